"""Pictures, sources, loader and statistics: values, order, errors."""

import contextlib
import io
import itertools
import os
import resource
import struct
import subprocess
import sys
import threading
import time
import types
import zlib
from pathlib import Path

import grain
import jax
import numpy as np
import pytest
import simplejpeg
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from etils import epath
from PIL import Image

from alexnet_jax import prepare
from alexnet_jax.analysis import features as features_lib
from alexnet_jax.data import (
    DataError,
    eval_batches,
    images,
    loader,
    match_classes,
    open_source,
    sources,
    statistics,
    train_batches,
    warnings_about,
)
from alexnet_jax.data.loader import TrainOrder

SIZE = 16
REPOSITORY = Path(__file__).parents[2]


def encoded(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def random_picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), np.uint8)


def deep_png(values: np.ndarray) -> bytes:
    """A PNG of uint16 [H, W, C], which Pillow writes of one channel only."""
    height, width, channels = values.shape
    color = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, 16, color, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body))
        + kind
        + body
        + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in parts
    )


def deep_tiff(values: np.ndarray, *, apart=False, white_is_zero=False) -> bytes:
    """A TIFF of uint16 [H, W, C], which Pillow writes of one channel only."""
    height, width, channels = values.shape
    strips = np.split(values, channels, axis=2) if apart else [values]
    size = strips[0].size * 2
    starts = [8 + i * size for i in range(len(strips))]
    places = struct.pack(f"<{2 * len(starts)}I", *starts, *[size] * len(starts))
    end = 8 + values.size * 2
    tags = {256: width, 257: height, 258: 16, 259: 1, 262: 2 if channels > 1 else 1}
    tags |= {273: end, 277: channels, 278: height, 279: end + len(places) // 2}
    tags |= {284: 1 + apart, 262: 0 if white_is_zero else tags[262]}
    if not apart:
        tags |= {273: 8, 279: size}
    entries = b"".join(
        struct.pack("<HHII", tag, 4, len(starts) if tag in (273, 279) else 1, tags[tag])
        for tag in sorted(tags)
    )
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    data = b"".join(strip.astype("<u2").tobytes() for strip in strips)
    return b"II*\0" + struct.pack("<I", end + len(places)) + data + places + directory


class NumberedSource(sources.Source):
    """Picture i is filled with i, its label is i; fails and waits on request."""

    image_size = 2
    class_names = ("a",)
    description = "numbers"

    def __init__(self, num_examples: int, broken: int = -1):
        self.num_examples = num_examples
        self.broken = broken

    def fetch(self, indices, images, labels):
        if self.broken in indices:
            raise ValueError(f"cannot decode picture_{self.broken}.jpg")
        time.sleep(0.001 * (int(indices[0]) % 3))  # threads end out of order
        images[...] = (indices % 256)[:, None, None, None]
        labels[:] = indices


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two classes, 5 + 4 training and 3 + 2 evaluation pictures, PNG (lossless)."""
    root = tmp_path_factory.mktemp("pictures")
    number = 0
    for split, counts in (("train", (5, 4)), ("val", (3, 2))):
        for name, count in zip(("école", "犬"), counts, strict=True):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                picture = Image.fromarray(random_picture(SIZE, SIZE, number))
                picture.save(root / split / name / f"{i}.PNG")
                number += 1
    return root


# Pictures.


def test_decode_lossless_modes():
    rgb = random_picture(SIZE, SIZE)
    grey = rgb[..., 0]
    grey_rgb = np.repeat(grey[..., None], 3, axis=2)
    deep = grey.astype(np.uint16) * 256 + 77
    alpha = np.concatenate([rgb, grey[..., None]], axis=2)
    palette = Image.fromarray(grey).convert("P")
    cases = {
        "rgb": (Image.fromarray(rgb), rgb),
        "grey": (Image.fromarray(grey), grey_rgb),
        "16 bits": (Image.fromarray(deep), grey_rgb),
        "alpha": (Image.fromarray(alpha), on_white(alpha)),
        "grey and opaque alpha": (Image.fromarray(grey_rgb).convert("LA"), None),
        "palette": (palette, grey_rgb),
        "dark": (Image.fromarray(grey // 64), grey_rgb // 64),
        "one bit": (Image.fromarray(grey > 127), (grey_rgb > 127) * np.uint8(255)),
    }
    for name, (picture, expected) in cases.items():
        result = images.decode(encoded(picture), SIZE, name)
        assert result.shape == (SIZE, SIZE, 3) and result.dtype == np.uint8
        if expected is not None:
            np.testing.assert_array_equal(result, expected, err_msg=name)


def on_white(rgba: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 4] -> uint8 [H, W, 3], composited in exact arithmetic."""
    color, alpha = rgba[..., :3].astype(int), rgba[..., 3:].astype(int)
    return ((color * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def test_transparent_pictures_are_composited_on_white(recwarn):
    rgba = np.zeros((SIZE, SIZE, 4), np.uint8)
    rgba[..., :3] = random_picture(SIZE, SIZE)
    rgba[..., 3] = np.arange(SIZE * SIZE).reshape(SIZE, SIZE)  # every alpha
    grey = np.repeat(rgba[..., :1], 3, axis=2)
    grey_alpha = np.concatenate([grey, rgba[..., 3:]], axis=2)
    palette = Image.fromarray(rgba[..., :3]).quantize(8)
    alphas = np.array([0, 255, 40, 80, 120, 160, 200, 240], np.uint8)
    indexed = np.asarray(palette)[..., None]
    palette_rgba = np.concatenate([palette.convert("RGB"), alphas[indexed]], axis=2)
    key = tuple(rgba[3, 4, :3].tolist())  # one colour is transparent
    keyed = rgba.copy()
    keyed[..., 3] = np.where((rgba[..., :3] == key).all(2), 0, 255)
    cases = {
        "RGBA": (encoded(Image.fromarray(rgba)), rgba),
        "WebP": (
            encoded(Image.fromarray(rgba), "WEBP", lossless=True, exact=True),
            rgba,
        ),
        "LA": (encoded(Image.fromarray(grey_alpha).convert("LA")), grey_alpha),
        "P": (encoded(palette, transparency=alphas.tobytes()), palette_rgba),
        "RGB": (encoded(Image.fromarray(rgba[..., :3]), transparency=key), keyed),
        "RGBA of 16 bits": (deep_png(rgba.astype(np.uint16) * 257), rgba),
    }
    for name, (data, expected) in cases.items():
        result = images.decode(data, SIZE, name).astype(int)
        assert np.abs(result - on_white(expected)).max() <= 1, name
        opaque, clear = expected[..., 3] == 255, expected[..., 3] == 0
        np.testing.assert_array_equal(result[opaque], expected[opaque, :3], name)
        assert clear.any() and (result[clear] == 255).all(), name
    array = images.load_picture(rgba, SIZE)
    np.testing.assert_array_equal(array, images.decode(cases["RGBA"][0], SIZE, "x"))
    assert not recwarn.list


def test_decode_jpeg_of_all_colour_spaces():
    smooth = np.zeros((SIZE, SIZE, 3), np.uint8)
    smooth[...] = (200, 100, 50)
    picture = Image.fromarray(smooth)
    for mode in ("RGB", "CMYK", "L"):
        converted = picture.convert(mode)
        data = encoded(converted, "JPEG", quality=95)
        result = images.decode(data, SIZE, mode)
        expected = np.asarray(converted.convert("RGB")).astype(int)
        assert np.abs(result - expected).max() <= 3, mode
    np.testing.assert_array_equal(result[..., 0], result[..., 2])  # grey stays grey


def test_jpeg_fast_path_is_libjpeg_turbos_decoder_in_the_callers_memory():
    data = simplejpeg.encode_jpeg(random_picture(SIZE, SIZE), quality=90)
    batch = np.zeros((3, SIZE, SIZE, 3), np.uint8)
    assert images.decode(data, SIZE, "x", batch[1]).base is batch
    np.testing.assert_array_equal(batch[1], simplejpeg.decode_jpeg(data))
    assert not batch[0].any() and not batch[2].any()


# How a camera stores an upright picture [H, W, 3]: EXIF's "0th row" and "0th column".
STORED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: upright[:, ::-1].transpose(1, 0, 2),
    7: lambda upright: upright[::-1, ::-1].transpose(1, 0, 2),
    8: lambda upright: upright[::-1].transpose(1, 0, 2),
}


def with_orientation(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(kind, orientation, tmp_path):
    smooth = np.zeros((SIZE, SIZE + 8, 3), np.uint8)  # JPEG keeps it but for rounding
    smooth[..., 0] = 10 * np.arange(SIZE + 8)
    smooth[..., 1] = 12 * np.arange(SIZE)[:, None]
    picture = Image.fromarray(np.ascontiguousarray(STORED[orientation](smooth)))
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95}}.get(kind, {})
    path = tmp_path / "train" / "a" / f"1.{kind.lower()}"
    path.parent.mkdir(parents=True)
    picture.save(path, kind, exif=with_orientation(orientation), **options)
    with Image.open(path) as opened:
        found = {"Pillow": images.load_picture(opened, SIZE)}
    # `predict` and `retrieve` read files by `features_lib.read`, an index its folder.
    [found["file"]] = features_lib.read([str(path)], SIZE)
    source = open_source(f"folder:{tmp_path}", "train", image_size=SIZE)
    found["folder"] = next(eval_batches(source, batch_size=1))["image"][0]
    tolerance = 8 if kind == "JPEG" else 0
    for door, result in found.items():
        difference = np.abs(result.astype(int) - smooth[:, 4:-4])
        assert difference.max() <= tolerance, door


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_ignored_unless_asked_for(kind):
    """ImageNet's published numbers were obtained without it."""
    picture = Image.fromarray(random_picture(SIZE, SIZE))
    turned = encoded(picture, kind, exif=with_orientation(6))
    np.testing.assert_array_equal(
        images.decode(turned, SIZE, "x"),
        images.decode(encoded(picture, kind), SIZE, "x"),
    )


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    "exif", [b"", b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01"]
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_is_ignored(kind, exif):
    picture = Image.fromarray(random_picture(SIZE, SIZE))
    data = encoded(picture, kind, exif=exif)
    expected = images.decode(encoded(picture, kind), SIZE, "x")
    np.testing.assert_array_equal(
        images.decode(data, SIZE, "x", upright=True), expected
    )


DEEP = {"PNG": deep_png, "TIFF": deep_tiff}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", DEEP)
@pytest.mark.parametrize("bits, factor", [(8, 256), (9, 64), (12, 16), (14, 4)])
def test_few_bits_stored_in_16_are_an_error(bits, factor, kind, channels, tmp_path):
    values = np.zeros((SIZE, SIZE, channels), np.uint16)
    values[3, 4] = largest = 2**bits - 1
    said = f"{largest:,}" if channels == 1 else f"below {2**bits:,}"
    path = tmp_path / "dark.png"
    path.write_bytes(DEEP[kind](values))
    with pytest.raises(DataError) as error:
        images.load_picture(path, SIZE)
    assert f"cannot decode {path} " in str(error.value)
    assert f"its largest value is {said} of 65,535: it would" in str(error.value)
    assert f"magick FILE -evaluate multiply {factor} NEW_FILE" in str(error.value)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", DEEP)
def test_16_bits_keep_the_upper_8(kind, channels):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2**16, (SIZE, SIZE, channels), np.uint16)
    result = images.decode(DEEP[kind](values), SIZE, "x")
    np.testing.assert_array_equal(result, np.broadcast_to(values >> 8, result.shape))
    # A dark picture, if there is one value that needs more than 14 bits; a black one.
    dark = np.zeros_like(values)
    dark[0, 0] = 2**14
    assert images.decode(DEEP[kind](dark), SIZE, "x").max() == 64
    if channels == 1:
        assert not images.decode(DEEP[kind](0 * dark), SIZE, "x").any()


@pytest.mark.parametrize(
    "values, layout, words",
    [
        (np.full((SIZE, SIZE, 3), 50_000), {"apart": True}, "channels stored apart"),
        (
            np.full((SIZE, SIZE, 1), 50_000),
            {"white_is_zero": True},
            "white stored as 0",
        ),
    ],
)
def test_16_bit_tiffs_that_pillow_reads_wrong_are_an_error(values, layout, words):
    data = deep_tiff(values.astype(np.uint16), **layout)
    with pytest.raises(
        DataError, match=f"more than 8 bits with {words}.*save it as PNG"
    ):
        images.decode(data, SIZE, "x")


def test_resize_shrinks_by_area_and_cuts_the_centre():
    # 4 x 6 to 2: scaled to 2 x 3 by averaging 2 x 2 blocks, columns 0 and 1 kept
    # (one pixel too many: it goes on the right).
    blocks = random_picture(2, 3).astype(int)
    blocks = blocks // 4 * 4
    picture = np.repeat(np.repeat(blocks, 2, axis=0), 2, axis=1)
    picture[:, ::2] += 2  # even, as Pillow rounds after each of its two passes
    result = images.resize_to_square(picture.astype(np.uint8), 2)
    np.testing.assert_array_equal(result, blocks[:, :2] + 1)


def test_resize_enlarges_bicubically():
    picture = random_picture(8, 12)
    expected = Image.fromarray(picture).resize((24, 16), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(
        images.resize_to_square(picture, 16), np.asarray(expected)[:, 4:20]
    )


def test_load_picture_takes_paths_pillow_and_arrays(tmp_path):
    picture = random_picture(SIZE, SIZE + 4)
    path = tmp_path / "a.png"
    Image.fromarray(picture).save(path)
    expected = picture[:, 2:-2]
    for given in (path, str(path), Image.fromarray(picture), picture):
        np.testing.assert_array_equal(images.load_picture(given, SIZE), expected)
    grey = images.load_picture(picture[..., 0], SIZE)
    np.testing.assert_array_equal(grey[..., 2], expected[..., 0])
    copy = images.load_picture(expected, SIZE)
    assert not np.shares_memory(copy, picture)
    with pytest.raises(ValueError, match=r"uint8 .* got float64 \[16, 20, 3\]"):
        images.load_picture(picture / 255.0, SIZE)
    with pytest.raises(FileNotFoundError):
        images.load_picture(tmp_path / "none.png", SIZE)


# Sources.


def test_folder_values_and_order(folder):
    source = open_source(f"folder:{folder}", "train", image_size=SIZE)
    assert source.class_names == ("école", "犬") and source.num_classes == 2
    assert source.num_examples == 9
    pictures = np.zeros((4, SIZE, SIZE, 3), np.uint8)
    labels = np.full(4, -1, np.int32)
    source.fetch(np.array([8, 0, 4, 5]), pictures, labels)
    assert labels.tolist() == [1, 0, 0, 1]
    for picture, number in zip(pictures, (8, 0, 4, 5), strict=True):
        np.testing.assert_array_equal(picture, random_picture(SIZE, SIZE, number))
    evaluation = open_source(f"folder:{folder}", "val", image_size=8)
    assert warnings_about(source, evaluation) == []
    paths = [statistics.statistics_path(split) for split in (source, evaluation)]
    assert paths == [folder / "statistics_16.npz", folder / "statistics_8_val.npz"]
    batch = next(eval_batches(evaluation, batch_size=5))
    expected = images.resize_to_square(random_picture(SIZE, SIZE, 12), 8)
    np.testing.assert_array_equal(batch["image"][3], expected)


def test_eval_folder_names_stand_for_each_other(folder, tmp_path):
    for split in ("test", "val", "validation"):
        source = open_source(f"folder:{folder}", split, image_size=SIZE)
        assert source.num_examples == 5 and "/val" in source.description
    for name in ("val", "validation"):
        (tmp_path / name / "a").mkdir(parents=True)
        (tmp_path / name / "a" / "1.jpg").touch()
    assert open_source(f"folder:{tmp_path}", "val").description.endswith("val")
    with pytest.raises(ValueError, match=r"no folder 'test' but val, validation"):
        open_source(f"folder:{tmp_path}", "test")


def test_folder_errors(tmp_path):
    def check(error, message):
        with pytest.raises(error, match=message):
            open_source(f"folder:{tmp_path / 'data'}", "train")

    check(
        FileNotFoundError, r"data does not exist.*train/<class>.*config\.data\.source"
    )
    (tmp_path / "data" / "n01").mkdir(parents=True)
    check(FileNotFoundError, r"no folder train in .*found in .*: n01")
    (tmp_path / "data" / "train").mkdir()
    (tmp_path / "data" / "train" / "1.jpg").touch()
    check(DataError, r"no class folders in .*train \(found there: 1\.jpg\)")
    with pytest.raises(ValueError, match=r"unknown data source '\./pictures'.*folder:"):
        open_source("./pictures", "train")


def place_pictures(root, *names):
    """Pictures of one colour each, the n-th of grey level 10 n."""
    for level, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (SIZE, SIZE), (10 * level,) * 3).save(root / name, "PNG")


def fetched(source, index):
    """The picture of an example."""
    picture = np.zeros((1, source.image_size, source.image_size, 3), np.uint8)
    source.fetch(np.array([index]), picture, np.zeros(1, np.int32))
    return picture[0]


def test_labels_are_matched_by_class_name(tmp_path):
    place_pictures(tmp_path, "test/b/1.png", "test/d/2.png")
    source = open_source(f"folder:{tmp_path}", "test", image_size=SIZE)
    assert match_classes(source, ["b", "d"]) is source
    lines = []
    matched = match_classes(source, ["d", "c", "b", "a"], log=lines.append)
    assert matched.class_names == ("d", "c", "b", "a") and matched.num_classes == 4
    assert matched.labels_of(np.arange(2)).tolist() == [2, 0]
    pictures, labels = np.zeros((2, SIZE, SIZE, 3), np.uint8), np.zeros(2, np.int32)
    matched.fetch(np.array([1, 0]), pictures, labels)
    assert labels.tolist() == [0, 2] and pictures[:, 0, 0, 0].tolist() == [10, 0]
    (line,) = lines
    assert line.startswith("WARNING: no images of 2 of the 4 trained classes: a, c (")
    match_classes(source, ["d", "b"], log=pytest.fail)
    for trained, words in (
        (
            ["a", "b", "c"],
            r"test has .* never trained: d; it lacks a, c \(2 .* 3 trained",
        ),
        (["b"], r"never trained: d \(2 classes there, 1 trained\)$"),
    ):
        with pytest.raises(DataError, match=words):
            match_classes(source, trained)


TINY = [
    "train/n01/images/n01_0.JPEG",
    "train/n02/images/n02_0.JPEG",
    "train/n02/images/n02_1.JPEG",
    "val/images/val_0.JPEG",
    "val/images/val_1.JPEG",
    "test/images/test_0.JPEG",
]


def test_tiny_imagenet_is_read_as_it_is_unpacked(tmp_path):
    place_pictures(tmp_path, *TINY)
    for wnid in ("n01", "n02"):
        (tmp_path / "train" / wnid / f"{wnid}_boxes.txt").write_text("n01_0.JPEG\t0")
    annotations = tmp_path / "val" / "val_annotations.txt"
    annotations.write_text("val_0.JPEG\tn02\t0\t0\t3\t3\nval_1.JPEG\tn01\t0\t0\t3\t3\n")
    train, val = (
        open_source(f"folder:{tmp_path}", split, image_size=SIZE)
        for split in ("train", "val")
    )
    assert train.class_names == val.class_names == ("n01", "n02")
    assert train.labels_of(np.arange(3)).tolist() == [0, 1, 1]
    assert [fetched(train, i)[0, 0, 0] for i in range(3)] == [0, 10, 20]
    assert [fetched(val, i)[0, 0, 0] for i in range(2)] == [40, 30]
    assert "n01/n01_boxes.txt" in train.left_out
    with pytest.raises(DataError, match=r"images have no classes: .*eval_split=val"):
        open_source(f"folder:{tmp_path}", "test")
    annotations.write_text("val_0.JPEG\tn02\t0\t0\t3\t3\n")
    with pytest.raises(DataError, match=r"1 of 2 pictures in .*images have no class: "):
        open_source(f"folder:{tmp_path}", "val")


def test_names_of_imagenet_say_the_class(tmp_path):
    """Hugging Face's, and the official ones: picture 1 is a sea snake, n01751748."""
    place_pictures(
        tmp_path,
        "train/n01440764_10026_n01440764.JPEG",
        "train/n01751748_7_n01751748.JPEG",
        "val/ILSVRC2012_val_00000001_n01751748.JPEG",
        "val/ILSVRC2012_val_00000999_n01440764.JPEG",
        "validation/ILSVRC2012_val_00000001.JPEG",
    )
    train, val, official = (
        open_source(f"folder:{tmp_path}", split, image_size=SIZE)
        for split in ("train", "val", "validation")
    )
    assert train.class_names == val.class_names == ("n01440764", "n01751748")
    assert [fetched(train, i)[0, 0, 0] for i in range(2)] == [0, 10]
    assert [fetched(val, i)[0, 0, 0] for i in range(2)] == [30, 20]
    assert val.labels_of(np.arange(2)).tolist() == [0, 1]
    assert official.class_names == ("n01751748",)
    place_pictures(tmp_path, "val/cat.png")
    with pytest.raises(DataError, match=r"1 of 3 pictures in .*val have no class: cat"):
        open_source(f"folder:{tmp_path}", "val")


def test_fake_source():
    train, evaluation = (open_source("fake", s, image_size=8) for s in ("train", "val"))
    assert (train.num_examples, evaluation.num_examples) == (1_281_167, 50_000)
    assert train.num_classes == 1000
    again = sources.FakeSource(image_size=8)
    one, two = (next(train_batches(s, batch_size=64, seed=3)) for s in (train, again))
    np.testing.assert_array_equal(one["image"], two["image"])
    np.testing.assert_array_equal(one["label"], two["label"])
    assert 120 < one["image"].mean() < 135 and len(np.unique(one["label"])) > 50


def test_missing_tfds_dataset_says_where_and_how(tmp_path, monkeypatch):
    (tmp_path / "mnist").mkdir()
    with pytest.raises(FileNotFoundError) as info:
        open_source("cifar10", "train", data_dir=str(tmp_path))
    message = str(info.value)
    assert f"in {tmp_path}" in message and "mnist" in message
    assert "download_and_prepare" in message and "alexnet_jax[tf]" in message
    assert "TFDS_DATA_DIR" in message and "array_record" in message
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError) as info:
        open_source("imagenet2012_256", "train")
    message, target = str(info.value), tmp_path / "elsewhere"
    assert "elsewhere does not exist" in message and "image-net.org" in message
    command = f"alexnet_jax.prepare imagenet --source=FOLDER --data_dir={target}"
    assert command in message


