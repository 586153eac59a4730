"""Base classes of the sources of images."""

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Self
from urllib.parse import quote

import numpy as np

from alexnet_jax.data import images as images_lib


class Source:
    """One split of a data set: examples by index, without order or state.

    Attributes:
      num_examples: number of examples in the split, at least 1.
      class_names: names, indexed by label; `num_classes` is their number.
      image_size: side S of the images that `fetch` writes.
      description: one line that says where the examples are.
      left_out: one line about the files there that are not read; empty if all are.
      ranges: (place, start, end) of the stored examples, for `overlap`.
      statistics_path: file beside the data for the mean image and the colour PCA of
        this split; None if there is no such place.
    """

    num_examples: int
    class_names: tuple[str, ...]
    image_size: int
    description: str
    left_out = ""
    ranges: tuple[tuple[str, int, int], ...] = ()
    statistics_path: Path | None = None

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def labels_of(self, indices: np.ndarray) -> np.ndarray:
        """Return the labels of examples `indices` [n] as int32 [n]; decode nothing."""
        raise NotImplementedError

    def fetch(self, indices: np.ndarray, images: np.ndarray, labels: np.ndarray) -> None:
        """Write examples `indices` [n] into the caller's arrays; thread-safe.

        Args:
          images: uint8 [n, S, S, 3].
          labels: int32 [n].

        Raises:
          DataError: an image is broken; the message names it.
        """
        raise NotImplementedError


class StoredSource(Source):
    """Image files or records on a disk."""

    _upright = False  # images are turned by their EXIF orientation
    _label_of: np.ndarray  # stored class -> label, see `with_classes`

    def name_of(self, index: int) -> str:
        """Return the file or record of an example, for messages."""
        raise NotImplementedError

    def record(self, index: int) -> tuple[int, bytes]:
        """Return the label and the image file of an example."""
        raise NotImplementedError

    def fetch(self, indices: np.ndarray, images: np.ndarray, labels: np.ndarray) -> None:
        upright, size = self._upright, self.image_size
        for i, index in enumerate(indices.tolist()):
            labels[i], data = self.record(index)
            images_lib.decode(data, size, self.name_of(index), images[i], upright=upright)

    def with_classes(self, class_names: Sequence[str]) -> Self:
        """Return the same images, labelled by the position in `class_names`."""
        positions = np.array([class_names.index(name) for name in self.class_names], np.int32)
        other = copy.copy(self)
        other._label_of = positions[self._label_of]
        other.class_names = tuple(class_names)
        return other


class Sample(Source):
    """A fixed sample: one image drawn from each of `count` equal parts of a source.

    So the images are spread evenly (class folders are sorted by class), yet without a
    period (other splits have their classes in turn).
    """

    def __init__(self, source: Source, count: int):
        total = source.num_examples
        self.num_examples = min(count, total)
        self._source = source
        self._chosen = np.arange(total)
        self.description, self.left_out = source.description, source.left_out
        if self.num_examples < total:
            places = np.random.default_rng(0).random(count) + np.arange(count)
            self._chosen = (places * total / count).astype(np.int64)
            self.description += f", {count} of {total}"
        self.class_names, self.image_size = source.class_names, source.image_size

    def labels_of(self, indices: np.ndarray) -> np.ndarray:
        return self._source.labels_of(self._chosen[indices])

    def fetch(self, indices: np.ndarray, images: np.ndarray, labels: np.ndarray) -> None:
        self._source.fetch(self._chosen[indices], images, labels)


def statistics_name(split: str, image_size: int) -> str:
    part = "" if split == "train" else "_" + quote(split, safe="")
    return f"statistics_{image_size}{part}.npz"


def some(names: Sequence[str], limit: int = 8) -> str:
    """Return "a, b, c", "a, b, ... (17 in all)" or "nothing", for messages."""
    shown = ", ".join(names[:limit]) or "nothing"
    return f"{shown}, ... ({len(names)} in all)" if len(names) > limit else shown


def visible(folder: Path) -> dict[str, bool]:
    """Return {name: it is a folder}, sorted, of all in a folder that is not hidden."""
    with os.scandir(folder) as entries:
        found = {e.name: e.is_dir() for e in entries if not e.name.startswith(".")}
    return dict(sorted(found.items()))


def what_is_in(folder: Path) -> str:
    """Describe a folder that lacks something, for messages."""
    if not folder.is_dir():
        return f"{folder} {'is not a folder' if folder.exists() else 'does not exist'}"
    return f"found in {folder}: {some(list(visible(folder)))}"
