"""torchvision's AlexNet, variant `owt`: its names, its layout, its scale.

torchvision divides pictures by 255, subtracts a mean colour and divides by a standard
deviation a channel (`transforms.Normalize`); ours are 0..255 minus a mean. The factor
between the two, 255 times the standard deviation, goes into the first kernel: zeros
around the picture are the mean colour in both, so that this is exact.
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from alexnet_jax import kinds, variants
from alexnet_jax.pretrained import weights as weights_lib
from alexnet_jax.pretrained.weights import Weights, WeightsError

VARIANT = "owt"
IMAGE_SIZE = 256
# What `transforms.Normalize` is given with torchvision's published weights.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
_NAMES = {
    "conv1": "features.0",
    "conv2": "features.3",
    "conv3": "features.6",
    "conv4": "features.8",
    "conv5": "features.10",
    "fc6": "classifier.1",
    "fc7": "classifier.4",
    "fc8": "classifier.6",
}
# Settings that say nothing about what a trained network computes.
_HARMLESS = ("num_classes", "width", "dtype", "init", "dropout")


def read(path: Path, variant: str | None) -> Weights:
    """Reads a `.pth`; arguments, result and errors as `read_weights`."""
    weights_lib.check_variant(path, variant, (VARIANT,))
    return from_state(path, _read_state(path))


def from_state(
    path: Path,
    state: Mapping[str, np.ndarray],
    *,
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
) -> Weights:
    """Weights from torchvision's tensors by name.

    Args:
      path: where they are from, for messages.
      state: what `AlexNet.state_dict()` gives, as NumPy arrays.
      mean, std: what `transforms.Normalize` is given.

    Raises:
      WeightsError: naming tensors that are missing, unexpected or of another shape.
    """
    table = variants.get(VARIANT)
    names = {row: (f"{name}.weight", f"{name}.bias") for row, name in _NAMES.items()}
    features = weights_lib.found_features(state, names)
    classifier = table.layers[-1]
    settings = {
        "variant": VARIANT,
        "num_classes": features.get(classifier.name) or classifier.features,
        "width": weights_lib.fitting_width(table, features),
    }
    model = weights_lib.model_of(path, settings)
    found = {name: np.shape(array) for name, array in state.items()}
    expected = _expected(weights_lib.shapes_of(model, table.crop_size))
    weights_lib.check_shapes(path, "torchvision's AlexNet", found, expected)

    def tensors(layer: str) -> tuple[np.ndarray, np.ndarray]:
        weight = state[f"{_NAMES[layer]}.weight"]
        if layer == table.layers[0].name:
            weight = weight / (255 * np.array(std, np.float32)[:, None, None])
        return weight, state[f"{_NAMES[layer]}.bias"]

    with np.errstate(over="ignore"):  # of a deviation of nearly nothing
        variables = weights_lib.params_of(model.network.layers, tensors)
    weights_lib.check_numbers(path, weights_lib.flat(variables))
    return Weights(
        settings=settings,
        variables=variables,
        mean=(255 * np.array(mean)).astype(np.float32),
        image_size=IMAGE_SIZE,
        crop_size=table.crop_size,
        class_names=weights_lib.class_names(settings["num_classes"]),
    )


def to_state(weights: Weights) -> dict[str, np.ndarray]:
    """The tensors that torchvision's `AlexNet.load_state_dict` takes; float32.

    Raises:
      WeightsError: if the network is not torchvision's.
    """
    network = weights.make_model().network
    changed = changed_settings(weights.settings)
    if network.name != VARIANT or changed:
        with_them = f" with {', '.join(changed)} changed" if changed else ""
        raise WeightsError(
            f"torchvision has no network like variant {network.name}{with_them}; "
            f"names='torchvision' is for {VARIANT}."
        )
    state: dict[str, np.ndarray] = {}
    channels = 3
    for row in network.layers:
        leaves = weights.variables["params"][row.name]
        kernel = np.asarray(leaves["kernel"], np.float32)
        weight = weights_lib.channels_first(kernel, channels)
        if channels == 3:
            weight = weight * (255 * np.array(STD, np.float32)[:, None, None])
        state[f"{_NAMES[row.name]}.weight"] = weight
        state[f"{_NAMES[row.name]}.bias"] = np.asarray(leaves["bias"], np.float32)
        channels = row.features
    return state


def changed_settings(settings: Mapping[str, Any]) -> list[str]:
    """The settings that torchvision's network does not have, whatever its width."""
    return [
        name
        for name, value in settings.items()
        if value is not None and name not in ("variant", *_HARMLESS)
    ]


