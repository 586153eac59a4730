"""Where pictures come from, behind one interface: class folders, tfds, fake data.

A source knows how many examples there are and fetches any of them by index into
arrays that the caller owns. It holds no order and no state; that is the loader's.
"""

import contextlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import numpy as np

from alexnet_jax.cli import PathError, expanded
from alexnet_jax.data import images as images_lib
from alexnet_jax.data.errors import DataError
from alexnet_jax.data.imagenet import named_wnid
from alexnet_jax.data.images import PICTURE_SUFFIXES

_EVAL_FOLDERS = ("test", "val", "validation")
# tiny-imagenet's: a folder of pictures in each class and split, and the classes of a
# split, a line a picture: file name, TAB, class, TAB, box.
_IMAGES, _ANNOTATIONS = "images", "val_annotations.txt"
HOW_TO_GET_IMAGENET = (
    "The archives are had from https://image-net.org/download-images after signing up "
    'there: ILSVRC2012, "Training images (Task 1 & 2)", 138 GB, and "Validation images '
    '(all tasks)", 6.3 GB; put ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, '
    "packed as they are, into one folder"
)
HOW_TO_NAME_DATA_DIR = (
    "with --config.data.dir (of prepare: --data_dir) or the environment variable "
    "TFDS_DATA_DIR"
)
_TFDS_CLASS = re.compile(r"tensorflow_datasets\.core\.features\.[\w.]+")
_PREPARE_AGAIN = "Delete the directory and prepare the data set again"
_LABELS_LOOKED_AT = 256  # before training: reading all of them may take minutes
_VERSION = re.compile(r"\d+\.\d+\.\d+")


class Source(Protocol):
    """What the loader and the statistics need to know.

    Attributes:
      num_examples: number of examples in the split, at least 1.
      class_names: names, indexed by label; `num_classes` is their number.
      image_size: side S of the pictures that `fetch` writes.
      description: one line that says where the examples lie.
      left_out: one line that says which files there are not read; empty if all are.
      statistics_path: where the mean image and the colour PCA of this split are
        kept, beside the data; None if the source has no place of its own.
    """

    @property
    def num_examples(self) -> int: ...
    @property
    def class_names(self) -> tuple[str, ...]: ...
    @property
    def image_size(self) -> int: ...
    @property
    def description(self) -> str: ...
    @property
    def left_out(self) -> str: ...
    @property
    def statistics_path(self) -> Path | None: ...
    @property
    def num_classes(self) -> int: ...

    def labels_of(self, indices: np.ndarray) -> np.ndarray:
        """int32 [n], the labels of examples `indices` [n]; decodes no picture."""
        ...

    def fetch(
        self, indices: np.ndarray, images: np.ndarray, labels: np.ndarray
    ) -> None:
        """Writes examples `indices` [n] into `images` (uint8 [n, S, S, 3]) and
        `labels` (int32 [n]). May be called from several threads at once.

        Raises:
          DataError: a picture is broken; the message names it.
        """
        ...


def open_source(
    source: str, split: str, *, data_dir: str | None = None, image_size: int = 256
) -> Source:
    """Opens one split of a data set.

    Args:
      source: `folder:PATH` (PATH/train/<class>/*.jpg), `textures` (procedural
        pictures, built at first use; `textures/tiny` for tests), `fake`, or the
        name of a prepared tfds data set: `imagenet2012_256`, `cifar10:3.0.2`,
        `name/config`.
      split: `train`, `test`, ...; for tfds also slices such as `train[:90%]`. For
        a folder, `test`, `val` and `validation` stand for each other.
      data_dir: directory of tfds data sets; when absent the environment variable
        TFDS_DATA_DIR, else ~/tensorflow_datasets.
      image_size: side of the pictures in pixels; others are resized.

    Raises:
      DataError (a ValueError), FileNotFoundError: with what was looked for, where,
        what was found there and what to do.
    """
    if image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    if source.startswith("folder:"):
        return FolderSource(source.removeprefix("folder:"), split, image_size)
    if source == "fake":
        return FakeSource(split, image_size)
    if not re.fullmatch(r"\w+(/[\w.\-]+)?(:[\d.*]+)?", source):
        raise DataError(
            f"unknown data source {source!r}: --config.data.source takes folder:PATH, "
            "textures, fake, or the name of a tfds data set such as imagenet2012_256"
        )
    if source in ("textures", "textures/tiny"):
        from alexnet_jax.data.textures import build

        source = build(tfds_data_dir(data_dir), tiny=source.endswith("tiny"))
    return TfdsSource(
        tfds_directory(source, tfds_data_dir(data_dir)), split, image_size
    )


