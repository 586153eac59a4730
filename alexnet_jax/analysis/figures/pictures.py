"""Draw images: with predicted labels, by class, and with their nearest neighbours."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from alexnet_jax.data.imagenet import words
from alexnet_jax.data.sources import Source

_LABELLED_ACROSS, _CLASSES_ACROSS = 4, 6
_RIGHT, _OTHER = "#ee6677", "#4477aa"  # the correct label is red in the paper
_INCHES = 0.95  # side of a neighbour
_LONGEST = 19  # letters of a title that are as wide as a neighbour


def best_labels(
    pictures: Any,
    probabilities: Any,
    class_names: Sequence[str],
    *,
    titles: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
    top: int = 5,
) -> Figure:
    """Draw each image above bars of its most probable labels (paper, figure 4, left).

    Args:
      pictures: uint8 [N, S, S, 3].
      probabilities: [N, K].
      class_names: K names.
      titles: one per image; None: the names of `labels`, if they are given.
      labels: the correct ones, whose bar is red if it is among the best.
      top: bars per image.

    Returns:
      A matplotlib figure with four images per row, bars from 0 to 1.
    """
    shown, chances = np.asarray(pictures), np.asarray(probabilities, np.float64)
    count, top = len(shown), min(top, chances.shape[1])
    if titles is None and labels is not None:
        titles = [class_names[label] for label in labels]
    across = min(_LABELLED_ACROSS, count)
    rows = -(-count // across)
    figure = Figure(figsize=(2.1 * across, (2.2 + 0.24 * top) * rows), layout="constrained")
    grid = figure.subplots(2 * rows, across, squeeze=False, height_ratios=[2.0, 0.24 * top] * rows)
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


def contact_sheet(
    train: Source,
    train_labels: np.ndarray,
    evaluation: Source | None = None,
    eval_labels: np.ndarray | None = None,
    *,
    num_classes: int = 24,
) -> Figure:
    """Draw one image per class of each split, under label and name.

    Args:
      train, evaluation: the splits.
      train_labels, eval_labels: the labels of all their examples.
      num_classes: how many classes to show, evenly spread over those that both have.
    """
    splits = [(train, train_labels)]
    present = set(train_labels.tolist())
    if evaluation is not None and eval_labels is not None:
        both = present & set(eval_labels.tolist())
        if both:
            splits.append((evaluation, eval_labels))
            present = both
    shared, count = sorted(present), min(num_classes, len(present))
    chosen = [shared[k * len(shared) // count] for k in range(count)]
    # [class, S, S of each split side by side, 3]
    pictures = np.concatenate(
        [
            _pictures(source, [int(np.argmax(labels == k)) for k in chosen])
            for source, labels in splits
        ],
        axis=2,
    )
    rows = -(-count // _CLASSES_ACROSS)
    height = 2.6 / len(splits) + 0.3  # of a row, in inches: the pictures and a title
    figure = Figure(figsize=(2.6 * _CLASSES_ACROSS, height * rows), layout="constrained")
    axes = figure.subplots(rows, _CLASSES_ACROSS, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, label, picture in zip(axes.flat, chosen, pictures, strict=False):
        axis.imshow(picture)
        name = words(train.class_names[label])
        axis.set_title(f"{label}  {name[:26]}", fontsize=9, parse_math=False)
    sides = ("left: training, right: evaluation", train.description)
    figure.suptitle(sides[2 - len(splits)], fontsize=9, parse_math=False)
    return figure


def _pictures(source: Source, indices: list[int]) -> np.ndarray:
    """uint8 [n, S, S + a white margin at the right, 3]."""
    size = source.image_size
    pictures = np.empty((len(indices), size, size, 3), np.uint8)
    source.fetch(np.array(indices), pictures, np.empty(len(indices), np.int32))
    margin = ((0, 0), (0, 0), (0, size // 32), (0, 0))
    return np.pad(pictures, margin, constant_values=255)


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
    """Draw one row per query: the query, its neighbours, its neighbours in pixels.

    The paper's figure 4, right.

    Args:
      queries: uint8 [Q, S, S, 3].
      found: uint8 [Q, N, S, S, 3], the nearest by features, the nearest first.
      pixel_found: the same by distances between pixels; None: not drawn.
      found_titles, pixel_titles: [Q][N], for example class names.
      query_titles: [Q].
      layer: whose features, for the heading.

    Returns:
      A matplotlib figure: the query at the left, then both groups.
    """
    queries, found = np.asarray(queries), np.asarray(found)
    groups = [(f"nearest in {layer}", found, found_titles)]
    if pixel_found is not None:
        groups.append(("nearest in pixels", np.asarray(pixel_found), pixel_titles))
    count = found.shape[1]
    rows = len(queries)
    figure = Figure(
        figsize=(_INCHES * (1.2 + len(groups) * (count + 0.2)), 1.12 * _INCHES * rows + 0.3),
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
        # A long one keeps its end, where file names differ.
        short = title if len(title) <= _LONGEST else f"...{title[3 - _LONGEST :]}"
        axes.set_title(short, fontsize=6, pad=2, parse_math=False)
