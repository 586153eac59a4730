"""From archives to `imagenet2012_256`: labels, pictures, order, faults; the checks."""

import dataclasses
import io
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import tensorflow_datasets as tfds
from PIL import Image

from alexnet_jax import load, prepare
from alexnet_jax.analysis.figures import contact_sheet
from alexnet_jax.data import (
    DataError,
    check,
    images,
    open_source,
    statistics,
)
from alexnet_jax.data.imagenet import (
    class_words,
    classes,
    originals,
    preparation,
)
from alexnet_jax.data.imagenet import wnids as get_wnids
from alexnet_jax.data.sources import Source
from alexnet_jax.data.sources.tfds import example_message
from alexnet_jax.system import cli
from alexnet_jax.training.loop import train_and_evaluate
from alexnet_jax.training.writers import read_metrics
from configs import paper

REPOSITORY = Path(__file__).parents[2]
WNIDS = get_wnids()[:3]
PER_CLASS, NUM_VALIDATION = 6, 9


def smooth_picture(height: int, width: int, seed: int) -> Image.Image:
    """Random, but soft enough that JPEG keeps it."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def file_of(number: int) -> bytes:
    """Picture files of many shapes, and of every kind that ImageNet holds."""
    picture = smooth_picture(200 + 17 * number % 400, 256 + 31 * number % 300, number)
    kind = {1: "CMYK", 2: "L"}.get(number % 6, "RGB")
    file = io.BytesIO()
    if number % 6 == 3:  # n02105855_2933.JPEG is a PNG
        picture.save(file, "PNG")
    else:
        picture.convert(kind).save(file, "JPEG", quality=95)
    return file.getvalue()


TRAIN = {
    f"{wnid}_{i}.JPEG": (label, file_of(PER_CLASS * label + i))
    for label, wnid in enumerate(WNIDS)
    for i in range(PER_CLASS)
}
VALIDATION = {
    f"ILSVRC2012_val_{i:08d}.JPEG": file_of(100 + i)
    for i in range(1, NUM_VALIDATION + 1)
}
# The first of the official ground truth, by their words.
FIRST_VALIDATION = (
    "sea snake",
    "alp",
    "Shetland sheepdog",
    "soup bowl",
    "cradle",
    "garter snake",
    "porcupine",
    "bakery",
    "mousetrap",
)


def tar_of(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return packed.getvalue()


def write_archives(folder: Path, train=TRAIN, validation=VALIDATION) -> Path:
    """The layout of the official archives; classes and pictures in some order."""
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


def write_folders(folder: Path, flat: bool, train=TRAIN, validation=VALIDATION) -> Path:
    for name, (_, data) in train.items():
        (folder / "train" / name.split("_")[0]).mkdir(parents=True, exist_ok=True)
        (folder / "train" / name.split("_")[0] / name).write_bytes(data)
    for name, data in validation.items():
        wnid = "" if flat else classes.validation_wnid(name)
        (folder / "val" / wnid).mkdir(parents=True, exist_ok=True)
        (folder / "val" / wnid / name).write_bytes(data)
    return folder


def run(*arguments: str) -> int:
    return prepare.main(["prepare", *arguments])


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> Path:
    return write_archives(tmp_path_factory.mktemp("archives"))


@pytest.fixture(scope="module")
def data_dir(archives, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("tfds")
    arguments = (f"--source={archives}", f"--data_dir={target}", "--workers=2")
    assert run("imagenet", *arguments) == 0
    return target


# Classes.


def test_the_thousand_classes():
    words = class_words()
    assert len(words) == 1000 and list(words) == sorted(words)
    assert next(iter(words.values())) == "tench, Tinca tinca"
    assert classes.words("n15075141") == "toilet tissue"
    assert classes.words("cat") == "cat"
    assert sum(text == "crane" for text in words.values()) == 2


def test_validation_labels_are_the_official_ones():
    labels = classes._validation_wnids()
    assert set(np.unique(labels, return_counts=True)[1]) == {50}
    # Not the development kit's numbers: picture 1 is a sea snake, label 65.
    for number, words in enumerate(FIRST_VALIDATION, 1):
        wnid = classes.validation_wnid(f"ILSVRC2012_val_{number:08d}.JPEG")
        assert classes.words(wnid) == words
    assert (
        get_wnids().index(classes.validation_wnid("ILSVRC2012_val_00000001.JPEG")) == 65
    )
    for name in (
        "ILSVRC2012_val_00050001.JPEG",
        "ILSVRC2012_val_00000000.JPEG",
        "1.jpg",
    ):
        with pytest.raises(DataError, match="no validation picture"):
            classes.validation_wnid(name)


# The data set.


def records(data_dir: Path, split: str) -> dict[str, tuple[int, bytes]]:
    builder = tfds.builder_from_directory(data_dir / "imagenet2012_256" / "1.0.0")
    decoders = {"image": tfds.decode.SkipDecoding()}
    source = builder.as_data_source(split, decoders=decoders)
    return {
        r["file_name"].decode(): (int(r["label"]), bytes(r["image"])) for r in source
    }


def test_tfds_opens_it_and_every_picture_has_its_label(data_dir):
    builder = tfds.builder_from_directory(data_dir / "imagenet2012_256" / "1.0.0")
    assert builder.info.features["label"].names == list(get_wnids())
    assert builder.info.splits["train"].num_examples == len(TRAIN)
    train = records(data_dir, "train")
    assert {name: label for name, (label, _) in train.items()} == {
        name: label for name, (label, _) in TRAIN.items()
    }
    validation = records(data_dir, "validation")
    assert set(validation) == set(VALIDATION)
    for name, (label, _) in validation.items():
        words = FIRST_VALIDATION[int(name[15:23]) - 1]
        assert classes.words(get_wnids()[label]) == words
    decoded = next(iter(builder.as_data_source("train")))  # by tfds itself
    assert decoded["image"].shape == (256, 256, 3)


def test_pictures_went_through_the_papers_preprocessing(data_dir):
    """Shorter side to 256, the central square, by Pillow alone; JPEG of quality 95."""
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


def test_storage_is_shuffled_and_statistics_lie_beside(data_dir):
    train = open_source("imagenet2012_256", "train", data_dir=str(data_dir))
    labels = train.labels_of(np.arange(train.num_examples))
    assert sorted(labels) == sorted(label for label, _ in TRAIN.values())
    assert list(labels) != sorted(labels)
    stored = statistics.load(train.statistics_path)
    np.testing.assert_array_equal(
        stored.mean_image, statistics.compute(train).mean_image
    )
    assert stored.num_examples == len(TRAIN)
    left = {p.name for p in (data_dir / "imagenet2012_256").iterdir()}
    assert left == {"1.0.0", ".lock"}


def written(found: originals.Originals) -> list[tuple[str, tuple[int, bytes]]]:
    """What a worker writes of them, without the processes: name, label, JPEG."""
    rows = []
    for index in range(len(found)):
        name, label, data = found.read(index)
        picture = images.decode(data, 256, name)
        record = preparation._record(name, label, picture)
        feature = example_message().FromString(record).features.feature
        assert feature["file_name"].bytes_list.value == [name.encode()]
        assert feature["label"].int64_list.value == [label]
        rows.append((name, (label, feature["image"].bytes_list.value[0])))
    return rows


@pytest.mark.parametrize("flat", [True, False])
def test_class_folders_give_the_same_as_archives(data_dir, tmp_path, flat):
    found = originals.find(write_folders(tmp_path / "raw", flat))
    archived = [
        list(records(data_dir, split).items()) for split in ("train", "validation")
    ]
    for split, expected in zip(("train", "validation"), archived, strict=True):
        [part] = found[split].divided(1)
        assert written(part) == expected  # in the same order


@pytest.mark.parametrize("kind", ["array_record", "tfrecord"])
def test_a_prepared_tfds_imagenet2012_gives_the_same(data_dir, tmp_path, kind):
    folder = write_tfds(tmp_path / "imagenet2012" / "5.1.0", kind)
    for source in (tmp_path, folder):
        found = originals.find(source)
        assert dict(written(found["train"])) == records(data_dir, "train")
        assert len(found["validation"]) == NUM_VALIDATION
    shard = next(folder.glob("*train*"))
    shard.write_bytes(shard.read_bytes()[:-100])
    originals._reader.cache_clear()
    message = {"tfrecord": "is cut off at", "array_record": "cannot read .*#0 of"}
    with pytest.raises((DataError, OSError), match=message[kind]):
        originals.find(tmp_path)["train"].read(0)


def write_tfds(folder: Path, kind: str, train=TRAIN, validation=VALIDATION) -> Path:
    from array_record.python import array_record_module

    folder.mkdir(parents=True)
    labelled = {
        name: (get_wnids().index(classes.validation_wnid(name)), data)
        for name, data in validation.items()
    }
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name="imagenet2012", filetype_suffix=kind
    )
    infos = []
    for split, pictures in (("train", train), ("validation", labelled)):
        path = folder / f"imagenet2012-{split}.{kind}-00000-of-00001"
        packed = [example(*item) for item in pictures.items()]
        if kind == "tfrecord":
            with open(path, "wb") as file:  # checksums are nobody's concern here
                file.writelines(
                    struct.pack("<QI", len(record), 0) + record + b"0000"
                    for record in packed
                )
        else:
            writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
            for record in packed:
                writer.write(record)
            writer.close()
        infos.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[len(packed)],
                num_bytes=path.stat().st_size,
                filename_template=template.replace(split=split),
            )
        )
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features={
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(names=get_wnids()),
            "file_name": tfds.features.Text(),
        },
        split_infos=infos,
        filename_template=template,
        version="5.1.0",
        check_data=False,
    )
    return folder


def example(name: str, label_and_data: tuple[int, bytes]) -> bytes:
    label, data = label_and_data
    message = example_message()()
    message.features.feature["image"].bytes_list.value.append(data)
    message.features.feature["label"].int64_list.value.append(label)
    message.features.feature["file_name"].bytes_list.value.append(name.encode())
    return message.SerializeToString()


def test_a_second_start_has_nothing_to_do(archives, data_dir, tmp_path, capsys):
    before = {p: p.stat().st_mtime_ns for p in data_dir.rglob("*record*")}
    (data_dir / "imagenet2012_256" / "1.0.0" / "parts").mkdir()  # killed at the end
    assert run("imagenet", f"--source={archives}", f"--data_dir={data_dir}") == 0
    output = capsys.readouterr().out
    assert "is there already" in output and "train: 18 pictures" in output
    assert "WARNING: ILSVRC-2012 has 1,281,167" in output
    assert before == {p: p.stat().st_mtime_ns for p in data_dir.rglob("*record*")}
    assert not list(data_dir.rglob("parts"))
    # Tried with a few pictures, then given the real ones: that is not "there".
    assert run("imagenet", f"--source={tmp_path}", f"--data_dir={data_dir}") == 1
    assert f"made of {archives}, not of {tmp_path}" in capsys.readouterr().err


def test_the_papers_config_trains_on_it_as_it_stands(data_dir, tmp_path, monkeypatch):
    """But for its size: the source, the splits and the statistics are its own."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    config = paper.get_config()
    config.model.width, config.model.init = 1 / 16, "he"
    config.data.batch_size, config.max_steps = 8, 2
    train_and_evaluate(config, tmp_path)
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert last["eval/count"] == NUM_VALIDATION and last["step"] == 2
    kept = statistics.load(tmp_path / "statistics.npz")
    train = open_source("imagenet2012_256", "train")
    stored = statistics.load(statistics.statistics_path(train))
    np.testing.assert_array_equal(kept.mean_image, stored.mean_image)
    model, variables, _ = load(tmp_path)
    assert variables["params"]["fc8"]["bias"].shape == (1000,)
    assert model.network.columns == 2


