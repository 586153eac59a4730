"""Makes the tfds data set `imagenet2012_256` of the original pictures, once.

The paper's preprocessing (section 2): the shorter side to 256, then the central
256 x 256; stored as JPEG of quality 95, as cuda-convnet2's make-data did.

tfds's own `download_and_prepare` begins anew when it is interrupted, and works on one
core. Here every shard is a task for any process: it is written under another name and
then renamed, so what is there is whole, and a second start makes only what is missing.
tfds writes the description of the data set, so that tfds opens it.
"""

import contextlib
import dataclasses
import datetime
import importlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from concurrent.futures import process
from multiprocessing import connection
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg

from alexnet_jax.data import images, locks, sources, statistics
from alexnet_jax.data.errors import DataError
from alexnet_jax.data.imagenet import originals as originals_lib
from alexnet_jax.data.imagenet.classes import OFFICIAL_COUNTS, wnids
from alexnet_jax.data.imagenet.originals import SPLITS, Originals

NAME = "imagenet2012_256"
VERSION = "1.0.0"
SIZE = 256
RECORD_FILE = "preparation.json"
_JPEG_QUALITY = 95
_PICTURES_A_SHARD = 1250  # about 40 MB, and some ten seconds of work
_FEWEST_SHARDS = 8  # a small set is spread over the cores as well
_BYTES_A_PICTURE = 40_000  # 34,300 on average over 1,000 ImageNet pictures

# Called with (what is done, in all, in what unit); gives a context that yields a
# function to be called with how many more are done.
Bar = Callable[[str, int | None, str], contextlib.AbstractContextManager[Any]]


def prepare(
    source: Path,
    data_dir: Path,
    *,
    workers: int,
    max_unreadable: int,
    verify: bool,
    log: Callable[[str], object],
    bar: Bar,
) -> Path:
    """Prepares both splits, or goes on with it, and computes their statistics.

    Args:
      source: see `originals.find`.
      data_dir: directory of tfds data sets, made if absent.
      workers: processes.
      max_unreadable: with more broken pictures than this, in both splits together,
        the preparation stops; up to it each is named and left out.
      verify: compare the MD5 of the archives with the official ones first.

    Returns:
      The data set's directory, DATA_DIR/imagenet2012_256/1.0.0.

    Raises:
      DataError, OSError: what is missing or broken, where, and what to do. Shards
        that are finished stay, in a directory whose name ends in .incomplete.
    """
    directory = data_dir / NAME / VERSION
    if (directory / "dataset_info.json").exists():
        log(f"{directory} is there already. To make it anew, delete it first.")
        return directory
    unfinished = directory.with_name(f"{VERSION}.incomplete")
    # All that can be checked first is, and nothing is made if it fails.
    with bar("reading tables of contents", None, "pictures") as progress:
        found = originals_lib.find(source, progress, cache=unfinished / "parts")
    for split, originals in found.items():
        log(_description(split, originals))
    if verify:
        _verify(source, bar)
    shards = _shards(found, unfinished)
    missing = [shard for shard in shards if not shard.is_done()]
    _check_disk(data_dir, missing)
    with _alone(data_dir / NAME):
        _begin(unfinished, source, found)
        if len(missing) < len(shards):
            done = len(shards) - len(missing)
            log(f"{done} of {len(shards)} shards are done already")
        _write_shards(shards, workers, max_unreadable, bar)
        _finish(unfinished, shards, workers, log, bar)
        os.rename(unfinished, directory)
    return directory


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds the folder; another process that prepares there is refused."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locks.held(folder / ".lock", wait=False))
        except BlockingIOError:
            raise DataError(
                f"another process is preparing {folder}; wait for it, or end it and "
                "start this command again"
            ) from None
        yield


# What there is to do.


def _begin(unfinished: Path, source: Path, found: dict[str, Originals]) -> None:
    """Makes the directory; refuses one that was begun with other pictures."""
    parts = unfinished / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    plan = {split: originals.fingerprint() for split, originals in found.items()}
    path = parts / "plan.json"
    if path.exists() and json.loads(path.read_text()) != plan:
        raise DataError(
            f"{unfinished} was begun with other pictures than those of {source}. Give "
            "the --source that it was begun with, or delete that folder"
        )
    _write_text(path, json.dumps(plan))
    originals_lib.keep_tables(found, parts)


