"""The one-column network of torchvision's widths, with a training of today.

    python -m alexnet_jax.main --config=configs/owt.py --workdir=runs/owt

on a prepared `imagenet2012_256`; on a folder of images, add

    --config.data.source=folder:PATH --config.data.eval_split=val

The network: Krizhevsky 2014, "One weird trick", arXiv:1404.5997, with torchvision's 256
features in conv4, no response normalisation, and dropout before fc6 and fc7. The
training: batch 128; learning rate 0.06, cosine to 0 over 150 epochs; weight decay 1e-4;
resized crops of at least 0.08 of the area (Szegedy et al. 2015); labels smoothed by 0.1
(Szegedy et al. 2016); momentum 0.9, the learning rate outside the velocity, as torch
has it. This code's own choice: He's start, and a warm-up of five epochs (Goyal et al.
2017, arXiv:1706.02677).

That learning rate belongs to pixels divided by torchvision's standard deviations (58.4,
57.1, 57.4 of 255), about 57.6. Here pixels are 0..255 minus the mean, so the same conv1 has
a kernel that much smaller and a gradient that much larger: a rate divided by 57.6 squared
gives it the same steps (conv1's bias and its weight decay, which did not need it, are
slowed as well). Without that, the loss of step 7 was not a number (benchmarks/results).

Expected on the 50,000 validation images of ILSVRC-2012, not run here: top-1 error
about 40% on the centre view; 60.1% right is reported of a training with these constants,
by a source that was not checked. torchvision's own weights for this network:
43.48%, and top-5 20.93%.
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
