"""launch/slurm.sbatch under a real SLURM of one node, started for these tests."""

# ruff: noqa: F401, F811  (the fixture of another file)

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from alexnet_jax.training.distributed import count_tasks
from alexnet_jax.training.writers import read_metrics
from tests.training.test_distributed import config_file

pytestmark = pytest.mark.nightly

ROOT = Path(__file__).parents[2]
NODE = ROOT / "tests" / "slurm_node.sh"
LAUNCH = ROOT / "launch" / "slurm.sbatch"
PROGRAMS = ("sbatch", "srun", "slurmctld", "slurmd", "munged")
OUTER = ("SLURM_", "SBATCH_", "SRUN_")
FINAL_STATES = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
# Two tasks without GPUs, each on a core.
REHEARSAL = ("--gres=none", "--cpus-per-task=1")

STEPS = 84
FIELDS = (
    *("--config.model.dtype=float32", f"--config.max_steps={STEPS}", "--config.log_every_steps=2"),
    *("--config.schedule.name=constant", "--config.eval_every_epochs=0"),
)

# Replaces the interpreter: prints its arguments, and on a signal task 1 takes two seconds
# longer than task 0 for its checkpoint. A restarted one ends.
STAND_IN = """#!/usr/bin/env bash
say() { echo "task $SLURM_PROCID: $*"; }
stop() { sleep $((2 * SLURM_PROCID)); say "checkpoint after $1"; exit "$2"; }
trap 'stop USR1 138' USR1
trap 'stop TERM 143' TERM
say "started with $*"
if [ -n "${SLURM_RESTART_COUNT:-}" ]; then exit 0; fi
for status; do :; done  # the last argument
case $status in --exit=*) exit "${status#--exit=}" ;; esac
while true; do sleep 0.1; done
"""


def require_slurm():
    """Skip the test if SLURM or the right to start its daemons is missing."""
    # The daemons are in sbin, which not every PATH has.
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)}: install Debian's packages slurm-wlm and munge")
    if os.getuid() != 0:
        pytest.skip("SLURM's daemons are started for the test, which takes root")


