"""Read weights of Caffe, torchvision and alexnet_jax; write .safetensors and .onnx.

weights = pretrained.read_weights("bvlc_alexnet.caffemodel")
pretrained.save_safetensors("alexnet.safetensors", weights)
pretrained.export_onnx("alexnet.onnx", weights.make_model(), weights.variables)
"""

from alexnet_jax.models.weights.files import (
    SUFFIXES,
    Weights,
    WeightsError,
    read_weights,
)
from alexnet_jax.models.weights.onnx import export_onnx
from alexnet_jax.models.weights.safetensors import NAMES, save_safetensors

__all__ = [
    "NAMES",
    "SUFFIXES",
    "Weights",
    "WeightsError",
    "export_onnx",
    "read_weights",
    "save_safetensors",
]
