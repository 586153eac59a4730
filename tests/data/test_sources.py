"""Class folders, tfds data sets and fake data: values, labels, warnings and errors."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from alexnet_jax import prepare
from alexnet_jax.data import (
    DataError,
    eval_batches,
    images,
    match_classes,
    open_source,
    sources,
    train_batches,
    warnings_about,
)
from alexnet_jax.data.imagenet import originals
from alexnet_jax.data.sources.fake import FakeSource
from alexnet_jax.data.sources.folder import FolderSource
from tests.data.imagenet_files import (
    TRAIN,
    example,
    file_of,
    imagenet,
    write_imagenet2012,
    write_records,
    write_shards_here,
    write_tfds,
)
from tests.data.images import SIZE, fetched, random_image, write_images

# Class folders.


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory) -> Path:
    """Write two classes: 5 + 4 training and 3 + 2 evaluation images, lossless PNG."""
    root = tmp_path_factory.mktemp("images")
    number = 0
    for split, counts in (("train", (5, 4)), ("val", (3, 2))):
        for name, count in zip(("école", "犬"), counts, strict=True):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(random_image(SIZE, SIZE, number))
                image.save(root / split / name / f"{i}.PNG")
                number += 1
    return root


def test_folder_values_and_order(image_folder):
    source = open_source(f"folder:{image_folder}", "train", image_size=SIZE)
    assert source.class_names == ("école", "犬") and source.num_classes == 2
    assert source.num_examples == 9
    assert source.labels_of(np.array([8, 0, 4, 5])).tolist() == [1, 0, 0, 1]
    found = fetched(source, 8, 0, 4, 5)
    for image, number in zip(found, (8, 0, 4, 5), strict=True):
        np.testing.assert_array_equal(image, random_image(SIZE, SIZE, number))
    evaluation = open_source(f"folder:{image_folder}", "val", image_size=8)
    assert warnings_about(source, evaluation) == []
    paths = [split.statistics_path for split in (source, evaluation)]
    assert paths == [image_folder / "statistics_16.npz", image_folder / "statistics_8_val.npz"]
    batch = next(eval_batches(evaluation, batch_size=5))
    expected = images.resize_to_square(random_image(SIZE, SIZE, 12), 8)
    np.testing.assert_array_equal(batch["image"][3], expected)


def test_eval_split_names_are_interchangeable(image_folder, tmp_path):
    for split in ("test", "val", "validation"):
        source = open_source(f"folder:{image_folder}", split, image_size=SIZE)
        assert source.num_examples == 5 and "/val" in source.description
    write_images(tmp_path, "val/a/1.jpg", "validation/a/1.jpg")
    assert open_source(f"folder:{tmp_path}", "val").description.endswith("val")
    with pytest.raises(ValueError, match=r"no folder 'test' but val, validation"):
        open_source(f"folder:{tmp_path}", "test")


@pytest.mark.parametrize(
    "made, message",
    [
        ("", r"data does not exist.*train/<class>.*config\.data\.source"),
        ("n01/", r"no folder train in .*found in .*: n01"),
        ("train/1.jpg", r"no class folders in .*train \(found there: 1\.jpg\)"),
        ("train/b/a.svg", r"train/b holds no images \(\.jpg, .*found there: a\.svg\)"),
        ("train/a/deep/", r"a holds no images \(\.jpg, .*found there: deep\)\. Fill it"),
    ],
)
def test_unusable_folder_gives_one_message(made, message, tmp_path):
    if made:
        path = tmp_path / "data" / made
        path.parent.mkdir(parents=True)
        path.mkdir() if made.endswith("/") else path.touch()
    with pytest.raises((DataError, FileNotFoundError), match=message):
        open_source(f"folder:{tmp_path / 'data'}", "train")


def test_labels_are_matched_by_class_name(tmp_path):
    write_images(tmp_path, "test/b/1.png", "test/d/2.png")
    source = open_source(f"folder:{tmp_path}", "test", image_size=SIZE)
    assert match_classes(source, ["b", "d"]) is source
    lines = []
    matched = match_classes(source, ["d", "c", "b", "a"], log=lines.append)
    assert matched.class_names == ("d", "c", "b", "a") and matched.num_classes == 4
    assert matched.labels_of(np.arange(2)).tolist() == [2, 0]
    batch = next(eval_batches(matched, batch_size=2))
    assert batch["label"].tolist() == [2, 0]
    assert batch["image"][:, 0, 0, 0].tolist() == [0, 10]
    [line] = lines
    assert line.startswith("WARNING: no images of 2 of the 4 trained classes: a, c (")
    match_classes(source, ["d", "b"], log=pytest.fail)
    words = r"test has .* never trained: d; it lacks a, c \(2 .* 3 trained"
    with pytest.raises(DataError, match=words):
        match_classes(source, ["a", "b", "c"])


def test_tiny_imagenet_is_read_as_unpacked(tmp_path):
    train_files = [f"train/{n}/images/{n}_0.JPEG" for n in ("n01", "n02")]
    val_files = ["val/images/val_0.JPEG", "val/images/val_1.JPEG"]
    write_images(tmp_path, *train_files, *val_files, "test/images/test_0.JPEG")
    (tmp_path / "train" / "n01" / "n01_boxes.txt").write_text("n01_0.JPEG\t0")
    annotations = tmp_path / "val" / "val_annotations.txt"
    annotations.write_text("val_0.JPEG\tn02\t0\t0\t3\t3\nval_1.JPEG\tn01\t0\t0\t3\t3\n")
    train, val = (
        open_source(f"folder:{tmp_path}", split, image_size=SIZE) for split in ("train", "val")
    )
    assert train.class_names == val.class_names == ("n01", "n02")
    assert train.labels_of(np.arange(2)).tolist() == [0, 1]
    assert fetched(train, 0, 1)[:, 0, 0, 0].tolist() == [0, 10]
    assert fetched(val, 0, 1)[:, 0, 0, 0].tolist() == [30, 20]
    assert "n01/n01_boxes.txt" in train.left_out
    with pytest.raises(DataError, match=r"images have no classes: .*eval_split=val"):
        open_source(f"folder:{tmp_path}", "test")
    annotations.write_text("val_0.JPEG\tn02\t0\t0\t3\t3\n")
    with pytest.raises(DataError, match=r"1 of 2 images in .*images have no class: "):
        open_source(f"folder:{tmp_path}", "val")


def test_imagenet_file_names_give_the_class(tmp_path):
    write_images(
        tmp_path,
        "train/n01440764_10026_n01440764.JPEG",  # as Hugging Face names it
        "val/ILSVRC2012_val_00000001_n01751748.JPEG",
        "val/ILSVRC2012_val_00000999_n01440764.JPEG",
        "validation/ILSVRC2012_val_00000001.JPEG",  # the official name
    )
    train, val, official = (
        open_source(f"folder:{tmp_path}", split, image_size=SIZE)
        for split in ("train", "val", "validation")
    )
    assert train.class_names == ("n01440764",)
    assert val.class_names == ("n01440764", "n01751748")
    assert fetched(val, 0, 1)[:, 0, 0, 0].tolist() == [20, 10]
    assert official.class_names == ("n01751748",)
    write_images(tmp_path, "val/cat.png")
    with pytest.raises(DataError, match=r"1 of 3 images in .*val have no class: cat"):
        open_source(f"folder:{tmp_path}", "val")


def test_left_out_files_are_counted_in_a_warning(tmp_path, capsys):
    read = "a/2.png", "a/10.PNG", "b/1.avif"
    hidden = "a/.hidden.png", "a/.git/1.png", ".git/1.png"
    others = "3.jpg", "a/deep/1.gif", "a/notes.txt", "b/1.heic", "b/x/y/1.png"
    for split in ("train", "test"):
        write_images(tmp_path / split, *read, *hidden, *others)
    source = FolderSource(tmp_path, "train", 8)
    assert source.class_names == ("a", "b")
    assert source.labels_of(np.arange(3)).tolist() == [0, 0, 1]
    assert source._files == ["10.PNG", "2.png", "1.avif"]
    common = [f"--source=folder:{tmp_path}", "--image_size=8"]
    common += ["--eval_split=test", f"--out={tmp_path / 'sheet.png'}"]
    prepare.main(["check", *common])
    said = capsys.readouterr().out
    for split in ("train", "test"):
        left_out = "3.jpg, a/deep, a/notes.txt, b/1.heic, b/x"
        line = f"WARNING: 5 left out of {tmp_path / split}: {left_out}\n"
        assert said.count(line) == 1
    assert "ok     labels mean the same classes in both splits" in said


def test_splits_that_share_images_are_reported(tmp_path):
    write_images(tmp_path, *(f"train/a/{i}.jpg" for i in range(3)))
    (tmp_path / "val").symlink_to("train")
    train, evaluation = (open_source(f"folder:{tmp_path}", s) for s in ("train", "val"))
    one_class, of_evaluation, shared = warnings_about(train, evaluation)
    words = "WARNING: every training image looked at (3 of 3) is of one class, a. A low"
    assert one_class.startswith(words)
    assert "every evaluation image looked at (3 of 3) is of one class" in of_evaluation
    words = "WARNING: 3 of 3 evaluation images are training images too"
    assert shared.startswith(words)


# Fake data, and data sets that are missing.


def test_fake_source():
    train, evaluation = (open_source("fake", s, image_size=8) for s in ("train", "val"))
    assert (train.num_examples, evaluation.num_examples) == (1_281_167, 50_000)
    assert train.num_classes == 1000
    again = FakeSource("train", 8)
    one, two = (next(train_batches(s, batch_size=64, seed=3)) for s in (train, again))
    np.testing.assert_array_equal(one["image"], two["image"])
    np.testing.assert_array_equal(one["label"], two["label"])
    assert 120 < one["image"].mean() < 135 and len(np.unique(one["label"])) > 50


def test_missing_data_set_error_names_folder_and_command(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"unknown data source '\./images'.*folder:"):
        open_source("./images", "train")
    (tmp_path / "mnist").mkdir()
    with pytest.raises(FileNotFoundError) as info:
        open_source("cifar10", "train", data_dir=str(tmp_path))
    for words in (f"in {tmp_path}", "mnist", "download_and_prepare", "alexnet_jax[tf]"):
        assert words in str(info.value)
    target = tmp_path / "elsewhere"
    monkeypatch.setenv("TFDS_DATA_DIR", str(target))
    command = f"alexnet_jax.prepare imagenet --source=ARCHIVES --data_dir={target}"
    with pytest.raises(FileNotFoundError) as info:
        open_source("imagenet2012_256", "train")
    for words in ("elsewhere does not exist", "image-net.org", command):
        assert words in str(info.value)


# Data sets of tfds.


def test_limit_of_open_files_is_raised(tiny, monkeypatch):
    raised = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: raised.append(limits))
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1024, 4096))
    open_source("textures/tiny", "train", data_dir=str(tiny))
    assert raised == [(1025, 4096)]  # it has one file


def test_overlapping_slices_are_counted(tiny):
    def shared(*splits: str) -> str:
        opened = [open_source("textures/tiny", s, data_dir=str(tiny)) for s in splits]
        return sources.overlap(*opened).partition(" evaluation")[0]

    assert shared("train[:90%]", "train[80%:]") == "20 of 40"
    assert shared("train[:90%]", "train[90%:]") == ""
    assert shared("train", "test") == ""
    assert shared("train+test", "test[:10]") == "10 of 10"
    assert shared("train+train", "train") == "200 of 200"


IMAGE = tfds.features.Image(shape=(4, 4, 3))
LABEL = tfds.features.ClassLabel(names=["x", "y"])


def open_own(data_dir: Path, features: dict, kind="array_record", **options) -> sources.Source:
    """Open a tfds data set with an image, a label, `features` and one empty record."""
    features = {"image": IMAGE, "label": LABEL, **features}
    write_tfds(data_dir / "own" / "1.0.0", features, {"train": [b"1"]}, kind, **options)
    return open_source("own", "train", data_dir=str(data_dir))


FLOAT = tfds.features.Image(shape=(4, 4, 1), dtype=np.float32)
TENSOR = tfds.features.Tensor(shape=(4, 4, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "features, kind, message",
    [
        ({"image": FLOAT}, "array_record", r"'image' is an image of float32; only uint8 images, 0"),
        (
            {"image": TENSOR},
            "array_record",
            r"has 0 features of type Image \(image: Tensor\(shape=",
        ),
        (
            {"coarse": LABEL},
            "array_record",
            r"2 features of type ClassLabel \(coarse: .*supervised",
        ),
        ({}, "tfrecord", r"prepared as tfrecord, which.*as array_record, .*download_and_prepare"),
    ],
)
def test_unusable_tfds_data_set_is_refused(features, kind, message, tmp_path):
    with pytest.raises(DataError, match=message):
        open_own(tmp_path, features, kind)


def test_supervised_keys_choose_the_features(tmp_path):
    fine = tfds.features.ClassLabel(num_classes=5)
    keys = ("left", "fine")
    source = open_own(tmp_path, {"left": IMAGE, "fine": fine}, supervised_keys=keys)
    assert (source._image_key, source._label_key) == keys
    assert source.num_classes == 5


def _shard(root: Path) -> Path:
    [path] = root.glob("*train*")
    return path


def _flip_a_bit(root: Path) -> None:
    whole = bytearray(_shard(root).read_bytes())
    whole[whole.index(b"JFIF")] ^= 1
    _shard(root).write_bytes(whole)


def _name_a_class(root: Path) -> None:
    """Write nested JSON that names a module; importing it would stop the tests."""
    (root / "evil_module.py").write_text("raise SystemExit('imported')\n")
    path = root / "features.json"
    features = json.loads(path.read_text())
    evil = json.dumps({"x": {"pythonClassName": "evil_module.Image", "image": {}}})
    name = "tensorflow_datasets.core.features.features_dict.FeaturesDict"
    nested = {"pythonClassName": name, "jsonFeature": {"json": evil}}
    features["featuresDict"]["features"]["evil"] = nested
    path.write_text(json.dumps(features))


def _wrong_label(root: Path) -> None:
    record = example("n01440764_0.JPEG", 1000, file_of(0))
    write_records(_shard(root), [record] * len(TRAIN))


STATISTICS, IMAGENET = "statistics", "imagenet"
TFDS_FAULTS = [
    (lambda root: _shard(root).unlink(), STATISTICS, "1 of 1 files of "),
    (lambda root: os.truncate(_shard(root), 0), IMAGENET, "missing or empty: imagen"),
    (_flip_a_bit, STATISTICS, "chunk data hash mismatch"),
    (_name_a_class, IMAGENET, "names the class 'evil_module.Image', which would be imported"),
    (_wrong_label, STATISTICS, "not of 1000 classes: index 1000 is out of bounds"),
    (_wrong_label, IMAGENET, "label is 1000, outside 0..999"),
]


@pytest.mark.parametrize("damage, command, words", TFDS_FAULTS)
def test_damaged_data_set_gives_one_message(damage, command, words, tmp_path, monkeypatch, capsys):
    root, new = write_imagenet2012(tmp_path, "array_record"), tmp_path / "new"
    damage(root)
    monkeypatch.syspath_prepend(root)  # `python -m` does so with the current folder
    originals._reader.cache_clear()
    if command == IMAGENET:
        write_shards_here(monkeypatch)
        assert imagenet(root, new) == 1
    else:
        arguments = ["--source=imagenet2012", f"--data_dir={tmp_path}"]
        assert prepare.main([command, *arguments]) == 1
    error = capsys.readouterr().err
    assert words in error and str(root) in error and error.count("\n") == 1
    assert "repare" in error and "again" in error
    assert not (new / "imagenet2012_256" / "1.0.0").exists()


# No source needs TensorFlow.

_WITHOUT_TENSORFLOW = """
import importlib.machinery
import sys

class Refuse:  # TensorFlow can be found (some libraries look), but not imported
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "tensorflow":
            return importlib.machinery.ModuleSpec(name, self)

    def create_module(self, spec):
        raise AssertionError("tensorflow was imported")

    exec_module = create_module

sys.meta_path.insert(0, Refuse())
from alexnet_jax.data import eval_batches, open_source, statistics, train_batches
assert not {"grain", "tensorflow_datasets"} & {*sys.modules}, "imported before use"
folder, data_dir = sys.argv[1:]
for source in (f"folder:{folder}", "textures/tiny", "fake"):
    train = open_source(source, "train", data_dir=data_dir, image_size=16)
    forgotten = train_batches(train, batch_size=4, seed=0)  # quiet at exit
    next(forgotten), next(forgotten)
    if source != "fake":
        next(eval_batches(train, batch_size=7))
        statistics.compute(train, max_examples=4)
assert "tensorflow" not in sys.modules
print("fine")
"""


def test_nothing_imports_tensorflow(image_folder, tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", _WITHOUT_TENSORFLOW, str(image_folder), str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "fine\n"
    assert "Exception" not in result.stderr
