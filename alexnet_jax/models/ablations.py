"""Ablations: named changes of a layer table.

    create_model("paper", lrn=False, columns=1)

Each function takes a table and a value, and returns the changed table. It raises
ValueError for a value out of range. `ABLATIONS` lists the functions by name, in the order
in which `customize` applies them.
"""

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import Any, Literal, get_args

from alexnet_jax.models.layers import (
    NORMS,
    Activation,
    ActivationKind,
    AlphaMode,
    BatchNorm,
    Dense,
    Dropout,
    Layer,
    Lrn,
    Pool,
    PoolKind,
    Stage,
    Variant,
)
from alexnet_jax.models.variants import PAPER_LRN

NormalizationKind = Literal["lrn", "batch", "none"]
Place = Literal["before", "after"]


def skip(table: Variant, names: Collection[str]) -> Variant:
    """Remove convolutional or local layers and their norms, but not their pooling.

    The first layer sets the grid and cannot be removed.
    """
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
            # The layer before takes over the pooling, so the grids stay the same (but
            # for the stride of the layer itself, in zfnet's conv2).
            kept = tuple(s for s in row.then if isinstance(s, Pool | Dropout))
            rows[-1] = dataclasses.replace(rows[-1], then=(*rows[-1].then, *kept))
        else:
            rows.append(row)
    return dataclasses.replace(table, layers=tuple(rows))


def columns(table: Variant, count: int) -> Variant:
    """Set the number of columns; with 1 every layer sees everything."""
    return dataclasses.replace(table, columns=_positive("columns", count))


def width(table: Variant, factor: float) -> Variant:
    """Multiply the features of every layer but the last by a factor above 0."""
    if not factor > 0:
        raise ValueError(f"width={factor} must be above 0; 0.25 is a quarter.")
    if factor == 1:
        return table

    def scale(row: Layer) -> Layer:
        if row is table.layers[-1]:
            return row
        each = max(1, round(row.features * factor / table.columns))  # per column
        return dataclasses.replace(row, features=table.columns * each)

    return _each_layer(table, scale)


def num_classes(table: Variant, count: int) -> Variant:
    """Set the units of the last layer."""
    features = _positive("num_classes", count)
    last = dataclasses.replace(table.layers[-1], features=features)
    return dataclasses.replace(table, layers=(*table.layers[:-1], last))


def lrn(table: Variant, on: bool) -> Variant:
    """Apply `normalization="lrn"` (True) or `normalization="none"` (False)."""
    return normalization(table, "lrn" if on else "none")


def normalization(table: Variant, kind: NormalizationKind) -> Variant:
    """Normalise by "lrn", by "batch" norm, or not at all ("none").

    A table that normalises keeps the places of its norms and, for "lrn", their constants.
    Another table gets the paper's LRN, or batch norm, after the activations of conv1 and
    conv2.
    """
    _one_of("normalization", kind, get_args(NormalizationKind))
    normalizes = any(isinstance(stage, NORMS) for stage in table.stages)

    def change(row: Layer) -> Layer:
        norms, others = _split_norms(row.then)
        then = row.then
        if kind == "none":
            then = others
        elif kind == "batch" and norms:
            # A single one, in place of the first: layer 2 of the original has two.
            at = then.index(norms[0])
            then = (*others[:at], BatchNorm(), *others[at:])
        elif not normalizes and row.name in ("conv1", "conv2"):
            norm = PAPER_LRN if kind == "lrn" else BatchNorm()
            at = 1 + next(i for i, s in enumerate(then) if isinstance(s, Activation))
            then = (*then[:at], norm, *then[at:])
        return dataclasses.replace(row, then=then)

    return _each_layer(table, change)


def norm_layers(table: Variant, names: Collection[str]) -> Variant:
    """Keep the normalisation of these layers only."""
    normalized = [row.name for row in table.layers if _split_norms(row.then)[0]]
    for name in names:
        if name not in normalized:
            raise ValueError(
                f"norm_layers={list(names)}: {name!r} of variant {table.name!r} is "
                f"not normalised; these are: {', '.join(normalized) or 'none'}."
            )

    def change(row: Layer) -> Layer:
        if row.name in names:
            return row
        return dataclasses.replace(row, then=_split_norms(row.then)[1])

    return _each_layer(table, change)


def norm_place(table: Variant, place: Place) -> Variant:
    """Put every norm "before" or "after" the activation of its layer.

    A norm on the other side moves next to the activation.
    """
    _one_of("norm_place", place, get_args(Place))

    def change(row: Layer) -> Layer:
        units = [i for i, s in enumerate(row.then) if isinstance(s, Activation)]
        if not units:
            return row
        at = units[0]
        before, unit, after = row.then[:at], row.then[at], row.then[at + 1 :]
        if place == "before":
            norms, after = _split_norms(after)
            then = (*before, *norms, unit, *after)
        else:
            norms, before = _split_norms(before)
            then = (*before, unit, *norms, *after)
        return dataclasses.replace(row, then=then)

    return _each_layer(table, change)


def lrn_size(table: Variant, maps: int) -> Variant:
    """Set n, the odd number of maps that LRN sums over; the paper's is 5."""
    if _positive("lrn_size", maps) % 2 == 0:
        raise ValueError(f"lrn_size={maps} must be odd: the window is centred.")
    return _each_lrn(table, "lrn_size", size=int(maps))


def lrn_k(table: Variant, k: float) -> Variant:
    """Set k > 0, the constant that LRN adds to the sum; the paper's is 2."""
    if not 0 < k < math.inf:
        raise ValueError(f"lrn_k={k} must be above 0: LRN divides by a power of it.")
    return _each_lrn(table, "lrn_k", k=float(k))


