"""Every mode on every mesh gives the numbers of one device, with pinned collectives.

Three steps with dropout and augmentation, in float64: in float32 another order of
summation flips the odd max-pool winner, and a gradient moves by a hundredth. The network
`small` runs on two and on four devices, and the narrow network of the paper on some.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alexnet_jax.data import augment
from alexnet_jax.models import ops
from alexnet_jax.models.alexnet import create_model
from alexnet_jax.models.exchange import Exchange
from alexnet_jax.training import describe, metrics, optim, parallel, steps
from alexnet_jax.training.describe import PHASES
from alexnet_jax.training.steps import StepSpec
from tests.models.test_variants import TWO_SIXES
from tests.training import small
from tests.training.small import BATCH, CLASSES, batch, fast_loops, first_state, statistics

SGD = optim.make_optimizer(0.01)
QUICK = [("data", 2, 1), ("columns", 1, 2), ("hybrid", 1, 2), ("hybrid", 2, 2)]
SLOW = [("columns", 2, 2), ("data", 4, 1), ("hybrid", 1, 4)]
REAL = [("data", 2, 1), ("columns", 1, 2), ("hybrid", 2, 2)]  # one mesh per mode
NIGHTLY = [
    ("columns", 1, 1),
    ("hybrid", 1, 2),
    *SLOW,
    ("data", 8, 1),
    ("columns", 4, 2),
    ("hybrid", 1, 8),
    ("hybrid", 2, 4),
    ("hybrid", 4, 2),
]


def slowly(*arguments):
    return pytest.param(*arguments, marks=pytest.mark.slow)


def nightly(*arguments):
    return pytest.param(*arguments, marks=pytest.mark.nightly)


MESHES = [
    *(("small", *mesh) for mesh in QUICK),
    *(slowly("small", *mesh) for mesh in SLOW),
    *(slowly("paper", *mesh) for mesh in REAL),
    *(nightly("paper", *mesh) for mesh in NIGHTLY),
]


def network(dtype, variant, **ablations):
    """Return a small table's network, or a named one at 1/32 of its width."""
    if variant in ("small", "apart"):
        table = {"small": small.SMALL, "apart": small.APART}[variant]
        return small.make_model(dtype, table=table, **ablations)
    return create_model(
        variant, num_classes=CLASSES, width=1 / 32, dtype=dtype, init="he", **ablations
    )


def examples_for(mode, rows, columns):
    """Return the number of examples: four, or one per shard if there are more."""
    return max(BATCH, parallel.batch_shards(rows, columns, mode))


def on_one_device(mode, rows, columns, **kwargs):
    """Return the result on one device that `three_steps` must equal on that mesh."""
    examples = examples_for(mode, rows, columns)
    return three_steps("data", 1, 1, examples=examples, **kwargs)


def make(
    mode,
    rows,
    columns,
    dtype,
    *,
    variant="small",
    parts=1,
    examples=None,
    transform="shard_map",
    tx=None,
    frozen=(),
    **kwargs,
):
    """Return the compiled training step on a mesh, and its arguments."""
    examples = examples or examples_for(mode, rows, columns)
    model, tx = network(dtype, variant, **kwargs), tx or SGD
    mesh, crop = parallel.make_mesh(rows, columns), model.network.crop_size
    spec = StepSpec(
        model,
        tx,
        augment.Augmentation(crop),
        mesh,
        mode,
        transform,
        accumulate_steps=parts,
        frozen=frozen,
    )
    state, step = first_state(spec), steps.make_train_step(spec)
    on_device = parallel.put_batch(batch(examples, crop + 2), mesh, mode, examples)
    args = (state, on_device, statistics(dtype, crop + 2))
    slow = dtype == jnp.float64 and examples > BATCH
    with fast_loops() if slow else contextlib.nullcontext():
        return step.lower(*args).compile(), *args


@functools.cache
def three_steps(mode, rows, columns, **kwargs):
    """Return parameters after each of three float64 steps, velocities, losses, HLO."""
    with jax.enable_x64(True):
        step, state, on_device, stats = make(mode, rows, columns, jnp.float64, **kwargs)
        params, losses = [], []
        for _ in range(3):
            state, scalars = step(state, on_device, stats)
            params.append(jax.device_get(state.params))
            losses.append(float(scalars["loss"]))
        return params, jax.device_get(state.opt_state), losses, step.as_text()


