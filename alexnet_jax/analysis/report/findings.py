"""Collect the data that report.html shows: no HTML, no figures.

`Missing` stands for data that cannot be shown, for example of images that were moved. The
rest of the report is collected all the same.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from alexnet_jax.analysis.features import Extractor, fetch
from alexnet_jax.analysis.retrieval import Index, index_of, nearest, shrink
from alexnet_jax.data import DataError, match_classes
from alexnet_jax.data.sources import Sample, Source
from alexnet_jax.models.summary import LayerSummary, summary
from alexnet_jax.training import timing
from alexnet_jax.training.checkpoint import Checkpointer
from alexnet_jax.training.config import as_json, flat, get_config
from alexnet_jax.training.evaluate import Predictions
from alexnet_jax.training.timing import TIMES_FILE, Times, read_times
from alexnet_jax.training.workdir import CHECKPOINTS, read_class_names, read_config, require_run
from alexnet_jax.training.writers import METRICS_FILE, read_metrics

# Held-out images that are classified. Of a larger split, an even sample is taken.
MOST_HELD_OUT = 10_000
# Training images that are searched for neighbours.
MOST_INDEXED = 2_000
# Held-out images whose neighbours are counted, and neighbours per image.
QUERIES, NEIGHBOURS = 100, 5


@dataclass(frozen=True)
class Missing:
    """Data that cannot be shown, and the reason as text."""

    reason: str


@dataclass(frozen=True)
class Run:
    """A trained network and the records in its workdir.

    Attributes:
      config: the content of `config.json`.
      step: the checkpoint that the report shows: the best, or else the newest.
      versions: the packages that wrote the checkpoint, if it stores them.
      layers: the rows of `summary.summary`.
      names: the class of each logit.
      logits_of: the network as a function from raw images to logits.
    """

    workdir: Path
    config: dict[str, Any]
    records: list[dict[str, Any]]
    times: list[Times]
    step: int
    versions: dict[str, str]
    layers: list[LayerSummary]
    names: list[str]
    logits_of: Extractor

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The records of evaluations."""
        return [record for record in self.records if "eval/loss" in record]

    @property
    def training_images(self) -> int | None:
        """The size of the training split, computed from a record's step and epoch."""
        if not self.records or self.records[-1]["epoch"] <= 0:
            return None
        last = self.records[-1]
        return round(last["step"] * self.config["data"]["batch_size"] / last["epoch"])

    @property
    def first_kernel(self) -> np.ndarray:
        """The kernels of the first layer, float [H, W, 3, K]."""
        name = self.logits_of.model.network.layers[0].name
        return np.asarray(self.logits_of.variables["params"][name]["kernel"])

    @property
    def columns(self) -> int:
        """The number of columns of the network."""
        return self.logits_of.model.network.columns


def read_run(workdir: Path) -> Run:
    """Return the run in a workdir.

    Raises:
      FileNotFoundError, CheckpointError: as `load.load`.
    """
    require_run(workdir)
    logits_of = Extractor(workdir, "logits")
    checkpoints = workdir.absolute() / CHECKPOINTS
    with Checkpointer(checkpoints, read_only=True) as saved:
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
        names=logits_of.class_names,
        logits_of=logits_of,
    )


