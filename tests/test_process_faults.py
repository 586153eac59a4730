"""Several processes of which one is killed, frozen, stopped or started otherwise.

The processes are real, as in test_distributed.py.
"""

# ruff: noqa: F811, for the fixtures of other files
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_distributed import (
    ENVIRONMENT,
    ROOT,
    config_file,  # noqa: F401, a fixture
    free_port,
    launch,
    main_command,
    run_together,
    scalars,
    start_by_hand,
)
from test_train import folder  # noqa: F401, a fixture

from alexnet_jax import distributed
from alexnet_jax.writers import read_metrics


def wait_for(process, words, seconds=90):
    """Reads a process's output until a line holds `words`; returns all of it."""
    lines, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        line = process.stdout.readline()
        assert line, "".join(lines)  # it ended
        lines.append(line)
        if words in line:
            return "".join(lines)
    raise AssertionError("".join(lines))


def pid_of(workdir, index):
    """The process number `index` of the run in a workdir."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = entry.read_bytes().decode().split("\0")
        except OSError:
            continue
        mine = f"--workdir={workdir}" in arguments and "alexnet_jax.main" in arguments
        if mine and f"--process_id={index}" in arguments:
            return int(entry.parent.name)
    raise AssertionError(f"no process {index} in {workdir}")


# What the others say: the trainer, from an exchange that failed, or before it jax, from
# what the coordinator told it or no longer tells it.
LOST = re.compile(
    r"process \d: error: (another process|process 0 \(.*\)) is gone|another task died; see the other task"
)
LONG = ("--config.max_steps=600", "--config.checkpoint.every_steps=10")


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_run_and_the_same_command_resumes(
    killed, config_file, tmp_path
):
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
    again.send_signal(signal.SIGUSR1)
    out, _ = again.communicate(timeout=60)
    assert again.returncode == 128 + signal.SIGUSR1, out
    # Asked for in both processes, they stopped after the same step.
    assert re.search(r"\[0\] stopped at step \d+ by SIGUSR1", out)
    steps = [
        row["step"] for row in read_metrics(tmp_path / "metrics.jsonl") if "lr" in row
    ]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.slow
def test_a_frozen_process_is_found_by_its_missing_heartbeat(config_file, tmp_path):
    """A machine that is gone closes no connection. No launcher here that could tell."""
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
def test_one_signal_to_one_process_stops_all_after_the_same_step(config_file, tmp_path):
    process = launch(config_file, tmp_path, 2, *LONG)
    wait_for(process, "checkpoint of step 10")
    os.kill(pid_of(tmp_path, 1), signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, out
    assert re.search(r"\[0\] stopped at step \d+ by SIGTERM", out)


@pytest.mark.slow
def test_a_signal_in_an_evaluation_cuts_it_short_for_all(config_file, tmp_path):
    """Sent to one process, while the step of the last evaluation is compiled."""
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


def test_a_process_that_waits_for_the_others_ends_at_once(config_file, tmp_path):
    address = f"127.0.0.1:{free_port()}"
    command = main_command(
        *(config_file, tmp_path / "run", f"--coordinator_address={address}"),
        *("--num_processes=2", "--process_id=0", "--cpu_devices=1"),
    )
    process = subprocess.Popen(
        command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    host, port = address.split(":")
    end = time.monotonic() + 60
    while time.monotonic() < end:  # until it listens
        with contextlib.suppress(ConnectionRefusedError):
            socket.create_connection((host, int(port))).close()
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert err == "stopped by SIGTERM; start the same command again\n"


def test_a_mistake_is_said_once_and_nothing_is_left(config_file, tmp_path):
    workdir = tmp_path / "run"
    mesh = ("--config.parallel.data=2", "--config.parallel.column=2")
    process = launch(config_file, workdir, 2, *mesh)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    words = r"Asked for 4 devices \(2 data x 2 column\), found 2 \(cpu\) in 2 processes"
    assert len(re.findall(words, out)) == 1, out
    assert "[1] process 1: error: the same as in process 0" in out
    assert "Its own lines above say why" in out
    assert not workdir.exists()


class Client:
    """The part of jax's client that leaving uses, with what process 0 has said."""

    def __init__(self, said):
        self.said = said

    def blocking_key_value_get(self, key, milliseconds):
        if self.said is None:
            raise RuntimeError("DEADLINE_EXCEEDED")
        return self.said

    def key_value_try_get(self, key):
        return self.blocking_key_value_get(key, 0)


