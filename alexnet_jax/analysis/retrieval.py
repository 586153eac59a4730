"""Pictures that a network finds alike: an index of features, searched exactly.

"If two images produce feature activation vectors with a small Euclidean separation, we
can say that the higher levels of the neural network consider them to be similar" (the
paper, section 6.1).
"""

import dataclasses
import os
import sys
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from alexnet_jax.data.errors import DataError
from alexnet_jax.data.files import read_npz, replacing
from alexnet_jax.data.imagenet import words
from alexnet_jax.data.images import resize_to_square
from alexnet_jax.data.sources import Source
from alexnet_jax.pictures import Extractor

# Bytes of an index that are compared with the queries at once: of larger blocks the copy
# on a CPU's side takes most of the time, in memory that is new each time.
BLOCK_BYTES = 2**24
# Queries that go over the index together.
QUERIES = 256
# Side of the pictures whose pixels are compared.
PIXELS = 32
# How far the features of the same picture may be from the stored ones, over their
# largest: other processors and devices add up in another order.
PROBE_TOLERANCE = 1e-2
# Grey levels by which a picture's pixels may differ from the stored ones, on average.
SAME_PICTURE = 4
# So many more than asked for are compared once more, by their differences.
_MORE = 16


class RetrievalError(ValueError):
    """What is wrong with an index or a query, in words."""


@dataclass(frozen=True)
class Index:
    """Features of every picture of a split, in its order.

    Attributes:
      features: float32 [N, D].
      pixels: uint8 [N, P], each picture shrunk to `PIXELS` x `PIXELS` x 3, flat.
      labels: int [N].
      class_names: by label.
      probe: float32 [D], the features of a grey picture: another network has others.
      layer: what the features are of, such as "fc7".
      source, split: of `data.open_source`, to find the pictures again.
    """

    features: np.ndarray
    pixels: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    probe: np.ndarray
    layer: str
    source: str
    split: str

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes an .npz, whole or not at all, for `load_index` and NumPy."""
        with replacing(path) as file:
            np.savez(file, **vars(self))


def load_index(path: str | os.PathLike[str]) -> Index:
    """Reads what `Index.save` has written; never through pickle.

    Raises:
      RetrievalError: if there is no such file, or something else in it.
    """
    names = [field.name for field in dataclasses.fields(Index)]
    found: dict[str, Any] = read_npz(path, names, RetrievalError)
    missing = [name for name in names if name not in found]
    if missing:
        raise RetrievalError(f"{path} is no index: it has no {', '.join(missing)}.")
    found["class_names"] = tuple(found["class_names"].tolist())
    for name in ("layer", "source", "split"):
        found[name] = str(found[name])
    return Index(**found)


def feature_problem(features: np.ndarray) -> str:
    """Why features [..., D] cannot be searched, in words; "" if they can be.

    The square of a distance has to fit into float32: one that is infinite or NaN is no
    nearer than none at all, and the first row would be found in its place.
    """
    largest = np.sqrt(np.finfo(np.float32).max / (4 * features.shape[-1]))
    # No array of their size is made; a NaN is in both ends, and in no range.
    if features.min() >= -largest and features.max() <= largest:
        return ""
    return f"infinite, NaN or larger than {largest:.0e}"


def check_queries(queries: np.ndarray, rows: np.ndarray, what: str) -> None:
    """Raises RetrievalError if queries are not as long as the rows of `what`."""
    if queries.ndim != 2 or queries.shape[1] != rows.shape[1]:
        raise RetrievalError(
            f"queries are {queries.shape}; for {what} they must be [Q, "
            f"{rows.shape[1]}]."
        )


def shrink(pictures: np.ndarray) -> np.ndarray:
    """uint8 [B, S, S, 3] -> uint8 [B, P], for distances between pixels."""
    sides = [resize_to_square(picture, PIXELS) for picture in pictures]
    return np.stack(sides).reshape(len(pictures), -1)


def nearest(
    features: np.ndarray,
    queries: np.ndarray,
    count: int,
    *,
    block: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest rows of an index by Euclidean distance, exactly.

    Blocks of the index go to the device one after the other. There |q|^2 - 2 q x + |x|^2
    of float32 finds the nearest `count` and sixteen more; theirs are computed again as
    |q - x| in float64, where nothing cancels. So one can be missed only if more than
    sixteen others are as near as float32 can tell.

    Args:
      features: [N, D], float32 or uint8.
      queries: [Q, D] of the same.
      count: how many to find; at most N are.
      block: rows of a block; None: as many as are 16 MB.

    Returns:
      (distances float64 [Q, n], rows int [Q, n]), the nearest first; of equal distances
      the smaller row.

    Raises:
      RetrievalError: for queries of another length than the index.
    """
    check_queries(queries, features, "this index")
    most = min(count + _MORE, len(features))
    size = block or BLOCK_BYTES // (features.itemsize * features.shape[1])
    size = max(min(size, len(features)), most)
    parts = [queries[i : i + QUERIES] for i in range(0, len(queries), QUERIES)]
    on_device = [jnp.asarray(part, jnp.float32) for part in parts]
    best = [
        (jnp.full((len(part), most), jnp.inf), jnp.zeros((len(part), most), jnp.int32))
        for part in parts
    ]
    for first in range(0, len(features), size):
        # The last block begins earlier, with rows that were looked at: all are whole.
        start = min(first, len(features) - size)
        there = jnp.asarray(features[start : start + size])
        for i, part in enumerate(on_device):
            best[i] = _merge(*best[i], part, there, start, first)
    found = [
        rank(features, part, np.asarray(rows), count)
        for part, (_, rows) in zip(parts, best, strict=True)
    ] or [(np.zeros((0, count)), np.zeros((0, count), np.int32))]
    distances, rows = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    return distances, rows


