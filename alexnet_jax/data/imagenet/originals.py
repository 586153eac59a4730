"""Where the original pictures of ILSVRC-2012 lie: archives, class folders, tfds.

Nothing is unpacked. A split becomes a table, one row a picture, that says in which
file and at which bytes it lies; any process can then read any picture by itself.
"""

import dataclasses
import functools
import hashlib
import importlib
import os
import struct
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from alexnet_jax.data import sources
from alexnet_jax.data.errors import DataError
from alexnet_jax.data.imagenet.classes import (
    OFFICIAL_COUNTS,
    check_label,
    named_wnid,
    validation_wnid,
    wnids,
)

SPLITS = tuple(OFFICIAL_COUNTS)
ARCHIVES = {"train": "ILSVRC2012_img_train.tar", "validation": "ILSVRC2012_img_val.tar"}
# Bytes and MD5 of the official archives, as tfds and torchvision have them.
OFFICIAL_BYTES = {"train": 147_897_477_120, "validation": 6_744_924_160}
OFFICIAL_MD5 = {
    "train": "1d675b47d978889d74fa0da5fadfb00e",
    "validation": "29b22e2961454d5413ddabcf34fc5622",
}
_FOLDERS = {"train": ("train",), "validation": ("val", "validation")}
_BLOCK = 512  # bytes, a tar archive's unit
_KAGGLE = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")
_COLUMNS = ("place", "name", "offset", "size", "label")
_MEND = "Prepare that data set again"
_FROM_RECORD = -1  # a label that is known only when the record is read

Progress = Callable[[int], object]


