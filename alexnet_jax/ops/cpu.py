"""Fast paths for the CPU, where XLA's own gradients of these operations are slow.

Everything here has a hand-written reverse-mode gradient (`jax.custom_vjp`), so
forward mode (`jax.jvp`, `jax.linearize`, Hessian-vector products) needs the plain
form, `fast=False`. Arguments are checked in `alexnet_jax.ops`, not here.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from alexnet_jax.ops import reference
from alexnet_jax.ops.reference import Pads

# XLA writes a kernel's gradient as a convolution in which the examples are the input
# channels and the whole picture is the window. From about 64 examples that takes twice
# as long an example on the 13x13 layers; 8, 16 and 32 at a time are equally fast.
_EXAMPLES_AT_A_TIME = 16


def conv(
    x: jax.Array, kernel: jax.Array, *, stride: tuple[int, int], padding: Pads
) -> jax.Array:
    """One ungrouped convolution, NHWC and HWIO, computed in at least float32."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    a, kernel = _align_varying(x.astype(dtype), kernel.astype(dtype))
    return _conv(a, kernel, stride, padding).astype(x.dtype)


def _align_varying(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gives both operands the same varying mesh axes inside `jax.shard_map`.

    A hand-written gradient has to return the kernel's gradient with the kernel's own
    varying axes. A kernel that all data rows share is therefore first cast to varying:
    the transpose of that cast is the sum over the rows, which is the gradient wanted.
    Outside `shard_map`, and with `check_vma=False`, nothing varies and nothing is done.
    """
    x_axes = jax.typeof(x).manual_axis_type.varying
    kernel_axes = jax.typeof(kernel).manual_axis_type.varying
    if missing := kernel_axes - x_axes:
        x = lax.pcast(x, tuple(sorted(missing)), to="varying")
    if missing := x_axes - kernel_axes:
        kernel = lax.pcast(kernel, tuple(sorted(missing)), to="varying")
    return x, kernel


def _conv_value(x, kernel, stride, padding) -> jax.Array:
    return reference.conv(x, kernel, stride=stride, padding=padding)


def _conv_forward(x, kernel, stride, padding):
    return _conv_value(x, kernel, stride, padding), (x, kernel)


def _conv_backward(stride, padding, residuals, g):
    # Two independent pieces of code: jit drops the one whose result nobody uses,
    # such as the gradient of conv1's pictures.
    x, kernel = residuals
    conv = functools.partial(_conv_value, stride=stride, padding=padding)
    (dx,) = jax.linear_transpose(lambda x: conv(x, kernel), x)(g)
    return dx, _kernel_gradient(conv, x, kernel, g)


def _kernel_gradient(conv, x, kernel, g):
    """XLA's own gradient, taken for a few examples at a time and summed."""
    total = jnp.zeros_like(kernel)
    for start in range(0, x.shape[0], _EXAMPLES_AT_A_TIME):
        part = slice(start, start + _EXAMPLES_AT_A_TIME)
        transpose = jax.linear_transpose(functools.partial(conv, x[part]), kernel)
        total += transpose(g[part])[0]
    return total


_conv = jax.custom_vjp(_conv_value, nondiff_argnums=(2, 3))
_conv.defvjp(_conv_forward, _conv_backward)


def local_response_norm(
    x: jax.Array, *, size: int, k: float, alpha: float, beta: float, groups: int
) -> jax.Array:
    """LRN across channels; `alpha` multiplies the plain sum of squares."""
    a = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    a = a.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    y = _lrn(a, size, k, alpha, beta)
    return y.reshape(x.shape).astype(x.dtype)


def _lrn_value(a, size, k, alpha, beta) -> jax.Array:
    return a * _inverse_power(_lrn_base(a, size, k, alpha), beta)


def _lrn_base(a, size, k, alpha):
    return k + alpha * reference.window_sum(jnp.square(a), size, axis=-1)


def _lrn_forward(a, size, k, alpha, beta):
    # The base is as quick to compute again as to load, so only `a` is kept.
    return _lrn_value(a, size, k, alpha, beta), a


def _lrn_backward(size, k, alpha, beta, a, g):
    base = _lrn_base(a, size, k, alpha)
    scaled = g * _inverse_power(base, beta)
    # The window is centred, so "all i whose window holds j" is j's own window.
    shared = reference.window_sum(scaled * a / base, size, axis=-1)
    return (scaled - 2 * alpha * beta * a * shared,)


def _inverse_power(base, beta):
    """base ** -beta, by two roots for the usual beta of 0.75."""
    if beta == 0.75:
        root = lax.rsqrt(base)
        return root * jnp.sqrt(root)
    return base**-beta


_lrn = jax.custom_vjp(_lrn_value, nondiff_argnums=(1, 2, 3, 4))
_lrn.defvjp(_lrn_forward, _lrn_backward)
