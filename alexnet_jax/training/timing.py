"""Time of a run: `times.jsonl`, images per second and the profiler's trace.

Every start of a run appends a line to `times.jsonl`:

{"first_step": 0, "last_step": 625, "seconds": {"total": 189.2, "training": 141.9,
"waiting for data": 0.4, "compiling": 21.0, "evaluation": 9.7, "checkpoints": 2.1}}

"total" is the wall time of `train_and_evaluate`. The others are parts of it that do not
overlap. While "waiting for data" the devices were idle; "training" is the rest of the
training steps.
"""

import collections
import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax

from alexnet_jax.data import Batches
from alexnet_jax.data.loader import Batch

TIMES_FILE = "times.jsonl"
TRAINING, WAITING = "training", "waiting for data"
COMPILING, EVALUATION, CHECKPOINTS = "compiling", "evaluation", "checkpoints"
TRACING, SUMMARIES = "tracing", "summaries"
# Steps that the devices may be running or have queued before the host waits for one:
# enough to keep them busy, few enough to bound memory.
STEPS_IN_FLIGHT = 2
# Precision of the time when the devices became idle: a share of the host's wait, and at
# least so many seconds.
POLL_SHARE, POLL_SECONDS = 0.05, 0.0002
# Steps before a trace; they fill the queues.
SKIPPED_STEPS = 3


class Pace(NamedTuple):
    """Speed of training between two log lines.

    Attributes:
      steps_per_second: excludes the time of evaluations, checkpoints and summaries.
      wait_share: share of the time that the devices waited for data, in [0, 1].
    """

    steps_per_second: float
    wait_share: float


class StepClock:
    """Add up seconds by purpose, and measure the pace of the training steps."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._seconds: dict[str, float] = collections.defaultdict(float)
        self.restart(0, 0.0)

    @contextlib.contextmanager
    def spending(self, what: str) -> Iterator[None]:
        """Count the time in the block as `what`, except what is counted inside."""
        started, before = time.monotonic(), sum(self._seconds.values())
        try:
            yield
        finally:
            counted = sum(self._seconds.values()) - before
            self._seconds[what] += time.monotonic() - started - counted

    def restart(self, step: int, waited: float) -> None:
        """Start to measure the pace at a step and a value of `Batches.wait_seconds`."""
        self._since, self._counted = time.monotonic(), sum(self._seconds.values())
        self._step, self._waited = step, waited

    def lap(self, step: int, waited: float) -> Pace:
        """Return the pace since the last `restart` or `lap`, and count the time."""
        paused = sum(self._seconds.values()) - self._counted
        seconds = time.monotonic() - self._since - paused
        waited_here, steps = waited - self._waited, step - self._step
        self._seconds[WAITING] += waited_here
        self._seconds[TRAINING] += seconds - waited_here
        self.restart(step, waited)
        return Pace(steps / seconds, waited_here / seconds)

    def append_to(self, path: str | os.PathLike[str], *, first_step: int, last_step: int) -> None:
        """Append a line to a `times.jsonl`."""
        seconds = {"total": time.monotonic() - self._started, **self._seconds}
        record = {
            "first_step": first_step,
            "last_step": last_step,
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
        }
        with open(path, "a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(record) + "\n")


@dataclass(frozen=True)
class Times:
    """Steps and seconds of one start, from `times.jsonl`."""

    first_step: int
    last_step: int
    seconds: dict[str, float]


def read_times(path: str | os.PathLike[str]) -> list[Times]:
    """Return the starts of a run in order, without one that was killed."""
    if not os.path.exists(path):
        return []
    found = []
    with open(path, encoding="utf-8") as file, contextlib.suppress(ValueError):
        for line in file:
            found.append(Times(**json.loads(line)))
    return found


def next_batch(batches: Batches, computing: Any) -> Batch:
    """Return the next batch; count the wait only while the devices are idle.

    The host runs ahead of the devices, so its whole wait would overstate a loader that is
    a little too slow. `Batches.wait_seconds` and `data_wait_frac` count the idle time.

    Args:
      batches: the source of the batch.
      computing: an array that the last started step computes.
    """
    started = time.perf_counter()
    while not computing.is_ready():
        waited = time.perf_counter() - started
        if batches.wait(max(POLL_SECONDS, POLL_SHARE * waited)):
            break
    return next(batches)


class Profiler:
    """Trace `count` training steps into `folder` with JAX's profiler.

    The trace begins `SKIPPED_STEPS` after the start of the run. A run that ends before
    the trace does closes it. Every start adds a trace, named by the time.
    """

    def __init__(self, folder: Path, *, count: int, start_step: int, say: Callable[[str], object]):
        self._folder, self._count, self._say = folder, count, say
        self._first = start_step + SKIPPED_STEPS
        self._is_running = self._has_begun = False

    def is_due(self, step: int) -> bool:
        """Return True if the trace begins or ends before the step."""
        return bool(self._count) and step in (self._first, self._first + self._count)

    def switch(self) -> None:
        """Begin or end the trace; the devices must be idle."""
        if not self._is_running:
            jax.profiler.start_trace(self._folder)
            self._is_running = self._has_begun = True
            return
        self._is_running = False
        jax.profiler.stop_trace()
        self._say(
            f"traced from step {self._first} on: {self._folder}. Look at it in "
            f"TensorBoard (pip install tensorboard xprof; tensorboard --logdir="
            f"{self._folder}) or open the newest *.trace.json.gz in it with "
            "https://ui.perfetto.dev"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._is_running:
            self.switch()
        elif self._count and not self._has_begun:
            self._say(
                f"no trace: --config.profile begins {SKIPPED_STEPS} steps after the "
                "start, and the run was over before"
            )
