"""The network's own operations: LRN, grouped convolution and pooling.

Pure functions on jax arrays with channels last. Each computes in at least float32
inside and returns its input's dtype. `fast=True` takes the hand-written path of the
backend where there is one; `fast=False` is always the plain form, which supports
forward mode and second derivatives too.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from alexnet_jax.models.ops import cpu, reference

__all__ = [
    "add_bias",
    "avg_pool",
    "compiler_options",
    "grouped_conv",
    "jit",
    "local_conv",
    "local_response_norm",
    "max_pool",
    "within_map_response_norm",
]


def _implementation(fast: bool):
    """The module whose operators are used: chosen only here."""
    return cpu if fast and jax.default_backend() == "cpu" else reference


def jit(function: Callable[..., Any], **options: Any) -> Any:
    """Return `jax.jit(function)` with the options that make this network fast.

    On a CPU they choose how XLA computes convolutions (docs/performance.md has the
    figures). On other backends, and with a jaxlib that does not know them, this is
    `jax.jit`. JAX takes compiler options at the top only: use `jax.jit` for functions
    that are called inside another jit. This starts the backend, so call it after
    `jax.distributed.initialize`.

    Args:
      function: a function of arrays, such as `model.apply`.
      options: arguments of `jax.jit`, such as `static_argnames`.
    """
    return jax.jit(function, compiler_options=compiler_options(), **options)


def compiler_options() -> dict[str, Any]:
    """Return the compiler options of `jit`: {} on backends other than CPUs."""
    return dict(_known_options(jax.default_backend()))


@functools.cache
def _known_options(backend: str) -> dict[str, Any]:
    if backend != "cpu":
        return {}
    options = cpu.COMPILER_OPTIONS
    try:
        jax.jit(lambda: jnp.zeros(()), compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        logging.getLogger(__name__).warning(
            "XLA does not know %s (%s): convolutions may be slower",
            ", ".join(options),
            error,
        )
        return {}
    return options


def add_bias(x: jax.Array, bias: jax.Array, *, fast: bool = True) -> jax.Array:
    """Adds a bias to every position: [..., C] + [C].

    Args:
      x: floating-point [..., C].
      bias: [C]; used in x's dtype.
      fast: False for the plain form (forward mode, second derivatives).

    Returns:
      An array of x's shape and dtype.

    Raises:
      ValueError: for a bias of another shape.
      TypeError: for an integer x.
    """
    _check_floating("add_bias", x)
    _check_bias("add_bias", x, bias)
    return _implementation(fast).add_bias(x, bias.astype(x.dtype))


def local_response_norm(
    x: jax.Array,
    bias: jax.Array | None = None,
    *,
    relu: bool = False,
    size: int = 5,
    k: float = 2.0,
    alpha: float = 1e-4,
    beta: float = 0.75,
    groups: int = 1,
    alpha_mode: str = "sum",
    fast: bool = True,
) -> jax.Array:
    """Local response normalisation across channels.

    b_i = a_i / (k + alpha' * sum of a_j^2 over the `size` channels around i) ** beta,
    the window centred on i and truncated at the first and the last channel of a group
    (Krizhevsky et al. 2012, section 3.3, whose constants are the defaults).

    Args:
      x: floating-point activations [..., C], any leading dimensions.
      bias, relu: with them the activations are relu(x + bias[C]): a layer's bias and
        nonlinearity in the same loop, which is faster than before it.
      size: channels in the window, odd and positive (the paper's n).
      k: added to the sum; positive.
      alpha: weight of the sum of squares, see `alpha_mode`.
      beta: the power; 0.75 is the fastest.
      groups: equal contiguous parts of C that the window does not cross, one a column
        of a two-column network.
      alpha_mode: "sum" takes alpha' = alpha, as the paper writes it; "mean" takes
        alpha' = alpha / size, as cuda-convnet, Caffe and torch compute it.
      fast: False for the plain form (forward mode, second derivatives).

    Returns:
      An array of x's shape and dtype.

    Raises:
      ValueError: for an even or non-positive `size`, channels that `groups` does not
        divide, a bias of another shape, or an unknown `alpha_mode`.
      TypeError: for integer activations.
    """
    _check_floating("local_response_norm", x)
    _check_odd("local_response_norm", size)
    _check_divides("local_response_norm", "channels", x.shape[-1], groups)
    if bias is not None:
        _check_bias("local_response_norm", x, bias)
    if alpha_mode not in ("sum", "mean"):
        raise ValueError(
            f'local_response_norm: alpha_mode is "{alpha_mode}", expected "sum" '
            '(the paper) or "mean" (cuda-convnet, Caffe, torch)'
        )
    return _implementation(fast).local_response_norm(
        x,
        bias,
        relu=relu,
        size=size,
        k=k,
        alpha=alpha if alpha_mode == "sum" else alpha / size,
        beta=beta,
        groups=groups,
    )


def within_map_response_norm(
    x: jax.Array,
    *,
    size: int = 3,
    k: float = 1.0,
    alpha: float = 5e-5,
    beta: float = 0.75,
    fast: bool = True,
) -> jax.Array:
    """Response normalisation over the neighbouring pixels of the same map.

    b = a / (k + alpha / size**2 * sum of a^2 over `size` x `size` pixels) ** beta,
    the window centred and truncated at the borders; the divisor stays size**2 there.
    This is the "rnorm" layer of cuda-convnet, whose CIFAR-10 nets use the defaults.

    Args:
      x: floating-point activations [B, H, W, C].
      size: side of the window in pixels, odd and positive.
      k: added to the sum; positive.
      alpha: weight of the sum of squares before the division by size**2.
      beta: the power; 0.75 is the fastest.
      fast: False for the plain form (forward mode, second derivatives).

    Returns:
      An array of x's shape and dtype.

    Raises:
      ValueError: for an even or non-positive `size`, or an x that is not [B, H, W, C].
      TypeError: for integer activations.
    """
    _check_rank("within_map_response_norm", "x[B,H,W,C]", x, 4)
    _check_floating("within_map_response_norm", x)
    _check_odd("within_map_response_norm", size)
    return _implementation(fast).within_map_response_norm(
        x, size=size, k=k, alpha=alpha / size**2, beta=beta
    )


def grouped_conv(
    x: jax.Array,
    kernel: jax.Array,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[Sequence[int]] = 0,
    groups: int = 1,
    fast: bool = True,
) -> jax.Array:
    """2-D convolution (cross-correlation) in groups that do not see each other.

    Group g reads the g-th contiguous part of the input channels and writes the g-th
    part of the output channels: with groups=2 the kernels of conv2, conv4 and conv5
    "take as input only those kernel maps which reside on the same GPU"
    (Krizhevsky et al. 2012, sections 3.2 and 3.5). Computed as one convolution a
    group: XLA's `feature_group_count` has a slow gradient, and under `jit` with
    sharded examples gathers the whole batch on every device.

    Args:
      x: floating-point inputs [B, H, W, Cin].
      kernel: [kh, kw, Cin / groups, Cout]; used in x's dtype.
      stride: one number or (down, across).
      padding: zeros around the input, one number or ((top, bottom), (left, right)).
      groups: divides Cin and Cout.
      fast: False for the plain form (forward mode, second derivatives).

    Returns:
      [B, H', W', Cout] in x's dtype, H' = (H + top + bottom - kh) // stride + 1.

    Raises:
      ValueError: for channel counts that do not fit `groups` or each other, a stride
        or padding of another form, or a kernel larger than the padded input.
      TypeError: for integer inputs.
    """
    _check_rank("grouped_conv", "x[B,H,W,Cin]", x, 4)
    _check_rank("grouped_conv", "kernel[kh,kw,Cin/groups,Cout]", kernel, 4)
    _check_floating("grouped_conv", x)
    steps = _pair("grouped_conv", "stride", stride)
    pads = _pads(padding)
    _check_divides("grouped_conv", "input channels", x.shape[-1], groups)
    _check_divides("grouped_conv", "output channels", kernel.shape[-1], groups)
    if kernel.shape[2] * groups != x.shape[-1]:
        raise ValueError(
            f"grouped_conv: kernel {kernel.shape} reads {kernel.shape[2]} channels a "
            f"group, expected {x.shape[-1] // groups}: x has {x.shape[-1]} in "
            f"{groups} group(s)"
        )
    for size, length, sides in zip(kernel.shape[:2], x.shape[1:3], pads, strict=True):
        if size > length + sum(sides):
            raise ValueError(
                f"grouped_conv: kernel {kernel.shape[:2]} is larger than the input "
                f"{x.shape[1:3]} with padding {pads}"
            )
    conv = _implementation(fast).conv
    kernel = kernel.astype(x.dtype)
    if groups == 1:
        return conv(x, kernel, stride=steps, padding=pads)
    parts = zip(
        jnp.split(x, groups, axis=-1), jnp.split(kernel, groups, axis=-1), strict=True
    )
    return jnp.concatenate(
        [conv(a, w, stride=steps, padding=pads) for a, w in parts], axis=-1
    )


def local_conv(
    x: jax.Array, kernel: jax.Array, *, padding: int | Sequence[Sequence[int]] = 0
) -> jax.Array:
    """A locally connected layer: a convolution whose kernels differ from place to place.

    cuda-convnet's "local" layers, of which its best CIFAR-10 nets have two. As many
    matrix products as there are places; differentiable in every way.

    Args:
      x: floating-point inputs [B, H, W, Cin].
      kernel: [H', W', kh, kw, Cin, Cout], one kernel a place; used in x's dtype.
      padding: zeros around the input, one number or ((top, bottom), (left, right)).

    Returns:
      [B, H', W', Cout] in x's dtype, H' = H + top + bottom - kh + 1.

    Raises:
      ValueError: for a kernel of another number of places or of channels.
      TypeError: for integer inputs.
    """
    _check_rank("local_conv", "x[B,H,W,Cin]", x, 4)
    _check_rank("local_conv", "kernel[H',W',kh,kw,Cin,Cout]", kernel, 6)
    _check_floating("local_conv", x)
    pads = _pads(padding)
    places = tuple(
        length + sum(sides) - size + 1
        for length, sides, size in zip(
            x.shape[1:3], pads, kernel.shape[2:4], strict=True
        )
    )
    if kernel.shape[:2] != places or kernel.shape[4] != x.shape[-1]:
        raise ValueError(
            f"local_conv: kernel {kernel.shape} is for {kernel.shape[:2]} places and "
            f"{kernel.shape[4]} channels, expected {places} and {x.shape[-1]}: x is "
            f"{x.shape}, padding {pads}"
        )
    return reference.local_conv(x, kernel.astype(x.dtype), padding=pads)


def max_pool(
    x: jax.Array,
    *,
    window: int | Sequence[int] = 3,
    stride: int | Sequence[int] = 2,
    ceil: bool = False,
    fast: bool = True,
) -> jax.Array:
    """Max pooling; the default windows overlap (Krizhevsky et al. 2012, section 3.4).

    Deterministic, no select-and-scatter. Of tied values the first in row-major order
    takes the whole gradient, as in lax and torch; NaN propagates.

    Args:
      x: [B, H, W, C] of any real dtype.
      window: side of the window in pixels, one number or (height, width).
      stride: step between windows, one number or (down, across).
      ceil: False keeps the windows that lie wholly inside. True adds, right and
        bottom, the last window that hangs over the edge and sees only what is inside
        (cuda-convnet's CIFAR-10 nets).
      fast: False for the plain form (forward mode, second derivatives).

    Returns:
      [B, H', W', C] in x's dtype, H' = (H - window) / stride + 1 rounded down (up).

    Raises:
      ValueError: for an x that is not [B, H, W, C], a window or stride below 1, or
        without `ceil` a window larger than the picture.
    """
    sizes, steps = _check_pool("max_pool", x, window, stride, ceil)
    pool = _implementation(fast).max_pool
    return pool(x, window=sizes, stride=steps, ceil=ceil)


def avg_pool(
    x: jax.Array,
    *,
    window: int | Sequence[int],
    stride: int | Sequence[int],
    ceil: bool = False,
) -> jax.Array:
    """Average pooling.

    Args:
      x: floating-point activations [B, H, W, C].
      window: side of the window in pixels, one number or (height, width).
      stride: step between windows, one number or (down, across).
      ceil: as in `max_pool`; a window that hangs over the edge is divided by the
        number of pixels it really holds, as cuda-convnet does.

    Returns:
      [B, H', W', C] in x's dtype, H' = (H - window) / stride + 1 rounded down (up).

    Raises:
      ValueError: as `max_pool`.
      TypeError: for integer activations.
    """
    sizes, steps = _check_pool("avg_pool", x, window, stride, ceil)
    _check_floating("avg_pool", x)
    return reference.avg_pool(x, window=sizes, stride=steps, ceil=ceil)


def _check_pool(name, x, window, stride, ceil):
    _check_rank(name, "x[B,H,W,C]", x, 4)
    sizes, steps = _pair(name, "window", window), _pair(name, "stride", stride)
    if not ceil and (sizes[0] > x.shape[1] or sizes[1] > x.shape[2]):
        raise ValueError(
            f"{name}: window {sizes} is larger than the picture {x.shape[1:3]}; "
            "expected at most its size, or ceil=True"
        )
    return sizes, steps


def _check_rank(name: str, expected: str, x: jax.Array, rank: int) -> None:
    if x.ndim != rank:
        raise ValueError(f"{name}: got shape {x.shape}, expected {expected}")


def _check_floating(name: str, x: jax.Array) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name}: x is {x.dtype}, expected a floating-point dtype")


def _check_bias(name: str, x: jax.Array, bias: jax.Array) -> None:
    if bias.shape != x.shape[-1:]:
        raise ValueError(
            f"{name}: bias has shape {bias.shape}, expected {x.shape[-1:]}: one number "
            f"a channel of x{x.shape}"
        )


def _check_odd(name: str, size: int) -> None:
    if size < 1 or size % 2 == 0:
        raise ValueError(f"{name}: size is {size}, expected an odd number from 1 up")


def _check_divides(name: str, what: str, channels: int, groups: int) -> None:
    if groups < 1 or channels % groups:
        raise ValueError(
            f"{name}: {channels} {what} in {groups} groups, expected a number of "
            f"groups that divides {channels}"
        )


def _pair(name: str, what: str, value: int | Sequence[int]) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(
            f"{name}: {what} is {value}, expected one number or a pair, from 1 up"
        )
    return pair


def _pads(padding: int | Sequence[Sequence[int]]) -> reference.Pads:
    if isinstance(padding, int):
        padding = ((padding, padding), (padding, padding))
    pads = tuple(tuple(sides) for sides in padding)
    if [len(sides) for sides in pads] != [2, 2] or min(map(min, pads)) < 0:
        raise ValueError(
            f"grouped_conv: padding is {padding}, expected one number or "
            "((top, bottom), (left, right)), from 0 up"
        )
    (top, bottom), (left, right) = pads
    return (top, bottom), (left, right)
