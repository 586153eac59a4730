"""Crop, flip and lighting: uniform offsets, exact statistics, exact no-ops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_jax.data import augment

COUNT = 20_000


@pytest.fixture(scope="module")
def keys():
    return augment.example_keys(jax.random.key(0), 0, COUNT)


def test_crop_offsets_are_uniform(keys):
    # A 4 x 4 image whose values tell the place; 2 x 2 cut out: 3 x 3 places.
    image = jnp.arange(16, dtype=jnp.uint8).reshape(1, 4, 4, 1).repeat(3, -1)
    crops = jax.jit(augment.random_crop, static_argnums=2)(
        jnp.broadcast_to(image, (COUNT, 4, 4, 3)), keys, 2
    )
    assert crops.dtype == jnp.uint8
    corners, counts = np.unique(crops[:, 0, 0, 0], return_counts=True)
    np.testing.assert_array_equal(corners, [0, 1, 2, 4, 5, 6, 8, 9, 10])
    assert np.abs(counts / COUNT - 1 / 9).max() < 0.01  # 4.5 sigma
    # Each crop is a piece of the image.
    np.testing.assert_array_equal(crops[:, 1, 1, 0], crops[:, 0, 0, 0] + 5)


def test_crops_of_224_from_256_have_33_offsets(keys):
    rows = jnp.arange(256, dtype=jnp.uint8)[:, None, None]
    image = jnp.broadcast_to(rows, (256, 256, 3))
    crop = jax.jit(
        jax.vmap(lambda key: augment.random_crop(image[None], key[None], 224)[0, 0, 0, 0])
    )
    tops = np.unique(crop(keys[:3000]))
    np.testing.assert_array_equal(tops, np.arange(33))


@pytest.mark.parametrize("min_area", [0.08, 0.9])
def test_boxes_are_distributed_as_in_torchvision(keys, min_area):
    """Compare areas, shapes and places with torchvision's loop of ten tries."""
    side = 256
    boxes = np.asarray(jax.jit(augment.random_boxes, static_argnums=(1, 2))(keys, side, min_area))
    assert boxes.dtype == np.int32
    corner, sides = boxes[:, :2], boxes[:, 2:]
    assert (corner >= 0).all() and (sides >= 1).all() and (corner + sides <= side).all()
    shares, ratios = sides.prod(1) / side**2, sides[:, 1] / sides[:, 0]
    assert min_area - 0.01 < shares.min() < min_area + 0.01
    assert 0.73 < ratios.min() and ratios.max() < 1.37
    expected = torchvision_boxes(np.random.default_rng(0), side, min_area, COUNT)
    assert abs(shares.max() - expected[:, 2:].prod(1).max() / side**2) < 0.01
    whole = (sides == side).all(1).mean(), (expected[:, 2:] == side).all(1).mean()
    assert abs(whole[0] - whole[1]) < 0.015
    for found, other in (
        (shares, expected[:, 2:].prod(1) / side**2),
        (np.log(ratios), np.log(expected[:, 3] / expected[:, 2])),
        (corner[:, 0], expected[:, 0]),
        (corner[:, 1], expected[:, 1]),
    ):
        spread = other.std() / np.sqrt(COUNT / 2)
        assert abs(found.mean() - other.mean()) < 4 * spread
        places = np.quantile(other, np.linspace(0.1, 0.9, 9))
        ranks = [(found <= place).mean() - (other <= place).mean() for place in places]
        assert np.abs(ranks).max() < 0.02


def torchvision_boxes(rng, side, min_area, count):
    """Return boxes [count, 4] as `RandomResizedCrop.get_params` draws them."""
    boxes = []
    for _ in range(count):
        for _ in range(10):
            area = side * side * rng.uniform(min_area, 1.0)
            ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
            width = round(np.sqrt(area * ratio))
            height = round(np.sqrt(area / ratio))
            if 0 < width <= side and 0 < height <= side:
                break
        else:
            width = height = side
        top = rng.integers(0, side - height + 1)
        left = rng.integers(0, side - width + 1)
        boxes.append((top, left, height, width))
    return np.array(boxes)


def test_min_area_of_one_takes_the_whole_image(keys):
    boxes = augment.random_boxes(keys[:50], 32, 1.0)
    assert (np.asarray(boxes) == [0, 0, 32, 32]).mean() > 0.95


