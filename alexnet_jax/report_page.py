"""What stands in a run's report.html, section by section."""

import shlex
import time
from typing import Any

import jax
import numpy as np

from alexnet_jax import records as machine_records
from alexnet_jax import retrieve
from alexnet_jax.analysis import (
    best_labels,
    filter_statistics,
    filter_statistics_by_column,
    first_layer_filters,
    page,
    training_curves,
)
from alexnet_jax.analysis.page import Markup
from alexnet_jax.data.imagenet import words
from alexnet_jax.evaluate import class_errors, errors, worst_confusions
from alexnet_jax.experiment import CONFIG_FILE, flat
from alexnet_jax.findings import (
    Alike,
    Difference,
    HeldOut,
    Missing,
    Run,
    differences,
    first_kernel,
    look_at_held_out,
    look_for_alike,
    time_spent,
)
from alexnet_jax.metrics import shows_top5
from alexnet_jax.timing import TIMES_FILE
from alexnet_jax.writers import METRICS_FILE

_EXAMPLES = 8  # pictures with their labels
_SHOWN_QUERIES = 5  # pictures with their neighbours
_ALL_CLASSES = 20  # of no more classes all are listed, else the worst
_WORST = 10


def build_page(run: Run, python: str = "python") -> bytes:
    """The whole of report.html.

    Args:
      python: how Python is called in the commands that it shows.
    """
    held_out = look_at_held_out(run)
    alike = look_for_alike(run, held_out)
    changed = differences(run.config)
    name = run.workdir.absolute().name
    return page.document(
        f"{name}: {_network(run)}",
        _about(run),
        _headline(run),
        _curves(run),
        _mistakes(run, held_out),
        _predictions(run, held_out),
        _neighbours(run, alike),
        _filters(run),
        _time(run),
        _configuration(run, changed),
        _layers(run),
        _commands(run, python, changed is not None),
        footer="Made by python -m alexnet_jax.report from the files of the run.",
    )


def _percent(share: float, digits: int = 2) -> str:
    return f"{100 * share:.{digits}f}%"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour} h {minute:02d} min" if hour else f"{minute} min {second:02d} s"


def _missing(what: str, missing: Missing) -> Markup:
    return page.paragraph(f"{what}: {missing.reason}", kind="missing")


def _of(shown: int, total: int) -> str:
    """Such as "2,000 (spread evenly) of 50,000" of pictures that are capped."""
    return (
        f"{shown:,} (spread evenly) of {total:,}" if shown < total else f"All {total:,}"
    )


def _network(run: Run) -> str:
    """Such as "network paper, 0.25 of its width"."""
    model = run.config["model"]
    width = "" if model["width"] == 1 else f", {model['width']:g} of its width"
    return f"network {model['variant']}{width}"


def _headline(run: Run) -> Markup:
    """The numbers that are asked for first."""
    last, evaluations = run.last, run.evaluations
    classes = len(run.names)
    count = sum(row.parameters for row in run.layers)
    cells: list[tuple[Any, Any]] = []
    if evaluations:
        found = evaluations[-1]
        views = {"eval/": "centre view"}
        if "eval/views_loss" in found:
            views["eval/views_"] = f"{run.config['eval_views']} views"
        for prefix, where in views.items():
            where = f"of {found['eval/count']:,.0f} held-out pictures, {where}"
            cells.append(
                (_percent(found[f"{prefix}top1_error"]), f"top-1 error {where}")
            )
            if shows_top5(classes):
                error = _percent(found[f"{prefix}top5_error"])
                cells.append((error, "top-5 error of the same"))
    top5 = f", top-5 {_percent(1 - 5 / classes, 1)}" if shows_top5(classes) else ""
    cells += [
        (_percent(1 - 1 / classes, 1), f"error of guessing: {classes:,} classes{top5}"),
        (f"{count / 1e6:.1f} M", f"parameters ({count:,})")
        if count >= 1e6
        else (f"{count:,}", "parameters"),
    ]
    if last is not None:
        pictures = run.training_pictures
        of = f" of {pictures:,} training pictures" if pictures else ""
        cells += [
            (f"{last['epoch']:.4g}", f"of {run.config['num_epochs']:g} epochs{of}"),
            (
                f"{last['step']:,}",
                f"steps of {run.config['data']['batch_size']} images",
            ),
        ]
    parts = [page.tiles(cells)]
    if not evaluations:
        why = f"{METRICS_FILE} holds no evaluation yet"
        if not run.config["data"]["eval_split"]:
            why = "data.eval_split is empty"
        parts.append(_missing("Held-out errors", Missing(why)))
    return page.joined(*parts)


