"""The loader, beside the bare JPEG decoder and a PyTorch DataLoader with Pillow.

    python -m benchmarks.speed.input_pipeline --out=DIR [--short] [--workers N]
        [--images=FOLDER]

Records of 256 x 256 JPEGs in array_record, as `prepare imagenet` writes them: one file
of 1,250 under 1,025 names, so that everything depends on ImageNet's number of records
but the bytes come from the page cache. The decoder alone decodes JPEGs that lie in
memory into one array; the peer has the same JPEGs in memory and makes the same batches
of uint8 tensors. Then, in a process of its own, the memory over many batches; and the
time from the start of a process to its first batch.
"""

import argparse
import concurrent.futures
import importlib.metadata
import importlib.util
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from alexnet_jax.data import sources
from alexnet_jax.data.imagenet import preparation
from alexnet_jax.data.loader import Batches, train_order
from alexnet_jax.data.sources.tfds import TfdsSource
from benchmarks.speed import input_images, measure, memory

BATCH_SIZE = 128
SHUFFLED, IN_ORDER = "ours, shuffled", "ours, in order"
BARE, THREADS = "decoder alone, 1 thread", "decoder alone, a thread per worker"
UNDECODED = "ours, records not decoded, 1 thread"
UNDECODED_THREADS = "ours, records not decoded, a thread per worker"
TORCH = "torch DataLoader, Pillow"
# The versions in the result.
PACKAGES = ("simplejpeg", "array_record", "tensorflow-datasets", "grain", "pillow")

# A user's first script.
_FIRST_BATCH = """
import sys
from alexnet_jax.data import open_source, train_batches
source = open_source("imagenet2012_256", "train", data_dir=sys.argv[1])
with train_batches(source, batch_size=128, seed=0, workers=int(sys.argv[2])) as batches:
    next(batches)
    print("there")
"""


def main() -> None:
    parser = measure.command_line(__doc__)
    add = parser.add_argument
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="of each")
    add("--images", type=Path, help=input_images.IMAGES_HELP)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        record = _measured(Path(name), options)
    rates = record["images_per_second"]
    bars = measure.Bars(
        f"Records of 256 x 256 JPEGs, {options.workers} workers",
        "images per second",
        {name: rates[name] for name in rates if name not in (UNDECODED, UNDECODED_THREADS)},
        ceiling=statistics.median(rates[BARE]) * options.workers,
        ceiling_name=f"{options.workers} times the decoder alone",
    )
    figure = measure.bar_charts([bars])
    measure.write_result(options.out, "input_pipeline", record, table=_table(record), figure=figure)


def _measured(data_dir: Path, options: argparse.Namespace) -> dict[str, Any]:
    workers, short = options.workers, options.short
    source = input_images.records(options.images, data_dir)
    jpegs = [source.record(index)[1] for index in range(preparation.IMAGES_PER_SHARD)]
    candidates = _candidates(source, jpegs, workers, short)
    calls = {name: call for name, (_, call) in candidates.items()}
    seconds = measure.alternate(calls, rounds=2 if short else 5)
    each = {name: [s / candidates[name][0] for s in found] for name, found in seconds.items()}
    of_cores = measure.ratio(each, SHUFFLED, BARE)
    ratios = {
        "of the decoder's rate times the cores": {k: v / workers for k, v in of_cores.items()},
        "of the decoder's rate in as many threads": measure.ratio(each, SHUFFLED, THREADS),
        "shuffled against in order": measure.ratio(each, SHUFFLED, IN_ORDER),
    }
    if TORCH in each:
        ratios["times torch's DataLoader"] = measure.ratio(each, SHUFFLED, TORCH)
    return {
        "workers": workers,
        "records": source.num_examples,
        "bytes_per_image": statistics.mean(len(jpeg) for jpeg in jpegs),
        "images": "given" if options.images else "drawn",
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "images_per_second": {k: [1 / s for s in v] for k, v in each.items()},
        "ratios": ratios,
        "first_batch_seconds": [
            _first_batch_seconds(data_dir, workers) for _ in range(1 if short else 5)
        ],
        "memory": measure.in_fresh_process(
            _memory, data_dir, 10_000 if short else 100_000, workers
        ),
    }


