"""`.safetensors` files, with the names of this project or of torchvision.

A file that this module wrote needs nothing beside it: settings, sizes and class names
are in its metadata.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from alexnet_jax.models.weights import files, torchvision
from alexnet_jax.models.weights.files import Weights, WeightsError
from alexnet_jax.system.files import atomic_write

NAMES = ("alexnet_jax", "torchvision")
# Metadata entry with everything but the tensors, as JSON.
RECORD = "alexnet_jax"
VERSION = 1
_MEAN = "mean"


def save_safetensors(
    path: str | os.PathLike[str], weights: Weights, *, names: str = "alexnet_jax"
) -> None:
    """Write weights as `.safetensors`, atomically.

    Args:
      path: file to write.
      weights: what to write.
      names: "alexnet_jax": tensors `params/conv1/kernel` ... and `mean`, which
        `alexnet_jax.load(path)` reads as the same network. "torchvision", for variant
        `owt`: tensors `features.0.weight` ... for
        `torchvision.models.alexnet().load_state_dict`. That network's input is images of
        0..1 after `transforms.Normalize(mean, std)`. Both are JSON in the metadata:
        `normalize_std` is torchvision's usual one, `normalize_mean` is this network's
        mean colour / 255. To subtract a mean image / 255 instead is exact.

    Raises:
      WeightsError: (a ValueError) for variables that do not fit the settings, or a
        network that torchvision does not have.
    """
    path = Path(path)
    if names not in NAMES:
        raise WeightsError(f"names={names!r} must be one of {', '.join(NAMES)}.")
    model = weights.make_model()
    leaves = files.flat(weights.variables)
    shapes = {name: np.shape(leaf) for name, leaf in leaves.items()}
    expected = files.shapes_of(model, weights.crop_size)
    files.check_shapes(path, "the network of its settings", shapes, expected)
    settings = {k: v for k, v in weights.settings.items() if v is not None}
    if "dtype" in settings:
        settings["dtype"] = jnp.dtype(settings["dtype"]).name
    record = {
        "version": VERSION,
        "settings": {"variant": model.network.name, **settings},
        "image_size": weights.image_size,
        "crop_size": weights.crop_size,
        "class_names": weights.class_names,
    }
    metadata = {RECORD: json.dumps(record)}
    if names == "torchvision":
        tensors = torchvision.to_state(weights)
        colour = weights.mean.reshape(-1, 3).mean(0, dtype=np.float64) / 255
        metadata["format"] = "pt"  # transformers and timm look for it
        metadata["normalize_mean"] = json.dumps(colour.tolist())
        metadata["normalize_std"] = json.dumps(torchvision.STD)
    else:
        tensors = {_MEAN: weights.mean, **leaves}
    # safetensors writes the memory of an array as it is, even of a transposed one.
    arrays = {name: np.ascontiguousarray(leaf) for name, leaf in tensors.items()}
    with atomic_write(path) as file:
        file.write(safetensors.numpy.save(arrays, metadata))


def read(path: Path, variant: str | None) -> Weights:
    """Read a `.safetensors`; arguments, result and errors are those of `read_weights`."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # of safetensors, and of NumPy for unknown dtypes
        raise files.not_of_format(path, ".safetensors", error) from error
    # torch keeps counters between the weights.
    tensors = {
        name: tensor
        for name, tensor in tensors.items()
        if jnp.issubdtype(tensor.dtype, jnp.floating)
    }
    files.check_finite(path, tensors)
    record = _read_record(path, metadata)
    first_parts = {torchvision.own_name(name).partition(".")[0] for name in tensors}
    if first_parts & set(torchvision.PARTS):
        files.check_variant(path, variant, (torchvision.VARIANT,))
        weights = torchvision.from_state(
            path,
            {name: array.astype(np.float32, copy=False) for name, array in tensors.items()},
            mean=json.loads(metadata.get("normalize_mean", "null")) or torchvision.MEAN,
            std=json.loads(metadata.get("normalize_std", "null")) or torchvision.STD,
        )
        if record is None:
            return weights
        record["settings"] |= weights.settings
        return dataclasses.replace(weights, **record)
    if record is None:
        raise WeightsError(
            f"{path} was written neither by alexnet_jax nor from torchvision's AlexNet "
            "(params/conv1/kernel ... or features.0.weight ...); it holds "
            f"{files.some(list(tensors)) or 'nothing'}."
        )
    model, side = files.make_model(record["settings"]), record["image_size"]
    files.check_variant(path, variant, (model.network.name,))
    found = {name: array.shape for name, array in tensors.items()}
    is_image = len(found.get(_MEAN, ())) == 3
    expected = files.shapes_of(model, record["crop_size"])
    expected[_MEAN] = (side, side, 3) if is_image else (3,)
    what = f"the weights of variant {model.network.name}"
    files.check_shapes(path, what, found, expected)
    mean = tensors.pop(_MEAN).astype(np.float32)
    return Weights(variables=files.nested(tensors), mean=mean, **record)


def _read_record(path: Path, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """Return settings, sizes and class names from the metadata; None if not ours."""
    if RECORD not in metadata:
        return None
    try:
        record = json.loads(metadata[RECORD])
        version, names = record.pop("version"), record["class_names"]
        if version != VERSION:
            raise ValueError(f"version {version}, expected {VERSION}")
        files.make_model(record["settings"])  # raises for unknown settings
        return record | {"class_names": None if names is None else tuple(names)}
    except (ValueError, TypeError, KeyError) as error:
        raise WeightsError(f"{path}: its metadata {RECORD!r} cannot be used: {error}") from error
