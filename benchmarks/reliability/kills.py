"""Kill runs at any moment, start them again and compare: is anything lost?

    python -m benchmarks.reliability.kills --out=DIR [--short] [--kills=50] [--seed=0]

Trains configs/quickstart.py, shortened (`QUICKLY`), on two virtual devices and in two
processes, once without a disturbance each. Then the same in new folders, with the data
set drawn anew, killed by SIGKILL and started again until the run ends by itself. Half of
the kills come at moments drawn uniformly over the length of an undisturbed run. The
others come within a phase that is waited for, for example between the arrays of a
checkpoint and the rename of its folder. After some of them the newest checkpoint is
damaged as well: a file is truncated, or one bit is flipped.

A start has to resume from the newest whole checkpoint and to name the damaged file. In
the end parameters, optimizer state, plateau rule and the records of every step have to
equal those of the undisturbed run to the bit. Exit status 1 if anything differs, or if
fewer kills than asked for have hit a run.
"""

import collections
import contextlib
import itertools
import math
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alexnet_jax.training.checkpoint import Checkpointer, CheckpointError, all_steps
from alexnet_jax.training.writers import METRICS_FILE, read_metrics
from benchmarks.speed import measure

ROOT = Path(__file__).parents[2]
# Each step has a record, so a record does not depend on where a start begins.
STEPS, EVALUATE_EVERY = 24, 6
QUICKLY = (
    "--config=configs/quickstart.py",
    "--config.data.source=textures/tiny",
    "--config.data.batch_size=8",
    "--config.model.width=0.05",
    "--config.num_epochs=0.96",
    "--config.eval_every_epochs=0.24",
    "--config.log_every_steps=1",
    "--config.checkpoint.every_steps=4",
)
# Halves the time of compiling, which every start does for itself.
ENVIRONMENT = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_ENABLE_COMPILATION_CACHE": "0",
    "PYTHONUNBUFFERED": "1",
}
# The fields of a record that depend on the clock.
CLOCK = ("images_per_sec", "data_wait_frac")

START = "start: imports, opening the data, restoring"
PREPARATION = "start: the data set is drawn"
COMPILING = "compiling"
TRAINING = "training"
EVALUATION = "evaluation"
ARRAYS = "checkpoint: its arrays are written"
BEFORE_RENAME = "checkpoint: before its folder is renamed"
DELETION = "checkpoint: old ones are deleted"
LAST_SAVE = "checkpoint: the last one"
END = "end: after the last checkpoint"
PHASES = (
    *(START, PREPARATION, COMPILING, TRAINING, EVALUATION),
    *(ARRAYS, BEFORE_RENAME, DELETION, LAST_SAVE, END),
)
# The phases that the kills of a run are aimed at; None: any moment. The data set is drawn
# in a run's first start, and the last save comes in its last one.
AIMS = (
    (PREPARATION, None, BEFORE_RENAME, None, EVALUATION, None),
    (COMPILING, None, ARRAYS, None, None, LAST_SAVE),
    (None, None, BEFORE_RENAME, None, EVALUATION, LAST_SAVE),
)
SHORT_AIMS = (COMPILING, BEFORE_RENAME, EVALUATION, LAST_SAVE)
# The share of kills after which a checkpoint is damaged, if there are two.
DAMAGED = 2 / 3
# Between two looks at a process: less than a phase takes.
LOOK_SECONDS = 0.0005
# Time for the other process of a killed one to end by itself, as under
# launch/multiprocess.py.
GRACE_SECONDS = 10.0
# A start that takes so many times as long as an undisturbed run hangs.
PATIENCE = 10
# Number of runs per kill that are tried until all kills have hit one.
MOST_RUNS = 4


class LossError(Exception):
    """A difference from the undisturbed run; the message names it."""


@dataclass(frozen=True)
class Kind:
    """Number of processes and flags of a run."""

    name: str
    processes: int
    flags: tuple[str, ...]


