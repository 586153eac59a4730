"""Find the original images of ILSVRC-2012: archives, class folders or tfds.

Archives are read in place. A split becomes a list of its images: the file and the bytes
where each lies. Any process can then read any image by itself.
"""

import functools
import hashlib
import importlib
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from alexnet_jax.data.errors import DataError
from alexnet_jax.data.imagenet.classes import check_label, named_wnid, wnids
from alexnet_jax.data.images import IMAGE_SUFFIXES
from alexnet_jax.data.sources.folder import find_images
from alexnet_jax.data.sources.source import some, what_is_in
from alexnet_jax.data.sources.tfds import (
    example_message,
    require_files,
    tfds_builder,
    tfds_directory,
)
from alexnet_jax.system.cli import progress

HOW_TO_GET_IMAGENET = (
    "Download the archives from https://image-net.org/download-images after signing up "
    'there: ILSVRC2012, "Training images (Task 1 & 2)", 138 GB, and "Validation images '
    '(all tasks)", 6.3 GB; put ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, '
    "packed as they are, into one folder"
)


class Official(NamedTuple):
    """A split as image-net.org offers it, and names of folders that do as well."""

    archive: str
    bytes: int
    md5: str  # as in tfds and torchvision
    folders: tuple[str, ...]


OFFICIAL = {
    "train": Official(
        "ILSVRC2012_img_train.tar", 147_897_477_120, "1d675b47d978889d74fa0da5fadfb00e", ("train",)
    ),
    "validation": Official(
        "ILSVRC2012_img_val.tar",
        6_744_924_160,
        "29b22e2961454d5413ddabcf34fc5622",
        ("val", "validation"),
    ),
}
_LABELS = {wnid: label for label, wnid in enumerate(wnids())}
_BLOCK = 512  # bytes, the unit of a tar archive


class Original(NamedTuple):
    """One image, and where its bytes lie."""

    path: str  # the image file, an archive, or a file of tfds records
    name: str  # of the image file, even in an archive; else "file of records#number"
    size: int  # bytes; for array_record those of the whole file
    label: int  # 0..999; -1 if only the record knows
    offset: int = 0  # first byte in the file
    number: int | None = None  # of the record in an array_record file


def divided(originals: list[Original], count: int) -> list[list[Original]]:
    """Divide into `count` parts, each a fair sample, by a hash of the names.

    The part of an image depends on its name alone: archives and folders give the same,
    and an image more or less changes one part. The records of a tfds data set are
    shuffled already and keep their order.
    """
    if originals[0].label < 0:
        cuts = np.array_split(np.arange(len(originals)), count)
        return [originals[cut[0] : cut[-1] + 1] for cut in cuts]
    parts: list[list[tuple[int, Original]]] = [[] for _ in range(count)]
    for original in originals:
        name = os.fsencode(original.name)
        key = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big")
        parts[key * count >> 64].append((key, original))
    return [[original for _, original in sorted(part)] for part in parts]


def fingerprint(originals: list[Original]) -> str:
    """Return a hash of names, sizes and labels, wherever the images lie."""
    names = b"/".join(os.fsencode(original.name) for original in originals)
    digest = hashlib.blake2b(names, digest_size=16)
    digest.update(np.array([original.size for original in originals], "i8").tobytes())
    digest.update(np.array([original.label for original in originals], "i2").tobytes())
    return digest.hexdigest()


def read(original: Original) -> tuple[str, int, bytes]:
    """Return name, label and bytes of an image file.

    Raises:
      OSError: it cannot be read.
      DataError: its label cannot be right.
    """
    path, name, size, label, offset, number = original
    try:
        if number is not None:
            data = _reader(path).read([number])[0]
        else:
            with open(path, "rb") as file:
                file.seek(offset)
                data = file.read(size)
            if len(data) < size:
                raise OSError(f"it ends after {len(data)} of {size} bytes")
    except (OSError, RuntimeError) as error:
        raise OSError(
            f"cannot read {name} of {path}: {error}. Start the same command again when "
            "it can be read"
        ) from error
    return _from_example(data, name, path) if label < 0 else (name, label, data)


def find(source: Path) -> dict[str, list[Original]]:
    """Find the originals of both splits in a folder.

    Args:
      source: holds the two archives, or train/<wnid>/ and val/ (class folders, or files
        side by side whose names say the class), or one of each; or a prepared tfds
        `imagenet2012`.

    Raises:
      DataError: an archive is cut off, or a class is unknown.
      FileNotFoundError: a split is missing.
    """
    directory = source
    if (source / "imagenet2012").is_dir():
        directory = tfds_directory("imagenet2012", source)
    if (directory / "dataset_info.json").exists():
        return {split: _tfds(directory, split) for split in OFFICIAL}
    for inside in ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC"):  # as Kaggle packs it
        source = source / inside if (source / inside / "train").is_dir() else source
    places = {}
    for split, official in OFFICIAL.items():
        names = (official.archive, *official.folders)
        found = [source / name for name in names if (source / name).exists()]
        if not found:
            raise FileNotFoundError(
                f"no {split} split ({official.archive} or "
                f"{'/ or '.join(official.folders)}/) in --source={source} "
                f"({what_is_in(source)}). {HOW_TO_GET_IMAGENET}"
            )
        places[split] = found[0]
    return {split: _images_of(place) for split, place in places.items()}


