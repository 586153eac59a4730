"""Asked to stop: what Ctrl-C, SIGTERM and SIGUSR1 do.

SIGUSR1 is what SLURM is told to send before a job's time is up. A command answers with
one line and ends (`answering`); a run in progress, in a command or in a notebook, ends
where it loses nothing (`asking`). The exit status is the one that a shell shows after
such a signal: 130, 143 or 138.
"""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType

# Windows has no SIGUSR1.
SIGNALS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1")
    if hasattr(signal, name)
]


class Interrupted(KeyboardInterrupt):
    """A command was asked to stop while it had nothing to save.

    Attributes:
      status: its exit status.
    """

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


@dataclass
class Stop:
    """Whether a run was asked to end, and by which signal: the first one."""

    signal: int | None = None


@contextlib.contextmanager
def answering() -> Iterator[None]:
    """Within, a signal gives one line, and `Interrupted` in the main thread.

    A second Ctrl-C ends the process at once, whatever it is doing, with one line and
    status 130. Signals reach the main thread alone; in another one, and within
    another `answering`, nothing is changed.
    """
    global _listener
    if _listener is not None or not _in_main_thread():
        yield
        return
    listener = _Listener()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if not listener.answered:  # else it is on its way out already
            listener.answered = True
            raise Interrupted(number)

    _listener = listener
    try:
        with _handled_by(interrupt), listener.listening():
            yield
    finally:
        _listener = None


@contextlib.contextmanager
def asking() -> Iterator[Stop]:
    """Within, signals only ask, and say so; a second Ctrl-C ends at once.

    In a command it ends the process, elsewhere by a KeyboardInterrupt.
    """
    stop = Stop()
    if not _in_main_thread():
        yield stop
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.signal is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        stop.signal = number
        if _listener is None:
            _say(_asked(number))
        else:
            _listener.answered = True

    with _handled_by(ask), _listener_says(_asked):
        yield stop


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Within, the first signal already ends a command, whatever it is doing.

    For a wait in which Python's handlers do not run and nothing is half-written.
    """
    with _listener_says(_ended, then_exit=True):
        yield


# What is said. Not by print: a handler may run within another print.


def _ended(number: int) -> str:
    return f"stopped by {signal.Signals(number).name}; start the same command again"


def _asked(number: int) -> str:
    again = "a second" if number == signal.SIGINT else "a"
    return (
        f"{signal.Signals(number).name}: stopping after this step, or this batch of an "
        f"evaluation, with a checkpoint; {again} Ctrl-C ends at once"
    )


def _say(line: str) -> None:
    # On a terminal there may be a progress bar, and "^C" behind it.
    start = "\n" if os.isatty(2) else ""
    with contextlib.suppress(OSError):  # nobody reads it
        os.write(2, f"{start}{line}\n".encode())


# How signals are heard.

_MARK = b"\0"  # among the numbers of signals


class _Listener:
    """Hears signals also when Python's handlers cannot run.

    They wait until the main thread comes back to Python: from a compilation, or from
    devices that wait for those of another process, which may be gone. So the line is
    said, and a second Ctrl-C answered, by a thread, to which the interpreter writes
    the number of each signal as soon as it comes.

    Attributes:
      answered: whether a handler has dealt with a signal.
    """

    def __init__(self) -> None:
        self.answered = False
        self.words: Callable[[int], str] = _ended
        self.then_exit = False
        self._reading, self._writing = socket.socketpair()
        self._writing.setblocking(False)  # as `set_wakeup_fd` wants it
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._caught_up = threading.Event()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        self._thread.start()
        descriptor = self._writing.fileno()
        before = signal.set_wakeup_fd(descriptor, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            self._writing.close()
            self._thread.join()  # what it has heard is said
            self._reading.close()

    def catch_up(self) -> None:
        """Returns when all signals until now are dealt with, if it listens."""
        if self._thread.is_alive():
            self._caught_up.clear()
            self._writing.send(_MARK)
            self._caught_up.wait()

    def _listen(self) -> None:
        heard = False
        while number := self._reading.recv(1):
            if number == _MARK:
                self._caught_up.set()
            elif number[0] in SIGNALS:
                self._answer(number[0], again=heard)
                heard = True

    def _answer(self, number: int, *, again: bool) -> None:
        if not again:
            _say(self.words(number))
            if self.then_exit:
                os._exit(128 + number)
        elif number == signal.SIGINT:
            _say("ended at once; start the same command again")
            os._exit(128 + number)


_listener: _Listener | None = None  # of this process, which has one set of handlers


@contextlib.contextmanager
def _listener_says(
    words: Callable[[int], str], *, then_exit: bool = False
) -> Iterator[None]:
    listener = _listener
    if listener is None:
        yield
        return
    before = listener.words, listener.then_exit
    listener.words, listener.then_exit = words, then_exit
    try:
        yield
    finally:
        listener.catch_up()  # in these words
        listener.words, listener.then_exit = before


@contextlib.contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
