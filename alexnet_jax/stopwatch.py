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
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from alexnet_jax import kinds
from alexnet_jax.data.files import parse_json, read_lines

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
    """The starts of a run that have ended by themselves; none: there is no such file.

    Lines that are not whole are left out.

    Raises:
      ValueError: if it is no regular file.
    """
    try:
        lines = read_lines(path)
    except FileNotFoundError:
        return []
    times = (_parse(line) for line in lines)
    return [found for found in times if found is not None]


_NAMES = ("first_step", "last_step", "seconds")


def _parse(line: str) -> Times | None:
    """A start, or None for a line that is not whole."""
    record: Any = None
    with contextlib.suppress(ValueError):
        record = parse_json(line)
    if not isinstance(record, dict) or not {*_NAMES} <= {*record}:
        return None
    first, last, seconds = (record[name] for name in _NAMES)
    whole = kinds.WHOLE.holds(first) and kinds.WHOLE.holds(last)
    whole = whole and 0 <= first <= last < 2**63
    # Without its total a line says nothing.
    whole = whole and isinstance(seconds, dict) and "total" in seconds
    if not whole or not all(map(_is_seconds, seconds.values())):
        return None
    return Times(first, last, {name: float(s) for name, s in seconds.items()})


def _is_seconds(value: Any) -> bool:
    return kinds.NUMBER.holds(value) and 0 <= value <= sys.float_info.max
