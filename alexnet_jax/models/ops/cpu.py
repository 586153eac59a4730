"""Fast forms for the CPU, where XLA's own gradients of these operators are slow.

Every operator has a hand-written reverse-mode gradient (`jax.custom_vjp`), so forward
mode (`jax.jvp`, `jax.linearize`, Hessian-vector products) needs the plain form,
`fast=False`. `alexnet_jax.models.ops` checks the arguments.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

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
# Bytes of the part of the batch that a loop takes at a time. With the arrays that are made
# of it, it fits in a server's cache. 2 to 8 of conv1's images are equally fast.
_CACHED = 4_000_000

# docs/performance.md has the effect of each.
# - oneDNN computes convolutions with jaxlib 0.11. With 0.10, which ignores its option, Eigen
#   does. Without these options YNNPACK would, which gives less than 128 output channels to
#   one thread. It keeps the matrix products.
# - LRN and pooling profit from wider vectors.
# - The region analysis saves a copy of all parameters per training step.
COMPILER_OPTIONS = {
    "xla_cpu_copy_insertion_use_region_analysis": True,
    "xla_cpu_experimental_onednn_custom_call": True,
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


class _Norm(NamedTuple):
    """The constants of `local_response_norm`."""

    relu: bool
    size: int
    k: float
    alpha: float
    beta: float
    groups: int


class _Pooling(NamedTuple):
    """The windows of `max_pool`."""

    window: tuple[int, int]
    stride: tuple[int, int]
    ceil: bool


def local_response_norm(x: jax.Array, bias: jax.Array | None, **constants: Any) -> jax.Array:
    """Return LRN across channels; `alpha` multiplies the plain sum of squares."""
    terms = _wide_terms(jnp.atleast_2d(x), bias)
    return _lrn(terms, _Norm(**constants)).reshape(x.shape).astype(x.dtype)


def _wide_terms(x: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, ...]:
    wide = jnp.promote_types(x.dtype, jnp.float32)
    terms = (x,) if bias is None else (x, bias)
    return gradients.operands(*(term.astype(wide) for term in terms))


def _lrn_value(terms, norm) -> jax.Array:
    """Return LRN in one loop over `terms`, the array and its bias, that XLA vectorises."""

    def squares(terms):
        return jnp.square(gradients.activation(terms, norm.relu))

    total = gradients.window_sum(squares, terms, norm.size, norm.groups)
    base = norm.k + norm.alpha * total
    return gradients.activation(terms, norm.relu) / gradients.power(base, norm.beta)


def _lrn_forward(terms, norm):
    # To compute the base again is as fast as to load it.
    return _lrn_value(terms, norm), terms


def _lrn_backward(norm, terms, g):
    x, *bias = terms
    dx = _in_place(lambda x, g: _lrn_input_gradient((x, *bias), norm, g), x, g)
    return ((dx, *(_sum_positions(dx) for _ in bias)),)


def _lrn_input_gradient(terms, norm, g):
    a = gradients.activation(terms, norm.relu)
    base = _stored_base(a, norm)
    scaled = g / gradients.power(base, norm.beta)
    # The window is centred, so "all i whose window holds j" is j's own window.
    shared = _stored_window_sum(scaled * a / base, norm)
    da = scaled - 2 * norm.alpha * norm.beta * a * shared
    return jnp.where(a > 0, da, 0) if norm.relu else da


def _stored_base(a: jax.Array, norm: _Norm) -> jax.Array:
    return norm.k + norm.alpha * _stored_window_sum(jnp.square(a), norm)


def _stored_window_sum(a: jax.Array, norm: _Norm) -> jax.Array:
    """Return the sums of `size` neighbouring channels inside their group.

    Several operations read them. XLA stores the input and the output of this one, instead
    of computing every shifted array again in each reader.
    """
    rows = a.reshape(-1, a.shape[-1] // norm.groups)
    sides = ((0, 0), (norm.size // 2, norm.size // 2))
    sums = lax.reduce_window(rows, rows.dtype.type(0), lax.add, (1, norm.size), (1, 1), sides)
    return sums.reshape(a.shape)


_lrn = jax.custom_vjp(_lrn_value, nondiff_argnums=(1,))
_lrn.defvjp(_lrn_forward, _lrn_backward)


def lrn_and_max_pool(
    x: jax.Array, bias: jax.Array | None, pooling: dict[str, Any], **constants: Any
) -> jax.Array:
    """Return `max_pool` of `local_response_norm`, without storing the normalised images.

    Both passes go through a few examples at a time, whose arrays stay in the cache.
    """
    terms = _wide_terms(x, bias)
    return _lrn_and_pool(terms, _Norm(**constants), _Pooling(**pooling), x.dtype)


def _lrn_and_pool_value(terms, norm, pooling, dtype) -> jax.Array:
    def pooled(y):
        return reference.max_pool(y, **pooling._asdict())

    return _of_normalised(pooled, terms, norm, dtype)


def _lrn_and_pool_forward(terms, norm, pooling, dtype):
    def pooled(y):
        return _max_and_places(y, pooling)

    y, places = _of_normalised(pooled, terms, norm, dtype)
    return y, (terms, places)


def _of_normalised(function, terms, norm, dtype) -> Any:
    """Return function(LRN of the terms), a few examples at a time."""
    x, *bias = terms

    def part(x):
        a = gradients.activation((x, *bias), norm.relu)
        return function((a / gradients.power(_stored_base(a, norm), norm.beta)).astype(dtype))

    return _in_parts(part, x.shape, x)


def _lrn_and_pool_backward(norm, pooling, dtype, residuals, g):
    (x, *bias), places = residuals

    def part(x, places, g):
        g = _to_winners(g, places, pooling, x.shape).astype(x.dtype)
        return _lrn_input_gradient((x, *bias), norm, g)

    dx = _in_place(part, x, places, g)
    return ((dx, *(_sum_positions(dx) for _ in bias)),)


_lrn_and_pool = jax.custom_vjp(_lrn_and_pool_value, nondiff_argnums=(1, 2, 3))
_lrn_and_pool.defvjp(_lrn_and_pool_forward, _lrn_and_pool_backward)


# A loop over parts of the batch: the arrays that a part needs on its way stay in the
# processor's cache. XLA stores what goes into a loop, so nothing before it is computed
# again inside.


def _in_parts(function: Callable[..., Any], shape: tuple[int, ...], *arrays: Any) -> Any:
    """Return function(*arrays), computed for a few examples of `shape` after the other."""
    found = lax.map(lambda arrays: function(*arrays), _parts(arrays, shape))
    return jax.tree.map(lambda a: a.reshape(shape[0], *a.shape[2:]), found)


def _in_place(function: Callable[..., jax.Array], x: jax.Array, *arrays: Any) -> jax.Array:
    """Return function(x, *arrays) as `_in_parts`, in the memory of x if x is not used again."""
    if not x.size:
        return x

    def step(i, parts):
        part = function(*jax.tree.map(lambda a: a[i], (parts, *others)))
        return lax.dynamic_update_index_in_dim(parts, part, i, 0)

    parts, *others = _parts((x, *arrays), x.shape)
    return lax.fori_loop(0, parts.shape[0], step, parts).reshape(x.shape)


def _parts(arrays: Any, shape: tuple[int, ...]) -> Any:
    """Return arrays[batch, ...] as [parts, examples, ...]."""
    batch, *rest = shape
    most = max(1, min(batch // 2, _CACHED // max(1, 4 * math.prod(rest))))
    # A part of another size at the end would cost a copy of the whole result.
    size = max(size for size in range(1, most + 1) if batch % size == 0)
    if 4 * size < most:  # no useful divisor: many tiny parts are slower than one
        size = batch
    return jax.tree.map(lambda a: a.reshape(batch // size, size, *a.shape[1:]), arrays)


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


def max_pool(x: jax.Array, **pooling: Any) -> jax.Array:
    """Return the maximum, with a gradient that remembers which element won."""
    (x,) = gradients.operands(x)
    return _max_pool(x, _Pooling(**pooling), x.shape)


def _max_pool_value(x, pooling, shape) -> jax.Array:
    return reference.max_pool(x, **pooling._asdict())


def _max_pool_forward(x, pooling, shape):
    return _max_and_places(x, pooling)


def _max_and_places(x: jax.Array, pooling: _Pooling) -> tuple[jax.Array, list[jax.Array]]:
    """Return each window's maximum, and the winner's row and column in the window.

    The two places take one byte each; the image itself is not kept.
    """
    (height, width), (down, across), ceil = pooling
    side = x.shape[1]
    x, columns = reference.max_along(x, width, across, axis=2, ceil=ceil)
    _, rows = reference.max_along(x, height, down, axis=1, ceil=ceil)
    # The same maximum again: XLA stores the output of this operation. It would repeat
    # another one in each reader, for example each part of the next kernel gradient.
    overhang = max((rows.shape[1] - 1) * down + height - side, 0)
    x = lax.reduce_window(
        x,
        x.dtype.type(-np.inf),
        reference.larger,
        (1, height, 1, 1),
        (1, down, 1, 1),
        ((0, 0), (0, overhang), (0, 0), (0, 0)),
    )
    return x, [rows, columns]


def _max_pool_backward(pooling, shape, places, g):
    def part(places, g):
        return _to_winners(g, places, pooling, shape)

    return (_in_parts(part, shape, places, g),)


def _to_winners(g, places, pooling: _Pooling, shape: tuple[int, ...]) -> jax.Array:
    """Return the gradient of each window at the element that won, in images of `shape`."""
    for axis, place in enumerate(places, start=1):
        window, stride = pooling.window[axis - 1], pooling.stride[axis - 1]
        g = _to_winners_along(g, place, window, stride, axis, shape[axis])
    return g


def _to_winners_along(g, place, window: int, stride: int, axis: int, length: int):
    """Return the gradient along one axis.

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


_max_pool = jax.custom_vjp(_max_pool_value, nondiff_argnums=(1, 2))
_max_pool.defvjp(_max_pool_forward, _max_pool_backward)
