"""Time of a run: `times.jsonl`, steps per second and waits for data.

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
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

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
SKIPPED_STEPS = 3


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

    def lap(self, step: int, waited: float) -> tuple[float, float]:
        """Count the time since the last `restart` or `lap`.

        Returns:
          (steps per second, without evaluations, checkpoints and summaries; share of the
          time that the devices waited for data, in [0, 1]).
        """
        paused = sum(self._seconds.values()) - self._counted
        seconds = time.monotonic() - self._since - paused
        waited_here, steps = waited - self._waited, step - self._step
        self._seconds[WAITING] += waited_here
        self._seconds[TRAINING] += seconds - waited_here
        self.restart(step, waited)
        return steps / seconds, waited_here / seconds

    def append_to(self, path: Path, *, first_step: int, last_step: int) -> None:
        """Append a line to a `times.jsonl`."""
        seconds = {"total": time.monotonic() - self._started, **self._seconds}
        record = {
            "first_step": first_step,
            "last_step": last_step,
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
        }
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")


class Times(NamedTuple):
    """Steps and seconds of one start, from `times.jsonl`."""

    first_step: int
    last_step: int
    seconds: dict[str, float]


def read_times(path: Path) -> list[Times]:
    """Return the starts of a run in order, without one that was killed."""
    found = []
    with contextlib.suppress(FileNotFoundError, ValueError):  # of a line torn by a kill
        for line in path.read_text().splitlines():
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


class Profiler(contextlib.ExitStack):
    """Trace `count` training steps into `folder` with JAX's profiler.

    It begins `SKIPPED_STEPS` after the start, when the queues are full, and ends at the
    latest with the run. Every start adds a trace, named by the time.
    """

    def __init__(self, folder: Path, count: int, start_step: int):
        super().__init__()
        self._folder, self._count = folder, count
        self._first = start_step + SKIPPED_STEPS

    def is_due(self, step: int) -> bool:
        """Return True if the trace begins or ends before the step."""
        return self._count > 0 and step in (self._first, self._first + self._count)

    def switch(self, step: int) -> None:
        """Begin or end the trace; the devices must be idle."""
        self.close()
        if step == self._first:
            self.enter_context(jax.profiler.trace(self._folder))
