"""The update rule against a NumPy loop, schedules, the plateau rule."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alexnet_jax.training import optim

DROP_AT = 4


def numpy_loop(form, grads, w, rate, momentum=0.9, decay=5e-4):
    """Return the path of one number by section 5 of the paper, or by torch's form."""
    v, path = 0.0, []
    for step, g in enumerate(grads):
        lr = rate if step < DROP_AT else rate / 10
        if form == "paper":
            v = momentum * v - decay * lr * w - lr * g
            w = w + v
        else:
            v = momentum * v + g + decay * w
            w = w - lr * v
        path.append(w)
    return path


def run(tx, params, grads):
    state = tx.init(params)

    @jax.jit
    def step(params, state, grad):
        updates, state = tx.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    path = []
    for grad in grads:
        params, state = step(params, state, grad)
        path.append(params)
    return path, state


@pytest.mark.parametrize("form", optim.FORMS)
@pytest.mark.parametrize("mult, decay_bias", [(1.0, True), (2.0, False)])
def test_update_rule_equals_a_numpy_loop_across_a_drop(form, mult, decay_bias):
    rng = np.random.default_rng(0)
    grads = rng.normal(size=(9, 2))
    with jax.enable_x64(True):
        schedule = optax.piecewise_constant_schedule(0.1, {DROP_AT: 0.1})
        tx = optim.make_optimizer(schedule, form=form, bias_lr_mult=mult, decay_bias=decay_bias)
        layer = {"kernel": jnp.array([0.3]), "bias": jnp.array([1.0])}
        steps = [{"conv1": {"kernel": jnp.array([g]), "bias": jnp.array([b])}} for g, b in grads]
        path, _ = run(tx, {"conv1": layer}, steps)
        kernel = [float(p["conv1"]["kernel"][0]) for p in path]
        bias = [float(p["conv1"]["bias"][0]) for p in path]
    np.testing.assert_allclose(kernel, numpy_loop(form, grads[:, 0], 0.3, 0.1), rtol=1e-12)
    decay = 5e-4 if decay_bias else 0.0
    np.testing.assert_allclose(
        bias, numpy_loop(form, grads[:, 1], 1.0, 0.1 * mult, decay=decay), rtol=1e-12
    )


def test_weight_decay_of_single_layers():
    tx = optim.make_optimizer(
        1.0, momentum=0.0, weight_decay=0.5, layer_weight_decay={"fc10": 0.25}
    )
    params = {name: {"kernel": jnp.ones(1)} for name in ("conv1", "fc10")}
    path, _ = run(tx, params, [jax.tree.map(jnp.zeros_like, params)])
    assert path[0]["conv1"]["kernel"] == 0.5
    assert path[0]["fc10"]["kernel"] == 0.75


def test_the_learning_rate_is_in_the_state_and_can_be_changed():
    tx = optim.make_optimizer(0.5, momentum=0.0, weight_decay=0.0)
    params = {"fc8": {"kernel": jnp.zeros(1)}}
    state = tx.init(params)
    assert state.hyperparams["learning_rate"] == 0.5
    state = state._replace(hyperparams={"learning_rate": jnp.float32(0.25)})
    updates, state = tx.update({"fc8": {"kernel": jnp.ones(1)}}, state, params)
    assert updates["fc8"]["kernel"] == -0.25
    assert state.hyperparams["learning_rate"] == 0.25


def test_fixed_schedule_drops_at_its_epochs():
    schedule = optim.make_schedule(
        "fixed", 0.01, steps_per_epoch=100.5, num_epochs=90, drop_epochs=(25, 51, 79)
    )
    epochs = {0: 0.01, 24.9: 0.01, 25.1: 1e-3, 50.9: 1e-3, 51.1: 1e-4, 79.1: 1e-5}
    for epoch, rate in epochs.items():
        assert float(schedule(round(epoch * 100.5))) == pytest.approx(rate)


