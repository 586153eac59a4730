"""torchvision's AlexNet, variant `owt`: its `.pth` files, tensor names and scale.

torchvision divides images by 255, subtracts a mean colour and divides by a standard deviation per
channel (`transforms.Normalize`). Images here are 0..255 minus a mean. The first kernel absorbs
the factor between the two, 255 times the standard deviation. This is exact: the zero padding
around an image is the mean colour in both.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from alexnet_jax.models import variants
from alexnet_jax.models.weights import files
from alexnet_jax.models.weights.files import Weights, WeightsError

VARIANT = "owt"
# Arguments of `transforms.Normalize` for torchvision's published weights.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
_MODULES = {
    **{f"conv{i}": f"features.{at}" for i, at in enumerate((0, 3, 6, 8, 10), start=1)},
    **{f"fc{i}": f"classifier.{at}" for i, at in enumerate((1, 4, 6), start=6)},
}
_NAMES = {row: (f"{at}.weight", f"{at}.bias") for row, at in _MODULES.items()}
# Prefixes that DataParallel and torch.compile put before the names of a module.
_WRAPPERS = ("module", "_orig_mod")
# Settings that do not change what a trained network computes, and its size.
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
            f"reading {path} needs torch: pip install torch (or write it as .safetensors where "
            "torch is installed)."
        ) from error
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's message advises weights_only=False
        why = (
            "torch.load with weights_only=True does not read it; expected a state_dict, "
            "torch.save(model.state_dict(), PATH)"
        )
        raise files.not_of_format(path, ".pth", why) from error
    # Training programs keep the state_dict beside an optimiser's, under a key of their own.
    tensors: dict[Any, Any] = dict(flatten_dict(found)) if isinstance(found, dict) else {}
    arrays = {}
    for keys, value in tensors.items():
        name = ".".join(map(str, keys))
        if is_own(name) and isinstance(value, torch.Tensor) and value.is_floating_point():
            arrays[name] = value.detach().float().numpy()
    if not arrays:
        raise WeightsError(
            f"{path} holds no state_dict of torchvision's AlexNet. Write one with "
            "torch.save(model.state_dict(), PATH)."
        )
    return from_state(path, arrays)


def own_name(name: str) -> str:
    """Return a tensor's name in torchvision's AlexNet, without the wrappers' prefixes.

    "model._orig_mod.features.module.0.weight" -> "features.0.weight".
    """
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    starts = [i for i, part in enumerate(parts) if part in ("features", "classifier")]
    return ".".join(parts[max(starts, default=0) :])


def is_own(name: str) -> bool:
    """Return True for the name of a tensor of torchvision's AlexNet."""
    return own_name(name).startswith(("features.", "classifier."))


def from_state(
    path: Path,
    state: Mapping[str, np.ndarray],
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> Weights:
    """Return the weights of `AlexNet.state_dict()`, whose names may have prefixes (`own_name`).

    Mean and deviation are the arguments of `transforms.Normalize`. Raise WeightsError for missing,
    unexpected and misshapen tensors, and for two tensors that differ only in their prefix.
    """
    tensors = files.renamed(path, state.items(), own_name)
    colour = (255 * np.array(mean)).astype(np.float32)
    weights = files.from_foreign(path, variants.get(VARIANT), tensors, _NAMES, colour)
    first = weights.variables["params"]["conv1"]
    first["kernel"] = first["kernel"] / _scale(std)
    return weights


def to_state(weights: Weights) -> dict[str, np.ndarray]:
    """Return the float32 tensors that torchvision's `AlexNet.load_state_dict` takes.

    Raises:
      WeightsError: if the network is not torchvision's.
    """
    settings = {k: v for k, v in weights.settings.items() if v is not None}
    changed = [name for name in settings if name not in _HARMLESS]
    if settings["variant"] != VARIANT or changed:
        with_them = f" with {', '.join(changed)} changed" if changed else ""
        raise WeightsError(
            f"torchvision has no network like variant {settings['variant']}{with_them}; "
            f"names='torchvision' is for {VARIANT}. Leave names out: alexnet_jax.load reads any "
            "variant."
        )
    state: dict[str, np.ndarray] = {}
    channels = 3
    for row in weights.make_model().network.layers:
        leaves = weights.variables["params"][row.name]
        kernel, bias = (np.asarray(leaves[name], np.float32) for name in ("kernel", "bias"))
        if row.name == "conv1":
            kernel = kernel * _scale(STD)
        weight, channels = files.channels_first(kernel, channels), row.features
        state |= dict(zip(_NAMES[row.name], (weight, bias), strict=True))
    return state


def _scale(std: Sequence[float]) -> np.ndarray:
    """Return the factor on the channels of the first kernel, [3, 1]: 255 times the deviation."""
    return 255 * np.array(std, np.float32)[:, None]
