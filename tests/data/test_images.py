"""Decoding and resizing: pixel values, orientation, bit depth and errors."""

import numpy as np
import pytest
import simplejpeg
from PIL import Image, PngImagePlugin

from alexnet_jax.data import DataError, eval_batches, images, open_source
from alexnet_jax.data.sources.folder import FolderSource
from tests.data.pictures import SIZE, deep_png, deep_tiff, encoded, fetched, random_picture

RGB = random_picture(SIZE, SIZE)
GREY = RGB[..., 0]
GREY_RGB = np.repeat(GREY[..., None], 3, axis=2)


@pytest.mark.parametrize(
    "image, expected",
    [
        (Image.fromarray(RGB), RGB),
        (Image.fromarray(GREY), GREY_RGB),
        (Image.fromarray(GREY.astype(np.uint16) * 256 + 77), GREY_RGB),
        (Image.fromarray(GREY).convert("P"), GREY_RGB),
        (Image.fromarray(GREY // 64), GREY_RGB // 64),
        (Image.fromarray(GREY > 127), (GREY_RGB > 127) * np.uint8(255)),
    ],
    ids=["rgb", "grey", "16 bits", "palette", "dark", "one bit"],
)
def test_lossless_modes(image, expected):
    result = images.decode(encoded(image), SIZE, "x")
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result, expected)


def on_white(rgba: np.ndarray) -> np.ndarray:
    """Composite uint8 [H, W, 4] in exact arithmetic; uint8 [H, W, 3]."""
    color, alpha = rgba[..., :3].astype(int), rgba[..., 3:].astype(int)
    return ((color * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def test_transparent_pixels_are_composited_on_white(recwarn):
    rgba = np.zeros((SIZE, SIZE, 4), np.uint8)
    rgba[..., :3] = RGB
    rgba[..., 3] = np.arange(SIZE * SIZE).reshape(SIZE, SIZE)  # every alpha
    grey_alpha = np.concatenate([GREY_RGB, rgba[..., 3:]], axis=2)
    palette = Image.fromarray(RGB).quantize(8)
    alphas = np.array([0, 255, 40, 80, 120, 160, 200, 240], np.uint8)
    indexed = np.asarray(palette)[..., None]
    palette_rgba = np.concatenate([palette.convert("RGB"), alphas[indexed]], axis=2)
    key = tuple(RGB[3, 4].tolist())  # one colour is transparent
    keyed = rgba.copy()
    keyed[..., 3] = np.where((RGB == key).all(2), 0, 255)
    webp = encoded(Image.fromarray(rgba), "WEBP", lossless=True, exact=True)
    cases = {
        "RGBA": (encoded(Image.fromarray(rgba)), rgba),
        "WebP": (webp, rgba),
        "LA": (encoded(Image.fromarray(grey_alpha).convert("LA")), grey_alpha),
        "P": (encoded(palette, transparency=alphas.tobytes()), palette_rgba),
        "RGB": (encoded(Image.fromarray(RGB), transparency=key), keyed),
        "RGBA of 16 bits": (deep_png(rgba.astype(np.uint16) * 257), rgba),
    }
    for name, (data, expected) in cases.items():
        result = images.decode(data, SIZE, name).astype(int)
        assert np.abs(result - on_white(expected)).max() <= 1, name
        opaque, clear = expected[..., 3] == 255, expected[..., 3] == 0
        np.testing.assert_array_equal(result[opaque], expected[opaque, :3], name)
        assert clear.any() and (result[clear] == 255).all(), name
    assert not recwarn.list


@pytest.mark.parametrize("mode", ["RGB", "CMYK", "L"])
def test_jpeg_of_every_colour_space(mode):
    converted = Image.new("RGB", (SIZE, SIZE), (200, 100, 50)).convert(mode)
    result = images.decode(encoded(converted, "JPEG", quality=95), SIZE, mode)
    expected = np.asarray(converted.convert("RGB")).astype(int)
    assert np.abs(result - expected).max() <= 3


def test_jpeg_is_decoded_by_libjpeg_turbo_into_the_callers_memory():
    data = simplejpeg.encode_jpeg(RGB, quality=90)
    batch = np.zeros((3, SIZE, SIZE, 3), np.uint8)
    assert images.decode(data, SIZE, "x", batch[1]).base is batch
    np.testing.assert_array_equal(batch[1], simplejpeg.decode_jpeg(data))
    assert not batch[0].any() and not batch[2].any()


# Stored pixels per EXIF orientation of an upright image [H, W, 3].
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
    found = {"file": images.load_image(path, SIZE)}
    with Image.open(path) as opened:
        found["Pillow"] = images.load_image(opened, SIZE)
    source = open_source(f"folder:{tmp_path}", "train", image_size=SIZE)
    found["folder"] = next(eval_batches(source, batch_size=1))["image"][0]
    for way, result in found.items():
        difference = np.abs(result.astype(int) - smooth[:, 4:-4])
        assert difference.max() <= (8 if kind == "JPEG" else 0), way


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_is_ignored_unless_asked_for_or_if_damaged(kind):
    """ImageNet's published numbers were obtained without it."""
    picture = Image.fromarray(RGB)
    expected = images.decode(encoded(picture, kind), SIZE, "x")
    turned = encoded(picture, kind, exif=with_orientation(6))
    np.testing.assert_array_equal(images.decode(turned, SIZE, "x"), expected)
    damaged = encoded(picture, kind, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01")
    found = images.decode(damaged, SIZE, "x", upright=True)
    np.testing.assert_array_equal(found, expected)


DEEP = {"PNG": deep_png, "TIFF": deep_tiff}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", DEEP)
@pytest.mark.parametrize("bits, factor", [(8, 256), (9, 64), (12, 16), (14, 4)])
def test_few_bits_stored_in_16_are_an_error(bits, factor, kind, channels):
    values = np.zeros((SIZE, SIZE, channels), np.uint16)
    values[3, 4] = largest = 2**bits - 1
    with pytest.raises(DataError, match=r"cannot decode dark\.png") as error:
        images.decode(DEEP[kind](values), SIZE, "dark.png")
    assert f"its values are at most {largest:,} of 65,535: it would" in str(error.value)
    assert f"magick FILE -evaluate multiply {factor} NEW_FILE" in str(error.value)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", DEEP)
def test_16_bits_keep_the_upper_8(kind, channels):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2**16, (SIZE, SIZE, channels), np.uint16)
    result = images.decode(DEEP[kind](values), SIZE, "x")
    np.testing.assert_array_equal(result, np.broadcast_to(values >> 8, result.shape))
    # A dark image, if one value needs more than 14 bits; a black one.
    dark = np.zeros_like(values)
    dark[0, 0] = 2**14
    assert images.decode(DEEP[kind](dark), SIZE, "x").max() == 64
    if channels == 1:
        assert not images.decode(DEEP[kind](0 * dark), SIZE, "x").any()


def test_16_bit_tiffs_that_pillow_misreads_are_an_error():
    for channels, layout in ((3, {"apart": True}), (1, {"white_is_zero": True})):
        data = deep_tiff(np.full((SIZE, SIZE, channels), 50_000, np.uint16), **layout)
        with pytest.raises(DataError, match=r"more than 8 bits .*; save it as PNG"):
            images.decode(data, SIZE, "x")


def test_resize_shrinks_by_area_and_cuts_the_centre():
    # 4 x 6 to 2: scaled to 2 x 3 by averaging 2 x 2 blocks, columns 0 and 1 kept
    # (one pixel too many: it goes on the right).
    blocks = random_picture(2, 3).astype(int) // 4 * 4
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
    path, expected = tmp_path / "a.png", picture[:, 2:-2]
    Image.fromarray(picture).save(path)
    for given in (path, str(path), Image.fromarray(picture), picture):
        np.testing.assert_array_equal(images.load_image(given, SIZE), expected)
    grey = images.load_image(picture[..., 0], SIZE)
    np.testing.assert_array_equal(grey[..., 2], expected[..., 0])
    assert not np.shares_memory(images.load_image(expected, SIZE), picture)
    with pytest.raises(ValueError, match=r"uint8 .* got float64 \[16, 20, 3\]"):
        images.load_image(picture / 255.0, SIZE)


# Files of every kind, and broken ones.


def cut(kind: str) -> bytes:
    whole = encoded(Image.fromarray(random_picture(40, 40)), kind)
    return whole[: len(whole) // 2]


def with_much_text() -> bytes:
    """More than Pillow's 1 MB, and a colour profile of as much."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt("comment", "x" * 3_000_000, zip=True)
    return encoded(PLAIN, "PNG", pnginfo=info, icc_profile=bytes(3_000_000))


PLAIN = Image.new("RGB", (30, 20), (200, 100, 50))
# An image file, and its one colour or words of its error.
FILES = {
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
    "zero bytes": (b"", "it is damaged or no image"),
    "HTML": (b"<!DOCTYPE html>", "begins with b'<!DOCTYP'"),
    "a program for Ghostscript": (b"%!PS-Adobe-3.0 EPSF", "begins with b'%!PS-Ado'"),
    "90 megapixels": (
        encoded(Image.new("L", (10_000, 9_000)), "JPEG"),
        f"10,000 x 9,000, more than {images.MAX_PIXELS:,} pixels; make it smaller",
    ),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("data, expected", FILES.values(), ids=FILES)
def test_file_is_read_right_or_refused(data, expected, tmp_path):
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
    assert expected in message
    assert message.endswith("Replace it by an intact copy or take it out")


@pytest.mark.parametrize("suffix", images.IMAGE_SUFFIXES)
def test_every_readable_format_is_read_from_folders(suffix, tmp_path):
    path = tmp_path / "train" / "a" / f"1{suffix.upper()}"
    path.parent.mkdir(parents=True)
    mode = {".pbm": "1", ".pgm": "L"}.get(suffix, "RGB")
    Image.new(mode, (9, 9), 255 if mode != "RGB" else (255, 255, 255)).save(path)
    assert (fetched(FolderSource(tmp_path, "train", 8), 0) > 250).all()


def test_files_of_the_same_name_are_told_apart():
    assert images.short_names(["a/1.png", "b/2.png"]) == ["1.png", "2.png"]
    assert images.short_names(["x/a/1.png", "b/1.png"]) == ["a/1.png", "b/1.png"]
    assert images.short_names([]) == []
