"""Atomic writes, full disks, locks between processes, and `.npz` files."""

import contextlib
import datetime
import errno
import fcntl
import os
import shlex
import shutil
import socket
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from alexnet_jax.system.cli import existing_parent


class FullDiskError(OSError):
    """There is no room to write; the message says where and how much is free."""


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
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a new file that replaces `path` once all of it is on the disk.

    It is written beside `path` under a name that no other process uses. After an
    exception it is removed and `path` is as it was. The folder is created if need be.

    Raises:
      FullDiskError: (an OSError) there is no room for it.
    """
    path = Path(path)
    process = f"{socket.gethostname()}.{os.getpid()}"  # containers share process ids
    temporary = path.with_name(f".{path.name}.{process}.tmp")
    with explain_full_disk(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def explain_full_disk(folder: Path, needed: Callable[[], int] | None = None) -> Iterator[None]:
    """Raise FullDiskError in place of any error of a full disk or a used up quota.

    Args:
      folder: where the body writes.
      needed: called when the disk is full; about how many bytes are still to be written.
    """
    try:
        yield
    except FullDiskError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # array_record, TensorStore
        for code in (errno.ENOSPC, errno.EDQUOT):
            reason = os.strerror(code)
            if code == getattr(error, "errno", None) or reason in str(error):
                raise _full_disk(folder, reason, needed and needed()) from error
        raise


def check_room(folder: Path, needed: int) -> None:
    """Raise FullDiskError unless a folder, created or not, has room for `needed` bytes."""
    if shutil.disk_usage(existing_parent(folder)).free < needed:
        raise _full_disk(folder, os.strerror(errno.ENOSPC), needed)


def _full_disk(folder: Path, reason: str, needed: int | None) -> FullDiskError:
    room = f"{_in_words(shutil.disk_usage(existing_parent(folder)).free)} free"
    if needed is not None:
        room += f", about {_in_words(needed)} more needed"
    return FullDiskError(
        f"cannot write in {folder}: {reason} ({room}). Make room there and start the "
        "same command again"
    )


def _in_words(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


@contextlib.contextmanager
def exclusive_lock(path: Path, *, wait: bool) -> Iterator[None]:
    """Hold the exclusive lock of a file, which is created; write the holder into it.

    The system frees the lock of a killed process. On a file system without locks nobody
    waits: results written under the lock must be harmless if written twice.

    Raises:
      HeldError: (an OSError) another process holds it, and `wait` is false.
    """
    # Opened to append, not truncated: the line in it may be another holder's.
    with open(path, "ab+", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.seek(0)
            holder = file.read().decode(errors="replace").strip()
            raise HeldError(path, holder or "another process") from None
        except OSError:
            pass  # a file system without locks
        line = (
            f"process {os.getpid()} on {socket.gethostname()} since "
            f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M:%S} UTC "
            f"({shlex.join(sys.orig_argv)})\n"
        )
        file.truncate(0)
        with contextlib.suppress(OSError):  # on a full disk
            file.write(line.encode(errors="replace"))
        try:
            yield
        finally:
            file.truncate(0)


@contextlib.contextmanager
def shared_lock(path: Path) -> Iterator[None]:
    """Keep everybody from `exclusive_lock(path, ...)`, beside any number of other readers.

    Waits for a holder. Does nothing if the file cannot be opened, for example because
    its folder does not exist, or on a file system without locks.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            path.touch()  # fails in a folder that only others may write to
        with contextlib.suppress(OSError):
            fcntl.flock(stack.enter_context(open(path, "rb")), fcntl.LOCK_SH)
        yield


def read_npz(
    path: str | os.PathLike[str], names: Sequence[str], error: type[ValueError]
) -> dict[str, np.ndarray]:
    """Return the named arrays that an .npz holds; never through pickle.

    Raises:
      error: if there is no such file, or it cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names if name in file}
    except FileNotFoundError as problem:
        raise error(f"{path}: there is no such file. Check the path.") from problem
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as problem:
        raise error(f"{path} is no .npz that can be read: {problem}") from problem
