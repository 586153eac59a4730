"""The first layer's kernels as pictures, a panel a column (paper, figure 3)."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

# Larger than this, kernels need no more pixels to be seen.
_INCHES_A_KERNEL = 0.55


def first_layer_filters(kernel: Any, *, columns: int = 1) -> Figure:
    """Draws every kernel of the first layer.

    Args:
      kernel: [kh, kw, 3, features], the first layer's.
      columns: panels, one a column of the network: its kernels are contiguous.

    Returns:
      A matplotlib figure. Each kernel is stretched to its own smallest and largest
      weight, all three colours alike, so that weak ones can be seen as well.

    Raises:
      ValueError: if the features do not divide into the columns.
    """
    weights = np.asarray(kernel, np.float32)
    features = weights.shape[-1]
    if features % columns:
        raise ValueError(f"{features} kernels do not divide into {columns} columns.")
    low, high = weights.min((0, 1, 2)), weights.max((0, 1, 2))
    pictures = (weights - low) / np.maximum(high - low, 1e-12)
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
        sheet = _sheet(pictures[..., column * each : (column + 1) * each], across)
        panel.imshow(sheet, interpolation="nearest")
        title = f"conv1, column {column + 1} of {columns}" if columns > 1 else "conv1"
        panel.set_title(f"{title}: {each} kernels", fontsize=9, loc="left")
        panel.axis("off")
    return figure


def _sheet(pictures: np.ndarray, across: int) -> np.ndarray:
    """[kh, kw, 3, n] -> one white picture with the n tiles, `across` in a row."""
    height, width, _, count = pictures.shape
    down = count // across
    sheet = np.ones((down * (height + 1) - 1, across * (width + 1) - 1, 3), np.float32)
    for index in range(count):
        top, left = index // across * (height + 1), index % across * (width + 1)
        sheet[top : top + height, left : left + width] = pictures[..., index]
    return sheet
