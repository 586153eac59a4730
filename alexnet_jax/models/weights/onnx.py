"""Export to ONNX: standard operators, any batch size, values named like our features.

ONNX keeps channels first. LRN inside columns becomes Split, LRN and Concat. ONNX's LRN
multiplies the mean of the squares, so the paper's alpha is multiplied by the size of the
window. A pooling window that hangs over an edge becomes padding, which both pooling
operators leave out. Normalisation within a map becomes an average pooling of squares, and
a locally connected layer becomes one matrix product per place.
"""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from alexnet_jax.models.alexnet import AlexNet
from alexnet_jax.models.layers import (
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
from alexnet_jax.models.ops.reference import pooled_length
from alexnet_jax.models.summary import check_image_size
from alexnet_jax.models.weights import files
from alexnet_jax.models.weights.files import WeightsError
from alexnet_jax.system.files import atomic_write

# Opset 17 (2022) has all operators that are needed, and current runtimes read it.
OPSET = 17
IR_VERSION = 8
INPUT, OUTPUT = "images", "logits"
_ACTIVATIONS = {"relu": "Relu", "tanh": "Tanh", "sigmoid": "Sigmoid"}
_BATCH_NORM_EPSILON = 1e-5  # flax's default


def export_onnx(
    path: str | os.PathLike[str],
    model: AlexNet,
    variables: Mapping[str, Any],
    *,
    mean: np.ndarray | None = None,
    crop_size: int | None = None,
    class_names: Sequence[str] | None = None,
) -> None:
    """Write a network as ONNX, atomically; needs the package onnx.

    The input is `images`, float32 [batch, 3, S, S], RGB; the batch has any size. The
    output is `logits` [batch, K]. Values inside have the names of
    `model.apply(..., method="features")`. The network computes in float32 as in
    evaluation: dropout is the paper's factor, batch norm uses its running statistics.

    Args:
      path: file to write.
      model: the whole network, for example from `create_model` or `load`.
      variables: argument of `model.apply`.
      mean: None: images are 0..255 minus the mean, as for `model.apply`. Otherwise
        images are 0..255, and the network subtracts this mean: [3], or the centre of
        [side, side, 3], RGB, 0..255.
      crop_size: the side S; None: the variant's own.
      class_names: stored in the file's metadata (`class_names`, a JSON list).

    Raises:
      WeightsError: (a ValueError) if onnx is not installed, for variables of another
        network, or for a mean image smaller than S.
      ValueError: for a size that does not give the network's grid.
    """
    try:
        from onnx import TensorProto, helper, numpy_helper
    except ImportError as error:
        raise WeightsError(
            'writing ONNX needs onnx: pip install "alexnet_jax[onnx]", or onnx itself.'
        ) from error
    network = model.network
    size = crop_size or network.crop_size
    check_image_size(network, size)
    leaves = files.flat(variables)
    shapes = {name: np.shape(leaf) for name, leaf in leaves.items()}
    files.check_shapes(path, "this network", shapes, files.shapes_of(model, size))
    graph = _Graph(network, leaves, size)
    if mean is not None:
        if mean.ndim == 1:
            mean = mean[None, None]
        else:
            start = (len(mean) - size) // 2
            if start < 0:
                raise WeightsError(
                    f"the mean image is {len(mean)} pixels wide, the network's input {size}."
                )
            mean = mean[start : start + size, start : start + size]
        inputs = [graph.x, graph.constant("mean", mean.transpose(2, 0, 1))]
        graph.add("Sub", inputs, "images_minus_mean")
    for row in network.layers:
        _add_layer(graph, row)
    minus = "minus the mean" if mean is None else "the mean is subtracted inside"
    about = f"RGB, 0..255, {minus}; [batch, 3, height, width]"
    properties = {"variant": network.name, "input": about}
    if class_names is not None:
        properties["class_names"] = json.dumps(list(class_names))
    value, classes = helper.make_tensor_value_info, network.layers[-1].features
    whole = helper.make_model(
        helper.make_graph(
            graph.nodes,
            f"alexnet_jax {network.name}",
            [value(INPUT, TensorProto.FLOAT, ["batch", 3, size, size], about)],
            [value(OUTPUT, TensorProto.FLOAT, ["batch", classes])],
            [numpy_helper.from_array(a, name) for name, a in graph.constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="alexnet_jax",
    )
    helper.set_model_props(whole, properties)
    with atomic_write(path) as file:
        file.write(whole.SerializeToString())


class _Graph:
    """An ONNX graph under construction.

    Attributes:
      network: the layer table.
      leaves: its variables by name.
      nodes: the nodes so far.
      constants: arrays by name.
      x: name of the value that the next node reads.
      channels, side: shape of `x`, [batch, channels, side, side]; after a fully
        connected layer it is [batch, channels] and the side is 0.
    """

    def __init__(self, network: Variant, leaves: Mapping[str, Any], side: int):
        self.network, self.leaves = network, leaves
        self.nodes: list[Any] = []
        self.constants: dict[str, np.ndarray] = {}
        self.x, self.channels, self.side = INPUT, 3, side

    def add(self, kind: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        """Add a node whose output is the new `x`; return `name`, that of both."""
        from onnx import helper

        self.nodes.append(helper.make_node(kind, inputs, [name], name, **attributes))
        self.x = name
        return name

    def constant(self, name: str, values: Any, dtype: Any = np.float32) -> str:
        """Add an array; return its name."""
        self.constants[name] = np.asarray(values, dtype)
        return name

    def split(self, parts: int, name: str) -> list[str]:
        """Split the channels of `x` into equal parts; return their names."""
        from onnx import helper

        names = [f"{name}_{part}" for part in range(parts)]
        sizes = np.full(parts, self.channels // parts)
        inputs = [self.x, self.constant(f"{name}_sizes", sizes, np.int64)]
        self.nodes.append(helper.make_node("Split", inputs, names, name, axis=1))
        return names

    def kernel_and_bias(self, row: Layer) -> tuple[np.ndarray, np.ndarray]:
        """Return the kernel and bias of a layer, in our layout, float32."""
        kernel, bias = (
            np.asarray(self.leaves[f"params/{row.name}/{name}"], np.float32)
            for name in ("kernel", "bias")
        )
        return kernel, bias

    def groups(self, row: Conv | Dense) -> int:
        """Return the number of columns of a layer that do not see each other."""
        # The first and the last layer always see everything.
        inside = row not in (self.network.layers[0], self.network.layers[-1])
        return self.network.columns if inside and row.sees == "own" else 1


def _add_layer(graph: _Graph, row: Layer) -> None:
    """Add a row of the layer table."""
    labels = [row.name, *feature_names(row)]
    # The last of several values with one name is the feature.
    names = [
        label if label and label not in labels[i + 1 :] else f"{label or row.name}_{i}"
        for i, label in enumerate(labels)
    ]
    if row is graph.network.layers[-1]:
        names[-1] = OUTPUT
    match row:
        case Conv():
            _conv(graph, row, names[0])
        case Local():
            _local(graph, row, names[0])
        case Dense():
            _dense(graph, row, names[0])
    for stage, name in zip(row.then, names[1:], strict=True):
        _stage(graph, stage, row, name)


def _conv(graph: _Graph, row: Conv, name: str) -> None:
    kernel, bias = graph.kernel_and_bias(row)
    (top, bottom), (left, right) = row.pads(graph.side)
    weight = files.channels_first(kernel, graph.channels)
    inputs = [
        graph.x,
        graph.constant(f"{row.name}.weight", weight),
        graph.constant(f"{row.name}.bias", bias),
    ]
    graph.add(
        "Conv",
        inputs,
        name,
        group=graph.groups(row),
        kernel_shape=[row.kernel, row.kernel],
        strides=[row.stride, row.stride],
        pads=[top, left, bottom, right],
    )
    graph.channels = row.features
    graph.side = 1 + (graph.side + top + bottom - row.kernel) // row.stride


def _local(graph: _Graph, row: Local, name: str) -> None:
    """Add a matrix product per place, of its window as a row, as in `ops.local_conv`."""
    kernel, bias = graph.kernel_and_bias(row)
    down, across, side, _, channels, features = kernel.shape
    places, values = down * across, side * side * channels

    def constant(name: str, values: Any, dtype: Any = np.int64) -> str:
        return graph.constant(f"{row.name}{name}", values, dtype)

    def add(kind: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        return graph.add(kind, inputs, f"{row.name}_{name}", **attributes)

    x = graph.x
    if row.padding:
        pads = constant("_pads", [0, 0, row.padding, row.padding] * 2)
        x = add("Pad", [x, pads], "padded")
    axes = constant("_axes", [2, 3])
    windows = []
    for top, left in np.ndindex(side, side):
        first = constant(f"_window_{top}_{left}_first", [top, left])
        end = constant(f"_window_{top}_{left}_end", [top + down, left + across])
        windows.append(add("Slice", [x, first, end, axes], f"window_{top}_{left}"))
    x = add("Concat", windows, "windows", axis=1)
    x = add("Reshape", [x, constant("_rows", [0, values, places])], "by_place")
    x = add("Transpose", [x], "places_first", perm=[2, 0, 1])
    weight = constant(".weight", kernel.reshape(places, values, features), np.float32)
    x = add("MatMul", [x, weight], "products")
    biases = constant(".bias", bias.reshape(places, 1, features), np.float32)
    x = add("Add", [x, biases], "sums")
    x = add("Transpose", [x], "places_last", perm=[1, 2, 0])
    shape = constant("_maps", [0, features, down, across])
    graph.add("Reshape", [x, shape], name)
    graph.channels, graph.side = features, down


def _dense(graph: _Graph, row: Dense, name: str) -> None:
    """Add a Gemm per column: Gemm knows no groups."""
    columns = graph.groups(row)
    kernel, bias = graph.kernel_and_bias(row)
    parts = graph.split(columns, f"{row.name}_columns") if columns > 1 else [graph.x]
    outputs = []
    for i, x in enumerate(parts):
        suffix = f"_{i}" if columns > 1 else ""
        if graph.side:
            x = graph.add("Flatten", [x], f"{row.name}_flat{suffix}", axis=1)
        kernel_part = np.split(kernel, columns, axis=1)[i]
        weight = files.channels_first(kernel_part, graph.channels // columns)
        inputs = [
            x,
            graph.constant(f"{row.name}.weight{suffix}", weight),
            graph.constant(f"{row.name}.bias{suffix}", np.split(bias, columns)[i]),
        ]
        outputs.append(graph.add("Gemm", inputs, f"{name}{suffix}", transB=1))
    if columns > 1:
        graph.add("Concat", outputs, name, axis=1)
    graph.channels, graph.side = row.features, 0


def _stage(graph: _Graph, stage: Stage, row: Layer, name: str) -> None:
    """Add a stage of a row; its output gets this name."""
    match stage:
        case Activation(kind):
            graph.add(_ACTIVATIONS[kind], [graph.x], name)
        case Lrn():
            _lrn(graph, stage, name)
        case WithinMapLrn():
            _within_map_lrn(graph, stage, name)
        case BatchNorm():
            norm = stage_name("norm", row.name)
            inputs = [graph.x]
            for leaf in ("scale", "bias", "mean", "var"):
                part = "params" if leaf in ("scale", "bias") else "batch_stats"
                values = graph.leaves[f"{part}/{norm}/{leaf}"]
                inputs.append(graph.constant(f"{norm}.{leaf}", values))
            epsilon = _BATCH_NORM_EPSILON
            graph.add("BatchNormalization", inputs, name, epsilon=epsilon)
        case Pool():
            _pool(graph, stage, name)
        case Dropout(rate=rate, scale_at="test") if rate > 0:
            kept = graph.constant(f"{name}_kept", 1 - rate)
            graph.add("Mul", [graph.x, kept], name)
        case Dropout():
            graph.add("Identity", [graph.x], name)


def _lrn(graph: _Graph, stage: Lrn, name: str) -> None:
    constants = {
        "size": stage.size,
        "alpha": float(stage.alpha * (stage.size if stage.alpha_mode == "sum" else 1)),
        "beta": float(stage.beta),
        "bias": float(stage.k),
    }
    columns = graph.network.columns if stage.per_column else 1
    if columns == 1:
        graph.add("LRN", [graph.x], name, **constants)
        return
    parts = [
        graph.add("LRN", [part], f"{part}_normalized", **constants)
        for part in graph.split(columns, f"{name}_columns")
    ]
    graph.add("Concat", parts, name, axis=1)


def _within_map_lrn(graph: _Graph, stage: WithinMapLrn, name: str) -> None:
    """Compute x / (k + alpha * mean of the window's squares, zeros around) ** beta."""
    x, pad, window = graph.x, stage.size // 2, [stage.size, stage.size]
    means = {"kernel_shape": window, "pads": [pad] * 4, "count_include_pad": 1}
    graph.add("Mul", [x, x], f"{name}_squares")
    graph.add("AveragePool", [graph.x], f"{name}_means", **means)
    for kind, constant in (("Mul", "alpha"), ("Add", "k"), ("Pow", "beta")):
        value = graph.constant(f"{name}_{constant}", getattr(stage, constant))
        graph.add(kind, [graph.x, value], f"{name}_{kind.lower()}_{constant}")
    graph.add("Div", [x, graph.x], name)


def _pool(graph: _Graph, stage: Pool, name: str) -> None:
    window, stride = stage.window, stage.stride
    count = pooled_length(graph.side, window, stride, ceil=stage.ceil)
    overhang = max(0, (count - 1) * stride + window - graph.side)
    graph.add(
        "MaxPool" if stage.kind == "max" else "AveragePool",
        [graph.x],
        name,
        kernel_shape=[window, window],
        strides=[stride, stride],
        pads=[0, 0, overhang, overhang],
    )
    graph.side = count
