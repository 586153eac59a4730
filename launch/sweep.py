"""Runs a sweep of configs/sweeps/ and sums it up beside the published figures.

    python launch/sweep.py configs/sweeps/lrn.py --out=DIR [--seeds=0,1,2] [--jobs=2]

trains every row with every seed, each run a process of its own, and leaves
DIR/summary.{md,csv,png}, DIR/sweep.json, and in DIR/runs/ the workdirs with their
log.txt. The same command again skips what is finished and goes on with what was
interrupted. `--set data.source=folder:PATH num_epochs=2.0` changes fields of all runs.
`--dry_run` shows the commands only.

`--slurm` submits each run as a job of launch/slurm.sbatch, one process with one GPU,
and waits for all; `--slurm="--gres=gpu:2 --time=08:00:00"` gives sbatch other options.

Exit status: 0, 1 if a run is broken, 130 after Ctrl-C or SIGTERM, which runs are told
first: they write a checkpoint.
"""

import argparse
import contextlib
import csv
import dataclasses
import datetime
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
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # configs/ and, where it is not installed, alexnet_jax

from alexnet_jax import records, signals, sweeps
from alexnet_jax.data import locks
from alexnet_jax.data.files import replacing
from alexnet_jax.data.paths import path_argument, require_writable
from alexnet_jax.experiment import CHECKPOINTS, CONFIG_FILE, DIVERGED, ConfigError
from alexnet_jax.sweeps import Line, Measurement, Plan, Run, SweepError
from alexnet_jax.writers import METRICS_FILE, parse_record, read_metrics

POLL_SECONDS = 0.5
# What is shown of the log of a broken run that does not say "error:", in lines.
LAST_LINES = 3
TAIL_BYTES = 16384
SQUEUE_SECONDS = 30
LOCK, RUNS = ".lock", "runs"
STATUS, LOG, SUBMITTED = "status.json", "log.txt", "sbatch.txt"
ENDED = "finished", "diverged", "broken"