def _about(run: Run) -> Markup:
    """The lines under the title: where, on what, when."""
    when = time.strftime("%Y-%m-%d %H:%M %Z")
    metrics = run.workdir / METRICS_FILE
    written = ""
    if metrics.exists():
        day = time.strftime("%Y-%m-%d", time.localtime(metrics.stat().st_mtime))
        written = f" {METRICS_FILE} was last written on {day}."
    data = run.config["data"]
    on = page.joined("On ", page.code(str(data["source"])))
    return page.paragraph(
        on,
        f", {data['crop_size']} × {data['crop_size']} pixels, run in ",
        page.code(str(run.workdir)),
        f". Report of {when}.{written}",
        kind="soft",
    )


def _curves(run: Run) -> Markup:
    classes = len(run.names)
    shown = [
        ("loss", "Loss over the epochs, in training and held out."),
        ("top1_error", "Top-1 error over the epochs, in training and held out."),
        ("lr", "Learning rate over the epochs."),
        ("images_per_sec", "Images a second over the epochs."),
    ]
    if not any("train/loss" in record for record in run.records):
        missing = Missing(f"{METRICS_FILE} holds no record of training")
        return page.section("Training", _missing("Training curves", missing))
    figures = [
        page.drawing(
            training_curves(run.records, quantities=[name], num_classes=classes), alt
        )
        for name, alt in shown
    ]
    every = run.config["log_every_steps"]
    return page.section(
        "Training",
        page.side_by_side(*figures),
        page.paragraph(
            f"Training values are means over {every} steps, of augmented pictures and, "
            "where there is dropout, with it: held-out errors can be lower. The dotted "
            "lines are what guessing gives.",
            kind="soft",
        ),
    )


def _mistakes(run: Run, held_out: HeldOut | Missing) -> Markup:
    title = "Errors by class"
    if isinstance(held_out, Missing):
        return page.section(title, _missing("Errors by class", held_out))
    predictions = held_out.predictions
    found, overall = class_errors(predictions), errors(predictions)
    chosen = found if len(found) <= _ALL_CLASSES else found[:_WORST]
    largest = max(max(c.top1_error for c in chosen), 1e-9)
    which = "" if len(chosen) == len(found) else f", the {len(chosen)} worst"
    top5 = shows_top5(len(run.names))
    header = ["class", "", "top-1", *(["top-5"] if top5 else []), "pictures"]
    rows = [
        (
            words(c.name),
            page.bar(c.top1_error / largest),
            _percent(c.top1_error, 1),
            *([_percent(c.top5_error, 1)] if top5 else []),
            f"{c.count:,}",
        )
        for c in chosen
    ]
    pairs = [
        (words(c.label), words(c.predicted), f"{c.count:,}", _percent(c.share, 1))
        for c in worst_confusions(predictions, _WORST)
    ]
    seen = _of(len(predictions.labels), held_out.total)
    by_class = page.joined(
        page.heading(f"Error of each class{which}"),
        page.table(header, rows, columns="lb" + "r" * (len(header) - 2)),
    )
    confusions = (
        page.table(
            ["class", "taken for", "times", "of its pictures"], pairs, columns="llrr"
        )
        if pairs
        else page.paragraph("No picture is classified wrongly.")
    )
    return page.section(
        title,
        page.paragraph(
            f"{seen} held-out pictures, centre view, by the checkpoint of step "
            f"{run.step:,}: top-1 error {_percent(overall['top1_error'])}"
            + (f", top-5 {_percent(overall['top5_error'])}." if top5 else ".")
        ),
        page.side_by_side(
            by_class,
            page.joined(page.heading("Most frequent confusions"), confusions),
        ),
    )


