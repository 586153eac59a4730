"""Every operator of the paper's network by itself, beside the machine's limits.

    python -m benchmarks.speed.operators --out=DIR [--short] [--batch N] [--precision NAME]

Convolutions, normalisation, pooling and fully connected layers, forward and backward, and
the update, at batch 128: ours as the network runs them, ours plain (`fast=False`), grouped
convolutions by XLA's `feature_group_count`, and torch's, eager, the best of its memory
formats and forms. A gradient is timed by itself, with what the forward pass has kept. The
update, in place, can go beyond the limit: a copy also fetches the memory that it is about
to overwrite. The last line has the share of the augmentation in a training step.
"""

import importlib.util
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from alexnet_jax.data import augment
from alexnet_jax.models import ops
from alexnet_jax.models.alexnet import AlexNet
from alexnet_jax.models.summary import summary
from alexnet_jax.training import optim
from benchmarks.speed import jax_alexnet, measure, roofline
from benchmarks.speed.measure import Setting

COLUMNS = 2
GROUPS = "feature_group_count"

# Builds arrays and returns the call that is timed.
Builder = Callable[[], Callable[[], Any]]


class Layer(NamedTuple):
    """A convolution as `ops.grouped_conv` takes it, and the shape that it reads."""

    name: str
    shape: tuple[int, ...]
    kernel: tuple[int, int, int, int]
    stride: int
    padding: tuple[tuple[int, int], tuple[int, int]]
    groups: int


def convolutions(model: AlexNet) -> list[Layer]:
    """Return the network's convolutions, from its layer table."""
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
    """Return an array of N(0, 1)."""
    rng = np.random.default_rng(sum(shape))
    return jnp.asarray(rng.standard_normal(shape, dtype=np.float32), dtype)


