"""Draw a sweep's results beside the published ones, or as the paper's figure 1."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from alexnet_jax.analysis.figures.curves import RUN_COLORS
from alexnet_jax.sweeps.plan import Sweep
from alexnet_jax.sweeps.summary import Estimate, Line

_OURS, _PAPER = "#4477aa", "#cc3311"  # told apart by colour-blind readers as well


def sweep_results(sweep: Sweep, lines: Sequence[Line]) -> Figure:
    """Return a figure of each row's metric and of its effect, with the published one.

    On the left: every run as a light dot, mean and standard deviation over seeds. On the
    right: the effect and its standard error.
    """
    figure = Figure(figsize=(8.0, 1.3 + 0.42 * len(lines)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for y, line in enumerate(lines):
        values = [value.value for value in line.values.values()]
        left.plot(values, [y] * len(values), "o", color=_OURS, alpha=0.3, markersize=4)
        _draw(left, y, line.value)
        _draw(right, y, line.effect)
        paper = line.row.paper
        if paper is not None and paper.effect is not None:
            right.plot(paper.effect, y, "D", color=_PAPER, fillstyle="none", zorder=3)
    left.set_yticks(range(len(lines)), [line.title for line in lines])
    left.set_ylim(len(lines) - 0.5, -0.5)  # the first row on top
    left.set_xlabel(str(sweep.metric))
    ratio = sweep.compare == "ratio"
    right.set_xlabel(
        f"row over {sweep.baseline!r}" if ratio else f"row minus {sweep.baseline!r} (points)"
    )
    right.axvline(1.0 if ratio else 0.0, color="black", linewidth=0.8)
    right.plot([], [], "o", color=_OURS, label="here")
    right.plot([], [], "D", color=_PAPER, fillstyle="none", label="published")
    figure.legend(
        *right.get_legend_handles_labels(), frameon=False, ncols=2, loc="outside upper right"
    )
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw(axes: Axes, y: int, estimate: Estimate) -> None:
    if estimate.mean is not None:
        axes.errorbar(estimate.mean, y, xerr=estimate.spread, fmt="o", color=_OURS, capsize=3)


def error_curves(rows: Mapping[str, Sequence[Sequence[dict[str, Any]]]], target: float) -> Figure:
    """Return a figure of training errors (%) over the epochs, as the paper's figure 1.

    Args:
      rows: row -> records of `writers.read_metrics` of each of its runs.
      target: the error in [0, 1] that is drawn as a dashed line.
    """
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    for i, (name, runs) in enumerate(rows.items()):
        color = RUN_COLORS[i % len(RUN_COLORS)]
        axes.plot([], [], color=color, label=name)
        for j, records in enumerate(runs):
            points = [
                (r["epoch"], 100 * r["train/top1_error"])
                for r in records
                if "train/top1_error" in r
            ]
            axes.plot(*zip(*points, strict=True), color=color, alpha=1.0 if j == 0 else 0.4)
    axes.axhline(100 * target, color="black", linewidth=0.8, linestyle="--")
    axes.set_xlabel("epoch")
    axes.set_ylabel("training error (%)")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
