"""Evaluate trained networks, alone or averaged (table 2): `--mode=eval`.

Probabilities are averaged over views (section 4.1) and over networks.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from alexnet_jax.data.imagenet import words
from alexnet_jax.data.statistics import load as load_statistics
from alexnet_jax.models.weights import Weights
from alexnet_jax.system.cli import expanded, require_writable_file
from alexnet_jax.training import finetune, load, metrics
from alexnet_jax.training.banner import say_place
from alexnet_jax.training.checkpoint import Checkpointer, CheckpointError, all_steps, split_step
from alexnet_jax.training.config import Config, ConfigError
from alexnet_jax.training.evaluate import (
    Predictions,
    average,
    class_errors,
    errors,
    load_predictions,
    predict,
    worst_confusions,
)
from alexnet_jax.training.experiment import build_for_evaluation
from alexnet_jax.training.resume import compare
from alexnet_jax.training.workdir import (
    CHECKPOINTS,
    CONFIG_FILE,
    STATISTICS_FILE,
    about_mean,
    require_run,
)
from alexnet_jax.training.writers import METRICS_FILE, read_metrics

WORST = 10  # number of classes, and of confusions, that are printed


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


def parse_members(text: str) -> list[Member]:
    """Parse "DIR,DIR@STEP,DIR@latest,FILE.safetensors,FILE.npz".

    Raises:
      CheckpointError: a name is empty, or another word follows an "@".
    """
    names = text.split(",")
    if "" in names:
        raise CheckpointError(
            f"--workdir={text} has a comma with nothing before or behind it; several are given "
            "as DIR,DIR@STEP,FILE.npz."
        )
    return [Member(expanded(folder), step) for folder, step in map(split_step, names)]


def config_file(members: Sequence[Member]) -> str:
    """Return the config.json of the first run.

    Raises:
      ConfigError: there is no run.
      FileNotFoundError: its workdir has no config.json.
    """
    for member in members:
        if member.is_run:
            require_run(member.path)
            return str(member.path / CONFIG_FILE)
    raise ConfigError(
        "--config=FILE is missing. Weights and predictions do not say which images to test on: "
        "give a config that does."
    )


def evaluate_runs(
    config: Config, members: Sequence[Member], *, save_to: str | os.PathLike[str] | None = None
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
      of evaluations in training that chose the checkpoint. With several members the
      record is the ensemble's, and "members" lists theirs.

    Raises:
      CheckpointError: there is no such checkpoint.
      PredictionsError: a file holds no predictions, or those of other images.
      ConfigError, DataError, OSError: as `train_and_evaluate`.
    """
    if not config.data.eval_split:
        raise ConfigError(
            "--config.data.eval_split is empty: nothing to evaluate on. Name a split, for example "
            "test."
        )
    is_first = jax.process_index() == 0
    if save_to is not None:
        save_to = expanded(save_to)
        if save_to.suffix != ".npz":
            raise ConfigError(f"--predictions={save_to} must be a file FILE.npz.")
        if is_first:
            require_writable_file(save_to)
    for member in members:  # all of them, before the first is computed
        folder = member.path / CHECKPOINTS
        if member.is_run and not all_steps(folder):
            raise CheckpointError(
                f"There is no checkpoint in {folder}; train first (--mode=train), or "
                "give the --workdir of a run."
            )

    found, records = [], []
    for member in members:
        about: dict[str, Any] = {}
        if member.is_predictions:
            predictions = load_predictions(member.path)
        elif member.is_run and len(members) == 1:
            predictions, about = _predict(config, member)
        else:
            predictions, about = _predict(load.with_network_of(config, member.path), member)
        record = about | _metrics(predictions)
        if len(members) > 1:
            record = {"name": str(member.path)} | record
            _say(f"{member.path}: {_in_words(record, predictions)}")
        found.append(predictions)
        records.append(record)

    together, record, who = average(found), records[0], ""
    if len(members) > 1:
        record = _metrics(together) | {"members": records}
        who = f"{len(members)} networks averaged: "
    if save_to is not None and is_first:
        together.save(save_to)
        _say(f"predictions saved: {save_to}")
    _say(f"{who}{_in_words(record, together)} of {together.split}")
    _say("\n".join(describe_mistakes(together)))
    # NaN and Infinity are not JSON.
    finite = json.loads(json.dumps(record), parse_constant=lambda name: None)
    _say(json.dumps(finite))
    return record


