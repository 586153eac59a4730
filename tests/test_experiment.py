"""Configs: every field is read, every mistake is said, and load gives it back."""

import importlib
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from alexnet_jax import augment, experiment, steps, variants
from alexnet_jax.data import DataError
from alexnet_jax.data.statistics import Statistics
from configs import common

ROOT = Path(__file__).parent.parent
CONFIGS = [
    *("common", "paper", "original", "quickstart", "cifar10", "folder", "memorize"),
    *("cifar10_11", "cifar10_13", "caffe", "caffenet", "owt", "large_batch", "tiny"),
    "finetune",
]


def config_with(**changes):
    """The common config on one device with changes: data__batch_size=3, ..."""
    config = common.get_config()
    config.parallel.data = 1
    with config.unlocked():
        for name, value in changes.items():
            group = config
            *path, last = name.split("__")
            for part in path:
                group = group[part]
            group[last] = value
    return config


def fields(config, prefix=""):
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from fields(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_every_config_file_is_tested():
    found = {path.stem for path in (ROOT / "configs").glob("*.py")}
    assert found == set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_configs_are_valid_and_have_only_common_fields(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    assert set(fields(config)) == set(fields(common.get_config()))
    experiment.validate(config)  # on the eight devices of the tests


@pytest.mark.parametrize("field", [*fields(common.get_config())])
def test_every_field_is_read(field):
    """A field that nothing reads is a promise that nothing keeps."""
    code = "".join(
        (ROOT / "alexnet_jax" / name).read_text()
        for name in (
            "experiment.py",
            "finetune.py",
            "train.py",
            "main.py",
            "describe.py",
        )
    )
    group, _, name = field.rpartition(".")
    if group == "model.overrides":  # passed on by name
        from alexnet_jax.ablations import ABLATIONS

        assert name in ABLATIONS
        return
    owner = group.rpartition(".")[2] if group else "config"
    aliases = {"optim": "optim", "model": "(?:model|fields)", "augment": "fields"}
    owner = aliases.get(owner, owner)
    assert re.search(rf"\b{owner}\.{name}\b", code), field


def test_every_field_has_its_line_of_explanation():
    lines = (ROOT / "configs" / "common.py").read_text().splitlines()
    for number, line in enumerate(lines):
        if re.match(r"    \w+(\.\w+)* = ", line) and "ConfigDict()" not in line:
            assert lines[number - 1].lstrip().startswith("#"), line


def test_all_mistakes_at_once_in_words():
    config = config_with(
        optim__momentum=1.5,
        data__crop_size=300,
        schedule__name="step",
        model__variant="alexnet",
        num_epochs=float("nan"),
    )
    with pytest.raises(experiment.ConfigError) as error:
        experiment.validate(config)
    message = str(error.value)
    assert message.startswith("5 mistakes in the config:")
    for words in (
        "--config.optim.momentum=1.5 is out of range: 0 to below 1.",
        "--config.data.crop_size=300 is larger than --config.data.image_size=256.",
        "--config.schedule.name='step' must be one of constant, plateau, fixed, cosine",
        "There is no variant 'alexnet'; the variants are paper",
        "--config.num_epochs=nan is out of range: above 0.",
    ):
        assert words in message


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"data__batch_size": 10, "parallel__data": 4},
            "batch_size=10 does not divide over 4 devices; the nearest that do: 8 or",
        ),
        (
            {"data__batch_size": 120, "optim__accumulate_steps": 8}
            | {"parallel__data": 2},
            r"over 2 devices in --config.optim.accumulate_steps=8 parts; .* 112 or 128\.$",
        ),
        (
            {"data__batch_size": 4, "optim__accumulate_steps": 8},
            r"over 1 devices in .* the nearest that do: 8\.$",
        ),
        ({"optim__accumulate_steps": 0}, "steps=0 is out of range: at least 1"),
        ({"summaries_every_steps": -1}, "steps=-1 is out of range: 0 or more"),
        ({"stall_after_steps": -1}, "steps=-1 is out of range: 0 or more"),
        ({"profile": -1}, "profile=-1 is out of range: 0 or more"),
        ({"parallel__data": 16}, r"Asked for 16 devices \(16 data x 1 column\), found"),
        ({"data__crop_size": 200}, "from images of 224 to 227 pixels; images of 200"),
        (
            {"model__variant": "caffe", "data__crop_size": 227}
            | {"parallel__mode": "columns", "parallel__column": 2},
            "'caffe' cannot be split over 2 columns: its local response",
        ),
        ({"schedule__drop_epochs": (3.0, 2.0)}, "above 0 and increasing"),
        (
            {"schedule__warmup_epochs": 100.0, "schedule__name": "cosine"},
            "must be below --config.num_epochs=90",
        ),
        ({"optim__label_smoothing": 1.0}, "=1.0 is out of range: 0 .none. to below 1"),
        ({"optim__trust_coefficient": -0.1}, "out of range: 0 .off. or more"),
        ({"schedule__power": 0.0}, "power=0.0 is out of range: above 0"),
        (
            {"augment__min_area": 0.0},
            "min_area=0.0 is out of range: above 0, at most 1",
        ),
        ({"model__dtype": "float64"}, "needs JAX_ENABLE_X64=1"),
        ({"model__overrides__dropout": 2.0}, "dropout=2.0 is not a rate"),
        ({"model__init": "xavier"}, "init='xavier' must be one of paper, caffe, he"),
    ],
)
def test_each_mistake_is_said(changes, words):
    with pytest.raises(experiment.ConfigError, match=words) as error:
        experiment.validate(config_with(**changes))
    assert str(error.value).startswith("1 mistake in the config:")


