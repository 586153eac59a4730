"""A small ImageNet for the tests: archives, class folders and a tfds data set."""

import io
import struct
import tarfile
from collections.abc import Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from etils import epath
from PIL import Image

from alexnet_jax import prepare
from alexnet_jax.data.imagenet import named_wnid, wnids
from alexnet_jax.data.sources.tfds import example_message

WNIDS = wnids()[:3]
PER_CLASS, NUM_VALIDATION = 6, 9


def file_of(number: int) -> bytes:
    """Return an image file; shape and kind depend on `number`, pixels are smooth noise."""
    rng = np.random.default_rng(number)
    small = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8))
    size = (256 + 31 * number % 300, 200 + 17 * number % 400)
    image = small.resize(size, Image.Resampling.BICUBIC)
    kind = {1: "CMYK", 2: "L"}.get(number % 6, "RGB")
    file = io.BytesIO()
    if number % 6 == 3:  # n02105855_2933.JPEG is a PNG
        image.save(file, "PNG")
    else:
        image.convert(kind).save(file, "JPEG", quality=95)
    return file.getvalue()


TRAIN = {
    f"{wnid}_{i}.JPEG": (label, file_of(PER_CLASS * label + i))
    for label, wnid in enumerate(WNIDS)
    for i in range(PER_CLASS)
}
VALIDATION = {
    f"ILSVRC2012_val_{i:08d}.JPEG": file_of(100 + i) for i in range(1, NUM_VALIDATION + 1)
}


def tar_of(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return packed.getvalue()


def write_archives(folder: Path, train=TRAIN, validation=VALIDATION) -> Path:
    """Write archives like the official ones, classes and images in reverse order."""
    inner = {
        f"{wnid}.tar": tar_of(
            {n: data for n, (_, data) in reversed(train.items()) if n.startswith(wnid)}
        )
        for wnid in reversed(WNIDS)
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ILSVRC2012_img_train.tar").write_bytes(tar_of(inner))
    reverse = dict(reversed(validation.items()))
    (folder / "ILSVRC2012_img_val.tar").write_bytes(tar_of(reverse))
    return folder


def write_folders(folder: Path, flat: bool) -> Path:
    """Write class folders; if `flat`, all validation images into one folder."""
    files = {f"train/{n.split('_')[0]}/{n}": data for n, (_, data) in TRAIN.items()}
    for name, data in VALIDATION.items():
        wnid = "." if flat else named_wnid(name)
        files[f"val/{wnid}/{name}"] = data
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def example(name: str, label: int, data: bytes) -> bytes:
    """Return a record of tfds's imagenet2012."""
    message = example_message()()
    message.features.feature["image"].bytes_list.value.append(data)
    message.features.feature["label"].int64_list.value.append(label)
    message.features.feature["file_name"].bytes_list.value.append(name.encode())
    return message.SerializeToString()


def write_imagenet2012(data_dir: Path, kind: str) -> Path:
    """Write the small ImageNet as the tfds data set imagenet2012."""
    features = {
        "image": tfds.features.Image(encoding_format="jpeg"),
        "label": tfds.features.ClassLabel(names=wnids()),
        "file_name": tfds.features.Text(),
    }
    validation = [
        example(name, wnids().index(named_wnid(name)), data) for name, data in VALIDATION.items()
    ]
    train = [example(name, *item) for name, item in TRAIN.items()]
    splits = {"train": train, "validation": validation}
    return write_tfds(data_dir / "imagenet2012" / "5.1.0", features, splits, kind)


def write_tfds(
    folder: Path,
    features: dict[str, Any],
    splits: dict[str, Sequence[bytes]],
    kind: str = "array_record",
    **options: Any,
) -> Path:
    """Write a data set as tfds does, one file per split, without the builder."""
    folder.mkdir(parents=True)
    name = folder.parent.name
    template = tfds.core.ShardedFileTemplate(
        data_dir=epath.Path(folder), dataset_name=name, filetype_suffix=kind
    )
    infos = []
    for split, records in splits.items():
        path = folder / f"{name}-{split}.{kind}-00000-of-00001"
        write_records(path, records)
        infos.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[len(records)],
                num_bytes=path.stat().st_size,
                filename_template=template.replace(split=split),
            )
        )
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=features,
        split_infos=infos,
        filename_template=template,
        version=folder.name,
        check_data=False,
        **options,
    )
    return folder


def write_records(path: Path, records: Sequence[bytes]) -> None:
    if ".tfrecord" in path.name:  # nobody reads these checksums
        spans = [struct.pack("<QI", len(r), 0) + r + b"0000" for r in records]
        path.write_bytes(b"".join(spans))
        return
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def imagenet(source: Path, data_dir: Path, *options: str) -> int:
    """Run `prepare imagenet`; return its exit status."""
    arguments = ["imagenet", f"--source={source}", f"--data_dir={data_dir}"]
    return prepare.main([*arguments, *options])


def records(data_dir: Path, split: str) -> dict[str, tuple[int, bytes]]:
    """Return {name: (label, JPEG)} of a prepared data set, as tfds reads it."""
    builder = tfds.builder_from_directory(data_dir / "imagenet2012_256" / "1.0.0")
    decoders = {"image": tfds.decode.SkipDecoding()}
    source = builder.as_data_source(split, decoders=decoders)
    return {r["file_name"].decode(): (int(r["label"]), bytes(r["image"])) for r in source}


def write_shards_here(monkeypatch) -> list[str]:
    """Make `prepare` write in this process; return the list of shards, filled later."""
    made = []

    class Here(futures.Executor):
        def __init__(self, *_):
            pass

        def submit(self, function, shard):
            future: futures.Future[dict[str, Any]] = futures.Future()
            try:
                future.set_result(function(shard))
                made.append(shard.path.name)
            except OSError as error:
                future.set_exception(error)
            return future

    monkeypatch.setattr(futures, "ProcessPoolExecutor", Here)
    return made
