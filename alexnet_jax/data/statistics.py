"""Mean image and colour PCA of a data set (Krizhevsky et al. 2012, sections 2, 4.1).

One pass over the images, exact sums, memory independent of their number.
"""

import dataclasses
import os
import threading
from collections.abc import Callable
from concurrent import futures
from typing import Any

import numpy as np

from alexnet_jax.data.errors import DataError
from alexnet_jax.data.sources import Source
from alexnet_jax.system.files import atomic_write, read_npz

_CHUNK = 16  # images that a thread holds at a time
COMPUTE_AGAIN = "Compute it again: python -m alexnet_jax.prepare statistics --source=..."
_REMEDY = (
    f"{COMPUTE_AGAIN} In the workdir of a run delete it and start the training command "
    "again, which makes it anew."
)


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Mean image and colour PCA, as arrays of NumPy or of JAX.

    Attributes:
      mean_image: float32 [S, S, 3], RGB, 0..255.
      pca_std_255: float32 [3], square roots of the eigenvalues of the covariance of
        RGB over all pixels, ASCENDING, in grey levels of 0..255 (standard
        deviations, not eigenvalues).
      pca_vectors: float32 [3, 3], its unit eigenvectors in the COLUMNS, in the same
        order; rows are R, G, B. Signs: the largest component is positive.
      num_examples: images that were used; 0: unknown.
      split_examples: images that the split had then.
    """

    mean_image: Any
    pca_std_255: Any
    pca_vectors: Any
    num_examples: int = 0
    split_examples: int = 0

    @property
    def extent(self) -> str:
        """Return, for example, "10,000 of 50,000 images"."""
        total = f"{self.split_examples:,} images"
        is_part = self.num_examples < self.split_examples
        return f"{self.num_examples:,} of {total}" if is_part else total

    def save(self, path: str | os.PathLike) -> None:
        """Write an .npz file, completely or not at all."""
        with atomic_write(path) as file:
            np.savez(file, **dataclasses.asdict(self))


def load(path: str | os.PathLike, image_size: int | None = None) -> Statistics:
    """Read a file that `Statistics.save` wrote.

    Args:
      image_size: expected side of the images; None: any.

    Raises:
      FileNotFoundError: there is no such file.
      DataError: the file is damaged, or of images of another size.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"{os.fspath(path)}: there is no such file. Give a file of the mean image and the "
            "colour PCA, made by python -m alexnet_jax.prepare statistics."
        )
    names = [field.name for field in dataclasses.fields(Statistics)]
    try:
        arrays = read_npz(path, names, ValueError)
        mean, std, vectors, count = (arrays[name] for name in names[:4])
        total = arrays.get("split_examples", count)  # not in files of earlier versions
    except (ValueError, KeyError) as error:
        raise DataError(
            f"{os.fspath(path)} is not a statistics file ({error}). {_REMEDY}"
        ) from error
    if image_size not in (None, len(mean)):
        raise DataError(
            f"{os.fspath(path)}: the mean image is {len(mean)} x {len(mean)} pixels, the "
            f"images here are {image_size} x {image_size}: it is of other data, or of "
            f"another run. {_REMEDY}"
        )
    return Statistics(mean, std, vectors, int(count), int(total))


def compute(
    source: Source,
    *,
    max_examples: int | None = None,
    workers: int = 2,
    progress: Callable[[int], object] = lambda _: None,
) -> Statistics:
    """Compute the mean image and the colour PCA.

    Args:
      source: the training split.
      max_examples: use only as many images, evenly spread over the split (class
        folders are sorted by class); all if absent.
      workers: decoding threads.
      progress: called with the number of images done since its last call.

    Raises:
      DataError: an image is broken.
    """
    count = min(source.num_examples, max_examples or source.num_examples)
    side = source.image_size
    # Sums of integers below 2**53 are exact in float64 (for 2 million images of
    # 256 x 256), so the order in which the threads add makes no difference.
    total = np.zeros((side, side, 3), np.float64)
    products = np.zeros((3, 3), np.float64)
    lock = threading.Lock()

    def add(first: int) -> int:
        chosen = np.arange(first, min(first + _CHUNK, count))
        chosen = chosen * source.num_examples // count
        images = np.empty((len(chosen), side, side, 3), np.uint8)
        source.fetch(chosen, images, np.empty(len(chosen), np.int32))
        sums = images.sum(axis=0, dtype=np.uint16)  # 16 times 255 fit
        outer = _products(images)
        with lock:
            np.add(total, sums, out=total)
            np.add(products, outer, out=products)
        return len(chosen)

    pool = futures.ThreadPoolExecutor(workers)
    try:
        for done in pool.map(add, range(0, count, _CHUNK)):
            progress(done)
    finally:
        pool.shutdown(cancel_futures=True)

    num_pixels = count * side * side
    mean = total.sum(axis=(0, 1)) / num_pixels
    covariance = products / num_pixels - np.outer(mean, mean)
    eigenvalues, vectors = np.linalg.eigh(covariance)  # ascending
    largest = np.abs(vectors).argmax(axis=0)
    vectors = vectors * np.sign(vectors[largest, range(3)])
    return Statistics(
        mean_image=(total / count).astype(np.float32),
        # A grey data set has two zero eigenvalues, which may come out as -1e-13.
        pca_std_255=np.sqrt(np.maximum(eigenvalues, 0)).astype(np.float32),
        pca_vectors=vectors.astype(np.float32),
        num_examples=count,
        split_examples=source.num_examples,
    )


def _products(images: np.ndarray) -> np.ndarray:
    """Return RGB times RGB, summed over all pixels: float64 [3, 3], exact.

    In float32, 256 products of two bytes still have an exact sum: the values of an image,
    RGBRGB..., lie in 256 rows, and are multiplied by themselves, by the next value and by
    the one after that. Products with the next pixel's values are dropped.
    """
    rows = 256
    count = images[0].size
    columns = 3 * -(-count // (3 * rows))
    values = np.zeros(rows * columns + 2, np.float32)
    sums = np.zeros((3, columns))
    for image in images:
        values[:count] = image.reshape(-1)
        for lag in range(3):
            a, b = values[: rows * columns], values[lag : rows * columns + lag]
            # Not a matrix product: BLAS threads would fight the caller's.
            a, b = a.reshape(rows, columns), b.reshape(rows, columns)
            sums[lag] += np.einsum("rc,rc->c", a, b)
    (rr, gg, bb), (rg, gb, _), (rb, _, _) = sums.reshape(3, -1, 3).sum(axis=1)
    return np.array([[rr, rg, rb], [rg, gg, gb], [rb, gb, bb]])
