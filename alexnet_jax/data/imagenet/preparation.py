"""Make the tfds data set `imagenet2012_256` from the original images, once.

The shorter side becomes 256, then the central 256 x 256 is kept (section 2 of the paper)
and stored as JPEG of quality 95, as make-data of cuda-convnet2 did. EXIF orientation is
ignored, as in the published results.

Each shard is a task for a pool of processes (tfds's `download_and_prepare` uses one core
and starts anew after an interruption). A shard is written under another name and then
renamed: one that is there is complete, and a second start makes only the missing ones.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import process
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg

from alexnet_jax.data import images, statistics
from alexnet_jax.data.errors import DataError
from alexnet_jax.data.imagenet import originals
from alexnet_jax.data.imagenet.classes import OFFICIAL_COUNTS, wnids
from alexnet_jax.data.imagenet.originals import OFFICIAL, Original
from alexnet_jax.data.sources.source import statistics_name
from alexnet_jax.data.sources.tfds import TfdsSource, example_message
from alexnet_jax.system.cli import progress, require_writable
from alexnet_jax.system.files import atomic_write, check_room, exclusive_lock, explain_full_disk

NAME = "imagenet2012_256"
VERSION = "1.0.0"
SIZE = 256
_RECORD_FILE = "preparation.json"
_JPEG_QUALITY = 95
IMAGES_PER_SHARD = 1250  # about 43 MB, and some ten seconds of work
# A small set is spread over the cores as well, but no shard may be empty.
_FEWEST_SHARDS, _FEWEST_IMAGES = 8, 64
_BYTES_PER_IMAGE = 36_000  # 34,400 on average over 1,000 ImageNet images
_BYTES_BESIDE = 2_000_000  # for the mean image and the descriptions

Log = Callable[[str], object]


def prepare(
    source: Path, data_dir: Path, *, workers: int, max_unreadable: int, verify: bool, log: Log
) -> None:
    """Prepare both splits in DATA_DIR/imagenet2012_256, or resume their preparation.

    List the shards, make the missing ones, describe them, and rename the directory.

    Args:
      source: see `originals.find`.
      data_dir: directory of tfds data sets, made if absent.
      workers: processes.
      max_unreadable: broken images to leave out, in both splits together; more raise.
      verify: compare the MD5 of the archives with the official ones first.
      log: called with lines about the progress.

    Raises:
      DataError, OSError: something is missing, broken or full. Finished shards stay, in
        a directory whose name ends in .incomplete.
    """
    directory = data_dir / NAME / VERSION
    if (directory / "dataset_info.json").exists():
        _describe_finished(directory, source, log)
        return
    unfinished = directory.with_name(f"{VERSION}.incomplete")
    started = time.monotonic()
    require_writable(data_dir)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(directory.parent / ".lock", wait=False):
        shards = []
        for split, found in originals.find(source).items():
            log(_count(split, len(found), source))
            count = min(_FEWEST_SHARDS, len(found) // _FEWEST_IMAGES)
            count = max(count, -(-len(found) // IMAGES_PER_SHARD))
            for number, part in enumerate(originals.divided(found, count)):
                path = unfinished / shard_name(split, number, count)
                shards.append(Shard(path, split, part))
        if verify:
            _verify(source, log)

        def bytes_missing() -> int:
            images_left = sum(len(shard.originals) for shard in shards if not shard.is_done())
            return images_left * _BYTES_PER_IMAGE + _BYTES_BESIDE

        check_room(data_dir, bytes_missing())
        with explain_full_disk(data_dir, bytes_missing):
            (unfinished / "parts").mkdir(parents=True, exist_ok=True)
            planned = {shard.path for shard in shards}
            for path in unfinished.glob("*.array_record-*"):
                if path not in planned:  # a half one, or of other images
                    path.unlink()
            _write_shards(shards, workers, max_unreadable, log)
            _finish(unfinished, source, shards, workers, log)
            os.rename(unfinished, directory)
            shutil.rmtree(directory / "parts")
    log(f"{directory} is ready, after {(time.monotonic() - started) / 60:.1f} minutes")


def _describe_finished(directory: Path, source: Path, log: Log) -> None:
    """Describe a finished data set; raise DataError if it is of another source."""
    shutil.rmtree(directory / "parts", ignore_errors=True)  # left by a kill at the end
    record = json.loads((directory / _RECORD_FILE).read_text())
    for split, count in record["pictures"].items():
        log(_count(split, count, directory))
    log(f"images left out when it was made: {len(record['unreadable']):,}")
    if record["source"] != str(source):
        raise DataError(
            f"{directory} is there already, made of {record['source']}, not of {source}; "
            "delete it first, or give another --data_dir"
        )
    log("it is there already; to make it anew, delete it first")


def _count(split: str, count: int, place: Path) -> str:
    line, official = f"{split}: {count:,} images in {place}", OFFICIAL_COUNTS[split]
    if count != official:
        line += f"\n  WARNING: ILSVRC-2012 has {official:,}; these are not all of it"
    return line


def _verify(source: Path, log: Log) -> None:
    """Raise DataError unless both archives have the official MD5."""
    for official in OFFICIAL.values():
        path = source / official.archive
        if not path.is_file():
            raise DataError(
                f"--verify needs the archives; {path} is not there. Put it there, or leave "
                "--verify out"
            )
        log(f"computing the MD5 of {path}")
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "md5").hexdigest()
        if found != official.md5:
            raise DataError(
                f"{path} has the MD5 {found}, the official archive {official.md5}: it is "
                "damaged or was packed again. Download it again, or leave --verify out"
            )


# Shards.


@dataclasses.dataclass(frozen=True, eq=False)
class Shard:
    """One file of the data set and the images that go into it.

    Its result lies in `parts/` beside it: {"records", "bytes", "made_of": fingerprint of
    the originals, "unreadable": [[name, why], ...]}.
    """

    path: Path
    split: str
    originals: list[Original]

    @property
    def result_path(self) -> Path:
        return self.path.parent / "parts" / f"{self.path.name}.json"

    def is_done(self) -> bool:
        """Return True if it is complete, of these images, and all could be read."""
        if not self.path.exists() or not self.result_path.exists():
            return False
        result = self.result()
        return (
            result["bytes"] == self.path.stat().st_size
            and not result["unreadable"]  # one may have been mended since
            and result["made_of"] == originals.fingerprint(self.originals)
        )

    def result(self) -> dict[str, Any]:
        return json.loads(self.result_path.read_text())


def shard_name(split: str, number: int, count: int) -> str:
    """Return tfds's name for one of `count` files of a split."""
    return f"{NAME}-{split}.array_record-{number:05d}-of-{count:05d}"


