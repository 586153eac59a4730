"""Collect the data that report.html shows: no HTML, no figures."""

import collections
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from alexnet_jax.analysis.features import Extractor
from alexnet_jax.data import DataError, match_classes
from alexnet_jax.data.sources import Sample, Source
from alexnet_jax.models.summary import LayerSummary, summary
from alexnet_jax.training.checkpoint import Checkpointer
from alexnet_jax.training.evaluate import Predictions
from alexnet_jax.training.timing import TIMES_FILE, TRAINING, WAITING, Times, read_times
from alexnet_jax.training.workdir import CHECKPOINTS, read_class_names, read_config
from alexnet_jax.training.writers import METRICS_FILE, read_metrics

# Held-out images that are classified: an even sample of a larger split.
MOST_HELD_OUT = 10_000


@dataclass(frozen=True)
class Run:
    """A trained network and the records in its workdir.

    Attributes:
      config: the content of `config.json`.
      step: the checkpoint that the report shows: the best, or else the newest.
      versions: the packages that wrote the checkpoint, if it stores them.
      layers: the rows of `summary.summary`.
      logits_of: the network as a function from raw images to logits.
      names: the class of each logit.
    """

    workdir: Path
    config: dict[str, Any]
    records: list[dict[str, Any]]
    times: list[Times]
    step: int
    versions: dict[str, str]
    layers: list[LayerSummary]
    logits_of: Extractor
    names: list[str]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The records of evaluations."""
        return [record for record in self.records if "eval/loss" in record]

    @property
    def first_kernel(self) -> np.ndarray:
        """The kernels of the first layer, float [H, W, 3, K]."""
        name = self.logits_of.model.network.layers[0].name
        return np.asarray(self.logits_of.variables["params"][name]["kernel"])

    def open(self, split: str) -> Source:
        """Open a split of the run's own data, with the labels that it was trained on.

        Raises:
          DataError, FileNotFoundError: as `match_classes` and `open_source`.
        """
        source = self.logits_of.open(self.config["data"]["source"], split)
        known = read_class_names(self.workdir)
        return source if known is None else match_classes(source, known)


def read_run(workdir: Path) -> Run:
    """Return the run in a workdir.

    Raises:
      FileNotFoundError, CheckpointError: as `load.load`.
    """
    logits_of = Extractor(workdir, "logits")
    with Checkpointer(workdir.absolute() / CHECKPOINTS, read_only=True) as saved:
        step = saved.find("best")
        assert step is not None  # else Extractor has raised
        versions = saved.metadata(step).get("versions", {})
    config = read_config(workdir)
    assert config is not None
    metrics = workdir / METRICS_FILE
    return Run(
        workdir=workdir,
        config=config,
        records=read_metrics(metrics) if metrics.exists() else [],
        times=read_times(workdir / TIMES_FILE),
        step=step,
        versions=versions,
        layers=summary(logits_of.model, config["data"]["crop_size"]),
        logits_of=logits_of,
        names=logits_of.class_names,
    )


@dataclass(frozen=True)
class HeldOut:
    """Predictions for `images`, out of `total` held-out ones, centre view."""

    images: Source
    predictions: Predictions
    total: int


def classify_held_out(run: Run) -> HeldOut:
    """Classify the held-out images, at most `MOST_HELD_OUT` of them.

    Raises:
      DataError, OSError: there are none, or they cannot be read.
    """
    split = run.config["data"]["eval_split"]
    if not split:
        raise DataError(
            "this run has no held-out images: data.eval_split is empty. Train with "
            "--config.data.eval_split=test to have some"
        )
    source = run.open(split)
    images = Sample(source, MOST_HELD_OUT)
    found = run.logits_of.over(images, "held-out images")
    logits = np.concatenate([logits for _, logits in found])
    predictions = Predictions(
        centre=np.asarray(jax.nn.log_softmax(logits)),
        views=None,
        num_views=1,
        labels=images.labels_of(np.arange(images.num_examples)),
        class_names=tuple(run.names),
        split=images.description,
    )
    return HeldOut(images, predictions, source.num_examples)


def examples(predictions: Predictions, count: int) -> tuple[list[int], int]:
    """Return indices of example images, the mistakes first, and the number of mistakes.

    At most half are mistakes, the surest first. The others are evenly spread over the
    correctly classified images.
    """
    logs = predictions.centre
    predicted = np.argmax(logs, axis=1)
    is_wrong = predicted != predictions.labels
    wrong, right = np.flatnonzero(is_wrong), np.flatnonzero(~is_wrong)
    surest = np.argsort(-logs[wrong, predicted[wrong]], kind="stable")
    wrong = wrong[surest][: count // 2]
    more = min(count - len(wrong), len(right))
    right = right[np.arange(more) * len(right) // max(more, 1)]
    return [*wrong.tolist(), *right.tolist()], len(wrong)


@dataclass(frozen=True)
class TimeSpent:
    """The time of all starts of a run together.

    Attributes:
      total: seconds; None without a `times.jsonl`.
      parts: name -> seconds, the longest first. Their sum is `total`, if that is known.
      images_per_sec: in training, waiting for data included; None without records.
      unrecorded_steps: of starts without a line in `times.jsonl`, for example killed
        ones. Their time is in `images_per_sec` only.
    """

    total: float | None
    parts: dict[str, float]
    images_per_sec: float | None
    unrecorded_steps: int


def time_spent(run: Run) -> TimeSpent:
    """Add up `times.jsonl`, or without it the times in the training records."""
    batch, steps = run.config["data"]["batch_size"], 0
    seconds = waited = 0.0
    for record in run.records:
        if rate := record.get("images_per_sec"):
            spent = (record["step"] - steps) * batch / rate
            steps = record["step"]
            seconds += spent
            waited += spent * record.get("data_wait_frac", 0.0)
    images_per_sec = steps * batch / seconds if seconds else None
    if not run.times:
        parts = {TRAINING: seconds - waited, WAITING: waited} if seconds else {}
        return TimeSpent(None, parts, images_per_sec, steps)
    sums: Any = collections.Counter()
    for start in run.times:
        sums.update(start.seconds)
    total = sums.pop("total")
    sums["starting and the rest"] = max(0.0, total - sum(sums.values()))
    parts = {name: value for name, value in sums.most_common() if value > 0}
    recorded = {k for start in run.times for k in range(start.first_step, start.last_step)}
    return TimeSpent(total, parts, images_per_sec, len({*range(steps)} - recorded))
