"""Gradient norms and dead units equal those of plain JAX and NumPy on any mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_jax.data import augment
from alexnet_jax.models.alexnet import create_model
from alexnet_jax.training import metrics, optim, parallel, steps
from tests.training.small import BATCH, CROP, batch, first_state, make_model, statistics

SEED = 5
# Units whose bias is so low that nothing gets through: in both columns, or in one.
DEAD = {"conv2": [0, 3, 7], "conv5": [1], "fc6": [*range(100)]}


def make_spec(rows, columns, mode, parts=1):
    model, tx = make_model(jnp.float64), optim.make_optimizer(0.01)
    mesh, augmentation = parallel.make_mesh(rows, columns), augment.Augmentation(CROP)
    return steps.StepSpec(model, tx, augmentation, mesh, mode, seed=SEED, accumulate_steps=parts)


def state_with_dead_units(spec):
    state = first_state(spec)
    params = jax.device_get(state.params)
    for layer, units in DEAD.items():
        bias = params[layer]["bias"].copy()
        bias[units] = -1e6
        params[layer]["bias"] = bias
    specs = steps.state_specs(spec).params
    params = jax.device_put(params, parallel.shardings(spec.mesh, specs))
    # A later step, so that a key without the step is noticed.
    return state.replace(params=params, step=state.step + 3)


def summary(mode, rows, columns, parts=1):
    spec = make_spec(rows, columns, mode, parts)
    step = steps.make_summary_step(spec)
    on_device = parallel.put_batch(batch(), spec.mesh, mode, BATCH)
    state = state_with_dead_units(spec)
    return jax.device_get(step(state, on_device, statistics(jnp.float64)))


@functools.cache
def by_hand():
    """Return the summaries without meshes, parts or the functions of `steps`."""
    spec = make_spec(1, 1, "data")
    model, state = spec.model, state_with_dead_units(spec)
    examples = batch()
    crop_key, mask_key = (
        jax.random.fold_in(steps.purpose_key(SEED, purpose), 3)
        for purpose in (steps.AUGMENT, steps.DROPOUT)
    )
    images = augment.train_images(
        jnp.asarray(examples["image"]),
        crop_key,
        0,
        statistics(jnp.float64),
        augment.Augmentation(CROP),
        jnp.float64,
    )

    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss_fn(params):
        features = model.apply(
            {"params": params}, images, train=True, rngs={"dropout": mask_key}, method="features"
        )
        losses = metrics.cross_entropy(features["logits"], examples["label"])
        return losses.sum() / BATCH, features

    (loss, features), grads = jax.device_get(jax.jit(loss_fn)(state.params))
    expected = {"train/loss": loss}
    for layer, leaves in grads.items():
        flat = np.concatenate([leaf.ravel() for leaf in leaves.values()])
        expected[f"grad_norm/{layer}"] = np.linalg.norm(flat)
        if layer != "fc8":
            units = features[layer].reshape(-1, features[layer].shape[-1])
            expected[f"dead_relu/{layer}"] = np.mean(~units.any(0))
    return expected


@pytest.mark.parametrize(
    "mode, rows, columns, parts",
    [
        ("hybrid", 1, 2, 2),
        pytest.param("data", 2, 1, 2, marks=pytest.mark.slow),
        pytest.param("data", 1, 1, 1, marks=pytest.mark.slow),
        pytest.param("columns", 1, 2, 1, marks=pytest.mark.slow),
    ],
)
def test_summaries_equal_plain_jax_on_the_whole_batch(mode, rows, columns, parts):
    with jax.enable_x64(True):
        expected, got = by_hand(), summary(mode, rows, columns, parts)
    assert set(got) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-10, err_msg=name)
    # At least what was killed, and not everything.
    sizes = {"conv2": 8, "conv5": 8, "fc6": 128}
    for layer, units in DEAD.items():
        share = got[f"dead_relu/{layer}"]
        assert len(units) / sizes[layer] <= share < 1
    assert got["grad_norm/fc6"] > 0


def test_only_relu_units_can_be_dead():
    tx, mesh = optim.make_optimizer(0.01), parallel.make_mesh(1, 1)
    model = create_model("cifar", init="he", activation="tanh", normalization="batch")
    spec = steps.StepSpec(model, tx, augment.Augmentation(32), mesh)
    state, step = steps.init_state(spec), steps.make_summary_step(spec)
    zeros = {"image": np.zeros((2, 32, 32, 3), np.uint8), "label": np.zeros(2, np.int32)}
    stats = augment.Statistics(jnp.zeros((32, 32, 3)), jnp.ones(3), jnp.eye(3))
    names = set(jax.eval_shape(step, state, zeros, stats))
    assert not any(name.startswith("dead_relu/") for name in names)
    # Batch normalisation's own scale and bias are a layer too.
    layers = {name.partition("/")[2] for name in names if name.startswith("grad_norm/")}
    assert layers == set(state.params)
    assert "norm1" in layers
