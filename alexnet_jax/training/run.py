"""A run in progress: the actions that its loop takes between steps."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alexnet_jax.data.loader import Batch
from alexnet_jax.system.signals import Stop
from alexnet_jax.training import parallel, steps
from alexnet_jax.training.checkpoint import Checkpointer
from alexnet_jax.training.config import as_json
from alexnet_jax.training.distributed import Vote, Votes
from alexnet_jax.training.evaluate import evaluate
from alexnet_jax.training.experiment import Experiment
from alexnet_jax.training.progress import Progress
from alexnet_jax.training.step_log import StepLog, divergence
from alexnet_jax.training.timing import CHECKPOINTS, COMPILING, EVALUATION, SUMMARIES, StepClock
from alexnet_jax.training.writers import MultiWriter


class Stopped(Exception):
    """All processes of the run know of a signal, so it ends here.

    Attributes:
      signal: the signal's number.
    """

    def __init__(self, number: int):
        super().__init__(number)
        self.signal = number


class Run:
    """State of a run, and the actions between its steps.

    Attributes:
      state: parameters, optimiser state and step, on the devices.
      progress: everything else that a checkpoint keeps.
      log: writes the means of the training metrics.
      stop: the signal that asked the run to stop, if one came.
      saved_step: step of the newest checkpoint; -1: there is none.
    """

    def __init__(
        self,
        experiment: Experiment,
        state: steps.TrainState,
        progress: Progress,
        checkpointer: Checkpointer,
        writers: MultiWriter,
        clock: StepClock,
        *,
        saved_step: int,
    ):
        self.experiment, self.config = experiment, experiment.config
        self.state, self.progress = state, progress
        self.checkpointer, self.writers, self.clock = checkpointer, writers, clock
        self.stop = Stop()
        self.statistics = experiment.pixel_statistics()
        self.saved_step, self.saved_at = saved_step, time.monotonic()
        self.log = StepLog(experiment, checkpointer, writers, clock)
        self._votes = Votes(experiment.mesh)
        self._eval_steps: dict[int, Any] = {}  # compiled, by the number of views
        self._summary_step: Any = None

    @property
    def step(self) -> int:
        """Number of finished training steps."""
        return self.progress.step

    @property
    def has_ended(self) -> bool:
        """True if no step is left."""
        is_over = self.step >= self.experiment.total_steps
        return is_over or self.progress.target_reached

    def compile(self, what: str, step: Any, *args: Any) -> Any:
        """Compile a step, with a log line before and after."""
        self.writers.text(f"compiling the {what} step ...")
        started = time.monotonic()
        with self.clock.spending(COMPILING):
            compiled = step.lower(*args).compile()
        seconds = time.monotonic() - started
        self.writers.text(f"compiled the {what} step in {seconds:.1f} s")
        return compiled

    @contextlib.contextmanager
    def paused(self, what: str) -> Iterator[None]:
        """Wait for the devices; count the time in the block as `what`, not as training."""
        self.state.step.block_until_ready()
        with self.clock.spending(what):
            yield

    def vote(self) -> Vote:
        """Return the common decision of all processes, from their signals and clocks."""
        every = self.config.checkpoint.every_minutes
        minutes = (time.monotonic() - self.saved_at) / 60
        return self._votes.cast(Vote(self.stop.signal or 0, bool(every) and minutes >= every))

    # Summaries.

    def summary_due(self) -> bool:
        """Return True if a summary of the next step is due."""
        every = self.config.summaries_every_steps
        return bool(every) and self.step % every == 0

    def write_summary(self, batch: Any) -> None:
        """Write gradient norms and shares of dead units of the next step."""
        args = self.state, batch, self.statistics
        with self.paused(SUMMARIES):
            if self._summary_step is None:
                step = steps.make_summary_step(self.experiment.spec)
                self._summary_step = self.compile("summary", step, *args)
            scalars = jax.device_get(self._summary_step(*args))
        if self.step:  # the log has the mean loss of later steps
            del scalars["train/loss"]
        self._write({name: float(value) for name, value in scalars.items()})

    def _write(self, scalars: dict[str, float]) -> None:
        epoch = self.step / self.experiment.steps_per_epoch
        self.writers.write(self.step, epoch, scalars)

    # Evaluations.

    def evaluation_due(self) -> bool:
        """Return True if an evaluation is due after the current step."""
        every = self.config.eval_every_epochs * self.experiment.steps_per_epoch
        if not every or not self.step or self.experiment.eval_source is None:
            return False
        return self.step // every > (self.step - 1) // every

    def evaluate(self, views: int = 1) -> None:
        """Evaluate the current step, write the errors and apply the plateau rule.

        Raises:
          Stopped: a signal came; the evaluation is discarded.
        """
        experiment, source = self.experiment, self.experiment.eval_source
        if source is None:
            return
        with self.paused(EVALUATION), experiment.eval_batches() as batches:
            errors = evaluate(
                lambda batch: self.eval_batch(experiment.put(batch), views),
                self._until_stopped(batches),
                expected_count=source.num_examples,
            )
        self._write({f"eval/{name}": value for name, value in errors.items()})
        error = errors["top1_error"]
        self.progress.evaluated_step, self.progress.error = self.step, error
        # The plateau rule ignores an evaluation at `max_steps` that the full run would
        # not have made.
        if self.config.schedule.name == "plateau" and self.evaluation_due():
            self.progress.plateau, factor = self.progress.plateau.after(error)
            if factor != 1.0:
                patience = self.progress.plateau.patience
                self.writers.text(f"no better error in {patience} evaluations")
                self.scale_learning_rate(factor)

    def eval_batch(self, batch: Any, views: int) -> Any:
        """Return the sums of the evaluation metrics over a batch."""
        args = self.state.params, self.state.batch_stats, batch, self.statistics
        if views not in self._eval_steps:
            step = steps.make_eval_step(self.experiment.spec, views)
            self._eval_steps[views] = self.compile("evaluation", step, *args)
        return self._eval_steps[views](*args)

    def _until_stopped(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            if number := self.vote().stop_signal:
                raise Stopped(number)
            yield batch

    def scale_learning_rate(self, factor: float) -> None:
        """Multiply the learning rate in the optimiser's state, and log it."""
        opt_state: Any = self.state.opt_state
        old = opt_state.hyperparams["learning_rate"]
        rate = np.asarray(jax.device_get(old) * factor, old.dtype)
        on_mesh = parallel.put_everywhere(rate, self.experiment.mesh)
        hyperparams = {**opt_state.hyperparams, "learning_rate": on_mesh}
        opt_state = opt_state._replace(hyperparams=hyperparams)
        self.state = dataclasses.replace(self.state, opt_state=opt_state)
        self.writers.text(f"learning rate now {float(rate):.3g}")

    # Checkpoints.

    def current_error(self) -> float | None:
        """Return the top-1 error of the current step; None: not evaluated."""
        progress = self.progress
        return progress.error if progress.evaluated_step == self.step else None

    def checkpoint_due(self, wanted: bool) -> bool:
        """Return True if a checkpoint is due by time (`wanted`), step or best error."""
        every, error = self.config.checkpoint.every_steps, self.current_error()
        is_best = error is not None and self.checkpointer.is_best(error)
        return wanted or is_best or bool(every and self.step % every == 0)

    def save(self) -> None:
        """Write a checkpoint, or add the error to the one that this step has.

        Raises:
          FloatingPointError: a parameter is not finite.
        """
        with self.paused(CHECKPOINTS):
            if not _all_finite(self.state.params):
                raise divergence(
                    f"The parameters of step {self.step} are not finite; no checkpoint "
                    "was written.",
                    self.checkpointer,
                )
            metadata = {
                "config": as_json(self.config),
                **self.progress.to_json(),
                "num_examples": self.experiment.train_source.num_examples,
                "versions": {"jax": jax.__version__},
            }
            error = self.current_error()
            self.checkpointer.save(self.step, self.state, metadata=metadata, top1_error=error)
        if self.saved_step != self.step:
            self.writers.text(f"checkpoint of step {self.step}")
        self.saved_step, self.saved_at = self.step, time.monotonic()


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]))
