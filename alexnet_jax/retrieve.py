"""Finds the pictures of a data set that a trained network takes to be most alike.

python -m alexnet_jax.retrieve --workdir=DIR --index=FILE.npz
    [--source=folder:PATH] [--split=train] [--data_dir=DIR] [--layer=fc7]
python -m alexnet_jax.retrieve --workdir=DIR --index=FILE.npz PICTURE ...
    [--top=6] [--format=json] [--figure=FILE.png]

The first makes the index, the features of every picture of a split (of the run's own
training pictures, unless it is told others); the second looks pictures up in it. Both
at once is fine. With --figure the neighbours are drawn as in the paper's figure 4,
beside those by distances between pixels.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from alexnet_jax import data, ops
from alexnet_jax.analysis.retrieval import (
    Index,
    RetrievalError,
    load_index,
    nearest,
    shrink,
)
from alexnet_jax.checkpoint import CheckpointError
from alexnet_jax.data.imagenet import words
from alexnet_jax.data.images import load_picture, short_names
from alexnet_jax.experiment import ConfigError, load, read_config
from alexnet_jax.writers import progress

BATCH = 64
# How far the features of the same picture may be from the stored ones, over their
# largest: other processors and devices add up in another order.
PROBE_TOLERANCE = 1e-2


class Describer:
    """A trained network as a function from pictures to one layer's features."""

    def __init__(self, workdir: Path, layer: str, *, step: int | None = None):
        """Raises RetrievalError if there is no such layer; else as `load`."""
        model, variables, preprocess = load(workdir, step=step)
        self.image_size = (read_config(workdir) or {})["data"]["image_size"]
        self._grey = np.full((self.image_size, self.image_size, 3), 128, np.uint8)
        self._preprocess = preprocess

        def features(images: jax.Array) -> Any:
            return model.apply(variables, images, method="features")

        known = jax.eval_shape(features, preprocess(self._grey))
        if layer not in known:
            raise RetrievalError(f"layer {layer!r} must be one of {', '.join(known)}.")
        self._apply = jax.jit(
            lambda images: features(images)[layer].reshape(len(images), -1),
            compiler_options=ops.compiler_options(),
        )

    def __call__(self, pictures: np.ndarray) -> np.ndarray:
        """uint8 [B, S, S, 3] -> float32 [B, D]; at most `BATCH` at a time."""
        found = []
        for start in range(0, len(pictures), BATCH):
            part = list(pictures[start : start + BATCH])
            filled = part + [self._grey] * (BATCH - len(part))  # one program for all
            features = np.asarray(self._apply(self._preprocess(filled)), np.float32)
            found.append(features[: len(part)])
        return np.concatenate(found)

    def probe(self) -> np.ndarray:
        """The features of a grey picture, float32 [D]."""
        return self(self._grey[None])[0]


def build_index(
    workdir: Path,
    *,
    source: str | None = None,
    split: str | None = None,
    data_dir: str | None = None,
    layer: str = "fc7",
    step: int | None = None,
) -> Index:
    """The features of every picture of a split.

    Args:
      workdir: of a run.
      source, split, data_dir: as of `data.open_source`; None: the run's own training
        pictures.
      layer: a name of `model.apply(..., method="features")`.
      step: which checkpoint; as `experiment.load`.

    Prints a progress bar, or a line a minute where nobody is watching.

    Raises:
      RetrievalError: if there is no such layer.
      DataError, CheckpointError, FileNotFoundError: as `open_source` and `load`.
    """
    describe = Describer(workdir, layer, step=step)
    own = (read_config(workdir) or {})["data"]
    pictures = data.open_source(
        source := source or str(own["source"]),
        split := split or str(own["train_split"]),
        data_dir=data_dir or own["dir"] or None,
        image_size=describe.image_size,
    )
    count = pictures.num_examples
    features, pixels = [], []
    with (
        data.eval_batches(pictures, batch_size=BATCH) as batches,
        progress("index", count, "pictures") as advance,
    ):
        for batch in batches:
            features.append(describe(batch["image"]))
            pixels.append(shrink(batch["image"]))
            advance(int(batch["mask"].sum()))
    return Index(
        features=np.concatenate(features)[:count],
        pixels=np.concatenate(pixels)[:count],
        labels=pictures.labels_of(np.arange(count)).astype(np.int32),
        class_names=tuple(pictures.class_names),
        probe=describe.probe(),
        layer=layer,
        source=source,
        split=split,
    )


def check_index(index: Index, describe: Describer) -> None:
    """Raises RetrievalError if the index is of another network's features."""
    probe = describe.probe()
    same = probe.shape == index.probe.shape
    if same:
        largest = np.abs(index.probe).max()
        same = np.abs(probe - index.probe).max() <= PROBE_TOLERANCE * largest + 1e-6
    if not same:
        raise RetrievalError(
            "the index is of another network than the workdir's (the same picture has "
            "other features there). Make it again: remove its file."
        )


