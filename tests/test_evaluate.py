"""Predictions: averaged, saved and counted class by class, by hand."""

import dataclasses

import numpy as np
import pytest

from alexnet_jax import evaluate
from alexnet_jax.evaluate import Predictions, PredictionsError

LABELS = np.array([0, 0, 1, 2, 2, 2], np.int32)
NAMES = (
    "ant",
    "bee",
    "cat",
    "dog",
    "elk",
    "fly",
    "gnu",
)  # the last four without pictures


def probabilities(seed, count=6, classes=7):
    raw = np.random.default_rng(seed).exponential(size=(count, classes))
    return (raw / raw.sum(1, keepdims=True)).astype(np.float32)


def make(centre, views=None, **changes):
    fields = {
        "centre": np.log(centre),
        "views": None if views is None else np.log(views),
        "num_views": 1 if views is None else 10,
        "labels": LABELS,
        "class_names": NAMES,
        "split": "a test",
    }
    return Predictions(**(fields | changes))


def ranked(*first):
    """Probabilities whose most likely classes are these, in this order."""
    found = np.full((len(first), len(NAMES)), 0.001)
    for row, classes in zip(found, first, strict=True):
        row[list(classes)] = 0.9 / 2.0 ** np.arange(len(classes))
    return found / found.sum(1, keepdims=True)


MISTAKEN = ranked(
    (0,), (1, 0), (1,), (0, 1, 3, 4, 5, 2), (0, 1, 2), (2,)
)  # right, second, right, sixth, third, right


def test_errors_by_hand():
    found = evaluate.errors(make(MISTAKEN, ranked(*[(k,) for k in LABELS])))
    assert found["top1_error"] == pytest.approx(3 / 6)
    assert found["top5_error"] == pytest.approx(1 / 6)
    assert found["views_top1_error"] == found["views_top5_error"] == 0
    own = MISTAKEN[np.arange(6), LABELS]
    assert found["loss"] == pytest.approx(-np.log(own).mean())
    assert found["count"] == 6


def test_classes_and_confusions_by_hand():
    predictions = make(MISTAKEN)
    assert evaluate.class_errors(predictions) == [
        ("cat", 3, pytest.approx(2 / 3), pytest.approx(1 / 3)),
        ("ant", 2, 0.5, 0.0),
        ("bee", 1, 0.0, 0.0),
    ]
    assert evaluate.worst_confusions(predictions) == [
        ("cat", "ant", 2, pytest.approx(2 / 3)),
        ("ant", "bee", 1, 0.5),
    ]
    assert len(evaluate.worst_confusions(predictions, most=1)) == 1
    more_units = np.concatenate([0.1 * MISTAKEN, np.full((6, 1), 0.9)], axis=1)
    assert evaluate.worst_confusions(make(more_units))[0][:3] == ("cat", "class 7", 3)
    right = make(MISTAKEN, ranked(*[(k,) for k in LABELS]))  # several views count
    assert evaluate.worst_confusions(right) == []


def test_an_ensemble_averages_probabilities():
    first, second, third = (probabilities(seed) for seed in range(3))
    together = evaluate.average(
        [make(first, second), make(second, third), make(third, first)]
    )
    mean = (first + second + third) / 3
    np.testing.assert_allclose(np.exp(together.centre), mean, rtol=1e-5)
    np.testing.assert_allclose(np.exp(together.best), mean, rtol=1e-5)
    assert together.num_views == 10
    # A probability that float32 cannot hold is none that is lost.
    tiny = dataclasses.replace(make(first), centre=np.full((6, 7), -200, np.float32))
    assert evaluate.average([tiny, tiny]).centre[0, 0] == pytest.approx(-200.0)
    # Ten views and one are not averaged; their centres are.
    mixed = evaluate.average([make(first, second), make(second)])
    assert mixed.views is None and mixed.num_views == 1


def test_members_of_other_pictures_or_classes_are_refused():
    good = make(MISTAKEN)
    with pytest.raises(PredictionsError, match="no predictions to average"):
        evaluate.average([])
    other = make(MISTAKEN, labels=LABELS[::-1].copy(), split="another")
    with pytest.raises(PredictionsError, match="6 of a test, 6 of another"):
        evaluate.average([good, other])
    words = "other classes: 7 of a test, label 1 is 'bee'; 7 of more, label 1 is 'wasp'"
    renamed = (NAMES[0], "wasp", *NAMES[2:])
    with pytest.raises(PredictionsError, match=words):
        evaluate.average([good, make(MISTAKEN, class_names=renamed, split="more")])
    words = "7 of a test, label 6 is 'gnu'; 6 of a test, label 6 is 'none'"
    with pytest.raises(PredictionsError, match=words):
        evaluate.average([good, make(MISTAKEN[:, :-1], class_names=NAMES[:-1])])


@pytest.mark.parametrize("views", [None, probabilities(1)])
def test_saved_predictions_come_back(views, tmp_path):
    before = make(probabilities(0), views)
    path = tmp_path / "deep" / "p.npz"
    before.save(path)
    assert [p.name for p in path.parent.iterdir()] == ["p.npz"]
    with np.load(path) as arrays:
        of_older_versions = {**arrays, "thumbnails": np.zeros((6, 4, 4, 3), np.uint8)}
    np.savez(path, **of_older_versions)
    after = evaluate.load_predictions(path)
    for name, value in vars(before).items():
        found = getattr(after, name)
        assert type(found) is type(value)
        np.testing.assert_array_equal(found, value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": None}, "holds no predictions: it has no labels"),
        ({"centre": np.array([{}])}, "Object arrays cannot be loaded"),
    ],
)
def test_files_without_predictions_are_refused(changes, words, tmp_path):
    fields = {k: v for k, v in vars(make(probabilities(0))).items() if v is not None}
    fields = {k: v for k, v in (fields | changes).items() if v is not None}
    np.savez(tmp_path / "p.npz", **fields)
    with pytest.raises(PredictionsError, match=words):
        evaluate.load_predictions(tmp_path / "p.npz")


def test_files_that_are_not_npz_are_refused(tmp_path):
    with pytest.raises(PredictionsError, match="there is no such file"):
        evaluate.load_predictions(tmp_path / "p.npz")
    for content in (b"", b"PK\x03\x04 torn", b"x" * 100):
        (tmp_path / "p.npz").write_bytes(content)
        with pytest.raises(PredictionsError, match=r"no \.npz that can be read"):
            evaluate.load_predictions(tmp_path / "p.npz")


def test_predictions_of_batches_leave_padding_out():
    batches = [np.arange(4), np.arange(4, 8)]
    found = evaluate.predict(
        lambda batch: {"centre": batch[:, None] * np.ones(3)}, batches, expected_count=6
    )
    np.testing.assert_array_equal(found["centre"][:, 0], np.arange(6))
    with pytest.raises(
        RuntimeError, match="predictions of 8 pictures; the split has 9"
    ):
        evaluate.predict(
            lambda batch: {"centre": batch[:, None]}, batches, expected_count=9
        )
    with pytest.raises(RuntimeError, match="predictions of 0"):
        evaluate.predict(lambda batch: batch, [], expected_count=1)