@dataclass
class Job:
    """A run and what has become of it.

    Attributes:
      state: waiting, running, finished, diverged (its loss is no longer finite), broken
        or stopped.
      offset: where this start's part of the log begins.
      error: why it is broken or has diverged.
      beaten: it was ended, as another candidate of its search had won.
    """

    run: Run
    folder: Path
    state: str = "waiting"
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    offset: int = 0
    error: str = ""
    beaten: bool = False

    @property
    def ended(self) -> bool:
        return self.state in ENDED


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is missing and sums up; returns the exit status."""
    options = _parse(argv)
    try:
        return _sweep(options)
    except BrokenPipeError:
        return signals.discard_output()
    except (SweepError, ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except signals.Interrupted as stopped:
        return stopped.status


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweep", help="a file such as configs/sweeps/lrn.py")
    parser.add_argument(
        "--out", type=path_argument, required=True, help="folder of the sweep"
    )
    parser.add_argument("--seeds", help="such as 0,1,2; else the sweep's own")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--jobs", type=int, default=1, help="runs at a time on this machine"
    )
    where.add_argument(
        "--slurm", nargs="?", const="", metavar="OPTIONS", help="submit to SLURM"
    )
    parser.add_argument("--dry_run", action="store_true", help="show the commands only")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="FIELD=VALUE",
        help="config fields of all runs",
    )
    return parser.parse_args(argv)


def _sweep(options: argparse.Namespace) -> int:
    with signals.interrupts():  # while files of Python run, nothing is lost
        plan = make_plan(options)
    out = options.out
    require_writable(out)
    launcher = Launcher(plan, out, options.jobs, options.slurm)
    launcher.update()
    if options.dry_run:
        launcher.show_commands()
        return 0
    out.mkdir(parents=True, exist_ok=True)
    with locks.held(out / LOCK, wait=False):
        interrupted = launcher.work()
        write_summary(plan, launcher, out)
    broken = [job for job in launcher.jobs.values() if job.state == "broken"]
    for job in broken:
        print(f"broken: {job.folder}\n{job.error}", file=sys.stderr)
    return 130 if interrupted else 1 if broken else 0


def make_plan(options: argparse.Namespace) -> Plan:
    """The sweep with the seeds and the settings of the command line."""
    sweep = sweeps.load(options.sweep)
    seeds = sweep.seeds
    if options.seeds is not None:
        seeds = _seeds(options.seeds)
    if options.jobs < 1:
        raise SweepError(f"--jobs={options.jobs} must be at least 1.")
    settings = {}
    for word in options.set:
        name, equals, value = word.partition("=")
        if not equals:
            raise SweepError(f"--set {word} must be FIELD=VALUE, as num_epochs=2.0.")
        settings[name] = value
    return Plan(Path(options.sweep.partition(":")[0]).stem, sweep, seeds, settings)


def _seeds(text: str) -> tuple[int, ...]:
    """Such as "0,1,2"."""
    try:
        seeds = tuple(map(int, text.split(",")))
    except ValueError as error:
        raise SweepError(f"--seeds={text} must be numbers, such as 0,1,2.") from error
    sweeps.check_seeds(seeds, f"--seeds={text}")
    return seeds


class Launcher:
    """Starts the runs of a plan, watches them, and keeps what they came to."""

    def __init__(self, plan: Plan, out: Path, jobs: int, slurm: str | None):
        self.plan = plan
        self.out = out
        self.at_a_time = jobs if slurm is None else sys.maxsize
        self.slurm = slurm
        self.jobs: dict[str, Job] = {}
        self.results: dict[str, Measurement | None] = {}
        self.view = View(sys.stdout)

    def update(self) -> None:
        """Adds the runs that are known to be needed by now."""
        for run in self.plan.runs(self.results):
            if run.name not in self.jobs:
                job = Job(run, self.out / RUNS / run.name)
                self._look(job)
                self.jobs[run.name] = job
                if job.state == "diverged":
                    self.results[run.name] = None
                if job.state == "finished":
                    self._finish(job)
                if job.ended:
                    self.update()  # it may settle a search

    def _look(self, job: Job) -> None:
        """What an earlier sweep has left of a run."""
        finished = (job.folder / STATUS).exists()
        stored = job.folder / CONFIG_FILE
        begun = finished or (job.folder / CHECKPOINTS).exists()
        compared = begun and stored.exists()
        if compared and (found := sweeps.differences(job.run, stored)):
            lines = "\n".join(f"  --config.{line}" for line in found)
            raise SweepError(
                f"{job.folder} is of other settings:\n{lines}\nAsk for the same "
                "ones, take a new --out, or remove that folder."
            )
        if finished:
            try:
                status = json.loads((job.folder / STATUS).read_text())
            except ValueError as error:
                raise SweepError(
                    f"{job.folder / STATUS} is damaged ({error}); remove it, and the "
                    "run is looked at again."
                ) from error
            job.state, job.error = status["state"], status.get("error", "")
            job.beaten = status.get("beaten", False)
        elif (job.folder / SUBMITTED).exists() and _is_queued(job):
            raise SweepError(
                f"{job.folder}: SLURM job {_job_id(job)} of an earlier sweep is still "
                "queued or running. Wait for it, or scancel it."
            )

    def _finish(self, job: Job) -> None:
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

    def show_commands(self) -> None:
        """Prints what would be run."""
        for job in self.jobs.values():
            if not job.ended:
                print(shlex.join(self._command(job)))
        searched = [row for row in self.plan.sweep.rows if row.search is not None]
        if searched and len(self.plan.seeds) > 1:
            names = ", ".join(row.name for row in searched)
            seeds = ", ".join(map(str, self.plan.seeds[1:]))
            print(f"# and of {names} the best candidate with seeds {seeds}")

    def work(self) -> bool:
        """Until all runs have ended, or a signal; returns whether it was one."""
        asked: list[int] = []
        before = {
            number: signal.signal(number, lambda number, _: asked.append(number))
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        told = 0
        try:
            while True:
                self._advance(start=not asked)
                self.view.show(list(self.jobs.values()))
                running = [j for j in self.jobs.values() if j.state == "running"]
                waiting = [j for j in self.jobs.values() if j.state == "waiting"]
                if not running and (asked or not waiting):
                    return bool(asked)
                if len(asked) > told:  # a second Ctrl-C does not wait any longer
                    told = len(asked)
                    self._stop(running, signal.SIGTERM if told == 1 else signal.SIGKILL)
                time.sleep(POLL_SECONDS)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _advance(self, *, start: bool) -> None:
        """Takes in what has ended and starts what there is room for."""
        for job in self.jobs.values():
            if job.process is not None and job.state == "running":
                status = job.process.poll()
                if status is not None:
                    self._end(job, status, stopped=not start)
                elif start and not job.beaten:
                    self._end_if_beaten(job)
        self.update()
        running = sum(job.state == "running" for job in self.jobs.values())
        waiting = [job for job in self.jobs.values() if job.state == "waiting"]
        for job in waiting[: max(0, self.at_a_time - running)] if start else ():
            self._start(job)

    def _command(self, job: Job) -> list[str]:
        flags = [f"--workdir={job.folder.absolute()}", *job.run.flags()]
        if self.slurm is None:
            return [sys.executable, "-m", "alexnet_jax.main", *flags]
        return [
            *("sbatch", "--wait", "--parsable", "--nodes=1", "--ntasks-per-node=1"),
            *("--gres=gpu:1", f"--job-name={job.run.name}"),
            f"--output={job.folder.absolute() / LOG}",
            *shlex.split(self.slurm),
            str(ROOT / "launch" / "slurm.sbatch"),
            *flags,
        ]

    def _start(self, job: Job) -> None:
        job.folder.mkdir(parents=True, exist_ok=True)
        log = job.folder / LOG
        job.offset = log.stat().st_size if log.exists() else 0
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        # SLURM writes the log itself; sbatch says the job's number.
        printed = log if self.slurm is None else job.folder / SUBMITTED
        if printed != log:
            printed.unlink(missing_ok=True)
        with open(printed, "ab") as stream:
            try:
                job.process = subprocess.Popen(
                    self._command(job),
                    env={
                        "PYTHON": sys.executable,  # for slurm.sbatch
                        **os.environ,
                        "PYTHONPATH": path,
                        "PYTHONUNBUFFERED": "1",
                    },
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    # A Ctrl-C at the terminal comes here only, and is handed on once.
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
            self._finish(job)
            if job.state == "finished":
                self._write_status(job)
        elif status == DIVERGED:
            job.state, self.results[job.run.name] = "diverged", None
            job.error = _last_words(job, status)
            self._write_status(job)
        elif stopped:
            job.state = "stopped"
        else:
            job.state, self.results[job.run.name] = "broken", None
            job.error = _last_words(job, status)

    def _write_status(self, job: Job) -> None:
        about = {
            "state": job.state,
            "command": records.without_paths(self._command(job)[1:]),
            "seconds": round(time.time() - job.started, 1),
            "versions": records.versions(),
        }
        if job.beaten:
            about["beaten"] = True
        if job.error:
            about["error"] = job.error
        _write(job.folder / STATUS, json.dumps(about, indent=1) + "\n")

    def _end_if_beaten(self, job: Job) -> None:
        """Ends a candidate's run that can no longer win its search."""
        epoch = _last_record(job.folder / METRICS_FILE).get("epoch", 0.0)
        if self.plan.is_beaten(job.run, epoch, self.results):
            job.beaten = True
            self._stop([job], signal.SIGTERM)

    def _stop(self, running: Sequence[Job], number: int) -> None:
        """Tells local runs, and SLURM's jobs, to write a checkpoint and end."""
        for job in running:
            self.view.say(f"ending {job.run.name}: it writes a checkpoint ...")
            assert job.process is not None
            if self.slurm is not None and _job_id(job):
                subprocess.run(["scancel", _job_id(job)], check=False)
            if self.slurm is None or number == signal.SIGKILL or not _job_id(job):
                with contextlib.suppress(ProcessLookupError):
                    job.process.send_signal(number)


