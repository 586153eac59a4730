"""Features of images from a trained network: for predict, retrieve and the report."""

import copy
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from alexnet_jax import data as data_lib
from alexnet_jax.data.errors import DataError
from alexnet_jax.data.images import load_picture
from alexnet_jax.data.sources import Source
from alexnet_jax.models import ops
from alexnet_jax.system.cli import progress
from alexnet_jax.system.files import atomic_write
from alexnet_jax.training.checkpoint import split_step
from alexnet_jax.training.load import is_weights_file, make_preprocess, read_network
from alexnet_jax.training.workdir import read_config

# Images per call of the network.
BATCH = 64


class Extractor:
    """A trained network as a function from raw images to one layer's features.

    Args:
      path: the workdir of a run, or a file of weights; as for `load.load`.
      layer: a name of `model.apply(..., method="features")`, for example "fc7".
      step: which checkpoint; as for `load.load`.
      batch: images per call of the network; smaller batches are filled up, so that one
        compiled program serves all.

    Attributes:
      model, variables: as from `load.load`.
      image_size: side of the images in pixels.
      class_names: by label; "class 3" if neither run nor file names it.

    Raises:
      ValueError: the network has no such layer.
      FileNotFoundError, CheckpointError: as `load.load`.
    """

    def __init__(self, path: Path, layer: str, *, step: int | None = None, batch: int = BATCH):
        weights = read_network(path, step=step)
        self.model, self.variables = weights.make_model(), weights.variables
        self.image_size = weights.image_size
        known = weights.class_names or ()
        count = self.model.network.layers[-1].features
        unnamed = [f"class {k}" for k in range(len(known), count)]
        self.class_names = [*known[:count], *unnamed]
        self._preprocess = make_preprocess(weights)
        self._data: dict[str, Any] = {}
        if not is_weights_file(path):
            folder, _ = split_step(os.fspath(path))
            self._data = (read_config(Path(folder)) or {}).get("data", {})
        self._batch = batch
        self._grey = np.full((self.image_size, self.image_size, 3), 128, np.uint8)
        self._set_layer(layer)

    def of(self, layer: str) -> "Extractor":
        """Return an extractor of another layer of the same network."""
        other = copy.copy(self)
        other._set_layer(layer)
        return other

    def _set_layer(self, layer: str) -> None:
        model, variables = self.model, self.variables

        def features(images: jax.Array) -> Any:
            return model.apply(variables, images, method="features")

        known = jax.eval_shape(features, self._preprocess(self._grey))
        if layer not in known:
            raise ValueError(f"layer {layer!r} must be one of {', '.join(known)}.")
        self._apply = ops.jit(lambda images: features(images)[layer].reshape(len(images), -1))

    @property
    def data(self) -> dict[str, Any]:
        """The fields `data` of the run's config.

        Raises:
          DataError: the weights are from a file, which names no data.
        """
        if not self._data:
            raise DataError(
                "a file of weights does not say which pictures: give --source, such as "
                "--source=folder:PATH, and --split."
            )
        return self._data

    def __call__(self, pictures: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        """Return the features float32 [B, D] of raw images uint8 [S, S, 3], B > 0."""
        found = []
        for start in range(0, len(pictures), self._batch):
            part = list(pictures[start : start + self._batch])
            filled = part + [self._grey] * (self._batch - len(part))
            features = np.asarray(self._apply(self._preprocess(filled)), np.float32)
            found.append(features[: len(part)])
        return np.concatenate(found)

    def over(self, pictures: Source, what: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the images of a split in order and their features, in batches.

        Shows progress under the name `what`.

        Yields:
          (uint8 [B, S, S, 3], float32 [B, D]).
        """
        with (
            data_lib.eval_batches(pictures, batch_size=self._batch) as batches,
            progress(what, pictures.num_examples, "pictures") as advance,
        ):
            for batch in batches:
                images = batch["image"][: int(batch["mask"].sum())]
                yield images, self(images)
                advance(len(images))

    def open(self, split: str, *, source: str | None = None, data_dir: str | None = None) -> Source:
        """Open a split by `data.open_source`; without `source` the run's own data."""
        return data_lib.open_source(
            source or str(self.data["source"]),
            split,
            data_dir=data_dir or self._data.get("dir") or None,
            image_size=self.image_size,
        )

    def probe(self) -> np.ndarray:
        """Return the features of a grey image, float32 [D], to recognise the network."""
        return self(self._grey[None])[0]


def read(paths: Sequence[str], size: int) -> list[np.ndarray | Exception]:
    """Return uint8 [size, size, 3] for each file, or the error why it is unreadable."""
    found: list[np.ndarray | Exception] = []
    for path in paths:
        try:
            found.append(load_picture(path, size))
        except (OSError, ValueError) as error:
            found.append(error)
    return found


def fetch(source: Source, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return images uint8 [N, S, S, 3] of a source and their labels int32 [N]."""
    size = source.image_size
    images = np.empty((len(indices), size, size, 3), np.uint8)
    labels = np.empty(len(indices), np.int32)
    source.fetch(indices, images, labels)
    return images, labels


def save_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure atomically; its folder is made if missing."""
    with atomic_write(path) as file:
        figure.savefig(file, format=path.suffix.removeprefix(".").lower(), dpi=150)
