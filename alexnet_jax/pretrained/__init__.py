"""Weights in files: from Caffe, torchvision and our own, and to ONNX.

weights = pretrained.read_weights("bvlc_alexnet.caffemodel")
pretrained.save_safetensors("alexnet.safetensors", weights)
pretrained.export_onnx("alexnet.onnx", weights.make_model(), weights.variables)

`files` has what a file holds and how foreign kernels become ours, `reading` finds the
format, `caffe`, `torchvision` and `safetensors` are one format each, and
`onnx` writes networks as ONNX.
"""

from alexnet_jax.pretrained.files import Weights, WeightsError
from alexnet_jax.pretrained.onnx import export_onnx
from alexnet_jax.pretrained.reading import SUFFIXES, read_weights
from alexnet_jax.pretrained.safetensors import NAMES, save_safetensors

__all__ = [
    "NAMES",
    "SUFFIXES",
    "Weights",
    "WeightsError",
    "export_onnx",
    "read_weights",
    "save_safetensors",
]
