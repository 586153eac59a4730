"""Loss, error and learning rate over a run, of one run or of several beside each other."""

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
_FAINT = 0.55  # training, beside what is held out
MOST_RUNS = len(RUN_COLORS)
# Characters of a name beside which another one, or nothing more, fits into the legend.
_LONG, _LONGEST = 44, 90
# A learning rate that falls in a few steps by more than this is drawn on a logarithmic
# axis: on a linear one all but the first steps would lie on zero.
_LOG_RANGE, _FEW = 20.0, 16


class _Quantity(NamedTuple):
    """What a panel shows: its axis, and the names in the records."""

    axis: str
    scale: float
    train: str
    held_out: str | None


QUANTITIES = {
    "loss": _Quantity("loss (nats)", 1.0, "train/loss", "eval/loss"),
    "top1_error": _Quantity(
        "top-1 error (%)", 100.0, "train/top1_error", "eval/top1_error"
    ),
    "lr": _Quantity("learning rate", 1.0, "lr", None),
    "images_per_sec": _Quantity("images a second", 1.0, "images_per_sec", None),
}

Records = Sequence[dict[str, Any]]


def training_curves(
    runs: Records | Mapping[str, Records],
    *,
    quantities: Sequence[str] = ("loss", "top1_error"),
    over: str = "epoch",
    num_classes: int | None = None,
) -> Figure:
    """Draws what the records of one run, or of several, say over the epochs.

    Args:
      runs: records of `writers.read_metrics`; of several runs name -> records.
      quantities: a panel each: "loss" (nats) and "top1_error" (%), of training and held
        out, "lr", "images_per_sec".
      over: "epoch" or "step".
      num_classes: draws what guessing gives, ln(classes) and 100 (1 - 1 / classes) %.

    Returns:
      A matplotlib figure. Of one run training and held-out values have their colours; of
      several each run has its own, with lines for training and markers for held out.

    Raises:
      ValueError: for more runs than can be told apart, six.
    """
    several = runs if isinstance(runs, Mapping) else {}
    if len(several) > MOST_RUNS:
        raise ValueError(
            f"at most {MOST_RUNS} runs can be told apart in a figure; {len(several)} "
            "were given."
        )
    held_out = any(
        QUANTITIES[name].held_out in record
        for name in quantities
        for records in several.values()
        for record in records
    )
    # Room below for the legend of several runs, two names a row.
    columns = 1 if any(len(name) > _LONG for name in several) else 2
    below = 0.25 + 0.22 * -(-(len(several) + 2) // columns) if several else 0.0
    figure = Figure(figsize=(4.0 * len(quantities), 3.2 + below), layout="constrained")
    panels = figure.subplots(1, len(quantities), squeeze=False)[0]
    for axes, name in zip(panels, quantities, strict=True):
        quantity = QUANTITIES[name]
        for i, records in enumerate(several.values()):
            _draw_several(axes, records, quantity, over, i, held_out)
        if not isinstance(runs, Mapping):
            _draw_one(axes, runs, quantity, over)
        axes.set_ylabel(quantity.axis)
        axes.set_xlabel(over)
        _finish(axes, name, num_classes)
        if axes.get_legend_handles_labels()[0]:  # of one run
            axes.legend(frameon=False)
    if several:
        _legend(figure, list(several), held_out, columns)
    return figure


def _points(
    records: Records, key: str | None, scale: float, over: str
) -> tuple[list[float], list[float]]:
    if key is None:
        return [], []
    found = [r for r in records if key in r]
    return [r[over] for r in found], [scale * r[key] for r in found]


def _draw_one(axes: Axes, records: Records, quantity: _Quantity, over: str) -> None:
    for key, color, marker, label in (
        (quantity.train, _TRAIN, "", "training"),
        (quantity.held_out, _EVAL, "o", "held out"),
    ):
        x, y = _points(records, key, quantity.scale, over)
        if x:
            label = label if quantity.held_out else f"_{label}"  # nothing to tell apart
            marker = marker or _marker_of_one(x)
            style = {"color": color, "marker": marker, "markersize": 3.5}
            axes.plot(x, y, label=label, **style)


def _marker_of_one(x: Sequence[float]) -> str:
    """A line of a single point is not to be seen."""
    return "o" if len(x) == 1 else ""


def _draw_several(
    axes: Axes,
    records: Records,
    quantity: _Quantity,
    over: str,
    number: int,
    held_out: bool,
) -> None:
    color, marker = RUN_COLORS[number], _MARKERS[number]
    faint = _FAINT if held_out and quantity.held_out else 1.0
    x, y = _points(records, quantity.train, quantity.scale, over)
    style = {"color": color, "marker": _marker_of_one(x), "markersize": 3.5}
    axes.plot(x, y, linewidth=1.1, alpha=faint, **style)
    x, y = _points(records, quantity.held_out, quantity.scale, over)
    every = max(1, len(x) // 12)  # markers on each of a hundred would hide the line
    style = {"color": color, "marker": marker, "markersize": 4.5, "markevery": every}
    if x:
        axes.plot(x, y, linewidth=1.1, linestyle="--", **style)


def _finish(axes: Axes, name: str, num_classes: int | None) -> None:
    """The axes' range, grid and, where there is one, the level of guessing."""
    if num_classes is not None and name in ("loss", "top1_error"):
        level = math.log(num_classes) if name == "loss" else 100 * (1 - 1 / num_classes)
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
    values = [np.asarray(line.get_ydata(), float) for line in axes.lines]
    rates = np.concatenate(values) if values else np.zeros(0)
    few = len(np.unique(rates)) <= _FEW * max(1, len(axes.lines))
    if (
        name == "lr"
        and rates.size
        and few
        and 0 < _LOG_RANGE * rates.min() < rates.max()
    ):
        axes.set_yscale("log")
    else:
        # Room above the highest, which autoscaling gives by the range of the values.
        highest = rates[np.isfinite(rates)].max(initial=0.0)
        axes.set_ylim(0, 1.08 * highest if highest > 0 else 1.0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure, names: Sequence[str], held_out: bool, columns: int) -> None:
    """The runs; and which line is of training, if there are others."""
    handles = []
    for i, name in enumerate(names):
        if len(name) > _LONGEST:  # what tells runs apart is often at the end
            name = f"{name[: _LONGEST // 2 - 2]} ... {name[3 - _LONGEST // 2 :]}"
        style = {"marker": _MARKERS[i] if held_out else "", "markersize": 4.5}
        handles.append(Line2D([], [], color=RUN_COLORS[i], label=name, **style))
    if held_out:
        handles += [
            Line2D([], [], color="black", alpha=_FAINT, label="training"),
            Line2D([], [], color="black", linestyle="--", label="held out"),
        ]
    legend = figure.legend(
        handles=handles,
        frameon=False,
        ncols=columns,
        fontsize=8,
        loc="outside lower center",
    )
    for words in legend.get_texts():
        words.set_parse_math(False)  # a "$" in a name is a dollar
