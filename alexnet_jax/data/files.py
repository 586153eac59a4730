"""Files that are written whole or not at all, and what is read from them."""

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

from alexnet_jax.cli import existing_parent


class FullDiskError(OSError):
    """There is no room to write; the message says where, and how much is free."""


@contextlib.contextmanager
def telling_of_a_full_disk(
    folder: Path, needed: Callable[[], int] | None = None
) -> Iterator[None]:
    """What is written here goes into `folder`; of a full disk one message tells.

    Args:
      needed: about how many bytes are still to be written, asked when it is full.

    Raises:
      FullDiskError: (an OSError) instead of the OSError of a full disk or a used up
        quota, and of what array_record (a RuntimeError) and TensorStore (a ValueError)
        make of it.
    """
    try:
        yield
    except FullDiskError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        reason = full_disk_in(error)
        if not reason:
            raise
        room = f"{_in_words(shutil.disk_usage(existing_parent(folder)).free)} free"
        if needed is not None:
            room += f", about {_in_words(needed())} more needed"
        raise FullDiskError(
            f"cannot write in {folder}: {reason} ({room}). Make room there and start "
            "the same command again"
        ) from error


def full_disk_in(error: BaseException | str) -> str:
    """How an error, or its text, tells of a full disk or quota; "" if it does not."""
    for code in (errno.ENOSPC, errno.EDQUOT):
        if code == getattr(error, "errno", 0) or os.strerror(code) in str(error):
            return os.strerror(code)
    return ""


def check_room(folder: Path, needed: int) -> None:
    """Raises FullDiskError unless a folder, made or not, has room for so many bytes."""
    free = shutil.disk_usage(existing_parent(folder)).free
    if free < needed:
        raise FullDiskError(
            f"{folder} has {_in_words(free)} free; about {_in_words(needed)} are "
            "needed. Make room there, or take another folder"
        )


def _in_words(count: int) -> str:
    """Such as 12.3 MB."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` once all of it is on the disk.

    It is written beside it, under a name that no other process has; after an exception
    nothing is left of it, and `path` is as it was. The folder is made if need be.

    Raises:
      FullDiskError: (an OSError) there is no room for it.
      OSError: with the name `path`, if it cannot be written.
    """
    path = Path(path)
    process = f"{socket.gethostname()}.{os.getpid()}"  # in containers all have the same
    temporary = path.with_name(f".{path.name}.{process}.tmp")
    with telling_of_a_full_disk(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.unlink(missing_ok=True)  # it may be a link to another's file
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            if error.filename != os.fspath(temporary):
                raise
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        finally:
            with contextlib.suppress(OSError):  # on a disk that is read-only
                temporary.unlink(missing_ok=True)


def read_npz(
    path: str | os.PathLike[str], names: Sequence[str], error: type[ValueError]
) -> dict[str, np.ndarray]:
    """Those of the arrays that are in an .npz; never through pickle.

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