def match_classes(
    source: Source,
    class_names: Sequence[str],
    *,
    log: Callable[[str], object] = lambda _: None,
) -> Source:
    """Return a split with the labels of the classes that a network is trained on.

    Classes are matched by name, so label k means the same in training and evaluation.

    Args:
      source: the split; it may lack some of the trained classes.
      class_names: the trained classes, by label.
      log: told of trained classes that the split has no images of.

    Raises:
      DataError: the split has classes that were never trained.
    """
    if source.class_names == tuple(class_names):
        return source
    absent = sorted(set(class_names) - set(source.class_names))
    unknown = sorted(set(source.class_names) - set(class_names))
    if unknown:
        lacking = f"; it lacks {some(absent)}" if absent else ""
        raise DataError(
            f"{source.description} has classes that were never trained: "
            f"{some(unknown)}{lacking} ({source.num_classes} classes there, "
            f"{len(class_names)} trained)"
        )
    if absent:
        log(
            f"WARNING: no images of {len(absent)} of the {len(class_names)} trained "
            f"classes: {some(absent)} ({source.description}); labels are matched by "
            "class name"
        )
    return _Relabelled(source, class_names)


class _Relabelled:
    """A stored split whose labels are positions in `class_names`.

    Attributes: see `Source`; `ranges`: see `num_shared`.
    """

    def __init__(self, source: Any, class_names: Sequence[str]):
        self._source = source
        labels = {name: label for label, name in enumerate(class_names)}
        self._labels = np.array([labels[name] for name in source.class_names], np.int32)
        self.class_names = tuple(class_names)
        self.num_examples = source.num_examples
        self.image_size = source.image_size
        self.description, self.left_out = source.description, source.left_out
        self.statistics_path = source.statistics_path
        self.ranges = source.ranges

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def name_of(self, index: int) -> str:
        """The file or record of an example, for messages."""
        return self._source.name_of(index)

    def record(self, index: int) -> tuple[int, bytes]:
        """Label and picture file of an example."""
        label, data = self._source.record(index)
        return int(self._labels[label]), data

    def labels_of(self, indices: np.ndarray) -> np.ndarray:
        """See `Source.labels_of`."""
        return self._labels[self._source.labels_of(indices)]

    def fetch(
        self, indices: np.ndarray, images: np.ndarray, labels: np.ndarray
    ) -> None:
        """See `Source.fetch`."""
        self._source.fetch(indices, images, labels)
        labels[:] = self._labels[labels]