def assert_same_leaves(got, expected, tolerance=1e-10):
    leaves = jax.tree_util.tree_leaves_with_path(expected)
    for (path, b), a in zip(leaves, jax.tree.leaves(got), strict=True):
        difference = np.linalg.norm(np.asarray(a - b)) / max(np.linalg.norm(b), 1e-300)
        assert difference < tolerance, jax.tree_util.keystr(path)


def by_phase(found, phase):
    return [exchange for exchange in found if exchange.phase == phase]


def collectives(hlo):
    return dict(describe.counts(describe.exchanges(hlo)))


def assert_same_run(got, want):
    np.testing.assert_allclose(got[2], want[2], rtol=1e-10)
    for params, expected in zip(got[0], want[0], strict=True):
        assert_same_leaves(params, expected)
    # After one step at rest the velocity is the gradient; it is compared as well.
    assert_same_leaves(got[1], want[1])


@pytest.mark.parametrize("variant, mode, rows, columns", MESHES)
def test_three_steps_equal_those_of_one_device(variant, mode, rows, columns):
    got = three_steps(mode, rows, columns, variant=variant)
    assert_same_run(got, on_one_device(mode, rows, columns, variant=variant))
    assert got[2][0] != got[2][2]


@pytest.mark.parametrize(
    "variant, mode, rows, columns",
    [
        slowly("apart", "columns", 2, 2),
        slowly("original", "columns", 2, 2),
        nightly("no_communication", "columns", 2, 2),
        nightly("six_conv", "columns", 1, 2),
        nightly("no_overlap", "columns", 1, 2),
        nightly("original", "hybrid", 2, 2),
        *(
            nightly(name, *mesh)
            for name in ("original", "no_communication")
            for mesh in (("data", 2, 1), ("hybrid", 1, 4))
        ),
        nightly("no_communication", "hybrid", 2, 2),
        # One column: dropout before fc6, on a device's own examples.
        slowly("owt", "hybrid", 1, 4),
        nightly("one_tower", "hybrid", 1, 2),
    ],
)
def test_other_variants_equal_those_of_one_device(variant, mode, rows, columns):
    want = on_one_device(mode, rows, columns, variant=variant)
    assert_same_run(three_steps(mode, rows, columns, variant=variant), want)


@pytest.mark.parametrize(
    "variant, mode, rows, columns",
    [("small", "data", 2, 1), slowly("small", "hybrid", 2, 2), nightly("paper", "hybrid", 2, 2)],
)
def test_gpu_operators_and_exchanges_give_the_same_run(variant, mode, rows, columns):
    with ops.compiling_for("gpu"):
        got = three_steps.__wrapped__(mode, rows, columns, variant=variant)
    assert_same_run(got, on_one_device(mode, rows, columns, variant=variant))


@functools.cache
def train_small(model, mode, rows, columns, *, steps_taken):
    """Return the state on the host and the collectives of a small network's step."""
    side, mesh = model.network.crop_size, parallel.make_mesh(rows, columns)
    examples = batch(8, side)
    examples["label"] %= model.network.layers[-1].features
    stats = jax.tree.map(np.asarray, augment.imagenet_statistics(side))
    tx = optim.make_optimizer(1e-3)
    spec = StepSpec(model, tx, augment.Augmentation(side), mesh, mode)
    state, step = steps.init_state(spec), steps.make_train_step(spec)
    args = (parallel.put_batch(examples, mesh, mode, 8), stats)
    compiled = step.lower(state, *args).compile()
    for _ in range(steps_taken):
        state, _ = compiled(state, *args)
    return jax.device_get(state), describe.exchanges(compiled.as_text())


