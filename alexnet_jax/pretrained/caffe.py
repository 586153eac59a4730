"""Caffe's `.caffemodel`: bvlc_alexnet, CaffeNet, and what was fine-tuned from them.

A message of protocol buffers, of which only the layers' names and blobs are declared
here; parsers skip the rest. Field numbers and names are those of Caffe's
`src/caffe/proto/caffe.proto` (BVLC/caffe), which also says that files from before
2015 have `layers` instead of `layer`, and four numbers instead of a shape.
"""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from alexnet_jax import variants
from alexnet_jax.layers import Variant
from alexnet_jax.pretrained import files
from alexnet_jax.pretrained.files import Weights, WeightsError

VARIANTS = ("caffe", "caffenet")
# Of ImageNet's pictures in Caffe's own examples (104, 117, 123 in its order, BGR).
MEAN_255 = (122.67891434, 116.66876762, 104.00698793)
IMAGE_SIZE = 256
# message -> field -> (number, type[, of which message]); "*" is a repeated one.
# Numbers are packed, which on the wire is what bytes are: declared as bytes, sixty
# million of them are one array, not as many Python numbers.
_MESSAGES: dict[str, dict[str, tuple[Any, ...]]] = {
    "BlobShape": {"dim": (1, "int64*")},
    "BlobProto": {
        "num": (1, "int64"),
        "channels": (2, "int64"),
        "height": (3, "int64"),
        "width": (4, "int64"),
        "data": (5, "bytes*"),
        "shape": (7, "message", "BlobShape"),
        "double_data": (8, "bytes*"),
    },
    "LayerParameter": {
        "name": (1, "string"),
        "blobs": (7, "message*", "BlobProto"),
    },
    "V1LayerParameter": {
        "name": (4, "string"),
        "blobs": (6, "message*", "BlobProto"),
    },
    "NetParameter": {
        "layers": (2, "message*", "V1LayerParameter"),
        "layer": (100, "message*", "LayerParameter"),
    },
}


@cache
def messages() -> dict[str, Any]:
    """The classes of the messages by name."""
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
    """Reads a `.caffemodel`; arguments, result and errors as `read_weights`."""
    files.check_variant(path, variant, VARIANTS)
    layers = _read_layers(path)
    variant = _variant(path, [name for name, _ in layers], variant)
    table = variants.get(variant)
    classifier = table.layers[-1].name
    blobs_by_layer = files.renamed(
        path,
        [(name, blobs) for name, blobs in layers if blobs],
        # Fine-tuned networks call their classifier fc8_flickr and the like.
        lambda name: classifier if name.startswith(classifier) else name,
    )
    tensors = {
        f"{layer} blob {i}": _squeezed(blob, layer, i, table)
        for layer, blobs in blobs_by_layer.items()
        for i, blob in enumerate(blobs)
    }
    rows = [row.name for row in table.layers]
    names = {row: (f"{row} blob 0", f"{row} blob 1") for row in rows}
    features = files.found_features(tensors, names)
    settings = {
        "variant": variant,
        "num_classes": features.get(classifier, table.layers[-1].features),
        "width": files.fitting_width(table, features),
    }
    return Weights(
        settings=settings,
        variables=_variables(path, settings, table, tensors),
        mean=np.array(MEAN_255, np.float32),
        image_size=IMAGE_SIZE,
        crop_size=table.crop_size,
        class_names=files.class_names(settings["num_classes"]),
    )


def _read_layers(path: Path) -> list[tuple[str, list[np.ndarray]]]:
    """Name and blobs of every layer, those without blobs too, in the file's order."""
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
    """Float32, in the shape that the file says."""
    if blob.double_data:
        values = np.frombuffer(b"".join(blob.double_data), "<f8").astype(np.float32)
    else:
        values = np.frombuffer(b"".join(blob.data), "<f4")
    shape = (blob.num, blob.channels, blob.height, blob.width)
    if blob.HasField("shape"):
        shape = tuple(blob.shape.dim)
    return values.reshape(shape)


def _squeezed(blob: np.ndarray, layer: str, index: int, table: Variant) -> np.ndarray:
    """Without the leading ones that made everything four-dimensional until 2015."""
    dense = layer in {row.name for row in table.denses}
    rank = 1 if index else 2 if dense else 4
    while blob.ndim > rank and blob.shape[0] == 1:
        blob = blob[0]
    return blob


def _variant(path: Path, names: list[str], given: str | None) -> str:
    """CaffeNet pools before it normalises; otherwise the two are the same."""
    if "norm1" not in names or "pool1" not in names:
        if given is None:
            raise WeightsError(
                f"{path} does not say whether its network is bvlc_alexnet or CaffeNet; "
                "give variant='caffe' or variant='caffenet' to load; or make a file that "
                "says it: python -m alexnet_jax.export --variant=caffe "
                f"--workdir={path} --out=FILE.safetensors."
            )
        return given
    pools_first = names.index("pool1") < names.index("norm1")
    found = "caffenet" if pools_first else "caffe"
    files.check_variant(path, given, (found,))
    return found


def _variables(
    path: Path,
    settings: dict[str, Any],
    table: Variant,
    tensors: dict[str, np.ndarray],
) -> dict[str, Any]:
    """Ours, of RGB; checked."""
    model = files.make_model(settings)
    shapes = files.shapes_of(model, table.crop_size)
    expected = {}
    for row in table.layers:
        kernel = shapes[f"params/{row.name}/kernel"]
        expected[f"{row.name} blob 0"] = files.first_shape(kernel)
        expected[f"{row.name} blob 1"] = kernel[-1:]
    found = {name: array.shape for name, array in tensors.items()}
    what = f"the tensors of variant {table.name}"
    files.check_shapes(path, what, found, expected)
    files.check_numbers(path, tensors)

    def blobs(layer: str) -> tuple[np.ndarray, np.ndarray]:
        weight = tensors[f"{layer} blob 0"]
        if layer == table.layers[0].name:
            weight = weight[:, ::-1]  # BGR, as OpenCV reads pictures
        return weight, tensors[f"{layer} blob 1"]

    return files.params_of(model.network.layers, blobs)
