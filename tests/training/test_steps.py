"""Steps in bfloat16, with other optimisers and losses, and with label smoothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alexnet_jax.data import augment
from alexnet_jax.training import metrics, optim, parallel, steps
from tests.training.small import CROP, batch, first_state, make_model, statistics

EXAMPLES, STEPS = 8, 25
COLUMNS = [pytest.param(1, marks=pytest.mark.slow), 2]


@functools.cache
def memorise(dtype, columns):
    """Train on one batch without noise; return the losses and the last state."""
    model, tx = make_model(dtype, dropout=0.0), optim.make_optimizer(0.003)
    mesh = parallel.make_mesh(1, columns)
    plain = augment.Augmentation(CROP, crop=False, flip=False, lighting=0.0)
    spec = steps.StepSpec(model, tx, plain, mesh, "columns")
    state, step = first_state(spec), steps.make_train_step(spec)
    on_device = parallel.put_batch(batch(EXAMPLES), mesh, "columns", EXAMPLES)
    losses = []
    for _ in range(STEPS):
        state, scalars = step(state, on_device, statistics(jnp.float32))
        assert scalars["loss"].dtype == jnp.float32
        losses.append(float(scalars["loss"]))
    return losses, state


@pytest.mark.parametrize("columns", COLUMNS)
def test_bfloat16_step_keeps_its_state_in_float32(columns):
    _, state = memorise("bfloat16", columns)
    floats = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    # Kernels and biases of eight layers, their velocities, and the learning rate.
    assert len(floats) == 33
    assert {leaf.dtype for leaf in floats} == {jnp.dtype("float32")}


def brier(logits, labels):
    """Return the squared distance of the probabilities from the one-hot labels."""
    wanted = jax.nn.one_hot(labels, logits.shape[-1])
    return jnp.sum((jax.nn.softmax(logits) - wanted) ** 2, axis=-1)


@pytest.mark.slow
def test_any_optimiser_and_loss_train_the_same_on_any_mesh():
    model, plain = make_model("float32"), augment.Augmentation(CROP, crop=False, flip=False)
    found = []
    for columns in (1, 2):
        mesh = parallel.make_mesh(1, columns)
        spec = steps.StepSpec(model, optax.adamw(1e-3), plain, mesh, "columns", loss=brier)
        state, step = steps.init_state(spec), steps.make_train_step(spec)
        on_device = parallel.put_batch(batch(EXAMPLES), mesh, "columns", EXAMPLES)
        losses = []
        for _ in range(3):
            state, scalars = step(state, on_device, statistics(jnp.float32))
            assert scalars.keys() == {"loss", "top1_error"}  # no learning rate
            losses.append(float(scalars["loss"]))
        found.append(losses)
    classes = model.network.layers[-1].features
    # The first network guesses: (1 - 1/K)^2 + (K - 1) / K^2 = 1 - 1/K.
    assert found[0][0] == pytest.approx(1 - 1 / classes, rel=0.05)
    assert found[0][2] < found[0][0]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)


@pytest.mark.parametrize("columns", COLUMNS)
def test_bfloat16_learns_like_float32(columns):
    exact, _ = memorise("float32", 1)
    losses, _ = memorise("bfloat16", columns)
    assert exact[0] > 2.2 and exact[-1] < 0.02 and losses[-1] < 0.02
    # Mean distance of the two curves, in nats.
    assert np.abs(np.subtract(exact, losses)).mean() < 0.05
    assert losses != exact


@pytest.mark.parametrize("columns", COLUMNS)
def test_bfloat16_logits_equal_float32_up_to_rounding(columns):
    _, state = memorise("float32", 1)
    params = jax.device_get(state.params)
    mesh = parallel.make_mesh(1, columns)
    raw = jnp.asarray(batch(EXAMPLES)["image"])
    images = augment.eval_images(raw, mean_image=statistics(jnp.float32).mean_image, crop_size=CROP)

    def logits(dtype):
        model = make_model(dtype, dropout=0.0)
        local = parallel.local_model(model, mesh, "columns")
        specs = parallel.param_specs(model.network, params, mesh, "columns")
        apply = parallel.on_devices(
            lambda params, images: local.apply({"params": params}, images),
            mesh,
            (specs, parallel.P()),
            parallel.P(),
        )
        return jax.jit(apply)(params, images)

    exact, rounded = logits("float32"), logits("bfloat16")
    assert rounded.dtype == jnp.float32
    error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    # Eight significant bits, so each rounding is off by at most 2^-9. Some thirty of
    # them (weights, sums, biases and normalisations of eight layers), of either sign,
    # come to sqrt(30) * 2^-9 = 0.011; none at all would be float32 in disguise.
    assert 2**-12 < error < 2**-6


def test_labels_are_smoothed_in_training_only():
    model, tx = make_model("float32", dropout=0.0), optim.make_optimizer(0.003)
    mesh = parallel.make_mesh(1, 1)
    plain = augment.Augmentation(CROP, crop=False, flip=False, lighting=0.0)
    spec = steps.StepSpec(model, tx, plain, mesh, label_smoothing=0.3)
    stats, raw = statistics(jnp.float32), batch(EXAMPLES)
    state = first_state(spec)
    params = jax.device_get(state.params)
    images = augment.eval_images(
        jnp.asarray(raw["image"]), mean_image=stats.mean_image, crop_size=CROP
    )
    # On logits that are far from uniform, so that smoothing shows.
    params["fc8"]["kernel"] = 30 * params["fc8"]["kernel"]
    logits = jax.jit(model.apply)({"params": params}, images)
    hard, smoothed = (
        float(metrics.cross_entropy(logits, raw["label"], smoothing).mean())
        for smoothing in (0.0, 0.3)
    )
    assert abs(hard - smoothed) > 0.01
    evaluate = steps.make_eval_step(spec)
    masked = raw | {"mask": np.ones(EXAMPLES, np.float32)}
    sums = evaluate(params, {}, masked, stats)
    assert float(sums["loss"]) / EXAMPLES == pytest.approx(hard, rel=1e-4)
    train = steps.make_train_step(spec)
    state = state.replace(params=jax.device_put(params, state.step.sharding))
    _, scalars = train(state, raw, stats)
    assert float(scalars["loss"]) == pytest.approx(smoothed, rel=1e-4)
