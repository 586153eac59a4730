"""Draw images: with predicted labels, by class, and with their nearest neighbours."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from alexnet_jax.data.imagenet import words
from alexnet_jax.data.sources import Source

_LABELLED_ACROSS, _CLASSES_ACROSS = 4, 6
_RIGHT, _OTHER = "#ee6677", "#4477aa"  # the correct label is red in the paper
_INCHES = 0.95  # side of a neighbour
_LONGEST = 19  # letters of a title that are as wide as a neighbour


def best_labels(
    images: Any,
    probabilities: Any,
    class_names: Sequence[str],
    *,
    titles: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
    top: int = 5,
) -> Figure:
    """Draw each image above bars of its most probable labels (paper, figure 4, left).

    Args:
      images: uint8 [N, S, S, 3].
      probabilities: [N, K].
      class_names: K names.
      titles: one per image; None: the names of `labels`, if they are given.
      labels: the correct ones, whose bar is red if it is among the best.
      top: bars per image, from 0 to 1.
    """
    shown, chances = np.asarray(images), np.asarray(probabilities, np.float64)
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
    splits, shared = [(train, train_labels)], np.unique(train_labels)
    if evaluation is not None and eval_labels is not None:
        both = np.intersect1d(shared, eval_labels)
        if len(both):
            splits.append((evaluation, eval_labels))
            shared = both
    count = min(num_classes, len(shared))
    chosen = shared[np.arange(count) * len(shared) // count]
    parts = []
    for source, labels in splits:
        size = source.image_size
        images = np.empty((count, size, size, 3), np.uint8)
        first = np.array([np.argmax(labels == label) for label in chosen])
        source.fetch(first, images, np.empty(count, np.int32))
        margin = ((0, 0), (0, 0), (0, size // 32), (0, 0))  # white, at the right
        parts.append(np.pad(images, margin, constant_values=255))
    pairs = np.concatenate(parts, axis=2)
    rows = -(-count // _CLASSES_ACROSS)
    height = 2.6 / len(splits) + 0.3  # of a row, in inches: the images and a title
    figure = Figure(figsize=(2.6 * _CLASSES_ACROSS, height * rows), layout="constrained")
    grid = figure.subplots(rows, _CLASSES_ACROSS, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, label, pair in zip(grid.flat, chosen, pairs, strict=False):
        axes.imshow(pair)
        name = words(train.class_names[label])
        axes.set_title(f"{label}  {name[:26]}", fontsize=9, parse_math=False)
    about = "left: training, right: evaluation" if len(splits) == 2 else train.description
    figure.suptitle(about, fontsize=9, parse_math=False)
    return figure


def nearest_images(
    queries: np.ndarray,
    query_titles: Sequence[str],
    groups: Sequence[tuple[str, np.ndarray, Sequence[str]]],
) -> Figure:
    """Draw one row per query: the query, then its neighbours in each group.

    The paper's figure 4, right.

    Args:
      queries: uint8 [Q, S, S, 3].
      query_titles: [Q].
      groups: (heading, uint8 [Q * N, S, S, 3], titles [Q * N]), query by query, the
        nearest first.
    """
    rows = len(queries)
    count = len(groups[0][1]) // rows
    widths = [1.2, *[count + 0.2] * len(groups)]
    size = (_INCHES * sum(widths), 1.12 * _INCHES * rows + 0.3)
    figure = Figure(figsize=size, layout="constrained")
    parts: Any = figure.subfigures(1, len(widths), width_ratios=widths)
    for part, (heading, images, titles) in zip(
        parts, [("query", queries, query_titles), *groups], strict=True
    ):
        part.suptitle(heading, fontsize=9)
        grid = part.subplots(rows, len(images) // rows, squeeze=False)
        for axes, image, title in zip(grid.flat, images, titles, strict=True):
            axes.imshow(image)
            axes.axis("off")
            # A long one keeps its end, where file names differ.
            short = title if len(title) <= _LONGEST else f"...{title[3 - _LONGEST :]}"
            axes.set_title(short, fontsize=6, pad=2, parse_math=False)
    return figure
