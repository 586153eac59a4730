"""Export to ONNX: standard operators, any batch size, values named like our features.

ONNX keeps channels first. For LRN inside columns, the columns become examples of a larger batch.
ONNX's LRN multiplies the mean of the squares, so the paper's alpha is multiplied by the size of
the window. A pooling window that hangs over an edge becomes padding, which both pooling operators
leave out. Normalisation within a map becomes an average pooling of squares. A fully connected
layer of columns becomes a grouped convolution, and a locally connected layer the product of its
windows with a kernel per place. Importing this module needs the package onnx.
"""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from onnx import TensorProto, helper, numpy_helper

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
    WithinMapLrn,
    feature_names,
    stage_name,
)
from alexnet_jax.models.ops.reference import pooled_length
from alexnet_jax.models.weights.files import Weights, channels_first
from alexnet_jax.system.files import atomic_write

# Opset 17 (2022) has all operators that are needed, and current runtimes read it.
OPSET = 17
IR_VERSION = 8
INPUT, OUTPUT = "images", "logits"
_ACTIVATIONS = {"relu": "Relu", "tanh": "Tanh", "sigmoid": "Sigmoid"}
_BATCH_NORM_EPSILON = 1e-5  # flax's default


def export_onnx(path: str | os.PathLike[str], weights: Weights) -> None:
    """Write a network as ONNX, atomically.

    The input is `images`, float32 [batch, 3, S, S], RGB, 0..255, the central crop of raw images;
    the network subtracts the mean. The batch has any size. The output is `logits` [batch, K].
    Values inside have the names of `model.apply(..., method="features")`. The network computes in
    float32 as in evaluation: dropout is the paper's factor, batch norm uses its running
    statistics. The file's metadata holds `class_names`, a JSON list.
    """
    graph = _Graph(weights)
    mean, size = weights.mean, weights.crop_size
    start = (len(mean) - size) // 2
    centre = slice(start, start + size)
    mean = mean[None, None] if mean.ndim == 1 else mean[centre, centre]
    graph.add("Sub", "images_minus_mean", {"mean": mean.transpose(2, 0, 1)})
    for row in graph.network.layers:
        graph.add_row(row)
    about = "RGB, 0..255, the mean is subtracted inside; [batch, 3, height, width]"
    properties = {"variant": graph.network.name, "input": about}
    if weights.class_names is not None:
        properties["class_names"] = json.dumps(list(weights.class_names))
    value, classes = helper.make_tensor_value_info, graph.network.layers[-1].features
    whole = helper.make_model(
        helper.make_graph(
            graph.nodes,
            f"alexnet_jax {graph.network.name}",
            [value(INPUT, TensorProto.FLOAT, ["batch", 3, size, size], about)],
            [value(OUTPUT, TensorProto.FLOAT, ["batch", classes])],
            graph.constants,
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
      nodes, constants: what the graph has so far.
      x: name of the value that the next node reads.
      channels, side: shape of `x`, [batch, channels, side, side]; after a fully connected layer
        it is [batch, channels] and the side is 0.
    """

    def __init__(self, weights: Weights):
        self.network = weights.make_model().network
        self.leaves = flatten_dict(weights.variables, sep="/")
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.x, self.channels, self.side = INPUT, 3, weights.crop_size

    def add(
        self,
        kind: str,
        name: str,
        constants: Mapping[str, Any] | None = None,
        *,
        inputs: Sequence[str] | None = None,
        **attributes: Any,
    ) -> None:
        """Add a node that reads `inputs` (`x`), then `constants`; its output is the new `x`."""
        reads = list(inputs or [self.x])
        for constant, values in (constants or {}).items():
            reads.append(f"{name}.{constant}")
            array = np.asarray(values, np.int64 if kind == "Reshape" else np.float32)
            self.constants.append(numpy_helper.from_array(array, reads[-1]))
        self.nodes.append(helper.make_node(kind, reads, [name], name, **attributes))
        self.x = name

    def add_row(self, row: Layer) -> None:
        """Add a row of the layer table, and its stages."""
        labels = [row.name, *feature_names(row)]
        # The last of several values with one name is the feature.
        names = [
            label if label and label not in labels[i + 1 :] else f"{label or row.name}_{i}"
            for i, label in enumerate(labels)
        ]
        if row is self.network.layers[-1]:
            names[-1] = OUTPUT
        kernel, bias = (
            np.asarray(self.leaves[f"params/{row.name}/{leaf}"], np.float32)
            for leaf in ("kernel", "bias")
        )
        match row:
            case Conv():
                self._conv(row, names[0], kernel, bias)
            case Local():
                self._local(row, names[0], kernel, bias)
            case Dense():
                self._dense(row, names[0], kernel, bias)
        self.channels = row.features
        for stage, name in zip(row.then, names[1:], strict=True):
            self._stage(stage, row, name)

    def _groups(self, row: Conv | Dense) -> int:
        """Return the number of columns of a layer that do not see each other."""
        # The first and the last layer always see everything.
        inside = row not in (self.network.layers[0], self.network.layers[-1])
        return self.network.columns if inside and row.sees == "own" else 1

    def _conv(self, row: Conv, name: str, kernel: np.ndarray, bias: np.ndarray) -> None:
        (top, bottom), (left, right) = row.pads(self.side)
        self.add(
            "Conv",
            name,
            {"weight": channels_first(kernel, self.channels), "bias": bias},
            group=self._groups(row),
            strides=[row.stride, row.stride],
            pads=[top, left, bottom, right],
        )
        self.side = row.side(self.side)

    def _local(self, row: Local, name: str, kernel: np.ndarray, bias: np.ndarray) -> None:
        # A convolution with kernels of zeros and a one copies each window into channels, ordered
        # by input channel, row and column.
        ones = np.tile(np.eye(row.kernel**2), (self.channels, 1))
        ones = ones.reshape(-1, 1, row.kernel, row.kernel)
        pads = [row.padding] * 4
        self.add("Conv", f"{name}_windows", {"ones": ones}, group=self.channels, pads=pads)
        down, across = kernel.shape[:2]
        weight = kernel.transpose(0, 1, 4, 2, 3, 5).reshape(down, across, -1, row.features)
        self.add("Einsum", f"{name}_products", {"weight": weight}, equation="bvij,ijvf->bfij")
        self.add("Add", name, {"bias": bias.transpose(2, 0, 1)})
        self.side = row.side(self.side)

    def _dense(self, row: Dense, name: str, kernel: np.ndarray, bias: np.ndarray) -> None:
        groups, side = self._groups(row), max(1, self.side)
        channels = self.channels // groups
        weight = channels_first(kernel, channels)
        if groups == 1:
            self.add("Flatten", f"{name}_flat")
            self.add("Gemm", name, {"weight": weight, "bias": bias}, transB=1)
        else:
            self.add("Reshape", f"{name}_maps", {"shape": [-1, self.channels, side, side]})
            constants = {"weight": weight.reshape(-1, channels, side, side), "bias": bias}
            self.add("Conv", f"{name}_units", constants, group=groups)
            self.add("Flatten", name)
        self.side = 0

    def _stage(self, stage: Stage, row: Layer, name: str) -> None:
        """Add a stage of a row; its output gets this name."""
        match stage:
            case Activation(kind):
                self.add(_ACTIVATIONS[kind], name)
            case Lrn():
                self._lrn(stage, name)
            case WithinMapLrn():
                self._within_map_lrn(stage, name)
            case BatchNorm():
                norm = stage_name("norm", row.name)
                parts = {"scale": "params", "bias": "params"}
                parts |= {"mean": "batch_stats", "var": "batch_stats"}
                constants = {k: self.leaves[f"{part}/{norm}/{k}"] for k, part in parts.items()}
                self.add("BatchNormalization", name, constants, epsilon=_BATCH_NORM_EPSILON)
            case Pool():
                self._pool(stage, name)
            case Dropout(rate, "test"):
                self.add("Mul", name, {"kept": 1 - rate})
            case Dropout():
                self.add("Identity", name)

    def _lrn(self, stage: Lrn, name: str) -> None:
        columns = self.network.columns if stage.per_column else 1
        if columns > 1:
            own = [-1, self.channels // columns, self.side, self.side]
            self.add("Reshape", f"{name}_columns", {"shape": own})
        self.add(
            "LRN",
            f"{name}_normalized" if columns > 1 else name,
            size=stage.size,
            alpha=float(stage.alpha * (stage.size if stage.alpha_mode == "sum" else 1)),
            beta=float(stage.beta),
            bias=float(stage.k),
        )
        if columns > 1:
            self.add("Reshape", name, {"shape": [-1, self.channels, self.side, self.side]})

    def _within_map_lrn(self, stage: WithinMapLrn, name: str) -> None:
        """Compute x / (k + alpha * mean of the window's squares, zeros around) ** beta."""
        x = self.x
        self.add("Mul", f"{name}_squares", inputs=[x, x])
        self.add(
            "AveragePool",
            f"{name}_means",
            kernel_shape=[stage.size, stage.size],
            pads=[stage.size // 2] * 4,
            count_include_pad=1,
        )
        self.add("Mul", f"{name}_scaled", {"alpha": stage.alpha})
        self.add("Add", f"{name}_sum", {"k": stage.k})
        self.add("Pow", f"{name}_divisor", {"beta": stage.beta})
        self.add("Div", name, inputs=[x, self.x])

    def _pool(self, stage: Pool, name: str) -> None:
        count = pooled_length(self.side, stage.window, stage.stride, ceil=stage.ceil)
        overhang = max(0, (count - 1) * stage.stride + stage.window - self.side)
        self.add(
            "MaxPool" if stage.kind == "max" else "AveragePool",
            name,
            kernel_shape=[stage.window, stage.window],
            strides=[stage.stride, stage.stride],
            pads=[0, 0, overhang, overhang],
        )
        self.side = count
