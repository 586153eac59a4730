"""Paths as users give them: what they have to be, and what is wrong with one, in words."""

import argparse
import errno
import itertools
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path

# Control characters, which a terminal may obey, and bytes that are no UTF-8 as Python
# has them in names.
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


class PathError(OSError):
    """A path that cannot be used; the message says which, why and what to do."""


def expanded(path: str | os.PathLike[str]) -> Path:
    """A path in which `~` and `~NAME` are the home of that user.

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
    """A path on the command line, as `expanded`; for argparse.

    Raises:
      ArgumentTypeError: there is no such home.
    """
    try:
        return expanded(text)
    except PathError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def existing_parent(path: Path) -> Path:
    """`path`, or the nearest folder above it that is there."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def free_name(path: Path) -> Path:
    """The path, or one with a number behind it if there is such a thing already."""
    names = (path.with_name(f"{path.name}_{number}") for number in itertools.count(2))
    return next(p for p in itertools.chain([path], names) if not os.path.lexists(p))


def require_writable(folder: Path) -> None:
    """Raises PathError unless a folder can be written to, or made; before long work."""
    _require_writable(folder, f"to {folder}")


def require_writable_file(path: Path) -> None:
    """Raises PathError unless a file can be written; its folder may not be there yet."""
    if os.path.lexists(path) and not path.is_file():
        raise PathError(f"cannot write {path}: it is {_what(path)}. Name a file")
    _require_writable(path.parent, str(path))


def _require_writable(folder: Path, what: str) -> None:
    blocking, existing = _not_a_folder(folder), existing_parent(folder.absolute())
    if blocking is not None:
        reason = f"{blocking} is {_what(blocking)}, where a folder has to be"
    elif os.access(existing, os.W_OK | os.X_OK):
        return
    else:
        reason = f"no permission for {existing}, or its file system is read-only"
    raise PathError(
        f"cannot write {what}: {reason}. Name a place that can be written to"
    )


def require_places(
    folder: Path,
    files: Sequence[str],
    folders: Sequence[str],
    locks: Sequence[str] = (),
) -> None:
    """Raises PathError unless a folder is fit for what will be written into it.

    Args:
      folder: there, or to be made.
      files, folders: names in it; what is already there has to be of its kind.
      locks: names of files that may not be links either (`locks.held`).
    """
    require_writable(folder)
    for path in (folder / name for name in locks):
        if path.is_symlink():
            raise PathError(
                f"{path} is a link; a lock is never looked for elsewhere. Move it away, "
                "or name another folder"
            )
    for names, fits, kind in (
        ((*files, *locks), Path.is_file, "file"),
        (folders, Path.is_dir, "folder"),
    ):
        for path in (folder / name for name in names):
            if os.path.lexists(path) and not fits(path):
                raise PathError(
                    f"{path} is {_what(path)}; a {kind} belongs there. Move it away, or "
                    "name another folder"
                )


def require_regular(path: str | os.PathLike[str]) -> os.stat_result:
    """What the system knows of a file that is to be read to its end.

    Raises:
      ValueError: for a folder, and a pipe or device, whose end may never come.
      OSError: if there is none.
    """
    about = os.stat(path)
    if not stat.S_ISREG(about.st_mode):
        raise ValueError("it is no regular file")
    return about


def printable(text: str, *, lines: bool = False) -> str:
    """A text without what a terminal would obey: `\\x1b` in the place of an escape.

    Args:
      lines: whether it may have several; a name may not, and `\\n` is shown.
    """
    if lines:
        return "\n".join(map(printable, text.split("\n")))
    return UNPRINTABLE.sub(
        lambda found: found[0].encode("unicode_escape").decode(), text
    )


def message_of(error: BaseException) -> str:
    """What a command says of an error.

    The system's own, "[Errno 20] Not a directory: 'a/b'", is put into a sentence.
    """
    words = str(error)
    if isinstance(error, OSError) and error.strerror:
        words = _sentence(error)
    return printable(words, lines=True)


def _sentence(error: OSError) -> str:
    """Which path, why, and what to do."""
    if not isinstance(error.filename, str | bytes | os.PathLike):
        return f"the system says: {error.strerror}"
    path = Path(os.fsdecode(error.filename))
    blocking = _not_a_folder(path)
    match error.errno:
        case errno.ENOTDIR | errno.EEXIST if blocking is not None:
            name = "it" if blocking == path else blocking
            reason = f"{name} is {_what(blocking)}, where a folder has to be"
        case errno.EISDIR:
            reason = "it is a folder, where a file has to be"
        case errno.EROFS:
            reason = "its file system is read-only"
        case errno.EACCES | errno.EPERM:
            reason = "no permission"
        case _:
            reason = str(error.strerror)
    return f"cannot use {path}: {reason}. Name another path, or have this one changed"


def _not_a_folder(path: Path) -> Path | None:
    """The first part of a path that is there and no folder."""
    parts = (*reversed(path.parents), path)
    there = (part for part in parts if os.path.lexists(part))
    return next((part for part in there if not part.is_dir()), None)


def _what(path: Path) -> str:
    """What stands there, in words."""
    if path.is_symlink() and not path.exists():
        return "a link to nothing"
    if path.is_dir():
        return "a folder"
    return "a file" if path.is_file() else "no regular file"