# Faults.


def test_killed_and_started_again_it_makes_only_what_is_missing(tmp_path):
    rng = np.random.default_rng(0)
    large = simplejpeg.encode_jpeg(rng.integers(0, 256, (600, 800, 3), np.uint8))
    train = {
        f"{wnid}_{i}.JPEG": (label, large)
        for label, wnid in enumerate(WNIDS)
        for i in range(110)
    }
    source = write_archives(tmp_path / "source", train)  # five shards, and one
    unfinished = tmp_path / "imagenet2012_256" / "1.0.0.incomplete"
    command = [sys.executable, "-m", "alexnet_jax.prepare", "imagenet"]
    command += [f"--source={source}", f"--data_dir={tmp_path}", "--workers=1"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
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
    finished = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert "shards are done already" in finished.stdout
    directory = unfinished.with_name("1.0.0")
    for path, inode in shards.items():
        assert (directory / path.name).stat().st_ino == inode  # the same file
    assert set(records(tmp_path, "train")) == set(train)
    assert not unfinished.exists() and not list(directory.glob(".*"))


@pytest.fixture
def in_this_process(monkeypatch):
    """Shards are written here, so that a test can see and spoil it."""
    return write_shards_here(monkeypatch)


def write_shards_here(monkeypatch) -> list[str]:
    """The names of the shards that will have been written."""
    made = []

    def write(shards, workers, max_unreadable, log, bar):
        missing = [shard for shard in shards if not shard.is_done()]
        for shard in missing:
            preparation.write_shard(shard)
            made.append(shard.path.name)
        unreadable = [u for s in missing for u in s.result()["unreadable"]]
        preparation._check_unreadable(unreadable, max_unreadable)

    monkeypatch.setattr(preparation, "_write_shards", write)
    return made


def test_a_source_that_fails_for_a_moment_spoils_nothing(
    tmp_path, in_this_process, monkeypatch, capsys
):
    source = write_archives(tmp_path / "source")
    arguments = ("imagenet", f"--source={source}", f"--data_dir={tmp_path}")

    def unplug(*_):
        (source / "ILSVRC2012_img_train.tar").rename(source / "away")

    with monkeypatch.context() as patch:
        patch.setattr(preparation, "check_room", unplug)  # the last of the checks
        assert run(*arguments, "--max_unreadable=1000") == 1
    assert "cannot read n0" in capsys.readouterr().err
    (source / "away").rename(source / "ILSVRC2012_img_train.tar")
    assert run(*arguments, "--max_unreadable=0") == 0
    assert set(records(tmp_path, "train")) == set(TRAIN)


def test_a_mended_or_removed_picture_costs_one_shard(
    tmp_path, in_this_process, monkeypatch, capsys
):
    monkeypatch.setattr(preparation, "_FEWEST_PICTURES", 4)  # 18 make four shards
    source = write_folders(tmp_path / "source", flat=True)
    first, second = sorted(TRAIN)[:2]
    broken = source / "train" / WNIDS[0] / first
    whole = broken.read_bytes()
    broken.write_bytes(bytes(len(whole)))
    arguments = ("imagenet", f"--source={source}", f"--data_dir={tmp_path}")
    assert run(*arguments, "--max_unreadable=0") == 1
    assert "pictures that cannot be read: 1, " in capsys.readouterr().err
    assert len(in_this_process) == 6
    broken.write_bytes(whole)
    (source / "train" / WNIDS[0] / second).unlink()
    assert run(*arguments, "--max_unreadable=0") == 0
    assert len(in_this_process) <= 6 + 2
    assert set(records(tmp_path, "train")) == set(TRAIN) - {second}


def test_wrong_sources_are_one_message(tmp_path, capsys):
    assert run("imagenet", f"--data_dir={tmp_path}") == 1
    assert "--source is missing" in capsys.readouterr().err
    for source, found in (
        (tmp_path / "no", "does not exist"),
        (tmp_path, "found in"),
    ):
        assert run("imagenet", f"--source={source}", f"--data_dir={tmp_path}") == 1
        error = capsys.readouterr().err
        assert "no train split (ILSVRC2012_img_train.tar or train/)" in error
        assert found in error and "https://image-net.org/download-images" in error
    (tmp_path / "train" / "cat").mkdir(parents=True)
    (tmp_path / "train" / "cat" / "1.jpg").write_bytes(file_of(0))
    (tmp_path / "val").mkdir()
    assert run("imagenet", f"--source={tmp_path}", f"--data_dir={tmp_path}") == 1
    assert "configs/folder.py" in capsys.readouterr().err


def test_hugging_faces_names_say_the_class(tmp_path):
    for name, (label, data) in TRAIN.items():
        place_file(tmp_path / "train" / f"{name[:-5]}_{WNIDS[label]}.JPEG", data)
    for name, data in VALIDATION.items():
        wnid = classes.validation_wnid(name)
        place_file(tmp_path / "val" / f"{name[:-5]}_{wnid}.JPEG", data)
    found = originals.find(tmp_path)
    for index in range(len(TRAIN)):
        name, label, data = found["train"].read(index)
        assert TRAIN[f"{name.rpartition('_')[0]}.JPEG"] == (label, data)
    for index in range(NUM_VALIDATION):
        name, label, data = found["validation"].read(index)
        official = f"{name.rpartition('_')[0]}.JPEG"
        assert get_wnids()[label] == classes.validation_wnid(official)
        assert VALIDATION[official] == data
    place_file(tmp_path / "train" / "cat.JPEG", b"")
    with pytest.raises(
        DataError, match="cat.JPEG in .* is of class unknown, none of the"
    ):
        originals.find(tmp_path)


def place_file(path: Path, data: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)


def test_kaggles_layout_is_known(tmp_path):
    write_folders(tmp_path / "ILSVRC" / "Data" / "CLS-LOC", flat=True)
    assert len(originals.find(tmp_path)["train"]) == len(TRAIN)


def test_verify_compares_the_md5(archives, tmp_path, monkeypatch, capsys):
    arguments = ("imagenet", f"--source={archives}", f"--data_dir={tmp_path}")
    assert run(*arguments, "--verify") == 1
    error = capsys.readouterr().err
    assert originals.OFFICIAL_MD5["train"] in error and "packed again" in error
    path = archives / "ILSVRC2012_img_val.tar"
    read = []
    wrong = originals.md5_problem("validation", path, read.append)
    assert wrong and sum(read) == path.stat().st_size
    monkeypatch.setitem(
        originals.OFFICIAL_MD5, "validation", wrong.split()[4].strip(",")
    )
    assert originals.md5_problem("validation", path, read.append) is None


def test_a_log_file_gets_lines_instead_of_a_bar(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr("tqdm.std.time", lambda: now)
    with cli.progress("preparing", 1000, "pictures") as update:
        update(400)  # made by an earlier start
        for now in (30.0, 64.0, 100.0, 128.0):
            update(100)
    with cli.progress("checking", 5, "pictures") as update:
        update(5)  # within the minute
    out, err = capsys.readouterr()
    assert not out
    assert err.split("\n")[:2] == [
        "\rpreparing: 600/1000 pictures,  9.38 pictures/s, 00:42 left",
        "\rpreparing: 800/1000 pictures,  3.12 pictures/s, 01:04 left",
    ]
    assert "checking" not in err


# The checks.


class Labelled(Source):
    """A source of known labels; a picture is filled with its label, but for a white row."""

    image_size, description = 8, "labels"

    def __init__(self, labels, class_names=("a", "b", "c", "d")):
        self.labels = np.asarray(labels)
        self.num_examples = len(self.labels)
        self.class_names = class_names

    def labels_of(self, indices):
        return self.labels[indices]

    def fetch(self, indices, images, labels):
        labels[:] = self.labels[indices]
        images[...] = (80 * labels % 256).astype(np.uint8)[:, None, None, None]
        images[:, 0] = 255


def findings(train, evaluation=None, **options) -> dict[str, list[str]]:
    splits = [s for s in (train, evaluation) if s is not None]
    contents = [check.read_records(s, 2, lambda _: None) for s in splits]
    found: dict[str, list[str]] = {}
    for finding in check.examine(train, evaluation, *zip(*contents), **options):
        found.setdefault(finding.level, []).append(finding.text)
    return found


def test_label_entropy_is_shannons():
    assert check.label_entropy(np.array([[0, 0, 1, 1], [0, 0, 0, 0]])) == 0.5
    assert check.label_entropy(np.arange(128)[None]) == pytest.approx(7.0)


def test_a_good_data_set_passes():
    labels = np.random.default_rng(0).integers(0, 4, 1000)
    found = findings(Labelled(labels), Labelled(labels[:200]))
    assert "WRONG" not in found and len(found["ok"]) == 8
    assert any("order of storage: shuffled" in text for text in found["ok"])


def test_what_is_wrong_is_found():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 1000)
    found = findings(Labelled(np.sort(labels)))
    assert any("sorted by class" in text for text in found["note"])
    assert "WRONG" not in found  # training shuffles
    few = findings(Labelled(np.sort(labels[:12])))
    assert few["note"][:2] == [
        "shuffling: too few pictures to tell",
        "order of storage: too few pictures to tell",
    ]
    [text, *_] = findings(Labelled(np.full(100, 1)))["WRONG"]
    assert "every picture has the same label, b" in text
    [text] = findings(Labelled(rng.integers(0, 3, 300)))["WRONG"]
    assert "no pictures of d" in text
    [text] = findings(Labelled(labels), Labelled(labels, ("a", "b", "d", "e")))["WRONG"]
    assert "never trained: e" in text


@pytest.mark.parametrize("bits, level", [(8, "ok"), (12, "WRONG"), (14, "WRONG")])
def test_images_that_hardly_vary_are_found(bits, level):
    """Values of `bits` in 16, of which a reader has taken the upper 8."""

    class Deep(Labelled):
        image_size = 16

        def fetch(self, indices, images, labels):
            every_value = np.tile(np.arange(256, dtype=np.uint8), 3)
            outlier = indices[0] < 100  # of 300
            images[...] = every_value.reshape(16, 16, 3) >> (
                0 if outlier else -bits % 8
            )

    finding = check._pixel_values("train", Deep(np.arange(300) % 4))
    assert finding.level == level
    expected = {
        8: "an image spans 255 of 255 grey levels (median of 256)",
        12: "spans 15 of 255 grey levels (median of 256): the images hardly vary",
        14: "spans 63 of 255 grey levels (median of 256): the images hardly vary",
    }
    assert expected[bits] in finding.text


def image_folder(root: Path, **splits: dict[str, bytes]) -> list:
    """Sources of class folders, of files by "class/name"."""
    for split, files in splits.items():
        for name, data in files.items():
            (root / split / name).parent.mkdir(parents=True, exist_ok=True)
            (root / split / name).write_bytes(data)
    return [open_source(f"folder:{root}", split, image_size=8) for split in splits]


@pytest.mark.parametrize("copies, level", [(0, "ok"), (1, "note"), (2, "WRONG")])
def test_copies_of_training_images_are_found_by_content(tmp_path, copies, level):
    """Under other names, in another class; one in more than a hundred is a note."""
    train = {f"{'ab'[i % 2]}/{i}.jpg": file_of(i) for i in range(4)}
    evaluation = {f"{'ab'[i % 2]}/{i}.jpg": b"%d" % i for i in range(150)}
    for i in range(copies):
        evaluation[f"a/copy{i}.jpg"] = train["b/1.jpg"]
    splits = image_folder(tmp_path, train=train, val=evaluation)
    hashes = [check.read_records(s, 2, lambda _: None)[1] for s in splits]
    [finding] = check._in_both(*splits, hashes)
    assert finding.level == level
    if copies:
        assert finding.text.startswith(
            f"{copies} of {150 + copies} evaluation images are byte for byte training "
            f"images, for example {tmp_path}/val/a/copy0.jpg and {tmp_path}/train/b/1.jpg"
        )


def test_unshuffled_batches_are_found(monkeypatch):
    def in_order(count, *, batch_size, seed):
        return np.arange(count // batch_size * batch_size).reshape(-1, batch_size)

    monkeypatch.setattr(check, "TrainOrder", in_order)
    [text] = findings(Labelled(np.sort(np.arange(1000) % 4)))["WRONG"]
    assert "shuffling" in text


def test_imagenet_is_counted_and_its_order_checked():
    labels = np.arange(2000) % 1000
    shuffled = np.random.default_rng(0).permutation(labels)
    whole = Labelled(shuffled, get_wnids())
    [text] = findings(whole)["WRONG"]
    assert "train: 2,000 pictures, ILSVRC-2012 has 1,281,167" in text
    found = findings(whole, partial=True)
    assert "WRONG" not in found
    assert "0 is n01440764 (tench)" in found["ok"][0]
    own = findings(Labelled(labels % 2, get_wnids()[:2]), partial=True)
    assert "WRONG" not in own  # somebody's own folders, named by WNIDs
    swapped = (get_wnids()[1], get_wnids()[0], *get_wnids()[2:])
    wrong = findings(Labelled(shuffled, swapped), partial=True)["WRONG"]
    assert "class order" in wrong[0]


def test_statistics_of_other_data_are_found(data_dir, tmp_path):
    shutil.copytree(data_dir / "imagenet2012_256", tmp_path / "imagenet2012_256")
    train = open_source("imagenet2012_256", "train", data_dir=str(tmp_path))
    level = [f.level for f in check._statistics(train, False, 2)]
    assert level == ["ok"]
    stored = statistics.load(train.statistics_path)
    statistics.Statistics(
        stored.mean_image + 1, stored.pca_std_255, stored.pca_vectors, len(TRAIN)
    ).save(train.statistics_path)
    assert [f.level for f in check._statistics(train, False, 2)] == ["WRONG"]
    dataclasses.replace(stored, num_examples=60, split_examples=60).save(
        train.statistics_path
    )
    [finding] = check._statistics(train, False, 2)
    assert finding.level == "WRONG"
    assert "is of 60 images, the split has 18: training does not use it" in finding.text
    train.statistics_path.unlink()
    assert [f.level for f in check._statistics(train, False, 2)] == ["note"]


def test_check_command(data_dir, tmp_path, capsys):
    out = tmp_path / "sheet.png"
    arguments = ("check", f"--data_dir={data_dir}", f"--out={out}")
    assert run(*arguments) == 1
    output = capsys.readouterr().out
    assert "WRONG  train: 18 pictures, ILSVRC-2012 has 1,281,167" in output
    assert "no pictures of" in output  # 997 of the classes
    with Image.open(out) as picture:
        assert picture.format == "PNG" and picture.width > 1000
    for arguments, message in (
        (("check", f"--out={tmp_path}"), "must be a .png, .jpg or .pdf file"),
        (("check", f"--out={tmp_path / 'no' / 'x.png'}"), "in a folder that exists"),
        (("check", "--split="), "--split is empty"),
    ):
        assert run(*arguments, f"--data_dir={data_dir}") == 1
        assert message in capsys.readouterr().err


def test_contact_sheet_pairs_the_splits():
    train = Labelled(np.arange(8) % 4)
    evaluation = Labelled(np.array([3, 2, 1]))
    figure = contact_sheet(train, train.labels, evaluation, evaluation.labels)
    shown = [axis for axis in figure.axes if axis.get_images()]
    assert [axis.get_title() for axis in shown] == ["1  b", "2  c", "3  d"]
    for axis, label in zip(shown, (1, 2, 3), strict=True):
        pixels = np.asarray(axis.get_images()[0].get_array())
        assert (pixels[1:, :8] == 80 * label).all()
        assert (pixels[1:, -8:] == 80 * label).all()
    alone = contact_sheet(train, train.labels, num_classes=2)
    assert [a.get_title() for a in alone.axes if a.get_images()] == ["0  a", "2  c"]
