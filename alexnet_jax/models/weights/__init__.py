"""Trained networks in files.

`files` has what every format shares, and `read_weights` for all of them. `safetensors`
and `onnx` write a network; `caffe` and `torchvision` know the files of other programs.
The formats are imported where they are used.
"""

from alexnet_jax.models.weights.files import SUFFIXES, Weights, WeightsError, read_weights

__all__ = ["SUFFIXES", "Weights", "WeightsError", "read_weights"]
