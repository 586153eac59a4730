"""The tfds data set `textures`: ten classes of procedural 256 x 256 pictures."""

import collections
import dataclasses
import io
import itertools
import os
from collections.abc import Iterator
from concurrent import futures
from typing import Any, ClassVar

import numpy as np
import simplejpeg
import tensorflow_datasets as tfds

from alexnet_jax.data.textures import drawing

_JPEG_QUALITY = 85
_SPLITS = ("train", "test")


@dataclasses.dataclass
class TexturesConfig(tfds.core.BuilderConfig):
    """Sizes and seed; a config with a name gets a folder of that name.

    Attributes:
      train_examples, test_examples: pictures in each split, classes by turns.
      seed: picture i of a split is a function of (seed, split, i) only.
    """

    train_examples: int = 4000
    test_examples: int = 1000
    seed: int = 2012


class Builder(tfds.core.GeneratorBasedBuilder):
    """Draws the pictures; nothing is downloaded. See `drawing`."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "First version."}

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description="Ten classes of procedural two-coloured textures that "
            "neither colours nor a linear function of the pixels can tell apart.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(
                        shape=(drawing.SIZE, drawing.SIZE, 3), encoding_format="jpeg"
                    ),
                    "label": tfds.features.ClassLabel(names=drawing.CLASS_NAMES),
                }
            ),
            supervised_keys=("image", "label"),
            disable_shuffling=True,  # classes by turns, in the order of the index
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        config = self._sizes
        return {
            "train": self._generate_examples("train", config.train_examples),
            "test": self._generate_examples("test", config.test_examples),
        }

    def _generate_examples(self, split: str, count: int) -> Iterator[tuple[int, dict]]:
        seed, part = self._sizes.seed, _SPLITS.index(split)
        for index, jpeg in enumerate(_in_threads(seed, part, count)):
            label = index % len(drawing.CLASS_NAMES)
            yield index, {"image": io.BytesIO(jpeg), "label": label}

    @property
    def _sizes(self) -> TexturesConfig:
        config = self.builder_config
        return config if isinstance(config, TexturesConfig) else _FULL


_FULL = TexturesConfig(name="full")


def example(seed: int, part: int, index: int) -> bytes:
    """JPEG file of picture `index` of split `part` (0: train, 1: test)."""
    rng = np.random.default_rng((seed, part, index))
    picture = drawing.draw(index % len(drawing.CLASS_NAMES), rng)
    return simplejpeg.encode_jpeg(
        picture, quality=_JPEG_QUALITY, colorsubsampling="420"
    )


def _in_threads(seed: int, part: int, count: int) -> Iterator[bytes]:
    """All pictures of a split in order; NumPy releases the interpreter lock."""
    workers = os.cpu_count() or 1
    with futures.ThreadPoolExecutor(workers) as pool:
        pending: collections.deque[futures.Future[bytes]] = collections.deque()
        todo = iter(range(count))
        while True:
            free = 8 * workers - len(pending)
            for index in itertools.islice(todo, free):
                pending.append(pool.submit(example, seed, part, index))
            if not pending:
                return
            yield pending.popleft().result()
