"""Several processes: what they are told, what they say, and that nothing changes.

The processes are real, on this machine, connected by gloo.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from test_train import folder  # noqa: F401, a fixture

from alexnet_jax import distributed
from alexnet_jax.distributed import DistributedError
from alexnet_jax.writers import read_metrics

ROOT = Path(__file__).parent.parent
LAUNCHER = ROOT / "launch" / "multiprocess.py"
# With LLVM's cheap passes (conftest.py): without any a float64 step takes a second.
ENVIRONMENT = {
    **os.environ,
    "JAX_ENABLE_X64": "1",
    "PYTHONPATH": str(ROOT),
    "PYTHONUNBUFFERED": "1",
}
CONFIG = """
from configs import common


def get_config():
    config = common.get_config()
    config.data.source = "folder:{folder}"
    config.data.image_size, config.data.crop_size = 226, 224
    config.data.batch_size = 6
    config.model.width, config.model.init = 1 / 32, "he"
    config.model.dtype = "float64"
    config.optim.learning_rate = 1e-3
    config.log_every_steps = 1
    config.eval_every_epochs = 1.0
    config.num_epochs = 400.0
    config.max_steps = 8
    config.parallel.mode = "columns"
    return config
"""


@pytest.fixture(scope="module")
def config_file(folder, tmp_path_factory):  # noqa: F811
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(CONFIG.format(folder=folder))
    return path


def main_command(config_file, workdir, *more):
    return [
        *(sys.executable, "-m", "alexnet_jax.main"),
        *(f"--config={config_file}", f"--workdir={workdir}", *more),
    ]


def run(command):
    return subprocess.run(
        command,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def run_alone(config_file, workdir, devices, *more):
    """One process on so many devices."""
    done = run(main_command(config_file, workdir, f"--cpu_devices={devices}", *more))
    assert done.returncode == 0, done.stderr
    return done.stdout


def launch(config_file, workdir, count, *more):
    """launch/multiprocess.py, started."""
    arguments = main_command(config_file, workdir, *more)[3:]
    return subprocess.Popen(
        [sys.executable, LAUNCHER, "-n", str(count), "--", *arguments],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_by_hand(config_file, workdir, *flags_of_each):
    """The processes of a run, without the launcher."""
    port = free_port()
    return [
        subprocess.Popen(
            main_command(
                *(config_file, workdir, "--cpu_devices=1", *flags),
                f"--coordinator_address=127.0.0.1:{port}",
                *(f"--num_processes={len(flags_of_each)}", f"--process_id={index}"),
            ),
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index, flags in enumerate(flags_of_each)
    ]


def run_together(config_file, workdir, count, *more):
    process = launch(config_file, workdir, count, *more)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    return out


def scalars(workdir):
    """(step, name, value) of every loss and error, in the order of the file."""
    return [
        (row["step"], name, value)
        for row in read_metrics(workdir / "metrics.jsonl")
        for name, value in row.items()
        if "/" in name
    ]


def assert_same_scalars(got, want):
    assert [row[:2] for row in got] == [row[:2] for row in want]
    np.testing.assert_allclose(
        [row[2] for row in got], [row[2] for row in want], rtol=1e-10
    )


def of_training(rows, last_step):
    """Without evaluations: a run that stops has one more."""
    return [row for row in rows if "train/" in row[1] and row[0] <= last_step]


@pytest.fixture(scope="module")
def alone(config_file, tmp_path_factory):
    """Twelve steps of one process on two devices."""
    workdir = tmp_path_factory.mktemp("alone")
    run_alone(config_file, workdir, 2, "--config.max_steps=12")
    return scalars(workdir)


@pytest.fixture(scope="module")
def together(config_file, tmp_path_factory):
    """Eight steps of two processes with a device each: workdir and output."""
    workdir = tmp_path_factory.mktemp("together")
    return workdir, run_together(config_file, workdir, 2)


def test_two_processes_are_one(alone, together):
    workdir, out = together
    got, want = scalars(workdir), of_training(alone, 8)
    assert_same_scalars(of_training(got, 8), want)
    assert len(want) == 2 * 8
    evaluations = [row for row in alone if "eval/" in row[1] and row[0] <= 8]
    assert_same_scalars(
        [r for r in got if r[:2] in [e[:2] for e in evaluations]], evaluations
    )
    assert len(evaluations) == 4
    host = socket.gethostname()
    for index in range(2):
        banner = f"[{index}] process {index} of 2 on {host}: 1 of 2 devices; mode "
        # The columns of a row read the same pictures.
        what = "columns, 1 data x 2 column, examples 0 to 5 of each batch"
        assert banner + what in out
    # Process 0 alone writes and speaks.
    assert len(list(workdir.glob("events.out.tfevents.*"))) == 1
    assert not re.search(r"^\[1\] (step|checkpoint|compil)", out, re.MULTILINE)


@pytest.mark.slow
def test_what_two_processes_wrote_one_reads_and_the_other_way_round(
    config_file, alone, together, tmp_path
):
    workdir = tmp_path / "moved"
    shutil.copytree(together[0], workdir)
    out = run_alone(config_file, workdir, 1, "--config.max_steps=10")
    assert "resuming from step 8" in out
    out = run_together(config_file, workdir, 2, "--config.max_steps=12")
    assert "resuming from step 10" in out
    assert_same_scalars(of_training(scalars(workdir), 12), of_training(alone, 12))


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode, parts", [("data", ("0 to 2", "3 to 5")), ("hybrid", ("0 to 2", "3 to 5"))]
)
def test_two_processes_are_one_in_the_other_modes(
    mode, parts, config_file, alone, tmp_path
):
    out = run_together(config_file, tmp_path, 2, f"--config.parallel.mode={mode}")
    assert_same_scalars(of_training(scalars(tmp_path), 8), of_training(alone, 8))
    for index, part in enumerate(parts):  # each row reads its own part
        assert re.search(rf"\[{index}\] process {index} .*examples {part} of each", out)


@pytest.mark.slow
def test_four_processes_in_rows_of_columns(config_file, alone, tmp_path):
    out = run_together(config_file, tmp_path, 4)
    assert_same_scalars(of_training(scalars(tmp_path), 8), of_training(alone, 8))
    parts = re.findall(r"process (\d) of 4 .*examples (\d to \d)", out)
    expected = {"0": "0 to 2", "1": "0 to 2", "2": "3 to 5", "3": "3 to 5"}
    assert dict(parts) == expected


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
    assert not [out for out in outs if "Traceback" in out or "ERROR" in out]


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


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


REFUSED = (
    r"127.0.0.1:\d+ \(process 0\) could not be reached within 2 seconds \(Conn.* r"
)


@pytest.mark.parametrize(
    "host, index, words",
    [
        ("127.0.0.1", 1, REFUSED),
        ("no.such.host.invalid", 1, "could not be reached within 2 seconds"),
        ("127.0.0.1", 0, "not all of 2 processes came within 2 seconds"),
    ],
)
def test_a_process_that_stays_alone_says_so_in_time(
    host, index, words, config_file, tmp_path
):
    command = main_command(
        *(config_file, tmp_path, f"--coordinator_address={host}:{free_port()}"),
        *("--num_processes=2", f"--process_id={index}", "--connect_seconds=2"),
        "--cpu_devices=1",
    )
    done = run(command)
    assert done.returncode == 1
    message = done.stderr.strip().splitlines()[-1]
    assert re.match(rf"error: process {index}: .*{words}", message)
    assert "--connect_seconds changes" in message
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(DistributedError, match=f"cannot listen on port {port}"):
            distributed.start(
                coordinator_address=f"localhost:{port}", num_processes=2, process_id=0
            )


SRUN = {
    "SLURM_STEP_NODELIST": "node[1-3]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),1",
    "SLURM_NTASKS": "9",
    "SLURM_NODEID": "2",
    "SLURM_LOCALID": "0",
}


@pytest.mark.parametrize(
    "arguments, environment, words",
    [
        ({"mode": "on"}, {}, "missing: --coordinator_address, --num_proc.* --process_id"),
        ({"num_processes": 2}, {}, "missing: --coordinator_address, --process_id"),
        ({"num_processes": 2}, SRUN, "missing: --coordinator_address, --process_id"),
        ({"mode": "off", "process_id": 1}, {}, "contradict each other"),
        ({"mode": "maybe"}, {}, "must be one of auto, on, off"),
        ({"coordinator_address": "host", "num_processes": 2, "process_id": 0}, {},
         "--coordinator_address=host must be HOST:PORT"),
        ({"coordinator_address": "host:1", "num_processes": 2, "process_id": 2}, {},
         "--process_id=2 must be 0 to 1"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_together(arguments, environment, words, monkeypatch):
    for name in SRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DistributedError, match=words):
        distributed.start(**arguments)


def test_one_process_is_not_connected(monkeypatch):
    monkeypatch.delenv("SLURM_STEP_NODELIST", raising=False)
    assert distributed.start() is False
    assert distributed.start("off") is False
    for name, value in {**SRUN, "SLURM_NTASKS": "1"}.items():
        monkeypatch.setenv(name, value)
    assert distributed.start() is False


def test_what_slurm_and_open_mpi_say():
    tasks = distributed._tasks(SRUN)
    assert (tasks.count, tasks.on_node, tasks.local_id) == (9, 1, 0)
    first = distributed._tasks({**SRUN, "SLURM_NODEID": "0", "SLURM_LOCALID": "3"})
    assert (first.on_node, first.local_id) == (4, 3)
    # In a batch script, outside srun, there is no step.
    assert distributed._tasks({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "9"}) is None
    open_mpi = {
        "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1",
        "OMPI_COMM_WORLD_SIZE": "4",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    }
    tasks = distributed._tasks(open_mpi)
    assert (tasks.count, tasks.on_node, tasks.local_id) == (4, 2, 1)


def test_shares_of_a_nodes_gpus():
    assert distributed.share_of_gpus(4, 4, 3) == [3]
    assert distributed.share_of_gpus(8, 2, 1) == [4, 5, 6, 7]
    assert distributed.share_of_gpus(8, 1, 0) is None  # one process a node: all
    assert distributed.share_of_gpus(1, 4, 3) is None  # bound by the launcher
    assert distributed.share_of_gpus(8, None, 0) is None
    with pytest.raises(DistributedError, match="3 processes on this node and 4 GPUs"):
        distributed.share_of_gpus(4, 3, 0)


@pytest.fixture
def three_gpus(tmp_path, monkeypatch):
    """A stand-in for nvidia-smi that knows of three GPUs."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nprintf 'GPU-aa\\nGPU-bb\\nGPU-cc\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


