"""Run a sweep of configs/sweeps/ and summarise it beside the published figures.

    python launch/sweep.py configs/sweeps/lrn.py --out=DIR [--seeds=0,1,2] [--jobs=2]

trains every row with every seed, each run in a process of its own, and writes
DIR/summary.{md,csv,png}, DIR/sweep.json, and in DIR/runs/ the workdirs with their
log.txt. The same command again skips finished runs and resumes interrupted ones.
`--set data.source=folder:PATH num_epochs=2.0` changes config fields of all runs.
`--dry_run` only prints the commands.

`--slurm` submits each run as a job of launch/slurm.sbatch, one process with one GPU,
and waits for all of them; `--slurm="--gres=gpu:2 --time=08:00:00"` passes options to
sbatch.

Exit status: 0; 1 if a run is broken; 130 after Ctrl-C or SIGTERM, once the runs have
written their checkpoints.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from alexnet_jax.sweeps import summary
from alexnet_jax.sweeps.plan import ROOT, Measurement, Metric, Plan, Run, SweepError
from alexnet_jax.system import machine, signals
from alexnet_jax.system.cli import path_argument, require_writable
from alexnet_jax.system.files import atomic_write, exclusive_lock
from alexnet_jax.training.config import ConfigError, as_json, flat
from alexnet_jax.training.experiment import DIVERGED
from alexnet_jax.training.load import run_file
from alexnet_jax.training.workdir import CHECKPOINTS, from_stored, read_config
from alexnet_jax.training.writers import METRICS_FILE, read_metrics

POLL_SECONDS = 0.5
# Lines of a broken run's log that are shown if none of them begins with "error:".
LAST_LINES = 3
LOCK, STATUS, LOG, SUBMITTED = ".lock", "status.json", "log.txt", "sbatch.txt"


@dataclass
class Job:
    """A run in a process of its own.

    Attributes:
      folder: its workdir, with its log.
      command: its command line.
      metric: what is read from a finished run.
      state: waiting, running, finished, diverged (the loss was not finite), broken or
        stopped.
      result: of a finished run.
      error: why it is broken or has diverged.
      process: of a running job; under SLURM `sbatch --wait`.
      started: time.time() of its start.
      log_offset: the byte of the log at which this start begins.
    """

    run: Run
    folder: Path
    command: list[str]
    metric: Metric
    state: str = "waiting"
    result: Measurement | None = None
    error: str = ""
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    log_offset: int = 0

    def take_over(self) -> None:
        """Continue from the state that an earlier sweep left.

        Raises:
          SweepError: the folder is of other settings, or its SLURM job still exists.
        """
        status = self.read_status()
        stored = read_config(self.folder)
        if stored is not None and (status or (self.folder / CHECKPOINTS).exists()):
            fields = flat(as_json(from_stored(stored)))
            differences = "".join(
                f"  --config.{name}: {fields[name]} there, {value} asked for\n"
                for name, value in sorted(self.run.fields.items())
                if fields[name] != value
            )
            if differences:
                raise SweepError(
                    f"{self.folder} is of other settings:\n{differences}Ask for the same "
                    "ones, take a new --out, or remove that folder."
                )
        if status:
            self.state, self.error = status["state"], status.get("error", "")
        elif self._is_queued():
            raise SweepError(
                f"{self.folder}: SLURM job {self._slurm_id()} of an earlier sweep is still "
                "queued or running. Wait for it, or scancel it."
            )
        if self.state == "finished":
            self._measure()

    def start(self) -> None:
        """Start its process, or submit it to SLURM."""
        self.folder.mkdir(parents=True, exist_ok=True)
        log, submitted = self.folder / LOG, self.folder / SUBMITTED
        self.log_offset = log.stat().st_size if log.exists() else 0
        submitted.unlink(missing_ok=True)
        environment = {
            "PYTHON": sys.executable,  # for slurm.sbatch
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "PYTHONUNBUFFERED": "1",
        }
        # SLURM writes the log itself; sbatch prints the job's number.
        with open(submitted if self.command[0] == "sbatch" else log, "ab") as stream:
            self.process = subprocess.Popen(
                self.command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                # Ctrl-C at the terminal reaches the sweep only, which passes it on.
                start_new_session=True,
            )
        self.state, self.started = "running", time.time()

    def stop(self) -> None:
        """Ask the process, or SLURM's job, to write a checkpoint and end."""
        if job_id := self._slurm_id():
            subprocess.run(["scancel", job_id], check=False)
        elif self.process is not None:
            self.process.terminate()

    def end(self, status: int, *, stopping: bool) -> None:
        """Record how the process has ended; `stopping`: it was asked to."""
        if status == 0:
            self.state = "finished"
            self._measure()
        elif status == DIVERGED or not stopping:
            self.state = "diverged" if status == DIVERGED else "broken"
            self.error = self.last_words(status)
        else:
            self.state = "stopped"
        if self.state in ("finished", "diverged"):
            about = {
                "state": self.state,
                "command": machine.without_paths(self.command[1:]),
                "seconds": round(time.time() - self.started, 1),
                "versions": machine.versions(),
                **({"error": self.error} if self.error else {}),
            }
            with atomic_write(self.folder / STATUS) as file:
                file.write(json.dumps(about, indent=1).encode() + b"\n")

    def read_status(self) -> dict[str, Any]:
        """Return the content of status.json; {} for a run that has not ended."""
        path = self.folder / STATUS
        return json.loads(path.read_text()) if path.exists() else {}

    def last_words(self, status: int) -> str:
        """Return the end of the log, from its last "error:" on, and the signal if any."""
        text = b""
        for name, offset in ((SUBMITTED, 0), (LOG, self.log_offset)):
            path = self.folder / name
            text += path.read_bytes()[offset:] if path.exists() else b""
        lines = text.decode("utf-8", "replace").strip().splitlines()
        lines = lines or [f"(exit status {status}, nothing in its log)"]
        starts = [i for i, line in enumerate(lines) if line.startswith("error:")]
        shown = lines[starts[-1] if starts else -LAST_LINES :]
        if status < 0:
            name = signal.Signals(-status).name
            hint = ", perhaps for want of memory" if name == "SIGKILL" else ""
            shown = [f"killed by {name}{hint}; the end of its log:", *shown]
        return "\n".join(shown)

    def _measure(self) -> None:
        """Read the result of a finished run; without one it is broken."""
        path = self.folder / METRICS_FILE
        self.result = self.metric.measure(read_metrics(path)) if path.exists() else None
        if self.result is None:
            self.state, self.error = "broken", f"{path} has no record for {self.metric}."

    def _slurm_id(self) -> str:
        """Return the job number that `sbatch --parsable` printed; "" without one."""
        path = self.folder / SUBMITTED
        found = re.match(r"\s*([0-9]+)(;\S*)?\s", path.read_text() if path.exists() else "")
        return found[1] if found else ""

    def _is_queued(self) -> bool:
        """Return True if SLURM still has the job of an earlier sweep."""
        if not self._slurm_id() or not shutil.which("squeue"):
            return False
        command = ["squeue", "--noheader", f"--jobs={self._slurm_id()}"]
        return bool(subprocess.run(command, capture_output=True, check=False).stdout.strip())


