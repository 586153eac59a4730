"""Fast forms for GPUs, where the bytes that a kernel moves are its time.

`alexnet_jax.models.ops` checks the arguments. docs/performance.md has what each form
saves, as compiled for an H200.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from alexnet_jax.models.ops import gradients, reference

add_bias = reference.add_bias
conv = reference.conv
within_map_response_norm = reference.within_map_response_norm


def local_response_norm(
    x: jax.Array,
    bias: jax.Array | None,
    *,
    relu: bool,
    size: int,
    k: float,
    alpha: float,
    beta: float,
    groups: int,
) -> jax.Array:
    """Return LRN across channels; `alpha` multiplies the plain sum of squares."""
    if bias is None:
        bias = jnp.zeros(x.shape[-1:])
    x, bias = gradients.operands(x, bias.astype(jnp.promote_types(x.dtype, jnp.float32)))
    return _lrn(x, bias, relu, size, k, alpha, beta, groups)


def _lrn_value(x, bias, relu, size, k, alpha, beta, groups) -> jax.Array:
    a, base = _activation_and_base(x, bias, relu, size, k, alpha, groups)
    return (a / gradients.power(base, beta)).astype(x.dtype)


def _activation_and_base(x, bias, relu, size, k, alpha, groups) -> tuple[jax.Array, jax.Array]:
    def squares(terms):
        return jnp.square(gradients.activation(terms, relu))

    terms = x.astype(bias.dtype), bias
    total = gradients.window_sum(squares, terms, size, groups)
    return gradients.activation(terms, relu), k + alpha * total


def _lrn_forward(x, bias, relu, size, k, alpha, beta, groups):
    return _lrn_value(x, bias, relu, size, k, alpha, beta, groups), (x, bias)


def _lrn_backward(relu, size, k, alpha, beta, groups, residuals, g):
    """Return the gradients in two loops, each of which computes the base again.

    The first stores one array in the dtype of x. The barriers keep XLA from storing the
    base and other arrays in float32.
    """
    x, bias = residuals
    wide, base_of = bias.dtype, (relu, size, k, alpha, groups)
    x, g = lax.optimization_barrier((x, g))
    a, base = _activation_and_base(x, bias, *base_of)
    share = (g.astype(wide) * a / (gradients.power(base, beta) * base)).astype(x.dtype)
    x, g, share = lax.optimization_barrier((x, g, share))
    a, base = _activation_and_base(x, bias, *base_of)
    # The window is centred, so "all i whose window holds j" is j's own window.
    shared = gradients.window_sum(lambda terms: terms[0], [share.astype(wide)], size, groups)
    da = g.astype(wide) / gradients.power(base, beta) - 2 * alpha * beta * a * shared
    if relu:
        da = jnp.where(a > 0, da, 0)
    dx = lax.optimization_barrier(da.astype(x.dtype))
    return dx, jnp.sum(dx.astype(wide), range(dx.ndim - 1))


_lrn = jax.custom_vjp(_lrn_value, nondiff_argnums=(2, 3, 4, 5, 6, 7))
_lrn.defvjp(_lrn_forward, _lrn_backward)


def wide_matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Return x @ kernel in at least float32, with a gradient that reads x's dtype."""
    return _wide_matmul(*gradients.operands(x, kernel))


def _wide_matmul_forward(x, kernel):
    return reference.wide_matmul(x, kernel), (x, kernel)


def _wide_matmul_backward(operands, g):
    x, kernel = operands
    g = g.astype(x.dtype)
    return g @ kernel.T, x.T @ g


_wide_matmul = jax.custom_vjp(reference.wide_matmul)
_wide_matmul.defvjp(_wide_matmul_forward, _wide_matmul_backward)


def max_pool(
    x: jax.Array, *, window: tuple[int, int], stride: tuple[int, int], ceil: bool
) -> jax.Array:
    """Return the maximum, with a gradient that remembers which element won."""
    (x,) = gradients.operands(x)
    return _max_pool(x, window, stride, ceil, x.shape)


def _max_pool_value(x, window, stride, ceil, shape) -> jax.Array:
    return _max_pool_forward(x, window, stride, ceil, shape)[0]


def _max_pool_forward(x, window, stride, ceil, shape):
    """Return the maximum, and the place of each window's winner in row-major order."""
    rows, columns = (
        functools.partial(
            reference.window_slices,
            window=window[i],
            stride=stride[i],
            axis=1 + i,
            ceil=ceil,
            fill=-jnp.inf,
        )
        for i in (0, 1)
    )
    elements = [element for row in rows(x) for element in columns(row)]
    return reference.first_maximum(elements, np.min_scalar_type(math.prod(window)))


def _max_pool_backward(window, stride, ceil, shape, place, g):
    """Return the gradient of each window, at the element that won, in one loop.

    Element q * stride + t is at t + j * stride of window q - j, on both axes, for every j
    that the window has room for.
    """
    batch, height, width, channels = shape
    grid = [-(-length // step) for length, step in zip((height, width), stride, strict=True)]
    # Arrays are [batch, rows q, rows t, columns q, columns t, channels].
    t_rows, t_columns = np.ogrid[: stride[0], : stride[1]]
    wide = jnp.promote_types(g.dtype, jnp.float32)
    total = jnp.zeros((batch, grid[0], stride[0], grid[1], stride[1], channels), wide)
    for j in np.ndindex(*(-(-size // step) for size, step in zip(window, stride, strict=True))):
        down, across = t_rows + j[0] * stride[0], t_columns + j[1] * stride[1]
        inside = (down < window[0]) & (across < window[1])
        at = np.where(inside, down * window[1] + across, math.prod(window))
        pads = [(0, 0, 0), *((j[i], grid[i] - j[i] - g.shape[1 + i], 0) for i in (0, 1)), (0, 0, 0)]
        shifted, winner = (
            jnp.expand_dims(lax.pad(a, a.dtype.type(0), pads), (2, 4)) for a in (g, place)
        )
        at = jnp.asarray(at[:, None, :, None], place.dtype)
        total += jnp.where(winner == at, shifted.astype(wide), 0)
    total = total.reshape(batch, grid[0] * stride[0], grid[1] * stride[1], channels)
    return (total[:, :height, :width].astype(g.dtype),)


_max_pool = jax.custom_vjp(_max_pool_value, nondiff_argnums=(1, 2, 3, 4))
_max_pool.defvjp(_max_pool_forward, _max_pool_backward)
