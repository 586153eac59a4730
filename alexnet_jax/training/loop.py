"""Train a network and evaluate it: the whole of a run, and its loop."""

import contextlib
import os
import signal
from pathlib import Path

import jax

from alexnet_jax.system.signals import stop_requests
from alexnet_jax.training import finetune, load
from alexnet_jax.training.banner import describe_run
from alexnet_jax.training.checkpoint import Checkpointer, has_checkpoint
from alexnet_jax.training.config import Config, validate
from alexnet_jax.training.metrics import shows_top5
from alexnet_jax.training.progress import Progress, learning_rate_factor
from alexnet_jax.training.resume import (
    alone_in,
    checked_folder,
    compare,
    prepare,
    require_same_epochs,
    restore,
    schedule_changes,
)
from alexnet_jax.training.run import Run, Stopped
from alexnet_jax.training.steps import TrainState
from alexnet_jax.training.timing import (
    TIMES_FILE,
    TRACING,
    Profiler,
    StepClock,
    next_batch,
)
from alexnet_jax.training.writers import make_writers

PROFILE = "profile"


def train_and_evaluate(config: Config, workdir: str | os.PathLike[str]) -> TrainState:
    """Train, or go on training, and evaluate; everything lands in `workdir`.

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
      CheckpointError, OSError: the workdir cannot be written to, or the disk is full;
        earlier checkpoints are as they were.
      FloatingPointError: when the loss is no longer finite; the last good checkpoint
        stays.
      KeyboardInterrupt, SystemExit: after Ctrl-C, or SIGTERM or SIGUSR1 (exit status
        143 or 138), once a checkpoint has been written.
    """
    clock = StepClock()
    path = checked_folder(workdir)
    validate(config)
    # Before anything is written: weights to start from may be the wrong ones.
    checkpoints = path / load.CHECKPOINTS
    begun = has_checkpoint(checkpoints)
    if not begun:
        finetune.check_source(config)
    differences, experiment = prepare(config, path)
    first = None if begun else finetune.begin(experiment)
    path.mkdir(parents=True, exist_ok=True)
    with (
        alone_in(path),
        Checkpointer(checkpoints, keep=config.checkpoint.keep) as checkpointer,
    ):
        if restored := restore(checkpointer, experiment, differences):
            state, metadata = restored
            # With the config of the checkpoint: the workdir may have been begun, or its
            # config changed, since `prepare` looked.
            differences = compare(config, metadata["config"], path)
            require_same_epochs(metadata, experiment, path)
            origin = [
                *schedule_changes(metadata, config),
                f"resuming from step {int(state.step)} ({checkpointer.directory})",
            ]
        else:
            experiment, state, (how, *more) = first or finetune.begin(experiment)
            metadata = {}
            origin = [f"no checkpoint in {checkpointer.directory}: {how}", *more]
        writes, step = jax.process_index() == 0, int(state.step)
        if writes:
            if not restored:  # those of a start that came to nothing
                (path / TIMES_FILE).unlink(missing_ok=True)
            experiment.statistics.save(path / load.STATISTICS_FILE)
            load.write_class_names(path, experiment.train_source.class_names)
            load.write_config(path, experiment.config)
        with make_writers(
            path,
            total_steps=experiment.total_steps,
            resume_step=step if restored else None,
            enabled=writes,
            show_top5=shows_top5(experiment.train_source.num_classes),
        ) as writers:
            for line in (*describe_run(experiment), *differences, *origin):
                writers.text(line)
            progress = Progress.resume(step, metadata, experiment.config)
            saved_step = step if restored else -1
            run = Run(
                *(experiment, state, progress, checkpointer, writers, clock),
                saved_step=saved_step,
            )
            factor = learning_rate_factor(metadata, config)
            if factor != 1.0:
                run.scale_learning_rate(factor)
            try:
                _train(run, path / PROFILE)
            finally:
                if writes and run.step > step:
                    # On a full disk the error that ended the run is to be heard.
                    with contextlib.suppress(OSError):
                        clock.append_to(
                            path / TIMES_FILE, first_step=step, last_step=run.step
                        )
            return run.state


def _train(run: Run, profile: Path) -> None:
    """Train and evaluate until the end or until a signal, with a checkpoint then."""
    with stop_requests() as run.stop:
        try:
            if run.has_ended:
                total = run.experiment.total_steps
                shorter = f", and has {total} by now" if total < run.step else ""
                run.writers.text(
                    f"nothing to do: the run ended at step {run.step}{shorter}"
                )
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
    """Take the steps that are left; raise `Stopped` after a signal.

    After step s come its log line, its evaluation and its checkpoint, in this order. To
    do them again does no harm, so a run that was killed between two of them resumes.
    """
    config, experiment = run.config, run.experiment
    if run.evaluation_due() and run.progress.evaluated_step < run.step:
        run.evaluate()  # the checkpoint is of before it
        run.save()
    with (
        Profiler(
            profile, count=config.profile, start_step=run.step, say=run.writers.text
        ) as profiler,
        experiment.train_batches(run.step) as batches,
    ):
        batch = experiment.put(next(batches))
        train_step = run.compile(
            "training", experiment.train_step(), run.state, batch, run.statistics
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

            asked = run.vote()
            is_last = run.step >= experiment.total_steps or asked.stop_signal != 0
            if not is_last:  # decoded and sent while the devices compute
                batch = experiment.put(next_batch(batches, metrics["loss"]))
            if is_last or run.step % config.log_every_steps == 0:
                target_reached = run.log.write(run.step, batches.wait_seconds)
                run.progress.target_reached = target_reached
            if asked.stop_signal and not run.has_ended:
                raise Stopped(asked.stop_signal)
            if run.evaluation_due():
                run.evaluate(config.eval_views if run.has_ended else 1)
            if run.checkpoint_due(asked.save):
                run.save()


def _finish(run: Run) -> None:
    """Evaluate the last step, unless that is done, and save it."""
    if run.saved_step != run.step:
        run.save()  # before an evaluation that may fail
    error = run.current_error()
    # An earlier start may have evaluated this step after its checkpoint was written.
    if error is None and run.checkpointer.top1_error(run.step) is None:
        run.evaluate(run.config.eval_views)
        run.save()
