"""`.safetensors` files, with the names of this project or of torchvision.

A file that this module wrote needs nothing beside it: settings, sizes and class names are in its
metadata.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from alexnet_jax.models.alexnet import AlexNet
from alexnet_jax.models.layers import table_to_json
from alexnet_jax.models.weights import files, torchvision
from alexnet_jax.models.weights.files import Weights, WeightsError
from alexnet_jax.system.files import atomic_write

# Metadata entry with everything but the tensors, as JSON.
RECORD = "alexnet_jax"
VERSION = 1


def save(
    path: str | os.PathLike[str],
    model: AlexNet,
    variables: Mapping[str, Any],
    *,
    mean: Any,
    image_size: int,
    class_names: Sequence[str] | None = None,
) -> None:
    """Write a network of your own as a file that `alexnet_jax.load` reads.

    Args:
      path: a `.safetensors`.
      model, variables: as for `model.apply`; the table of layers is stored with them.
      mean: [3] or [image_size, image_size, 3], RGB, 0..255: what was subtracted from images.
      image_size: side in pixels of a raw image, from which the centre is cut.
      class_names: by label.
    """
    settings = {
        "variant": model.network.name,
        "table": table_to_json(model.network),
        "num_classes": model.network.layers[-1].features,
        "dtype": jnp.dtype(model.dtype).name,
    }
    arrays, crop_size = jax.tree.map(np.asarray, dict(variables)), model.network.crop_size
    mean = np.asarray(mean, np.float32)
    _check(
        Path(path), model, {**flatten_dict(arrays, sep="/"), "mean": mean}, image_size, crop_size
    )
    names = None if class_names is None else tuple(class_names)
    save_safetensors(path, Weights(settings, arrays, mean, image_size, crop_size, names))


def _check(
    path: Path, model: AlexNet, tensors: Mapping[str, Any], image_size: int, crop_size: int
) -> None:
    """Raise WeightsError unless the tensors are a network's variables and its mean."""
    expected = files.shapes_of(model, crop_size)
    is_image = "mean" in tensors and tensors["mean"].ndim == 3
    expected["mean"] = (image_size, image_size, 3) if is_image else (3,)
    files.check_tensors(path, f"the weights of variant {model.network.name}", tensors, expected)


def save_safetensors(
    path: str | os.PathLike[str],
    weights: Weights,
    *,
    names: Literal["alexnet_jax", "torchvision"] = "alexnet_jax",
) -> None:
    """Write weights as `.safetensors`, atomically.

    Args:
      path: file to write.
      weights: what to write.
      names: "alexnet_jax": tensors `params/conv1/kernel` ... and `mean`, which
        `alexnet_jax.load(path)` reads as the same network. "torchvision", for variant `owt`:
        tensors `features.0.weight` ... for `torchvision.models.alexnet().load_state_dict`. That
        network's input is images of 0..1 after `transforms.Normalize(mean, std)`. Both are JSON
        in the metadata: `normalize_std` is torchvision's usual one, `normalize_mean` is this
        network's mean colour / 255. To subtract a mean image / 255 instead is exact.

    Raises:
      WeightsError: (a ValueError) for a network that torchvision does not have.
    """
    record = {
        "version": VERSION,
        "settings": {k: v for k, v in weights.settings.items() if v is not None},
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
        tensors = {"mean": weights.mean, **flatten_dict(weights.variables, sep="/")}
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
    tensors = {k: v for k, v in tensors.items() if jnp.issubdtype(v.dtype, jnp.floating)}
    record = _read_record(path, metadata[RECORD]) if RECORD in metadata else None
    if any(map(torchvision.is_own, tensors)):
        files.check_variant(path, variant, (torchvision.VARIANT,))
        state = {name: array.astype(np.float32, copy=False) for name, array in tensors.items()}
        if record is None:
            return torchvision.from_state(path, state)
        mean, std = (json.loads(metadata[f"normalize_{name}"]) for name in ("mean", "std"))
        weights = torchvision.from_state(path, state, mean, std)
        record["settings"] |= weights.settings
        return dataclasses.replace(weights, **record)
    if record is None:
        raise WeightsError(
            f"{path} was written neither by alexnet_jax nor from torchvision's AlexNet "
            "(params/conv1/kernel ... or features.0.weight ...)."
        )
    model = files.make_model(record["settings"])
    files.check_variant(path, variant, (model.network.name,))
    _check(path, model, tensors, record["image_size"], record["crop_size"])
    mean = tensors.pop("mean").astype(np.float32)
    return Weights(variables=unflatten_dict(tensors, sep="/"), mean=mean, **record)


def _read_record(path: Path, text: str) -> dict[str, Any]:
    """Return settings, sizes and class names: the arguments of `Weights` beside its arrays."""
    record = json.loads(text)
    try:
        if record.pop("version") != VERSION:
            raise ValueError(f"expected version {VERSION}; write the file again with this program")
        files.make_model(record["settings"])  # raises for settings of a later version
    except (ValueError, TypeError) as error:
        raise WeightsError(f"{path}: its metadata {RECORD!r} cannot be used: {error}") from error
    names = record["class_names"]
    return record | {"class_names": None if names is None else tuple(names)}