class FolderSource:
    """PATH/{train, test|val|validation}/<class>/<picture>.

    Labels are the positions of the class names in sorted order (by code point, so
    ImageNet's WNIDs get their usual labels); files are sorted too. Pictures are turned by
    their EXIF orientation. Hidden files are ignored; files of other kinds and folders
    inside a class folder are named in `left_out`. ImageNet's pictures need no class folders
    if their names say the class (`named_wnid`), and tiny-imagenet is read as it is unpacked.
    Attributes: see `Source`; `ranges`: see `num_shared`.
    """

    def __init__(self, path: str | os.PathLike, split: str, image_size: int):
        root = expanded(path)
        self._folder = _split_folder(root, split)
        self.image_size = image_size
        inside = {entry.name: is_folder(entry) for entry in visible(self._folder)}
        flat, ignored = _flat_split(self._folder, inside)
        self.class_names = tuple(flat or sorted(n for n in inside if inside[n]))
        if not self.class_names:
            raise DataError(
                f"no class folders in {self._folder} (found there: "
                f"{some(sorted(inside))}). "
                f"Expected {self._folder / '<class>' / '<picture>.jpg'}, one folder "
                "a class; change --config.data.source or move the pictures"
            )
        # File names only: ImageNet's 1.3 million full paths would take 200 MB.
        self._files: list[str] = []
        self._places: list[Path] = []  # by label
        labels: list[int] = []
        for label, name in enumerate(self.class_names):
            place, files, others = flat.get(name) or _class_folder(self._folder / name)
            self._places.append(place)
            self._files += files
            labels += [label] * len(files)
            ignored += [f"{name}/{other}" for other in others]
        self._labels = np.asarray(labels, np.int32)
        self.num_examples = len(self._files)
        self.ranges = ((os.path.realpath(self._folder), 0, self.num_examples),)
        self.description = f"folder {self._folder}"
        self.left_out = _left_out(self._folder, ignored)
        self.statistics_path = root / _statistics_name(split, image_size)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def labels_of(self, indices: np.ndarray) -> np.ndarray:
        """See `Source.labels_of`."""
        return self._labels[indices]

    def path_of(self, index: int) -> Path:
        """The file of an example."""
        return self._places[self._labels[index]] / self._files[index]

    def name_of(self, index: int) -> str:
        """The file of an example, for messages."""
        return str(self.path_of(index))

    def record(self, index: int) -> tuple[int, bytes]:
        """Label and picture file of an example."""
        return int(self._labels[index]), self.path_of(index).read_bytes()

    def fetch(
        self, indices: np.ndarray, images: np.ndarray, labels: np.ndarray
    ) -> None:
        """See `Source.fetch`."""
        for i, index in enumerate(indices):
            labels[i], data = self.record(index)
            name = self.name_of(index)
            images_lib.decode(data, self.image_size, name, images[i], upright=True)


