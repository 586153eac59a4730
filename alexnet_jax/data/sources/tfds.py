"""Prepared tfds data sets, read in random order (array_record)."""

import json
import os
import re
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alexnet_jax.data.errors import DataError
from alexnet_jax.data.sources.source import StoredSource, some, statistics_name, what_is_in
from alexnet_jax.system.cli import expanded

_PREPARE_AGAIN = "Delete the directory and prepare the data set again"


class TfdsSource(StoredSource):
    """A prepared tfds data set in a random-access format (array_record).

    It needs an image and a class label among its features, whatever their names. Images
    are not turned by their EXIF orientation, as in the published protocol of ImageNet.
    """

    def __init__(self, directory: Path, split: str, image_size: int):
        import tensorflow_datasets as tfds
        from google.protobuf.message import DecodeError

        builder = tfds_builder(directory)
        info = builder.info
        self._image_key = _only_feature(info, tfds.features.Image)
        self._label_key = _only_feature(info, tfds.features.ClassLabel)
        dtype = np.dtype(info.features[self._image_key].np_dtype)
        if dtype != np.uint8:  # float32 is stored as its bytes
            raise DataError(
                f"tfds data set {info.full_name}: its feature {self._image_key!r} is an "
                f"image of {dtype}; only uint8 images, 0..255, are read. Prepare the data set "
                "again with such images"
            )
        try:
            self.ranges = _ranges(info, split, os.path.realpath(directory))
            # Raw records: parsing the protocol buffer here takes half the time of
            # tfds's own deserialisation, and that time holds the interpreter lock.
            as_data_source: Any = builder.as_data_source  # untyped in tfds
            self._records = as_data_source(
                split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
            )
        except NotImplementedError:
            raise DataError(
                f"{directory} was prepared as {info.file_format.value}, which cannot be "
                "read in random order. Prepare it again as array_record, in another "
                f"data_dir. {_how_to_prepare(':'.join(info.full_name.rsplit('/', 1)))}"
            ) from None
        except (ValueError, AssertionError) as error:
            reason = " ".join(str(error).split())
            raise DataError(
                f"cannot read split {split!r} of {directory}: {reason}. Take one of its splits: "
                f"{some(sorted(info.splits))}; a slice is written 'train[:90%]'"
            ) from error
        # Checked here, not when the first evaluation comes to it after hours.
        files = [shard.filename for shard in info.splits[split].file_instructions]
        require_files(files, directory)
        # array_record keeps all files open; ImageNet has 1,025, many systems allow 1,024.
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft + len(files), hard), hard))
        self._parse = example_message().FromString
        # Not imported in `record`: an import there costs two threads a quarter of their rate.
        self._damage = RuntimeError, DecodeError, LookupError
        self.num_examples = len(self._records)
        self.class_names = tuple(info.features[self._label_key].names)
        self._label_of = np.arange(len(self.class_names), dtype=np.int32)
        self.image_size = image_size
        self.description = f"tfds {directory} [{split}]"
        self.statistics_path = directory / statistics_name(split, image_size)

    def name_of(self, index: int) -> str:
        return f"record {index} of {self.description}"

    def labels_of(self, indices: np.ndarray) -> np.ndarray:
        return np.array([self.record(index)[0] for index in indices.tolist()], np.int32)

    def record(self, index: int) -> tuple[int, bytes]:
        # One record per call: for a list of them array_record starts a new pool of up to
        # 64 threads each time.
        try:
            features = self._parse(self._records[index]).features.feature
            label = features[self._label_key].int64_list.value[0]
            data = features[self._image_key].bytes_list.value[0]
            if label < 0:  # tfds stores -1 in a split without labels
                raise LookupError("it has no label")
            return int(self._label_of[label]), data
        except self._damage as error:
            raise DataError(
                f"{self.name_of(index)} is damaged or not of {len(self._label_of)} "
                f"classes: {error}. {_PREPARE_AGAIN}, or take another split"
            ) from error


def tfds_data_dir(data_dir: str | None) -> Path:
    """Return the directory of tfds data sets: `data_dir`, else the one tfds takes."""
    chosen = data_dir or os.environ.get("TFDS_DATA_DIR")
    return expanded(chosen or "~/tensorflow_datasets")


