"""Experiments: meshes, classes, statistics, the pipeline and the optimiser of a config."""

import contextlib
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from alexnet_jax.data import DataError, augment
from alexnet_jax.data.statistics import Statistics
from alexnet_jax.models import variants
from alexnet_jax.training import experiment, steps
from alexnet_jax.training.config import ConfigError
from tests.training.test_config import config_with


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("a", "b", "c"):
            (root / split / name).mkdir(parents=True)
            for i in range(4):
                picture = rng.integers(0, 256, (40, 32, 3), np.uint8)
                Image.fromarray(picture).save(root / split / name / f"{i}.png")
    return root


def small(folder, **changes):
    """The CIFAR net on a few pictures: builds and trains in seconds."""
    return config_with(
        **{
            "data__source": f"folder:{folder}",
            "data__image_size": 32,
            "data__crop_size": 32,
            "data__batch_size": 6,
            "model__variant": "cifar",
            "model__init": "he",
        }
        | changes
    )


def test_classes_are_counted_from_the_data(folder):
    built = experiment.build(small(folder), log=lambda line: None)
    assert built.model.network.layers[-1].features == 3
    assert (built.steps_per_epoch, built.total_steps) == (2.0, 180)
    more = experiment.build(small(folder, model__num_classes=10), log=lambda _: None)
    assert more.model.network.layers[-1].features == 10
    with pytest.raises(ConfigError, match="fewer than the 3 classes"):
        experiment.build(small(folder, model__num_classes=2))


def test_missing_folder_and_empty_class_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/nowhere does not exist"):
        experiment.build(small(tmp_path / "nowhere"))
    (tmp_path / "train" / "empty").mkdir(parents=True)
    with pytest.raises(DataError, match="empty holds no pictures"):
        experiment.build(small(tmp_path))


def test_statistics_are_taken_from_beside_the_data(folder):
    said = []
    built = experiment.build(small(folder), log=said.append)
    assert said == ["mean image: computing it from 12 of 12 images"]
    assert not (built.statistics.mean_image == 7).any()
    again, said = _built_beside(folder, Statistics(*SEVENS, 5, 12))
    assert said == [f"mean image: {folder}/statistics_32.npz, of 5 of 12 images"]
    assert (again.statistics.mean_image == 7).all()


def test_statistics_of_another_number_of_images_are_computed_again(folder):
    built, (line, hint) = _built_beside(folder, Statistics(*SEVENS, 60, 60))
    path = folder / "statistics_32.npz"
    assert line == (f"mean image: computing it from 12 of 12 images, since {path} is of 60 images")
    assert "prepare statistics stores" in hint
    pictures = [Image.open(p) for p in sorted(folder.glob("train/*/*.png"))]
    mean = np.mean([np.asarray(p)[4:36] for p in pictures], axis=0)  # of 40 x 32
    np.testing.assert_allclose(built.statistics.mean_image, mean, rtol=1e-6)
    assert built.statistics.split_examples == 12


SEVENS = (np.full((32, 32, 3), 7, np.float32), np.ones(3, np.float32), np.eye(3, dtype=np.float32))


def _built_beside(folder, stored):
    """Build with statistics beside the data; return (experiment, lines that were said)."""
    said, path = [], folder / "statistics_32.npz"
    stored.save(path)
    try:
        return experiment.build(small(folder), log=said.append), said
    finally:
        path.unlink()


def test_building_warns_about_images_in_both_splits(folder):
    said = []
    config = small(folder, data__eval_split="train")
    experiment.build(config, log=said.append)
    assert said[0].startswith("WARNING: 12 of 12 evaluation images are training images")


def test_pipeline_yields_what_training_sees(folder):
    """Images of step 3 minus the mean, some mirrored, each with one colour added."""
    config = small(folder, data__batch_size=4)
    batch, raw, mean = first_batches(config, 3)
    assert batch["image"].shape == (4, 32, 32, 3)
    assert batch["image"].dtype == np.float32
    np.testing.assert_array_equal(batch["label"], raw["label"])
    for got, picture in zip(np.asarray(batch["image"]), raw["image"], strict=True):
        candidates = [view - mean for view in (picture, picture[:, ::-1])]
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
    def crops(pictures):
        key = jax.random.fold_in(steps.purpose_key(config.seed, steps.AUGMENT), 0)
        keys = augment.example_keys(key, 0, 4)
        first = jax.vmap(lambda key: jax.random.split(key, 3)[0])(keys)
        return augment.random_resized_crop(pictures, first, 32, min_area=0.3)

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


def test_the_originals_recipe_reaches_the_step():
    config = importlib.import_module("configs.original").get_config()
    augmentation = experiment.make_augmentation(config, steps_per_epoch=10_009.0)
    assert augmentation.lighting_form == "original"
    assert augmentation.lighting_steps == 67 * 10_009
    model = experiment.make_model(config, 10)
    tx = experiment.make_optimizer(config, model, steps_per_epoch=2.0)
    layer = {"kernel": jnp.ones((1, 1)), "bias": jnp.ones(1)}
    params = {"conv1": layer, "conv2": layer}
    state = tx.init(params)
    step = jax.jit(tx.update)
    seen = {}
    for count in range(2 * 91):
        grads = jax.tree.map(jnp.ones_like, params)
        before = state
        updates, state = step(grads, state, params)
        if count in (0, 60, 120, 140, 150, 170):
            # This step's addition to the velocity, over 1 + weight decay.
            old, new = (
                [leaf for leaf in jax.tree.leaves(s) if leaf.shape in ((1, 1), (1,))]
                for s in (before, state)
            )
            seen[count] = [float((n - 0.9 * o).squeeze()) for o, n in zip(old, new, strict=True)]
            moved = [bool(u.any()) for u in jax.tree.leaves(updates["conv1"])]
            assert moved == [count < 144] * 2  # frozen at epoch 72, bias and all
    # bias and kernel of conv1, of conv2; epochs 0, 30, 60, 70, 75 and 85.
    decayed = 1.0005
    for count, conv1, conv2, conv1_bias in [
        (0, 0.01, 0.01, 0.02),
        (60, 0.001, 0.001, 0.02),
        (120, 1e-4, 1e-4, 0.02),
        (140, 1e-5, 1e-4, 0.02),
        (150, 0.0, 1e-4, 0.02),
        (170, 0.0, 1e-5, 0.02),
    ]:
        want = [-conv1_bias, -conv1 * decayed, -0.02, -conv2 * decayed]
        np.testing.assert_allclose(seen[count], want, rtol=1e-3, atol=2e-7)
