"""torch's files: tensors by name, and nothing else."""

from pathlib import Path
from typing import Any

import numpy as np

from alexnet_jax.pretrained import files
from alexnet_jax.pretrained.files import WeightsError

# Under which names training programs keep the state_dict in a checkpoint.
_STATE_KEYS = ("state_dict", "model_state_dict", "model", "net")


def read_state(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a `.pth`, float32; never through plain pickle.

    Raises:
      WeightsError: for anything but a dictionary of floating-point tensors, and if torch
        is not installed.
    """
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise WeightsError(
            f"reading {path} needs torch: pip install torch (or write it as "
            ".safetensors where torch is installed)."
        ) from error
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle's and torch's own are many
        # Not torch's own words, which advise to read it by plain pickle.
        why = (
            "torch.load with weights_only=True does not read it; expected a state_dict, "
            "torch.save(model.state_dict(), PATH)"
        )
        raise files.not_of_format(path, ".pth", why) from error
    checkpoint = found if isinstance(found, dict) else {}
    keys = [key for key in _STATE_KEYS if isinstance(checkpoint.get(key), dict)]
    if len(keys) > 1:
        raise WeightsError(
            f"{path} holds a dictionary under each of the keys {', '.join(keys)}. Write a "
            "file with the state_dict alone: torch.save(model.state_dict(), PATH)."
        )
    state = {
        name: value
        for name, value in (checkpoint[keys[0]] if keys else checkpoint).items()
        if not files.is_counter(name)
    }
    others = [
        name
        for name, value in state.items()
        if not isinstance(value, torch.Tensor) or not value.is_floating_point()
    ]
    if others or not isinstance(found, dict):
        what = f"no floating-point tensor is under its keys {files.some(others)}"
        raise WeightsError(
            f"{path} holds no state_dict: {what if others else 'it is no dictionary'}. "
            "Expected that of torchvision's AlexNet, alone or under one of the keys "
            f"{', '.join(_STATE_KEYS)}: torch.save(model.state_dict(), PATH)."
        )
    return {name: value.detach().float().numpy() for name, value in state.items()}
