"""Pictures and those that a network finds most like them (paper, figure 4, right)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_INCHES = 0.95
_LONGEST = 19  # letters of a title that are as wide as a picture


def nearest_pictures(
    queries: Any,
    found: Any,
    pixel_found: Any | None = None,
    *,
    found_titles: Sequence[Sequence[str]] | None = None,
    pixel_titles: Sequence[Sequence[str]] | None = None,
    query_titles: Sequence[str] | None = None,
    layer: str = "fc7",
) -> Figure:
    """Draws a row a query: itself, its neighbours, and its neighbours in pixels.

    Args:
      queries: uint8 [Q, S, S, 3].
      found: uint8 [Q, N, S, S, 3], the nearest by features, the nearest first.
      pixel_found: the same by distances between pixels; None: not drawn.
      found_titles, pixel_titles: [Q][N], what stands above each, such as its class.
      query_titles: [Q].
      layer: whose features, for the heading.

    Returns:
      A matplotlib figure: the query at the left, then both groups, each with a heading.
    """
    queries, found = np.asarray(queries), np.asarray(found)
    groups = [(f"nearest in {layer}", found, found_titles)]
    if pixel_found is not None:
        groups.append(("nearest in pixels", np.asarray(pixel_found), pixel_titles))
    count = found.shape[1]
    rows = len(queries)
    figure = Figure(
        figsize=(
            _INCHES * (1.2 + len(groups) * (count + 0.2)),
            1.12 * _INCHES * rows + 0.3,
        ),
        layout="constrained",
    )
    widths = [1.2, *[count + 0.2] * len(groups)]
    parts: Any = figure.subfigures(1, len(widths), width_ratios=widths)
    parts[0].suptitle("query", fontsize=9)
    column = parts[0].subplots(rows, 1, squeeze=False)[:, 0]
    for row, axes in enumerate(column):
        _show(axes, queries[row], None if query_titles is None else query_titles[row])
    for part, (heading, pictures, titles) in zip(parts[1:], groups, strict=True):
        part.suptitle(heading, fontsize=9)
        grid = part.subplots(rows, count, squeeze=False)
        for row in range(rows):
            for place in range(count):
                title = None if titles is None else titles[row][place]
                _show(grid[row, place], pictures[row, place], title)
    return figure


def _show(axes: Axes, picture: np.ndarray, title: str | None) -> None:
    axes.imshow(picture)
    axes.axis("off")
    if title is not None:
        # A longer one keeps its end, which tells files apart.
        short = title if len(title) <= _LONGEST else f"...{title[3 - _LONGEST :]}"
        axes.set_title(short, fontsize=6, pad=2, parse_math=False)
