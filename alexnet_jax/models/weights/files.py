"""A trained network, how to read one from a file, and what the file formats share.

Caffe, torch and ONNX keep channels first: a kernel is [out, in, down, across], and a fully
connected layer reads the maps one after the other. Here a kernel is [down, across, in, out], and
a fully connected layer reads the places one after the other. The order of the channels, and which
of them a column sees, is the same everywhere.
"""

import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from alexnet_jax.data import imagenet
from alexnet_jax.models import alexnet
from alexnet_jax.models.layers import Variant

# pytorch/examples writes `.pth.tar`.
SUFFIXES = (".safetensors", ".caffemodel", ".pth.tar", ".pth", ".pt")
# Caffe's and torchvision's AlexNet see the centre of images of this side, in pixels.
FOREIGN_IMAGE_SIZE = 256

Shapes = Mapping[str, tuple[int, ...]]
T = TypeVar("T")


class WeightsError(ValueError):
    """A file of weights cannot be used, or weights cannot be written."""


@dataclass(frozen=True)
class Weights:
    """A trained network, from which `alexnet_jax.load` makes its three results.

    Attributes:
      settings: keyword arguments of `create_model`: variant, num_classes, width, ...
      variables: argument of `model.apply`: {"params"}, with batch norm {"batch_stats"}.
      mean: float32 [3] or [S, S, 3], RGB, 0..255: subtracted from raw images.
      image_size: side S in pixels of a raw image before the central crop.
      crop_size: side in pixels of the central crop, the input of the network.
      class_names: by label; None if the file does not say.
    """

    settings: dict[str, Any]
    variables: dict[str, Any]
    mean: np.ndarray
    image_size: int
    crop_size: int
    class_names: tuple[str, ...] | None = None

    def make_model(self) -> alexnet.AlexNet:
        """Return the network of the settings; ValueError if `create_model` refuses."""
        return make_model(self.settings)


def read_weights(path: str | os.PathLike[str], *, variant: str | None = None) -> Weights:
    """Read a file of weights.

    Args:
      path: a `.caffemodel` (bvlc_alexnet and CaffeNet, any number of classes), a `.pth`, `.pt` or
        `.pth.tar` of torchvision's AlexNet (needs torch), or a `.safetensors` with torchvision's
        names or our own.
      variant: name of the network. Only a `.caffemodel` without normalisation layers needs it
        ("caffe" or "caffenet"). Any other file names its variant, and another one here is an
        error. The layers may be narrower than the variant's.

    Returns:
      The weights. The 1,000 classes of a foreign file are assumed to be ImageNet's, in the order
      of their WNIDs.

    Raises:
      WeightsError: (a ValueError) if there is no such file, or if it is damaged or of another
        format or variant. The message names the wrong tensors.
    """
    from alexnet_jax.models.weights import caffe, safetensors, torchvision

    path = Path(path)
    if not path.is_file():
        raise WeightsError(
            f"{path}: there is no such file of weights. Give one that ends in "
            f"{', '.join(SUFFIXES)}, or the workdir of a run."
        )
    if not path.name.lower().endswith(SUFFIXES):
        raise WeightsError(
            f"{path}: files of weights are {', '.join(SUFFIXES)}; got {path.suffix or 'no suffix'}. "
            "Give such a file, or rename this one."
        )
    readers = {".safetensors": safetensors.read, ".caffemodel": caffe.read}
    return readers.get(path.suffix.lower(), torchvision.read)(path, variant)


def make_model(settings: Mapping[str, Any]) -> alexnet.AlexNet:
    """Return `create_model(**settings)` without its advice on initial weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return alexnet.from_settings(settings)


def shapes_of(model: alexnet.AlexNet, crop_size: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of every variable by name, for example `params/conv1/kernel`."""
    images = jax.ShapeDtypeStruct((1, crop_size, crop_size, 3), np.float32)
    # Fast operators, or a key made outside, would start JAX's devices. A file may be read before
    # `jax.distributed` is set up.
    plain = model.clone(fast=False)
    variables: Any = jax.eval_shape(lambda x: plain.init(jax.random.key(0), x), images)
    leaves: dict[str, Any] = flatten_dict(variables, sep="/")
    return {name: leaf.shape for name, leaf in leaves.items()}


