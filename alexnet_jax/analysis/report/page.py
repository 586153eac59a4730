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
    HeldOut,
    Run,
    classify_held_out,
    examples,
    time_spent,
)
from alexnet_jax.analysis.retrieval import RetrievalError, build_index, draw, nearest, shrink
from alexnet_jax.data import DataError
from alexnet_jax.data.imagenet import words
from alexnet_jax.data.sources import Sample
from alexnet_jax.system.machine import versions
from alexnet_jax.training.config import as_json, flat, get_config
from alexnet_jax.training.evaluate import class_errors, errors, worst_confusions
from alexnet_jax.training.metrics import shows_top5
from alexnet_jax.training.workdir import CONFIG_FILE
from alexnet_jax.training.writers import METRICS_FILE

_EXAMPLES = 8  # images with their most probable labels
# Training images that are searched for the neighbours of held-out ones, held-out images
# whose neighbours are counted, neighbours per image, and held-out images that are shown.
MOST_INDEXED, _QUERIES, _NEIGHBOURS, _SHOWN_QUERIES = 2_000, 100, 5, 5
_ALL_CLASSES = 20  # if there are more, only the worst are listed
_WORST = 10
_DPI = 120
_CSS_DPI = 96


def build_page(run: Run, python: str = "python") -> bytes:
    """Return report.html in UTF-8.

    Args:
      python: the Python command in the commands that the page shows.
    """
    mistakes = predictions = neighbours = None
    reason = ""  # why the images' sections are missing
    try:
        held_out = classify_held_out(run)
        mistakes = _mistakes(held_out)
        predictions = _predictions(run, held_out)
        neighbours = _neighbours(run, held_out)
    except (DataError, RetrievalError, OSError) as error:
        reason = str(error)
    metrics = run.workdir / METRICS_FILE
    written = time.localtime(metrics.stat().st_mtime) if metrics.exists() else None
    parallel = run.config["parallel"]
    devices = max(1, parallel["data"]) * max(1, parallel["column"])
    fields, defaults = flat(run.config), flat(as_json(get_config()))
    html = _template().render(
        run=run,
        name=run.workdir.absolute().name,
        data=run.config["data"],
        top5=shows_top5(len(run.names)),
        made=time.strftime("%Y-%m-%d %H:%M %Z"),
        written=time.strftime("%Y-%m-%d", written) if written else "",
        reason=reason,
        curves=_curves(run),
        mistakes=mistakes,
        predictions=predictions,
        neighbours=neighbours,
        filters=_filters(run),
        spent=time_spent(run),
        fields=fields,
        changed=[
            (name, fields[name], default)
            for name, default in defaults.items()
            if fields.get(name, default) != default
        ],
        python=python,
        workdir=shlex.quote(str(run.workdir)),
        config_file=shlex.quote(str(run.workdir / CONFIG_FILE)),
        cpu_devices=devices if devices > 1 and jax.default_backend() == "cpu" else 0,
        versions=versions(),
    )
    return html.encode()


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": lambda number: f"{number:,.0f}",
        "duration": _duration,
        "percent": lambda share, digits=2: f"{100 * share:.{digits}f}%",
        "value": _value,
        "words": words,
    }
    return environment.get_template("report.html.j2")


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


def _image(figure: Figure, kind: str) -> Image:
    """Return a figure as "svg", sharp at every size, or as "png" for images."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=_DPI)
    if kind == "png":  # of 256 colours: a third of the size, and it looks alike
        rgb = PillowImage.open(buffer).convert("RGB")
        buffer = io.BytesIO()
        small = rgb.quantize(256, PillowImage.Quantize.MEDIANCUT)
        small.save(buffer, format="png", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    url = f"data:image/{'svg+xml' if kind == 'svg' else kind};base64,{data}"
    return Image(url, *(round(_CSS_DPI * side) for side in figure.get_size_inches()))


def _curves(run: Run) -> dict[str, Image] | None:
    if not any("train/loss" in record for record in run.records):
        return None
    draw_curves, classes = figures.training_curves, len(run.names)
    return {
        name: _image(draw_curves(run.records, quantities=[name], num_classes=classes), "svg")
        for name in ("loss", "top1_error", "lr", "images_per_sec")
    }


def _mistakes(held_out: HeldOut) -> dict[str, Any]:
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


def _predictions(run: Run, held_out: HeldOut) -> dict[str, Any]:
    chosen, wrong = examples(held_out.predictions, _EXAMPLES)
    images, labels = fetch(held_out.images, np.array(chosen))
    names = [words(name) for name in run.names]
    shown = []
    for i, image, label in zip(chosen, images, labels, strict=True):
        chances = np.exp(held_out.predictions.centre[i].astype(np.float64))
        best = int(np.argmax(chances))
        drawn = figures.best_labels(image[None], chances[None], names, labels=[label])
        about = {"label": names[label], "predicted": names[best], "probability": chances[best]}
        shown.append({"image": _image(drawn, "png"), **about})
    return {"examples": shown, "wrong": wrong}


def _neighbours(run: Run, held_out: HeldOut) -> dict[str, Any]:
    """Find the training images nearest to some of the held-out ones.

    The features are those of the last layer before the classifier.
    """
    features_of = run.logits_of.of(run.layers[-2].name)
    training = run.open(run.config["data"]["train_split"])
    searched = Sample(training, MOST_INDEXED)
    index = build_index(features_of, searched)
    queries = Sample(held_out.images, _QUERIES)
    images, labels = fetch(queries, np.arange(queries.num_examples))
    _, rows = nearest(index.features, features_of(images), _NEIGHBOURS)
    _, by_pixels = nearest(index.pixels, shrink(images), _NEIGHBOURS)
    # The first image of each of a few classes, evenly spread.
    classes, first = np.unique(labels, return_index=True)
    count = min(_SHOWN_QUERIES, len(classes))
    shown = first[np.arange(count) * len(classes) // count]
    titles = [words(run.names[label]) for label in labels[shown]]
    drawn = draw(index, searched, images[shown], rows[shown], query_titles=titles)
    return {
        "image": _image(drawn, "png"),
        "shown": count,
        "queries": len(images),
        "each": rows.shape[1],
        "layer": index.layer,
        "searched": searched.num_examples,
        "total": training.num_examples,
        "same_class": np.mean(index.labels[rows] == labels[:, None]),
        "same_class_pixels": np.mean(index.labels[by_pixels] == labels[:, None]),
    }


def _filters(run: Run) -> dict[str, Any]:
    kernel, columns = run.first_kernel, run.logits_of.model.network.columns
    found = figures.filter_statistics(kernel)
    statistics = figures.filter_statistics_by_column(kernel, columns=columns)
    return {
        "image": _image(figures.first_layer_filters(kernel, columns=columns), "png"),
        "statistics": _image(statistics, "svg"),
        "side": kernel.shape[0],
        "count": kernel.shape[-1],
        "columns": columns,
        "median_colour": np.median(found.colour),
        "oriented": np.mean(found.coherence > 0.5),
    }