def _predict(config: Config, member: Member) -> tuple[Predictions, dict[str, Any]]:
    """Return the predictions of a run or of weights; {"step", "best_of"} of a run's checkpoint."""
    if member.is_run:
        weights, about = _read_checkpoint(config, member)
    else:
        weights, about = load.read_network(member.path), {}
        config.model.num_classes = 0  # that of the data, which is compared below
        _say(f"mean image: {member.path}, of the weights")
    experiment = build_for_evaluation(
        config, class_names=weights.class_names, mean=weights.mean, log=_say
    )
    source, known = experiment.train_source, weights.settings["num_classes"]
    if known != experiment.model.network.layers[-1].features:
        raise ConfigError(
            f"{member.path} knows {known} classes; {source.description} has "
            f"{source.num_classes}. Give the data that it was trained on."
        )
    say_place(experiment)
    return predict(experiment, finetune.put_variables(experiment, weights.variables)), about


def _read_checkpoint(config: Config, member: Member) -> tuple[Weights, dict[str, Any]]:
    """Read a checkpoint of a run; print which one, and how its config differs."""
    workdir = member.path.absolute()
    with Checkpointer(workdir / CHECKPOINTS, read_only=True) as saved:
        step = saved.find(member.step)
        weights = load.read_network(workdir, step=step)
        assert step is not None  # else there was no checkpoint to read
        is_best = member.step == "best" and saved.top1_error(step) is not None
        # Not config.json, which may be that of a later start.
        trained_with = saved.metadata(step)["config"]
    differences = compare(config, trained_with, workdir)
    statistics = load_statistics(workdir / STATISTICS_FILE)
    _say(about_mean(workdir, statistics, trained_with))
    if differences:
        _say("\n".join([f"{member.path}: {differences[0]}", *differences[1:]]))
    about: dict[str, Any] = {"step": step}
    line = f"checkpoint of step {step} ({member.path / CHECKPOINTS / str(step)})"
    path = workdir / METRICS_FILE
    records = read_metrics(path) if path.exists() else []
    evaluated = {record["step"] for record in records if "eval/top1_error" in record}
    if is_best and len(evaluated) > 1:
        about["best_of"] = len(evaluated)
        line += f", chosen as the best of {len(evaluated)} evaluations in training, so its error "
        line += "on the same images is a little optimistic"
    _say(line)
    return weights, about


def describe_mistakes(predictions: Predictions) -> list[str]:
    """Return lines with the worst classes and the most frequent confusions."""
    worst = [c for c in class_errors(predictions)[:WORST] if c.top1_error > 0]
    if not worst:
        return ["no image is classified wrongly"]
    confusions = worst_confusions(predictions, WORST)
    shown = [c.name for c in worst] + [name for c in confusions for name in c[:2]]
    width = max(len(words(name)) for name in shown)
    lines = [f"classes with the highest error ({_num_views(predictions.num_views)}):"]
    for name, count, top1, top5 in worst:
        rates = f"top-1 {100 * top1:5.1f}%"
        if metrics.shows_top5(len(predictions.class_names)):
            rates += f"  top-5 {100 * top5:5.1f}%"
        lines.append(f"  {words(name):<{width}}  {rates}  of {count} images")
    lines.append("most frequent confusions:")
    for label, predicted, count, share in confusions:
        pair = f"{words(label):<{width}}  taken for {words(predicted):<{width}}"
        times = "once" if count == 1 else f"{count} times"
        lines.append(f"  {pair}  {times}, {100 * share:.1f}% of its images")
    return lines


def _metrics(predictions: Predictions) -> dict[str, Any]:
    return {f"eval/{name}": value for name, value in errors(predictions).items()}


def _in_words(record: dict[str, Any], predictions: Predictions) -> str:
    """Return "step 10: top-1 error 40.66%, top-5 error 18.21% (10 views); ..."."""
    ks = (1, 5) if metrics.shows_top5(len(predictions.class_names)) else (1,)
    parts = []
    for prefix, count in (("eval/views_", predictions.num_views), ("eval/", 1)):
        if f"{prefix}loss" in record:
            rates = (f"top-{k} error {100 * record[f'{prefix}top{k}_error']:.2f}%" for k in ks)
            parts.append(f"{', '.join(rates)} ({_num_views(count)})")
    step = f"step {record['step']}: " if "step" in record else ""
    return f"{step}{'; '.join(parts)}; {record['eval/count']} images"


def _num_views(count: int) -> str:
    return "centre view" if count == 1 else f"{count} views"


def _say(line: str) -> None:
    if jax.process_index() == 0:
        print(line, flush=True)
