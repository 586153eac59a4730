"""What a run holds, for its report: facts from its files, and a look at pictures.

Nothing is drawn here. What is not there any more, such as data that were moved, is a
`Missing` with the reason in words, and the rest is found all the same.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from alexnet_jax import config_files, experiment, retrieve, timing
from alexnet_jax.analysis.retrieval import Index, nearest, shrink
from alexnet_jax.checkpoint import Checkpointer
from alexnet_jax.data import DataError, match_classes
from alexnet_jax.data.sources import Sample, Source
from alexnet_jax.evaluate import Predictions
from alexnet_jax.model import LayerSummary, summary
from alexnet_jax.pictures import Extractor
from alexnet_jax.timing import TIMES_FILE, Times, read_times
from alexnet_jax.writers import METRICS_FILE, read_metrics

# Held-out pictures that are looked at; of more, a sample of so many.
MOST_HELD_OUT = 10_000
# Training pictures whose features are compared.
MOST_INDEXED = 2_000
# Held-out pictures whose neighbours are counted, and how many neighbours.
QUERIES, NEIGHBOURS = 100, 5


@dataclass(frozen=True)
class Missing:
    """What cannot be shown, and why, in words."""

    reason: str


@dataclass(frozen=True)
class Run:
    """A trained network and what its workdir says about it.

    Attributes:
      config: of `config.json`.
      step: of the checkpoint that is looked at: the best, or the newest.
      versions: of the packages that it was written with, as far as it says.
      layers: of `model.summary`.
      names: of the classes, one a unit of the classifier.
      logits_of: the network, as a function from pictures.
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
    def last(self) -> dict[str, Any] | None:
        """The newest record; None if there are none."""
        return self.records[-1] if self.records else None

    @property
    def training_pictures(self) -> int | None:
        """How many there are, as the records tell: steps and epochs."""
        if self.last is None or self.last["epoch"] <= 0:
            return None
        images = self.last["step"] * self.config["data"]["batch_size"]
        return round(images / self.last["epoch"])


def read_run(workdir: Path) -> Run:
    """Reads a run.

    Raises:
      FileNotFoundError, CheckpointError: as `experiment.load`.
    """
    experiment.require_run(workdir)
    logits_of = Extractor(workdir, "logits")
    with Checkpointer(
        workdir.absolute() / experiment.CHECKPOINTS, read_only=True
    ) as saved:
        step = saved.find("best")
        assert step is not None  # else there was nothing to load
        found = saved.metadata(step)
    config = experiment.read_config(workdir)
    assert config is not None
    layers = summary(logits_of.model, config["data"]["crop_size"])
    metrics = workdir / METRICS_FILE
    return Run(
        workdir=workdir,
        config=config,
        records=read_metrics(metrics) if metrics.exists() else [],
        times=read_times(workdir / TIMES_FILE),
        step=step,
        versions=found.get("versions", {}),
        layers=layers,
        names=logits_of.class_names,
        logits_of=logits_of,
    )


def first_kernel(run: Run) -> tuple[np.ndarray, int]:
    """The first layer's kernels, and in how many columns they are."""
    network = run.logits_of.model.network
    params = run.logits_of.variables["params"]
    return np.asarray(params[network.layers[0].name]["kernel"]), network.columns


# A look at pictures.


