"""The layer tables: every named network as data.

A table has one row a layer, and a row reads like section 3.5 of the paper: so many
features, a kernel, a stride, a padding, what the layer sees of the layer before, how
it starts, and `then` what is done with its output, in this order. An ablation is a
change of rows (`customize`), never an `if` in the network.

Sources: Krizhevsky, Sutskever and Hinton, "ImageNet classification with deep
convolutional neural networks", NIPS 2012 ("the paper"); the layer files of the
original program, released by the Computer History Museum ("the original", with the
number of the experiment); the `bvlc_alexnet` and
`bvlc_reference_caffenet` definitions of Caffe; torchvision's AlexNet after
Krizhevsky, "One weird trick for parallelizing convolutional neural networks",
arXiv:1404.5997; the example files of cuda-convnet and cuda-convnet2 for CIFAR-10
(`layers-18pct.cfg`, `layers-conv-local-13pct.cfg`, `layers-cifar10-11pct.cfg`); Zeiler
and Fergus, "Visualizing and understanding convolutional networks", ECCV 2014.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, TypeVar

ActivationKind = Literal["relu", "tanh", "sigmoid"]
ACTIVATIONS: tuple[ActivationKind, ...] = ("relu", "tanh", "sigmoid")
NormalizationKind = Literal["lrn", "batch", "none"]
NORMALIZATIONS: tuple[NormalizationKind, ...] = ("lrn", "batch", "none")
PoolKind = Literal["max", "avg"]
POOL_KINDS: tuple[PoolKind, ...] = ("max", "avg")
Place = Literal["before", "after"]
PLACES: tuple[Place, ...] = ("before", "after")


@dataclass(frozen=True)
class Activation:
    """A unit's output function (paper, section 3.1)."""

    kind: ActivationKind = "relu"


@dataclass(frozen=True)
class Lrn:
    """Local response normalisation across features (paper, section 3.3).

    `per_column`: the window stays inside a column. `alpha_mode`: "sum" multiplies
    the sum of squares by alpha (the paper), "mean" their mean (Caffe, torch).
    """

    size: int = 5
    k: float = 2.0
    alpha: float = 1e-4
    beta: float = 0.75
    alpha_mode: Literal["sum", "mean"] = "sum"
    per_column: bool = True


@dataclass(frozen=True)
class WithinMapLrn:
    """Response normalisation within one feature map (cuda-convnet's `rnorm`)."""

    size: int
    k: float
    alpha: float
    beta: float


@dataclass(frozen=True)
class BatchNorm:
    """Batch normalisation (Ioffe and Szegedy 2015), the modern stand-in for LRN."""


@dataclass(frozen=True)
class Pool:
    """Pooling; `window` > `stride` overlaps (paper, section 3.4).

    `ceil`: the last window may hang over the right and bottom edge.
    """

    window: int = 3
    stride: int = 2
    kind: PoolKind = "max"
    ceil: bool = False


@dataclass(frozen=True)
class Dropout:
    """Dropout (paper, section 4.2).

    `scale_at`: "test" multiplies by the share of units kept when testing, as the
    paper says; "train" divides by it when training (inverted dropout), as Caffe,
    torch and flax do. The same network in expectation, but not at the same
    learning rate and initial weights: inverted dropout doubles what the next
    layer reads in training.
    """

    rate: float = 0.5
    scale_at: Literal["test", "train"] = "test"


Stage = Activation | Lrn | WithinMapLrn | BatchNorm | Pool | Dropout
NORMS = (Lrn, WithinMapLrn, BatchNorm)


