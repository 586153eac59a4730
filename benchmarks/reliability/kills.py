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
import dataclasses
import itertools
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
from collections.abc import Callable
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
STATE = ("step", "params", "batch_stats", "opt_state")

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
DAMAGED = {"short": 1.0, "long": 2 / 3}
# Between two looks at a process: less than a phase takes.
LOOK_SECONDS = 0.0005
# The other process of a killed one has so long to end by itself, as under
# launch/multiprocess.py.
GRACE_SECONDS = 10.0
# A start that takes so many times as long as an undisturbed run hangs.
PATIENCE = 10
# So many runs per kill are tried until all kills have hit one.
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


@dataclass(frozen=True)
class Plan:
    """When a start is killed: so many seconds after its begin, or into a phase."""

    phase: str | None
    seconds: float


@dataclass
class Kill:
    """The record of one kill."""

    aimed_at: str | None
    phase: str
    seconds: float
    processes: list[int]
    damage: str | None = None


class Life:
    """One start of a run, watched.

    Attributes:
      doing: the phase, as far as its output tells.
      begun_at: the step it resumes from, 0 for a new run; None: not printed yet.
    """

    def __init__(self, kind: Kind, folder: Path):
        self.folder = folder
        self.workdir = folder / "run"
        self.doing = START
        self.begun_at: int | None = None
        self.lines: list[str] = []
        self._checkpoints = self.workdir / "checkpoints"
        self._records: tuple[int, str] = (-1, "")
        self.started = time.monotonic()
        self.processes = [_start(kind, folder, flags) for flags in _flags_of_each(kind.processes)]
        self._readers = [
            threading.Thread(target=self._listen, args=(process,)) for process in self.processes
        ]
        for reader in self._readers:
            reader.start()

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.lines.append(line.rstrip())
            if "Drawing the textures" in line:
                self.doing = PREPARATION
            elif "Textures are ready" in line:
                self.doing = START
            elif re.match(r"compiling the \w+ step", line):
                self.doing = COMPILING
            elif re.match(r"compiled the \w+ step", line):
                self.doing = TRAINING
            elif line.startswith(f"checkpoint of step {STEPS}\n"):
                self.doing = END
            elif found := re.match(r"(resuming from step (\d+)|no checkpoint in)", line):
                self.begun_at = int(found[2] or 0)

    # Where it is.

    def phase(self) -> str:
        """Return the current phase, from its output and its files."""
        if self.doing in (START, PREPARATION, COMPILING):
            return self.doing
        steps = self._steps()
        unfinished = [int(name[:-4]) for name in steps if name.endswith(".tmp")]
        if unfinished:
            step = min(unfinished)
            if step < max((int(name) for name in steps if name.isdecimal()), default=0):
                return DELETION
            if step == STEPS:
                return LAST_SAVE
            # Orbax gives its folder this name when all arrays are in it.
            arrays = self._checkpoints / f"{step}.tmp" / "state"
            return BEFORE_RENAME if arrays.exists() else ARRAYS
        if self.doing == TRAINING and self._is_evaluating():
            return EVALUATION
        return self.doing

    def _steps(self) -> list[str]:
        """Return the names N of complete steps and N.tmp of others."""
        if not self._checkpoints.exists():
            return []
        return [name for name in os.listdir(self._checkpoints) if name[0].isdecimal()]

    def _is_evaluating(self) -> bool:
        """Return whether the last record is of a step whose evaluation is to come."""
        path = self.workdir / METRICS_FILE
        size = path.stat().st_size
        if size != self._records[0]:
            last = path.read_text().rstrip("\n").rpartition("\n")[2]
            self._records = (size, last)
        found = re.match(r'\{"step": (\d+), .*"lr"', self._records[1])
        return found is not None and int(found[1]) % EVALUATE_EVERY == 0

    # Its end.

    def has_ended(self) -> bool:
        return all(process.poll() is not None for process in self.processes)

    def seconds(self) -> float:
        return time.monotonic() - self.started

    def send(self, number: int, processes: list[int]) -> None:
        """Send a signal to some of the processes."""
        for index in processes:
            self.processes[index].send_signal(number)

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
    """Outcome and duration of a run, and the durations of its phases.

    Attributes:
      outcome: see `outcome`.
      seconds: of the run.
      stretches: median seconds by phase.
    """

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
    _require_good_end(life)
    medians = {name: statistics.median(found) for name, found in stretches.items()}
    return Undisturbed(outcome(life.workdir), seconds, medians)


def _require_good_end(life: Life) -> None:
    life.wait(GRACE_SECONDS)
    bad = [process.returncode for process in life.processes if process.returncode]
    if bad:
        raise LossError(f"a start ended with status {bad[0]}")


