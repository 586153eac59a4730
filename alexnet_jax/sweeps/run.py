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

from alexnet_jax.sweeps import plan as plan_lib
from alexnet_jax.sweeps import summary
from alexnet_jax.sweeps.plan import Measurement, Plan, Run, SweepError
from alexnet_jax.system import machine, signals
from alexnet_jax.system.cli import path_argument, require_writable
from alexnet_jax.system.files import atomic_write, exclusive_lock
from alexnet_jax.training.config import ConfigError
from alexnet_jax.training.experiment import DIVERGED
from alexnet_jax.training.workdir import CHECKPOINTS, CONFIG_FILE
from alexnet_jax.training.writers import METRICS_FILE, parse_record, read_metrics

POLL_SECONDS = 0.5
SQUEUE_SECONDS = 30
# Lines of a broken run's log that are shown if none of them begins with "error:".
LAST_LINES = 3
TAIL_BYTES = 16384
LOCK, RUNS = ".lock", "runs"
STATUS, LOG, SUBMITTED = "status.json", "log.txt", "sbatch.txt"


@dataclass
class Job:
    """A run and its state.

    Attributes:
      folder: its workdir, with its log.
      state: waiting, running, finished, diverged (the loss was not finite), broken or
        stopped.
      process: of a running job; under SLURM `sbatch --wait`.
      started: time.time() of its start.
      log_offset: the byte of the log at which this start begins.
      error: why it is broken or has diverged.
      beaten: it was ended because another candidate of its search had won.
    """

    run: Run
    folder: Path
    state: str = "waiting"
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    log_offset: int = 0
    error: str = ""
    beaten: bool = False

    @property
    def ended(self) -> bool:
        """True if a later start of the sweep skips it."""
        return self.state in ("finished", "diverged", "broken")

    def read_status(self) -> dict[str, Any]:
        """Return the content of status.json; {} for a run that has not ended."""
        path = self.folder / STATUS
        return json.loads(path.read_text()) if path.exists() else {}

    def write_status(self, command: Sequence[str]) -> None:
        """Write status.json: how the run has ended."""
        about = {
            "state": self.state,
            "command": machine.without_paths(command[1:]),
            "seconds": round(time.time() - self.started, 1),
            "versions": machine.versions(),
            **({"beaten": True} if self.beaten else {}),
            **({"error": self.error} if self.error else {}),
        }
        with atomic_write(self.folder / STATUS) as file:
            file.write(json.dumps(about, indent=1).encode() + b"\n")

    def slurm_id(self) -> str:
        """Return the job number that `sbatch --parsable` printed; "" without one."""
        path = self.folder / SUBMITTED
        text = path.read_text() if path.exists() else ""
        found = re.match(r"\s*([0-9]+)(;\S*)?\s", text)
        return found.group(1) if found else ""

    def is_queued(self) -> bool:
        """Return True if SLURM still has the job of an earlier sweep."""
        if not self.slurm_id() or not shutil.which("squeue"):
            return False
        command = ["squeue", "--noheader", f"--jobs={self.slurm_id()}"]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=SQUEUE_SECONDS
        )
        return bool(done.stdout.strip())

    def last_words(self, status: int) -> str:
        """Return the end of the log, from its last "error:" on, and the signal if any."""
        found = b""
        for name, offset in ((LOG, self.log_offset), (SUBMITTED, 0)):
            path = self.folder / name
            if not found.strip() and path.exists():
                found = path.read_bytes()[offset:]
        lines = found.decode("utf-8", "replace").strip().splitlines()
        lines = lines or [f"(exit status {status}, nothing in its log)"]
        starts = [i for i, line in enumerate(lines) if line.startswith("error:")]
        shown = lines[starts[-1] if starts else -LAST_LINES :]
        if status < 0:
            name = signal.Signals(-status).name
            hint = ", perhaps for want of memory" if name == "SIGKILL" else ""
            shown = [f"killed by {name}{hint}; the end of its log:", *shown]
        return "\n".join(shown)

    def last_record(self) -> dict[str, Any]:
        """Return the last training record of a growing metrics.jsonl, or {}."""
        path = self.folder / METRICS_FILE
        if not path.exists():
            return {}
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            lines = file.read().decode("utf-8", "replace").splitlines()
        # The first and the last line may be torn.
        found = filter(None, map(parse_record, reversed(lines)))
        return next((r for r in found if r.get("train/loss") is not None), {})

    def __str__(self) -> str:
        """Return the name, and epoch and training error if they are known."""
        last = self.last_record()
        if not last:
            return self.run.name
        error = f"error {100 * last['train/top1_error']:.1f}%"
        return f"{self.run.name}  epoch {last['epoch']:.2f}  {error}"


