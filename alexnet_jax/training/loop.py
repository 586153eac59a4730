"""Train a network and evaluate it: a run from start to end, and its loop."""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import jax

from alexnet_jax.system.signals import stop_requests
from alexnet_jax.training.banner import describe_run, say_place
from alexnet_jax.training.checkpoint import Checkpointer
from alexnet_jax.training.config import Config, as_json, validate
from alexnet_jax.training.metrics import shows_top5
from alexnet_jax.training.resume import prepare, require_same_epochs
from alexnet_jax.training.run import Progress, Run, Stopped
from alexnet_jax.training.steps import TrainState, make_train_step
from alexnet_jax.training.timing import TIMES_FILE, TRACING, Profiler, StepClock, next_batch
from alexnet_jax.training.workdir import (
    CHECKPOINTS,
    STATISTICS_FILE,
    alone_in,
    checked_folder,
    from_stored,
    write_class_names,
    write_config,
)
from alexnet_jax.training.writers import MultiWriter


def train_and_evaluate(config: Config, workdir: str | os.PathLike[str]) -> TrainState:
    """Train a network, or resume its training, and evaluate it.

    The same config and workdir resume the run where it stopped. The result is exactly
    that of a run that never stopped. A new workdir is a new run.

    Args:
      config: see `config.get_config`.
      workdir: folder for `config.json`, `classes.json` (the names by label),
        `metrics.jsonl`, `times.jsonl`, `statistics.npz`, `checkpoints/`, `profile/` and
        TensorBoard's event files; created if it does not exist.

    Returns:
      The final state.

    Raises:
      ConfigError: the config is wrong, or the workdir holds another network, has
        epochs of another length, or is in use by another run.
      CheckpointError: all checkpoints of the workdir are damaged.
      OSError: the workdir cannot be written, or the disk is full; earlier checkpoints
        stay intact.
      FloatingPointError: the loss or a parameter is not finite; the last good
        checkpoint stays.
      KeyboardInterrupt: after SIGINT (Ctrl-C); a checkpoint has been written.
      SystemExit: after SIGTERM (exit status 143) or SIGUSR1 (138); a checkpoint has been
        written.
    """
    clock = StepClock()
    path = checked_folder(workdir)
    validate(config)
    # Errors of config, workdir and data come before anything is written.
    experiment, state, origin = prepare(config, path)
    say_place(experiment)
    path.mkdir(parents=True, exist_ok=True)
    checkpoints, writes_files = path / CHECKPOINTS, jax.process_index() == 0
    with alone_in(path), Checkpointer(checkpoints, keep=config.checkpoint.keep) as checkpointer:
        if restored := checkpointer.restore(experiment.abstract_state()):
            state, metadata = restored
            # Fields that the version of the checkpoint did not know take their default.
            metadata["config"] = as_json(from_stored(metadata["config"]))
            require_same_epochs(metadata, experiment, path)
            origin = [f"resuming from step {int(state.step)} ({checkpoints})"]
        else:
            metadata, origin[0] = {}, f"no checkpoint in {checkpoints}: {origin[0]}"
        assert state is not None  # there is a checkpoint, or `prepare` has found none
        step = int(state.step)
        if writes_files:
            if not metadata:  # left over from a start without a checkpoint
                (path / TIMES_FILE).unlink(missing_ok=True)
            experiment.statistics.save(path / STATISTICS_FILE)
            write_class_names(path, experiment.train_source.class_names)
            write_config(path, experiment.config)
        with (
            MultiWriter(
                path,
                total_steps=experiment.total_steps,
                steps_per_epoch=experiment.steps_per_epoch,
                resume_step=step if metadata else None,
                enabled=writes_files,
                show_top5=shows_top5(experiment.train_source.num_classes),
            ) as writers,
            stop_requests() as stop,
        ):
            for line in (*describe_run(experiment), *origin):
                writers.text(line)
            progress = Progress.resume(step, metadata, config)
            saved_step = step if metadata else -1
            run = Run(experiment, state, progress, checkpointer, writers, clock, stop, saved_step)
            # A rate that is constant, or lowered by the plateau rule, is stored in the
            # checkpoint. The other schedules read the config at every step.
            if metadata and config.schedule.name in ("constant", "plateau"):
                before = metadata["config"]["optim"]["learning_rate"]
                run.scale_learning_rate(config.optim.learning_rate / before)
            try:
                with _explained_divergence(run):
                    _train(run, path / "profile")
            finally:
                if writes_files and run.step > step:
                    # A full disk must not hide the error that ended the run.
                    with contextlib.suppress(OSError):
                        clock.append_to(path / TIMES_FILE, first_step=step, last_step=run.step)
            return run.state


