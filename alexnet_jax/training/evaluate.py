"""Evaluate one network, or the average of several (table 2), on a split.

Training sums the errors batch by batch (`evaluate`). `--mode=eval` keeps the predictions
on every image (`evaluate_runs`): it averages probabilities over views (section 4.1) and
over networks, and prints errors, worst classes and confusions.
"""

import collections
import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alexnet_jax.data.imagenet import words
from alexnet_jax.data.sources import place_of_split
from alexnet_jax.data.statistics import Statistics
from alexnet_jax.models.weights import Weights
from alexnet_jax.system.cli import expanded, require_writable_file
from alexnet_jax.system.files import atomic_write, read_npz
from alexnet_jax.training import finetune, load, metrics
from alexnet_jax.training.banner import say_place
from alexnet_jax.training.checkpoint import (
    Checkpointer,
    CheckpointError,
    has_checkpoint,
    split_step,
)
from alexnet_jax.training.config import Config, ConfigError
from alexnet_jax.training.experiment import Experiment, build_for_evaluation
from alexnet_jax.training.resume import compare
from alexnet_jax.training.workdir import CHECKPOINTS, about_mean, read_statistics
from alexnet_jax.training.writers import METRICS_FILE, read_metrics

WORST = 10  # number of classes, and of confusions, that are printed


class PredictionsError(ValueError):
    """A file without predictions, or predictions that cannot be averaged."""


def evaluate(
    eval_step: Callable[[Any], dict[str, jax.Array]],
    batches: Iterable[Any],
    *,
    expected_count: int,
) -> dict[str, float]:
    """Return loss and errors from sums over padded and masked batches.

    Args:
      eval_step: batch -> the sums of `make_eval_step`.
      batches: device batches, the last one padded.
      expected_count: number of examples of the split.

    Returns:
      {"loss", "top1_error", "top5_error", "count"}: mean loss in nats, errors in
      [0, 1], number of examples. With several views also "views_loss",
      "views_top1_error" and "views_top5_error".

    Raises:
      RuntimeError: if another number of examples was counted.
    """
    totals: Any = collections.Counter()
    for sums in _fetched(eval_step, batches):
        totals.update({name: float(value) for name, value in sums.items()})
    count = round(totals["count"])  # exact, in float64
    if count != expected_count:
        raise RuntimeError(
            f"The evaluation counted {count} examples; the split has {expected_count}."
        )
    found: dict[str, float] = {}
    for views in ("", "views_"):
        if f"{views}count" in totals:
            found[f"{views}loss"] = totals[f"{views}loss"] / count
            found[f"{views}top1_error"] = 1.0 - totals[f"{views}top1"] / count
            found[f"{views}top5_error"] = 1.0 - totals[f"{views}top5"] / count
    return found | {"count": count}


def _fetched(
    step: Callable[[Any], dict[str, jax.Array]], batches: Iterable[Any]
) -> Iterator[dict[str, np.ndarray]]:
    """Yield the step's result for each batch, on the host."""
    before = None
    for batch in batches:
        result = step(batch)
        if before is not None:  # a batch computes while the next one is prepared
            yield jax.device_get(before)
        before = result
    if before is not None:
        yield jax.device_get(before)


# Predictions and their errors.


@dataclass(frozen=True)
class Predictions:
    """Probabilities by a network, or by an average of several, for every image.

    Attributes:
      centre: float [N, K], natural logarithms of the probabilities for the centre view,
        in the order of the split.
      views: the same for the mean over `num_views` views; None if `num_views` is 1.
      labels: int [N].
      class_names: K names, by label.
      split: description of the split.
    """

    centre: np.ndarray
    views: np.ndarray | None
    num_views: int
    labels: np.ndarray
    class_names: tuple[str, ...]
    split: str

    @property
    def best(self) -> np.ndarray:
        """The mean over several views if there is one, else the centre view."""
        return self.centre if self.views is None else self.views

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an .npz atomically, for `load_predictions` and NumPy."""
        with atomic_write(path) as file:
            np.savez(file, **{k: v for k, v in vars(self).items() if v is not None})


def load_predictions(path: str | os.PathLike[str]) -> Predictions:
    """Read a file of `Predictions.save`; never through pickle.

    Raises:
      PredictionsError: if there is no such file, or it holds something else.
    """
    names = [field.name for field in dataclasses.fields(Predictions)]
    found: dict[str, Any] = read_npz(path, names, PredictionsError)
    if missing := [name for name in names if name not in {*found, "views"}]:
        raise PredictionsError(
            f"{path} holds no predictions: it has no {', '.join(missing)}. They are "
            "saved by --mode=eval --predictions=FILE.npz."
        )
    return Predictions(
        centre=found["centre"],
        views=found.get("views"),
        num_views=int(found["num_views"]),
        labels=found["labels"].astype(np.int64),
        class_names=tuple(found["class_names"].tolist()),
        split=str(found["split"]),
    )


def predict(experiment: Experiment, variables: dict[str, Any]) -> Predictions:
    """Return the predictions of a network on its experiment's evaluation split."""
    source, views = experiment.eval_source, experiment.config.eval_views
    assert source is not None
    if source.left_out:
        _say(f"WARNING: {source.left_out}")
    step, statistics = experiment.predict_step(views), experiment.pixel_statistics()
    params, batch_stats = variables["params"], variables["batch_stats"]
    with experiment.eval_batches() as batches:
        found = list(
            _fetched(
                lambda batch: step(params, batch_stats, batch, statistics),
                (experiment.put(batch) for batch in batches),
            )
        )
    count = source.num_examples
    logs = {  # without padding
        name: np.concatenate([part[name] for part in found])[:count]
        for name in found[0]
    }
    return Predictions(
        centre=logs["centre"],
        views=logs.get("views"),
        num_views=views,
        labels=source.labels_of(np.arange(count)),
        class_names=source.class_names,
        split=source.description,
    )