@pytest.mark.parametrize("box", [(2, 3, 4, 5), (0, 0, 12, 12), (1, 2, 11, 7), (3, 6, 6, 6)])
def test_resizing_equals_a_numpy_loop(box):
    """Check bilinear weights if the image grows (4 x 5 to 6), a wider triangle if it shrinks."""
    raw, size = raw_images(1, 12), 6
    top, left, height, width = box

    def weights(corner, side):
        """Return [size, 12]: the weight of each input pixel in each output pixel."""
        table = np.zeros((size, 12))
        reach = max(1.0, side / size)
        for i in range(size):
            centre = corner + (i + 0.5) * side / size - 0.5
            for j in range(12):
                table[i, j] = max(0.0, 1 - abs(centre - j) / reach)
        return table / table.sum(1, keepdims=True)

    expected = np.zeros((size, size, 3))
    rows, columns = weights(top, height), weights(left, width)
    for y, x in np.ndindex(size, size):
        for j, i in np.ndindex(12, 12):
            expected[y, x] += rows[y, j] * columns[x, i] * np.asarray(raw)[0, j, i]
    found = augment.resize_boxes(raw, jnp.array([box]), size)
    np.testing.assert_allclose(found[0], expected, atol=2e-3)


def test_resized_crops_have_the_requested_dtype():
    keys = augment.example_keys(jax.random.key(0), 0, 2)

    def crop(dtype):  # larger than the raw images: they are enlarged
        options = {"size": 12, "min_area": 0.3, "dtype": dtype}
        compiled = jax.jit(functools.partial(augment.random_resized_crop, **options))
        return compiled(raw_images(2, 8), keys)

    narrow = crop(jnp.float32)
    assert narrow.shape == (2, 12, 12, 3)
    with jax.enable_x64(True):
        wide = crop(jnp.float64)
    assert (narrow.dtype, wide.dtype) == (jnp.float32, jnp.float64)
    np.testing.assert_allclose(wide, narrow, atol=1e-3)


def test_half_of_the_images_are_flipped(keys):
    image = jnp.array([[1, 2, 3]], jnp.uint8)[None, :, :, None].repeat(3, -1)
    flipped = jax.jit(augment.random_flip)(jnp.broadcast_to(image, (COUNT, 1, 3, 3)), keys)
    first, counts = np.unique(flipped[:, 0, 0, 0], return_counts=True)
    np.testing.assert_array_equal(first, [1, 3])
    assert abs(counts[0] / COUNT - 0.5) < 0.015
    assert (flipped[:, 0, 1, 0] == 2).all()


def test_lighting_has_the_covariance_of_the_paper(keys):
    images = jnp.zeros((COUNT, 1, 1, 3))
    shift = jax.jit(augment.pca_lighting)(images, keys)[:, 0, 0]
    sigma, std = 0.1, augment.IMAGENET_PCA_STD_255
    vectors = augment.IMAGENET_PCA_VECTORS
    expected = vectors @ np.diag((sigma * std) ** 2) @ vectors.T
    found = np.cov(np.asarray(shift), rowvar=False)
    np.testing.assert_allclose(found, expected, rtol=0.05)
    assert np.abs(np.mean(shift, 0)).max() < 0.3
    # In grey levels: about a tenth of the pixels' own standard deviation.
    assert np.sqrt(np.trace(expected) / 3) == pytest.approx(7.44, abs=0.01)


def test_lighting_is_one_draw_per_image():
    images = jnp.zeros((4, 5, 6, 3))
    keys = augment.example_keys(jax.random.key(1), 0, 4)
    lit = np.asarray(augment.pca_lighting(images, keys))
    assert (lit == lit[:, :1, :1]).all()
    assert len(np.unique(lit[:, 0, 0, 0])) == 4


def test_lighting_of_sigma_zero_returns_its_input():
    images = jax.random.normal(jax.random.key(0), (2, 3, 3, 3))
    keys = augment.example_keys(jax.random.key(1), 0, 2)
    assert augment.pca_lighting(images, keys, sigma=0.0) is images


def test_imagenet_constants_are_an_orthonormal_basis():
    vectors = augment.IMAGENET_PCA_VECTORS
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=1e-6)
    # Variances on 0..255 (facts of the original's input_meta).
    np.testing.assert_allclose(
        augment.IMAGENET_PCA_STD_255**2, [388.911, 1375.957, 14830.383], rtol=1e-5
    )


def statistics(size=8):
    rng = np.random.default_rng(0)
    return augment.Statistics(
        jnp.asarray(rng.uniform(90, 130, (size, size, 3)), jnp.float32),
        jnp.array([5.0, 10.0, 60.0]),
        jnp.eye(3),
    )


