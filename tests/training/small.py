"""The paper's eight layers for images of 48 pixels: the same stages, columns and exchanges."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from alexnet_jax.data import augment
from alexnet_jax.models.alexnet import AlexNet, create_model
from alexnet_jax.models.layers import Conv, Dense, Variant
from alexnet_jax.models.variants import DROPPED, NORM_POOL, POOLED
from alexnet_jax.training import parallel, steps

SIZE, CROP, BATCH, CLASSES = 50, 48, 4, 10
# fmt: off
SMALL = Variant("small", columns=2, grid=24, crop_size=CROP, layers=(
    Conv("conv1",  8, 5, stride=2, padding=2, then=NORM_POOL),
    Conv("conv2",  8, 3, padding=1, sees="own", bias=1.0, then=NORM_POOL),
    Conv("conv3", 12, 3, padding=1),
    Conv("conv4", 12, 3, padding=1, sees="own", bias=1.0),
    Conv("conv5",  8, 3, padding=1, sees="own", bias=1.0, then=POOLED),
    Dense("fc6", 128, bias=1.0, then=DROPPED),
    Dense("fc7", 128, bias=1.0, then=DROPPED),
    Dense("fc8", CLASSES, then=()),
))
# fmt: on
# The columns meet in the classifier only, as in `no_communication`.
_APART = (dataclasses.replace(row, sees="own") for row in SMALL.layers[1:-1])
APART = dataclasses.replace(
    SMALL, name="apart", layers=(SMALL.layers[0], *_APART, SMALL.layers[-1])
)
NETWORK_OF_FILE = f"{__file__}:SMALL"  # as --config.model.variant names it


def make_model(dtype="float32", *, table=SMALL, **ablations) -> AlexNet:
    return create_model(table, dtype=dtype, init="he", **ablations)


def batch(examples=BATCH, size=SIZE):
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (examples, size, size, 3), np.uint8),
        "label": rng.integers(0, CLASSES, examples).astype(np.int32),
    }


def statistics(dtype, size=SIZE):
    return augment.Statistics(
        jnp.full((size, size, 3), 120, dtype),
        jnp.asarray(augment.IMAGENET_PCA_STD_255, dtype),
        jnp.asarray(augment.IMAGENET_PCA_VECTORS, dtype),
    )


def first_state(spec):
    """Return the first state on the spec's mesh, made by a program for one device."""
    arrays = _first_arrays(spec.model, spec.tx)
    return jax.device_put(arrays, parallel.shardings(spec.mesh, steps.state_specs(spec)))


@functools.cache
def _first_arrays(model, tx):
    crop = augment.Augmentation(model.network.crop_size)
    spec = steps.StepSpec(model, tx, crop, parallel.make_mesh(1, 1))
    return jax.device_get(steps.init_state(spec))


@contextlib.contextmanager
def fast_loops():
    """Compile with optimisation: float64 convolutions run ten times faster."""
    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    jax.config.update(name, False)
    try:
        yield
    finally:
        jax.config.update(name, before)
