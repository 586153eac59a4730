"""train_and_evaluate(config, workdir): the whole of a run."""

import collections
import contextlib
import dataclasses
import itertools
import math
import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from alexnet_jax import distributed, finetune, parallel
from alexnet_jax import experiment as experiment_lib
from alexnet_jax.checkpoint import Checkpointer, CheckpointError, has_checkpoint
from alexnet_jax.data import Batches, locks
from alexnet_jax.data import statistics as statistics_lib
from alexnet_jax.data.imagenet import OFFICIAL_COUNTS, wnids
from alexnet_jax.data.loader import Batch
from alexnet_jax.data.paths import expanded, require_writable
from alexnet_jax.evaluate import evaluate
from alexnet_jax.experiment import Config, ConfigError, Experiment
from alexnet_jax.metrics import shows_top5
from alexnet_jax.model import INITS
from alexnet_jax.optim import Plateau
from alexnet_jax.profiler import Profiler
from alexnet_jax.signals import Stop, stop_requests
from alexnet_jax.steps import TrainState
from alexnet_jax.stopwatch import (
    CHECKPOINTS,
    COMPILING,
    EVALUATION,
    SUMMARIES,
    TIMES_FILE,
    TRACING,
    TRAINING,
    WAITING,
    Stopwatch,
)
from alexnet_jax.writers import METRICS_FILE, MultiWriter, last_step_with, make_writers

# Held as long as a run trains; says who.
LOCK_FILE = ".lock"
PROFILE = "profile"
# Steps that may be under way on the devices before the host waits for one: enough
# to keep them busy, few enough to bound memory.
STEPS_IN_FLIGHT = 2
# How exactly it is known when they had nothing left to do: to this share of the time
# that the host has waited, but no more often than so many seconds.
POLL_SHARE, POLL_SECONDS = 0.05, 0.0002
# A loss as near to ln(classes), in nats, is that of guessing.
STALL_MARGIN = 0.02


def train_and_evaluate(config: Config, workdir: str | os.PathLike[str]) -> TrainState:
    """Trains, or goes on training, and evaluates; everything lands in `workdir`.

    The same config and workdir again go on where the last run stopped, exactly: the
    result is the one of a run that never stopped. A new workdir is a new run.

    Args:
      config: see `configs/common.py`.
      workdir: folder for `config.json`, `classes.json` (the names by label),
        `metrics.jsonl`, `times.jsonl`, `statistics.npz`, `checkpoints/`, `profile/` and
        TensorBoard's event files; made if it does not exist.

    Returns:
      The final state.

    Raises:
      ConfigError: for a config that is wrong, a workdir of another network or of epochs
        of another length, or one that another run is in.
      PathError: (an OSError) the workdir cannot be written to.
      CheckpointError, FullDiskError: (the second is an OSError) there is no room for a
        checkpoint or a record; earlier checkpoints are as they were.
      FloatingPointError: when the loss is no longer finite; the last good checkpoint
        stays.
      KeyboardInterrupt, SystemExit: after Ctrl-C, or SIGTERM or SIGUSR1 (exit status
        143 or 138), once a checkpoint has been written.
    """
    watch = Stopwatch()
    path = _folder(workdir)
    experiment_lib.validate(config)
    # Before anything is written: weights to start from may be the wrong ones.
    begun = has_checkpoint(path / experiment_lib.CHECKPOINTS)
    if not begun:
        finetune.check_source(config)
    differences, experiment = prepare(config, path)
    first = None if begun else finetune.begin(experiment)
    path.mkdir(parents=True, exist_ok=True)
    with (
        _alone_in(path),
        Checkpointer(
            path / experiment_lib.CHECKPOINTS, keep=config.checkpoint.keep
        ) as checkpointer,
    ):
        restored = _restore(checkpointer, experiment, differences)
        if restored:
            state, host = restored
            # What the checkpoint was trained with: the workdir may have been begun, or
            # its config changed, since `prepare` looked.
            differences = compare(config, host["config"], path)
            _require_same_epochs(host, experiment, path)
            origin = [
                *_new_length(host, config),
                f"resuming from step {int(state.step)} ({checkpointer.directory})",
            ]
        else:
            experiment, state, (how, *more) = first or finetune.begin(experiment)
            host: dict[str, Any] = {}
            origin = [f"no checkpoint in {checkpointer.directory}: {how}", *more]
        if jax.process_index() == 0:
            _write_about(path, experiment, is_new=not restored)
        with make_writers(
            path,
            total_steps=experiment.total_steps,
            resume_step=int(state.step) if restored else None,
            enabled=jax.process_index() == 0,
            show_top5=shows_top5(experiment.train_source.num_classes),
        ) as writers:
            for line in (*_describe(experiment), *differences, *origin):
                writers.text(line)
            run = _Run(experiment, state, checkpointer, writers, host, watch)
            _train(run, path)
            return run.state


