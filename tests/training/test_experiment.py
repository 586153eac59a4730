"""Experiments: meshes, classes, statistics, the pipeline and the optimiser of a config."""

import contextlib
import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from alexnet_jax.data import augment
from alexnet_jax.data.statistics import Statistics
from alexnet_jax.models import variants
from alexnet_jax.training import experiment, steps
from alexnet_jax.training.config import ConfigError
from tests.training.runs import CLASSES, EPOCHS, IMAGES, small_config
from tests.training.test_config import config_with


def small(folder, **changes):
    """Return a config of the CIFAR net on raw images of its own size."""
    config = small_config(folder)
    config.data.image_size = 32
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config


def test_classes_are_counted_from_the_data(folder):
    built = experiment.build(small(folder), log=lambda line: None)
    assert built.model.network.layers[-1].features == CLASSES
    assert built.steps_per_epoch == IMAGES / 6
    assert built.total_steps == math.ceil(EPOCHS * IMAGES / 6)
    more = experiment.build(small(folder, model__num_classes=10), log=lambda _: None)
    assert more.model.network.layers[-1].features == 10
    with pytest.raises(ConfigError, match="fewer than the 3 classes"):
        experiment.build(small(folder, model__num_classes=2))


SEVENS = (np.full((32, 32, 3), 7, np.float32), np.ones(3, np.float32), np.eye(3, dtype=np.float32))


@pytest.mark.parametrize(
    "stored, words",
    [
        (None, "computing it from 25 of 25 images"),
        (Statistics(*SEVENS, 5, IMAGES), "{path}, of 5 of 25 images"),
        # Stored for another number of images: computed again.
        (
            Statistics(*SEVENS, 60, 60),
            "computing it from 25 of 25 images, since {path} is of 60 images",
        ),
    ],
)
def test_statistics_are_read_beside_the_data_or_computed(stored, words, folder):
    said, path = [], folder / "statistics_32.npz"
    if stored:
        stored.save(path)
    built = experiment.build(small(folder), log=said.append)
    path.unlink(missing_ok=True)
    assert said[0] == f"mean image: {words.format(path=path)}"
    images = [np.asarray(Image.open(path)) for path in folder.glob("train/*/*.png")]
    mean = 7 if " 5 of" in words else np.mean(images, axis=0)
    np.testing.assert_allclose(built.statistics.mean_image, mean, rtol=1e-6)
    assert built.statistics.split_examples == IMAGES


def test_building_warns_about_images_in_both_splits(folder):
    said = []
    experiment.build(small(folder, data__eval_split="train"), log=said.append)
    assert said[0].startswith("WARNING: 25 of 25 evaluation images are training images")


def test_pipeline_yields_what_training_sees(folder):
    """Compare with raw images minus the mean, mirrored or not, up to one added colour."""
    config = small(folder, data__batch_size=4)
    batch, raw, mean = first_batches(config, 3)
    assert batch["image"].shape == (4, 32, 32, 3)
    assert batch["image"].dtype == np.float32
    np.testing.assert_array_equal(batch["label"], raw["label"])
    for got, original in zip(np.asarray(batch["image"]), raw["image"], strict=True):
        candidates = [view - mean for view in (original, original[:, ::-1])]
        spread = [np.ptp(got - image, axis=(0, 1)).max() for image in candidates]
        assert min(spread) < 1e-3 < max(spread)


def first_batches(config, step):
    """Return (batch of the pipeline, the same raw, mean image)."""
    with contextlib.closing(experiment.pipeline(config, start_step=step)) as batches:
        batch = next(batches)
    built = experiment.build(config, log=lambda line: None)
    with built.train_batches(step) as host:
        return batch, next(host), built.statistics.mean_image


def test_weight_decay_of_the_table_can_be_ignored():
    config = importlib.import_module("configs.cifar10").get_config()
    model = experiment.make_model(config, 10)
    params = {"fc10": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}

    def shrink(own):
        config.optim.layer_weight_decay = own
        tx = experiment.make_optimizer(config, model, steps_per_epoch=1.0)
        grads = jax.tree.map(jnp.zeros_like, params)
        updates, _ = tx.update(grads, tx.init(params), params)
        return float(updates["fc10"]["kernel"][0, 0])

    # fc10's own decay is 1, the optimiser's 0.0005; the rate 0.001.
    assert shrink(own=True) == pytest.approx(-1e-3)
    assert shrink(own=False) == pytest.approx(-5e-7)


def test_pipeline_yields_resized_crops(folder):
    config = small(folder, data__batch_size=4)
    config.augment.update({"min_area": 0.3, "flip": False, "lighting": 0.0})
    batch, raw, mean = first_batches(config, 0)

    @jax.jit
    def crops(images):
        key = jax.random.fold_in(steps.purpose_key(config.seed, steps.AUGMENT), 0)
        keys = augment.example_keys(key, 0, 4)
        first = jax.vmap(lambda key: jax.random.split(key, 3)[0])(keys)
        return augment.random_resized_crop(images, first, 32, min_area=0.3)

    expected = crops(raw["image"]) - mean
    np.testing.assert_allclose(batch["image"], expected, atol=1e-3)


@pytest.mark.parametrize(
    "mode, data, column, shape",
    [
        ("data", -1, -1, (8, 1)),
        ("columns", -1, -1, (4, 2)),
        ("columns", 8, -1, (8, 1)),
        ("columns", 3, -1, (3, 2)),
        ("columns", 1, 1, (1, 1)),
        ("hybrid", -1, -1, (1, 8)),
        ("hybrid", 2, -1, (2, 4)),
        ("hybrid", -1, 2, (4, 2)),
    ],
)
def test_meshes_of_eight_devices(mode, data, column, shape):
    config = config_with(parallel__mode=mode, parallel__data=data, parallel__column=column)
    assert experiment.mesh_shape(config, variants.get("paper")) == shape