def _call(function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    """Return a compiled call that waits for its result."""
    compiled = ops.jit(function).lower(*args).compile()
    return lambda: jax.block_until_ready(compiled(*args))


def _gradient(function: Callable[..., Any], *args: Any, wrt: int = 0) -> Callable[[], Any]:
    """Return a call of the backward pass; what it needs of the forward pass is kept."""

    def forward(*args: Any) -> Any:
        def of_one(arg: Any) -> Any:
            return function(*args[:wrt], arg, *args[wrt + 1 :])

        return jax.vjp(of_one, args[wrt])

    y, backward = ops.jit(forward)(*args)
    return _call(lambda backward, g: backward(g), backward, y)


def _products(
    name: str, function: Callable[..., Any], args: Callable[[], tuple[Any, Any]]
) -> Iterator[tuple[str, Builder]]:
    """Yield forward pass and both gradients of a function of (input, kernel)."""
    yield f"{name} forward", lambda: _call(function, *args())
    if name != "conv1":
        yield f"{name} input gradient", lambda: _gradient(function, *args())
    yield f"{name} kernel gradient", lambda: _gradient(function, *args(), wrt=1)


def _convolutions(model: AlexNet, batch: int, form: str) -> Iterator[tuple[str, Builder]]:
    for layer in convolutions(model):
        if form != GROUPS:
            conv = partial(
                ops.grouped_conv,
                stride=layer.stride,
                padding=layer.padding,
                groups=layer.groups,
                fast=form == "ours",
            )
        elif layer.groups > 1:
            conv = partial(
                lax.conv_general_dilated,
                window_strides=(layer.stride, layer.stride),
                padding=layer.padding,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=layer.groups,
            )
        else:
            continue

        def args(layer: Layer = layer) -> tuple[jax.Array, jax.Array]:
            return random((batch, *layer.shape), model.dtype), random(layer.kernel, model.dtype)

        yield from _products(layer.name, conv, args)


def _others(model: AlexNet, batch: int, form: str) -> Iterator[tuple[str, Builder]]:
    """Yield normalisation and pooling, and of "ours" the fully connected layers."""
    fast = form == "ours"
    functions = {
        "norm": partial(ops.local_response_norm, groups=COLUMNS, fast=fast),
        "pool": partial(ops.max_pool, fast=fast),
    }
    before: tuple[int, ...] = ()
    for row in summary(model):
        function = functions.get(row.name[:4])
        if function is not None:
            x = partial(random, (batch, *before), model.dtype)
            yield f"{row.name} forward", lambda f=function, x=x: _call(f, x())
            yield f"{row.name} backward", lambda f=function, x=x: _gradient(f, x())
        if row.name.startswith("fc") and fast:
            shapes = (batch, int(np.prod(before))), (int(np.prod(before)), row.shape[0])

            def args(shapes: Any = shapes) -> tuple[jax.Array, jax.Array]:
                return random(shapes[0], model.dtype), random(shapes[1], model.dtype)

            yield from _products(row.name, jnp.matmul, args)
        before = row.shape


def _update(model: AlexNet) -> Callable[[], Any]:
    """Return the optimiser's update and `apply_updates`, in place, as in a training step."""
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


def candidates(model: AlexNet, setting: Setting, device: str) -> dict[str, dict[str, Builder]]:
    """Return by operator, named as in `roofline`, the builders by candidate."""
    found: dict[str, dict[str, Builder]] = defaultdict(dict)

    def add(who: str, builders: Iterable[tuple[str, Builder]]) -> None:
        for name, build in builders:
            found[name][who] = build

    for form in ("ours", "plain", GROUPS):
        add(form, _convolutions(model, setting.batch, form))
    for form in ("ours", "plain"):
        add(form, _others(model, setting.batch, form))
    add("ours", [("update", lambda: _update(model))])
    if importlib.util.find_spec("torch"):
        from benchmarks.speed import torch_operators

        for name, who, build in torch_operators.operators(model, setting, device):
            add(who, [(name, build)])
    return found


def rows(
    costs: Sequence[roofline.Cost],
    seconds: dict[str, dict[str, list[float]]],
    flop_rate: float,
    bandwidth: float,
) -> list[dict[str, Any]]:
    """Return per operator its work, all seconds, its limit, and torch's fastest form."""
    found = []
    for cost in costs:
        times = seconds[cost.name]
        theirs = [who for who in times if who.startswith("torch")]
        best = min(theirs, key=lambda who: statistics.median(times[who]), default="")
        limit = cost.seconds(flop_rate, bandwidth)
        row = {
            "operator": cost.name,
            "flops": cost.flops,
            "bytes": cost.bytes,
            "limit_seconds": limit,
            "seconds": times,
            "share_of_limit": limit / statistics.median(times["ours"]),
            "peer": best,
        }
        if best:
            row["ratio"] = measure.ratio(times, "ours", best)
        found.append(row)
    return found


def table(found: Sequence[dict[str, Any]], flop_rate: float, bandwidth: float) -> str:
    """Return the rows with the sum of the medians, and the forms of grouped convolution."""
    header = ["operator", "work", "limit ms", "ours ms", "ours", "of the limit"]
    header += ["plain ms", "torch ms", "torch's format", "ours / torch (spread)"]
    cells, grouped = [], []
    for row in found:
        times, peer = row["seconds"], row["peer"]
        by_flops = row["flops"] / flop_rate >= row["bytes"] / bandwidth
        amount, unit = (row["flops"], "GFLOP") if by_flops else (row["bytes"], "GB")
        cells.append(
            [
                row["operator"],
                f"{amount / 1e9:,.2f} {unit}",
                f"{row['limit_seconds'] * 1e3:,.2f}",
                measure.milliseconds(times["ours"]),
                f"{amount / 1e9 / statistics.median(times['ours']):,.1f} {unit}/s",
                f"{row['share_of_limit']:.0%}",
                measure.milliseconds(times["plain"]) if "plain" in times else "",
                measure.milliseconds(times[peer]) if peer else "",
                peer.removeprefix("torch "),
                measure.spread(row["ratio"].values(), ".2f") if peer else "",
            ]
        )
        if GROUPS in times:
            forms = (times["plain"], times[GROUPS])
            grouped.append([row["operator"], *map(measure.milliseconds, forms)])
    totals = {}
    for who in ("ours", "plain", "torch"):
        # There is one form only of matrix products and the update: ours.
        medians = [
            statistics.median(times.get(peer if who == "torch" else who, times["ours"]))
            for times, peer in ((row["seconds"], row["peer"]) for row in found)
        ]
        totals[who] = 1e3 * sum(medians)
    limit = 1e3 * sum(row["limit_seconds"] for row in found)
    cells.append(
        [
            *("sum", "", f"{limit:,.1f}", f"{totals['ours']:,.1f}"),
            *("", f"{limit / totals['ours']:.0%}", f"{totals['plain']:,.1f}"),
            *(f"{totals['torch']:,.1f}" if found[0]["peer"] else "", "", ""),
        ]
    )
    forms_header = ["grouped convolution", "split ms", f"{GROUPS} ms"]
    return "\n\n".join(
        [measure.markdown_table(header, cells), measure.markdown_table(forms_header, grouped)]
    )


def augmentation(setting: Setting, rounds: int) -> dict[str, list[float]]:
    """Return seconds of crop, flip and lighting of a batch, and of a whole step."""
    how = augment.Augmentation(crop_size=jax_alexnet.CROP)
    dtype = jnp.float32  # the network rounds them if it must
    augmented = _call(
        lambda raw, key, statistics: augment.train_images(raw, key, 0, statistics, how, dtype),
        jax_alexnet.raw_images(setting.batch, 256),
        jax.random.key(0),
        augment.imagenet_statistics(256),
    )
    step = jax_alexnet.Trainer(setting, how)
    return measure.alternate({"augmentation": augmented, "training step": step}, rounds=rounds)


def main() -> None:
    parser = measure.command_line(__doc__)
    parser.add_argument("--batch", type=int, help="128; with --short 16")
    parser.add_argument("--precision", help="float32; on a GPU bfloat16")
    chosen = parser.parse_args()
    on_gpu = jax.default_backend() != "cpu"
    setting = Setting(
        chosen.batch or (16 if chosen.short else 128),
        chosen.precision or ("bfloat16" if on_gpu else "float32"),
    )
    rounds = 2 if chosen.short else 5
    model = jax_alexnet.network(setting)
    limits = measure.gemm_rate(setting.precision), measure.copy_bandwidth()
    seconds = {}
    with jax_alexnet.precision(setting):
        for name, builders in candidates(model, setting, "cuda" if on_gpu else "cpu").items():
            print(f"{name} ...", file=sys.stderr, flush=True)
            calls = {who: build() for who, build in builders.items()}
            seconds[name] = measure.alternate(calls, rounds=rounds)
            del calls  # frees the arrays before the next operator's are made
    augmented = augmentation(setting, rounds)
    share = measure.ratio(augmented, "training step", "augmentation")
    costs = roofline.training(model, setting.batch, kernel_itemsize=model.dtype.itemsize)
    found = rows(costs, seconds, *limits)
    measure.write_result(
        chosen.out,
        "operators",
        {
            "batch": setting.batch,
            "precision": setting.precision,
            "gemm_flops_per_second": limits[0],
            "copy_bytes_per_second": limits[1],
            "operators": found,
            "augmentation": augmented,
        },
        table=f"{setting}: GEMM {limits[0] / 1e9:,.0f} GFLOP/s, copying "
        f"{limits[1] / 1e9:,.1f} GB/s.\n\n{table(found, *limits)}\n\n"
        f"Augmentation by itself takes {measure.milliseconds(augmented['augmentation'])} ms, "
        f"a training step with it {measure.milliseconds(augmented['training step'])} ms: "
        f"{measure.spread(share.values(), '.1%')}.",
        figure=measure.bar_charts(
            [
                measure.Bars(
                    f"Operators, {setting}: share of the machine's limit",
                    "limit / time",
                    {
                        f"ours, {row['operator']}": [
                            row["limit_seconds"] / s for s in row["seconds"]["ours"]
                        ]
                        for row in found
                    },
                    ceiling=1.0,
                    ceiling_name="limit",
                )
            ]
        ),
    )


if __name__ == "__main__":
    main()