def test_a_data_set_of_more_files_than_may_be_open(tmp_path, monkeypatch):
    open_source("textures/tiny", "train", data_dir=str(tmp_path))
    raised = []
    monkeypatch.setattr(
        resource, "setrlimit", lambda kind, limits: raised.append(limits)
    )
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1024, 4096))
    open_source("textures/tiny", "train", data_dir=str(tmp_path))
    assert raised == [(1025, 4096)]  # it has one file


def write_tfds(data_dir: Path, features: dict, supervised_keys=None) -> None:
    """The tfds data set `own`, with one record that holds nothing."""
    directory = data_dir / "own" / "1.0.0"
    directory.mkdir(parents=True)
    path = directory / "own-train.array_record-00000-of-00001"
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    writer.write(b"1")
    writer.close()
    template = tfds.core.ShardedFileTemplate(
        data_dir=epath.Path(directory),
        dataset_name="own",
        filetype_suffix="array_record",
    )
    split = tfds.core.SplitInfo(
        name="train",
        shard_lengths=[1],
        num_bytes=1,
        filename_template=template.replace(split="train"),
    )
    tfds.folder_dataset.write_metadata(
        data_dir=directory,
        features=features,
        split_infos=[split],
        version="1.0.0",
        filename_template=template,
        check_data=False,
        supervised_keys=supervised_keys,
    )


