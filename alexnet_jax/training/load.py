"""Load what was stored: config files, the folder of a run, trained networks."""

import dataclasses
import json
import os
import runpy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from alexnet_jax.data import augment
from alexnet_jax.data import images as images_lib
from alexnet_jax.data import statistics as statistics_lib
from alexnet_jax.data.statistics import Statistics
from alexnet_jax.models import alexnet, variants
from alexnet_jax.models.weights import (
    SUFFIXES,
    Weights,
    WeightsError,
    read_weights,
)
from alexnet_jax.system.files import replacing
from alexnet_jax.training import distributed
from alexnet_jax.training.checkpoint import Checkpointer, CheckpointError, split_step
from alexnet_jax.training.config import (
    Config,
    ConfigError,
    as_json,
    flat,
    get_config,
    model_settings,
)

# The folder of a run.
CONFIG_FILE = "config.json"
STATISTICS_FILE = "statistics.npz"
CLASSES_FILE = "classes.json"
CHECKPOINTS = "checkpoints"


def load(
    path: str | os.PathLike[str],
    *,
    step: int | None = None,
    variant: str | None = None,
) -> tuple[alexnet.AlexNet, dict[str, Any], Callable[[Any], jax.Array]]:
    """Load a trained network: `model, variables, preprocess = load(PATH)`.

    Args:
      path: the workdir of a run, DIR or DIR@STEP, or a file of weights: `.safetensors`,
        `.caffemodel`, `.pth` (see `pretrained.read_weights`).
      step: which checkpoint of a run; else the one with the lowest top-1 error, and
        without any evaluation the newest.
      variant: of a file that does not say it.

    Returns:
      model: the whole network, for one device.
      variables: what `model.apply` takes.
      preprocess: a path, a Pillow picture, a uint8 array [H, W, 3], or a list of
        these (see `load_picture`) -> images [B, crop, crop, 3], the centre view minus
        the mean.

    Raises:
      FileNotFoundError: if `path` is neither a workdir nor a file.
      CheckpointError: if it holds no whole checkpoint.
      WeightsError: if it is a file that cannot be used, and why; or another variant.
      DataError, ConfigError: if the statistics or the class names are damaged.
      DeviceError: if jax has no devices.
    """
    weights = read_network(path, step=step, variant=variant)
    return weights.make_model(), weights.variables, make_preprocess(weights)


def make_preprocess(weights: Weights) -> Callable[[Any], jax.Array]:
    """Return the function `preprocess` that `load` returns."""
    size, crop_size = weights.image_size, weights.crop_size
    mean_image = jnp.broadcast_to(jnp.asarray(weights.mean), (size, size, 3))

    def preprocess(pictures: Any) -> jax.Array:
        if not isinstance(pictures, (list, tuple)):
            pictures = [pictures]
        stack = np.stack([images_lib.load_picture(p, size) for p in pictures])
        return augment.eval_images(
            jnp.asarray(stack), mean_image=mean_image, crop_size=crop_size
        )

    return preprocess


def read_network(
    path: str | os.PathLike[str],
    *,
    step: int | None = None,
    variant: str | None = None,
) -> Weights:
    """Return the settings, weights, sizes, mean and class names of a trained network.

    Arguments and errors are those of `load`.
    """
    distributed.require_devices()
    if is_weights_file(path):
        if step is not None:
            raise WeightsError(f"{path} is a file of weights; it has no step {step}.")
        weights = read_weights(path, variant=variant)
        on_device = jax.tree.map(jnp.asarray, weights.variables)
        return dataclasses.replace(weights, variables=on_device)
    folder, which = split_step(os.fspath(path))
    if step is not None and folder != os.fspath(path):
        raise CheckpointError(f"{path} says which step already; got step {step} too.")
    workdir = Path(folder).absolute()
    require_run(workdir)
    statistics = read_statistics(workdir)
    with Checkpointer(workdir / CHECKPOINTS, read_only=True) as checkpointer:
        chosen = checkpointer.find(which if step is None else step)
        variables, metadata = checkpointer.restore_params(step=chosen)
    config = from_stored(metadata["config"])
    if variant not in (None, config.model.variant):
        raise WeightsError(
            f"{path} holds a network of variant {config.model.variant}; got "
            f"variant={variant!r}."
        )
    side = config.data.image_size
    statistics_lib.require_size(
        statistics,
        side,
        workdir / STATISTICS_FILE,
        remedy=statistics_lib.TRAIN_AGAIN,
    )
    names = read_class_names(workdir)
    classifier = variants.get(config.model.variant).layers[-1].name
    units = variables["params"][classifier]["bias"].shape[0]
    return Weights(
        settings=model_settings(config, units),
        variables=variables,
        mean=statistics.mean_image,
        image_size=side,
        crop_size=config.data.crop_size,
        class_names=None if names is None else tuple(names),
    )


def read_statistics(workdir: Path, image_size: int | None = None) -> Statistics:
    """Return the statistics that a workdir was trained with.

    Args:
      image_size: side of the pictures that they have to be of; None: of any.

    Raises:
      FileNotFoundError, DataError: they are not there, or not those of such pictures.
    """
    path = workdir / STATISTICS_FILE
    try:
        return statistics_lib.load(path, image_size, remedy=statistics_lib.TRAIN_AGAIN)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path} is missing: the mean image that the network of this run is given "
            "its pictures without. Copy it from where the run was trained."
        ) from error


