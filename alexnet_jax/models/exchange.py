"""The network's only view of other devices: an `Exchange`.

This one exchanges nothing: every layer is on one device. `training.parallel` has the
exchanges of a network that is split over several devices.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from alexnet_jax.models.layers import Layer


@dataclass(frozen=True)
class Part:
    """The part of a layer's output that is on one device.

    Attributes:
      positions: [B], positions of the device's examples in the global batch.
      batch_axes: mesh axes that the examples are split over.
      shards: number of equal parts that the features are split into.
      index: which of these parts the device has.
    """

    positions: jax.Array
    batch_axes: tuple[str, ...] = ()
    shards: int = 1
    index: int | jax.Array = 0


@dataclass(frozen=True)
class Exchange:
    """Communication between the devices that share a network or a batch.

    Attributes:
      batch_axes: mesh axes that the images are split over; () on a single device.
    """

    batch_axes: tuple[str, ...]

    def part(self, row: Layer, own: jax.Array) -> Part:
        """Return this device's part of the output of a layer.

        Args:
          row: the layer.
          own: [B], positions of this device's images in the global batch.
        """
        return Part(own, self.batch_axes)

    def gather_features(self, x: jax.Array) -> jax.Array:
        """Return all features [B, H, W, C], for a convolution that sees them all."""
        return x

    def dense_inputs(self, x: jax.Array, columns: int) -> jax.Array:
        """Return the inputs of this device's units in a fully connected layer.

        Args:
          x: this device's part of the layer before, [B, H, W, C] or [B, C].
          columns: number of columns that do not see each other; 1 if every unit reads
            everything.

        Returns:
          [B', columns on this device, inputs per column].
        """
        return by_column(x, columns)

    def classifier_inputs(self, x: jax.Array) -> jax.Array:
        """Return this device's inputs of the last layer, [B', F]."""
        return x.reshape(x.shape[0], -1)

    def sum_logits(self, parts: jax.Array) -> jax.Array:
        """Return the logits [B, K], summed over the devices' partial logits [B', K]."""
        return parts


def by_column(x: jax.Array, columns: int) -> jax.Array:
    """Return features [B, ..., C] as [B, columns, inputs per column], in order."""
    x = x.reshape(*x.shape[:-1], columns, x.shape[-1] // columns)
    return jnp.moveaxis(x, -2, 1).reshape(x.shape[0], columns, -1)
