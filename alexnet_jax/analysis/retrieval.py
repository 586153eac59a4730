"""Similar images by features of a network: an index that is searched exactly.

"If two images produce feature activation vectors with a small Euclidean separation, we
can say that the higher levels of the neural network consider them to be similar" (the
paper, section 6.1).
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from alexnet_jax.analysis.features import Extractor, fetch
from alexnet_jax.data.imagenet import words
from alexnet_jax.data.images import resize_to_square
from alexnet_jax.data.sources import Source
from alexnet_jax.system.files import atomic_write, read_npz

# Bytes of a table, and of distances to it, on the device at once; on a CPU, larger
# blocks are slower.
BLOCK_BYTES = 2**24
# Side of the images whose pixels are compared.
PIXELS = 32
# Tolerance for the features of the same image, relative to the largest one: devices add
# up in different orders.
PROBE_TOLERANCE = 1e-2
# Mean difference in grey levels from which on two images are different.
SAME_IMAGE = 4
# Candidates beyond those asked for that are compared again in float64.
_MORE = 16


class RetrievalError(ValueError):
    """Raised for an index or features that cannot be used."""


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
      source, split: as for `data.open_source`, to find the images again; "" if unknown.
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
    """Read the file that `Index.save` wrote.

    Raises:
      RetrievalError: the file is missing, unreadable or not an index.
    """
    found: dict[str, Any] = read_stored(path, [field.name for field in dataclasses.fields(Index)])
    found["class_names"] = tuple(found["class_names"].tolist())
    for name in ("layer", "source", "split"):
        found[name] = str(found[name])
    return Index(**found)


def read_stored(path: str | os.PathLike[str], names: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the arrays of an .npz; never through pickle.

    Raises:
      RetrievalError: the file is missing or unreadable, or lacks one of the arrays.
    """
    found = read_npz(path, names, RetrievalError)
    if missing := [name for name in names if name not in found]:
        raise RetrievalError(
            f"{path} was not made by alexnet_jax.retrieve: it has no {', '.join(missing)}. "
            "Remove it, or name another."
        )
    return found


def build_index(
    features_of: Extractor, images: Source, *, source: str = "", split: str = ""
) -> Index:
    """Return the index of all images of a source; `source` and `split` are stored with it.

    Raises:
      DataError: an image is broken.
      RetrievalError: features are not finite.
    """
    parts = [(found, shrink(batch)) for batch, found in features_of.over(images, "index")]
    features, pixels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    if not np.isfinite(features).all():
        raise RetrievalError(
            f"features of {features_of.layer} are infinite or NaN: this network finds nothing. "
            "Take another checkpoint, --step=N."
        )
    return Index(
        features=features,
        pixels=pixels,
        labels=images.labels_of(np.arange(images.num_examples)).astype(np.int32),
        class_names=tuple(images.class_names),
        probe=features_of.probe(),
        layer=features_of.layer,
        source=source,
        split=split,
    )


def shrink(images: np.ndarray) -> np.ndarray:
    """uint8 [B, S, S, 3] -> uint8 [B, P], for distances between pixels."""
    small = [resize_to_square(image, PIXELS) for image in images]
    return np.stack(small).reshape(len(images), -1)


