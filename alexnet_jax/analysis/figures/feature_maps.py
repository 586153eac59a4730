"""Draw each layer's output for an image, map by map."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

_INCHES_PER_MAP = 0.62
_PIXELS = 52


def feature_maps(image: Any, features: Mapping[str, Any], *, most: int = 16) -> Figure:
    """Draw an image and the maps of every layer that has any.

    Args:
      image: uint8 [S, S, 3], the network's input.
      features: of `model.apply(variables, image, method="features")`, name ->
        [1, H, W, C] or [H, W, C], drawn in this order (`jax.jit` sorts it by name);
        layers without H and W (fc6 and on) are left out.
      most: maps per layer: those of the largest mean activation, the strongest first.

    Returns:
      A matplotlib figure, one row per layer. Each map is stretched from black, its
      smallest value, to white, its largest. Beside it the layer's name, its shape, and
      the share of its values that are zero.
    """
    maps = {
        name: np.asarray(values, np.float32).reshape(values.shape[-3:])
        for name, values in features.items()
        if values.ndim > 2
    }
    figure = Figure(
        figsize=(1.5 + most * _INCHES_PER_MAP, 1.1 + len(maps) * (_INCHES_PER_MAP + 0.06)),
        layout="constrained",
    )
    axes = figure.subplots(1 + len(maps), 1, height_ratios=[1.1, *[_INCHES_PER_MAP] * len(maps)])
    figure.suptitle(f"The image, and the {most} strongest maps of each layer", fontsize=9)
    axes[0].imshow(np.asarray(image))
    axes[0].set_anchor("W")
    axes[0].axis("off")
    for panel, (name, values) in zip(axes[1:], maps.items(), strict=True):
        height, width, count = values.shape
        shown = np.argsort(-values.mean((0, 1)), kind="stable")[:most]
        panel.imshow(_strip(values[..., shown], most), cmap="gray", vmin=0, vmax=1)
        panel.set_xticks([])
        panel.set_yticks([])
        panel.spines[:].set_visible(False)
        panel.set_anchor("W")
        panel.set_ylabel(
            f"{name}\n{height}×{width}×{count}\n{np.mean(values == 0):.0%} zero",
            fontsize=7,
            rotation=0,
            horizontalalignment="right",
            verticalalignment="center",
        )
    return figure


def _strip(values: np.ndarray, places: int) -> np.ndarray:
    """Return n maps [H, W, n] side by side on white [h, places * (w + gap) - gap].

    Small maps are enlarged to about 50 pixels, so that all rows have one length.
    """
    low, high = values.min((0, 1)), values.max((0, 1))
    stretched = (values - low) / np.maximum(high - low, 1e-12)
    larger = max(1, round(_PIXELS / values.shape[1]))
    stretched = stretched.repeat(larger, axis=0).repeat(larger, axis=1)
    height, width, _ = stretched.shape
    gap = max(1, width // 16)
    tiles = np.pad(stretched, ((0, 0), (0, gap), (0, 0)), constant_values=1)
    strip = tiles.transpose(0, 2, 1).reshape(height, -1)
    empty = places * (width + gap) - strip.shape[1]
    return np.pad(strip, ((0, 0), (0, empty)), constant_values=1)[:, :-gap]
