"""Random images in memory."""

import numpy as np

from alexnet_jax.data.sources.source import Source


class FakeSource(Source):
    """Random but constant images and labels at no cost, for benchmarks and tests.

    Example i is image i modulo 32 of a pool drawn once, with label i modulo 1,000: there
    is nothing to learn. There are as many examples as in ImageNet.
    """

    def __init__(self, split: str, image_size: int):
        self.num_examples = 1_281_167 if split.startswith("train") else 50_000
        self.class_names = tuple(f"class_{k}" for k in range(1000))
        self.image_size = image_size
        self.description = f"fake data, {self.num_examples} random images [{split}]"
        shape = (32, image_size, image_size, 3)
        self._pool = np.random.default_rng(0).integers(0, 256, shape, np.uint8)

    def labels_of(self, indices: np.ndarray) -> np.ndarray:
        return indices % self.num_classes

    def fetch(self, indices: np.ndarray, images: np.ndarray, labels: np.ndarray) -> None:
        np.take(self._pool, indices % len(self._pool), axis=0, out=images, mode="wrap")
        labels[:] = self.labels_of(indices)