IMAGE = tfds.features.Image(shape=(4, 4, 3))
LABEL = tfds.features.ClassLabel(names=["x", "y"])


@pytest.mark.parametrize(
    "features, message",
    [
        (
            {"image": tfds.features.Image(shape=(4, 4, 1), dtype=np.float32)},
            r"feature 'image' is an image of float32; only uint8 images, 0\.\.255, are",
        ),
        (
            {"image": tfds.features.Tensor(shape=(4, 4, 3), dtype=np.uint8)},
            r"has 0 features of type Image \(image: Tensor\(shape=\(4, 4, 3\), dtype=ui",
        ),
        (
            {"coarse": LABEL},
            r"2 features of type ClassLabel \(coarse: .*name it in supe",
        ),
    ],
)
def test_unusable_tfds_features_are_refused(features, message, tmp_path):
    write_tfds(tmp_path, {"image": IMAGE, "label": LABEL} | features)
    with pytest.raises(DataError, match=message):
        open_source("own", "train", data_dir=str(tmp_path))


def test_supervised_keys_choose_the_features(tmp_path):
    fine = tfds.features.ClassLabel(num_classes=5)
    features = {"image": IMAGE, "left": IMAGE, "label": LABEL, "fine": fine}
    write_tfds(tmp_path, features, supervised_keys=("left", "fine"))
    source = open_source("own", "train", data_dir=str(tmp_path))
    assert (source._image_key, source._label_key) == ("left", "fine")
    assert source.num_classes == 5


