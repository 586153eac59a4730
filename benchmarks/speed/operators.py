"""Every operator of the paper's network by itself, beside the machine's limits.

    python -m benchmarks.speed.operators --out=DIR [--short] [--batch N] [--precision NAME]

Convolutions, normalisation, pooling and fully connected layers, forwards and backwards,
and the update, at batch 128: ours as the network runs them, ours plain (`fast=False`)
and torch's, eager, the best of its memory formats and forms. A gradient is timed by
itself, with what the forward pass has kept. The update, in place, can go beyond the
limit: a copy also fetches the memory that it is about to overwrite. Two tables follow:
grouped convolution as a loop over the groups against XLA's `feature_group_count`, and
the on-device augmentation as a share of a whole training step.
"""

import argparse
import importlib.util
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from matplotlib.figure import Figure

from alexnet_jax.data import augment
from alexnet_jax.models import ops
from alexnet_jax.models.alexnet import AlexNet
from alexnet_jax.models.summary import summary
from alexnet_jax.training import optim
from benchmarks.speed import jax_alexnet, measure, roofline
from benchmarks.speed.measure import Setting

ROUNDS = {"short": 2, "long": 5}
COLUMNS = 2

Calls = dict[str, Callable[[], Any]]


class Layer(NamedTuple):
    """A convolution as `ops.grouped_conv` takes it, and the shape that it reads."""

    name: str
    shape: tuple[int, ...]
    kernel: tuple[int, int, int, int]
    stride: int
    padding: tuple[tuple[int, int], tuple[int, int]]
    groups: int