def _expected(shapes: weights_lib.Shapes) -> dict[str, tuple[int, ...]]:
    expected = {}
    for row, name in _NAMES.items():
        kernel = shapes[f"params/{row}/kernel"]
        expected[f"{name}.weight"] = weights_lib.first_shape(kernel)
        expected[f"{name}.bias"] = kernel[-1:]
    return expected


def _read_state(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a `.pth`, by torchvision's names; never through plain pickle."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise WeightsError(
            f"reading {path} needs torch: pip install torch (or write it as "
            ".safetensors where torch is installed)."
        ) from error
    _check_archive(path)
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle's, zipfile's and torch's own are many
        if "GLOBAL" in str(error):
            raise WeightsError(
                f"{path} is refused: it holds more than tensors, which could run "
                "code (torch.load with weights_only=True). Expected the state_dict of "
                "torchvision's AlexNet: torch.save(model.state_dict(), PATH)."
            ) from error
        # Not torch's own words, which advise to read it by plain pickle.
        why = "torch.load with weights_only=True does not read it"
        raise weights_lib.not_of_format(path, ".pth", why) from error
    if isinstance(found, dict) and "state_dict" in found:
        found = found["state_dict"]  # as pytorch/examples keeps it
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor)
        for name, value in found.items()
    ):
        raise WeightsError(
            f"{path} holds no state_dict. Expected that of torchvision's AlexNet: "
            "torch.save(model.state_dict(), PATH)."
        )
    # DataParallel puts "module." before the names of what it wraps.
    return {
        name.replace("module.", ""): value
        for name, value in _arrays(path, found).items()
    }


def _check_archive(path: Path) -> None:
    """Raises WeightsError for a zip file that unpacks to more than its own size.

    torch packs nothing, but would unpack whatever there is, all of it at once.
    """
    if not zipfile.is_zipfile(path):
        return  # of torch before 1.6, where nothing is packed either
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
    except Exception as error:  # zipfile's own are many
        raise weights_lib.not_of_format(path, ".pth", error) from error
    if unpacked > path.stat().st_size:
        why = f"it would unpack to {unpacked:,} bytes"
        raise weights_lib.not_of_format(path, ".pth", why)


def _arrays(path: Path, state: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """torch's tensors as float32.

    Raises:
      WeightsError: for tensors that are not plain floating-point ones, or hold more
        numbers than the file can: views of few numbers can have any shape.
    """
    size, total = path.stat().st_size, 0
    arrays = {}
    for name, value in state.items():
        plain = str(value.layout) == "torch.strided" and value.device.type == "cpu"
        if not plain or not value.is_floating_point():
            raise WeightsError(
                f"{path}: {kinds.shown(name)} is {value.dtype} on {value.device.type}, "
                f"{value.layout}; weights are plain floating-point tensors."
            )
        total += value.numel() * value.element_size()
        if total > size:
            raise WeightsError(
                f"{path} is no state_dict: its tensors would have at least {total:,} "
                f"bytes, the file has {size:,}."
            )
        try:
            arrays[name] = value.detach().float().numpy()
        except (RuntimeError, TypeError) as error:  # some tensors hold no numbers
            raise WeightsError(
                f"{path}: {kinds.shown(name)} cannot be read: {error}"
            ) from error
    return arrays
