"""Search by binary codes beside exact search: what it finds and how fast it is.

    python -m alexnet_jax.retrieve --workdir=RUN --index=TRAIN.npz [--layer=LAYER]
    python -m alexnet_jax.retrieve --workdir=RUN --index=TEST.npz [--layer=LAYER] \
        --split=test
    python -m benchmarks.speed.codes --out=DIR [--short] [--index TRAIN.npz ...]
        [--queries TEST.npz ...] [--parts quality|speed ...]

For each index, by codes of several lengths: how many of the exact 10 nearest are among
the 10 and the 100 nearest by code (the second is also what a shortlist of 100, put into
exact order, finds), and how many of the 10 nearest by code are of the query's class.
Coders learn from the rows of the index; 1,000 images of TEST.npz, evenly spread, are
the queries. The autoencoder's codes stand beside those of as many random hyperplanes
(locality-sensitive hashing) and of the signs of the first principal components. Without
files the features are drawn around random centres.

Speed is measured on 50,000 rows of 4,096 random numbers, which is all it depends on:
`retrieval.nearest`, a plain search in NumPy, and `codes.nearest_codes`, the encoding of
the queries included, in turns.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from alexnet_jax.analysis.codes import (
    STEPS,
    Coder,
    Codes,
    nearest_codes,
    recall,
    shortlist,
    train_coder,
)
from alexnet_jax.analysis.retrieval import load_index, nearest
from benchmarks.speed import measure

BITS = (28, 64, 128, 256)
NEAREST, AMONG = 10, 100
QUERIES = 1000
# Rows, numbers per row, bits and queries of the measurement of speed.
SPEED_ROWS, SPEED_WIDTH, SPEED_BITS, SPEED_QUERIES = 50_000, 4096, 256, (1, 256)
OURS = "autoencoder"
PEER = "exact, NumPy"


def main() -> None:
    parser = measure.command_line(__doc__)
    for name, about in (("index", "of the rows"), ("queries", "of the queries")):
        parser.add_argument(f"--{name}", type=Path, nargs="+", default=[], help=about)
    parts = ("quality", "speed")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    options = parser.parse_args()
    if len(options.index) != len(options.queries):
        parser.error("--index and --queries need as many files each.")
    record: dict[str, Any] = {"quality": {}, "speed": None}
    if "quality" in options.parts:
        record["quality"] = _qualities(options)
    if "speed" in options.parts:
        size = (2000, 256) if options.short else (SPEED_ROWS, SPEED_WIDTH)
        record["speed"] = speed(*size, rounds=2 if options.short else 5)
    measure.write_result(options.out, "codes", record, table=table(record), figure=chart(record))


def _qualities(options: argparse.Namespace) -> dict[str, Any]:
    bits, steps = ((28, 64), 200) if options.short else (BITS, STEPS)
    qualities = {}
    for rows, queries in zip(options.index, options.queries, strict=True):
        found, asked = load_index(rows), load_index(queries)
        count = min(QUERIES, len(asked.labels))
        chosen = np.linspace(0, len(asked.labels) - 1, count, dtype=int)
        source = found.source.partition(":")[0]  # not where it lies on this machine
        qualities[f"{found.layer} of {source} {found.split}"] = quality(
            (found.features, found.labels),
            (asked.features[chosen], asked.labels[chosen]),
            bits=bits,
            steps=steps,
        )
    if not qualities:
        qualities["drawn"] = quality(drawn(0), drawn(1, 200), bits=bits, steps=steps)
    return qualities


def drawn(seed: int, count: int = 2000) -> tuple[np.ndarray, np.ndarray]:
    """Return features [count, 256] around ten centres, and labels."""
    centres = np.random.default_rng(0).normal(size=(10, 256))
    rng = np.random.default_rng([1, seed])
    labels = rng.integers(0, 10, count)
    features = centres[labels] + rng.normal(size=(count, 256))
    return features.astype(np.float32), labels


def random_planes(features: np.ndarray, bits: int, seed: int = 0) -> Coder:
    """Return random hyperplanes through the mean (Charikar 2002)."""
    width = features.shape[1]
    rng = np.random.default_rng(seed)
    return Coder(
        mean=features.mean(axis=0),
        kernel=rng.normal(size=(width, bits)).astype(np.float32),
        bias=np.zeros(bits, np.float32),
    )


def principal_signs(features: np.ndarray, bits: int) -> Coder:
    """Return the signs of the first principal components of 10,000 rows, evenly spread."""
    rows = np.linspace(0, len(features) - 1, min(10_000, len(features)), dtype=int)
    mean = features.mean(axis=0)
    centred = features[rows] - mean
    _, vectors = np.linalg.eigh(centred.T @ centred)
    kernel = np.ascontiguousarray(vectors[:, ::-1][:, :bits])  # the largest comes last
    return Coder(mean=mean, kernel=kernel, bias=np.zeros(kernel.shape[1], np.float32))


def quality(
    index: tuple[np.ndarray, np.ndarray],
    queries: tuple[np.ndarray, np.ndarray],
    *,
    bits: tuple[int, ...],
    steps: int,
) -> dict[str, Any]:
    """Return recall and precision of each kind of code.

    Args:
      index, queries: features [N, D] and labels [N].
      bits: lengths of the codes.
      steps: updates of an autoencoder.
    """
    (features, labels), (asked, wanted) = index, queries
    _, exact = nearest(features, asked, NEAREST)
    methods: dict[str, Callable[[int], Coder]] = {
        OURS: lambda size: train_coder(features, bits=size, steps=steps),
        "random planes": lambda size: random_planes(features, size),
        "principal signs": lambda size: principal_signs(features, size),
    }
    found = []
    for size in bits:
        for name, make in methods.items():
            started = time.perf_counter()
            coder = make(size)
            seconds = time.perf_counter() - started
            packed = coder.encode(features)
            _, rows = nearest_codes(packed, coder.encode(asked), AMONG)
            found.append(
                {
                    "method": name,
                    "bits": size,
                    "bytes": packed.shape[1],
                    "recall_among_10": recall(rows[:, :NEAREST], exact),
                    "recall_among_100": recall(rows, exact),
                    "precision_10": precision(labels, rows[:, :NEAREST], wanted),
                    "making_seconds": seconds,
                }
            )
    return {
        "rows": len(features),
        "width": features.shape[1],
        "queries": len(asked),
        "exact_precision_10": precision(labels, exact, wanted),
        "codes": found,
    }


def precision(labels: np.ndarray, rows: np.ndarray, wanted: np.ndarray) -> float:
    """Return the share of the rows found [Q, n] whose label is the query's [Q]."""
    return float((labels[rows] == wanted[:, None]).mean())


