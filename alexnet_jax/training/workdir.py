"""Files of a workdir: config, statistics, class names, and the lock of its run."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from alexnet_jax.data.statistics import Statistics
from alexnet_jax.system.cli import expanded, require_writable
from alexnet_jax.system.files import HeldError, atomic_write, exclusive_lock
from alexnet_jax.training.config import Config, ConfigError, as_json, flat, get_config

CONFIG_FILE = "config.json"
STATISTICS_FILE = "statistics.npz"
CLASSES_FILE = "classes.json"
CHECKPOINTS = "checkpoints"
# Held while a run trains; names its process.
LOCK_FILE = ".lock"


def checked_folder(workdir: str | os.PathLike[str]) -> Path:
    """Return the absolute workdir; raise ConfigError or OSError if it cannot be one."""
    if "://" in os.fspath(workdir):
        raise ConfigError(f"--workdir={workdir} must be a local or mounted folder.")
    if "," in os.fspath(workdir):
        raise ConfigError(
            f"--workdir={workdir} has a comma, which separates runs in --mode=eval and in "
            "the report. Name a folder without a comma."
        )
    path = expanded(workdir).absolute()
    if path.is_file():
        raise ConfigError(f"--workdir={workdir} is a file; name a folder, or none yet.")
    require_writable(path)
    return path


@contextlib.contextmanager
def alone_in(workdir: Path) -> Iterator[None]:
    """Hold the lock of a workdir; process 0 does so for all processes of the run.

    Raises:
      ConfigError: another run holds it; names that run.
    """
    holder = ""
    with contextlib.ExitStack() as held:
        try:
            if jax.process_index() == 0:
                held.enter_context(exclusive_lock(workdir / LOCK_FILE, wait=False))
        except HeldError as error:
            holder = error.holder
        if multihost_utils.broadcast_one_to_all(np.int32(bool(holder))):
            raise ConfigError(
                f"{workdir} is in use by {holder or 'another run, see process 0'}. Wait "
                "for that run, end it, or take another --workdir."
            )
        yield


def require_run(workdir: Path) -> None:
    """Raise FileNotFoundError unless a folder is the workdir of a run."""
    if not (workdir / CONFIG_FILE).exists():
        raise FileNotFoundError(
            f"{workdir} is not the workdir of a run: it has no {CONFIG_FILE}. Give the "
            "folder that was given as --workdir, or a file of weights."
        )


def from_stored(stored: dict[str, Any], changes: Mapping[str, Any] | None = None) -> Config:
    """Return a config that was stored as JSON, perhaps by an older version.

    Missing fields take their default; unknown fields are ignored. `changes` replace stored
    fields by their name "GROUP.FIELD".
    """
    config = get_config()
    known = flat(config.to_dict())
    fields = flat(stored) | dict(changes or {})
    config.update_from_flattened_dict(
        {name: _as_tuples(value) for name, value in fields.items() if name in known}
    )
    return config


def _as_tuples(value: Any) -> Any:
    """Turn lists back into tuples, which JSON does not know."""
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def read_config(workdir: Path) -> Any:
    """Return the tree of config.json in a workdir; None: there is none."""
    return _read_json(workdir / CONFIG_FILE)


def write_config(workdir: Path, config: Config) -> None:
    """Write config.json into a workdir, atomically."""
    _write_json(workdir / CONFIG_FILE, as_json(config))


def read_class_names(workdir: Path) -> list[str] | None:
    """Return the names by label that a workdir was trained with; None: unknown."""
    return _read_json(workdir / CLASSES_FILE)


def write_class_names(workdir: Path, names: Sequence[str]) -> None:
    """Write classes.json, the names by label, into a workdir, atomically."""
    _write_json(workdir / CLASSES_FILE, list(names))


def about_mean(workdir: Path, statistics: Statistics, config: Any) -> str:
    """Return a line with the file of a run's mean image and its number of images."""
    tuned = config.get("finetune", {}).get("source")
    images = "the weights" if tuned else statistics.extent
    return f"mean image: {workdir / STATISTICS_FILE}, of {images}"


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes()) if path.exists() else None
    except ValueError as error:
        raise ConfigError(
            f"{path} is damaged: {error}. Copy it from where the run was trained."
        ) from error


def _write_json(path: Path, value: Any) -> None:
    with atomic_write(path) as file:
        file.write(f"{json.dumps(value, indent=2)}\n".encode())