COSINE = {"schedule__name": "cosine"}
# Changes to the common config, and what is said about them.
IDLE = [
    ({"schedule__warmup_epochs": 5.0},
     ("--config.schedule.warmup_epochs=5.0 has no effect with --config.schedule.name="
      "'plateau'; it needs cosine or polynomial, or to be left at 0.0.")),
    (COSINE | {"schedule__factor": 0.5}, "it needs plateau or fixed"),
    (COSINE | {"schedule__patience": 2}, "it needs plateau, or to be left at 5"),
    (COSINE | {"schedule__max_drops": 2}, "it needs plateau, or to be left at 3"),
    (COSINE | {"schedule__drop_epochs": (2.0,)}, "drop_epochs=(2.0,) has no effect"),
    (COSINE | {"schedule__power": 3.0}, "it needs polynomial"),
    ({"schedule__max_drops": 0, "schedule__patience": 2}, "it needs 1 or more"),
    ({"schedule__layer_factors": (("conv1", 90, 0.1),)}, "effect with --config.num_epochs"),
    ({"schedule__name": "fixed", "num_epochs": 25.0},
     "drop_epochs=(25.0, 51.0, 79.0) are all after the end, --config.num_epochs=25.0"),
    ({"data__eval_split": ""},
     ("'plateau' lowers the learning rate by evaluations, and --config.data.eval_split='' "
      "with --config.eval_every_epochs=1.0 leaves none. Evaluate, or take another schedule, such as constant or cosine, or "
      "--config.schedule.max_drops=0.")),
    ({"eval_every_epochs": 0.0}, "--config.data.eval_split='test' with --config.eval_every_epochs=0.0 leaves none."),
    (COSINE | {"data__eval_split": "", "eval_every_epochs": 2.0},
     "eval_every_epochs=2.0 has no effect with --config.data.eval_split=''"),
    ({"augment__min_area": 0.5, "augment__crop": False}, "effect with --config.augment.crop"),
    ({"augment__lighting": 0.0, "augment__lighting_form": "original"}, "lighting=0.0; it"),
    ({"augment__lighting": 0.0, "augment__lighting_until_epoch": 6.0}, "lighting=0.0; it"),
    ({"augment__lighting_until_epoch": 90.0}, "effect with --config.num_epochs=90.0"),
    ({"optim__momentum": 0.0, "optim__form": "torch"}, "form='torch' has no effect"),
    ({"model__variant": "cifar", "data__image_size": 32, "data__crop_size": 32,
      "optim__weight_decay": 0.0}, "layers without a weight decay of their own"),
    ({"schedule__name": "constant", "optim__constant_bias_lr": True}, "another schedule"),
    ({"eval_every_epochs": 100.0}, "effect with --config.num_epochs=90.0; it needs a"),
    ({"data__image_size": 224, "eval_views": 10}, "it needs larger pictures"),
    ({"finetune__new_layers": ("fc7",)}, "it needs weights to start from"),
    ({"data__dir": "DATA", "data__source": "folder:PATH"}, "dir='DATA' has no effect"),
    ({"data__dir": "DATA", "data__source": "fake"}, "it needs a tfds data set or textures"),
    ({"model__variant": "cifar_13", "model__overrides__dropout": 0.5,
      "data__image_size": 32, "data__crop_size": 24},
     ("dropout=0.5 has no effect with --config.model.variant='cifar_13'; it needs a "
      "network with dropout, or to be left out.")),
    ({"model__overrides__norm_place": "before", "model__overrides__lrn": False},
     "with --config.model.variant='paper', --config.model.overrides.lrn=False; it needs"),
]  # fmt: skip


