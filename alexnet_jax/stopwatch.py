"""Where the time of a run went: `times.jsonl`, a line a start.

{"first_step": 0, "last_step": 625, "seconds": {"total": 189.2, "training": 141.9,
"waiting for data": 0.4, "compiling": 21.0, "evaluation": 9.7, "checkpoints": 2.1}}

`total` is the wall time from the call of `train_and_evaluate` to its end; the others are
parts of it that do not overlap, and what they leave is the start (opening the data,
statistics, the first state or the checkpoint) and small things. "training" is the time
of the training steps without "waiting for data", in which the devices had nothing to
do. "evaluation" is without the compiling of its step.
"""

import collections
import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

TIMES_FILE = "times.jsonl"
TRAINING, WAITING = "training", "waiting for data"
COMPILING, EVALUATION, CHECKPOINTS = "compiling", "evaluation", "checkpoints"
TRACING, SUMMARIES = "tracing", "summaries"


class Stopwatch:
    """Adds up seconds by what they were spent on, from when it is made."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._seconds: dict[str, float] = collections.defaultdict(float)

    def add(self, what: str, seconds: float) -> None:
        """Counts time that somebody else has measured."""
        self._seconds[what] += seconds

    @contextlib.contextmanager
    def spending(self, what: str) -> Iterator[None]:
        """Counts what happens within, but for what is counted in there already."""
        started, before = time.monotonic(), sum(self._seconds.values())
        try:
            yield
        finally:
            counted = sum(self._seconds.values()) - before
            self._seconds[what] += time.monotonic() - started - counted

    def append_to(
        self, path: str | os.PathLike[str], *, first_step: int, last_step: int
    ) -> None:
        """Adds a line to a `times.jsonl`, which is made if need be."""
        total = time.monotonic() - self._started
        seconds = {"total": total, **self._seconds}
        record = {
            "first_step": first_step,
            "last_step": last_step,
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
        }
        with open(path, "a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(record) + "\n")


@dataclass(frozen=True)
class Times:
    """Of one start: its steps, and the seconds of `times.jsonl`."""

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