def rank(
    features: np.ndarray, queries: np.ndarray, rows: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest of some rows of an index, by distances in float64.

    Args:
      features: [N, D].
      queries: [Q, D].
      rows: int [Q, R], those that are compared with each query.
      count: how many to keep; at most R are.

    Returns:
      (distances float64 [Q, n], rows int [Q, n]), as `nearest`.
    """
    candidates = np.sort(rows, axis=1)  # ties: the smaller row first
    distances = np.empty(candidates.shape)
    for i, query in enumerate(queries):  # all at once would need Q x R x D numbers
        differences = features[candidates[i]].astype(np.float64) - query
        distances[i] = np.sqrt(np.einsum("nd,nd->n", differences, differences))
    order = np.argsort(distances, axis=1, kind="stable")[:, :count]
    return (
        np.take_along_axis(distances, order, axis=1),
        np.take_along_axis(candidates, order, axis=1),
    )


@jax.jit
def _merge(
    squares: jax.Array,
    rows: jax.Array,
    queries: jax.Array,
    part: jax.Array,
    start: jax.Array,
    first: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The nearest of those so far and of a block of the index, [Q, n] each.

    The block's rows are `start` and on; those before `first` do not count.
    """
    part = part.astype(queries.dtype)
    # This way round: XLA would write out the block transposed otherwise.
    products = jnp.matmul(part, queries.T, precision=lax.Precision.HIGHEST).T
    lengths = jnp.sum(part**2, axis=1) - 2 * products
    here = lengths + jnp.sum(queries**2, axis=1, keepdims=True)
    return keep_nearest(squares, rows, here, start, first)


def keep_nearest(
    best: jax.Array,
    rows: jax.Array,
    here: jax.Array,
    start: jax.Array,
    first: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The nearest of those so far, [Q, n], and of a block, [Q, B]; traced.

    Of equal ones the smaller row.

    Args:
      best, rows: distances so far, and their rows.
      here: float32, distances to the block's rows, which are `start` and on; those before
        `first` do not count.
    """
    here = jnp.where(start + jnp.arange(here.shape[1]) >= first, here, jnp.inf)
    count = best.shape[1]
    nearest_here, places = lax.top_k(-here, count)
    both = jnp.concatenate([-best, nearest_here], axis=1)
    both_rows = jnp.concatenate([rows, start + places], axis=1)
    negated, places = lax.top_k(both, count)
    return -negated, jnp.take_along_axis(both_rows, places, axis=1)


# Indices of data sets.


def build_index(
    features_of: Extractor,
    layer: str,
    *,
    source: str | None = None,
    split: str | None = None,
    data_dir: str | None = None,
) -> Index:
    """Return the features of every picture of a split.

    Args:
      features_of: of a run and of this layer.
      source, split, data_dir: as of `data.open_source`; None: the run's own training
        pictures.

    Raises:
      DataError: as `open_source`.
      RetrievalError: the network has no numbers for some picture.
    """
    source = source or str(features_of.data["source"])
    split = split or str(features_of.data["train_split"])
    pictures = open_for_index(features_of, split, source, data_dir)
    if pictures.left_out:
        print(f"WARNING: {pictures.left_out}", file=sys.stderr)
    index = index_of(features_of, layer, pictures, source=source, split=split)
    if problem := feature_problem(index.features):
        raise RetrievalError(
            f"features of {layer} are {problem}: this network finds nothing. Take another "
            "checkpoint, --step=N."
        )
    return index


def index_of(
    features_of: Extractor, layer: str, pictures: Source, *, source: str, split: str
) -> Index:
    """Return the index of all `pictures`; the strings are stored with it."""
    features, pixels = [], []
    for images, found in features_of.over(pictures, "index"):
        features.append(found)
        pixels.append(shrink(images))
    return Index(
        features=np.concatenate(features),
        pixels=np.concatenate(pixels),
        labels=pictures.labels_of(np.arange(pictures.num_examples)).astype(np.int32),
        class_names=tuple(pictures.class_names),
        probe=features_of.probe(),
        layer=layer,
        source=source,
        split=split,
    )


def open_for_index(
    features_of: Extractor, split: str, source: str, data_dir: str | None
) -> Source:
    """Open a split as `Extractor.open`; errors name `--source`, not the config field.

    Raises:
      DataError: as `Extractor.open`, and for a folder that is not there.
    """
    try:
        return features_of.open(split, source=source, data_dir=data_dir)
    except (DataError, FileNotFoundError) as error:
        words = str(error).replace("--config.data.source", "--source")
        raise DataError(words) from error


def fetch_rows(index: Index, source: Source, rows: np.ndarray) -> np.ndarray:
    """Return the pictures of some rows of an index, uint8 [R, S, S, 3].

    Args:
      source: what the index was made of; it may have other pictures by now.
      rows: int [R].

    Raises:
      RetrievalError: there is another number of pictures, or one of these has another
        label or does not look like the one in the index. Of other rows nothing is known.
      DataError: as `Source.fetch`.
    """
    if source.num_examples != len(index.labels):
        raise RetrievalError(
            f"{source.description} has {source.num_examples:,} pictures now, the index "
            f"{len(index.labels):,}. Make it again: remove its file."
        )
    size = source.image_size
    pictures = np.empty((len(rows), size, size, 3), np.uint8)
    labels = np.empty(len(rows), np.int32)
    source.fetch(rows, pictures, labels)
    apart = np.abs(shrink(pictures).astype(int) - index.pixels[rows]).mean(axis=1)
    if (apart >= SAME_PICTURE).any() or (labels != index.labels[rows]).any():
        raise RetrievalError(
            f"{source.description} has other pictures now than the index. Make it again: "
            "remove its file."
        )
    return pictures


def check_index(index: Index, features_of: Extractor) -> None:
    """Raise RetrievalError if the index is of another network's features."""
    probe = features_of.probe()
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
    source: Source,
    pictures: np.ndarray,
    rows: np.ndarray,
    **titles: Any,
) -> Any:
    """Return a matplotlib figure of queries [Q, S, S, 3] and of their neighbours.

    Args:
      source: the pictures of the index.
      rows: int [Q, N] of the index, by features; those by pixels are found here.
      titles: `query_titles`, `layer`, of `figures.nearest_pictures`.

    Raises:
      RetrievalError, DataError: as `fetch_rows`.
    """
    from alexnet_jax.analysis.figures import nearest_pictures  # matplotlib

    count = rows.shape[1]
    _, by_pixels = nearest(index.pixels, shrink(pictures), count)
    both = np.concatenate([rows, by_pixels], axis=1)
    shown = fetch_rows(index, source, both.ravel())
    shown = shown.reshape(*both.shape, *pictures.shape[1:])
    names = [[words(index.class_names[k]) for k in index.labels[row]] for row in both]
    return nearest_pictures(
        pictures,
        shown[:, :count],
        shown[:, count:],
        found_titles=[row[:count] for row in names],
        pixel_titles=[row[count:] for row in names],
        **{"layer": index.layer, **titles},
    )
