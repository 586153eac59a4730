"""What the commands that look at pictures have in common: predict, retrieve, report."""

import argparse
import copy
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from alexnet_jax import data as data_lib
from alexnet_jax import ops
from alexnet_jax.checkpoint import CheckpointError, split_step
from alexnet_jax.data.errors import DataError
from alexnet_jax.data.files import replacing
from alexnet_jax.data.images import load_picture
from alexnet_jax.data.paths import path_argument
from alexnet_jax.data.sources import Source
from alexnet_jax.loading import (
    is_weights_file,
    make_preprocess,
    read_config,
    read_network,
)
from alexnet_jax.writers import progress, show_every_name

# Kinds of files that figures are written to.
FIGURES = ("png", "jpg", "svg", "pdf")
# Pictures that go through the network at once.
BATCH = 64


class UnknownLayerError(ValueError):
    """A network has no features of that name."""


class Extractor:
    """A trained network as a function from pictures to one layer's features.

    Args:
      path: the workdir of a run, or a file of weights; as of `loading.load`.
      layer: a name of `model.apply(..., method="features")`, such as "fc7", "logits".
      step: which checkpoint; as `loading.load`.
      batch: pictures at once; fewer are filled up, so that one program does for all.

    Attributes:
      model, variables: as `loading.load`.
      image_size: side of the pictures in pixels.
      class_names: by label; "class 3" where neither run nor file says.

    Raises:
      UnknownLayerError: if there is no such layer.
      FileNotFoundError, CheckpointError: as `loading.load`.
    """

    def __init__(
        self,
        path: Path,
        layer: str,
        *,
        step: int | None = None,
        batch: int = BATCH,
    ):
        weights = read_network(path, step=step)
        self.model, self.variables = weights.make_model(), weights.variables
        self.image_size = weights.image_size
        known = weights.class_names or ()
        count = self.model.network.layers[-1].features
        self.class_names = [*known[:count]]
        self.class_names += [f"class {k}" for k in range(len(known), count)]
        self._preprocess = make_preprocess(weights)
        self._data: dict[str, Any] = {}
        if not is_weights_file(path):
            folder, _ = split_step(os.fspath(path))
            self._data = (read_config(Path(folder)) or {}).get("data", {})
        self._batch = batch
        self._grey = np.full((self.image_size, self.image_size, 3), 128, np.uint8)
        self._look_at(layer)

    def of(self, layer: str) -> "Extractor":
        """The same network, which is not read again, as a function to another layer."""
        other = copy.copy(self)
        other._look_at(layer)
        return other

    def _look_at(self, layer: str) -> None:
        model, variables = self.model, self.variables

        def features(images: jax.Array) -> Any:
            return model.apply(variables, images, method="features")

        known = jax.eval_shape(features, self._preprocess(self._grey))
        if layer not in known:
            raise UnknownLayerError(
                f"layer {layer!r} must be one of {', '.join(known)}."
            )
        self._apply = ops.jit(
            lambda images: features(images)[layer].reshape(len(images), -1)
        )

    @property
    def data(self) -> dict[str, Any]:
        """The fields `data` of the run's config.

        Raises:
          DataError: if the weights are from a file, which does not say.
        """
        if not self._data:
            raise DataError(
                "a file of weights does not say which pictures: give --source, such as "
                "--source=folder:PATH, and --split."
            )
        return self._data

    def __call__(self, pictures: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        """uint8 pictures [S, S, 3] -> float32 [B, D]; at least one."""
        found = []
        for start in range(0, len(pictures), self._batch):
            part = list(pictures[start : start + self._batch])
            filled = part + [self._grey] * (self._batch - len(part))
            features = np.asarray(self._apply(self._preprocess(filled)), np.float32)
            found.append(features[: len(part)])
        return np.concatenate(found)

    def over(
        self, pictures: Source, what: str
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The pictures of a split in order, and their features, batch by batch.

        Prints a progress bar, or a line a minute where nobody is watching.

        Args:
          what: they are, for the progress.

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

    def open(
        self,
        split: str,
        *,
        source: str | None = None,
        data_dir: str | None = None,
    ) -> Source:
        """A split of a data set, `data.open_source`; without `source` the run's own.

        Raises:
          DataError: as `open_source` and `data`.
        """
        return data_lib.open_source(
            source or str(self.data["source"]),
            split,
            data_dir=data_dir or self._data.get("dir") or None,
            image_size=self.image_size,
        )

    def probe(self) -> np.ndarray:
        """The features of a grey picture, float32 [D]: other networks have others."""
        return self(self._grey[None])[0]


def read(paths: Sequence[str], size: int) -> list[np.ndarray | Exception]:
    """uint8 [size, size, 3] of each file, or why it cannot be read."""
    found: list[np.ndarray | Exception] = []
    for path in paths:
        try:
            found.append(load_picture(path, size))
        except (OSError, ValueError) as error:
            found.append(error)
    return found


def parser(module: str, about: str | None, *, top: int) -> argparse.ArgumentParser:
    """A command line with what both take, but for the pictures."""
    made = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--workdir",
        type=path_argument,
        required=True,
        help="folder of a run, or a file of weights",
    )
    made.add_argument("--step", type=int, help="which checkpoint; else the best")
    made.add_argument("--top", type=int, default=top, help="answers a picture")
    made.add_argument("--format", choices=["text", "json"], default="text")
    made.add_argument(
        "--figure", type=figure_file, metavar="FILE.png", help="also draw them"
    )
    return made


def figure_file(text: str) -> Path:
    """The path of a figure; for argparse.

    Raises:
      ArgumentTypeError: if it does not end in one of `FIGURES`.
    """
    path = path_argument(text)
    if path.suffix.removeprefix(".").lower() not in FIGURES:
        raise argparse.ArgumentTypeError(
            f"{text} must end in one of .{', .'.join(FIGURES)}"
        )
    return path


def save_figure(figure: Any, path: Path) -> None:
    """Writes a matplotlib figure, whole or not at all, and the folder it goes to."""
    with replacing(path) as file:
        figure.savefig(file, format=path.suffix.removeprefix(".").lower(), dpi=150)


def exit_status(command: Callable[[], bool]) -> int:
    """Runs a command that says whether all went well; mistakes in words, status 1."""
    logging.set_verbosity(logging.WARNING)
    show_every_name()
    warnings.filterwarnings("ignore", module="PIL")  # an error says all that matters
    try:
        return 0 if command() else 1
    except BrokenPipeError:  # no user error: `signals.run` ends quietly
        raise
    except (CheckpointError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
    return 1
