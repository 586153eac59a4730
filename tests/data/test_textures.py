"""The textures data set: contents, equal builds, and baselines that must fail on it."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from alexnet_jax.data import eval_batches, open_source
from alexnet_jax.data.textures import CLASS_NAMES, build, draw
from alexnet_jax.data.textures import textures_dataset_builder as module
from benchmarks.speed import texture_baselines as baselines
from tests.data.images import fetched

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def drawn() -> tuple[np.ndarray, np.ndarray]:
    """Return 1,200 images, classes in turn, and their labels."""
    labels = np.arange(1200) % 10
    images = [draw(i % 10, np.random.default_rng((5, i))) for i in range(1200)]
    # Every second pixel: colours stay exact, and 1,200 images take 59 MB.
    return np.stack([image[::2, ::2] for image in images]), labels


def test_image_is_a_function_of_class_and_generator():
    one = draw(3, np.random.default_rng(1))
    assert one.shape == (256, 256, 3) and one.dtype == np.uint8
    np.testing.assert_array_equal(one, draw(3, np.random.default_rng(1)))
    assert (one != draw(3, np.random.default_rng(2))).mean() > 0.5


@pytest.mark.parametrize("label", range(10), ids=CLASS_NAMES)
def test_two_colours_share_the_area_equally(label):
    for i in range(4):
        image = draw(label, np.random.default_rng((7, i))).astype(float)
        # Along the line from one colour to the other, brightness has two heaps.
        axis = np.linalg.svd(
            image.reshape(-1, 3)[::64] - image.mean(axis=(0, 1)), full_matrices=False
        )[2][0]
        values = image @ axis
        low, high = np.quantile(values, [0.1, 0.9])
        share = np.mean(values > (low + high) / 2)
        assert abs(share - 0.5) < 0.05
        edge = np.abs(values - (low + high) / 2) < (high - low) / 6
        assert edge.mean() < 0.2  # soft edges are thin


BASELINES = {
    "linear": (baselines.linear_error, lambda images: baselines.pixel_features(images, 16)),
    "color": (baselines.color_error, baselines.color_features),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BASELINES)
def test_colour_and_linear_baselines_fail(name, drawn):
    error, features_of = BASELINES[name]
    images, labels = drawn
    features = features_of(images)
    # Chance is 0.9. The baselines may choose their settings on the test images.
    assert error(features[:900], labels[:900], features[900:], labels[900:]) >= 0.75
    # The baselines do find classes that differ in colour.
    rng, labels = np.random.default_rng(0), np.arange(300) % 3
    coloured = rng.integers(0, 200, (300, 16, 16, 3), np.uint8)
    coloured[np.arange(300), ..., labels] += 55  # class 0 is reddish, and so on
    features = features_of(coloured)
    assert error(features[:200], labels[:200], features[200:], labels[200:]) < 0.1


@pytest.mark.slow
def test_no_class_mirrors_another(drawn):
    """Check that the nearest power spectrum, which ignores phase, mostly has the same class."""
    images, labels = drawn
    grey = images.mean(axis=3, dtype=np.float32)[:, :128, :128]
    grey -= grey.mean(axis=(1, 2), keepdims=True)

    def spectrum(grey):
        power = np.abs(np.fft.rfft2(grey * np.hanning(128)[:, None] * np.hanning(128)))
        power = power[:, np.r_[0:32, -32:0], :32].reshape(-1, 32, 2, 16, 2)
        features = np.sqrt(power.mean(axis=(2, 4))).reshape(len(grey), -1)
        return features / np.linalg.norm(features, axis=1, keepdims=True)

    train = spectrum(grey[:900])
    train = np.concatenate([train, spectrum(grey[:900, :, ::-1])])
    for view in (grey[900:], grey[900:, :, ::-1]):
        nearest = (spectrum(view) @ train.T).argmax(axis=1) % 900
        assert np.mean(labels[nearest] != labels[900:]) < 0.5


def test_splits_hold_the_drawn_images(tiny):
    train, test = (
        open_source("textures/tiny", split, data_dir=str(tiny)) for split in ("train", "test")
    )
    assert (train.num_examples, test.num_examples) == (200, 100)
    assert train.class_names == test.class_names == CLASS_NAMES
    batch = next(eval_batches(train, batch_size=20))
    assert batch["label"].tolist() == [*range(10), *range(10)]
    for i in (0, 13):
        original = draw(i % 10, np.random.default_rng((2012, 0, i))).astype(int)
        assert np.abs(batch["image"][i] - original).mean() < 15  # JPEG
    assert not np.array_equal(batch["image"][0], fetched(test, 0))
    full = module.TexturesConfig("x")
    assert (full.train_examples, full.test_examples) == (4000, 1000)


def test_slices_sizes_and_names(tiny):
    def opened(split, image_size=256):
        return open_source("textures/tiny", split, data_dir=str(tiny), image_size=image_size)

    source = opened("train[:90%]")
    assert source.num_examples == 180
    name = "textures/tiny/1.0.0/statistics_256_train%5B%3A90%25%5D.npz"
    assert source.statistics_path == tiny / name
    small = fetched(opened("train[90%:]", 64), 0)
    cells = fetched(opened("train"), 180).reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
    assert np.abs(small - cells).max() <= 1.5  # Pillow rounds after each pass
    for name in ("textures/tiny:1.0.0", "textures/tiny:1.*.*", "textures:1.0.0"):
        # With a single config its name may be left out.
        assert open_source(name, "test", data_dir=str(tiny)).num_examples == 100
    with pytest.raises(FileNotFoundError, match=r"found in .*tiny: 1\.0\.0"):
        open_source("textures/tiny:2.0.0", "test", data_dir=str(tiny))


@pytest.mark.parametrize(
    "split, words",
    [
        ("val", "Unknown split"),
        ("train[:x]", "Error parsing"),
        ("train[300:]", "incompatible with 200"),
        ("train[51:50]", r"the slice train\[51:50\] is empty"),  # tfds's end is 200
        ("train+test[3:2]", r"the slice test\[3:2\] is empty"),
    ],
)
def test_wrong_split_gives_one_message(split, words, tiny):
    match = rf"cannot read split .*{words}.*its splits: test, train"
    with pytest.raises(ValueError, match=match):
        open_source("textures/tiny", split, data_dir=str(tiny))


def digest(data_dir: Path) -> dict[str, str]:
    files = sorted((data_dir / "textures").rglob("*array_record*"))
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_two_builds_write_the_same_bytes(tiny, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(os, "cpu_count", lambda: 5)  # another number of threads
    build(tmp_path, tiny=True)
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("WARNING:absl")]
    assert out == "" and len(lines) == 2
    assert str(tmp_path) in lines[0] and "ready" in lines[1]
    before = digest(tiny)
    assert digest(tmp_path) == before and len(before) == 2
    assert build(tiny, tiny=True) == "textures/tiny:1.0.0"  # is there: nothing to do
    assert capfd.readouterr() == ("", "") and digest(tiny) == before


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