def _folder(workdir: str | os.PathLike[str]) -> Path:
    """The workdir, absolute; ConfigError or PathError if it cannot be one."""
    if "://" in os.fspath(workdir):
        raise ConfigError(
            f"--workdir={workdir} must be a local or mounted folder: a run is resumed from "
            "what is renamed there at once."
        )
    if "," in os.fspath(workdir):
        raise ConfigError(
            f"--workdir={workdir} has a comma, which separates runs in --mode=eval and in "
            "the report: they could not read this one. Name a folder without a comma."
        )
    path = expanded(workdir).absolute()
    if path.exists() and not path.is_dir():
        raise ConfigError(f"--workdir={workdir} is a file; name a folder, or none yet.")
    require_writable(path)
    return path


def _require_same_epochs(
    host: dict[str, Any], experiment: Experiment, workdir: Path
) -> None:
    """Raises ConfigError if an epoch has not as many steps as in the checkpoint.

    The epoch, the learning rate and the place in the data follow from the step.
    """
    old, new = host["config"]["data"]["batch_size"], experiment.config.data.batch_size
    now = experiment.train_source.num_examples
    before = host.get("num_examples", now)  # a workdir may be from before it was kept
    if old != new:
        change = f"has --config.data.batch_size={old}, not {new}"
        parts = experiment.config.optim.accumulate_steps
        parts = "N" if old % new else old // new * parts
        remedy = f"Keep {old}"
        if new < old:
            remedy += (
                f"; --config.optim.accumulate_steps={parts} is the same run in less memory "
                "(but for batch normalisation)"
            )
    elif before != now:
        change = f"was trained on {before:,} pictures, and there are {now:,} now"
        remedy = "Bring the old ones back"
    else:
        return
    raise ConfigError(
        f"{workdir} {change}: its steps would mean other epochs, learning rates and "
        f"places in the data. {remedy}. Or take a new --workdir; "
        f"--config=configs/finetune.py:{workdir} starts it from these weights."
    )


def _new_length(host: dict[str, Any], config: Config) -> list[str]:
    """A line if the rest of a schedule is laid out anew, as the run's length changed."""
    old, name = host["config"].get("num_epochs"), config.schedule.name
    if name not in ("cosine", "polynomial") or old in (None, config.num_epochs):
        return []
    line = (
        f"the {name} schedule is laid out over {config.num_epochs:g} epochs instead of "
        f"{old:g}: from here on the learning rate is another"
    )
    return [line]


def _restore(
    checkpointer: Checkpointer, experiment: Experiment, differences: Sequence[str]
) -> tuple[TrainState, dict[str, Any]] | None:
    """`Checkpointer.restore`; its error says how the configs differ, if they do."""
    try:
        return checkpointer.restore(experiment.abstract_state())
    except CheckpointError as error:
        if not differences:
            raise
        lines = "\n".join(["", *differences])
        raise CheckpointError(f"{error}{lines}") from error


@contextlib.contextmanager
def _alone_in(workdir: Path) -> Iterator[None]:
    """Holds a workdir for this run; process 0 does so for all of its processes.

    Raises:
      ConfigError: another run holds it, and which.
    """
    with contextlib.ExitStack() as held:
        holder = ""
        if jax.process_index() == 0:
            try:
                held.enter_context(locks.held(workdir / LOCK_FILE, wait=False))
            except locks.HeldError as error:
                holder = error.holder
        refused = bool(holder)
        if jax.process_count() > 1:
            refused = multihost_utils.broadcast_one_to_all(np.int32(refused))
        if refused:
            raise ConfigError(
                f"{workdir} is in use by {holder or 'another run, see process 0'}. Two "
                "runs in one workdir would spoil each other's: wait for that one, end "
                "it, or take another --workdir."
            )
        yield