def make_jobs(plan: Plan, out: Path, slurm: str | None) -> list[Job]:
    """Return the runs of a plan as jobs in `out`.

    Args:
      slurm: options for sbatch; None: the runs are this machine's own.
    """
    jobs = []
    for run in plan.runs:
        folder = out / "runs" / run.name
        command = [sys.executable, "-m", "alexnet_jax.main"]
        if slurm is not None:
            command = [
                *("sbatch", "--wait", "--parsable", "--nodes=1", "--ntasks-per-node=1"),
                *("--gres=gpu:1", f"--job-name={run.name}", f"--output={folder.absolute() / LOG}"),
                *shlex.split(slurm),
                str(ROOT / "launch" / "slurm.sbatch"),
            ]
        command += [f"--workdir={folder.absolute()}", *run.flags()]
        jobs.append(Job(run, folder, command, plan.sweep.metric))
    return jobs


def work(jobs: Sequence[Job], at_a_time: int) -> bool:
    """Run the jobs that wait; return True if a signal ended it."""
    waiting = [job for job in jobs if job.state == "waiting"]
    running: list[Job] = []
    stopping = False
    bar = tqdm(total=len(jobs), initial=len(jobs) - len(waiting), unit="run", disable=None)
    with signals.stop_requests() as stop, bar:
        while running or (waiting and not stopping):
            if stop.signal and not stopping:
                stopping = True
                for job in running:
                    job.stop()
            while waiting and not stopping and len(running) < at_a_time:
                running.append(waiting.pop(0))
                running[-1].start()
                bar.write(f"running: {running[-1].run.name}")
            time.sleep(POLL_SECONDS)
            for job in list(running):
                status = job.process.poll() if job.process else None
                if status is not None:
                    running.remove(job)
                    job.end(status, stopping=stopping)
                    bar.write(f"{job.state}: {job.run.name}")
                    bar.update()
    return stopping


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing and summarise it; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("sweep", help="a file, for example configs/sweeps/lrn.py")
    add("--out", type=path_argument, required=True, help="folder of the sweep")
    add("--seeds", help="for example 0,1,2; default: the sweep's own")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--jobs", type=int, default=1, help="runs at a time on this machine")
    where.add_argument("--slurm", nargs="?", const="", metavar="OPTIONS", help="submit to SLURM")
    add("--dry_run", action="store_true", help="only print commands")
    about = "config fields of all runs"
    add("--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE", help=about)
    options = parser.parse_args(argv)
    try:
        return _run(options)
    except BrokenPipeError:
        raise
    except (SweepError, ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _run(options: argparse.Namespace) -> int:
    plan, out = _plan(options), options.out
    if options.jobs < 1:
        raise SweepError(f"--jobs={options.jobs} must be at least 1.")
    require_writable(out)
    jobs = make_jobs(plan, out, options.slurm)
    for job in jobs:
        job.take_over()
    if options.dry_run:
        for job in jobs:
            if job.state == "waiting":
                print(shlex.join(job.command))
        return 0
    out.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(out / LOCK, wait=False):
        at_a_time = options.jobs if options.slurm is None else len(jobs)
        interrupted = work(jobs, at_a_time)
        command = f"python launch/sweep.py {machine.without_paths(sys.argv[1:])}"
        page = summary.write(plan, jobs, out, command)
        print(f"\n{page}\nwrote {out}/summary.md, .csv, .png and {out}/sweep.json")
    broken = [job for job in jobs if job.state == "broken"]
    for job in broken:
        print(f"broken: {job.folder}\n{job.error}", file=sys.stderr)
    return 130 if interrupted else 1 if broken else 0


def _plan(options: argparse.Namespace) -> Plan:
    sweep = run_file(options.sweep, "get_sweep")
    seeds = sweep.seeds
    if options.seeds is not None:
        try:
            seeds = [int(seed) for seed in options.seeds.split(",")]
        except ValueError as error:
            raise SweepError(
                f"--seeds={options.seeds} must be numbers, for example 0,1,2."
            ) from error
    settings = {}
    for word in options.set:
        name, equals, value = word.partition("=")
        if not equals:
            raise SweepError(f"--set {word} must be FIELD=VALUE, as num_epochs=2.0.")
        settings[name] = value
    return Plan(Path(options.sweep.partition(":")[0]).stem, sweep, seeds, settings)
