"""Random crop, flip and PCA lighting, and the centre crop, on the device.

Raw images (uint8) in, float images out, inside the jitted step. Every image draws from
its own key, made of the step's key and the image's position in the global batch, so
the draws do not depend on the number of devices (`first_example`).

Source: Krizhevsky et al. 2012, section 4.1; the original's `convdata_jpeg.py`.
Resized crops: Szegedy et al. 2015; torchvision's `RandomResizedCrop`.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from alexnet_jax.data.statistics import Statistics

# ImageNet's principal components of RGB pixel values, computed by the original
# (cuda-convnet2, `make-data/input_meta`): standard deviations (not variances) in
# grey levels of 0..255, and the vectors as columns in the same order, rows R, G, B.
IMAGENET_PCA_STD_255 = np.array([19.72083305, 37.09388853, 121.78006099])
IMAGENET_PCA_VECTORS = np.array(
    [
        [0.41795513, -0.71257945, -0.56351045],
        [-0.81698062, -0.02354167, -0.5761844],
        [0.39731118, 0.70119634, -0.59200296],
    ]
)
LIGHTING_FORMS = ("paper", "original")
VIEW_COUNTS = (1, 9, 10)
# Width over height of a resized crop, and how often one is drawn for one that fits.
CROP_RATIOS, CROP_TRIES = (3 / 4, 4 / 3), 10
# Mean of ImageNet's mean image (same source), RGB, 0..255.
IMAGENET_MEAN_255 = np.array([127.305, 119.715, 104.913])


# On the device the statistics are a pytree of their three arrays.
jax.tree_util.register_dataclass(
    Statistics,
    data_fields=("mean_image", "pca_std_255", "pca_vectors"),
    meta_fields=("num_examples", "split_examples"),
)


def imagenet_statistics(side: int) -> Statistics:
    """Return ImageNet's statistics, with its mean colour at all side x side pixels."""
    return Statistics(
        mean_image=jnp.full((side, side, 3), IMAGENET_MEAN_255),
        pca_std_255=jnp.asarray(IMAGENET_PCA_STD_255),
        pca_vectors=jnp.asarray(IMAGENET_PCA_VECTORS),
    )


@dataclass(frozen=True)
class Augmentation:
    """Settings of `train_images`.

    Attributes:
      crop_size: side of the images, at most that of the raw images.
      crop, flip: draw them; without `crop` the centre is taken.
      lighting, lighting_form: sigma and form of `pca_lighting`.
      lighting_steps: light before this step only; None: always.
      min_area: below 1 the crops are those of `random_resized_crop`.
      mixup: alpha of `mixup`; 0: images are not mixed. `train_images` ignores it.
    """

    crop_size: int
    crop: bool = True
    flip: bool = True
    lighting: float = 0.1
    lighting_form: str = "paper"
    lighting_steps: int | None = None
    min_area: float = 1.0
    mixup: float = 0.0