def _write_about(path: Path, experiment: Experiment, *, is_new: bool) -> None:
    """What a workdir holds beside records and checkpoints."""
    if is_new:  # those of a start that came to nothing
        (path / TIMES_FILE).unlink(missing_ok=True)
    experiment.statistics.save(path / experiment_lib.STATISTICS_FILE)
    experiment_lib.write_class_names(path, experiment.train_source.class_names)
    experiment_lib.write_config(path, experiment.config)


def _train(run: "_Run", path: Path) -> None:
    """Trains to the end, or until a signal; and notes where the time went."""
    if jax.process_index() == 0:  # the one that writes
        metrics = path / METRICS_FILE
        run.summarized_step = last_step_with(metrics, "grad_norm/")
        several = run.ended and run.config.eval_views > 1
        run.recorded_step = last_step_with(
            metrics, "eval/views_" if several else "eval/"
        )
    profiler = Profiler(
        path / PROFILE,
        count=run.config.profile,
        start_step=run.step,
        say=run.writers.text,
    )
    first_step = run.step
    try:
        with stop_requests() as stop, profiler:
            run.train(stop, profiler)
    finally:
        if jax.process_index() == 0 and run.step > first_step:
            # On a full disk what has ended the run is to be heard, not this.
            with contextlib.suppress(OSError):
                run.watch.append_to(
                    path / TIMES_FILE, first_step=first_step, last_step=run.step
                )


def prepare(config: Config, workdir: Path) -> tuple[list[str], Experiment]:
    """The config's differences from the workdir's, in lines, and the experiment.

    Raises:
      ConfigError: for a config that is wrong, or a workdir of another network.
    """
    experiment_lib.validate(config, training=False)
    differences, statistics = [], None
    # What a run without a checkpoint left behind may be of other data.
    begun = has_checkpoint(workdir / experiment_lib.CHECKPOINTS)
    if begun:
        differences = _compare_with_workdir(config, workdir)
        stored = workdir / experiment_lib.STATISTICS_FILE
        if stored.exists():
            statistics = statistics_lib.load(
                stored, config.data.image_size, remedy=statistics_lib.TRAIN_AGAIN
            )
            if jax.process_index() == 0:
                print(
                    experiment_lib.about_mean(workdir, statistics, config), flush=True
                )
    experiment = experiment_lib.build(config, statistics=statistics)
    if begun:
        _require_same_classes(experiment.train_source.class_names, workdir)
    say_place(experiment)
    return differences, experiment


def say_place(experiment: Experiment) -> None:
    """Each of several processes says where it is; the rest is process 0's."""
    if jax.process_count() > 1:
        low, high = experiment.positions()
        part = f"examples {low} to {high - 1} of each batch"
        here, everywhere = jax.local_device_count(), jax.device_count()
        print(
            f"process {jax.process_index()} of {jax.process_count()} on "
            f"{socket.gethostname()}: {here} of {everywhere} devices; "
            f"{_mesh(experiment)}, {part}",
            flush=True,
        )


def _compare_with_workdir(config: Config, workdir: Path) -> list[str]:
    """`compare` with the workdir's own config."""
    saved = experiment_lib.read_config(workdir)
    return [] if saved is None else compare(config, saved, workdir)


