"""Images of known pixels for the tests, as files and in class folders."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 16


def random_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write_images(root: Path, *names: str) -> Path:
    """Write images of one colour each, the n-th of grey level 10 n."""
    for level, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (SIZE, SIZE), (10 * level,) * 3).save(root / name, "PNG")
    return root


def fetched(source, *indices: int) -> np.ndarray:
    """Return the images of these examples; of one example without the batch axis."""
    images = np.zeros((len(indices), *2 * [source.image_size], 3), np.uint8)
    source.fetch(np.array(indices), images, np.zeros(len(indices), np.int32))
    return images[0] if len(indices) == 1 else images


def deep_png(values: np.ndarray) -> bytes:
    """Return a PNG of uint16 [H, W, C]; Pillow writes one channel only."""
    height, width, channels = values.shape
    color = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, 16, color, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in parts
    )


def deep_tiff(values: np.ndarray, *, apart=False, white_is_zero=False) -> bytes:
    """Return a TIFF of uint16 [H, W, C]; Pillow writes one channel only."""
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
