"""Errors of a network on a split.

Training sums them batch by batch (`evaluate`). `predict` keeps the probabilities for
every image, so that `ensemble` and the report can average them over networks and name
the worst classes.
"""

import collections
import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alexnet_jax.system.files import atomic_write, read_npz
from alexnet_jax.training import metrics
from alexnet_jax.training.experiment import Experiment
from alexnet_jax.training.steps import make_predict_step

# Sums over a stream of batches, in training.


def evaluate(
    eval_step: Callable[[Any], dict[str, jax.Array]], batches: Iterable[Any], *, expected_count: int
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
      RuntimeError: another number of examples was counted.
    """
    totals: Any = collections.Counter()
    for sums in _fetched(eval_step, batches):
        totals.update({name: float(value) for name, value in sums.items()})
    count = round(totals["count"])  # exact, in float64
    if count != expected_count:
        raise RuntimeError(
            f"The evaluation counted {count} examples; the split has {expected_count}. Pass each "
            "example of the split once, and mask the padding of the last batch."
        )
    found: dict[str, float] = {}
    for views in ("", "views_") if "views_count" in totals else ("",):
        found[f"{views}loss"] = totals[f"{views}loss"] / count
        for k in (1, 5):
            found[f"{views}top{k}_error"] = 1.0 - totals[f"{views}top{k}"] / count
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


class PredictionsError(ValueError):
    """A file without predictions, or predictions that cannot be averaged."""


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
      PredictionsError: there is no such file, or it holds something else.
    """
    names = [field.name for field in dataclasses.fields(Predictions)]
    found: dict[str, Any] = read_npz(path, names, PredictionsError)
    try:
        return Predictions(
            centre=found["centre"],
            views=found.get("views"),
            num_views=int(found["num_views"]),
            labels=found["labels"].astype(np.int64),
            class_names=tuple(found["class_names"].tolist()),
            split=str(found["split"]),
        )
    except KeyError as error:
        raise PredictionsError(
            f"{path} holds no predictions: it has no {error}. They are saved by --mode=eval "
            "--predictions=FILE.npz."
        ) from error


def predict(experiment: Experiment, variables: dict[str, Any]) -> Predictions:
    """Return the predictions of a network on its experiment's evaluation split."""
    source, views = experiment.eval_source, experiment.config.eval_views
    assert source is not None
    step, statistics = make_predict_step(experiment.spec, views), experiment.statistics_on_mesh()

    def predict_batch(batch: Any) -> dict[str, jax.Array]:
        put = experiment.put(batch)
        return step(variables["params"], variables["batch_stats"], put, statistics)

    with experiment.eval_batches() as batches:
        found = list(_fetched(predict_batch, batches))
    count = source.num_examples  # without padding
    logs = {name: np.concatenate([part[name] for part in found])[:count] for name in found[0]}
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
      PredictionsError: labels or class names differ between the members.
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
        np.bincount(labels, ~_in_top_k(predictions.best, labels, k), len(names)) for k in (1, 5)
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


def worst_confusions(predictions: Predictions, most: int) -> list[Confusion]:
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