def _candidates(
    source: TfdsSource, jpegs: Sequence[bytes], workers: int, short: bool
) -> dict[str, tuple[int, Callable[[], object]]]:
    """Return by name how many images a call makes, and the call."""
    count = BATCH_SIZE * (4 if short else 160) * workers
    part = count // workers // 2
    cuts = np.linspace(0, count, workers + 1).astype(int).tolist()
    threads = concurrent.futures.ThreadPoolExecutor(workers)
    shuffled = train_order(source.num_examples, 0)

    def decode(count: int) -> None:
        out = np.empty((preparation.SIZE, preparation.SIZE, 3), np.uint8)
        for i in range(count):
            simplejpeg.decode_jpeg(jpegs[i % len(jpegs)], buffer=out)

    def find(first: int, last: int) -> None:
        for index in shuffled(first, last).tolist():
            source.record(index)

    def read(examples: Callable[[int, int], np.ndarray]) -> None:
        """Read batches, from the start of the threads to their end."""
        for _ in _batches(source, examples, count, workers):
            pass

    found: dict[str, tuple[int, Callable[[], object]]] = {
        BARE: (part, lambda: decode(part)),
        THREADS: (part * workers, lambda: list(threads.map(decode, [part] * workers))),
        SHUFFLED: (count, lambda: read(shuffled)),
        IN_ORDER: (count, lambda: read(np.arange)),
        UNDECODED: (count, lambda: find(0, count)),
        UNDECODED_THREADS: (count, lambda: list(threads.map(find, cuts[:-1], cuts[1:]))),
    }
    if importlib.util.find_spec("torch"):
        loader = _torch_loader(jpegs, count // 2, workers)
        found[TORCH] = (count // 2, lambda: [None for _ in loader])
    return found


def _batches(source: sources.Source, examples: Any, count: int, workers: int) -> Batches:
    return Batches(source, examples, batch_size=BATCH_SIZE, num_examples=count, workers=workers)


def _torch_loader(jpegs: Sequence[bytes], count: int, workers: int) -> Any:
    """Return the peer's batches; its processes start once and stay."""
    import torch

    class InMemory(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return count

        def __getitem__(self, index: int) -> tuple[Any, int]:
            with Image.open(io.BytesIO(jpegs[index % len(jpegs)])) as image:
                assert image.mode == "RGB"  # convert() would copy it once more
                return torch.from_numpy(np.array(image)), index

    return torch.utils.data.DataLoader(
        InMemory(),
        batch_size=BATCH_SIZE,
        shuffle=True,
        num_workers=workers,
        persistent_workers=True,
        prefetch_factor=4,
    )


def _first_batch_seconds(data_dir: Path, workers: int) -> float:
    started = time.perf_counter()
    command = [sys.executable, "-c", _FIRST_BATCH, str(data_dir), str(workers)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        return time.perf_counter() - started


def _memory(data_dir: Path, count: int, workers: int) -> dict[str, Any]:
    """Return resident memory while `count` shuffled records are read, a hundred samples."""
    source = sources.open_source("imagenet2012_256", "train", data_dir=str(data_dir))
    order = train_order(source.num_examples, 0)
    steps = count // BATCH_SIZE
    records, mib = [], []
    with _batches(source, order, steps * BATCH_SIZE, workers) as batches:
        for step, _ in enumerate(batches, 1):
            if step % max(1, steps // 100) == 0:
                records.append(step * BATCH_SIZE)
                mib.append(memory.status_bytes("VmRSS") / 2**20)
    return {"records": records, "mib": mib}


def _table(record: dict[str, Any]) -> str:
    rates = [
        [name, measure.spread(found, ",.0f")] for name, found in record["images_per_second"].items()
    ]
    ratios = [
        [name, measure.spread(found.values(), ".2f")] for name, found in record["ratios"].items()
    ]
    watched = record["memory"]
    late = watched["mib"][len(watched["mib"]) // 10 :]
    sentence = (
        f"{record['workers']} workers each; {record['records']:,} records of "
        f"{record['bytes_per_image']:,.0f} bytes ({record['images']} images), from "
        f"the page cache. First batch {measure.spread(record['first_batch_seconds'], '.2f')} "
        f"s after the start of the process. Memory while {watched['records'][-1]:,} records "
        f"are read, after the first tenth of them: {min(late):,.0f} to {max(late):,.0f} MiB."
    )
    rate_table = measure.markdown_table(["", "images/s (spread)"], rates)
    ratio_table = measure.markdown_table(["ours, shuffled", "ratio (spread)"], ratios)
    return f"{rate_table}\n\n{ratio_table}\n\n{sentence}"


if __name__ == "__main__":
    main()
