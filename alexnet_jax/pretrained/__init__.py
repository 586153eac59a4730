"""Weights in files: from Caffe, torchvision and our own, and to ONNX.

weights = pretrained.read_weights("bvlc_alexnet.caffemodel")
pretrained.save_safetensors("alexnet.safetensors", weights)
pretrained.export_onnx("alexnet.onnx", weights.make_model(), weights.variables)

`weights` has what a file holds and how foreign kernels become ours, `reading` finds the
format, `caffe`, `torchvision` and `tensors` (.safetensors) are one format each, and
`onnx_graph` writes networks as ONNX.
"""

from alexnet_jax.pretrained.onnx_graph import export_onnx
from alexnet_jax.pretrained.reading import SUFFIXES, read_weights
from alexnet_jax.pretrained.tensors import NAMES, save_safetensors
from alexnet_jax.pretrained.weights import Weights, WeightsError

__all__ = [
    "NAMES",
    "SUFFIXES",
    "Weights",
    "WeightsError",
    "export_onnx",
    "read_weights",
    "save_safetensors",
]
