"""One definition on any mesh: the same numbers, and only the exchanges it needs.

The acceptance test trains three steps, dropout and augmentation on, in float64: in
float32 another summation order flips the odd max-pool winner, and a gradient moves
by a hundredth.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_jax import augment, metrics, optim, parallel, steps
from alexnet_jax.model import create_model

SIZE, CROP, BATCH, CLASSES = 226, 224, 4, 10
MESHES = [
    ("columns", 1, 1),
    ("data", 2, 1),
    ("columns", 1, 2),
    ("data", 4, 1),
    ("columns", 2, 2),
]


def narrow(dtype, **kwargs):
    return create_model(
        "paper", num_classes=CLASSES, width=1 / 32, dtype=dtype, init="he", **kwargs
    )


def batch(examples=BATCH):
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (examples, SIZE, SIZE, 3), np.uint8),
        "label": rng.integers(0, CLASSES, examples).astype(np.int32),
    }


def statistics(dtype):
    return augment.PixelStatistics(
        jnp.full((SIZE, SIZE, 3), 120, dtype),
        jnp.asarray(augment.IMAGENET_PCA_STD_255, dtype),
        jnp.asarray(augment.IMAGENET_PCA_VECTORS, dtype),
    )


def make(mode, rows, columns, dtype, *, parts=1, examples=BATCH, **kwargs):
    """The compiled training step on a mesh, its first state and its batch."""
    model, tx = narrow(dtype, **kwargs), optim.make_optimizer(0.01)
    mesh = parallel.make_mesh(rows, columns)
    state = steps.init_state(model, tx, seed=0, crop_size=CROP, mesh=mesh, mode=mode)
    step = steps.make_train_step(
        model,
        tx,
        augment.Augmentation(CROP),
        mesh=mesh,
        mode=mode,
        seed=0,
        accumulate_steps=parts,
    )
    args = (state, parallel.put_batch(batch(examples), mesh), statistics(dtype))
    return step.lower(*args).compile(), *args


@functools.cache
def three_steps(mode, rows, columns, **kwargs):
    """Parameters after each of three float64 steps, velocities, losses, the HLO."""
    with jax.enable_x64(True):
        step, state, on_device, stats = make(mode, rows, columns, jnp.float64, **kwargs)
        params, losses = [], []
        for _ in range(3):
            state, scalars = step(state, on_device, stats)
            params.append(jax.device_get(state.params))
            losses.append(float(scalars["loss"]))
        return params, jax.device_get(state.opt_state), losses, step.as_text()


def assert_same_leaves(got, expected, tolerance):
    leaves = jax.tree_util.tree_leaves_with_path(expected)
    for (path, b), a in zip(leaves, jax.tree.leaves(got), strict=True):
        difference = np.linalg.norm(np.asarray(a - b)) / max(np.linalg.norm(b), 1e-300)
        assert difference < tolerance, jax.tree_util.keystr(path)


@pytest.mark.parametrize("mode, rows, columns", MESHES)
def test_three_steps_are_those_of_one_device(mode, rows, columns):
    params, opt_state, losses, _ = three_steps(mode, rows, columns)
    expected, expected_opt_state, expected_losses, _ = three_steps("data", 1, 1)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-10)
    for got, want in zip(params, expected, strict=True):
        assert_same_leaves(got, want, 1e-10)
    # After one step at rest the velocity is the gradient; it is compared as well.
    assert_same_leaves(opt_state, expected_opt_state, 1e-10)
    assert losses[0] != losses[2]


def test_batch_norm_sees_the_whole_batch():
    want = three_steps("data", 1, 1, normalization="batch")
    got = three_steps("columns", 2, 2, normalization="batch")
    assert_same_leaves(got[0][-1], want[0][-1], 1e-10)


@pytest.mark.parametrize(
    "mode, rows, columns", [("data", 1, 1), ("data", 2, 1), ("columns", 1, 2)]
)
def test_a_batch_in_four_parts_is_the_same_batch(mode, rows, columns):
    """Other masks, crops or lighting in a part would move every parameter."""
    more = {"examples": 8} if rows == 2 else {}  # else the acceptance test's own
    whole = three_steps(mode, rows, columns, **more)
    parts = three_steps(mode, rows, columns, parts=4, **more)
    np.testing.assert_allclose(parts[2], whole[2], rtol=1e-10)
    for got, want in zip(parts[0], whole[0], strict=True):
        assert_same_leaves(got, want, 1e-10)
    assert_same_leaves(parts[1], whole[1], 1e-10)


def test_gradients_are_exchanged_once_however_many_parts():
    whole = three_steps("data", 2, 1, examples=8)[3]
    parts = three_steps("data", 2, 1, examples=8, parts=4)[3]
    assert dict(parallel.collectives(whole)) == {"all-reduce": 18}
    assert parallel.collectives(parts) == parallel.collectives(whole)
    # The loop's body is a computation of its own: all that is sent is outside it.
    entry = parts[parts.index("\nENTRY ") :]
    assert parallel.collectives(entry) == parallel.collectives(parts)
    # The other loops are the random numbers'.
    assert parts.count(" while(") == whole.count(" while(") + 1


def test_batch_norm_in_parts_passes_its_statistics_on():
    """Two parts of two: the running mean moves twice, each time by a tenth."""
    model = narrow(jnp.float32, normalization="batch")
    tx, mesh = optim.make_optimizer(0.01), parallel.make_mesh(2, 1)
    plain = augment.Augmentation(CROP, crop=False, flip=False, lighting=0.0)
    kwargs = {"mesh": mesh, "mode": "data"}
    state = steps.init_state(model, tx, seed=0, crop_size=CROP, **kwargs)
    stats, examples = statistics(jnp.float32), batch()
    images = augment.eval_images(
        examples["image"], mean_image=stats.mean_image, crop_size=CROP
    )
    conv1 = jax.jit(lambda *args: model.apply(*args, method="features")["conv1"])(
        {"params": state.params, "batch_stats": state.batch_stats}, images
    )
    # Each device holds two neighbours; a part is the first, or the second, of both.
    first, second = conv1[::2].mean((0, 1, 2)), conv1[1::2].mean((0, 1, 2))
    step = steps.make_train_step(model, tx, plain, seed=0, accumulate_steps=2, **kwargs)
    state, _ = step(state, parallel.put_batch(examples, mesh), stats)
    np.testing.assert_allclose(
        state.batch_stats["norm1"]["mean"], 0.09 * first + 0.1 * second, rtol=1e-4
    )


def test_parts_take_less_memory():
    def bytes_needed(parts):
        step, *_ = make("data", 1, 1, jnp.float32, parts=parts, examples=8)
        return step.memory_analysis().temp_size_in_bytes

    # A quarter of the activations, and once more the gradients.
    assert bytes_needed(4) < 0.5 * bytes_needed(1)


@functools.cache
def eval_logits_and_sums(mode, rows, columns):
    model = narrow(jnp.float32)
    mesh = parallel.make_mesh(rows, columns)
    state = steps.init_state(
        model, optim.make_optimizer(0.1), seed=3, crop_size=CROP, mesh=mesh, mode=mode
    )
    step = steps.make_eval_step(model, mesh=mesh, mode=mode, crop_size=CROP)
    padded = batch() | {"mask": np.array([1] * 3 + [0], np.float32)}
    stats = statistics(jnp.float32)
    device_batch = parallel.put_batch(padded, mesh)
    sums = step(state.params, state.batch_stats, device_batch, stats)
    images = augment.eval_images(
        padded["image"], mean_image=stats.mean_image, crop_size=CROP
    )
    local = model.local(mesh, mode)
    specs = parallel.param_specs(model.network, state.params, mesh, mode)
    apply = parallel.shard_map(
        lambda params, images: local.apply({"params": params}, images),
        mesh,
        (specs, parallel.P(parallel.DATA)),
        parallel.P(parallel.DATA),
    )
    logits = jax.device_get(jax.jit(apply)(state.params, images))
    return logits, jax.device_get(sums), padded


@pytest.mark.parametrize("mode, rows, columns", MESHES)
def test_float32_logits_and_masked_sums(mode, rows, columns):
    expected, _, padded = eval_logits_and_sums("data", 1, 1)
    logits, sums, _ = eval_logits_and_sums(mode, rows, columns)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(logits / scale, expected / scale, atol=1e-5)
    by_hand = metrics.sums(expected, padded["label"], padded["mask"])
    assert sums["count"] == 3
    np.testing.assert_allclose(sums["loss"], by_hand["loss"], rtol=1e-5)
    assert sums["top1"] == by_hand["top1"] and sums["top5"] == by_hand["top5"]


@pytest.mark.parametrize(
    "mode, rows, columns, expected",
    [
        # Gradients of 16 kernels and biases, the loss and the error.
        ("data", 2, 1, {"all-reduce": 18}),
        # The paper's: features before conv3, fc6 and fc7, their gradients back, and
        # one sum of the logits.
        ("columns", 1, 2, {"all-gather": 3, "all-reduce": 1, "reduce-scatter": 3}),
        # Both: the rows average what each column owns.
        ("columns", 2, 2, {"all-gather": 3, "all-reduce": 19, "reduce-scatter": 3}),
        ("columns", 1, 1, {}),
    ],
)
def test_collectives_are_pinned(mode, rows, columns, expected):
    *_, hlo = three_steps(mode, rows, columns)
    assert dict(parallel.collectives(hlo)) == expected


def test_what_the_columns_exchange_is_what_the_paper_exchanged():
    step, *_ = make("columns", 1, 2, jnp.float32)
    gathered = [line for line in step.as_text().splitlines() if " all-gather(" in line]
    # Full-width: 13 x 13 x 128, 6 x 6 x 128 and 2,048 values an image and direction;
    # at a width of 1/32: 4 maps, 4 maps and 64 units a column, two columns.
    shapes = ("[4,13,13,8]", "[4,6,6,8]", "[4,128]")
    for shape in shapes:
        assert sum(shape in line for line in gathered) == 1, shape


def test_collectives_of_a_single_device_do_not_count():
    text = """
      %a = f32[8]{0} all-reduce(%x), replica_groups={{0},{1}}, to_apply=%add
      %b = (f32[8]{0}, f32[2,2]{1,0}) all-reduce(%x, %y), replica_groups={{0,1}}
      %c = f32[8]{0} all-gather-start(%x), replica_groups=[1,2]<=[2], dimensions={0}
    """
    assert parallel.collectives(text) == {"all-reduce": 2, "all-gather": 1}


def test_optimiser_state_is_split_like_the_parameters():
    model, tx = narrow(jnp.float32), optim.make_optimizer(0.01)
    mesh = parallel.make_mesh(1, 2)
    state = steps.init_state(
        model, tx, seed=0, crop_size=CROP, mesh=mesh, mode="columns"
    )
    kernels = [
        leaf
        for leaf in jax.tree.leaves((state.params, state.opt_state))
        if leaf.ndim > 1
    ]
    assert len(kernels) == 16  # eight kernels and their velocities
    for leaf in kernels:
        assert {s.data.size for s in leaf.addressable_shards} == {leaf.size // 2}


@pytest.mark.parametrize(
    "variant, words",
    [
        ("caffe", "looks across the columns"),
        ("caffenet", "looks across the columns"),
        ("one_tower", "it has 1 column"),
        ("one_gpu", "it has 1 column"),
        ("owt", "it has 1 column"),
        ("cifar", "it has 1 column"),
    ],
)
def test_variants_without_columns_say_why(variant, words):
    model = create_model(variant)
    with pytest.raises(ValueError, match=f"'{variant}' cannot be split.*{words}"):
        model.local(parallel.make_mesh(1, 2), "columns")
    assert model.local(parallel.make_mesh(2, 1), "data").conv_shards == 1


def test_meshes_that_cannot_be_made_are_named():
    with pytest.raises(ValueError, match=r"12 devices \(6 data x 2 column\), found 8"):
        parallel.make_mesh(6, 2)
    with pytest.raises(ValueError, match="at least 1"):
        parallel.make_mesh(0, 2)
    with pytest.raises(ValueError, match="no use for 2 columns"):
        create_model().local(parallel.make_mesh(1, 2), "data")
    with pytest.raises(ValueError, match="must be one of data, columns"):
        create_model().local(parallel.make_mesh(1, 2), "rows")
