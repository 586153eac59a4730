"""Mean image and colour PCA: NumPy's numbers, and the command that stores them."""

import os

import numpy as np
import pytest
from PIL import Image

from alexnet_jax import prepare
from alexnet_jax.data import DataError, open_source, sources, statistics
from tests.data.images import SIZE, random_image


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write nine training images in two classes."""
    root = tmp_path_factory.mktemp("images")
    for i in range(9):
        path = root / "train" / "ab"[i // 5] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random_image(SIZE, SIZE, i)).save(path)
    return root


def test_statistics_equal_numpy(folder, tmp_path):
    source = open_source(f"folder:{folder}", "train", image_size=SIZE)
    raw = np.stack([random_image(SIZE, SIZE, i) for i in range(9)])
    seen = []
    result = statistics.compute(source, progress=seen.append)
    assert result.num_examples == sum(seen) == 9
    np.testing.assert_allclose(result.mean_image, raw.mean(axis=0), rtol=1e-6)
    covariance = np.cov(raw.reshape(-1, 3).T.astype(float), bias=True)
    vectors = result.pca_vectors.astype(float)
    assert (np.diff(result.pca_std_255) > 0).all()
    np.testing.assert_allclose(
        vectors @ np.diag(result.pca_std_255**2.0) @ vectors.T, covariance, atol=1e-2
    )
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=1e-6)
    one = statistics.compute(source, workers=1)
    np.testing.assert_array_equal(one.pca_vectors, result.pca_vectors)

    path = tmp_path / "statistics.npz"
    result.save(path)
    loaded = statistics.load(path)
    for name in ("mean_image", "pca_std_255", "pca_vectors"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(result, name))
        assert getattr(loaded, name).dtype == np.float32
    assert loaded.num_examples == loaded.split_examples == 9
    assert os.listdir(tmp_path) == ["statistics.npz"]  # no temporary file left


def test_subset_is_spread_over_the_split(folder):
    source = open_source(f"folder:{folder}", "train", image_size=SIZE)
    result = statistics.compute(source, max_examples=3)
    expected = np.mean([random_image(SIZE, SIZE, i) for i in (0, 3, 6)], axis=0)
    assert result.extent == "3 of 9 images"
    np.testing.assert_allclose(result.mean_image, expected, rtol=1e-6)


def test_sums_of_products_are_exact():
    images = np.random.default_rng(0).integers(0, 256, (3, 41, 40, 3), np.uint8)
    images[0] = 255  # the largest sums
    pixels = images.reshape(-1, 3).astype(np.int64)
    np.testing.assert_array_equal(statistics._products(images), pixels.T @ pixels)


def test_grey_images_have_one_component():
    class Grey(sources.Source):
        num_examples, image_size = 5, 2

        def fetch(self, indices, images, labels):
            images[...] = (indices * 20)[:, None, None, None]

    result = statistics.compute(Grey())  # 0, 20 ... 80: variance 800 in each channel
    np.testing.assert_allclose(result.pca_std_255, [0, 0, np.sqrt(2400)], atol=1e-3)
    np.testing.assert_allclose(result.pca_vectors[:, 2], np.full(3, 3**-0.5), rtol=1e-6)


def test_unusable_file_is_refused(tmp_path):
    path = tmp_path / "s.npz"
    with pytest.raises(FileNotFoundError):
        statistics.load(path)
    path.write_bytes(b"PK broken")
    with pytest.raises(DataError, match=r"s\.npz is not a statistics file.*prepare"):
        statistics.load(path)
    np.savez(path, mean_image=np.zeros(3))
    with pytest.raises(DataError, match="pca_std_255"):
        statistics.load(path)
    mean, vectors = np.zeros((8, 8, 3), np.float32), np.eye(3, dtype=np.float32)
    statistics.Statistics(mean, vectors[0], vectors, 7, 7).save(path)
    assert statistics.load(path, 8).num_examples == 7
    with pytest.raises(DataError, match="is 8 x 8 pixels, the images here are 9 x 9"):
        statistics.load(path, 9)


def test_command_stores_statistics_beside_the_data(folder, capsys):
    (folder / "val").symlink_to("train")
    arguments = ["--image_size=16", "--split=val", f"--source=folder:{folder}"]
    assert prepare.main(["statistics", *arguments]) == 0
    path = folder / "statistics_16_val.npz"
    assert str(path) in capsys.readouterr().out
    assert statistics.load(path).num_examples == 9


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "the following arguments are required: command (--help shows all)"),
        (["more"], "invalid choice: 'more' (choose from"),
        (["statistics", "--workers=0"], "argument --workers: 0 must be at least 1"),
        (["statistics"], "--source is missing"),
        (["statistics", "--sorce=x"], "unrecognized arguments: --sorce=x"),
        (["statistics", "--source=folder:/no/such"], "/no/such does not exist"),
        (["statistics", "--source=fake"], "no folder to keep"),
        (["check", "--out=x"], "must be a .png, .jpg or .pdf file"),
    ],
)
def test_mistakes_on_the_command_line_give_one_message(arguments, message, capsys):
    assert prepare.main([*arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