def speed(rows: int, width: int, *, rounds: int) -> dict[str, Any]:
    """Return seconds, and seconds of all processors, of searches for one query and many."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((rows, width), np.float32)
    codes = Codes.of(random_planes(features, SPEED_BITS), features)
    squares = np.einsum("nd,nd->n", features, features)
    seconds, cpu_seconds = {}, {}
    for count in SPEED_QUERIES:
        queries = rng.standard_normal((count, width), np.float32)
        searches: dict[str, Callable[[], Any]] = {
            PEER: partial(plain_search, features, squares, queries, NEAREST),
            "exact": partial(nearest, features, queries, NEAREST),
            "ours, codes": lambda queries=queries: nearest_codes(
                codes.packed, codes.coder.encode(queries), NEAREST
            ),
            "ours, shortlist of 100": partial(
                shortlist, features, codes, queries, NEAREST, size=AMONG
            ),
        }
        spent: dict[str, list[float]] = {name: [] for name in searches}
        calls = {name: partial(_timed, call, spent[name]) for name, call in searches.items()}
        seconds[str(count)] = measure.alternate(calls, rounds=rounds)
        cpu_seconds[str(count)] = {name: found[1:] for name, found in spent.items()}
    about = {"rows": rows, "width": width, "bits": SPEED_BITS}
    return {**about, "seconds": seconds, "cpu_seconds": cpu_seconds}


def _timed(call: Callable[[], Any], spent: list[float]) -> None:
    """Call and append the processors' seconds, which have no other process's work in them."""
    started = time.process_time()
    call()
    spent.append(time.process_time() - started)


def plain_search(
    features: np.ndarray, squares: np.ndarray, queries: np.ndarray, count: int
) -> np.ndarray:
    """Return the nearest rows in NumPy, in float32, from the rows' squared lengths."""
    distances = squares - 2 * queries @ features.T  # but for the queries' own lengths
    rows = np.argpartition(distances, count, axis=1)[:, :count]
    order = np.take_along_axis(distances, rows, axis=1).argsort(axis=1)
    return np.take_along_axis(rows, order, axis=1)


