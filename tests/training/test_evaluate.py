"""Evaluation: errors by hand, checkpoints, views, weights and ensembles of small runs."""

import dataclasses
import json
import shutil
import sys

import jax
import numpy as np
import pytest

from alexnet_jax import load, main
from alexnet_jax.data import DataError
from alexnet_jax.models.weights.safetensors import save_safetensors
from alexnet_jax.training import evaluate, loop
from alexnet_jax.training import load as load_lib
from alexnet_jax.training.checkpoint import CheckpointError
from alexnet_jax.training.config import ConfigError
from alexnet_jax.training.ensemble import Member, describe_mistakes, evaluate_runs, parse_members
from alexnet_jax.training.evaluate import Predictions, PredictionsError
from alexnet_jax.training.load import read_network
from alexnet_jax.training.workdir import write_config
from tests.training.runs import IMAGES, columns_config, records, small_config

# Predictions, by hand.

LABELS = np.array([0, 0, 1, 2, 2, 2], np.int32)
# The last four have no images.
NAMES = ("ant", "bee", "cat", "dog", "elk", "fly", "gnu")


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
    """Return probabilities whose most likely classes are these, in this order."""
    found = np.full((len(first), len(NAMES)), 0.001)
    for row, classes in zip(found, first, strict=True):
        row[list(classes)] = 0.9 / 2.0 ** np.arange(len(classes))
    return found / found.sum(1, keepdims=True)


MISTAKEN = ranked(
    (0,), (1, 0), (1,), (0, 1, 3, 4, 5, 2), (0, 1, 2), (2,)
)  # right, second, right, sixth, third, right
RIGHT = ranked(*[(k,) for k in LABELS])


def test_errors_classes_and_confusions_by_hand():
    found = evaluate.errors(make(MISTAKEN, RIGHT))
    assert found["top1_error"] == pytest.approx(3 / 6)
    assert found["top5_error"] == pytest.approx(1 / 6)
    assert found["views_top1_error"] == found["views_top5_error"] == 0
    own = MISTAKEN[np.arange(6), LABELS]
    assert found["loss"] == pytest.approx(-np.log(own).mean())
    assert found["count"] == 6
    predictions = make(MISTAKEN)
    assert evaluate.class_errors(predictions) == [
        ("cat", 3, pytest.approx(2 / 3), pytest.approx(1 / 3)),
        ("ant", 2, 0.5, 0.0),
        ("bee", 1, 0.0, 0.0),
    ]
    assert evaluate.worst_confusions(predictions, 10) == [
        ("cat", "ant", 2, pytest.approx(2 / 3)),
        ("ant", "bee", 1, 0.5),
    ]
    assert len(evaluate.worst_confusions(predictions, 1)) == 1
    lines = describe_mistakes(predictions)
    assert lines[1] == "  cat  top-1  66.7%  top-5  33.3%  of 3 images"
    assert lines[-1] == "  ant  taken for bee  once, 50.0% of its images"
    right = make(MISTAKEN, RIGHT)  # several views count
    assert describe_mistakes(right) == ["no image is classified wrongly"]
    more_units = make(np.concatenate([0.1 * MISTAKEN, np.full((6, 1), 0.9)], axis=1))
    assert evaluate.worst_confusions(more_units, 10)[0][:3] == ("cat", "class 7", 3)
    assert "taken for class 7" in describe_mistakes(more_units)[-1]


def test_an_ensemble_averages_probabilities():
    first, second, third = (probabilities(seed) for seed in range(3))
    together = evaluate.average([make(first, second), make(second, third), make(third, first)])
    mean = (first + second + third) / 3
    np.testing.assert_allclose(np.exp(together.centre), mean, rtol=1e-5)
    np.testing.assert_allclose(np.exp(together.best), mean, rtol=1e-5)
    assert together.num_views == 10
    # A probability too small for float32 is not lost.
    tiny = dataclasses.replace(make(first), centre=np.full((6, 7), -200, np.float32))
    assert evaluate.average([tiny, tiny]).centre[0, 0] == pytest.approx(-200.0)
    # Ten views and one are not averaged; their centres are.
    mixed = evaluate.average([make(first, second), make(second)])
    assert mixed.views is None and mixed.num_views == 1
    for changes, words in (
        ({"labels": LABELS[::-1].copy()}, "on a test .* their labels differ"),
        ({"class_names": ("wasp", *NAMES[1:])}, "their class names differ"),
    ):
        with pytest.raises(PredictionsError, match=words):
            evaluate.average([make(MISTAKEN), make(MISTAKEN, **changes)])