@pytest.mark.parametrize("rows, columns, width", [slowly(1, 2, 1 / 8), nightly(2, 4, 1.0)])
def test_classifier_of_feature_maps_needs_one_all_to_all(rows, columns, width):
    """Expect one all-to-all before the only fully connected layer of CIFAR-10's nets."""
    model = create_model("cifar_11", dtype="float64", init="he", width=width)
    with jax.enable_x64(True):
        want, _ = train_small(model, "data", 1, 1, steps_taken=1)
        got, found = train_small(model, "hybrid", rows, columns, steps_taken=1)
    assert_same_leaves(got.params, want.params)
    kinds = [dict(describe.counts(by_phase(found, p))) for p in PHASES[:2]]
    assert kinds == [{"all-to-all": 1, "reduce-scatter": 1}, {"all-to-all": 1, "all-gather": 1}]


@pytest.mark.parametrize("mode, rows", [nightly("hybrid", 1), ("hybrid", 2), slowly("columns", 2)])
def test_batch_norms_of_equal_number_are_split_with_their_layers(mode, rows):
    model = create_model(TWO_SIXES, dtype="float64", init="he")
    with jax.enable_x64(True):
        want, _ = train_small(model, "data", 1, 1, steps_taken=3)
        got, _ = train_small(model, mode, rows, 2, steps_taken=3)
    assert_same_leaves((got.params, got.batch_stats), (want.params, want.batch_stats))
    assert np.ptp(got.params["norm_fc6"]["scale"]) > 0
    assert np.ptp(got.params["norm6"]["scale"]) > 0


@pytest.mark.parametrize(
    "mode, rows, columns", [slowly("data", 1, 1), slowly("data", 4, 1), slowly("hybrid", 2, 2)]
)
def test_several_views_are_averaged(mode, rows, columns):
    """Compare sums for the centre view, and for the mean probabilities over ten views."""
    model = create_model("cifar_11", init="he", width=1 / 8)
    size, crop, examples = 28, 24, 4
    mesh = parallel.make_mesh(rows, columns)
    spec = StepSpec(model, SGD, augment.Augmentation(crop), mesh, mode)
    state, step = steps.init_state(spec), steps.make_eval_step(spec, views=10)
    padded = batch(examples, size) | {"mask": np.array([1, 1, 1, 0], np.float32)}
    stats = augment.imagenet_statistics(size)
    on_device = parallel.put_batch(padded, mesh, mode, examples)
    sums = step(state.params, state.batch_stats, on_device, stats)
    views = [
        augment.eval_images(view, mean_image=stats.mean_image, crop_size=crop)
        for view in augment.several_views(padded["image"], 10, crop)
    ]
    params = jax.device_get(state.params)
    apply = jax.jit(model.apply)
    logits = [np.asarray(apply({"params": params}, view)) for view in views]
    mean = np.mean([jax.nn.softmax(z) for z in logits], axis=0)
    labels, mask = padded["label"], padded["mask"]
    own = np.log(mean[np.arange(examples), labels])
    assert sums["count"] == sums["views_count"] == 3
    np.testing.assert_allclose(sums["views_loss"], -own[:3].sum(), rtol=1e-5)
    assert sums["views_top1"] == np.sum((mean.argmax(-1) == labels) * mask)
    centre = metrics.sums(jnp.asarray(logits[0]), labels, jnp.asarray(mask))
    np.testing.assert_allclose(sums["loss"], centre["loss"], rtol=1e-5)


@pytest.mark.parametrize(
    "variant, rows", [slowly("small", 2), nightly("paper", 2), nightly("paper", 8)]
)
def test_pmap_is_the_same_step(variant, rows):
    got = three_steps("data", rows, 1, variant=variant, transform="pmap")
    assert_same_run(got, on_one_device("data", rows, 1, variant=variant))
    assert collectives(got[3]) == {"all-reduce": 18}


@pytest.mark.slow
def test_missing_reduction_is_noticed(monkeypatch):
    """Expect a difference under pmap, and an error under shard_map."""
    want = on_one_device("data", 2, 1)
    monkeypatch.setattr(parallel, "sum_gradients", lambda grads, *_: grads)
    with jax.enable_x64(True):
        step, *args = make("data", 2, 1, jnp.float64, transform="pmap")
        state, _ = step(*args)
    with pytest.raises(AssertionError):
        assert_same_leaves(jax.device_get(state.params), want[0][0], 1e-3)
    with pytest.raises(ValueError, match="out_specs"):
        make("data", 2, 1, jnp.float32)


