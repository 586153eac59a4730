"""From archives to `imagenet2012_256`: labels, images, order, and resuming."""

import io
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import simplejpeg
import tensorflow_datasets as tfds
from PIL import Image

from alexnet_jax.data import DataError, images, open_source, statistics
from alexnet_jax.data.imagenet import (
    class_words,
    classes,
    named_wnid,
    originals,
    preparation,
    wnids,
)
from alexnet_jax.data.sources.tfds import example_message
from alexnet_jax.training import experiment
from configs import paper
from tests.data.imagenet_files import (
    NUM_VALIDATION,
    TRAIN,
    VALIDATION,
    WNIDS,
    imagenet,
    records,
    write_archives,
    write_folders,
    write_imagenet2012,
    write_shards_here,
)

# Class words of the first validation images in the official ground truth.
FIRST_VALIDATION = (
    *("sea snake", "alp", "Shetland sheepdog", "soup bowl", "cradle"),
    *("garter snake", "porcupine", "bakery", "mousetrap"),
)


# Classes.


def test_classes_are_sorted_by_wnid():
    words = class_words()
    assert len(words) == 1000 and list(words) == sorted(words)
    assert next(iter(words.values())) == "tench, Tinca tinca"
    assert classes.words("n15075141") == "toilet tissue" and classes.words("cat") == "cat"


def test_validation_labels_are_the_official_ones():
    labels = classes._validation_wnids()
    assert set(np.unique(labels, return_counts=True)[1]) == {50}
    # The development kit has other numbers. Image 1 is a sea snake, label 65.
    for number, words in enumerate(FIRST_VALIDATION, 1):
        wnid = named_wnid(f"ILSVRC2012_val_{number:08d}.JPEG")
        assert classes.words(wnid) == words
    assert wnids().index(labels[0]) == 65
    assert named_wnid("1.jpg") is None
    with pytest.raises(DataError, match="expected a number from 1 to 50,000"):
        named_wnid("ILSVRC2012_val_00050001.JPEG")


# The data set.


def test_tfds_reads_every_image_with_its_label(data_dir):
    builder = tfds.builder_from_directory(data_dir / "imagenet2012_256" / "1.0.0")
    assert builder.info.features["label"].names == list(wnids())
    assert builder.info.splits["train"].num_examples == len(TRAIN)
    train = {name: label for name, (label, _) in records(data_dir, "train").items()}
    assert train == {name: label for name, (label, _) in TRAIN.items()}
    validation = records(data_dir, "validation")
    assert set(validation) == set(VALIDATION)
    for name, (label, _) in validation.items():
        words = FIRST_VALIDATION[int(name[15:23]) - 1]
        assert classes.words(wnids()[label]) == words
    decoded = next(iter(builder.as_data_source("train")))  # by tfds itself
    assert decoded["image"].shape == (256, 256, 3)


def test_stored_images_have_the_papers_preprocessing(data_dir):
    """Compare with Pillow: shorter side to 256, central square, JPEG of quality 95."""
    for name, (_, jpeg) in records(data_dir, "train").items():
        original = Image.open(io.BytesIO(TRAIN[name][1])).convert("RGB")
        width, height = original.size
        scale = 256 / min(width, height)
        size = (max(256, round(width * scale)), max(256, round(height * scale)))
        filter_ = "BOX" if scale < 1 else "BICUBIC"
        resized = original.resize(size, Image.Resampling[filter_])
        left, top = (size[0] - 256) // 2, (size[1] - 256) // 2
        wanted = np.asarray(resized.crop((left, top, left + 256, top + 256)), int)
        stored = Image.open(io.BytesIO(jpeg))
        assert stored.size == (256, 256) and stored.format == "JPEG"
        # Quality 95 of the standard's luminance table: its first entries are 2 1 1 2.
        assert list(stored.quantization[0][:4]) == [2, 1, 1, 2]
        assert np.abs(np.asarray(stored, int) - wanted).mean() < 2.5, name


