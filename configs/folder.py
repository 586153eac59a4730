"""Train on your own images, one folder per class.

    python -m alexnet_jax.main --config=configs/folder.py --workdir=runs/mine \
        --config.data.source=folder:PATH

PATH holds train/<class>/*.jpg and test/<class>/*.jpg; test may also be named val. The
number of classes is the number of folders. Images of any size are resized to 256 x 256. A
narrower network (`--config.model.width=0.5`) is often enough for some dozens of classes.
"""

from alexnet_jax.training.config import get_config as defaults


def get_config():
    config = defaults()
    config.data.source = "folder:PATH"
    # He initialisation trains at any width. The paper's needs ImageNet and full width.
    config.model.init = "he"
    config.optim.learning_rate = 1e-3
    config.num_epochs = 30.0
    config.schedule.name = "cosine"
    config.schedule.warmup_epochs = 0.5
    config.log_every_steps = 20
    return config