@pytest.mark.parametrize(
    "variant, mode, rows, columns",
    [slowly("small", "hybrid", 2, 2), nightly("paper", "columns", 2, 2)],
)
def test_batch_norm_sees_the_whole_batch(variant, mode, rows, columns):
    norm = {"variant": variant, "normalization": "batch"}
    want = on_one_device(mode, rows, columns, **norm)
    got = three_steps(mode, rows, columns, **norm)
    assert_same_leaves(got[0][-1], want[0][-1])


@pytest.mark.parametrize(
    "variant, mode, rows, columns, count",
    [
        ("small", "data", 2, 1, 2),
        ("small", "hybrid", 1, 2, 2),
        nightly("paper", "data", 1, 1, 4),
        nightly("paper", "columns", 1, 2, 4),
        slowly("small", "hybrid", 2, 2, 2),
        nightly("paper", "hybrid", 2, 2, 2),
    ],
)
def test_micro_batches_equal_one_batch(variant, mode, rows, columns, count):
    # A micro-batch has at least one example on every device.
    shards = parallel.batch_shards(rows, columns, mode)
    more = {} if BATCH % (shards * count) == 0 else {"examples": shards * count}
    whole = three_steps(mode, rows, columns, variant=variant, **more)
    parts = three_steps(mode, rows, columns, variant=variant, parts=count, **more)
    assert_same_run(parts, whole)


def test_gradients_are_exchanged_once_for_any_number_of_micro_batches():
    whole = three_steps("data", 2, 1)[3]
    parts = three_steps("data", 2, 1, parts=2)[3]
    assert collectives(whole) == collectives(parts) == {"all-reduce": 18}
    # The body of the loop is another computation: all exchanges are outside it.
    assert collectives(parts[parts.index("\nENTRY ") :]) == {"all-reduce": 18}
    # It is a loop; unrolled, each convolution would be there once more.
    assert parts.count(" convolution(") == whole.count(" convolution(") > 0


@pytest.mark.slow
def test_batch_norm_averages_over_micro_batches_in_turn():
    """Expect the running mean to move twice for two parts of two, each time by a tenth."""
    model, crop = small.make_model(normalization="batch"), small.CROP
    tx, mesh = optim.make_optimizer(0.01), parallel.make_mesh(2, 1)
    plain = augment.Augmentation(crop, crop=False, flip=False, lighting=0.0)
    spec = StepSpec(model, tx, plain, mesh, accumulate_steps=2)
    state, step = steps.init_state(spec), steps.make_train_step(spec)
    stats, examples = statistics(jnp.float32), batch(4)
    images = augment.eval_images(examples["image"], mean_image=stats.mean_image, crop_size=crop)
    conv1 = jax.jit(lambda *args: model.apply(*args, method="features")["conv1"])(
        {"params": state.params, "batch_stats": state.batch_stats}, images
    )
    # Each device holds two neighbours; a micro-batch is the first, or second, of both.
    first, second = conv1[::2].mean((0, 1, 2)), conv1[1::2].mean((0, 1, 2))
    state, _ = step(state, parallel.put_batch(examples, mesh, "data", 4), stats)
    np.testing.assert_allclose(
        state.batch_stats["norm1"]["mean"], 0.09 * first + 0.1 * second, rtol=1e-4
    )


@pytest.mark.slow
def test_micro_batches_take_less_memory():
    def bytes_needed(parts):
        step, *_ = make("data", 1, 1, jnp.float32, variant="paper", parts=parts, examples=8)
        return step.memory_analysis().temp_size_in_bytes

    # A quarter of the activations, and once more the gradients.
    assert bytes_needed(4) < 0.5 * bytes_needed(1)


