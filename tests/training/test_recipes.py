"""Every recipe for ImageNet trains two narrow steps and has the schedule of its source."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_jax.training import experiment, loop
from alexnet_jax.training.config import flat
from alexnet_jax.training.writers import read_metrics

NAMES = ("paper", "original", "caffe", "caffenet", "owt", "large_batch")
STEPS_PER_EPOCH = 10


def recipe(name):
    return importlib.import_module(f"configs.{name}").get_config()


@pytest.mark.parametrize(
    "name",
    [
        # caffenet has the layers of caffe, and no other field.
        pytest.param(name, marks=pytest.mark.nightly if name == "caffenet" else pytest.mark.slow)
        for name in NAMES
    ],
)
def test_two_steps_of_every_recipe(name, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "STATISTICS_SAMPLE", 8)
    config = recipe(name)
    config.data.source = "fake"
    config.data.eval_split, config.schedule.max_drops = "", 0
    config.data.batch_size = 4
    config.model.width = 1 / 32
    config.model.init = "he"
    config.parallel.data = 1
    config.optim.accumulate_steps = min(2, config.optim.accumulate_steps)
    config.max_steps = 2
    config.log_every_steps = 1
    state = loop.train_and_evaluate(config, tmp_path)
    assert int(state.step) == 2
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "train/loss" in row]
    losses = [row["train/loss"] for row in rows]
    assert len(losses) == 2 and np.isfinite(losses).all()
    assert losses[0] == pytest.approx(np.log(1000), abs=3)


def at_step(state, step):
    """Return the optimiser's state as it is after `step` steps."""
    return jax.tree.map(lambda x: jnp.full_like(x, step) if x.dtype == jnp.int32 else x, state)


def rates(name, epochs):
    """Return the learning rates of a recipe at these epochs."""
    config = recipe(name)
    network = experiment.make_model(config, None)
    tx = experiment.make_optimizer(config, network, steps_per_epoch=STEPS_PER_EPOCH)
    params = {"conv1": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    found = []
    for epoch in epochs:
        state = at_step(tx.init(params), round(epoch * STEPS_PER_EPOCH))
        _, state = tx.update(params, state, params)
        found.append(float(state.hyperparams["learning_rate"]))
    return found


def test_schedules_of_the_recipes():
    caffe = [0.01, 0.01, 1e-3, 1e-4, 1e-5, 1e-6]
    np.testing.assert_allclose(rates("caffe", (0, 19, 21, 41, 61, 81)), caffe, rtol=1e-5)
    peak = recipe("large_batch").optim.learning_rate
    found = rates("large_batch", (0, 2.5, 5, 52.5, 100))
    np.testing.assert_allclose(found, [0, peak / 2, peak, peak / 4, 0], rtol=1e-5)
    found = rates("owt", (0, 5, 77.5, 150))
    np.testing.assert_allclose(found, [0, 0.06, 0.03, 0], rtol=1e-5, atol=1e-9)


def test_the_originals_recipe():
    """Slow conv1 down at epoch 67 and freeze it at 72; biases keep their rate."""
    config = recipe("original")
    augmentation = experiment.make_augmentation(config, steps_per_epoch=10_009.0)
    assert augmentation.lighting_form == "original"
    assert augmentation.lighting_steps == 67 * 10_009
    network = experiment.make_model(config, 10)
    tx = experiment.make_optimizer(config, network, steps_per_epoch=STEPS_PER_EPOCH)
    layer = {"kernel": jnp.ones((1, 1)), "bias": jnp.ones(1)}
    params = {"conv1": layer, "conv2": layer}
    for epoch, conv1, conv2, conv1_bias in [
        (0, 0.01, 0.01, 0.02),
        (30, 0.001, 0.001, 0.02),
        (60, 1e-4, 1e-4, 0.02),
        (70, 1e-5, 1e-4, 0.02),
        (75, 0.0, 1e-4, 0.0),
        (85, 0.0, 1e-5, 0.0),
    ]:
        state = at_step(tx.init(params), epoch * STEPS_PER_EPOCH)
        updates, _ = tx.update(params, state, params)  # gradients of 1, weights of 1
        decayed = 1.0005
        want = [conv1_bias, conv1 * decayed, 0.02, conv2 * decayed]
        got = [-float(leaf.squeeze()) for leaf in jax.tree.leaves(updates)]
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-9, err_msg=str(epoch))


def test_caffe_recipes_differ_only_in_the_variant():
    caffe, caffenet = (flat(recipe(n).to_dict()) for n in NAMES[2:4])
    assert {k for k in caffe if caffe[k] != caffenet[k]} == {"model.variant"}
    assert caffe["optim.bias_lr_mult"] == 2 and not caffe["optim.decay_bias"]


def test_recipes_reach_augmentation_and_optimiser():
    owt = experiment.make_augmentation(recipe("owt"), steps_per_epoch=1.0)
    assert owt.min_area == 0.08 and owt.crop
    large = recipe("large_batch")
    network = experiment.make_model(large, None)
    tx = experiment.make_optimizer(large, network, steps_per_epoch=STEPS_PER_EPOCH)
    ones = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    params = {"conv1": ones, "norm1": {"scale": jnp.ones(2), "bias": jnp.ones(2)}}
    state = at_step(tx.init(params), 5 * STEPS_PER_EPOCH)
    updates, _ = tx.update(params, state, params)
    peak, trust = large.optim.learning_rate, large.optim.trust_coefficient
    for layer, name, size in (
        ("conv1", "kernel", peak * trust),
        ("conv1", "bias", peak),
        ("norm1", "scale", peak),
        ("norm1", "bias", peak),
    ):
        np.testing.assert_allclose(updates[layer][name], -size, rtol=1e-5)