class TfdsSource:
    """A prepared tfds data set in a random-access format (array_record).

    It needs an image and a class label among its features, whatever their names.
    Nothing is downloaded or prepared here. As in ImageNet's published protocol, pictures
    are not turned by their EXIF orientation. Attributes: see `Source`; `ranges`: see
    `num_shared`.
    """

    def __init__(self, directory: Path, split: str, image_size: int):
        import tensorflow_datasets as tfds

        builder = tfds_builder(directory)
        self._image_key, self._label_key, classes = _image_and_label(builder.info)
        try:
            parts = _slices(builder.info, split)
            # Raw records: parsing the protocol buffer here takes half the time of
            # tfds's own deserialisation, and that time holds the interpreter lock.
            # (Any: tfds wraps its methods in ways that type checkers cannot see.)
            as_data_source: Any = builder.as_data_source
            self._records = as_data_source(
                split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
            )
        except NotImplementedError:
            file_format = builder.info.file_format
            raise DataError(
                f"{directory} was prepared as {file_format and file_format.value}, "
                "which cannot be read in random order. Prepare it again as "
                "array_record, in another data_dir. "
                f"{_how_to_prepare(':'.join(builder.info.full_name.rsplit('/', 1)))}"
            ) from None
        except (ValueError, AssertionError) as error:
            reason = " ".join(str(error).split())
            raise DataError(
                f"cannot read split {split!r} of {directory}: {reason} (its splits: "
                f"{some(sorted(builder.info.splits))}; a slice is written "
                "'train[:90%]'). Change --config.data.train_split or eval_split"
            ) from error
        # Now, not when the first evaluation comes to it after hours.
        shards = builder.info.splits[split].file_instructions
        files = {shard.filename: shard.examples_in_shard for shard in shards}
        check_files(files, f"{directory} [{split}]")
        # array_record keeps all of them open; ImageNet has 1,025, many systems allow 1,024.
        with contextlib.suppress(ImportError):  # not on Windows
            import resource

            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            wanted = min(soft + len(files), hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        self._parse = example_message().FromString
        self.num_examples = len(self._records)
        root = os.path.realpath(directory)
        self.ranges = tuple((f"{root}/{name}", *part) for name, *part in parts)
        self.class_names = classes
        self.image_size = image_size
        self.description = f"tfds {directory} [{split}]"
        self.left_out = ""
        self.statistics_path = directory / _statistics_name(split, image_size)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def labels_of(self, indices: np.ndarray) -> np.ndarray:
        """See `Source.labels_of`."""
        return np.array([self.record(index)[0] for index in indices.tolist()], "i4")

    def fetch(
        self, indices: np.ndarray, images: np.ndarray, labels: np.ndarray
    ) -> None:
        """See `Source.fetch`."""
        remedy = _PREPARE_AGAIN
        for i, index in enumerate(indices.tolist()):
            labels[i], data = self.record(index)
            name = self.name_of(index)
            images_lib.decode(data, self.image_size, name, images[i], remedy=remedy)

    def record(self, index: int) -> tuple[int, bytes]:
        """Label and picture file of an example."""
        from google.protobuf.message import DecodeError

        # One record a call: for a list of them array_record starts a new pool
        # of up to 64 threads each time.
        try:
            features = self._parse(self._records[index]).features.feature
            label = features[self._label_key].int64_list.value[0]
            data = features[self._image_key].bytes_list.value[0]
        except (RuntimeError, DecodeError, LookupError) as error:
            if "open() failed" in str(error):
                raise DataError(
                    f"cannot read {self.name_of(index)}: {error}"
                ) from error
            raise DataError(
                f"{self.name_of(index)} is damaged: {error}. {_PREPARE_AGAIN}"
            ) from error
        if not 0 <= label < self.num_classes:
            raise DataError(
                f"{self.name_of(index)} has label {label}, outside "
                f"0..{self.num_classes - 1}; a split without labels cannot be used. "
                f"{_PREPARE_AGAIN}, or take another split"
            )
        return label, data

    def name_of(self, index: int) -> str:
        """An example, for messages."""
        return f"record {index} of {self.description}"


class FakeSource:
    """Random but constant pictures and labels at no cost, for benchmarks and tests.

    Example i shows picture i modulo 32 of a pool drawn once from the seed, with
    label i modulo `num_classes`: there is nothing to learn. Attributes: see
    `Source`; the numbers of examples are ImageNet's unless given.
    """

    def __init__(
        self,
        split: str = "train",
        image_size: int = 256,
        *,
        num_classes: int = 1000,
        num_examples: int | None = None,
        seed: int = 0,
    ):
        if num_examples is None:
            num_examples = 1_281_167 if split.startswith("train") else 50_000
        if num_examples < 1 or num_classes < 1:
            raise ValueError(
                "fake data needs at least one example and one class, got "
                f"num_examples={num_examples}, num_classes={num_classes}"
            )
        self.num_examples = num_examples
        self.class_names = tuple(f"class_{k}" for k in range(num_classes))
        self.image_size = image_size
        self.description = f"fake data, {num_examples} random pictures [{split}]"
        self.left_out = ""
        self.statistics_path = None
        shape = (32, image_size, image_size, 3)
        self._pool = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def labels_of(self, indices: np.ndarray) -> np.ndarray:
        """See `Source.labels_of`."""
        return indices % self.num_classes

    def fetch(
        self, indices: np.ndarray, images: np.ndarray, labels: np.ndarray
    ) -> None:
        """See `Source.fetch`."""
        np.take(self._pool, indices % len(self._pool), axis=0, out=images, mode="wrap")
        labels[:] = self.labels_of(indices)


class Sample:
    """Some of a source's pictures, the same every time. Attributes: see `Source`.

    The split is cut into `count` equal parts and one picture taken from each, by chance:
    so they are spread evenly (class folders are sorted by class), and yet with no period
    (other splits have their classes in turn).
    """

    def __init__(self, source: Source, count: int):
        total = source.num_examples
        self.num_examples = min(count, total)
        self._source = source
        self._chosen = np.arange(total)
        self.description, self.left_out = source.description, source.left_out
        if self.num_examples < total:
            places = np.random.default_rng(0).random(count) + np.arange(count)
            self._chosen = (places * total / count).astype(np.int64)
            self.description += f", {count} of {total}"
        self.class_names = source.class_names
        self.image_size = source.image_size
        self.statistics_path = None

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def labels_of(self, indices: np.ndarray) -> np.ndarray:
        """See `Source.labels_of`."""
        return self._source.labels_of(self._chosen[indices])

    def fetch(
        self, indices: np.ndarray, images: np.ndarray, labels: np.ndarray
    ) -> None:
        """See `Source.fetch`."""
        self._source.fetch(self._chosen[indices], images, labels)


StoredSource = FolderSource | TfdsSource | _Relabelled


def num_shared(train: Source, evaluation: Source) -> int:
    """The number of evaluation images that are training images, by where they lie.

    Compares `ranges`, the places (folder or split, start, end) of a source's examples:
    tfds slices may overlap, and two names stand for one folder.
    """
    if not isinstance(train, StoredSource) or not isinstance(evaluation, StoredSource):
        return 0
    shared = sum(
        max(0, min(end, other_end) - max(start, other_start))
        for place, start, end in train.ranges
        for other, other_start, other_end in evaluation.ranges
        if place == other
    )
    return min(shared, evaluation.num_examples)


def warnings_about(train: Source, evaluation: Source | None) -> list[str]:
    """Lines on mistakes in the data at which training runs and its numbers look good."""
    lines = []
    for what, source in (("training", train), ("evaluation", evaluation)):
        if source is None:
            continue
        sample = Sample(source, _LABELS_LOOKED_AT)
        labels = sample.labels_of(np.arange(sample.num_examples))
        if (labels == labels[0]).all():
            lines.append(
                f"WARNING: every {what} image looked at ({len(labels):,} of "
                f"{source.num_examples:,}) is of one class, "
                f"{source.class_names[labels[0]]}. A low loss and error mean "
                "nothing then: take a split of several classes"
            )
    if evaluation is not None and (shared := num_shared(train, evaluation)):
        lines.append(f"WARNING: {shared_in_words(shared, train, evaluation)}")
    return lines


def shared_in_words(shared: int, train: Source, evaluation: Source) -> str:
    """Return the message about what `num_shared` found."""
    return (
        f"{shared:,} of {evaluation.num_examples:,} evaluation images are training images "
        f"too, so their error is not that of unseen images (training: "
        f"{train.description}; evaluation: {evaluation.description}). Take a split of "
        "other images (of a tfds data set for example train[:90%] and train[90%:])"
    )


def tfds_data_dir(data_dir: str | None) -> Path:
    """The directory of tfds data sets: `data_dir`, else what tfds itself takes.

    Raises:
      PathError: (an OSError) it cannot be one.
    """
    chosen = data_dir or os.environ.get("TFDS_DATA_DIR")
    try:
        directory = expanded(chosen or "~/tensorflow_datasets")
    except PathError as error:
        if chosen:
            raise
        raise PathError(
            "there is no home here for ~/tensorflow_datasets. Name another folder "
            + HOW_TO_NAME_DATA_DIR
        ) from error
    return directory


def example_message() -> Any:
    """The protocol buffer class of a tfds record; it is made at run time."""
    from tensorflow_datasets.proto import tf_example_pb2

    return getattr(tf_example_pb2, "Example")  # noqa: B009


def _statistics_name(split: str, image_size: int) -> str:
    part = "" if split == "train" else "_" + quote(split, safe="")
    return f"statistics_{image_size}{part}.npz"


def some(names: Sequence[str], limit: int = 8) -> str:
    """'a, b, c' or 'a, b, ... (17 in all)' or 'nothing', for messages."""
    shown = ", ".join(names[:limit]) or "nothing"
    return f"{shown}, ... ({len(names)} in all)" if len(names) > limit else shown


def visible(folder: Path) -> list[os.DirEntry]:
    """What is in a folder, hidden things left out."""
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not entry.name.startswith(".")]