def test_cosine_schedule_rises_and_falls():
    schedule = optim.make_schedule(
        "cosine", 0.2, steps_per_epoch=10, num_epochs=11, warmup_epochs=1
    )
    values = [float(schedule(step)) for step in (0, 5, 10, 60, 110)]
    np.testing.assert_allclose(values, [0, 0.1, 0.2, 0.1, 0], atol=1e-7)
    flat = optim.make_schedule("cosine", 0.2, steps_per_epoch=10, num_epochs=11)
    assert float(flat(0)) == pytest.approx(0.2)


@pytest.mark.parametrize("name", ["constant", "plateau"])
def test_constant_and_plateau_schedules_are_numbers(name):
    assert optim.make_schedule(name, 0.1, steps_per_epoch=1, num_epochs=1) == 0.1


def test_layers_frozen_in_all_steps():
    changes = [("a", 0, 0.0), ("b", 1, 0.0), ("c", 0, 0.0), ("c", 2, 1.0), ("d", 0, 2.0)]
    assert optim.frozen_layers(changes) == {"a"}


def test_plateau_divides_three_times_at_most():
    rule, factors = optim.Plateau(patience=2), []
    for error in [0.9, 0.8, 0.8, 0.85, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7]:
        rule, factor = rule.after(error)
        factors.append(factor)
    # 0.8 twice not beaten; then 0.7 not beaten twice, twice; then no more drops.
    assert factors == [1, 1, 1, 0.1, 1, 1, 0.1, 1, 0.1, 1, 1, 1]
    assert (rule.best, rule.drops) == (0.7, 3)


def test_plateau_survives_a_checkpoint():
    rule = optim.Plateau(patience=2)
    assert optim.Plateau(patience=2, **rule.progress()).after(0.99)[0].best == 0.99
    rule, _ = rule.after(0.5)
    rule, _ = rule.after(0.6)
    assert optim.Plateau(patience=2, **rule.progress()) == rule


def test_the_originals_rates_equal_a_numpy_loop():
    """Drop the rate of weights, slow down and freeze conv1, keep biases at 0.02."""
    # Steps for epochs: conv1 slows down at 3 and freezes at 6; all drop at 4.
    factors = optim.make_layer_factors(
        [("conv1", 1.5, 0.1), ("conv1", 3, 0.0)], steps_per_epoch=2.0
    )
    rng = np.random.default_rng(1)
    grads = rng.normal(size=(12, 2, 2))
    start = {"kernel": 0.3, "bias": 1.0}

    def loop(layer, leaf, series):
        v, w, path = 0.0, start[leaf], []
        for step, g in enumerate(series):
            lr = 0.02 if leaf == "bias" else 0.01 if step < DROP_AT else 0.001
            if layer == "conv1" and leaf == "kernel" and step >= 3:
                lr *= 0.1
            decay = 5e-4 if leaf == "kernel" else 0.0
            v = 0.9 * v - decay * lr * w - lr * g
            if layer != "conv1" or step < 6:  # frozen: no velocity moves it either
                w += v
            path.append(w)
        return path

    with jax.enable_x64(True):
        tx = optim.make_optimizer(
            optax.piecewise_constant_schedule(0.01, {DROP_AT: 0.1}),
            decay_bias=False,
            bias_learning_rate=0.02,
            layer_factors=factors,
        )
        leaves = {leaf: jnp.array([value]) for leaf, value in start.items()}
        path, _ = run(
            tx,
            {"conv1": leaves, "conv2": leaves},
            [
                {
                    layer: {leaf: jnp.array([g[i, j]]) for j, leaf in enumerate(("kernel", "bias"))}
                    for i, layer in enumerate(("conv1", "conv2"))
                }
                for g in grads
            ],
        )
    for i, layer in enumerate(("conv1", "conv2")):
        for j, leaf in enumerate(("kernel", "bias")):
            got = [float(p[layer][leaf][0]) for p in path]
            want = loop(layer, leaf, grads[:, i, j])
            np.testing.assert_allclose(got, want, rtol=1e-12, err_msg=f"{layer} {leaf}")