class Slurm:
    """Run commands on the node of the tests, and read what its jobs print."""

    def __init__(self, place):
        self.environment = {
            # Without the variables of a job that runs these tests.
            **{k: v for k, v in os.environ.items() if not k.startswith(OUTER)},
            "SLURM_CONF": f"{place}/slurm.conf",
        }

    def run(self, *command, **environment):
        done = subprocess.run(
            [str(part) for part in command],
            cwd=ROOT,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def submit(self, output, *command, **environment):
        """Submit a job that writes to the file `output`; return its id."""
        sbatch = ("sbatch", "--parsable", f"--output={output}")
        return self.run(*sbatch, *command, **environment)

    def job(self, job):
        """Return the fields that `scontrol show job` prints."""
        text = self.run("scontrol", "--oneliner", "show", "job", job)
        names = "JobState|Reason|Restarts|ExitCode|PreemptTime"
        return dict(re.findall(rf" ({names})=(\S+)", text))

    def wait(self, job, condition, output, *, seconds=60):
        """Wait until condition(fields of the job); fail with the job's output."""
        deadline = time.monotonic() + seconds
        while True:
            fields = self.job(job)
            if condition(fields):
                return fields
            state = fields["JobState"]
            ended = state in FINAL_STATES
            if ended or time.monotonic() > deadline:
                why = f"job {job} is {state}" if ended else f"waited {seconds} s"
                said = output.read_text() if output.exists() else "nothing"
                pytest.fail(f"{why}\n{fields}\nthe end of its output:\n{said[-4000:]}")
            time.sleep(0.2)

    def wait_for_requeue(self, job, output):
        """Wait until the job is requeued, and start it without SLURM's two minutes of delay."""

        def requeued(fields):
            return fields["Restarts"] == "1" and fields["JobState"] == "PENDING"

        self.wait(job, requeued, output)
        # Later than in the second of its end, by which credentials are distinguished.
        self.run("scontrol", "update", f"jobid={job}", "StartTime=now+2")

    def wait_for_state(self, job, state, output, *, seconds=60):
        return self.wait(job, lambda fields: fields["JobState"] == state, output, seconds=seconds)


@pytest.fixture(scope="module")
def slurm():
    require_slurm()
    # pytest's folder is too long: names of sockets may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="slurm-") as place:
        try:
            # Into a file: the daemons would keep a pipe open.
            with open(Path(place) / "start.log", "w+") as log:
                command = [NODE, "start", place]
                done = subprocess.run(command, stdout=log, stderr=log, timeout=60, check=False)
                log.seek(0)
                assert done.returncode == 0, log.read()
            yield Slurm(place)
        finally:
            subprocess.run([NODE, "stop", place], timeout=60, check=True)


@pytest.fixture
def stand_in(tmp_path):
    path = tmp_path / "python"
    path.write_text(STAND_IN)
    path.chmod(0o755)
    return {"PYTHON": str(path)}


def said(output, pattern):
    return re.findall(pattern, output.read_text()) if output.exists() else []


def wait_until_started(slurm, job, output):
    slurm.wait(job, lambda _: len(said(output, "started with")) == 2, output)


def test_every_task_finishes_before_the_job_is_requeued(slurm, stand_in, tmp_path):
    output = tmp_path / "out"
    job = slurm.submit(output, *REHEARSAL, LAUNCH, "--mode=x", "--a=b c", **stand_in)
    wait_until_started(slurm, job, output)
    slurm.run("scancel", "--signal=USR1", job)
    slurm.wait_for_requeue(job, output)
    slurm.wait_for_state(job, "COMPLETED", output)
    for task in range(2):
        arguments = "-m alexnet_jax.main --distributed=on --mode=x --a=b c"
        # Twice the same: the job and its successor.
        assert len(said(output, f"task {task}: started with {arguments}\n")) == 2
        assert said(output, f"task {task}: checkpoint after USR1")
    assert len(said(output, "requeueing job")) == 1


def test_a_preempted_job_is_requeued(slurm, stand_in, tmp_path):
    output = tmp_path / "out"
    job = slurm.submit(output, *REHEARSAL, LAUNCH, **stand_in)
    wait_until_started(slurm, job, output)
    command = ("--partition=urgent", "--ntasks=2", "--wrap=true")
    urgent = slurm.submit(tmp_path / "urgent", *command)
    slurm.wait_for_requeue(job, output)
    slurm.wait_for_state(urgent, "COMPLETED", tmp_path / "urgent")
    slurm.wait_for_state(job, "COMPLETED", output)
    for task in range(2):
        assert said(output, f"task {task}: checkpoint after TERM")


def test_a_job_stopped_by_its_user_stays_stopped(slurm, stand_in, tmp_path):
    output = tmp_path / "out"
    job = slurm.submit(output, *REHEARSAL, LAUNCH, **stand_in)
    wait_until_started(slurm, job, output)
    slurm.run("scancel", "--signal=TERM", job)
    fields = slurm.wait_for_state(job, "FAILED", output)
    assert fields["ExitCode"] == "143:0"
    assert fields["Restarts"] == "0"


def test_an_exit_status_is_passed_on(slurm, stand_in, tmp_path):
    output = tmp_path / "out"
    # One task is no cluster.
    one = ("--ntasks-per-node=1", *REHEARSAL)
    job = slurm.submit(output, *one, LAUNCH, "--exit=3", **stand_in)
    fields = slurm.wait_for_state(job, "FAILED", output)
    assert fields["ExitCode"] == "3:0"
    assert said(output, "task 0: started with -m alexnet_jax.main --distributed=off")


def test_srun_step_of_one_task_is_one_process(slurm):
    def found(*srun):
        lines = slurm.run("salloc", "--ntasks=2", "srun", *srun, "env").splitlines()
        return count_tasks(dict(line.split("=", 1) for line in lines if "=" in line))

    assert found() == 2
    assert found("--ntasks=1") == 1
    # The shell that salloc opens, by LaunchParameters=use_interactive_step.
    assert found("--interactive", "--preserve-env") == 1


def test_missing_interpreter_is_reported(slurm, tmp_path):
    output = tmp_path / "out"
    job = slurm.submit(output, *REHEARSAL, LAUNCH, PYTHON="no/python")
    fields = slurm.wait_for_state(job, "FAILED", output)
    assert fields["ExitCode"] == "1:0"
    assert said(output, "error: no no/python in ")


def logged_steps(workdir):
    path = workdir / "metrics.jsonl"
    rows = read_metrics(path) if path.exists() else []
    return [row["step"] for row in rows if "train/loss" in row]


def test_a_run_goes_on_after_the_time_limit(slurm, config_file, tmp_path):
    output, workdir = tmp_path / "out", tmp_path / "run"
    job = slurm.submit(
        output,
        *REHEARSAL,
        LAUNCH,
        f"--config={config_file}",
        f"--workdir={workdir}",
        "--cpu_devices=1",
        *FIELDS,
        PYTHON=sys.executable,
        JAX_DISABLE_MOST_OPTIMIZATIONS="1",
    )
    slurm.wait(job, lambda _: len(logged_steps(workdir)) >= 3, output, seconds=120)
    slurm.run("scancel", "--signal=USR1", job)  # to the tasks, as at the limit
    slurm.wait_for_requeue(job, output)
    (stopped,) = said(output, r"stopped at step (\d+) by SIGUSR1")
    assert 6 <= int(stopped) < STEPS
    assert list((workdir / "checkpoints").glob(f"*{stopped}*"))
    assert sorted(said(output, r"process (\d) of 2 on ")) == ["0", "1"]
    fields = slurm.wait_for_state(job, "COMPLETED", output, seconds=120)
    assert fields["Restarts"] == "1"
    assert said(output, r"resuming from step (\d+)") == [stopped]
    # No step is repeated or missing.
    expected = {*range(2, STEPS + 1, 2), int(stopped)}
    assert logged_steps(workdir) == sorted(expected)
