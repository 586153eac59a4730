"""Networks as ONNX: real operators, any batch size, our features under our names.

Channels first, as everybody who reads ONNX expects. LRN inside columns is Split, LRN
and Concat; ONNX multiplies the mean of squares, so the paper's alpha goes in times the
window. Windows that hang over an edge are written out as padding, which both pooling
operators leave out of account. cuda-convnet's normalisation within a map is an average
pooling of squares, and a locally connected layer one matrix product a place.
"""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from alexnet_jax.alexnet import AlexNet
from alexnet_jax.data.files import replacing
from alexnet_jax.layers import (
    Activation,
    BatchNorm,
    Conv,
    Dense,
    Dropout,
    Layer,
    Local,
    Lrn,
    Pool,
    Stage,
    Variant,
    WithinMapLrn,
    feature_names,
    stage_name,
)
from alexnet_jax.ops.reference import pooled_length
from alexnet_jax.pretrained import files
from alexnet_jax.pretrained.files import WeightsError
from alexnet_jax.summary import check_image_size

# Of 2022: what is needed is in there, and runtimes of today all read it.
OPSET = 17
IR_VERSION = 8
INPUT, OUTPUT = "images", "logits"
_ACTIVATIONS = {"relu": "Relu", "tanh": "Tanh", "sigmoid": "Sigmoid"}
# flax's BatchNorm, which the model makes without naming it.
_BATCH_NORM_EPSILON = 1e-5


def export_onnx(
    path: str | os.PathLike[str],
    model: AlexNet,
    variables: Mapping[str, Any],
    *,
    mean: np.ndarray | None = None,
    crop_size: int | None = None,
    class_names: Sequence[str] | None = None,
) -> None:
    """Writes a network as ONNX, whole or not at all; needs the package onnx.

    The input is `images`, float32 [batch, 3, S, S], RGB, the batch of any size; the
    output is `logits` [batch, K]. Values inside are named as those of
    `model.apply(..., method="features")`. It computes in float32, as when testing: no
    dropout but the paper's factor, batch norm with its running statistics.

    Args:
      path: the file.
      model: the whole network, as from `create_model` or `load`.
      variables: what `model.apply` takes.
      mean: None: the images are 0..255 minus the mean, as for `model.apply`. Otherwise
        [3], or [side, side, 3] of which the centre counts, RGB, 0..255: the network
        subtracts it itself, and the images are 0..255.
      crop_size: the side S; by default the variant's own.
      class_names: kept in the file's metadata (`class_names`, a JSON list).

    Raises:
      WeightsError: (a ValueError) without the package onnx, for variables of another
        network, or for a mean image that is smaller than S.
      ValueError: for a size that does not give the network's grid.
    """
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise WeightsError(
            'writing ONNX needs onnx: pip install "alexnet_jax[onnx]", or onnx itself.'
        ) from error
    size = crop_size or model.network.crop_size
    check_image_size(model.network, size)
    leaves = files.flat(variables)
    shapes = {name: np.shape(leaf) for name, leaf in leaves.items()}
    expected = files.shapes_of(model, size)
    files.check_shapes(path, "this network", shapes, expected)
    graph = _Graph(size)
    if mean is not None:
        graph.subtract(mean)
    for row in model.network.layers:
        _add_layer(graph, model.network, row, leaves)
    properties = {"variant": model.network.name, "input": _about(mean)}
    if class_names is not None:
        properties["class_names"] = json.dumps(list(class_names))
    whole = _model_proto(graph, model.network, size, properties)
    with replacing(path) as file:
        file.write(whole.SerializeToString())


