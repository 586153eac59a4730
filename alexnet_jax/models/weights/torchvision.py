"""torchvision's AlexNet, variant `owt`: its `.pth` files, tensor names and scale.

torchvision divides images by 255, subtracts a mean colour and divides by a standard
deviation per channel (`transforms.Normalize`). Images here are 0..255 minus a mean. The
first kernel absorbs the factor between the two, 255 times the standard deviation. This
is exact: the zero padding around an image is the mean colour in both.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alexnet_jax.models import variants
from alexnet_jax.models.weights import files
from alexnet_jax.models.weights.files import Weights, WeightsError

VARIANT = "owt"
# Arguments of `transforms.Normalize` for torchvision's published weights.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
PARTS = ("features", "classifier")
_MODULES = {
    **{f"conv{i}": f"features.{at}" for i, at in enumerate((0, 3, 6, 8, 10), start=1)},
    **{f"fc{i}": f"classifier.{at}" for i, at in enumerate((1, 4, 6), start=6)},
}
_NAMES = {row: (f"{at}.weight", f"{at}.bias") for row, at in _MODULES.items()}
# Prefixes that DataParallel and torch.compile put before the names of a module.
_WRAPPERS = ("module", "_orig_mod")
# Keys under which training programs keep the state_dict in a checkpoint.
_STATE_KEYS = ("state_dict", "model_state_dict", "model", "net")
# Settings that do not change what a trained network computes.
_HARMLESS = ("variant", "num_classes", "width", "dtype", "init", "dropout")


def read(path: Path, variant: str | None) -> Weights:
    """Read a `.pth`, which may hold a checkpoint; nothing in the file is run.

    Arguments, result and errors are those of `read_weights`.
    """
    files.check_variant(path, variant, (VARIANT,))
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise WeightsError(
            f"reading {path} needs torch: pip install torch (or write it as "
            ".safetensors where torch is installed)."
        ) from error
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's message advises weights_only=False
        why = (
            "torch.load with weights_only=True does not read it; expected a state_dict, "
            "torch.save(model.state_dict(), PATH)"
        )
        raise files.not_of_format(path, ".pth", why) from error
    state = found if isinstance(found, dict) else {}
    keys = [key for key in _STATE_KEYS if isinstance(state.get(key), dict)]
    if len(keys) > 1:
        raise WeightsError(
            f"{path} holds a dictionary under each of the keys {', '.join(keys)}. Write a "
            "file with the state_dict alone: torch.save(model.state_dict(), PATH)."
        )
    if keys:
        state = state[keys[0]]
    arrays = {
        name: value.detach().float().numpy()
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    }
    if not arrays:
        raise WeightsError(
            f"{path} holds no state_dict. Expected that of torchvision's AlexNet, alone or "
            f"under one of the keys {', '.join(_STATE_KEYS)}: "
            "torch.save(model.state_dict(), PATH)."
        )
    files.check_finite(path, arrays)
    return from_state(path, arrays)


def own_name(name: str) -> str:
    """Return a tensor's name in torchvision's AlexNet, without the wrappers' prefixes.

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
    """Return the weights of a state_dict.

    Args:
      path: file of the tensors, for messages.
      state: `AlexNet.state_dict()` as NumPy arrays; names may have prefixes (`own_name`).
      mean, std: arguments of `transforms.Normalize`.

    Raises:
      WeightsError: for missing, unexpected and misshapen tensors, and for two tensors
        that differ only in their prefix.
    """
    return files.from_foreign(
        path,
        "torchvision's AlexNet",
        variants.get(VARIANT),
        files.renamed(path, state.items(), own_name),
        _NAMES,
        first=lambda weight: weight / _scale(std),
        mean=(255 * np.array(mean)).astype(np.float32),
    )


def to_state(weights: Weights) -> dict[str, np.ndarray]:
    """Return the float32 tensors that torchvision's `AlexNet.load_state_dict` takes.

    Raises:
      WeightsError: if the network is not torchvision's.
    """
    network = weights.make_model().network
    changed = [
        name
        for name, value in weights.settings.items()
        if value is not None and name not in _HARMLESS
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
        if row is network.layers[0]:
            weight = weight * _scale(STD)
        bias = np.asarray(leaves["bias"], np.float32)
        state |= dict(zip(_NAMES[row.name], (weight, bias), strict=True))
        channels = row.features
    return state


def _scale(std: Sequence[float]) -> np.ndarray:
    """Return the factor on the first weight, [3, 1, 1]: 255 times the deviation."""
    return 255 * np.array(std, np.float32)[:, None, None]
