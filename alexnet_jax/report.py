"""Draws what a run has learnt, and says how good it is.

python -m alexnet_jax.report --workdir=DIR

writes DIR/filters.png (the first layer's kernels, a panel a column) and
DIR/curves.png (loss and error over the epochs).
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags, logging

from alexnet_jax.analysis import first_layer_filters, training_curves
from alexnet_jax.checkpoint import CheckpointError
from alexnet_jax.experiment import load
from alexnet_jax.writers import METRICS_FILE, read_metrics

_NEXT = """what next
  your own pictures   {python} -m alexnet_jax.main --config=configs/folder.py \\
                        --workdir=runs/mine --config.data.source=folder:PATH
  the paper           {python} -m alexnet_jax.main --config=configs/paper.py \\
                        --workdir=runs/paper --config.data.source=folder:PATH
  without LRN         add --config.model.overrides.lrn=False and a new --workdir
  in a notebook       model, variables, preprocess = alexnet_jax.load("{workdir}")"""


def report(workdir: Path) -> list[str]:
    """Draws the figures into `workdir`; returns the lines that say what there is."""
    model, variables, _ = load(workdir)
    records = read_metrics(workdir / METRICS_FILE)
    first = model.network.layers[0].name
    kernel = variables["params"][first]["kernel"]
    filters, curves = workdir / "filters.png", workdir / "curves.png"
    first_layer_filters(kernel, columns=model.network.columns).savefig(filters, dpi=150)
    training_curves(records).savefig(curves, dpi=150)
    lines = []
    evaluations = [record for record in records if "eval/loss" in record]
    if evaluations:
        last = evaluations[-1]
        top1, top5 = 100 * last["eval/top1_error"], 100 * last["eval/top5_error"]
        lines.append(
            f"held-out errors: top-1 {top1:.2f}%, top-5 {top5:.2f}% "
            f"({last['eval/count']:.0f} pictures, step {last['step']})"
        )
        if "eval/views_loss" in last:
            top1, top5 = (100 * last[f"eval/views_{k}_error"] for k in ("top1", "top5"))
            lines.append(f"over several views: top-1 {top1:.2f}%, top-5 {top5:.2f}%")
    lines.append(f"first-layer filters: {filters}")
    lines.append(f"training curves:     {curves}")
    return lines


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        sys.exit(f"error: unknown on the command line: {' '.join(argv[1:])}")
    if not _WORKDIR.value:
        sys.exit("error: --workdir=DIR is missing: the folder of a run.")
    workdir = Path(_WORKDIR.value)
    try:
        lines = report(workdir)
    except (CheckpointError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    # As it was called: the environment's python, not the system's.
    python = os.path.relpath(sys.executable)
    python = sys.executable if python.startswith("..") else python
    print("\n".join(["", *lines, "", _NEXT.format(python=python, workdir=workdir)]))


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string("workdir", None, "The folder of a run.")
    logging.set_verbosity(logging.WARNING)
    app.run(main)