def place_of_split(source: str, split: str, data_dir: str) -> Any:
    """Return the same value for all names of a split: in folders, test may be val.

    Args:
      source, split, data_dir: fields of `config.data`.
    """
    if source.startswith("folder:"):
        with contextlib.suppress(OSError, DataError):  # it may not be there
            root = expanded(source.removeprefix("folder:"))
            return _split_folder(root, split).resolve()
    return source, split, tfds_data_dir(data_dir).absolute()


def _split_folder(root: Path, split: str) -> Path:
    """The folder of a split; `test`, `val` and `validation` stand for each other."""
    aliases = [name for name in _EVAL_FOLDERS if name != split]
    names = [split, *aliases] if split in _EVAL_FOLDERS else [split]
    found = [root / name for name in names if (root / name).is_dir()]
    if found and found[0].name == split or len(found) == 1:
        return found[0]
    if found:
        raise DataError(
            f"{root} has no folder {split!r} but {some([f.name for f in found])}: "
            "say which with --config.data.eval_split"
        )
    raise FileNotFoundError(
        f"no folder {' or '.join(names)} in {root.absolute()} ({_what_is_in(root)}). "
        f"Expected {root}/train/<class>/<picture>.jpg and {root}/test/<class>/... (or "
        "val); set --config.data.source=folder:PATH to the folder that holds them"
    )


