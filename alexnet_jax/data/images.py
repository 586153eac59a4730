"""Decoding and resizing on the host: any picture file to uint8 RGB [S, S, 3].

The resize is the one the 2012 pictures went through: the shorter side to S, then
the central S x S (Krizhevsky et al. 2012, section 2; cuda-convnet2's make-data
shrinks by pixel area and enlarges by cubic interpolation). Every picture becomes
RGB: about twenty ImageNet files are CMYK, one is a PNG. EXIF orientation is NOT
applied: the published ImageNet numbers were obtained without it. Of an animation the
first frame counts.

Whatever a file claims to be, memory and time are bounded: more than MAX_BYTES are not
read, more than MAX_PIXELS and MAX_SCANS not decoded, which is known before they are.
"""

import contextlib
import functools
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from alexnet_jax.data.errors import DataError
from alexnet_jax.data.paths import printable

# Pillow's own bound, above which it warns: 256 MiB as RGB.
MAX_PIXELS = 89_478_485
# As many as such a picture has when it is not compressed.
MAX_BYTES = 2**28
# A progressive JPEG has ten or so, each as long to decode as a whole picture.
MAX_SCANS = 100
# Those of Pillow's formats that are taken. Of the others some start a program (EPS), some
# take gigabytes for a file of 150 bytes (JPEG 2000) and most are never met.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
TAKE_OUT = "Replace the file by an intact copy or take it out of the data set"
_JPEG_START, _SCAN_START = b"\xff\xd8", b"\xff\xda"
# Numbers of the tags of a TIFF that say how large its tiles are.
_TILE_WIDTH, _TILE_LENGTH = 322, 323
# libjpeg converts these to RGB by itself; CMYK and YCCK go through Pillow.
_JPEG_COLORS = ("YCbCr", "RGB", "Gray")