def lrn_alpha(table: Variant, alpha: float) -> Variant:
    """Set alpha >= 0, the factor on LRN's sum of squares; the paper's is 1e-4."""
    if not 0 <= alpha < math.inf:
        raise ValueError(f"lrn_alpha={alpha} must be at least 0.")
    return _each_lrn(table, "lrn_alpha", alpha=float(alpha))


def lrn_beta(table: Variant, beta: float) -> Variant:
    """Set beta >= 0, the exponent of LRN; the paper's is 0.75."""
    if not 0 <= beta < math.inf:
        raise ValueError(f"lrn_beta={beta} must be at least 0.")
    return _each_lrn(table, "lrn_beta", beta=float(beta))


def lrn_alpha_mode(table: Variant, mode: AlphaMode) -> Variant:
    """Let LRN's alpha multiply the "sum" of the squares (the paper) or their "mean"."""
    _one_of("lrn_alpha_mode", mode, get_args(AlphaMode))
    return _each_lrn(table, "lrn_alpha_mode", alpha_mode=mode)


def lrn_per_column(table: Variant, on: bool) -> Variant:
    """Keep LRN's window inside a column (the paper), or let it cross (Caffe)."""
    return _each_lrn(table, "lrn_per_column", per_column=bool(on))


def pool_window(table: Variant, pixels: int) -> Variant:
    """Set the window of every pooling layer; 2 is the paper's ablation of overlap."""
    return _each_stage(table, Pool, window=_positive("pool_window", pixels))


def pool_stride(table: Variant, pixels: int) -> Variant:
    """Set the stride of every pooling layer."""
    return _each_stage(table, Pool, stride=_positive("pool_stride", pixels))


def pool_kind(table: Variant, kind: PoolKind) -> Variant:
    """Make every pooling layer "max" or "avg"."""
    _one_of("pool_kind", kind, get_args(PoolKind))
    return _each_stage(table, Pool, kind=kind)


def activation(table: Variant, kind: ActivationKind) -> Variant:
    """Make every unit "relu", "tanh" or "sigmoid"."""
    _one_of("activation", kind, get_args(ActivationKind))
    return _each_stage(table, Activation, kind=kind)


def dropout(table: Variant, rate: float) -> Variant:
    """Set the rate, 0 <= rate < 1, of every dropout."""
    if not 0 <= rate < 1:
        raise ValueError(f"dropout={rate} is not a rate: 0 <= dropout < 1.")
    return _each_stage(table, Dropout, rate=float(rate))


ABLATIONS: dict[str, Callable[[Variant, Any], Variant]] = {
    "skip": skip,
    "columns": columns,
    "width": width,
    "num_classes": num_classes,
    "lrn": lrn,
    "normalization": normalization,
    "norm_layers": norm_layers,
    "norm_place": norm_place,
    "lrn_size": lrn_size,
    "lrn_k": lrn_k,
    "lrn_alpha": lrn_alpha,
    "lrn_beta": lrn_beta,
    "lrn_alpha_mode": lrn_alpha_mode,
    "lrn_per_column": lrn_per_column,
    "pool_window": pool_window,
    "pool_stride": pool_stride,
    "pool_kind": pool_kind,
    "activation": activation,
    "dropout": dropout,
}


def customize(table: Variant, **ablations: Any) -> Variant:
    """Return the table with ablations applied.

    Args:
      table: the table to start from.
      **ablations: values by the names of `ABLATIONS`; None: no change.

    Raises:
      TypeError: for an unknown name.
      ValueError: for a value out of range, or features that do not divide into columns.
    """
    for name in ablations:
        if name not in ABLATIONS:
            raise TypeError(
                f"There is no ablation {name!r}; the ablations are {', '.join(ABLATIONS)}."
            )
    given = {name: value for name, value in ablations.items() if value is not None}
    if "lrn" in given and "normalization" in given:
        raise ValueError(
            f"lrn={given['lrn']} and normalization={given['normalization']!r} say the "
            "same thing twice; give one of them."
        )
    for name, change in ABLATIONS.items():
        if name in given:
            table = change(table, given[name])
    for row in table.layers[:-1]:
        if row.features % table.columns:
            raise ValueError(
                f"The {row.features} features of {row.name} do not divide into "
                f"{table.columns} columns."
            )
    return table


def _each_layer(table: Variant, change: Callable[[Layer], Layer]) -> Variant:
    return dataclasses.replace(table, layers=tuple(map(change, table.layers)))


def _each_stage(table: Variant, of: type[Stage], /, **changes: Any) -> Variant:
    def change(row: Layer) -> Layer:
        then = (
            dataclasses.replace(stage, **changes) if isinstance(stage, of) else stage
            for stage in row.then
        )
        return dataclasses.replace(row, then=tuple(then))

    return _each_layer(table, change)


def _each_lrn(table: Variant, name: str, **changes: Any) -> Variant:
    if not any(isinstance(stage, Lrn) for stage in table.stages):
        raise ValueError(
            f"{name} changes LRN, and the network {table.name!r} has none here; give "
            "normalization='lrn', or leave it out."
        )
    return _each_stage(table, Lrn, **changes)


def _split_norms(stages: tuple[Stage, ...]) -> tuple[tuple[Stage, ...], tuple[Stage, ...]]:
    """Return (the norms, the other stages)."""
    norms = tuple(stage for stage in stages if isinstance(stage, NORMS))
    return norms, tuple(stage for stage in stages if not isinstance(stage, NORMS))


def _positive(what: str, value: int) -> int:
    if value < 1 or value != int(value):
        raise ValueError(f"{what}={value!r} must be a whole number of at least 1.")
    return int(value)


def _one_of(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{what}={value!r} must be one of {', '.join(choices)}.")
