"""`prepare imagenet` beside decoding, resizing and encoding alone.

    python -m benchmarks.preparation --out=DIR [--short] [--pictures=FOLDER]
        [--workers N ...]

The whole command (finding the originals, starting processes, writing and syncing the
records, the mean image and the colour PCA), by 1 and by 2 processes, on 4,000 pictures
in class folders (those of FOLDER under several names); against the same library calls
on pictures in memory, in one process. From its rate follows how long ImageNet takes on
more cores; that is arithmetic, and the disk has to keep up.
"""

import argparse
import contextlib
import io
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from alexnet_jax.data import images
from alexnet_jax.data.imagenet import OFFICIAL_COUNTS, originals, preparation
from benchmarks import measure, pictures

ALONE = "decode, resize, encode"
CORES = 16


def main() -> None:
    parser = measure.command_line(__doc__)
    add = parser.add_argument
    add("--pictures", type=Path, help=pictures.PICTURES_HELP)
    add("--workers", type=int, nargs="+", default=[1, 2], help="processes to compare")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        record = _measured(Path(name), options)
    measure.write_result(
        options.out,
        "preparation",
        record,
        table=_table(record),
        figure=_figure(record),
    )


def _measured(scratch: Path, options: argparse.Namespace) -> dict[str, Any]:
    train, validation = (300, 20) if options.short else (3800, 200)
    found = pictures.source(options.pictures, scratch)
    source = pictures.repeated(found, scratch, train=train, validation=validation)
    table = originals.find(source)["train"]
    in_memory = [table.read(i) for i in range(min(400, len(table)))]
    total = train + validation
    candidates: dict[str, tuple[int, Callable[[], object]]] = {
        ALONE: (len(in_memory), lambda: [_make(*picture) for picture in in_memory])
    }
    for workers in options.workers:
        candidates[_name(workers)] = (
            total,
            lambda workers=workers: _prepare(source, workers),
        )
    seconds = measure.alternate(
        {name: call for name, (_, call) in candidates.items()},
        rounds=1 if options.short else 3,
        warmup=0,
    )
    each = {k: [s / candidates[k][0] for s in v] for k, v in seconds.items()}
    rates = {k: [1 / s for s in v] for k, v in each.items()}
    most = max(options.workers)
    a_core = statistics.median(rates[_name(most)]) / most
    size = statistics.mean(len(data) for _, _, data in in_memory)
    return {
        "pictures": total,
        "bytes_a_picture": size,
        "pictures_a_second": rates,
        "a_core_of_alone": {
            workers: [
                rate / workers / alone
                for rate, alone in zip(rates[_name(workers)], rates[ALONE], strict=True)
            ]
            for workers in options.workers
        },
        "computed_hours": sum(OFFICIAL_COUNTS.values()) / a_core / CORES / 3600,
        "computed_megabytes_a_second": CORES * a_core * size / 1e6,
    }


def _name(workers: int) -> str:
    return f"ours, {workers} process{'es' if workers > 1 else ''}"


def _make(name: str, label: int, data: bytes) -> bytes:
    return preparation.encode(images.decode(data, preparation.SIZE, name))


def _prepare(source: Path, workers: int) -> None:
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        preparation.prepare(
            source,
            Path(folder),
            workers=workers,
            max_unreadable=0,
            verify=False,
            log=io.StringIO().write,
            bar=_no_bar,
        )


@contextlib.contextmanager
def _no_bar(what: str, total: int | None, unit: str) -> Iterator[Any]:
    yield lambda count: None


def _table(record: dict[str, Any]) -> str:
    shares = {_name(w): values for w, values in record["a_core_of_alone"].items()}
    rows = []
    for name, rates in record["pictures_a_second"].items():
        row = [name, f"{statistics.median(rates):,.0f}"]
        row.append(f"{min(rates):,.0f} to {max(rates):,.0f}")
        share = shares.get(name)
        row.append(
            f"{statistics.median(share):.2f} ({min(share):.2f} to {max(share):.2f})"
            if share
            else ""
        )
        rows.append(row)
    header = ["", "pictures/s", "spread", "a process, of alone"]
    return (
        f"{measure.markdown_table(header, rows)}\n\n{record['pictures']:,} pictures of "
        f"{record['bytes_a_picture'] / 1000:,.0f} kB. Computed, not measured: all of "
        f"ImageNet on {CORES} cores at this rate takes "
        f"{60 * record['computed_hours']:.1f} minutes "
        f"({record['computed_hours']:.2f} hours), if the disk delivers "
        f"{record['computed_megabytes_a_second']:,.0f} MB/s."
    )


def _figure(record: dict[str, Any]) -> Figure:
    rates = record["pictures_a_second"]
    most = max(record["a_core_of_alone"])
    return measure.bar_chart(
        rates,
        title="prepare imagenet, the whole command",
        unit="pictures a second",
        ceiling=most * statistics.median(rates[ALONE]),
        ceiling_name=f"{most} times decode, resize, encode",
    )


if __name__ == "__main__":
    main()
