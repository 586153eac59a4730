"""Resuming in a workdir: configs and data that it refuses, and its lock."""

import dataclasses
import json
import os
import re
import shutil

import numpy as np
import pytest

from alexnet_jax import load
from alexnet_jax.data import DataError, statistics
from alexnet_jax.system.files import exclusive_lock
from alexnet_jax.training import checkpoint, loop, resume
from alexnet_jax.training import load as load_lib
from alexnet_jax.training import workdir as workdir_lib
from alexnet_jax.training.checkpoint import CheckpointError
from alexnet_jax.training.config import ConfigError, as_json
from alexnet_jax.training.run import Progress, Run
from alexnet_jax.training.writers import METRICS_FILE, read_metrics
from tests.training.runs import EPOCHS, IMAGES, STEPS, small_config


@pytest.fixture
def config(folder):
    """Return the config of the finished run, for one more step."""
    return small_config(folder, num_epochs=EPOCHS + 1, max_steps=STEPS + 1)


@pytest.fixture
def workdir(workdir, tmp_path):
    """Return a copy of the finished run."""
    return shutil.copytree(workdir, tmp_path / "run")


def printed(config, workdir, capsys):
    resume.prepare(config, workdir)
    return capsys.readouterr().out.splitlines()


def test_changed_fields_and_the_mean_image_are_printed(workdir, folder, capsys):
    config = small_config(folder)
    mean = f"mean image: {workdir / 'statistics.npz'}, of {IMAGES} images"
    assert printed(config, workdir, capsys) == [mean]
    config.optim.learning_rate, config.data.workers = 0.5, 3
    assert printed(config, workdir, capsys) == [
        mean,
        "the config differs from this workdir's:",
        "  --config.data.workers: 2 in the workdir, now 3",
        "  --config.optim.learning_rate: 0.001 in the workdir, now 0.5",
    ]


def test_workdir_of_an_older_version_is_resumed(workdir, folder, capsys):
    path = workdir / "config.json"
    tree = json.loads(path.read_text())
    del tree["summaries_every_steps"], tree["model"]["overrides"]["skip"]
    del tree["finetune"]
    tree["optim"]["nesterov"] = True  # a field that was removed
    path.write_text(json.dumps(tree))
    config = small_config(folder, summaries_every_steps=7)
    assert printed(config, workdir, capsys)[2:] == [
        "  --config.summaries_every_steps: 0 in the workdir, now 7"
    ]


def test_damaged_config_is_refused(workdir, config):
    path = workdir / "config.json"
    path.write_text("")
    for read in (resume.prepare, load_lib.with_network_of):
        with pytest.raises(ConfigError, match=f"{path} is damaged: Expecting value"):
            read(config, workdir)


def test_another_network_is_refused(workdir, config, capsys):
    path = workdir / "config.json"
    before = path.read_text()
    config.model.overrides.activation = "tanh"  # of the same shapes
    words = r"holds another network:\n  .*activation: None in the workdir, now tanh"
    with pytest.raises(ConfigError, match=words):
        loop.train_and_evaluate(config, workdir)
    assert path.read_text() == before
    config.model.overrides.activation = None
    config.schedule.name, config.schedule.patience = "cosine", 5  # another optimiser state
    with pytest.raises(CheckpointError, match="holds another network or optimiser: opt_state/"):
        loop.train_and_evaluate(config, workdir)
    assert "schedule.name: plateau in the workdir, now cosine" in capsys.readouterr().out
    path.unlink()
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        loop.train_and_evaluate(config, workdir)


def test_second_run_in_a_workdir_is_refused(workdir, config):
    before = set(workdir.rglob("*"))
    with exclusive_lock(workdir / workdir_lib.LOCK_FILE, wait=False):
        with pytest.raises(ConfigError) as raised:
            loop.train_and_evaluate(config, workdir)
        load(workdir)  # a reader is not kept waiting
    words = rf"is in use by process {os.getpid()} on .* since .* \(.*python.*\)\. .*--w"
    assert re.search(words, str(raised.value)), raised.value
    added = {path.name for path in workdir.rglob("*") if path not in before}
    assert added <= {workdir_lib.LOCK_FILE, ".readers"}
    assert int(loop.train_and_evaluate(config, workdir).step) == STEPS + 1


def test_damaged_statistics_are_replaced_as_advised(workdir, config):
    path = workdir / "statistics.npz"
    good = statistics.load(path)
    dataclasses.replace(good, mean_image=good.mean_image[:32, :32]).save(path)
    for use in (lambda: loop.train_and_evaluate(config, workdir), lambda: load(workdir)):
        with pytest.raises(DataError, match=r"delete it and start the training"):
            use()
    path.unlink()
    with pytest.raises(FileNotFoundError, match="statistics.npz: there is no such file"):
        load(workdir)
    loop.train_and_evaluate(config, workdir)
    np.testing.assert_array_equal(statistics.load(path).mean_image, good.mean_image)


