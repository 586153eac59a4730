"""Graceful shutdown on SIGINT, SIGTERM and SIGUSR1.

A training run finishes its step, writes a checkpoint and exits (`stop_requests`). Any
other command exits at once with one line (`run`). The exit status is 128 + the signal's
number: 130, 143 or 138. SLURM sends SIGUSR1 before a job's time limit.

Python runs handlers between its own instructions, so after a compilation.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interrupted(KeyboardInterrupt):
    """A signal ended a command; `status` is its exit status."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


@dataclass
class Stop:
    """The first signal that asked a run to stop; 0: no signal yet."""

    signal: int = 0


@contextlib.contextmanager
def stop_requests() -> Iterator[Stop]:
    """Let the first signal set `Stop.signal`.

    A second Ctrl-C kills a command; in a notebook it raises KeyboardInterrupt.
    """
    stop = Stop()
    # A notebook has Python's own handler; a background process of a shell ignores SIGINT.
    outside = signal.getsignal(signal.SIGINT) in (signal.default_int_handler, signal.SIG_IGN)

    def request(number: int) -> None:
        if not stop.signal:
            stop.signal = number
            again = "a second" if number == signal.SIGINT else "a"
            _say(
                f"{signal.Signals(number).name}: stopping after this step, or this batch of an "
                f"evaluation, with a checkpoint; {again} Ctrl-C ends at once"
            )

    with _handled_by(request, signal.default_int_handler if outside else signal.SIG_DFL):
        yield stop


@contextlib.contextmanager
def interrupts() -> Iterator[None]:
    """Print one line on a signal and raise `Interrupted`; a second Ctrl-C kills."""

    def interrupt(number: int) -> None:
        _say(f"stopped by {signal.Signals(number).name}; start the same command again")
        raise Interrupted(number)

    with _handled_by(interrupt, signal.SIG_DFL):
        yield


def run(command: Callable[[], int]) -> NoReturn:
    """Run a command within `interrupts` and exit with the status that it returns.

    The status is 1, without a message, if the output is closed, as after `| head`.
    """
    try:
        with interrupts():
            status = command()
            sys.stdout.flush()
    except Interrupted as stopped:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        # The interpreter's shutdown can crash while other threads run.
        os._exit(stopped.status)
    except BrokenPipeError:
        status = discard_output()
    sys.exit(status)


def discard_output() -> int:
    """Send further output nowhere, as nobody reads it; return exit status 1."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


@contextlib.contextmanager
def _handled_by(react: Callable[[int], None], second_ctrl_c: Any) -> Iterator[None]:
    """Call `react` with the number of each signal; do nothing outside the main thread."""

    def handler(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, second_ctrl_c)
        react(number)

    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handler) for number in SIGNALS if is_main}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _say(line: str) -> None:
    """Write a line to standard error; the handler may run inside a print."""
    start = "\n" if os.isatty(2) else ""  # after a progress bar or "^C"
    with contextlib.suppress(OSError):
        os.write(2, f"{start}{line}\n".encode())