def example_keys(key: jax.Array, first_example: Any, count: int) -> jax.Array:
    """Return a key per example first_example ... first_example + count - 1."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, first_example + jnp.arange(count))


def random_crop(raw: jax.Array, keys: jax.Array, size: int) -> jax.Array:
    """Cut size x size at a random place out of each image.

    Every offset from 0 to S - size, both included, is equally likely: at 224 of 256,
    33 x 33 places (the paper's "factor of 2048" counts 32 x 32, twice for the flip).

    Args:
      raw: [B, S, S, 3] of any dtype; the result is [B, size, size, 3].
      keys: [B] random keys, one per image.
    """
    offsets = jnp.int32(raw.shape[1] - size)

    def crop(image: jax.Array, key: jax.Array) -> jax.Array:
        top, left = jax.random.randint(key, (2,), 0, offsets + 1, dtype=jnp.int32)
        corner = (top, left, jnp.int32(0))
        return lax.dynamic_slice(image, corner, (size, size, image.shape[-1]))

    return jax.vmap(crop)(raw, keys)


def random_boxes(keys: jax.Array, side: int, min_area: float) -> jax.Array:
    """Draw a box in a side x side image per key, as torchvision does.

    The box's share of the area is uniform in [min_area, 1], the logarithm of its width
    over height uniform in the range of `CROP_RATIOS`. The first of ten draws that fits
    is taken, and the whole image if none does. Sides and corners are whole pixels, and
    every place is equally likely.

    Returns:
      int32 [B, 4]: top, left, height, width.
    """
    low, high = (math.log(ratio) for ratio in CROP_RATIOS)

    def box(key: jax.Array) -> jax.Array:
        area_key, ratio_key, place_key = jax.random.split(key, 3)
        # In float32 whatever is computed in later, so that the boxes are the same.
        draws = (CROP_TRIES,)
        share = jax.random.uniform(area_key, draws, jnp.float32, min_area, 1.0)
        ratio = jnp.exp(jax.random.uniform(ratio_key, draws, jnp.float32, low, high))
        sides = jnp.stack([jnp.sqrt(share / ratio), jnp.sqrt(share * ratio)], axis=-1)
        sides = jnp.round(side * sides).astype(jnp.int32)
        fits = jnp.all((sides >= 1) & (sides <= side), axis=-1)
        first = jnp.where(jnp.any(fits), sides[jnp.argmax(fits)], jnp.int32(side))
        corner = jax.random.randint(place_key, (2,), 0, side - first + 1, jnp.int32)
        return jnp.concatenate([corner, first])

    return jax.vmap(box)(keys)


def resize_boxes(
    raw: jax.Array, boxes: jax.Array, size: int, dtype: Any = jnp.float32
) -> jax.Array:
    """Resize a box of each image to size x size, bilinearly and antialiased.

    A box that is enlarged is interpolated between pixel centres. For one that is
    reduced the triangle is widened to the pixels that it stands for.

    Args:
      raw: [B, S, S, C].
      boxes: int [B, 4]: top, left, height, width, in pixels, within the image.
      size, dtype: of the result; a float dtype.

    Returns:
      [B, size, size, C], within the range of the raw images and not rounded.
    """

    def resize(image: jax.Array, box: jax.Array) -> jax.Array:
        corner, sides = box[:2].astype(dtype), box[2:].astype(dtype)
        scale, shape = size / sides, (size, size, image.shape[-1])
        return jax.image.scale_and_translate(
            image.astype(dtype), shape, (0, 1), scale, -corner * scale, "linear"
        )

    return jax.vmap(resize)(raw, boxes)


def random_resized_crop(
    raw: jax.Array, keys: jax.Array, size: int, *, min_area: float, dtype: Any = jnp.float32
) -> jax.Array:
    """Cut a box of random area, shape and place out of each, resized to size x size.

    Differs from torchvision's `RandomResizedCrop` in two things: a pixel at the edge of
    a box is interpolated with its neighbours outside (torchvision cuts the box out
    first), and the result is not rounded to grey levels.

    Args:
      raw: [B, S, S, 3] of any dtype; S need not be as large as `size`.
      keys: [B] random keys, one per image.
      min_area: smallest share of an image's area, above 0, at most 1; 0.08 in Szegedy
        et al. 2015, "Going deeper with convolutions", section 6.
      size, dtype: of the result, [B, size, size, 3]; a float dtype.
    """
    boxes = random_boxes(keys, raw.shape[1], min_area)
    return resize_boxes(raw, boxes, size, dtype)


def random_flip(raw: jax.Array, keys: jax.Array) -> jax.Array:
    """Mirror each image [H, W, 3] left to right with probability 1/2."""

    def flip(image: jax.Array, key: jax.Array) -> jax.Array:
        coin = jax.random.bits(key, dtype=jnp.uint32) & 1
        return jnp.where(coin == 1, image[:, ::-1], image)

    return jax.vmap(flip)(raw, keys)


def pca_lighting(
    images: jax.Array,
    keys: jax.Array,
    *,
    sigma: float = 0.1,
    form: str = "paper",
    std_255: Any = IMAGENET_PCA_STD_255,
    vectors: Any = IMAGENET_PCA_VECTORS,
) -> jax.Array:
    """Add a random multiple of the principal components of colour to each image.

    Every pixel of an image gets the same vectors @ (z * std_255), z ~ N(0, sigma^2)
    drawn once per image. The paper writes eigenvalues; on pixels of 0..255 the first
    would give a sigma of about 1,500 grey levels. The original uses their square roots.

    Args:
      images: float [B, H, W, 3], RGB, on the scale 0..255.
      keys: [B] random keys, one per image.
      sigma: 0.1 in the paper; 0 returns the images as they are.
      form: "paper" adds; "original" then divides by 1 + sigma, as the original did
        in training (and not in testing) without a word in the paper.
      std_255: [3] standard deviations along the components, in grey levels.
      vectors: [3, 3], components as columns, rows R, G, B.

    Raises:
      ValueError: for an unknown form.

    Source: Krizhevsky et al. 2012, section 4.1.
    """
    if form not in LIGHTING_FORMS:
        raise ValueError(f"form={form!r} must be one of {', '.join(LIGHTING_FORMS)}.")
    if sigma == 0:
        return images
    dtype = images.dtype
    # Drawn in float32 whatever the dtype, so that float64 sees the same numbers.
    z = jax.vmap(lambda key: jax.random.normal(key, (3,), jnp.float32))(keys)
    scale = jnp.asarray(std_255, dtype) * sigma
    # Written out: a matrix product may run in lower precision on a GPU.
    shift = ((z.astype(dtype) * scale)[:, None] * jnp.asarray(vectors, dtype)).sum(-1)
    lit = images + shift[:, None, None, :]
    return lit / (1 + sigma) if form == "original" else lit


class Mixed(NamedTuple):
    """Images that `mixup` made, and their labels.

    Attributes:
      images: [B, H, W, 3].
      other_labels: [B], those of the partners.
      share: [B] in [0, 1], weight of an image's own pixels and label.
    """

    images: jax.Array
    other_labels: jax.Array
    share: jax.Array


def mixup(
    images: jax.Array, labels: jax.Array, key: jax.Array, first_example: Any, alpha: float
) -> Mixed:
    """Mix each image with its neighbour in the batch: 0 with 1, 2 with 3, ...

    The batch is a random draw of the data set, so the partners are random too. Both are
    always on the same device, and a step is the same on any number of devices.

    Args:
      images: float [B, H, W, 3]; B is even.
      labels: int [B].
      key: of the step; each example folds in its position in the global batch.
      first_example: the position of images[0] in the global batch; even.
      alpha: above 0. The share of an image's own pixels is drawn from Beta(alpha,
        alpha); 0.2 in the source for ImageNet.

    Raises:
      ValueError: if B is odd.

    Source: Zhang et al. 2018, "mixup: Beyond empirical risk minimization",
    arXiv:1710.09412, with one draw per image.
    """
    if len(images) % 2:
        raise ValueError(
            f"mixup pairs the images of a micro-batch; got {len(images)}, an odd number. "
            "Change the batch size, the number of devices or accumulate_steps."
        )
    keys = example_keys(key, first_example, len(images))
    share = jax.vmap(lambda k: jax.random.beta(k, alpha, alpha, dtype=jnp.float32))(keys)
    share = share.astype(images.dtype)

    def partners(a: jax.Array) -> jax.Array:
        return a.reshape(-1, 2, *a.shape[1:])[:, ::-1].reshape(a.shape)

    weight = share[:, None, None, None]
    mixed = weight * images + (1 - weight) * partners(images)
    return Mixed(mixed, partners(labels), share)


def centre_crop(raw: jax.Array, size: int) -> jax.Array:
    """Return the central size x size of [..., S, S, 3].

    The larger half of an odd margin is cut at the right and the bottom.
    """
    start = (raw.shape[-3] - size) // 2
    return raw[..., start : start + size, start : start + size, :]


def train_images(
    raw: jax.Array,
    key: jax.Array,
    first_example: Any,
    statistics: Statistics,
    augmentation: Augmentation,
    dtype: Any = jnp.float32,
    *,
    step: Any = 0,
) -> jax.Array:
    """Augment raw images for training.

    Args:
      raw: uint8 [B, S, S, 3].
      key: of the step; each example folds in its position in the global batch.
      first_example: the position of the first image in the global batch.
      statistics: of the training data. The centre of the mean image is subtracted
        from every crop, wherever it was cut, as the original did.
      augmentation: the draws to make.
      dtype: of the result.
      step: of the training, for `lighting_steps`.

    Returns:
      [B, crop_size, crop_size, 3], RGB, 0..255 minus the mean.
    """
    size = augmentation.crop_size
    keys = example_keys(key, first_example, raw.shape[0])
    crop_keys, flip_keys, light_keys = jnp.moveaxis(
        jax.vmap(lambda k: jax.random.split(k, 3))(keys), 1, 0
    )
    if augmentation.crop and augmentation.min_area < 1:
        wide, min_area = jnp.promote_types(dtype, jnp.float32), augmentation.min_area
        raw = random_resized_crop(raw, crop_keys, size, min_area=min_area, dtype=wide)
    elif augmentation.crop and size < raw.shape[1]:
        raw = random_crop(raw, crop_keys, size)
    else:
        raw = centre_crop(raw, size)
    if augmentation.flip:
        raw = random_flip(raw, flip_keys)
    images = _minus_mean(raw, statistics.mean_image, dtype)
    lit = pca_lighting(
        images,
        light_keys,
        sigma=augmentation.lighting,
        form=augmentation.lighting_form,
        std_255=statistics.pca_std_255,
        vectors=statistics.pca_vectors,
    )
    if augmentation.lighting_steps is None:
        return lit
    return jnp.where(step < augmentation.lighting_steps, lit, images)


def eval_images(
    raw: jax.Array, *, mean_image: jax.Array, crop_size: int, dtype: Any = jnp.float32
) -> jax.Array:
    """Return the centre crops of uint8 [B, S, S, 3] minus the mean's centre."""
    return _minus_mean(centre_crop(raw, crop_size), mean_image, dtype)


