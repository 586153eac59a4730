"""The test protocol on trained runs: one network, or several averaged (paper, table 2).

Views and the averaging of their probabilities are those of section 4.1.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from alexnet_jax import banner, finetune, loading, resume
from alexnet_jax import experiment as experiment_lib
from alexnet_jax.checkpoint import (
    Checkpointer,
    CheckpointError,
    has_checkpoint,
    split_step,
)
from alexnet_jax.config import Config, ConfigError
from alexnet_jax.data.imagenet import words
from alexnet_jax.data.paths import expanded, require_writable_file
from alexnet_jax.data.sources import place_of_split
from alexnet_jax.data.statistics import Statistics
from alexnet_jax.evaluate import (
    Predictions,
    PredictionsError,
    average,
    class_errors,
    errors,
    load_predictions,
    predict,
    worst_confusions,
)
from alexnet_jax.experiment import Experiment
from alexnet_jax.metrics import shows_top5
from alexnet_jax.writers import METRICS_FILE, read_metrics

# Classes and confusions that are shown.
WORST = 10


@dataclass(frozen=True)
class Member:
    """A network to be tested: a checkpoint, weights, or predictions that it once made.

    Attributes:
      path: the workdir of a run, a file of weights, or an .npz.
      step: which checkpoint; "best" (without evaluations the newest), or "latest".
    """

    path: Path
    step: int | str = "best"

    @property
    def is_predictions(self) -> bool:
        return self.path.suffix == ".npz" and not self.path.is_dir()

    @property
    def is_weights(self) -> bool:
        return not self.is_predictions and loading.is_weights_file(self.path)

    @classmethod
    def parse(cls, text: str) -> "Member":
        """DIR, DIR@STEP, DIR@best, DIR@latest, FILE.safetensors ... or FILE.npz.

        Raises:
          CheckpointError: for nothing, or another word after the "@".
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
    """Tests networks on the evaluation split, and several together as an ensemble.

    Prints how the config differs from those that the runs were trained with, which
    checkpoints are tested, errors, the worst classes and confusions, and as the last line
    the record that it returns, NaN and infinities as null.

    Args:
      config: says which data, how many views and which devices. Of one workdir also the
        network, which has to be its own; of several, and of weights, each keeps its own.
      members: at least one.
      save_to: an .npz for the predictions, averaged over the members.

    Returns:
      {"step", "eval/loss", "eval/top1_error", ...} as in metrics.jsonl; of several the
      ensemble's, without "step", and under "members" each one's own with its "name". And
      "best_of", the number of evaluations on this very split, if the checkpoint was
      chosen by them; None if it is not known.

    Raises:
      CheckpointError: when there is no such checkpoint.
      PredictionsError: for a file without predictions, or of other pictures; or
        `save_to` is there and holds something else.
      PathError: (an OSError) `save_to` cannot be written.
      ConfigError, DataError: as `train.train_and_evaluate`.
    """
    if not config.data.eval_split:
        raise ConfigError("--config.data.eval_split is empty: nothing to evaluate on.")
    save_to = None if save_to is None else _place_of_predictions(expanded(save_to))
    for member in members:  # all of them, before the first is computed
        if not member.is_predictions and not member.is_weights:
            _require_checkpoint(member)
    found, records = [], []
    for member in members:
        about = {}
        if member.is_predictions:
            predictions = load_predictions(member.path)
        elif member.is_weights:
            predictions = _predictions(*_from_weights(config, member.path))
        else:
            own = config if len(members) == 1 else _of_its_own(config, member.path)
            about, experiment, variables = _from_run(own, member)
            predictions = _predictions(experiment, variables)
        found.append(predictions)
        records.append({"name": str(member.path)} | about | _metrics(predictions))
        if len(members) > 1:
            _say(f"{member.path}: {_in_words(records[-1], predictions)}")
    together = average(found)
    record: dict[str, Any] = records[0] | {}
    del record["name"]
    if len(members) > 1:
        record = _metrics(together) | {"members": records}
    if save_to is not None and jax.process_index() == 0:
        together.save(save_to)
        _say(f"predictions saved: {save_to}")
    who = f"{len(members)} networks averaged: " if len(members) > 1 else ""
    _say(f"{who}{_in_words(record, together)} of {together.split}")
    for line in describe_mistakes(together):
        _say(line)
    _say(_as_json(record))
    return record