def test_overlapping_slices_are_counted(tmp_path):
    def shared(train, evaluation):
        splits = (train, evaluation)
        return sources.num_shared(
            *(open_source("textures/tiny", s, data_dir=str(tmp_path)) for s in splits)
        )

    assert shared("train[:90%]", "train[80%:]") == 20  # of 200
    assert shared("train[:90%]", "train[90%:]") == 0
    assert shared("train", "test") == 0
    assert shared("train+test", "test[:10]") == 10
    assert shared("train+train", "train") == 200


def test_two_names_of_a_folder_share_its_images(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    for i in range(3):
        (tmp_path / "train" / "a" / f"{i}.jpg").touch()
    (tmp_path / "val").symlink_to("train")
    train, evaluation = (open_source(f"folder:{tmp_path}", s) for s in ("train", "val"))
    assert sources.num_shared(train, evaluation) == 3
    one_class, of_evaluation, shared = warnings_about(train, evaluation)
    words = "WARNING: every training image looked at (3 of 3) is of one class, a. A low"
    assert one_class.startswith(words)
    assert "every evaluation image looked at (3 of 3) is of one class" in of_evaluation
    assert shared.startswith(
        "WARNING: 3 of 3 evaluation images are training images too"
    )


# Loader.


def test_order_is_a_function_of_seed_and_step():
    source = NumberedSource(10)

    def labels(start, count, **options):
        with train_batches(
            source, batch_size=4, seed=7, start_step=start, **options
        ) as batches:
            return np.stack([next(batches)["label"] for _ in range(count)])

    expected = labels(0, 10, workers=1)
    for workers in (2, 5):
        np.testing.assert_array_equal(labels(0, 10, workers=workers), expected)
    np.testing.assert_array_equal(labels(6, 4, prefetch=1), expected[6:])
    np.testing.assert_array_equal(labels(0, 10, positions=(1, 3)), expected[:, 1:3])
    # Batches run on over the ends of epochs: 40 labels are 4 epochs of 10.
    epochs = expected.reshape(4, 10)
    for epoch in epochs:
        assert sorted(epoch) == list(range(10))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    other = TrainOrder(10, batch_size=4, seed=8)
    assert (np.stack([other[s] for s in range(10)]) != expected).any()


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
@pytest.mark.parametrize("count", [1, 10, 1_281_167])
def test_order_is_grains(count, seed):
    order = TrainOrder(count, batch_size=7, seed=seed)
    whole = grain.MapDataset.range(count).seed(seed).shuffle().repeat().batch(7)
    last = count // 7  # its batch goes over the end of the epoch
    for step in (0, 1, last, last + 1):
        np.testing.assert_array_equal(order[step], whole[step])
    np.testing.assert_array_equal(order.examples(9, 12), whole[1][2:5])


@pytest.mark.parametrize("count", [1, 3])
def test_batch_larger_than_the_data_set(count):
    with train_batches(NumberedSource(count), batch_size=6, seed=0) as batches:
        labels = np.concatenate([next(batches)["label"] for _ in range(2)])
    assert np.bincount(labels).tolist() == [12 // count] * count


def test_train_batches_are_fresh_and_right():
    with train_batches(NumberedSource(50), batch_size=8, seed=0) as batches:
        seen = [next(batches) for _ in range(6)]
    for batch in seen:
        assert batch["image"].shape == (8, 2, 2, 3) and batch["image"].dtype == np.uint8
        assert batch["label"].dtype == np.int32 and set(batch) == {"image", "label"}
        np.testing.assert_array_equal(batch["image"][:, 1, 0, 2], batch["label"])
    for a, b in itertools.pairwise(seen):
        assert not np.shares_memory(a["image"], b["image"])


def test_memory_of_batches_is_used_again_but_never_while_something_looks_at_it():
    with train_batches(NumberedSource(50), batch_size=8, seed=0, prefetch=2) as batches:
        # A view of a view, JAX's arrays (which share the memory on CPU), whole batches.
        views = [next(batches)["image"][2:][:1] for _ in range(4)]
        arrays = [jax.device_put(next(batches)["image"]) for _ in range(4)]
        kept = [next(batches) for _ in range(4)]
        places = {next(batches)["image"].ctypes.data for _ in range(50)}
    order = TrainOrder(50, batch_size=8, seed=0)
    for step, view in enumerate(views):
        assert (view == order[step][2]).all()
    for step, array in enumerate(arrays, 4):
        np.testing.assert_array_equal(array[:, 0, 0, 0], order[step])
    for step, batch in enumerate(kept, 8):
        np.testing.assert_array_equal(batch["image"][:, 1, 1, 1], order[step])
    assert len(places) <= 4  # two read ahead, one handed out, one being taken
    assert all(place % 64 == 0 for place in places)


@pytest.mark.parametrize("batch_size", [1, 7, 10, 64])
@pytest.mark.parametrize("workers", [1, 3])
def test_eval_sees_every_example_once(batch_size, workers):
    seen, count = [], 0.0
    batches = eval_batches(NumberedSource(10), batch_size=batch_size, workers=workers)
    assert batches.num_batches == -(-10 // batch_size)
    for batch in batches:
        assert len(batch["image"]) == len(batch["label"]) == batch_size
        assert batch["mask"].dtype == np.float32
        real = batch["mask"] == 1
        seen += batch["label"][real].tolist()
        count += batch["mask"].sum()
        assert not batch["label"][~real].any() and not batch["image"][~real].any()
    assert seen == list(range(10)) and count == 10
    assert batches.step == batches.num_batches
    with pytest.raises(StopIteration):
        next(batches)


def test_eval_positions_of_two_processes_cover_the_split():
    halves = [
        list(eval_batches(NumberedSource(10), batch_size=8, positions=positions))
        for positions in ((0, 4), (4, 8))
    ]
    assert [len(half) for half in halves] == [2, 2]
    labels = [[b["label"][b["mask"] > 0].tolist() for b in half] for half in halves]
    assert labels == [[[0, 1, 2, 3], [8, 9]], [[4, 5, 6, 7], []]]


def test_worker_error_reaches_the_consumer_and_threads_end():
    before = threading.active_count()
    batches = train_batches(NumberedSource(10, broken=6), batch_size=4, seed=0)
    with pytest.raises(ValueError, match=r"picture_6\.jpg"):
        for _ in range(10):
            next(batches)
    with pytest.raises(RuntimeError, match="closed"):
        next(batches)
    batches = train_batches(NumberedSource(10), batch_size=4, seed=0, workers=3)
    next(batches)
    assert threading.active_count() > before
    batches.close()
    batches.close()
    batches = train_batches(NumberedSource(10), batch_size=4, seed=0)
    next(batches)
    del batches  # a forgotten iterator ends its threads too
    assert threading.active_count() == before


def test_reading_ahead_is_bounded_and_waiting_is_measured(monkeypatch):
    seconds, more = itertools.count(), threading.Event()
    now = 0

    class Slow(NumberedSource):
        fetched = 0

        def fetch(self, indices, images, labels):
            nonlocal now
            if Slow.fetched == 4:
                more.wait()
            now = next(seconds) + 1  # on the clock below
            super().fetch(indices, images, labels)
            Slow.fetched += 1

    clock = types.SimpleNamespace(perf_counter=lambda: now)
    monkeypatch.setattr(loader, "time", clock)
    batches = train_batches(Slow(100), batch_size=2, seed=0, workers=1, prefetch=3)
    with batches, contextlib.ExitStack() as ended:
        ended.callback(more.set)
        next(batches)
        while Slow.fetched < 4:  # one handed out, three ahead
            time.sleep(0.001)
        time.sleep(0.05)
        assert Slow.fetched == 4
        waited = batches.wait_seconds
        assert 1 <= waited <= 4  # for the first; the others may have come meanwhile
        next(batches)
        assert batches.wait_seconds == waited  # it lay ready


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0},
        {"workers": 0},
        {"prefetch": 0},
        {"seed": -1},
        {"start_step": -1},
        {"positions": (2, 6)},
        {"positions": (2, 2)},
    ],
)
def test_loader_arguments_are_checked(options):
    given = {"batch_size": 4, "seed": 0, **options}
    with pytest.raises(ValueError, match=next(iter(options))):
        train_batches(NumberedSource(10), **given)