@dataclass(frozen=True)
class HeldOut:
    """What the network says about held-out pictures, on the centre view.

    Attributes:
      pictures: those that were looked at; `total` of them there are.
    """

    pictures: Source
    predictions: Predictions
    total: int

    def examples(self, count: int) -> tuple[list[int], int]:
        """Some of the pictures, and how many of them are wrong; those come first.

        At most half are wrong ones, the surest mistakes first; the right ones are
        evenly spread.
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
    """Held-out pictures and the training pictures nearest to them.

    Attributes:
      indexed: the training pictures that were searched; `total` of them there are.
      pictures: uint8 [Q, S, S, 3], the held-out ones.
      labels: int32 [Q], theirs.
      rows: [Q, N], their neighbours in the index by features.
      same_class, same_class_pixels: shares of neighbours of the query's class, by
        features and by pixels, in [0, 1].
    """

    index: Index
    indexed: Source
    total: int
    pictures: np.ndarray
    labels: np.ndarray
    rows: np.ndarray
    same_class: float
    same_class_pixels: float


def look_at_held_out(run: Run) -> HeldOut | Missing:
    """Classifies the held-out pictures, at most `MOST_HELD_OUT` of them."""
    split = run.config["data"]["eval_split"]
    if not split:
        return Missing("this run has no held-out pictures (data.eval_split is empty)")

    def look() -> HeldOut:
        source = _open(run, split)
        pictures = Sample(source, MOST_HELD_OUT)
        found = run.logits_of.over(pictures, "held-out pictures")
        logits = np.concatenate([logits for _, logits in found])
        count = pictures.num_examples
        predictions = Predictions(
            centre=np.asarray(jax.nn.log_softmax(logits)),
            views=None,
            num_views=1,
            labels=pictures.labels_of(np.arange(count)),
            class_names=tuple(run.names),
            split=pictures.description,
        )
        return HeldOut(pictures, predictions, source.num_examples)

    return _or_missing(look)


def look_for_alike(run: Run, held_out: HeldOut | Missing) -> Alike | Missing:
    """Finds the training pictures that are most like some of the held-out ones.

    By the features of the last layer before the classifier.
    """
    if isinstance(held_out, Missing):
        return held_out
    layer = run.layers[-2].name

    def look() -> Alike:
        split = run.config["data"]["train_split"]
        source = _open(run, split)
        indexed, features_of = Sample(source, MOST_INDEXED), run.logits_of.of(layer)
        kind = str(run.config["data"]["source"])
        index = retrieve.index_of(features_of, layer, indexed, source=kind, split=split)
        chosen = Sample(held_out.pictures, QUERIES)
        places, size = np.arange(chosen.num_examples), chosen.image_size
        labels = np.empty(len(places), np.int32)
        pictures = np.empty((len(places), size, size, 3), np.uint8)
        chosen.fetch(places, pictures, labels)
        _, rows = nearest(index.features, features_of(pictures), NEIGHBOURS)
        _, by_pixels = nearest(index.pixels, shrink(pictures), NEIGHBOURS)
        same, same_pixels = (
            float(np.mean(index.labels[found] == labels[:, None]))
            for found in (rows, by_pixels)
        )
        return Alike(
            index=index,
            indexed=indexed,
            total=source.num_examples,
            pictures=pictures,
            labels=labels,
            rows=rows,
            same_class=same,
            same_class_pixels=same_pixels,
        )

    return _or_missing(look)


def _open(run: Run, split: str) -> Source:
    """A split of the run's own data, with the labels that it was trained on.

    Raises:
      DataError: as `match_classes` and `open_source`.
    """
    source = run.logits_of.open(split)
    known = experiment.read_class_names(run.workdir)
    return source if known is None else match_classes(source, known)


def _or_missing(look: Callable[[], Any]) -> Any:
    """What `look` finds; why not, if the data are not there or cannot be read."""
    try:
        return look()
    except (DataError, OSError) as error:
        return Missing(str(error))


# Where the time went.


class Part(NamedTuple):
    """Seconds spent on something."""

    what: str
    seconds: float


@dataclass(frozen=True)
class TimeSpent:
    """Of all starts of a run together.

    Attributes:
      total: seconds; None: not known.
      parts: they do not overlap; with a total its rest is among them.
      images_per_sec: in training, waiting for data included; None: no record.
      unrecorded_steps: steps of starts that were killed, or of before there was a
        record; their time is in `images_per_sec` only.
    """

    total: float | None
    parts: list[Part]
    images_per_sec: float | None
    unrecorded_steps: int


def time_spent(run: Run) -> TimeSpent:
    """Adds up `times.jsonl`; without it what the training records tell."""
    batch, before = run.config["data"]["batch_size"], 0
    seconds = waited = images = 0.0
    for record in run.records:
        rate = record.get("images_per_sec")
        if rate:
            done = (record["step"] - before) * batch
            before, images = record["step"], images + done
            seconds += done / rate
            waited += done / rate * record.get("data_wait_frac", 0.0)
    rate = images / seconds if seconds else None
    if not run.times:
        parts = [
            Part(timing.TRAINING, seconds - waited),
            Part(timing.WAITING, waited),
        ]
        return TimeSpent(None, parts if seconds else [], rate, before)
    sums: dict[str, float] = {}
    for start in run.times:
        for what, value in start.seconds.items():
            sums[what] = sums.get(what, 0.0) + value
    total = sums.pop("total")
    parts = [Part(what, value) for what, value in sums.items() if value > 0]
    parts.append(Part("starting and the rest", max(0.0, total - sum(sums.values()))))
    parts.sort(key=lambda part: -part.seconds)
    covered = end = 0  # steps of some start, those that two of them did once
    for first, last in sorted((s.first_step, s.last_step) for s in run.times):
        covered += max(0, last - max(first, end))
        end = max(end, last)
    return TimeSpent(total, parts, rate, max(before, end) - covered)


# The configuration.


class Difference(NamedTuple):
    """A field that is not as in configs/common.py."""

    field: str
    value: Any
    default: Any


def differences(config: dict[str, Any]) -> list[Difference] | None:
    """What differs from configs/common.py; None where that is not installed."""
    if not config_files.COMMON.exists():
        return None
    common = config_files.load_config(str(config_files.COMMON))
    defaults = experiment.flat(experiment.as_json(common))
    own = experiment.flat(config)
    return [
        Difference(name, own[name], default)
        for name, default in defaults.items()
        if name in own and own[name] != default
    ]
