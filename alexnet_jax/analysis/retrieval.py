"""Similar images by features of a network: an index that is searched exactly.

"If two images produce feature activation vectors with a small Euclidean separation, we
can say that the higher levels of the neural network consider them to be similar" (the
paper, section 6.1).
"""

import dataclasses
import functools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from alexnet_jax.analysis.features import Extractor, fetch
from alexnet_jax.data import warnings_about
from alexnet_jax.data.errors import DataError
from alexnet_jax.data.imagenet import words
from alexnet_jax.data.images import resize_to_square
from alexnet_jax.data.sources import Source
from alexnet_jax.system.files import atomic_write, read_npz

# Bytes of an index that are compared with the queries at once; on a CPU, larger blocks
# are slower.
BLOCK_BYTES = 2**24
# Queries that are compared with the index together.
QUERIES = 256
# Side of the images whose pixels are compared.
PIXELS = 32
# Tolerance for the features of the same image, relative to the largest one: devices add
# up in different orders.
PROBE_TOLERANCE = 1e-2
# Mean difference in grey levels from which on two images are different.
SAME_PICTURE = 4
# Candidates beyond those asked for that are compared again in float64.
_MORE = 16


class RetrievalError(ValueError):
    """Raised for an index or a query that cannot be used."""


@dataclass(frozen=True)
class Index:
    """Features of every image of a split, in its order.

    Attributes:
      features: float32 [N, D].
      pixels: uint8 [N, P], each image shrunk to `PIXELS` x `PIXELS` x 3, flat.
      labels: int [N].
      class_names: by label.
      probe: float32 [D], features of a grey image, to recognise the network.
      layer: name of the layer, for example "fc7".
      source, split: as for `data.open_source`, to find the images again.
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
        """Write an .npz atomically, for `load_index` and NumPy."""
        with atomic_write(path) as file:
            np.savez(file, **vars(self))


def load_index(path: str | os.PathLike[str]) -> Index:
    """Read the file that `Index.save` wrote; never through pickle.

    Raises:
      RetrievalError: the file is missing, unreadable or not an index.
    """
    names = [field.name for field in dataclasses.fields(Index)]
    found: dict[str, Any] = read_npz(path, names, RetrievalError)
    if missing := [name for name in names if name not in found]:
        raise RetrievalError(f"{path} is no index: it has no {', '.join(missing)}.")
    found["class_names"] = tuple(found["class_names"].tolist())
    for name in ("layer", "source", "split"):
        found[name] = str(found[name])
    return Index(**found)


def shrink(pictures: np.ndarray) -> np.ndarray:
    """uint8 [B, S, S, 3] -> uint8 [B, P], for distances between pixels."""
    small = [resize_to_square(picture, PIXELS) for picture in pictures]
    return np.stack(small).reshape(len(pictures), -1)


def nearest(
    features: np.ndarray, queries: np.ndarray, count: int, *, block: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the nearest rows of an index by Euclidean distance, exactly.

    On the device |q|^2 - 2 q x + |x|^2 in float32 finds the nearest `count` and sixteen
    more; for these |q - x| is computed in float64, where nothing cancels. A neighbour is
    missed only if more than sixteen others are as near as float32 can tell.

    Args:
      features: [N, D], float32 or uint8.
      queries: [Q, D] of the same type.
      count: how many to find; n = min(count, N).
      block: rows on the device at once; None: 16 MB.

    Returns:
      (distances float64 [Q, n], rows int [Q, n]), the nearest first; ties by row.
    """
    most = min(count + _MORE, len(features))
    size = block or BLOCK_BYTES // (features.itemsize * features.shape[1])
    _, rows = search(features, queries.astype(np.float32), most, size, _squares)
    return rank(features, queries, rows, count)


def _squares(queries: jax.Array, part: jax.Array) -> jax.Array:
    part = part.astype(queries.dtype)
    # In this order, because XLA would otherwise write out the block transposed.
    products = jnp.matmul(part, queries.T, precision=lax.Precision.HIGHEST).T
    lengths = jnp.sum(part**2, axis=1) - 2 * products
    return lengths + jnp.sum(queries**2, axis=1, keepdims=True)


