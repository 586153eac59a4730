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
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

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
    """Whether a run was asked to end, and by which signal: the first one.

    `ending`: it ends by itself now, once a last checkpoint is written; the run says so,
    and a signal changes nothing.
    """

    signal: int | None = None
    ending: bool = False


def run(command: Callable[[], int]) -> NoReturn:
    """Runs a command, `answering`, and ends the process with the status it returns.

    The status is 1 if nobody reads the output any more, as after `| head`.
    """
    try:
        with answering():
            status = command()
            sys.stdout.flush()
    except Interrupted as stopped:
        end(stopped.status)
    except BrokenPipeError:
        status = discard_output()
    sys.exit(status)


def discard_output() -> int:
    """Send further output nowhere, as nobody reads it; return exit status 1."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def end(status: int) -> NoReturn:
    """Ends the process without the interpreter's own end.

    It would take modules apart under threads that an interrupted command has left in
    the middle of their work, and can crash.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(status)


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
        with _handled_by(interrupt), listener.listening(), _not_dropped(listener):
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

    def words(number: int) -> str:
        return _asked(number, stop.ending)

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.signal is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        stop.signal = number
        if _listener is None:
            _say(words(number))
        else:
            _listener.answered = True

    with _handled_by(ask), _listener_says(words):
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


def _asked(number: int, ending: bool) -> str:
    again = "a second" if number == signal.SIGINT else "a"
    what = "stopping after this step, or this batch of an evaluation, with a checkpoint"
    if ending:
        what = "the run is at its end, and writes its last checkpoint"
    return f"{signal.Signals(number).name}: {what}; {again} Ctrl-C ends at once"


def _say(line: str) -> None:
    # On a terminal there may be a progress bar, and "^C" behind it.
    start = "\n" if os.isatty(2) else ""
    with contextlib.suppress(OSError):  # nobody reads it
        os.write(2, f"{start}{line}\n".encode())


# How signals are heard.

# Among the numbers of signals.
_MARK, _AGAIN = b"\0", b"\xff"
# A callback, of jax in the garbage collector, has ended after so long.
_AGAIN_SECONDS = 0.01


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
        self._main_thread = threading.get_ident()
        self._first = 0  # the signal that was answered first
        self._own = 0  # signals on their way that this listener has sent

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

    def interrupt_again(self) -> None:
        """Soon, the first signal's handler."""
        self._writing.send(_AGAIN)

    def _listen(self) -> None:
        while number := self._reading.recv(1):
            if number == _MARK:
                self._caught_up.set()
            elif number == _AGAIN:
                time.sleep(_AGAIN_SECONDS)
                self._own += 1
                self.answered = False
                signal.pthread_kill(self._main_thread, self._first)
            elif number[0] in SIGNALS and self._own:
                self._own -= 1
            elif number[0] in SIGNALS:
                self._answer(number[0])

    def _answer(self, number: int) -> None:
        if not self._first:
            self._first = number
            _say(self.words(number))
            if self.then_exit:
                os._exit(128 + number)
        elif number == signal.SIGINT:
            _say("ended at once; start the same command again")
            os._exit(128 + number)


_listener: _Listener | None = None  # of this process, which has one set of handlers


@contextlib.contextmanager
def _not_dropped(listener: _Listener) -> Iterator[None]:
    """An `Interrupted` from where Python drops exceptions is raised once more.

    That is in destructors and in callbacks of the garbage collector. jax has one of
    these, and a signal that comes in the middle of work often meets it.
    """
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if issubclass(unraisable.exc_type, Interrupted):
            listener.interrupt_again()
        else:
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


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
