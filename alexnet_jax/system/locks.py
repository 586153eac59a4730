"""File locks: one writing process at a time, or any number of readers."""

import contextlib
import datetime
import fcntl
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from pathlib import Path


class HeldError(OSError):
    """Another process holds a lock.

    Attributes:
      holder: "process 12 on HOST since 2026-01-31 12:00:00 UTC (python -m ...)", or
        "another process" if the file does not say.
    """

    def __init__(self, path: Path, holder: str):
        super().__init__(f"{path} is held by {holder}")
        self.holder = holder


@contextlib.contextmanager
def held(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold the lock of a file, which is created, and write the holder into it.

    The system frees the lock of a killed process. On a file system without locks nobody
    waits: what is written under the lock must be harmless if written twice.

    Yields:
      Whether the lock is held; False on a file system without locks.

    Raises:
      HeldError: (an OSError) another process holds it, and `wait` is false.
    """
    # Not truncated: the line in it may be another holder's.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            is_held = True
        except BlockingIOError:
            holder = os.pread(descriptor, 65_536, 0).decode(errors="replace").strip()
            raise HeldError(path, holder or "another process") from None
        except OSError:
            is_held = False
        now = datetime.datetime.now(datetime.UTC)
        line = (
            f"process {os.getpid()} on {socket.gethostname()} since "
            f"{now:%Y-%m-%d %H:%M:%S} UTC ({shlex.join(sys.orig_argv)})\n"
        )
        with contextlib.suppress(OSError):  # on a full disk
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, line.encode(errors="replace"), 0)
        try:
            yield is_held
        finally:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def shared(path: Path) -> Iterator[None]:
    """Keep everybody from `held(path, ...)`, beside any number of other readers.

    Waits for a holder. Does nothing if the file cannot be opened, for example because
    its folder does not exist, or on a file system without locks.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            try:
                descriptor = os.open(
                    path, os.O_RDONLY | os.O_CLOEXEC | os.O_CREAT, 0o666
                )
            except OSError:  # in a folder that only others may write to
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