def outcome(workdir: Path) -> dict[str, Any]:
    """Return, by name, everything that two finished runs have in common."""
    import jax

    with Checkpointer(workdir / "checkpoints", read_only=True) as saved:
        step = saved.find("latest")
        state, metadata = saved.restore_params("latest", parts=STATE)
        error = None if step is None else saved.top1_error(step)
    leaves = {
        jax.tree_util.keystr(path): (str(leaf.dtype), leaf.shape, leaf.tobytes())
        for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(state))
    }
    records = [
        {name: value for name, value in record.items() if name not in CLOCK}
        for record in read_metrics(workdir / METRICS_FILE)
    ]
    return {
        "step": step,
        **{f"state {name}": leaf for name, leaf in leaves.items()},
        "plateau rule": metadata["plateau"],
        "other metadata": {k: v for k, v in metadata.items() if k != "plateau"},
        "last error": error,
        "records": records,
    }


def require_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise LossError naming what differs."""
    names = [n for n in {**expected, **found} if expected.get(n) != found.get(n)]
    if names:
        raise LossError(f"differs from the undisturbed run: {', '.join(names)}")


# A run that is killed.


@dataclass
class Disturbed:
    """A run that is killed, and its kills so far.

    Attributes:
      damaged: the share of kills after which a checkpoint is damaged.
      skipped: (step, file) of the damaged checkpoint that the next start has to name.
    """

    kind: Kind
    folder: Path
    chance: random.Random
    damaged: float
    kills: list[Kill] = field(default_factory=list)
    skipped: tuple[int, str] | None = None

    def live(self, plan: Plan | None, patience: float) -> bool:
        """Start it once, kill it as planned; return whether it ended by itself."""
        whole = self._whole_steps()
        life = Life(self.kind, self.folder)
        everyone = list(range(self.kind.processes))
        try:
            phase = self._watch(life, plan, patience)
            if phase is not None:
                assert plan is not None
                victims = everyone
                if len(everyone) > 1 and self.chance.random() < 0.4:
                    victims = [self.chance.choice(everyone)]
                seconds = life.seconds()
                life.send(signal.SIGKILL, victims)
                life.send(signal.SIGCONT, everyone)
                life.wait(GRACE_SECONDS)
                kill = Kill(plan.phase, phase, round(seconds, 3), victims)
                self.kills.append(kill)
            else:
                _require_good_end(life)
            self._check_start(life, whole[-1] if whole else 0)
        except LossError:
            print("\n".join(life.lines), file=sys.stderr)
            raise
        finally:
            life.wait(0.0)
        if phase is None:
            return True
        if self.chance.random() < self.damaged and self.skipped is None:
            self.damage_newest()
        return False

    def _watch(self, life: Life, plan: Plan | None, patience: float) -> str | None:
        """Freeze it at the planned moment and return the phase; None if it ended."""
        everyone = list(range(self.kind.processes))
        while not life.has_ended():
            if life.seconds() > patience:
                raise LossError(f"a start has not ended in {patience:.0f} seconds")
            if plan is not None and _is_time(life, plan):
                life.send(signal.SIGSTOP, everyone)
                phase = life.phase()
                if plan.phase in (None, phase) and not life.has_ended():
                    return phase
                life.send(signal.SIGCONT, everyone)
                # The phase was over: the next one is hit nearer to its beginning.
                plan = dataclasses.replace(plan, seconds=plan.seconds / 2)
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
            step, name = self.skipped
            words = f"Checkpoint of step {step} skipped: {name}"
            if not any(words in line for line in life.lines):
                raise LossError(f"a start did not say: {words}")
            self.skipped = None

    def _whole_steps(self) -> list[int]:
        folder = self.folder / "run" / "checkpoints"
        if not folder.exists():
            return []
        found = []
        with Checkpointer(folder, read_only=True) as saved:
            for step in all_steps(folder):
                with contextlib.suppress(CheckpointError):  # damaged
                    saved.find(step)
                    found.append(step)
        return found

    def damage_newest(self) -> None:
        """Damage a file of the newest whole checkpoint, if there is one before it."""
        whole = self._whole_steps()
        if len(whole) < 2:
            return
        folder = self.folder / "run" / "checkpoints" / str(whole[-1])
        files = [
            path
            for path in folder.rglob("[!.]*")  # not what a killed `atomic_write` left
            if path.is_file() and path.stat().st_size
        ]
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
        self.kills[-1].damage = f"step {whole[-1]}, {name}: {how}"


def _is_time(life: Life, plan: Plan) -> bool:
    if plan.phase is None:
        return life.seconds() >= plan.seconds
    if life.phase() != plan.phase:
        return False
    time.sleep(plan.seconds)
    return True


def plan(aim: str | None, whole: Undisturbed, chance: random.Random, misses: int) -> Plan:
    """Draw a moment within the phase aimed at, or of a whole run if it is None.

    Each miss halves the time, because phases are shorter on a machine less busy than
    it was in the undisturbed run.
    """
    length = whole.seconds if aim is None else 0.9 * whole.stretches.get(aim, 0.0)
    return Plan(aim, chance.uniform(0.0, length) / 2**misses)


def disturb(
    whole: Undisturbed, new_run: Callable[[int], Disturbed], aims: list[str | None]
) -> list[dict[str, Any]]:
    """Kill runs until as many kills as there are aims have hit; return the records.

    A run that ends before its kills leaves them to the next one. A phase that three
    runs in a row were not killed in is given up for any moment. Ends in any case after
    `MOST_RUNS` times as many runs as aims.
    """
    records: list[dict[str, Any]] = []
    most, misses = MOST_RUNS * len(aims), 0
    while aims and len(records) < most:
        now, aims = aims[:6], aims[6:]
        if misses >= 3:
            now[0] = None
        run = new_run(len(records))
        records.append(disturbed_run(run, now, whole, misses))
        misses = 0 if run.kills else misses + 1
        aims += now[len(run.kills) :]
        print(f"{run.kind.name}: {len(aims)} kills to come", file=sys.stderr)
    return records


def disturbed_run(
    run: Disturbed, aims: list[str | None], whole: Undisturbed, misses: int
) -> dict[str, Any]:
    """Kill a run once per aim, let it end, compare it; return the record."""
    started = time.monotonic()
    patience = PATIENCE * whole.seconds
    loss = None
    try:
        for aim in aims:
            if run.live(plan(aim, whole, run.chance, misses), patience):
                break
        else:
            run.live(None, patience)
        require_same(outcome(run.folder / "run"), whole.outcome)
    except (LossError, CheckpointError) as error:
        loss = str(error).replace(str(run.folder), "DIR")
        print(f"LOSS: {loss}", file=sys.stderr)
    return {
        "kind": run.kind.name,
        "seconds": round(time.monotonic() - started, 1),
        "loss": loss,
        "kills": [dataclasses.asdict(kill) for kill in run.kills],
    }


# The record.


def summary(runs: list[dict[str, Any]], asked_for: int) -> dict[str, Any]:
    """Return counts over all runs."""
    kills = [kill | {"kind": run["kind"]} for run in runs for kill in run["kills"]]
    by_phase = {
        phase: {
            kind.name: sum(kill["phase"] == phase and kill["kind"] == kind.name for kill in kills)
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


def table(record: dict[str, Any]) -> str:
    """Return the kills by phase as a table, and a sentence about losses."""
    counts = record["summary"]
    names = [kind.name for kind in KINDS]
    rows = [
        [phase, *(str(found[name]) for name in names)]
        for phase, found in counts["kills_by_phase"].items()
    ]
    sums = [sum(found[name] for found in counts["kills_by_phase"].values()) for name in names]
    rows.append(["all", *map(str, sums)])
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
    form = "short" if options.short else "long"
    chance = random.Random(options.seed)
    runs: list[dict[str, Any]] = []
    lengths: dict[str, Any] = {}
    asked_for = 0
    with tempfile.TemporaryDirectory() as name:
        for kind in KINDS[:1] if options.short else KINDS:
            scratch = Path(name) / str(kind.processes)
            whole = undisturbed(kind, scratch / "undisturbed")
            lengths[kind.name] = {"run": whole.seconds, **whole.stretches}
            aims: list[str | None] = [*SHORT_AIMS]
            if not options.short:
                endless = itertools.cycle(itertools.chain.from_iterable(AIMS))
                aims = list(itertools.islice(endless, -(-options.kills // len(KINDS))))

            def new_run(number: int, kind: Kind = kind, scratch: Path = scratch):
                folder = scratch / str(number)
                return Disturbed(kind, folder, chance, DAMAGED[form])

            asked_for += len(aims)
            runs += disturb(whole, new_run, aims)
    record = {
        "environment": ENVIRONMENT,
        "flags": {kind.name: [*QUICKLY, *kind.flags] for kind in KINDS},
        "seed": options.seed,
        "seconds_undisturbed": lengths,
        "summary": summary(runs, asked_for),
        "each": runs,
    }
    measure.write_result(options.out, "kills", record, table=table(record))
    counts = record["summary"]
    return 1 if counts["losses"] or counts["kills"] < asked_for else 0


if __name__ == "__main__":
    sys.exit(main())
