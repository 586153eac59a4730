"""Decoding and resizing on the host: any picture file to uint8 RGB [S, S, 3].

The resize is the one the 2012 pictures went through: the shorter side to S, then
the central S x S (Krizhevsky et al. 2012, section 2; cuda-convnet2's make-data
shrinks by pixel area and enlarges by cubic interpolation). Every picture becomes
RGB: about twenty ImageNet files are CMYK, one is a PNG. Transparent pixels are composited
on white. EXIF orientation is applied to the user's own files (`upright`), but not to
ImageNet: its published numbers were obtained without it. An animation is read as its
first frame.
"""

import contextlib
import functools
import io
import os
import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import (
    ExifTags,
    Image,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
)

from alexnet_jax.data.errors import DataError

# Pillow's own bound, above which it warns: 256 MiB as RGB.
MAX_PIXELS = 89_478_485
# The formats that are read, and the suffixes of their files. Of Pillow's other formats
# some start a program (EPS).
_FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "AVIF": (".avif",),
}
PICTURE_SUFFIXES = tuple(suffix for names in _FORMATS.values() for suffix in names)
TAKE_OUT = "Replace the file by an intact copy or take it out of the data set"
_JPEG_START = b"\xff\xd8"
_BITS, _PHOTOMETRIC = 258, 262  # numbers of a TIFF's tags
# Pillow's names of layouts of 16 bits a channel, of which it keeps the upper 8.
_REDUCED = re.compile(r"(LA|RGB[AaX]?);16[BLN]")
# EXIF orientation -> the turn that sets it upright; 1 is upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# libjpeg converts these to RGB by itself; CMYK and YCCK go through Pillow.
_JPEG_COLORS = ("YCbCr", "RGB", "Gray")


def decode(
    data: bytes,
    size: int,
    name: str,
    out: np.ndarray | None = None,
    *,
    upright: bool = False,
    remedy: str = TAKE_OUT,
) -> np.ndarray:
    """Decodes one picture file to RGB, resized and cut to a square.

    Args:
      data: the whole file: JPEG, PNG, WebP, BMP, GIF, TIFF, PPM or AVIF, whatever it is
        called.
      size: side S of the result in pixels.
      name: file or record, for the error message.
      out: where to write, uint8 [S, S, 3], C-contiguous; allocated when absent.
      upright: turn it as its EXIF orientation says. (Pillow turns every TIFF.)
      remedy: what to do about a broken one, for the error message.

    Returns:
      `out`: uint8 [S, S, 3], 0..255.

    Raises:
      DataError: (a ValueError) the picture is broken, too large, or has less than 15
        bits stored in 16; the message says which one, and why.
    """
    if out is None:
        out = np.empty((size, size, 3), np.uint8)
    with _naming(f"{name} ({len(data)} bytes)", remedy):
        if not _decode_plain_jpeg(data, size, out, upright=upright):
            with _open(data) as picture:
                out[...] = _square(picture, size, upright=upright)
    return out


@contextlib.contextmanager
def _naming(name: str, remedy: str) -> Iterator[None]:
    """Raise what goes wrong in decoding as a DataError with its name and what to do."""
    try:
        yield
    except MemoryError:  # not the picture's fault: `prepare` must not leave it out
        raise
    except Exception as error:  # Pillow also lets zlib's, struct's ... errors through
        reason = str(error).rstrip(".") or type(error).__name__
        remedy = f". {remedy}." if remedy else ""
        raise DataError(f"cannot decode {name}: {reason}{remedy}") from error


@functools.cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def _open(data: bytes) -> Image.Image:
    """Read the header only."""
    # Pillow refuses intact files with more than 1 MB of compressed text or colour profile.
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**28
    try:
        return Image.open(io.BytesIO(data), formats=_formats())
    except UnidentifiedImageError:  # Pillow names a buffer at an address
        raise ValueError(
            f"it is damaged or no picture ({', '.join(_formats())}); it begins with "
            f"{data[:8]!r}"
        ) from None


def _check_tiff(picture: TiffImagePlugin.TiffImageFile) -> None:
    """Raise ValueError for a TIFF that Pillow would read wrong."""
    tags = picture.tag_v2
    # Pillow reads channels that are stored apart as bytes, and does not invert these.
    apart = picture.tile and ";" not in str(picture.tile)
    inverted = tags.get(_PHOTOMETRIC) == 0
    if max(tags.get(_BITS, (1,))) > 8 and (apart or inverted):
        raise ValueError(
            "it is a TIFF of more than 8 bits with "
            f"{'channels stored apart' if apart else 'white stored as 0'}, which is not "
            "read; save it as PNG"
        )


def _check_range(largest: int, in_words: str) -> None:
    """Raise ValueError if 16 bits hold 14 or fewer: their upper 8 would look black.

    Args:
      largest: value of the picture, or the largest that it may have.
      in_words: the same for the error message.
    """
    bits = max(8, largest.bit_length())
    if bits > 14 or largest == 0:
        return
    factor = 2 ** (16 - bits - bits % 2)
    raise ValueError(
        f"it has 16 bits a channel, but its largest value is {in_words} of 65,535: it "
        "would be read as nearly black. Multiply the values of all such files alike, for "
        f"example by {factor}: magick FILE -evaluate multiply {factor} NEW_FILE"
    )