def _what_is_in(folder: Path) -> str:
    if not folder.exists():
        return f"{folder} does not exist"
    if not folder.is_dir():
        return f"{folder} is not a folder"
    return f"found in {folder}: {some(sorted(e.name for e in visible(folder)))}"


def _flat_split(
    folder: Path, inside: Mapping[str, bool]
) -> tuple[dict[str, tuple[Path, list[str], list[str]]], list[str]]:
    """Look for pictures that lie side by side, whatever their class.

    Args:
      folder: of the split.
      inside: name -> whether it is a folder, of what is in it.

    Returns:
      ({class: (folder of its pictures, their sorted names, [])}, empty for a split with
      class folders; what else is beside pictures or class folders).

    Raises:
      DataError: the class of a picture is not known.
    """
    folders = [name for name in inside if inside[name]]
    beside = sorted(name for name in inside if not inside[name])
    if folders == [_IMAGES]:
        if _ANNOTATIONS not in inside:
            raise DataError(
                f"the pictures in {folder / _IMAGES} have no classes: there is no "
                f"{_ANNOTATIONS} beside it, and tiny-imagenet's split test has none. Set "
                "--config.data.eval_split=val, or move the pictures into class folders"
            )
        place = folder / _IMAGES
        lines = (folder / _ANNOTATIONS).read_text("utf-8").splitlines()
        rows = [line.split("\t") for line in lines]
        class_of = {row[0]: row[1] for row in rows if len(row) > 1}
    elif folders:
        return {}, beside
    else:
        place = folder
        class_of = {name: wnid for name in inside if (wnid := named_wnid(name))}
        if not class_of:
            return {}, beside
    files, others = class_files(place)
    unknown = [name for name in files if name not in class_of]
    if unknown:
        raise DataError(
            f"{len(unknown)} of {len(files)} pictures in {place} have no class: "
            f"{some(unknown)}. Move them into class folders, or out of {folder}"
        )
    found: dict[str, tuple[Path, list[str], list[str]]] = {}
    for name in files:
        found.setdefault(class_of[name], (place, [], []))[1].append(name)
    return dict(sorted(found.items())), others


def _class_folder(folder: Path) -> tuple[Path, list[str], list[str]]:
    """`class_files`, after the folder that they are in: tiny-imagenet has one inside."""
    if not (folder / _IMAGES).is_dir():
        return folder, *class_files(folder)
    inside = {entry.name for entry in visible(folder)}
    if any(name.lower().endswith(PICTURE_SUFFIXES) for name in inside):
        return folder, *class_files(folder)
    files, others = class_files(folder / _IMAGES)
    beside = sorted(inside - {_IMAGES})
    return folder / _IMAGES, files, [*beside, *(f"{_IMAGES}/{n}" for n in others)]


def class_files(folder: Path) -> tuple[list[str], list[str]]:
    """Return the sorted names of the pictures in a class folder, and of all else.

    Raises:
      DataError: there are no pictures.
    """
    names = sorted(entry.name for entry in visible(folder))
    files = [name for name in names if _is_picture(name)]
    others = [name for name in names if not _is_picture(name)]
    if files:
        return files, others
    below = [file for other in others for file in _files_below(folder, other)]
    if count := sum(map(_is_picture, below)):
        raise DataError(
            f"class folder {folder} holds pictures only in folders inside it ({count:,} in "
            f"{some(others)}). Move them into {folder} itself"
        )
    raise DataError(
        f"class folder {folder} holds no pictures ({', '.join(PICTURE_SUFFIXES)}; "
        f"found there: {some(others)}). Fill it or remove "
        "it: an empty class would shift the labels unnoticed"
    )