@pytest.mark.parametrize("views", [None, probabilities(1)])
def test_saved_predictions_are_loaded(views, tmp_path):
    before, path = make(probabilities(0), views), tmp_path / "deep" / "p.npz"
    before.save(path)
    with np.load(path) as arrays:
        of_older_versions = {**arrays, "thumbnails": np.zeros((6, 4, 4, 3), np.uint8)}
    np.savez(path, **of_older_versions)
    after = evaluate.load_predictions(path)
    for name, value in vars(before).items():
        found = getattr(after, name)
        assert type(found) is type(value)
        np.testing.assert_array_equal(found, value)


def test_file_without_predictions_is_refused(tmp_path):
    good = {k: v for k, v in vars(make(probabilities(0))).items() if v is not None}
    np.savez(tmp_path / "p.npz", **{k: v for k, v in good.items() if k != "labels"})
    words = "holds no predictions: it has no 'labels'"
    with pytest.raises(PredictionsError, match=words):
        evaluate.load_predictions(tmp_path / "p.npz")


# Runs.


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    """Return a folder of two runs with two checkpoints each, and their config.

    The networks have not learnt much, so that there are mistakes.
    """
    root = tmp_path_factory.mktemp("runs")
    config = small_config(folder)
    config.model.width, config.optim.learning_rate = 0.25, 1e-6
    config.num_epochs = 2.0
    config.eval_views = 10
    for seed in (0, 1):
        config.seed = seed
        loop.train_and_evaluate(config, root / f"seed_{seed}")
    return root, config


def copy_of(config, **data):
    copy = config.copy_and_resolve_references()
    copy.data.update(data)
    return copy


