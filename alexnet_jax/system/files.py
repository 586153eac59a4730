"""Files that are written completely or not at all, full disks, and `.npz` files."""

import contextlib
import errno
import os
import shutil
import socket
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from alexnet_jax.system.cli import existing_parent


class FullDiskError(OSError):
    """There is no room to write; the message says where and how much is free."""


@contextlib.contextmanager
def telling_of_a_full_disk(
    folder: Path, needed: Callable[[], int] | None = None
) -> Iterator[None]:
    """Turn the errors of a full disk into one that says where, for writes to `folder`.

    Args:
      needed: called when the disk is full; about how many bytes are still to be written.

    Raises:
      FullDiskError: (an OSError) instead of the OSError of a full disk or a used up
        quota, array_record's RuntimeError and TensorStore's ValueError.
    """
    try:
        yield
    except FullDiskError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        for code in (errno.ENOSPC, errno.EDQUOT):
            reason = os.strerror(code)
            if code == getattr(error, "errno", None) or reason in str(error):
                missing = None if needed is None else needed()
                raise _full_disk(folder, reason, missing) from error
        raise


def check_room(folder: Path, needed: int) -> None:
    """Raise FullDiskError unless a folder, created or not, has room for `needed` bytes."""
    if _free(folder) < needed:
        raise _full_disk(folder, os.strerror(errno.ENOSPC), needed)


def _full_disk(folder: Path, reason: str, needed: int | None) -> FullDiskError:
    room = f"{_in_words(_free(folder))} free"
    if needed is not None:
        room += f", about {_in_words(needed)} more needed"
    return FullDiskError(
        f"cannot write in {folder}: {reason} ({room}). Make room there and start the "
        "same command again"
    )


def _free(folder: Path) -> int:
    return shutil.disk_usage(existing_parent(folder)).free


def _in_words(count: int) -> str:
    """Return bytes as MB or GB, for example 12.3 MB."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a new file that replaces `path` once all of it is on the disk.

    It is written beside `path` under a name that no other process uses. After an
    exception nothing is left of it and `path` is as it was. The folder is created if
    need be.

    Raises:
      FullDiskError: (an OSError) there is no room for it.
    """
    path = Path(path)
    process = f"{socket.gethostname()}.{os.getpid()}"  # containers share process ids
    temporary = path.with_name(f".{path.name}.{process}.tmp")
    with telling_of_a_full_disk(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def read_npz(
    path: str | os.PathLike[str], names: Sequence[str], error: type[ValueError]
) -> dict[str, np.ndarray]:
    """Return those of the arrays that are in an .npz; never through pickle.

    Raises:
      error: if there is no such file, or it cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names if name in file}
    except FileNotFoundError as problem:
        raise error(f"{path}: there is no such file.") from problem
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as problem:
        raise error(f"{path} is no .npz that can be read: {problem}") from problem
