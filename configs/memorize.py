"""Check a prepared data set: a narrow network must memorise a small one.

    python -m alexnet_jax.main --config=configs/memorize.py --workdir=DIR \
        --config.data.source=NAME

Training has no augmentation, no dropout and no weight decay, so nothing keeps the network
from memorising. The training error must go to zero. The error on evaluation images that are
also in the training split must follow. If either does not, labels, statistics or evaluation
disagree.
"""

from alexnet_jax.training.config import get_config as defaults


def get_config():
    config = defaults()
    config.data.source = "imagenet2012_256"
    config.data.eval_split = "validation"
    config.data.batch_size = 50
    config.parallel.data = 1
    config.model.width = 0.25
    config.model.init = "he"
    config.model.overrides.dropout = 0.0
    config.augment.crop = config.augment.flip = False
    config.augment.lighting = 0.0
    config.optim.learning_rate = 1e-3
    config.optim.weight_decay = 0.0
    config.schedule.name = "cosine"
    config.schedule.warmup_epochs = 1.0
    config.num_epochs = 40.0
    config.eval_every_epochs = 10.0
    config.log_every_steps = 20
    return config
