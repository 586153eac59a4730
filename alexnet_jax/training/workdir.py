"""Files of a workdir: config, statistics, class names."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alexnet_jax.data import statistics as statistics_lib
from alexnet_jax.data.statistics import Statistics
from alexnet_jax.system.files import atomic_write
from alexnet_jax.training.config import Config, ConfigError, as_json, flat, get_config

CONFIG_FILE = "config.json"
STATISTICS_FILE = "statistics.npz"
CLASSES_FILE = "classes.json"
CHECKPOINTS = "checkpoints"


def require_run(workdir: Path) -> None:
    """Raise FileNotFoundError unless a folder is the workdir of a run."""
    if not (workdir / CONFIG_FILE).exists():
        raise FileNotFoundError(
            f"{workdir} is not the workdir of a run: it has no {CONFIG_FILE}. Give the "
            "folder that was given as --workdir, or a file of weights."
        )


def from_stored(stored: dict[str, Any], changes: Mapping[str, Any] | None = None) -> Config:
    """Return a config that was stored as JSON, perhaps by an older version.

    Missing fields take their default; unknown fields are ignored.

    Args:
      stored: the tree of fields.
      changes: "GROUP.FIELD" -> value that replaces the stored one.
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


def read_config(workdir: Path) -> dict[str, Any] | None:
    """Return the config.json of a workdir; None: there is none."""
    return _read_json(workdir / CONFIG_FILE)


def write_config(workdir: Path, config: Config) -> None:
    """Write the config.json of a workdir atomically."""
    _write_json(workdir / CONFIG_FILE, as_json(config))


def read_statistics(workdir: Path, image_size: int | None = None) -> Statistics:
    """Return the statistics that a workdir was trained with.

    Args:
      image_size: expected side of the images; None: any.

    Raises:
      FileNotFoundError, DataError: the file is missing, damaged, or of another size.
    """
    path = workdir / STATISTICS_FILE
    try:
        return statistics_lib.load(path, image_size)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path} is missing: the mean image that the network of this run is given "
            "its pictures without. Copy it from where the run was trained."
        ) from error


def about_mean(workdir: Path, statistics: Statistics, config: Any) -> str:
    """Return a line with the file of a run's mean image and its number of images."""
    tuned = config.get("finetune", {}).get("source")
    images = "the weights" if tuned else statistics.extent
    return f"mean image: {workdir / STATISTICS_FILE}, of {images}"


def read_class_names(workdir: Path) -> list[str] | None:
    """Return the names by label that a workdir was trained with; None: unknown."""
    return _read_json(workdir / CLASSES_FILE)


def write_class_names(workdir: Path, names: Sequence[str]) -> None:
    """Write the names by label into a workdir, atomically."""
    _write_json(workdir / CLASSES_FILE, list(names))


def _read_json(path: Path) -> Any:
    """Return the content of a JSON file of a workdir; None: there is no such file.

    Raises:
      ConfigError: the file is damaged.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ConfigError(
            f"{path} is damaged: {error}. Copy it from where the run was trained."
        ) from error


def _write_json(path: Path, value: Any) -> None:
    with atomic_write(path) as file:
        file.write(f"{json.dumps(value, indent=2)}\n".encode())