def compare(config: Config, saved: dict[str, Any], workdir: Path) -> list[str]:
    """Lines that say how the config differs from one that a workdir was trained with.

    Raises:
      ConfigError: when it describes another network.
    """
    old = experiment_lib.flat(saved)
    new = experiment_lib.flat(experiment_lib.as_json(config))
    changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    lines = [
        f"  --config.{key}: "
        + (f"{old[key]} in the workdir" if key in old else "newer than the workdir")
        + (f", now {new[key]}" if key in new else "; there is no such field any more")
        for key in changed
    ]
    fixed = ("model.", "data.image_size", "data.crop_size")
    if any(key.startswith(fixed) for key in changed):
        raise ConfigError(
            f"{workdir} holds another network:\n"
            + "\n".join(
                line
                for key, line in zip(changed, lines, strict=True)
                if key.startswith(fixed)
            )
            + "\nTake a new --workdir, or the config that this one was made with."
        )
    return ["the config differs from this workdir's:", *lines] if lines else []


def _require_same_classes(names: Sequence[str], workdir: Path) -> None:
    """Raises ConfigError if the labels mean something else than in the workdir."""
    old = experiment_lib.read_class_names(workdir)
    if old is None or old == list(names):
        return
    pairs = itertools.zip_longest(old, names, fillvalue="none")
    label, (was, now) = next((k, p) for k, p in enumerate(pairs) if p[0] != p[1])
    raise ConfigError(
        f"{workdir} was trained on other classes: {len(old)} of them, label {label} was "
        f"{was!r}; here are {len(names)}, and label {label} is {now!r}. Take a new "
        "--workdir, or the pictures that it was trained on."
    )


def _describe(experiment: Experiment) -> list[str]:
    """What runs, on what, over what: the first lines of every log."""
    network, mesh = experiment.model.network, experiment.mesh
    shapes = experiment.abstract_state().params
    parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    device = mesh.devices.flat[0]
    classes, size = network.layers[-1].features, experiment.crop_size
    kind = f"{mesh.size} x {device.device_kind} ({device.platform})"
    if jax.process_count() > 1:
        kind += f" in {jax.process_count()} processes"
    train = experiment.train_source
    about = f"{parameters:,} parameters, {classes} classes, images of {size} pixels"
    lines = [
        f"network {network.name}: {about}",
        f"devices {kind}: {_mesh(experiment)}",
        f"training on {train.num_examples:,} pictures: {train.description}",
    ]
    if train.class_names == wnids() and train.num_examples < OFFICIAL_COUNTS["train"]:
        lines.append(
            f"WARNING: ILSVRC-2012 has {OFFICIAL_COUNTS['train']:,} training pictures; "
            "published error rates are of all of them"
        )
    if experiment.eval_source is not None:
        lines.append(
            f"evaluating on {experiment.eval_source.num_examples:,} pictures: "
            f"{experiment.eval_source.description}"
        )
    splits = filter(None, (train, experiment.eval_source))
    lines += [f"WARNING: {split.left_out}" for split in splits if split.left_out]
    return lines


def _mesh(experiment: Experiment) -> str:
    mesh, transform = experiment.mesh, experiment.config.parallel.transform
    rows, columns = mesh.shape[parallel.DATA], mesh.shape[parallel.COLUMN]
    by = "" if transform == "shard_map" else f" by {transform}"
    return f"mode {experiment.mode}{by}, {rows} data x {columns} column"


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]))


def next_batch(batches: Batches, computing: Any) -> Batch:
    """The next batch, waited for.

    The wait counts (`Batches.wait_seconds`, `data_wait_frac`) only from when the devices
    have nothing left to do: the host runs ahead of them, and a loader that is a little
    too slow would otherwise seem to cost all of the time.

    Args:
      batches: where it comes from.
      computing: a result, an array, of the last step that was given to the devices.
    """
    started = time.perf_counter()
    while not computing.is_ready():
        waited = time.perf_counter() - started
        if batches.wait(max(POLL_SECONDS, POLL_SHARE * waited)):
            break
    return next(batches)


class _Asked(NamedTuple):
    """What the processes of a run are to do: stop, for which signal (0: none); save."""

    stop_signal: int
    save: bool


class _CutShort(Exception):
    """An evaluation ends here, as the run was asked to stop by `signal`."""

    def __init__(self, number: int):
        self.signal = number