def rank(
    features: np.ndarray, queries: np.ndarray, rows: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the nearest among some rows int [Q, R] of an index, in float64.

    Takes features [N, D] and queries [Q, D]; returns as `nearest`, n = min(count, R).
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


def search(
    table: np.ndarray,
    queries: np.ndarray,
    count: int,
    block: int,
    distances: Callable[[jax.Array, jax.Array], jax.Array],
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of a table with the smallest distances, which goes in blocks.

    Args:
      table, queries: [N, D] and [Q, D].
      count: at most N.
      block: rows on the device at once.
      distances: a module-level function (queries, block) -> float32 [Q, B].

    Returns:
      (distances float32 [Q, count], rows int32 [Q, count]), ascending; ties by row.
    """
    size = max(min(block, len(table)), count)
    parts = [jnp.asarray(queries[i : i + QUERIES]) for i in range(0, len(queries), QUERIES)]
    best = [
        (jnp.full((len(part), count), jnp.inf), jnp.zeros((len(part), count), jnp.int32))
        for part in parts
    ]
    for first in range(0, len(table), size):
        # The last block starts earlier, at rows of the block before: all have one size.
        start = min(first, len(table) - size)
        there = jnp.asarray(table[start : start + size])
        for i, part in enumerate(parts):
            best[i] = _merge(*best[i], part, there, start, first, distances)
    if not best:
        return np.zeros((0, count), np.float32), np.zeros((0, count), np.int32)
    found, rows = (np.concatenate(arrays) for arrays in zip(*best, strict=True))
    return found, rows


@functools.partial(jax.jit, static_argnames="distances")
def _merge(
    best: jax.Array,
    rows: jax.Array,
    queries: jax.Array,
    part: jax.Array,
    start: int,
    first: int,
    distances: Callable[[jax.Array, jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Merge the nearest so far with those of a block, whose rows before `first` are old."""
    here = distances(queries, part)
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
    """Return the features of every image of a split.

    Args:
      features_of: of a run and of this layer.
      source, split, data_dir: as for `data.open_source`; None: the run's own training
        images.

    Raises:
      DataError: as `open_source`.
      RetrievalError: features are not finite, or too large to compare.
    """
    source = source or str(features_of.data["source"])
    split = split or str(features_of.data["train_split"])
    images = open_for_index(features_of, split, source, data_dir)
    for line in warnings_about(images):
        print(line, file=sys.stderr)
    index = index_of(features_of, layer, images, source=source, split=split)
    # The square of a distance has to fit into float32.
    largest = np.sqrt(np.finfo(np.float32).max / (4 * index.features.shape[1]))
    if not (np.abs(index.features) <= largest).all():  # NaN included
        raise RetrievalError(
            f"features of {layer} are infinite, NaN or larger than {largest:.0e}: this "
            "network finds nothing. Take another checkpoint, --step=N."
        )
    return index


def index_of(
    features_of: Extractor, layer: str, images: Source, *, source: str, split: str
) -> Index:
    """Return the index of a source; the strings are stored with it."""
    features, pixels = zip(
        *((found, shrink(batch)) for batch, found in features_of.over(images, "index")), strict=True
    )
    return Index(
        features=np.concatenate(features),
        pixels=np.concatenate(pixels),
        labels=images.labels_of(np.arange(images.num_examples)).astype(np.int32),
        class_names=tuple(images.class_names),
        probe=features_of.probe(),
        layer=layer,
        source=source,
        split=split,
    )


def open_for_index(features_of: Extractor, split: str, source: str, data_dir: str | None) -> Source:
    """Open a split as `Extractor.open`; errors name `--source`, not the config field."""
    try:
        return features_of.open(split, source=source, data_dir=data_dir)
    except (DataError, FileNotFoundError) as error:
        message = str(error).replace("--config.data.source", "--source")
        raise DataError(message) from error


def fetch_rows(index: Index, source: Source, rows: np.ndarray) -> np.ndarray:
    """Return the images of rows int [R] of an index, uint8 [R, S, S, 3].

    Raises:
      RetrievalError: the source has changed: another number of images, or another
        label or image in one of these rows.
      DataError: as `Source.fetch`.
    """
    count = len(index.labels)
    if source.num_examples != count:
        raise RetrievalError(
            f"{source.description} has {source.num_examples:,} pictures now, the index "
            f"{count:,}. Make it again: remove its file."
        )
    images, labels = fetch(source, rows)
    apart = np.abs(shrink(images).astype(int) - index.pixels[rows]).mean(axis=1)
    if (apart >= SAME_PICTURE).any() or (labels != index.labels[rows]).any():
        raise RetrievalError(
            f"{source.description} has other pictures now than the index. Make it again: "
            "remove its file."
        )
    return images


def check_index(index: Index, features_of: Extractor) -> None:
    """Raise RetrievalError if the index is of another network's features."""
    probe = features_of.probe()
    tolerance = PROBE_TOLERANCE * np.abs(index.probe).max() + 1e-6
    same = probe.shape == index.probe.shape
    if not same or np.abs(probe - index.probe).max() > tolerance:
        raise RetrievalError(
            "the index is of another network than the workdir's (the same picture has "
            "other features there). Make it again: remove its file."
        )


def draw(
    index: Index, source: Source, pictures: np.ndarray, rows: np.ndarray, **titles: Any
) -> Any:
    """Return a matplotlib figure of queries [Q, S, S, 3] and of their neighbours.

    Args:
      source: the images of the index.
      rows: int [Q, N], neighbours by features; those by pixels are found here.
      titles: `query_titles` and `layer` of `figures.nearest_pictures`.

    Raises:
      RetrievalError, DataError: as `fetch_rows`.
    """
    from alexnet_jax.analysis.figures import nearest_pictures

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