def _train(run: Run, profile: Path) -> None:
    """Train and evaluate to the end; on a signal write a checkpoint and exit."""
    try:
        if run.has_ended:
            run.writers.text(f"nothing to do: the run ended at step {run.step}")
        else:
            _loop(run, profile)
        _finish(run)
    except Stopped as stopped:
        run.save()
        name = signal.Signals(stopped.signal).name
        run.writers.text(
            f"stopped at step {run.step} by {name}; the same command goes on from here"
        )
        if stopped.signal == signal.SIGINT:
            raise KeyboardInterrupt("checkpoint written") from None
        raise SystemExit(128 + stopped.signal) from None


@contextlib.contextmanager
def _explained_divergence(run: Run) -> Iterator[None]:
    """Add the last good checkpoint and what to do to a FloatingPointError."""
    try:
        yield
    except FloatingPointError as error:
        folder = run.checkpointer.directory
        good = f"The last good checkpoint is that of step {run.saved_step} in {folder}."
        if run.saved_step < 0:
            good = f"There is no checkpoint in {folder} yet."
        raise FloatingPointError(
            f"{error} {good} Try a lower --config.optim.learning_rate. To find the layer, "
            "run the same command with --config.summaries_every_steps=1, which prints the "
            "gradient norm of each layer."
        ) from error


def _loop(run: Run, profile: Path) -> None:
    """Take the remaining steps; raise `Stopped` after a signal.

    A log line, an evaluation and a checkpoint follow a step, in this order. Each may be
    repeated, so a run that was killed between two of them resumes exactly.
    """
    config, experiment = run.config, run.experiment
    if run.evaluation_due() and run.progress.evaluated_step < run.step:
        run.evaluate()  # the previous process did not finish it
        run.save()
    profiler = Profiler(profile, config.profile, run.step)
    with profiler, experiment.train_batches(run.step) as batches:
        batch = experiment.put(next(batches))
        train_step = run.compiled("training", make_train_step, (run.state, batch, run.statistics))
        run.clock.restart(run.step, batches.wait_seconds)
        while not run.has_ended:
            if is_due(run.step, config.summaries_every_steps):
                run.write_summary(batch)
            if profiler.is_due(run.step):
                with run.paused(TRACING):
                    profiler.switch(run.step)

            with jax.profiler.StepTraceAnnotation("train", step_num=run.step):
                run.state, metrics = train_step(run.state, batch, run.statistics)
            run.progress.step += 1
            run.log.add(run.step, metrics)

            decision = run.vote()
            is_last = run.step >= experiment.total_steps
            if not (is_last or decision.stop_signal):  # decode while the devices compute
                batch = experiment.put(next_batch(batches, metrics["loss"]))
            if is_last or is_due(run.step, config.log_every_steps):
                run.progress.target_reached = run.log.write(run.step, batches.wait_seconds)
            if decision.stop_signal and not run.has_ended:
                raise Stopped(decision.stop_signal)
            is_best = run.evaluation_due() and run.evaluate(
                config.eval_views if run.has_ended else 1
            )
            if is_best or decision.save or is_due(run.step, config.checkpoint.every_steps):
                run.save()


def is_due(step: int, every_steps: int) -> bool:
    """Return True at each multiple of `every_steps`; False if that is 0."""
    return every_steps > 0 and step % every_steps == 0


def _finish(run: Run) -> None:
    """Save the last step and evaluate it, unless that is done."""
    if run.saved_step != run.step:
        run.save()  # before an evaluation that may fail
    # The checkpoint has an error if an earlier process evaluated this step.
    if run.error is None and run.checkpointer.top1_error(run.step) is None:
        run.evaluate(run.config.eval_views)
        run.save()