def test_layer_factors_scale_biases_without_their_own_rate():
    factors = optim.make_layer_factors([("fc8", 1, 10.0)], steps_per_epoch=1)
    tx = optim.make_optimizer(
        0.1, momentum=0.0, weight_decay=0.0, bias_lr_mult=2.0, layer_factors=factors
    )
    one = {"kernel": jnp.ones(1), "bias": jnp.ones(1)}
    path, _ = run(tx, {"fc8": one, "fc7": one}, [{"fc8": one, "fc7": one}] * 2)
    moved = {}
    for layer in ("fc7", "fc8"):
        first, second = (float(params[layer]["bias"][0]) for params in path)
        moved[layer] = [1 - first, first - second]
    np.testing.assert_allclose(moved["fc7"], [0.2, 0.2], rtol=1e-6)
    np.testing.assert_allclose(moved["fc8"], [0.2, 2.0], rtol=1e-6)


def network(rng):
    """Return random parameters of a convolution, batch norm and a classifier."""
    shapes = {
        "conv1": {"kernel": (3, 3, 2, 4), "bias": (4,)},
        "norm1": {"scale": (4,), "bias": (4,)},
        "fc8": {"kernel": (4, 3), "bias": (3,)},
    }
    return {
        layer: {name: jnp.asarray(rng.normal(size=s)) for name, s in leaves.items()}
        for layer, leaves in shapes.items()
    }


def only_kernels(params):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def test_lars_is_optax_lars_with_the_same_masks():
    rng = np.random.default_rng(2)
    with jax.enable_x64(True):
        params, grads = network(rng), [network(rng) for _ in range(6)]
        schedule = optim.make_schedule(
            "polynomial", 0.5, steps_per_epoch=1, num_epochs=7, warmup_epochs=2
        )
        ours = optim.make_optimizer(
            schedule, decay_bias=False, weight_decay=0.01, trust_coefficient=0.02
        )
        theirs = optax.lars(
            schedule,
            weight_decay=0.01,
            weight_decay_mask=only_kernels,
            trust_coefficient=0.02,
            trust_ratio_mask=only_kernels,
        )
        found, expected = run(ours, params, grads)[0], run(theirs, params, grads)[0]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), found, expected)


@pytest.mark.parametrize("decay_bias", [True, False])
def test_decay_bias_decides_whether_biases_decay(decay_bias):
    params = network(np.random.default_rng(5))
    tx = optim.make_optimizer(1.0, momentum=0.0, weight_decay=0.5, decay_bias=decay_bias)
    (decayed,), _ = run(tx, params, [jax.tree.map(jnp.zeros_like, params)])
    for layer, leaves in params.items():
        for name, leaf in leaves.items():
            factor = 0.5 if decay_bias or name == "kernel" else 1.0
            np.testing.assert_allclose(decayed[layer][name], factor * leaf, rtol=1e-6)


@pytest.mark.parametrize("power, warmup", [(2.0, 2.0), (2.0, 0.0), (1.0, 0.5)])
def test_polynomial_schedule_equals_a_loop(power, warmup):
    schedule = optim.make_schedule(
        "polynomial", 0.2, steps_per_epoch=10, num_epochs=12, warmup_epochs=warmup, power=power
    )
    rise, end = round(10 * warmup), 120
    for step in (0, 1, 4, 5, 19, 20, 21, 60, 119, 120, 130):
        t = min(1.0, (step - rise) / (end - rise))
        rate = 0.2 * step / rise if step < rise else 0.2 * (1 - t) ** power
        assert float(schedule(step)) == pytest.approx(rate, rel=1e-5, abs=1e-8), step


def test_a_factor_from_epoch_0_holds_from_the_first_step():
    (factor,) = optim.make_layer_factors(
        [("conv1", 0, 0.25), ("conv1", 3, 0.5)], steps_per_epoch=2.0
    ).values()
    assert [float(factor(step)) for step in (0, 1, 5, 6)] == [0.25, 0.25, 0.25, 0.5]