def test_records_are_shuffled_and_statistics_stored(data_dir):
    train = open_source("imagenet2012_256", "train", data_dir=str(data_dir))
    labels = train.labels_of(np.arange(train.num_examples)).tolist()
    assert sorted(labels) == sorted(label for label, _ in TRAIN.values()) != labels
    stored = statistics.load(train.statistics_path)
    mean = statistics.compute(train).mean_image
    np.testing.assert_array_equal(stored.mean_image, mean)
    assert stored.num_examples == len(TRAIN)
    left = {p.name for p in (data_dir / "imagenet2012_256").iterdir()}
    assert left == {"1.0.0", ".lock"}


def test_paper_config_uses_the_prepared_data_set(data_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    config = paper.get_config()
    config.model.width, config.model.init = 1 / 16, "he"
    said = []
    built = experiment.build(config, log=said.append)
    assert built.eval_source.num_examples == NUM_VALIDATION
    assert built.model.network.layers[-1].features == 1000
    [line] = [line for line in said if line.startswith("mean image: ")]
    assert line == f"mean image: {built.train_source.statistics_path}, of {len(TRAIN)} images"


# Other forms of the originals.


def written(found: list[originals.Original]) -> list[tuple[str, tuple[int, bytes]]]:
    """Return (name, (label, JPEG)) of what a worker writes, made in this process."""
    rows = []
    for original in found:
        name, label, data = originals.read(original)
        record = preparation._record(name, label, images.decode(data, 256, name))
        feature = example_message().FromString(record).features.feature
        assert feature["file_name"].bytes_list.value == [name.encode()]
        assert feature["label"].int64_list.value == [label]
        rows.append((name, (label, feature["image"].bytes_list.value[0])))
    return rows


@pytest.mark.parametrize("flat", [True, False])
def test_class_folders_equal_archives(data_dir, tmp_path, flat):
    root = tmp_path
    if flat:  # as Kaggle packs it
        root = tmp_path / "ILSVRC" / "Data" / "CLS-LOC"
    write_folders(root, flat)
    found = originals.find(tmp_path)
    for split in ("train", "validation"):
        [part] = originals.divided(found[split], 1)
        assert written(part) == list(records(data_dir, split).items())  # and the order


@pytest.mark.parametrize("kind", ["array_record", "tfrecord"])
def test_tfds_imagenet2012_equals_archives(data_dir, tmp_path, kind):
    folder = write_imagenet2012(tmp_path, kind)
    for source in (tmp_path, folder):
        found = originals.find(source)
        assert dict(written(found["train"])) == records(data_dir, "train")
        assert len(found["validation"]) == NUM_VALIDATION
    shard = next(folder.glob("*train*"))
    shard.write_bytes(shard.read_bytes()[:-100])
    originals._reader.cache_clear()
    message = {"tfrecord": "is cut off at", "array_record": "cannot read .*#0 of"}
    with pytest.raises((DataError, OSError), match=message[kind]):
        originals.read(originals.find(tmp_path)["train"][0])


def test_hugging_face_file_names_give_the_class(tmp_path):
    labels = {f"train/{n[:-5]}_{WNIDS[k]}.JPEG": k for n, (k, _) in TRAIN.items()}
    for name in VALIDATION:
        wnid = named_wnid(name)
        labels[f"val/{name[:-5]}_{wnid}.JPEG"] = wnids().index(wnid)
    for name in labels:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    found = originals.find(tmp_path)
    rows = [originals.read(original) for split in found.values() for original in split]
    assert {data.decode(): label for _, label, data in rows} == labels
    (tmp_path / "train" / "cat.JPEG").touch()
    words = "1 of 19 images in .* have no class: cat.JPEG"
    with pytest.raises(DataError, match=words):
        originals.find(tmp_path)


# A second start.


def test_finished_preparation_is_not_repeated(archives, data_dir, tmp_path, capsys):
    before = {p: p.stat().st_mtime_ns for p in data_dir.rglob("*record*")}
    (data_dir / "imagenet2012_256" / "1.0.0" / "parts").mkdir()  # killed at the end
    assert imagenet(archives, data_dir) == 0
    output = capsys.readouterr().out
    assert "is there already" in output and "train: 18 images" in output
    assert "WARNING: ILSVRC-2012 has 1,281,167" in output
    assert before == {p: p.stat().st_mtime_ns for p in data_dir.rglob("*record*")}
    assert not list(data_dir.rglob("parts"))
    # Prepared from a few images, then started with another source.
    assert imagenet(tmp_path, data_dir) == 1
    assert f"made of {archives}, not of {tmp_path}" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_preparation_resumes_with_the_missing_shards(tmp_path):
    rng = np.random.default_rng(0)
    large = simplejpeg.encode_jpeg(rng.integers(0, 256, (600, 800, 3), np.uint8))
    train = {
        f"{wnid}_{i}.JPEG": (label, large) for label, wnid in enumerate(WNIDS) for i in range(110)
    }
    source = write_archives(tmp_path / "source", train)  # five shards, and one
    unfinished = tmp_path / "imagenet2012_256" / "1.0.0.incomplete"
    command = [sys.executable, "-m", "alexnet_jax.prepare", "imagenet", "--workers=1"]
    command += [f"--source={source}", f"--data_dir={tmp_path}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(done := list(unfinished.glob("parts/*record*.json"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    shards = {unfinished / p.stem: (unfinished / p.stem).stat().st_ino for p in done}
    damaged, _ = shards.popitem()
    damaged.write_bytes(damaged.read_bytes()[:-1])  # is made again
    assert not (tmp_path / "imagenet2012_256" / "1.0.0").exists()
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "shards are done already" in finished.stdout
    directory = unfinished.with_name("1.0.0")
    for path, inode in shards.items():
        assert (directory / path.name).stat().st_ino == inode  # the same file
    assert set(records(tmp_path, "train")) == set(train)
    assert not unfinished.exists() and not list(directory.glob(".*"))


def test_repaired_or_removed_image_rewrites_one_shard(tmp_path, monkeypatch, capsys):
    made = write_shards_here(monkeypatch)
    monkeypatch.setattr(preparation, "_FEWEST_IMAGES", 4)  # 18 make four shards
    source = write_folders(tmp_path / "source", flat=True)
    first, second = sorted(TRAIN)[:2]
    broken = source / "train" / WNIDS[0] / first
    whole = broken.read_bytes()
    broken.write_bytes(bytes(len(whole)))
    assert imagenet(source, tmp_path, "--max_unreadable=0") == 1
    assert "images that cannot be read: 1, " in capsys.readouterr().err
    assert len(made) == 6
    broken.write_bytes(whole)
    (source / "train" / WNIDS[0] / second).unlink()
    assert imagenet(source, tmp_path, "--max_unreadable=0") == 0
    assert len(made) <= 6 + 2
    assert set(records(tmp_path, "train")) == set(TRAIN) - {second}


def test_broken_images_are_named_counted_and_limited(tmp_path, monkeypatch, capsys):
    name, empty = f"{WNIDS[1]}_2.JPEG", "ILSVRC2012_val_00000004.JPEG"
    train = TRAIN | {name: (1, TRAIN[name][1][:500])}
    source = write_archives(tmp_path / "source", train, VALIDATION | {empty: b""})
    write_shards_here(monkeypatch)
    assert imagenet(source, tmp_path, "--max_unreadable=1") == 1
    error = capsys.readouterr().err
    words = "images that cannot be read: 2, --max_unreadable=1 allows no more. Put"
    assert words in error
    assert f"cannot decode {name} (500 bytes)" in error
    assert f"cannot decode {empty} (0 bytes)" in error
    with pytest.raises(FileNotFoundError, match="was begun there; the same command"):
        open_source("imagenet2012_256", "train", data_dir=str(tmp_path))
    assert imagenet(source, tmp_path, "--max_unreadable=2") == 0
    output = capsys.readouterr().out
    assert "images left out: 2\n" in output and f"cannot decode {name}" in output
    directory = tmp_path / "imagenet2012_256" / "1.0.0"
    record = json.loads((directory / "preparation.json").read_text())
    counts = {"train": len(TRAIN) - 1, "validation": NUM_VALIDATION - 1}
    assert record["pictures"] == counts
    assert [name for name, _ in record["unreadable"]] == [name, empty]
    assert set(records(tmp_path, "train")) == set(TRAIN) - {name}
