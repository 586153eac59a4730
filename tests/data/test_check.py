"""`prepare check`: every mistake is found, and a good data set passes."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from alexnet_jax import prepare
from alexnet_jax.analysis.figures import contact_sheet
from alexnet_jax.data import check, open_source, statistics
from alexnet_jax.data.imagenet import wnids
from alexnet_jax.data.sources import Source
from tests.data.imagenet_files import TRAIN, file_of


class Labelled(Source):
    """Yield known labels; an image holds its label, except for a white row."""

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
    splits = [s and check.read_split(s, 2, lambda _: None) for s in (train, evaluation)]
    found: dict[str, list[str]] = {}
    for finding in check.examine(*splits, **options):
        found.setdefault(finding.level, []).append(finding.text)
    return found


RANDOM = np.random.default_rng(0).integers(0, 4, 1000)


def test_label_entropy_is_shannon_entropy():
    assert check.label_entropy(np.array([[0, 0, 1, 1], [0, 0, 0, 0]])) == 0.5
    assert check.label_entropy(np.arange(128)[None]) == pytest.approx(7.0)


def test_good_data_set_passes():
    found = findings(Labelled(RANDOM), Labelled(RANDOM[:200]))
    assert "WRONG" not in found and len(found["ok"]) == 8
    assert any("order of storage: " in text for text in found["ok"])


def test_sorted_and_few_examples_are_noted():
    found = findings(Labelled(np.sort(RANDOM)))
    assert any("sorted by class" in text for text in found["note"])
    assert "WRONG" not in found  # training shuffles
    few = findings(Labelled(np.sort(RANDOM[:12])))
    assert "too few images to tell" in few["note"][0]


@pytest.mark.parametrize(
    "splits, words",
    [
        ([Labelled(np.full(100, 1))], "every image has the same label, b"),
        ([Labelled(RANDOM[RANDOM < 3])], "no images of d"),
        ([Labelled(RANDOM), Labelled(RANDOM, (*"abde",))], "never trained: e"),
    ],
)
def test_wrong_labels_are_found(splits, words):
    assert words in findings(*splits)["WRONG"][0]


def test_unshuffled_batches_are_found(monkeypatch):
    monkeypatch.setattr(check, "train_order", lambda count, seed: np.arange)
    [text] = findings(Labelled(np.sort(np.arange(1000) % 4)))["WRONG"]
    assert "shuffling" in text


@pytest.mark.parametrize(
    "bits, level, words",
    [
        (8, "ok", "an image spans 255 of 255 grey levels (median of 256)"),
        (12, "WRONG", "spans 15 of 255 grey levels (median of 256): the images hardly"),
        (14, "WRONG", "spans 63 of 255 grey levels (median of 256): the images hardly"),
    ],
)
def test_images_that_hardly_vary_are_found(bits, level, words):
    class Deep(Labelled):  # values of `bits` in 16, of which a reader kept the upper 8
        image_size = 16

        def fetch(self, indices, images, labels):
            every_value = np.tile(np.arange(256, dtype=np.uint8), 3)
            cut = 0 if indices[0] < 100 else -bits % 8  # the others are outliers
            images[...] = every_value.reshape(16, 16, 3) >> cut

    finding = check._pixel_values("train", Deep(np.arange(300) % 4))
    assert finding.level == level and words in finding.text


@pytest.mark.parametrize("copies, level", [(0, "ok"), (1, "note"), (2, "WRONG")])
def test_copies_of_training_images_are_found_by_content(tmp_path, copies, level):
    files = {f"train/{'ab'[i % 2]}/{i}.jpg": file_of(i) for i in range(4)}
    files |= {f"val/{'ab'[i % 2]}/{i}.jpg": b"%d" % i for i in range(150)}
    files |= {f"val/a/copy{i}.jpg": files["train/b/1.jpg"] for i in range(copies)}
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    splits = [
        check.read_split(open_source(f"folder:{tmp_path}", name, image_size=8), 2, lambda _: None)
        for name in ("train", "val")
    ]
    [finding] = check._in_both(*splits)
    assert finding.level == level
    assert finding.text.startswith(f"{copies} of {150 + copies} evaluation images are ")
    if copies:
        pair = f"{tmp_path}/val/a/copy0.jpg and {tmp_path}/train/b/1.jpg"
        assert f"training images, for example {pair}" in finding.text


def test_imagenet_is_counted_and_its_order_checked():
    labels = np.arange(2000) % 1000
    shuffled = np.random.default_rng(0).permutation(labels)
    whole = Labelled(shuffled, wnids())
    [text] = findings(whole)["WRONG"]
    assert "train: 2,000 images, ILSVRC-2012 has 1,281,167" in text
    found = findings(whole, partial=True)
    assert "WRONG" not in found
    assert "0 is n01440764 (tench)" in found["ok"][0]
    own = findings(Labelled(labels % 2, wnids()[:2]), partial=True)
    assert "WRONG" not in own  # folders of one's own, named by WNIDs
    swapped = (wnids()[1], wnids()[0], *wnids()[2:])
    wrong = findings(Labelled(shuffled, swapped), partial=True)["WRONG"]
    assert "class order" in wrong[0]


def test_statistics_of_other_data_are_found(data_dir, tmp_path):
    shutil.copytree(data_dir / "imagenet2012_256", tmp_path / "imagenet2012_256")
    train = open_source("imagenet2012_256", "train", data_dir=str(tmp_path))
    path = Path(train.statistics_path)

    def finding():
        [found] = check._statistics(train, False, 2)
        return found

    assert finding().level == "ok"
    stored = statistics.load(path)
    dataclasses.replace(stored, mean_image=stored.mean_image + 1).save(path)
    assert finding().level == "WRONG"
    dataclasses.replace(stored, num_examples=60, split_examples=60).save(path)
    assert finding().level == "WRONG"
    words = f"is of 60 images, the split has {len(TRAIN)}: training does not use it"
    assert words in finding().text
    path.unlink()
    assert finding().level == "note"


def test_command_draws_a_contact_sheet_and_exits_with_1(data_dir, tmp_path, capsys):
    out = tmp_path / "sheet.png"
    arguments = ["check", f"--data_dir={data_dir}"]
    assert prepare.main([*arguments, f"--out={out}"]) == 1
    output = capsys.readouterr().out
    assert "WRONG  train: 18 images, ILSVRC-2012 has 1,281,167" in output
    assert "no images of" in output  # 997 of the classes
    with Image.open(out) as sheet:
        assert sheet.format == "PNG" and sheet.width > 1000


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
