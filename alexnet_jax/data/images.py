"""Decoding and resizing on the host: any picture file to uint8 RGB [S, S, 3].

The resize is the one the 2012 pictures went through: the shorter side to S, then
the central S x S (Krizhevsky et al. 2012, section 2; cuda-convnet2's make-data
shrinks by pixel area and enlarges by cubic interpolation). Every picture becomes
RGB: about twenty ImageNet files are CMYK, one is a PNG. EXIF orientation is NOT
applied: the published ImageNet numbers were obtained without it.
"""

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from alexnet_jax.data.errors import DataError

_JPEG_START = b"\xff\xd8"
# libjpeg converts these to RGB by itself; CMYK and YCCK go through Pillow.
_JPEG_COLORS = ("YCbCr", "RGB", "Gray")


def decode(
    data: bytes, size: int, name: str, out: np.ndarray | None = None
) -> np.ndarray:
    """Decodes one picture file to RGB, resized and cut to a square.

    Args:
      data: the whole file (JPEG, PNG, BMP, WebP, whatever Pillow reads).
      size: side S of the result in pixels.
      name: file or record, for the error message.
      out: where to write, uint8 [S, S, 3], C-contiguous; allocated when absent.

    Returns:
      `out`: uint8 [S, S, 3], 0..255.

    Raises:
      DataError: (a ValueError) the picture is broken; the message says which one.
    """
    if out is None:
        out = np.empty((size, size, 3), np.uint8)
    try:
        if not _decode_plain_jpeg(data, size, out):
            with Image.open(io.BytesIO(data)) as picture:
                out[...] = resize_to_square(_to_rgb(picture), size)
    except Exception as error:  # Pillow also lets zlib's, struct's ... errors through
        raise DataError(
            f"cannot decode {name} ({len(data)} bytes): {error}. Replace the file "
            "by an intact copy or take it out of the data set."
        ) from error
    return out


def _decode_plain_jpeg(data: bytes, size: int, out: np.ndarray) -> bool:
    """Fast path; False leaves the picture, and the verdict on it, to Pillow."""
    if data[:2] != _JPEG_START:
        return False
    try:
        height, width, color, _ = simplejpeg.decode_jpeg_header(data)
        if color not in _JPEG_COLORS:
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
      picture: a path, a Pillow picture, or uint8 [H, W], [H, W, 3] or [H, W, 4].
      size: side S of the result in pixels.

    Returns:
      uint8 [S, S, 3], RGB, 0..255; never a view of the argument.

    Raises:
      ValueError: a broken file, or an array that is not a uint8 picture.
      OSError: there is no such file.
    """
    if isinstance(picture, (str, os.PathLike)):
        with open(picture, "rb") as file:
            return decode(file.read(), size, os.fspath(picture))
    if isinstance(picture, np.ndarray):
        channels = picture.shape[2:]
        if picture.dtype != np.uint8 or channels not in ((), (3,), (4,)):
            raise ValueError(
                "a picture array must be uint8 (0..255) of shape [H, W], [H, W, 3] "
                f"or [H, W, 4]; got {picture.dtype} {list(picture.shape)}"
            )
        picture = Image.fromarray(picture)
    return np.array(resize_to_square(_to_rgb(picture), size))


def short_names(paths: Sequence[str | os.PathLike]) -> list[str]:
    """The files' names; with their folders' where several have the same."""
    parts = [Path(path).parts for path in paths]
    names = [part[-1] for part in parts]
    if len(set(names)) == len(names):
        return names
    return ["/".join(part[-2:]) for part in parts]


def _to_rgb(picture: Image.Image) -> Image.Image:
    """Any Pillow mode to RGB; transparency is dropped, 16 bits keep the upper 8."""
    if picture.mode == "RGB":
        return picture
    if picture.mode.startswith("I"):  # 16-bit grey; convert("RGB") would clip it
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError("more than 16 bits a channel")
        picture = Image.fromarray((values >> 8).astype(np.uint8))
    elif picture.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    elif picture.mode in ("P", "PA", "LA"):
        picture = picture.convert("RGBA")  # Pillow warns on the direct way
    return picture.convert("RGB")