def test_evaluation_of_a_workdir_on_more_devices(runs, tmp_path, capsys):
    root, config = runs
    workdir = root / "seed_1"
    config = copy_of(config, batch_size=7)
    config.parallel.data = 7
    config.eval_every_epochs = 0.0  # a training by the plateau rule would be refused
    record = evaluate_runs(config, [Member(workdir)])
    assert record["eval/count"] == IMAGES
    evaluations = records(workdir, "eval/")
    (best,) = [found for found in evaluations if found["step"] == record["step"]]
    assert best["eval/top1_error"] == min(found["eval/top1_error"] for found in evaluations)
    for name in ("eval/top1_error", "eval/top5_error"):
        assert record[name] == pytest.approx(best[name])
    assert record["eval/loss"] == pytest.approx(best["eval/loss"], rel=1e-5)
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == record
    assert lines[:5] == [
        f"mean image: {workdir}/statistics.npz, of {IMAGES} images",
        f"{workdir}: the config differs from this workdir's:",
        "  --config.data.batch_size: 6 in the workdir, now 7",
        "  --config.eval_every_epochs: 1.0 in the workdir, now 0.0",
        "  --config.parallel.data: 1 in the workdir, now 7",
    ]
    wrong = f"{100 * record['eval/top1_error']:.2f}%"
    assert lines[6].startswith(f"step {record['step']}: top-1 error ")
    assert f"; top-1 error {wrong} (centre view); {IMAGES} images of" in lines[6]
    assert "top-5" not in "".join(lines[:-1])  # of three classes
    assert any(line.endswith(f" of {IMAGES // 3} images") for line in lines), lines
    with pytest.raises(CheckpointError, match="There is no checkpoint in"):
        evaluate_runs(config, [Member(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_evaluation_needs_no_training_images_and_not_every_class(runs, folder, tmp_path, capsys):
    root, config = runs
    whole = tmp_path / "whole.npz"
    evaluate_runs(config, [Member(root / "seed_0")], save_to=whole)
    whole = evaluate.load_predictions(whole)
    test = tmp_path / "images" / "test"
    shutil.copytree(folder / "test", test)
    shutil.rmtree(test / "blue")  # the first by name
    (test / "red" / "notes.txt").touch()
    config = copy_of(config, source=f"folder:{tmp_path / 'images'}")
    path = tmp_path / "weights.safetensors"
    save_safetensors(path, read_network(root / "seed_0"))
    for member in (Member(root / "seed_0"), Member(path)):
        capsys.readouterr()
        saved = tmp_path / f"{member.path.name}.npz"
        evaluate_runs(config, [member], save_to=saved)
        found = evaluate.load_predictions(saved)
        kept = whole.labels > 0
        np.testing.assert_array_equal(found.labels, whole.labels[kept])
        np.testing.assert_allclose(found.centre, whole.centre[kept], rtol=1e-4)
        lines = capsys.readouterr().out.splitlines()
        words = "WARNING: no images of 1 of the 3 trained classes: blue ("
        assert sum(line.startswith(words) for line in lines) == 1
        assert sum(line.startswith("WARNING: 1 left out of ") for line in lines) == 1
        (test / "red").rename(test / "rot")
        with pytest.raises(DataError, match="never trained: rot; it lacks blue, red"):
            evaluate_runs(config, [member])
        (test / "rot").rename(test / "red")
    # Weights that name no classes are compared by their number.
    nameless = dataclasses.replace(read_network(root / "seed_0"), class_names=None)
    save_safetensors(path, nameless)
    words = r"knows 3 classes; folder .* has 2\. Give the data"
    with pytest.raises(ConfigError, match=words):
        evaluate_runs(config, [Member(path)])


def exit_status(monkeypatch, *arguments):
    """Return the exit status of main, in process."""
    monkeypatch.setattr(sys, "argv", ["main", *arguments])
    with pytest.raises(SystemExit) as ended:
        main.run()
    return ended.value.code


def test_evaluation_takes_the_config_of_the_run(runs, tmp_path, monkeypatch, capsys):
    root, config = runs
    name = root / "seed_1"
    expected = evaluate_runs(config, [Member(name)])
    lines = capsys.readouterr().out.splitlines()
    # The last start had seed 1, as the fixture left the config.
    assert exit_status(monkeypatch, "--mode=eval", f"--workdir={name}") == 0
    assert capsys.readouterr().out.splitlines() == lines
    assert json.loads(lines[-1]) == expected
    # Only the named fields change.
    changes = "--config.eval_views=1", "--config.data.batch_size", "5"
    assert exit_status(monkeypatch, *changes, f"--workdir={name}", "--mode=eval") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:4] == [
        f"{name}: the config differs from this workdir's:",
        "  --config.data.batch_size: 6 in the workdir, now 5",
        "  --config.eval_views: 10 in the workdir, now 1",
    ]
    record = json.loads(lines[-1])
    assert "eval/views_loss" not in record
    assert record["eval/loss"] == pytest.approx(expected["eval/loss"], rel=1e-5)
    # Several take the first run's; files have none.
    file = tmp_path / "p.npz"
    both = f"--workdir={name},{root / 'seed_0'}"
    assert exit_status(monkeypatch, "--mode=eval", both, f"--predictions={file}") == 0
    assert "2 networks averaged" in capsys.readouterr().out
    assert exit_status(monkeypatch, "--mode=eval", f"--workdir={file},{name}") == 0
    capsys.readouterr()
    for workdir, words in ((file, "do not say which images"), (tmp_path, "has no config.json")):
        assert exit_status(monkeypatch, "--mode=eval", f"--workdir={workdir}") == 1
        assert words in capsys.readouterr().err


def test_a_stored_config_is_locked_and_has_tuples(runs, tmp_path):
    config = copy_of(runs[1])
    config.schedule.layer_factors = (("conv1", 0.0, 2.0),)
    write_config(tmp_path, config)
    found = load_lib.load_config(str(tmp_path / "config.json"))
    assert found.to_dict() == config.to_dict() and found.is_locked
    with pytest.raises(ConfigError, match="there is no such file"):
        load_lib.load_config(str(tmp_path / "none" / "config.json"))


def test_another_network_is_refused_even_if_config_json_agrees(runs, tmp_path):
    """Compare with the config in the checkpoint, even if config.json has changed."""
    root, config = runs
    workdir = shutil.copytree(root / "seed_0", tmp_path / "run")
    config = copy_of(config)
    config.model.overrides.activation = "tanh"
    words = r"run holds another network:\n.*activation: None in the workdir, now tanh"
    for _ in range(2):
        with pytest.raises(ConfigError, match=words):
            evaluate_runs(config, [Member(workdir)])
        write_config(workdir, config)  # of a start since then


def test_any_checkpoint_can_be_named(runs, capsys):
    root, config = runs
    best = evaluate_runs(config, parse_members(f"{root}/seed_0"))
    assert best["best_of"] == 2
    place = root / "seed_0" / "checkpoints" / str(best["step"])
    line = f"checkpoint of step {best['step']} ({place}), chosen as the best of 2 evaluations in "
    assert line in capsys.readouterr().out
    first, *_, last = records(root / "seed_0", "eval/")
    found = evaluate_runs(config, parse_members(f"{root}/seed_0@{first['step']}"))
    assert "chosen" not in capsys.readouterr().out and "best_of" not in found
    assert found["step"] == first["step"] != last["step"]
    assert found["eval/loss"] == pytest.approx(first["eval/loss"], rel=1e-5)
    latest = evaluate_runs(config, parse_members(f"{root}/seed_0@latest"))
    # Its ten views as well are those that training has measured.
    last = records(root / "seed_0", "eval/views_")[-1]
    assert latest == pytest.approx({k: last[k] for k in latest}, rel=1e-5)
    assert latest["step"] == last["step"] and "eval/views_top5_error" in latest
    with pytest.raises(CheckpointError, match="step 3"):
        evaluate_runs(config, parse_members(f"{root}/seed_0@3"))
    with pytest.raises(CheckpointError, match="a step, best or latest after the @; got 'last'"):
        parse_members(f"{root}/seed_0@last")
    (root / "odd@last").mkdir()
    assert parse_members(f"{root}/odd@last") == [Member(root / "odd@last")]
    with pytest.raises(CheckpointError, match="a comma with nothing"):
        parse_members(f"{root}/seed_0,")


def test_ensemble_is_the_mean_of_its_members_probabilities(runs, folder, tmp_path, capsys):
    root, config = runs
    names = [f"{root}/seed_0", f"{root}/seed_1"]
    path = tmp_path / "both.npz"
    members = parse_members(",".join(names))
    record = evaluate_runs(config, members, save_to=path)
    assert [member["name"] for member in record["members"]] == names
    # Average the networks as a notebook would.
    paths = sorted(folder.glob("test/*/*.png"))
    total = 0.0
    for name in names:
        model, variables, preprocess = load(name)
        logits = jax.jit(model.apply)(variables, preprocess(paths))
        total += jax.nn.softmax(logits)
    saved = evaluate.load_predictions(path)
    assert [saved.class_names[k] for k in saved.labels] == [file.parent.name for file in paths]
    np.testing.assert_allclose(np.exp(saved.centre), total / 2, rtol=1e-4)
    wrong = np.mean(np.argmax(total, -1) != saved.labels)
    assert record["eval/top1_error"] == pytest.approx(wrong)
    assert "2 networks averaged: top-1 error" in capsys.readouterr().out
    # Saved predictions count as a network.
    alone = evaluate_runs(config, parse_members(str(path)))
    assert alone == {k: v for k, v in record.items() if k != "members"}
    with pytest.raises(ConfigError, match="must be a file FILE.npz"):
        evaluate_runs(config, members, save_to=tmp_path / "p.txt")
    with pytest.raises(PredictionsError, match="no such file"):
        evaluate_runs(config, [Member(tmp_path / "q.npz"), *members])


def test_last_line_is_json_for_a_diverged_network(tmp_path, folder, capsys):
    path = tmp_path / "p.npz"
    make(np.full((6, 7), np.nan)).save(path)
    record = evaluate_runs(small_config(folder), [Member(path)])
    assert np.isnan(record["eval/loss"]) and record["eval/top1_error"] == 1
    line = capsys.readouterr().out.splitlines()[-1]
    said = json.loads(line, parse_constant=pytest.fail)
    assert said == record | {"eval/loss": None}


def test_weights_file_gives_the_errors_of_its_run(runs, folder, tmp_path):
    root, config = runs
    path = tmp_path / "weights.safetensors"
    save_safetensors(path, read_network(root / "seed_0"))
    run = evaluate_runs(config, [Member(root / "seed_0")])
    other = columns_config(folder)  # its network is not asked for
    other.eval_views = config.eval_views
    other.parallel.mode, other.parallel.column = "data", -1
    record = evaluate_runs(other, parse_members(str(path)))
    assert record == pytest.approx({k: run[k] for k in run if k.startswith("eval/")})


@pytest.mark.slow
def test_other_networks_share_an_ensemble(runs, folder, tmp_path):
    """Average ten views of a network with those of one in columns, of another input size."""
    root, config = runs
    other = columns_config(folder)
    other.max_steps = 3
    loop.train_and_evaluate(other, tmp_path)
    record = evaluate_runs(config, [Member(root / "seed_0"), Member(tmp_path)])
    both = record["members"]
    alone = evaluate_runs(other, [Member(tmp_path)])
    assert both[1]["eval/loss"] == pytest.approx(alone["eval/loss"], rel=1e-5)
    # A mean of probabilities is never as bad as the mean of the losses (Jensen).
    mean = sum(member["eval/views_loss"] for member in both) / 2
    assert record["eval/views_loss"] < mean
