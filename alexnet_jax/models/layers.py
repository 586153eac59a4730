"""The vocabulary of layer tables: rows (layers), and the stages that follow a row."""

import dataclasses
import json
import re
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

ActivationKind = Literal["relu", "tanh", "sigmoid"]
PoolKind = Literal["max", "avg"]
AlphaMode = Literal["sum", "mean"]
Sees = Literal["all", "own"]


@dataclass(frozen=True)
class Activation:
    """The nonlinearity of a layer's units (paper, section 3.1)."""

    kind: ActivationKind = "relu"


@dataclass(frozen=True)
class Lrn:
    """Local response normalisation across features (paper, section 3.3).

    `per_column`: the window stays inside a column.
    `alpha_mode`: alpha multiplies the "sum" of the squares (the paper) or their "mean" (Caffe,
    torch).
    """

    size: int = 5
    k: float = 2.0
    alpha: float = 1e-4
    beta: float = 0.75
    alpha_mode: AlphaMode = "sum"
    per_column: bool = True

    def __post_init__(self) -> None:
        if self.k <= 0:
            raise ValueError(f"Lrn.k={self.k} must be above 0: 0 / 0 is NaN where all is zero.")


@dataclass(frozen=True)
class WithinMapLrn:
    """Response normalisation within one feature map (cuda-convnet's `rnorm`)."""

    size: int
    k: float
    alpha: float
    beta: float


@dataclass(frozen=True)
class BatchNorm:
    """Batch normalisation (Ioffe and Szegedy 2015), the modern alternative to LRN."""


@dataclass(frozen=True)
class Pool:
    """Pooling; windows overlap if `window` > `stride` (paper, section 3.4).

    `ceil`: the last window may hang over the right and bottom edge.
    """

    window: int = 3
    stride: int = 2
    kind: PoolKind = "max"
    ceil: bool = False


@dataclass(frozen=True)
class Dropout:
    """Dropout (paper, section 4.2).

    `scale_at`: "test" multiplies by the share of kept units when testing, as in the paper;
    "train" divides by it when training (inverted dropout), as in Caffe, torch and flax. The two
    train differently with the same learning rate and initial weights: at a rate of 0.5, inverted
    dropout doubles what the next layer reads in training.
    """

    rate: float = 0.5
    scale_at: Literal["test", "train"] = "test"


Stage = Activation | Lrn | WithinMapLrn | BatchNorm | Pool | Dropout
NORMS = (Lrn, WithinMapLrn, BatchNorm)


@dataclass(frozen=True)
class Layer:
    """Fields that all rows of a table share.

    `weight_std`, `bias`: weights start as N(0, weight_std^2), biases at `bias`.
    `weight_decay`: of this layer, instead of the optimiser's.
    `then`: the stages applied to the output, in order.
    """

    name: str
    features: int
    _: KW_ONLY
    weight_std: float = 0.01
    bias: float = 0.0
    weight_decay: float | None = None
    then: tuple[Stage, ...] = (Activation(),)


@dataclass(frozen=True)
class Conv(Layer):
    """A convolutional layer.

    `padding`: pixels on every side, or "ceil": on the right and bottom only, until the last
    window fits (cuda-convnet's output size, 1 + ceil((n - k) / s)).
    `sees`: "all" features of the layer before, or only those of its "own" column.
    """

    kernel: int
    stride: int = 1
    padding: int | Literal["ceil"] = 0
    sees: Sees = "all"

    def pads(self, size: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return ((top, bottom), (left, right)) for inputs of size x size."""
        if self.padding == "ceil":
            sides = (0, (self.kernel - size) % self.stride)
        else:
            sides = (self.padding, self.padding)
        return sides, sides

    def side(self, size: int) -> int:
        """Return the side of the output for inputs of size x size; 0 if the kernel does not fit."""
        return max(0, 1 + (size + sum(self.pads(size)[0]) - self.kernel) // self.stride)


@dataclass(frozen=True)
class Local(Layer):
    """A locally connected layer: every place has its own kernel and its own bias.

    The stride is 1, and a kernel sees all features of the layer before.
    """

    kernel: int
    padding: int = 0

    def side(self, size: int) -> int:
        """Return the side of the output for inputs of size x size; 0 if the kernel does not fit."""
        return max(0, 1 + size + 2 * self.padding - self.kernel)


@dataclass(frozen=True)
class Dense(Layer):
    """A fully connected layer; `sees` as in `Conv`, but a last row always sees "all"."""

    sees: Sees = "all"


@dataclass(frozen=True)
class Variant:
    """A network as a table: one row per layer. The last row gives the logits.

    `columns`: number of columns (the paper's GPUs) that the features are split into.
    `grid`: side of the first layer's output; images that give another one are refused.
    `crop_size`: the usual side of an image.
    """

    name: str
    columns: int
    grid: int
    crop_size: int
    layers: tuple[Layer, ...]

    def __post_init__(self) -> None:
        names = [row.name for row in self.layers]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"Table {self.name!r} has two rows named {twice!r}; rename one.")
        dense = [isinstance(row, Dense) for row in self.layers]
        if sorted(dense) != dense:
            after = names[dense.index(False, dense.index(True))]
            raise ValueError(
                f"Table {self.name!r}: {after} needs feature maps, and comes after a Dense row. "
                "Put it before the first Dense row."
            )

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
        """Weight decay by layer, of the layers that have their own."""
        return {row.name: row.weight_decay for row in self.layers if row.weight_decay is not None}


_TYPES = {
    t.__name__: t
    for t in (Activation, BatchNorm, Conv, Dense, Dropout, Local, Lrn, Pool, Variant, WithinMapLrn)
}


def table_to_json(table: Variant) -> str:
    """Return a table as JSON text, with which a run stores it."""

    def plain(value: Any) -> Any:
        if type(value).__name__ in _TYPES:
            fields = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
            return {"type": type(value).__name__, **fields}
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    return json.dumps(plain(table))


def table_from_json(text: str) -> Variant:
    """Return the table that `table_to_json` wrote; missing fields take their default."""

    def made(value: dict[str, Any]) -> Any:
        make = _TYPES[value.pop("type")]
        return make(**{name: as_tuples(item) for name, item in value.items()})

    def as_tuples(value: Any) -> Any:
        return tuple(map(as_tuples, value)) if isinstance(value, list) else value

    return json.loads(text, object_hook=made)


def stage_name(kind: str, layer: str) -> str:
    """Return the name of the norm or pool after a layer.

    ("norm", "conv1") -> "norm1", as published; ("norm", "fc6") -> "norm_fc6".
    """
    number = re.fullmatch(r"conv(\d+)", layer)
    return f"{kind}{number[1]}" if number else f"{kind}_{layer}"


def feature_names(row: Layer) -> list[str | None]:
    """Return the name of each stage's output in `AlexNet.features`.

    An activation keeps the name of its input; dropout has no name.
    """
    names: list[str | None] = []
    name = row.name
    for stage in row.then:
        if isinstance(stage, NORMS):
            name = stage_name("norm", row.name)
        elif isinstance(stage, Pool):
            name = stage_name("pool", row.name)
        names.append(None if isinstance(stage, Dropout) else name)
    return names