def _job_id(job: Job) -> str:
    """What sbatch --parsable has printed: the number of the job; "" so far."""
    words = (job.folder / SUBMITTED).read_text().split()
    number = words[0].partition(";")[0] if words else ""
    return number if re.fullmatch("[0-9]+", number) else ""


def _is_queued(job: Job) -> bool:
    if not _job_id(job) or not shutil.which("squeue"):
        return False
    command = ["squeue", "--noheader", f"--jobs={_job_id(job)}"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=SQUEUE_SECONDS
    )
    return bool(done.stdout.strip())


def _last_words(job: Job, status: int) -> str:
    """The error in a broken run's log, from "error:" on, else its last lines.

    Of a run that was killed, which has no time to say anything, by which signal.
    """
    lines = [f"(exit status {status}, nothing in its log)"]
    for name, offset in ((LOG, job.offset), (SUBMITTED, 0)):
        path = job.folder / name
        found = path.read_bytes()[offset:] if path.exists() else b""
        if found.strip():
            lines = found.decode("utf-8", "replace").strip().splitlines()
            break
    starts = [i for i, line in enumerate(lines) if line.startswith("error:")]
    shown = lines[starts[-1] if starts else -LAST_LINES :]
    if status < 0:
        name = signal.Signals(-status).name
        hint = ", perhaps for want of memory" if name == "SIGKILL" else ""
        shown = [f"killed by {name}{hint}; the end of its log:", *shown]
    return "\n".join(shown)


