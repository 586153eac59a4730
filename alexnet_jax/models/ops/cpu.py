"""Fast forms for the CPU, where XLA's own gradients of these operators are slow.

Every operator has a hand-written reverse-mode gradient (`jax.custom_vjp`), so forward
mode (`jax.jvp`, `jax.linearize`, Hessian-vector products) needs the plain form,
`fast=False`. `alexnet_jax.models.ops` checks the arguments.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from alexnet_jax.models.ops import gradients, reference
from alexnet_jax.models.ops.reference import Pads

wide_matmul = reference.wide_matmul

# XLA writes a kernel's gradient as a convolution in which the examples are the input
# channels and the whole image is the window. Without the options below it takes, from
# about 64 examples, twice as long per example on the 13x13 layers; with them a sixth less
# in conv1. 8, 16 and 32 at a time are equally fast.
_EXAMPLES_AT_A_TIME = 16
_PARTS_OF_A_SUM = 32

# Eigen computes convolutions instead of YNNPACK, which in jaxlib 0.10 gives less than 128
# output channels to one thread. Matrix products stay with YNNPACK. LRN and pooling profit
# from the wider vectors.
COMPILER_OPTIONS = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
    "xla_cpu_prefer_vector_width": 512,
}


def conv(x: jax.Array, kernel: jax.Array, *, stride: tuple[int, int], padding: Pads) -> jax.Array:
    """Convolve without groups, NHWC and HWIO, in at least float32."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    a, kernel = gradients.operands(x.astype(dtype), kernel.astype(dtype))
    return _conv(a, kernel, stride, padding).astype(x.dtype)


def _conv_value(x, kernel, stride, padding) -> jax.Array:
    return reference.conv(x, kernel, stride=stride, padding=padding)


def _conv_forward(x, kernel, stride, padding):
    return _conv_value(x, kernel, stride, padding), (x, kernel)


def _conv_backward(stride, padding, residuals, g):
    # The two are independent: jit drops one whose result nobody uses, for example the
    # gradient of conv1's images.
    x, kernel = residuals
    return (
        _input_gradient(x.shape, kernel, g, stride, padding),
        _kernel_gradient(x, kernel.shape, g, stride, padding),
    )


# Both gradients are convolutions, in the order of dimensions that XLA computes. XLA would
# change another order itself, but not inside a loop: in that over the parts of a batch
# (optim.accumulate_steps) another order takes 12 times as long.


def _input_gradient(shape, kernel, g, stride, padding):
    """Return [B, H, W, Cin] from g[B, H', W', Cout]: the kernel is turned around."""
    pads = [
        _pads_for(length, _spread(count, step), size, size - 1 - before)
        for length, count, step, size, (before, _) in zip(
            shape[1:3], g.shape[1:3], stride, kernel.shape, padding, strict=False
        )
    ]
    turned = jnp.swapaxes(kernel[::-1, ::-1], 2, 3)
    return _convolve(g, turned, pads, lhs_dilation=stride)


def _kernel_gradient(x, shape, g, stride, padding):
    """Return [kh, kw, Cin, Cout], summed over a few examples at a time.

    The examples take the place of the channels that are summed, the input channels that
    of the examples, and a whole map of g, spread by the stride, is the window.
    """
    pads = [
        _pads_for(size, length, _spread(count, step), before)
        for size, length, count, step, (before, _) in zip(
            shape, x.shape[1:3], g.shape[1:3], stride, padding, strict=False
        )
    ]
    total = jnp.zeros(shape, x.dtype)
    for start in range(0, x.shape[0], _EXAMPLES_AT_A_TIME):
        part = slice(start, start + _EXAMPLES_AT_A_TIME)
        maps, windows = (jnp.moveaxis(a[part], 0, -1) for a in (x, g))
        maps = jnp.moveaxis(maps, 2, 0)  # [Cin, H, W, b]
        windows = jnp.swapaxes(windows, 2, 3)  # [H', W', b, Cout]
        found = _convolve(maps, windows, pads, rhs_dilation=stride)
        total += jnp.moveaxis(found, 0, 2)
    return total


def _spread(count: int, step: int) -> int:
    return (count - 1) * step + 1