KINDS = (
    Kind("one process", 1, ("--cpu_devices=2",)),
    Kind(
        "two processes",
        2,
        ("--cpu_devices=1", "--config.schedule.name=plateau", "--config.schedule.patience=1"),
    ),
)


class Life:
    """One start of a run, watched.

    Attributes:
      begun_at: the step it resumes from, 0 for a new run; None: not printed yet.
    """

    def __init__(self, kind: Kind, folder: Path):
        self.workdir = folder / "run"
        self.begun_at: int | None = None
        self.lines: list[str] = []
        self._doing = START  # the phase, as far as its output tells
        self._checkpoints = self.workdir / "checkpoints"
        self._records: tuple[int, str] = (-1, "")
        self.started = time.monotonic()
        self.processes = [_start(kind, folder, flags) for flags in _flags_of_each(kind.processes)]
        self._readers = [threading.Thread(target=self._listen, args=(p,)) for p in self.processes]
        for reader in self._readers:
            reader.start()

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.lines.append(line.rstrip())
            if "Drawing the textures" in line:
                self._doing = PREPARATION
            elif "Textures are ready" in line:
                self._doing = START
            elif re.match(r"compiling the \w+ step", line):
                self._doing = COMPILING
            elif re.match(r"compiled the \w+ step", line):
                self._doing = TRAINING
            elif line.startswith(f"checkpoint of step {STEPS}\n"):
                self._doing = END
            elif found := re.match(r"(resuming from step (\d+)|no checkpoint in)", line):
                self.begun_at = int(found[2] or 0)

    def phase(self) -> str:
        """Return the current phase, from its output and its files."""
        if self._doing in (START, PREPARATION, COMPILING):
            return self._doing
        steps = os.listdir(self._checkpoints) if self._checkpoints.exists() else []
        unfinished = [int(name[:-4]) for name in steps if re.fullmatch(r"\d+\.tmp", name)]
        if unfinished:
            step = min(unfinished)
            if step < max((int(name) for name in steps if name.isdecimal()), default=0):
                return DELETION
            if step == STEPS:
                return LAST_SAVE
            # Orbax gives its folder this name when all arrays are in it.
            arrays = self._checkpoints / f"{step}.tmp" / "state"
            return BEFORE_RENAME if arrays.exists() else ARRAYS
        if self._doing == TRAINING and self._is_evaluating():
            return EVALUATION
        return self._doing

    def _is_evaluating(self) -> bool:
        """Return True if the last record is of a step whose evaluation is to come."""
        path = self.workdir / METRICS_FILE
        size = path.stat().st_size
        if size != self._records[0]:
            self._records = (size, path.read_text().rstrip("\n").rpartition("\n")[2])
        found = re.match(r'\{"step": (\d+), .*"lr"', self._records[1])
        return found is not None and int(found[1]) % EVALUATE_EVERY == 0

    def has_ended(self) -> bool:
        return all(process.poll() is not None for process in self.processes)

    def seconds(self) -> float:
        return time.monotonic() - self.started

    def send(self, number: int, processes: list[int] | None = None) -> None:
        """Send a signal to some of the processes; None: to all."""
        for index, process in enumerate(self.processes):
            if processes is None or index in processes:
                process.send_signal(number)

    def wait(self, grace: float) -> None:
        """Wait until all have ended, by themselves in time or by SIGKILL."""
        end = time.monotonic() + grace
        for process in self.processes:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for reader in self._readers:
            reader.join()

    def require_good_end(self) -> None:
        """Wait for the end; raise LossError if a status is not 0."""
        self.wait(GRACE_SECONDS)
        for process in self.processes:
            if process.returncode:
                raise LossError(f"a start ended with status {process.returncode}")


def _flags_of_each(count: int) -> list[list[str]]:
    """Return the flags that tell the processes of a run apart."""
    if count == 1:
        return [[]]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = [f"--coordinator_address=127.0.0.1:{port}", f"--num_processes={count}"]
    return [[*address, f"--process_id={index}"] for index in range(count)]