# What is shown.


@dataclass
class View:
    """The jobs: a table redrawn in place on a terminal, else a line a change."""

    stream: TextIO
    drawn: int = 0
    states: dict[str, str] = dataclasses.field(default_factory=dict)

    def show(self, jobs: Sequence[Job]) -> None:
        """Shows what has changed since the last call."""
        if not self.stream.isatty():
            for job in jobs:
                if self.states.get(job.run.name, "waiting") != job.state:
                    cells = "  ".join(filter(None, progress(job)))
                    self.say(f"{job.state}: {job.run.name}  {cells}".rstrip())
            self.states = {job.run.name: job.state for job in jobs}
            return
        size = shutil.get_terminal_size()
        # The running ones are seen whatever the height.
        order = {"running": 0, "waiting": 1}
        room = max(3, size.lines - 3)
        if len(jobs) > room:
            jobs = sorted(jobs, key=lambda job: order.get(job.state, 2))
        lines = _table(jobs[:room])
        if len(jobs) > room:
            lines.append(f"... and {len(jobs) - room} more")
        up = f"\x1b[{self.drawn}A" if self.drawn else ""
        self.stream.write(f"{up}\x1b[J")
        self.stream.writelines(f"{line[: size.columns - 1]}\n" for line in lines)
        self.stream.flush()
        self.drawn = len(lines)

    def say(self, line: str) -> None:
        """A line below the table."""
        print(line, file=self.stream, flush=True)
        self.drawn = 0


