"""Plain forms in jnp and lax: the definitions that the fast forms are tested against.

They are differentiable any number of times, forwards and backwards, on every backend.
`alexnet_jax.models.ops` checks the arguments.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Pads = tuple[tuple[int, int], tuple[int, int]]


def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """Return x[..., C] + bias[C], rounded once; the bias gradient is a sum in float32."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return (x.astype(wide) + bias.astype(wide)).astype(x.dtype)


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
    a = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if bias is not None:
        a = a + bias.astype(a.dtype)
    if relu:
        a = jax.nn.relu(a)
    a = a.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    total = window_sum(jnp.square(a), size, axis=-1)
    return (a / (k + alpha * total) ** beta).reshape(x.shape).astype(x.dtype)


def within_map_response_norm(
    x: jax.Array, *, size: int, k: float, alpha: float, beta: float
) -> jax.Array:
    """Return LRN over `size` x `size` pixels; `alpha` multiplies the plain sum."""
    a = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    total = window_sum(window_sum(jnp.square(a), size, axis=-2), size, axis=-3)
    return (a / (k + alpha * total) ** beta).astype(x.dtype)


def window_sum(x: jax.Array, size: int, *, axis: int) -> jax.Array:
    """Return sums of `size` neighbours along `axis`, centred, truncated at both ends."""
    length = x.shape[axis]
    pads = [(0, 0)] * x.ndim
    pads[axis] = (size // 2, size // 2)
    padded = jnp.pad(x, pads)
    total = lax.slice_in_dim(padded, 0, length, axis=axis)
    for start in range(1, size):
        total += lax.slice_in_dim(padded, start, start + length, axis=axis)
    return total


def conv(
    x: jax.Array, kernel: jax.Array, *, stride: tuple[int, int], padding: Pads, groups: int = 1
) -> jax.Array:
    """Convolve, NHWC and HWIO.

    XLA accumulates 16-bit inputs in float32 and rounds the result once. Without a cast
    a GPU can use its tensor cores.
    """
    return lax.conv_general_dilated(
        x,
        kernel,
        stride,
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def wide_matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Return x @ kernel in at least float32."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.matmul(x, kernel, preferred_element_type=wide)


def local_conv(x: jax.Array, kernel: jax.Array, *, padding: Pads) -> jax.Array:
    """Convolve with unshared weights: one matrix product per place."""
    rows, columns, height, width, inputs, features = kernel.shape
    wide = jnp.promote_types(x.dtype, jnp.float32)  # XLA lacks this product of bfloat16 on a CPU
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    windows = jnp.concatenate(
        [
            x[:, top : top + rows, left : left + columns]
            for top in range(height)
            for left in range(width)
        ],
        axis=-1,
    )
    kernel = kernel.reshape(rows, columns, height * width * inputs, features)
    product = jnp.einsum("bhwi,hwio->bhwo", windows.astype(wide), kernel.astype(wide))
    return product.astype(x.dtype)


def max_pool(
    x: jax.Array, *, window: tuple[int, int], stride: tuple[int, int], ceil: bool
) -> jax.Array:
    """Return the maximum of shifted strided slices, first across, then down.

    In that order, and with ties kept by the earlier slice, the winner is the first in
    row-major order. `reduce_window` would choose the same one, but its gradient
    (select-and-scatter) is slow on a CPU, and on a GPU XLA refuses it if operations must
    be deterministic.
    """
    for axis in (2, 1):
        x, _ = max_along(x, window[axis - 1], stride[axis - 1], axis=axis, ceil=ceil)
    return x


def max_along(
    x: jax.Array, window: int, stride: int, *, axis: int, ceil: bool
) -> tuple[jax.Array, jax.Array]:
    """Return the maximum of each window along one axis, and its place in the window.

    The dtype of places can also count to the end of the stride after the window.
    """
    lowest = -jnp.inf if jnp.issubdtype(x.dtype, jnp.floating) else _smallest(x.dtype)
    slices = window_slices(x, window, stride, axis=axis, ceil=ceil, fill=lowest)
    return first_maximum(slices, np.min_scalar_type(window + stride))


def first_maximum(arrays: Sequence[jax.Array], dtype: np.dtype) -> tuple[jax.Array, jax.Array]:
    """Return the maximum of arrays and, in `dtype`, the index of the first that has it."""
    x, *others = arrays
    place = jnp.zeros(x.shape, dtype)
    for i, other in enumerate(others, start=1):
        place = jnp.where(_stays(x, other), place, jnp.asarray(i, place.dtype))
        x = larger(x, other)
    return x, place


def larger(x: jax.Array, other: jax.Array) -> jax.Array:
    """Return the maximum of two, the first if they are equal; NaN if one is."""
    return jnp.where(_stays(x, other), x, other)


def _stays(x: jax.Array, other: jax.Array) -> jax.Array:
    # A NaN in `x` stays; one in `other` fails `x >= other` and is taken.
    return (x >= other) | jnp.isnan(x)


def avg_pool(
    x: jax.Array, *, window: tuple[int, int], stride: tuple[int, int], ceil: bool
) -> jax.Array:
    """Return the mean over the pixels of each window that lie inside the image."""
    total = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    for axis in (2, 1):
        size, step = window[axis - 1], stride[axis - 1]
        length = x.shape[axis]
        slices = window_slices(total, size, step, axis=axis, ceil=ceil, fill=0)
        starts = np.arange(slices[0].shape[axis]) * step
        inside = np.minimum(starts + size, length) - starts
        shape = [1] * x.ndim
        shape[axis] = -1
        total = sum(slices[1:], slices[0])
        total = total / jnp.asarray(inside.reshape(shape), total.dtype)
    return total.astype(x.dtype)


def pooled_length(length: int, window: int, stride: int, *, ceil: bool) -> int:
    """Return the number of windows that a side of `length` pixels holds."""
    if not ceil:
        return (length - window) // stride + 1
    count = max(-(-(length - window) // stride), 0) + 1
    # With a stride longer than the window the last one could start outside.
    return min(count, -(-length // stride))


def window_slices(
    x: jax.Array, window: int, stride: int, *, axis: int, ceil: bool, fill
) -> Sequence[jax.Array]:
    """Return slices along `axis`; slice i holds the i-th element of every window."""
    count = pooled_length(x.shape[axis], window, stride, ceil=ceil)
    last = (count - 1) * stride
    overhang = last + window - x.shape[axis]
    if overhang > 0:
        pads = [(0, 0)] * x.ndim
        pads[axis] = (0, overhang)
        x = jnp.pad(x, pads, constant_values=fill)
    return [
        lax.slice_in_dim(x, start, start + last + 1, stride, axis=axis) for start in range(window)
    ]


def _smallest(dtype: jnp.dtype) -> int:
    return int(jnp.iinfo(dtype).min)
