"""Paths as users give them, and places to write to that are checked before long work."""

import argparse
import itertools
import os
from pathlib import Path


class PathError(OSError):
    """A path that cannot be used; the message says which, why and what to do."""


def expanded(path: str | os.PathLike[str]) -> Path:
    """Return a path in which `~` and `~NAME` are the home of that user.

    Raises:
      PathError: (an OSError) there is no such home.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise PathError(
            f"{path}: there is no home {Path(path).parts[0]} here. Write the whole path"
        ) from error


def path_argument(text: str) -> Path:
    """Return a path of the command line, as `expanded`; a type for argparse.

    Raises:
      ArgumentTypeError: there is no such home.
    """
    try:
        return expanded(text)
    except PathError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def existing_parent(path: Path) -> Path:
    """Return `path`, or the nearest folder above it that is there."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def free_name(path: Path) -> Path:
    """Return the path, with a number behind it if there is such a thing already."""
    names = (path.with_name(f"{path.name}_{number}") for number in itertools.count(2))
    return next(p for p in itertools.chain([path], names) if not os.path.lexists(p))


def require_writable(folder: Path) -> None:
    """Raise PathError unless a folder can be written to, or made; before long work."""
    _require_writable(folder, f"to {folder}")


def require_writable_file(path: Path) -> None:
    """Raise PathError unless a file can be written; its folder may not be there yet."""
    if path.exists() and not path.is_file():
        raise PathError(f"cannot write {path}: it is no file. Name another place")
    _require_writable(path.parent, str(path))


def _require_writable(folder: Path, what: str) -> None:
    existing = existing_parent(folder.absolute())
    if not existing.is_dir():
        reason = f"{existing} is a file, where a folder has to be"
    elif not os.access(existing, os.W_OK | os.X_OK):
        reason = f"no permission for {existing}, or its file system is read-only"
    else:
        return
    raise PathError(
        f"cannot write {what}: {reason}. Name a place that can be written to"
    )
