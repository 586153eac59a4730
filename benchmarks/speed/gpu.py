"""Everything that is measured on a GPU, by one command in at most nine minutes.

    python -m benchmarks.speed.gpu --out=DIR [--short] [--minutes N]

Needs JAX for the GPU, and torch for the GPU for the comparisons. Each benchmark runs in
a process of its own and leaves its files in DIR; DIR/gpu.json and .md say how each
went. When the time is up the one that runs is stopped, with what it has written kept,
and the others are left out; more minutes leave out less. `--short` runs a little of
each, to see that all work.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.speed import measure

# Stopping a process and writing the last files.
_RESERVE_SECONDS = 10.0

Start = Callable[[list[str], float], int | None]


@dataclass(frozen=True)
class Section:
    """A benchmark and its arguments; the most important ones come first.

    Attributes:
      module: for example `speed.growth`, of `benchmarks`.
      arguments: after --out.
      at_most: seconds, so that one that hangs leaves time for the others.
    """

    module: str
    arguments: tuple[str, ...]
    at_most: float


@dataclass(frozen=True)
class Outcome:
    """How a section went: "done", "failed (STATUS)", "stopped" or "left out"."""

    command: str
    result: str
    seconds: float


def sections(short: bool) -> list[Section]:
    """What is run, in this order; each writes into a folder of its own name.

    The precision that a GPU is bought for comes first, so that it is there if the
    time runs out.
    """
    if short:
        names = ("train_step", "inference", "operators", "growth", "start_up")
        modules = [*(f"speed.{name}" for name in names), "reliability.repeats"]
        return [Section(module, ("--short",), 100.0) for module in modules]
    train, classify = "speed.train_step", "speed.inference"
    return [
        Section(train, ("--precision", "bfloat16"), 200.0),
        Section("speed.operators", (), 120.0),
        Section(train, ("--precision", "float32", "--batch", "128"), 100.0),
        Section(classify, ("--precision", "bfloat16"), 90.0),
        Section("speed.growth", (), 120.0),
        Section(train, ("--precision", "tensorfloat32", "--batch", "128"), 100.0),
        Section("reliability.repeats", (), 100.0),
        Section("speed.start_up", ("--short",), 60.0),
        Section(train, ("--precision", "float32", "--batch", "1024"), 100.0),
        Section(classify, ("--precision", "float32"), 90.0),
    ]


def run(
    plan: Sequence[Section],
    out: Path,
    *,
    budget: float,
    start: Start,
    clock: Callable[[], float] = time.monotonic,
) -> list[Outcome]:
    """Runs the sections one after the other until the time is up.

    Args:
      plan: what to run.
      out: the folder of the results.
      budget: seconds in all.
      start: (command, seconds) -> exit status, None if it had to be stopped.
      clock: seconds.
    """
    end = clock() + budget - _RESERVE_SECONDS
    found = []
    for section in plan:
        words = " ".join([section.module, *section.arguments])
        began = clock()
        left = min(section.at_most, end - began)
        if left <= 0:
            found.append(Outcome(words, "left out", 0.0))
            continue
        folder = out / "-".join(words.replace("--", "").split())
        command = ["-m", f"benchmarks.{section.module}", f"--out={folder}"]
        status = start([sys.executable, *command, *section.arguments], left)
        result = "stopped" if status is None else f"failed ({status})"
        found.append(Outcome(words, "done" if status == 0 else result, clock() - began))
    return found


def start_process(command: list[str], seconds: float) -> int | None:
    """Runs a command; its whole group of processes is ended when the time is up."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)  # torch's compile workers are processes of its own
        process.wait()
        return None


def backend() -> str:
    """Return JAX's default backend."""
    import jax

    return jax.default_backend()


def main() -> None:
    parser = measure.command_line(__doc__)
    parser.add_argument("--minutes", type=float, default=9.0, help="in all; 9")
    chosen = parser.parse_args()
    # In a process that ends: a CUDA context kept here would hold memory.
    if measure.in_fresh_process(backend) != "gpu":
        raise SystemExit(
            "benchmarks.speed.gpu: JAX finds no GPU here. With one, `pip install "
            '"jax[cuda13]"`; without, run the benchmarks one by one (`python -m '
            "benchmarks.speed.train_step --out=DIR`) or `make bench`."
        )
    found = run(
        sections(chosen.short),
        chosen.out,
        budget=60 * chosen.minutes,
        start=start_process,
    )
    rows = [[o.command, o.result, f"{o.seconds:,.0f}"] for o in found]
    table = measure.markdown_table(["benchmark", "result", "seconds"], rows)
    record = {"sections": [asdict(outcome) for outcome in found]}
    measure.write_result(chosen.out, "gpu", record, table=table)
    if any(outcome.result.startswith("failed") for outcome in found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
