"""Train as the original program of 2012 did, where it differs from the paper.

    python -m alexnet_jax.main --config=configs/original.py --workdir=runs/original

This is the original's experiment 145, whose logged errors are the paper's. The variant
`original` (alexnet_jax/models/variants.py) is its network. The log of its run on
ILSVRC-2012 shows:

- The learning rate was dropped by hand after epochs 25, 51 and 79 of 91.
- conv1 slowed down at epoch 67 and was frozen at epoch 72, together with its biases.
- The colour noise was switched off at epoch 67.
- The learning rate of the other biases stayed at 0.02 to the end. In the run on
  ILSVRC-2010 it ends at 0.002.
- No biases had weight decay.

Two things differ from 2012. The images are shuffled anew every epoch. Every image has its
own crop; in 2012, 32 neighbouring images shared one.

The original's errors on the 50,000 validation images are 40.66% (top-1) and 18.21% (top-5)
over ten views (docs/imagenet.md, "What to expect"). This recipe has not been run here on
all of ImageNet.

To train without communication between the columns (experiment 150: 41.83% and 19.33%), add

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
