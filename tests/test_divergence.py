"""Which layer went first: planted faults are found, on two columns."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_parallel import BATCH, CROP, batch, narrow, statistics

from alexnet_jax import augment, optim, parallel, steps
from alexnet_jax.divergence import first_not_finite, first_of_parameters

MODE = "columns"


@functools.cache
def inspection():
    """The network, its healthy parameters, and a function that looks at others."""
    model, tx = narrow(jnp.float32), optim.make_optimizer(0.01)
    mesh = parallel.make_mesh(1, 2)
    kwargs = {"mesh": mesh, "mode": MODE, "seed": 0}
    step = steps.make_inspection_step(model, tx, augment.Augmentation(CROP), **kwargs)
    state = steps.init_state(model, tx, crop_size=CROP, **kwargs)
    specs = parallel.param_specs(model.network, state.params, mesh, MODE)
    on_devices = parallel.put_batch(batch(), mesh, MODE, BATCH)

    def look(params):
        params = jax.device_put(params, parallel.shardings(mesh, specs))
        changed = state.replace(params=params)
        return jax.device_get(step(changed, on_devices, statistics(jnp.float32)))

    return model.network, jax.device_get(state.params), look


def planted(**leaves):
    """The healthy parameters but for some leaves, named layer_leaf, set to a value."""
    network, params, look = inspection()
    changed = {layer: dict(tree) for layer, tree in params.items()}
    for name, value in leaves.items():
        layer, leaf = name.split("_")
        changed[layer][leaf] = np.full_like(changed[layer][leaf], value)
    return network, look(changed)


def test_a_healthy_step_is_finite_and_its_magnitudes_are_right():
    network, found = planted()
    _, params, _ = inspection()
    assert first_not_finite(network, found) is None
    for layer, tree in params.items():
        largest = max(np.abs(leaf).max() for leaf in tree.values())
        assert found["parameters"][layer].max() == largest
    # What follows relu, and what it becomes: pooling takes the largest as it is.
    activation = {name: value.max() for name, value in found["activation"].items()}
    assert activation["pool5"] == activation["conv5"] > 0
    assert abs(found["loss"][""].max() - math.log(10)) < 1
    assert set(found["gradient"]) == set(params)


@pytest.mark.parametrize(
    ("leaves", "words"),
    [
        ({"fc6_bias": np.inf}, r"^the parameters of fc6 \(inf\), which that step"),
        ({"conv3_kernel": np.nan}, r"^the parameters of conv3 \(nan\)"),
        # conv2's sums pass what float32 holds; what comes before is as ever.
        (
            {"conv2_kernel": 3e38},
            r"^the activation conv2 \(inf\), while pool1 before it stays below \d",
        ),
        # Nothing but fc7's gradient is large: fc6's units times what fc8 sends back.
        (
            {
                "fc6_bias": 1e37,
                "fc7_kernel": 0.0,
                "fc7_bias": 1e-8,
                "fc8_kernel": 1e5 * np.arange(10),
            },
            r"^the gradient of fc7 \(inf\), while no activation is beyond 1e\+37",
        ),
    ],
)
def test_what_goes_first_is_named(leaves, words):
    message = first_not_finite(*planted(**leaves))
    assert message is not None
    assert re.search(words, message), message


def test_parameters_that_an_update_made_too_large_are_named():
    network, found = planted(fc6_bias=np.inf, fc7_bias=np.nan)
    assert first_of_parameters(network, found) == "the parameters of fc6 (inf)"
    assert first_of_parameters(*planted()) is None
