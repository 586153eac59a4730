"""Load trained networks and config files."""

import os
import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from alexnet_jax.data import augment
from alexnet_jax.data import images as images_lib
from alexnet_jax.data.statistics import load as load_statistics
from alexnet_jax.models import alexnet
from alexnet_jax.models.weights import SUFFIXES, Weights, WeightsError, read_weights
from alexnet_jax.models.weights.files import make_model
from alexnet_jax.training.checkpoint import Checkpointer, CheckpointError, split_step
from alexnet_jax.training.config import Config, ConfigError, as_json, flat, model_settings
from alexnet_jax.training.distributed import require_devices
from alexnet_jax.training.workdir import (
    CHECKPOINTS,
    CONFIG_FILE,
    STATISTICS_FILE,
    from_stored,
    read_class_names,
    read_config,
    require_run,
)


def load(
    path: str | os.PathLike[str], *, step: int | None = None, variant: str | None = None
) -> tuple[alexnet.AlexNet, dict[str, Any], Callable[[Any], jax.Array]]:
    """Load a trained network: `model, variables, preprocess = load(PATH)`.

    Args:
      path: the workdir of a run, DIR or DIR@STEP, or a weights file: `.safetensors`,
        `.caffemodel`, `.pth` (see `models.weights.read_weights`).
      step: checkpoint of a run; None: the one with the lowest top-1 error, or without
        any evaluation the newest.
      variant: variant of a file that does not name it.

    Returns:
      model: the whole network, for one device.
      variables: the argument of `model.apply`.
      preprocess: a path, a Pillow image, a uint8 array [H, W, 3], or a list of these
        -> images [B, crop, crop, 3], the centre view minus the mean.

    Raises:
      FileNotFoundError: `path` is neither a workdir nor a file.
      CheckpointError: the workdir holds no complete checkpoint.
      WeightsError: the file cannot be used, or holds another variant.
      DataError, ConfigError: the statistics or the class names are damaged.
      DeviceError: JAX has no devices.
    """
    weights = read_network(path, step=step, variant=variant)
    return weights.make_model(), weights.variables, make_preprocess(weights)


def make_preprocess(weights: Weights) -> Callable[[Any], jax.Array]:
    """Return the function `preprocess` that `load` returns."""
    size, crop_size = weights.image_size, weights.crop_size
    mean_image = jnp.broadcast_to(jnp.asarray(weights.mean), (size, size, 3))

    def preprocess(images: Any) -> jax.Array:
        many = images if isinstance(images, (list, tuple)) else [images]
        stack = np.stack([images_lib.load_image(p, size) for p in many])
        return augment.eval_images(jnp.asarray(stack), mean_image=mean_image, crop_size=crop_size)

    return preprocess


def read_network(
    path: str | os.PathLike[str], *, step: int | None = None, variant: str | None = None
) -> Weights:
    """Return the settings, weights, sizes, mean and class names of a trained network.

    Arguments and errors are those of `load`.
    """
    require_devices()
    if is_weights_file(path):
        if step is not None:
            raise WeightsError(
                f"{path} is a file of weights; it has no step {step}. Leave the step out."
            )
        weights = read_weights(path, variant=variant)
        on_device = jax.tree.map(jnp.asarray, weights.variables)
        return replace(weights, variables=on_device)
    folder, which = split_step(os.fspath(path))
    if step is not None and folder != os.fspath(path):
        raise CheckpointError(
            f"{path} names a step already; got step {step} too. Give one of them."
        )
    workdir = Path(folder).absolute()
    require_run(workdir)
    with Checkpointer(workdir / CHECKPOINTS, read_only=True) as checkpointer:
        variables, metadata = checkpointer.restore_params(which if step is None else step)
    config = from_stored(metadata["config"])
    if variant not in (None, config.model.variant):
        raise WeightsError(
            f"{path} holds a network of variant {config.model.variant}; got variant={variant!r}. "
            "Leave variant out, or give another run."
        )
    names = read_class_names(workdir)
    classifier = make_model(model_settings(config, None)).network.layers[-1].name
    units = variables["params"][classifier]["bias"].shape[0]
    return Weights(
        settings=model_settings(config, units),
        variables=variables,
        mean=load_statistics(workdir / STATISTICS_FILE, config.data.image_size).mean_image,
        image_size=config.data.image_size,
        crop_size=config.data.crop_size,
        class_names=None if names is None else tuple(names),
    )


def is_weights_file(path: str | os.PathLike[str]) -> bool:
    """Return True if a path is a file, or is named like a weights file."""
    named = os.fspath(path).lower().endswith(SUFFIXES)
    return Path(path).is_file() or (named and not Path(path).is_dir())


def with_network_of(config: Config, path: str | os.PathLike[str]) -> Config:
    """Return a copy of a config with the network and image sizes of a trained one.

    `path` and errors are those of `load`.
    """
    if is_weights_file(path):
        weights = read_weights(path)
        network = {"data.image_size": weights.image_size, "data.crop_size": weights.crop_size}
        for name, value in weights.settings.items():
            group = "model" if name in config.model else "model.overrides"
            network[f"{group}.{name}"] = value
    else:
        workdir = Path(split_step(os.fspath(path))[0])
        require_run(workdir)
        stored = flat(as_json(from_stored(read_config(workdir) or {})))
        own = ("model.", "data.image_size", "data.crop_size")
        network = {name: value for name, value in stored.items() if name.startswith(own)}
    return from_stored(as_json(config), network)


def load_config(name: str) -> Config:
    """Return the config of "FILE.py", "FILE.py:ARGUMENT" or "WORKDIR/config.json".

    Raises:
      ConfigError: there is no such file, or it returns no config.
      Exception: any error of the Python file.
    """
    path = Path(name)
    if path.name == CONFIG_FILE:
        stored = read_config(path.parent)
        if stored is None:
            raise ConfigError(f"{path}: there is no such file. Name the folder of a run.")
        return from_stored(stored)
    config = run_file(name, "get_config")
    if not isinstance(config, ConfigDict):
        raise ConfigError(
            f"{name}: get_config() must return a ConfigDict; it returns {type(config).__name__}."
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
        raise ConfigError(f"{path}: there is no such file in {Path.cwd()}. Check the path.")
    found = runpy.run_path(path).get(function)
    if found is None:
        raise ConfigError(f"{path} defines no {function}(). Add it, or name another file.")
    return found(argument) if colon else found()
