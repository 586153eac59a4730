"""Operators of the network: LRN, grouped and local convolution, pooling.

They are pure functions of floating-point arrays with channels last. Each computes in at
least float32 and returns the dtype of its input; integers raise TypeError (max_pool
takes them). With `fast=True` it runs the hand-written form for the backend, if there is
one. With `fast=False` it runs the plain form, which also supports forward mode and second
derivatives.
"""

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from alexnet_jax.models.ops import cpu, gpu, reference

__all__ = [
    "add_bias",
    "avg_pool",
    "grouped_conv",
    "jit",
    "local_conv",
    "local_response_norm",
    "max_pool",
    "wide_matmul",
    "within_map_response_norm",
]

# The backend of `compiling_for`.
_target: ContextVar[str | None] = ContextVar("target", default=None)


class _Path(NamedTuple):
    """The module whose operators are used, and what it computes in one call."""

    forms: ModuleType
    groups_in_one_call: bool = False
    lrn_and_pool_in_one_call: bool = False


def _path(fast: bool) -> _Path:
    """Choose the form of every operator. This is the one place that does.

    On a GPU cuDNN convolves all groups in one call, unless XLA may split that call over
    devices. `ALEXNET_SPLIT_GROUPS=1` in the environment convolves group by group there too,
    if a measurement says otherwise.
    """
    if fast and backend() == "cpu":
        return _Path(cpu, lrn_and_pool_in_one_call=True)
    if fast and backend() == "gpu":
        split = os.environ.get("ALEXNET_SPLIT_GROUPS") == "1" or _partitioned_by_xla()
        return _Path(gpu, groups_in_one_call=not split)
    return _Path(reference)


def _partitioned_by_xla() -> bool:
    """Return whether XLA may split arrays over devices: on several, outside `shard_map`.

    There the kernel's gradient of a convolution with `feature_group_count` is multiplied by
    the size of a mesh axis that does not split the batch (jax 0.10 and 0.11).
    """
    return jax.device_count() > 1 and not jax.sharding.get_abstract_mesh().manual_axes


def exchanges_in_background() -> bool:
    """Return whether devices compute while they exchange, so that an early start helps."""
    return backend() == "gpu"


def backend() -> str:
    """Return the backend that operators are chosen for, for example "cpu" or "gpu"."""
    return _target.get() or jax.default_backend()


@contextlib.contextmanager
def compiling_for(name: str) -> Iterator[None]:
    """Choose the operators of another backend, for programs that are compiled but not run."""
    token = _target.set(name)
    try:
        yield
    finally:
        _target.reset(token)


def jit(function: Callable[..., Any], **options: Any) -> Any:
    """Return `jax.jit(function)` with the options that make this network fast.

    On a CPU they choose how XLA computes convolutions (docs/performance.md has the
    figures). On other backends, and with a jaxlib that does not know them, this is
    `jax.jit`. JAX takes compiler options at the top only: use `jax.jit` for functions
    that are called inside another jit. This starts the backend, so call it after
    `jax.distributed.initialize`.

    Args:
      function: a function of arrays, for example `model.apply`.
      options: arguments of `jax.jit`, for example `static_argnames`.
    """
    compiler_options = _compiler_options(backend())
    return jax.jit(function, compiler_options=compiler_options, **options)


