"""The network's only view of other devices: an `Exchange`, by default `Alone`.

`parallel` has the exchanges of a network that is split over several devices.
"""

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp

from alexnet_jax.models.layers import Layer


@dataclass(frozen=True)
class Part:
    """A device's part of a layer's output.

    Attributes:
      positions: [B], where the device's examples are in the global batch.
      batch_axes: the mesh axes that the examples are split over.
      shards: into how many equal parts the features are split.
      index: which of these parts the device has.
    """

    positions: jax.Array
    batch_axes: tuple[str, ...] = ()
    shards: int = 1
    index: int | jax.Array = 0


class Exchange(Protocol):
    """How the devices that share a network, or a batch, exchange what they lack.

    Attributes:
      batch_axes: the mesh axes that images are split over; empty for the whole batch.
    """

    @property
    def batch_axes(self) -> tuple[str, ...]: ...

    def part(self, row: Layer, own: jax.Array) -> Part:
        """Return this device's part of the output of a layer.

        Args:
          row: the layer.
          own: [B], the positions in the global batch of the images of this device.
        """
        ...

    def gather_features(self, x: jax.Array) -> jax.Array:
        """Return all features [B, H, W, C] for a convolution that sees them all."""
        ...

    def dense_inputs(self, x: jax.Array, columns: int) -> jax.Array:
        """Return what the units of this device read in a fully connected layer.

        Args:
          x: this device's part of the layer before, [B, H, W, C] or [B, C].
          columns: how many columns the layer has, each with its own inputs; 1 if every
            unit reads everything.

        Returns:
          [B', columns of this device, inputs of each].
        """
        ...

    def classifier_inputs(self, x: jax.Array) -> jax.Array:
        """Return the inputs of the last layer that this device multiplies, [B', F]."""
        ...

    def sum_logits(self, parts: jax.Array) -> jax.Array:
        """Return the logits [B, K], from every device's product of its inputs [B', K]."""
        ...


@dataclass(frozen=True)
class Alone:
    """All layers are on this device: nothing to exchange."""

    batch_axes: tuple[str, ...] = ()

    def part(self, row: Layer, own: jax.Array) -> Part:
        return Part(own, self.batch_axes)

    def gather_features(self, x: jax.Array) -> jax.Array:
        return x

    def dense_inputs(self, x: jax.Array, columns: int) -> jax.Array:
        return by_column(x, columns)

    def classifier_inputs(self, x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0], -1)

    def sum_logits(self, parts: jax.Array) -> jax.Array:
        return parts


def by_column(x: jax.Array, columns: int) -> jax.Array:
    """Features [B, ..., C] -> [B, columns, inputs of a column], in the same order."""
    x = x.reshape(*x.shape[:-1], columns, x.shape[-1] // columns)
    return jnp.moveaxis(x, -2, 1).reshape(x.shape[0], columns, -1)
