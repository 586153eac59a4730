"""Features of images from a trained network: for predict, retrieve and the report."""

import copy
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from alexnet_jax import data as data_lib
from alexnet_jax.data.images import load_image
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
      data: the fields `data` of the run's config; empty for a file of weights.

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
        self.data: dict[str, Any] = {}
        if not is_weights_file(path):
            folder, _ = split_step(os.fspath(path))
            self.data = (read_config(Path(folder)) or {})["data"]
        self.layer = layer
        self._batch = batch
        self._preprocess = make_preprocess(weights)
        self._grey = np.full((self.image_size, self.image_size, 3), 128, np.uint8)
        model, variables = self.model, self.variables

        def features(images: jax.Array) -> Any:
            return model.apply(variables, images, method="features")

        def features_of(images: jax.Array, layer: str) -> jax.Array:
            return features(images)[layer].reshape(len(images), -1)

        self._apply = ops.jit(features_of, static_argnames="layer")
        layers = jax.eval_shape(features, self._preprocess(self._grey))
        if layer not in layers:
            raise ValueError(f"layer {layer!r} must be one of {', '.join(layers)}.")

    def of(self, layer: str) -> "Extractor":
        """Return an extractor of another layer of the same network."""
        other = copy.copy(self)
        other.layer = layer
        return other

    def __call__(self, images: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        """Return the features float32 [B, D] of raw images uint8 [S, S, 3], B > 0."""
        found = []
        for start in range(0, len(images), self._batch):
            part = list(images[start : start + self._batch])
            filled = part + [self._grey] * (self._batch - len(part))
            features = np.asarray(self._apply(self._preprocess(filled), self.layer), np.float32)
            found.append(features[: len(part)])
        return np.concatenate(found)

    def over(self, source: Source, what: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield raw images [B, S, S, 3] of a source in order, and features float32 [B, D].

        Shows progress under the name `what`.
        """
        with (
            data_lib.eval_batches(source, batch_size=self._batch) as batches,
            progress(what, source.num_examples, "images") as advance,
        ):
            for batch in batches:
                images = batch["image"][: int(batch["mask"].sum())]
                yield images, self(images)
                advance(len(images))

    def open(self, source: str, split: str, data_dir: str | None = None) -> Source:
        """Open a split as `data.open_source`, at the size of the network's images."""
        directory = data_dir or self.data.get("dir") or None
        size = self.image_size
        return data_lib.open_source(source, split, data_dir=directory, image_size=size)

    def probe(self) -> np.ndarray:
        """Return the features of a grey image, float32 [D], to recognise the network."""
        return self(self._grey[None])[0]


def read(paths: Sequence[str], size: int) -> list[np.ndarray | Exception]:
    """Return uint8 [size, size, 3] for each file, or the error why it is unreadable."""
    found: list[np.ndarray | Exception] = []
    for path in paths:
        try:
            found.append(load_image(path, size))
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
