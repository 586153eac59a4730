"""Train a network and evaluate it: a run from start to end, and its loop."""

import contextlib
import os
import signal
from pathlib import Path

import jax

from alexnet_jax.system.signals import stop_requests
from alexnet_jax.training.banner import describe_run
from alexnet_jax.training.checkpoint import Checkpointer, has_checkpoint
from alexnet_jax.training.config import Config, validate
from alexnet_jax.training.metrics import shows_top5
from alexnet_jax.training.progress import Progress
from alexnet_jax.training.resume import (
    alone_in,
    begin,
    checked_folder,
    compare,
    learning_rate_factor,
    prepare,
    require_same_epochs,
    restore,
)
from alexnet_jax.training.run import Run, Stopped
from alexnet_jax.training.steps import TrainState, make_train_step
from alexnet_jax.training.timing import TIMES_FILE, TRACING, Profiler, StepClock, next_batch
from alexnet_jax.training.workdir import (
    CHECKPOINTS,
    STATISTICS_FILE,
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
      CheckpointError, OSError: the workdir cannot be written, or the disk is full;
        earlier checkpoints stay intact.
      FloatingPointError: the loss or a parameter is not finite; the last good
        checkpoint stays.
      KeyboardInterrupt, SystemExit: Ctrl-C, or SIGTERM or SIGUSR1 (exit status 143 or
        138), came, and a checkpoint has been written.
    """
    clock = StepClock()
    path = checked_folder(workdir)
    validate(config)
    checkpoints = path / CHECKPOINTS
    is_resumed = has_checkpoint(checkpoints)
    # Errors of config, workdir and data come before anything is written.
    differences, experiment = prepare(config, path)
    first = None if is_resumed else begin(experiment)
    path.mkdir(parents=True, exist_ok=True)
    with alone_in(path), Checkpointer(checkpoints, keep=config.checkpoint.keep) as checkpointer:
        if restored := restore(checkpointer, experiment, differences):
            state, metadata = restored
            # Another process may have changed the workdir since `prepare` read it.
            differences = compare(config, metadata["config"], path)
            require_same_epochs(metadata, experiment, path)
            origin = [f"resuming from step {int(state.step)} ({checkpointer.directory})"]
        else:
            experiment, state, (how, *more) = first or begin(experiment)
            metadata = {}
            origin = [f"no checkpoint in {checkpointer.directory}: {how}", *more]
        step, writes_files = int(state.step), jax.process_index() == 0
        if writes_files:
            if not restored:  # left over from a start without a checkpoint
                (path / TIMES_FILE).unlink(missing_ok=True)
            experiment.statistics.save(path / STATISTICS_FILE)
            write_class_names(path, experiment.train_source.class_names)
            write_config(path, experiment.config)
        with MultiWriter(
            path,
            total_steps=experiment.total_steps,
            resume_step=step if restored else None,
            enabled=writes_files,
            show_top5=shows_top5(experiment.train_source.num_classes),
        ) as writers:
            for line in (*describe_run(experiment), *differences, *origin):
                writers.text(line)
            run = Run(
                experiment,
                state,
                Progress.resume(step, metadata, config),
                checkpointer,
                writers,
                clock,
                saved_step=step if restored else -1,
            )
            factor = learning_rate_factor(metadata, config)
            if factor != 1.0:
                run.scale_learning_rate(factor)
            try:
                _train(run, path / "profile")
            finally:
                if writes_files and run.step > step:
                    # A full disk must not hide the error that ended the run.
                    with contextlib.suppress(OSError):
                        clock.append_to(path / TIMES_FILE, first_step=step, last_step=run.step)
            return run.state


def _train(run: Run, profile: Path) -> None:
    """Train and evaluate to the end; on a signal write a checkpoint and exit."""
    with stop_requests() as run.stop:
        try:
            if run.has_ended:
                total = run.experiment.total_steps
                shorter = f", and has {total} by now" if total < run.step else ""
                run.writers.text(f"nothing to do: the run ended at step {run.step}{shorter}")
            else:
                _loop(run, profile)
            _finish(run)
        except Stopped as stopped:
            run.save()
            run.writers.text(
                f"stopped at step {run.step} by {signal.Signals(stopped.signal).name}; "
                "the same command goes on from here"
            )
            if stopped.signal == signal.SIGINT:
                raise KeyboardInterrupt("checkpoint written") from None
            raise SystemExit(128 + stopped.signal) from None
        if run.stop.signal:
            name = signal.Signals(run.stop.signal).name
            run.writers.text(f"{name}: the run has ended, nothing is left to do")


def _loop(run: Run, profile: Path) -> None:
    """Take the remaining steps; raise `Stopped` after a signal.

    A log line, an evaluation and a checkpoint follow a step, in this order. Each may be
    repeated, so a run that was killed between two of them resumes exactly.
    """
    config, experiment = run.config, run.experiment
    if run.evaluation_due() and run.progress.evaluated_step < run.step:
        run.evaluate()  # the previous process did not finish it
        run.save()
    with (
        Profiler(
            profile, count=config.profile, start_step=run.step, say=run.writers.text
        ) as profiler,
        experiment.train_batches(run.step) as batches,
    ):
        batch = experiment.put(next(batches))
        train_step = run.compile(
            "training", make_train_step(experiment.spec), run.state, batch, run.statistics
        )
        run.clock.restart(run.step, batches.wait_seconds)
        while not run.has_ended:
            if run.summary_due():
                run.write_summary(batch)
            if profiler.is_due(run.step):
                with run.paused(TRACING):
                    profiler.switch()

            with jax.profiler.StepTraceAnnotation("train", step_num=run.step):
                run.state, metrics = train_step(run.state, batch, run.statistics)
            run.progress.step += 1
            run.log.add(run.step, metrics)

            decision = run.vote()
            is_last = run.step >= experiment.total_steps or decision.stop_signal != 0
            if not is_last:  # decode and transfer while the devices compute
                batch = experiment.put(next_batch(batches, metrics["loss"]))
            if is_last or run.step % config.log_every_steps == 0:
                target_reached = run.log.write(run.step, batches.wait_seconds)
                run.progress.target_reached = target_reached
            if decision.stop_signal and not run.has_ended:
                raise Stopped(decision.stop_signal)
            if run.evaluation_due():
                run.evaluate(config.eval_views if run.has_ended else 1)
            if run.checkpoint_due(decision.save):
                run.save()


def _finish(run: Run) -> None:
    """Save the last step and evaluate it, unless that is done."""
    if run.saved_step != run.step:
        run.save()  # before an evaluation that may fail
    error = run.current_error()
    # The checkpoint has an error if an earlier process evaluated this step.
    if error is None and run.checkpointer.top1_error(run.step) is None:
        run.evaluate(run.config.eval_views)
        run.save()
