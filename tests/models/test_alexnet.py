"""The network: features, dropout, dtypes, derivatives, errors, the original's layers."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_jax.models import layers, ops
from alexnet_jax.models.alexnet import create_model, dropout
from alexnet_jax.models.exchange import Part
from tests.models.networks import random_variables


def narrow(variant="paper", **kwargs):
    kwargs = {"num_classes": 10, "width": 1 / 16, "init": "he"} | kwargs
    return create_model(variant, **kwargs)


def images_like(count=2):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(0, 60, (count, 224, 224, 3)), jnp.float32)


@pytest.fixture(scope="module")
def paper():
    """Return (model, variables, images) of the paper's network, narrowed."""
    model, images = narrow(), images_like()
    return model, jax.jit(model.init)(jax.random.key(0), images), images


def features_of(model, variables, images, **options):
    """Return the features, and their names in the order of the network: jit sorts them."""
    names = []

    @jax.jit
    def apply(images):
        features = model.apply(variables, images, method="features", **options)
        names.extend(features)
        return features

    return apply(images), names


def test_features_are_the_stages_of_the_network(paper):
    model, variables, images = paper
    features, names = features_of(model, variables, images)
    order = "conv1 norm1 pool1 conv2 norm2 pool2 conv3 conv4 conv5 pool5 fc6 fc7 logits"
    assert " ".join(names) == order
    assert features["conv1"].min() == 0  # after the activation
    assert features["pool5"].shape == (2, 6, 6, 16)
    logits = jax.jit(model.apply)(variables, images)
    np.testing.assert_allclose(features["logits"], logits, rtol=1e-5, atol=1e-6)
    # fc8 of half of fc7: the paper multiplies by the dropout rate when testing (4.2).
    fc8 = variables["params"]["fc8"]
    expected = 0.5 * features["fc7"] @ fc8["kernel"] + fc8["bias"]
    np.testing.assert_allclose(features["logits"], expected, rtol=1e-5, atol=1e-6)


def test_pre_activations_are_the_sums_before_any_stage():
    model, images = narrow("original"), images_like()
    variables = random_variables(model)
    found, names = features_of(model, variables, images, pre_activations=True)
    weighted = [row.name for row in model.network.layers[:-1]]
    assert [name for name in names if name.endswith("_pre")] == [f"{n}_pre" for n in weighted]
    features, plain_names = features_of(model, variables, images)
    assert plain_names == [name for name in names if not name.endswith("_pre")]
    for name in weighted:
        before, after = np.asarray(found[f"{name}_pre"]), np.asarray(features[name])
        assert (before < 0).any()
        # This network normalises conv1 and pools conv5 before their activations.
        late = name in ("conv1", "conv5")
        np.testing.assert_allclose(before if late else np.maximum(before, 0), after, rtol=1e-5)


def test_224_pixels_equal_227_with_a_zero_border(paper):
    model, variables, images = paper
    bordered = jnp.pad(images, ((0, 0), (0, 3), (0, 3), (0, 0)))
    apply = jax.jit(model.apply)
    np.testing.assert_allclose(apply(variables, images), apply(variables, bordered), rtol=1e-5)


@pytest.mark.parametrize("scale_at", ["test", "train"])
def test_dropout_keeps_its_expectation_and_scale(scale_at):
    x, stage, part = jnp.ones((64, 1, 1, 512)), layers.Dropout(0.25, scale_at), Part(jnp.arange(64))
    test, train = (np.asarray(dropout(x, stage, key, part)) for key in (None, jax.random.key(1)))
    assert train.mean() == pytest.approx(test.mean(), rel=0.02)
    kept, scale = (0.75, 1.0) if scale_at == "test" else (1.0, np.float32(1 / 0.75))
    assert test.mean() == pytest.approx(kept)
    assert set(np.unique(train)) == {0.0, scale}


def test_dropout_masks_do_not_depend_on_the_batch(paper):
    model, variables, _ = paper
    images = images_like(4)

    @jax.jit
    def logits(images, first, key=3):
        rngs = {"dropout": jax.random.key(key)}
        return model.apply(variables, images, True, first, rngs=rngs)

    whole = logits(images, 0)
    parts = jnp.concatenate([logits(images[:2], 0), logits(images[2:], 2)])
    np.testing.assert_allclose(whole, parts, rtol=1e-5, atol=1e-5)
    assert not np.allclose(whole, logits(images, 0, key=4))
    same = jnp.broadcast_to(images[:1], images.shape)
    rows = np.asarray(logits(same, 0))
    assert len(np.unique(rows.round(4), axis=0)) == 4  # a mask for each


def test_bfloat16_computes_with_float32_parameters(paper):
    exact_model, variables, images = paper
    model = narrow(dtype=jnp.bfloat16)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    logits = jax.jit(model.apply)(variables, images)
    assert logits.dtype == jnp.float32
    exact = jax.jit(exact_model.apply)(variables, images)
    assert jnp.abs(logits - exact).max() < 0.05 * jnp.abs(exact).max()


def test_bias_gradients_of_bfloat16_are_summed_in_float32():
    model, images = narrow(dtype=jnp.bfloat16), images_like()
    variables = jax.jit(model.init)(jax.random.key(0), images)
    loss = jax.jit(lambda variables: jnp.sum(jnp.sin(model.apply(variables, images))))
    for layer, grads in jax.grad(loss)(variables)["params"].items():
        rounded = grads["bias"].astype(jnp.bfloat16)
        assert jnp.any(grads["bias"] != rounded.astype(jnp.float32)), layer


