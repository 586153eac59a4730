"""The size of a network: shapes, parameters, multiply-adds, and image sizes that fit."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from alexnet_jax.models.layers import Conv, Local, Pool, Variant
from alexnet_jax.models.ops.reference import pooled_length

if TYPE_CHECKING:
    from alexnet_jax.models.alexnet import AlexNet


@dataclass(frozen=True)
class LayerSummary:
    """One line of `summary`, for one image: shapes have no batch dimension."""

    name: str
    shape: tuple[int, ...]
    parameters: int
    multiply_adds: int


def summary(model: "AlexNet", image_size: int | None = None) -> list[LayerSummary]:
    """Return shape, parameters and multiply-adds of every layer, without computing it.

    Args:
      model: the network.
      image_size: side in pixels; None: the variant's own.

    Raises:
      ValueError: for a size that does not give the table's grid.
    """
    size = image_size or model.network.crop_size
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    names: list[str] = []

    def trace(key: jax.Array, images: jax.Array) -> Any:
        found, variables = model.init_with_output(key, images, method="features")
        names.extend(found)  # eval_shape forgets the order of the layers
        return found, variables["params"]

    shapes, params = jax.eval_shape(trace, key, images)
    convs = {row.name for row in model.network.convs}
    lines = []
    for name in names:
        layer = model.network.layers[-1].name if name == "logits" else name
        weights, shape = params.get(layer, {}), shapes[name].shape[1:]
        products = weights["kernel"].size if "kernel" in weights else 0
        if layer in convs:  # one kernel for all places
            products *= shape[0] * shape[1]
        parameters = sum(leaf.size for leaf in weights.values())
        lines.append(LayerSummary(layer, shape, parameters, products))
    return lines


def check_image_size(network: Variant, size: int) -> None:
    """Check that images of `size` give the table's grid, and that every layer fits.

    Raises:
      ValueError: the message names the sizes that fit, or the layer that does not.
    """
    first = network.layers[0]
    if isinstance(first, Conv) and first.side(size) != network.grid:
        fits = [n for n in range(1, 2048) if first.side(n) == network.grid]
        best = min(fits, key=lambda n: (n != network.crop_size, abs(n - size)))
        raise ValueError(
            f"Variant {network.name!r} needs a {network.grid}x{network.grid} grid after "
            f"{first.name}, from images of {fits[0]} to {fits[-1]} pixels; images of "
            f"{size} pixels give {first.side(size)}x{first.side(size)}. Set "
            f"--config.data.crop_size={best}, or grid={first.side(size)} in a table of your own."
        )
    # Ablations of the pooling can leave a later layer no input.
    side = size
    for row in network.layers:
        if not isinstance(row, Conv | Local):
            return
        side = row.side(side)
        if side < 1:
            raise ValueError(
                f"Variant {network.name!r}: the maps before {row.name} are smaller than its "
                f"{row.kernel}x{row.kernel} kernel; pool less "
                "(--config.model.overrides.pool_window and pool_stride)."
            )
        for stage in row.then:
            if not isinstance(stage, Pool):
                continue
            if max(stage.window, stage.stride) > side:
                raise ValueError(
                    f"Variant {network.name!r}: pool_window={stage.window} and "
                    f"pool_stride={stage.stride} do not fit the {side}x{side} maps of "
                    f"{row.name}: neither may be above {side}."
                )
            side = pooled_length(side, stage.window, stage.stride, ceil=stage.ceil)
