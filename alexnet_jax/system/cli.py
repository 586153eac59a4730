"""Command lines: arguments, paths, progress and exit statuses. Imports no other module."""

import argparse
import contextlib
import itertools
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from absl import logging
from tqdm import tqdm

# Kinds of files that figures are written to.
FIGURES = ("png", "jpg", "svg", "pdf")


class PathError(OSError):
    """A path that cannot be used; the message says which, why and what to do."""


# Arguments.


def parser(module: str, about: str | None, *, top: int) -> argparse.ArgumentParser:
    """Return the arguments that `predict` and `retrieve` share, without the images."""
    made = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--workdir", type=path_argument, required=True, help="folder of a run, or a file of weights"
    )
    made.add_argument("--step", type=int, help="which checkpoint; else the best")
    made.add_argument("--top", type=int, default=top, help="answers per image")
    made.add_argument("--format", choices=["text", "json"], default="text")
    made.add_argument("--figure", type=figure_file, metavar="FILE.png", help="also draw them")
    return made


def path_argument(text: str) -> Path:
    """Return a path with `~` expanded, for argparse."""
    try:
        return expanded(text)
    except PathError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def figure_file(text: str) -> Path:
    """Return the path of a figure, which ends in one of `FIGURES`; for argparse."""
    path = path_argument(text)
    if path.suffix.removeprefix(".").lower() not in FIGURES:
        raise argparse.ArgumentTypeError(f"{text} must end in one of .{', .'.join(FIGURES)}")
    return path


# Paths.


def expanded(path: str | os.PathLike[str]) -> Path:
    """Return a path with `~` and `~NAME` replaced by the home of that user.

    Raises:
      PathError: (an OSError) there is no such home.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise PathError(
            f"{path}: there is no home {Path(path).parts[0]} here. Write the whole path"
        ) from error


def existing_parent(path: Path) -> Path:
    """Return `path`, or the nearest folder above it that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def free_name(path: Path) -> Path:
    """Return the path, with a number behind it if it exists already."""
    names = (path.with_name(f"{path.name}_{number}") for number in itertools.count(2))
    return next(p for p in itertools.chain([path], names) if not os.path.lexists(p))


def require_writable_file(path: Path) -> None:
    """Raise PathError unless a file can be written; its folder need not exist."""
    if path.exists() and not path.is_file():
        raise PathError(f"cannot write {path}: it is not a file. Name another path")
    require_writable(path.parent)


def require_writable(folder: Path) -> None:
    """Raise PathError unless files can be written in a folder, or it can be made."""
    existing = existing_parent(folder.absolute())
    if not existing.is_dir():
        reason = f"{existing} is a file, where a folder has to be"
    elif not os.access(existing, os.W_OK | os.X_OK):
        reason = f"no permission for {existing}, or its file system is read-only"
    else:
        return
    raise PathError(f"cannot write to {folder}: {reason}. Name a place that can be written to")


# Output.


def progress_bar(stream: TextIO, **options: Any) -> Any:
    """Return a tqdm bar for a terminal, removed when closed; `options` are tqdm's."""
    # Some terminals (containers, recorders) report 0 columns, and tqdm would draw none.
    has_width = os.get_terminal_size(stream.fileno()).columns > 0
    width: dict[str, Any] = {"dynamic_ncols": True} if has_width else {"ncols": 80, "nrows": 24}
    return tqdm(file=stream, leave=False, **width, **options)


@contextlib.contextmanager
def progress(
    what: str, total: int | None, unit: str, *, every_seconds: float = 60.0
) -> Iterator[Callable[[int], object]]:
    """Show a progress bar on a terminal, in a log file one line per minute.

    Yields a function to call with the number of units done since its last call.
    """
    options: dict[str, Any] = {"desc": what, "total": total, "unit": f" {unit}"}
    if sys.stderr.isatty():
        bar = progress_bar(sys.stderr, unit_scale=True, **options)
    else:
        bar = tqdm(
            bar_format="{desc}: {n_fmt}/{total_fmt}{unit}, {rate_fmt}, {remaining} left\n",
            mininterval=every_seconds,
            delay=every_seconds,  # short work prints nothing
            miniters=1,
            smoothing=1.0,  # the rate since the line before
            **options,
        )
    with bar:
        yield bar.update


def exit_status(command: Callable[[], bool], *user_errors: type[Exception]) -> int:
    """Run a command that returns True if all went well; return its exit status.

    OSError, ValueError and `user_errors` become one line on standard error, and status 1.
    """
    logging.set_verbosity(logging.WARNING)
    warnings.filterwarnings("ignore", module="PIL")  # an error says all that matters
    try:
        return 0 if command() else 1
    except BrokenPipeError:  # the reader, for example `head`, has seen enough
        raise
    except (OSError, ValueError, *user_errors) as error:
        print(f"error: {error}", file=sys.stderr)
    return 1
