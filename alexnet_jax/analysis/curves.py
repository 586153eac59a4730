"""Loss and error over the epochs, from the records of a run."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

_TRAIN, _EVAL = "#4477aa", "#cc3311"  # told apart by colour-blind readers as well
_RUNS = (_TRAIN, "#ee7733", "#228833", "#aa3377", "#66ccee", "#bbbbbb")


def training_curves(records: Sequence[dict[str, Any]]) -> Figure:
    """Draws the training and evaluation loss and top-1 error over the epochs.

    Args:
      records: of `writers.read_metrics`.

    Returns:
      A matplotlib figure: losses in nats on the left, errors in % on the right.
    """
    figure = Figure(figsize=(8.0, 3.2), layout="constrained")
    loss, error = figure.subplots(1, 2)
    for group, color, marker in (("train", _TRAIN, ""), ("eval", _EVAL, "o")):
        for axes, name, scale in ((loss, "loss", 1.0), (error, "top1_error", 100.0)):
            key = f"{group}/{name}"
            points = [(r["epoch"], scale * r[key]) for r in records if key in r]
            if points:
                epochs, values = zip(*points, strict=True)
                label = "training" if group == "train" else "held out"
                axes.plot(
                    epochs,
                    values,
                    color=color,
                    marker=marker,
                    markersize=4,
                    label=label,
                )
    loss.set_ylabel("loss (nats)")
    error.set_ylabel("top-1 error (%)")
    for axes in (loss, error):
        axes.set_xlabel("epoch")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def compare_losses(
    runs: Mapping[str, Sequence[dict[str, Any]]], *, chance: float | None = None
) -> Figure:
    """Draws the training losses of several runs over their steps.

    Args:
      runs: name -> records of `writers.read_metrics`; at most six.
      chance: a loss to draw a line at, such as ln(classes).

    Returns:
      A matplotlib figure; losses in nats.
    """
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for (name, records), color in zip(runs.items(), _RUNS, strict=False):
        points = [(r["step"], r["train/loss"]) for r in records if "train/loss" in r]
        axes.plot(*zip(*points, strict=True), color=color, label=name)
    if chance is not None:
        axes.axhline(chance, color="black", linewidth=0.8, linestyle="--")
        axes.annotate(
            "ln(classes)",
            (1.0, chance),
            (0, 3),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            horizontalalignment="right",
        )
    axes.set_xlabel("step")
    axes.set_ylabel("training loss (nats)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