def _as_json(record: dict[str, Any]) -> str:
    """A line that every JSON parser reads: no NaN or Infinity, as in metrics.jsonl."""
    finite = json.loads(json.dumps(record), parse_constant=lambda name: None)
    return json.dumps(finite)


def _place_of_predictions(path: Path) -> Path:
    """The file, if predictions can be written there, and over nothing else."""
    if path.suffix != ".npz":
        raise ConfigError(f"--predictions={path} must be a file FILE.npz.")
    if jax.process_index() == 0:  # which writes it
        require_writable_file(path)
        if path.exists():
            try:
                load_predictions(path)
            except PredictionsError as error:
                raise PredictionsError(
                    f"--predictions={path} is there, and is not replaced: {error} Name "
                    "another file."
                ) from error
    return path


def describe_mistakes(predictions: Predictions, most: int = WORST) -> list[str]:
    """The classes with the highest error and the most frequent confusions, in lines."""
    worst = [c for c in class_errors(predictions)[:most] if c.top1_error > 0]
    confusions = worst_confusions(predictions, most)
    if not worst:
        return ["no picture is classified wrongly"]
    names = {name: words(name) for name in predictions.class_names}
    shown = [c.name for c in worst] + [n for c in confusions for n in c[:2]]
    width = max(len(names[name]) for name in shown)
    where = _views_in_words(predictions.num_views)
    lines = [f"classes with the highest error ({where}):"]
    for name, count, top1, top5 in worst:
        rates = f"top-1 {100 * top1:5.1f}%"
        if shows_top5(len(names)):
            rates += f"  top-5 {100 * top5:5.1f}%"
        lines.append(f"  {names[name]:<{width}}  {rates}  of {count} pictures")
    lines.append("most frequent confusions:")
    for label, predicted, count, share in confusions:
        pair = f"{names[label]:<{width}}  taken for {names[predicted]:<{width}}"
        times = "once" if count == 1 else f"{count} times"
        lines.append(f"  {pair}  {times}, {100 * share:.1f}% of its pictures")
    return lines


def _require_checkpoint(member: Member) -> None:
    if not has_checkpoint(member.path / loading.CHECKPOINTS):
        raise CheckpointError(
            f"There is no checkpoint in {member.path / loading.CHECKPOINTS}; "
            "train first (--mode=train), or give the --workdir of a run."
        )


def _of_its_own(config: Config, workdir: Path) -> Config:
    """The config with the network that the workdir was trained with."""
    if loading.read_config(workdir) is None:
        raise CheckpointError(
            f"{workdir} has no {loading.CONFIG_FILE} that says which network it "
            "holds; test it by itself, with its --config."
        )
    return loading.with_network_of(config, workdir)


def _from_run(
    config: Config, member: Member
) -> tuple[dict[str, Any], Experiment, dict[str, Any]]:
    """Restore a checkpoint for a test.

    Returns:
      ({"step"}, and "best_of" as in the record of `evaluate_runs`; the experiment that
      the network is tested in; its variables).
    """
    workdir = member.path.absolute()
    if (stored := loading.read_config(workdir)) is not None:
        resume.compare(config, stored, workdir)  # another network is refused
    statistics = loading.read_statistics(workdir, config.data.image_size)
    _say(loading.about_mean(workdir, statistics, stored or {}))
    experiment = experiment_lib.build_for_evaluation(
        config,
        class_names=loading.read_class_names(workdir),
        statistics=statistics,
        log=_say,
    )
    banner.say_place(experiment)
    with Checkpointer(workdir / loading.CHECKPOINTS, read_only=True) as saved:
        step = saved.find(member.step)
        is_best = member.step == "best" and saved.best_step() is not None
        variables, trained_with = _restore(experiment, saved, step)
    assert step is not None  # else there was no checkpoint to restore
    # The checkpoint's own: config.json may be lost, or of a start since then.
    differences = resume.compare(config, trained_with, workdir)
    if differences:
        _say("\n".join([f"{member.path}: {differences[0]}", *differences[1:]]))
    about: dict[str, Any] = {"step": step}
    chosen = ""
    same_split = _place(config.data) == _place(trained_with["data"])
    if is_best and same_split and (count := _count_evaluations(workdir)) != 1:
        about["best_of"] = count
        chosen = (
            f", chosen as the best of {count or 'its'} evaluations on this split, so its "
            "error is a little optimistic"
        )
    path = member.path / loading.CHECKPOINTS / str(step)
    _say(f"checkpoint of step {step} ({path}){chosen}")
    return about, experiment, variables