def _write_shards(shards: list[Shard], workers: int, max_unreadable: int, log: Log) -> None:
    """Make the missing shards in processes; count the broken images."""
    missing = [shard for shard in shards if not shard.is_done()]
    if len(missing) < len(shards):
        log(f"{len(shards) - len(missing)} of {len(shards)} shards are done already")
    unreadable: list[list[str]] = []
    context = multiprocessing.get_context("spawn")  # no thread of ours is copied
    pool = futures.ProcessPoolExecutor(min(workers, len(missing) or 1), context, _begin_worker)
    total = sum(len(shard.originals) for shard in shards)
    with progress("preparing", total, "images") as done:
        done(total - sum(len(shard.originals) for shard in missing))
        try:
            pending = {pool.submit(write_shard, s): len(s.originals) for s in missing}
            for future in futures.as_completed(pending):
                unreadable += future.result()["unreadable"]
                if len(unreadable) > max_unreadable:
                    raise DataError(
                        f"images that cannot be read: {len(unreadable):,}, "
                        f"--max_unreadable={max_unreadable} allows no more. Put intact "
                        "copies in their place, or leave these out with a larger number:"
                        f"{_reasons(unreadable)}"
                    )
                done(pending[future])
        except process.BrokenProcessPool as error:
            raise OSError(
                "a worker process was killed, by hand or because memory ran out. Start the same "
                "command again to resume, with fewer --workers if memory is short"
            ) from error
        finally:  # a shard that is being written is finished first, in some seconds
            pool.shutdown(cancel_futures=True)