def read(path: str | os.PathLike) -> bytes:
    """A file, for `decode`: no more of it than shows that it is too large.

    Raises:
      OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        # A pipe or a device says 0.
        if 0 < os.fstat(file.fileno()).st_size <= MAX_BYTES:
            return file.read()
        return file.read(MAX_BYTES + 1)


def decode(
    data: bytes,
    size: int,
    name: str,
    out: np.ndarray | None = None,
    *,
    remedy: str = TAKE_OUT,
) -> np.ndarray:
    """Decodes one picture file to RGB, resized and cut to a square.

    Args:
      data: the whole file: JPEG, PNG, WebP, BMP, GIF, TIFF, PPM or AVIF, whatever it is
        called.
      size: side S of the result in pixels.
      name: file or record, for the error message.
      out: where to write, uint8 [S, S, 3], C-contiguous; allocated when absent.
      remedy: what to do about a broken one, for the error message.

    Returns:
      `out`: uint8 [S, S, 3], 0..255.

    Raises:
      DataError: (a ValueError) the picture is broken or too large; the message says
        which one, and why.
      OSError: there is not enough memory for it.
    """
    if out is None:
        out = np.empty((size, size, 3), np.uint8)
    with _naming(f"{name} ({len(data)} bytes)", remedy):
        if len(data) > MAX_BYTES:
            raise ValueError(f"files of more than {MAX_BYTES:,} bytes are not read")
        _check_scans(data)
        if not _decode_plain_jpeg(data, size, out):
            with _open(data) as picture:
                out[...] = _square(picture, size)
    return out


@contextlib.contextmanager
def _naming(name: str, remedy: str) -> Iterator[None]:
    """What goes wrong while a picture is decoded, with its name and what to do."""
    try:
        yield
    except MemoryError as error:
        # Not the picture's fault: it must not count as broken.
        raise OSError(
            f"not enough memory to decode {name}; decode fewer at once (workers)"
        ) from error
    except Exception as error:  # Pillow also lets zlib's, struct's ... errors through
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        if isinstance(error, Image.DecompressionBombError):
            reason = _TOO_LARGE.format("")
        remedy = f". {remedy}." if remedy else ""
        raise DataError(f"cannot decode {name}: {reason}{remedy}") from error


@functools.cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def _open(data: bytes) -> Image.Image:
    """Reads the header only."""
    try:
        return Image.open(io.BytesIO(data), formats=_formats())
    except UnidentifiedImageError:  # Pillow names a buffer at an address
        if not data:
            raise ValueError("the file is empty") from None
        raise ValueError(
            f"it is damaged or no picture ({', '.join(_FORMATS)}); it begins with "
            f"{data[:8]!r}"
        ) from None


_TOO_LARGE = f"it has {{}}more than {MAX_PIXELS:,} pixels; make it smaller"


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(_TOO_LARGE.format(f"{width:,} x {height:,}, "))


def _check_scans(data: bytes) -> None:
    # The same bytes may be in other segments and behind the picture: they are looked at
    # closely where there are many.
    if not data.startswith(_JPEG_START) or data.count(_SCAN_START) <= MAX_SCANS:
        return
    scans, place = 0, len(_JPEG_START)
    while 0 <= (place := data.find(b"\xff", place)) < len(data) - 1:
        marker = data[place + 1]
        if marker == 0xD9:  # the end of the picture
            break
        if marker == 0xFF:  # any number of these may be before a marker
            place += 1
        elif marker in (0, 1) or 0xD0 <= marker <= 0xD8:  # no segment follows
            place += 2
        else:
            scans += marker == _SCAN_START[1]
            place += 2 + max(2, int.from_bytes(data[place + 2 : place + 4], "big"))
    if scans > MAX_SCANS:
        raise ValueError(f"it has {scans:,} scans, more than {MAX_SCANS}")


def _check_tiles(picture: TiffImagePlugin.TiffImageFile) -> None:
    """Of a TIFF, where a tile may be larger than the picture, or be any JPEG."""
    tags = picture.tag_v2
    _check_pixels(int(tags.get(_TILE_WIDTH, 1)), int(tags.get(_TILE_LENGTH, 1)))
    if "jpeg" in str(picture.info.get("compression")):
        raise ValueError(
            "it is a TIFF with JPEG in it, which is not read; save it as JPEG or PNG"
        )


def _square(picture: Image.Image, size: int) -> np.ndarray:
    """As of `resize_to_square`, of a picture that may not be decoded yet."""
    _check_pixels(*picture.size)
    if isinstance(picture, TiffImagePlugin.TiffImageFile):
        _check_tiles(picture)
    return resize_to_square(_to_rgb(picture), size)


def _decode_plain_jpeg(data: bytes, size: int, out: np.ndarray) -> bool:
    """Fast path; False leaves the picture, and the verdict on it, to Pillow."""
    if data[:2] != _JPEG_START:
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

    Raises:
      ValueError: a strip that would be enlarged to more than MAX_PIXELS.
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
        if short < size and scaled[0] * scaled[1] > MAX_PIXELS:
            raise ValueError(
                f"it has {width:,} x {height:,} pixels, too long a strip to be enlarged "
                f"to {scaled[0]:,} x {scaled[1]:,}; cut it"
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
      picture: a path, a Pillow picture, or uint8 [H, W], [H, W, 3] or [H, W, 4].
      size: side S of the result in pixels.

    Returns:
      uint8 [S, S, 3], RGB, 0..255; never a view of the argument.

    Raises:
      ValueError: a broken file or picture, or one of more than MAX_PIXELS (a
        DataError); an array that is not a uint8 picture.
      OSError: there is no such file, or not enough memory.
    """
    remedy = "Give an intact copy or another picture"
    if isinstance(picture, (str, os.PathLike)):
        return decode(read(picture), size, os.fspath(picture), remedy=remedy)
    if isinstance(picture, np.ndarray):
        channels = picture.shape[2:]
        shaped = channels in ((), (3,), (4,)) and picture.size
        if picture.dtype != np.uint8 or not shaped:
            raise ValueError(
                "a picture array must be uint8 (0..255) of shape [H, W], [H, W, 3] "
                f"or [H, W, 4]; got {picture.dtype} {list(picture.shape)}"
            )
        picture = Image.fromarray(picture)
    name = str(getattr(picture, "filename", "")) or "the picture"
    with _naming(name, remedy):
        return np.array(_square(picture, size))


def short_names(paths: Sequence[str | os.PathLike]) -> list[str]:
    """The files' names, as they can be drawn; with their folders' where several are alike."""
    parts = [[*map(printable, Path(path).parts or ".")] for path in paths]
    names = [part[-1] for part in parts]
    if len(set(names)) == len(names):
        return names
    return ["/".join(part[-2:]) for part in parts]


def _to_rgb(picture: Image.Image) -> Image.Image:
    """Any Pillow mode to RGB; transparency is dropped, 16 bits keep the upper 8."""
    if picture.mode == "RGB":
        return picture
    if picture.mode.startswith("I"):  # 16-bit grey; convert("RGB") would clip it
        values = np.asarray(picture)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError("more than 16 bits a channel")
        picture = Image.fromarray((values >> 8).astype(np.uint8))
    elif picture.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    elif picture.mode in ("P", "PA", "LA"):
        picture = picture.convert("RGBA")  # Pillow warns on the direct way
    return picture.convert("RGB")