@dataclass(frozen=True)
class Conv:
    """A convolutional layer.

    `padding`: pixels on every side, or "ceil": on the right and bottom only, just
    until the last window fits (cuda-convnet's output size, 1 + ceil((n - k) / s)).
    `sees`: "all" features of the layer before, or only those of its "own" column.
    `weight_std`, `bias`: weights start as N(0, weight_std^2), biases at `bias`.
    `weight_decay`: this layer's own, instead of the optimiser's.
    """

    name: str
    features: int
    kernel: int
    stride: int = 1
    padding: int | Literal["ceil"] = 0
    sees: Literal["all", "own"] = "all"
    weight_std: float = 0.01
    bias: float = 0.0
    weight_decay: float | None = None
    then: tuple[Stage, ...] = (Activation(),)

    def pads(self, size: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """((top, bottom), (left, right)) of inputs of size x size."""
        if self.padding == "ceil":
            sides = (0, (self.kernel - size) % self.stride)
        else:
            sides = (self.padding, self.padding)
        return sides, sides


@dataclass(frozen=True)
class Local:
    """A locally connected layer: a convolution of stride 1 with unshared weights.

    Every place has its own kernel and its own bias, and sees all features of the layer
    before. Fields as in `Conv`.
    """

    name: str
    features: int
    kernel: int
    padding: int = 0
    weight_std: float = 0.01
    bias: float = 0.0
    weight_decay: float | None = None
    then: tuple[Stage, ...] = (Activation(),)

    def pads(self, size: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """((top, bottom), (left, right)), whatever the size."""
        return (self.padding, self.padding), (self.padding, self.padding)


@dataclass(frozen=True)
class Dense:
    """A fully connected layer. Fields as in `Conv`; the last row sees everything."""

    name: str
    features: int
    sees: Literal["all", "own"] = "all"
    weight_std: float = 0.01
    bias: float = 0.0
    weight_decay: float | None = None
    then: tuple[Stage, ...] = (Activation(),)


Layer = Conv | Local | Dense


@dataclass(frozen=True)
class Variant:
    """A network: its rows, the number of columns, and the grid that it needs.

    `grid` is the height and width of the first layer's output; an image size that
    gives another grid is refused. `crop_size` is the customary input size.
    """

    name: str
    columns: int
    grid: int
    crop_size: int
    layers: tuple[Layer, ...]

    @property
    def convs(self) -> tuple[Conv, ...]:
        return tuple(row for row in self.layers if isinstance(row, Conv))

    @property
    def denses(self) -> tuple[Dense, ...]:
        return tuple(row for row in self.layers if isinstance(row, Dense))

    @property
    def stages(self) -> tuple[Stage, ...]:
        return tuple(stage for row in self.layers for stage in row.then)

    @property
    def layer_weight_decay(self) -> dict[str, float]:
        """The layers with a weight decay of their own."""
        return {
            row.name: row.weight_decay
            for row in self.layers
            if row.weight_decay is not None
        }


RELU = Activation("relu")
OVERLAPPING = Pool(window=3, stride=2)
PAPER_LRN = Lrn()
# Caffe's k is 1 and its alpha is divided by the window, which spans both columns.
CAFFE_LRN = Lrn(k=1.0, alpha_mode="mean", per_column=False)
PAPER_DROPOUT = Dropout(scale_at="test")
INVERTED_DROPOUT = Dropout(scale_at="train")

# Section 3.5, sentence by sentence; section 5 for the biases and the weights. The
# paper's 224 pixels give 55 x 55 only with the original's rule for the last window.
PAPER = Variant(
    "paper",
    columns=2,
    grid=55,
    crop_size=224,
    layers=(
        Conv(
            "conv1",
            96,
            kernel=11,
            stride=4,
            padding="ceil",
            then=(RELU, PAPER_LRN, OVERLAPPING),
        ),
        Conv(
            "conv2",
            256,
            kernel=5,
            padding=2,
            sees="own",
            bias=1.0,
            then=(RELU, PAPER_LRN, OVERLAPPING),
        ),
        Conv("conv3", 384, kernel=3, padding=1),
        Conv("conv4", 384, kernel=3, padding=1, sees="own", bias=1.0),
        Conv(
            "conv5",
            256,
            kernel=3,
            padding=1,
            sees="own",
            bias=1.0,
            then=(RELU, OVERLAPPING),
        ),
        Dense("fc6", 4096, bias=1.0, then=(RELU, PAPER_DROPOUT)),
        Dense("fc7", 4096, bias=1.0, then=(RELU, PAPER_DROPOUT)),
        Dense("fc8", 1000, then=()),
    ),
)

# The paper's one-GPU net: half the kernels, except in the last convolution and the
# fully connected layers, so that the number of parameters stays close (section 3.2).
ONE_GPU = dataclasses.replace(
    PAPER,
    name="one_gpu",
    columns=1,
    layers=tuple(
        dataclasses.replace(row, features=row.features // 2)
        if row.name in ("conv1", "conv2", "conv3", "conv4")
        else row
        for row in PAPER.layers
    ),
)

# The original's experiment 145, whose logged errors are the paper's: what the paper
# does not say. Layer 1 normalises before its units; alpha is divided by the window;
# layer 2 is normalised once more, within each map; conv3 to conv5 start wider.
_ORIGINAL_LRN = Lrn(alpha_mode="mean")
_ORIGINAL_WITHIN_MAP = WithinMapLrn(size=5, k=1.0, alpha=1e-3, beta=0.75)
_ORIGINAL_THEN = {
    "conv1": (_ORIGINAL_LRN, OVERLAPPING, RELU),
    "conv2": (RELU, _ORIGINAL_LRN, _ORIGINAL_WITHIN_MAP, OVERLAPPING),
    "conv5": (OVERLAPPING, RELU),
}
ORIGINAL = dataclasses.replace(
    PAPER,
    name="original",
    layers=tuple(
        dataclasses.replace(
            row,
            weight_std=0.03 if row.name in ("conv3", "conv4", "conv5") else 0.01,
            then=_ORIGINAL_THEN.get(row.name, row.then),
        )
        for row in PAPER.layers
    ),
)

# Experiment 150: "like #145 but with no column communication". The columns meet in
# the classifier only; wider conv2 and fc6 keep the number of parameters.
_OWN_COLUMN = {
    "conv2": {"features": 320},
    "conv3": {"sees": "own"},
    "fc6": {"features": 8192, "sees": "own"},
    "fc7": {"sees": "own"},
}
NO_COMMUNICATION = dataclasses.replace(
    ORIGINAL,
    name="no_communication",
    layers=tuple(
        dataclasses.replace(row, **_OWN_COLUMN.get(row.name, {}))
        for row in ORIGINAL.layers
    ),
)

# Experiment 146, the paper's "1 CNN*": "an extra sixth convolutional layer over the
# last pooling layer" (section 6).
SIX_CONV = dataclasses.replace(
    ORIGINAL,
    name="six_conv",
    layers=(
        *ORIGINAL.layers[:5],
        Conv("conv6", 256, kernel=3, padding=1, weight_std=0.03, bias=1.0),
        *ORIGINAL.layers[5:],
    ),
)

# Experiment 147: pooling without overlap, rounding up, and less padding in conv2 and
# conv5. Grids: 55, pooled 28, 26, pooled 13, 13, 13, 11, pooled 6.
_PAIRS = Pool(window=2, stride=2, ceil=True)
_LESS_PADDING = {"conv2": {"padding": 1}, "conv5": {"padding": 0}}
NO_OVERLAP = dataclasses.replace(
    ORIGINAL,
    name="no_overlap",
    layers=tuple(
        dataclasses.replace(
            row,
            then=tuple(_PAIRS if s == OVERLAPPING else s for s in row.then),
            **_LESS_PADDING.get(row.name, {}),
        )
        for row in ORIGINAL.layers
    ),
)

# bvlc_alexnet. Its 227 pixels with no padding are the paper's 224 with three.
CAFFE = Variant(
    "caffe",
    columns=2,
    grid=55,
    crop_size=227,
    layers=(
        Conv("conv1", 96, kernel=11, stride=4, then=(RELU, CAFFE_LRN, OVERLAPPING)),
        Conv(
            "conv2",
            256,
            kernel=5,
            padding=2,
            sees="own",
            bias=0.1,
            then=(RELU, CAFFE_LRN, OVERLAPPING),
        ),
        Conv("conv3", 384, kernel=3, padding=1),
        Conv("conv4", 384, kernel=3, padding=1, sees="own", bias=0.1),
        Conv(
            "conv5",
            256,
            kernel=3,
            padding=1,
            sees="own",
            bias=0.1,
            then=(RELU, OVERLAPPING),
        ),
        Dense("fc6", 4096, weight_std=0.005, bias=0.1, then=(RELU, INVERTED_DROPOUT)),
        Dense("fc7", 4096, weight_std=0.005, bias=0.1, then=(RELU, INVERTED_DROPOUT)),
        Dense("fc8", 1000, then=()),
    ),
)

# bvlc_reference_caffenet: bvlc_alexnet but for pooling before LRN, and biases of 1.
CAFFENET = dataclasses.replace(
    CAFFE,
    name="caffenet",
    layers=tuple(
        dataclasses.replace(
            row,
            bias=1.0 if row.bias else 0.0,
            then=(RELU, OVERLAPPING, CAFFE_LRN)
            if row.name in ("conv1", "conv2")
            else row.then,
        )
        for row in CAFFE.layers
    ),
)


def _dropout_before_dense(name: str, widths: tuple[int, int, int, int, int]) -> Variant:
    """One column, no LRN, dropout before fc6 and fc7: the listings of today.

    The published weights of these nets started from torch's defaults; here the rows
    keep the paper's start. `sees` matters only if `columns` is overridden.
    """
    c1, c2, c3, c4, c5 = widths
    return Variant(
        name,
        columns=1,
        grid=55,
        crop_size=224,
        layers=(
            Conv("conv1", c1, kernel=11, stride=4, padding=2, then=(RELU, OVERLAPPING)),
            Conv(
                "conv2",
                c2,
                kernel=5,
                padding=2,
                sees="own",
                bias=1.0,
                then=(RELU, OVERLAPPING),
            ),
            Conv("conv3", c3, kernel=3, padding=1),
            Conv("conv4", c4, kernel=3, padding=1, sees="own", bias=1.0),
            Conv(
                "conv5",
                c5,
                kernel=3,
                padding=1,
                sees="own",
                bias=1.0,
                then=(RELU, OVERLAPPING, INVERTED_DROPOUT),
            ),
            Dense("fc6", 4096, bias=1.0, then=(RELU, INVERTED_DROPOUT)),
            Dense("fc7", 4096, bias=1.0, then=(RELU,)),
            Dense("fc8", 1000, then=()),
        ),
    )


ONE_TOWER = _dropout_before_dense("one_tower", (96, 256, 384, 384, 256))
# torchvision's widths; the text of "One weird trick" has 384 in the fourth layer.
OWT = _dropout_before_dense("owt", (64, 192, 384, 256, 256))

# cuda-convnet's "18%" CIFAR-10 net: pooling grids round up, no augmentation, and a
# weight decay a layer (0.004 on the convolutions, 1 on the classifier).
_CIFAR_LRN = WithinMapLrn(size=3, k=1.0, alpha=5e-5, beta=0.75)
_CIFAR_MAX = Pool(window=3, stride=2, kind="max", ceil=True)
_CIFAR_AVG = Pool(window=3, stride=2, kind="avg", ceil=True)
CIFAR = Variant(
    "cifar",
    columns=1,
    grid=32,
    crop_size=32,
    layers=(
        Conv(
            "conv1",
            32,
            kernel=5,
            padding=2,
            weight_std=1e-4,
            weight_decay=0.004,
            then=(RELU, _CIFAR_MAX, _CIFAR_LRN),
        ),
        Conv(
            "conv2",
            32,
            kernel=5,
            padding=2,
            weight_decay=0.004,
            then=(RELU, _CIFAR_AVG, _CIFAR_LRN),
        ),
        Conv(
            "conv3",
            64,
            kernel=5,
            padding=2,
            weight_decay=0.004,
            then=(RELU, _CIFAR_AVG),
        ),
        Dense("fc10", 10, weight_decay=1.0, then=()),
    ),
)

# Zeiler and Fergus's net of 2013: smaller windows and a smaller stride in conv1. Their
# grids (110, 55, 26, 13, 6) come from pooling that rounds up.
_ZFNET_MAX = Pool(window=3, stride=2, ceil=True)
_ZFNET_LRN = Lrn(per_column=False)
ZFNET = Variant(
    "zfnet",
    columns=1,
    grid=110,
    crop_size=224,
    layers=(
        Conv(
            "conv1",
            96,
            kernel=7,
            stride=2,
            padding=1,
            then=(RELU, _ZFNET_MAX, _ZFNET_LRN),
        ),
        Conv("conv2", 256, kernel=5, stride=2, then=(RELU, _ZFNET_MAX, _ZFNET_LRN)),
        Conv("conv3", 384, kernel=3, padding=1),
        Conv("conv4", 384, kernel=3, padding=1),
        Conv("conv5", 256, kernel=3, padding=1, then=(RELU, OVERLAPPING)),
        Dense("fc6", 4096, then=(RELU, PAPER_DROPOUT)),
        Dense("fc7", 4096, then=(RELU, PAPER_DROPOUT)),
        Dense("fc8", 1000, then=()),
    ),
)

# cuda-convnet2's "11%" CIFAR-10 net: two convolutions, two locally connected layers,
# random 24 x 24 crops.
_CIFAR_11_LRN = Lrn(size=9, k=1.0, alpha=1e-3, alpha_mode="mean")
CIFAR_11 = Variant(
    "cifar_11",
    columns=1,
    grid=24,
    crop_size=24,
    layers=(
        Conv(
            "conv1",
            64,
            kernel=5,
            padding=2,
            weight_std=1e-4,
            weight_decay=0.0,
            then=(RELU, _CIFAR_MAX, _CIFAR_11_LRN),
        ),
        Conv(
            "conv2",
            64,
            kernel=5,
            padding=2,
            weight_decay=0.0,
            then=(RELU, _CIFAR_11_LRN, _CIFAR_MAX),
        ),
        Local("local3", 64, kernel=3, padding=1, weight_std=0.04, weight_decay=0.004),
        Local("local4", 32, kernel=3, padding=1, weight_std=0.04, weight_decay=0.004),
        Dense("fc10", 10, weight_decay=0.01, then=()),
    ),
)

# cuda-convnet's "13%" net: without normalisation, local3 half as wide.
_CIFAR_13 = {
    "conv1": {"then": (RELU, _CIFAR_MAX)},
    "conv2": {"then": (RELU, _CIFAR_MAX)},
    "local3": {"features": 32},
    "fc10": {"weight_decay": 0.004},
}
CIFAR_13 = dataclasses.replace(
    CIFAR_11,
    name="cifar_13",
    layers=tuple(
        dataclasses.replace(row, **_CIFAR_13.get(row.name, {}))
        for row in CIFAR_11.layers
    ),
)

VARIANTS: dict[str, Variant] = {
    table.name: table
    for table in (
        PAPER,
        ORIGINAL,
        NO_COMMUNICATION,
        SIX_CONV,
        NO_OVERLAP,
        ONE_GPU,
        CAFFE,
        CAFFENET,
        ONE_TOWER,
        OWT,
        ZFNET,
        CIFAR,
        CIFAR_13,
        CIFAR_11,
    )
}

StageT = TypeVar("StageT", Activation, Pool, Dropout)


def customize(
    table: Variant,
    *,
    num_classes: int | None = None,
    width: float = 1.0,
    lrn: bool | None = None,
    normalization: NormalizationKind | None = None,
    norm_layers: Iterable[str] | None = None,
    norm_place: Place | None = None,
    pool_window: int | None = None,
    pool_stride: int | None = None,
    pool_kind: PoolKind | None = None,
    activation: ActivationKind | None = None,
    columns: int | None = None,
    dropout: float | None = None,
    skip: Iterable[str] | None = None,
) -> Variant:
    """Returns the table with an ablation's changes; None leaves a thing as it is.

    Args:
      table: the table to start from.
      num_classes: units of the last layer, at least 1.
      width: factor on every number of features but the last layer's, above 0.
      lrn: False takes every normalisation out, True is `normalization="lrn"`.
      normalization: "lrn", "batch" or "none". A table that normalises keeps its
        places (and, for "lrn", its constants); one that does not gets the paper's
        LRN or batch norm after the activations of conv1 and conv2.
      norm_layers: the only layers that stay normalised, of those that are.
      norm_place: "before" or "after" the activation of their layer. A norm that has to
        change sides moves right next to it; one that is there already stays.
      pool_window, pool_stride: of every pooling layer. The paper's ablation of
        overlapping pooling is `pool_window=2`.
      pool_kind: "max" or "avg", of every pooling layer.
      activation: "relu", "tanh" or "sigmoid", for every unit.
      columns: number of columns; 1 lets every layer see everything.
      dropout: the rate wherever the table drops, 0 <= rate < 1.
      skip: names of convolutional (or local) layers to take out, with their normalisation but
        not their pooling. The first one sets the grid and cannot be skipped.

    Raises:
      ValueError: for a value outside these ranges, in words.
    """
    if lrn is not None:
        if normalization is not None:
            raise ValueError(
                f"lrn={lrn} and normalization={normalization!r} say the same thing "
                "twice; give one of them."
            )
        normalization = "lrn" if lrn else "none"
    if skip:
        table = _without(table, _names(skip))
    if columns is not None:
        table = dataclasses.replace(table, columns=_positive("columns", columns))
    if width != 1.0:
        table = _scaled(table, width)
    if num_classes is not None:
        table = _classifying(table, _positive("num_classes", num_classes))
    if normalization is not None:
        table = _normalized(table, normalization)
    if norm_layers is not None:
        table = _normalized_only_in(table, _names(norm_layers))
    if norm_place is not None:
        table = _norms_moved(table, norm_place)
    for field, pixels in (("window", pool_window), ("stride", pool_stride)):
        if pixels is not None:
            change = {field: _positive(f"pool_{field}", pixels)}
            table = _map_stages(
                table, Pool, lambda s, change=change: dataclasses.replace(s, **change)
            )
    if pool_kind is not None:
        _one_of("pool_kind", pool_kind, POOL_KINDS)
        table = _map_stages(
            table, Pool, lambda s: dataclasses.replace(s, kind=pool_kind)
        )
    if activation is not None:
        _one_of("activation", activation, ACTIVATIONS)
        table = _map_stages(table, Activation, lambda _: Activation(activation))
    if dropout is not None:
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout} is not a rate: 0 <= dropout < 1.")
        table = _map_stages(
            table, Dropout, lambda s: dataclasses.replace(s, rate=float(dropout))
        )
    _check_columns(table)
    return table


def stage_name(kind: str, layer: str) -> str:
    """Return the name of a norm or pool after a layer, different for every layer.

    ("norm", "conv1") -> "norm1", as published; ("norm", "fc6") -> "norm_fc6".
    """
    number = re.fullmatch(r"conv(\d+)", layer)
    return f"{kind}{number[1]}" if number else f"{kind}_{layer}"


def get(name: str) -> Variant:
    """The table of that name; ValueError with the names there are."""
    if name not in VARIANTS:
        raise ValueError(
            f"There is no variant {name!r}; the variants are {', '.join(VARIANTS)}."
        )
    return VARIANTS[name]


def _names(layers: Iterable[str]) -> tuple[str, ...]:
    return (layers,) if isinstance(layers, str) else tuple(layers)


def _positive(what: str, value: int) -> int:
    if isinstance(value, bool) or value < 1 or value != int(value):
        raise ValueError(f"{what}={value!r} must be a whole number of at least 1.")
    return int(value)


def _one_of(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{what}={value!r} must be one of {', '.join(choices)}.")


def _map_layers(table: Variant, change: Callable[[Layer], Layer]) -> Variant:
    return dataclasses.replace(table, layers=tuple(map(change, table.layers)))


def _map_stages(
    table: Variant, kind: type[StageT], change: Callable[[StageT], Stage]
) -> Variant:
    return _map_layers(
        table,
        lambda row: dataclasses.replace(
            row,
            then=tuple(change(s) if isinstance(s, kind) else s for s in row.then),
        ),
    )


def _scaled(table: Variant, width: float) -> Variant:
    if not width > 0:
        raise ValueError(f"width={width} must be above 0; 0.25 is a quarter.")
    columns = table.columns  # every column keeps the same number of features

    def scale(row: Layer) -> Layer:
        if row is table.layers[-1]:
            return row
        features = columns * max(1, round(row.features * width / columns))
        return dataclasses.replace(row, features=features)

    return _map_layers(table, scale)


def _classifying(table: Variant, num_classes: int) -> Variant:
    last = dataclasses.replace(table.layers[-1], features=num_classes)
    return dataclasses.replace(table, layers=(*table.layers[:-1], last))


def _normalized(table: Variant, kind: NormalizationKind) -> Variant:
    _one_of("normalization", kind, NORMALIZATIONS)
    places = {row.name for row in table.layers if any(_norms(row))}

    def change(row: Layer) -> Layer:
        then = row.then
        if kind == "none":
            then = tuple(s for s in then if not isinstance(s, NORMS))
        elif kind == "batch" and row.name in places:
            # One in a row, where the first was: the original's layer 2 has two.
            first = next(i for i, s in enumerate(then) if isinstance(s, NORMS))
            then = (
                *then[:first],
                BatchNorm(),
                *(s for s in then[first:] if not isinstance(s, NORMS)),
            )
        elif not places and row.name in ("conv1", "conv2"):
            new = PAPER_LRN if kind == "lrn" else BatchNorm()
            at = 1 + next(i for i, s in enumerate(then) if isinstance(s, Activation))
            then = (*then[:at], new, *then[at:])
        return dataclasses.replace(row, then=then)

    return _map_layers(table, change)


def _norms(row: Layer) -> list[Stage]:
    return [s for s in row.then if isinstance(s, NORMS)]


def _normalized_only_in(table: Variant, names: tuple[str, ...]) -> Variant:
    normalized = [row.name for row in table.layers if _norms(row)]
    for name in names:
        if name not in normalized:
            raise ValueError(
                f"norm_layers={list(names)}: {name!r} of variant {table.name!r} is "
                f"not normalised; these are: {', '.join(normalized) or 'none'}."
            )

    def change(row: Layer) -> Layer:
        if row.name in names:
            return row
        rest = tuple(s for s in row.then if not isinstance(s, NORMS))
        return dataclasses.replace(row, then=rest)

    return _map_layers(table, change)


def _norms_moved(table: Variant, place: Place) -> Variant:
    """With every norm on that side of its layer's activation."""
    _one_of("norm_place", place, PLACES)

    def change(row: Layer) -> Layer:
        units = [i for i, s in enumerate(row.then) if isinstance(s, Activation)]
        if not units:
            return row
        before, unit, after = (
            row.then[: units[0]],
            row.then[units[0]],
            row.then[units[0] + 1 :],
        )
        if place == "before":
            moved = tuple(s for s in after if isinstance(s, NORMS))
            after = tuple(s for s in after if not isinstance(s, NORMS))
            then = (*before, *moved, unit, *after)
        else:
            moved = tuple(s for s in before if isinstance(s, NORMS))
            before = tuple(s for s in before if not isinstance(s, NORMS))
            then = (*before, unit, *moved, *after)
        return dataclasses.replace(row, then=then)

    return _map_layers(table, change)


def _without(table: Variant, names: tuple[str, ...]) -> Variant:
    can_go = [row.name for row in table.layers[1:] if not isinstance(row, Dense)]
    for name in names:
        if name not in can_go:
            raise ValueError(
                f"skip={list(names)}: {name!r} cannot be left out of variant "
                f"{table.name!r}; these can: {', '.join(can_go)}."
            )
    rows: list[Layer] = []
    for row in table.layers:
        if row.name in names:
            # The pooling stays with the layer before, so that the grid is kept (but for
            # a stride of the layer's own, as zfnet's conv2 has).
            kept = tuple(s for s in row.then if isinstance(s, Pool | Dropout))
            rows[-1] = dataclasses.replace(rows[-1], then=(*rows[-1].then, *kept))
        else:
            rows.append(row)
    return dataclasses.replace(table, layers=tuple(rows))


def _check_columns(table: Variant) -> None:
    for row in table.layers[:-1]:
        if row.features % table.columns:
            raise ValueError(
                f"The {row.features} features of {row.name} do not divide into "
                f"{table.columns} columns."
            )
