"""Train the one-column network of torchvision's widths with a modern recipe.

    python -m alexnet_jax.main --config=configs/owt.py --workdir=runs/owt

This trains on a prepared `imagenet2012_256`. For a folder of images, add

    --config.data.source=folder:PATH --config.data.eval_split=val

The network is that of Krizhevsky 2014, "One weird trick", arXiv:1404.5997, as torchvision
has it: 256 features in conv4, no response normalisation, and dropout before fc6 and fc7.

The training has these constants:

- batch 128; momentum 0.9; weight decay 1e-4
- learning rate 0.06, cosine to 0 over 150 epochs; it multiplies the velocity, as in torch,
  and not the gradient
- resized crops of at least 0.08 of the area (Szegedy et al. 2015)
- labels smoothed by 0.1 (Szegedy et al. 2016)
- our own choices: He initialisation, and a warm-up of five epochs (Goyal et al. 2017,
  arXiv:1706.02677)

The learning rate of 0.06 belongs to pixels divided by torchvision's standard deviations:
58.4, 57.1 and 57.4 of 255, about 57.6. Here pixels are 0..255 minus the mean. To compute
the same features from them, conv1 needs a kernel that is 57.6 times smaller. The gradient
of that kernel is 57.6 times larger. So conv1's rate is divided by 57.6 squared, which gives
the same steps. This also slows conv1's bias and weight decay, which did not need it.
Without the factor, the loss of step 7 was not a number (benchmarks/results).

Expected on the 50,000 validation images of ILSVRC-2012: top-1 error about 40% on the centre
view. A source that we have not checked reports an accuracy of 60.1% with these constants.
torchvision's own weights for this network have a top-1 error of 43.48% and a top-5 error of
20.93%. This recipe has not been run here on all of ImageNet.
"""

from alexnet_jax.training.config import get_config as defaults


def get_config():
    config = defaults()
    config.data.source = "imagenet2012_256"
    config.data.eval_split = "validation"
    config.augment.min_area = 0.08
    config.augment.lighting = 0.0
    config.model.variant = "owt"
    config.model.init = "he"
    config.num_epochs = 150.0
    config.optim.learning_rate = 0.06
    config.optim.weight_decay = 1e-4
    config.optim.form = "torch"
    config.optim.label_smoothing = 0.1
    config.schedule.name = "cosine"
    config.schedule.warmup_epochs = 5.0
    config.schedule.layer_factors = (("conv1", 0.0, 57.6**-2),)
    config.checkpoint.every_steps = 5000
    return config