def average(members: Sequence[Predictions]) -> Predictions:
    """Return the mean probabilities of several networks on the same images.

    Several views are averaged only if all members have the same number of them.

    Raises:
      PredictionsError: if labels or class names differ between the members.
    """

    def log_mean(logs: list[np.ndarray]) -> np.ndarray:
        with np.errstate(invalid="ignore"):  # NaN stays NaN
            return np.logaddexp.reduce(logs, axis=0) - math.log(len(logs))

    first = members[0]
    for other in members[1:]:
        same_classes = other.class_names == first.class_names
        if not same_classes or not np.array_equal(other.labels, first.labels):
            raise PredictionsError(
                f"Predictions on {other.split} cannot be averaged with those on "
                f"{first.split}: their {'labels' if same_classes else 'class names'} "
                "differ. Give members that were tested on the same split."
            )
    centre, views = log_mean([member.centre for member in members]), None
    if first.num_views > 1 and len({member.num_views for member in members}) == 1:
        views = log_mean([member.best for member in members])
    num_views = 1 if views is None else first.num_views
    return dataclasses.replace(first, centre=centre, views=views, num_views=num_views)


def errors(predictions: Predictions) -> dict[str, float]:
    """Return the metrics of `evaluate` for predictions."""
    labels = predictions.labels
    found: dict[str, float] = {}
    for prefix, logs in (("", predictions.centre), ("views_", predictions.views)):
        if logs is not None:
            own = np.take_along_axis(logs, labels[:, None], axis=1)
            found[f"{prefix}loss"] = -float(np.mean(own, dtype=np.float64))
            for k in (1, 5):
                right = np.mean(_in_top_k(logs, labels, k))
                found[f"{prefix}top{k}_error"] = 1.0 - float(right)
    return found | {"count": len(labels)}


