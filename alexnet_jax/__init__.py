"""AlexNet (Krizhevsky, Sutskever and Hinton 2012) in JAX and Flax.

model = alexnet_jax.create_model("paper")
model, variables, preprocess = alexnet_jax.load("runs/quickstart")
"""

from alexnet_jax.experiment import load, pipeline
from alexnet_jax.model import AlexNet, create_model

__all__ = ["AlexNet", "create_model", "load", "pipeline"]
