"""One process at a time, and who it is."""

import contextlib
import datetime
import json
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from pathlib import Path


class HeldError(OSError):
    """Another process holds a lock.

    Attributes:
      holder: who, in words: "process 12 on HOST since 2026-01-31 12:00:00 UTC (python
        -m alexnet_jax.main ...)"; "another process" where the file does not say.
    """

    def __init__(self, path: Path, holder: str):
        super().__init__(f"{path} is held by {holder}")
        self.holder = holder


@contextlib.contextmanager
def held(path: Path, *, wait: bool) -> Iterator[bool]:
    """Holds the lock of a file, which is made, and says in it who does.

    A killed holder lets go. Where there are no locks (Windows, some network file
    systems) nobody waits: what is written under it must be harmless when written twice.

    Yields:
      Whether it is held, so that nobody else is here: False where there are no locks.

    Raises:
      HeldError: (an OSError) another process holds it, and `wait` is false.
      OSError: it cannot be opened.
    """
    try:
        import fcntl
    except ImportError:
        yield False
        return
    # Not truncated: the line in it may be the holder's.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    is_held = True
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise HeldError(path, _read_holder(descriptor)) from None
        except OSError:
            is_held = False
        _write(descriptor, _this_process())
        try:
            yield is_held
        finally:
            _write(descriptor, b"")
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def shared(path: Path) -> Iterator[None]:
    """While any number of processes are in here, nobody gets `held(path, ...)`.

    Waits for a holder. Where the file cannot be opened (it is not there, in a folder
    that only others may write to) or there are no locks, it does nothing.
    """
    try:
        import fcntl

        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_CREAT, 0o666)
        except OSError:  # in a folder that only others may write to
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (ImportError, OSError):
        yield
        return
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def _this_process() -> bytes:
    now = datetime.datetime.now(datetime.UTC)
    line = json.dumps(
        {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": f"{now:%Y-%m-%d %H:%M:%S} UTC",
            "command": shlex.join(sys.orig_argv),
        }
    )
    return line.encode() + b"\n"


def _write(descriptor: int, line: bytes) -> None:
    # The lock holds on a full disk too; then it does not say whose it is.
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, line, 0)


def _read_holder(descriptor: int) -> str:
    try:
        found = json.loads(os.pread(descriptor, 65_536, 0))
        return "process {pid} on {host} since {since} ({command})".format(**found)
    except (OSError, ValueError, TypeError, KeyError):
        # It has only just got it, or the file was left by something else.
        return "another process"
