"""Operators against plain NumPy loops, lax, torch and the constants of three papers.

The gradient of a loop is its central difference in float64: exact to about 1e-9 for
the smooth operations here, without any algebra.
"""

import contextlib
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from alexnet_jax.models import ops

FORMS = ["cpu", "gpu", "plain"]
PLAIN = pytest.param("plain", marks=pytest.mark.slow)  # lax's own, written out
ALL_FORMS = pytest.mark.parametrize("fast", [*FORMS[:2], PLAIN], indirect=True)


@pytest.fixture
def fast(request):
    """Yield the argument `fast`: True for the forms of a CPU and of a GPU, or False."""
    with contextlib.ExitStack() as stack:
        if request.param == "gpu":
            stack.enter_context(ops.compiling_for("gpu"))
            # As on one device; otherwise only `shard_map` convolves groups in one call.
            one_device = mock.patch.object(ops, "_partitioned_by_xla", return_value=False)
            stack.enter_context(one_device)
        yield request.param != "plain"


def loop_lrn(x, *, size=5, k=2.0, alpha=1e-4, beta=0.75, groups=1):
    """Return LRN by the formula of section 3.3, channel by channel; alpha is not divided."""
    y = np.empty_like(x)
    per_group = x.shape[-1] // groups
    for place in np.ndindex(x.shape):
        *pixel, i = place
        first = i // per_group * per_group
        low, high = max(first, i - size // 2), min(first + per_group - 1, i + size // 2)
        total = 0.0
        for j in range(low, high + 1):
            total += x[(*pixel, j)] ** 2
        y[place] = x[place] / (k + alpha * total) ** beta
    return y


def loop_within_map(x, *, size=3, k=1.0, alpha=5e-5, beta=0.75):
    y = np.empty_like(x)
    _, height, width, _ = x.shape
    reach = size // 2
    for b, h, w, c in np.ndindex(x.shape):
        total = 0.0
        for i in range(max(0, h - reach), min(height, h + reach + 1)):
            for j in range(max(0, w - reach), min(width, w + reach + 1)):
                total += x[b, i, j, c] ** 2
        y[b, h, w, c] = x[b, h, w, c] / (k + alpha / size**2 * total) ** beta
    return y


def loop_conv(x, kernel, *, stride, padding, groups, g):
    """Return y and, for a cotangent g of y, the gradients dx and dkernel."""
    (top, bottom), (left, right) = padding
    padded = np.pad(x, ((0, 0), *padding, (0, 0)))
    batch, height, width, _ = padded.shape
    kh, kw, inputs, outputs = kernel.shape
    out_h = (height - kh) // stride[0] + 1
    out_w = (width - kw) // stride[1] + 1
    y = np.zeros((batch, out_h, out_w, outputs))
    dx, dkernel = np.zeros_like(padded), np.zeros_like(kernel)
    for b, h, w, o in np.ndindex(y.shape):
        first = o // (outputs // groups) * inputs
        for i, j, c in np.ndindex(kh, kw, inputs):
            place = (b, h * stride[0] + i, w * stride[1] + j, first + c)
            y[b, h, w, o] += padded[place] * kernel[i, j, c, o]
            dx[place] += g[b, h, w, o] * kernel[i, j, c, o]
            dkernel[i, j, c, o] += g[b, h, w, o] * padded[place]
    return y, dx[:, top : height - bottom, left : width - right], dkernel


def loop_pool(x, reduce, *, window, stride, ceil):
    """Reduce windows, clipped to the image; if `ceil`, the last may hang over the edge."""
    grid = []
    for length, size, step in zip(x.shape[1:3], window, stride, strict=True):
        starts = list(range(0, length - size + 1, step))
        next_start = starts[-1] + step if starts else 0
        covered = starts[-1] + size if starts else 0
        if ceil and covered < length and next_start < length:
            starts.append(next_start)
        grid.append(starts)
    y = np.empty((x.shape[0], len(grid[0]), len(grid[1]), x.shape[3]), x.dtype)
    for b, h, w, c in np.ndindex(y.shape):
        top, left = grid[0][h], grid[1][w]
        patch = x[b, top : top + window[0], left : left + window[1], c]
        y[b, h, w, c] = reduce(patch)
    return y


def central_difference(f, x, weights, step=1e-5):
    """Return d sum(weights * f(x)) / dx, one entry at a time, in float64."""
    gradient = np.empty_like(x)
    for place in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[place] += step
        down[place] -= step
        difference = (f(up) - f(down)) / (2 * step)
        gradient[place] = np.sum(weights * difference)
    return gradient


def normal(*shape, seed=0, scale=1.0):
    return np.random.default_rng(seed).normal(0, scale, shape)


def relative_error(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return np.linalg.norm(got - want) / np.linalg.norm(want)


class Case(NamedTuple):
    """Hold an operator, its arguments, and its expected results for the cotangent g."""

    op: Callable[..., Any]
    arrays: Sequence[Any]
    y: Any
    g: Any
    gradients: Sequence[Any]


def check_cases(cases: Sequence[Case], exact):
    """Check values and gradients in float32 and float64, with one program to compile."""
    tolerances = {"float32": 2e-5, "float64": exact}

    @jax.jit
    def values_and_gradients(given):
        found = []
        for case, by_dtype in zip(cases, given, strict=True):
            pairs = {dtype: jax.vjp(case.op, *arrays) for dtype, (_, arrays) in by_dtype.items()}
            found.append({d: (value, *vjp(by_dtype[d][0])) for d, (value, vjp) in pairs.items()})
        return found

    def as_dtype(case, dtype):
        return np.asarray(case.g, dtype), [np.asarray(array, dtype) for array in case.arrays]

    with jax.enable_x64(True):
        given = [{dtype: as_dtype(case, dtype) for dtype in tolerances} for case in cases]
        found = values_and_gradients(given)
    for number, (case, by_dtype) in enumerate(zip(cases, found, strict=True)):
        for dtype, arrays in by_dtype.items():
            for array, want in zip(arrays, (case.y, *case.gradients), strict=True):
                assert array.dtype == dtype
                assert relative_error(array, want) < tolerances[dtype], (number, dtype)


def with_differences(loop, x):
    """Return x, the loop's value, a cotangent g, and central differences."""
    y = loop(x)
    g = normal(*y.shape, seed=9)
    return x, y, g, central_difference(loop, x, g)


@functools.cache
def differences_of_normal(loop, shape, seed, **constants):
    """Return `with_differences` of a random x, computed once for all forms."""
    x = normal(*shape, seed=seed, scale=2.0)
    return with_differences(functools.partial(loop, **constants), x)


def check_by_differences(pairs):
    """Check operators against (x, a loop's value, a cotangent, its central differences)."""
    cases = [Case(op, [x], y, g, [slope]) for op, (x, y, g, slope) in pairs]
    check_cases(cases, exact=1e-8)


# alpha is large so that the sum matters; the real constants have their own test.
LRN_CASES = [
    # shape, size, k, alpha, beta, groups
    ((1, 3, 12), 5, 2.0, 0.3, 0.75, 1),
    ((12,), 5, 2.0, 0.3, 0.75, 2),
    ((3, 12), 3, 1.0, 0.5, 0.5, 3),
    ((1, 2, 2, 12), 9, 1.0, 0.2, 1.3, 2),  # a window that is wider than its group
    ((2, 1, 1, 2, 12), 1, 1.0, 0.2, 0.75, 1),
]


@ALL_FORMS
def test_lrn_equals_the_loop(fast):
    pairs = []
    for shape, *values in LRN_CASES:
        constants = dict(zip(("size", "k", "alpha", "beta", "groups"), values, strict=True))
        op = functools.partial(ops.local_response_norm, **constants, fast=fast)
        pairs.append((op, differences_of_normal(loop_lrn, shape, 1, **constants)))
    check_by_differences(pairs)


def loop_lrn_and_pool(x, *, size, alpha, groups, **pool):
    return loop_pool(loop_lrn(x, size=size, alpha=alpha, groups=groups), np.max, **pool)


@ALL_FORMS
def test_lrn_with_a_pool_equals_the_loops(fast, monkeypatch):
    # The batch is processed in parts of two examples, and of one.
    monkeypatch.setattr(ops.cpu, "_CACHED", 2 * 4 * 5 * 4 * 6)
    lrn, pairs = {"size": 3, "alpha": 0.3, "groups": 2}, []
    for window, stride, ceil in ((3, 2, True), ((2, 3), (2, 1), False)):
        pool = {"window": window, "stride": stride, "ceil": ceil}
        op = functools.partial(ops.local_response_norm, **lrn, pool=pool, fast=fast)
        pool |= {"window": ops._pair(window), "stride": ops._pair(stride)}
        # No example depends on the others, so each has its own differences.
        shape, constants = (1, 5, 4, 6), {**lrn, **pool}
        examples = [
            differences_of_normal(loop_lrn_and_pool, shape, seed, **constants) for seed in range(7)
        ]
        whole = [np.concatenate(arrays) for arrays in zip(*examples, strict=True)]
        pairs += [(op, [array[:batch] for array in whole]) for batch in (1, 4, 7)]
    check_by_differences(pairs)


@ALL_FORMS
def test_lrn_constants_of_the_paper_and_of_caffe(fast):
    x = jnp.zeros(96).at[50].set(100.0)  # alpha x^2 = 1; Caffe divides it by n = 5
    paper = ops.local_response_norm(x, fast=fast)
    caffe = ops.local_response_norm(x, k=1.0, alpha_mode="mean", fast=fast)
    np.testing.assert_allclose(paper[50], 100 / 3.0**0.75, rtol=1e-6)
    np.testing.assert_allclose(caffe[50], 100 / 1.2**0.75, rtol=1e-6)


@ALL_FORMS
def test_lrn_window_is_truncated_and_stays_in_its_group(fast):
    """Count the channels of each window: with a tiny k they are the divisor."""
    x = jnp.ones(8)
    norm = functools.partial(ops.local_response_norm, k=1e-9, alpha=1.0, beta=1.0, fast=fast)
    counts = 1 / norm(x)
    np.testing.assert_allclose(counts, [3, 4, 5, 5, 5, 5, 4, 3], rtol=1e-6)
    counts = 1 / norm(x, groups=2)
    np.testing.assert_allclose(counts, [3, 4, 4, 3, 3, 4, 4, 3], rtol=1e-6)


@ALL_FORMS
def test_lrn_mean_mode_equals_torch(fast):
    torch = pytest.importorskip("torch")
    x = normal(2, 4, 3, 10, scale=30.0).astype(np.float32)
    theirs = torch.nn.LocalResponseNorm(5, alpha=1e-2, beta=0.75, k=2.0)
    want = theirs(torch.from_numpy(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    got = ops.local_response_norm(jnp.asarray(x), alpha=1e-2, alpha_mode="mean", fast=fast)
    np.testing.assert_allclose(got, want.numpy(), rtol=2e-5, atol=1e-6)


@ALL_FORMS
def test_within_map_norm_equals_the_loop(fast):
    pairs = []
    for size, beta in ((1, 0.75), (3, 0.75), (5, 0.6)):
        constants = {"size": size, "k": 1.0, "alpha": 3.0, "beta": beta}
        op = functools.partial(ops.within_map_response_norm, **constants, fast=fast)
        found = differences_of_normal(loop_within_map, (1, 5, 4, 2), 2, **constants)
        pairs.append((op, found))
    check_by_differences(pairs)


def loop_local_conv(x, kernel, padding):
    padded = np.pad(x, ((0, 0), *padding, (0, 0)))
    rows, columns, kh, kw, _, features = kernel.shape
    y = np.zeros((x.shape[0], rows, columns, features))
    for b, h, w, o in np.ndindex(y.shape):
        y[b, h, w, o] = np.sum(padded[b, h : h + kh, w : w + kw] * kernel[h, w, ..., o])
    return y


def test_local_conv_equals_the_loop():
    x, kernel = normal(2, 5, 4, 3, seed=3), normal(4, 5, 3, 2, 3, 4, seed=4)
    padding = ((1, 0), (1, 1))

    def op(x):
        return ops.local_conv(x, jnp.asarray(kernel, x.dtype), padding=padding)

    found = with_differences(lambda x: loop_local_conv(x, kernel, padding), x)
    check_by_differences([(op, found)])


ONE = ((1, 1), (1, 1))
CONV_CASES = {
    # name: x, kernel, stride, padding, groups
    "same_3x3": ((2, 5, 4, 2), (3, 3, 2, 3), (1, 1), ONE, 1),
    "two_groups": ((1, 5, 5, 4), (3, 3, 2, 4), (1, 1), ONE, 2),
    "three_groups_1x1": ((2, 3, 3, 6), (1, 1, 2, 3), (1, 1), ((0, 0), (0, 0)), 3),
    "conv1_in_small": ((1, 12, 12, 3), (7, 7, 3, 2), (4, 4), ((0, 3), (0, 3)), 1),
    "pixels_left_over": ((1, 10, 9, 3), (5, 5, 3, 2), (4, 4), ((0, 0), (0, 0)), 1),
    "uneven_stride": ((2, 7, 6, 2), (3, 2, 1, 4), (2, 3), ((0, 1), (2, 0)), 2),
    "wide_padding": ((1, 3, 3, 1), (2, 2, 1, 2), (1, 1), ((2, 3), (3, 2)), 1),
    "stride_beyond_kernel": ((1, 8, 8, 2), (2, 2, 2, 2), (3, 3), ((1, 0), (0, 1)), 1),
    "a_batch_in_parts": ((35, 3, 3, 1), (2, 2, 1, 2), (1, 1), ((0, 0), (0, 0)), 1),
}  # fmt: skip


@ALL_FORMS
def test_conv_equals_the_loop(fast):
    cases = []
    for x_shape, kernel_shape, stride, padding, groups in CONV_CASES.values():
        arrays = [normal(*x_shape, seed=3), normal(*kernel_shape, seed=4)]
        constants = {"stride": stride, "padding": padding, "groups": groups}
        op = functools.partial(ops.grouped_conv, **constants, fast=fast)
        g = normal(*jax.eval_shape(op, *arrays).shape, seed=9)
        y, dx, dkernel = loop_conv(*arrays, **constants, g=g)
        cases.append(Case(op, arrays, y, g, [dx, dkernel]))
    check_cases(cases, exact=1e-12)


def lowered_text(f, *arrays):
    text = jax.jit(f).lower(*arrays).as_text()
    assert text is not None
    return text


def compiled_text(f, *arrays):
    text = jax.jit(f).lower(*arrays).compile().as_text()
    assert text is not None
    return text


@pytest.mark.parametrize(
    "fast, split, expected",
    [("cpu", "", 12 * "1"), ("plain", "", 12 * "1"), ("gpu", "1", 12 * "1"), ("gpu", "", "122112")],
    indirect=["fast"],
)
def test_only_a_gpu_convolves_groups_in_one_call(fast, split, expected, monkeypatch):
    """Read the group counts in the program of the forward pass and both gradients."""
    monkeypatch.setenv("ALEXNET_SPLIT_GROUPS", split)

    def gradients(x, kernel):
        f = functools.partial(ops.grouped_conv, groups=2, padding=1, fast=fast)
        y, vjp = jax.vjp(f, x, kernel)
        return vjp(y)

    text = lowered_text(gradients, jnp.ones((2, 6, 6, 4)), jnp.ones((3, 3, 2, 6)))
    counts = re.findall(r"(?:feature|batch)_group_count = (\d+)", text)
    assert "".join(counts) == expected


def test_unused_image_gradient_is_dropped():
    """Count convolutions: there are fewer without the gradient of the images."""

    def loss(x, kernel):
        return jnp.sum(ops.grouped_conv(x, kernel, stride=4) ** 2)

    def convolutions(argnums):
        arrays = jnp.ones((2, 31, 31, 3)), jnp.ones((11, 11, 3, 8))
        text = compiled_text(jax.grad(loss, argnums), *arrays)
        return len(re.findall(r" convolution\(", text))

    assert convolutions(1) == 2  # forward and the kernel's
    assert convolutions((0, 1)) == 3


POOL_CASES = [
    # image, window, stride, ceil
    ((7, 7), (3, 3), (2, 2), False),
    ((8, 9), (3, 3), (2, 2), False),
    ((8, 9), (3, 3), (2, 2), True),
    ((8, 8), (2, 2), (2, 2), False),
    ((5, 7), (2, 2), (2, 2), True),
    ((6, 8), (3, 2), (1, 3), True),
    ((4, 5), (1, 2), (3, 4), True),  # the next window would start outside
    ((2, 2), (3, 3), (2, 2), True),  # one window, larger than the image
]


def jax_pool(x, window, stride):
    """Return max pooling by lax, with padding VALID."""
    lowest = -jnp.inf if jnp.issubdtype(x.dtype, jnp.floating) else -(2**31)
    return lax.reduce_window(x, lowest, lax.max, (1, *window, 1), (1, *stride, 1), "VALID")


@pytest.mark.parametrize(
    "fast, kind",
    [
        *((form, "max") for form in FORMS[:2]),
        ("plain", "avg"),
        pytest.param("plain", "max", marks=pytest.mark.slow),
    ],
    indirect=["fast"],
)
def test_pooling_equals_the_loop(fast, kind):
    pool, reduce = ops.avg_pool, np.mean
    if kind == "max":
        pool, reduce = functools.partial(ops.max_pool, fast=fast), np.max
    pairs = []
    for side, window, stride, ceil in POOL_CASES:
        x = np.random.default_rng(5).permutation(2 * np.prod(side) * 2)
        x = x.reshape(2, *side, 2).astype(np.float64)  # no ties: differences exist
        constants = {"window": window, "stride": stride, "ceil": ceil}
        loop = functools.partial(loop_pool, reduce=reduce, **constants)
        pairs.append((functools.partial(pool, **constants), with_differences(loop, x)))
    check_by_differences(pairs)


@ALL_FORMS
@pytest.mark.parametrize("window, stride", [((3, 3), (2, 2)), ((2, 2), (2, 2))])
def test_max_pool_breaks_ties_as_lax_does(window, stride, fast):
    """Use few integer values, so that most windows are tied and gradients exact."""

    @jax.jit
    def values_and_gradients(x, weights):
        found = []
        for pool in (functools.partial(ops.max_pool, fast=fast), jax_pool):
            y, vjp = jax.vjp(functools.partial(pool, window=window, stride=stride), x)
            found.append((y, *vjp(weights)))
        return found

    for levels in (1, 2, 4):
        rng = np.random.default_rng(7)
        x = jnp.asarray(rng.integers(0, levels, (3, 9, 8, 4)), jnp.float32)
        weights = jnp.asarray(
            rng.integers(1, 100, (3, 4, (8 - window[1]) // 2 + 1, 4)), jnp.float32
        )
        ours, theirs = values_and_gradients(x, weights)
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@ALL_FORMS
def test_max_pool_of_nan_infinity_and_integers(fast):
    max_pool = functools.partial(ops.max_pool, fast=fast)
    x = np.zeros((9, 5, 5, 1), np.float32)
    for i, (down, across) in enumerate(np.ndindex(3, 3)):
        x[i, down, across] = np.nan
    got = max_pool(jnp.asarray(x))
    np.testing.assert_array_equal(got, jax_pool(jnp.asarray(x), (3, 3), (2, 2)))
    assert np.isnan(got[:, 0, 0]).all()
    x = jnp.full((1, 4, 4, 1), -jnp.inf)
    assert np.all(np.asarray(max_pool(x, ceil=True)) == -np.inf)
    x = jnp.arange(-30, 20, dtype=jnp.int32).reshape(1, 5, 10, 1)
    got = max_pool(x, ceil=True)
    assert got.dtype == jnp.int32
    want = loop_pool(np.asarray(x), np.max, window=(3, 3), stride=(2, 2), ceil=True)
    np.testing.assert_array_equal(got, want)


@ALL_FORMS
def test_max_pool_gradient_has_no_select_and_scatter(fast):
    x, max_pool = jnp.ones((2, 9, 9, 4)), functools.partial(ops.max_pool, fast=fast)

    def gradient(pool):
        return jax.grad(lambda x: jnp.sum(pool(x) ** 2))

    assert "select-and-scatter(" not in compiled_text(gradient(max_pool), x)
    # The CPU compiler takes lax's own apart, so the control looks before it does.
    lax_pool = functools.partial(jax_pool, window=(3, 3), stride=(2, 2))
    name = "stablehlo.select_and_scatter"
    assert name in lowered_text(gradient(lax_pool), x)
    assert name not in lowered_text(gradient(max_pool), x)


@ALL_FORMS
@pytest.mark.parametrize("pool", [None, {"window": 3, "stride": 2, "ceil": True}])
def test_fused_bias_relu_lrn_and_pool_equal_separate_calls(pool, fast):
    """Compare separate calls for bias, ReLU, LRN and pooling with one call, in float64."""
    with jax.enable_x64(True):
        x, bias = jnp.asarray(normal(2, 6, 4, 12, seed=16)), jnp.asarray(normal(12))
        weights = jnp.asarray(normal(12, seed=17))
        lrn = functools.partial(ops.local_response_norm, alpha=0.3, groups=3)

        def before(x, bias):
            y = lrn(jax.nn.relu(x + bias), fast=False)
            return jnp.sum(weights * jnp.sin(ops.max_pool(y, **pool, fast=False) if pool else y))

        def inside(x, bias):
            return jnp.sum(weights * jnp.sin(lrn(x, bias, relu=True, pool=pool, fast=fast)))

        wants, gots = (jax.jit(jax.value_and_grad(f, (0, 1)))(x, bias) for f in (before, inside))
        for got, want in zip(*map(jax.tree.leaves, (gots, wants)), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)


@ALL_FORMS
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_bias_gradient_is_the_sum_over_positions(dtype, fast):
    """Compare float32 sums of up to 90,900 positive numbers, to two parts in a million."""
    bias = jnp.asarray(normal(5, seed=15), jnp.float32)
    add = functools.partial(ops.add_bias, fast=fast)
    for positions in ((), (3,), (2, 5, 7), (9, 100, 101)):
        x = jnp.asarray(normal(*positions, 5, seed=14) ** 2 + 0.1, dtype)
        got, vjp = jax.vjp(add, x, bias)
        np.testing.assert_array_equal(got, (x.astype(jnp.float32) + bias).astype(dtype))
        of_x, of_bias = vjp(x)
        np.testing.assert_array_equal(of_x, x)
        sums = np.asarray(x, np.float64).reshape(-1, 5).sum(0)
        np.testing.assert_allclose(of_bias, sums, rtol=2e-6)


@ALL_FORMS
def test_wide_matmul_sums_in_float32(fast):
    """Use integers whose sums of products are exact, so that results are rounded once."""
    rng = np.random.default_rng(20)
    arrays = [rng.integers(-8, 8, shape).astype(float) for shape in ((6, 70), (70, 5), (6, 5))]
    x, kernel, g = arrays
    want = x @ kernel, g @ kernel.T, x.T @ g
    op = functools.partial(ops.wide_matmul, fast=fast)
    check_cases([Case(op, [x, kernel], want[0], g, want[1:])], exact=1e-14)
    x, kernel = (jnp.asarray(a, jnp.bfloat16) for a in (x, kernel))
    value, vjp = jax.vjp(op, x, kernel)
    assert value.dtype == jnp.float32
    np.testing.assert_array_equal(value, want[0])
    for got, exact in zip(vjp(jnp.float32(g)), want[1:], strict=True):
        np.testing.assert_array_equal(got, jnp.asarray(exact, jnp.bfloat16))


def test_jit_keeps_convolutions_out_of_ynnpack():
    def conv(x, kernel, groups=1):
        return ops.grouped_conv(x, kernel, padding=1, groups=groups)

    args = jnp.ones((2, 8, 8, 32)), jnp.ones((3, 3, 32, 32))
    plain, fast = (
        function(conv, static_argnames="groups").lower(*args).compile().as_text()
        for function in (jax.jit, ops.jit)
    )
    assert "ynn_fusion" in plain and "ynn_fusion" not in fast


def test_jit_drops_unknown_xla_options(monkeypatch, caplog):
    monkeypatch.setattr(ops.cpu, "COMPILER_OPTIONS", {"xla_cpu_no_such_option": 1})
    ops._compiler_options.cache_clear()
    assert ops.jit(lambda x: x + 1)(1.0) == 2.0
    assert "xla_cpu_no_such_option" in caplog.text
    ops._compiler_options.cache_clear()


CONVS = {  # kernel shape and arguments, for four input channels
    "conv": ((3, 3, 2, 4), {"padding": 1, "groups": 2}),
    "strided_conv": ((3, 3, 4, 2), {"stride": 2}),
}


def apply(name, x, fast):
    """Apply one of the operations to x[B,H,W,4], with constants that matter."""
    if name in CONVS:
        kernel_shape, arguments = CONVS[name]
        # The same bfloat16 values in every dtype, so that dtypes can be compared.
        kernel = jnp.asarray(normal(*kernel_shape), jnp.bfloat16).astype(x.dtype)
        return ops.grouped_conv(x, kernel, **arguments, fast=fast)
    if name == "lrn":
        return ops.local_response_norm(x, alpha=0.3, groups=2, fast=fast)
    bias = jnp.asarray(normal(4), jnp.bfloat16).astype(x.dtype)
    if name == "lrn_of_layer":
        constants = {"alpha": 0.3, "groups": 2}
        return ops.local_response_norm(x, bias, relu=True, **constants, fast=fast)
    if name == "lrn_and_pool":
        pool = {"window": 3, "stride": 2, "ceil": True}
        return ops.local_response_norm(x, bias, relu=True, alpha=0.3, pool=pool, fast=fast)
    if name == "local":
        rows, columns = x.shape[1:3]
        kernel = jnp.asarray(normal(rows - 1, columns, 2, 3, 4, 2), jnp.bfloat16)
        return ops.local_conv(x, kernel, padding=((0, 0), (1, 1)))
    if name == "within_map":
        return ops.within_map_response_norm(x, alpha=3.0, fast=fast)
    if name == "avg_pool":
        return ops.avg_pool(x, window=3, stride=2, ceil=True)
    if name == "bias":
        return ops.add_bias(x, bias, fast=fast)
    return ops.max_pool(x, fast=fast)


FAST_NAMES = ["lrn", "lrn_of_layer", "lrn_and_pool", "within_map", *CONVS, "max_pool", "bias"]
NAMES = [*FAST_NAMES, "avg_pool", "local"]
NAME_AND_FORM = pytest.mark.parametrize(
    "name, fast",
    [
        *((name, form) for form in FORMS[:2] for name in FAST_NAMES),
        *(pytest.param(name, "plain", marks=pytest.mark.slow) for name in FAST_NAMES),
        *((name, "plain") for name in NAMES if name not in FAST_NAMES),
    ],
    indirect=["fast"],
)


@NAME_AND_FORM
@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(jnp.bfloat16, id="bf16"),
        pytest.param(jnp.float16, id="f16", marks=pytest.mark.slow),
    ],
)
def test_16_bit_results_are_float32_rounded_once(name, fast, dtype):
    x = jnp.asarray(normal(2, 6, 6, 4, scale=2.0), dtype)
    got = apply(name, x, fast)
    assert got.dtype == dtype
    wide = apply(name, x.astype(jnp.float32), fast)
    # Another order of summation may move a value over a rounding border.
    assert np.mean(np.asarray(got == wide.astype(dtype))) > 0.99
    np.testing.assert_allclose(
        got.astype(jnp.float32), wide, rtol=float(jnp.finfo(dtype).eps), atol=1e-6
    )


@pytest.mark.parametrize(
    "name, fast", [(name, form) for form in FORMS[:2] for name in FAST_NAMES], indirect=["fast"]
)
def test_bfloat16_gradients_equal_the_plain_form(name, fast):
    x = jnp.asarray(normal(2, 6, 6, 4, scale=2.0), jnp.bfloat16)

    def gradient(fast):
        y, vjp = jax.vjp(lambda x: apply(name, x, fast), x)
        return vjp(jnp.asarray(normal(*y.shape), y.dtype))[0]

    got, want = gradient(fast), gradient(False)
    assert got.dtype == jnp.bfloat16
    assert relative_error(got.astype(jnp.float32), want.astype(jnp.float32)) < 2**-6


@ALL_FORMS
def test_each_gradient_has_the_dtype_of_its_argument(fast):
    """Take gradients of bfloat16 activations and float32 parameters."""
    x = jnp.asarray(normal(1, 5, 5, 2), jnp.bfloat16)
    kernel = jnp.asarray(normal(3, 3, 2, 2), jnp.float32)

    def loss(x, kernel):
        y = ops.grouped_conv(x, kernel, fast=fast)
        assert y.dtype == jnp.bfloat16
        return jnp.sum(y.astype(jnp.float32))

    dx, dw = jax.grad(loss, (0, 1))(x, kernel)
    assert (dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize("name", NAMES)
def test_plain_form_has_forward_mode_and_second_derivatives(name):
    with jax.enable_x64(True):
        op = functools.partial(apply, name, fast=False)
        x, v = (jnp.asarray(normal(1, 6, 6, 4, seed=s)) for s in (10, 11))

        def loss(x):
            return jnp.sum(jnp.sin(op(x)))

        gradient = jax.jit(jax.grad(loss))

        @jax.jit
        def forward_mode(x, v):
            _, slope = jax.jvp(loss, (x,), (v,))
            _, hessian_times_v = jax.jvp(jax.grad(loss), (x,), (v,))
            return slope, hessian_times_v

        slope, hessian_times_v = forward_mode(x, v)
        np.testing.assert_allclose(slope, jnp.vdot(gradient(x), v), rtol=1e-10)
        step = 1e-5
        difference = (gradient(x + step * v) - gradient(x - step * v)) / (2 * step)
        assert relative_error(hessian_times_v, difference) < 1e-6


@pytest.mark.parametrize("name", FAST_NAMES)
def test_fast_forms_refuse_forward_mode_and_second_derivatives(name):
    x = jnp.asarray(normal(1, 6, 6, 4), jnp.float32)

    def loss(x):
        return jnp.sum(jnp.sin(apply(name, x, fast=True)))

    def slope(x):
        return jnp.vdot(jax.grad(loss)(x), x)

    for derivative in (
        lambda x: jax.jvp(loss, (x,), (x,)),
        jax.jit(lambda x: jax.jvp(loss, (x,), (x,))),
        lambda x: jax.jvp(jax.jit(loss), (x,), (x,)),
        lambda x: jax.linearize(loss, x)[1](x),
        jax.hessian(loss),
        jax.grad(slope),
    ):
        with pytest.raises(TypeError, match=r"create_model\(\.\.\., fast=False\)"):
            derivative(x)


@NAME_AND_FORM
def test_per_example_gradients_under_vmap(name, fast):
    op = functools.partial(apply, name, fast=fast)
    x = jnp.asarray(normal(3, 6, 6, 4, seed=12), jnp.float32)

    def loss(example):
        return jnp.sum(jnp.sin(op(example[None])))

    each = jax.jit(jax.vmap(jax.grad(loss)))(x)
    batch = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(op(x)))))(x)
    np.testing.assert_allclose(each, batch, rtol=1e-4, atol=1e-5)


@ALL_FORMS
def test_per_example_kernel_gradients_under_vmap(fast):
    x = jnp.asarray(normal(3, 7, 7, 4, seed=12), jnp.float32)
    kernel = jnp.asarray(normal(3, 3, 2, 4, seed=13), jnp.float32)
    conv = functools.partial(ops.grouped_conv, stride=2, groups=2, fast=fast)
    slope = jax.grad(lambda kernel, x: jnp.sum(jnp.sin(conv(x, kernel))))
    each = jax.jit(jax.vmap(lambda a: slope(kernel, a[None])))(x)
    batch = jax.jit(slope)(kernel, x)
    np.testing.assert_allclose(each.sum(0), batch, rtol=1e-4, atol=1e-5)


def test_convolutions_in_a_loop_have_the_layout_of_xla():
    """Check the layout: XLA changes another one only outside of loops; inside it is 12x slower."""
    x = jnp.asarray(normal(2, 3, 9, 9, 4), jnp.float32)
    kernel = jnp.asarray(normal(3, 3, 2, 6), jnp.float32)

    def loss(x, kernel):
        return jnp.sum(jnp.sin(ops.grouped_conv(x, kernel, stride=2, groups=2)))

    gradients = jax.jit(lambda x, w: lax.map(lambda a: jax.grad(loss, (0, 1))(a, w), x))
    text = gradients.lower(x, kernel).compile().as_text()
    assert " while(" in text
    assert set(re.findall(r"dim_labels=(\S+?),? ", text)) == {"b01f_01io->b01f"}


def make_mesh(**axes):
    types, count = (AxisType.Auto,) * len(axes), math.prod(axes.values())
    shape, devices = tuple(axes.values()), jax.devices()[:count]
    return jax.make_mesh(shape, tuple(axes), axis_types=types, devices=devices)


def small_net(params, x, fast):
    """Apply every op at least once, conv1 strided and conv2 in groups."""
    x = ops.grouped_conv(x, params["conv1"], stride=2, padding=1, fast=fast)
    lrn = functools.partial(ops.local_response_norm, relu=True, alpha=0.1, groups=2)
    x = lrn(x, params["bias1"], fast=fast)
    x = ops.add_bias(x, params["bias2"], fast=fast)
    x = ops.local_response_norm(x, alpha=0.1, pool={"window": 3, "stride": 2}, fast=fast)
    x = ops.grouped_conv(x, params["conv2"], padding=1, groups=2, fast=fast)
    x = ops.max_pool(x, window=2, stride=1, fast=fast)
    x = ops.within_map_response_norm(x, alpha=1.0, fast=fast)
    shape = x.shape
    x = ops.wide_matmul(x.reshape(-1, shape[-1]), params["fc"], fast=fast).reshape(shape)
    return jnp.sin(ops.avg_pool(x, window=3, stride=2, ceil=True))


@pytest.mark.parametrize("check_vma", [True, pytest.param(False, marks=pytest.mark.slow)])
@ALL_FORMS
def test_gradients_under_shard_map_equal_one_device(check_vma, fast):
    """Replicate kernels and split examples over two devices; compare in float64."""
    mesh = make_mesh(data=2)
    with jax.enable_x64(True):
        params = {
            "conv1": jnp.asarray(normal(3, 3, 3, 8)),
            "bias1": jnp.asarray(normal(8)),
            "bias2": jnp.asarray(normal(8)),
            "conv2": jnp.asarray(normal(3, 3, 4, 6)),
            "fc": jnp.asarray(normal(6, 6)),
        }
        x = jnp.asarray(normal(4, 17, 17, 3))

        def local(params, x):
            def loss(params, x):
                value = jnp.mean(small_net(params, x, fast) ** 2)
                return lax.pmean(value, "data") if check_vma else value

            value, gradients = jax.value_and_grad(loss, (0, 1))(params, x)
            if check_vma:
                return value, gradients
            # Nothing inserts the sums here; the caller does, as in pmap.
            of_params, of_x = gradients
            value, of_params = lax.pmean((value, of_params), "data")
            return value, (of_params, of_x / 2)

        split = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(P(), P("data")),
            out_specs=(P(), (P(), P("data"))),
            check_vma=check_vma,
        )

        def whole(params, x):
            return jnp.mean(small_net(params, x, fast) ** 2)

        got = jax.jit(split)(params, x)
        want = jax.jit(jax.value_and_grad(whole, (0, 1)))(params, x)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert relative_error(a, b) < 1e-12


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_kernel_gradient_of_groups_on_a_sharded_batch_equals_one_device(backend):
    """Let XLA split the batch over one axis of a mesh of two."""
    mesh = make_mesh(data=2, column=2)
    x, kernel = jnp.asarray(normal(4, 6, 6, 4)), jnp.asarray(normal(3, 3, 2, 6))

    def loss(kernel, x):
        return jnp.sum(ops.grouped_conv(x, kernel, groups=2) ** 2)

    with ops.compiling_for(backend):
        got = jax.jit(jax.grad(loss))(kernel, jax.device_put(x, NamedSharding(mesh, P("data"))))
        want = jax.jit(jax.grad(loss))(kernel, x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_gpu_convolves_groups_in_one_call_under_shard_map():
    mesh = make_mesh(data=2)
    x, kernel = jnp.ones((4, 6, 6, 4)), jnp.ones((3, 3, 2, 6))
    conv = functools.partial(ops.grouped_conv, groups=2)
    with ops.compiling_for("gpu"):
        split = jax.shard_map(conv, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
        assert "feature_group_count = 2" in lowered_text(split, x, kernel)
        assert "feature_group_count = 2" not in lowered_text(conv, x, kernel)


@ALL_FORMS
def test_column_kernels_under_shard_map(fast):
    """Split kernels over "column" and examples over "data": each lacks an axis."""
    mesh = make_mesh(data=2, column=2)
    with jax.enable_x64(True):
        kernel, x = jnp.asarray(normal(3, 3, 2, 6)), jnp.asarray(normal(4, 6, 6, 2))

        def loss(x, kernel):
            return jnp.mean(jnp.sin(ops.grouped_conv(x, kernel, fast=fast)))

        def local(x, kernel):
            def mean(x, kernel):
                return lax.pmean(loss(x, kernel), ("data", "column"))

            return jax.grad(mean, (0, 1))(x, kernel)

        specs = (P("data"), P(None, None, None, "column"))
        split = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=specs)
        got = jax.jit(split)(x, kernel)
        want = jax.jit(jax.grad(loss, (0, 1)))(x, kernel)
        for a, b in zip(got, want, strict=True):
            assert relative_error(a, b) < 1e-12


X, KERNEL = jnp.ones((1, 6, 6, 4)), jnp.ones((3, 3, 2, 4))
MISTAKES = [
    (lambda: ops.local_response_norm(X, size=4), "size is 4, expected an odd number"),
    (
        lambda: ops.local_response_norm(X, groups=3),
        "4 channels in 3 groups, expected a number of groups that divides 4",
    ),
    (
        lambda: ops.local_response_norm(X, alpha_mode="total"),
        'alpha_mode is "total", expected "sum"',
    ),
    (
        lambda: ops.local_response_norm(X, jnp.ones(3)),
        r"local_response_norm: bias has shape \(3,\), expected \(4,\)",
    ),
    (lambda: ops.within_map_response_norm(X[0]), r"got shape \(6, 6, 4\), expected x\[B,H,W,C\]"),
    (lambda: ops.grouped_conv(X, KERNEL, groups=3), "4 input channels in 3 groups"),
    (lambda: ops.grouped_conv(X, KERNEL[..., :3], groups=2), "3 output channels in 2 groups"),
    (lambda: ops.grouped_conv(X, KERNEL), "4 // 1 != 2"),  # lax's own
    (
        lambda: ops.max_pool(X, window=7),
        r"max_pool: window \(7, 7\) is larger than the image \(6, 6\)",
    ),
    (
        lambda: ops.local_conv(X, jnp.ones((6, 6, 3, 3, 4, 2))),
        r"is for \(6, 6\) places and 4 channels, expected \(4, 4\) and 4",
    ),
    (
        lambda: ops.local_conv(X, jnp.ones((6, 6, 3, 3, 3, 2)), padding=1),
        r"is for \(6, 6\) places and 3 channels, expected \(6, 6\) and 4",
    ),
]


@pytest.mark.parametrize("call, message", MISTAKES)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_integers_are_refused():
    x, words = X.astype(jnp.int32), "x is int32, expected a floating-point dtype"
    for call in (
        ops.local_response_norm,
        ops.within_map_response_norm,
        functools.partial(ops.avg_pool, window=2, stride=2),
        lambda x: ops.grouped_conv(x, KERNEL, groups=2),
        lambda x: ops.local_conv(x, jnp.ones((6, 6, 1, 1, 4, 2))),
    ):
        with pytest.raises(TypeError, match=words):
            call(x)


@ALL_FORMS
def test_empty_batches_have_a_gradient(fast):
    def total(x):
        y = ops.local_response_norm(x, pool={}, fast=fast)
        return jnp.sum(y) + jnp.sum(ops.local_response_norm(x, fast=fast))

    assert jax.grad(total)(jnp.ones((0, 5, 5, 4))).shape == (0, 5, 5, 4)


def test_local_conv_of_bfloat16_runs_under_jit():
    x, kernel = (jnp.ones(shape, jnp.bfloat16) for shape in ((2, 4, 4, 3), (4, 4, 3, 3, 3, 5)))
    y = jax.jit(functools.partial(ops.local_conv, padding=1))(x, kernel)
    assert y.dtype == jnp.bfloat16 and y[0, 1, 1, 0] == 27