def _place(data: Any) -> Any:
    return place_of_split(data["source"], data["eval_split"], data.get("dir", ""))


def _count_evaluations(workdir: Path) -> int | None:
    """How many evaluations a run has recorded; None if its records are lost."""
    try:
        records = read_metrics(workdir / METRICS_FILE)
    except (OSError, ValueError):
        return None
    return len({r["step"] for r in records if "eval/top1_error" in r})


def _from_weights(config: Config, path: Path) -> tuple[Experiment, dict[str, Any]]:
    """What a file's network is tested in, and its variables.

    Raises:
      ConfigError: if its classes are not those of the data.
    """
    weights = loading.read_network(path)
    own = loading.with_network_of(config, path)
    own.model.num_classes = 0  # the data's, which are compared below
    side = own.data.image_size
    mean = np.broadcast_to(np.asarray(weights.mean), (side, side, 3))
    experiment = experiment_lib.build_for_evaluation(
        own,
        class_names=weights.class_names,
        statistics=Statistics(mean, np.zeros(3), np.eye(3), num_examples=1),
        log=_say,
    )
    source = experiment.eval_source
    assert source is not None
    if weights.settings["num_classes"] != source.num_classes:
        raise ConfigError(
            f"{path} knows {weights.settings['num_classes']} classes ("
            f"{_some_names(weights.class_names)}); {source.description} has "
            f"{source.num_classes} ({_some_names(source.class_names)}). Give the data "
            "that it was trained on."
        )
    target = experiment.abstract_state()
    variables = {
        part: finetune.over(tree, weights.variables.get(part, {}))
        for part, tree in (
            ("params", target.params),
            ("batch_stats", target.batch_stats),
        )
    }
    _say(f"mean image: {path}, of the weights")
    return experiment, variables


def _some_names(names: Sequence[str] | None) -> str:
    return "it does not say which" if names is None else f"{', '.join(names[:3])} ..."


def _predictions(experiment: Experiment, variables: dict[str, Any]) -> Predictions:
    """What a network says about the evaluation split."""
    num_views = experiment.config.eval_views
    predict_step = experiment.predict_step(num_views)
    statistics = experiment.pixel_statistics()
    batch_stats = variables.get("batch_stats", {})
    source = experiment.eval_source
    assert source is not None
    if source.left_out:
        _say(f"WARNING: {source.left_out}")
    with experiment.eval_batches() as batches:
        logs = predict(
            lambda batch: predict_step(
                variables["params"], batch_stats, batch, statistics
            ),
            (experiment.put(batch) for batch in batches),
            expected_count=source.num_examples,
        )
    return Predictions(
        centre=logs["centre"],
        views=logs.get("views"),
        num_views=num_views,
        labels=source.labels_of(np.arange(source.num_examples)),
        class_names=source.class_names,
        split=source.description,
    )


def _restore(
    experiment: Experiment, saved: Checkpointer, step: int | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A checkpoint's variables, and the config that it was trained with."""
    target = experiment.abstract_state()
    variables, metadata = saved.restore_params(
        step=step,
        abstract={"params": target.params, "batch_stats": target.batch_stats},
    )
    return variables, metadata["config"]


def _metrics(predictions: Predictions) -> dict[str, Any]:
    return {f"eval/{name}": value for name, value in errors(predictions).items()}


def _views_in_words(count: int) -> str:
    return "centre view" if count == 1 else f"{count} views"


def _in_words(record: dict[str, Any], predictions: Predictions) -> str:
    """Such as "step 10: top-1 error 40.66%, top-5 error 18.21% (10 views); ..."."""
    parts = []
    ks = (1, 5) if shows_top5(len(predictions.class_names)) else (1,)
    for prefix, count in (("eval/views_", predictions.num_views), ("eval/", 1)):
        if f"{prefix}loss" in record:
            rates = (
                f"top-{k} error {100 * record[f'{prefix}top{k}_error']:.2f}%"
                for k in ks
            )
            parts.append(f"{', '.join(rates)} ({_views_in_words(count)})")
    step = f"step {record['step']}: " if "step" in record else ""
    return f"{step}{'; '.join(parts)}; {record['eval/count']} pictures"


def _say(line: str) -> None:
    if jax.process_index() == 0:
        print(line, flush=True)
