"""Caffe's `.caffemodel`: bvlc_alexnet, CaffeNet, and networks fine-tuned from them.

The file is one protocol buffer message. Only the names and blobs of the layers are declared here;
the parser skips the rest. Names and field numbers are those of `src/caffe/proto/caffe.proto`
(BVLC/caffe). Files from before 2015 have `layers` instead of `layer`, and four numbers instead of
a shape.
"""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from alexnet_jax.models import variants
from alexnet_jax.models.weights import files
from alexnet_jax.models.weights.files import Weights, WeightsError

VARIANTS = ("caffe", "caffenet")
# ImageNet's mean colour, RGB, in Caffe's examples (there rounded, in the order BGR).
MEAN_255 = (122.67891434, 116.66876762, 104.00698793)
# message -> field -> (number, type[, message]); "*" marks a repeated field. Packed numbers and
# bytes have the same encoding: declared as bytes, sixty million weights are read as one array.
# fmt: off
_MESSAGES: dict[str, dict[str, tuple[Any, ...]]] = {
    "BlobShape": {"dim": (1, "int64*")},
    "BlobProto": {
        "num": (1, "int64"), "channels": (2, "int64"),
        "height": (3, "int64"), "width": (4, "int64"),
        "data": (5, "bytes*"),
        "shape": (7, "message", "BlobShape"),
    },
    "LayerParameter": {"name": (1, "string"), "blobs": (7, "message*", "BlobProto")},
    "V1LayerParameter": {"name": (4, "string"), "blobs": (6, "message*", "BlobProto")},
    "NetParameter": {
        "layers": (2, "message*", "V1LayerParameter"),
        "layer": (100, "message*", "LayerParameter"),
    },
}
# fmt: on


@cache
def messages() -> dict[str, Any]:
    """Return the message classes by name."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    package = "alexnet_jax.caffe"
    file = descriptor_pb2.FileDescriptorProto(
        name="alexnet_jax/caffe.proto", package=package, syntax="proto2"
    )
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, (number, kind, *of) in fields.items():
            label = "LABEL_REPEATED" if kind.endswith("*") else "LABEL_OPTIONAL"
            added = message.field.add(name=field, number=number)
            added.type = added.Type.Value(f"TYPE_{kind.rstrip('*').upper()}")
            added.label = added.Label.Value(label)
            if of:
                added.type_name = f".{package}.{of[0]}"
            elif kind == "int64*":
                added.options.packed = True
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found = pool.FindFileByName(file.name).message_types_by_name
    return {name: message_factory.GetMessageClass(found[name]) for name in _MESSAGES}


def read(path: Path, variant: str | None) -> Weights:
    """Read a `.caffemodel`; arguments, result and errors are those of `read_weights`."""
    files.check_variant(path, variant, VARIANTS)
    layers = _read_layers(path)
    table = variants.get(_variant(path, [name for name, _ in layers], variant))
    classifier = table.layers[-1].name
    blobs_by_layer = files.renamed(
        path,
        [(name, blobs) for name, blobs in layers if blobs],
        # Fine-tuned networks name their classifier fc8_flickr, for example.
        lambda name: classifier if name.startswith(classifier) else name,
    )
    ranks = {row.name: 2 if row in table.denses else 4 for row in table.layers}
    tensors = {}
    for layer, blobs in blobs_by_layer.items():
        for i, blob in enumerate(blobs):
            # Until 2015 all blobs had four dimensions, the first of them ones.
            rank = 1 if i else ranks.get(layer, 4)
            while blob.ndim > rank and blob.shape[0] == 1:
                blob = blob[0]
            tensors[f"{layer} blob {i}"] = blob
    names = {row.name: (f"{row.name} blob 0", f"{row.name} blob 1") for row in table.layers}
    weights = files.from_foreign(path, table, tensors, names, np.array(MEAN_255, np.float32))
    first = weights.variables["params"][table.layers[0].name]
    first["kernel"] = first["kernel"][:, :, ::-1]  # from BGR, OpenCV's order
    return weights


def _read_layers(path: Path) -> list[tuple[str, list[np.ndarray]]]:
    """Return (name, blobs) of every layer, in the order of the file."""
    from google.protobuf.message import DecodeError

    net = messages()["NetParameter"]()
    try:
        net.ParseFromString(path.read_bytes())
        layers = [
            (layer.name, [_array(blob) for blob in layer.blobs])
            for layer in (*net.layers, *net.layer)
        ]
    except (DecodeError, ValueError) as error:
        raise files.not_of_format(path, ".caffemodel", error) from error
    if not any(blobs for _, blobs in layers):
        raise files.not_of_format(path, ".caffemodel", "no layer has weights")
    return layers


def _array(blob: Any) -> np.ndarray:
    """Return a blob as float32."""
    values = np.frombuffer(b"".join(blob.data), "<f4")
    if blob.HasField("shape"):
        return values.reshape(tuple(blob.shape.dim))
    return values.reshape(blob.num, blob.channels, blob.height, blob.width)


def _variant(path: Path, names: list[str], given: str | None) -> str:
    """Return the variant of a file: CaffeNet pools before it normalises."""
    if "norm1" in names and "pool1" in names:
        pools_first = names.index("pool1") < names.index("norm1")
        found = "caffenet" if pools_first else "caffe"
        files.check_variant(path, given, (found,))
        return found
    if given is None:
        raise WeightsError(
            f"{path} does not say whether its network is bvlc_alexnet or CaffeNet; give "
            "variant='caffe' or variant='caffenet' to load, or write a file that does: "
            f"python -m alexnet_jax.export --variant=caffe --workdir={path} --out=FILE.safetensors."
        )
    return given
