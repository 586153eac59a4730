"""Ten classes of procedural images that only local structure tells apart.

A class is a scalar field over the plane (stripes, rings, bricks ...), at a random
scale, angle, offset and slight warp. The field is cut at its median, so exactly half
of every image is painted in each of two random colours: the classes have the same
colours, and as offset and polarity are random too, the same mean at every pixel.
Neither colours nor a linear function of pixels can name the class
(`benchmarks/speed/texture_baselines.py`). No class is the mirror image of another,
because training flips images, and the 224 x 224 crops hold several periods.
"""

from collections.abc import Callable

import numpy as np

SIZE = 256

_AXIS = np.arange(SIZE, dtype=np.float32) - (SIZE - 1) / 2
_MAX_ANGLE = 0.3  # radians either way: about 17 degrees
_TAU = np.float32(2 * np.pi)


def draw(label: int, rng: np.random.Generator) -> np.ndarray:
    """Draw an image of class `label`: uint8 [256, 256, 3], RGB, 0..255.

    The image is a function of the label and the state of `rng` only.
    """
    smallest, largest, field_of = _CLASSES[CLASS_NAMES[label]]
    period = rng.uniform(smallest, largest)
    field = field_of(*_plane(period, rng)) if field_of else _blobs(period, rng)
    return _paint(_cut_in_half(field), rng)


def _plane(period: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return coordinates u, v of every pixel in periods: turned, moved, warped."""
    angle = rng.uniform(-_MAX_ANGLE, _MAX_ANGLE)
    shift = rng.uniform(0, 8, 2)  # a multiple of every field's own period
    bend = rng.uniform(0, 0.1 * period, 2)
    waves = rng.uniform(90, 180, 2)
    phases = rng.uniform(0, 2 * np.pi, 2)
    # x is displaced along y and y along x: two vectors instead of two images.
    dx, dy = (
        (bend[i] * np.sin(2 * np.pi * _AXIS / waves[i] + phases[i])).astype(np.float32)
        for i in range(2)
    )
    x = _AXIS[None, :] + dx[:, None]
    y = _AXIS[:, None] + dy[None, :]
    cos, sin = (np.float32(f(angle) / period) for f in (np.cos, np.sin))
    u = cos * x + sin * y + np.float32(shift[0])
    v = cos * y - sin * x + np.float32(shift[1])
    return u, v


def _from_center(t: np.ndarray) -> np.ndarray:
    """Signed distance to the middle of t's unit cell, -0.5..0.5."""
    return t - np.floor(t) - np.float32(0.5)


def _dots(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return discs on a hexagonal lattice: two rectangular ones, half a cell apart."""
    height = np.float32(np.sqrt(3))
    v = v / height

    def squared(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        return _from_center(u) ** 2 + (height * _from_center(v)) ** 2

    return np.minimum(squared(u, v), squared(u + 0.5, v + 0.5))


def _rings(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    radius = np.hypot(_from_center(u), _from_center(v))
    return np.abs(radius - np.float32(0.33))


def _bricks(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Distance to the joints; a brick is two by one, rows are half a brick apart."""
    u = u / 2 + np.floor(v) / 2
    return np.minimum(1 - 2 * np.abs(_from_center(u)), 0.5 - np.abs(_from_center(v)))


def _triangles(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Three families of lines at 60 degrees that meet in points."""
    oblique = u / 2 + np.float32(np.sqrt(3) / 2) * v
    return np.sin(_TAU * u) * np.sin(_TAU * oblique) * np.sin(_TAU * (oblique - u))


def _scales(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Overlapping discs with concentric arcs, each row on top of the one before."""
    row = np.floor(4 * v)
    squared = np.full_like(u, 0.25)
    for back in (-1, 0, 1, 2):
        center = row + back
        candidate = _from_center(u + center / 2) ** 2 + (v - center / 4) ** 2
        squared = np.where(candidate < 0.25, candidate, squared)
    return np.cos(2 * _TAU * np.sqrt(squared))


def _weave(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Square cells, striped along and across by turns."""
    odd = np.mod(np.floor(u) + np.floor(v), 2) > 0.5
    return np.cos(2 * _TAU * np.where(odd, u, v))


def _blobs(wavelength: float, rng: np.random.Generator) -> np.ndarray:
    """Isotropic noise of one scale: plane waves in 40 random directions."""
    angles = rng.uniform(0, 2 * np.pi, 40)
    phases = rng.uniform(0, 2 * np.pi, 40)
    numbers = 2 * np.pi / (wavelength * rng.uniform(0.8, 1.25, 40))
    x = (_AXIS[:, None] * (numbers * np.cos(angles)) + phases).astype(np.float32)
    y = (_AXIS[:, None] * (numbers * np.sin(angles))).astype(np.float32)
    # cos(x + y), summed over the waves. Not a matrix product: BLAS threads would
    # fight those that draw, and may add in another order.
    x = np.concatenate([np.cos(x), -np.sin(x)], axis=1)
    y = np.concatenate([np.cos(y), np.sin(y)], axis=1)
    return np.einsum("yk,xk->yx", y, x)


# Class: smallest and largest period in pixels (what one unit of u and v measures), and
# the field over u and v.
_CLASSES: dict[str, tuple[int, int, Callable[[np.ndarray, np.ndarray], np.ndarray] | None]] = {
    "stripes": (22, 32, lambda u, v: np.cos(_TAU * u)),
    "checks": (18, 26, lambda u, v: np.cos(_TAU / 2 * u) * np.cos(_TAU / 2 * v)),
    "dots": (28, 40, _dots),
    "rings": (38, 52, _rings),
    "bricks": (22, 32, _bricks),
    "zigzag": (24, 34, lambda u, v: np.cos(_TAU * (v + 2 * np.abs(_from_center(u / 2))))),
    "triangles": (44, 62, _triangles),
    "scales": (50, 68, _scales),
    "weave": (38, 52, _weave),
    "blobs": (34, 48, None),
}
CLASS_NAMES = tuple(_CLASSES)


def _cut_in_half(field: np.ndarray) -> np.ndarray:
    """Return 1 where the field is above its median, 0 below; edges are a pixel wide."""
    height = field - np.partition(field, field.size // 2, axis=None)[field.size // 2]
    slope = np.full_like(field, 1e-6)
    across, down = np.abs(np.diff(field, axis=1)), np.abs(np.diff(field, axis=0))
    slope[:, 1:] += across
    slope[1:, :] = np.hypot(slope[1:, :], down)
    return np.clip(height / slope + np.float32(0.5), 0, 1)


def _paint(share: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Two colours, mixed by `share`, under uneven light, with some noise."""
    while True:
        colors = rng.uniform(20, 235, (2, 3)).astype(np.float32)
        brightness = colors @ np.array([0.3, 0.6, 0.1], np.float32)
        if abs(brightness[0] - brightness[1]) > 110:
            break
    direction, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.15)
    along_x = strength * np.cos(direction) * _AXIS / (SIZE / 2)
    along_y = strength * np.sin(direction) * _AXIS / (SIZE / 2)
    light = (1 + along_x[None, :] + along_y[:, None]).astype(np.float32)
    noise = 10 * rng.random((SIZE, SIZE), np.float32) - 5
    image = np.empty((SIZE, SIZE, 3), np.uint8)
    for channel in range(3):
        low, high = colors[:, channel]
        values = (low + (high - low) * share) * light + noise
        image[..., channel] = np.clip(values, 0, 255)
    return image