@pytest.mark.parametrize("changes, words", IDLE)
def test_a_field_without_effect_is_refused_in_training_only(changes, words):
    config = config_with(**changes)
    with pytest.raises(experiment.ConfigError, match=re.escape(words)) as error:
        experiment.validate(config)
    assert str(error.value).startswith("1 mistake in the config:")
    experiment.validate(config, training=False)


def test_a_field_that_has_an_effect_or_asks_for_nothing_is_not_refused():
    for changes in (
        COSINE | {"schedule__warmup_epochs": 5.0, "eval_every_epochs": 0.0},
        COSINE | {"data__eval_split": "", "schedule__drop_epochs": ()},
        {"data__eval_split": "", "schedule__max_drops": 0, "eval_views": 10},
        {"schedule__name": "fixed", "num_epochs": 26.0, "schedule__factor": 0.5},
        {"schedule__name": "fixed", "schedule__drop_epochs": ()},
        {"schedule__name": "polynomial", "schedule__power": 3.0},
        {"schedule__layer_factors": (("conv1", 9.0, 0.1), ("conv1", 95.0, 0.0))},
        {"optim__weight_decay": 0.0, "optim__decay_bias": False},
        {"data__dir": "DATA"},
        {"model__variant": "owt", "model__overrides__lrn": False},
        {"model__overrides__norm_place": "after", "model__overrides__dropout": 0.5},
        {"finetune__source": "runs/a", "finetune__new_layers": ["fc7"]},
    ):
        experiment.validate(config_with(**changes))


def test_defaults_ask_for_nothing():
    defaults = experiment.flat(common.get_config().to_dict())
    for need in experiment._NEEDS:
        assert defaults[need.field] == need.idle[0], need.field
        assert {*need.others} <= defaults.keys()


def test_open_mesh_takes_what_there_is():
    paper = experiment.make_model(config_with(), None).network

    def shape(**changes):
        return experiment.mesh_shape(config_with(**changes), paper)

    everything = {"parallel__data": -1}
    assert shape(**everything) == (jax.device_count(), 1)
    assert shape(parallel__mode="columns", **everything) == (4, 2)
    assert shape(parallel__mode="columns", parallel__data=8) == (8, 1)
    assert shape(parallel__mode="columns", parallel__data=3) == (3, 2)
    assert shape(parallel__mode="columns", parallel__column=1) == (1, 1)


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
    with pytest.raises(experiment.ConfigError, match="fewer than the 3 classes"):
        experiment.build(small(folder, model__num_classes=2))


def test_wrong_folders_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/nowhere does not exist"):
        experiment.build(small(tmp_path / "nowhere"))
    (tmp_path / "train" / "empty").mkdir(parents=True)
    with pytest.raises(DataError, match="empty holds no pictures"):
        experiment.build(small(tmp_path))


def test_statistics_are_taken_from_beside_the_data(folder):
    said = []
    built = experiment.build(small(folder), log=said.append)
    assert said == ["mean image: computing it from 12 of 12 images"]
    again, said = _built_beside(folder, Statistics(*SEVENS, 12))
    assert said == [f"mean image: {folder}/statistics_32.npz, of 12 images"]
    assert (again.statistics.mean_image == 7).all()
    assert not (built.statistics.mean_image == 7).any()


def test_partial_statistics_are_kept(folder):
    built, said = _built_beside(folder, Statistics(*SEVENS, 5, 12))
    assert said == [f"mean image: {folder}/statistics_32.npz, of 5 of 12 images"]
    assert (built.statistics.mean_image == 7).all()


def test_statistics_of_another_number_of_images_are_computed_again(folder):
    built, (line, hint) = _built_beside(folder, Statistics(*SEVENS, 60))
    path = folder / "statistics_32.npz"
    assert line == (
        f"mean image: computing it from 12 of 12 images, since {path} is of 60 images"
    )
    assert "prepare statistics stores" in hint
    pictures = [Image.open(p) for p in sorted(folder.glob("train/*/*.png"))]
    mean = np.mean([np.asarray(p)[4:36] for p in pictures], axis=0)  # of 40 x 32
    np.testing.assert_allclose(built.statistics.mean_image, mean, rtol=1e-6)
    assert built.statistics.split_examples == 12


SEVENS = (
    np.full((32, 32, 3), 7, np.float32),
    np.ones(3, np.float32),
    np.eye(3, dtype=np.float32),
)


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


