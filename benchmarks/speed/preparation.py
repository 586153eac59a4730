"""`prepare imagenet` beside decoding, resizing and encoding alone.

    python -m benchmarks.speed.preparation --out=DIR [--short] [--images=FOLDER]
        [--workers N ...]

The command by 1 and by 2 processes, on 400 and on 4,000 images in class folders (those
of FOLDER under several names): the difference is 3,600 images without the start of
processes. Against the same library calls on images in memory, in one process. The
records are the command's first part; the mean image and the colour PCA, for which every
record is decoded again, its second. From the whole follows how long ImageNet takes on
more cores; that is arithmetic, and the disk has to keep up.
"""

import argparse
import contextlib
import functools
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from alexnet_jax.data import images
from alexnet_jax.data.imagenet import OFFICIAL_COUNTS, originals, preparation
from benchmarks.speed import input_images, measure

ALONE, AGAIN = "decode, resize, encode", "and decode again"
RECORDS, WHOLE = "records", "with statistics"
CORES = 16


def main() -> None:
    parser = measure.command_line(__doc__)
    add = parser.add_argument
    add("--images", type=Path, help=input_images.IMAGES_HELP)
    add("--workers", type=int, nargs="+", default=[1, 2], help="processes to compare")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        record = _measured(Path(name), options)
    rates, most = record["images_per_second"], record["most_workers"]
    bars = measure.Bars(
        "prepare imagenet",
        "images per second",
        rates,
        ceiling=most * statistics.median(rates[ALONE]),
        ceiling_name=f"{most} times the first",
    )
    figure = measure.bar_charts([bars])
    measure.write_result(options.out, "preparation", record, table=_table(record), figure=figure)


def _measured(scratch: Path, options: argparse.Namespace) -> dict[str, Any]:
    sizes = (40, 400) if options.short else (400, 4000)
    found = input_images.source(options.images, scratch)
    few, many = (
        input_images.repeated(
            found, scratch / str(size), train=size - size // 20, validation=size // 20
        )
        for size in sizes
    )
    in_memory = [originals.read(original) for original in originals.find(many)["train"][:400]]
    stages: dict[str, list[float]] = {}
    candidates: dict[str, Callable[[], object]] = {
        ALONE: lambda: [_make(*image) for image in in_memory],
        AGAIN: lambda: [_make_and_decode(*image) for image in in_memory],
    }
    for workers in options.workers:
        for source in (few, many):
            name = f"{workers} {source}"
            stages[name] = []
            candidates[name] = functools.partial(_prepare, source, workers, stages[name])
    seconds = measure.alternate(candidates, rounds=1 if options.short else 3, warmup=0)
    rates = {n: [len(in_memory) / s for s in seconds[n]] for n in (ALONE, AGAIN)}
    shares = {}
    for workers in options.workers:
        for part, spent in ((RECORDS, stages), (WHOLE, seconds)):
            name = f"ours, {workers} process{'es' if workers > 1 else ''}, {part}"
            rounds = zip(spent[f"{workers} {few}"], spent[f"{workers} {many}"], strict=True)
            rates[name] = [(sizes[1] - sizes[0]) / (large - small) for small, large in rounds]
            shares[name] = {
                base: [r / workers / b for r, b in zip(rates[name], rates[base], strict=True)]
                for base in (ALONE, AGAIN)
            }
    most = max(options.workers)
    whole = rates[f"ours, {most} process{'es' if most > 1 else ''}, {WHOLE}"]
    a_core = statistics.median(whole) / most
    size = statistics.mean(len(data) for _, _, data in in_memory)
    return {
        "images": sizes,
        "bytes_per_image": size,
        "images_per_second": rates,
        "a_process_of": shares,
        "most_workers": most,
        "computed_hours": sum(OFFICIAL_COUNTS.values()) / a_core / CORES / 3600,
        "computed_megabytes_a_second": CORES * a_core * size / 1e6,
    }


def _make(name: str, label: int, data: bytes) -> bytes:
    return preparation.encode(images.decode(data, preparation.SIZE, name))


def _make_and_decode(name: str, label: int, data: bytes) -> None:
    images.decode(_make(name, label, data), preparation.SIZE, name)


def _prepare(source: Path, workers: int, records_seconds: list[float]) -> None:
    """Run the command; append to a list how long it makes records."""

    @contextlib.contextmanager
    def bar(what: str, total: int | None, unit: str) -> Iterator[Any]:
        started = time.perf_counter()
        yield lambda count: None
        if what == "preparing":
            records_seconds.append(time.perf_counter() - started)

    with (
        tempfile.TemporaryDirectory(dir=source.parent) as folder,
        mock.patch.object(preparation, "progress", bar),
    ):
        preparation.prepare(
            source,
            Path(folder),
            workers=workers,
            max_unreadable=0,
            verify=False,
            log=io.StringIO().write,
        )


def _table(record: dict[str, Any]) -> str:
    rows = []
    for name, rates in record["images_per_second"].items():
        shares = record["a_process_of"].get(name, {})
        cells = [measure.spread(shares[base], ".2f") for base in shares] or ["", ""]
        rows.append([name, measure.spread(rates, ",.0f"), *cells])
    header = ["", "images/s (spread)", "a process, of row 1", "of row 2"]
    return (
        f"{measure.markdown_table(header, rows)}\n\nImages of "
        f"{record['bytes_per_image'] / 1000:,.0f} kB. Computed, not measured: all of "
        f"ImageNet on {CORES} cores at this rate takes "
        f"{60 * record['computed_hours']:.1f} minutes, if the disk delivers "
        f"{record['computed_megabytes_a_second']:,.0f} MB/s."
    )


if __name__ == "__main__":
    main()
