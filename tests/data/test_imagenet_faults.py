"""Faults of a preparation: one message, and nothing half-made is taken for data."""

import hashlib
import os
import shutil
import socket
import tarfile
from pathlib import Path

import pytest

from alexnet_jax import prepare
from alexnet_jax.data.imagenet import originals, preparation
from alexnet_jax.system.files import exclusive_lock
from tests.data.imagenet_files import (
    TRAIN,
    WNIDS,
    imagenet,
    records,
    tar_of,
    write_archives,
    write_folders,
    write_shards_here,
)

TRAIN_TAR, VALIDATION_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"


def test_missing_originals_give_one_message(tmp_path, capsys):
    assert prepare.main(["imagenet", f"--data_dir={tmp_path}"]) == 1
    assert "--source is missing" in capsys.readouterr().err
    for source, found in ((tmp_path / "no", "does not exist"), (tmp_path, "found in")):
        assert imagenet(source, tmp_path) == 1
        error = capsys.readouterr().err
        assert "no train split (ILSVRC2012_img_train.tar or train/)" in error
        assert found in error and "https://image-net.org/download-images" in error
    (tmp_path / "train" / "cat").mkdir(parents=True)
    (tmp_path / "train" / "cat" / "1.jpg").touch()
    (tmp_path / "val").mkdir()
    assert imagenet(tmp_path, tmp_path) == 1
    assert "configs/folder.py" in capsys.readouterr().err


def cut_between_images(source: Path) -> None:
    with tarfile.open(source / VALIDATION_TAR) as archive:
        last = archive.getmembers()[-1]
    os.truncate(source / VALIDATION_TAR, last.offset)


def one_class(source: Path, *names: str, wnid: str = WNIDS[0]) -> None:
    inner = tar_of(dict.fromkeys(names, b"x"))
    (source / TRAIN_TAR).write_bytes(tar_of({f"{wnid}.tar": inner}))


def label_wrongly(source: Path) -> None:
    [path] = source.glob("val/*/ILSVRC2012_val_00000001.JPEG")
    (source / "val" / WNIDS[0]).mkdir()
    shutil.copy(path, source / "val" / WNIDS[0])


FIRST = f"{WNIDS[0]}_0.JPEG"
ARCHIVE_FAULTS = [
    (lambda s: os.truncate(s / TRAIN_TAR, 30_000), "was the download cut off"),
    (cut_between_images, "there is no end mark. It has"),
    (
        lambda s: (s / TRAIN_TAR).write_bytes(b"<html>404</html>" * 100),
        "the official archive 147,897,477,120",
    ),
    (lambda s: one_class(s, f"{WNIDS[1]}_0.JPEG"), f"{WNIDS[1]}_0.JPEG in"),
    (lambda s: one_class(s, "1.JPEG", wnid="n00000000"), "none of the 1,000 classes"),
    (lambda s: one_class(s, FIRST, f"more/{FIRST}"), f"holds {FIRST} more than once"),
    (lambda s: (s / VALIDATION_TAR).unlink(), "no validation split ("),
]
FOLDER_FAULTS = [
    (
        lambda source: (source / "train" / WNIDS[0] / "x.JPEG.part").touch(),
        f"what to do with {WNIDS[0]}/x.JPEG.part",
    ),
    (label_wrongly, "is labelled n01440764 (tench), but it is of class n01751748 (sea snake)"),
]


@pytest.mark.parametrize("damage, words", ARCHIVE_FAULTS + FOLDER_FAULTS)
def test_wrong_source_gives_one_message(damage, words, tmp_path, capsys):
    source = tmp_path / "source"
    if (damage, words) in FOLDER_FAULTS:
        write_folders(source, flat=False)
    else:
        write_archives(source)
    damage(source)
    assert imagenet(source, tmp_path / "target") == 1
    error = capsys.readouterr().err
    assert words in error and str(source) in error and error.count("\n") == 1
    assert not [*tmp_path.rglob("1.0.0*")]  # nothing was begun


def test_verify_compares_the_md5(tmp_path, capsys):
    source = write_archives(tmp_path / "source")
    assert imagenet(source, tmp_path, "--verify") == 1
    error = capsys.readouterr().err
    found = hashlib.md5((source / TRAIN_TAR).read_bytes()).hexdigest()
    assert f"{TRAIN_TAR} has the MD5 {found}, the official archive 1d675b47d9" in error


def test_temporary_read_error_damages_nothing(tmp_path, monkeypatch, capsys):
    write_shards_here(monkeypatch)
    source = write_archives(tmp_path / "source")

    def unplug(*_):
        (source / TRAIN_TAR).rename(source / "away")

    with monkeypatch.context() as patch:
        patch.setattr(preparation, "check_room", unplug)  # the last of the checks
        assert imagenet(source, tmp_path, "--max_unreadable=1000") == 1
    assert "cannot read n0" in capsys.readouterr().err
    (source / "away").rename(source / TRAIN_TAR)
    assert imagenet(source, tmp_path, "--max_unreadable=0") == 0
    assert set(records(tmp_path, "train")) == set(TRAIN)


def test_full_disk_gives_one_message_and_keeps_finished_shards(
    small_disk, tmp_path, monkeypatch, capsys
):
    disk, source = small_disk(8), write_archives(tmp_path / "source")
    others, target = disk / "others", disk / "tfds"
    others.write_bytes(bytes(7 << 20))  # seen before it begins
    assert imagenet(source, target) == 1
    error = capsys.readouterr().err
    assert f"{target}: No space left on device (1.0 MB free, about 3.0" in error
    made = write_shards_here(monkeypatch)
    monkeypatch.setattr(preparation, "check_room", lambda *_: None)
    monkeypatch.setattr(preparation, "_FEWEST_IMAGES", 9)  # train: two shards
    others.write_bytes(bytes(shutil.disk_usage(disk).total - (500 << 10)))
    assert imagenet(source, target) == 1
    error = capsys.readouterr().err
    assert f"cannot write in {disk}" in error and "No space left" in error
    assert "Make room there and start the same command again" in error
    assert not [*disk.rglob(".*.tmp")]
    others.unlink()
    assert imagenet(source, target) == 0
    assert len(made) == len(set(made)) == 3  # the finished ones were not made again
    assert set(records(target, "train")) == set(TRAIN)


def test_second_preparation_is_refused_before_it_reads(tmp_path, monkeypatch, capsys):
    source = write_archives(tmp_path / "source")
    monkeypatch.setattr(originals, "find", None)
    (tmp_path / "imagenet2012_256").mkdir()
    with exclusive_lock(tmp_path / "imagenet2012_256" / ".lock", wait=False):
        assert imagenet(source, tmp_path) == 1
    error = capsys.readouterr().err
    assert f"is held by process {os.getpid()} on {socket.gethostname()} since" in error
