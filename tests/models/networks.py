"""Networks for tests against other engines, with random weights at which a mistake shows.

LRN changes what it normalises, biases are not zero, and logits differ from class to class and
from image to image.
"""

import functools
import os
import tarfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from alexnet_jax.data import images
from alexnet_jax.models.layers import Activation, Lrn, WithinMapLrn, feature_names, stage_name
from alexnet_jax.models.weights import Weights, WeightsError, files, read_weights
from alexnet_jax.models.weights.files import make_model

TOLERANCE = 1e-4
LRNS = (Lrn, WithinMapLrn)
NARROW = 1 / 16
CLASSES = 12
MEAN = np.array([120.0, 115.0, 105.0], np.float32)
# Size of the activations, at which LRN's sums count beside its constant.
SCALE = 40.0
# unit -> factors on the kernels of the first layer, the last, the others, and biases.
GAINS = {
    "relu": (0.7, 3 / SCALE, 1.6, SCALE / 10),
    "tanh": (0.03, 3.0, 2.0, 0.3),
    "sigmoid": (0.03, 8.0, 8.0, 0.3),
}


@functools.cache
def raw_images(kind: str, size: int) -> np.ndarray:
    """Return three raw images, [3, size, size, 3]: blotches, or ImageNet's."""
    if kind == "random":
        rng = np.random.default_rng(0)
        blotches = rng.integers(0, 256, (3, 5, 5, 3)).astype(np.uint8)
        enlarge = functools.partial(images.resize_to_square, size=size)
        smooth = np.stack([enlarge(blotch) for blotch in blotches]).astype(int)
        noise = rng.integers(-30, 31, smooth.shape)
        return np.clip(smooth + noise, 0, 255).astype(np.uint8)
    name = os.environ.get("ALEXNET_TEST_DATA")
    archive = Path(name or "") / "imagenet_sample" / "ILSVRC2012_img_val.tar"
    if not name or not archive.exists():
        pytest.skip("ALEXNET_TEST_DATA names no folder of real images")
    with tarfile.open(archive) as tar:
        members = [member for member in tar if member.isfile()][:3]
        return np.stack([images.decode(tar.extractfile(m).read(), size, m.name) for m in members])


def channels_first(batch):
    return np.ascontiguousarray(batch.transpose(0, 3, 1, 2))


def random_variables(model):
    """Return weights that make every layer matter and logits differ by about 1."""
    rng = np.random.default_rng(0)
    layers = model.network.layers
    units = [s.kind for s in model.network.stages if isinstance(s, Activation)]
    first, last, others, biases = GAINS[units[0]]
    gains = {layers[0].name: first, layers[-1].name: last}
    leaves = {}
    for name, shape in files.shapes_of(model, model.network.crop_size).items():
        _, layer, leaf = name.split("/")
        std = 0.3 if layer == layers[-1].name else biases
        if leaf == "kernel":
            std = gains.get(layer, others) / np.sqrt(np.prod(shape[:-1][-3:]))  # fan-in
        drawn = std * rng.standard_normal(shape)
        if leaf in ("scale", "var"):
            drawn = rng.uniform(0.5, 2, shape)
        leaves[name] = jnp.asarray(drawn, jnp.float32)
    return unflatten_dict(leaves, sep="/")


def random_weights(*, mean=MEAN, image_size=None, class_names=None, **settings) -> Weights:
    """Return `Weights` with `random_variables` for a network with these settings."""
    model = make_model(settings)
    size = model.network.crop_size
    return Weights(settings, random_variables(model), mean, image_size or size, size, class_names)


def assert_same_logits(run, batch, wanted):
    """Check that `run` gives these logits for several images and for one, all different."""
    for count in (len(batch), 1):
        found = run(batch[:count])
        assert found.shape == wanted[:count].shape
        np.testing.assert_allclose(found, wanted[:count], rtol=0, atol=TOLERANCE)
    assert wanted.std(axis=1).min() > 0.3, "the classes are all alike"
    assert wanted.std(axis=0).max() > 0.1, "the images are all alike"


def assert_same_weights(found: Weights, wanted: Weights):
    assert found.settings == wanted.settings
    jax.tree.map(np.testing.assert_array_equal, found.variables, wanted.variables)


def assert_lrn_matters(features, row):
    """Check that the divisor of a normalisation differs from place to place."""
    (first, *_) = (i for i, stage in enumerate(row.then) if isinstance(stage, LRNS))
    labels = [row.name, *feature_names(row)]
    before = features[labels[first]]
    after = features[stage_name("norm", row.name)]
    divisor = np.abs(before[after != 0] / after[after != 0])
    assert divisor.std() > 0.03 * divisor.mean()


def jitted_features(weights):
    """Return a function of images that returns all features as NumPy arrays."""
    model = weights.make_model()
    apply = jax.jit(lambda x: model.apply(weights.variables, x, method="features"))
    return lambda batch: jax.tree.map(np.asarray, apply(batch))


def run_onnx(path: Path, batch):
    """Return the outputs for raw images, [B, S, S, 3]; the first are the logits."""
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(path, options, providers=providers)
    return session.run(None, {"images": channels_first(batch.astype(np.float32))})


def refused(path: Path, *expected: str, variant: str | None = None) -> None:
    """Check that reading fails with one line that names the file and contains these words."""
    with pytest.raises(WeightsError) as caught:
        read_weights(path, variant=variant)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    for words in expected:
        assert words in message
