"""Common parts of the operators with hand-written gradients (`cpu` and `gpu`)."""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def operands(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Prepare the arrays of a function with a hand-written gradient (`jax.custom_vjp`).

    All get the same varying mesh axes, which matters inside `jax.shard_map` only. The
    gradient of an array has to have the array's own axes. A kernel that all data rows
    share is therefore first cast to varying: the transpose of that cast is the sum over
    the rows, which is the right gradient.

    Forward mode and second derivatives of the result raise TypeError.
    """
    axes = [jax.typeof(array).manual_axis_type.varying for array in arrays]
    found = []
    for array, own in zip(arrays, axes, strict=True):
        if missing := frozenset().union(*axes) - own:
            array = lax.pcast(array, tuple(sorted(missing)), to="varying")
        found.append(_reverse_mode_only(array))
    return tuple(found)


@jax.custom_jvp
def _reverse_mode_only(x: jax.Array) -> jax.Array:
    """Return x. A gradient passes; forward mode and a second derivative raise TypeError."""
    return x


@_reverse_mode_only.defjvp
def _derivative(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> Any:
    return _no_derivative(*primals), _tangent.bind(*tangents)


@jax.custom_jvp
def _no_derivative(x: jax.Array) -> jax.Array:
    return x


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise TypeError(
        "The fast operators have reverse-mode first derivatives only. For forward mode "
        "(jax.jvp, jax.linearize) and second derivatives use the plain ones: "
        "create_model(..., fast=False), or fast=False in a call of an operator."
    )


_no_derivative.defjvp(_refuse)
# The identity of a tangent. Reverse mode transposes it and never runs it; forward mode
# runs it.
_tangent = Primitive("tangent_of_a_fast_operator")
_tangent.def_abstract_eval(lambda x: x)
_tangent.def_impl(_refuse)
mlir.register_lowering(_tangent, _refuse)
ad.deflinear2(_tangent, lambda cotangent, _: [cotangent])
batching.defvectorized(_tangent)


def activation(terms: Sequence[jax.Array], relu: bool) -> jax.Array:
    """Return the sum of the terms, an array and maybe its bias, after ReLU if asked."""
    total = sum(terms[1:], terms[0])
    return jnp.maximum(total, 0) if relu else total


def window_sum(
    function: Callable[[Sequence[jax.Array]], jax.Array],
    terms: Sequence[jax.Array],
    size: int,
    groups: int,
) -> jax.Array:
    """Return sums of function(terms) over `size` neighbouring channels inside their group.

    XLA computes it in one loop, without storing function(terms). So the neighbours are
    shifts of the terms: a shifted result would be computed behind a branch. The shape
    has no axis for the groups, which would need an index computed for every element.
    """
    channels = terms[0].shape[-1]
    width = channels // groups
    place = np.arange(channels) % width
    total = function(terms)
    for distance in range(1, min(size // 2, width - 1) + 1):
        for shift in (distance, -distance):
            shifted = function([_shift(term, shift) for term in terms])
            inside = (place + shift >= 0) & (place + shift < width)
            total += jnp.where(inside, shifted, 0)
    return total


def _shift(a: jax.Array, channels: int) -> jax.Array:
    """Return a[..., c + channels] at c, and 0 outside."""
    pads = [(0, 0, 0)] * (a.ndim - 1) + [(-channels, channels, 0)]
    return lax.pad(a, a.dtype.type(0), pads)


def power(base: jax.Array, beta: float) -> jax.Array:
    """Return base ** beta, by two square roots for the usual beta of 0.75.

    Divide by it: XLA takes a division for costly, so it computes and stores the result
    once. It would compute a product again in every operation that reads it, nine times
    per element in a pooling layer.
    """
    if beta == 0.75:
        root = jnp.sqrt(base)
        return root * jnp.sqrt(root)
    return base**beta
