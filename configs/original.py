"""The original program's network and training, where they differ from the paper.

    python -m alexnet_jax.main --config=configs/original.py --workdir=runs/original

The original's experiment 145, whose logged errors are the paper's: see the variant
`original` for the network. The log of its run on ILSVRC-2012 has the learning rate
dropped by hand after epochs 25, 51 and 79 of 91; conv1 slowed down at epoch 67, with the
colour noise taken off, and frozen at 72, bias and all; the other biases learning at 0.02
to the end, and none with weight decay. (The run on ILSVRC-2010 ends with biases at 0.002.)
Two things are not as they were then: the images are shuffled anew every epoch, and every
image has its own crop (there 32 neighbours shared one).

Its own figures on the 50,000 validation images, not run here: top-1 error 40.66% and
top-5 18.21% over ten views (docs/imagenet.md, "What to
expect").

Without communication between the columns (experiment 150: 41.83% and 19.33%):

    --config.model.variant=no_communication

Source: github.com/computerhistory/AlexNet-Source-Code, layers/layers-145.cfg and
layers/layer-params-145.cfg.
"""

from configs import paper


def get_config():
    config = paper.get_config()
    config.model.variant = "original"
    config.num_epochs = 91.0
    config.schedule.name = "fixed"
    config.schedule.drop_epochs = (25.0, 51.0, 79.0)
    config.schedule.layer_factors = (("conv1", 67.0, 0.1), ("conv1", 72.0, 0.0))
    config.optim.bias_lr_mult = 2.0
    config.optim.constant_bias_lr = True
    config.optim.decay_bias = False
    config.augment.lighting_form = "original"
    config.augment.lighting_until_epoch = 67.0
    return config