def _description(split: str, originals: Originals) -> str:
    line = f"{split}: {len(originals):,} pictures, {originals.description}"
    official = OFFICIAL_COUNTS[split]
    if len(originals) == official:
        return line
    return f"{line}\n  WARNING: ILSVRC-2012 has {official:,}; these are not all of it"


def _verify(source: Path, bar: Bar) -> None:
    problems = []
    for split, name in originals_lib.ARCHIVES.items():
        path = source / name
        if not path.is_file():
            raise DataError(f"--verify needs the archives; {path} is not there")
        with bar(f"MD5 of {name}", path.stat().st_size, "B") as progress:
            problems.append(originals_lib.md5_problem(split, path, progress))
    if any(problems):
        raise DataError("; ".join(problem for problem in problems if problem))


def _check_disk(data_dir: Path, missing: "list[Shard]") -> None:
    needed = sum(len(shard.originals) for shard in missing) * _BYTES_A_PICTURE
    free = shutil.disk_usage(sources.existing_parent(data_dir)).free
    if free < needed:
        raise DataError(
            f"{data_dir} has {free / 1e9:.1f} GB free; the pictures need "
            f"{needed / 1e9:.1f} GB. Make room, or give another --data_dir"
        )


# Shards.


@dataclasses.dataclass(frozen=True, eq=False)
class Shard:
    """One file of the data set and the pictures that go into it.

    Beside it, in `parts/`, lies what came of it, written when the shard is whole:
    {"records", "bytes", "unreadable": [[name, why], ...]}.
    """

    path: Path
    split: str
    originals: Originals

    @property
    def result_path(self) -> Path:
        return self.path.parent / "parts" / f"{self.path.name}.json"

    def is_done(self) -> bool:
        if not (self.result_path.exists() and self.path.exists()):
            return False
        return self.path.stat().st_size == self.result()["bytes"]

    def result(self) -> dict[str, Any]:
        return json.loads(self.result_path.read_text())


