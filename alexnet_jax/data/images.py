"""Decoding and resizing on the host: any image file to uint8 RGB [S, S, 3].

The shorter side becomes S, then the central S x S is kept (Krizhevsky et al. 2012,
section 2; like make-data of cuda-convnet2, by pixel area to shrink and by cubic
interpolation to enlarge). Every mode becomes RGB: about twenty ImageNet files are CMYK,
one is a PNG. Transparent pixels are composited on white. EXIF orientation is applied to
the user's own files (`upright`), but not to ImageNet: its published numbers were
obtained without it. An animation is read as its first frame.
"""

import functools
import io
import os
import re
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

from alexnet_jax.data.errors import DataError

# Pillow warns above this: 256 MiB as RGB.
MAX_PIXELS = 89_478_485
# The formats that are read, and the suffixes of their files. Some other formats of Pillow
# start a program (EPS).
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
IMAGE_SUFFIXES = tuple(suffix for names in _FORMATS.values() for suffix in names)
# Pillow's names of layouts with 16 bits per channel, of which it keeps the upper 8.
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


def decode(
    data: bytes, size: int, name: str, out: np.ndarray | None = None, *, upright: bool = False
) -> np.ndarray:
    """Decode one image file to RGB, resized and cut to a square.

    Args:
      data: the whole file in one of the formats above, whatever its suffix.
      size: side S of the result in pixels.
      name: file or record, for the error message.
      out: where to write, uint8 [S, S, 3], C-contiguous; allocated if absent.
      upright: turn it as its EXIF orientation says. (Pillow turns every TIFF.)

    Returns:
      `out`: uint8 [S, S, 3], 0..255.

    Raises:
      DataError: (a ValueError) the image is broken, too large, or has less than 15
        bits stored in 16.
    """
    if out is None:
        out = np.empty((size, size, 3), np.uint8)
    try:
        if not _decode_plain_jpeg(data, size, out, upright=upright):
            with _open(data) as image:
                out[...] = _square(image, size, upright=upright)
    except MemoryError:  # not the image's fault: `prepare` must not leave it out
        raise
    except Exception as error:  # Pillow also lets errors of zlib, struct ... through
        reason = str(error).rstrip(".") or type(error).__name__
        raise DataError(
            f"cannot decode {name} ({len(data)} bytes): {reason}. Replace it by an intact "
            "copy or take it out"
        ) from error
    return out


def load_image(image: str | os.PathLike | Image.Image | np.ndarray, size: int) -> np.ndarray:
    """Read one image from a path, Pillow or an array, as training sees it.

    Args:
      image: a path, a Pillow image, or uint8 [H, W], [H, W, 3] or [H, W, 4]. Files
        and Pillow images are turned by their EXIF orientation.
      size: side S of the result in pixels.

    Returns:
      uint8 [S, S, 3], RGB, 0..255; never a view of the argument.

    Raises:
      ValueError: a broken file (a DataError, see `decode`), or an unusable array.
      OSError: the file cannot be read.
    """
    if isinstance(image, (str, os.PathLike)):
        data = Path(image).read_bytes()
        return decode(data, size, os.fspath(image), upright=True)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.shape[2:] not in ((), (3,), (4,)):
            raise ValueError(
                "an image array must be uint8 (0..255) of shape [H, W], [H, W, 3] "
                f"or [H, W, 4]; got {image.dtype} {list(image.shape)}"
            )
        image = Image.fromarray(image)
    return np.array(_square(image, size, upright=True))


def resize_to_square(image: np.ndarray | Image.Image, size: int) -> np.ndarray:
    """Resize the shorter side to `size`, then cut the central `size` x `size`.

    Args:
      image: uint8 [H, W, 3] or a Pillow image in RGB.
      size: side of the result in pixels.

    Returns:
      uint8 [size, size, 3]. Shrinking is Pillow's BOX, enlarging BICUBIC; an image of
      this size is not resampled. The larger part of an odd margin is cut at the right
      and the bottom.
    """
    if not isinstance(image, Image.Image):
        if image.shape == (size, size, 3):
            return image
        image = Image.fromarray(image)
    short = min(image.size)
    if short != size:
        width, height = (max(size, round(n * size / short)) for n in image.size)
        resampling = Image.Resampling.BOX if short > size else Image.Resampling.BICUBIC
        image = image.resize((width, height), resampling)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image)[top : top + size, left : left + size]


