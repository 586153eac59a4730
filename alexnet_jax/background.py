"""What the threads of Orbax and TensorStore say, and do, when a disk is full.

A save that fails leaves threads that still write, and each of them tells of its own
error: hundreds of lines around, and after, the one that the run ends with.
"""

import asyncio
import contextlib
import gc
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from alexnet_jax.data.files import FullDiskError, full_disk_in

# How long to wait for those threads, in all, and until nothing has been heard of
# TensorStore's, which nobody can wait for: on a full disk all that they do fails at once.
WAIT_SECONDS, SILENT_SECONDS = 10.0, 0.5
_LOGGERS = "absl", "asyncio"


class Background:
    """Hears what background threads say, and keeps back what may be of a full disk.

    That is an error that tells of one, all that comes after it, and the complaint of a
    write whose event loop has been closed, which comes before, after and between.
    """

    def __init__(self) -> None:
        self._kept: list[Callable[[], object]] = []  # how each would have been said
        self._is_full = self._is_over = False
        self._heard = time.monotonic()
        self._others = set(threading.enumerate())
        self._hook = sys.unraisablehook

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is to be said now, as a filter of a logger."""
        theirs = is_of_orbax(record) or record.name == "asyncio"
        if record.levelno < logging.ERROR or not theirs or self._is_over:
            return True
        error = record.exc_info[1] if record.exc_info else None
        told = full_disk_in(record.getMessage()) or (error and full_disk_in(error))
        self._is_full = self._is_full or bool(told)
        if self._is_full:
            self._keep(lambda: logging.getLogger(record.name).handle(record))
        return not self._is_full

    def unraisable(self, args: Any) -> None:
        """The same of an exception that nobody can catch, as `sys.unraisablehook`."""
        # TensorStore's have no object.
        is_late = args.object is None and "Event loop is closed" in str(args.exc_value)
        if self._is_over or not is_late:
            self._hook(args)
        else:
            self._keep(lambda: self._hook(args))

    def _keep(self, say: Callable[[], object]) -> None:
        self._heard = time.monotonic()
        self._kept.append(say)

    def end(self) -> None:
        """Waits for the threads, and forgets what they have said."""
        until = time.monotonic() + WAIT_SECONDS
        for thread in set(threading.enumerate()) - self._others:
            if type(thread).__module__.startswith("orbax."):
                # Orbax's own join raises what the thread has raised.
                threading.Thread.join(thread, max(0.0, until - time.monotonic()))
        self._heard = time.monotonic()
        while time.monotonic() < min(until, self._heard + SILENT_SECONDS):
            time.sleep(SILENT_SECONDS / 10)
        # asyncio tells of an error that nobody has asked for, when it is freed.
        for found in gc.get_objects():
            if not issubclass(type(found), asyncio.Future):
                continue
            if found.get_loop().is_closed() and found.done() and not found.cancelled():
                found.exception()
        self._kept.clear()

    def say(self) -> None:
        """Says what was kept back, and keeps back nothing from now on."""
        self._is_over = True
        for say in self._kept:
            say()
        self._kept.clear()


def is_of_orbax(record: logging.LogRecord) -> bool:
    """Whether a line of Orbax's code has logged it: its logger is absl's, as others'."""
    return f"{os.sep}orbax{os.sep}" in record.pathname


@contextlib.contextmanager
def overheard() -> Iterator[None]:
    """A save: what its threads say of a full disk is left out if it says so itself.

    Then they have ended, too, unless they take longer than `WAIT_SECONDS`.
    """
    background = Background()
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(background)
    sys.unraisablehook = background.unraisable
    try:
        yield
    except FullDiskError:
        background.end()
        raise
    finally:
        sys.unraisablehook = background._hook
        for name in _LOGGERS:
            logging.getLogger(name).removeFilter(background)
        background.say()
