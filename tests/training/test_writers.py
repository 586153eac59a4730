"""Records of a run: metrics.jsonl, TensorBoard and the console."""

import errno
import io
import json
import math
import os
import pty
import struct
import sys
import termios
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from alexnet_jax.training.writers import (
    METRICS_FILE,
    JsonlWriter,
    MultiWriter,
    TensorBoardWriter,
    in_words,
    read_metrics,
)

TRAIN = {
    "train/loss": 3.21437,
    "train/top1_error": 0.7125,
    "lr": 0.01,
    "images_per_sec": 1523.4,
    "data_wait_frac": 0.031,
}
EVAL = {"eval/loss": 2.5, "eval/top1_error": 0.5, "eval/top5_error": 0.25, "eval/count": 50000}


# The JSON-lines file.


@pytest.fixture
def path(tmp_path):
    return tmp_path / METRICS_FILE


def _write_steps(path, steps, resume_step=None):
    writer = JsonlWriter(path, resume_step)
    for step in steps:
        writer.write(step, step / 100, {"train/loss": float(step)})


def _steps(path):
    return [record["step"] for record in read_metrics(path)]


def test_a_record_is_one_line_of_json(path):
    writer = JsonlWriter(path)
    writer.write(100, 1.5, TRAIN)
    # Read while the writer is open: a killed run has lost nothing.
    assert json.loads(path.read_text()) == {"step": 100, "epoch": 1.5} | TRAIN
    writer.write(100, 1.5, EVAL)
    writer.write(200, 3.0, {"train/loss": math.nan, "lr": math.inf})
    train, evaluation, diverged = read_metrics(path)
    assert list(train)[:3] == ["step", "epoch", "train/loss"]
    assert evaluation == {"step": 100, "epoch": 1.5} | EVAL
    assert isinstance(evaluation["eval/count"], int)
    assert math.isnan(diverged["train/loss"]) and math.isnan(diverged["lr"])
    last = path.read_text().splitlines()[-1]  # JSON has neither
    assert last == '{"step": 200, "epoch": 3.0, "train/loss": null, "lr": null}'


def test_resume_drops_what_will_be_written_again(path):
    _write_steps(path, [100, 200, 300, 400])
    with open(path, "a") as file:
        file.write('{"step": 500, "lr": 0.0')  # torn by a kill
    assert _steps(path) == [100, 200, 300, 400]
    _write_steps(path, [300, 400], resume_step=250)
    assert _steps(path) == [100, 200, 300, 400]
    # The record of the resumed step stays, and is not repeated.
    _write_steps(path, [300], resume_step=300)
    assert _steps(path) == [100, 200, 300]
    JsonlWriter(path, 300).write(300, 3.0, EVAL)
    for names in (EVAL, {f"{name}_of_views": x for name, x in EVAL.items()}):
        JsonlWriter(path, 300).write(300, 3.0, names)
    assert _steps(path) == [100, 200, 300, 300, 300]
    assert os.listdir(path.parent) == [METRICS_FILE]


def test_new_run_renames_the_old_file(path):
    for steps in ([100, 200], [100], []):
        _write_steps(path, steps)
        assert _steps(path) == steps
    assert _steps(path.with_name(METRICS_FILE + ".old")) == [100, 200]
    assert _steps(path.with_name(METRICS_FILE + ".old_2")) == [100]


def test_damaged_line_is_named(path):
    path.write_text('{"step": 100}\n{"step": 200, "lr": 0.0\n{"step": 300}\n')
    with pytest.raises(ValueError, match="line 2 is not a record"):
        read_metrics(path)
    _write_steps(path, [], resume_step=300)
    assert _steps(path) == [100, 300]


# TensorBoard.


def _event_files(folder):
    return sorted(p for p in folder.iterdir() if "tfevents" in p.name)


