"""Pictures with the labels that a network gives them (paper, figure 4, left)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

_ACROSS = 4
_RIGHT, _OTHER = "#ee6677", "#4477aa"  # the correct label is red in the paper


def best_labels(
    pictures: Any,
    probabilities: Any,
    class_names: Sequence[str],
    *,
    titles: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
    top: int = 5,
) -> Figure:
    """Draws each picture above bars of its most probable labels.

    Args:
      pictures: uint8 [N, S, S, 3], 0..255.
      probabilities: [N, K], in [0, 1].
      class_names: K of them, as they are to be read.
      titles: what stands above each picture; without it the correct label's name where
        `labels` are given.
      labels: the correct ones, whose bar is red if it is among the best.
      top: how many bars a picture.

    Returns:
      A matplotlib figure, four pictures in a row. The bars of a picture share one scale
      from 0 to 1; each bar's name stands on it.
    """
    shown, chances = np.asarray(pictures), np.asarray(probabilities, np.float64)
    count, top = len(shown), min(top, chances.shape[1])
    if titles is None and labels is not None:
        titles = [class_names[label] for label in labels]
    across = min(_ACROSS, count)
    rows = -(-count // across)
    figure = Figure(
        figsize=(2.1 * across, (2.2 + 0.24 * top) * rows), layout="constrained"
    )
    grid = figure.subplots(
        2 * rows, across, squeeze=False, height_ratios=[2.0, 0.24 * top] * rows
    )
    for axes in grid.flat:
        axes.axis("off")
    for i in range(count):
        upper, lower = grid[2 * (i // across) : 2 * (i // across) + 2, i % across]
        upper.imshow(shown[i])
        if titles is not None:
            upper.set_title(_short(titles[i], 28), fontsize=8, parse_math=False)
        order = np.argsort(-chances[i], kind="stable")[:top].tolist()
        right = None if labels is None else labels[i]
        colors = [_RIGHT if label == right else _OTHER for label in order]
        lower.barh(range(top), chances[i, order], 0.8, color=colors, alpha=0.55)
        for place, label in enumerate(order):
            name = f"{_short(class_names[int(label)], 22)}  {chances[i, label]:.0%}"
            style = {"fontsize": 7, "verticalalignment": "center"}
            lower.text(0.02, place, name, parse_math=False, **style)
        lower.set_xlim(0, 1)
        lower.set_ylim(top - 0.5, -0.5)  # the best on top
    return figure


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