class Launcher:
    """Start the runs of a plan, watch them, and keep their results.

    Args:
      plan: the runs.
      out: folder of the sweep.
      at_a_time: number of runs at the same time on this machine.
      slurm: options for sbatch; None: the runs are this machine's own.
    """

    def __init__(self, plan: Plan, out: Path, at_a_time: int, slurm: str | None):
        self.plan = plan
        self.out = out
        self.at_a_time = at_a_time if slurm is None else sys.maxsize
        self.slurm = slurm
        self.jobs: dict[str, Job] = {}
        self.results: dict[str, Measurement | None] = {}

    def update(self) -> None:
        """Add the runs that are known to be needed by now."""
        for run in self.plan.runs(self.results):
            if run.name not in self.jobs:
                job = Job(run, self.out / RUNS / run.name)
                self._examine(job)
                self.jobs[run.name] = job
                if job.state == "diverged":
                    self.results[run.name] = None
                if job.state == "finished":
                    self._measure(job)
                if job.ended:
                    self.update()  # it may settle a search

    def work(self) -> bool:
        """Run everything; return True if a signal ended it."""
        signals: list[int] = []
        before = {
            number: signal.signal(number, lambda number, _: signals.append(number))
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        handled = 0
        try:
            with tqdm(unit="run", disable=None, file=sys.stdout) as bar:
                while True:
                    self._advance(bar, start=not signals)
                    running = self._in_state("running")
                    if not running and (signals or not self._in_state("waiting")):
                        return bool(signals)
                    if len(signals) > handled:
                        handled = len(signals)
                        # A second signal does not wait for checkpoints.
                        ask = signal.SIGTERM if handled == 1 else signal.SIGKILL
                        for job in running:
                            bar.write(f"ending {job.run.name} ...")
                            self._stop(job, ask)
                    time.sleep(POLL_SECONDS)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def command(self, job: Job) -> list[str]:
        """Return the command line of a run."""
        flags = [f"--workdir={job.folder.absolute()}", *job.run.flags()]
        if self.slurm is None:
            return [sys.executable, "-m", "alexnet_jax.main", *flags]
        return [
            *("sbatch", "--wait", "--parsable", "--nodes=1", "--ntasks-per-node=1"),
            *("--gres=gpu:1", f"--job-name={job.run.name}"),
            f"--output={job.folder.absolute() / LOG}",
            *shlex.split(self.slurm),
            str(plan_lib.ROOT / "launch" / "slurm.sbatch"),
            *flags,
        ]

    def _in_state(self, state: str) -> list[Job]:
        return [job for job in self.jobs.values() if job.state == state]

    def _examine(self, job: Job) -> None:
        """Take over the state of a run from an earlier sweep."""
        status = job.read_status()
        begun = status or (job.folder / CHECKPOINTS).exists()
        stored = job.folder / CONFIG_FILE
        if begun and stored.exists():
            differences = plan_lib.differences(job.run, stored)
            if differences:
                lines = "\n".join(f"  --config.{line}" for line in differences)
                raise SweepError(
                    f"{job.folder} is of other settings:\n{lines}\nAsk for the same "
                    "ones, take a new --out, or remove that folder."
                )
        if status:
            job.state, job.error = status["state"], status.get("error", "")
            job.beaten = status.get("beaten", False)
        elif job.is_queued():
            raise SweepError(
                f"{job.folder}: SLURM job {job.slurm_id()} of an earlier sweep is still "
                "queued or running. Wait for it, or scancel it."
            )

    def _measure(self, job: Job) -> None:
        """Read the result of a finished run; without one it is broken."""
        metrics = job.folder / METRICS_FILE
        problem = f"{metrics} has no record for {self.plan.sweep.metric}."
        try:
            found = read_metrics(metrics) if metrics.exists() else []
        except ValueError as error:
            found, problem = [], str(error)
        result = self.plan.sweep.metric.measure(found)
        self.results[job.run.name] = result
        if result is None:
            job.state, job.error = "broken", problem

    def _advance(self, bar: Any, *, start: bool) -> None:
        """Handle the runs that have ended; start as many as there is room for."""
        for job in self._in_state("running"):
            assert job.process is not None
            status = job.process.poll()
            if status is not None:
                self._end(job, status, stopped=not start)
                bar.write(f"{job.state}: {job}")
            elif start and not job.beaten:
                epoch = job.last_record().get("epoch", 0.0)
                if self.plan.is_beaten(job.run, epoch, self.results):
                    job.beaten = True
                    self._stop(job, signal.SIGTERM)
        self.update()
        if start:
            room = max(0, self.at_a_time - len(self._in_state("running")))
            for job in self._in_state("waiting")[:room]:
                self._start(job)
                bar.write(f"running: {job.run.name}")
        bar.total = len(self.jobs)
        bar.n = sum(job.ended for job in self.jobs.values())
        bar.set_postfix_str("; ".join(map(str, self._in_state("running"))))

    def _start(self, job: Job) -> None:
        job.folder.mkdir(parents=True, exist_ok=True)
        log = job.folder / LOG
        job.log_offset = log.stat().st_size if log.exists() else 0
        # SLURM writes the log itself; sbatch prints the job's number.
        printed = log if self.slurm is None else job.folder / SUBMITTED
        (job.folder / SUBMITTED).unlink(missing_ok=True)
        search = (str(plan_lib.ROOT), os.environ.get("PYTHONPATH"))
        environment = {
            "PYTHON": sys.executable,  # for slurm.sbatch
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, search)),
            "PYTHONUNBUFFERED": "1",
        }
        with open(printed, "ab") as stream:
            try:
                job.process = subprocess.Popen(
                    self.command(job),
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    # Ctrl-C at the terminal reaches the sweep only, which passes it on.
                    start_new_session=True,
                )
            except FileNotFoundError as error:
                raise SweepError(
                    f"there is no {error.filename} on this machine; without --slurm "
                    "the runs are this machine's own."
                ) from error
        job.state, job.started = "running", time.time()

    def _end(self, job: Job, status: int, *, stopped: bool) -> None:
        if status == 0 or job.beaten:
            job.state = "finished"
            self._measure(job)
        elif status == DIVERGED:
            job.state, self.results[job.run.name] = "diverged", None
            job.error = job.last_words(status)
        elif stopped:
            job.state = "stopped"
        else:
            job.state, self.results[job.run.name] = "broken", None
            job.error = job.last_words(status)
        if job.state in ("finished", "diverged"):
            job.write_status(self.command(job))

    def _stop(self, job: Job, number: int) -> None:
        """Ask a local run, or SLURM's job, to write a checkpoint and end."""
        assert job.process is not None
        under_slurm = self.slurm is not None and job.slurm_id()
        if under_slurm:
            subprocess.run(["scancel", job.slurm_id()], check=False)
        if not under_slurm or number == signal.SIGKILL:
            job.process.send_signal(number)  # nothing if it has ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing and summarise it; return the exit status."""
    options = _parse(argv)
    try:
        return _run(options)
    except BrokenPipeError:
        return signals.discard_output()
    except (SweepError, ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweep", help="a file such as configs/sweeps/lrn.py")
    parser.add_argument("--out", type=path_argument, required=True, help="folder of the sweep")
    parser.add_argument("--seeds", help="such as 0,1,2; default: the sweep's own")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--jobs", type=int, default=1, help="runs at a time on this machine")
    where.add_argument("--slurm", nargs="?", const="", metavar="OPTIONS", help="submit to SLURM")
    parser.add_argument("--dry_run", action="store_true", help="only print commands")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="FIELD=VALUE",
        help="config fields of all runs",
    )
    return parser.parse_args(argv)