def short_names(paths: Sequence[str | os.PathLike]) -> list[str]:
    """Return the names of files; with their folders if several are alike."""
    parts = [Path(path).parts or (".",) for path in paths]
    count = 1 if len({part[-1] for part in parts}) == len(parts) else 2
    return ["/".join(part[-count:]) for part in parts]


@functools.cache
def _formats() -> list[str]:
    """Return those of the formats that this Pillow reads; set it up."""
    # Pillow refuses intact files with more than 1 MB of compressed text or colour profile.
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**28
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def _open(data: bytes) -> Image.Image:
    """Read the header only."""
    try:
        return Image.open(io.BytesIO(data), formats=_formats())
    except UnidentifiedImageError:  # Pillow names a buffer at an address
        known, begin = ", ".join(_formats()), data[:8]
        raise ValueError(f"it is damaged or no image ({known}); it begins with {begin!r}") from None


def _decode_plain_jpeg(data: bytes, size: int, out: np.ndarray, *, upright: bool) -> bool:
    """Decode most JPEGs fast; False leaves the image, and any error, to Pillow."""
    if not data.startswith(b"\xff\xd8"):
        return False
    # An APP1 segment holds EXIF. A search behind the start of the scan would cost time.
    has_exif = upright and b"\xff\xe1" in data[: data.find(b"\xff\xda")]
    if has_exif and _orientation(_open(data)) in _TURNS:
        return False
    try:
        height, width, color, _ = simplejpeg.decode_jpeg_header(data)
        # libjpeg makes RGB of these by itself, but not of CMYK and YCCK.
        if color not in ("YCbCr", "RGB", "Gray") or int(width) * int(height) > MAX_PIXELS:
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


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except (SyntaxError, ValueError, LookupError, TypeError, OSError, struct.error):
        return 1  # a damaged tag makes no image unreadable


def _square(image: Image.Image, size: int, *, upright: bool) -> np.ndarray:
    """Check, load, turn and resize an image that may not be decoded yet."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"it has {width:,} x {height:,}, more than {MAX_PIXELS:,} pixels; make it smaller"
        )
    tiles = str(getattr(image, "tile", ""))
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        # Pillow reads 16-bit channels that are stored apart as bytes, and does not
        # invert 16-bit images whose white is 0.
        bits = max(image.tag_v2.get(ExifTags.Base.BitsPerSample, (1,)))
        inverted = image.tag_v2.get(ExifTags.Base.PhotometricInterpretation) == 0
        if bits > 8 and (inverted or (image.tile and ";" not in tiles)):
            raise ValueError(
                "it is a TIFF of more than 8 bits with channels stored apart or white "
                "stored as 0, which is not read; save it as PNG"
            )
    image.load()
    if _REDUCED.search(tiles):
        _check_range(256 * np.asarray(image.convert("RGB")).max().item() + 255)
    turn = _TURNS.get(_orientation(image)) if upright else None
    image = _to_rgb(image)
    return resize_to_square(image if turn is None else image.transpose(turn), size)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow mode to RGB, composited on white; 16 bits keep the upper 8."""
    if image.mode.startswith("I"):  # 16-bit grey; convert("RGB") would clip it
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError("it has more than 16 bits per channel; save it with 8")
        _check_range(values.max().item())
        image = Image.fromarray((values >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError(
            "it has floating-point pixels, whose range is unknown; save it with 8 bits"
        )
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _check_range(largest: int) -> None:
    """Raise ValueError if 16 bits hold 14 or fewer: their upper 8 would look black."""
    bits = max(8, largest.bit_length())
    if bits <= 14 and largest > 0:
        factor = 2 ** (16 - bits - bits % 2)
        raise ValueError(
            f"it has 16 bits per channel, but its values are at most {largest:,} of "
            "65,535: it would be read as nearly black. Multiply the values of all such "
            "files alike, for example by "
            f"{factor}: magick FILE -evaluate multiply {factor} NEW_FILE"
        )
