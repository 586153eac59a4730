"""AlexNet (Krizhevsky, Sutskever and Hinton 2012) in JAX and Flax.

model = alexnet_jax.create_model("paper")
model, variables, preprocess = alexnet_jax.load("runs/quickstart")
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alexnet_jax.alexnet import AlexNet, create_model
    from alexnet_jax.experiment import pipeline
    from alexnet_jax.loading import load
    from alexnet_jax.ops import jit

__all__ = ["AlexNet", "create_model", "jit", "load", "pipeline"]

_HOMES = {
    "AlexNet": "alexnet",
    "create_model": "alexnet",
    "jit": "ops",
    "load": "loading",
    "pipeline": "experiment",
}


def __getattr__(name: str) -> Any:
    """Imports on first use: processes that only decode pictures need no JAX."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    return getattr(home, name)