def convolutions(model: AlexNet) -> list[Layer]:
    """The network's, read from its layer table."""
    before: tuple[int, ...] = (model.network.crop_size, model.network.crop_size, 3)
    found = []
    shapes = {row.name: row.shape for row in summary(model)}
    for row in model.network.convs:
        groups = COLUMNS if row.sees == "own" else 1
        kernel = (row.kernel, row.kernel, before[2] // groups, row.features)
        pads = row.pads(before[0])
        found.append(Layer(row.name, before, kernel, row.stride, pads, groups))
        pooled = row.name.replace("conv", "pool")
        before = shapes.get(pooled, shapes[row.name])
    return found


def random(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    rng = np.random.default_rng(sum(shape))
    return jnp.asarray(rng.standard_normal(shape, dtype=np.float32), dtype)


def _call(function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    """A compiled call that waits for its result."""
    compiled = ops.jit(function).lower(*args).compile()
    return lambda: jax.block_until_ready(compiled(*args))


def _gradient(function: Callable[..., Any], *args: Any, wrt: int = 0) -> Callable[[], Any]:
    """The backward pass only: what it needs of the forward pass is kept beforehand."""

    def forward(*args: Any) -> Any:
        def of_one(arg: Any) -> Any:
            return function(*args[:wrt], arg, *args[wrt + 1 :])

        return jax.vjp(of_one, args[wrt])

    y, backward = ops.jit(forward)(*args)
    return _call(lambda backward, g: backward(g), backward, y)


def ours(model: AlexNet, batch: int, fast: bool) -> Iterator[tuple[str, Callable]]:
    """(operator's name, builder of its call), named as in `roofline`."""
    for layer in convolutions(model):
        conv = partial(
            ops.grouped_conv,
            stride=layer.stride,
            padding=layer.padding,
            groups=layer.groups,
            fast=fast,
        )
        yield from _convolution(layer, conv, batch, model.dtype)
    before: tuple[int, ...] = ()
    lrn = partial(ops.local_response_norm, groups=COLUMNS, fast=fast)
    pool = partial(ops.max_pool, fast=fast)
    for row in summary(model):
        function = {"norm": lrn, "pool": pool}.get(row.name[:4])
        if function is not None:
            x = partial(random, (batch, *before), model.dtype)
            yield f"{row.name} forward", lambda f=function, x=x: _call(f, x())
            yield f"{row.name} backward", lambda f=function, x=x: _gradient(f, x())
        if row.name.startswith("fc"):
            n = int(np.prod(before))
            yield from _dense(row.name, batch, n, row.shape[0], model.dtype)
        before = row.shape
    yield "update", lambda: _update(model)


def _convolution(layer: Layer, conv: Callable, batch: int, dtype: Any) -> Iterator:
    def args() -> tuple[jax.Array, jax.Array]:
        return random((batch, *layer.shape), dtype), random(layer.kernel, dtype)

    yield f"{layer.name} forward", lambda: _call(conv, *args())
    if layer.name != "conv1":
        yield f"{layer.name} input gradient", lambda: _gradient(conv, *args())
    yield f"{layer.name} kernel gradient", lambda: _gradient(conv, *args(), wrt=1)


def _dense(name: str, batch: int, n: int, m: int, dtype: Any) -> Iterator:
    def args() -> tuple[jax.Array, jax.Array]:
        return random((batch, n), dtype), random((n, m), dtype)

    yield f"{name} forward", lambda: _call(jnp.matmul, *args())
    yield f"{name} input gradient", lambda: _gradient(jnp.matmul, *args())
    yield f"{name} kernel gradient", lambda: _gradient(jnp.matmul, *args(), wrt=1)


def _update(model: AlexNet) -> Callable[[], Any]:
    """The optimiser's and `apply_updates`, in place, as in a training step."""
    import optax

    size = model.network.crop_size
    images = jnp.zeros((1, size, size, 3), jnp.float32)
    params: Any = jax.jit(model.init)(jax.random.key(0), images)["params"]
    tx = optim.make_optimizer(0.01)
    state, grads = tx.init(params), jax.tree.map(jnp.ones_like, params)

    def update(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    compiled = ops.jit(update, donate_argnums=(0, 1))
    held = [params, state]

    def call() -> None:
        held[:] = compiled(*held, grads)
        jax.block_until_ready(held)

    return call


def measured(
    builders: dict[str, dict[str, Callable]], rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Of each operator the candidates' seconds, in turn; one operator at a time."""
    found = {}
    for name, candidates in builders.items():
        print(f"{name} ...", file=sys.stderr, flush=True)
        calls = {who: build() for who, build in candidates.items()}
        found[name] = measure.alternate(calls, rounds=rounds)
    return found


def candidates(model: AlexNet, setting: Setting, device: str) -> dict[str, dict[str, Callable]]:
    """By operator: builders of ours, ours plain where it differs, and torch's."""
    found: dict[str, dict[str, Callable]] = {}
    for name, build in ours(model, setting.batch, fast=True):
        found[name] = {"ours": build}
    for name, build in ours(model, setting.batch, fast=False):
        # There is one form only of matrix products and the update.
        if name.startswith(("conv", "norm", "pool")):
            found[name]["plain"] = build
    if importlib.util.find_spec("torch"):
        from benchmarks.speed import torch_operators

        for name, who, build in torch_operators.operators(model, setting, device):
            found[name][who] = build
    return found


def rows(
    costs: list[roofline.Cost],
    seconds: dict[str, dict[str, list[float]]],
    flop_rate: float,
    bandwidth: float,
) -> list[dict[str, Any]]:
    """A row an operator: its work, medians, and the share of its own limit."""
    found = []
    for cost in costs:
        times = seconds[cost.name]
        middle = {who: statistics.median(s) for who, s in times.items()}
        theirs = [who for who in middle if who.startswith("torch")]
        best = min(theirs, key=lambda who: middle[who], default="")
        row = {
            "operator": cost.name,
            "flops": cost.flops,
            "bytes": cost.bytes,
            "limit_seconds": cost.seconds(flop_rate, bandwidth),
            "seconds": times,
            "share_of_limit": cost.seconds(flop_rate, bandwidth) / middle["ours"],
            "peer": best,
        }
        if best:
            row["ratio"] = measure.ratio(times, "ours", best)
        found.append(row)
    return found


def table(found: list[dict[str, Any]], flop_rate: float, bandwidth: float) -> str:
    """The rows, with the sum of the medians below."""
    header = ["operator", "work", "limit ms", "ours ms", "ours", "of the limit"]
    header += ["plain ms", "torch ms", "torch's format", "ours / torch (spread)"]
    cells = []
    for row in found:
        times = {who: statistics.median(s) for who, s in row["seconds"].items()}
        by_flops = row["flops"] / flop_rate >= row["bytes"] / bandwidth
        amount, unit = (row["flops"], "GFLOP") if by_flops else (row["bytes"], "GB")
        cells.append(
            [
                row["operator"],
                f"{amount / 1e9:,.2f} {unit}",
                f"{row['limit_seconds'] * 1e3:,.2f}",
                f"{times['ours'] * 1e3:,.2f}",
                f"{amount / 1e9 / times['ours']:,.1f} {unit}/s",
                f"{row['share_of_limit']:.0%}",
                f"{times['plain'] * 1e3:,.2f}" if "plain" in times else "",
                f"{times[row['peer']] * 1e3:,.2f}" if row["peer"] else "",
                row["peer"].removeprefix("torch "),
                measure.spread(row["ratio"].values(), ".2f") if row["peer"] else "",
            ]
        )
    total = {who: _total(found, who) * 1e3 for who in ("ours", "plain", "torch")}
    at_best = sum(row["limit_seconds"] for row in found) * 1e3
    cells.append(
        [
            *("sum", "", f"{at_best:,.1f}", f"{total['ours']:,.1f}"),
            *("", f"{at_best / total['ours']:.0%}", f"{total['plain']:,.1f}"),
            *(f"{total['torch']:,.1f}" if found[0]["peer"] else "", "", ""),
        ]
    )
    return measure.markdown_table(header, cells)


def _total(found: list[dict[str, Any]], who: str) -> float:
    """Seconds of all operators; where there is no plain form, ours is it."""
    total = 0.0
    for row in found:
        name = row["peer"] if who == "torch" else who
        times = row["seconds"]
        total += statistics.median(times.get(name, times["ours"]))
    return total


def chart(found: list[dict[str, Any]], title: str) -> Figure:
    """A group of bars an operator, milliseconds, and its limit as a mark."""
    figure = Figure(figsize=(9, 1 + 0.42 * len(found)), layout="constrained")
    axes = figure.subplots()
    who = ["ours", "plain", "torch"]
    for i, name in enumerate(who):
        at, width = [], []
        for j, row in enumerate(found):
            key = row["peer"] if name == "torch" else name
            if key in row["seconds"]:
                at.append(j + 0.27 * (i - 1))
                width.append(statistics.median(row["seconds"][key]) * 1e3)
        colour = {"ours": "C0", "plain": "C9", "torch": "0.6"}[name]
        axes.barh(at, width, height=0.27, color=colour, label=name)
    limits = [row["limit_seconds"] * 1e3 for row in found]
    axes.plot(limits, range(len(found)), "|", color="C3", markersize=12, label="limit")
    axes.set_yticks(range(len(found)), [row["operator"] for row in found])
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.set_xlabel("milliseconds")
    axes.set_title(title)
    axes.legend(loc="lower right")
    return figure


def grouped(model: AlexNet, batch: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of the grouped convolutions written in two ways.

    "split" is the plain form of ours, a convolution a group; "feature_group_count"
    leaves the groups to XLA.
    """
    builders: dict[str, dict[str, Callable]] = {}
    for layer in [layer for layer in convolutions(model) if layer.groups > 1]:
        forms = {
            "split": partial(
                ops.grouped_conv,
                stride=layer.stride,
                padding=layer.padding,
                groups=layer.groups,
                fast=False,
            ),
            "feature_group_count": partial(
                lax.conv_general_dilated,
                window_strides=(layer.stride, layer.stride),
                padding=layer.padding,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=layer.groups,
            ),
        }
        for who, conv in forms.items():
            for name, build in _convolution(layer, conv, batch, model.dtype):
                builders.setdefault(name, {})[who] = build
    return measured(builders, rounds)


def augmentation(setting: Setting, rounds: int) -> dict[str, list[float]]:
    """Seconds of random crop, flip and lighting of a batch, and of a whole step."""
    how = augment.Augmentation(crop_size=jax_alexnet.CROP)
    dtype = jnp.float32  # the network rounds them if it must
    augmented = _call(
        lambda pictures, key, statistics: augment.train_images(
            pictures, key, 0, statistics, how, dtype
        ),
        jax_alexnet.pictures(setting.batch, 256),
        jax.random.key(0),
        augment.imagenet_statistics(256),
    )
    step = jax_alexnet.Trainer(setting, how)
    return measure.alternate({"augmentation": augmented, "training step": step}, rounds=rounds)


def more_tables(
    by_form: dict[str, dict[str, list[float]]], augmented: dict[str, list[float]]
) -> str:
    """Grouped convolution's forms, and the augmentation's share."""
    forms = [
        [name, *(f"{statistics.median(s) * 1e3:,.2f}" for s in times.values())]
        for name, times in by_form.items()
    ]
    share = measure.ratio(augmented, "training step", "augmentation")
    header = ["grouped convolution", "split ms", "feature_group_count ms"]
    alone, step = (statistics.median(s) * 1e3 for s in augmented.values())
    sentence = (
        f"Augmentation by itself takes {alone:,.2f} ms, a training step with it "
        f"{step:,.2f} ms: {share['median']:.1%} ({share['min']:.1%} to "
        f"{share['max']:.1%})."
    )
    return f"{measure.markdown_table(header, forms)}\n\n{sentence}"


def options() -> argparse.Namespace:
    parser = measure.command_line(__doc__)
    parser.add_argument("--batch", type=int, help="128; with --short 16")
    parser.add_argument("--precision", help="float32; on a GPU bfloat16")
    return parser.parse_args()


def main() -> None:
    chosen = options()
    on_gpu = jax.default_backend() != "cpu"
    setting = Setting(
        chosen.batch or (16 if chosen.short else 128),
        chosen.precision or ("bfloat16" if on_gpu else "float32"),
    )
    rounds = ROUNDS["short" if chosen.short else "long"]
    model = jax_alexnet.network(setting)
    flop_rate = measure.gemm_rate(setting.precision)
    bandwidth = measure.copy_bandwidth()
    with jax_alexnet.precision(setting):
        builders = candidates(model, setting, "cuda" if on_gpu else "cpu")
        seconds = measured(builders, rounds)
        by_form = grouped(model, setting.batch, rounds)
    augmented = augmentation(setting, rounds)
    costs = roofline.training(model, setting.batch, kernel_itemsize=model.dtype.itemsize)
    found = rows(costs, seconds, flop_rate, bandwidth)
    measure.write_result(
        chosen.out,
        "operators",
        {
            "batch": setting.batch,
            "precision": setting.precision,
            "gemm_flops_per_second": flop_rate,
            "copy_bytes_per_second": bandwidth,
            "operators": found,
            "grouped": by_form,
            "augmentation": augmented,
        },
        table=f"{setting}: GEMM {flop_rate / 1e9:,.0f} GFLOP/s, copying "
        f"{bandwidth / 1e9:,.1f} GB/s.\n\n{table(found, flop_rate, bandwidth)}\n\n"
        + more_tables(by_form, augmented),
        figure=chart(found, f"Operators, {setting}"),
    )


if __name__ == "__main__":
    main()