@dataclass(frozen=True)
class HeldOut:
    """Predictions for `images`, out of `total` held-out ones, centre view."""

    images: Source
    predictions: Predictions
    total: int

    def examples(self, count: int) -> tuple[list[int], int]:
        """Return indices of example images, the mistakes first, and their number.

        At most half are mistakes, the surest first. The others are evenly spread over
        the correctly classified images.
        """
        logs, labels = self.predictions.centre, self.predictions.labels
        predicted = np.argmax(logs, axis=1)
        wrong = np.flatnonzero(predicted != labels)
        surest = np.argsort(-logs[wrong, predicted[wrong]], kind="stable")
        wrong = wrong[surest][: count // 2]
        right = np.flatnonzero(predicted == labels)
        more = min(count - len(wrong), len(right))
        right = right[np.arange(more) * len(right) // max(more, 1)]
        return [*wrong.tolist(), *right.tolist()], len(wrong)


@dataclass(frozen=True)
class Alike:
    """Held-out images and the training images nearest to them.

    Attributes:
      indexed: the training images that were searched, out of `total`.
      images: uint8 [Q, S, S, 3], the held-out ones.
      labels: int32 [Q], their classes.
      rows: int [Q, N], their neighbours in the index by features.
      same_class, same_class_pixels: shares of neighbours that have the query's class, by
        features and by pixels, in [0, 1].
    """

    index: Index
    indexed: Source
    total: int
    images: np.ndarray
    labels: np.ndarray
    rows: np.ndarray
    same_class: float
    same_class_pixels: float


def look_at_held_out(run: Run) -> HeldOut | Missing:
    """Classify the held-out images, at most `MOST_HELD_OUT` of them."""
    split = run.config["data"]["eval_split"]
    if not split:
        return Missing("this run has no held-out pictures (data.eval_split is empty)")
    try:
        source = _open(run, split)
        images = Sample(source, MOST_HELD_OUT)
        found = run.logits_of.over(images, "held-out pictures")
        logits = np.concatenate([logits for _, logits in found])
    except (DataError, OSError) as error:
        return Missing(str(error))
    predictions = Predictions(
        centre=np.asarray(jax.nn.log_softmax(logits)),
        views=None,
        num_views=1,
        labels=images.labels_of(np.arange(images.num_examples)),
        class_names=tuple(run.names),
        split=images.description,
    )
    return HeldOut(images, predictions, source.num_examples)


def look_for_alike(run: Run, held_out: HeldOut | Missing) -> Alike | Missing:
    """Find the training images nearest to `QUERIES` of the held-out ones.

    The features are those of the last layer before the classifier.
    """
    if isinstance(held_out, Missing):
        return held_out
    layer, data = run.layers[-2].name, run.config["data"]
    features_of, split = run.logits_of.of(layer), data["train_split"]
    try:
        source = _open(run, split)
        indexed = Sample(source, MOST_INDEXED)
        index = index_of(features_of, layer, indexed, source=str(data["source"]), split=split)
        queries = Sample(held_out.images, QUERIES)
        images, labels = fetch(queries, np.arange(queries.num_examples))
    except (DataError, OSError) as error:
        return Missing(str(error))
    _, rows = nearest(index.features, features_of(images), NEIGHBOURS)
    _, by_pixels = nearest(index.pixels, shrink(images), NEIGHBOURS)
    return Alike(
        index=index,
        indexed=indexed,
        total=source.num_examples,
        images=images,
        labels=labels,
        rows=rows,
        same_class=float(np.mean(index.labels[rows] == labels[:, None])),
        same_class_pixels=float(np.mean(index.labels[by_pixels] == labels[:, None])),
    )


def _open(run: Run, split: str) -> Source:
    """Open a split of the run's own data, with the labels that it was trained on.

    Raises:
      DataError: as `match_classes` and `open_source`.
    """
    source = run.logits_of.open(split)
    known = read_class_names(run.workdir)
    return source if known is None else match_classes(source, known)


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
    batch, before = run.config["data"]["batch_size"], 0
    seconds = waited = images = 0.0
    for record in run.records:
        if rate := record.get("images_per_sec"):
            done = (record["step"] - before) * batch
            before, images = record["step"], images + done
            seconds += done / rate
            waited += done / rate * record.get("data_wait_frac", 0.0)
    rate = images / seconds if seconds else None
    if not run.times:
        parts = {timing.TRAINING: seconds - waited, timing.WAITING: waited}
        return TimeSpent(None, parts if seconds else {}, rate, before)
    sums: dict[str, float] = {}
    for start in run.times:
        for name, value in start.seconds.items():
            sums[name] = sums.get(name, 0.0) + value
    total = sums.pop("total")
    parts = {name: value for name, value in sums.items() if value > 0}
    parts["starting and the rest"] = max(0.0, total - sum(sums.values()))
    parts = dict(sorted(parts.items(), key=lambda part: -part[1]))
    covered = end = 0  # starts may overlap: a resumed run repeats steps
    for first, last in sorted((s.first_step, s.last_step) for s in run.times):
        covered += max(0, last - max(first, end))
        end = max(end, last)
    return TimeSpent(total, parts, rate, max(before, end) - covered)


def differences(config: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return (field, value, default) of the fields that differ from the defaults."""
    own, defaults = flat(config), flat(as_json(get_config()))
    return [
        (name, own[name], default)
        for name, default in defaults.items()
        if name in own and own[name] != default
    ]
