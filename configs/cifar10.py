"""Train cuda-convnet's "18%" network on CIFAR-10, from a folder of images.

    python -m alexnet_jax.main --config=configs/cifar10.py --workdir=runs/cifar10 \
        --config.data.source=folder:PATH

PATH holds train/<class>/* and test/<class>/*, images of 32 x 32 pixels. The constants are
from cuda-convnet's `layers-18pct.cfg`. There is no augmentation. The learning rate is 0.001
for weights and 0.002 for biases. Both are divided by ten after 120 epochs and again after
10 more. The file reports 18% test error. It does not say when training ends; 140 epochs
are our choice.

`--config=configs/cifar10.py:3` trains for three epochs. The learning rate then drops at the
same fractions of the run.
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
