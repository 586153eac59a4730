"""A trace of a few training steps by jax's profiler."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Self

import jax

# Steps before the trace: the first ones fill the queues.
SKIPPED_STEPS = 3


class Profiler:
    """Traces `count` steps into `folder`, some steps after the start of a process.

    A context manager: a run that ends in the middle still closes its trace. Every
    start adds a trace of its own, named by the time.

    Args:
      folder: made when the trace starts.
      count: steps to trace; 0: none.
      start_step: the step that the run starts or goes on from.
      say: where to say what is where.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        count: int,
        start_step: int,
        say: Callable[[str], object],
    ):
        self._folder = Path(folder)
        self._count = count
        self._first = start_step + SKIPPED_STEPS
        self._say = say
        self._step = start_step
        self._running = False

    def is_due(self, step: int) -> bool:
        """Whether the trace starts or ends before that step."""
        return bool(self._count) and step in (self._first, self._first + self._count)

    def switch(self, step: int) -> None:
        """Starts the trace, or ends it; the devices must have nothing under way."""
        self._step = step
        if self._running:
            self._stop()
        else:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def _stop(self) -> None:
        self._running = False
        jax.profiler.stop_trace()
        self._say(
            f"traced from step {self._first} on: {self._folder}. Look at it in "
            f"TensorBoard (pip install tensorboard xprof; tensorboard --logdir="
            f"{self._folder}) or open the newest *.trace.json.gz in it with "
            "https://ui.perfetto.dev"
        )

    def __enter__(self) -> Self:
        return self

    def close(self) -> None:
        """Ends a trace that is under way; says so if there was none."""
        if self._running:
            self._stop()
        elif self._count and self._step < self._first:
            self._say(
                f"no trace: --config.profile begins {SKIPPED_STEPS} steps after the "
                "start, and the run was over before"
            )
        self._count = 0

    def __exit__(self, *exc_info: object) -> None:
        self.close()
