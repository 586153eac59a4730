"""Draw loss, error and learning rate of one run, or of several in one figure."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

_TRAIN, _EVAL = "#4477aa", "#cc3311"  # told apart by colour-blind readers as well
# Of several runs; markers tell them apart without any colour.
RUN_COLORS = (_TRAIN, "#ee7733", "#228833", "#aa3377", "#33aadd", "#555555")
_MARKERS = "osD^vP"
_FAINT = 0.55  # training, next to held-out values
# The legend has two names per row unless one is longer than _LONG characters; a name
# longer than _LONGEST is shortened.
_LONG, _LONGEST = 44, 90
# A learning rate with few values, further apart than this, gets a logarithmic axis.
_LOG_RANGE, _FEW = 20.0, 16


class _Quantity(NamedTuple):
    """A panel: its axis, and the names in the records."""

    axis: str
    scale: float
    train: str
    held_out: str = ""


_QUANTITIES = {
    "loss": _Quantity("loss (nats)", 1.0, "train/loss", "eval/loss"),
    "top1_error": _Quantity("top-1 error (%)", 100.0, "train/top1_error", "eval/top1_error"),
    "lr": _Quantity("learning rate", 1.0, "lr"),
    "images_per_sec": _Quantity("images per second", 1.0, "images_per_sec"),
}

Records = Sequence[dict[str, Any]]


def training_curves(
    runs: Records | Mapping[str, Records],
    *,
    quantities: Sequence[str] = ("loss", "top1_error"),
    num_classes: int | None = None,
) -> Figure:
    """Draw the records of one run, or of several.

    Args:
      runs: records of `writers.read_metrics`; of several runs name -> records.
      quantities: one panel each: "loss" (nats) and "top1_error" (%), in training and
        held out, "lr", "images_per_sec".
      num_classes: draws what guessing gives, ln(classes) and 100 (1 - 1 / classes) %.

    Returns:
      A matplotlib figure. Colours tell training from held-out values of one run. Each of
      several runs has a colour, with lines for training and markers for held out.

    Raises:
      ValueError: for more than six runs, which could not be told apart.
    """
    several = runs if isinstance(runs, Mapping) else {}
    if len(several) > len(RUN_COLORS):
        raise ValueError(
            f"at most {len(RUN_COLORS)} runs can be told apart in a figure; "
            f"{len(several)} were given."
        )
    held_out = any(
        _QUANTITIES[name].held_out in record
        for name in quantities
        for records in several.values()
        for record in records
    )
    columns = 1 if any(len(name) > _LONG for name in several) else 2
    # Room below for the legend of several runs.
    below = 0.25 + 0.22 * -(-(len(several) + 2) // columns) if several else 0.0
    figure = Figure(figsize=(4.0 * len(quantities), 3.2 + below), layout="constrained")
    panels = figure.subplots(1, len(quantities), squeeze=False)[0]
    for axes, name in zip(panels, quantities, strict=True):
        quantity = _QUANTITIES[name]
        for i, records in enumerate(several.values()):
            _draw_several(axes, records, quantity, i, held_out)
        if not isinstance(runs, Mapping):
            _draw_one(axes, runs, quantity)
        axes.set_ylabel(quantity.axis)
        axes.set_xlabel("epoch")
        _finish(axes, name, num_classes)
    if several:
        _legend(figure, list(several), held_out, columns)
    return figure


def _points(records: Records, key: str, scale: float) -> tuple[list[float], list[float]]:
    found = [record for record in records if key in record]
    return [r["epoch"] for r in found], [scale * r[key] for r in found]


def _draw_one(axes: Axes, records: Records, quantity: _Quantity) -> None:
    for key, color, marker, label in (
        (quantity.train, _TRAIN, "", "training"),
        (quantity.held_out, _EVAL, "o", "held out"),
    ):
        x, y = _points(records, key, quantity.scale)
        if x:
            marker = marker or _marker_of(x)
            style = {"color": color, "marker": marker, "markersize": 3.5}
            axes.plot(x, y, label=label if quantity.held_out else None, **style)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)


def _marker_of(x: Sequence[float]) -> str:
    return "o" if len(x) == 1 else ""  # a line of a single point is invisible


def _draw_several(
    axes: Axes, records: Records, quantity: _Quantity, number: int, held_out: bool
) -> None:
    color = RUN_COLORS[number]
    x, y = _points(records, quantity.train, quantity.scale)
    faint = _FAINT if held_out and quantity.held_out else 1.0
    style = {"color": color, "marker": _marker_of(x), "markersize": 3.5}
    axes.plot(x, y, linewidth=1.1, alpha=faint, **style)
    x, y = _points(records, quantity.held_out, quantity.scale)
    if x:
        every = max(1, len(x) // 12)  # a hundred markers would hide the line
        style = {"color": color, "marker": _MARKERS[number], "markersize": 4.5}
        axes.plot(x, y, linewidth=1.1, linestyle="--", markevery=every, **style)


def _finish(axes: Axes, name: str, num_classes: int | None) -> None:
    """Set range and grid, and draw the level of guessing if there is one."""
    values = [np.asarray(line.get_ydata(), float) for line in axes.lines]
    if num_classes is not None and name in ("loss", "top1_error"):
        level = math.log(num_classes) if name == "loss" else 100 * (1 - 1 / num_classes)
        values.append(np.array([level]))
        axes.axhline(level, color="black", linewidth=0.8, linestyle=":")
        axes.annotate(
            f"guessing: ln({num_classes})" if name == "loss" else "guessing",
            (1.0, level),
            (0, 3),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            horizontalalignment="right",
            fontsize=8,
        )
    found = np.concatenate([np.zeros(0), *values])
    few = len(np.unique(found)) <= _FEW * max(1, len(axes.lines))
    least, most = found.min(initial=np.inf), found.max(initial=0.0)
    if name == "lr" and few and 0 < _LOG_RANGE * least < most:
        axes.set_yscale("log")
    else:
        # Autoscaling leaves room above by the range of the values only.
        highest = found[np.isfinite(found)].max(initial=0.0)
        axes.set_ylim(0, 1.08 * highest if highest > 0 else 1.0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure, names: Sequence[str], held_out: bool, columns: int) -> None:
    """Name the runs, and tell lines of training from others if there are any."""
    handles = []
    for i, name in enumerate(names):
        if len(name) > _LONGEST:  # runs often differ at the end of their names
            name = f"{name[: _LONGEST // 2 - 2]} ... {name[3 - _LONGEST // 2 :]}"
        style = {"marker": _MARKERS[i] if held_out else "", "markersize": 4.5}
        handles.append(Line2D([], [], color=RUN_COLORS[i], label=name, **style))
    if held_out:
        handles += [
            Line2D([], [], color="black", alpha=_FAINT, label="training"),
            Line2D([], [], color="black", linestyle="--", label="held out"),
        ]
    legend = figure.legend(
        handles=handles, frameon=False, ncols=columns, fontsize=8, loc="outside lower center"
    )
    for words in legend.get_texts():
        words.set_parse_math(False)  # a "$" in a name is a dollar