def _filters(run: Run) -> Markup:
    kernel, columns = first_kernel(run)
    side, count = kernel.shape[0], kernel.shape[-1]
    found = filter_statistics(kernel)
    each = f", in {columns} columns of {count // columns}" if columns > 1 else ""
    oriented = np.mean(found.coherence > 0.5)
    return page.section(
        "First-layer filters",
        page.paragraph(
            f"{count} kernels of {side} × {side} × 3{each}, each stretched to the whole "
            f"range. Half of them have more than {np.median(found.colour):.0%} of their "
            f"energy in colour; {oriented:.0%} answer to one orientation (coherence "
            "above a half)."
        ),
        page.picture(
            first_layer_filters(kernel, columns=columns),
            f"The {count} kernels of the first layer as small pictures{each}.",
            wide=True,
        ),
        page.drawing(
            filter_statistics_by_column(kernel, columns=columns),
            "Left: each kernel's share of colour and coherence of orientation. Right: "
            "how many kernels answer to each orientation.",
            "A kernel is a dot on the left. On the right those with an orientation: 0° "
            "answers to horizontal edges, 90° to vertical ones.",
            wide=True,
        ),
    )


def _predictions(run: Run, held_out: HeldOut | Missing) -> Markup:
    title = "Predictions"
    if isinstance(held_out, Missing):
        return page.section(title, _missing("Predictions", held_out))
    chosen, wrong = held_out.examples(_EXAMPLES)
    size = held_out.pictures.image_size
    pictures = np.empty((len(chosen), size, size, 3), np.uint8)
    labels = np.empty(len(chosen), np.int32)
    held_out.pictures.fetch(np.array(chosen), pictures, labels)
    names = [words(name) for name in run.names]
    chances = np.exp(held_out.predictions.centre[chosen].astype(np.float64))
    figures = []
    for i in range(len(chosen)):
        best = int(np.argmax(chances[i]))
        said = f"taken for {names[best]} ({chances[i, best]:.0%})"
        figures.append(
            page.picture(
                best_labels(
                    pictures[i : i + 1], chances[i : i + 1], names, labels=[labels[i]]
                ),
                f"A picture of {names[labels[i]]}, {said}.",
            )
        )
    mistakes = {
        0: "No picture is classified wrongly; these are spread evenly",
        1: "The first is the mistake that the network was surest of",
    }.get(wrong, f"The first {wrong} are the mistakes that the network was surest of")
    others = "; the others are right, spread evenly" if 0 < wrong < len(chosen) else ""
    return page.section(
        title,
        page.paragraph(
            f"{mistakes}{others}. The correct label stands "
            "above; its bar is red, and bars are probabilities."
        ),
        page.side_by_side(*figures, small=True),
    )