def raw_images(count=6, size=8):
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.integers(0, 256, (count, size, size, 3)), jnp.uint8)


def test_eval_images_are_the_centre_minus_the_centre_of_the_mean():
    stats, raw = statistics(), raw_images()
    images = augment.eval_images(raw, mean_image=stats.mean_image, crop_size=4)
    expected = np.asarray(raw, np.float32)[:, 2:6, 2:6] - stats.mean_image[2:6, 2:6]
    np.testing.assert_array_equal(images, expected)
    assert images.dtype == jnp.float32
    whole = augment.centre_crop(raw, 5)  # 8 - 5 = 3: one before, two behind
    np.testing.assert_array_equal(whole, raw[:, 1:6, 1:6])


CENTRE, CORNERS = (2, 2), [(0, 0), (0, 4), (4, 0), (4, 4)]  # of the paper, and their mirrors
NINE = [(2 * top, 2 * left) for top, left in np.ndindex(3, 3)]  # of cuda-convnet2


@pytest.mark.parametrize(
    "places, mirrored", [([CENTRE], False), (NINE, False), ([CENTRE, *CORNERS], True)]
)
def test_eval_views_have_the_published_places(places, mirrored):
    raw = np.asarray(raw_images())
    expected = [raw[:, top : top + 4, left : left + 4] for top, left in places]
    if mirrored:
        expected += [view[:, :, ::-1] for view in expected]
    views = augment.several_views(raw_images(), len(expected), 4)
    assert len(views) == len(expected)
    for one in expected:  # each once, in any order
        assert sum(np.array_equal(one, v) for v in views) == 1
    np.testing.assert_array_equal(views[0], raw[:, 2:6, 2:6])


def train(augmentation, raw=None, first=0, *, key=0, step=0):
    """Return the training images of `raw`, by default of all raw images."""
    raw = raw_images() if raw is None else raw
    key, stats = jax.random.key(key), statistics(raw.shape[1])
    train_images = jax.jit(augment.train_images, static_argnums=4)
    return train_images(raw, key, first, stats, augmentation, step=step)


def test_training_images_without_augmentation_are_eval_images():
    plain = augment.Augmentation(4, crop=False, flip=False, lighting=0.0)
    mean = statistics().mean_image
    expected = augment.eval_images(raw_images(), mean_image=mean, crop_size=4)
    np.testing.assert_array_equal(train(plain), expected)


def test_training_images_do_not_depend_on_how_the_batch_is_split():
    settings, raw = augment.Augmentation(4), raw_images()
    whole = train(settings)
    parts = [train(settings, raw[:2]), train(settings, raw[2:], 2)]
    np.testing.assert_array_equal(whole, jnp.concatenate(parts))
    assert not np.array_equal(whole, train(settings, key=1))


def test_resized_crops_do_not_depend_on_how_the_batch_is_split():
    raw = raw_images(4, 16)
    settings = augment.Augmentation(8, flip=False, lighting=0.0, min_area=0.1)
    resized = jax.jit(lambda raw, first: train(settings, raw, first))
    whole = resized(raw, 0)
    assert whole.shape == (4, 8, 8, 3) and whole.dtype == jnp.float32
    parts = jnp.concatenate([resized(raw[:2], 0), resized(raw[2:], 2)])
    np.testing.assert_allclose(whole, parts, atol=1e-3)
    # With the centre of the mean image added, values are in the range of raw images.
    images = whole + augment.centre_crop(statistics(16).mean_image, 8)
    assert -0.01 < images.min() < 60 and 195 < images.max() < 255.01


def test_original_lighting_is_divided_and_ends():
    """Check (x - mean + noise) / 1.1 in training, until `lighting_steps`."""

    def lit(step, **fields):
        settings = augment.Augmentation(4, crop=False, flip=False, **fields)
        return train(settings, step=step)

    plain = lit(0, lighting=0.0)
    original = {"lighting_form": "original", "lighting_steps": 5}
    np.testing.assert_allclose(lit(4, **original), lit(0) / 1.1, rtol=1e-6)
    np.testing.assert_array_equal(lit(5, **original), plain)
    compiled = jax.jit(lambda step: lit(step, lighting_steps=5))
    np.testing.assert_array_equal(compiled(5), plain)
    with pytest.raises(ValueError, match="paper, original"):
        lit(0, lighting_form="caffe")
