"""Find the images of a data set that a trained network considers most similar.

python -m alexnet_jax.retrieve --workdir=DIR --index=FILE.npz
    [--source=folder:PATH] [--split=train] [--data_dir=DIR] [--layer=fc7]
python -m alexnet_jax.retrieve --workdir=DIR --index=FILE.npz PICTURE ...
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
from typing import Any

import numpy as np

from alexnet_jax.analysis.codes import (
    STEPS,
    Codes,
    load_codes,
    nearest_codes,
    recall_of_rows,
    shortlist,
    train_coder,
)
from alexnet_jax.analysis.features import BATCH, Extractor, read, save_figure
from alexnet_jax.analysis.retrieval import (
    Index,
    RetrievalError,
    build_index,
    check_index,
    draw,
    fetch_rows,
    load_index,
    nearest,
    open_for_index,
)
from alexnet_jax.data.imagenet import words
from alexnet_jax.data.images import short_names
from alexnet_jax.data.sources.folder import FolderSource
from alexnet_jax.system import signals
from alexnet_jax.system.cli import (
    exit_status,
    parser,
    path_argument,
    progress,
    require_writable_file,
)
from alexnet_jax.training.checkpoint import CheckpointError

# Images that the autoencoder does not learn from; their recall is printed.
HELD_OUT = 200


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser("alexnet_jax.retrieve", __doc__, top=6)
    made.add_argument("pictures", nargs="*", metavar="PICTURE")
    made.add_argument("--index", type=path_argument, required=True, metavar="FILE.npz")
    for name, about in (
        ("source", "pictures of a new index; else the run's own"),
        ("split", "of these; else the run's training split"),
        ("data_dir", "tfds directory; else the run's own"),
        ("layer", "whose features; else fc7"),
    ):
        made.add_argument(f"--{name}", help=about)
    made.add_argument("--bits", type=int, help="compare codes of so many bits")
    made.add_argument("--shortlist", type=int, metavar="R", help="put the R nearest codes in order")
    options = made.parse_args(argv)
    if options.top < 1:
        made.error(f"--top={options.top} must be at least 1.")
    if options.index.suffix != ".npz":
        made.error(f"--index={options.index} must be a file FILE.npz.")
    if options.figure is not None and not options.pictures:
        made.error("--figure draws pictures; name some.")
    if options.shortlist is not None and not options.pictures:
        made.error("--shortlist is for looking pictures up; name some.")
    if options.bits is not None and options.bits < 1:
        made.error(f"--bits={options.bits} must be at least 1.")
    if options.shortlist is not None:
        if options.bits is None:
            made.error("--shortlist is of codes; say of how many bits: --bits=256.")
        if options.shortlist < options.top:
            made.error(f"--shortlist={options.shortlist} must be at least --top={options.top}.")
    return options


def _stored_index(options: argparse.Namespace) -> Index | None:
    """Return the index of the file, None if there is no file yet."""
    if not options.index.exists():
        return None
    index = load_index(options.index)
    for name in ("source", "split", "layer"):
        asked, there = getattr(options, name), getattr(index, name)
        if asked not in (None, there):
            raise RetrievalError(
                f"{options.index} is of --{name}={there}, not of {asked}. Take "
                "another --index, or remove that file to make it again."
            )
    return index


def _make_index(options: argparse.Namespace, features_of: Extractor, layer: str) -> Index:
    index = build_index(
        features_of, layer, source=options.source, split=options.split, data_dir=options.data_dir
    )
    index.save(options.index)
    count, width = index.features.shape
    print(
        f"{options.index}: {index.layer} of {count:,} pictures, {width:,} numbers each "
        f"({index.source}, {index.split})",
        file=sys.stderr,
    )
    return index


def _codes(options: argparse.Namespace, index: Index) -> Codes:
    """Return the codes of the index, from the file next to it or made anew."""
    bits, features = options.bits, index.features
    path = options.index.with_suffix(f".{bits}bits.npz")
    if path.exists():
        codes = load_codes(path)
        if codes.coder.bits == bits and codes.are_of(features):
            return codes
        print(f"{path}: codes of another index or length; making them again", file=sys.stderr)
    count, width = features.shape
    held_out = np.linspace(0, count - 1, min(HELD_OUT, -(-count // 10)), dtype=int)
    others = np.setdiff1d(np.arange(count), held_out)
    with progress("codes", STEPS, "steps") as advance:
        coder = train_coder(features, bits=bits, rows=others, steps=STEPS, progress=advance)
    codes = Codes.of(coder, features)
    few, many = recall_of_rows(features, codes, held_out, among=(10, 100))
    codes.save(path)
    print(
        f"{path}: {bits} bits a picture, {codes.packed.shape[1]:,} bytes instead of "
        f"{4 * width:,}. Of the 10 nearest by {width:,} numbers, of {len(held_out)} "
        f"pictures that training left out, {few:.0%} are among the 10 nearest by code "
        f"and {many:.0%} among 100.",
        file=sys.stderr,
    )
    return codes


def _folder_of(index: Index, rows: np.ndarray, features_of: Extractor) -> FolderSource | None:
    """Return the folder that holds the images of these rows.

    If the images of that folder have changed, print so and return None.
    """
    if not index.source.startswith("folder:"):
        return None
    try:
        source = open_for_index(features_of, index.split, index.source, None)
        different = np.unique(rows)
        for start in range(0, len(different), BATCH):
            fetch_rows(index, source, different[start : start + BATCH])
    except (OSError, ValueError) as error:  # the neighbours are printed all the same
        print(f"no files are named: {error}", file=sys.stderr)
        return None
    return source if isinstance(source, FolderSource) else None


def _look_up(
    options: argparse.Namespace, index: Index, codes: Codes | None, features_of: Extractor
) -> bool:
    """Print the neighbours of each image; return True if all could be read."""
    found = read(options.pictures, features_of.image_size)
    images, paths = [], []
    for path, image in zip(options.pictures, found, strict=True):
        if isinstance(image, Exception):
            print(f"error: {image}", file=sys.stderr)
        else:
            images.append(image)
            paths.append(path)
    if not images:
        return False
    queries = features_of(images)
    unit, form, suffix = "distance", "10.3f", ""
    if codes is None:
        distances, rows = nearest(index.features, queries, options.top)
    elif options.shortlist is not None:
        size = options.shortlist
        distances, rows = shortlist(index.features, codes, queries, options.top, size=size)
    else:
        asked = codes.coder.encode(queries)
        distances, rows = nearest_codes(codes.packed, asked, options.top)
        unit, form, suffix = "bits", "5d", " bits"
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
            file = f"  {item['file']}" if "file" in item else ""
            apart = f"{item[unit]:{form}}{suffix}"
            print(f"  {apart}  {item['row']:8d}  {item['words']}{file}")
    if options.figure is not None:
        source = open_for_index(features_of, index.split, index.source, options.data_dir)
        figure = draw(
            index,
            source,
            np.stack(images),
            rows,
            query_titles=short_names(paths),
            layer=index.layer + (f", {codes.coder.bits} bits" if codes else ""),
        )
        save_figure(figure, options.figure)
    return len(images) == len(options.pictures)


def _retrieve(options: argparse.Namespace) -> bool:
    index, features_of = _stored_index(options), None
    if index is None:
        require_writable_file(options.index)
    if options.figure is not None:
        require_writable_file(options.figure)
    if index is None or options.pictures:
        layer = index.layer if index is not None else options.layer or "fc7"
        features_of = Extractor(options.workdir, layer, step=options.step)
        if index is None:
            index = _make_index(options, features_of, layer)
        else:
            check_index(index, features_of)
    codes = None if options.bits is None else _codes(options, index)
    if features_of is None or not options.pictures:
        return True  # the index exists, and no picture is looked up
    return _look_up(options, index, codes, features_of)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    options = _parse(argv)
    return exit_status(lambda: _retrieve(options), CheckpointError)


if __name__ == "__main__":
    signals.run(main)