def _table(jobs: Sequence[Job]) -> list[str]:
    header = ("run", "state", "", "training", "", "left")
    cells = [header, *((j.run.name, j.state, *progress(j)) for j in jobs)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    return [
        "  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]


def progress(job: Job) -> tuple[str, str, str, str]:
    """Epoch, training error or loss, images/s and time left, as far as known."""
    if job.state == "waiting":
        return "", "", "", ""
    last = _last_record(job.folder / METRICS_FILE)
    if not last:
        return "", "", "", ""
    training = f"loss {last['train/loss']:.3f}"
    if last.get("train/top1_error") is not None:
        training = f"error {100 * last['train/top1_error']:.1f}%"
    rate = last["images_per_sec"]
    left = ""
    if job.state == "running":
        fields = job.run.fields()
        per_epoch = last["step"] / last["epoch"]
        end = fields["num_epochs"] * per_epoch
        if fields["max_steps"] >= 0:
            end = min(end, fields["max_steps"])
        seconds = max(0.0, end - last["step"]) * fields["data.batch_size"] / rate
        left = str(datetime.timedelta(seconds=round(seconds)))
    return f"epoch {last['epoch']:.2f}", training, f"{rate:.0f} images/s", left


def _last_record(path: Path) -> dict[str, Any]:
    """The last training record of a metrics.jsonl that may be growing; else {}."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return {}
    # The first and the last line may be torn.
    for record in filter(None, map(parse_record, reversed(lines))):
        has_rate = record.get("images_per_sec") and record["epoch"] > 0
        if has_rate and record.get("train/loss") is not None:
            return record
    return {}


# What is left behind.


def write_summary(plan: Plan, launcher: Launcher, out: Path) -> None:
    """Writes summary.{md,csv,png} and sweep.json of what there is so far."""
    lines = sweeps.summarize(plan, launcher.results)
    program = f"python launch/sweep.py {records.without_paths(sys.argv[1:])}"
    about = records.machine(program)
    page = _page(plan, lines, about, list(launcher.jobs.values()))
    _write(out / "summary.md", page)
    _write_csv(out / "summary.csv", lines)
    _draw(plan, lines, launcher, out / "summary.png")
    _write(out / "sweep.json", json.dumps(_record(plan, lines, about, launcher)) + "\n")
    print(f"\n{page}\nwrote {out}/summary.md, .csv, .png and {out}/sweep.json")


_NOISE = (
    "Mean ± sample standard deviation over seeds; against the baseline paired by seed, ± "
    f"its standard error. It agrees if it is within {sweeps.STANDARD_ERRORS:g} of these; "
    "where no effect is within them too, that says little."
)


def _page(
    plan: Plan, lines: Sequence[Line], about: dict[str, Any], jobs: Sequence[Job]
) -> str:
    """The summary in Markdown."""
    sweep = plan.sweep
    source = plan.settings.get("data.source")
    data = sweep.measured_on if source is None else "what `data.source` names"
    parts = [
        f"# {plan.name} ({about['date']})",
        sweep.about,
        f"    {about['command']}",
        f"{records.in_words(about)}. Measured on {data}.",
        records.markdown_table(*sweeps.summary_table(plan, lines)),
        _NOISE,
        *sweeps.published(sweep),
    ]
    if any(line.tried for line in lines):
        parts += ["## Search", f"With seed {plan.seeds[0]}; the best is in bold."]
        parts.append(records.markdown_table(*sweeps.search_table(plan, lines)))
    beaten = [job.run.name for job in jobs if job.beaten]
    if beaten:
        parts.append(f"Ended when another candidate had won: {', '.join(beaten)}.")
    left = [job for job in jobs if job.state != "finished"]
    if left:
        parts.append("## Not in these numbers")
        parts.append("\n".join(map(_why_left_out, left)))
    return "\n\n".join(parts) + "\n"


def _why_left_out(job: Job) -> str:
    first = job.error.splitlines()[0] if job.error else ""
    return f"- {job.run.name}: {job.state}{f' ({first})' if first else ''}"


def _write_csv(path: Path, lines: Sequence[Line]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["row", "candidate", "seeds", "value_bound", "value", "deviation"]
            + ["effect_bound", "effect", "standard_error"]
            + ["paper_value", "paper_effect", "verdict"]
        )
        for line in lines:
            value, effect, paper = line.value, line.effect, line.paper
            writer.writerow(
                [line.name, line.candidate, value.count, value.bound, value.mean]
                + [value.spread, effect.bound, effect.mean, effect.spread]
                + [paper and paper.value, paper and paper.effect, line.verdict]
            )


def _draw(plan: Plan, lines: Sequence[Line], launcher: Launcher, path: Path) -> None:
    # matplotlib is not needed to run anything.
    from alexnet_jax.analysis import sweep as figures

    metric = plan.sweep.metric
    if isinstance(metric, sweeps.EpochsTo):
        rows = {}
        for line in lines:
            found = [
                read_metrics(job.folder / METRICS_FILE)
                for job in launcher.jobs.values()
                if (job.run.row, job.run.candidate) == (line.name, line.candidate)
                and job.state == "finished"
            ]
            if found:
                rows[line.title] = found
        figure = figures.error_curves(rows, metric.target)
    else:
        figure = figures.sweep_results(plan.sweep, lines)
    figure.savefig(path, dpi=150)


def _record(
    plan: Plan, lines: Sequence[Line], about: dict[str, Any], launcher: Launcher
) -> dict[str, Any]:
    """sweep.json: everything, each run's values included."""
    runs = {}
    for name, job in launcher.jobs.items():
        result, status = launcher.results.get(name), job.folder / STATUS
        runs[name] = {
            "overrides": {
                name: value
                for name, value in job.run.overrides.items()
                if name not in plan.settings
            },
            "result": result and dataclasses.asdict(result),
            **(json.loads(status.read_text()) if status.exists() else {}),
            "state": job.state,
        }
        if job.error:
            runs[name]["error"] = job.error
    return {
        "sweep": plan.name,
        "about": plan.sweep.about,
        "machine": about,
        "metric": str(plan.sweep.metric),
        "compare": plan.sweep.compare,
        "baseline": plan.sweep.baseline,
        "measured_on": plan.sweep.measured_on,
        "seeds": list(plan.seeds),
        "settings": {
            name: records.without_paths([f"{name}={value}"]).partition("=")[2]
            for name, value in plan.settings.items()
        },
        "rows": [dataclasses.asdict(line) for line in lines],
        "runs": runs,
    }


def _write(path: Path, text: str) -> None:
    """The whole file or none."""
    with replacing(path) as file:
        file.write(text.encode())


if __name__ == "__main__":
    sys.exit(main())
