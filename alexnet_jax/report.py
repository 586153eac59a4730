"""Write the report of a run, or draw the curves of several runs in one figure.

python -m alexnet_jax.report --workdir=DIR

writes DIR/report.html, a page in one file: errors, curves, mistakes, filters, predictions,
neighbours, where the time went, the configuration. The page loads nothing else and prints
on A4. Also written: DIR/filters.png (the first layer's kernels, one panel per column),
DIR/filter_statistics.png (how coloured and how directed the kernels of each column are)
and DIR/curves.png (loss and error over the epochs). Mistakes and neighbours need the run's
own images; if these are missing, the page says so and shows the rest.

python -m alexnet_jax.report --workdir=DIR,DIR,DIR --out=FILE.png

draws the curves of at most six runs in one figure: loss and error, in training and held
out. FILE ends in .png, .jpg, .svg or .pdf.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alexnet_jax.analysis.features import save_figure
from alexnet_jax.analysis.figures import (
    filter_statistics_by_column,
    first_layer_filters,
    training_curves,
)
from alexnet_jax.analysis.report.findings import read_run
from alexnet_jax.analysis.report.page import build_page
from alexnet_jax.data.images import short_names
from alexnet_jax.system import signals
from alexnet_jax.system.cli import exit_status, figure_file, path_argument, require_writable_file
from alexnet_jax.system.files import atomic_write
from alexnet_jax.training.checkpoint import CheckpointError
from alexnet_jax.training.metrics import shows_top5
from alexnet_jax.training.workdir import read_class_names, require_run
from alexnet_jax.training.writers import METRICS_FILE, read_metrics

REPORT_FILE = "report.html"
FIGURES = ("filters.png", "filter_statistics.png", "curves.png")

_NEXT = """what next
  your own images     {python} -m alexnet_jax.main --config=configs/folder.py \\
                        --workdir=runs/mine --config.data.source=folder:PATH
  the paper           {python} -m alexnet_jax.main --config=configs/paper.py \\
                        --workdir=runs/paper --config.data.source=folder:PATH
  without LRN         add --config.model.overrides.lrn=False and a new --workdir
  in a notebook       model, variables, preprocess = alexnet_jax.load("{workdir}")"""


def report(workdir: Path, *, python: str = "python") -> list[str]:
    """Write the page and the figures of a run; return the lines to print.

    Args:
      python: the Python command in the commands that the page shows.

    Raises:
      FileNotFoundError, CheckpointError: as `load.load`.
      PathError: (an OSError) the page or a figure cannot be written.
    """
    require_run(workdir)
    for name in (REPORT_FILE, *FIGURES):
        require_writable_file(workdir / name)
    run = read_run(workdir)
    html = build_page(run, python)  # before anything is written
    filters, statistics, curves = (workdir / name for name in FIGURES)
    kernel, columns = run.first_kernel, run.logits_of.model.network.columns
    save_figure(first_layer_filters(kernel, columns=columns), filters)
    save_figure(filter_statistics_by_column(kernel, columns=columns), statistics)
    save_figure(training_curves(run.records), curves)
    with atomic_write(workdir / REPORT_FILE) as file:
        file.write(html)
    return [
        *_held_out_errors(run.records, shows_top5(len(run.names))),
        f"first-layer filters: {filters}, {statistics.name}",
        f"training curves:     {curves}",
        f"report:              {workdir / REPORT_FILE}",
    ]


def compare(workdirs: Sequence[Path], out: Path) -> list[str]:
    """Draw the curves of several runs; return lines with their held-out errors.

    Raises:
      FileNotFoundError: for a folder that is not the workdir of a run.
      PathError: (an OSError) `out` cannot be written.
      ValueError: for too many runs, or one given twice.
    """
    require_writable_file(out)
    names = short_names(workdirs)
    if len(set(names)) < len(names):
        names = [str(workdir) for workdir in workdirs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"--workdir names {twice} twice; name each run once.")
    runs, lines = {}, []
    for name, workdir in zip(names, workdirs, strict=True):
        require_run(workdir)
        runs[name] = read_metrics(workdir / METRICS_FILE)
        classes = read_class_names(workdir)
        top5 = classes is None or shows_top5(len(classes))
        errors = _held_out_errors(runs[name], top5) or ["no evaluation yet"]
        lines += [f"{name}: {line}" for line in errors]
    save_figure(training_curves(runs), out)
    return [*lines, f"curves of {len(runs)} runs: {out}"]


def _held_out_errors(records: Sequence[dict[str, Any]], top5: bool) -> list[str]:
    """Return lines with the errors of the last evaluation, if there is one."""
    evaluations = [record for record in records if "eval/loss" in record]
    if not evaluations:
        return []
    last = evaluations[-1]

    def errors(prefix: str) -> str:
        ks = (1, 5) if top5 else (1,)
        rates = ((k, 100 * last[f"{prefix}top{k}_error"]) for k in ks)
        return ", ".join(f"top-{k} {rate:.2f}%" for k, rate in rates)

    images = f"{last['eval/count']:.0f} images, step {last['step']}"
    lines = [f"held-out errors: {errors('eval/')} ({images})"]
    if "eval/views_loss" in last:
        lines.append(f"over several views: {errors('eval/views_')}")
    return lines


def _workdirs(text: str) -> list[Path]:
    """Return the folder of that name, or those between its commas; for argparse."""
    whole = path_argument(text)
    return [whole] if whole.exists() else [path_argument(name) for name in text.split(",")]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m alexnet_jax.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    about = "folder of a run, or of several to compare"
    parser.add_argument(
        "--workdir", type=_workdirs, required=True, metavar="DIR[,DIR...]", help=about
    )
    about = "figure of several runs"
    parser.add_argument("--out", type=figure_file, metavar="FILE.png", help=about)
    options = parser.parse_args(argv)
    if (len(options.workdir) > 1) != (options.out is not None):
        parser.error("--out=FILE.png goes with several runs, --workdir=DIR,DIR.")
    return options


def _run(options: argparse.Namespace) -> bool:
    if options.out is not None:
        print("\n".join(compare(options.workdir, options.out)))
        return True
    (workdir,) = options.workdir
    # The Python of this environment, as a relative path if it is short.
    python = os.path.relpath(sys.executable)
    python = sys.executable if python.startswith("..") else python
    lines = report(workdir, python=python)
    print("\n".join(["", *lines, "", _NEXT.format(python=python, workdir=workdir)]))
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    options = _parse(argv)
    return exit_status(lambda: _run(options), CheckpointError)


if __name__ == "__main__":
    signals.run(main)
