"""Images for the benchmarks of the input side: given ones, or drawn ones.

The same code as for ImageNet makes records of them. One file of records stands under as
many names as ImageNet has files, so everything that depends on the number of records
(opening, shuffling, memory) is as with ImageNet, but the bytes come from the page cache.
"""

import os
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from alexnet_jax.data.imagenet import originals, preparation, wnids
from alexnet_jax.data.sources.tfds import TfdsSource
from alexnet_jax.data.textures import CLASS_NAMES, draw

IMAGES_HELP = (
    "folder that `prepare imagenet` takes (archives or class folders); without it the "
    "embedded textures are drawn, enlarged to ImageNet's usual 500 x 375"
)
_DRAWN = 400
_FILES = 1025  # of ImageNet's training split


def source(folder: Path | None, scratch: Path) -> Path:
    """Return `folder`, or a folder in `scratch` with drawn images in class folders."""
    if folder is not None:
        return folder
    made = scratch / "drawn"
    for split, name in (("train", "train"), ("validation", "val")):
        for i in range(_DRAWN if split == "train" else 10):
            label = i % len(CLASS_NAMES)
            image = Image.fromarray(draw(label, np.random.default_rng(i)))
            enlarged = image.resize((500, 500), Image.Resampling.BICUBIC)
            pixels = np.asarray(enlarged.crop((0, 0, 500, 375)))
            wnid = wnids()[label]
            path = made / name / wnid / f"{wnid}_{i}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(simplejpeg.encode_jpeg(pixels, quality=90))
    return made


def records(folder: Path | None, data_dir: Path) -> TfdsSource:
    """Return a tfds data set of 256 x 256 JPEG records: one file, under 1,025 names.

    The file holds 1,250 images of `source(folder, data_dir)`, as ImageNet's do; fewer are
    repeated. The names make 1,281,250 records.
    """
    found = originals.find(source(folder, data_dir))["train"]
    part = [found[i % len(found)] for i in range(preparation.IMAGES_PER_SHARD)]
    directory = data_dir / preparation.NAME / preparation.VERSION
    (directory / "parts").mkdir(parents=True)
    counts = {"train": _FILES, "validation": 1}
    first, *others = (
        directory / preparation.shard_name(split, i, count)
        for split, count in counts.items()
        for i in range(count)
    )
    result = preparation.write_shard(preparation.Shard(first, "train", part))
    for path in others:
        os.link(first, path)
    results = {split: [result] * count for split, count in counts.items()}
    preparation.write_metadata(directory, results)
    return TfdsSource(directory, "train", preparation.SIZE)


def repeated(folder: Path, scratch: Path, *, train: int, validation: int) -> Path:
    """Return class folders of so many images: those of `folder`, under several names."""
    made = scratch / "repeated"
    counts = {"train": (train, "train"), "validation": (validation, "val")}
    for split, found in originals.find(folder).items():
        count, name = counts[split]
        first: list[Path] = []
        for i in range(count):
            if i < len(found):
                _, label, data = originals.read(found[i])
                wnid = wnids()[label]
            else:
                wnid = first[i % len(found)].parent.name
            path = made / name / wnid / f"{wnid}_{i}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            if i < len(found):
                path.write_bytes(data)
                first.append(path)
            else:
                os.link(first[i % len(found)], path)
    return made
