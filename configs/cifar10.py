"""CIFAR-10 with cuda-convnet's "18%" network, from a folder of images.

    python -m alexnet_jax.main --config=configs/cifar10.py --workdir=runs/cifar10 \
        --config.data.source=folder:PATH

PATH/train/<class>/* and PATH/test/<class>/*, 32 x 32 pixels. Constants: cuda-convnet's
`layers-18pct.cfg` (no augmentation; learning rate 0.001, of the biases 0.002; divided
by ten after 120 epochs and again after 10 more), which says 18% test error. It does not
say where it ends: 140 epochs are this code's choice. `--config=configs/cifar10.py:3` is
the same in three epochs: the learning rate drops at the same shares of the run.
"""

from alexnet_jax.training.config import get_config as defaults


def get_config(num_epochs="140"):
    config = defaults()
    config.num_epochs = float(num_epochs)
    config.data.source = "folder:PATH"
    config.data.image_size = 32
    config.data.crop_size = 32
    config.augment.crop = False
    config.augment.flip = False
    config.augment.lighting = 0.0
    config.model.variant = "cifar"
    config.optim.learning_rate = 0.001
    config.optim.bias_lr_mult = 2.0
    config.optim.decay_bias = False
    config.schedule.name = "fixed"
    config.schedule.drop_epochs = tuple(config.num_epochs * epoch / 140 for epoch in (120, 130))
    return config
