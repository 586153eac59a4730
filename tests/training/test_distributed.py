"""Several processes of one run give the numbers of one process.

The processes are real, on this machine, connected by gloo.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from alexnet_jax.sweeps import plan
from alexnet_jax.training import distributed, loop, parallel
from alexnet_jax.training.distributed import DistributedError
from alexnet_jax.training.writers import read_metrics
from tests.training.small import NETWORK_OF_FILE, fast_loops

ROOT = Path(__file__).parents[2]
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
    config.data.image_size, config.data.crop_size = 50, 48
    config.data.batch_size = 6
    config.model.variant, config.model.init = "{network}", "he"
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
def config_file(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(CONFIG.format(folder=folder, network=NETWORK_OF_FILE))
    return path


def main_command(config_file, workdir, *more):
    return [
        *(sys.executable, "-m", "alexnet_jax.main"),
        *(f"--config={config_file}", f"--workdir={workdir}", *more),
    ]


def run(command):
    return subprocess.run(
        command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False
    )


def run_alone(config_file, workdir, columns, max_steps):
    """Train in this process, on `columns` of its devices."""
    changes = {"max_steps": max_steps, "parallel.data": 1, "parallel.column": columns}
    config = plan.make_config(str(config_file), changes, "")
    with jax.enable_x64(True), fast_loops():
        loop.train_and_evaluate(config, workdir)


def launch(config_file, workdir, count, *more):
    """Start launch/multiprocess.py."""
    arguments = main_command(config_file, workdir, *more)[3:]
    return subprocess.Popen(
        [sys.executable, LAUNCHER, "-n", str(count), "--", *arguments],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_by_hand(config_file, workdir, *flags_of_each):
    """Start the processes of a run without the launcher."""
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
    """Return (step, name, value) of every loss and error, in the order of the file."""
    return [
        (row["step"], name, value)
        for row in read_metrics(workdir / "metrics.jsonl")
        for name, value in row.items()
        if "/" in name
    ]


def assert_same_scalars(got, want):
    assert [row[:2] for row in got] == [row[:2] for row in want]
    np.testing.assert_allclose([row[2] for row in got], [row[2] for row in want], rtol=1e-10)


def training_rows(rows, last_step):
    """Return training records only: a run that stops has one more evaluation."""
    return [row for row in rows if "train/" in row[1] and row[0] <= last_step]


@pytest.fixture(scope="module")
def alone(config_file, tmp_path_factory):
    """Train twelve steps in one process on two devices; return `scalars`."""
    workdir = tmp_path_factory.mktemp("alone")
    run_alone(config_file, workdir, 2, 12)
    return scalars(workdir)


@pytest.fixture(scope="module")
def together(config_file, tmp_path_factory):
    """Train eight steps in two processes of one device each; return workdir and output."""
    workdir = tmp_path_factory.mktemp("together")
    return workdir, run_together(config_file, workdir, 2)


@pytest.mark.slow
def test_two_processes_equal_one(alone, together):
    workdir, out = together
    got, want = scalars(workdir), training_rows(alone, 8)
    assert_same_scalars(training_rows(got, 8), want)
    assert len(want) == 2 * 8
    evaluations = [row for row in alone if "eval/" in row[1] and row[0] <= 8]
    assert_same_scalars([r for r in got if r[:2] in [e[:2] for e in evaluations]], evaluations)
    assert len(evaluations) == 4
    host = socket.gethostname()
    for index in range(2):
        banner = f"[{index}] process {index} of 2 on {host}: 1 of 2 devices; mode "
        # The columns of a row read the same images.
        what = "columns, 1 data x 2 column, examples 0 to 5 of each batch"
        assert banner + what in out
    # Only process 0 writes and prints.
    assert len(list(workdir.glob("events.out.tfevents.*"))) == 1
    assert not re.search(r"^\[1\] (step|checkpoint|compil)", out, re.MULTILINE)


@pytest.mark.slow
def test_checkpoints_move_between_one_and_two_processes(
    config_file, alone, together, tmp_path, capsys
):
    workdir = tmp_path / "moved"
    shutil.copytree(together[0], workdir)
    run_alone(config_file, workdir, 1, 10)
    assert "resuming from step 8" in capsys.readouterr().out
    out = run_together(config_file, workdir, 2, "--config.max_steps=12")
    assert "resuming from step 10" in out
    assert_same_scalars(training_rows(scalars(workdir), 12), training_rows(alone, 12))


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param("hybrid", marks=pytest.mark.slow),
        pytest.param("data", marks=pytest.mark.nightly),
    ],
)
def test_two_processes_equal_one_in_the_other_modes(mode, config_file, alone, tmp_path):
    out = run_together(config_file, tmp_path, 2, f"--config.parallel.mode={mode}")
    assert_same_scalars(training_rows(scalars(tmp_path), 8), training_rows(alone, 8))
    for index, part in enumerate(("0 to 2", "3 to 5")):  # each row reads its own part
        assert re.search(rf"\[{index}\] process {index} .*examples {part} of each", out)


@pytest.mark.nightly
def test_four_processes_in_rows_of_columns(config_file, alone, tmp_path):
    out = run_together(config_file, tmp_path, 4)
    assert_same_scalars(training_rows(scalars(tmp_path), 8), training_rows(alone, 8))
    parts = re.findall(r"process (\d) of 4 .*examples (\d to \d)", out)
    expected = {"0": "0 to 2", "1": "0 to 2", "2": "3 to 5", "3": "3 to 5"}
    assert dict(parts) == expected


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("index", [0, 1])
def test_process_without_peers_times_out(index, config_file, tmp_path):
    address = f"127.0.0.1:{free_port()}"
    command = main_command(
        *(config_file, tmp_path, f"--coordinator_address={address}"),
        *("--num_processes=2", f"--process_id={index}", "--connect_seconds=2"),
        "--cpu_devices=1",
    )
    done = run(command)
    assert done.returncode == 1
    message = done.stderr.strip().splitlines()[-1]
    words = f"error: process {index}: not all of 2 processes came to {address} within 2 seconds."
    assert message.startswith(words)
    assert message.endswith("--connect_seconds=N waits longer.")
    assert "Traceback" not in done.stderr


def test_port_in_use_is_named():
    with socket.create_server(("", 0)) as taken:
        address = f"localhost:{taken.getsockname()[1]}"
        with pytest.raises(DistributedError, match="Address already in use.*free port"):
            distributed.start(coordinator_address=address, num_processes=2, process_id=0)


# Variables of a task of srun and of one of Open MPI 4.
SRUN = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NUM_TASKS": "9",
    "SLURM_STEP_NODELIST": "node[1-3]",
    "SLURM_NTASKS": "9",
    "SLURM_PROCID": "8",
    "SLURM_LOCALID": "0",
}
MPIRUN = {
    "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
# A shell that `salloc -n 9` opens; a batch script, outside of srun.
SALLOC = {**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}
BATCH = {name: value for name, value in SRUN.items() if "STEP" not in name}


def set_variables(monkeypatch, environment):
    """Set these variables of launchers, and unset all others."""
    for name in os.environ:
        if name.startswith(("SLURM_", "OMPI_", "KUBERNETES_")):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"num_processes": 2}, "missing: --coordinator_address, --process_id"),
        ({"mode": "off", "process_id": 1}, "off contradicts --process_id"),
        ({"coordinator_address": "host", "num_processes": 2, "process_id": 0},
         "need --coordinator_address=HOST:PORT"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused(arguments, words, monkeypatch):
    set_variables(monkeypatch, {})
    with pytest.raises(DistributedError, match=words):
        distributed.start(**arguments)


def test_missing_cluster_is_refused_with_the_flags_to_give(monkeypatch):
    set_variables(monkeypatch, {})

    def fail(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(distributed.jax.distributed, "initialize", fail)
    words = "should be defined. Several processes need --coordinator.* Open MPI 4"
    with pytest.raises(DistributedError, match=words):
        distributed.start("on")


@pytest.mark.parametrize(
    "mode, environment", [("auto", {}), ("auto", SALLOC), ("auto", BATCH), ("off", SRUN)]
)
def test_one_process_is_not_connected(mode, environment, monkeypatch):
    set_variables(monkeypatch, environment)
    assert distributed.start(mode) is False


@pytest.mark.parametrize(
    "gpus, environment, count, ids",
    [
        # Bound to its own GPU, which is number 0 of one.
        ("3", SRUN, 9, []),
        # JAX takes the GPU with the task's number on its node.
        ("0,1,2,3", SRUN, 9, None),
        ("", MPIRUN, 4, None),
        ("", SRUN | MPIRUN, 4, None),
        # One process for all GPUs of its node.
        (None, SRUN | {"SLURM_STEP_TASKS_PER_NODE": "1(x9)"}, 9, []),
        ("0,1", MPIRUN | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, 4, []),
    ],
)
def test_launcher_tasks_are_connected_by_jax(gpus, environment, count, ids, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    variable = {} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus}
    set_variables(monkeypatch, environment | variable)
    given = {}
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda **kw: given.update(kw))
    assert distributed.start() is True
    assert given["cluster_detection_method"] is None
    assert given["coordinator_address"] is given["process_id"] is None
    assert (given["num_processes"], given["local_device_ids"]) == (count, ids)


def test_an_empty_list_of_devices_means_all_of_them():
    """Check that JAX keeps the empty list, on which `start` relies."""
    from jax._src.clusters import ClusterEnv

    given = ClusterEnv.auto_detect_unset_distributed_params("host:1", 2, 0, [], "slurm", 1)
    assert given[3] == []


@pytest.mark.parametrize(
    "error, reason",
    [
        (AssertionError(), "no such device"),  # jax 0.10 for cuda without a GPU
        (RuntimeError("INTERNAL: Failed to open libtpu.so"), "INTERNAL: Failed to open libtpu.so"),
    ],
)
def test_devices_that_do_not_start_are_a_user_error(error, reason, monkeypatch):
    def fail():
        raise error

    monkeypatch.setattr(distributed.jax, "devices", fail)
    with pytest.raises(distributed.DeviceError) as raised:
        distributed.require_devices()
    words = f"starts no devices with JAX_PLATFORMS='cpu' ({reason}; installed: cpu"
    assert words in str(raised.value)


def test_results_of_votes_are_delayed(monkeypatch):
    mesh, nothing = parallel.make_mesh(1, 2), distributed.Vote(0, False)
    votes = distributed.Votes(mesh)
    assert votes.cast(distributed.Vote(15, True)) == (15, True)  # alone
    monkeypatch.setattr(distributed.jax, "process_count", lambda: 2)
    wishes = [distributed.Vote(15, False), *4 * [nothing]]
    results = [votes.cast(wish) for wish in wishes]
    assert results == [nothing, nothing, (15, False), nothing, nothing]
    # Each process asks for a save until there was one; votes still under way do not count.
    votes = distributed.Votes(mesh)
    wishes = [*3 * [distributed.Vote(0, True)], *3 * [nothing]]
    saves = [votes.cast(wish).save for wish in wishes]
    assert saves == [False, False, True, False, False, False]