def _model_proto(
    graph: "_Graph", network: Variant, size: int, properties: dict[str, str]
) -> Any:
    from onnx import helper, numpy_helper

    images = _value(INPUT, ["batch", 3, size, size], properties["input"])
    logits = _value(OUTPUT, ["batch", network.layers[-1].features], "")
    name = f"alexnet_jax {network.name}"
    whole = helper.make_model(
        helper.make_graph(
            graph.nodes,
            name,
            [images],
            [logits],
            [numpy_helper.from_array(a, name) for name, a in graph.constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="alexnet_jax",
    )
    helper.set_model_props(whole, properties)
    return whole


def _about(mean: np.ndarray | None) -> str:
    minus = "the mean is subtracted inside" if mean is not None else "minus the mean"
    return f"RGB, 0..255, {minus}; [batch, 3, height, width]"


def _value(name: str, shape: list[Any], about: str) -> Any:
    from onnx import TensorProto, helper

    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape, about)


class _Graph:
    """Nodes in the making, and the value `x` that the next one reads.

    Attributes:
      nodes: so far.
      constants: arrays by name.
      x: a name. channels, side: its shape, [batch, channels, side, side]; after a
        fully connected layer [batch, channels] and a side of 0.
    """

    def __init__(self, side: int):
        self.nodes: list[Any] = []
        self.constants: dict[str, np.ndarray] = {}
        self.x, self.channels, self.side = INPUT, 3, side

    def add(
        self, kind: str, inputs: Sequence[str], name: str, **attributes: Any
    ) -> str:
        """A node of one output, `name`, which is also its own name."""
        from onnx import helper

        self.nodes.append(helper.make_node(kind, inputs, [name], name, **attributes))
        return name

    def constant(self, name: str, values: Any, dtype: Any = np.float32) -> str:
        self.constants[name] = np.asarray(values, dtype)
        return name

    def split(self, x: str, parts: int, name: str) -> list[str]:
        """Equal parts of the channels."""
        from onnx import helper

        names = [f"{name}_{part}" for part in range(parts)]
        sizes = np.full(parts, self.channels // parts)
        lengths = self.constant(f"{name}_sizes", sizes, np.int64)
        self.nodes.append(helper.make_node("Split", [x, lengths], names, name, axis=1))
        return names

    def subtract(self, mean: np.ndarray) -> None:
        """`x` minus the centre of a mean image, or a colour."""
        mean = np.asarray(mean, np.float32)
        if mean.ndim == 3:
            start = (mean.shape[0] - self.side) // 2
            if start < 0:
                raise WeightsError(
                    f"the mean image is {mean.shape[0]} pixels wide, the network's "
                    f"input {self.side}."
                )
            centre = slice(start, start + self.side)
            mean = mean[centre, centre].transpose(2, 0, 1)
        values = self.constant("mean", mean.reshape(3, *(mean.shape[1:] or (1, 1))))
        self.x = self.add("Sub", [self.x, values], "images_minus_mean")


def _add_layer(
    graph: _Graph,
    network: Variant,
    row: Layer,
    leaves: Mapping[str, Any],
) -> None:
    """A row of the table, and what is done with its output."""
    last = row is network.layers[-1]
    kernel = np.asarray(leaves[f"params/{row.name}/kernel"], np.float32)
    bias = np.asarray(leaves[f"params/{row.name}/bias"], np.float32)
    labels = [row.name, *feature_names(row)]
    # Of several values of one name the last one is the feature.
    names = [
        label if label and label not in labels[i + 1 :] else f"{label or row.name}_{i}"
        for i, label in enumerate(labels)
    ]
    if last:
        names[-1] = OUTPUT
    columns = 1
    # The first and the last layer see everything, whatever the table says.
    if not isinstance(row, Local) and row.sees == "own":
        columns = 1 if last or row is network.layers[0] else network.columns
    match row:
        case Conv():
            _conv(graph, row, kernel, bias, columns, names[0])
        case Local():
            _local(graph, row, kernel, bias, names[0])
        case Dense():
            _dense(graph, row, kernel, bias, columns, names[0])
    for stage, name in zip(row.then, names[1:], strict=True):
        _stage(graph, stage, row, network.columns, leaves, name)


def _conv(
    graph: _Graph,
    row: Conv,
    kernel: np.ndarray,
    bias: np.ndarray,
    groups: int,
    name: str,
) -> None:
    (top, bottom), (left, right) = row.pads(graph.side)
    weight = files.channels_first(kernel, graph.channels)
    inputs = [
        graph.x,
        graph.constant(f"{row.name}.weight", weight),
        graph.constant(f"{row.name}.bias", bias),
    ]
    graph.x = graph.add(
        "Conv",
        inputs,
        name,
        group=groups,
        kernel_shape=[row.kernel, row.kernel],
        strides=[row.stride, row.stride],
        pads=[top, left, bottom, right],
    )
    graph.channels = row.features
    graph.side = 1 + (graph.side + top + bottom - row.kernel) // row.stride


def _local(
    graph: _Graph, row: Local, kernel: np.ndarray, bias: np.ndarray, name: str
) -> None:
    """The windows of every place as rows of a matrix, as `ops.local_conv` does it."""
    down, across, side, _, channels, features = kernel.shape
    if row.padding:
        pads = [0, 0, row.padding, row.padding] * 2
        amounts = graph.constant(f"{row.name}_pads", pads, np.int64)
        graph.x = graph.add("Pad", [graph.x, amounts], f"{row.name}_padded")
    axes = graph.constant(f"{row.name}_axes", [2, 3], np.int64)
    windows = []
    for top in range(side):
        for left in range(side):
            part = f"{row.name}_window_{top}_{left}"
            first = graph.constant(f"{part}_first", [top, left], np.int64)
            behind = [top + down, left + across]
            end = graph.constant(f"{part}_end", behind, np.int64)
            windows.append(graph.add("Slice", [graph.x, first, end, axes], part))
    values = side * side * channels
    x = graph.add("Concat", windows, f"{row.name}_windows", axis=1)
    shape = graph.constant(f"{row.name}_rows", [0, values, down * across], np.int64)
    x = graph.add("Reshape", [x, shape], f"{row.name}_by_place")
    x = graph.add("Transpose", [x], f"{row.name}_places_first", perm=[2, 0, 1])
    weight = kernel.reshape(down * across, values, features)
    weight_name = graph.constant(f"{row.name}.weight", weight)
    x = graph.add("MatMul", [x, weight_name], f"{row.name}_products")
    bias = bias.reshape(down * across, 1, features)
    bias_name = graph.constant(f"{row.name}.bias", bias)
    x = graph.add("Add", [x, bias_name], f"{row.name}_sums")
    x = graph.add("Transpose", [x], f"{row.name}_places_last", perm=[1, 2, 0])
    shape = graph.constant(f"{row.name}_maps", [0, features, down, across], np.int64)
    graph.x = graph.add("Reshape", [x, shape], name)
    graph.channels, graph.side = features, down


def _dense(
    graph: _Graph,
    row: Dense,
    kernel: np.ndarray,
    bias: np.ndarray,
    columns: int,
    name: str,
) -> None:
    parts = [graph.x]
    if columns > 1:
        parts = graph.split(graph.x, columns, f"{row.name}_columns")
    outputs = []
    for i, (x, weight, part) in enumerate(
        zip(
            parts,
            np.split(kernel, columns, axis=1),
            np.split(bias, columns),
            strict=True,
        )
    ):
        suffix = f"_{i}" if columns > 1 else ""
        if graph.side:
            x = graph.add("Flatten", [x], f"{row.name}_flat{suffix}", axis=1)
        weight = files.channels_first(weight, graph.channels // columns)
        inputs = [
            x,
            graph.constant(f"{row.name}.weight{suffix}", weight),
            graph.constant(f"{row.name}.bias{suffix}", part),
        ]
        outputs.append(graph.add("Gemm", inputs, f"{name}{suffix}", transB=1))
    graph.x = outputs[0]
    if columns > 1:
        graph.x = graph.add("Concat", outputs, name, axis=1)
    graph.channels, graph.side = row.features, 0


def _stage(
    graph: _Graph,
    stage: Stage,
    row: Layer,
    columns: int,
    leaves: Mapping[str, Any],
    name: str,
) -> None:
    """Leaves `graph.x` under that name, whatever the stage."""
    match stage:
        case Activation(kind=kind):
            graph.x = graph.add(_ACTIVATIONS[kind], [graph.x], name)
        case Lrn():
            _lrn(graph, stage, columns if stage.per_column else 1, name)
        case WithinMapLrn():
            _within_map_lrn(graph, stage, name)
        case BatchNorm():
            _batch_norm(graph, stage_name("norm", row.name), leaves, name)
        case Pool():
            _pool(graph, stage, name)
        case Dropout(rate=rate, scale_at="test") if rate > 0:
            kept = graph.constant(f"{name}_kept", 1 - rate)
            graph.x = graph.add("Mul", [graph.x, kept], name)
        case Dropout():
            graph.x = graph.add("Identity", [graph.x], name)


def _lrn(graph: _Graph, stage: Lrn, groups: int, name: str) -> None:
    times = stage.size if stage.alpha_mode == "sum" else 1
    constants = {
        "size": stage.size,
        "alpha": float(stage.alpha * times),
        "beta": float(stage.beta),
        "bias": float(stage.k),
    }
    if groups == 1:
        graph.x = graph.add("LRN", [graph.x], name, **constants)
        return
    parts = [
        graph.add("LRN", [part], f"{part}_normalized", **constants)
        for part in graph.split(graph.x, groups, f"{name}_columns")
    ]
    graph.x = graph.add("Concat", parts, name, axis=1)


def _within_map_lrn(graph: _Graph, stage: WithinMapLrn, name: str) -> None:
    """x / (k + alpha * mean of the window's squares, zeros around) ** beta."""
    alpha = graph.constant(f"{name}_alpha", stage.alpha)
    k = graph.constant(f"{name}_k", stage.k)
    beta = graph.constant(f"{name}_beta", stage.beta)
    squares = graph.add("Mul", [graph.x, graph.x], f"{name}_squares")
    means = graph.add(
        "AveragePool",
        [squares],
        f"{name}_means",
        kernel_shape=[stage.size, stage.size],
        pads=[stage.size // 2] * 4,
        count_include_pad=1,
    )
    scaled = graph.add("Mul", [means, alpha], f"{name}_scaled")
    total = graph.add("Add", [scaled, k], f"{name}_total")
    divisor = graph.add("Pow", [total, beta], f"{name}_divisor")
    graph.x = graph.add("Div", [graph.x, divisor], name)


def _batch_norm(
    graph: _Graph, layer: str, leaves: Mapping[str, Any], name: str
) -> None:
    inputs = [
        graph.constant(f"{layer}.{leaf}", leaves[f"{kind}/{layer}/{leaf}"])
        for kind, leaf in (
            ("params", "scale"),
            ("params", "bias"),
            ("batch_stats", "mean"),
            ("batch_stats", "var"),
        )
    ]
    graph.x = graph.add(
        "BatchNormalization",
        [graph.x, *inputs],
        name,
        epsilon=_BATCH_NORM_EPSILON,
    )


def _pool(graph: _Graph, stage: Pool, name: str) -> None:
    window, stride = stage.window, stage.stride
    count = pooled_length(graph.side, window, stride, ceil=stage.ceil)
    overhang = max(0, (count - 1) * stride + window - graph.side)
    kind = "MaxPool" if stage.kind == "max" else "AveragePool"
    graph.x = graph.add(
        kind,
        [graph.x],
        name,
        kernel_shape=[window, window],
        strides=[stride, stride],
        pads=[0, 0, overhang, overhang],
    )
    graph.side = count
