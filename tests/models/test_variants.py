"""The layer tables: parameter counts from the literature, and every override."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from alexnet_jax.models import layers, variants
from alexnet_jax.models.ablations import customize
from alexnet_jax.models.alexnet import create_model
from alexnet_jax.models.summary import summary

# Total parameters and multiply-adds. `paper` 60,965,224 and 724,406,816, `owt`
# 61,100,840 and 714,188,480 (torchvision's own count), `one_tower` 62,378,344 and
# 1,135,256,096, `one_gpu` 59,798,312: sums of kernel sizes, done by hand.
COUNTS = {
    "paper": (60_965_224, 724_406_816),
    "original": (60_965_224, 724_406_816),
    # conv2 320 of 48, conv3 384 of 160, fc6 8,192 of 4,608, fc7 4,096 of 4,096.
    "no_communication": (60_714_408, 724_323_872),
    "six_conv": (61_555_304, 745_640_480),  # and 256 kernels of 3 x 3 x 256 at 6 x 6
    # conv2 at 26 x 26 instead of 27 x 27, conv5 at 11 x 11 instead of 13 x 13.
    "no_overlap": (60_965_224, 724_406_816 - 53 * 307_200 - 48 * 442_368),
    "caffe": (60_965_224, 724_406_816),
    "caffenet": (60_965_224, 724_406_816),
    "one_tower": (62_378_344, 1_135_256_096),
    "one_gpu": (59_798_312, 391_514_384),
    "owt": (61_100_840, 714_188_480),
    "zfnet": (62_357_608, 1_168_032_896),
    "cifar": (89_578, 12_298_240),
    # local3 36 places of 3 x 3 x 64 x 64 (x 32) and as many biases, local4 x 32.
    "cifar_11": (2_112_970, 19_512_576),
    "cifar_13": (1_116_490, 18_517_248),
}
PAPER_LAYERS = {
    "conv1": ((55, 55, 96), 34_944, 105_415_200),
    "conv2": ((27, 27, 256), 307_456, 223_948_800),
    "conv3": ((13, 13, 384), 885_120, 149_520_384),
    "conv4": ((13, 13, 384), 663_936, 112_140_288),
    "conv5": ((13, 13, 256), 442_624, 74_760_192),
    "fc6": ((4096,), 37_752_832, 37_748_736),
    "fc7": ((4096,), 16_781_312, 16_777_216),
    "fc8": ((1000,), 4_097_000, 4_096_000),
}
# Two layers of one number, each with batch norm.
# fmt: off
_RELU_NORM = (variants.RELU, layers.BatchNorm())
TWO_SIXES = layers.Variant("two_sixes", columns=2, grid=8, crop_size=16, layers=(
    layers.Conv("conv1", 4, kernel=3, stride=2, padding=1, then=(variants.RELU,)),
    layers.Conv("conv6", 8, kernel=3, padding=1, sees="own", then=_RELU_NORM),
    layers.Dense("fc6", 16, then=(*_RELU_NORM, variants.PAPER_DROPOUT)),
    layers.Dense("fc8", 5, then=()),
))
# fmt: on


def totals(model, size=None):
    rows = summary(model, size)
    return sum(r.parameters for r in rows), sum(r.multiply_adds for r in rows)


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name):
    assert totals(create_model(name)) == COUNTS[name]


def test_paper_layer_by_layer():
    rows = {r.name: r for r in summary(create_model("paper"))}
    for name, numbers in PAPER_LAYERS.items():
        row = rows[name]
        assert (row.shape, row.parameters, row.multiply_adds) == numbers
    order = "conv1 norm1 pool1 conv2 norm2 pool2 conv3 conv4 conv5 pool5 fc6 fc7 fc8"
    assert " ".join(rows) == order
    # Section 3.5 rounds its neurons to 650,000: those of the convolutions.
    neurons = [math.prod(row.shape) for row in rows.values() if row.parameters]
    assert sum(neurons[:5]) == 650_080


def test_one_column_is_the_ungrouped_network():
    assert totals(create_model("paper", columns=1))[0] == 62_378_344
    assert totals(create_model("one_tower", columns=2))[0] == 60_965_224


def test_both_input_sizes_of_the_paper_give_the_same_network():
    assert totals(create_model("paper"), 227) == COUNTS["paper"]
    with pytest.raises(ValueError, match="227 to 230 pixels; images of 224"):
        summary(create_model("caffe"), 224)
    with pytest.raises(ValueError, match=r"224 to 227 pixels.*228 pixels give 56x56"):
        summary(create_model("paper"), 228)


def test_layers_of_equal_number_have_separate_norms():
    model = create_model(TWO_SIXES, init="he")
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    scales = {
        name: layer["scale"].shape for name, layer in shapes["params"].items() if "scale" in layer
    }
    assert scales == {"norm6": (8,), "norm_fc6": (16,)}
    assert set(shapes["batch_stats"]) == set(scales)
    # Kernel and bias of each layer, two numbers per feature in the norms.
    assert [(row.name, row.parameters) for row in summary(model)] == [
        ("conv1", 27 * 4 + 4),
        ("conv6", 18 * 8 + 8),
        ("norm6", 2 * 8),
        ("fc6", 512 * 16 + 16),
        ("norm_fc6", 2 * 16),
        ("fc8", 16 * 5 + 5),
    ]


def stages(name, **overrides):
    return customize(variants.get(name), **overrides).stages


def of_kind(kind, name, **overrides):
    return [stage for stage in stages(name, **overrides) if isinstance(stage, kind)]


def test_normalization_overrides():
    assert of_kind(layers.NORMS, "paper") == [variants.PAPER_LRN] * 2
    assert of_kind(layers.NORMS, "paper", lrn=False) == []
    assert stages("paper", lrn=True) == stages("paper")
    assert stages("paper", normalization="none") == stages("paper", lrn=False)
    assert of_kind(layers.NORMS, "paper", normalization="batch") == [layers.BatchNorm()] * 2
    # Layer 2 of the original normalises twice; one batch norm takes their place.
    relu, pool = variants.RELU, variants.OVERLAPPING
    rows = customize(variants.get("original"), normalization="batch").layers
    assert rows[0].then == (layers.BatchNorm(), pool, relu)
    assert rows[1].then == (relu, layers.BatchNorm(), pool)
    # A table without any gets the paper's, after the activations of conv1 and conv2.
    first = customize(variants.get("owt"), lrn=True).layers[0].then
    assert first == (variants.RELU, variants.PAPER_LRN, variants.OVERLAPPING)
    assert of_kind(layers.NORMS, "owt", lrn=True) == [variants.PAPER_LRN] * 2
    assert of_kind(layers.NORMS, "cifar", lrn=False) == []
    # LRN takes the place of a table's own batch norm, too.
    assert customize(TWO_SIXES, lrn=True).layers[1].then == (variants.RELU, variants.PAPER_LRN)
    with pytest.raises(ValueError, match="twice"):
        stages("paper", lrn=False, normalization="batch")


def test_norm_layers_and_norm_place():
    relu, lrn, pool = variants.RELU, variants.PAPER_LRN, variants.OVERLAPPING

    def first_two(name="paper", **overrides):
        table = customize(variants.get(name), **overrides)
        return [row.then for row in table.layers[:2]]

    with_lrn, without = (relu, lrn, pool), (relu, pool)
    assert first_two(norm_layers=("conv1",)) == [with_lrn, without]
    assert first_two(norm_layers=()) == [without, without]
    assert first_two(norm_place="before") == [(lrn, relu, pool)] * 2
    assert first_two(norm_place="after") == [with_lrn] * 2
    batch = layers.BatchNorm()
    before = first_two(normalization="batch", norm_place="before")
    assert before == [(batch, relu, pool)] * 2
    # The original's layer 1 has its units last, its layer 2 two normalisations.
    first, second = first_two("original")
    assert first_two("original", norm_place="after") == [(pool, relu, first[0]), second]
    moved = (*second[1:3], relu, pool)
    assert first_two("original", norm_place="before") == [first, moved]
    for bad, words in (
        ({"norm_layers": ("conv3",)}, "'conv3' of variant 'paper' is not normalised;"),
        ({"norm_layers": ("conv1",), "lrn": False}, "these are: none"),
        ({"pool_kind": "median"}, "pool_kind='median' must be one of max, avg"),
    ):
        with pytest.raises(ValueError, match=words):
            first_two(**bad)


@pytest.mark.parametrize(
    "name, value, field",
    [
        ("lrn_size", 3, "size"),
        ("lrn_k", 1.0, "k"),
        ("lrn_alpha", 5e-4, "alpha"),
        ("lrn_beta", 1.0, "beta"),
        ("lrn_alpha_mode", "mean", "alpha_mode"),
        ("lrn_per_column", False, "per_column"),
    ],
)
def test_lrn_constants_are_overrides(name, value, field):
    wanted = dataclasses.replace(variants.PAPER_LRN, **{field: value})
    assert of_kind(layers.Lrn, "paper", **{name: value}) == [wanted] * 2
    # Within-map normalisation, the original's second in layer 2, has constants of its own.
    within = of_kind(layers.WithinMapLrn, "original", **{name: value})
    assert within == of_kind(layers.WithinMapLrn, "original") and len(within) == 1
    with pytest.raises(ValueError, match=f"{name} changes LRN, and the network 'owt'"):
        stages("owt", **{name: value})


@pytest.mark.parametrize(
    "name, value",
    [("lrn_k", 0.0), ("lrn_k", -1.0), ("lrn_k", math.nan), ("lrn_size", 4), ("lrn_alpha", -1e-4)]
    + [("lrn_beta", math.inf), ("lrn_alpha_mode", "max"), ("width", 0), ("columns", 1.5)]
    + [("dropout", 1.0), ("pool_window", 0), ("pool_kind", "median"), ("activation", "gelu")]
    + [("norm_place", "over"), ("normalization", "group"), ("num_classes", 0)],
)
def test_values_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r} must be"):
        stages("paper", **{name: value})


def test_pooling_activation_and_dropout_overrides():
    assert of_kind(layers.Pool, "paper", pool_window=2) == [layers.Pool(2, 2)] * 3
    rows = {r.name: r.shape for r in summary(create_model("paper", pool_window=2))}
    assert [rows[f"pool{i}"][0] for i in (1, 2, 5)] == [27, 13, 6]
    assert of_kind(layers.Pool, "paper", pool_stride=3) == [layers.Pool(3, 3)] * 3
    assert of_kind(layers.Pool, "paper", pool_kind="avg") == [layers.Pool(3, 2, "avg")] * 3
    tanh = [layers.Activation("tanh")] * 7
    assert of_kind(layers.Activation, "owt", activation="tanh") == tanh
    assert of_kind(layers.Dropout, "owt", dropout=0.25) == [layers.Dropout(0.25, "train")] * 2


def test_width_keeps_columns_and_classifier():
    table = customize(variants.get("paper"), width=0.25, num_classes=7)
    assert [row.features for row in table.layers] == [24, 64, 96, 96, 64, 1024, 1024, 7]
    narrow = customize(variants.get("paper"), width=1 / 100)
    assert all(row.features % 2 == 0 for row in narrow.layers[:-1])
    with pytest.raises(ValueError, match="do not divide into 7 columns"):
        customize(variants.get("paper"), columns=7)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="'conv1' cannot be left out.*conv2, conv3"):
        create_model("paper", skip=["conv1"])
    with pytest.raises(ValueError, match="no variant 'alexnet'; the variants are pap"):
        create_model("alexnet")
    with pytest.raises(TypeError, match="no ablation 'pooling'; the ablations are skip"):
        create_model(pooling=2)


# Side of the maps after each layer and pooling.
GRIDS = {
    "paper": [55, 27, 27, 13, 13, 13, 13, 6],
    "no_overlap": [55, 28, 26, 13, 13, 13, 11, 6],
    "zfnet": [110, 55, 26, 13, 13, 13, 13, 6],
    "cifar": [32, 16, 16, 8, 8, 4],
    "cifar_11": [24, 12, 12, 6, 6, 6],
}


@pytest.mark.parametrize("name", GRIDS)
def test_map_sizes(name):
    rows = [row for row in summary(create_model(name)) if len(row.shape) == 3]
    assert [r.shape[0] for r in rows if not r.name.startswith("norm")] == GRIDS[name]


def column(name, field):
    return [getattr(row, field) for row in variants.get(name).layers]


def test_tables_have_the_constants_of_their_sources():
    """Compare with layers-145.cfg, layers-147.cfg, layers-150.cfg, Caffe and cuda-convnet."""
    assert column("paper", "bias") == [0, 1, 0, 1, 1, 1, 1, 0]
    assert column("caffe", "bias") == [0, 0.1, 0, 0.1, 0.1, 0.1, 0.1, 0]
    assert column("caffenet", "bias") == column("original", "bias")
    assert column("original", "bias") == column("paper", "bias")
    sees = ["all", "own", "all", "own", "own", "all", "all", "all"]
    assert column("original", "sees") == column("paper", "sees") == sees
    stds = [0.01, 0.01, 0.03, 0.03, 0.03, 0.01, 0.01, 0.01]
    assert column("original", "weight_std") == column("no_overlap", "weight_std") == stds
    # The columns meet in the classifier only: 160 maps and 4,096 units per column.
    assert column("no_communication", "sees")[1:] == ["own"] * 6 + ["all"]
    assert column("no_communication", "features")[1:6] == [320, 384, 384, 256, 8192]
    assert variants.get("no_communication").stages == variants.get("original").stages
    assert column("cifar", "weight_decay") == [0.004, 0.004, 0.004, 1.0]
    for name, decay in (("cifar_11", 0.01), ("cifar_13", 0.004)):
        assert column(name, "weight_std") == [1e-4, 0.01, 0.04, 0.04, 0.01]
        assert column(name, "weight_decay") == [0, 0, 0.004, 0.004, decay]


def test_stages_have_the_order_of_their_sources():
    relu, pool, drop = variants.RELU, layers.Pool(3, 2), layers.Dropout(0.5, "test")
    lrn = layers.Lrn(5, k=2.0, alpha=1e-4, beta=0.75, alpha_mode="mean")
    within = layers.WithinMapLrn(5, k=1.0, alpha=1e-3, beta=0.75)
    first, second, *_, conv5, fc6, _, _ = column("original", "then")
    assert (first, second) == ((lrn, pool, relu), (relu, lrn, within, pool))
    assert (conv5, fc6) == ((pool, relu), (relu, drop))
    wide, ceil = layers.Lrn(9, 1.0, 1e-3, 0.75, "mean"), layers.Pool(3, 2, "max", True)
    assert column("cifar_11", "then")[:2] == [(relu, ceil, wide), (relu, wide, ceil)]
    assert column("cifar_13", "then")[:2] == [(relu, ceil)] * 2
    order = [type(stage) for stage in column("caffenet", "then")[0]]
    assert order == [layers.Activation, layers.Pool, layers.Lrn]


def test_locally_connected_layers_have_weights_per_place():
    model = create_model("cifar_11", init="he")
    key, images = jax.random.key(0), jnp.zeros((1, 24, 24, 3))
    local = jax.jit(model.init)(key, images)["params"]["local3"]
    assert local["kernel"].shape == (6, 6, 3, 3, 64, 64)
    assert local["bias"].shape == (6, 6, 64)
    assert jnp.std(local["kernel"]) == pytest.approx((2 / 576) ** 0.5, rel=0.02)
    skipped = create_model("cifar_11", skip=["local3"])
    rows = {r.name: r.parameters for r in summary(skipped)}
    assert "local3" not in rows and rows["local4"] == 36 * (9 * 64 + 1) * 32


def test_inits():
    key = jax.random.key(0)
    images = jnp.zeros((1, 224, 224, 3))

    def params(**kwargs):
        # The classifier's and fc6's statistics need only a narrow network.
        model = create_model("paper", width=0.125, **kwargs)
        return jax.jit(model.init)(key, images)["params"]

    with pytest.warns(UserWarning, match="init='he'"):
        paper = params(init="paper")
    with pytest.warns(UserWarning, match="init='he'"):
        caffe = params(init="caffe")
    he = params(init="he")
    for name, layer in paper.items():
        assert jnp.std(layer["kernel"]) == pytest.approx(0.01, rel=0.05), name
        bias = 1.0 if name in ("conv2", "conv4", "conv5", "fc6", "fc7") else 0.0
        assert (layer["bias"] == bias).all(), name
        std = 0.005 if name in ("fc6", "fc7") else 0.01
        assert jnp.std(caffe[name]["kernel"]) == pytest.approx(std, rel=0.05), name
        assert caffe[name]["bias"][0] == pytest.approx(0.1 * bias)
        fan_in = layer["kernel"].size / layer["kernel"].shape[-1]
        std = {"conv1": (2 / fan_in) ** 0.5 / 74.4, "fc8": 0.01}.get(name, (2 / fan_in) ** 0.5)
        assert jnp.std(he[name]["kernel"]) == pytest.approx(std, rel=0.05), name
        assert (he[name]["bias"] == 0).all(), name
    with pytest.raises(ValueError, match="paper, caffe, he"):
        create_model(init="xavier")