def _images_of(place: Path) -> list[Original]:
    """Read the table of an archive, or list a folder, and label the images."""
    found: dict[str, Original] = {}
    entries = _in_archive(place) if place.is_file() else _in_folder(place)
    with progress(f"reading the contents of {place.name}", None, "images") as done:
        for wnid, original in entries:
            name = original.name
            wnid = wnid or named_wnid(name)
            if wnid not in _LABELS:
                raise DataError(
                    f"{name} in {place} is of class {wnid or 'unknown'}, none of the 1,000 "
                    f"classes of ILSVRC-2012 ({wnids()[0]} ...). Images of other classes "
                    "need no preparation: --config=configs/folder.py "
                    "--config.data.source=folder:PATH"
                )
            check_label(name, wnid, str(place))
            if name in found:
                raise DataError(
                    f"{place} holds {name} more than once; expected each image once. Remove the "
                    "copies"
                )
            found[name] = original._replace(label=_LABELS[wnid])
            done(1)
    if not found:
        raise DataError(f"{place} holds no images; give the folder or archive of the split")
    return list(found.values())


def _in_archive(
    path: Path, start: int = 0, wnid: str | None = None
) -> Iterator[tuple[str | None, Original]]:
    """Yield the images of the archive at byte `start`, and of class archives inside.

    Each comes with its class, if it lies in the archive of one.
    """
    end = start
    try:
        with open(path, "rb") as file:
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                    name = os.path.basename(member.name)
                    stem, suffix = os.path.splitext(name)
                    if not member.isreg() or name.startswith("."):
                        continue
                    if suffix == ".tar":
                        yield from _in_archive(path, member.offset_data, stem)
                    else:
                        yield wnid, Original(str(path), name, member.size, -1, member.offset_data)
            # An archive that is cut off between two files lacks only the end mark.
            file.seek(end)
            if file.read(2 * _BLOCK) != bytes(2 * _BLOCK):
                raise tarfile.ReadError("there is no end mark")
    except tarfile.TarError as error:
        where = f"{path}, archive {wnid}.tar" if wnid else path
        official = {official.archive: official.bytes for official in OFFICIAL.values()}
        raise DataError(
            f"{where}: {error}. It has {path.stat().st_size:,} bytes, the official archive "
            f"{official[path.name]:,}: was the download cut off, or the file compressed? "
            "Go on with the download (wget -c, curl -C -) or start it again"
        ) from error


def _in_folder(folder: Path) -> Iterator[tuple[str, Original]]:
    """Yield the images of class folders, or those that lie side by side, by class.

    Raises:
      DataError: there is anything else, so that no image is skipped silently.
    """
    classes, others = find_images(folder)
    if others:
        raise DataError(
            f"in {folder} it is unclear what to do with {some(others)}: expected class "
            f"folders, and in them images only ({', '.join(IMAGE_SUFFIXES)}). Unpack, "
            "move or remove them"
        )
    for wnid, (place, names) in classes.items():
        for name in names:
            path = place / name
            yield wnid, Original(str(path), name, path.stat().st_size, -1)


def _tfds(directory: Path, split: str) -> list[Original]:
    """List the records of a prepared tfds imagenet2012."""
    info = tfds_builder(directory).info
    if tuple(getattr(dict(info.features.items()).get("label"), "names", ())) != wnids():
        raise DataError(
            f"{directory} is no tfds data set imagenet2012: its labels are not the 1,000 "
            "WNIDs in order. Prepare that data set again, or give the archives"
        )
    paths = [os.fspath(path) for path in info.splits[split].filepaths]
    require_files(paths, directory)
    found = []
    for path, count in zip(paths, info.splits[split].shard_lengths, strict=True):
        name, size = os.path.basename(path), os.path.getsize(path)
        if info.file_format.value == "array_record":
            found += [Original(path, f"{name}#{n}", size, -1, 0, n) for n in range(count)]
            continue
        with open(path, "rb") as file:  # records: length (8), checksum, data, checksum
            for n in range(count):
                length = int.from_bytes(file.read(8), "little")
                found.append(Original(path, f"{name}#{n}", length, -1, file.tell() + 4))
                file.seek(4 + length + 4, os.SEEK_CUR)
            if file.tell() != size:
                raise DataError(f"{path} is cut off at {size:,} bytes. Prepare that data set again")
    return found


@functools.lru_cache(maxsize=4)
def _reader(path: str) -> Any:
    module: Any = importlib.import_module("array_record.python.array_record_module")
    return module.ArrayRecordReader(path)


def _from_example(record: bytes, name: str, place: str) -> tuple[str, int, bytes]:
    """Return name, label and image file in a record of tfds's imagenet2012."""
    from google.protobuf.message import DecodeError

    try:
        features = example_message().FromString(record).features.feature
        label = features["label"].int64_list.value[0]
        if not 0 <= label < len(_LABELS):
            raise LookupError(f"its label is {label}, outside 0..{len(_LABELS) - 1}")
        data = features["image"].bytes_list.value[0]
        if "file_name" in features:
            name = features["file_name"].bytes_list.value[0].decode()
    except (DecodeError, LookupError) as error:
        raise DataError(
            f"record {name} of {place} is damaged: {error}. Prepare that data set again"
        ) from error
    check_label(name, wnids()[label], place)
    return name, label, data