def _pads_for(out: int, length: int, window: int, before: int) -> tuple[int, int]:
    """Return the padding for `out` places of a window; negative numbers cut off."""
    return before, out - 1 + window - length - before


def _convolve(x, kernel, pads, **dilation) -> jax.Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), pads, dimension_numbers=numbers, **dilation)


_conv = jax.custom_vjp(_conv_value, nondiff_argnums=(2, 3))
_conv.defvjp(_conv_forward, _conv_backward)


def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """Return x[..., C] + bias[C], rounded once."""
    return _add_bias(*gradients.operands(x, bias))


def _add_bias_forward(x, bias):
    return reference.add_bias(x, bias), bias


def _add_bias_backward(bias, g):
    return g, _sum_positions(g).astype(bias.dtype)


def _sum_positions(g: jax.Array) -> jax.Array:
    """Return the sum [C] over all positions of g[..., C], in at least float32.

    XLA sums in a tree of windows, which is exact but slow. So the rows are cut into parts
    that are first added to each other, and XLA sums only as many rows as a part has.
    """
    rows = g.reshape(-1, g.shape[-1]).astype(jnp.promote_types(g.dtype, jnp.float32))
    each, rest = divmod(rows.shape[0], _PARTS_OF_A_SUM)
    total = jnp.sum(rows[rows.shape[0] - rest :], 0)
    if each:
        parts = [rows[i * each : (i + 1) * each] for i in range(_PARTS_OF_A_SUM)]
        total += jnp.sum(sum(parts[1:], parts[0]), 0)
    return total


_add_bias = jax.custom_vjp(reference.add_bias)
_add_bias.defvjp(_add_bias_forward, _add_bias_backward)


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
    wide = jnp.promote_types(x.dtype, jnp.float32)
    terms = (x,) if bias is None else (x, bias)
    terms = gradients.operands(*(term.astype(wide) for term in terms))
    return _lrn(terms, relu, size, k, alpha, beta, groups).astype(x.dtype)


def _lrn_value(terms, relu, size, k, alpha, beta, groups) -> jax.Array:
    """Return LRN in one loop over `terms`, the array and its bias, that XLA vectorises."""

    def squares(terms):
        return jnp.square(gradients.activation(terms, relu))

    total = gradients.window_sum(squares, terms, size, groups)
    return gradients.activation(terms, relu) / gradients.power(k + alpha * total, beta)


def _lrn_forward(terms, relu, size, k, alpha, beta, groups):
    # To compute the base again is as fast as to load it.
    return _lrn_value(terms, relu, size, k, alpha, beta, groups), terms


def _lrn_backward(relu, size, k, alpha, beta, groups, terms, g):
    a = gradients.activation(terms, relu)
    base = k + alpha * _stored_window_sum(jnp.square(a), size, groups)
    scaled = g / gradients.power(base, beta)
    # The window is centred, so "all i whose window holds j" is j's own window.
    shared = _stored_window_sum(scaled * a / base, size, groups)
    da = scaled - 2 * alpha * beta * a * shared
    if relu:
        da = jnp.where(a > 0, da, 0)
    return ((da, *(_sum_positions(da) for _ in terms[1:])),)


