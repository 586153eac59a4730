"""What a file of weights holds, and how foreign tensors become ours.

Caffe, torch and ONNX keep channels first: kernels are [out, in, down, across], and a
fully connected layer reads the last features map by map. Ours are [down, across, in,
out], and the features are read place by place. The order of the channels, and which of
them a column sees, is the same everywhere.
"""

import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from alexnet_jax import ablations, alexnet
from alexnet_jax.data import imagenet
from alexnet_jax.layers import Layer, Variant

# Tensors that an error message names before it only counts them.
MOST_NAMED = 4
# Counters of torch's modules, which are no weights.
_COUNTERS = ("n_averaged", "num_batches_tracked")

Shapes = Mapping[str, tuple[int, ...]]
T = TypeVar("T")


class WeightsError(ValueError):
    """A file of weights is not what it should be, in words."""


@dataclass(frozen=True)
class Weights:
    """A trained network: what `alexnet_jax.load` makes its three results of.

    Attributes:
      settings: keyword arguments of `create_model`: variant, num_classes, width, ...
      variables: what `model.apply` takes: {"params"}, with batch norm {"batch_stats"}.
      mean: float32 [3] or [S, S, 3], RGB, 0..255: what is subtracted from pictures.
      image_size: side S of the pictures in pixels, of which the centre is looked at.
      crop_size: side of that centre, the input of the network.
      class_names: by label; None where the file does not say.

    Raises:
      WeightsError: for a mean of another shape.
    """

    settings: dict[str, Any]
    variables: dict[str, Any]
    mean: np.ndarray
    image_size: int
    crop_size: int
    class_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        side = self.image_size
        if self.mean.shape not in ((3,), (side, side, 3)):
            raise WeightsError(
                f"the mean has shape {list(self.mean.shape)}, expected [3] or "
                f"[{side}, {side}, 3]."
            )

    def make_model(self) -> alexnet.AlexNet:
        """The network that the weights are of.

        Raises:
          ValueError: for settings that `create_model` does not take.
        """
        return make_model(self.settings)


def make_model(settings: Mapping[str, Any]) -> alexnet.AlexNet:
    """`create_model` without its advice on how to start narrow networks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return alexnet.from_settings(settings)


def class_names(num_classes: int) -> tuple[str, ...] | None:
    """ImageNet's, for as many classes: foreign files do not say."""
    names = imagenet.wnids()
    return names if num_classes == len(names) else None


def shapes_of(model: alexnet.AlexNet, crop_size: int) -> dict[str, tuple[int, ...]]:
    """The shapes of all variables by name, `params/conv1/kernel`; nothing is computed."""
    images = jax.ShapeDtypeStruct((1, crop_size, crop_size, 3), np.float32)
    # Neither a key nor fast paths here: both would look for devices, and a file may be
    # read before it is known which there are to be.
    plain = model.clone(fast=False)
    variables = jax.eval_shape(lambda x: plain.init(jax.random.key(0), x), images)
    return {name: leaf.shape for name, leaf in flat(variables).items()}