@functools.cache
def eval_logits_and_sums(variant, mode, rows, columns, examples):
    model = network(jnp.float32, variant)
    mesh, crop = parallel.make_mesh(rows, columns), model.network.crop_size
    spec = StepSpec(model, SGD, augment.Augmentation(crop), mesh, mode, seed=3)
    state, step = steps.init_state(spec), steps.make_eval_step(spec)
    padded = batch(examples, crop + 2) | {"mask": (np.arange(examples) < 3).astype(np.float32)}
    stats = statistics(jnp.float32, crop + 2)
    device_batch = parallel.put_batch(padded, mesh, mode, examples)
    sums = step(state.params, state.batch_stats, device_batch, stats)
    images = augment.eval_images(padded["image"], mean_image=stats.mean_image, crop_size=crop)
    local, specs = spec.local_model, steps.state_specs(spec).params
    examples = parallel.P(spec.batch_axes)
    apply = parallel.on_devices(
        lambda params, images: local.apply({"params": params}, images),
        mesh,
        (specs, examples),
        examples,
    )
    logits = jax.device_get(jax.jit(apply)(state.params, images))
    return logits, jax.device_get(sums), padded


@pytest.mark.parametrize(
    "variant, mode, rows, columns",
    [
        slowly("small", "hybrid", 2, 2),
        slowly("paper", "columns", 2, 2),
        slowly("paper", "data", 4, 1),
        slowly("paper", "hybrid", 1, 4),
        *(nightly("paper", *mesh) for mesh in NIGHTLY),
    ],
)
def test_float32_logits_and_masked_sums(variant, mode, rows, columns):
    examples = examples_for(mode, rows, columns)
    expected, _, padded = eval_logits_and_sums(variant, "data", 1, 1, examples)
    logits, sums, _ = eval_logits_and_sums(variant, mode, rows, columns, examples)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(logits / scale, expected / scale, atol=1e-5)
    by_hand = metrics.sums(expected, padded["label"], padded["mask"])
    assert sums["count"] == 3
    np.testing.assert_allclose(sums["loss"], by_hand["loss"], rtol=1e-5)
    assert sums["top1"] == by_hand["top1"] and sums["top5"] == by_hand["top5"]


# The exchanges of a training step. Gradients that are summed: 16 kernels and biases,
# and with them go the loss and the error.
FEATURES = {"all-gather": 3, "all-reduce": 1}
FEATURES_BACK = {"reduce-scatter": 3}
# One gather of examples before fc6, one of features before fc7; every device's parts
# of the logits are summed on the device of the example. The backward pass mirrors it.
HYBRID = {"all-gather": 2, "reduce-scatter": 1}
HYBRID_BACK = {"all-gather": 1, "reduce-scatter": 2}
# Kernels and biases of five convolutions, fc8's bias; loss and error.
CONVOLUTIONS = {"all-reduce": 13}
EXCHANGES = {
    ("columns", 1, 1): ({}, {}, {}),
    ("data", 2, 1): ({}, {}, {"all-reduce": 18}),
    ("data", 4, 1): ({}, {}, {"all-reduce": 18}),
    ("data", 8, 1): ({}, {}, {"all-reduce": 18}),
    ("columns", 1, 2): (FEATURES, FEATURES_BACK, {}),
    # Rows of columns average what each column owns.
    ("columns", 2, 2): (FEATURES, FEATURES_BACK, {"all-reduce": 18}),
    ("columns", 4, 2): (FEATURES, FEATURES_BACK, {"all-reduce": 18}),
    ("hybrid", 1, 2): (HYBRID, HYBRID_BACK, CONVOLUTIONS),
    ("hybrid", 1, 4): (HYBRID, HYBRID_BACK, CONVOLUTIONS),
    ("hybrid", 1, 8): (HYBRID, HYBRID_BACK, CONVOLUTIONS),
    # Two rows also sum the parts of the fully connected layers' gradients.
    ("hybrid", 2, 2): (HYBRID, HYBRID_BACK, {"all-reduce": 18}),
    ("hybrid", 2, 4): (HYBRID, HYBRID_BACK, {"all-reduce": 18}),
    ("hybrid", 4, 2): (HYBRID, HYBRID_BACK, {"all-reduce": 18}),
}