# Statistics.


def test_statistics_are_numpys(folder, tmp_path):
    source = open_source(f"folder:{folder}", "train", image_size=SIZE)
    raw = np.stack([random_picture(SIZE, SIZE, i) for i in range(9)])
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


def test_statistics_of_a_subset_are_spread(folder):
    source = open_source(f"folder:{folder}", "train", image_size=SIZE)
    result = statistics.compute(source, max_examples=3)
    expected = np.mean([random_picture(SIZE, SIZE, i) for i in (0, 3, 6)], axis=0)
    assert (result.num_examples, result.split_examples) == (3, 9)
    assert result.extent == "3 of 9 images"
    np.testing.assert_allclose(result.mean_image, expected, rtol=1e-6)


def test_statistics_are_exact():
    images = np.random.default_rng(0).integers(0, 256, (3, 41, 40, 3), np.uint8)
    images[0] = 255  # the largest sums
    pixels = images.reshape(-1, 3).astype(np.int64)
    np.testing.assert_array_equal(statistics._products(images), pixels.T @ pixels)


def test_statistics_of_grey_pictures():
    class Grey(NumberedSource):
        def fetch(self, indices, images, labels):
            images[...] = (indices * 20)[:, None, None, None]

    result = statistics.compute(Grey(5))  # 0, 20 ... 80: variance 800 in each channel
    np.testing.assert_allclose(result.pca_std_255, [0, 0, np.sqrt(2400)], atol=1e-3)
    np.testing.assert_allclose(result.pca_vectors[:, 2], np.full(3, 3**-0.5), rtol=1e-6)


