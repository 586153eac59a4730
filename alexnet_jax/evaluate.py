"""Evaluation that counts every example exactly once, and predictions: saved, averaged
over networks, and class by class.
"""

import collections
import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alexnet_jax import metrics
from alexnet_jax.data.files import read_npz, replacing

Sums = dict[str, jax.Array]
# Pictures that are ranked at once: some hundred MB with a thousand classes.
_BLOCK = 8192


class PredictionsError(ValueError):
    """What is wrong with predictions, or with averaging them, in words."""


def evaluate(
    eval_step: Callable[[Any], Sums], batches: Iterable[Any], *, expected_count: int
) -> dict[str, float]:
    """Adds up `eval_step` over padded and masked batches.

    Args:
      eval_step: batch -> the sums of `metrics.sums` over its real examples, and
        perhaps those of several views, under "views_...".
      batches: device batches, the last one padded.
      expected_count: the size of the split.

    Returns:
      {"loss", "top1_error", "top5_error", "count"}: mean loss in nats, errors in
      [0, 1], number of examples; and of several views "views_loss",
      "views_top1_error", "views_top5_error".

    Raises:
      RuntimeError: if the number counted is not `expected_count`.
    """
    totals: dict[str, float] = collections.defaultdict(float)
    for sums in _fetched(eval_step, batches):
        for name, value in sums.items():
            totals[name] += float(value)  # float64: exact counts
    count = round(totals["count"])
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
    """What a step says of each batch, on the host."""
    pending: collections.deque[dict[str, jax.Array]] = collections.deque()
    for batch in batches:
        pending.append(step(batch))
        if len(pending) > 1:  # one batch computes while the next one is prepared
            yield jax.device_get(pending.popleft())
    while pending:
        yield jax.device_get(pending.popleft())


# Predictions.