def _in_top_k(logs: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    return np.asarray(metrics.in_top_k(jnp.asarray(logs), jnp.asarray(labels), k))


class ClassErrors(NamedTuple):
    """Errors in [0, 1] over the `count` images of one class."""

    name: str
    count: int
    top1_error: float
    top5_error: float


def class_errors(predictions: Predictions) -> list[ClassErrors]:
    """Return the errors of `best` for each class with images, the worst first."""
    labels, names = predictions.labels, predictions.class_names
    counts = np.bincount(labels, minlength=len(names))
    top1, top5 = (
        np.bincount(labels, ~_in_top_k(predictions.best, labels, k), len(names))
        for k in (1, 5)
    )
    found = [
        ClassErrors(name, int(count), float(one / count), float(five / count))
        for name, count, one, five in zip(names, counts, top1, top5, strict=True)
        if count
    ]
    return sorted(found, key=lambda c: (-c.top1_error, -c.top5_error))


class Confusion(NamedTuple):
    """Number of images of class `label` taken for `predicted`, and their share of it."""

    label: str
    predicted: str
    count: int
    share: float


def worst_confusions(predictions: Predictions, most: int = WORST) -> list[Confusion]:
    """Return the most frequent mistakes of `best`, ties by label."""
    labels, units = predictions.labels, predictions.best.shape[1]
    predicted = np.argmax(predictions.best, axis=1)
    wrong = predicted != labels
    pairs, counts = np.unique(
        np.stack([labels[wrong], predicted[wrong]]), axis=1, return_counts=True
    )
    sizes = np.bincount(labels)
    order = np.argsort(-counts, kind="stable")[:most]
    # A network may have more units than the data has classes.
    names = list(predictions.class_names)
    names += [f"class {k}" for k in range(len(names), units)]
    return [
        Confusion(names[a], names[b], int(n), float(n / sizes[a]))
        for (a, b), n in zip(pairs.T[order], counts[order], strict=True)
    ]


# Evaluation from the command line: load, average, print.


@dataclass(frozen=True)
class Member:
    """A network to evaluate: a checkpoint in a workdir, weights, or saved predictions.

    `step` is that of `Checkpointer.find`.
    """

    path: Path
    step: int | str = "best"

    @property
    def is_predictions(self) -> bool:
        return self.path.suffix == ".npz" and not self.path.is_dir()

    @property
    def is_run(self) -> bool:
        return not self.is_predictions and not load.is_weights_file(self.path)

    @classmethod
    def parse(cls, text: str) -> "Member":
        """Parse DIR, DIR@STEP, DIR@best, DIR@latest, FILE.safetensors ... or FILE.npz.

        Raises:
          CheckpointError: if the text is empty, or another word follows the "@".
        """
        if not text:
            raise CheckpointError(
                "--workdir has a comma with nothing before or behind it; several are "
                "given as DIR,DIR@STEP,FILE.npz."
            )
        folder, step = split_step(text)
        return cls(expanded(folder), step)


def evaluate_runs(
    config: Config,
    members: Sequence[Member],
    *,
    save_to: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Evaluate networks on the evaluation split, average several, print the results.

    Args:
      config: names the data, the views and the devices. A single workdir must hold the
        config's network; several, and weights, keep their own.
      members: at least one.
      save_to: an .npz for the predictions, averaged over the members.

    Returns:
      The record that is printed as the last line, as JSON with null for NaN: {"step",
      "eval/loss", "eval/top1_error", ...} as in metrics.jsonl. "best_of" is the number
      of evaluations on this very split that chose the checkpoint, None if unknown. With
      several members the record is the ensemble's, and "members" lists theirs.

    Raises:
      CheckpointError: if there is no such checkpoint.
      PredictionsError: if a file holds no predictions, or those of other images.
      PathError: (an OSError) if `save_to` cannot be written.
      ConfigError, DataError: as `train_and_evaluate`.
    """
    if not config.data.eval_split:
        raise ConfigError("--config.data.eval_split is empty: nothing to evaluate on.")
    if save_to is not None:
        save_to = expanded(save_to)
        if save_to.suffix != ".npz":
            raise ConfigError(f"--predictions={save_to} must be a file FILE.npz.")
        if jax.process_index() == 0:  # which writes it
            require_writable_file(save_to)
    for member in members:  # all of them, before the first is computed
        folder = member.path / CHECKPOINTS
        if member.is_run and not has_checkpoint(folder):
            raise CheckpointError(
                f"There is no checkpoint in {folder}; train first (--mode=train), or "
                "give the --workdir of a run."
            )

    found, records = [], []
    for member in members:
        about: dict[str, Any] = {}
        if member.is_predictions:
            predictions = load_predictions(member.path)
        else:
            own = config
            if len(members) > 1 or not member.is_run:
                own = load.with_network_of(config, member.path)
            experiment, variables, about = _load_network(own, member)
            predictions = predict(experiment, variables)
        found.append(predictions)
        records.append(about | _metrics(predictions))
        if len(members) > 1:
            records[-1] = {"name": str(member.path)} | records[-1]
            _say(f"{member.path}: {_in_words(records[-1], predictions)}")

    together = average(found)
    record = records[0]
    if len(members) > 1:
        record = _metrics(together) | {"members": records}
    if save_to is not None and jax.process_index() == 0:
        together.save(save_to)
        _say(f"predictions saved: {save_to}")

    who = f"{len(members)} networks averaged: " if len(members) > 1 else ""
    _say(f"{who}{_in_words(record, together)} of {together.split}")
    _say("\n".join(describe_mistakes(together)))
    # NaN and Infinity are not JSON.
    finite = json.loads(json.dumps(record), parse_constant=lambda name: None)
    _say(json.dumps(finite))
    return record


def _load_network(
    config: Config, member: Member
) -> tuple[Experiment, dict[str, Any], dict[str, Any]]:
    """Read a checkpoint or a file of weights onto the config's mesh.

    Returns:
      (experiment, variables, {"step", "best_of"} of a checkpoint as in `evaluate_runs`).
    """
    if member.is_run:
        weights, about, chosen = _read_checkpoint(config, member)
    else:
        weights, about, chosen = load.read_network(member.path), {}, ""
        config.model.num_classes = 0  # that of the data, which is compared below
        _say(f"mean image: {member.path}, of the weights")
    side = config.data.image_size
    mean = np.broadcast_to(np.asarray(weights.mean), (side, side, 3))
    experiment = build_for_evaluation(
        config,
        class_names=weights.class_names,
        statistics=Statistics(mean, np.zeros(3), np.eye(3), num_examples=1),
        log=_say,
    )
    source, known = experiment.eval_source, weights.settings["num_classes"]
    assert source is not None
    if known != experiment.model.network.layers[-1].features:
        raise ConfigError(
            f"{member.path} knows {known} classes; {source.description} has "
            f"{source.num_classes}. Give the data that it was trained on."
        )
    target = experiment.abstract_state()
    trees = {"params": target.params, "batch_stats": target.batch_stats}
    variables = {
        part: finetune.over(tree, weights.variables.get(part, {}))
        for part, tree in trees.items()
    }
    if chosen:
        say_place(experiment)
        _say(chosen)
    return experiment, variables, about


def _read_checkpoint(
    config: Config, member: Member
) -> tuple[Weights, dict[str, Any], str]:
    """Read the chosen checkpoint of a run; print how its config differs.

    Returns:
      (its network, {"step", "best_of"} as in `evaluate_runs`, a line about it).
    """
    workdir = member.path.absolute()
    with Checkpointer(workdir / CHECKPOINTS, read_only=True) as saved:
        step = saved.find(member.step)
        weights = load.read_network(workdir, step=step)
        assert step is not None  # else there was no checkpoint to read
        is_best = member.step == "best" and saved.top1_error(step) is not None
        # Not config.json, which may be that of a later start.
        trained_with = saved.metadata(step)["config"]
    differences = compare(config, trained_with, workdir)
    statistics = read_statistics(workdir)
    _say(about_mean(workdir, statistics, trained_with))
    if differences:
        _say("\n".join([f"{member.path}: {differences[0]}", *differences[1:]]))

    about: dict[str, Any] = {"step": step}
    line = f"checkpoint of step {step} ({member.path / CHECKPOINTS / str(step)})"
    here, there = (
        place_of_split(data["source"], data["eval_split"], data.get("dir", ""))
        for data in (config.data, trained_with["data"])
    )
    if is_best and here == there:
        try:
            kept = read_metrics(workdir / METRICS_FILE)
            count = len({r["step"] for r in kept if "eval/top1_error" in r})
        except (OSError, ValueError):
            count = None  # the records are lost
        if count != 1:
            about["best_of"] = count
            line += (
                f", chosen as the best of {count or 'its'} evaluations on this split, so "
                "its error is a little optimistic"
            )
    return weights, about, line


def describe_mistakes(predictions: Predictions) -> list[str]:
    """Return lines with the worst classes and the most frequent confusions."""
    worst = [c for c in class_errors(predictions)[:WORST] if c.top1_error > 0]
    if not worst:
        return ["no picture is classified wrongly"]
    confusions = worst_confusions(predictions)
    shown = [c.name for c in worst] + [name for c in confusions for name in c[:2]]
    width = max(len(words(name)) for name in shown)
    lines = [f"classes with the highest error ({_num_views(predictions.num_views)}):"]
    for name, count, top1, top5 in worst:
        rates = f"top-1 {100 * top1:5.1f}%"
        if metrics.shows_top5(len(predictions.class_names)):
            rates += f"  top-5 {100 * top5:5.1f}%"
        lines.append(f"  {words(name):<{width}}  {rates}  of {count} pictures")
    lines.append("most frequent confusions:")
    for label, predicted, count, share in confusions:
        pair = f"{words(label):<{width}}  taken for {words(predicted):<{width}}"
        times = "once" if count == 1 else f"{count} times"
        lines.append(f"  {pair}  {times}, {100 * share:.1f}% of its pictures")
    return lines


def _metrics(predictions: Predictions) -> dict[str, Any]:
    return {f"eval/{name}": value for name, value in errors(predictions).items()}


def _in_words(record: dict[str, Any], predictions: Predictions) -> str:
    """Return "step 10: top-1 error 40.66%, top-5 error 18.21% (10 views); ..."."""
    ks = (1, 5) if metrics.shows_top5(len(predictions.class_names)) else (1,)
    parts = []
    for prefix, count in (("eval/views_", predictions.num_views), ("eval/", 1)):
        if f"{prefix}loss" in record:
            rates = (
                f"top-{k} error {100 * record[f'{prefix}top{k}_error']:.2f}%"
                for k in ks
            )
            parts.append(f"{', '.join(rates)} ({_num_views(count)})")
    step = f"step {record['step']}: " if "step" in record else ""
    return f"{step}{'; '.join(parts)}; {record['eval/count']} pictures"


def _num_views(count: int) -> str:
    return "centre view" if count == 1 else f"{count} views"


def _say(line: str) -> None:
    if jax.process_index() == 0:
        print(line, flush=True)