@functools.cache
def _compiler_options(backend: str) -> dict[str, Any]:
    if backend != "cpu":
        return {}
    options = cpu.COMPILER_OPTIONS
    try:
        jax.jit(lambda: jnp.zeros(()), compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        logging.getLogger(__name__).warning(
            "XLA does not know %s (%s): convolutions may be slower", ", ".join(options), error
        )
        return {}
    return options


@jax.named_scope("add_bias")
def add_bias(x: jax.Array, bias: jax.Array, *, fast: bool = True) -> jax.Array:
    """Add a bias to every position: [..., C] + [C].

    Args:
      x: [..., C].
      bias: [C], of any floating-point dtype. Its gradient is summed in float32.

    Returns:
      An array of x's shape.

    Raises:
      ValueError: for a bias of another shape.
    """
    _check_floating("add_bias", x)
    _check_bias("add_bias", x, bias)
    return _path(fast).forms.add_bias(x, bias)


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
    pool: Mapping[str, Any] | None = None,
    fast: bool = True,
) -> jax.Array:
    """Normalise each activation by its neighbours across channels (LRN).

    b_i = a_i / (k + alpha' * sum of a_j^2 over the `size` channels around i) ** beta,
    the window centred on i and truncated at the first and the last channel of a group
    (Krizhevsky et al. 2012, section 3.3, whose constants are the defaults).

    Args:
      x: activations [..., C], any leading dimensions.
      bias, relu: the layer's bias [C] and whether ReLU follows it. With both, a_i is
        relu(x + bias). They run in the same loop as LRN, which is faster than a loop of
        their own.
      size: channels in the window, odd and positive (the paper's n).
      k: added to the sum; positive.
      alpha: weight of the sum of squares, see `alpha_mode`.
      beta: the power; 0.75 is the fastest.
      groups: number of equal contiguous parts of C that the window does not cross: 2
        for a two-column network.
      alpha_mode: "sum": alpha' = alpha, as the paper writes it; "mean": alpha' =
        alpha / size, as cuda-convnet, Caffe and torch compute it.
      pool: arguments of a `max_pool` that follows, for example `{"window": 3, "stride":
        2}`; x is then [B, H, W, C]. On a CPU both run in one loop over parts of the
        batch, which is twice as fast and stores no normalised image.

    On a CPU, if `jit` has sharded the batch (without `shard_map`), the gradient gathers the
    whole batch on every device. With `pool` the value does so too.

    Returns:
      An array of x's shape; with `pool`, of the shape that `max_pool` returns.

    Raises:
      ValueError: for an even or non-positive `size`, channels that `groups` does not
        divide, a bias of another shape, or an unknown `alpha_mode`. With `pool`, also for
        the errors of `max_pool`.
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
    path = _path(fast)
    constants: dict[str, Any] = {
        "relu": relu,
        "size": size,
        "k": k,
        "alpha": alpha if alpha_mode == "sum" else alpha / size,
        "beta": beta,
        "groups": groups,
    }
    with jax.named_scope("local_response_norm"):
        if pool is not None and path.lrn_and_pool_in_one_call:
            return path.forms.lrn_and_max_pool(x, bias, _pooling(x, **pool), **constants)
        x = path.forms.local_response_norm(x, bias, **constants)
    return x if pool is None else max_pool(x, **pool, fast=fast)


@jax.named_scope("within_map_response_norm")
def within_map_response_norm(
    x: jax.Array,
    *,
    size: int = 3,
    k: float = 1.0,
    alpha: float = 5e-5,
    beta: float = 0.75,
    fast: bool = True,
) -> jax.Array:
    """Normalise each activation by the neighbouring pixels of the same map.

    b = a / (k + alpha / size**2 * sum of a^2 over `size` x `size` pixels) ** beta,
    the window centred and truncated at the borders; the divisor stays size**2 there.
    This is the "rnorm" layer of cuda-convnet, whose CIFAR-10 nets use the defaults.

    Args:
      x: activations [B, H, W, C].
      size: side of the window in pixels, odd and positive.
      k: added to the sum; positive.
      alpha: weight of the sum of squares before the division by size**2.
      beta: the power; 0.75 is the fastest.

    Returns:
      An array of x's shape.

    Raises:
      ValueError: for an even or non-positive `size`, or an x that is not [B, H, W, C].
    """
    _check_rank("within_map_response_norm", "x[B,H,W,C]", x, 4)
    _check_floating("within_map_response_norm", x)
    _check_odd("within_map_response_norm", size)
    return _path(fast).forms.within_map_response_norm(
        x, size=size, k=k, alpha=alpha / size**2, beta=beta
    )


@jax.named_scope("grouped_conv")
def grouped_conv(
    x: jax.Array,
    kernel: jax.Array,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[Sequence[int]] = 0,
    groups: int = 1,
    fast: bool = True,
) -> jax.Array:
    """Convolve (cross-correlate) in groups that do not see each other.

    Group g reads the g-th contiguous part of the input channels and writes the g-th
    part of the output channels: with groups=2 the kernels of conv2, conv4 and conv5
    "take as input only those kernel maps which reside on the same GPU"
    (Krizhevsky et al. 2012, sections 3.2 and 3.5). On a GPU it is one convolution, by
    XLA's `feature_group_count`. It is one per group on a CPU, where `feature_group_count`
    has a slow gradient, and outside `shard_map` on several devices, where XLA may compute a
    wrong one. There the gradient of sharded examples gathers the whole batch on every device.

    Args:
      x: inputs [B, H, W, Cin].
      kernel: [kh, kw, Cin / groups, Cout]; used in x's dtype.
      stride: one number or (down, across).
      padding: zeros around the input, one number or ((top, bottom), (left, right)).
      groups: divides Cin and Cout.

    Returns:
      [B, H', W', Cout], H' = (H + top + bottom - kh) // stride + 1.

    Raises:
      ValueError: for arrays of another rank, channels that `groups` does not divide, or
        a kernel for another number of channels.
    """
    _check_rank("grouped_conv", "x[B,H,W,Cin]", x, 4)
    _check_rank("grouped_conv", "kernel[kh,kw,Cin/groups,Cout]", kernel, 4)
    _check_floating("grouped_conv", x)
    _check_divides("grouped_conv", "input channels", x.shape[-1], groups)
    _check_divides("grouped_conv", "output channels", kernel.shape[-1], groups)
    path, kernel = _path(fast), kernel.astype(x.dtype)
    conv = functools.partial(path.forms.conv, stride=_pair(stride), padding=_pads(padding))
    if groups == 1:
        return conv(x, kernel)
    if path.groups_in_one_call:
        return conv(x, kernel, groups=groups)
    inputs, kernels = (jnp.split(array, groups, axis=-1) for array in (x, kernel))
    return jnp.concatenate(list(map(conv, inputs, kernels)), axis=-1)


def local_conv(
    x: jax.Array, kernel: jax.Array, *, padding: int | Sequence[Sequence[int]] = 0
) -> jax.Array:
    """Convolve with a kernel of its own for every place: a locally connected layer.

    cuda-convnet's best CIFAR-10 nets have two of these "local" layers.

    Args:
      x: inputs [B, H, W, Cin].
      kernel: [H', W', kh, kw, Cin, Cout], one kernel per place; used in x's dtype.
      padding: zeros around the input, one number or ((top, bottom), (left, right)).

    Returns:
      [B, H', W', Cout], H' = H + top + bottom - kh + 1.

    Raises:
      ValueError: for arrays of another rank, or a kernel for other places or channels.
    """
    _check_rank("local_conv", "x[B,H,W,Cin]", x, 4)
    _check_rank("local_conv", "kernel[H',W',kh,kw,Cin,Cout]", kernel, 6)
    _check_floating("local_conv", x)
    pads = _pads(padding)
    places = tuple(x.shape[1 + i] + sum(pads[i]) - kernel.shape[2 + i] + 1 for i in range(2))
    if kernel.shape[:2] != places or kernel.shape[4] != x.shape[-1]:
        raise ValueError(
            f"local_conv: kernel {kernel.shape} is for {kernel.shape[:2]} places and "
            f"{kernel.shape[4]} channels, expected {places} and {x.shape[-1]}: x is "
            f"{x.shape}, padding {pads}"
        )
    return reference.local_conv(x, kernel.astype(x.dtype), padding=pads)


def wide_matmul(x: jax.Array, kernel: jax.Array, *, fast: bool = True) -> jax.Array:
    """Return x @ kernel in at least float32: logits are not rounded to x's dtype.

    On a GPU the gradient's products read x's dtype, as those of other layers do.

    Args:
      x: [B, Cin].
      kernel: [Cin, Cout]; used in x's dtype.

    Returns:
      [B, Cout].
    """
    _check_rank("wide_matmul", "x[B,Cin]", x, 2)
    _check_floating("wide_matmul", x)
    return _path(fast).forms.wide_matmul(x, kernel.astype(x.dtype))


@jax.named_scope("max_pool")
def max_pool(
    x: jax.Array,
    *,
    window: int | Sequence[int] = 3,
    stride: int | Sequence[int] = 2,
    ceil: bool = False,
    fast: bool = True,
) -> jax.Array:
    """Return the maximum of each window.

    The default windows overlap (Krizhevsky et al. 2012, section 3.4). The gradient is
    deterministic and needs no select-and-scatter. The first of tied values in row-major
    order takes the whole gradient, as in lax and torch. NaN propagates.

    Args:
      x: [B, H, W, C] of any real dtype.
      window: side of the window in pixels, one number or (height, width).
      stride: step between windows, one number or (down, across).
      ceil: False keeps the windows that lie wholly inside. True adds a last window that
        hangs over the right and bottom edge and sees only what is inside
        (cuda-convnet's CIFAR-10 nets).

    Returns:
      [B, H', W', C], H' = (H - window) / stride + 1 rounded down (up).

    Raises:
      ValueError: for an x that is not [B, H, W, C], or without `ceil` a window larger
        than the image.
    """
    pooling = _pooling(x, window, stride, ceil)
    # Only floats have a gradient, which is what the fast forms are for.
    pool = _path(fast and jnp.issubdtype(x.dtype, jnp.floating)).forms.max_pool
    return pool(x, **pooling)


def _pooling(
    x: jax.Array,
    window: int | Sequence[int] = 3,
    stride: int | Sequence[int] = 2,
    ceil: bool = False,
) -> dict[str, Any]:
    """Return the checked arguments of `max_pool`, whose defaults these are."""
    _check_pool("max_pool", x, _pair(window), ceil)
    return {"window": _pair(window), "stride": _pair(stride), "ceil": ceil}


@jax.named_scope("avg_pool")
def avg_pool(
    x: jax.Array, *, window: int | Sequence[int], stride: int | Sequence[int], ceil: bool = False
) -> jax.Array:
    """Return the average of each window.

    Args:
      x: activations [B, H, W, C].
      window: side of the window in pixels, one number or (height, width).
      stride: step between windows, one number or (down, across).
      ceil: as in `max_pool`; a window that hangs over the edge is divided by the
        number of pixels inside, as cuda-convnet does.

    Returns:
      [B, H', W', C], H' = (H - window) / stride + 1 rounded down (up).

    Raises:
      ValueError: as `max_pool`.
    """
    _check_pool("avg_pool", x, _pair(window), ceil)
    _check_floating("avg_pool", x)
    window, stride = _pair(window), _pair(stride)
    return reference.avg_pool(x, window=window, stride=stride, ceil=ceil)


def _check_pool(name: str, x: jax.Array, window: tuple[int, int], ceil: bool) -> None:
    _check_rank(name, "x[B,H,W,C]", x, 4)
    if not ceil and (window[0] > x.shape[1] or window[1] > x.shape[2]):
        raise ValueError(
            f"{name}: window {window} is larger than the image {x.shape[1:3]}; "
            "expected at most its size, or ceil=True"
        )


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
            f"per channel of x{x.shape}"
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


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    first, second = (value, value) if isinstance(value, int) else value
    return first, second


def _pads(padding: int | Sequence[Sequence[int]]) -> reference.Pads:
    if isinstance(padding, int):
        return (padding, padding), (padding, padding)
    (top, bottom), (left, right) = padding
    return (top, bottom), (left, right)
