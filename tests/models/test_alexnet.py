"""The network: against torch with the same weights, features, dropout, errors."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alexnet_jax.models import layers, ops
from alexnet_jax.models.alexnet import create_model
from alexnet_jax.models.exchange import Part

CLASSES = 20


def random_variables(model, size, seed=0):
    """Weights and biases of a scale at which every layer's output matters."""
    shapes = jax.eval_shape(
        model.init, jax.random.key(0), jnp.zeros((1, size, size, 3))
    )
    rng = np.random.default_rng(seed)

    def draw(leaf):
        fan_in = max(1, leaf.size // leaf.shape[-1])
        std = (2 / fan_in) ** 0.5 if leaf.ndim > 1 else 0.1
        return rng.normal(0, std, leaf.shape).astype(np.float32)

    return jax.tree.map(draw, shapes)


def torch_network(torch, table, params):
    """The rows of a table as torch.nn modules holding `params`."""
    nn = torch.nn
    modules, channels, grid = [], 3, 6
    for row in table.layers:
        weights = {k: torch.tensor(np.asarray(v)) for k, v in params[row.name].items()}
        if isinstance(row, layers.Conv):
            groups = table.columns if row.sees == "own" else 1
            layer = nn.Conv2d(
                channels,
                row.features,
                row.kernel,
                row.stride,
                int(row.padding),
                groups=groups,
            )
            weight = weights["kernel"].permute(3, 2, 0, 1)
            channels = row.features
        else:
            weight = weights["kernel"].T
            if channels:  # torch flattens channels first
                modules.append(nn.Flatten())
                weight = weight.reshape(-1, grid, grid, channels)
                weight = weight.permute(0, 3, 1, 2).reshape(weight.shape[0], -1)
                channels = 0
            layer = nn.Linear(weight.shape[1], row.features)
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(weights["bias"])
        modules.append(layer)
        for stage in row.then:
            match stage:
                case layers.Activation():
                    modules.append(nn.ReLU())
                case layers.Pool():
                    modules.append(nn.MaxPool2d(stage.window, stage.stride))
                case layers.Lrn():
                    modules.append(
                        nn.LocalResponseNorm(
                            stage.size, stage.alpha, stage.beta, stage.k
                        )
                    )
                case layers.Dropout():
                    modules.append(nn.Dropout(stage.rate))
    return nn.Sequential(*modules).eval()


@pytest.mark.parametrize("name", ["owt", "one_tower", "caffe"])
def test_same_weights_same_logits_as_torch(name):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    model = create_model(name, num_classes=CLASSES)
    size = model.network.crop_size
    variables = random_variables(model, size)
    images = np.random.default_rng(1).normal(0, 60, (2, size, size, 3))
    images = images.astype(np.float32)
    ours = jax.jit(model.apply)(variables, images)
    network = torch_network(torch, model.network, variables["params"])
    with torch.no_grad():
        theirs = network(torch.tensor(images).permute(0, 3, 1, 2)).numpy()
    scale = np.abs(theirs).max()
    assert scale > 1  # the logits say something
    np.testing.assert_allclose(ours / scale, theirs / scale, atol=1e-4)


def narrow(variant="paper", **kwargs):
    kwargs = {"num_classes": 10, "width": 1 / 16, "init": "he"} | kwargs
    return create_model(variant, **kwargs)


def images_like(count=2, size=224, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(0, 60, (count, size, size, 3)), jnp.float32)


def test_features_are_the_stages_of_the_network():
    model, images = narrow(), images_like()
    variables = jax.jit(model.init)(jax.random.key(0), images)
    names = []

    @jax.jit
    def features_of(images):
        features = model.apply(variables, images, method="features")
        names.extend(features)  # jit sorts them
        return features

    features = features_of(images)
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


def test_224_equals_227_with_its_border_black():
    model = narrow()
    images = images_like()
    variables = jax.jit(model.init)(jax.random.key(0), images)
    bordered = jnp.pad(images, ((0, 0), (0, 3), (0, 3), (0, 0)))
    apply = jax.jit(model.apply)
    np.testing.assert_allclose(
        apply(variables, images), apply(variables, bordered), rtol=1e-5
    )


@pytest.mark.parametrize("scale_at", ["test", "train"])
def test_dropout_keeps_the_expectation_and_the_scale_it_says(scale_at):
    model = narrow("paper" if scale_at == "test" else "caffe", width=1 / 4)
    x = jnp.ones((64, 1, 1, 512))
    stage = layers.Dropout(0.25, scale_at)

    def drop(x, train):
        place = Part(jnp.arange(64))
        return model.bind({}, rngs={"dropout": jax.random.key(1)})._dropout(
            stage, x, train, place
        )

    kept = 0.75
    test, train = np.asarray(drop(x, False)), np.asarray(drop(x, True))
    assert train.mean() == pytest.approx(test.mean(), rel=0.02)
    assert set(np.unique(train)) == (
        {0.0, 1.0} if scale_at == "test" else {0.0, np.float32(1 / kept)}
    )
    assert test.mean() == pytest.approx(kept if scale_at == "test" else 1.0)


def test_dropout_masks_belong_to_the_example_not_to_the_batch():
    model, images = narrow(), images_like(4)
    variables = jax.jit(model.init)(jax.random.key(0), images)

    @jax.jit
    def logits(images, first, key=3):
        return model.apply(
            variables,
            images,
            train=True,
            first_example=first,
            rngs={"dropout": jax.random.key(key)},
        )

    whole = logits(images, 0)
    parts = jnp.concatenate([logits(images[:2], 0), logits(images[2:], 2)])
    np.testing.assert_allclose(whole, parts, rtol=1e-5, atol=1e-5)
    assert not np.allclose(whole, logits(images, 0, key=4))
    same = jnp.broadcast_to(images[:1], images.shape)
    rows = np.asarray(logits(same, 0))
    assert len(np.unique(rows.round(4), axis=0)) == 4  # a mask for each


def test_bfloat16_computes_with_float32_parameters():
    images = images_like()
    variables = jax.jit(narrow().init)(jax.random.key(0), images)
    model = narrow(dtype=jnp.bfloat16)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    logits = jax.jit(model.apply)(variables, images)
    assert logits.dtype == jnp.float32
    exact = jax.jit(narrow().apply)(variables, images)
    assert jnp.abs(logits - exact).max() < 0.05 * jnp.abs(exact).max()


def test_batch_norm_learns_and_uses_running_statistics():
    model, images = narrow(normalization="batch"), images_like(8)
    variables = jax.jit(model.init)(jax.random.key(0), images)

    @jax.jit
    def train(images):
        return model.apply(
            variables,
            images,
            train=True,
            rngs={"dropout": jax.random.key(0)},
            mutable=["batch_stats"],
        )[1]

    @jax.jit
    def conv1_of(images):
        return model.apply(variables, images, method="features")["conv1"]

    changed, conv1 = train(images), conv1_of(images)
    mean = 0.1 * conv1.mean((0, 1, 2))  # momentum 0.9, from 0
    np.testing.assert_allclose(changed["batch_stats"]["norm1"]["mean"], mean, rtol=1e-4)


def test_jit_grad_and_forward_mode():
    images = images_like()
    model = narrow(fast=False)
    variables = jax.jit(model.init)(jax.random.key(0), images)
    fast = narrow()
    np.testing.assert_allclose(
        jax.jit(fast.apply)(variables, images),
        jax.jit(model.apply)(variables, images),
        rtol=1e-4,
        atol=1e-5,
    )
    apply = jax.jit(lambda x: model.apply(variables, x))
    _, tangent = jax.jvp(apply, (images,), (images,))
    # The derivative along x itself, by differences.
    step = 1e-2
    ahead, behind = (apply(images * (1 + s)) for s in (step, -step))
    np.testing.assert_allclose(tangent, (ahead - behind) / (2 * step), rtol=0.05)


@pytest.mark.slow
def test_plain_network_has_gradients_of_each_example_and_second_derivatives():
    with jax.enable_x64(True):
        model = narrow(fast=False, dtype=jnp.float64)
        images = jnp.asarray(images_like(), jnp.float64)
        params = jax.jit(model.init)(jax.random.key(0), images)["params"]

        def loss(params, images):
            logits = model.apply({"params": params}, images)
            return jnp.mean(jax.nn.logsumexp(logits, -1))

        def derivatives(params, direction):
            slope = jax.grad(loss)
            each = jax.vmap(lambda image: slope(params, image[None]))(images)
            whole, hessian_times = jax.jvp(
                lambda params: slope(params, images), (params,), (direction,)
            )
            return each, whole, hessian_times

        keys = iter(jax.random.split(jax.random.key(1), 99))
        direction = jax.tree.map(
            lambda w: jax.random.normal(next(keys), w.shape, w.dtype) * jnp.std(w),
            params,
        )
        each, whole, hessian_times = jax.jit(derivatives)(params, direction)
        mean = jax.tree.map(lambda leaf: leaf.mean(0), each)
        assert relative_error(mean, whole) < 1e-10
        step, slope = 1e-6, jax.jit(jax.grad(loss))
        ahead, behind = (
            slope(optax.tree.add_scale(params, s, direction), images)
            for s in (step, -step)
        )
        difference = jax.tree.map(lambda a, b: (a - b) / (2 * step), ahead, behind)
        assert relative_error(hessian_times, difference) < 1e-4


def relative_error(tree, other):
    """||a - b|| / ||b|| over all leaves."""
    gap = optax.tree.norm(optax.tree.sub(tree, other))
    return float(gap / optax.tree.norm(other))


def test_wrong_images_are_refused_in_words():
    model, images = narrow(), images_like()
    variables = jax.jit(model.init)(jax.random.key(0), images)
    for wrong, words in [
        (images[0], "expected [batch, size, size, 3]"),
        (images.astype(jnp.uint8), "images are uint8; expected floats"),
        (images[:, :200, :200], "images of 200 pixels give 49x49"),
        (images[:, :, :220], "images are 224x220, not square"),
    ]:
        with pytest.raises(ValueError, match=re.escape(words)):
            model.apply(variables, wrong)


def original_features(variant):
    model = create_model(variant, num_classes=CLASSES, width=1 / 8, init="he")
    variables = random_variables(model, 224)
    rng = np.random.default_rng(2)
    images = jnp.asarray(rng.uniform(-120, 120, (2, 224, 224, 3)), jnp.float32)
    apply = jax.jit(lambda v, x: model.apply(v, x, method="features"))
    return variables["params"], images, apply(variables, images), apply


def test_the_original_normalises_before_its_units_and_once_more_in_layer_two():
    params, images, found, _ = original_features("original")
    conv1 = ops.grouped_conv(
        images,
        jnp.asarray(params["conv1"]["kernel"]),
        stride=4,
        padding=((0, 3), (0, 3)),
    )
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


def test_without_communication_a_column_does_not_see_the_other():
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


def test_a_fully_connected_layer_of_columns_is_one_matrix_a_column():
    """fc6 of each column reads its own pooled maps, rows first."""
    params, _, found, _ = original_features("no_communication")
    pool5, fc6 = np.asarray(found["pool5"], np.float64), params["fc6"]
    half, units = pool5.shape[-1] // 2, fc6["bias"].size // 2
    columns = [
        pool5[..., i * half : (i + 1) * half].reshape(2, -1)
        @ fc6["kernel"][:, i * units : (i + 1) * units].astype(np.float64)
        for i in range(2)
    ]
    expected = np.maximum(np.concatenate(columns, -1) + fc6["bias"], 0)
    np.testing.assert_allclose(found["fc6"], expected, rtol=1e-4, atol=1e-3)
