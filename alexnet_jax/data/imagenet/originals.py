"""Find the original images of ILSVRC-2012: archives, class folders or tfds.

Archives are read in place. A split becomes a table with one row per image: the file and
the bytes where it lies. Any process can then read any image by itself.
"""

import dataclasses
import functools
import hashlib
import importlib
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from alexnet_jax.data.errors import DataError
from alexnet_jax.data.imagenet.classes import check_label, named_wnid, wnids
from alexnet_jax.data.images import PICTURE_SUFFIXES
from alexnet_jax.data.sources.folder import class_files
from alexnet_jax.data.sources.source import some, visible, what_is_in
from alexnet_jax.data.sources.tfds import (
    HOW_TO_GET_IMAGENET,
    check_files,
    example_message,
    tfds_builder,
    tfds_directory,
)
from alexnet_jax.system.cli import progress


class Official(NamedTuple):
    """A split as image-net.org offers it, and names of folders that do as well."""

    archive: str
    bytes: int
    md5: str  # as in tfds and torchvision
    folders: tuple[str, ...]


OFFICIAL = {
    "train": Official(
        "ILSVRC2012_img_train.tar",
        147_897_477_120,
        "1d675b47d978889d74fa0da5fadfb00e",
        ("train",),
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


@dataclasses.dataclass(frozen=True)
class Originals:
    """The images of one split.

    Attributes:
      description: one line that says what it is and where.
      kind: "file", bytes of an image file; "tfrecord" and "array_record", records of a
        tfds data set (for array_record, `offset` is the record's number).
      places: archives, folders or shard files.
      rows: structured array [n] with the fields
        place: number in `places`;
        name: file name of the image (in a tfds data set, of the record);
        offset, size: its bytes; offset -1 is a file of its own in a folder;
        label: 0..999; -1 if only the record knows.
    """

    description: str
    kind: Literal["file", "tfrecord", "array_record"]
    places: tuple[str, ...]
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def divided(self, count: int) -> "list[Originals]":
        """Divide into `count` parts, each a fair sample, by a hash of the names.

        The part of an image depends on its name alone: archives and folders give the
        same, and an image more or less changes one part. The records of a tfds data set
        are shuffled already and keep their order.
        """
        if self.kind == "file":
            digests = b"".join(
                hashlib.blake2b(name, digest_size=8).digest()
                for name in self.rows["name"]
            )
            hashes = np.frombuffer(digests, ">u8").astype(np.uint64)
            order = np.argsort(hashes, kind="stable")
            edges = [(part << 64) // count for part in range(1, count)]
            cuts = np.searchsorted(hashes[order], np.array(edges, np.uint64))
            parts = np.split(order, cuts)
        else:
            parts = np.array_split(np.arange(len(self)), count)
        return [dataclasses.replace(self, rows=self.rows[part]) for part in parts]

    def fingerprint(self) -> str:
        """Return a hash of names, sizes and labels, wherever the images lie."""
        digest = hashlib.blake2b(b"/".join(self.rows["name"].tolist()), digest_size=16)
        digest.update(self.rows["size"].tobytes() + self.rows["label"].tobytes())
        return digest.hexdigest()

    def read(self, index: int) -> tuple[str, int, bytes]:
        """Return name, label and bytes of an image file.

        Raises:
          OSError: it cannot be read.
          DataError: its label cannot be right.
        """
        place, name, offset, size, label = self.rows[index].item()
        place, name = self.places[place], os.fsdecode(name)
        try:
            if self.kind == "array_record":
                data = _reader(place).read([offset])[0]
            else:
                with open(place if offset >= 0 else f"{place}/{name}", "rb") as file:
                    file.seek(max(0, offset))
                    data = file.read(size)
                if len(data) < size:
                    raise OSError(f"it ends after {len(data)} of {size} bytes")
        except (OSError, RuntimeError) as error:
            raise OSError(
                f"cannot read {name} of {place}: {error}. Start the same command again "
                "when it can be read"
            ) from error
        return _from_example(data, name, place) if label < 0 else (name, label, data)


def find(source: Path) -> dict[str, Originals]:
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
    with progress("reading tables of contents", None, "pictures") as done:
        return {split: _pictures(place, done) for split, place in places.items()}


def _pictures(place: Path, done: Callable[[int], object]) -> Originals:
    """Read the table of an archive, or list a folder, and label the images."""
    is_archive = place.is_file()
    places: dict[Path, int] = {}
    rows = []
    for where, wnid, name, offset, size in (
        _in_archive(place) if is_archive else _in_folder(place)
    ):
        wnid = wnid or named_wnid(name)
        if wnid not in _LABELS:
            raise DataError(
                f"{name} in {where} is of class {wnid or 'unknown'}, none of the 1,000 "
                f"classes of ILSVRC-2012 ({wnids()[0]} ...). Pictures of other classes "
                "need no preparation: --config=configs/folder.py "
                "--config.data.source=folder:PATH"
            )
        check_label(name, wnid, str(where))
        number = places.setdefault(where, len(places))
        rows.append((number, os.fsencode(name), offset, size, _LABELS[wnid]))
        done(1)
    kind = "archive" if is_archive else "folder"
    return _table(f"{kind} {place}", "file", [*places], rows)


def _table(
    description: str, kind: Any, places: list[Any], rows: list[Any]
) -> Originals:
    if not rows:
        raise DataError(f"{description} holds no pictures")
    width = max(len(name) for _, name, *_ in rows)
    fields = [("place", "i4"), ("name", f"S{width}"), ("offset", "i8"), ("size", "i8")]
    table = np.array(rows, [*fields, ("label", "i2")])
    names, counts = np.unique(table["name"], return_counts=True)
    if len(names) < len(table):
        twice = os.fsdecode(names[counts.argmax()])
        raise DataError(f"{description} holds {twice} more than once")
    return Originals(description, kind, tuple(map(str, places)), table)


# (archive or folder, its class if it is of one class, name, offset, size).
Picture = tuple[Path, str | None, str, int, int]


def _in_archive(
    path: Path, start: int = 0, wnid: str | None = None
) -> Iterator[Picture]:
    """Yield the images of an archive, and of the archives of classes inside it.

    Args:
      start: first byte of the archive in the file.
      wnid: the class of its images, if it is the archive of a class.
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
                        yield path, wnid, name, member.offset_data, member.size
            # An archive that is cut off between two files lacks only the end mark.
            file.seek(end)
            if file.read(2 * _BLOCK) != bytes(2 * _BLOCK):
                raise tarfile.ReadError("there is no end mark")
    except tarfile.TarError as error:
        [official] = [o.bytes for o in OFFICIAL.values() if o.archive == path.name]
        where = f"{path}, archive {wnid}.tar" if wnid else path
        raise DataError(
            f"{where}: {error}. It has {path.stat().st_size:,} bytes, the official archive "
            f"{official:,}: was the download cut off, or the file compressed? Go on with "
            "the download (wget -c, curl -C -) or start it again"
        ) from error


def _in_folder(folder: Path) -> Iterator[Picture]:
    """Yield the images of class folders, or those that lie side by side.

    Raises:
      DataError: there is anything else: no image is left out without a word.
    """
    inside = {entry.name: entry.is_dir() for entry in visible(folder)}
    classes = sorted(name for name in inside if inside[name])
    unclear = sorted(inside.keys() - classes) if classes else []
    for wnid in classes or [None]:
        place = folder / (wnid or "")
        names, others = class_files(place)
        unclear += [os.path.relpath(place / name, folder) for name in others]
        for name in names:
            yield place, wnid, name, -1, os.stat(place / name).st_size
    if unclear:
        raise DataError(
            f"in {folder} it is unclear what to do with {some(unclear)}: expected class "
            f"folders, and in them pictures only ({', '.join(PICTURE_SUFFIXES)}). Unpack, "
            "move or remove them"
        )


def _tfds(directory: Path, split: str) -> Originals:
    """List the records of a prepared tfds imagenet2012."""
    info = tfds_builder(directory).info
    if tuple(getattr(dict(info.features.items()).get("label"), "names", ())) != wnids():
        raise DataError(
            f"{directory} is no tfds data set imagenet2012: its labels are not the 1,000 "
            "WNIDs in order"
        )
    kind = info.file_format.value
    files = [os.fspath(path) for path in info.splits[split].filepaths]
    lengths = dict(zip(files, info.splits[split].shard_lengths, strict=True))
    check_files(lengths, directory)
    rows = []
    for place, (path, count) in enumerate(lengths.items()):
        if kind == "tfrecord":
            spans = _tfrecord_spans(path, count)
        else:  # the size of the file tells data sets apart
            spans = [(n, os.path.getsize(path)) for n in range(count)]
        for number, span in enumerate(spans):
            name = f"{os.path.basename(path)}#{number}".encode()
            rows.append((place, name, *span, -1))
    return _table(f"tfds {directory} [{split}]", kind, files, rows)


def _tfrecord_spans(path: str, count: int) -> list[tuple[int, int]]:
    """Return offset and size of each record: length (8), checksum (4), data, checksum."""
    spans = []
    with open(path, "rb") as file:
        for _ in range(count):
            length = int.from_bytes(file.read(8), "little")
            spans.append((file.tell() + 4, length))
            file.seek(4 + length + 4, os.SEEK_CUR)
        if file.tell() != (size := os.path.getsize(path)):
            raise DataError(
                f"{path} is cut off at {size:,} bytes. Prepare that data set again"
            )
    return spans


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
        data = features["image"].bytes_list.value[0]
        if "file_name" in features:
            name = features["file_name"].bytes_list.value[0].decode()
        if not 0 <= label < len(_LABELS):
            raise LookupError(f"its label is {label}, outside 0..{len(_LABELS) - 1}")
    except (DecodeError, LookupError) as error:
        raise DataError(
            f"record {name} of {place} is damaged: {error}. Prepare that data set again"
        ) from error
    check_label(name, wnids()[label], place)
    return name, label, data
