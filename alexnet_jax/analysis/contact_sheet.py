"""Pictures of a data set under their class names: a wrong label is seen at once."""

import numpy as np
from matplotlib.figure import Figure

from alexnet_jax.data.imagenet import words
from alexnet_jax.data.sources import Source

_COLUMNS = 6


def contact_sheet(
    train: Source,
    train_labels: np.ndarray,
    evaluation: Source | None = None,
    eval_labels: np.ndarray | None = None,
    *,
    num_classes: int = 24,
) -> Figure:
    """One picture a class of each split, side by side under label and name.

    Args:
      train, evaluation: the splits; without the second one picture a class.
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
    rows = -(-count // _COLUMNS)
    height = 2.6 / len(splits) + 0.3  # of a row, in inches: the pictures and a title
    figure = Figure(figsize=(2.6 * _COLUMNS, height * rows), layout="constrained")
    axes = figure.subplots(rows, _COLUMNS, squeeze=False)
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