def _is_picture(name: str) -> bool:
    return name.lower().endswith(PICTURE_SUFFIXES)


def _files_below(folder: Path, name: str) -> list[str]:
    """Return the visible files in a folder of `folder`, at any depth; a file itself."""
    if not (folder / name).is_dir():
        return [name]
    found = []
    for place, folders, files in os.walk(folder / name):
        folders[:] = [inner for inner in folders if not inner.startswith(".")]
        visible_files = [file for file in files if not file.startswith(".")]
        found += [os.path.relpath(Path(place, file), folder) for file in visible_files]
    return found


def _left_out(folder: Path, names: Sequence[str]) -> str:
    """Describe by reason what is not read of a split; "" if all is read.

    Args:
      folder: of the split.
      names: of the files and folders, relative to it.
    """
    found: dict[str, list[str]] = {}
    for name in names:
        for file in _files_below(folder, name):
            if not _is_picture(file):
                reason = "file(s) of other kinds"
            elif "/" in name:
                reason = "picture(s) in folders inside a class"
            else:
                reason = "picture(s) outside class folders"
            found.setdefault(reason, []).append(file)
    parts = [
        f"{len(files):,} {reason} ({', '.join(sorted(files)[:3])}"
        f"{', ...' if len(files) > 3 else ''})"
        for reason, files in sorted(found.items())
    ]
    return f"left out of {folder}: {', '.join(parts)}" if parts else ""


def is_folder(entry: os.DirEntry) -> bool:
    """Return whether it is a folder, not a file; links are followed.

    Raises:
      DataError: it is neither: without the class, the labels would be others.
      OSError: it is a link in a circle.
    """
    if not entry.is_dir() and not entry.is_file():
        raise DataError(
            f"{entry.path} is neither a file nor a folder, or a link to nothing. Mend it "
            "or remove it"
        )
    return entry.is_dir()


def tfds_builder(directory: Path) -> Any:
    """tfds's builder of a prepared data set.

    Raises:
      DataError: its description is damaged, or names classes that are not tfds's.
    """
    import tensorflow_datasets as tfds

    try:
        _check_features(directory / "features.json")
        return tfds.builder_from_directory(directory)
    except (DataError, OSError):
        raise
    except Exception as error:  # of a damaged description tfds's own errors are many
        raise DataError(
            f"the description of the data set in {directory} (dataset_info.json, "
            f"features.json) is damaged: {error}. {_PREPARE_AGAIN}"
        ) from error


def _check_features(path: Path) -> None:
    """Raise DataError for classes that are not tfds's own: tfds imports their modules."""

    def check(fields: dict[str, Any]) -> None:
        texts = {key: value for key, value in fields.items() if isinstance(value, str)}
        for key in texts.keys() & {"json", "content"}:  # JSON within JSON
            json.loads(texts[key], object_hook=check)
        for key in texts.keys() & {"pythonClassName", "python_class_name", "type"}:
            if "." in texts[key] and not _TFDS_CLASS.fullmatch(texts[key]):
                raise DataError(
                    f"{path} names the class {texts[key]!r}, which would be imported; "
                    f"only tensorflow_datasets's own features are. {_PREPARE_AGAIN}"
                )

    if path.exists():
        json.loads(path.read_bytes(), object_hook=check)


def check_files(files: Mapping[str, int], what: str) -> None:
    """Raise DataError unless all files of a data set are there.

    Args:
      files: name -> how many records it has; a record has a byte at least.
    """
    missing = [
        os.path.basename(name)
        for name, count in sorted(files.items())
        if not os.path.isfile(name) or os.path.getsize(name) < count
    ]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(files)} files of {what} are missing or cut off: "
            f"{some(missing)}. Bring them back, or delete the directory and prepare it "
            "again"
        )


def _versions(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if _VERSION.fullmatch(p.name)]
    return sorted(found, key=lambda p: [int(part) for part in p.name.split(".")])