def nearest(features: np.ndarray, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the nearest rows of an index by Euclidean distance, exactly.

    On the device |q|^2 - 2 q x + |x|^2 in float32 finds the nearest `count` and sixteen
    more; for these |q - x| is computed in float64, where nothing cancels. A neighbour is
    missed only if more than sixteen others are as near as float32 can tell.

    Args:
      features: [N, D], float32 or uint8.
      queries: [Q, D] of the same type.
      count: how many to find; n = min(count, N).

    Returns:
      (distances float64 [Q, n], rows int [Q, n]), the nearest first; ties by row.
    """
    _, rows = search(features, queries.astype(np.float32), count + _MORE, _squares)
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
        distances[i] = np.linalg.norm(features[candidates[i]].astype(np.float64) - query, axis=1)
    order = np.argsort(distances, axis=1, kind="stable")[:, :count]
    return (
        np.take_along_axis(distances, order, axis=1),
        np.take_along_axis(candidates, order, axis=1),
    )


def search(
    table: np.ndarray,
    queries: np.ndarray,
    count: int,
    distances: Callable[[jax.Array, jax.Array], jax.Array],
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of a table with the smallest distances; the table goes in blocks.

    Args:
      table, queries: [N, D] and [Q, D].
      count: how many to find; n = min(count, N).
      distances: a module-level function (queries, block) -> float32 [Q, B].

    Returns:
      (distances float32 [Q, n], rows int32 [Q, n]), ascending; ties by row.
    """
    asked, count = jnp.asarray(queries), min(count, len(table))
    best = jnp.full((len(queries), count), jnp.inf)
    rows = jnp.zeros(best.shape, jnp.int32)
    size = max(1, BLOCK_BYTES // max(table[0].nbytes, 4 * len(queries)))
    for start in range(0, len(table), size):
        part = jnp.asarray(table[start : start + size])
        best, rows = _merge(best, rows, asked, part, start, distances)
    return np.asarray(best), np.asarray(rows)


@functools.partial(jax.jit, static_argnames="distances")
def _merge(
    best: jax.Array,
    rows: jax.Array,
    queries: jax.Array,
    part: jax.Array,
    start: int,
    distances: Callable[[jax.Array, jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Merge the nearest so far with those of a block of rows from `start` on."""
    count = best.shape[1]
    nearest_here, places = lax.top_k(-distances(queries, part), min(count, len(part)))
    both = jnp.concatenate([-best, nearest_here], axis=1)
    both_rows = jnp.concatenate([rows, start + places], axis=1)
    negated, places = lax.top_k(both, count)
    return -negated, jnp.take_along_axis(both_rows, places, axis=1)


def fetch_rows(index: Index, source: Source, rows: np.ndarray) -> np.ndarray:
    """Return the images of rows int [R] of an index, uint8 [R, S, S, 3].

    Raises:
      RetrievalError: the source has changed: another number of images, or another
        label or image in one of these rows.
      DataError: as `Source.fetch`.
    """
    if source.num_examples == len(index.labels):
        images, labels = fetch(source, rows)
        apart = np.abs(shrink(images).astype(int) - index.pixels[rows]).mean(axis=1)
        if (apart < SAME_IMAGE).all() and (labels == index.labels[rows]).all():
            return images
    raise RetrievalError(
        f"{source.description} has other images now than the index. Make it again: remove the "
        "file of --index and start the same command."
    )


def check_index(index: Index, features_of: Extractor) -> None:
    """Raise RetrievalError if the index is of another network's features."""
    probe, known = features_of.probe(), index.probe
    tolerance = PROBE_TOLERANCE * np.abs(known).max() + 1e-6
    if probe.shape != known.shape or np.abs(probe - known).max() > tolerance:
        raise RetrievalError(
            "the index is of another network than the workdir's (the same image has "
            "other features there). Give the --workdir that it was made with, or remove the "
            "file of --index to make it again."
        )


def draw(
    index: Index,
    source: Source,
    images: np.ndarray,
    rows: np.ndarray,
    *,
    query_titles: Sequence[str],
    layer: str = "",
) -> Any:
    """Return a matplotlib figure of queries [Q, S, S, 3] and of their neighbours.

    Args:
      source: the images of the index.
      rows: int [Q, N], neighbours by features; those by pixels are found here.
      query_titles: [Q].
      layer: for the heading, if it is to say more than the index.

    Raises:
      RetrievalError, DataError: as `fetch_rows`.
    """
    from alexnet_jax.analysis.figures import nearest_images

    _, by_pixels = nearest(index.pixels, shrink(images), rows.shape[1])
    groups = []
    for what, found in ((layer or index.layer, rows), ("pixels", by_pixels)):
        shown = fetch_rows(index, source, found.ravel())
        titles = [words(index.class_names[k]) for k in index.labels[found.ravel()]]
        groups.append((f"nearest in {what}", shown, titles))
    return nearest_images(images, query_titles, groups)