@pytest.mark.parametrize(
    "name, words",
    [
        ("{}/file", "file is a file; name a folder"),
        ("gs://bucket/run", "gs://bucket/run must be a local or mounted"),
        ("{}/a,b", "a,b has a comma, which separates runs in --m"),
    ],
)
def test_unusable_workdir_is_refused(name, words, config, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=words):
        loop.train_and_evaluate(config, name.format(tmp_path))
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    "batch_size, remedy",
    [
        (3, "Keep 6; --config.optim.accumulate_steps=2 is the same run in less memory"),
        (12, "Keep 6. Or take a new --workdir"),
    ],
)
def test_another_batch_size_is_refused(batch_size, remedy, workdir, config):
    config.data.batch_size = batch_size
    words = (
        f"{workdir} has --config.data.batch_size=6, not {batch_size}: its steps would mean "
        f"other epochs, learning rates and places in the data. {remedy}"
    )
    before = (workdir / "config.json").read_text()
    with pytest.raises(ConfigError, match=re.escape(words)):
        loop.train_and_evaluate(config, workdir)
    assert (workdir / "config.json").read_text() == before


def test_other_images_and_classes_are_refused(folder, workdir, tmp_path):
    images = shutil.copytree(folder, tmp_path / "images")
    next((images / "train" / "red").iterdir()).unlink()
    words = f"was trained on {IMAGES} images, and there are {IMAGES - 1} now: its"
    with pytest.raises(ConfigError, match=words):
        loop.train_and_evaluate(small_config(images, num_epochs=5.0), workdir)
    for split in ("train", "test"):
        (images / split / "green").rename(images / split / "gold")
    words = "label 1 was 'green'; here are 3, and label 1 is 'gold'. Take a new --workdir"
    with pytest.raises(ConfigError, match=words):
        loop.train_and_evaluate(small_config(images, num_epochs=5.0), workdir)


def test_longer_run_prints_that_its_schedule_changes(config, tmp_path):
    config.schedule.name, config.num_epochs = "cosine", 2.0
    saved = as_json(config)
    config.num_epochs = 4.0
    assert resume.compare(config, saved, tmp_path)[-1] == (
        "the cosine schedule is laid out over 4 epochs instead of 2: from here on the "
        "learning rate is another"
    )
    config.schedule.name = saved["schedule"]["name"] = "plateau"
    assert len(resume.compare(config, saved, tmp_path)) == 2


@pytest.mark.parametrize(
    "metadata, evaluated_step",
    [
        (None, -1),  # a new run
        ({"evaluated_step": 5, "error": 0.5}, 5),
        # Older versions: an evaluation of this step is missing, or is not.
        ({"evaluation_owed": True}, -1),
        ({"evaluation_owed": False}, 9),
    ],
)
def test_progress_of_old_and_new_checkpoints(metadata, evaluated_step, config):
    stored = {"config": as_json(config)}
    found = Progress.resume(9, {} if metadata is None else stored | metadata, config)
    assert (found.step, found.evaluated_step) == (9, evaluated_step)
    again = Progress.resume(9, stored | found.to_json(), config)
    assert again.evaluated_step == evaluated_step
    assert again.error == (metadata or {}).get("error")


def test_log_line_after_a_kill_has_all_its_steps(folder, tmp_path, monkeypatch):
    """Expect a kill to change no mean, and so not the end by `stop_at_train_error`."""
    config = small_config(folder, max_steps=8)
    config.log_every_steps, config.checkpoint.every_steps = 4, 3
    config.stop_at_train_error = 0.99  # reached by the first whole line
    loop.train_and_evaluate(config, tmp_path / "whole")
    save = Run.save

    def save_and_die(run):
        save(run)
        raise RuntimeError("killed")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(Run, "save", save_and_die)
        loop.train_and_evaluate(config, tmp_path / "killed")
    loop.train_and_evaluate(config, tmp_path / "killed")
    lines = [
        [r["step"], r["train/loss"], r["train/top1_error"]]
        for name in ("whole", "killed")
        for r in read_metrics(tmp_path / name / METRICS_FILE)
        if "train/loss" in r
    ]
    assert lines[0][0] == 4 and lines == [lines[0]] * 2


def test_a_config_without_a_newer_field_is_resumed(workdir, config):
    folder = workdir / "checkpoints" / str(STEPS)
    metadata = json.loads((folder / "metadata.json").read_text())
    for name in ("stop_at_train_error", "finetune"):
        del metadata["config"][name]
    (folder / "metadata.json").write_text(json.dumps(metadata))
    body = checkpoint.read_manifest(folder) | {"files": checkpoint.checksums(folder)}
    body["files"].pop("manifest.json", None)
    (folder / "manifest.json").write_bytes(checkpoint.manifest_text(body))
    assert int(loop.train_and_evaluate(config, workdir).step) == STEPS + 1
