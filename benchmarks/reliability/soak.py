"""Measure whether a long run grows: memory, open files and threads.

    python -m benchmarks.reliability.soak --out=DIR [--minutes=60] [--short]

Two processes run side by side: the quickstart without an end, which trains, evaluates,
summarises and saves a checkpoint every minute, and a loader alone, which decodes
images as fast as it can and opens its data set anew every thousand batches. Every ten
seconds /proc says what each of them holds (Linux only).
"""

import argparse
import itertools
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from alexnet_jax.training.writers import METRICS_FILE, read_metrics
from benchmarks.speed import measure

# Compiling, caches and the allocator's first arenas: not counted as growth.
WARM_UP_SHARE = 1 / 6
BATCHES_A_SOURCE = 1000
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Sample:
    """Resources of a process after so many seconds: resident MiB, files and threads."""

    seconds: float
    resident_mib: float
    open_files: int
    threads: int


def sample(process: int, started: float) -> Sample:
    """Return a running process's resources from /proc; OSError once it has ended."""
    folder = Path("/proc") / str(process)
    pages = int((folder / "statm").read_text().split()[1])
    return Sample(
        seconds=round(time.monotonic() - started, 1),
        resident_mib=round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1),
        open_files=len(os.listdir(folder / "fd")),
        threads=len(os.listdir(folder / "task")),
    )


def growth(samples: Sequence[Sample]) -> dict[str, Any]:
    """Return the growth of a process, the warm-up left out.

    Returns:
      "mib_an_hour": the slope of the straight line through its memory; the medians of
      the first and the last quarter; the least and most of files and threads.
    """
    counted = [s for s in samples if s.seconds >= WARM_UP_SHARE * samples[-1].seconds]
    hours = np.array([s.seconds for s in counted]) / 3600
    memory = [s.resident_mib for s in counted]
    quarter = max(1, len(counted) // 4)
    files = [s.open_files for s in counted]
    threads = [s.threads for s in counted]
    return {
        "mib_an_hour": float(np.polyfit(hours, memory, 1)[0]),
        "resident_mib": {
            "first_quarter": statistics.median(memory[:quarter]),
            "last_quarter": statistics.median(memory[-quarter:]),
            "most": max(memory),
        },
        "open_files": {"least": min(files), "most": max(files)},
        "threads": {"least": min(threads), "most": max(threads)},
    }


def training_command(workdir: Path, short: bool) -> list[str]:
    """Return the command of the quickstart without an end."""
    config = {
        "num_epochs": 1e6,
        "eval_every_epochs": 1.0,
        "summaries_every_steps": 100,
        "checkpoint.every_minutes": 0.1 if short else 1.0,
    }
    return [
        *(sys.executable, "-m", "alexnet_jax.main", "--config=configs/quickstart.py"),
        *(f"--workdir={workdir}", "--cpu_devices=2"),
        *(f"--config.{name}={value}" for name, value in config.items()),
    ]


def load(counted: Path) -> None:
    """Decode batches without an end; write their number into a file."""
    from alexnet_jax.data import open_source, train_batches

    total = 0
    for seed in itertools.count():
        source = open_source("textures", "train")
        with train_batches(source, batch_size=32, seed=seed) as batches:
            for _ in range(BATCHES_A_SOURCE):
                next(batches)
                total += 1
                counted.write_text(str(total))


def watch(
    processes: Mapping[str, subprocess.Popen[bytes]], minutes: float, every: float
) -> dict[str, list[Sample]]:
    """Return samples of the processes, one in `every` seconds.

    Raises:
      RuntimeError: one of them ended by itself.
    """
    started = time.monotonic()
    samples: dict[str, list[Sample]] = {name: [] for name in processes}
    while (now := time.monotonic() - started) < 60 * minutes:
        for name, process in processes.items():
            if process.poll() is not None:
                raise RuntimeError(
                    f"{name} ended after {now:.0f} s with status {process.returncode}"
                )
            samples[name].append(sample(process.pid, started))
        time.sleep(every)
    return samples


def soak(minutes: float, *, short: bool) -> dict[str, Any]:
    """Run both processes; return samples, growth, and how much was done."""
    with tempfile.TemporaryDirectory() as folder:
        workdir, counted = Path(folder) / "run", Path(folder) / "batches"
        loader = [sys.executable, "-m", "benchmarks.reliability.soak", f"--load={counted}"]
        commands = {"training": training_command(workdir, short), "loading": loader}
        with (Path(folder) / "log").open("wb") as log:
            processes = {
                name: subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
                for name, command in commands.items()
            }
            try:
                samples = watch(processes, minutes, every=2.0 if short else 10.0)
            finally:
                for process in processes.values():
                    process.send_signal(signal.SIGTERM)
                statuses = {n: p.wait(timeout=120) for n, p in processes.items()}
        done = {
            "training_exit_status": statuses["training"],
            "training_steps": int(read_metrics(workdir / METRICS_FILE)[-1]["step"]),
            "loaded_batches": int(counted.read_text()),
        }
    return {
        "minutes": minutes,
        "done": done,
        "growth": {name: growth(found) for name, found in samples.items()},
        "samples": {name: [asdict(s) for s in found] for name, found in samples.items()},
    }


def table(record: Mapping[str, Any]) -> str:
    rows = []
    for name, found in record["growth"].items():
        memory, files, threads = found["resident_mib"], found["open_files"], found["threads"]
        rows.append(
            [
                name,
                f"{found['mib_an_hour']:+.1f}",
                f"{memory['first_quarter']:,.0f}, {memory['last_quarter']:,.0f}",
                f"{files['least']} to {files['most']}",
                f"{threads['least']} to {threads['most']}",
            ]
        )
    header = ["process", "MiB an hour", "MiB, first and last quarter", "open files", "threads"]
    done = record["done"]
    return (
        f"{measure.markdown_table(header, rows)}\n\n"
        f"{record['minutes']:g} minutes, the first sixth not counted: "
        f"{done['training_steps']:,} steps trained, {done['loaded_batches']:,} batches "
        "loaded."
    )


def chart(record: Mapping[str, Any]) -> Figure:
    """Draw memory, files and threads over the time."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True)
    kinds = ("resident_mib", "open_files", "threads")
    for axes, kind in zip(panels, kinds, strict=True):
        for name, found in record["samples"].items():
            axes.plot([s["seconds"] / 60 for s in found], [s[kind] for s in found], label=name)
        axes.axvspan(0, WARM_UP_SHARE * record["minutes"], color="0.93", zorder=0)
        axes.set_ylim(bottom=0)
        axes.set_ylabel(kind)
    panels[0].legend(loc="lower right")
    panels[0].set_title("Resources of a long run (grey: start, not counted)", loc="left")
    panels[-1].set_xlabel("minutes")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--minutes", type=float, help="how long; 60")
    parser.add_argument("--short", action="store_true", help="does it run?")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:  # this is the loading process
        load(options.load)
        return
    if options.out is None:
        parser.error("--out=DIR is missing: the folder of the results")
    record = soak(options.minutes or (0.7 if options.short else 60.0), short=options.short)
    measure.write_result(options.out, "soak", record, table=table(record), figure=chart(record))


if __name__ == "__main__":
    main()