class _Run:
    """The state of a run in progress, and what happens between its steps."""

    def __init__(
        self,
        experiment: Experiment,
        state: TrainState,
        checkpointer: Checkpointer,
        writers: MultiWriter,
        host: dict[str, Any],
        watch: Stopwatch,
    ):
        self.watch = watch
        self.experiment = experiment
        self.config = experiment.config
        self.state = state
        self.step = int(state.step)
        self.checkpointer = checkpointer
        self.writers = writers
        self.statistics = experiment.pixel_statistics()
        schedule = self.config.schedule
        self.plateau = Plateau(
            patience=schedule.patience,
            factor=schedule.factor,
            max_drops=schedule.max_drops,
            **host.get("plateau", {}),
        )
        self._follow_learning_rate(host)
        self.train_step: Any = None  # compiled, as are those that follow
        self.eval_steps: dict[int, Any] = {}  # by the number of views
        self.summary_step: Any = None
        # A summary comes between a step's checkpoint and the next step: the run that
        # stopped there may have written it already.
        self.summarized_step = -1
        # The same of an evaluation that is made up for.
        self.recorded_step = -1
        # Whether one is due after this step and not done: the run stopped in it.
        self.evaluation_owed: bool = host.get("evaluation_owed", False)
        self.warned_of_stall = False
        self.recent: list[dict[str, jax.Array]] = []  # metrics since the last record
        self.saved_step = self.evaluated_step = -1
        self.evaluated_error: float | None = None
        # Whether the training error came down to `stop_at_train_error`, which ends a run.
        target = self.config.stop_at_train_error
        reached = host.get("target_reached", False)
        self.target_reached = reached and target == host["config"].get(
            "stop_at_train_error"
        )
        self.saved_at = time.monotonic()
        self.stop = Stop()
        # One process knows at once whether it was asked to stop; several agree.
        several = jax.process_count() > 1
        self.agreement = distributed.Agreement(experiment.mesh) if several else None
        self.votes: collections.deque[jax.Array] = collections.deque()
        self._restart_clock(0.0)

    @property
    def ended(self) -> bool:
        """Whether no step is left."""
        return self.step >= self.experiment.total_steps or self.target_reached

    # The loop.

    def train(self, stop: Stop, profiler: Profiler) -> None:
        """Steps until the end, or until asked to stop; then a checkpoint."""
        self.stop = stop
        try:
            if self.evaluation_owed:
                self._make_up_for_evaluation()
            if self.ended:
                self._end_again()
            else:
                self._take_steps(profiler)
            if stop.signal:  # it came too late
                name = signal.Signals(stop.signal).name
                self.writers.text(f"{name}: the run has ended, nothing is left to do")
        except _CutShort as cut:
            self._stopped(cut.signal)

    def _end_again(self) -> None:
        """A run without a step left: its last evaluation, if that is missing."""
        total = self.experiment.total_steps
        shorter = f", and has {total} by now" if total < self.step else ""
        self.writers.text(f"nothing to do: the run ended at step {self.step}{shorter}")
        # Unless it ended between the last checkpoint and the evaluation of it, or is a
        # new run of no steps.
        begun = self.checkpointer.latest_whole_step() == self.step
        if not begun or self.checkpointer.top1_error(self.step) is None:
            self._save_last(self._evaluate(self.config.eval_views))

    def _make_up_for_evaluation(self) -> None:
        """The evaluation of the restored step, whose checkpoint is of before it."""
        error = self.checkpointer.top1_error(self.step)
        if error is None:
            self._save(self._evaluate(self.config.eval_views if self.ended else 1))
        else:  # an earlier start has made up for it, and left the arrays as they were
            self._apply_plateau_rule(error)
        self.evaluation_owed = False

    def _take_steps(self, profiler: Profiler) -> None:
        total = self.experiment.total_steps
        with self.experiment.train_batches(self.step) as batches:
            batch = self._put(next(batches))
            args = (self.state, batch, self.statistics)
            step = self.experiment.train_step()
            self.train_step = train_step = self._compile("training", step, args)
            self._restart_clock(batches.wait_seconds)
            while True:
                self._summarize(batch)
                if profiler.is_due(self.step):
                    with self._off_the_clock(TRACING):
                        profiler.switch(self.step)
                with jax.profiler.StepTraceAnnotation("train", step_num=self.step):
                    self.state, metrics = train_step(self.state, batch, self.statistics)
                self.step += 1
                self._keep(metrics)
                asked = self._agree()
                last = self.step >= total or asked.stop_signal != 0
                if not last:
                    # Decoded and sent while the devices compute.
                    batch = self._put(next_batch(batches, metrics["loss"]))
                self._between_steps(batches.wait_seconds, last, asked.save)
                if last or self.target_reached:
                    break
        profiler.close()  # what follows is no training
        if asked.stop_signal and not self.ended:
            self._stopped(asked.stop_signal)
        if self.evaluated_step != self.step and self.experiment.eval_source is not None:
            self._save()  # before an evaluation that may fail
            self._evaluate(self.config.eval_views)
        self._save_last(self.evaluated_error)

    def _keep(self, metrics: dict[str, jax.Array]) -> None:
        if self.step == 1:
            classes = self.experiment.model.network.layers[-1].features
            self.writers.text(
                f"loss at step 0: {float(metrics['loss']):.4f}, "
                f"ln({classes}) = {math.log(classes):.4f}"
            )
        self.recent.append(metrics)
        if len(self.recent) > STEPS_IN_FLIGHT:
            self.recent[-1 - STEPS_IN_FLIGHT]["loss"].block_until_ready()
        self.writers.progress(self.step)

    def _agree(self) -> "_Asked":
        """What is asked of all processes after this step or batch of an evaluation.

        One process's clock and signals are its own. What several of them want is
        known to all of them STEPS_IN_FLIGHT of these later, and after the same one.
        """
        by_time = self.config.checkpoint.every_minutes
        minutes = (time.monotonic() - self.saved_at) / 60
        wanted = _Asked(self.stop.signal or 0, bool(by_time) and minutes >= by_time)
        if self.agreement is None:
            return wanted
        self.votes.append(self.agreement.largest([*wanted]))
        if len(self.votes) <= STEPS_IN_FLIGHT:
            return _Asked(0, False)
        number, save = jax.device_get(self.votes.popleft())
        # Votes from before a checkpoint do not ask for another one.
        fresh = self.step - self.saved_step > STEPS_IN_FLIGHT
        return _Asked(int(number), bool(save) and fresh)

    def _between_steps(self, waited: float, last: bool, save: bool) -> None:
        if last or self.step % self.config.log_every_steps == 0:
            self._log(waited)
        if self._evaluation_is_due():
            error = self._evaluate(self.config.eval_views if self.ended else 1)
            if error is not None and self.checkpointer.is_best(error):
                self._save(error)
        by_step = self.config.checkpoint.every_steps
        if save or (by_step and self.step % by_step == 0):
            self._save()

    def _evaluation_is_due(self) -> bool:
        every = self.config.eval_every_epochs * self.experiment.steps_per_epoch
        if not every:
            return False
        return self.step // every > (self.step - 1) // every

    # Records.

    def _restart_clock(self, waited: float) -> None:
        self.clock = time.monotonic()
        self.clock_step = self.step
        self.clock_waited = waited

    @contextlib.contextmanager
    def _off_the_clock(self, what: str) -> Iterator[None]:
        """What happens within does not count as training time, but as `what`."""
        self.state.step.block_until_ready()
        started = time.monotonic()
        with self.watch.spending(what):
            yield
        self.clock += time.monotonic() - started

    def _log(self, waited: float) -> None:
        """Writes the means since the last record; raises if a loss is not finite."""
        if not self.recent:
            return
        recent = jax.device_get(self.recent)
        seconds = time.monotonic() - self.clock
        self.recent.clear()
        losses = np.array([metrics["loss"] for metrics in recent])
        finite = np.isfinite(losses)
        if not finite.all():
            least = self.step - len(losses) + 1
            first = least + int(np.argmin(finite))
            raise self._not_finite(
                f"The loss of step {first} is {losses[np.argmin(finite)]} (checked "
                f"together: steps {least} to {self.step})."
            )
        waited_here = waited - self.clock_waited
        self.watch.add(WAITING, waited_here)
        self.watch.add(TRAINING, seconds - waited_here)
        rate = (self.step - self.clock_step) / seconds
        self._write(
            {
                "train/loss": float(losses.mean()),
                "train/top1_error": float(np.mean([m["top1_error"] for m in recent])),
                "lr": float(recent[-1]["lr"]),
                "images_per_sec": rate * self.config.data.batch_size,
                "data_wait_frac": waited_here / seconds,
                "eta_seconds": (self.experiment.total_steps - self.step) / rate,
            }
        )
        self._restart_clock(waited)
        self._warn_of_stall(float(losses.mean()))
        # After a stop or a start a line of the log may be of a few steps only.
        if len(recent) == self.config.log_every_steps:
            error = float(np.mean([m["top1_error"] for m in recent]))
            self.target_reached = error <= self.config.stop_at_train_error > 0

    def _not_finite(self, problem: str) -> FloatingPointError:
        """The error that ends a run that diverged: what, what is left, what to do."""
        kept, folder = (
            self.checkpointer.latest_whole_step(),
            self.checkpointer.directory,
        )
        good = f"The last good checkpoint is that of step {kept} in {folder}."
        if kept is None:
            good = f"There is no checkpoint in {folder} yet."
        return FloatingPointError(
            f"{problem} {good} Try a lower --config.optim.learning_rate. To find the "
            "layer, run the same command with --config.summaries_every_steps=1, which "
            "prints the gradient norm of each layer."
        )

    def _warn_of_stall(self, loss: float) -> None:
        """Once, if from `stall_after_steps` on the network is still guessing."""
        after = self.config.stall_after_steps
        # The data's classes: units without any are learnt away at once.
        classes = self.experiment.train_source.num_classes
        guessing = math.log(classes)
        stalled = abs(loss - guessing) <= STALL_MARGIN
        if not after or self.step < after or not stalled or self.warned_of_stall:
            return
        self.warned_of_stall = True
        inits = [init for init in INITS if init != self.config.model.init]
        self.writers.text(
            f"WARNING: after {self.step} steps the loss is {loss:.4f}, that of guessing "
            f"(ln({classes}) = {guessing:.4f}): nothing is learnt. A network that starts "
            "with small weights may never leave this plateau, and whether it does "
            "depends on the biases and the seed (BVLC/caffe issues 401 and 2085). Start "
            "anew, in another --workdir, with one of: --config.model.init="
            f"{' or '.join(inits)}; another --config.seed; a warm-up, "
            "--config.schedule.name=cosine --config.schedule.warmup_epochs=1. Check the "
            "data as well: python -m alexnet_jax.prepare check --source="
            f"{self.config.data.source}"
        )

    def _summarize(self, batch: Any) -> None:
        """Writes the summary of the step that comes next, if one is due."""
        every = self.config.summaries_every_steps
        if not every or self.step % every:
            return
        with self._off_the_clock(SUMMARIES):
            args = (self.state, batch, self.statistics)
            if self.summary_step is None:
                step = self.experiment.summary_step()
                self.summary_step = self._compile("summary", step, args)
            scalars = jax.device_get(self.summary_step(*args))
        if self.step:  # a single batch's loss says more only before the first update
            del scalars["train/loss"]
        if self.step != self.summarized_step:
            self._write({name: float(value) for name, value in scalars.items()})

    def _write(self, scalars: dict[str, float]) -> None:
        epoch = self.step / self.experiment.steps_per_epoch
        self.writers.write(self.step, epoch, scalars)

    # Evaluations and checkpoints.

    def _evaluate(self, views: int = 1) -> float | None:
        """Evaluates, writes, applies the plateau rule; returns the centre's error."""
        self.evaluated_step, self.evaluated_error = self.step, None
        experiment = self.experiment
        if experiment.eval_source is None:
            return None
        self.evaluation_owed = self._evaluation_is_due()
        with self._off_the_clock(EVALUATION), experiment.eval_batches() as batches:
            errors = evaluate(
                lambda batch: self._eval_batch(batch, views),
                (experiment.put(batch) for batch in self._until_asked(batches)),
                expected_count=experiment.eval_source.num_examples,
            )
        if self.step != self.recorded_step:
            self._write({f"eval/{name}": value for name, value in errors.items()})
        self._apply_plateau_rule(errors["top1_error"])
        self.evaluation_owed = False
        self.evaluated_error = errors["top1_error"]
        return self.evaluated_error

    def _until_asked(self, batches: Batches) -> Iterator[Batch]:
        """An evaluation's batches; raises _CutShort once the run is to stop."""
        for batch in batches:
            asked = self._agree()
            if asked.stop_signal:
                raise _CutShort(asked.stop_signal)
            yield batch

    def _apply_plateau_rule(self, error: float) -> None:
        # The evaluation at the end of a run that is cut short by max_steps is not one
        # of the rule's: the run may go on as if it had never stopped.
        if self.config.schedule.name != "plateau" or not self._evaluation_is_due():
            return
        self.plateau, factor = self.plateau.after(error)
        if factor != 1.0:
            patience = self.plateau.patience
            self.writers.text(f"no better error in {patience} evaluations")
            self._scale_learning_rate(factor)

    def _eval_batch(self, batch: Any, views: int) -> Any:
        args = (self.state.params, self.state.batch_stats, batch, self.statistics)
        if views not in self.eval_steps:
            step = self.experiment.eval_step(views)
            self.eval_steps[views] = self._compile("evaluation", step, args)
        return self.eval_steps[views](*args)

    def _follow_learning_rate(self, host: dict[str, Any]) -> None:
        """A new learning rate in the config changes the one in the checkpoint.

        Schedules read the config at every step; a plain number is in the state.
        """
        if not host or self.config.schedule.name not in ("constant", "plateau"):
            return
        before = host["config"]["optim"]["learning_rate"]
        if self.config.optim.learning_rate != before:
            self._scale_learning_rate(self.config.optim.learning_rate / before)

    def _scale_learning_rate(self, factor: float) -> None:
        opt_state: Any = self.state.opt_state
        rate = opt_state.hyperparams["learning_rate"]
        new = np.asarray(jax.device_get(rate) * factor, rate.dtype)
        new = parallel.put_everywhere(new, self.experiment.mesh)
        hyperparams = {**opt_state.hyperparams, "learning_rate": new}
        opt_state = opt_state._replace(hyperparams=hyperparams)
        self.state = dataclasses.replace(self.state, opt_state=opt_state)
        self.writers.text(f"learning rate now {float(new):.3g}")

    def _save(self, top1_error: float | None = None) -> None:
        with self._off_the_clock(CHECKPOINTS):
            if not _all_finite(self.state.params):
                raise self._not_finite(
                    f"The parameters of step {self.step} are not finite; no checkpoint "
                    "was written."
                )
            metadata = {
                "config": experiment_lib.as_json(self.config),
                "plateau": self.plateau.progress(),
                "target_reached": self.target_reached,
                "evaluation_owed": self.evaluation_owed,
                "num_examples": self.experiment.train_source.num_examples,
                "versions": {"jax": jax.__version__},
            }
            self.checkpointer.save(
                self.step, self.state, metadata=metadata, top1_error=top1_error
            )
        if self.saved_step != self.step:
            self.writers.text(f"checkpoint of step {self.step}")
        self.saved_step, self.saved_at = self.step, time.monotonic()

    def _save_last(self, top1_error: float | None) -> None:
        self._save(top1_error)

    def _stopped(self, number: int) -> None:
        self._save()
        self.writers.text(
            f"stopped at step {self.step} by {signal.Signals(number).name}; the same "
            "command goes on from here"
        )
        if number == signal.SIGINT:
            raise KeyboardInterrupt("checkpoint written")
        raise SystemExit(128 + number)

    # Devices.

    def _put(self, batch: Any) -> Any:
        return self.experiment.put(batch)

    def _compile(self, what: str, step: Any, args: tuple[Any, ...]) -> Any:
        self.writers.text(f"compiling the {what} step ...")
        started = time.monotonic()
        with self.watch.spending(COMPILING):
            compiled = step.lower(*args).compile()
        seconds = time.monotonic() - started
        self.writers.text(f"compiled the {what} step in {seconds:.1f} s")
        return compiled