def test_batch_norm_learns_and_uses_running_statistics():
    model, images = narrow(normalization="batch"), images_like(8)
    variables = jax.jit(model.init)(jax.random.key(0), images)

    @jax.jit
    def train(images):
        options = {"rngs": {"dropout": jax.random.key(0)}, "mutable": ["batch_stats"]}
        return model.apply(variables, images, True, **options)[1]

    @jax.jit
    def conv1_of(images):
        return model.apply(variables, images, method="features")["conv1"]

    changed, conv1 = train(images), conv1_of(images)
    mean = 0.1 * conv1.mean((0, 1, 2))  # momentum 0.9, from 0
    np.testing.assert_allclose(changed["batch_stats"]["norm1"]["mean"], mean, rtol=1e-4)


def test_plain_operators_support_forward_mode(paper):
    fast_model, variables, images = paper
    model = narrow(fast=False)
    apply = jax.jit(lambda x: model.apply(variables, x))
    fast = jax.jit(fast_model.apply)(variables, images)
    np.testing.assert_allclose(fast, apply(images), rtol=1e-4, atol=1e-5)
    _, tangent = jax.jvp(apply, (images,), (images,))
    # The derivative along x itself, by differences.
    step = 1e-2
    ahead, behind = (apply(images * (1 + s)) for s in (step, -step))
    np.testing.assert_allclose(tangent, (ahead - behind) / (2 * step), rtol=0.05)


def test_wrong_images_are_refused(paper):
    model, variables, images = paper
    for wrong, words in [
        (images[0], "expected [batch, size, size, 3]"),
        (images.astype(jnp.uint8), "images are uint8; expected floats"),
        (images[:, :200, :200], "images of 200 pixels give 49x49"),
        (images[:, :, :220], "images are 224x220, not square"),
    ]:
        with pytest.raises(ValueError, match=re.escape(words)):
            model.apply(variables, wrong)


@functools.cache
def original_features(variant):
    model = create_model(variant, num_classes=20, width=1 / 8, init="he")
    variables = random_variables(model)
    rng = np.random.default_rng(2)
    images = jnp.asarray(rng.uniform(-120, 120, (2, 224, 224, 3)), jnp.float32)
    apply = jax.jit(lambda v, x: model.apply(v, x, method="features"))
    return variables["params"], images, apply(variables, images), apply


def test_original_normalises_before_activation_and_twice_in_layer_two():
    params, images, found, _ = original_features("original")
    kernel, padding = jnp.asarray(params["conv1"]["kernel"]), ((0, 3), (0, 3))
    conv1 = ops.grouped_conv(images, kernel, stride=4, padding=padding)
    conv1 += params["conv1"]["bias"]
    np.testing.assert_allclose(found["conv1"], conv1, rtol=1e-4, atol=1e-3)
    assert (np.asarray(found["conv1"]) < 0).any()
    # alpha / 5, inside a column of 6 maps.
    constants = {"size": 5, "k": 2.0, "beta": 0.75}
    norm1 = ops.local_response_norm(conv1, alpha=2e-5, groups=2, **constants)
    pool1 = jnp.maximum(ops.max_pool(norm1, window=3, stride=2), 0)
    np.testing.assert_allclose(found["pool1"], pool1, rtol=1e-4, atol=1e-4)
    across = ops.local_response_norm(found["conv2"], alpha=2e-5, groups=2, **constants)
    norm2 = ops.within_map_response_norm(across, size=5, k=1.0, alpha=1e-3, beta=0.75)
    np.testing.assert_allclose(found["norm2"], norm2, rtol=1e-4, atol=1e-5)
    pooled = ops.max_pool(found["conv5"], window=3, stride=2)
    np.testing.assert_allclose(found["pool5"], jnp.maximum(pooled, 0), rtol=1e-5)
    # The activation is in what it was applied to; no layer loses its name.
    assert {"conv1", "norm1", "pool1", "conv2", "conv5", "pool5", "fc7"} < set(found)


def test_columns_without_communication_are_independent():
    params, images, found, apply = original_features("no_communication")
    kernel = np.array(params["conv1"]["kernel"])
    kernel[..., 6:] += 0.1  # the second column's maps
    changed = {**params, "conv1": {**params["conv1"], "kernel": kernel}}
    other = apply({"params": changed}, images)
    for name in found:
        if name == "logits":
            assert not np.allclose(found[name], other[name])
            continue
        a, b = np.asarray(found[name]), np.asarray(other[name])
        half = a.shape[-1] // 2
        np.testing.assert_array_equal(a[..., :half], b[..., :half], err_msg=name)
        assert not np.array_equal(a[..., half:], b[..., half:]), name


def test_fc6_of_separate_columns_has_one_matrix_per_column():
    """Check that fc6 of each column reads its own pooled maps, rows first."""
    params, _, found, _ = original_features("no_communication")
    pool5, fc6 = np.asarray(found["pool5"], np.float64), params["fc6"]
    half, units = pool5.shape[-1] // 2, fc6["bias"].size // 2
    columns = [
        pool5[..., i * half : (i + 1) * half].reshape(2, -1)
        @ np.asarray(fc6["kernel"][:, i * units : (i + 1) * units], np.float64)
        for i in range(2)
    ]
    expected = np.maximum(np.concatenate(columns, -1) + fc6["bias"], 0)
    np.testing.assert_allclose(found["fc6"], expected, rtol=1e-4, atol=1e-3)
