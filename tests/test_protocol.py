"""The test protocol on real, small runs: any checkpoint, several views, ensembles."""

import dataclasses
import json
import shutil
import sys

import jax
import numpy as np
import pytest
from absl.testing import flagsaver
from test_train import PICTURES, columns_config, folder, records, small_config  # noqa: F401

from alexnet_jax import evaluate, load, loading, main, protocol, train
from alexnet_jax.checkpoint import CheckpointError
from alexnet_jax.config import ConfigError
from alexnet_jax.data import DataError
from alexnet_jax.evaluate import PredictionsError
from alexnet_jax.loading import read_network
from alexnet_jax.pretrained import save_safetensors
from alexnet_jax.protocol import Member


def short(folder):  # noqa: F811
    """Far from learnt: there is something to be confused."""
    config = small_config(folder)
    config.optim.learning_rate = 1e-6
    config.num_epochs = 2.0
    config.eval_views = 10
    return config


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):  # noqa: F811
    """Two networks of one kind, with two checkpoints each, and their config."""
    root = tmp_path_factory.mktemp("runs")
    config = short(folder)
    for seed in (0, 1):
        config.seed = seed
        train.train_and_evaluate(config, root / f"seed_{seed}")
    return root, config


def test_evaluation_of_a_workdir_on_more_devices(runs, tmp_path, capsys):
    root, config = runs
    best = min(records(root / "seed_1", "eval/"), key=lambda r: r["eval/top1_error"])
    config = config.copy_and_resolve_references()
    config.data.batch_size = config.parallel.data = 7
    config.eval_every_epochs = 0.0  # a training by the plateau rule would be refused
    record = protocol.evaluate_runs(config, [Member(root / "seed_1")])
    assert record["eval/count"] == PICTURES
    for name in ("eval/top1_error", "eval/top5_error"):
        assert record[name] == pytest.approx(best[name])
    assert record["eval/loss"] == pytest.approx(best["eval/loss"], rel=1e-5)
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == record
    wrong = f"{100 * record['eval/top1_error']:.2f}%"
    workdir = root / "seed_1"
    assert lines[:5] == [
        f"mean image: {workdir}/statistics.npz, of {PICTURES} images",
        f"{workdir}: the config differs from this workdir's:",
        "  --config.data.batch_size: 6 in the workdir, now 7",
        "  --config.eval_every_epochs: 1.0 in the workdir, now 0.0",
        "  --config.parallel.data: 1 in the workdir, now 7",
    ]
    assert lines[6].startswith(f"step {record['step']}: top-1 error ")
    assert f"; top-1 error {wrong} (centre view); {PICTURES} pictures of" in lines[6]
    assert "top-5" not in "".join(lines[:-1])  # of three classes
    assert any(line.endswith(f" of {PICTURES // 3} pictures") for line in lines), lines
    with pytest.raises(CheckpointError, match="There is no checkpoint in"):
        protocol.evaluate_runs(config, [Member(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_it_says_which_checkpoint_and_how_it_was_chosen(
    runs,
    folder,  # noqa: F811
    tmp_path,
    capsys,
):
    root, config = runs

    def tested(name="seed_0", **data):
        own = config.copy_and_resolve_references()
        own.data.update(data)
        record = protocol.evaluate_runs(own, [Member.parse(f"{root}/{name}")])
        lines = capsys.readouterr().out.splitlines()
        (line,) = [line for line in lines if line.startswith("checkpoint of step ")]
        place = root / "seed_0" / "checkpoints" / str(record["step"])
        about, _, chosen = line.partition(")")
        assert about == f"checkpoint of step {record['step']} ({place}"
        assert json.loads(lines[-1]) == record
        return record.get("best_of"), chosen

    optimistic = (
        ", chosen as the best of 2 evaluations on this split, so its error is a little "
        "optimistic"
    )
    assert tested() == (2, optimistic)
    assert tested(eval_split="val") == (2, optimistic)  # the same folder
    (tmp_path / "elsewhere").symlink_to(folder)
    assert tested(source=f"folder:{tmp_path / 'elsewhere'}") == (2, optimistic)
    assert tested("seed_0@best") == (2, optimistic)
    shutil.copytree(root / "seed_0", root / "run.npz")
    assert not Member(root / "run.npz").is_predictions  # a folder
    assert tested("seed_0@latest") == tested("seed_0@5") == (None, "")
    assert tested(eval_split="train") == (None, "")
    shutil.copytree(folder / "test", tmp_path / "test")
    assert tested(source=f"folder:{tmp_path}") == (None, "")


def test_a_test_set_needs_no_training_pictures_and_not_every_class(
    runs,
    folder,  # noqa: F811
    tmp_path,
    capsys,
):
    root, config = runs
    whole = tmp_path / "whole.npz"
    protocol.evaluate_runs(config, [Member(root / "seed_0")], save_to=whole)
    whole = evaluate.load_predictions(whole)
    shutil.copytree(folder / "test", tmp_path / "pictures" / "test")
    shutil.rmtree(tmp_path / "pictures" / "test" / "blue")  # the first by name
    config = config.copy_and_resolve_references()
    config.data.source = f"folder:{tmp_path / 'pictures'}"
    path = tmp_path / "weights.safetensors"
    save_safetensors(path, read_network(root / "seed_0"))
    for member in (Member(root / "seed_0"), Member(path)):
        capsys.readouterr()
        saved = tmp_path / f"{member.path.name}.npz"
        protocol.evaluate_runs(config, [member], save_to=saved)
        found = evaluate.load_predictions(saved)
        kept = whole.labels > 0
        np.testing.assert_array_equal(found.labels, whole.labels[kept])
        np.testing.assert_allclose(found.centre, whole.centre[kept], rtol=1e-4)
        lines = capsys.readouterr().out.splitlines()
        words = "WARNING: no images of 1 of the 3 trained classes: blue ("
        assert sum(line.startswith(words) for line in lines) == 1
        (tmp_path / "pictures/test/red").rename(tmp_path / "pictures/test/rot")
        with pytest.raises(DataError, match="never trained: rot; it lacks blue, red"):
            protocol.evaluate_runs(config, [member])
        (tmp_path / "pictures/test/rot").rename(tmp_path / "pictures/test/red")


def started(monkeypatch, *arguments):
    """The exit status of main."""
    monkeypatch.setattr(sys, "argv", ["main", *arguments])
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as ended:
        main.run()
    return ended.value.code or 0


def test_evaluation_takes_the_config_of_the_run(runs, tmp_path, monkeypatch, capsys):
    root, config = runs
    name = root / "seed_1"
    expected = protocol.evaluate_runs(config, [Member(name)])
    lines = capsys.readouterr().out.splitlines()
    # As its last start had it: seed 1, as the fixture left the config.
    assert started(monkeypatch, "--mode=eval", f"--workdir={name}") == 0
    assert capsys.readouterr().out.splitlines() == lines
    assert json.loads(lines[-1]) == expected
    # Only what is named is another.
    changes = "--config.eval_views=1", "--config.data.batch_size", "5"
    assert started(monkeypatch, *changes, f"--workdir={name}", "--mode=eval") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        f"mean image: {name}/statistics.npz, of {PICTURES} images",
        f"{name}: the config differs from this workdir's:",
        "  --config.data.batch_size: 6 in the workdir, now 5",
        "  --config.eval_views: 10 in the workdir, now 1",
    ]
    record = json.loads(lines[-1])
    assert "eval/views_loss" not in record
    assert record["eval/loss"] == pytest.approx(expected["eval/loss"], rel=1e-5)
    # Of several it is the first run's; files have none.
    file = tmp_path / "p.npz"
    both = f"--workdir={name},{root / 'seed_0'}"
    arguments = "--mode=eval", both, f"--predictions={file}"
    assert started(monkeypatch, *arguments) == 0
    assert "2 networks averaged" in capsys.readouterr().out
    assert started(monkeypatch, "--mode=eval", f"--workdir={file},{name}") == 0
    capsys.readouterr()
    for arguments, words in (
        (["--mode=eval", f"--workdir={file}"], "Files do not say which pictures"),
        (["--mode=eval", f"--workdir={tmp_path}"], "has no config.json"),
        (["--mode=eval"], "--workdir=DIR is missing"),
        ([f"--workdir={name}", "--config.seed=1"], "--config=FILE is missing, such"),
        (
            ["--mode=eval", f"--workdir={name}", "--config.sed=1"],
            "the config has no such field: ",
        ),
    ):
        assert started(monkeypatch, *arguments) == 1
        assert words in capsys.readouterr().err


def test_a_stored_config_of_another_version(runs, tmp_path):
    """What it lacks has its default, what there is no more is left out."""
    root, config = runs
    stored = json.loads((root / "seed_1" / "config.json").read_text())
    del stored["finetune"], stored["optim"]["trust_coefficient"]
    stored["optim"]["gone"] = 3
    stored["schedule"]["layer_factors"] = [["conv1", 0.0, 2.0]]
    stored["model"]["overrides"]["norm_layers"] = ["conv1"]
    stored["num_epochs"] = 2
    path = tmp_path / "config.json"
    path.write_text(json.dumps(stored))
    found = loading.load_config(str(path))
    config = config.copy_and_resolve_references()
    config.schedule.layer_factors = (("conv1", 0.0, 2.0),)
    config.model.overrides.norm_layers = ("conv1",)
    assert found.to_dict() == config.to_dict()
    assert found.is_locked
    path.write_text("{")
    with pytest.raises(ConfigError, match="config.json is damaged"):
        loading.load_config(str(path))
    with pytest.raises(ConfigError, match="there is no such file"):
        loading.load_config(str(tmp_path / "none" / "config.json"))


def test_another_network_is_refused_whatever_the_workdir_says(runs, tmp_path):
    """Of the same shapes: its config is gone, and the checkpoint has its own."""
    root, config = runs
    workdir = shutil.copytree(root / "seed_0", tmp_path / "run")
    config = config.copy_and_resolve_references()
    config.model.overrides.activation = "tanh"
    words = r"run holds another network:\n.*activation: None in the workdir, now tanh"
    for _ in range(2):
        with pytest.raises(ConfigError, match=words):
            protocol.evaluate_runs(config, [Member(workdir)])
        (workdir / "config.json").unlink(missing_ok=True)


def test_any_checkpoint_can_be_named(runs):
    root, config = runs
    by_step = {r["step"]: r["eval/loss"] for r in records(root / "seed_0", "eval/")}
    assert len(by_step) == 2
    for step, loss in by_step.items():
        member = Member.parse(f"{root}/seed_0@{step}")
        found = protocol.evaluate_runs(config, [member])
        assert found["step"] == step
        assert found["eval/loss"] == pytest.approx(loss, rel=1e-5)
    latest = protocol.evaluate_runs(config, [Member.parse(f"{root}/seed_0@latest")])
    # Its ten views as well are those that training has measured.
    last = records(root / "seed_0", "eval/views_")[-1]
    assert latest == pytest.approx({k: last[k] for k in latest}, rel=1e-5)
    assert latest["step"] == max(by_step) and "eval/views_top5_error" in latest
    with pytest.raises(CheckpointError, match="step 3"):
        protocol.evaluate_runs(config, [Member.parse(f"{root}/seed_0@3")])
    with pytest.raises(CheckpointError, match="a step, best or latest; 'last' is none"):
        Member.parse(f"{root}/seed_0@last")
    (root / "odd@last").mkdir()
    assert Member.parse(f"{root}/odd@last").path == root / "odd@last"


def test_an_ensemble_is_the_mean_of_its_members_probabilities(
    runs,
    folder,  # noqa: F811
    tmp_path,
    capsys,
):
    root, config = runs
    names = [f"{root}/seed_0", f"{root}/seed_1"]
    path = tmp_path / "both.npz"
    members = [Member.parse(name) for name in names]
    record = protocol.evaluate_runs(config, members, save_to=path)
    assert [member["name"] for member in record["members"]] == names
    # By another way: the networks as a notebook has them.
    pictures = sorted(folder.glob("test/*/*.png"))
    total = 0.0
    for name in names:
        model, variables, preprocess = load(name)
        logits = jax.jit(model.apply)(variables, preprocess(pictures))
        total += jax.nn.softmax(logits)
    saved = evaluate.load_predictions(path)
    assert [saved.class_names[k] for k in saved.labels] == [
        picture.parent.name for picture in pictures
    ]
    np.testing.assert_allclose(np.exp(saved.centre), total / 2, rtol=1e-4)
    wrong = np.mean(np.argmax(total, -1) != saved.labels)
    assert record["eval/top1_error"] == pytest.approx(wrong)
    assert "2 networks averaged: top-1 error" in capsys.readouterr().out
    # What was saved counts as a network of its own.
    alone = protocol.evaluate_runs(config, [Member.parse(str(path))])
    assert alone == {k: v for k, v in record.items() if k != "members"}
    with pytest.raises(ConfigError, match="must be a file FILE.npz"):
        protocol.evaluate_runs(config, members, save_to=tmp_path / "p.txt")
    with pytest.raises(PredictionsError, match="no such file"):
        protocol.evaluate_runs(config, [Member(tmp_path / "q.npz"), *members])


def test_the_last_line_is_json_whatever_the_network_says(runs, monkeypatch, capsys):
    """One that has diverged; NaN and Infinity are no JSON."""
    root, config = runs
    member = Member(root / "seed_0")
    found = {"loss": np.nan, "views_loss": np.inf, "views_top1_error": 1.0}
    found |= {
        "top1_error": 1.0,
        "top5_error": 1.0,
        "views_top5_error": 1.0,
        "count": 24,
    }
    monkeypatch.setattr(protocol, "errors", lambda predictions: found)
    record = protocol.evaluate_runs(config, [member, member])
    assert np.isnan(record["eval/loss"])
    line = capsys.readouterr().out.splitlines()[-1]
    said = json.loads(line, parse_constant=pytest.fail)
    assert said["eval/loss"] is said["members"][1]["eval/views_loss"] is None
    assert said["eval/count"] == 24


def test_a_file_of_weights_is_tested_as_the_run_that_it_is_of(
    runs,
    folder,  # noqa: F811
    tmp_path,
):
    root, config = runs
    path = tmp_path / "weights.safetensors"
    weights = read_network(root / "seed_0")
    save_safetensors(path, weights)
    run = protocol.evaluate_runs(config, [Member(root / "seed_0")])
    other = columns_config(folder)  # its network is not asked for
    other.eval_views = config.eval_views
    other.parallel.mode, other.parallel.column = "data", -1
    record = protocol.evaluate_runs(other, [Member.parse(str(path))])
    assert record == pytest.approx({k: run[k] for k in run if k.startswith("eval/")})
    shutil.copytree(folder, tmp_path / "pictures")
    shutil.move(tmp_path / "pictures/train/red", tmp_path / "pictures/train/rot")
    shutil.move(tmp_path / "pictures/test/red", tmp_path / "pictures/test/rot")
    other.data.source = f"folder:{tmp_path / 'pictures'}"
    with pytest.raises(DataError, match="never trained: rot"):
        protocol.evaluate_runs(other, [Member(path)])
    (tmp_path / "pictures/test/rot").rename(tmp_path / "pictures/test/red")
    shutil.rmtree(tmp_path / "pictures/test/blue")
    save_safetensors(path, dataclasses.replace(weights, class_names=None))
    words = r"3 classes \(it does not say which\); folder .* has 2 \(green, red"
    with pytest.raises(ConfigError, match=words):
        protocol.evaluate_runs(other, [Member(path)])


@pytest.mark.slow
def test_other_networks_share_an_ensemble(runs, folder, tmp_path):  # noqa: F811
    """In columns on two devices, another input size, and ten views of each."""
    root, config = runs
    other = columns_config(folder)
    other.max_steps = 3
    train.train_and_evaluate(other, tmp_path)
    record = protocol.evaluate_runs(config, [Member(root / "seed_0"), Member(tmp_path)])
    both = record["members"]
    alone = protocol.evaluate_runs(other, [Member(tmp_path)])
    assert both[1]["eval/loss"] == pytest.approx(alone["eval/loss"], rel=1e-5)
    # A mean of probabilities is never as bad as the mean of the losses (Jensen).
    mean = sum(member["eval/views_loss"] for member in both) / 2
    assert record["eval/views_loss"] < mean