@pytest.mark.parametrize("said", [None, "error: another mistake"])
def test_a_mistake_of_its_own_is_said_by_a_process_itself(said, monkeypatch, capsys):
    state = SimpleNamespace(process_id=1, client=Client(said))
    monkeypatch.setattr(distributed.jax_distributed, "global_state", state)
    monkeypatch.setattr(distributed.jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.os, "_exit", sys.exit)
    with pytest.raises(SystemExit):
        distributed.leave("error: no room", 1, all_say_it=True)
    assert capsys.readouterr().err == "process 1: error: no room\n"


# A disk that is full when process 0 makes a folder for which the others' threads wait.
FULL_DISK = """
import errno, os, sys
def refuse(event, arguments):
    if event == "os.mkdir" and "/state.orbax-checkpoint-tmp" in str(arguments[0]):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
sys.addaudithook(refuse)
"""


@pytest.mark.slow
def test_on_a_full_disk_all_processes_end_with_a_line(
    config_file, tmp_path, monkeypatch
):
    (tmp_path / "sitecustomize.py").write_text(FULL_DISK)
    monkeypatch.setitem(ENVIRONMENT, "PYTHONPATH", f"{ROOT}{os.pathsep}{tmp_path}")
    processes = start_by_hand(
        config_file, tmp_path / "run", *2 * [["--config.max_steps=1"]]
    )
    outs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [1, 1], outs
    last = [out.splitlines()[-1] for out in outs]
    assert re.match(r"process 0: error: no checkpoint of step 1: .* No space", last[0])
    assert re.match(r"process 1: error: process 0 is gone; its own output", last[1])


@pytest.mark.parametrize(
    ("process", "said", "left"),
    [(1, "error: no room", [1]), (1, None, []), (0, "error: no room", [])],
)
def test_who_waits_for_process_0_in_a_save_leaves_before_it(
    process, said, left, monkeypatch, capsys
):
    """XLA aborts, with a hundred lines, what is still there when process 0 is gone."""
    state = SimpleNamespace(process_id=process, client=Client(said))
    monkeypatch.setattr(distributed.jax_distributed, "global_state", state)
    monkeypatch.setattr(distributed.jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "LEAVE_SECONDS", 0.1)
    gone, statuses = threading.Event(), []

    def leave(status):
        statuses.append(status)
        gone.set()

    monkeypatch.setattr(distributed.os, "_exit", leave)
    with distributed.heeding_process_0():
        gone.wait(60 if left else 0.3)
    assert statuses == left
    words = "process 1: error: process 0 is gone; its own output says why."
    assert (words in capsys.readouterr().err) == bool(left)


def test_a_coordinator_that_is_gone_is_named(monkeypatch):
    lost = RuntimeError("Gloo all-gather: Connection closed by peer")
    with socket.create_server(("127.0.0.1", 0)) as coordinator:
        address = f"127.0.0.1:{coordinator.getsockname()[1]}"
        state = SimpleNamespace(process_id=1, coordinator_address=address)
        monkeypatch.setattr(distributed.jax_distributed, "global_state", state)
        said = distributed.describe_failure(lost)
        assert said.startswith("error: another process is gone (Gloo all-gather")
    said = distributed.describe_failure(lost)
    assert said.startswith(f"error: process 0 (the coordinator, {address}) is gone (Gl")
    assert said.endswith("goes on, from the last checkpoint if there is one.")


@pytest.mark.slow
def test_processes_that_were_started_differently_are_told(config_file, tmp_path):
    workdir = tmp_path / "run"
    processes = start_by_hand(
        config_file, workdir, ["--config.seed=0"], ["--config.seed=1"]
    )
    outputs = [process.communicate(timeout=90)[0] for process in processes]
    assert all(process.returncode for process in processes)
    assert (
        "process 0: error: not all processes were started alike: process 1 has "
        "--config.seed=1 (process 0: 0).\n"
    ) in outputs[0]
    assert "process 1: error: the same as in process 0" in outputs[1]
    assert not (workdir / "config.json").exists()