def _orientation(picture: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 without a tag that can be read."""
    try:
        return picture.getexif().get(ExifTags.Base.Orientation, 1)
    except (SyntaxError, ValueError, LookupError, TypeError, OSError, struct.error):
        return 1  # a damaged tag makes no picture unreadable


def _square(picture: Image.Image, size: int, *, upright: bool) -> np.ndarray:
    """As of `resize_to_square`, of a picture that may not be decoded yet."""
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"it has {width:,} x {height:,}, more than {MAX_PIXELS:,} pixels; make it "
            "smaller"
        )
    if isinstance(picture, TiffImagePlugin.TiffImageFile):
        _check_tiff(picture)
    reduced = _REDUCED.search(str(getattr(picture, "tile", "")))
    picture.load()
    if reduced:
        above = 256 * (1 + np.asarray(picture.convert("RGB")).max().item())
        _check_range(above - 1, f"below {above:,}")
    orientation = _orientation(picture) if upright else 1
    picture = _to_rgb(picture)
    if orientation in _TURNS:
        picture = picture.transpose(_TURNS[orientation])
    return resize_to_square(picture, size)


def _has_app1(data: bytes) -> bool:
    """Return whether a JPEG has an APP1 segment, of EXIF or XMP, before its tables.

    A search in all bytes would cost 4% of loading.
    """
    place = 2
    while (head := data[place : place + 4])[:1] == b"\xff" and head[1:2] >= b"\xe0":
        if head[1] == 0xE1:
            return True
        # A marker may begin with more than one 0xff.
        place += 1 if head[1] == 0xFF else 2 + int.from_bytes(head[2:], "big")
    return False


def _decode_plain_jpeg(
    data: bytes, size: int, out: np.ndarray, *, upright: bool
) -> bool:
    """Fast path; False leaves the picture, and the verdict on it, to Pillow."""
    if data[:2] != _JPEG_START:
        return False
    if upright and _has_app1(data) and _orientation(_open(data)) in _TURNS:
        return False
    try:
        height, width, color, _ = simplejpeg.decode_jpeg_header(data)
        if color not in _JPEG_COLORS or int(width) * int(height) > MAX_PIXELS:
            return False
        if height == width == size and out.flags.c_contiguous:
            simplejpeg.decode_jpeg(data, buffer=out)
        else:
            out[...] = resize_to_square(simplejpeg.decode_jpeg(data), size)
    except ValueError:
        # simplejpeg also refuses harmless oddities (stray bytes between markers);
        # Pillow reads those and raises on truncated files.
        return False
    return True


def resize_to_square(image: np.ndarray | Image.Image, size: int) -> np.ndarray:
    """Shorter side to `size`, then the central `size` x `size`.

    Args:
      image: uint8 [H, W, 3] or a Pillow picture.
      size: side of the result in pixels.

    Returns:
      uint8 [size, size, 3]; a picture that already has this size is not resampled.
      Shrinking averages areas (Pillow BOX), enlarging is BICUBIC. When the number of
      pixels to cut is odd, the larger part goes at the right and the bottom.
    """
    if not isinstance(image, Image.Image):
        if image.shape == (size, size, 3):
            return image
        image = Image.fromarray(image)
    image = _to_rgb(image)
    width, height = image.size
    short = min(width, height)
    if short != size:
        scaled = (
            max(size, round(width * size / short)),
            max(size, round(height * size / short)),
        )
        resampling = Image.Resampling.BOX if short > size else Image.Resampling.BICUBIC
        image = image.resize(scaled, resampling)
        width, height = scaled
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image)[top : top + size, left : left + size]


def load_picture(
    picture: str | os.PathLike | Image.Image | np.ndarray, size: int
) -> np.ndarray:
    """One picture, from a path, Pillow or an array, the way training sees it.

    Args:
      picture: a path, a Pillow picture, or uint8 [H, W], [H, W, 3] or [H, W, 4]. Files
        and Pillow pictures are turned by their EXIF orientation. RGBA is composited on
        white.
      size: side S of the result in pixels.

    Returns:
      uint8 [S, S, 3], RGB, 0..255; never a view of the argument.

    Raises:
      ValueError: a broken file or picture, or one of more than MAX_PIXELS (a
        DataError); an array that is not a uint8 picture.
      OSError: there is no such file, or it cannot be read.
    """
    remedy = "Give an intact copy or another picture"
    if isinstance(picture, (str, os.PathLike)):
        name = os.fspath(picture)
        return decode(
            Path(picture).read_bytes(), size, name, upright=True, remedy=remedy
        )
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.shape[2:] not in ((), (3,), (4,)):
            raise ValueError(
                "a picture array must be uint8 (0..255) of shape [H, W], [H, W, 3] "
                f"or [H, W, 4]; got {picture.dtype} {list(picture.shape)}"
            )
        picture = Image.fromarray(picture)
    name = str(getattr(picture, "filename", "")) or "the picture"
    with _naming(name, remedy):
        return np.array(_square(picture, size, upright=True))


def short_names(paths: Sequence[str | os.PathLike]) -> list[str]:
    """The files' names; with their folders' where several are alike."""
    parts = [Path(path).parts or (".",) for path in paths]
    names = [part[-1] for part in parts]
    if len(set(names)) == len(names):
        return names
    return ["/".join(part[-2:]) for part in parts]


def _to_rgb(picture: Image.Image) -> Image.Image:
    """Convert any Pillow mode to RGB, composited on white; 16 bits keep the upper 8."""
    if picture.mode.startswith("I"):  # 16-bit grey; convert("RGB") would clip it
        values = np.asarray(picture)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError("more than 16 bits a channel")
        _check_range(int(values.max()), f"{values.max():,}")
        picture = Image.fromarray((values >> 8).astype(np.uint8))
    elif picture.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    elif picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")