@pytest.mark.parametrize("variant, mode, rows, columns", MESHES)
def test_collectives_are_pinned(variant, mode, rows, columns):
    *_, hlo = three_steps(mode, rows, columns, variant=variant)
    found = describe.exchanges(hlo)
    got = [dict(describe.counts(by_phase(found, p))) for p in PHASES]
    assert tuple(got) == EXCHANGES[mode, rows, columns]


# With frozen convolutions: no exchange for their gradients.
FROZEN = {
    ("columns", 1, 2): ({"reduce-scatter": 1}, {}),
    ("data", 2, 1): ({}, {"all-reduce": 8}),
    ("hybrid", 2, 2): ({"all-gather": 1, "reduce-scatter": 1}, {"all-reduce": 8}),
}


@pytest.mark.parametrize(
    "variant, mode, rows, columns, parts",
    [
        slowly("small", "columns", 1, 2, 1),
        slowly("small", "data", 2, 1, 2),
        slowly("small", "hybrid", 2, 2, 1),
    ],
)
def test_frozen_layers_stay_and_their_gradients_are_left_out(variant, mode, rows, columns, parts):
    frozen = tuple(f"conv{number}" for number in range(1, 6))
    changes = [(name, 0, 0.0) for name in frozen]
    assert optim.frozen_layers(changes) == set(frozen)
    factors = optim.make_layer_factors(changes, steps_per_epoch=1)
    tx = optim.make_optimizer(0.01, layer_factors=factors)
    whole, *_ = on_one_device(mode, rows, columns, variant=variant, tx=tx)
    kwargs = {"variant": variant, "tx": tx, "frozen": frozen, "parts": parts}
    params, *_, hlo = three_steps(mode, rows, columns, **kwargs)
    for before, after in zip(params, whole, strict=True):
        assert_same_leaves(before, after)
    for name in params[0]:
        moved = np.any(params[0][name]["kernel"] != params[2][name]["kernel"])
        assert moved == (name not in frozen), name
    found = describe.exchanges(hlo)
    got = [dict(describe.counts(by_phase(found, p))) for p in PHASES[1:]]
    assert tuple(got) == FROZEN[mode, rows, columns]


