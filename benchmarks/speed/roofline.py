"""Operations and bytes of the network's parts, and the least time that they need.

A part takes at least operations / (rate of matrix products) and at least bytes /
(bandwidth of copying), whichever is more; the sum over the parts is the roofline. The
bytes are each part's own arrays, read or written once; bias, activation, dropout and
casts are taken to be free (fused into their neighbours).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from alexnet_jax.models.alexnet import AlexNet
from alexnet_jax.models.summary import LayerSummary, summary

# An update reads weight, velocity and gradient and writes weight and velocity.
_UPDATE_ARRAYS = 5
_FLOAT32 = 4


@dataclass(frozen=True)
class Cost:
    """Floating-point operations, 2 for each multiply-add, and bytes of one part."""

    name: str
    flops: float
    bytes: float

    def seconds(self, flop_rate: float, bandwidth: float) -> float:
        """Return the least time that the machine's limits allow."""
        return max(self.flops / flop_rate, self.bytes / bandwidth)


def seconds(costs: Sequence[Cost], flop_rate: float, bandwidth: float) -> float:
    """Return the roofline of parts that run one after the other."""
    return sum(cost.seconds(flop_rate, bandwidth) for cost in costs)


def flops(costs: Sequence[Cost]) -> float:
    """Return the operations of all parts together."""
    return sum(cost.flops for cost in costs)


def inference(model: AlexNet, batch: int) -> list[Cost]:
    """Return the parts of classifying `batch` images, named "conv1 forward" and so on."""
    return [part for parts in _layers(model, batch, _FLOAT32) for part in parts[:1]]


def training(model: AlexNet, batch: int, *, kernel_itemsize: int = _FLOAT32) -> list[Cost]:
    """Return the parts of a training step; conv1 needs no gradient of its images.

    `kernel_itemsize`: bytes of a weight where a layer reads it, and of its gradient;
    the network's are float32 whatever it computes in.
    """
    layers = _layers(model, batch, kernel_itemsize)
    parts = [part for parts in layers for part in parts]
    parameters = sum(row.parameters for row in summary(model))
    return [*parts, Cost("update", 0, _UPDATE_ARRAYS * _FLOAT32 * parameters)]


def _layers(model: AlexNet, batch: int, kernel_itemsize: int) -> list[list[Cost]]:
    """Return the parts of each layer: the forward pass first, then its gradients."""
    size = model.network.crop_size
    before = (size, size, 3)
    found = []
    for row in summary(model):
        found.append(_parts(row, before, batch, model.dtype.itemsize, kernel_itemsize))
        before = row.shape
    del found[0][1]  # the input gradient of the images
    return found


def _parts(
    row: LayerSummary, before: tuple[int, ...], batch: int, itemsize: int, kernel_itemsize: int
) -> list[Cost]:
    read = batch * math.prod(before) * itemsize
    written = batch * math.prod(row.shape) * itemsize
    if not row.multiply_adds:
        # Normalisation and pooling go back from their input and the gradient of
        # their output to the gradient of their input.
        return [
            Cost(f"{row.name} forward", 0, read + written),
            Cost(f"{row.name} backward", 0, 2 * read + written),
        ]
    work = 2 * batch * row.multiply_adds
    moved = read + written + kernel_itemsize * row.parameters
    names = ("forward", "input gradient", "kernel gradient")
    return [Cost(f"{row.name} {name}", work, moved) for name in names]
