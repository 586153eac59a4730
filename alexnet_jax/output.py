"""Standard output that nobody reads any more, or that goes to a full disk.

A run goes on without it (`dropped`): its records are in its workdir. Other commands end
(`required`): quietly where the reader has seen enough, as `| head` has.
"""

import contextlib
import errno
import io
import os
import select
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn, TextIO


class OutputError(Exception):
    """Standard output cannot be written: why, in words; "" if nobody reads it.

    No OSError, which is taken for a mistake with some file.
    """


@contextlib.contextmanager
def dropped() -> Iterator[None]:
    """Within, lines that cannot be printed are left out; standard error says so once."""

    def say(error: OSError) -> None:
        print(
            f"standard output cannot be written ({error.strerror}): the run goes on "
            "without; its records are in the workdir",
            file=sys.stderr,
        )

    with _standard_streams(say):
        yield


@contextlib.contextmanager
def required() -> Iterator[None]:
    """Within, a command ends with status 1 when nothing can be printed any more.

    By an OutputError: at the latest in the end, as what is printed waits in a buffer.
    """

    def end(error: OSError) -> NoReturn:
        closed = error.errno == errno.EPIPE
        words = f"error: standard output cannot be written: {error.strerror}"
        raise OutputError("" if closed else words) from error

    try:
        with _standard_streams(end):
            yield
    except OutputError as error:
        if str(error):
            print(error, file=sys.stderr)
        sys.exit(1)


class _Stream(io.FileIO):
    """A standard stream; `failed` is told of the first error, and later ones are none."""

    def __init__(self, descriptor: int, failed: Callable[[OSError], None]):
        super().__init__(descriptor, "w", closefd=False)
        self._failed = failed

    def write(self, data) -> int:  # a buffer, as FileIO has it
        try:
            # None: whoever shares the terminal has made it one that is not waited for.
            while (count := super().write(data)) is None:
                select.select([], [self], [])
            return count
        except OSError as error:
            # Also for what waits in buffers, and for what does not print through here.
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self.fileno())
            os.close(nothing)
            self._failed(error)
            return len(data)


@contextlib.contextmanager
def _standard_streams(failed: Callable[[OSError], None]) -> Iterator[None]:
    """Within, errors of standard output go to `failed`, and those of standard error to nobody.

    Streams that are not the process's own, as in a notebook, stay as they are.
    """
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w") as nothing:  # for one that was closed from the start
        sys.stdout = _watched(before[0] or nothing, failed)
        sys.stderr = _watched(before[1] or nothing, lambda error: None)
        try:
            yield
            sys.stdout.flush()
        except SystemExit:
            sys.stdout.flush()
            raise
        finally:
            with contextlib.suppress(OutputError):
                sys.stdout.flush()
            sys.stderr.flush()
            sys.stdout, sys.stderr = before


def _watched(stream: TextIO, failed: Callable[[OSError], None]) -> TextIO:
    """The same stream, with `failed` for its errors."""
    if type(stream) is not io.TextIOWrapper:
        return stream
    unbuffered = isinstance(stream.buffer, io.FileIO)  # python -u
    raw = stream.buffer if unbuffered else getattr(stream.buffer, "raw", None)
    if not isinstance(raw, io.FileIO):
        return stream
    own = _Stream(raw.fileno(), failed)
    with contextlib.suppress(OSError):
        stream.flush()
    return io.TextIOWrapper(
        own if unbuffered else io.BufferedWriter(own),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
