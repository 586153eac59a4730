"""Small runs: class folders of three colours, configs on them, and comparisons of runs."""

import jax
import numpy as np
from PIL import Image

from alexnet_jax.training.writers import read_metrics
from configs import common
from tests.training import small

IMAGES, CLASSES = 25, 3  # 25 does not divide by 6: the last batch is padded
EPOCHS, STEPS = 4.0, 17  # of `small_config`


def draw_colours(root):
    """Draw three classes of noisy colours into root: easy, but not trivial."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for index in range(IMAGES):
            label = index % CLASSES
            image = rng.integers(0, 120, (32, 32, 3))
            image[..., label] += 100
            target = root / split / ["red", "green", "blue"][label]
            target.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.astype(np.uint8)).save(target / f"{index:03d}.png")


def small_config(folder, *, eval_split="test", **changes):
    config = common.get_config()
    config.data.source = f"folder:{folder}"
    config.data.image_size = 34
    config.data.crop_size = 32
    config.data.batch_size = 6
    config.model.variant = "cifar"
    config.model.init = "he"
    config.optim.learning_rate = 1e-3
    config.num_epochs = EPOCHS
    config.log_every_steps = 5
    config.eval_every_epochs = 1.0
    config.parallel.data = 1
    config.data.eval_split = eval_split
    for name, value in changes.items():
        setattr(config, name, value)
    if eval_split and config.eval_every_epochs:
        config.schedule.patience = 1
    else:  # the plateau rule needs evaluations
        config.schedule.name = "constant"
    return config


def columns_config(folder, **changes):
    """Return a config of the paper's layers for small images, in two columns."""
    config = small_config(folder, **{"eval_every_epochs": 2.0} | changes)
    config.data.image_size, config.data.crop_size = small.SIZE, small.CROP
    config.model.variant = small.NETWORK_OF_FILE
    config.parallel.mode = "columns"
    config.parallel.column = 2
    config.optim.learning_rate = 1e-3
    config.num_epochs = 5.0
    return config


def leaves(state):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def records(workdir, prefix):
    """Return the records with this prefix, without fields that depend on the clock."""
    clock = {"images_per_sec", "data_wait_frac"}
    rows = read_metrics(workdir / "metrics.jsonl")
    return [
        {k: v for k, v in row.items() if k not in clock}
        for row in rows
        if any(key.startswith(prefix) for key in row)
    ]


def assert_same_state(got, want):
    for a, b in zip(leaves(got), leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)
