"""Files that are written whole or not at all, and arrays that are read from them."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` once all of it is on the disk.

    It is written beside it, under a name that no other process has; after an exception
    nothing is left of it, and `path` is as it was. The folder is made if need be.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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
    """Those of the arrays that are in an .npz; never through pickle.

    Raises:
      error: if there is no such file, or it cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names if name in file}
    except FileNotFoundError as problem:
        raise error(f"{path}: there is no such file.") from problem
    except Exception as problem:  # zipfile's, zlib's and NumPy's own are many
        raise error(f"{path} is no .npz that can be read: {problem}") from problem