def table(record: dict[str, Any]) -> str:
    parts = []
    for name, found in record["quality"].items():
        header = ["codes", "bits", "bytes", "of 10 among 10", "among 100", "same class"]
        exact = f"{found['exact_precision_10']:.1%}"
        cells = [["exact", "", f"{4 * found['width']:,}", "100%", "100%", exact]]
        for row in found["codes"]:
            shares = ("recall_among_10", "recall_among_100", "precision_10")
            cells.append(
                [row["method"], str(row["bits"]), str(row["bytes"])]
                + [f"{row[share]:.1%}" for share in shares]
            )
        parts.append(
            f"{name}: {found['rows']:,} rows of {found['width']:,} numbers, "
            f"{found['queries']:,} queries\n\n{measure.markdown_table(header, cells)}"
        )
    if timed := record["speed"]:
        header = ["queries at once", "search", "queries/s", "CPU ms per query"]
        header += [f"times {PEER}", "in CPU seconds"]
        cells = []
        for count, seconds in timed["seconds"].items():
            cpu = timed["cpu_seconds"][count]
            for name, calls in seconds.items():
                rates = measure.spread((int(count) / s for s in calls), ",.2f")
                each = 1000 * statistics.median(cpu[name]) / int(count)
                ratios = [measure.ratio(found, name, PEER) for found in (seconds, cpu)]
                times = [measure.spread(found.values(), ".2f") for found in ratios]
                cells.append([count, name, rates, f"{each:,.2f}", *times])
        parts.append(
            f"{timed['rows']:,} rows of {timed['width']:,} numbers, codes of "
            f"{timed['bits']} bits\n\n{measure.markdown_table(header, cells)}"
        )
    return "\n\n".join(parts)


def chart(record: dict[str, Any]) -> Figure:
    """Draw recall over the bits, a panel per data set, and the speed on the right."""
    qualities, timed = record["quality"], record["speed"]
    count = len(qualities) + bool(timed)
    figure = Figure(figsize=(0.6 + 4.4 * count, 3.4), layout="constrained")
    panels = figure.subplots(1, count, squeeze=False)[0]
    for axes, (name, found) in zip(panels, qualities.items(), strict=False):
        _draw_quality(axes, name, found["codes"])
    if timed:
        most = max(timed["seconds"], key=int)
        rates = {n: [int(most) / s for s in calls] for n, calls in timed["seconds"][most].items()}
        title = f"{timed['rows']:,} rows, {most} queries at once"
        measure.Bars(title, "queries per second", rates).draw(panels[-1])
    return figure


def _draw_quality(axes: Axes, name: str, codes: list[dict[str, Any]]) -> None:
    for i, method in enumerate(dict.fromkeys(c["method"] for c in codes)):
        own = [c for c in codes if c["method"] == method]
        bits = [c["bits"] for c in own]
        for share, style in (("recall_among_10", "--"), ("recall_among_100", "-")):
            values = [100 * c[share] for c in own]
            label = method if style == "-" else None
            axes.plot(bits, values, f"o{style}", color=f"C{i}", label=label)
        axes.set_xscale("log", base=2)
        axes.set_xticks(bits, [str(b) for b in bits])
    axes.minorticks_off()
    axes.set(ylim=(0, 100), xlabel="bits", title=name)
    axes.set_ylabel("% of the exact 10 nearest\namong 100 (dashed: 10) by code")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)


if __name__ == "__main__":
    main()