def draw(
    index: Index,
    pictures: np.ndarray,
    rows: np.ndarray,
    titles: Sequence[str],
    *,
    data_dir: str | None = None,
) -> Any:
    """The matplotlib figure of queries [Q, S, S, 3] and of their neighbours.

    Args:
      rows: int [Q, N] of the index, by features; those by pixels are found here.
      titles: of the queries.
      data_dir: of tfds, if the index is of a tfds data set.

    Raises:
      DataError: if the pictures of the index are no longer there.
    """
    from alexnet_jax.analysis import nearest_pictures  # matplotlib

    _, by_pixels = nearest(index.pixels, shrink(pictures), rows.shape[1])
    source = data.open_source(
        index.source, index.split, data_dir=data_dir, image_size=pictures.shape[1]
    )
    both = np.concatenate([rows, by_pixels], axis=1)
    shown = np.empty((both.size, *pictures.shape[1:]), np.uint8)
    source.fetch(both.ravel(), shown, np.empty(both.size, np.int32))
    shown = shown.reshape(*both.shape, *pictures.shape[1:])
    names = [[words(index.class_names[k]) for k in index.labels[row]] for row in both]
    count = rows.shape[1]
    return nearest_pictures(
        pictures,
        shown[:, :count],
        shown[:, count:],
        found_titles=[row[:count] for row in names],
        pixel_titles=[row[count:] for row in names],
        query_titles=titles,
        layer=index.layer,
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m alexnet_jax.retrieve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("pictures", nargs="*", metavar="PICTURE")
    parser.add_argument("--workdir", type=Path, required=True, help="folder of a run")
    parser.add_argument("--step", type=int, help="which checkpoint; else the best")
    parser.add_argument("--index", type=Path, required=True, metavar="FILE.npz")
    for name, words_ in (
        ("source", "pictures of a new index; else the run's own"),
        ("split", "of these; else the run's training split"),
        ("data_dir", "tfds directory; else the run's own"),
        ("layer", "whose features; else fc7"),
    ):
        parser.add_argument(f"--{name}", help=words_)
    parser.add_argument("--top", type=int, default=6, help="neighbours a picture")
    parser.add_argument("--format", choices=["text", "json"], default="text")
    parser.add_argument("--figure", type=Path, metavar="FILE.png")
    options = parser.parse_args(argv)
    if options.top < 1:
        parser.error(f"--top={options.top} must be at least 1.")
    if options.index.suffix != ".npz":
        parser.error(f"--index={options.index} must be a file FILE.npz.")
    if options.figure is not None and not options.pictures:
        parser.error("--figure draws pictures; name some.")
    return options


def _index(options: argparse.Namespace) -> Index:
    """The index of the file, or a new one in it."""
    if options.index.exists():
        index = load_index(options.index)
        for name in ("source", "split", "layer"):
            asked, there = getattr(options, name), getattr(index, name)
            if asked not in (None, there):
                raise RetrievalError(
                    f"{options.index} is of --{name}={there}, not of {asked}. Take "
                    "another --index, or remove that file to make it again."
                )
        return index
    index = build_index(
        options.workdir,
        source=options.source,
        split=options.split,
        data_dir=options.data_dir,
        layer=options.layer or "fc7",
        step=options.step,
    )
    index.save(options.index)
    count, width = index.features.shape
    print(
        f"{options.index}: {index.layer} of {count:,} pictures, {width:,} numbers each "
        f"({index.source}, {index.split})",
        file=sys.stderr,
    )
    return index


def _answer(index: Index, rows: np.ndarray, distances: np.ndarray) -> list[Any]:
    """Of one query: {"row", "label", "name", "words", "distance"} a neighbour."""
    return [
        {
            "row": int(row),
            "label": int(index.labels[row]),
            "name": index.class_names[index.labels[row]],
            "words": words(index.class_names[index.labels[row]]),
            "distance": float(distance),
        }
        for row, distance in zip(rows, distances, strict=True)
    ]


def _look_up(options: argparse.Namespace, index: Index) -> int:
    """Prints the neighbours of each picture; returns how many could not be read."""
    describe = Describer(options.workdir, index.layer, step=options.step)
    check_index(index, describe)
    pictures, paths, unread = [], [], 0
    for path in options.pictures:
        try:
            pictures.append(load_picture(path, describe.image_size))
            paths.append(path)
        except (OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            unread += 1
    if not pictures:
        return unread
    shown = np.stack(pictures)
    distances, rows = nearest(index.features, describe(shown), options.top)
    for path, near, far in zip(paths, rows, distances, strict=True):
        found = _answer(index, near, far)
        if options.format == "json":
            print(json.dumps({"file": path, "neighbours": found}))
            continue
        print(path)
        for item in found:
            print(f"  {item['distance']:10.3f}  {item['row']:8d}  {item['words']}")
    if options.figure is not None:
        titles = short_names(paths)
        figure = draw(index, shown, rows, titles, data_dir=options.data_dir)
        options.figure.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(options.figure, dpi=150)
    return unread


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    options = _parse(argv)
    logging.set_verbosity(logging.WARNING)
    try:
        index = _index(options)
        return 1 if options.pictures and _look_up(options, index) else 0
    except (CheckpointError, ConfigError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