def _run(options: argparse.Namespace) -> int:
    out = options.out
    launcher = Launcher(_plan(options), out, options.jobs, options.slurm)
    require_writable(out)
    launcher.update()
    if options.dry_run:
        _print_commands(launcher)
        return 0
    out.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(out / LOCK, wait=False):
        interrupted = launcher.work()
        command = f"python launch/sweep.py {machine.without_paths(sys.argv[1:])}"
        plan, jobs = launcher.plan, launcher.jobs
        page = summary.write(plan, jobs, launcher.results, out, command)
        print(f"\n{page}\nwrote {out}/summary.md, .csv, .png and {out}/sweep.json")
    broken = [job for job in launcher.jobs.values() if job.state == "broken"]
    for job in broken:
        print(f"broken: {job.folder}\n{job.error}", file=sys.stderr)
    return 130 if interrupted else 1 if broken else 0


def _plan(options: argparse.Namespace) -> Plan:
    """Return the sweep with the seeds and settings of the command line."""
    sweep = plan_lib.load(options.sweep)
    seeds = sweep.seeds
    if options.seeds is not None:
        try:
            seeds = tuple(map(int, options.seeds.split(",")))
        except ValueError as error:
            raise SweepError(f"--seeds={options.seeds} must be numbers, such as 0,1,2.") from error
    if options.jobs < 1:
        raise SweepError(f"--jobs={options.jobs} must be at least 1.")
    settings = {}
    for word in options.set:
        name, equals, value = word.partition("=")
        if not equals:
            raise SweepError(f"--set {word} must be FIELD=VALUE, as num_epochs=2.0.")
        settings[name] = value
    return Plan(Path(options.sweep.partition(":")[0]).stem, sweep, seeds, settings)


def _print_commands(launcher: Launcher) -> None:
    for job in launcher.jobs.values():
        if not job.ended:
            print(shlex.join(launcher.command(job)))
    plan = launcher.plan
    searched = [row.name for row in plan.sweep.rows if row.search is not None]
    if searched and len(plan.seeds) > 1:
        seeds = ", ".join(map(str, plan.seeds[1:]))
        print(f"# and of {', '.join(searched)} the best candidate with seeds {seeds}")
