"""Where the time of a run goes: `times.jsonl`, images per second, a profiler's trace.

Every start appends a line to `times.jsonl`:

{"first_step": 0, "last_step": 625, "seconds": {"total": 189.2, "training": 141.9,
"waiting for data": 0.4, "compiling": 21.0, "evaluation": 9.7, "checkpoints": 2.1}}

"total" is the wall time of `train_and_evaluate`. The others are parts of it that do not
overlap; the start and small things are the rest. "waiting for data" is the time in which
the devices had nothing to do, and "training" the rest of the training steps.
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
# Steps that may be under way on the devices before the host waits for one: enough
# to keep them busy, few enough to bound memory.
STEPS_IN_FLIGHT = 2
# How exactly it is known when they had nothing left to do: to this share of the time
# that the host has waited, but no more often than so many seconds.
POLL_SHARE, POLL_SECONDS = 0.05, 0.0002
# Steps before a trace: the first ones fill the queues.
SKIPPED_STEPS = 3


class Pace(NamedTuple):
    """Speed of the training steps between two log lines.

    Attributes:
      steps_per_second: without the time of evaluations, checkpoints and summaries.
      wait_share: share of the time in which the devices waited for data, in [0, 1].
    """

    steps_per_second: float
    wait_share: float


class StepClock:
    """Adds up seconds by purpose, and measures the pace of the training steps."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._seconds: dict[str, float] = collections.defaultdict(float)
        self.restart(0, 0.0)

    @contextlib.contextmanager
    def spending(self, what: str) -> Iterator[None]:
        """Count the time within, without what is counted inside already."""
        started, before = time.monotonic(), sum(self._seconds.values())
        try:
            yield
        finally:
            counted = sum(self._seconds.values()) - before
            self._seconds[what] += time.monotonic() - started - counted

    def restart(self, step: int, waited: float) -> None:
        """Begin to measure the pace, at a step and a value of `Batches.wait_seconds`."""
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

    def append_to(
        self, path: str | os.PathLike[str], *, first_step: int, last_step: int
    ) -> None:
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
    """Return the starts of a run that have ended by themselves, in order.

    A last line torn by a kill is left out.
    """
    if not os.path.exists(path):
        return []
    found = []
    with open(path, encoding="utf-8") as file, contextlib.suppress(ValueError):
        for line in file:
            found.append(Times(**json.loads(line)))
    return found


def next_batch(batches: Batches, computing: Any) -> Batch:
    """Wait for the next batch and return it.

    The wait counts (`Batches.wait_seconds`, `data_wait_frac`) only from when the devices
    have nothing left to do: the host runs ahead of them, and a loader that is a little
    too slow would otherwise seem to cost all of the time.

    Args:
      batches: where it comes from.
      computing: a result, an array, of the last step that was given to the devices.
    """
    started = time.perf_counter()
    while not computing.is_ready():
        waited = time.perf_counter() - started
        if batches.wait(max(POLL_SECONDS, POLL_SHARE * waited)):
            break
    return next(batches)


class Profiler:
    """Trace `count` training steps into `folder` by jax's profiler.

    The trace begins some steps after the start. A run that ends in the middle still
    closes it. Every start of a run adds a trace, named by the time.
    """

    def __init__(
        self,
        folder: Path,
        *,
        count: int,
        start_step: int,
        say: Callable[[str], object],
    ):
        self._folder, self._count, self._say = folder, count, say
        self._first = start_step + SKIPPED_STEPS
        self._is_running = self._has_begun = False

    def is_due(self, step: int) -> bool:
        """Return True if the trace begins or ends before that step."""
        return bool(self._count) and step in (self._first, self._first + self._count)

    def switch(self) -> None:
        """Begin the trace, or end it; the devices must have nothing under way."""
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