def tfds_directory(name: str, data_dir: Path) -> Path:
    """Return DATA_DIR/name[/config]/version of a prepared data set, the newest version.

    Raises:
      FileNotFoundError: there is none; the message says how to prepare it.
    """
    path, _, version = name.partition(":")
    folder = data_dir / path
    pattern = re.escape(version).replace(r"\*", r"\d+") or r"\d+\.\d+\.\d+"
    # dataset_info.json is written last: without it the data set is unfinished. The only
    # config of a data set need not be named.
    for place in ("*/dataset_info.json", "*/*/dataset_info.json"):
        found = [info.parent for info in folder.glob(place)]
        found = [directory for directory in found if re.fullmatch(pattern, directory.name)]
        if len({directory.parent for directory in found}) == 1:
            return max(found, key=lambda p: [int(part) for part in p.name.split(".")])
    raise FileNotFoundError(
        f"no prepared tfds data set {name} in {data_dir} "
        f"({what_is_in(folder if folder.is_dir() else data_dir)}). Set --config.data.dir or "
        f"TFDS_DATA_DIR to the directory that holds it. {_how_to_prepare(name, data_dir)}"
    )


def _how_to_prepare(name: str, data_dir: Path | str = "DIR") -> str:
    if not name.startswith("imagenet2012_256"):
        return (
            'To prepare it: python -c "import tensorflow_datasets as tfds; '
            f"tfds.builder('{name}', data_dir='{data_dir}', file_format='array_record')"
            '.download_and_prepare()" (data sets whose builder needs TensorFlow: '
            'pip install "alexnet_jax[tf]" first; training does not need it)'
        )
    command = f"python -m alexnet_jax.prepare imagenet --source=ARCHIVES --data_dir={data_dir}"
    if any(Path(data_dir, "imagenet2012_256").glob("*.incomplete")):
        return f"A preparation was begun there; the same command resumes it: {command}"
    return f"To prepare it, download the archives from image-net.org (docs/imagenet.md): {command}"


def tfds_builder(directory: Path) -> Any:
    """Return tfds's builder of a prepared data set.

    Raises:
      DataError: its features name classes that are not tfds's: tfds would import them.
    """
    import tensorflow_datasets as tfds

    path = directory / "features.json"

    def check(fields: dict[str, Any]) -> None:
        for key, value in fields.items():
            if key in ("json", "content") and isinstance(value, str):
                json.loads(value, object_hook=check)  # JSON inside JSON
            is_class = key in ("pythonClassName", "python_class_name", "type")
            own = str(value).startswith("tensorflow_datasets.core.features.")
            if is_class and "." in str(value) and not own:
                raise DataError(
                    f"{path} names the class {value!r}, which would be imported: only "
                    f"classes of tensorflow_datasets are. {_PREPARE_AGAIN}"
                )

    if path.exists():
        json.loads(path.read_bytes(), object_hook=check)
    return tfds.builder_from_directory(directory)


def example_message() -> Any:
    """Return the protocol buffer class of a tfds record; it is made at run time."""
    from tensorflow_datasets.proto import tf_example_pb2

    return getattr(tf_example_pb2, "Example")  # noqa: B009


def require_files(files: Sequence[str], directory: Path) -> None:
    """Raise DataError unless the files of a data set are there and not empty."""
    missing = [
        os.path.basename(file)
        for file in files
        if not os.path.isfile(file) or not os.path.getsize(file)
    ]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(files)} files of {directory} are missing or empty: "
            f"{some(missing)}. Bring them back, or delete it and prepare it again"
        )


def _ranges(info: Any, split: str, root: str) -> tuple[tuple[str, int, int], ...]:
    """Return the parts of a split, see `StoredSource`.

    Raises:
      ValueError: a part is empty. tfds takes "train[51:50]" for "train[51:]", and counts
        -30 examples in "train[50:20]".
    """
    import tensorflow_datasets as tfds

    found = []
    for part in tfds.core.ReadInstruction.from_spec(split).to_absolute(info.splits):
        count = info.splits[part.splitname].num_examples
        start, end = part.from_ or 0, count if part.to is None else part.to
        if start >= end:
            raise ValueError(f"the slice {part.splitname}[{start}:{end}] is empty")
        found.append((f"{root}/{part.splitname}", start, end))
    return tuple(found)


def _only_feature(info: Any, kind: type) -> str:
    """Return the key of the only feature of a type, or of the supervised one."""
    found = [key for key, feature in info.features.items() if isinstance(feature, kind)]
    found = [key for key in found if key in (info.supervised_keys or ())] or found
    if len(found) == 1:
        return found[0]
    features = [f"{k}: {' '.join(repr(f).split())}" for k, f in info.features.items()]
    raise DataError(
        f"tfds data set {info.full_name} has {len(found)} features of type "
        f"{kind.__name__} ({some(sorted(features))}). Exactly one is needed: prepare it "
        "again with one, or name it in supervised_keys=(image, label)"
    )
