"""Class folders, tfds data sets and fake data behind one interface.

A source knows how many examples there are and fetches any of them by index into arrays
that the caller owns. Order and state are the loader's.
"""

import re
from collections.abc import Callable, Sequence

import numpy as np

from alexnet_jax.data.errors import DataError
from alexnet_jax.data.sources.source import Sample, Source, StoredSource, some

__all__ = [
    "Sample",
    "Source",
    "StoredSource",
    "match_classes",
    "open_source",
    "overlap",
    "warnings_about",
]

_LABELS_LOOKED_AT = 256  # before training: reading all of them may take minutes


def open_source(
    source: str, split: str, *, data_dir: str | None = None, image_size: int = 256
) -> Source:
    """Open one split of a data set.

    Args:
      source: `folder:PATH` (PATH/train/<class>/*.jpg), `textures` (procedural
        images, built at first use; `textures/tiny` for tests), `fake`, or the
        name of a prepared tfds data set: `imagenet2012_256`, `cifar10:3.0.2`,
        `name/config`.
      split: `train`, `test`, ...; for tfds also slices, for example `train[:90%]`. For
        a folder, `test`, `val` and `validation` stand for each other.
      data_dir: directory of tfds data sets; if absent the environment variable
        TFDS_DATA_DIR, else ~/tensorflow_datasets.
      image_size: side of the images in pixels; others are resized.

    Raises:
      DataError: (a ValueError) the data cannot be used.
      FileNotFoundError: the data is not there.
    """
    # Each kind is imported when it is opened.
    if source.startswith("folder:"):
        from alexnet_jax.data.sources.folder import FolderSource

        return FolderSource(source.removeprefix("folder:"), split, image_size)
    if source == "fake":
        from alexnet_jax.data.sources.fake import FakeSource

        return FakeSource(split, image_size)
    if not re.fullmatch(r"\w+(/[\w.\-]+)?(:[\d.*]+)?", source):
        raise DataError(
            f"unknown data source {source!r}: --config.data.source takes folder:PATH, "
            "textures, fake, or the name of a tfds data set, for example imagenet2012_256"
        )
    from alexnet_jax.data.sources.tfds import TfdsSource, tfds_data_dir, tfds_directory

    directory = tfds_data_dir(data_dir)
    if source in ("textures", "textures/tiny"):
        from alexnet_jax.data.textures import build

        source = build(directory, tiny=source.endswith("tiny"))
    return TfdsSource(tfds_directory(source, directory), split, image_size)


def match_classes(
    source: Source, class_names: Sequence[str], *, log: Callable[[str], object] = lambda _: None
) -> Source:
    """Return a split with the labels of the trained classes, matched by name.

    Args:
      source: the split; it may lack some of the trained classes.
      class_names: the trained classes, by label.
      log: called with a warning about trained classes without images in the split.

    Raises:
      DataError: the split has classes that were never trained.
    """
    if source.class_names == tuple(class_names):
        return source
    absent = sorted(set(class_names) - set(source.class_names))
    unknown = sorted(set(source.class_names) - set(class_names))
    if unknown:
        lacking = f"; it lacks {some(absent)}" if absent else ""
        raise DataError(
            f"{source.description} has classes that were never trained: "
            f"{some(unknown)}{lacking} ({source.num_classes} classes there, "
            f"{len(class_names)} trained). Remove or rename these classes, or take a network that "
            "was trained on them"
        )
    if absent:
        log(
            f"WARNING: no images of {len(absent)} of the {len(class_names)} trained "
            f"classes: {some(absent)} ({source.description}); labels are matched by "
            "class name"
        )
    assert isinstance(source, StoredSource)  # the classes of fake data are always equal
    return source.with_classes(class_names)


def overlap(train: Source, evaluation: Source) -> str:
    """Return a message about evaluation images that are training images, or "".

    Images are compared by place: slices of a tfds data set may overlap, and two names
    may stand for one folder.
    """
    shared = sum(
        max(0, min(end, other_end) - max(start, other_start))
        for place, start, end in train.ranges
        for other, other_start, other_end in evaluation.ranges
        if place == other
    )
    if not shared:
        return ""
    total = evaluation.num_examples
    return (
        f"{min(shared, total):,} of {total:,} evaluation images are training images "
        f"too, so their error is not that of unseen images (training: "
        f"{train.description}; evaluation: {evaluation.description}). Take a split of "
        "other images (of a tfds data set for example train[:90%] and train[90%:])"
    )


def warnings_about(train: Source | None, evaluation: Source | None = None) -> list[str]:
    """Return lines about skipped files, and mistakes with which the numbers look good."""
    lines = []
    for what, source in (("training", train), ("evaluation", evaluation)):
        if source is None:
            continue
        if source.left_out:
            lines.append(f"WARNING: {source.left_out}")
        sample = Sample(source, _LABELS_LOOKED_AT)
        labels = sample.labels_of(np.arange(sample.num_examples))
        if (labels == labels[0]).all():
            lines.append(
                f"WARNING: every {what} image looked at ({len(labels):,} of "
                f"{source.num_examples:,}) is of one class, "
                f"{source.class_names[labels[0]]}. A low loss and error mean "
                "nothing then: take a split of several classes"
            )
    if train and evaluation and (message := overlap(train, evaluation)):
        lines.append(f"WARNING: {message}")
    return lines