def _start(kind: Kind, folder: Path, flags: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "alexnet_jax.main", *QUICKLY, *kind.flags, *flags]
    return subprocess.Popen(
        [*command, f"--workdir={folder / 'run'}"],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT, "TFDS_DATA_DIR": str(folder / "data")},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )


# A run that nothing disturbs.


@dataclass(frozen=True)
class Undisturbed:
    """Outcome and seconds of a run, and median seconds by phase."""

    outcome: dict[str, Any]
    seconds: float
    stretches: dict[str, float]


def undisturbed(kind: Kind, folder: Path) -> Undisturbed:
    """Run to the end; raise LossError if that fails."""
    life = Life(kind, folder)
    stretches: dict[str, list[float]] = collections.defaultdict(list)
    phase, since = life.phase(), time.monotonic()
    while not life.has_ended():
        now = life.phase()
        if now != phase:
            stretches[phase].append(time.monotonic() - since)
            phase, since = now, time.monotonic()
        time.sleep(LOOK_SECONDS)
    seconds = life.seconds()
    life.require_good_end()
    medians = {name: statistics.median(found) for name, found in stretches.items()}
    return Undisturbed(outcome(life.workdir), seconds, medians)


def outcome(workdir: Path) -> dict[str, Any]:
    """Return, by name, everything that two finished runs have in common."""
    import jax

    with Checkpointer(workdir / "checkpoints", read_only=True) as saved:
        step = saved.find("latest")
        parts = ("step", "params", "batch_stats", "opt_state")
        state, metadata = saved.restore_params("latest", parts=parts)
        error = None if step is None else saved.top1_error(step)
    leaves = {
        f"state {jax.tree_util.keystr(path)}": (str(leaf.dtype), leaf.shape, leaf.tobytes())
        for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(state))
    }
    records = [
        {name: value for name, value in record.items() if name not in CLOCK}
        for record in read_metrics(workdir / METRICS_FILE)
    ]
    return {"step": step, **leaves, **metadata, "last error": error, "records": records}


# A run that is killed.