@pytest.mark.parametrize("variant", ["apart", nightly("no_communication")])
def test_columns_without_communication_exchange_only_logits(variant):
    *_, hlo = three_steps("columns", 2, 2, variant=variant)
    found = describe.exchanges(hlo)
    assert [e.shape for e in by_phase(found, "forward")] == [(BATCH // 2, CLASSES)]
    assert not by_phase(found, "backward")


@pytest.mark.parametrize("variant, mode, rows, columns", MESHES)
def test_nothing_gathers_images_kernels_or_optimiser_state(variant, mode, rows, columns):
    params, *_, hlo = three_steps(mode, rows, columns, variant=variant)
    examples = examples_for(mode, rows, columns)
    kernels = {leaf.shape for leaf in jax.tree.leaves(params[0])}
    grids = ((13, 13), (6, 6)) if variant == "paper" else ((5, 5), (2, 2))
    for exchange in describe.exchanges(hlo):
        if exchange.kind == "all-gather":
            assert exchange.shape not in kernels
            # [examples, ..., features]: of a device's or a row's examples, after conv2.
            assert exchange.shape[0] in (examples // rows, examples // rows // columns)
            assert exchange.shape[1:-1] in (*grids, ())


@pytest.mark.parametrize(
    "variant, values",
    [
        # Half of conv2's maps, of conv5's and of fc6's units.
        ("small", [2 * 2 * 4, 64, 5 * 5 * 4]),
        # Full width: 13 x 13 x 128, 6 x 6 x 128 and 2,048 values an image and direction;
        # at a width of 1/32 4 maps, 4 maps and 64 units a column.
        slowly("paper", [64, 6 * 6 * 4, 13 * 13 * 4]),
    ],
)
def test_columns_exchange_as_much_as_in_the_paper(variant, values):
    *_, hlo = three_steps("columns", 1, 2, variant=variant)
    found = describe.exchanges(hlo)
    sent = [e.sent_bytes / 8 / BATCH for e in found if e.kind == "all-gather"]
    assert sorted(sent) == values
    assert [e.shape for e in found if e.kind == "all-reduce"] == [(BATCH, CLASSES)]
    back = [e.sent_bytes / 8 / BATCH for e in by_phase(found, "backward")]
    assert sorted(back) == values


@pytest.mark.parametrize(
    "variant, mode, rows, columns, split",
    [
        ("small", "hybrid", 2, 2, 6),
        slowly("small", "columns", 2, 2, 16),
        nightly("paper", "columns", 2, 2, 16),
        nightly("paper", "hybrid", 1, 4, 6),
    ],
)
def test_velocities_are_split_like_the_parameters(variant, mode, rows, columns, split):
    """Count the kernels and velocities, of eight each, that are split."""
    factors = optim.make_layer_factors([("conv1", 1, 0.0)], steps_per_epoch=1)
    original = optim.make_optimizer(
        optax.constant_schedule(0.01), bias_learning_rate=0.02, layer_factors=factors
    )
    step, put, *args = make(mode, rows, columns, jnp.float32, variant=variant, tx=original)
    mesh, model = parallel.make_mesh(rows, columns), network(jnp.float32, variant)
    crop = augment.Augmentation(model.network.crop_size)
    spec = StepSpec(model, original, crop, mesh, mode)
    state = steps.init_state(spec)
    for made, wanted in zip(*map(jax.tree.leaves, (state, put)), strict=True):
        np.testing.assert_allclose(made, wanted, rtol=1e-6)
    for _ in range(2):  # as it is made, and as a step leaves it
        kernels, matching = (
            [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim > 1]
            for tree in (state.params, state.opt_state)
        )
        assert len(matching) == len(kernels) == 8
        for kernel, velocity in zip(kernels, matching, strict=True):
            assert velocity.shape == kernel.shape
            assert velocity.sharding.is_equivalent_to(kernel.sharding, kernel.ndim)
        sizes = [
            {shard.data.size for shard in leaf.addressable_shards} == {leaf.size // columns}
            for leaf in [*kernels, *matching]
        ]
        assert sum(sizes) == split
        # No device holds what belongs to another one.
        used = [leaf.sharding.device_set for leaf in jax.tree.leaves(state)]
        assert all(len(devices) == rows * columns for devices in used)
        state, _ = step(state, *args)


@pytest.mark.parametrize(
    "variant, words",
    [
        ("caffe", "looks across the columns"),
        ("one_gpu", "it has 1 column"),
        ("cifar", "it has 1 column"),
    ],
)
def test_variants_without_columns_name_the_reason(variant, words):
    model = create_model(variant)
    with pytest.raises(ValueError, match=f"'{variant}' cannot be split.*{words}"):
        parallel.local_model(model, parallel.make_mesh(1, 2), "columns")
    for rows, columns, mode, exchange in (
        (2, 1, "data", Exchange(("data",))),
        (1, 2, "hybrid", parallel.Hybrid(("column",), 2)),
    ):
        local = parallel.local_model(model, parallel.make_mesh(rows, columns), mode)
        assert local.exchange == exchange


def test_impossible_meshes_and_modes_are_named():
    with pytest.raises(ValueError, match=r"12 devices \(6 data x 2 column\), found 8"):
        parallel.make_mesh(6, 2)
    for columns, mode, words in (
        (2, "data", "no use for 2 columns"),
        (2, "rows", "must be one of data, columns, hybrid"),
        (3, "hybrid", "4096 units of fc6 do not divide by 3"),
    ):
        with pytest.raises(ValueError, match=words):
            parallel.local_model(create_model(), parallel.make_mesh(1, columns), mode)


def test_every_device_has_its_part_of_the_batch():
    """Check one process; tests/training/test_distributed.py has several."""
    for mode, rows, columns in QUICK:
        mesh = parallel.make_mesh(rows, columns)
        assert parallel.positions(mesh, mode, BATCH) == (0, BATCH)
        shards = parallel.batch_shards(rows, columns, mode)
        labels = parallel.put_batch(batch(), mesh, mode, BATCH)["label"]
        assert {s.data.shape for s in labels.addressable_shards} == {(BATCH // shards,)}
        np.testing.assert_array_equal(labels, batch()["label"])