def channels_last(weight: np.ndarray, channels: int) -> np.ndarray:
    """Return the kernel of a foreign weight, [out, in, down, across] or [out, in].

    Args:
      weight: channels first.
      channels: features of the layer before. A fully connected weight reads each of them at
        in / channels places.
    """
    if weight.ndim == 4:
        return weight.transpose(2, 3, 1, 0)
    outputs, inputs = weight.shape
    side = math.isqrt(inputs // channels)
    by_map = weight.reshape(outputs, channels, side, side)
    return by_map.transpose(2, 3, 1, 0).reshape(inputs, outputs)


def channels_first(kernel: np.ndarray, channels: int) -> np.ndarray:
    """Return the inverse of `channels_last`."""
    if kernel.ndim == 4:
        return kernel.transpose(3, 2, 0, 1)
    inputs, outputs = kernel.shape
    side = math.isqrt(inputs // channels)
    by_place = kernel.reshape(side, side, channels, outputs)
    return by_place.transpose(3, 2, 0, 1).reshape(outputs, inputs)


def from_foreign(
    path: Path,
    table: Variant,
    tensors: Mapping[str, np.ndarray],
    names: Mapping[str, tuple[str, str]],
    mean: np.ndarray,
) -> Weights:
    """Return tensors of another program as weights.

    The width and the number of classes are those of the tensors.

    Args:
      path: file of the tensors, for messages.
      table: layer table at full width.
      tensors: by name, channels first.
      names: layer -> (name of its weight, name of its bias) in `tensors`.
      mean: [3], RGB, 0..255.

    Raises:
      WeightsError: for missing, unexpected and misshapen tensors, and for infinite numbers.
    """
    classifier = table.layers[-1]
    # Its rounded width is the closest to the exact one.
    widest = max(table.layers[:-1], key=lambda row: row.features)

    def features(row: Any) -> int:
        found = [tensors[name] for name in names[row.name] if name in tensors]
        return len(found[0]) if found else row.features

    width = features(widest) / widest.features
    settings = {"variant": table.name, "num_classes": features(classifier), "width": width}
    model = make_model(settings)
    shapes, expected = shapes_of(model, table.crop_size), {}
    for layer, (weight, bias) in names.items():
        kernel = shapes[f"params/{layer}/kernel"]
        expected |= {weight: kernel[::-1], bias: kernel[-1:]}  # kernels are square
    check_tensors(path, f"the tensors of variant {table.name}", tensors, expected)
    params, channels = {}, 3
    for row in model.network.layers:
        weight, bias = (tensors[name] for name in names[row.name])
        # Copied per layer, so that each transposed copy is freed before the next.
        kernel = np.ascontiguousarray(channels_last(weight, channels))
        params[row.name] = {"kernel": kernel, "bias": np.asarray(bias)}
        channels = row.features
    wnids = imagenet.wnids()
    return Weights(
        settings=settings,
        variables={"params": params},
        mean=mean,
        image_size=FOREIGN_IMAGE_SIZE,
        crop_size=table.crop_size,
        class_names=wnids if len(wnids) == settings["num_classes"] else None,
    )


def renamed(
    path: Path, named: Iterable[tuple[str, T]], rename: Callable[[str], str]
) -> dict[str, T]:
    """Return the values of a file by their new names; WeightsError if two names become one."""
    before: dict[str, str] = {}
    found: dict[str, T] = {}
    for old, value in named:
        new = rename(old)
        if new in found:
            raise WeightsError(
                f"{path} holds both {before[new]!r} and {old!r} for {new!r}, and the network has "
                "one. Write a file that holds only one of the two."
            )
        before[new], found[new] = old, value
    return found


def check_tensors(
    path: Path, what: str, tensors: Mapping[str, np.ndarray], expected: Shapes
) -> None:
    """Raise WeightsError unless these are the expected tensors, and finite."""
    wrong = [
        f"{name} {list(tensors[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != tuple(shape)
    ]
    problems = {
        "missing": [name for name in expected if name not in tensors],
        "unexpected": [name for name in tensors if name not in expected],
        "of another shape": wrong,
        "infinite or NaN": [n for n, tensor in tensors.items() if not np.isfinite(tensor).all()],
    }
    listed = []
    for kind, names in problems.items():
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        if names:
            listed.append(f"{kind} {', '.join(names[:4])}{more}")
    if listed:
        raise WeightsError(
            f"{path} does not hold {what}: {'; '.join(listed)}. Give a file of that "
            "network, or write this one again."
        )


def check_variant(path: Path, given: str | None, expected: tuple[str, ...]) -> None:
    """Raise WeightsError if a variant is given that the file cannot hold."""
    if given is not None and given not in expected:
        raise WeightsError(
            f"{path} holds weights of variant {' or '.join(expected)}; got variant={given!r}. Leave "
            "variant out, or give another file."
        )


def not_of_format(path: Path, suffix: str, why: object) -> WeightsError:
    """Return the error for a file of another format, with the file's first bytes."""
    with open(path, "rb") as file:
        start = file.read(16)
    reason = (str(why).strip().splitlines() or ["no reason given"])[0]
    return WeightsError(
        f"{path} ({os.path.getsize(path):,} bytes, beginning with {start!r}) is no {suffix} that "
        f"can be read: {reason[:300].rstrip('.')}. Was it downloaded whole?"
    )