def _shards(found: dict[str, Originals], unfinished: Path) -> list[Shard]:
    shards = []
    for split, originals in found.items():
        originals = originals.shuffled()
        count = max(-(-len(originals) // _PICTURES_A_SHARD), _FEWEST_SHARDS)
        count = min(count, len(originals))
        for number, rows in enumerate(np.array_split(np.arange(len(originals)), count)):
            name = f"{NAME}-{split}.array_record-{number:05d}-of-{count:05d}"
            shards.append(Shard(unfinished / name, split, originals.take(rows)))
    return shards


def _write_shards(
    shards: list[Shard], workers: int, max_unreadable: int, bar: Bar
) -> None:
    """Makes what is missing, in processes; every broken picture counts."""
    done = [shard for shard in shards if shard.is_done()]
    missing = [shard for shard in shards if not shard.is_done()]
    unreadable: list[list[str]] = []

    def count(shard: Shard) -> None:
        unreadable.extend(shard.result()["unreadable"])
        if len(unreadable) > max_unreadable:
            raise DataError(
                f"{len(unreadable)} pictures cannot be read; --max_unreadable="
                f"{max_unreadable} allows no more:\n{_reasons(unreadable)}"
            )

    for shard in done:
        count(shard)
    context = multiprocessing.get_context("spawn")  # no thread of ours is copied
    stopping = context.Event()
    total = sum(len(shard.originals) for shard in shards)
    with bar("preparing", total, "pictures") as progress:
        progress(total - sum(len(shard.originals) for shard in missing))
        pool = futures.ProcessPoolExecutor(
            min(workers, max(1, len(missing))), context, _begin_worker, (stopping,)
        )
        try:
            pending = {pool.submit(write_shard, shard): shard for shard in missing}
            for future in futures.as_completed(pending):
                future.result()
                count(pending[future])
                progress(len(pending[future].originals))
        except process.BrokenProcessPool as error:
            raise OSError(
                "a worker process was killed (by hand, or for want of memory?); the "
                "same command goes on, with fewer --workers if need be"
            ) from error
        finally:
            stopping.set()
            pool.shutdown(cancel_futures=True)


def _reasons(unreadable: list[list[str]], limit: int = 20) -> str:
    lines = [f"  {why}" for _, why in unreadable[:limit]]
    if len(unreadable) > limit:
        lines.append(f"  ... {len(unreadable)} in all")
    return "\n".join(lines)


_stopping: Any = None  # in a worker: the event that asks it to end


def _begin_worker(stopping: Any) -> None:
    global _stopping
    _stopping = stopping
    # Ctrl-C reaches every process of the terminal; the parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent asks for nothing any more."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def write_shard(shard: Shard) -> None:
    """Writes one shard and what came of it; half a shard has another name.

    Raises:
      OSError: it cannot be written.
    """
    module: Any = importlib.import_module("array_record.python.array_record_module")
    temporary = shard.path.with_name(f".{shard.path.name}.tmp")
    records, unreadable = 0, []
    try:
        # One record a block: training reads them in random order.
        writer = module.ArrayRecordWriter(str(temporary), "group_size:1")
        for index in range(len(shard.originals)):
            if _stopping is not None and _stopping.is_set():
                temporary.unlink(missing_ok=True)
                return
            try:
                record = _record(shard.originals, index)
            except DataError as error:
                name = os.fsdecode(shard.originals.name[index])
                unreadable.append([name, str(error)])
                continue
            writer.write(record)
            records += 1
        writer.close()
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, shard.path)
    except RuntimeError as error:  # array_record's
        raise OSError(f"cannot write {temporary}: {error}") from error
    result = {"records": records, "unreadable": unreadable}
    result["bytes"] = shard.path.stat().st_size
    _write_text(shard.result_path, json.dumps(result))


def _record(originals: Originals, index: int) -> bytes:
    """One picture as a tfds record."""
    name, label, data = originals.read(index)
    picture = images.decode(data, SIZE, name)
    jpeg = simplejpeg.encode_jpeg(
        picture, quality=_JPEG_QUALITY, colorsubsampling="420"
    )
    example = sources.example_message()()
    feature = example.features.feature
    feature["image"].bytes_list.value.append(jpeg)
    feature["label"].int64_list.value.append(label)
    feature["file_name"].bytes_list.value.append(name.encode())
    # The same bytes for the same picture: a map has no order of its own.
    return example.SerializeToString(deterministic=True)


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


# The data set.


def _finish(
    unfinished: Path,
    shards: list[Shard],
    workers: int,
    log: Callable[[str], object],
    bar: Bar,
) -> None:
    """Description, statistics and record of the data set, all shards being there."""
    results = {shard: shard.result() for shard in shards}
    source = {shard.split: shard.originals.description for shard in shards}
    _write_metadata(unfinished, shards)
    train = sources.TfdsSource(unfinished, "train", SIZE)
    with bar("mean image and colour PCA", train.num_examples, "pictures") as progress:
        found = statistics.compute(train, workers=workers, progress=progress)
    found.save(statistics.statistics_path(train))
    unreadable = [pair for shard in shards for pair in results[shard]["unreadable"]]
    if unreadable:
        log(f"{len(unreadable)} pictures were left out:\n{_reasons(unreadable)}")
    record = {
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "source": source,
        "pictures": {
            split: sum(results[s]["records"] for s in shards if s.split == split)
            for split in SPLITS
        },
        "unreadable": unreadable,
        "preprocessing": f"shorter side {SIZE} (box or bicubic), central {SIZE} x "
        f"{SIZE}, JPEG of quality {_JPEG_QUALITY}, 4:2:0",
    }
    _write_text(unfinished / RECORD_FILE, json.dumps(record, indent=2) + "\n")
    shutil.rmtree(unfinished / "parts")


def _write_metadata(unfinished: Path, shards: list[Shard]) -> None:
    import tensorflow_datasets as tfds
    from etils import epath

    template = tfds.core.ShardedFileTemplate(
        data_dir=epath.Path(unfinished),
        dataset_name=NAME,
        filetype_suffix="array_record",
    )
    infos = []
    for split in SPLITS:
        results = [shard.result() for shard in shards if shard.split == split]
        infos.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[result["records"] for result in results],
                num_bytes=sum(result["bytes"] for result in results),
                filename_template=template.replace(split=split),
            )
        )
    with contextlib.redirect_stdout(io.StringIO()):
        tfds.folder_dataset.write_metadata(
            data_dir=unfinished,
            features={
                "image": tfds.features.Image(
                    shape=(SIZE, SIZE, 3), encoding_format="jpeg"
                ),
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
