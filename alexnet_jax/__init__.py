"""AlexNet (Krizhevsky, Sutskever and Hinton 2012) in JAX and Flax.

model = alexnet_jax.create_model("paper")
model, variables, preprocess = alexnet_jax.load("runs/quickstart")
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alexnet_jax.models.alexnet import AlexNet, create_model
    from alexnet_jax.models.ops import jit
    from alexnet_jax.models.weights.safetensors import save
    from alexnet_jax.training.experiment import pipeline
    from alexnet_jax.training.load import load

__all__ = ["AlexNet", "create_model", "jit", "load", "pipeline", "save"]

_HOMES = {
    "AlexNet": "models.alexnet",
    "create_model": "models.alexnet",
    "jit": "models.ops",
    "load": "training.load",
    "pipeline": "training.experiment",
    "save": "models.weights.safetensors",
}


def __getattr__(name: str) -> Any:
    """Import on first use: processes that only decode images need no JAX."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    return getattr(home, name)
