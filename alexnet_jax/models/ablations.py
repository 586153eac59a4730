"""Ablations: named changes of a layer table.

    create_model("paper", lrn=False, columns=1)

`ABLATIONS` lists them by name, in the order in which `customize` applies them. Each is a function
(table, value) -> table that raises ValueError for a value out of range.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterable
from typing import Any, Literal, get_args

import numpy as np

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
    _check_layers("skip", names, can_go, f"cannot be left out of variant {table.name!r}; these can")
    rows: list[Layer] = []
    for row in table.layers:
        if row.name in names:
            # The layer before takes over the pooling, so the grids stay the same (but for the
            # stride of the layer itself, in zfnet's conv2).
            kept = tuple(s for s in row.then if isinstance(s, Pool | Dropout))
            rows[-1] = dataclasses.replace(rows[-1], then=(*rows[-1].then, *kept))
        else:
            rows.append(row)
    return dataclasses.replace(table, layers=tuple(rows))


def columns(table: Variant, count: int) -> Variant:
    """Set the number of columns; with 1 every layer sees everything."""
    _check("columns", count, *COUNT)
    return dataclasses.replace(table, columns=count)


def width(table: Variant, factor: float) -> Variant:
    """Multiply the features of every layer but the last by a factor above 0."""
    _check("width", factor, "above 0; 0.25 is a quarter", lambda x: x > 0)
    *rows, last = table.layers
    if factor != 1:
        each = (max(1, round(row.features * factor / table.columns)) for row in rows)  # per column
        rows = [
            dataclasses.replace(row, features=table.columns * count)
            for row, count in zip(rows, each, strict=True)
        ]
    return dataclasses.replace(table, layers=(*rows, last))


def num_classes(table: Variant, count: int) -> Variant:
    """Set the units of the last layer."""
    _check("num_classes", count, *COUNT)
    *rows, last = table.layers
    return dataclasses.replace(table, layers=(*rows, dataclasses.replace(last, features=count)))


def lrn(table: Variant, on: bool) -> Variant:
    """Apply `normalization="lrn"` (True) or `normalization="none"` (False)."""
    return normalization(table, "lrn" if on else "none")


def normalization(table: Variant, kind: NormalizationKind) -> Variant:
    """Normalise by "lrn", by "batch" norm, or not at all ("none").

    A table that normalises keeps the places of its norms and the constants of its LRN. Another
    table gets the paper's LRN, or batch norm, after the activations of conv1 and conv2.
    """
    _check("normalization", kind, *one_of(NormalizationKind))
    new = PAPER_LRN if kind == "lrn" else BatchNorm()
    normalizes = any(isinstance(stage, NORMS) for stage in table.stages)

    def change(row: Layer) -> Iterable[Stage]:
        if kind == "none":
            return _others(row.then)
        if not normalizes:
            at = _first(Activation, row) if row.name in ("conv1", "conv2") else None
            return row.then if at is None else (*row.then[: at + 1], new, *row.then[at + 1 :])
        if kind == "lrn":
            return (new if isinstance(stage, BatchNorm) else stage for stage in row.then)
        at = _first(NORMS, row)
        if at is None:
            return row.then
        # A single one, in place of the first: layer 2 of the original has two.
        return (*row.then[:at], new, *_others(row.then[at:]))

    return _with_stages(table, change)


def norm_layers(table: Variant, names: Collection[str]) -> Variant:
    """Keep the normalisation of these layers only."""
    normalized = [row.name for row in table.layers if _norms(row.then)]
    what = f"of variant {table.name!r} is not normalised; these are"
    _check_layers("norm_layers", names, normalized, what)
    return _with_stages(table, lambda row: row.then if row.name in names else _others(row.then))


def norm_place(table: Variant, place: Place) -> Variant:
    """Put every norm "before" or "after" the activation of its layer.

    A norm on the other side moves next to the activation.
    """
    _check("norm_place", place, *one_of(Place))

    def change(row: Layer) -> Iterable[Stage]:
        at = _first(Activation, row)
        if at is None:
            return row.then
        before, unit, after = row.then[:at], row.then[at], row.then[at + 1 :]
        if place == "before":
            return (*before, *_norms(after), unit, *_others(after))
        return (*_others(before), unit, *_norms(before), *after)

    return _with_stages(table, change)


# A rule for a value: (what it must be, a function that returns True if it is).
Rule = tuple[str, Callable[[Any], bool]]
COUNT: Rule = (
    "a whole number of at least 1",
    lambda n: isinstance(n, int | np.integer) and bool(n >= 1),
)


def one_of(kinds: Any) -> Rule:
    """Return the rule for one of the values of a `Literal`."""
    return f"one of {', '.join(get_args(kinds))}", lambda value: value in get_args(kinds)


# Ablations that set a field of every stage of one kind: (kind, field, rule).
STAGE_FIELDS: dict[str, tuple[type[Stage], str, Rule]] = {
    # Section 3.3 of the paper: n = 5 maps around the unit, k = 2, alpha = 1e-4, beta = 0.75.
    "lrn_size": (Lrn, "size", ("an odd whole number", lambda n: COUNT[1](n) and n % 2 == 1)),
    # LRN divides by a power of k.
    "lrn_k": (Lrn, "k", ("above 0 and finite", lambda k: 0 < k < math.inf)),
    "lrn_alpha": (Lrn, "alpha", ("at least 0 and finite", lambda x: 0 <= x < math.inf)),
    "lrn_beta": (Lrn, "beta", ("at least 0 and finite", lambda x: 0 <= x < math.inf)),
    # Alpha multiplies the "sum" of the squares (the paper) or their "mean".
    "lrn_alpha_mode": (Lrn, "alpha_mode", one_of(AlphaMode)),
    # The window stays inside a column (the paper), or crosses columns (Caffe).
    "lrn_per_column": (Lrn, "per_column", ("True or False", lambda on: on in (True, False))),
    # Section 3.4: windows of 2 pixels with a stride of 2 are the ablation of overlap.
    "pool_window": (Pool, "window", COUNT),
    "pool_stride": (Pool, "stride", COUNT),
    "pool_kind": (Pool, "kind", one_of(PoolKind)),
    "activation": (Activation, "kind", one_of(ActivationKind)),
    "dropout": (Dropout, "rate", ("0 or more and below 1", lambda rate: 0 <= rate < 1)),
}


def set_stage_field(name: str, table: Variant, value: Any) -> Variant:
    """Apply the ablation `name` of `STAGE_FIELDS`."""
    kind, field, rule = STAGE_FIELDS[name]
    _check(name, value, *rule)
    if kind is Lrn and not any(isinstance(stage, Lrn) for stage in table.stages):
        raise ValueError(
            f"{name} changes LRN, and the network {table.name!r} has none here; give "
            "normalization='lrn', or leave it out."
        )

    def change(row: Layer) -> Iterable[Stage]:
        return (
            dataclasses.replace(stage, **{field: value}) if isinstance(stage, kind) else stage
            for stage in row.then
        )

    return _with_stages(table, change)


_ROW_CHANGES = (skip, columns, width, num_classes, lrn, normalization, norm_layers, norm_place)
ABLATIONS: dict[str, Callable[[Variant, Any], Variant]] = {
    **{change.__name__: change for change in _ROW_CHANGES},
    **{name: functools.partial(set_stage_field, name) for name in STAGE_FIELDS},
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
                f"{table.columns} columns. Change the columns, the features or the width."
            )
    return table


def _with_stages(table: Variant, stages_of: Callable[[Layer], Iterable[Stage]]) -> Variant:
    rows = (dataclasses.replace(row, then=tuple(stages_of(row))) for row in table.layers)
    return dataclasses.replace(table, layers=tuple(rows))


def _norms(stages: Iterable[Stage]) -> tuple[Stage, ...]:
    return tuple(stage for stage in stages if isinstance(stage, NORMS))


def _others(stages: Iterable[Stage]) -> tuple[Stage, ...]:
    return tuple(stage for stage in stages if not isinstance(stage, NORMS))


def _first(kinds: type[Stage] | tuple[type[Stage], ...], row: Layer) -> int | None:
    """Return the place of the first stage of these kinds after a row."""
    return next((i for i, stage in enumerate(row.then) if isinstance(stage, kinds)), None)


def _check(name: str, value: Any, must_be: str, holds: Callable[[Any], bool]) -> None:
    if not holds(value):
        raise ValueError(f"{name}={value!r} must be {must_be}.")


def _check_layers(name: str, layers: Collection[str], known: Collection[str], what: str) -> None:
    for layer in layers:
        if layer not in known:
            listed = ", ".join(known) or "none"
            raise ValueError(f"{name}={list(layers)}: {layer!r} {what}: {listed}.")