def flat(variables: Mapping[str, Any]) -> dict[str, Any]:
    """{"params": {"conv1": {"kernel": x}}} -> {"params/conv1/kernel": x}."""
    return traverse_util.flatten_dict(variables, sep="/")


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flat`."""
    return traverse_util.unflatten_dict(dict(leaves), sep="/")


def params_of(
    layers: Sequence[Layer],
    tensors: Callable[[str], tuple[np.ndarray, np.ndarray]],
) -> dict[str, Any]:
    """{"params"} of foreign tensors.

    Args:
      layers: of the network.
      tensors: name of a layer -> its kernel, channels first, and its bias.
    """
    params, channels = {}, 3
    for row in layers:
        weight, bias = tensors(row.name)
        # One by one: what is turned around on the way is freed before the next.
        kernel = np.ascontiguousarray(channels_last(weight, channels))
        params[row.name] = {"kernel": kernel, "bias": np.asarray(bias)}
        channels = row.features
    return {"params": params}


def channels_last(weight: np.ndarray, channels: int) -> np.ndarray:
    """[out, in, down, across] or [out, in] -> a kernel of ours.

    Args:
      weight: channels first.
      channels: features of the layer before, for a fully connected one: [out, in] reads
        in / channels places of each.
    """
    if weight.ndim == 4:
        return weight.transpose(2, 3, 1, 0)
    outputs, inputs = weight.shape
    side = math.isqrt(inputs // channels)
    by_map = weight.reshape(outputs, channels, side, side)
    return by_map.transpose(2, 3, 1, 0).reshape(inputs, outputs)


def channels_first(kernel: np.ndarray, channels: int) -> np.ndarray:
    """The inverse of `channels_last`."""
    if kernel.ndim == 4:
        return kernel.transpose(3, 2, 0, 1)
    inputs, outputs = kernel.shape
    side = math.isqrt(inputs // channels)
    by_place = kernel.reshape(side, side, channels, outputs)
    return by_place.transpose(3, 2, 0, 1).reshape(outputs, inputs)


def first_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that `channels_first` gives to a kernel of this one."""
    if len(shape) == 4:
        return shape[3], shape[2], shape[0], shape[1]
    return shape[::-1]


def is_counter(name: str) -> bool:
    """Return whether torch keeps a count under this name: `bn1.num_batches_tracked`."""
    return name.rpartition(".")[2] in _COUNTERS


def renamed(
    path: str | os.PathLike[str],
    named: Iterable[tuple[str, T]],
    rename: Callable[[str], str],
) -> dict[str, T]:
    """Return what a file holds by the names that `rename` gives.

    Raises:
      WeightsError: naming two of the file's names that become one.
    """
    before: dict[str, str] = {}
    found: dict[str, T] = {}
    for old, value in named:
        new = rename(old)
        if new in found:
            raise WeightsError(
                f"{path} holds both {before[new]!r} and {old!r} for {new!r}, and the "
                "network has one. Write a file that holds only one of the two."
            )
        before[new], found[new] = old, value
    return found


def found_features(
    tensors: Mapping[str, np.ndarray], names: Mapping[str, tuple[str, str]]
) -> dict[str, int]:
    """How many features a foreign file's layers have, of those that it has.

    Args:
      tensors: channels first: [out, ...].
      names: what each of our layers' kernel and bias are called there.
    """
    found = {}
    for layer, both in names.items():
        sizes = [len(tensors[name]) for name in both if name in tensors]
        if sizes:
            found[layer] = sizes[0]
    return found


def fitting_width(table: Variant, features: Mapping[str, int]) -> float:
    """The width at which most layers of a table have as many features as were found.

    Of several the one that is closest to 1. A layer that does not fit is then what is
    wrong with the file.
    """
    rows = [row for row in table.layers[:-1] if row.name in features]
    widths = {1.0, *(features[row.name] / row.features for row in rows)}

    def misfits(width: float) -> int:
        scaled = ablations.customize(table, width=width).layers[:-1]
        return sum(features.get(row.name) != row.features for row in scaled)

    return min(sorted(widths, key=lambda width: abs(width - 1)), key=misfits)


def check_shapes(
    path: str | os.PathLike[str], what: str, found: Shapes, expected: Shapes
) -> None:
    """Raises WeightsError unless there are these tensors, of these shapes, alone."""
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    wrong = [
        f"{name} {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    problems = [
        f"{kind} {some(names)}"
        for kind, names in (("missing", missing), ("unexpected", extra))
        if names
    ]
    if wrong:
        problems.append(f"of another shape {some(wrong)}")
    if problems:
        raise WeightsError(f"{path} does not hold {what}: {'; '.join(problems)}.")


def check_numbers(where: object, tensors: Mapping[str, Any]) -> None:
    """Raises WeightsError unless all of the tensors hold finite floating point."""
    for name, tensor in tensors.items():
        array = np.asarray(tensor)
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise WeightsError(
                f"{where}: {name} is {array.dtype}, and weights are floating point."
            )
        # A sum is one number, and NaN and infinity stay in it; an array of answers would
        # take a quarter of the memory again.
        with np.errstate(invalid="ignore", over="ignore"):
            whole = np.isfinite(np.sum(array, dtype=np.float64))
        if not whole and not np.isfinite(array.astype(np.float64)).all():
            raise WeightsError(
                f"{where}: {name} holds numbers that are infinite or NaN. Was it "
                "written when training had failed?"
            )


def check_variant(path: Path, given: str | None, expected: tuple[str, ...]) -> None:
    """Raises WeightsError if another variant was asked for than the file can be."""
    if given is not None and given not in expected:
        raise WeightsError(
            f"{path} holds weights of variant {' or '.join(expected)}; got "
            f"variant={given!r}."
        )


def not_of_format(path: Path, what: str, why: object) -> WeightsError:
    """The error for a file of another format, with how it begins."""
    with open(path, "rb") as file:
        start = file.read(16)
    reason = (str(why).strip().splitlines() or ["no reason given"])[0]
    return WeightsError(
        f"{path} ({os.path.getsize(path):,} bytes, beginning with {start!r}) is no "
        f"{what} that can be read: {reason[:300].rstrip('.')}. Was it downloaded whole?"
    )


def some(names: list[str]) -> str:
    """The first few, and how many more."""
    rest = len(names) - MOST_NAMED
    more = f" and {rest} more" if rest > 0 else ""
    return ", ".join(names[:MOST_NAMED]) + more
