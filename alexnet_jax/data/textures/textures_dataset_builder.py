"""The tfds data set `textures`: ten classes of procedural 256 x 256 images."""

import dataclasses
import io
import os
from collections.abc import Iterator
from concurrent import futures
from typing import Any, ClassVar

import numpy as np
import simplejpeg
import tensorflow_datasets as tfds

from alexnet_jax.data.textures import drawing

_SEED, _JPEG_QUALITY = 2012, 85


@dataclasses.dataclass
class TexturesConfig(tfds.core.BuilderConfig):
    """Images per split, classes by turns; a named config has a folder of that name."""

    train_examples: int = 4000
    test_examples: int = 1000


class Builder(tfds.core.GeneratorBasedBuilder):
    """Draw the images; see `drawing`."""

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
        config = self.builder_config
        if not isinstance(config, TexturesConfig):
            config = TexturesConfig(name="full")
        return {
            "train": self._generate_examples(0, config.train_examples),
            "test": self._generate_examples(1, config.test_examples),
        }

    def _generate_examples(self, part: int, count: int) -> Iterator[tuple[int, dict]]:
        workers = os.cpu_count() or 1
        with futures.ThreadPoolExecutor(workers) as pool:
            for first in range(0, count, 32 * workers):  # few images in memory
                indices = range(first, min(first + 32 * workers, count))
                jpegs = pool.map(lambda index: example(part, index), indices)
                for index, jpeg in zip(indices, jpegs, strict=True):
                    label = index % len(drawing.CLASS_NAMES)
                    yield index, {"image": io.BytesIO(jpeg), "label": label}


def example(part: int, index: int) -> bytes:
    """Return the JPEG file of image `index` of split `part` (0: train, 1: test)."""
    rng = np.random.default_rng((_SEED, part, index))
    image = drawing.draw(index % len(drawing.CLASS_NAMES), rng)
    return simplejpeg.encode_jpeg(image, quality=_JPEG_QUALITY, colorsubsampling="420")
