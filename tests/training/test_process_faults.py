"""One of several real processes is killed, frozen, stopped or started differently."""

# ruff: noqa: F811, for the fixture of another file
import os
import re
import signal
import time
from pathlib import Path

import pytest

from alexnet_jax.training.writers import read_metrics
from tests.training.test_distributed import (
    config_file,  # noqa: F401, a fixture
    launch,
    run_together,
    scalars,
    start_by_hand,
)


def wait_for(process, words, seconds=90):
    """Read a process's output until a line holds `words`; return all of it."""
    lines, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        line = process.stdout.readline()
        assert line, "".join(lines)  # it ended
        lines.append(line)
        if words in line:
            return "".join(lines)
    raise AssertionError("".join(lines))


def pid_of(workdir, index):
    """Return the process id of process `index` of the run in a workdir."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = entry.read_bytes().decode().split("\0")
        except OSError:
            continue
        mine = f"--workdir={workdir}" in arguments and "alexnet_jax.main" in arguments
        if mine and f"--process_id={index}" in arguments:
            return int(entry.parent.name)
    raise AssertionError(f"no process {index} in {workdir}")


# The traceback's last line, or before it jax's own words.
LOST = re.compile(
    r"this process failed, or another one is gone|another task died; see the other task"
)
LONG = ("--config.max_steps=600", "--config.checkpoint.every_steps=10")


@pytest.mark.parametrize(
    "killed", [pytest.param(0, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.nightly)]
)
def test_killed_process_ends_the_run_and_the_same_command_resumes(killed, config_file, tmp_path):
    process = launch(config_file, tmp_path, 2, *LONG)
    wait_for(process, "checkpoint of step 10")
    os.kill(pid_of(tmp_path, killed), signal.SIGKILL)
    started = time.monotonic()
    out, _ = process.communicate(timeout=60)
    assert time.monotonic() - started < 60
    assert process.returncode == 128 + signal.SIGKILL
    assert f"process {killed} was killed by SIGKILL" in out
    assert LOST.search(out), out
    again = launch(config_file, tmp_path, 2, *LONG)
    out = wait_for(again, "checkpoint of step")
    assert re.search(r"resuming from step \d+0 ", out)
    # A signal to one process stops both after the same step.
    os.kill(pid_of(tmp_path, 1), signal.SIGUSR1)
    out, _ = again.communicate(timeout=60)
    assert again.returncode == 128 + signal.SIGUSR1, out
    assert re.search(r"\[0\] stopped at step \d+ by SIGUSR1", out)
    steps = [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl") if "lr" in row]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.slow
def test_frozen_process_is_found_by_its_missing_heartbeat(config_file, tmp_path):
    """Stop a process: like a lost machine it closes no connection, and no launcher tells."""
    processes = start_by_hand(config_file, tmp_path, LONG, LONG)
    try:
        wait_for(processes[0], "checkpoint of step 10")
        processes[1].send_signal(signal.SIGSTOP)
        started = time.monotonic()
        out, _ = processes[0].communicate(timeout=90)
        assert time.monotonic() - started < 60
        assert processes[0].returncode != 0
        assert LOST.search(out), out
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.slow
def test_signal_to_one_process_stops_all_in_an_evaluation(config_file, tmp_path):
    """Send SIGTERM to one process while the step of the last evaluation is compiled."""
    flags = ("--config.max_steps=2", "--config.eval_views=10")
    process = launch(config_file, tmp_path, 2, *flags)
    wait_for(process, "compiling the evaluation step")
    os.kill(pid_of(tmp_path, 1), signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, out
    assert "[1] SIGTERM: stopping after this step, or this batch" in out
    assert "[0] stopped at step 2 by SIGTERM" in out
    assert not [row for row in scalars(tmp_path) if "eval/" in row[1]]
    out = run_together(config_file, tmp_path, 2, *flags)
    assert "nothing to do" in out
    assert len([row for row in scalars(tmp_path) if row[1] == "eval/views_loss"]) == 1


def test_user_error_ends_all_processes_and_writes_nothing(config_file, tmp_path):
    workdir = tmp_path / "run"
    mesh = ("--config.parallel.data=2", "--config.parallel.column=2")
    process = launch(config_file, workdir, 2, *mesh)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    words = r"Asked for 4 devices \(2 data x 2 column\), found 2 \(cpu\) in 2 processes"
    assert len(re.findall(words, out)) == 2, out
    assert "Its own lines above say why" in out
    assert not workdir.exists()


@pytest.mark.slow
def test_processes_with_different_flags_are_refused(config_file, tmp_path):
    workdir = tmp_path / "run"
    processes = start_by_hand(config_file, workdir, ["--config.seed=0"], ["--config.seed=1"])
    outputs = [process.communicate(timeout=90)[0] for process in processes]
    assert all(process.returncode == 1 for process in processes)
    words = (
        "error: not all processes were started alike: process 1 has --config.seed=1 "
        "(process 0: 0). Start all with the same flags.\n"
    )
    assert all(words in output for output in outputs), outputs
    assert not (workdir / "config.json").exists()