def _reasons(unreadable: list[list[str]]) -> str:
    """Return the first 20 reasons, a line each."""
    return "".join(f"\n  {why}" for _, why in unreadable[:20])


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: the parent decides
    warnings.filterwarnings("ignore", module="PIL")  # about images that it can read
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:  # a new start may write the same shard
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def write_shard(shard: Shard) -> dict[str, Any]:
    """Write one shard and its result, and return that; a half shard has another name.

    Raises:
      OSError: an original cannot be read, or the shard cannot be written. (Broken images
        are counted instead.)
    """
    module: Any = importlib.import_module("array_record.python.array_record_module")
    temporary = shard.path.with_name(f".{shard.path.name}.tmp")
    unreadable = []
    try:
        # One record per block: training reads them in random order. JPEGs do not shrink.
        writer = module.ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
        for original in shard.originals:
            name, label, data = originals.read(original)
            try:
                image = images.decode(data, SIZE, name)
            except DataError as error:
                unreadable.append([name, str(error)])
            else:
                writer.write(_record(name, label, image))
        writer.close()
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, shard.path)
    except RuntimeError as error:  # from array_record
        raise OSError(f"cannot write {shard.path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    result = {
        "records": len(shard.originals) - len(unreadable),
        "bytes": shard.path.stat().st_size,
        "made_of": originals.fingerprint(shard.originals),
        "unreadable": unreadable,
    }
    with atomic_write(shard.result_path) as file:
        file.write(json.dumps(result).encode())
    return result


def encode(image: np.ndarray) -> bytes:
    """Return uint8 [S, S, 3] as the JPEG that is stored."""
    return simplejpeg.encode_jpeg(image, _JPEG_QUALITY, colorsubsampling="420")


def _record(name: str, label: int, image: np.ndarray) -> bytes:
    """Return one image as a tfds record."""
    example = example_message()()
    feature = example.features.feature
    feature["image"].bytes_list.value.append(encode(image))
    feature["label"].int64_list.value.append(label)
    feature["file_name"].bytes_list.value.append(name.encode())
    # The same bytes for the same image: a map has no order of its own.
    return example.SerializeToString(deterministic=True)


# The data set.


def _finish(unfinished: Path, source: Path, shards: list[Shard], workers: int, log: Log) -> None:
    """Write description, statistics and record of the data set beside its shards."""
    results: dict[str, list[dict[str, Any]]] = {split: [] for split in OFFICIAL}
    unreadable: list[list[str]] = []
    for shard in shards:
        result = shard.result()
        results[shard.split].append(result)
        unreadable += result["unreadable"]
    log(f"images left out: {len(unreadable):,}{_reasons(unreadable)}")
    write_metadata(unfinished, results)
    train = TfdsSource(unfinished, "train", SIZE)
    with progress("mean image and colour PCA", train.num_examples, "images") as done:
        found = statistics.compute(train, workers=workers, progress=done)
    found.save(unfinished / statistics_name("train", SIZE))
    record = {
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "source": str(source),
        "pictures": {split: sum(r["records"] for r in results[split]) for split in results},
        "unreadable": unreadable,
        "preprocessing": f"shorter side {SIZE} (box or bicubic), central {SIZE} x "
        f"{SIZE}, JPEG of quality {_JPEG_QUALITY}, 4:2:0",
    }
    with atomic_write(unfinished / _RECORD_FILE) as file:
        file.write(json.dumps(record, indent=2).encode() + b"\n")


def write_metadata(unfinished: Path, results: dict[str, list[dict[str, Any]]]) -> None:
    """Write the description by which tfds opens the shards as a data set.

    Args:
      unfinished: the directory of the shards.
      results: split -> results of its shards, in order.
    """
    import tensorflow_datasets as tfds
    from etils import epath

    template = tfds.core.ShardedFileTemplate(
        data_dir=epath.Path(unfinished), dataset_name=NAME, filetype_suffix="array_record"
    )
    infos = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[result["records"] for result in of_split],
            num_bytes=sum(result["bytes"] for result in of_split),
            filename_template=template.replace(split=split),
        )
        for split, of_split in results.items()
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        tfds.folder_dataset.write_metadata(
            data_dir=unfinished,
            features={
                "image": tfds.features.Image(shape=(SIZE, SIZE, 3), encoding_format="jpeg"),
                "label": tfds.features.ClassLabel(names=wnids()),
                "file_name": tfds.features.Text(),
            },
            split_infos=infos,
            version=VERSION,
            filename_template=template,
            check_data=False,
            description="ILSVRC-2012, shorter side 256, central 256 x 256, JPEG q95 "
            "(Krizhevsky et al. 2012, section 2).",
            homepage="https://image-net.org/",
            supervised_keys=("image", "label"),
        )