def test_visible_gpus_are_cudas(three_gpus, monkeypatch):
    def see(text):
        return distributed.visible_gpus({"CUDA_VISIBLE_DEVICES": text})

    assert distributed.visible_gpus({}) == ["GPU-aa", "GPU-bb", "GPU-cc"]
    assert see("2,0") == ["GPU-cc", "GPU-aa"]
    assert see("GPU-b") == ["GPU-bb"]
    assert see("1,7,0") == ["GPU-bb"]  # CUDA stops at what is not there
    assert see("") == []
    assert see("MIG-1") == ["MIG-1"]
    monkeypatch.setenv("PATH", "")
    assert distributed.visible_gpus({}) is None


class Stored:
    """The part of jax's client that is used, with what the others have stored."""

    def __init__(self, others):
        self.values = {
            f"alexnet_jax/gpus/{i}": json.dumps(g) for i, g in others.items()
        }

    def key_value_set(self, key, value):
        self.values[key] = value

    def wait_at_barrier(self, name, milliseconds):
        pass

    def key_value_dir_get(self, prefix):
        return list(self.values.items())


def settle(monkeypatch, others, *, this, asked=None, tasks=None, visible=None):
    """What `_settle_gpus` makes of the others' GPUs: the jax setting afterwards."""
    client = Stored(others)
    state = SimpleNamespace(client=client, process_id=this)
    monkeypatch.setattr(distributed.jax_distributed, "global_state", state)
    settings = {}
    monkeypatch.setattr(distributed.jax.config, "update", settings.__setitem__)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    distributed._settle_gpus(asked, tasks)
    return settings.get("jax_cuda_visible_devices"), client.values


