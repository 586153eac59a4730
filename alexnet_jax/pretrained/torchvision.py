"""torchvision's AlexNet, variant `owt`: its names, its layout, its scale.

torchvision divides pictures by 255, subtracts a mean colour and divides by a standard
deviation a channel (`transforms.Normalize`); ours are 0..255 minus a mean. The factor
between the two, 255 times the standard deviation, goes into the first kernel: zeros
around the picture are the mean colour in both, so that this is exact.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from alexnet_jax import variants
from alexnet_jax.pretrained import files, torch_files
from alexnet_jax.pretrained.files import Weights, WeightsError

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
PARTS = ("features", "classifier")
# Prefixes that DataParallel and torch.compile put before the names of a module.
_WRAPPERS = ("module", "_orig_mod")
# Settings that say nothing about what a trained network computes.
_HARMLESS = ("num_classes", "width", "dtype", "init", "dropout")


def read(path: Path, variant: str | None) -> Weights:
    """Reads a `.pth`; arguments, result and errors as `read_weights`."""
    files.check_variant(path, variant, (VARIANT,))
    state = torch_files.read_state(path)
    files.check_numbers(path, state)
    return from_state(path, state)


def own_name(name: str) -> str:
    """Return a tensor's name in torchvision's AlexNet, without what wraps the network.

    "model._orig_mod.features.module.0.weight" -> "features.0.weight".
    """
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    start = max((i for i, part in enumerate(parts) if part in PARTS), default=0)
    return ".".join(parts[start:])


def from_state(
    path: Path,
    state: Mapping[str, np.ndarray],
    *,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> Weights:
    """Weights from torchvision's tensors by name.

    Args:
      path: where they are from, for messages.
      state: what `AlexNet.state_dict()` gives, as NumPy arrays; the names may have any
        prefix (`own_name`).
      mean, std: what `transforms.Normalize` is given.

    Raises:
      WeightsError: naming tensors that are missing, unexpected or of another shape, or
        two that differ in their prefix only.
    """
    state = files.renamed(path, state.items(), own_name)
    table = variants.get(VARIANT)
    names = {row: (f"{name}.weight", f"{name}.bias") for row, name in _NAMES.items()}
    features = files.found_features(state, names)
    classifier = table.layers[-1]
    settings = {
        "variant": VARIANT,
        "num_classes": features.get(classifier.name, classifier.features),
        "width": files.fitting_width(table, features),
    }
    model = files.make_model(settings)
    found = {name: np.shape(array) for name, array in state.items()}
    expected = _expected(files.shapes_of(model, table.crop_size))
    files.check_shapes(path, "torchvision's AlexNet", found, expected)

    def tensors(layer: str) -> tuple[np.ndarray, np.ndarray]:
        weight = state[f"{_NAMES[layer]}.weight"]
        if layer == table.layers[0].name:
            weight = weight / (255 * np.array(std, np.float32)[:, None, None])
        return weight, state[f"{_NAMES[layer]}.bias"]

    return Weights(
        settings=settings,
        variables=files.params_of(model.network.layers, tensors),
        mean=(255 * np.array(mean)).astype(np.float32),
        image_size=IMAGE_SIZE,
        crop_size=table.crop_size,
        class_names=files.class_names(settings["num_classes"]),
    )


def to_state(weights: Weights) -> dict[str, np.ndarray]:
    """The tensors that torchvision's `AlexNet.load_state_dict` takes; float32.

    Raises:
      WeightsError: if the network is not torchvision's.
    """
    network = weights.make_model().network
    changed = [
        name
        for name, value in weights.settings.items()
        if value is not None and name not in ("variant", *_HARMLESS)
    ]
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
        weight = files.channels_first(kernel, channels)
        if channels == 3:
            weight = weight * (255 * np.array(STD, np.float32)[:, None, None])
        state[f"{_NAMES[row.name]}.weight"] = weight
        state[f"{_NAMES[row.name]}.bias"] = np.asarray(leaves["bias"], np.float32)
        channels = row.features
    return state


def _expected(shapes: files.Shapes) -> dict[str, tuple[int, ...]]:
    expected = {}
    for row, name in _NAMES.items():
        kernel = shapes[f"params/{row}/kernel"]
        expected[f"{name}.weight"] = files.first_shape(kernel)
        expected[f"{name}.bias"] = kernel[-1:]
    return expected
