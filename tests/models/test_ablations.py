"""The paper's ablations: each row builds what it says, and trains a step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_jax.data import augment
from alexnet_jax.models.summary import summary
from alexnet_jax.sweeps import plan as plan_lib
from alexnet_jax.training import experiment, parallel, steps
from alexnet_jax.training.config import validate
from configs.sweeps import ablations, lrn_constants, pooling
from tests.models.test_variants import COUNTS

PAPER = COUNTS["paper"]
# Parameters and multiply-adds of an image, by hand from those of the paper's layers.
ROW_COUNTS = {
    "one GPU": COUNTS["one_gpu"],
    "one column, whole": COUNTS["one_tower"],
    "no column communication": COUNTS["no_communication"],
    # A scale and a shift for each of 96 + 256 maps.
    "batch norm": (60_965_224 + 2 * (96 + 256), 724_406_816),
    # conv3 reads conv1's 96 maps, pooled twice.
    "without conv2": (
        60_965_224 - 307_456 - 9 * 160 * 384,
        724_406_816 - 223_948_800 - 169 * 9 * 160 * 384,
    ),
    # conv4 reads conv2's 128 maps a column instead of 192.
    "without conv3": (
        60_965_224 - 885_120 - 9 * 64 * 384,
        724_406_816 - 149_520_384 - 169 * 9 * 64 * 384,
    ),
    "without conv4": (60_965_224 - 663_936, 724_406_816 - 112_140_288),
    # fc6 reads conv4's 384 maps instead of 256.
    "without conv5": (
        60_965_224 - 442_624 + 36 * 128 * 4096,
        724_406_816 - 74_760_192 + 36 * 128 * 4096,
    ),
    "six convolutions": COUNTS["six_conv"],
    "original, no overlap": COUNTS["no_overlap"],
    "ZFNet": COUNTS["zfnet"],
}
PLAN = plan_lib.Plan("ablations", ablations.get_sweep(), seeds=(0,))


CONSTANTS = {
    f"{module.__name__}: {row.name}": (module, row)
    for module in (lrn_constants, pooling)
    for row in module.get_sweep().rows
}


def config_of(name, **more):
    if name in CONSTANTS:
        module, row = CONSTANTS[name]
        (run,) = plan_lib.Plan(name, module.get_sweep(), seeds=(0,)).of_row(row)
    else:
        (run,) = PLAN.of_row(ablations.ROWS[name])
    return plan_lib.make_config(run.config, {**run.overrides, **more}, name)


@pytest.mark.parametrize("name", ablations.ROWS)
def test_geometry_and_parameters(name):
    config = config_of(name)
    validate(config)
    rows = summary(experiment.make_model(config, 1000), config.data.crop_size)
    found = sum(r.parameters for r in rows), sum(r.multiply_adds for r in rows)
    assert found == ROW_COUNTS.get(name, PAPER)
    shapes = {row.name: row.shape for row in rows}
    pooled = [shape for shape in shapes.values() if len(shape) == 3][-1]
    assert pooled == (6, 6, 384 if name == "without conv5" else 256)
    assert [shapes[fc] for fc in ("fc7", "fc8")] == [(4096,), (1000,)]


def test_published_figures():
    found = {
        name: (row.paper.value, row.paper.effect, row.baseline)
        for name, row in ablations.ROWS.items()
        if row.paper is not None and "experiment" in row.paper.source
    }
    assert found == {
        "one GPU": (39.17, 1.7, None),
        "no column communication": (41.83, 1.17, "original"),
        "no LRN": (42.03, 1.4, None),
        "original": (40.66, None, None),
        "original, LRN before ReLU": (41.10, None, "original"),
        "original, LRN after conv1 only": (40.49, None, "original"),
        "original, no overlap": (41.06, 0.40, "original"),
    }
    for name in ("no colour lighting", "without conv3"):
        assert ablations.ROWS[name].paper.measured_on == ablations.NOT_NAMED


def test_no_two_rows_build_the_same():
    seen = {}
    for name in ablations.ROWS:
        config = config_of(name)
        network = experiment.make_model(config, 1000).network
        said = network.layers, network.columns, repr(config.augment)
        assert seen.setdefault(said, name) == name


# Each has stages or connections of its own; the other rows repeat them.
SLOW = {
    *("no column communication", "LRN before ReLU", "original", "batch norm", "average pooling"),
    *("tanh units", "six convolutions", "ZFNet", "without conv2"),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in SLOW else pytest.mark.nightly)
        for name in [*ablations.ROWS, *CONSTANTS]
    ],
)
def test_each_row_trains_a_step(name):
    narrow = {"model.width": 1 / 32, "model.init": "he", "parallel.mode": "data"}
    config = config_of(name, **narrow)
    model = experiment.make_model(config, 10)
    tx = experiment.make_optimizer(config, model, steps_per_epoch=10.0)
    augmentation = experiment.make_augmentation(config, 10.0)
    spec = steps.StepSpec(model, tx, augmentation, parallel.make_mesh(1))
    state, step = steps.init_state(spec), steps.make_train_step(spec)
    before = jax.device_get(state.params)
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(rng.integers(0, 256, (2, 226, 226, 3), np.uint8)),
        "label": jnp.array([3, 7]),
    }
    state, scalars = step(state, batch, augment.imagenet_statistics(226))
    assert np.isfinite(scalars["loss"])
    for layer, weights in jax.device_get(state.params).items():
        leaf = "kernel" if "kernel" in weights else "scale"
        new, old = weights[leaf], before[layer][leaf]
        assert np.isfinite(new).all() and (new != old).any(), layer