def _neighbours(run: Run, alike: Alike | Missing) -> Markup:
    title = "Nearest neighbours"
    if isinstance(alike, Missing):
        return page.section(title, _missing("Nearest neighbours", alike))
    count = len(alike.pictures)
    present = np.unique(alike.labels)  # a picture each of some of the classes
    most = min(_SHOWN_QUERIES, len(present))
    chosen = present[np.arange(most) * len(present) // most]
    shown = np.array([np.argmax(alike.labels == label) for label in chosen])
    titles = [words(run.names[label]) for label in alike.labels[shown]]
    figure = retrieve.draw(
        alike.index,
        alike.indexed,
        alike.pictures[shown],
        alike.rows[shown],
        query_titles=titles,
    )
    searched = _of(alike.indexed.num_examples, alike.total)
    neighbours = alike.rows.shape[1]
    return page.section(
        title,
        page.paragraph(
            f"Held-out pictures, and the training pictures nearest to them: by Euclidean "
            f"distance of the features in {alike.index.layer}, the last layer before the "
            f"classifier, and by that of the pixels. {searched} training pictures were "
            f"searched. Of the {neighbours} nearest to each of {count} held-out pictures "
            f"{_percent(alike.same_class, 1)} are of its class by features, "
            f"{_percent(alike.same_class_pixels, 1)} by pixels."
        ),
        page.picture(
            figure,
            f"{len(shown)} held-out pictures, a row each, with their {neighbours} "
            "nearest training pictures by features and by pixels.",
            wide=True,
        ),
    )


def _time(run: Run) -> Markup:
    spent = time_spent(run)
    title = "Where the time went"
    if not spent.parts:
        missing = Missing(f"neither {TIMES_FILE} nor {METRICS_FILE} has any")
        return page.section(title, _missing("Times", missing))
    whole = spent.total or sum(part.seconds for part in spent.parts)
    rows = [
        (
            part.what,
            page.bar(part.seconds / whole),
            _duration(part.seconds),
            _percent(part.seconds / whole, 1),
        )
        for part in spent.parts
    ]
    if spent.total is not None:
        starts = len(run.times)
        head = f"{_duration(spent.total)} in {starts} start{'s' * (starts > 1)}"
    else:
        head = f"{_duration(whole)} of training steps"
    if spent.images_per_sec is not None:
        head += f"; {spent.images_per_sec:,.0f} images a second in training"
    parts = [page.paragraph(head, ".")]
    if spent.total is None:
        parts.append(
            _missing(
                "Compiling, evaluations and checkpoints",
                Missing(f"there is no {TIMES_FILE}; the shares are of training alone"),
            )
        )
    elif spent.unrecorded_steps:
        missing = Missing(
            f"{spent.unrecorded_steps:,} steps are of starts that were killed, or of "
            f"before there was a {TIMES_FILE}"
        )
        parts.append(_missing("Not in the table", missing))
    parts.append(page.table(["", "", "time", "share"], rows, columns="lbrr"))
    return page.section(title, *parts)


def _configuration(run: Run, changed: list[Difference] | None) -> Markup:
    fields = [(page.code(k), _value(v)) for k, v in flat(run.config).items()]
    if changed is None:
        first = _missing(
            "What differs from the defaults",
            Missing("configs/common.py is not installed here"),
        )
    else:
        rows = [
            (page.code(d.field), _value(d.value), _value(d.default)) for d in changed
        ]
        first = page.joined(
            page.paragraph("What differs from configs/common.py:"),
            page.table(["field", "here", "default"], rows, columns="lll"),
        )
    everything = page.table(["field", "value"], fields, columns="ll")
    return page.section(
        "Configuration", first, page.details(f"All {len(fields)} fields", everything)
    )


def _value(value: Any) -> Markup | str:
    """None is what stands in the table of layers."""
    if value is None:
        return "as in the network's table"
    if isinstance(value, list):
        value = tuple(value)
    return page.code(repr(value) if value == "" else str(value))


def _layers(run: Run) -> Markup:
    rows = [
        (
            row.name,
            " × ".join(str(n) for n in row.shape),
            f"{row.parameters:,}" if row.parameters else "",
            f"{row.multiply_adds:,}" if row.multiply_adds else "",
        )
        for row in run.layers
    ]
    rows.append(
        (
            "total",
            "",
            f"{sum(row.parameters for row in run.layers):,}",
            f"{sum(row.multiply_adds for row in run.layers):,}",
        )
    )
    header = ["layer", "output", "parameters", "multiply-adds an image"]
    return page.details(
        "The network's layers", page.table(header, rows, columns="llrr")
    )


def _commands(run: Run, python: str, has_configs: bool) -> Markup:
    workdir = shlex.quote(str(run.workdir))
    predict = f"{python} -m alexnet_jax.predict \\\n    --workdir={workdir} PICTURE ..."
    alike = (
        f"{python} -m alexnet_jax.retrieve \\\n    --workdir={workdir} "
        f"--index=FILE.npz \\\n    --layer={run.layers[-2].name} PICTURE ..."
    )
    parts = [page.heading("What is in other pictures"), page.block(predict)]
    parts += [page.heading("Training pictures like them"), page.block(alike)]
    if has_configs:
        words = [
            f"{python} -m alexnet_jax.main",
            f"--workdir={workdir}",
            *_devices(run),
        ]
        config = shlex.quote(str(run.workdir / CONFIG_FILE))
        test, train = (
            " \\\n    ".join([*words, last])
            for last in ("--mode=eval", f"--config={config}")
        )
        if run.config["data"]["eval_split"]:
            parts += [page.heading("Test it again"), page.block(test)]
        cut = run.config["max_steps"] >= 0
        parts += [
            page.heading("Go on"),
            page.block(train),
            page.paragraph(
                "Where it had come to its end with a larger ",
                page.code(f"--config.{'max_steps' if cut else 'num_epochs'}"),
                ". Or the command that it was trained with.",
            ),
        ]
    versions = machine_records.versions()
    here = ", ".join(f"{name} {version}" for name, version in versions.items())
    then = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    parts += [
        page.heading("Versions"),
        page.paragraph(
            f"The checkpoint of step {run.step:,} was written with "
            f"{then or 'versions that it does not say'}. This page was made with {here}."
        ),
    ]
    return page.section("Commands and versions", *parts)


def _devices(run: Run) -> list[str]:
    """The flag for the virtual devices that this run's config asks for."""
    parallel = run.config["parallel"]
    devices = max(1, parallel["data"]) * max(1, parallel["column"])
    if devices > 1 and jax.default_backend() == "cpu":
        return [f"--cpu_devices={devices}"]
    return []