def _stored_window_sum(a: jax.Array, size: int, groups: int) -> jax.Array:
    """Return the sums of `size` neighbouring channels inside their group.

    The backward pass reads them several times. XLA stores the input and the output of
    this operation, instead of every shifted array.
    """
    rows = a.reshape(-1, a.shape[-1] // groups)
    sides = ((0, 0), (size // 2, size // 2))
    sums = lax.reduce_window(rows, rows.dtype.type(0), lax.add, (1, size), (1, 1), sides)
    return sums.reshape(a.shape)


_lrn = jax.custom_vjp(_lrn_value, nondiff_argnums=(1, 2, 3, 4, 5, 6))
_lrn.defvjp(_lrn_forward, _lrn_backward)


def within_map_response_norm(
    x: jax.Array, *, size: int, k: float, alpha: float, beta: float
) -> jax.Array:
    """Return LRN over `size` x `size` pixels; `alpha` multiplies the plain sum."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    (a,) = gradients.operands(x.astype(wide))
    return _within_map(a, size, k, alpha, beta).astype(x.dtype)


def _within_map_value(a, size, k, alpha, beta) -> jax.Array:
    return a / gradients.power(k + alpha * _stored_area_sum(jnp.square(a), size), beta)


def _within_map_forward(a, size, k, alpha, beta):
    base = k + alpha * _stored_area_sum(jnp.square(a), size)
    return a / gradients.power(base, beta), (a, base)


def _within_map_backward(size, k, alpha, beta, residuals, g):
    a, base = residuals
    scaled = g / gradients.power(base, beta)
    # As across channels: the pixels whose window holds a pixel are its own window.
    shared = _stored_area_sum(scaled * a / base, size)
    return (scaled - 2 * alpha * beta * a * shared,)


def _stored_area_sum(a: jax.Array, size: int) -> jax.Array:
    """Return the sums of size x size pixels of a map, one side after the other."""
    for axis in (2, 1):
        window = [1] * a.ndim
        window[axis] = size
        sides = [(0, 0)] * a.ndim
        sides[axis] = (size // 2, size // 2)
        a = lax.reduce_window(a, a.dtype.type(0), lax.add, window, (1,) * a.ndim, sides)
    return a


_within_map = jax.custom_vjp(_within_map_value, nondiff_argnums=(1, 2, 3, 4))
_within_map.defvjp(_within_map_forward, _within_map_backward)


def max_pool(
    x: jax.Array, *, window: tuple[int, int], stride: tuple[int, int], ceil: bool
) -> jax.Array:
    """Return the maximum, with a gradient that remembers which element won."""
    (x,) = gradients.operands(x)
    return _max_pool(x, window, stride, ceil, x.shape)


def _max_pool_value(x, window, stride, ceil, shape) -> jax.Array:
    return reference.max_pool(x, window=window, stride=stride, ceil=ceil)


def _max_pool_forward(x, window, stride, ceil, shape):
    # Keep the place of each window's winner, one byte per axis, instead of the image.
    x, columns = reference.max_along(x, window[1], stride[1], axis=2, ceil=ceil)
    _, rows = reference.max_along(x, window[0], stride[0], axis=1, ceil=ceil)
    # The same maximum again: XLA stores the output of this operation. It would repeat
    # another one in each reader, for example each part of the next kernel gradient.
    overhang = max((rows.shape[1] - 1) * stride[0] + window[0] - shape[1], 0)
    x = lax.reduce_window(
        x,
        x.dtype.type(-np.inf),
        reference.larger,
        (1, window[0], 1, 1),
        (1, stride[0], 1, 1),
        ((0, 0), (0, overhang), (0, 0), (0, 0)),
    )
    return x, (rows, columns)


def _max_pool_backward(window, stride, ceil, shape, places, g):
    def of_example(arrays):
        g, *places = arrays
        for axis, place in enumerate(places):
            g = _to_winners(g, place, window[axis], stride[axis], axis, shape[1 + axis])
        return g

    # One example after the other: XLA stores what goes into a loop. Outside one it would
    # compute the places again, for every element that may be the winner.
    return (lax.map(of_example, (g, *places)),)


def _to_winners(g, place, window: int, stride: int, axis: int, length: int):
    """Return the gradient of each window along `axis`, at the element that won.

    Element q * stride + t is at place t + j * stride of window q - j, for every j
    that the window has room for.
    """
    elements, count = np.arange(length), g.shape[axis]
    shape = [1] * g.ndim
    shape[axis] = length
    total: Any = 0
    for j in range(-(-window // stride)):
        of_window = elements // stride - j
        at = elements - of_window * stride
        inside = (of_window >= 0) & (of_window < count) & (at < window)
        at = np.where(inside, at, window).reshape(shape)  # no winner is at `window`
        # Indexing with constants: a padded array would put each element behind a branch,
        # which takes five times as long on processors without AVX-512.
        picked = np.clip(of_window, 0, count - 1)
        values, winners = (jnp.take(a, picked, axis=axis, mode="clip") for a in (g, place))
        total += jnp.where(winners == jnp.asarray(at, place.dtype), values, 0)
    return total


_max_pool = jax.custom_vjp(_max_pool_value, nondiff_argnums=(1, 2, 3, 4))
_max_pool.defvjp(_max_pool_forward, _max_pool_backward)
