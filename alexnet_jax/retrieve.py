"""Find the images of a data set that a trained network considers most similar.

python -m alexnet_jax.retrieve --workdir=DIR --index=FILE.npz
    [--source=folder:PATH] [--split=train] [--data_dir=DIR] [--layer=fc7]
python -m alexnet_jax.retrieve --workdir=DIR --index=FILE.npz IMAGE ...
    [--top=6] [--format=json] [--figure=FILE.png] [--bits=256 [--shortlist=100]]

The first makes the index, the features of every image of a split (by default the run's
own training images); the second looks images up in it. One command can do both. With
--figure the neighbours are drawn as in the paper's figure 4, beside those by distances
between pixels.

With --bits images are compared by short binary codes of their features. The autoencoder
for these is trained once; codes are kept beside the index (FILE.256bits.npz). Distances
are then numbers of differing bits; with --shortlist=R the R nearest by code are ordered
by their Euclidean distances.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alexnet_jax.analysis import codes as codes_lib
from alexnet_jax.analysis import retrieval
from alexnet_jax.analysis.codes import Codes
from alexnet_jax.analysis.features import Extractor, save_figure
from alexnet_jax.analysis.retrieval import Index, RetrievalError
from alexnet_jax.data import DataError, warnings_about
from alexnet_jax.data.imagenet import words
from alexnet_jax.data.images import load_image, short_names
from alexnet_jax.data.sources import Source
from alexnet_jax.data.sources.folder import FolderSource
from alexnet_jax.system import signals
from alexnet_jax.system.cli import exit_status, parser, path_argument, require_writable_file
from alexnet_jax.training.checkpoint import CheckpointError

# Images that the autoencoder does not learn from; their recall is printed.
HELD_OUT = 200


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser("alexnet_jax.retrieve", __doc__, top=6)
    made.add_argument("images", nargs="*", metavar="IMAGE")
    made.add_argument("--index", type=path_argument, required=True, metavar="FILE.npz")
    for name, about in (
        ("source", "images of a new index; else the run's own"),
        ("split", "of these; else the run's training split"),
        ("data_dir", "tfds directory; else the run's own"),
        ("layer", "whose features; else fc7"),
    ):
        made.add_argument(f"--{name}", help=about)
    made.add_argument("--bits", type=int, help="compare codes of so many bits")
    made.add_argument("--shortlist", type=int, metavar="R", help="put the R nearest codes in order")
    options = made.parse_args(argv)
    for name, value in (("top", options.top), ("bits", options.bits)):
        if value is not None and value < 1:
            made.error(f"--{name}={value} must be at least 1.")
    if options.shortlist is not None and options.bits is None:
        made.error("--shortlist needs codes. Give their length, for example --bits=256.")
    if options.figure is not None and not options.images:
        made.error("--figure draws the neighbours of images. Name at least one image.")
    return options


def _load_index(options: argparse.Namespace) -> Index:
    index = retrieval.load_index(options.index)
    for name in ("source", "split", "layer"):
        asked, there = getattr(options, name), getattr(index, name)
        if asked not in (None, there):
            raise RetrievalError(
                f"{options.index} is of --{name}={there}, not of {asked}. Take "
                "another --index, or remove that file to make it again."
            )
    return index


def _make_index(options: argparse.Namespace, features_of: Extractor) -> Index:
    require_writable_file(options.index)
    source = options.source or features_of.data.get("source")
    split = options.split or features_of.data.get("train_split")
    if not source or not split:
        raise ValueError(
            "a file of weights does not say which images: give --source, for example "
            "--source=folder:PATH, and --split."
        )
    images = _open(features_of, source, split, options.data_dir)
    for line in warnings_about(images):
        print(line, file=sys.stderr)
    index = retrieval.build_index(features_of, images, source=source, split=split)
    index.save(options.index)
    count, width = index.features.shape
    print(
        f"{options.index}: {index.layer} of {count:,} images, {width:,} numbers each "
        f"({source}, {split})",
        file=sys.stderr,
    )
    return index


def _open(features_of: Extractor, source: str, split: str, data_dir: str | None) -> Source:
    """Open a split; errors name `--source`, not the config field."""
    try:
        return features_of.open(source, split, data_dir)
    except (DataError, FileNotFoundError) as error:
        raise DataError(str(error).replace("--config.data.source", "--source")) from error


def _codes(path: Path, features: np.ndarray, bits: int) -> Codes:
    """Return the codes of an index, from their file or made anew."""
    if path.exists():
        codes = codes_lib.load_codes(path)
        if codes.coder.bits == bits and codes.are_of(features):
            return codes
        print(f"{path}: codes of another index or length; making them again", file=sys.stderr)
    count, width = features.shape
    held_out = np.linspace(0, count - 1, min(HELD_OUT, -(-count // 10)), dtype=int)
    others = np.setdiff1d(np.arange(count), held_out)
    known = features[others]
    codes = Codes.of(codes_lib.train_coder(known, bits=bits), features)
    codes.save(path)
    _, exact = retrieval.nearest(known, features[held_out], 10)
    _, found = codes_lib.nearest_codes(codes.packed[others], codes.packed[held_out], 100)
    few, many = (codes_lib.recall(found[:, :n], exact) for n in (10, 100))
    print(
        f"{path}: {bits} bits an image, {codes.packed.shape[1]:,} bytes instead of "
        f"{4 * width:,}. Of the 10 nearest by {width:,} numbers, of {len(held_out)} "
        f"images that training left out, {few:.0%} are among the 10 nearest by code "
        f"and {many:.0%} among 100.",
        file=sys.stderr,
    )
    return codes


def _folder_of(index: Index, rows: np.ndarray, features_of: Extractor) -> FolderSource | None:
    """Return the folder that holds the images of rows [Q, N]; None if they have changed."""
    if not index.source.startswith("folder:"):
        return None
    try:
        source = _open(features_of, index.source, index.split, None)
        for found in rows:
            retrieval.fetch_rows(index, source, found)
    except (OSError, ValueError) as error:  # the neighbours are printed all the same
        print(f"no files are named: {error}", file=sys.stderr)
        return None
    assert isinstance(source, FolderSource)
    return source


def _look_up(
    options: argparse.Namespace, index: Index, codes: Codes | None, features_of: Extractor
) -> bool:
    """Print the neighbours of each image; return True if all could be read."""
    images, paths = [], []
    for path in options.images:
        try:
            images.append(load_image(path, features_of.image_size))
            paths.append(path)
        except (OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
    if not images:
        return False
    queries, top, unit = features_of(images), options.top, "distance"
    if codes is None:
        distances, rows = retrieval.nearest(index.features, queries, top)
    elif options.shortlist is not None:
        size = max(options.shortlist, top)
        distances, rows = codes_lib.shortlist(index.features, codes, queries, top, size=size)
    else:
        unit, asked = "bits", codes.coder.encode(queries)
        distances, rows = codes_lib.nearest_codes(codes.packed, asked, top)
    folder = _folder_of(index, rows, features_of)
    for path, near, far in zip(paths, rows.tolist(), distances.tolist(), strict=True):
        neighbours: list[dict[str, Any]] = []
        for row, distance in zip(near, far, strict=True):
            label = int(index.labels[row])
            name = index.class_names[label]
            file = {} if folder is None else {"file": str(folder.path_of(row))}
            about = {"label": label, "name": name, "words": words(name)}
            neighbours.append({"row": row} | file | about | {unit: distance})
        if options.format == "json":
            print(json.dumps({"file": path, "neighbours": neighbours}))
            continue
        print(path)
        for item in neighbours:
            apart = f"{item[unit]:10.3f}" if unit == "distance" else f"{item[unit]:5d} bits"
            file = f"  {item['file']}" if folder else ""
            print(f"  {apart}  {item['row']:8d}  {item['words']}{file}")
    if options.figure is not None:
        source = _open(features_of, index.source, index.split, options.data_dir)
        layer = index.layer if codes is None else f"{index.layer}, {codes.coder.bits} bits"
        titles = short_names(paths)
        shown = np.stack(images)
        figure = retrieval.draw(index, source, shown, rows, query_titles=titles, layer=layer)
        save_figure(figure, options.figure)
    return len(images) == len(options.images)


def _retrieve(options: argparse.Namespace) -> bool:
    if options.figure is not None:
        require_writable_file(options.figure)
    index = _load_index(options) if options.index.exists() else None
    layer = index.layer if index is not None else options.layer or "fc7"
    features_of = Extractor(options.workdir, layer, step=options.step)
    if index is None:
        index = _make_index(options, features_of)
    else:
        retrieval.check_index(index, features_of)
    codes = None
    if options.bits is not None:
        path = options.index.with_suffix(f".{options.bits}bits.npz")
        codes = _codes(path, index.features, options.bits)
    return not options.images or _look_up(options, index, codes, features_of)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    options = _parse(argv)
    return exit_status(lambda: _retrieve(options), CheckpointError)


if __name__ == "__main__":
    signals.run(main)