@dataclass(frozen=True)
class Predictions:
    """What a network, or several together, say about every picture of a split.

    Attributes:
      centre: float [N, K], natural logarithms of the probabilities, of the centre view;
        pictures in the order of the split.
      views: of the probabilities averaged over `num_views` views; None: there is only
        the centre, and `num_views` is 1.
      labels: int [N].
      class_names: K of them, by label.
      split: which pictures these are, in words.
    """

    centre: np.ndarray
    views: np.ndarray | None
    num_views: int
    labels: np.ndarray
    class_names: tuple[str, ...]
    split: str

    @property
    def best(self) -> np.ndarray:
        """Those over several views where there are some, else of the centre."""
        return self.centre if self.views is None else self.views

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes an .npz, whole or not at all, for `load_predictions` and NumPy."""
        with replacing(path) as file:
            np.savez(file, **{k: v for k, v in vars(self).items() if v is not None})


def load_predictions(path: str | os.PathLike[str]) -> Predictions:
    """Reads what `Predictions.save` has written; never through pickle.

    Raises:
      PredictionsError: if there is no such file, or something else in it.
    """
    names = [field.name for field in dataclasses.fields(Predictions)]
    found = read_npz(path, names, PredictionsError)
    missing = [name for name in names if name not in found and name != "views"]
    if missing:
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


def predict(
    predict_step: Callable[[Any], dict[str, jax.Array]],
    batches: Iterable[Any],
    *,
    expected_count: int,
) -> dict[str, np.ndarray]:
    """The predictions on padded batches, without the padding.

    Args:
      predict_step: batch -> those of `steps.make_predict_step`, [B, K] each.
      batches: device batches of a split in order, padded at its end only.
      expected_count: the size of the split.

    Returns:
      The same names, [expected_count, K] each.

    Raises:
      RuntimeError: if the batches hold fewer.
    """
    blocks: dict[str, list[np.ndarray]] = collections.defaultdict(list)
    for found in _fetched(predict_step, batches):
        for name, values in found.items():
            blocks[name].append(values)
    whole = {name: np.concatenate(parts) for name, parts in blocks.items()}
    count = min((len(values) for values in whole.values()), default=0)
    if count < expected_count:
        raise RuntimeError(
            f"There are predictions of {count} pictures; the split has {expected_count}."
        )
    return {name: values[:expected_count] for name, values in whole.items()}


def average(members: Sequence[Predictions]) -> Predictions:
    """The mean probabilities of several networks on the same pictures.

    Over several views only if all members have as many.

    Raises:
      PredictionsError: if there is none, or they are of different pictures or classes.
    """
    if not members:
        raise PredictionsError("There are no predictions to average.")
    first = members[0]
    for other in members[1:]:
        if other.class_names != first.class_names:
            names = first.class_names, other.class_names
            pairs = enumerate(itertools.zip_longest(*names, fillvalue="none"))
            label, (one, another) = next((k, p) for k, p in pairs if p[0] != p[1])
            raise PredictionsError(
                f"Predictions of other classes: {len(names[0])} of {first.split}, label "
                f"{label} is {one!r}; {len(names[1])} of {other.split}, label {label} is "
                f"{another!r}."
            )
        if not np.array_equal(other.labels, first.labels):
            raise PredictionsError(
                f"Predictions of other pictures: {len(first.labels)} of {first.split}, "
                f"{len(other.labels)} of {other.split}, and their labels differ."
            )
    views = None
    alike = len({member.num_views for member in members}) == 1
    if alike and all(member.views is not None for member in members):
        views = _log_mean([member.best for member in members])
    return dataclasses.replace(
        first,
        centre=_log_mean([member.centre for member in members]),
        views=views,
        num_views=1 if views is None else first.num_views,
    )


def _log_mean(logs: Sequence[np.ndarray]) -> np.ndarray:
    """Logarithms of the mean of probabilities, from theirs, without underflow."""
    total = logs[0].astype(np.promote_types(logs[0].dtype, np.float32))
    for other in logs[1:]:
        total = np.logaddexp(total, other)
    return total - np.log(len(logs)).astype(total.dtype)


def errors(predictions: Predictions) -> dict[str, float]:
    """The metrics of `evaluate`, of predictions."""
    found: dict[str, float] = {}
    for prefix, logs in (("", predictions.centre), ("views_", predictions.views)):
        if logs is not None:
            labels = predictions.labels
            own = np.take_along_axis(logs, labels[:, None], axis=1)
            found[f"{prefix}loss"] = -float(np.mean(own, dtype=np.float64))
            for k in (1, 5):
                right = np.mean(_in_top_k(logs, labels, k))
                found[f"{prefix}top{k}_error"] = 1.0 - float(right)
    return found | {"count": len(predictions.labels)}


def _in_top_k(logs: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    blocks = []
    for i in range(0, len(labels), _BLOCK):
        part = slice(i, i + _BLOCK)
        found = metrics.in_top_k(jnp.asarray(logs[part]), jnp.asarray(labels[part]), k)
        blocks.append(np.asarray(found))
    return np.concatenate(blocks)


class ClassErrors(NamedTuple):
    """Of one class: errors in [0, 1] over its `count` pictures."""

    name: str
    count: int
    top1_error: float
    top5_error: float


def class_errors(predictions: Predictions) -> list[ClassErrors]:
    """Of each class that has pictures, the worst first, from `Predictions.best`."""
    labels, names = predictions.labels, predictions.class_names
    count = np.bincount(labels, minlength=len(names))
    wrong = [
        np.bincount(
            labels, ~_in_top_k(predictions.best, labels, k), minlength=len(names)
        )
        for k in (1, 5)
    ]
    found = [
        ClassErrors(name, int(n), *(float(w[label] / n) for w in wrong))
        for label, (name, n) in enumerate(zip(names, count, strict=True))
        if n
    ]
    return sorted(found, key=lambda c: (-c.top1_error, -c.top5_error))


class Confusion(NamedTuple):
    """Pictures of one class that were taken for another.

    Attributes:
      share: `count` over the pictures of class `label`.
    """

    label: str
    predicted: str
    count: int
    share: float


def worst_confusions(predictions: Predictions, most: int = 10) -> list[Confusion]:
    """The most frequent mistakes, from `Predictions.best`; the first of equal ones."""
    labels, names = predictions.labels, predictions.class_names
    predicted = np.argmax(predictions.best, axis=1)
    wrong = predicted != labels
    pairs, counts = np.unique(
        np.stack([labels[wrong], predicted[wrong]]), axis=1, return_counts=True
    )
    sizes = np.bincount(labels)
    order = np.argsort(-counts, kind="stable")[:most]
    # A network may have more units than the data has classes.
    names = (
        *names,
        *(f"class {k}" for k in range(len(names), predictions.best.shape[1])),
    )
    return [
        Confusion(names[a], names[b], int(n), float(n / sizes[a]))
        for (a, b), n in zip(pairs.T[order], counts[order], strict=True)
    ]
