"""Which layer went first when a run's numbers are no longer finite."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from alexnet_jax.model import feature_names
from alexnet_jax.variants import Variant


def first_not_finite(
    network: Variant, largest: Mapping[str, Mapping[str, Any]]
) -> str | None:
    """The first value of a training step that is not finite, in words.

    In the order in which a step works them out: the parameters that it starts with,
    the activations from the first layer to the last, the loss, and the gradients from
    the last layer back to the first.

    Args:
      network: whose step it is.
      largest: of `steps.make_inspection_step`.

    Returns:
      Such as "the gradient of conv2 (inf), while no activation is beyond 2.1e+12 (of
      fc6)"; None if everything is finite.
    """
    values = {
        kind: {name: float(np.max(value)) for name, value in found.items()}
        for kind, found in largest.items()
    }
    forward, loss = values["activation"], values["loss"][""]
    if found := first_of_parameters(network, largest):
        return f"{found}, which that step started with"
    before = ""
    for name in _in_order(network, forward):
        if not math.isfinite(forward[name]):
            return f"the activation {name} ({forward[name]}){before}"
        before = f", while {name} before it stays below {forward[name]:.2g}"
    top = max(forward, key=lambda name: forward[name])
    most = f"while no activation is beyond {forward[top]:.2g} (of {top})"
    if not math.isfinite(loss):
        return f"the loss ({loss}), {most}"
    for layer in reversed(_in_order(network, values["gradient"])):
        if not math.isfinite(value := values["gradient"][layer]):
            return f"the gradient of {layer} ({value}), {most}"
    return None


def first_of_parameters(
    network: Variant, largest: Mapping[str, Mapping[str, Any]]
) -> str | None:
    """Such as "the parameters of conv2 (inf)"; None if all are finite. Arguments as of
    `first_not_finite`."""
    for layer in _in_order(network, largest["parameters"]):
        if not math.isfinite(value := float(np.max(largest["parameters"][layer]))):
            return f"the parameters of {layer} ({value})"
    return None


def _in_order(network: Variant, names: Mapping[str, Any]) -> list[str]:
    """Names of layers, or of their activations, from the first to the last."""
    order = [name for row in network.layers for name in (row.name, *feature_names(row))]
    return [name for name in dict.fromkeys([*order, *names]) if name and name in names]