def test_pipeline_gives_what_training_sees(folder):
    config = small(folder, data__batch_size=4)
    batches = experiment.pipeline(config, start_step=3)
    batch = next(batches)
    batches.close()
    assert batch["image"].shape == (4, 32, 32, 3)
    assert batch["image"].dtype == np.float32
    # By hand: the pictures of step 3 less the mean, some mirrored, all lit.
    built = experiment.build(config, log=lambda line: None)
    with built.train_batches(3) as host:
        raw = next(host)
    np.testing.assert_array_equal(batch["label"], raw["label"])
    mean = built.statistics.mean_image
    for got, picture in zip(np.asarray(batch["image"]), raw["image"], strict=True):
        # Mirrored or not, less the mean as it is, and lit by one colour throughout.
        candidates = [view - mean for view in (picture, picture[:, ::-1])]
        spread = [
            np.ptp(got - candidate, axis=(0, 1)).max() for candidate in candidates
        ]
        assert min(spread) < 1e-3 < max(spread)


def test_tables_own_weight_decay_can_be_left_out():
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


def test_pipeline_gives_resized_crops(folder):
    config = small(folder, data__batch_size=4, data__crop_size=32)
    config.augment.update({"min_area": 0.3, "flip": False, "lighting": 0.0})
    batches = experiment.pipeline(config)
    batch = next(batches)
    batches.close()
    built = experiment.build(config, log=lambda line: None)
    with built.train_batches(0) as host:
        raw = next(host)

    @jax.jit
    def crops(pictures):
        key = jax.random.fold_in(steps.purpose_key(config.seed, steps.AUGMENT), 0)
        keys = augment.example_keys(key, 0, 4)
        first = jax.vmap(lambda key: jax.random.split(key, 3)[0])(keys)
        return augment.random_resized_crop(pictures, first, 32, min_area=0.3)

    expected = crops(raw["image"]) - built.statistics.mean_image
    np.testing.assert_allclose(batch["image"], expected, atol=1e-3)


def test_load_refuses_what_is_no_workdir(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not the workdir of a run"):
        experiment.load(tmp_path)


@pytest.mark.parametrize(
    "mode, data, column, shape",
    [
        ("data", -1, -1, (8, 1)),
        ("columns", -1, -1, (4, 2)),
        ("columns", 8, -1, (8, 1)),
        ("hybrid", -1, -1, (1, 8)),
        ("hybrid", 2, -1, (2, 4)),
        ("hybrid", -1, 2, (4, 2)),
    ],
)
def test_meshes_of_eight_devices(mode, data, column, shape):
    config = config_with(
        parallel__mode=mode, parallel__data=data, parallel__column=column
    )
    assert experiment.mesh_shape(config, variants.get("paper")) == shape


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"parallel__mode": "hybrid", "parallel__data": -1, "data__batch_size": 12},
         "batch_size=12 does not divide over 8 devices; the nearest that do: 8 or 16"),
        ({"parallel__mode": "hybrid", "parallel__column": 3},
         "4096 units of fc6 do not divide by 3"),
        ({"parallel__mode": "columns", "parallel__transform": "pmap"},
         "transform=pmap splits nothing but the batch"),
        ({"optim__trust_coefficient": 0.001, "parallel__mode": "columns",
          "parallel__column": 2},
         "whole layers, which --config.parallel.mode=columns splits over 2 columns"),
        ({"optim__trust_coefficient": 0.001, "parallel__mode": "hybrid",
          "parallel__column": 4, "parallel__data": 2}, "hybrid splits over 4 columns"),
        ({"parallel__transform": "vmap"}, "must be one of shard_map, pmap"),
        ({"schedule__layer_factors": (("conv9", 1.0, 0.1),)},
         r"layer_factors: .'conv9'.*the layer one of conv1, conv2"),
        ({"schedule__layer_factors": (("conv1", 5.0, 0.1), ("conv1", 5.0, 0.0))},
         "its epochs 0 or more and increasing"),
        ({"schedule__layer_factors": ("conv1", 5.0, 0.1)}, "must be .layer, epoch"),
        ({"augment__lighting_form": "caffe"}, "must be one of paper, original"),
        ({"augment__lighting_until_epoch": -2.0}, "-1 or at least 0"),
    ],
)  # fmt: skip
def test_mistakes_about_devices_and_the_original(changes, words):
    with pytest.raises(experiment.ConfigError, match=words):
        experiment.validate(config_with(**changes))


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
            # What this step adds to the velocity, over 1 + weight decay.
            old, new = (
                [leaf for leaf in jax.tree.leaves(s) if leaf.shape in ((1, 1), (1,))]
                for s in (before, state)
            )
            seen[count] = [
                float((n - 0.9 * o).squeeze()) for o, n in zip(old, new, strict=True)
            ]
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