def test_broken_statistics_file(tmp_path):
    path = tmp_path / "s.npz"
    with pytest.raises(FileNotFoundError):
        statistics.load(path)
    path.write_bytes(b"PK broken")
    with pytest.raises(ValueError, match=r"s\.npz is not a statistics file.*prepare"):
        statistics.load(path)
    np.savez(path, mean_image=np.zeros(3))
    with pytest.raises(ValueError, match="pca_std_255"):
        statistics.load(path)


def test_prepare_statistics_command(folder, capsys):
    arguments = ["--image_size=16", "--split=val"]
    status = prepare.main(
        ["prepare", "statistics", f"--source=folder:{folder}", *arguments]
    )
    path = folder / "statistics_16_val.npz"
    assert status == 0 and str(path) in capsys.readouterr().out
    assert statistics.load(path).num_examples == 5
    path.unlink()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "the following arguments are required: command (--help shows all)"),
        (["more"], "invalid choice: 'more' (choose from"),
        (["statistics", "--workers=0"], "argument --workers: 0 is less than 1"),
        (["statistics"], "--source is missing"),
        (["statistics", "--sorce=x"], "unrecognized arguments: --sorce=x"),
        (["statistics", "--source=folder:/no/such"], "/no/such does not exist"),
        (["statistics", "--source=fake"], "no place"),
    ],
)
def test_prepare_errors_are_one_line(arguments, message, capsys):
    assert prepare.main(["prepare", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


# The whole, without TensorFlow.

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
for name in ("grain", "tensorflow_datasets"):
    assert name not in sys.modules, name + " is imported before it is used"
folder, data_dir = sys.argv[1:]
for source in (f"folder:{folder}", "textures/tiny", "fake"):
    train = open_source(source, "train", data_dir=data_dir, image_size=16)
    with train_batches(train, batch_size=4, seed=0) as batches:
        next(batches), next(batches)
    forgotten = train_batches(train, batch_size=4, seed=0)  # quiet at exit
    next(forgotten)
    if source != "fake":
        count = sum(b["mask"].sum() for b in eval_batches(train, batch_size=7))
        assert count == train.num_examples
        statistics.compute(train, max_examples=4)
assert "tensorflow" not in sys.modules
print("fine")
"""


def test_nothing_imports_tensorflow(folder, tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", _WITHOUT_TENSORFLOW, str(folder), str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "fine\n"
    assert "Exception" not in result.stderr


def test_files_of_the_same_name_are_told_apart():
    assert images.short_names(["a/1.png", "b/2.png"]) == ["1.png", "2.png"]
    assert images.short_names(["x/a/1.png", "b/1.png"]) == ["a/1.png", "b/1.png"]
    assert images.short_names([]) == []