def about_mean(workdir: Path, statistics: Statistics, config: Any) -> str:
    """Return a line with the file of a run's mean image, and its number of images."""
    tuned = config.get("finetune", {}).get("source")
    images = "the weights" if tuned else statistics.extent
    return f"mean image: {workdir / STATISTICS_FILE}, of {images}"


def is_weights_file(path: str | os.PathLike[str]) -> bool:
    """Return True if a path is a file, or is named like a file of weights."""
    named = os.fspath(path).lower().endswith(SUFFIXES)
    return Path(path).is_file() or (named and not Path(path).is_dir())


def require_run(workdir: Path) -> None:
    """Raise FileNotFoundError if a folder is not the workdir of a run."""
    if not (workdir / CONFIG_FILE).exists():
        raise FileNotFoundError(
            f"{workdir} is not the workdir of a run: it has no {CONFIG_FILE}. Give the "
            "folder that was given as --workdir, or a file of weights."
        )


def with_network_of(config: Config, path: str | os.PathLike[str]) -> Config:
    """Return a copy of a config with the network and the sizes of a trained one.

    `path` and errors are those of `load`.
    """
    if is_weights_file(path):
        weights = read_weights(path)
        network = {
            f"model.{name}"
            if name in config.model
            else f"model.overrides.{name}": value
            for name, value in weights.settings.items()
        }
        network["data.image_size"] = weights.image_size
        network["data.crop_size"] = weights.crop_size
    else:
        workdir = Path(split_step(os.fspath(path))[0])
        require_run(workdir)
        stored = flat(as_json(from_stored(read_config(workdir) or {})))
        sizes = ("data.image_size", "data.crop_size")
        network = {
            name: value
            for name, value in stored.items()
            if name.startswith("model.") or name in sizes
        }
    return from_stored(as_json(config), network)


def read_class_names(workdir: Path) -> list[str] | None:
    """Return the names by label that a workdir was trained with, None if unknown.

    Raises:
      ConfigError: if the file is damaged.
    """
    return read_json(workdir / CLASSES_FILE)


def write_class_names(workdir: Path, names: Sequence[str]) -> None:
    """Write the names by label into a workdir, atomically."""
    write_json(workdir / CLASSES_FILE, list(names))


def load_config(name: str) -> Config:
    """Return the config of "FILE.py", "FILE.py:ARGUMENT" or "WORKDIR/config.json".

    Raises:
      ConfigError: there is no such file, or it makes no config.
      Exception: anything that the Python file raises.
    """
    path = Path(name)
    if path.name == CONFIG_FILE:
        stored = read_config(path.parent)
        if stored is None:
            raise ConfigError(f"{path}: there is no such file.")
        return from_stored(stored)
    config = run_file(name, "get_config")
    if not isinstance(config, ConfigDict):
        raise ConfigError(
            f"{name}: get_config() must return a ConfigDict; it returns "
            f"{type(config).__name__}."
        )
    return config.lock()


def run_file(name: str, function: str) -> Any:
    """Run a Python file; return the result of a function in it.

    Args:
      name: "FILE.py", or "FILE.py:TEXT" to call the function with "TEXT".

    Raises:
      ConfigError: there is no such file, or it has no such function.
    """
    path, colon, argument = name.partition(":")
    if not Path(path).is_file():
        raise ConfigError(f"{path}: there is no such file in {Path.cwd()}.")
    found = runpy.run_path(path).get(function)
    if found is None:
        raise ConfigError(f"{path} defines no {function}().")
    return found(argument) if colon else found()


def from_stored(
    stored: dict[str, Any], changes: Mapping[str, Any] | None = None
) -> Config:
    """Return a config that was stored as JSON, perhaps by an older version.

    Fields that are missing take their default; fields that are gone are ignored.

    Args:
      stored: the tree of fields.
      changes: "GROUP.FIELD" -> value, instead of the stored one.
    """
    config = get_config()
    known = flat(config.to_dict())
    fields = flat(stored) | dict(changes or {})
    config.update_from_flattened_dict(
        {name: _as_tuples(value) for name, value in fields.items() if name in known}
    )
    return config


def _as_tuples(value: Any) -> Any:
    """Turn lists, of which JSON makes tuples, back into tuples."""
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def read_config(workdir: Path) -> dict[str, Any] | None:
    """Return the config.json of a workdir, None if there is none.

    Raises:
      ConfigError: if the file is damaged.
    """
    return read_json(workdir / CONFIG_FILE)


def write_config(workdir: Path, config: Config) -> None:
    """Write the config.json of a workdir atomically."""
    write_json(workdir / CONFIG_FILE, as_json(config))


def read_json(path: Path) -> Any:
    """Return the content of a JSON file of a workdir, None if there is no such file.

    Raises:
      ConfigError: if the file is damaged.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ConfigError(
            f"{path} is damaged: {error}. Copy it from where the run was trained."
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    with replacing(path) as file:
        file.write(f"{json.dumps(value, indent=2)}\n".encode())
