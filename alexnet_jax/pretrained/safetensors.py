"""`.safetensors`: our own files, which need nothing beside them, and torchvision's."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from alexnet_jax.alexnet import AlexNet
from alexnet_jax.data.files import replacing
from alexnet_jax.pretrained import files, torchvision
from alexnet_jax.pretrained.files import Weights, WeightsError

NAMES = ("alexnet_jax", "torchvision")
# The entry of the file's metadata that has all but the tensors, as JSON.
RECORD = "alexnet_jax"
VERSION = 1
_MEAN = "mean"


def save_safetensors(
    path: str | os.PathLike[str], weights: Weights, *, names: str = "alexnet_jax"
) -> None:
    """Writes weights as `.safetensors`, whole or not at all.

    Args:
      path: the file.
      weights: what to write.
      names: "alexnet_jax": tensors `params/conv1/kernel` ... and `mean`, with settings,
        sizes and class names in the metadata, so that `alexnet_jax.load(path)` gives
        the same network again. "torchvision", for variant `owt`: `features.0.weight`
        ... in torch's layout, for `torchvision.models.alexnet().load_state_dict`. Its
        input is then pictures of 0..1 after `transforms.Normalize(mean, std)`: std is
        torchvision's usual one, for which the first kernel is scaled, but mean is this
        network's own colour / 255 and not torchvision's. Both stand in the metadata,
        as `normalize_mean` and `normalize_std`, JSON. Of a mean image only the mean
        colour fits in there; subtracting the mean image / 255 instead is exact.

    Raises:
      WeightsError: (a ValueError) for variables that are not those of the settings, or
        a network that torchvision does not have.
    """
    path = Path(path)
    if names not in NAMES:
        raise WeightsError(f"names={names!r} must be one of {', '.join(NAMES)}.")
    leaves = files.flat(weights.variables)
    shapes = {name: np.shape(leaf) for name, leaf in leaves.items()}
    expected = files.shapes_of(weights.make_model(), weights.crop_size)
    files.check_shapes(path, "the network of its settings", shapes, expected)
    metadata = {RECORD: json.dumps(_record(weights))}
    if names == "torchvision":
        tensors = torchvision.to_state(weights)
        colour = weights.mean.reshape(-1, 3).mean(0, dtype=np.float64) / 255
        metadata["format"] = "pt"  # what transformers and timm look for
        metadata["normalize_mean"] = json.dumps(colour.tolist())
        metadata["normalize_std"] = json.dumps(torchvision.STD)
    else:
        tensors = {_MEAN: weights.mean, **leaves}
    # safetensors takes an array's memory as it lies: transposed ones would be written so.
    arrays = {name: np.ascontiguousarray(leaf) for name, leaf in tensors.items()}
    with replacing(path) as file:
        file.write(safetensors.numpy.save(arrays, metadata))


def read(path: Path, variant: str | None) -> Weights:
    """Reads a `.safetensors`; arguments, result and errors as `read_weights`."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            names = list(file.keys())
            tensors = {
                name: file.get_tensor(name)
                for name in names
                if not files.is_counter(name)
            }
    except Exception as error:  # its own, and NumPy's of dtypes that it does not have
        raise files.not_of_format(path, ".safetensors", error) from error
    files.check_numbers(path, tensors)
    record = _read_record(path, metadata)
    first_parts = {torchvision.own_name(name).partition(".")[0] for name in tensors}
    if first_parts & set(torchvision.PARTS):
        files.check_variant(path, variant, (torchvision.VARIANT,))
        return _from_torchvision(path, tensors, metadata, record)
    if record is None:
        names = files.some(list(tensors)) or "nothing"
        raise WeightsError(
            f"{path} was written neither by alexnet_jax nor from torchvision's AlexNet "
            f"(params/conv1/kernel ... or features.0.weight ...); it holds {names}."
        )
    files.check_variant(path, variant, (_model(record).network.name,))
    return _from_record(path, tensors, record)


def _from_torchvision(
    path: Path,
    tensors: dict[str, np.ndarray],
    metadata: Mapping[str, str],
    record: dict[str, Any] | None,
) -> Weights:
    mean, std = (
        json.loads(metadata[name]) if name in metadata else default
        for name, default in (
            ("normalize_mean", torchvision.MEAN),
            ("normalize_std", torchvision.STD),
        )
    )
    found = torchvision.from_state(
        path,
        {name: array.astype(np.float32, copy=False) for name, array in tensors.items()},
        mean=mean,
        std=std,
    )
    if record is None:
        return found
    return dataclasses.replace(
        found,
        settings={**record["settings"], **found.settings},
        image_size=record["image_size"],
        crop_size=record["crop_size"],
        class_names=record["class_names"],
    )


def _record(weights: Weights) -> dict[str, Any]:
    settings = {"variant": weights.make_model().network.name}
    settings |= {
        name: jnp.dtype(value).name if name == "dtype" else value
        for name, value in weights.settings.items()
        if value is not None
    }
    return {
        "version": VERSION,
        "settings": settings,
        "image_size": weights.image_size,
        "crop_size": weights.crop_size,
        "class_names": weights.class_names,
    }


def _read_record(path: Path, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """Return the record that `_record` wrote; None if there is none."""
    if RECORD not in metadata:
        return None
    try:
        record = json.loads(metadata[RECORD])
        if record["version"] != VERSION:
            raise ValueError(f"version {record['version']}, expected {VERSION}")
        _model(record)  # refuses settings of other versions
    except (ValueError, TypeError, KeyError) as error:
        raise WeightsError(
            f"{path}: its metadata {RECORD!r} cannot be used: {error}"
        ) from error
    names = record["class_names"]
    record["class_names"] = None if names is None else tuple(names)
    return record


def _model(record: Mapping[str, Any]) -> AlexNet:
    """The network of a file's record."""
    return files.make_model(record["settings"])


def _from_record(
    path: Path, tensors: dict[str, np.ndarray], record: dict[str, Any]
) -> Weights:
    model, side = _model(record), record["image_size"]
    expected = files.shapes_of(model, record["crop_size"])
    found = {name: array.shape for name, array in tensors.items()}
    image = len(found.get(_MEAN, ())) == 3
    expected[_MEAN] = (side, side, 3) if image else (3,)
    what = f"the weights of variant {model.network.name}"
    files.check_shapes(path, what, found, expected)
    mean = tensors.pop(_MEAN).astype(np.float32, copy=False)
    return Weights(
        settings=record["settings"],
        variables=files.nested(tensors),
        mean=mean,
        image_size=side,
        crop_size=record["crop_size"],
        class_names=record["class_names"],
    )
