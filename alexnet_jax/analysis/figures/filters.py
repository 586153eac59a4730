"""Draw the first layer's kernels, one panel per column (paper, figure 3)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_INCHES_A_KERNEL = 0.55
_COLUMNS = ("#4477aa", "#cc3311", "#228833", "#ee7733")


def first_layer_filters(kernel: Any, *, columns: int = 1) -> Figure:
    """Draw every kernel of the first layer.

    Args:
      kernel: [kh, kw, 3, features].
      columns: of the network, one panel each; a column's kernels are contiguous.

    Returns:
      A matplotlib figure. Each kernel is stretched to its own smallest and largest
      weight, all three colours alike.

    Raises:
      ValueError: the features do not divide into the columns.
    """
    weights = np.asarray(kernel, np.float32)
    features = weights.shape[-1]
    if features % columns:
        raise ValueError(
            f"{features} kernels do not divide into {columns} columns; set `columns` to a "
            f"divisor of {features}."
        )
    low, high = weights.min((0, 1, 2)), weights.max((0, 1, 2))
    stretched = (weights - low) / np.maximum(high - low, 1e-12)
    each = features // columns
    # Full rows, several times as wide as high: 48 kernels are 3 rows of 16, as in
    # the paper.
    widths = [n for n in range(1, each + 1) if each % n == 0]
    across = next((n for n in widths if n * n >= 5 * each), each)
    down = each // across
    figure = Figure(
        figsize=(across * _INCHES_A_KERNEL, columns * (down * _INCHES_A_KERNEL + 0.35)),
        layout="constrained",
    )
    panels = figure.subplots(columns, 1, squeeze=False)[:, 0]
    for column, panel in enumerate(panels):
        sheet = _sheet(stretched[..., column * each : (column + 1) * each], across)
        panel.imshow(sheet, interpolation="nearest")
        title = f"conv1, column {column + 1} of {columns}" if columns > 1 else "conv1"
        panel.set_title(f"{title}: {each} kernels", fontsize=9, loc="left")
        panel.axis("off")
    return figure


@dataclass(frozen=True)
class FilterStatistics:
    """Colour and orientation of the first layer's kernels, [features] each.

    Attributes:
      colour: share of a kernel's energy (sum of squared weights) in differences between
        the colours, in [0, 1]; 0: the three colours are alike.
      orientation: of the edges it responds to, in [0, pi) radians, 0 for horizontal
        ones; pi / 4 rises to the right. It is perpendicular to the main axis of the
        structure tensor of the mean of the colours (Bigun and Granlund 1987).
      coherence: 1 for a grating, 0 for a spot.
    """

    colour: np.ndarray
    orientation: np.ndarray
    coherence: np.ndarray


def filter_statistics(kernel: Any) -> FilterStatistics:
    """Return colour and orientation of each kernel [kh, kw, 3, features].

    "The kernels on GPU 1 are largely color-agnostic, while the kernels on GPU 2 are
    largely color-specific" (the paper, section 6.1).
    """
    weights = np.asarray(kernel, np.float64)
    grey = weights.mean(axis=2)
    energy = (weights**2).sum((0, 1, 2))
    of_grey = weights.shape[2] * (grey**2).sum((0, 1))
    colour = 1.0 - of_grey / np.maximum(energy, 1e-300)
    down, along = np.gradient(grey, axis=(0, 1))
    up = -down
    xx, yy, xy = (along**2).sum((0, 1)), (up**2).sum((0, 1)), (along * up).sum((0, 1))
    # The gradient's axis; an edge runs across it.
    gradient = 0.5 * np.arctan2(2 * xy, xx - yy)
    strength = np.hypot(2 * xy, xx - yy)
    return FilterStatistics(
        colour=np.clip(colour, 0.0, 1.0),
        orientation=(gradient + np.pi / 2) % np.pi,
        coherence=strength / np.maximum(xx + yy, 1e-300),
    )


def filter_statistics_by_column(kernel: Any, *, columns: int = 1) -> Figure:
    """Draw each column's kernels by colour, coherence and orientation.

    Takes the arguments of `first_layer_filters`.

    Returns:
      A matplotlib figure: on the left each kernel's share of colour and its coherence;
      on the right, as a rose, the orientations of kernels with coherence above 0.5.
    """
    found = filter_statistics(kernel)
    each = len(found.colour) // columns
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    left = figure.add_subplot(1, 2, 1)
    right: Any = figure.add_subplot(1, 2, 2, projection="polar")
    edges = np.linspace(0, np.pi, 9)
    for column in range(columns):
        part = slice(column * each, (column + 1) * each)
        colour, coherence = found.colour[part], found.coherence[part]
        style = {"color": _COLUMNS[column % len(_COLUMNS)], "alpha": 0.6}
        median = f"column {column + 1}: median {np.median(colour):.0%} colour"
        left.plot(colour, coherence, "o", markersize=4, label=median, **style)
        oriented = found.orientation[part][coherence > 0.5]
        count, _ = np.histogram(oriented, edges)
        width = (edges[1] - edges[0]) / columns
        right.bar(edges[:-1] + (column + 0.5) * width, count, width, **style)
    left.set_xlabel("share of colour")
    left.set_ylabel("coherence of orientation")
    left.set_xlim(0, 1)
    left.set_ylim(0, 1)
    left.legend(frameon=False, fontsize=8)
    left.grid(alpha=0.3)
    left.spines[["top", "right"]].set_visible(False)
    right.set_thetalim(0, np.pi)
    right.set_title("kernels by orientation of their edges", fontsize=9)
    right.tick_params(labelsize=7)
    right.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    return figure


def _sheet(kernels: np.ndarray, across: int) -> np.ndarray:
    """Return one image with the n tiles of [kh, kw, 3, n], `across` per row, white between."""
    tiles = np.pad(kernels, ((0, 1), (0, 1), (0, 0), (0, 0)), constant_values=1)
    height, width, colours, count = tiles.shape
    down = count // across
    rows = tiles.reshape(height, width, colours, down, across).transpose(3, 0, 4, 1, 2)
    return rows.reshape(down * height, across * width, colours)[:-1, :-1]