@dataclasses.dataclass(frozen=True)
class Originals:
    """The pictures of one split, as columns of equal length n.

    Attributes:
      description: one line for the reader: what it is and where.
      kind: "file", bytes of a picture file; "tfrecord" and "array_record", records
        of a tfds data set (of the latter `offset` is the record's number).
      places: archives, folders or shard files.
      place: int32 [n], which of them.
      name: bytes [n], the picture's file name (in a tfds data set the record's).
      offset, size: int64 [n], its bytes; offset -1 is a file of its own in a folder.
      label: int16 [n], 0..999; -1 where only the record knows.
    """

    description: str
    kind: Literal["file", "tfrecord", "array_record"]
    places: tuple[str, ...]
    place: np.ndarray
    name: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    label: np.ndarray

    def __len__(self) -> int:
        return len(self.name)

    def take(self, indices: Any) -> "Originals":
        """Some rows, in that order (an index array or a slice)."""
        return dataclasses.replace(
            self, **{name: getattr(self, name)[indices] for name in _COLUMNS}
        )

    def divided(self, count: int) -> "list[Originals]":
        """In `count` parts, each a fair sample: by a hash of the names, in its order.

        A picture's part depends on its name alone: archives and folders give the
        same, and a picture more or less changes one part. The records of a tfds data
        set are shuffled already and keep their order.
        """
        if self.kind != "file":
            rows = np.array_split(np.arange(len(self)), count)
            return [self.take(part) for part in rows]
        digests = b"".join(
            hashlib.blake2b(n, digest_size=8).digest() for n in self.name
        )
        hashes = np.frombuffer(digests, ">u8").astype(np.uint64)
        order = np.argsort(hashes, kind="stable")
        edges = [(part << 64) // count for part in range(1, count)]
        cuts = np.searchsorted(hashes[order], np.array(edges, np.uint64))
        return [self.take(part) for part in np.split(order, cuts)]

    def fingerprint(self) -> str:
        """A hash of what the pictures are, wherever they lie: names, sizes, labels."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(b"/".join(self.name.tolist()))
        digest.update(self.size.tobytes() + self.label.tobytes())
        return digest.hexdigest()

    def read(self, index: int) -> tuple[str, int, bytes]:
        """Name, label and file of a picture.

        Raises:
          OSError: it cannot be read, whatever it may hold.
          DataError: its label cannot be right.
        """
        place = self.places[self.place[index]]
        name, label = os.fsdecode(self.name[index]), int(self.label[index])
        offset, size = int(self.offset[index]), int(self.size[index])
        if self.kind == "array_record":
            try:
                record = _reader(place).read([offset])[0]
            except RuntimeError as error:
                raise OSError(
                    f"cannot read record {offset} of {place}: {error}. {_MEND}, or start "
                    "the same command when it can be read"
                ) from error
            return _from_example(record, name, place)
        path = place if offset >= 0 else os.path.join(place, name)
        try:
            with open(path, "rb") as file:
                file.seek(max(0, offset))
                data = file.read(size)
        except OSError as error:
            raise OSError(
                f"cannot read {name} of {place}: {error.strerror}. Start the same "
                "command again when it can be read"
            ) from error
        if len(data) < size:
            raise OSError(f"{name} of {place} ends after {len(data)} of {size} bytes")
        if self.kind == "file":
            return name, label, data
        return _from_example(data, name, place)


def find(source: Path, progress: Progress | None = None) -> dict[str, Originals]:
    """The originals of both splits in a folder.

    Args:
      source: holds the two archives, or train/<wnid>/ and val/ (class folders, or files
        side by side whose names say the class), or one of each; or a prepared tfds
        `imagenet2012`.
      progress: called with the number of pictures found since its last call.

    Raises:
      DataError, FileNotFoundError: a split is missing, an archive is cut off, a class
        is unknown; with what was found and what to do.
    """
    directory = _tfds_directory(source)
    if directory is not None:
        return {split: _tfds(directory, split) for split in SPLITS}
    for inside in _KAGGLE:  # as Kaggle packs it
        source = source / inside if (source / inside / "train").is_dir() else source
    found: dict[str, Callable[[], Originals]] = {}
    for split in SPLITS:
        archive = source / ARCHIVES[split]
        folders = [source / name for name in _FOLDERS[split]]
        folder = next((path for path in folders if path.is_dir()), None)
        report = progress or (lambda _: None)
        if archive.is_file():
            read = _train_archive if split == "train" else _validation_archive
            found[split] = functools.partial(read, archive, report)
        elif folder is not None:
            found[split] = functools.partial(_folder, folder, split, report)
    if len(found) < len(SPLITS):
        raise FileNotFoundError(_nothing_found(source, found))
    return {split: _checked(read()) for split, read in found.items()}


def _nothing_found(source: Path, found: Any) -> str:
    if source.is_dir():
        visible = sorted(p.name for p in source.iterdir() if p.name[0] != ".")
        there = f"found there: {sources.some(visible)}"
    else:
        there = (
            "it is not a folder: give the one that holds both archives"
            if source.exists()
            else "it does not exist"
        )
    missing = " and no ".join(
        f"{split} split ({ARCHIVES[split]} or {'/ or '.join(_FOLDERS[split])}/)"
        for split in SPLITS
        if split not in found
    )
    return f"no {missing} in --source={source} ({there}). {sources.HOW_TO_GET_IMAGENET}"


def _checked(originals: Originals) -> Originals:
    names, counts = np.unique(originals.name, return_counts=True)
    if len(names) < len(originals):
        twice = os.fsdecode(names[counts.argmax()])
        raise DataError(f"{originals.description} holds {twice} more than once")
    if not len(originals):
        raise DataError(f"{originals.description} holds no pictures")
    return originals


def _table(
    description: str, places: list[str], rows: list[tuple[int, bytes, int, int, int]]
) -> Originals:
    """From (place, name, offset, size, label) a picture."""
    place, name, offset, size, label = zip(*rows, strict=True) if rows else [()] * 5
    return Originals(
        description,
        "file",
        tuple(places),
        np.array(place, np.int32),
        np.array(name, np.bytes_),
        np.array(offset, np.int64),
        np.array(size, np.int64),
        np.array(label, np.int16),
    )


def _label(wnid: str, where: str) -> int:
    try:
        return _LABELS[wnid]
    except KeyError:
        raise DataError(
            f"{where} is none of the 1,000 classes of ILSVRC-2012, such as "
            f"{wnids()[0]}. Pictures of other classes need no preparation: "
            "--config=configs/folder.py --config.data.source=folder:PATH"
        ) from None


_LABELS = {wnid: label for label, wnid in enumerate(wnids())}


# Archives.


def _about(archive: Path) -> str:
    return f"archive {archive}"


def _train_archive(path: Path, progress: Progress) -> Originals:
    """An archive of a thousand archives, n01440764.tar ..."""
    rows = []
    for member in _members(path, 0, path.stat().st_size):
        wnid, suffix = os.path.splitext(os.path.basename(member.name))
        if suffix != ".tar":
            raise DataError(
                f"{path} holds {member.name}; expected archives of classes, such "
                f"as {wnids()[0]}.tar"
            )
        label = _label(wnid, f"{member.name} in {path}")
        inside = list(_members(path, member.offset_data, member.size, wnid))
        for picture in inside:
            name = _name(picture)
            check_label(os.fsdecode(name), wnid, f"{path}, archive {wnid}.tar")
            rows.append((0, name, picture.offset_data, picture.size, label))
        progress(len(inside))
    return _table(_about(path), [str(path)], rows)


def _validation_archive(path: Path, progress: Progress) -> Originals:
    """The flat archive of the validation pictures; labels by their numbers."""
    rows = []
    for member in _members(path, 0, path.stat().st_size):
        name = _name(member)
        label = _LABELS[validation_wnid(os.fsdecode(name), str(path))]
        rows.append((0, name, member.offset_data, member.size, label))
        progress(1)
    return _table(_about(path), [str(path)], rows)


def _members(
    path: Path, start: int, size: int, inner: str = ""
) -> Iterator[tarfile.TarInfo]:
    """The files of the archive that lies at these bytes; hidden ones are left out."""
    where = f"{path}, archive {inner}.tar" if inner else str(path)
    end = start
    try:
        with open(path, "rb") as file:
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                    if end > start + size:
                        raise tarfile.ReadError("unexpected end of data")
                    hidden = os.path.basename(member.name).startswith(".")
                    if member.isreg() and not hidden:
                        yield member
            # Cut off between two files an archive looks whole but for this.
            file.seek(end)
            if file.read(2 * _BLOCK) != bytes(2 * _BLOCK):
                raise tarfile.ReadError("there is no end mark")
    except tarfile.TarError as error:
        raise DataError(_cut_off(path, f"{where}: {error}")) from error


def _cut_off(path: Path, what: str) -> str:
    official = next(OFFICIAL_BYTES[s] for s, a in ARCHIVES.items() if a == path.name)
    with open(path, "rb") as file:
        if file.read(2) == b"\x1f\x8b":
            return f"{path} is compressed; the official archive is not: gunzip it"
    return (
        f"{what}. It has {path.stat().st_size:,} bytes, the official archive "
        f"{official:,}: was the download cut off? Go on with it (wget -c, curl -C -) or "
        "download it again"
    )


def _name(member: tarfile.TarInfo) -> bytes:
    return os.fsencode(os.path.basename(member.name))


def md5_problem(split: str, path: Path, progress: Progress) -> str | None:
    """What is wrong with an archive, None if it is the official one, to the bit."""
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
            progress(len(block))
    if digest.hexdigest() == OFFICIAL_MD5[split]:
        return None
    return (
        f"{path} has the MD5 {digest.hexdigest()}, the official archive "
        f"{OFFICIAL_MD5[split]}: it is damaged or was packed again"
    )


# Folders.


def _folder(folder: Path, split: str, progress: Progress) -> Originals:
    """Class folders, or pictures side by side whose names say the class."""
    inside = {e.name: sources.is_folder(e) for e in sources.visible(folder)}
    classes = sorted(name for name in inside if inside[name])
    flat = not classes
    places = [folder] if flat else [folder / wnid for wnid in classes]
    unclear = (
        [] if flat else [folder / name for name in sorted(inside.keys() - classes)]
    )
    rows = []
    for number, place in enumerate(places):
        names, others = sources.class_files(place)
        unclear += [place / name for name in others]
        for name in names:
            wnid = _wnid(name, split, place) if flat else place.name
            label = _label(wnid, f"folder {place}")
            check_label(name, wnid, str(place))
            size = os.stat(place / name).st_size
            rows.append((number, os.fsencode(name), -1, size, label))
        progress(len(names))
    if unclear:  # no picture is left out without a word
        relative = [os.path.relpath(path, folder.parent) for path in unclear]
        raise DataError(
            f"in {folder.parent} it is unclear what to do with {sources.some(relative)}: "
            "expected class folders, and in them pictures only "
            f"({', '.join(sources.PICTURE_SUFFIXES)}). Unpack, move or remove them"
        )
    return _table(f"folder {folder}", [str(place) for place in places], rows)


def _wnid(name: str, split: str, folder: Path) -> str:
    """The class of a picture that lies in no class folder."""
    if split == "validation":
        return validation_wnid(name, str(folder))
    if wnid := named_wnid(name):
        return wnid
    raise DataError(
        f"{folder / name} does not say its class: expected class folders, or names such "
        "as n01440764_10026.JPEG"
    )


# tfds.


def _tfds_directory(source: Path) -> Path | None:
    """The version's directory of a prepared imagenet2012 in or at `source`."""
    if (source / "dataset_info.json").exists():
        return source
    if (source / "imagenet2012").is_dir():
        return sources.tfds_directory("imagenet2012", source)
    return None


def _tfds(directory: Path, split: str) -> Originals:
    info: Any = sources.tfds_builder(directory).info
    features = dict(info.features.items())
    names = getattr(features.get("label"), "names", None)
    if tuple(names or ()) != wnids() or "image" not in features:
        raise DataError(
            f"{directory} is no tfds data set imagenet2012: its labels are not the "
            "1,000 WNIDs in order"
        )
    if split not in info.splits:
        raise DataError(
            f"{directory} has no split {split} (its splits: "
            f"{sources.some(sorted(info.splits))}): was the validation archive missing "
            f"when it was prepared? {sources.HOW_TO_GET_IMAGENET}"
        )
    kind = info.file_format and info.file_format.value
    files = [os.fspath(path) for path in info.splits[split].filepaths]
    lengths = info.splits[split].shard_lengths
    said = dict(zip(files, lengths, strict=True))
    sources.check_files(said, f"{directory} [{split}]")
    if kind == "array_record":
        sizes = [os.path.getsize(path) for path in files]  # tells data sets apart
        spans = [
            [(number, size) for number in range(length)]
            for length, size in zip(lengths, sizes, strict=True)
        ]
    elif kind == "tfrecord":
        spans = [_tfrecord_spans(Path(path)) for path in files]
    else:
        raise DataError(
            f"{directory} is stored as {kind}, not tfrecord or array_record"
        )
    rows = [
        (place, f"{os.path.basename(files[place])}#{number}".encode(), *span)
        for place, of_file in enumerate(spans)
        for number, span in enumerate(of_file)
    ]
    table = _table(
        f"tfds {directory} [{split}]", files, [(*row, _FROM_RECORD) for row in rows]
    )
    return dataclasses.replace(table, kind=kind)


def _tfrecord_spans(path: Path) -> list[tuple[int, int]]:
    """Offset and size of each record: length (8), checksum (4), data, checksum (4)."""
    spans, end = [], path.stat().st_size
    with open(path, "rb") as file:
        while file.tell() < end:
            header = file.read(12)
            length = struct.unpack("<Q", header[:8])[0] if len(header) == 12 else end
            spans.append((file.tell(), length))
            if file.tell() + length + 4 > end:
                raise DataError(f"{path} is cut off at {end:,} bytes. {_MEND}")
            file.seek(length + 4, os.SEEK_CUR)
    return spans


@functools.lru_cache(maxsize=4)
def _reader(path: str) -> Any:
    # (The type checker cannot see into this module.)
    module: Any = importlib.import_module("array_record.python.array_record_module")
    return module.ArrayRecordReader(path)


def _from_example(record: bytes, name: str, place: str) -> tuple[str, int, bytes]:
    from google.protobuf.message import DecodeError

    try:
        features = sources.example_message().FromString(record).features.feature
        label = features["label"].int64_list.value[0]
        data = features["image"].bytes_list.value[0]
        if "file_name" in features:
            name = features["file_name"].bytes_list.value[0].decode()
    except (DecodeError, LookupError, UnicodeDecodeError) as error:
        raise DataError(
            f"record {name} of {place} is damaged: {error}. {_MEND}"
        ) from error
    if not 0 <= label < len(_LABELS):
        raise DataError(
            f"{name} of {place} has the label {label}, outside 0..{len(_LABELS) - 1}. "
            f"{_MEND}"
        )
    check_label(name, wnids()[label], place)
    return name, label, data
