"""Train on the embedded images in seconds: the trained network of `notebooks/`.

    python -m alexnet_jax.main --config=configs/tiny.py --workdir=runs/tiny

This is cuda-convnet's "18%" network with batch normalisation in place of its response
normalisation. It trains on 200 images shrunk to 64 x 64. Measured: after its 200 steps, 11%
of 100 unseen images are wrong (chance: 90%). configs/quickstart.py trains the paper's
layers, which takes minutes.
"""

from alexnet_jax.training.config import get_config as defaults


def get_config():
    config = defaults()
    config.num_epochs = 20.0
    config.log_every_steps = 20
    # Evaluated once, at the end.
    config.eval_every_epochs = 0.0
    config.model.variant = "cifar"
    config.model.init = "he"
    config.model.overrides.normalization = "batch"
    config.data.source = "textures/tiny"
    config.data.batch_size = 20
    config.data.image_size = 64
    config.data.crop_size = 32
    config.augment.lighting = 0.0
    config.schedule.name = "cosine"
    config.parallel.data = 1
    return config
