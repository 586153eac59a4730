"""Faults of data: nothing is lost, no code runs, and each is one message."""

import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from alexnet_jax import prepare
from alexnet_jax.data import (
    DataError,
    images,
    open_source,
    statistics,
)
from alexnet_jax.data.imagenet import originals, preparation
from alexnet_jax.data.loader import TrainOrder
from alexnet_jax.data.sources import FolderSource
from alexnet_jax.system import locks
from alexnet_jax.training import evaluate, loop
from alexnet_jax.training import experiment as experiment_lib
from tests.data.test_data import encoded, fetched
from tests.data.test_imagenet import (
    NUM_VALIDATION,
    TRAIN,
    VALIDATION,
    WNIDS,
    example,
    file_of,
    records,
    tar_of,
    write_archives,
    write_folders,
    write_shards_here,
    write_tfds,
)
from tests.training.test_loop import folder, small_config  # noqa: F401, a fixture

REPOSITORY = Path(__file__).parents[2]


def imagenet(*arguments: str) -> int:
    return prepare.main(["prepare", "imagenet", *arguments])


# Pictures.


def cut(kind: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    whole = encoded(Image.fromarray(pixels), kind)
    return whole[: len(whole) // 2]


def with_much_text() -> bytes:
    """More than Pillow's 1 MB, and a colour profile of as much."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt("comment", "x" * 3_000_000, zip=True)
    return encoded(PLAIN, "PNG", pnginfo=info, icc_profile=bytes(3_000_000))


PLAIN = Image.new("RGB", (30, 20), (200, 100, 50))
# A picture file, and what must come of it: one colour, or words of a message.
PICTURES = {
    # (255 - ink) (255 - black) / 255
    "CMYK": (
        encoded(Image.new("CMYK", (30, 20), (0, 155, 205, 55)), "JPEG", quality=95),
        (200, 78, 39),
    ),
    "a BMP by another name": (encoded(PLAIN, "BMP"), (200, 100, 50)),
    "JPEG in a TIFF": (encoded(PLAIN, "TIFF", compression="jpeg"), (200, 100, 50)),
    "much text": (with_much_text(), (200, 100, 50)),
    "truncated JPEG": (cut("JPEG"), "truncated"),
    "truncated PNG": (cut("PNG"), "truncated"),
    "zero bytes": (b"", "it is damaged or no picture"),
    "HTML": (b"<!DOCTYPE html>", "begins with b'<!DOCTYP'"),
    # Pillow would start Ghostscript.
    "a program": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "begins with b'%!PS-Ado'",
    ),
    "90 megapixels": (
        encoded(Image.new("L", (10_000, 9_000)), "JPEG"),
        f"10,000 x 9,000, more than {images.MAX_PIXELS:,} pixels; make it smaller",
    ),
    "180 megapixels": (
        encoded(Image.new("1", (15_000, 12_000)), "PNG"),
        "Image size (180000000 pixels) exceeds limit",
    ),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("data, expected", PICTURES.values(), ids=PICTURES)
def test_picture_is_right_or_refused(data, expected, tmp_path):
    path = tmp_path / "train" / "a" / "1.jpg"
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    source = FolderSource(tmp_path, "train", 8)
    if not isinstance(expected, str):
        picture = fetched(source, 0)
        np.testing.assert_allclose(picture.mean((0, 1)), expected, atol=3)
        assert picture.std((0, 1)).max() < 3
        return
    with pytest.raises(DataError) as error:
        fetched(source, 0)
    message = str(error.value)
    assert message.startswith(f"cannot decode {path} ({len(data)} bytes): ")
    assert expected in message and "BytesIO" not in message
    assert message.endswith("an intact copy or take it out of the data set.")


def test_want_of_memory_is_not_the_fault_of_a_picture(monkeypatch):
    """`prepare` must not leave it out as a broken one."""

    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr(images, "resize_to_square", full)
    with pytest.raises(MemoryError):
        images.decode(encoded(PLAIN, "PNG"), 8, "x.png")


# Folders.


def test_class_without_pictures_is_one_message(tmp_path, capsys):
    """Without it all labels behind it would be others."""
    path = write_folders(tmp_path, flat=True) / "train" / "b"
    path.mkdir()
    (path / "a.svg").touch()
    (path / ".hidden.jpg").touch()
    assert prepare.main(["prepare", "statistics", f"--source=folder:{tmp_path}"]) == 1
    error = capsys.readouterr().err
    assert f"class folder {path} holds no pictures (.jpg, " in error
    assert "found there: a.svg). Fill it or remove it" in error
    assert error.count("\n") == 1


def left_out_folder(root: Path) -> Path:
    """Two classes of three pictures, and files that are not read."""
    picture = encoded(PLAIN, "PNG")
    files = "a/2.png", "a/10.PNG", "a/.hidden.png", "a/notes.txt", "a/.git/1.png"
    deep = [f"a/deep/{i}.gif" for i in range(4)] + ["b/x/y/1.png", "b/x/.DS_Store"]
    for name in (*files, *deep, ".git/1.png", "b/1.avif", "b/1.heic", "3.jpg"):
        path = root / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture)
    return root


LEFT_OUT = "3.jpg, a/deep, a/notes.txt, b/1.heic, b/x"


def test_left_out_files_are_a_warning_of_every_command(tmp_path, capsys):
    root = left_out_folder(tmp_path / "pictures")
    (root / "train").rename(root / "test")
    left_out_folder(root)
    source = FolderSource(root, "train", 8)
    assert source.class_names == ("a", "b")
    assert source.labels_of(np.arange(3)).tolist() == [0, 0, 1]
    assert source._files == ["10.PNG", "2.png", "1.avif"]
    assert source.description == f"folder {root / 'train'}"
    lines = [
        f"WARNING: 5 left out of {root / split}: {LEFT_OUT}\n"
        for split in ("train", "test")
    ]
    experiment = experiment_lib.build(small_config(root))
    said = capsys.readouterr().out
    assert [said.count(line) for line in lines] == [1, 1]
    state = experiment.init_state()
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    evaluate.predict(experiment, variables)
    assert capsys.readouterr().out == lines[1]
    common = [f"--source=folder:{root}", "--image_size=8"]
    assert prepare.main(["prepare", "statistics", *common]) == 0
    assert lines[0] in capsys.readouterr().out
    common += ["--eval_split=test", f"--out={tmp_path / 'sheet.png'}"]
    prepare.main(["prepare", "check", *common])
    said = capsys.readouterr().out
    assert [said.count(line) for line in lines] == [1, 1]
    assert "ok     labels mean the same classes in both splits" in said


@pytest.mark.parametrize("suffix", images.PICTURE_SUFFIXES)
def test_every_readable_format_is_read_from_folders(suffix, tmp_path):
    path = tmp_path / "train" / "a" / f"1{suffix.upper()}"
    path.parent.mkdir(parents=True)
    mode = {".pbm": "1", ".pgm": "L"}.get(suffix, "RGB")
    Image.new(mode, (9, 9), 255 if mode != "RGB" else (255, 255, 255)).save(path)
    assert (fetched(FolderSource(tmp_path, "train", 8), 0) > 250).all()


def test_class_of_nested_pictures_only_says_so(tmp_path):
    (tmp_path / "train" / "a" / "deep").mkdir(parents=True)
    words = r"a holds no pictures itself, but folders \(deep\)\. Move the pictures into"
    with pytest.raises(DataError, match=words):
        FolderSource(tmp_path, "train", 8)


# Data sets of tfds.


def _shard(root: Path) -> Path:
    [path] = root.glob("*train*")
    return path


def _flip_a_bit(root: Path) -> None:
    whole = bytearray(_shard(root).read_bytes())
    whole[whole.index(b"JFIF")] ^= 1
    _shard(root).write_bytes(whole)


def _name_a_class(root: Path, within_json: bool = False) -> None:
    """Make the data set name a module that stops the tests if it is imported."""
    (root / "evil_module.py").write_text("raise SystemExit('imported')\n")
    path = root / "features.json"
    features = json.loads(path.read_text())
    evil = {"pythonClassName": "evil_module.Image", "image": {}}
    if within_json:
        name = "tensorflow_datasets.core.features.features_dict.FeaturesDict"
        text = json.dumps({"x": evil})
        evil = {"pythonClassName": name, "jsonFeature": {"json": text}}
    features["featuresDict"]["features"]["evil"] = evil
    path.write_text(json.dumps(features))


def _write_records(root: Path, record: bytes) -> None:
    from array_record.python import array_record_module

    writer = array_record_module.ArrayRecordWriter(str(_shard(root)), "group_size:1")
    for _ in range(len(TRAIN)):
        writer.write(record)
    writer.close()


def _wrong_label(root: Path) -> None:
    _write_records(root, example(f"{WNIDS[0]}_0.JPEG", (1000, file_of(0))))


def _no_message(root: Path) -> None:
    _write_records(root, b"\xff\xff not a protocol buffer")


STATISTICS, IMAGENET = "statistics", "imagenet"
EVIL = "names the class 'evil_module.Image', which would be imported"
TFDS_FAULTS = [
    (lambda root: _shard(root).unlink(), STATISTICS, "1 of 1 files of "),
    (lambda root: os.truncate(_shard(root), 0), IMAGENET, "missing or cut off: imagen"),
    (_flip_a_bit, STATISTICS, "chunk data hash mismatch"),
    (_name_a_class, STATISTICS, EVIL),
    (functools.partial(_name_a_class, within_json=True), IMAGENET, EVIL),
    (_wrong_label, STATISTICS, "not of 1000 classes: index 1000 is out of bounds"),
    (_wrong_label, IMAGENET, "label is 1000, outside 0..999"),
    (_no_message, STATISTICS, "1000 classes: Error parsing message"),
]


@pytest.fixture(scope="module")
def data_set(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tfds") / "imagenet2012" / "5.1.0"
    return write_tfds(root, "array_record")


@pytest.mark.parametrize("damage, command, words", TFDS_FAULTS)
def test_damaged_data_sets_are_one_message(
    damage, command, words, data_set, tmp_path, monkeypatch, capsys
):
    root = tmp_path / "imagenet2012" / "5.1.0"
    shutil.copytree(data_set, root)
    damage(root)
    monkeypatch.syspath_prepend(root)  # what `python -m` does with the folder it is in
    originals._reader.cache_clear()
    write_shards_here(monkeypatch)
    arguments = ["--source=imagenet2012", f"--data_dir={tmp_path}"]
    if command == IMAGENET:
        arguments = [f"--source={root}", f"--data_dir={tmp_path / 'new'}"]
    assert prepare.main(["prepare", command, *arguments]) == 1
    error = capsys.readouterr().err
    assert words in error and str(root) in error and error.count("\n") == 1
    assert "repare" in error and "again" in error
    assert not (tmp_path / "new" / "imagenet2012_256" / "1.0.0").exists()


# Archives.

TRAIN_TAR, VALIDATION_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"


def _cut_between_pictures(source: Path) -> None:
    with tarfile.open(source / VALIDATION_TAR) as archive:
        last = archive.getmembers()[-1]
    os.truncate(source / VALIDATION_TAR, last.offset)


def _one_class(source: Path, files: dict[str, bytes], wnid: str = WNIDS[0]) -> None:
    (source / TRAIN_TAR).write_bytes(tar_of({f"{wnid}.tar": tar_of(files)}))


def _twice(source: Path) -> None:
    _one_class(source, {f"{WNIDS[0]}_0.JPEG": b"x", f"more/{WNIDS[0]}_0.JPEG": b"x"})


def _wrong_class(source: Path) -> None:
    _one_class(source, {f"{WNIDS[1]}_0.JPEG": b"x"})


def _html(source: Path) -> None:
    (source / TRAIN_TAR).write_bytes(b"<html>404</html>" * 100)


ARCHIVE_FAULTS = [
    (
        lambda source: os.truncate(source / TRAIN_TAR, 30_000),
        "was the download cut off",
    ),
    (_cut_between_pictures, "there is no end mark. It has"),
    (_html, "the official archive 147,897,477,120"),
    (_wrong_class, f"{WNIDS[1]}_0.JPEG in"),
    (
        lambda source: _one_class(source, {"1.JPEG": b"x"}, "n00000000"),
        "none of the 1,000 classes",
    ),
    (_twice, f"holds {WNIDS[0]}_0.JPEG more than once"),
    (lambda source: (source / VALIDATION_TAR).unlink(), "no validation split ("),
]


@pytest.mark.parametrize("damage, words", ARCHIVE_FAULTS)
def test_wrong_archives_are_one_message(damage, words, tmp_path, capsys):
    source = write_archives(tmp_path / "source")
    damage(source)
    assert imagenet(f"--source={source}", f"--data_dir={tmp_path / 'target'}") == 1
    error = capsys.readouterr().err
    assert words in error and str(source) in error and error.count("\n") == 1
    assert not [*tmp_path.rglob("1.0.0*")]  # nothing was begun


def _label_wrongly(source: Path) -> None:
    [path] = source.glob("val/*/ILSVRC2012_val_00000001.JPEG")
    (source / "val" / WNIDS[0]).mkdir()
    path.rename(source / "val" / WNIDS[0] / path.name)


def _download_half(source: Path) -> None:
    (source / "train" / WNIDS[0] / "x.JPEG.part").touch()


@pytest.mark.parametrize(
    "damage, words",
    [
        (_download_half, f"what to do with {WNIDS[0]}/x.JPEG.part"),
        (
            _label_wrongly,
            "is labelled n01440764 (tench), but it is of class n01751748 (sea snake)",
        ),
    ],
)
def test_wrong_folders_of_imagenet_are_one_message(damage, words, tmp_path, capsys):
    source = write_folders(tmp_path / "source", flat=False)
    damage(source)
    assert imagenet(f"--source={source}", f"--data_dir={tmp_path}") == 1
    assert words in capsys.readouterr().err
    assert not [*tmp_path.rglob("1.0.0*")]


def test_broken_pictures_are_named_counted_and_limited(tmp_path, monkeypatch, capsys):
    name, empty = f"{WNIDS[1]}_2.JPEG", "ILSVRC2012_val_00000004.JPEG"
    source = write_archives(
        tmp_path / "source",
        TRAIN | {name: (1, TRAIN[name][1][:500])},
        VALIDATION | {empty: b""},
    )
    write_shards_here(monkeypatch)
    arguments = (f"--source={source}", f"--data_dir={tmp_path}")
    assert imagenet(*arguments, "--max_unreadable=1") == 1
    error = capsys.readouterr().err
    words = "pictures that cannot be read: 2, --max_unreadable=1 allows no more. Put"
    assert words in error
    assert f"cannot decode {name} (500 bytes)" in error
    assert f"cannot decode {empty} (0 bytes)" in error
    with pytest.raises(FileNotFoundError, match="was begun there; the same command"):
        open_source("imagenet2012_256", "train", data_dir=str(tmp_path))
    assert imagenet(*arguments, "--max_unreadable=2") == 0
    output = capsys.readouterr().out
    assert "pictures left out: 2\n" in output and f"cannot decode {name}" in output
    directory = tmp_path / "imagenet2012_256" / "1.0.0"
    record = json.loads((directory / "preparation.json").read_text())
    counts = {"train": len(TRAIN) - 1, "validation": NUM_VALIDATION - 1}
    assert record["pictures"] == counts
    assert [name for name, _ in record["unreadable"]] == [name, empty]
    assert set(records(tmp_path, "train")) == set(TRAIN) - {name}


# Training.


def test_broken_picture_ends_a_run_with_its_name(folder, tmp_path):  # noqa: F811
    pictures = tmp_path / "pictures"
    shutil.copytree(folder, pictures)
    config = small_config(pictures, num_epochs=2.0)
    # A run would compute them first, and find there what is broken.
    source = FolderSource(pictures, "train", config.data.image_size)
    statistics.compute(source).save(statistics.statistics_path(source))
    names = sorted(pictures.glob("train/*/*.png"))
    order = TrainOrder(len(names), batch_size=6, seed=config.seed)
    broken = names[order[2][3]]
    broken.write_bytes(broken.read_bytes()[:300])
    words = rf"cannot decode {broken} \(300 bytes\): .*truncated.*intact copy"
    with pytest.raises(DataError, match=words):
        loop.train_and_evaluate(config, tmp_path / "run")


# A full disk.


def test_full_disk_while_imagenet_is_prepared(
    small_disk, tmp_path, monkeypatch, capsys
):
    disk, source = small_disk(8), write_archives(tmp_path / "source")
    others = disk / "others"
    arguments = (f"--source={source}", f"--data_dir={disk / 'tfds'}")
    others.write_bytes(bytes(7 << 20))  # seen before it begins
    assert imagenet(*arguments) == 1
    error = capsys.readouterr().err
    assert f"{disk / 'tfds'}: No space left on device (1.0 MB free, about 3.0" in error
    made = write_shards_here(monkeypatch)
    monkeypatch.setattr(preparation, "check_room", lambda *_: None)
    monkeypatch.setattr(preparation, "_FEWEST_PICTURES", 9)  # train: two shards
    others.write_bytes(bytes(shutil.disk_usage(disk).total - (500 << 10)))
    assert imagenet(*arguments) == 1
    error = capsys.readouterr().err
    assert f"cannot write in {disk}" in error and "No space left" in error
    assert "Make room there and start the same command again" in error
    assert not [*disk.rglob(".*.tmp")]
    others.unlink()
    assert imagenet(*arguments) == 0
    assert len(made) == len(set(made)) == 3  # the finished ones were not made again
    assert set(records(disk / "tfds", "train")) == set(TRAIN)


# One process at a time.

_HOLD = """
import pathlib, runpy, sys
held = runpy.run_path("alexnet_jax/system/locks.py")["held"]
with held(pathlib.Path(sys.argv[1]), wait=False):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_refused_process_is_told_who_holds_the_lock(tmp_path):
    path = tmp_path / ".lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(path)],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        for _ in range(2):  # who is refused must not wipe out the holder's line
            with pytest.raises(locks.HeldError) as error, locks.held(path, wait=False):
                pass
            who = f"process {holder.pid} on {socket.gethostname()} since 2"
            assert str(error.value).startswith(f"{path} is held by {who}")
            assert "sys.stdin.read()" in error.value.holder
        holder.kill()
    with locks.held(path, wait=False):  # the lock of a killed process is free
        pass


def test_one_preparation_at_a_time(tmp_path, monkeypatch, capsys):
    """The second one learns it before it reads archives for half an hour."""
    source = write_archives(tmp_path / "source")
    monkeypatch.setattr(originals, "find", None)
    with preparation._alone(tmp_path / "imagenet2012_256"):
        assert imagenet(f"--source={source}", f"--data_dir={tmp_path}") == 1
    error = capsys.readouterr().err
    who = f"is being prepared by process {os.getpid()} on {socket.gethostname()} since"
    assert who in error and "wait for it, or end it" in error


@pytest.mark.slow
def test_two_processes_draw_the_textures_once(tmp_path):
    script = (
        "import sys; from alexnet_jax.data import open_source; "
        "print(open_source('textures/tiny', 'test', data_dir=sys.argv[1]).num_examples)"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120)[0] for process in started]
    assert [text.splitlines()[-1] for text in said] == ["100", "100"]
    assert sum(text.count("Drawing the textures") for text in said) == 1
    assert [p.name for p in (tmp_path / "textures" / "tiny").iterdir()] == ["1.0.0"]