def _events(folder):
    """Return the events of a TFRecord file: length, its checksum, payload, checksum."""
    event_type: Any = getattr(event_pb2, "Event")  # noqa: B009  (made at import)
    (path,) = _event_files(folder)
    data, events = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        events.append(event_type.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return events


def test_tensorboard_holds_the_scalars_and_drops_repeated_steps(tmp_path):
    writer = TensorBoardWriter(tmp_path, resume_step=50)
    writer.write(100, 1.5, TRAIN)
    writer.write(200, 3.0, EVAL)
    writer.close()
    events = _events(tmp_path)
    found = {
        (value.tag, event.step): value.simple_value
        for event in events
        for value in event.summary.value
    }
    assert found["train/loss", 100] == pytest.approx(3.21437)
    assert found["eval/count", 200] == 50000
    assert found["epoch", 200] == 3.0
    start = 1  # SessionLog.START
    assert [e.step for e in events if e.session_log.status == start] == [51]


# The console.

VIEWS = {"eval/views_loss": 0.9, "eval/views_top1_error": 0.4, "eval/views_top5_error": 0.1}
SUMMARY = {
    "dead_relu/conv1": 0.0,
    "dead_relu/fc6": 0.1251,
    "grad_norm/conv1": 0.00123,
    "grad_norm/fc8": 12.3,
    "train/loss": math.nan,
}


@pytest.mark.parametrize(
    "scalars, show_top5, words",
    [
        (
            TRAIN | {"eta_seconds": 3753.2},
            True,
            (
                "train: loss 3.2144  top-1 error 71.25%  lr 0.01  1523.4 images/s"
                "  waiting for data 3%  left 1:02:33"
            ),
        ),
        (EVAL, True, "eval: loss 2.5000  top-1 error 50.00%  top-5 error 25.00%  on 50000 images"),
        (
            EVAL | VIEWS,  # of five classes or fewer
            False,
            (
                "eval: loss 2.5000  top-1 error 50.00%  on 50000 images"
                "  several views: loss 0.9000  top-1 error 40.00%"
            ),
        ),
        (
            SUMMARY,
            True,
            (
                "dead relu: conv1 0%  fc6 13%  grad norm: conv1 1.2e-03  fc8 1.2e+01"
                "  train: loss nan"
            ),
        ),
        ({"images_per_sec": 9.64, "own/dead": 0.25}, True, "9.6 images/s  own: dead 0.25"),
    ],
)
def test_a_record_is_a_readable_line(scalars, show_top5, words):
    assert in_words(scalars, show_top5=show_top5) == words


def test_run_goes_on_when_its_output_cannot_be_written(tmp_path, monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", Closed())
    with MultiWriter(tmp_path, total_steps=10, steps_per_epoch=1.0) as writers:
        writers.text("line")


@pytest.mark.parametrize("columns", [0, 100])  # 0: it does not tell its width
def test_a_terminal_has_a_bar_below_whole_lines(columns, tmp_path, monkeypatch):
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, columns))
    with os.fdopen(theirs, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        sizes = {"total_steps": 400, "steps_per_epoch": 100.0}
        with MultiWriter(tmp_path, resume_step=100, **sizes) as writers:
            for step in (101, 200, 400):
                writers.progress(step)
            writers.write(400, EVAL)
            writers.text("done")
        shown = ""
        while "done\r\n" not in shown:
            shown += os.read(ours, 65536).decode()
    os.close(ours)
    assert "100/400" in shown and "25%" in shown  # the bar starts where the run does
    lines = [line.rsplit("\r", 1)[-1] for line in shown.split("\r\n")]
    assert any(line.startswith("step 400/400  epoch 4.00  eval:") for line in lines)
    assert "done" in lines


# All of them.


def test_all_writers_through_a_resume(tmp_path, capsys):
    workdir = tmp_path / "runs" / "paper"
    sizes = {"total_steps": 300, "steps_per_epoch": 100.0}
    # Step 100 is written again after the resume, and appears once.
    for resume_step, steps in ((None, (100, 200)), (100, (100, 200, 300))):
        with MultiWriter(workdir, resume_step=resume_step, **sizes) as writers:
            for step in steps:
                writers.progress(step)
                scalars = {"train/loss": jnp.float32(step), "n": np.int64(3), "eta_seconds": 9}
                writers.write(step, scalars)
            writers.text("a line")
    with MultiWriter(workdir, enabled=False, **sizes) as others:
        others.write(300, TRAIN)
        others.progress(300)
        others.text("a line")
    path = workdir / METRICS_FILE
    assert _steps(path) == [100, 200, 300]
    assert path.read_text().startswith('{"step": 100, "epoch": 1.0, "train/loss": 100.0, "n": 3}\n')
    # A restart adds an event file, even one within the same second.
    assert len(_event_files(workdir)) == 2
    assert b"eta_seconds" not in b"".join(p.read_bytes() for p in _event_files(workdir))
    out = capsys.readouterr().out
    assert out.count("train: loss") == 4 and out.count("a line\n") == 2
    assert "step 100/300  epoch 1.00  train: loss 100.0000  n 3  left 0:00:09\n" in out
