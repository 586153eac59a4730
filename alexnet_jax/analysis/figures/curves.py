"""Draw loss, error and learning rate of one run, or of several in one figure."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

_TRAIN, _EVAL = "#4477aa", "#cc3311"  # told apart by colour-blind readers as well
# Colours of several runs; markers tell them apart without any colour.
RUN_COLORS = (_TRAIN, "#ee7733", "#228833", "#aa3377", "#33aadd", "#555555")
_MARKERS = "osD^vP"
_FAINT = 0.55  # training, next to held-out values
# The legend has two names per row unless one is longer than this.
_LONG = 44
# A learning rate with few values, further apart than this, gets a logarithmic axis.
_LOG_RANGE, _FEW = 20.0, 16


# Each panel: its axis, a factor, and the names in the records.
_QUANTITIES = {
    "loss": ("loss (nats)", 1.0, "train/loss", "eval/loss"),
    "top1_error": ("top-1 error (%)", 100.0, "train/top1_error", "eval/top1_error"),
    "lr": ("learning rate", 1.0, "lr", ""),
    "images_per_sec": ("images per second", 1.0, "images_per_sec", ""),
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
    names = list(runs) if isinstance(runs, Mapping) else []
    drawn = list(runs.values()) if isinstance(runs, Mapping) else [runs]
    has_held_out = False
    if len(names) > len(RUN_COLORS):
        raise ValueError(
            f"at most {len(RUN_COLORS)} runs can be told apart in a figure; {len(names)} were "
            "given. Draw several figures."
        )
    columns = 1 if any(len(name) > _LONG for name in names) else 2
    # Room below for the legend of several runs.
    below = 0.25 + 0.22 * math.ceil((len(names) + 2) / columns) if names else 0.0
    figure = Figure(figsize=(4.0 * len(quantities), 3.2 + below), layout="constrained")
    panels = figure.subplots(1, len(quantities), squeeze=False)[0]
    shared: dict[str, Any] = {"linewidth": 1.1 if names else 1.5, "markersize": 4}
    for axes, name in zip(panels, quantities, strict=True):
        label, scale, train, held_out = _QUANTITIES[name]
        is_tested = any(held_out in record for records in drawn for record in records)
        alpha = _FAINT if names and is_tested else 1.0
        for records, color, marker in zip(drawn, RUN_COLORS, _MARKERS, strict=False):
            x, y = _points(records, train, scale)
            dot = marker if len(x) == 1 else ""  # a line of a single point is invisible
            if x:
                axes.plot(x, y, color=color, marker=dot, alpha=alpha, label="training", **shared)
            x, y = _points(records, held_out, scale)
            style = {"color": _EVAL, "label": "held out"}
            if names:  # a hundred markers would hide the line
                style = {"color": color, "linestyle": "--", "markevery": max(1, len(x) // 12)}
            if x:
                axes.plot(x, y, marker=marker, **style, **shared)
        if held_out and axes.lines and not names:
            axes.legend(frameon=False)
        has_held_out |= is_tested
        axes.set_ylabel(label)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if num_classes is not None and name in ("loss", "top1_error"):
            _draw_guessing(axes, name, num_classes)
        _set_range(axes, may_be_log=name == "lr")
    if names:
        _add_legend(figure, names, has_held_out, columns)
    return figure


def _points(records: Records, key: str, scale: float) -> tuple[list[float], list[float]]:
    found = [record for record in records if key in record]
    return [r["epoch"] for r in found], [scale * r[key] for r in found]


def _draw_guessing(axes: Axes, name: str, num_classes: int) -> None:
    is_loss = name == "loss"
    level = math.log(num_classes) if is_loss else 100 * (1 - 1 / num_classes)
    axes.axhline(level, color="black", linewidth=0.8, linestyle=":")
    axes.annotate(
        f"guessing: ln({num_classes})" if is_loss else "guessing",
        (1.0, level),
        (0, 3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        horizontalalignment="right",
        fontsize=8,
    )


def _set_range(axes: Axes, *, may_be_log: bool) -> None:
    lines = [np.asarray(line.get_ydata(), float) for line in axes.lines]
    values = np.concatenate([np.zeros(0), *lines])
    values = values[np.isfinite(values)]
    few = len(np.unique(values)) <= _FEW * len(lines)
    least, most = values.min(initial=np.inf), values.max(initial=0.0)
    if may_be_log and few and 0 < _LOG_RANGE * least < most:
        axes.set_yscale("log")
    else:
        # Autoscaling leaves room above by the range of the values only.
        axes.set_ylim(0, 1.08 * most or 1.0)


def _add_legend(figure: Figure, names: Sequence[str], has_held_out: bool, columns: int) -> None:
    """Name the runs, and tell lines of training from held-out ones if there are any."""
    handles = [
        Line2D([], [], color=color, label=name, marker=marker if has_held_out else "", markersize=4)
        for name, color, marker in zip(names, RUN_COLORS, _MARKERS, strict=False)
    ]
    if has_held_out:
        handles += [
            Line2D([], [], color="black", alpha=_FAINT, label="training"),
            Line2D([], [], color="black", linestyle="--", label="held out"),
        ]
    legend = figure.legend(
        handles=handles, frameon=False, ncols=columns, fontsize=8, loc="outside lower center"
    )
    for words in legend.get_texts():
        words.set_parse_math(False)  # a "$" in a name is a dollar