@dataclass
class Disturbed:
    """A run that is killed again and again.

    Attributes:
      damaged: the share of kills after which a checkpoint is damaged.
      kills: the records of its kills so far.
      skipped: (step, file) of the damaged checkpoint that the next start has to name.
    """

    kind: Kind
    folder: Path
    whole: Undisturbed
    chance: random.Random
    damaged: float
    kills: list[dict[str, Any]] = field(default_factory=list)
    skipped: tuple[int, str] | None = None

    def live(self, aim: str | None, length: float) -> bool:
        """Start it once and kill it; return True if it ended by itself.

        Args:
          aim: the phase to kill it in; None: at any moment.
          length: the kill comes at most so many seconds after the phase, or the start,
            began; infinity: never.
        """
        newest_whole = max(self._whole_steps(), default=0)
        life = Life(self.kind, self.folder)
        try:
            phase = self._watch(life, aim, self.chance.uniform(0, 1) * length)
            if phase is None:
                life.require_good_end()
            else:
                victims = list(range(self.kind.processes))
                if len(victims) > 1 and self.chance.random() < 0.4:
                    victims = [self.chance.choice(victims)]
                seconds = round(life.seconds(), 3)
                life.send(signal.SIGKILL, victims)
                life.send(signal.SIGCONT)
                life.wait(GRACE_SECONDS)
                about = {"aimed_at": aim, "phase": phase, "seconds": seconds}
                self.kills.append({**about, "processes": victims, "damage": None})
            self._check_start(life, newest_whole)
        except LossError:
            print("\n".join(life.lines), file=sys.stderr)
            raise
        finally:
            life.wait(0.0)
        if phase is not None and self.skipped is None and self.chance.random() < self.damaged:
            self._damage_newest()
        return phase is None

    def _watch(self, life: Life, aim: str | None, delay: float) -> str | None:
        """Freeze it at the planned moment and return the phase; None if it ended."""
        patience = PATIENCE * self.whole.seconds
        while not life.has_ended():
            if life.seconds() > patience:
                raise LossError(f"a start has not ended in {patience:.0f} seconds")
            if life.phase() == aim if aim else life.seconds() >= delay:
                time.sleep(delay if aim else 0.0)
                life.send(signal.SIGSTOP)
                phase = life.phase()
                if aim in (None, phase) and not life.has_ended():
                    return phase
                life.send(signal.SIGCONT)
                delay /= 2  # the phase was over: the next one is hit nearer to its beginning
            time.sleep(LOOK_SECONDS)
        return None

    def _check_start(self, life: Life, newest_whole: int) -> None:
        """Raise LossError unless it resumed as it should and named what it skipped."""
        if life.begun_at is None:  # killed before
            return
        if life.begun_at != newest_whole:
            raise LossError(
                f"a start went on from step {life.begun_at}; the newest whole "
                f"checkpoint was that of step {newest_whole}"
            )
        if self.skipped is not None:
            words = "Checkpoint of step {} skipped: {}".format(*self.skipped)
            if not any(words in line for line in life.lines):
                raise LossError(f"a start did not say: {words}")
            self.skipped = None

    def _whole_steps(self) -> list[int]:
        folder = self.folder / "run" / "checkpoints"
        found = []
        with Checkpointer(folder, read_only=True) as saved:
            for step in all_steps(folder):
                with contextlib.suppress(CheckpointError):  # damaged
                    saved.find(step)
                    found.append(step)
        return found

    def _damage_newest(self) -> None:
        """Damage a file of the newest whole checkpoint, if there is one before it."""
        whole = self._whole_steps()
        if len(whole) < 2:
            return
        folder = self.folder / "run" / "checkpoints" / str(whole[-1])
        # Without the hidden files that a killed `atomic_write` leaves.
        files = [p for p in folder.rglob("[!.]*") if p.is_file() and p.stat().st_size]
        path = self.chance.choice(sorted(files))
        content = bytearray(path.read_bytes())
        size = len(content)
        if self.chance.random() < 0.5:
            content = content[: self.chance.randrange(size)]
            how = f"{len(content)} of {size} bytes left"
        else:
            bit = self.chance.randrange(8 * size)
            content[bit // 8] ^= 1 << bit % 8
            how = f"bit {bit} of {8 * size} flipped"
        path.write_bytes(content)
        name = path.relative_to(folder).as_posix()
        self.skipped = (whole[-1], name)
        self.kills[-1]["damage"] = f"step {whole[-1]}, {name}: {how}"


def disturb(
    new_run: Callable[[int], Disturbed], aims: list[str | None]
) -> Iterator[dict[str, Any]]:
    """Kill runs until as many kills as there are aims have hit; yield a record per run.

    A run that ends before its kills leaves them to the next one. A phase that three
    runs in a row were not killed in is given up for any moment. Ends in any case after
    `MOST_RUNS` times as many runs as aims.
    """
    misses = 0
    for number in range(MOST_RUNS * len(aims)):
        now, aims = aims[:6], aims[6:]
        if not now:
            return
        if misses >= 3:
            now[0] = None
        run = new_run(number)
        yield disturbed_run(run, now, misses)
        misses = 0 if run.kills else misses + 1
        aims += now[len(run.kills) :]
        print(f"{run.kind.name}: {len(aims)} kills to come", file=sys.stderr)


def disturbed_run(run: Disturbed, aims: list[str | None], misses: int) -> dict[str, Any]:
    """Kill a run once per aim, let it end, compare it; return the record.

    Each miss halves the time after which it is killed, because phases are shorter on a
    machine that is less busy than it was in the undisturbed run.
    """
    started, whole = time.monotonic(), run.whole
    loss = None
    try:
        for aim in aims:
            length = whole.seconds if aim is None else 0.9 * whole.stretches.get(aim, 0.0)
            if run.live(aim, length / 2**misses):
                break
        else:
            run.live(None, math.inf)
        found, expected = outcome(run.folder / "run"), whole.outcome
        names = [n for n in {**expected, **found} if expected.get(n) != found.get(n)]
        if names:
            raise LossError(f"differs from the undisturbed run: {', '.join(names)}")
    except (LossError, CheckpointError) as error:
        loss = str(error).replace(str(run.folder), "DIR")
        print(f"LOSS: {loss}", file=sys.stderr)
    return {
        "kind": run.kind.name,
        "seconds": round(time.monotonic() - started, 1),
        "loss": loss,
        "kills": run.kills,
    }


# The record.


def summary(runs: list[dict[str, Any]], asked_for: int) -> dict[str, Any]:
    """Return counts over all runs."""
    kills = [kill | {"kind": run["kind"]} for run in runs for kill in run["kills"]]
    by_phase = {
        phase: {
            kind.name: sum((kill["phase"], kill["kind"]) == (phase, kind.name) for kill in kills)
            for kind in KINDS
        }
        for phase in PHASES
    }
    return {
        "runs": len(runs),
        "kills_asked_for": asked_for,
        "kills": len(kills),
        "kills_at_any_moment": sum(kill["aimed_at"] is None for kill in kills),
        "kills_by_phase": {p: n for p, n in by_phase.items() if any(n.values())},
        "damaged_checkpoints": sum(kill["damage"] is not None for kill in kills),
        "losses": [run["loss"] for run in runs if run["loss"] is not None],
    }


def table(counts: dict[str, Any]) -> str:
    """Return the kills by phase as a table, and a sentence about losses."""
    by_phase = counts["kills_by_phase"]
    names = [kind.name for kind in KINDS]
    rows = [[phase, *(str(found[name]) for name in names)] for phase, found in by_phase.items()]
    rows.append(["all", *(str(sum(found[name] for found in by_phase.values())) for name in names)])
    sentence = (
        f"{counts['runs']} runs of {STEPS} steps, {counts['kills']} kills of "
        f"{counts['kills_asked_for']} asked for, "
        f"{counts['kills_at_any_moment']} of them at a moment drawn uniformly over a "
        f"run; {counts['damaged_checkpoints']} checkpoints damaged. Runs that differ "
        f"from the undisturbed one, by a bit or more: {len(counts['losses'])}."
    )
    return f"{measure.markdown_table(['killed in', *names], rows)}\n\n{sentence}"


def main() -> int:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    parser = measure.command_line(__doc__)
    parser.add_argument("--kills", type=int, default=50, help="in all; not with --short")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    kinds, damaged = (KINDS[:1], 1.0) if options.short else (KINDS, DAMAGED)
    aims: list[str | None] = [*SHORT_AIMS]
    if not options.short:
        endless = itertools.cycle(itertools.chain.from_iterable(AIMS))
        aims = list(itertools.islice(endless, -(-options.kills // len(KINDS))))
    chance = random.Random(options.seed)
    runs: list[dict[str, Any]] = []
    lengths: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        for kind in kinds:
            scratch = Path(name) / str(kind.processes)
            whole = undisturbed(kind, scratch / "undisturbed")
            lengths[kind.name] = {"run": whole.seconds, **whole.stretches}

            def new_run(
                number: int, kind: Kind = kind, whole: Undisturbed = whole, folder: Path = scratch
            ) -> Disturbed:
                return Disturbed(kind, folder / str(number), whole, chance, damaged)

            runs += disturb(new_run, list(aims))
    counts = summary(runs, len(aims) * len(kinds))
    record = {
        "environment": ENVIRONMENT,
        "flags": {kind.name: [*QUICKLY, *kind.flags] for kind in KINDS},
        "seed": options.seed,
        "seconds_undisturbed": lengths,
        "summary": counts,
        "each": runs,
    }
    measure.write_result(options.out, "kills", record, table=table(counts))
    return 1 if counts["losses"] or counts["kills"] < counts["kills_asked_for"] else 0


if __name__ == "__main__":
    sys.exit(main())
