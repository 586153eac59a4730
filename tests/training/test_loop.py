"""Whole runs: they learn, stop, resume exactly, and are loaded."""

import collections
import gzip
import json
import os
import re
import shutil
import signal

import jax
import numpy as np
import pytest

from alexnet_jax import load
from alexnet_jax.system.files import FullDiskError
from alexnet_jax.training import checkpoint, loop, run, step_log, timing
from tests.training.runs import (
    IMAGES,
    STEPS,
    assert_same_state,
    columns_config,
    records,
    small_config,
)
from tests.training.small import fast_loops


def test_run_learns_and_writes_its_records(finished):
    state, workdir = finished
    assert int(state.step) == STEPS == -(-4 * IMAGES // 6)  # 4 epochs in batches of 6
    rows = records(workdir, "train/")
    assert [row["step"] for row in rows] == [*range(5, STEPS, 5), STEPS]
    assert rows[-1]["epoch"] == pytest.approx(STEPS * 6 / IMAGES)
    evaluations = records(workdir, "eval/")
    assert {row["eval/count"] for row in evaluations} == {IMAGES}
    assert evaluations[-1]["eval/top1_error"] < 0.2
    assert evaluations[-1]["eval/top5_error"] == 0
    saved = json.loads((workdir / "config.json").read_text())
    assert saved["data"]["batch_size"] == 6
    assert list(workdir.glob("events.out.tfevents.*"))
    assert (workdir / "statistics.npz").exists()


def test_loader_threads_and_summaries_change_nothing(finished, folder, tmp_path, capsys):
    expected, plain = finished
    config = small_config(folder, summaries_every_steps=5)
    config.data.workers = 3
    state = loop.train_and_evaluate(config, tmp_path)
    assert_same_state(state, expected)
    for kind in ("lr", "eval/"):
        assert records(tmp_path, kind) == records(plain, kind)
    summaries = records(tmp_path, "grad_norm/")
    assert [row["step"] for row in summaries] == [0, 5, 10, 15]
    for row in summaries:
        norms = {name for name in row if name.startswith("grad_norm/")}
        assert norms == {f"grad_norm/{layer}" for layer in state.params}
        assert all(row[name] > 0 for name in norms)
        assert 0 <= row["dead_relu/conv1"] <= 1
    # The loss before any update; afterwards the training records have it.
    assert [row["step"] for row in summaries if "train/loss" in row] == [0]
    first, out = summaries[0]["train/loss"], capsys.readouterr().out
    assert f"loss at step 0: {first:.4f}" in out
    assert "step  0/17  epoch 0.00  dead relu: conv1 " in out
    (events,) = tmp_path.glob("events.out.tfevents.*")
    assert b"grad_norm/conv1" in events.read_bytes()


def test_run_ends_at_its_training_error_and_evaluates_several_views(folder, tmp_path, capsys):
    config = small_config(folder, stop_at_train_error=0.02, eval_views=10, eval_every_epochs=0.0)
    config.num_epochs, config.log_every_steps = 8.0, 2
    state = loop.train_and_evaluate(config, tmp_path)
    rows = records(tmp_path, "train/")
    errors = [row["train/top1_error"] for row in rows]
    assert errors[-1] <= 0.02 < min(errors[:-1])
    assert int(state.step) == rows[-1]["step"] < 8 * IMAGES // 6
    (evaluation,) = records(tmp_path, "eval/")
    assert {"eval/views_top1_error", "eval/top1_error"} <= set(evaluation)
    capsys.readouterr()
    loop.train_and_evaluate(config, tmp_path)  # the same again has nothing to do
    assert "nothing to do: the run ended at step" in capsys.readouterr().out
    config.stop_at_train_error = 0.0  # another end: it goes on
    assert int(loop.train_and_evaluate(config, tmp_path).step) > int(state.step)


def float64_run(folder, workdir, mode, data, column):
    config = columns_config(folder, eval_split="", eval_every_epochs=0.0)
    config.model.dtype = "float64"
    config.data.batch_size = 8
    config.log_every_steps = 1
    config.max_steps = 6
    config.checkpoint.every_steps = 3
    config.parallel.mode = mode
    config.parallel.data, config.parallel.column = data, column
    with jax.enable_x64(True), fast_loops():
        return loop.train_and_evaluate(config, workdir)


@pytest.fixture(scope="module")
def six_steps_on_two_devices(folder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("two") / "columns"
    return float64_run(folder, workdir, "columns", 1, 2), workdir


@pytest.mark.parametrize(
    "mode, data, column",
    [
        ("columns", 1, 2),
        pytest.param("data", 1, 1, marks=pytest.mark.slow),
        pytest.param("columns", 2, 2, marks=pytest.mark.nightly),
        pytest.param("hybrid", 1, 8, marks=pytest.mark.nightly),
    ],
)
def test_run_resumes_on_the_same_and_on_other_devices(
    mode, data, column, folder, tmp_path, six_steps_on_two_devices, capsys
):
    """Resume after step 3 of a run on two devices: the next three losses are the same."""
    expected, workdir = six_steps_on_two_devices
    moved = shutil.copytree(workdir, tmp_path / "moved")
    shutil.rmtree(moved / "checkpoints" / "6")
    state = float64_run(folder, moved, mode, data, column)
    assert f"resuming from step 3 ({moved / 'checkpoints'})" in capsys.readouterr().out
    got, want = records(moved, "train/loss"), records(workdir, "train/loss")
    assert [row["step"] for row in got] == list(range(1, 7))
    np.testing.assert_allclose(
        [row["train/loss"] for row in got], [row["train/loss"] for row in want], rtol=1e-8
    )
    devices = {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(state)}
    assert devices == {data * column}
    if (mode, data, column) == ("columns", 1, 2):
        assert_same_state(state, expected)
        assert got == want


@pytest.mark.parametrize(
    "number, error",
    [
        (signal.SIGTERM, SystemExit),
        pytest.param(signal.SIGINT, KeyboardInterrupt, marks=pytest.mark.slow),
    ],
)
def test_stopped_run_resumes_exactly(
    number, error, finished, folder, tmp_path, monkeypatch, capsys
):
    expected, _ = finished
    add = step_log.StepLog.add

    def add_and_stop(self, step, metrics):
        add(self, step, metrics)
        if step == 13:  # after which an evaluation of the plateau rule is due
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(step_log.StepLog, "add", add_and_stop)
        with pytest.raises(error):
            loop.train_and_evaluate(small_config(folder), tmp_path)
    out = capsys.readouterr().out
    assert f"stopped at step 13 by {number.name}; the same command goes on" in out
    state = loop.train_and_evaluate(small_config(folder), tmp_path)
    assert_same_state(state, expected)
    starts = timing.read_times(tmp_path / "times.jsonl")
    assert [(s.first_step, s.last_step) for s in starts] == [(0, 13), (13, STEPS)]


def test_signal_in_last_save_changes_nothing(folder, tmp_path, monkeypatch, capsys):
    save = loop.Checkpointer.save

    def save_and_signal(checkpointer, step, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        save(checkpointer, step, *args, **kwargs)

    config = small_config(folder, max_steps=2, eval_split="")
    monkeypatch.setattr(loop.Checkpointer, "save", save_and_signal)
    assert int(loop.train_and_evaluate(config, tmp_path).step) == 2
    assert capsys.readouterr().out.endswith("checkpoint of step 2\n")


def stop_in_evaluation(patch, number=signal.SIGTERM, *, step, batch):
    """Send this process a signal in an evaluation, when a batch is on the devices."""
    counts = collections.Counter()
    eval_batch = run.Run.eval_batch

    def eval_batch_and_stop(self, *args):
        counts[self.step] += 1
        if self.step == step and counts[step] == batch:
            os.kill(os.getpid(), number)
        assert counts[step] <= batch  # the rest is not looked at
        return eval_batch(self, *args)

    patch.setattr(run.Run, "eval_batch", eval_batch_and_stop)


def test_interrupted_evaluation_is_repeated(folder, tmp_path, monkeypatch, capsys):
    """Check that the rule drops once, however often the repeated evaluation is killed."""

    def killed(*_, **__):
        raise MemoryError

    # Nothing improves: after step 9, the second evaluation, the rule lowers the rate.
    config = small_config(folder, max_steps=12)
    config.optim.learning_rate = 1e-12
    expected = loop.train_and_evaluate(config, tmp_path / "whole")
    workdir = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_in_evaluation(patch, step=9, batch=2)
        with pytest.raises(SystemExit) as stopped:
            loop.train_and_evaluate(config, workdir)
    assert stopped.value.code == 143
    assert "stopped at step 9 by SIGTERM; the same" in capsys.readouterr().out
    assert [row["step"] for row in records(workdir, "eval/")] == [5]
    for where, name in (
        (checkpoint, "atomic_write"),  # of the error, after the record is written
        (loop, "next_batch"),  # in the steps that follow
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, killed)
            with pytest.raises(MemoryError):
                loop.train_and_evaluate(config, workdir)
        assert "learning rate now 1e-13" in capsys.readouterr().out
    state = loop.train_and_evaluate(config, workdir)
    assert capsys.readouterr().out.count("learning rate now") == 1
    assert_same_state(state, expected)
    assert records(workdir, "eval/") == records(tmp_path / "whole", "eval/")
    # A resumed run follows a changed rate.
    config.optim.learning_rate, config.schedule.max_drops = 1e-10, 0
    config.schedule.patience, config.max_steps = 5, 13
    state = loop.train_and_evaluate(config, workdir)
    rate = state.opt_state.hyperparams["learning_rate"]
    assert float(rate) == pytest.approx(1e-11)


@pytest.mark.slow
def test_interrupted_last_evaluation_is_repeated(folder, tmp_path, monkeypatch, capsys):
    config = small_config(folder, max_steps=3, eval_every_epochs=0.0, eval_views=10)
    with monkeypatch.context() as patch:
        stop_in_evaluation(patch, signal.SIGUSR1, step=3, batch=1)
        with pytest.raises(SystemExit) as stopped:
            loop.train_and_evaluate(config, tmp_path)
    assert stopped.value.code == 138
    assert not records(tmp_path, "eval/")
    loop.train_and_evaluate(config, tmp_path)
    out = capsys.readouterr().out
    assert "stopped at step 3 by SIGUSR1" in out and "nothing to do" in out
    (row,) = records(tmp_path, "eval/")
    assert "eval/views_loss" in row


@pytest.mark.slow
@pytest.mark.parametrize(
    ("left", "words"),
    [
        (100_000, r"^cannot write in .*/checkpoints: No space .* more needed\)"),
        (0, r"^cannot write in .*/run: No space left on device \(0.0 MB free\)\. Make room"),
    ],
)
def test_full_disk_ends_the_run_which_resumes_when_there_is_room(
    left, words, finished, folder, small_disk, monkeypatch
):
    workdir = small_disk(6) / "run"
    ballast, add = workdir.parent / "ballast", step_log.StepLog.add

    def fill(self, step, metrics):
        if step == 8:
            if not left:  # the file's last page, too, is full
                page = os.sysconf("SC_PAGE_SIZE")
                with open(workdir / "metrics.jsonl", "ab") as file:
                    file.write(b" " * (page - file.tell() % page - 1) + b"\n")
            free = shutil.disk_usage(workdir).free
            ballast.write_bytes(bytes(free - left))
        add(self, step, metrics)

    config = small_config(folder)
    config.checkpoint.every_steps = 5
    with monkeypatch.context() as patch:
        patch.setattr(step_log.StepLog, "add", fill)
        with pytest.raises(FullDiskError) as raised:
            loop.train_and_evaluate(config, workdir)
    assert re.search(words, str(raised.value)), raised.value
    names = {path.name for path in (workdir / "checkpoints").iterdir()}
    assert names <= {".readers", "5", "9"}, names  # 9: the best one, of an evaluation
    load(workdir)  # is whole
    ballast.unlink()
    state = loop.train_and_evaluate(config, workdir)
    assert_same_state(state, finished[0])
    assert records(workdir, "train/") == records(finished[1], "train/")


def test_load_returns_model_variables_and_preprocess(finished, folder):
    _, workdir = finished
    model, variables, preprocess = load(workdir)
    paths = sorted(folder.glob("test/*/*.png"))
    names = sorted({path.parent.name for path in paths})
    logits = jax.jit(model.apply)(variables, preprocess(paths))
    assert preprocess(str(paths[0])).shape == (1, 32, 32, 3)
    labels = np.array([names.index(path.parent.name) for path in paths])
    error = np.mean(np.argmax(logits, -1) != labels)
    best = min(row["eval/top1_error"] for row in records(workdir, "eval/"))
    assert error == pytest.approx(best)


@pytest.mark.parametrize(
    "every_steps, words",
    [
        (0, (r"^The loss of step (\d) is (nan|inf) \(checked together: steps 1 to 5\)\. "
            r"There is no checkpoint in .*/checkpoints yet\. Try a lower --config")),
        # Weights can be spoilt a step before the loss shows it. Nothing of either is saved.
        (1, (r"^The (?:loss|parameters) of step (\d) (?:is|are not) .*"
            r"The last good checkpoint is that of step (\d) in ")),
    ],
)  # fmt: skip
def test_divergence_ends_the_run(every_steps, words, folder, tmp_path):
    config = small_config(folder)
    config.optim.learning_rate = 1e9
    config.checkpoint.every_steps = every_steps
    with pytest.raises(FloatingPointError) as raised:
        loop.train_and_evaluate(config, tmp_path)
    found = re.search(words, str(raised.value))
    assert found, raised.value
    assert "run the same command with --config.summaries_every" in str(raised.value)
    if every_steps:
        assert int(found[1]) == int(found[2]) + 1
        load(f"{tmp_path}@{found[2]}")  # it is whole


def test_stalled_loss_warns_once(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(step_log, "STALL_AFTER_STEPS", 9)
    config = small_config(folder, max_steps=15, eval_split="")
    config.model.init = "caffe"
    config.optim.learning_rate = 1e-12
    loop.train_and_evaluate(config, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    (warning,) = (line for line in lines if line.startswith("WARNING"))
    assert "after 10 steps the loss is 1.0" in warning
    assert "--config.model.init=paper or he" in warning  # it has caffe


def traced_steps(workdir):
    """Return the step numbers in a workdir's only trace."""
    (path,) = workdir.glob("profile/plugins/profile/*/*.trace.json.gz")
    assert path.with_name(path.name.replace("trace.json.gz", "xplane.pb")).exists()
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    steps = {e["args"]["step_num"] for e in events if e.get("name") == "train"}
    return sorted(int(step) for step in steps)


@pytest.mark.slow
def test_profile_traces_a_few_steps(folder, tmp_path):
    # The second run ends within its trace, which must still be closed.
    for count, max_steps in ((2, 8), (50, 5)):
        config = small_config(folder, profile=count, max_steps=max_steps, eval_split="")
        loop.train_and_evaluate(config, tmp_path / str(count))
        assert traced_steps(tmp_path / str(count)) == [3, 4]
