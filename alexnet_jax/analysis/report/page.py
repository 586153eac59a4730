"""Render report.html: figures and numbers from here, all text from `report.html.j2`.

Figures become data URLs, and the template escapes every name. The page forbids every
request, so that a name in the data can never make a browser load anything.
"""

import base64
import io
import shlex
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jinja2
import numpy as np
from matplotlib.figure import Figure
from PIL import Image as PillowImage

from alexnet_jax.analysis import figures
from alexnet_jax.analysis.features import fetch
from alexnet_jax.analysis.report.findings import (
    Alike,
    HeldOut,
    Missing,
    Run,
    differences,
    look_at_held_out,
    look_for_alike,
    time_spent,
)
from alexnet_jax.analysis.retrieval import draw
from alexnet_jax.data.imagenet import words
from alexnet_jax.system import machine as machine_records
from alexnet_jax.training.config import flat
from alexnet_jax.training.evaluate import class_errors, errors, worst_confusions
from alexnet_jax.training.metrics import shows_top5
from alexnet_jax.training.workdir import CONFIG_FILE
from alexnet_jax.training.writers import METRICS_FILE

_EXAMPLES = 8  # images with their most probable labels
_SHOWN_QUERIES = 5  # images with their neighbours
_ALL_CLASSES = 20  # if there are more, only the worst are listed
_WORST = 10
_DPI = 120
_CSS_DPI = 96


def build_page(run: Run, python: str = "python") -> bytes:
    """Return report.html in UTF-8.

    Args:
      python: the Python command in the commands that the page shows.
    """
    held_out = look_at_held_out(run)
    alike = look_for_alike(run, held_out)
    metrics = run.workdir / METRICS_FILE
    written = time.localtime(metrics.stat().st_mtime) if metrics.exists() else None
    template = _environment().get_template("report.html.j2")
    html = template.render(
        run=run,
        name=run.workdir.absolute().name,
        data=run.config["data"],
        top5=shows_top5(len(run.names)),
        made=time.strftime("%Y-%m-%d %H:%M %Z"),
        written=time.strftime("%Y-%m-%d", written) if written else "",
        curves=_curves(run),
        mistakes=_mistakes(held_out),
        predictions=_predictions(run, held_out),
        neighbours=_neighbours(run, alike),
        filters=_filters(run),
        spent=time_spent(run),
        fields=flat(run.config),
        changed=differences(run.config),
        python=python,
        workdir=shlex.quote(str(run.workdir)),
        config_file=shlex.quote(str(run.workdir / CONFIG_FILE)),
        cpu_devices=_cpu_devices(run),
        versions=machine_records.versions(),
    )
    return html.encode()


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        {
            "count": lambda number: f"{number:,.0f}",
            "duration": _duration,
            "percent": lambda share, digits=2: f"{100 * share:.{digits}f}%",
            "value": _value,
            "words": words,
        }
    )
    environment.tests["missing"] = lambda found: isinstance(found, Missing)
    return environment


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour} h {minute:02d} min" if hour else f"{minute} min {second:02d} s"


def _value(value: Any) -> str:
    """Return a config value as the command line takes it."""
    if isinstance(value, list):
        value = tuple(value)
    return repr(value) if value == "" else str(value)


class Image(NamedTuple):
    """A figure for the page: data URL, and size in CSS pixels."""

    url: str
    width: int
    height: int


def _image(figure: Figure, kind: str, data: bytes) -> Image:
    url = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return Image(url, *(round(_CSS_DPI * side) for side in figure.get_size_inches()))


def _svg(figure: Figure) -> Image:
    """Return a figure of lines and text, sharp at every size."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _image(figure, "svg+xml", buffer.getvalue())


def _png(figure: Figure) -> Image:
    """Return a figure of images in 256 colours: a third of the size, and it looks alike."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    rgb = PillowImage.open(buffer).convert("RGB")
    buffer = io.BytesIO()
    small = rgb.quantize(256, PillowImage.Quantize.MEDIANCUT)
    small.save(buffer, format="png", optimize=True)
    return _image(figure, "png", buffer.getvalue())


def _curves(run: Run) -> dict[str, Image] | Missing:
    if not any("train/loss" in record for record in run.records):
        return Missing(f"{METRICS_FILE} holds no record of training")
    return {
        name: _svg(
            figures.training_curves(run.records, quantities=[name], num_classes=len(run.names))
        )
        for name in ("loss", "top1_error", "lr", "images_per_sec")
    }


def _mistakes(held_out: HeldOut | Missing) -> dict[str, Any] | Missing:
    if isinstance(held_out, Missing):
        return held_out
    found = class_errors(held_out.predictions)
    shown = found if len(found) <= _ALL_CLASSES else found[:_WORST]
    return {
        "overall": errors(held_out.predictions),
        "total": held_out.total,
        "classes": shown,
        "all_shown": len(shown) == len(found),
        "largest": max(max(c.top1_error for c in shown), 1e-9),
        "confusions": worst_confusions(held_out.predictions, _WORST),
    }


def _predictions(run: Run, held_out: HeldOut | Missing) -> dict[str, Any] | Missing:
    if isinstance(held_out, Missing):
        return held_out
    chosen, wrong = held_out.examples(_EXAMPLES)
    images, labels = fetch(held_out.images, np.array(chosen))
    names = [words(name) for name in run.names]
    chances = np.exp(held_out.predictions.centre[chosen].astype(np.float64))
    examples = []
    for image, label, chance in zip(images, labels, chances, strict=True):
        best = int(np.argmax(chance))
        drawn = figures.best_labels(image[None], chance[None], names, labels=[label])
        examples.append(
            {
                "image": _png(drawn),
                "label": names[label],
                "predicted": names[best],
                "probability": chance[best],
            }
        )
    return {"examples": examples, "wrong": wrong}


def _neighbours(run: Run, alike: Alike | Missing) -> dict[str, Any] | Missing:
    if isinstance(alike, Missing):
        return alike
    # The first image of each of a few classes, evenly spread.
    present = np.unique(alike.labels)
    count = min(_SHOWN_QUERIES, len(present))
    classes = present[np.arange(count) * len(present) // count]
    shown = np.array([np.argmax(alike.labels == label) for label in classes])
    drawn = draw(
        alike.index,
        alike.indexed,
        alike.images[shown],
        alike.rows[shown],
        query_titles=[words(run.names[label]) for label in classes],
    )
    return {
        "image": _png(drawn),
        "shown": count,
        "queries": len(alike.images),
        "each": alike.rows.shape[1],
        "layer": alike.index.layer,
        "searched": alike.indexed.num_examples,
        "total": alike.total,
        "same_class": alike.same_class,
        "same_class_pixels": alike.same_class_pixels,
    }


def _filters(run: Run) -> dict[str, Any]:
    kernel, columns = run.first_kernel, run.columns
    found = figures.filter_statistics(kernel)
    statistics = figures.filter_statistics_by_column(kernel, columns=columns)
    return {
        "image": _png(figures.first_layer_filters(kernel, columns=columns)),
        "statistics": _svg(statistics),
        "side": kernel.shape[0],
        "count": kernel.shape[-1],
        "columns": columns,
        "median_colour": np.median(found.colour),
        "oriented": np.mean(found.coherence > 0.5),
    }


def _cpu_devices(run: Run) -> int:
    """Return the number of virtual CPU devices that the run's config needs; else 0."""
    parallel = run.config["parallel"]
    devices = max(1, parallel["data"]) * max(1, parallel["column"])
    return devices if devices > 1 and jax.default_backend() == "cpu" else 0