def several_views(raw: jax.Array, count: int, size: int) -> jax.Array:
    """Cut several views out of each image: [B, S, S, 3] -> [V, B, size, size, 3].

    Args:
      count: 1, the centre; 9, cuda-convnet2's views of CIFAR-10, the three by three
        offsets 0, half and all of the margin; 10, the paper's (section 4.1), the centre
        and the four corners, and then the five mirrored. The centre is view 0.

    Raises:
      ValueError: for another count.
    """
    if count not in VIEW_COUNTS:
        raise ValueError(f"count={count} must be one of {VIEW_COUNTS}.")
    margin = raw.shape[1] - size
    middle = margin // 2
    sides = {1: (), 9: (0, middle, margin), 10: (0, margin)}[count]
    places = [(y, x) for y in sides for x in sides]
    if count == 9:
        places.pop(4)
    places.insert(0, (middle, middle))
    views = [raw[:, y : y + size, x : x + size] for y, x in places]
    if count == 10:
        views += [view[:, :, ::-1] for view in views]
    return jnp.stack(views)


def _minus_mean(raw: jax.Array, mean_image: jax.Array, dtype: Any) -> jax.Array:
    wide = jnp.promote_types(dtype, jnp.float32)
    return raw.astype(wide) - centre_crop(mean_image, raw.shape[-2]).astype(wide)