def tfds_directory(name: str, data_dir: Path) -> Path:
    """DATA_DIR/name[/config]/version of a prepared data set, the newest version."""
    path, _, version = name.partition(":")
    folder = data_dir / path
    configs = sorted(p for p in folder.glob("*") if _versions(p))
    if not _versions(folder) and len(configs) == 1:
        folder = configs[0]
    pattern = re.escape(version).replace(r"\*", r"\d+")
    for candidate in reversed(_versions(folder)):
        # dataset_info.json is written last: without it the data set is unfinished.
        wanted = not version or re.fullmatch(pattern, candidate.name)
        if wanted and (candidate / "dataset_info.json").exists():
            return candidate
    where = folder if folder.is_dir() else data_dir
    raise FileNotFoundError(
        f"no prepared tfds data set {name} in {data_dir} ({_what_is_in(where)}). "
        "The directory is --config.data.dir, else the environment variable "
        f"TFDS_DATA_DIR, else ~/tensorflow_datasets. {_how_to_prepare(name, data_dir)}"
    )


def _how_to_prepare(name: str, data_dir: Path | str = "DIR") -> str:
    if name.startswith("imagenet2012_256"):
        command = (
            "python -m alexnet_jax.prepare imagenet --source=FOLDER "
            f"--data_dir={data_dir}"
        )
        if any(Path(data_dir, "imagenet2012_256").glob("*.incomplete")):
            return f"A preparation was begun there; the same command goes on: {command}"
        return (
            f"{HOW_TO_GET_IMAGENET}. Then: {command} (class folders, train/<wnid>/ and "
            "val/, or a prepared tfds imagenet2012 do as well)"
        )
    return (
        'To prepare it: python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{name}', data_dir='{data_dir}', file_format='array_record')"
        '.download_and_prepare()" (data sets whose builder needs TensorFlow: '
        'pip install "alexnet_jax[tf]" first; training does not need it)'
    )


def _slices(info: Any, split: str) -> list[tuple[str, int, int]]:
    """The parts that a split consists of: (name, start, end).

    Raises:
      ValueError: for an empty part. tfds takes "train[51:50]" for "train[51:]", and
        counts -30 examples in "train[50:20]".
    """
    import tensorflow_datasets as tfds

    slices = []
    for part in tfds.core.ReadInstruction.from_spec(split).to_absolute(info.splits):
        count = info.splits[part.splitname].num_examples
        start, end = part.from_ or 0, count if part.to is None else part.to
        if start >= end:
            raise ValueError(f"the slice {part.splitname}[{start}:{end}] is empty")
        slices.append((part.splitname, start, end))
    return slices


def _image_and_label(info: Any) -> tuple[str, str, tuple[str, ...]]:
    """Keys of the image and the class label, and the class names."""
    from tensorflow_datasets.core.features import ClassLabel, Image

    supervised = info.supervised_keys or ()
    image = _only_feature(info, Image, supervised[:1], "tfds.features.Image()")
    label = _only_feature(
        info, ClassLabel, supervised[1:], "tfds.features.ClassLabel(num_classes=N)"
    )
    dtype = np.dtype(info.features[image].np_dtype)
    if dtype != np.uint8:
        raise DataError(
            f"tfds data set {info.full_name}: its feature {image!r} is an image of "
            f"{dtype}; only uint8 images, 0..255, are read. Convert the values and "
            "prepare it again with tfds.features.Image(), whose dtype is uint8"
        )
    feature = info.features[label]
    if feature.num_classes is None:
        raise DataError(f"tfds data set {info.full_name} does not say its classes")
    return image, label, tuple(feature.names)


def _only_feature(info: Any, kind: type, supervised: Sequence[Any], needed: str) -> str:
    """The key of the feature of a kind; of several the one that `supervised` names.

    Raises:
      DataError: there is none, or there are several.
    """
    features = dict(sorted(info.features.items()))
    found = [key for key, feature in features.items() if isinstance(feature, kind)]
    found = [key for key in found if key in supervised] or found
    if len(found) == 1:
        return found[0]
    name = f"tfds data set {info.full_name}"
    if found:
        raise DataError(
            f"{name} has {len(found)} features of type {kind.__name__}: {some(found)}. "
            "Name one in its supervised_keys=(image, label), or prepare it again with "
            "only one"
        )
    others = [f"{k}: {' '.join(repr(f).split())}" for k, f in features.items()]
    raise DataError(
        f"{name} has no feature of type {kind.__name__} ({some(others)}). Prepare it "
        f"again with {needed}"
    )