def test_two_processes_on_one_gpu_are_named(three_gpus, monkeypatch):
    words = "processes 0 and 1 are both on GPU-bb. Give each its own"
    with pytest.raises(DistributedError, match=words):
        settle(monkeypatch, {0: ["GPU-aa", "GPU-bb"]}, this=1, asked=[1])
    _, stored = settle(monkeypatch, {0: ["GPU-aa"]}, this=1, asked=[1])
    assert json.loads(stored["alexnet_jax/gpus/1"]) == ["GPU-bb"]
    # Without nvidia-smi nothing is known, and nothing said.
    monkeypatch.setenv("PATH", "")
    assert settle(monkeypatch, {0: ["GPU-aa"]}, this=1) == (None, {
        "alexnet_jax/gpus/0": '["GPU-aa"]'
    })  # fmt: skip


def test_under_slurm_each_process_takes_its_share(three_gpus, monkeypatch):
    tasks = distributed._Tasks(count=6, on_node=3, local_id=2)
    chosen, stored = settle(monkeypatch, {}, this=5, tasks=tasks)
    assert chosen == "2"
    assert json.loads(stored["alexnet_jax/gpus/5"]) == ["GPU-cc"]
    # Bound to one GPU by SLURM, jax would look for the third of one.
    chosen, stored = settle(monkeypatch, {}, this=5, tasks=tasks, visible="1")
    assert chosen == "all"
    assert json.loads(stored["alexnet_jax/gpus/5"]) == ["GPU-bb"]
    alone = distributed._Tasks(count=2, on_node=1, local_id=0)
    chosen, stored = settle(monkeypatch, {}, this=1, tasks=alone)
    assert chosen == "all"
    assert len(json.loads(stored["alexnet_jax/gpus/1"])) == 3


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
