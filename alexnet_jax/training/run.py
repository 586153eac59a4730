"""A run in progress: the actions that its loop takes between steps."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

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
from alexnet_jax.training.optim import Plateau
from alexnet_jax.training.step_log import StepLog
from alexnet_jax.training.timing import CHECKPOINTS, COMPILING, EVALUATION, SUMMARIES, StepClock
from alexnet_jax.training.writers import MultiWriter


class Stopped(Exception):
    """All processes of the run know of a signal, `signal`, so it ends here."""

    def __init__(self, number: int):
        super().__init__(number)
        self.signal = number


@dataclass
class Progress:
    """Progress of a run apart from its arrays: JSON in each checkpoint.

    Attributes:
      step: number of finished training steps.
      plateau: state of the rule that lowers the learning rate.
      evaluated_step: the newest evaluated step, which `plateau` includes; -1: none.
      error: the top-1 error of that evaluation, in [0, 1].
      best_error: the lowest of all evaluations.
      target_reached: the training error reached `config.stop_at_train_error`.
      log_window: loss and top-1 error of each step since the last log line.
    """

    step: int
    plateau: Plateau
    evaluated_step: int = -1
    error: float | None = None
    best_error: float = 1.0
    target_reached: bool = False
    log_window: Sequence[Sequence[float]] = ()

    @classmethod
    def resume(cls, step: int, metadata: Mapping[str, Any], config: Any) -> Self:
        """Return the progress that a checkpoint's metadata holds; {}: of a new run."""
        schedule = config.schedule
        rule = schedule.patience, schedule.factor, schedule.max_drops
        names = ("evaluated_step", "error", "best_error", "target_reached", "log_window")
        stored = {name: metadata[name] for name in names if name in metadata}
        progress = cls(step, Plateau(*rule, **metadata.get("plateau", {})), **stored)
        if metadata:
            if "evaluated_step" not in metadata and not metadata.get("evaluation_owed"):
                progress.evaluated_step = step  # of an older version
            if metadata["config"]["stop_at_train_error"] != config.stop_at_train_error:
                progress.target_reached = False
        return progress

    def to_json(self) -> dict[str, Any]:
        """Return the metadata for `resume`; the step is stored by the checkpoint."""
        fields = dataclasses.asdict(self) | {"plateau": self.plateau.progress()}
        del fields["step"]
        return fields


@dataclass
class Run:
    """State of a run, and the actions between its steps.

    Attributes:
      state: parameters, optimiser state and step, on the devices.
      progress: everything else that a checkpoint keeps.
      stop: the signal that asked the run to stop, if one came.
      saved_step: step of the newest checkpoint; -1: there is none.
      log: writes the means of the training metrics.
    """

    experiment: Experiment
    state: steps.TrainState
    progress: Progress
    checkpointer: Checkpointer
    writers: MultiWriter
    clock: StepClock
    stop: Stop
    saved_step: int

    def __post_init__(self) -> None:
        self.config = self.experiment.config
        self.statistics = self.experiment.statistics_on_mesh()
        window = self.progress.log_window
        self.log = StepLog(self.experiment, self.writers, self.clock, window)
        self.saved_at = time.monotonic()
        self._votes = Votes(self.experiment.mesh)
        self._compiled: dict[Any, Any] = {}

    @property
    def step(self) -> int:
        """Number of finished training steps."""
        return self.progress.step

    @property
    def has_ended(self) -> bool:
        """True if no step is left."""
        return self.step >= self.experiment.total_steps or self.progress.target_reached

    def compiled(self, what: str, make_step: Any, args: tuple[Any, ...], *options: int) -> Any:
        """Return `make_step(spec, *options)` compiled for `args`; log the first time."""
        if (what, options) not in self._compiled:
            self.writers.text(f"compiling the {what} step ...")
            started = time.monotonic()
            with self.clock.spending(COMPILING):
                step = make_step(self.experiment.spec, *options)
                self._compiled[what, options] = step.lower(*args).compile()
            seconds = time.monotonic() - started
            self.writers.text(f"compiled the {what} step in {seconds:.1f} s")
        return self._compiled[what, options]

    @contextlib.contextmanager
    def paused(self, what: str) -> Iterator[None]:
        """Wait for the devices; count the time in the block as `what`, not as training."""
        self.state.step.block_until_ready()
        with self.clock.spending(what):
            yield

    def vote(self) -> Vote:
        """Return the common decision of all processes, from their signals and clocks."""
        minutes = (time.monotonic() - self.saved_at) / 60
        is_due = 0 < self.config.checkpoint.every_minutes <= minutes
        return self._votes.cast(Vote(self.stop.signal, is_due))

    def write_summary(self, batch: Any) -> None:
        """Write gradient norms and shares of dead units of the next step."""
        args = self.state, batch, self.statistics
        with self.paused(SUMMARIES):
            summary_step = self.compiled("summary", steps.make_summary_step, args)
            scalars = jax.device_get(summary_step(*args))
        if self.step:  # the log has the mean loss of later steps
            del scalars["train/loss"]
        self.writers.write(self.step, scalars)

    def evaluation_due(self) -> bool:
        """Return True if an evaluation is due after the current step."""
        every = self.config.eval_every_epochs * self.experiment.steps_per_epoch
        if not every or not self.step or self.experiment.eval_source is None:
            return False
        return self.step // every > (self.step - 1) // every

    def evaluate(self, views: int = 1) -> bool:
        """Evaluate the current step, write the errors and apply the plateau rule.

        Returns:
          True if it has the lowest top-1 error so far.

        Raises:
          Stopped: a signal came; the evaluation is discarded.
        """
        experiment, source, progress = self.experiment, self.experiment.eval_source, self.progress
        if source is None:
            return False
        with self.paused(EVALUATION), experiment.eval_batches() as batches:
            errors = evaluate(
                lambda batch: self.eval_batch(experiment.put(batch), views),
                self._until_stopped(batches),
                expected_count=source.num_examples,
            )
        self.writers.write(self.step, {f"eval/{name}": x for name, x in errors.items()})
        error = errors["top1_error"]
        is_best = error < progress.best_error
        progress.evaluated_step, progress.error = self.step, error
        progress.best_error = min(error, progress.best_error)
        # The plateau rule ignores an evaluation at `max_steps` that the full run would
        # not have made.
        if self.config.schedule.name == "plateau" and self.evaluation_due():
            progress.plateau, factor = progress.plateau.after(error)
            if factor != 1.0:
                patience = progress.plateau.patience
                self.writers.text(f"no better error in {patience} evaluations")
                self.scale_learning_rate(factor)
        return is_best

    def eval_batch(self, batch: Any, views: int) -> Any:
        """Return the sums of the evaluation metrics over a batch."""
        args = self.state.eval_params, self.state.batch_stats, batch, self.statistics
        return self.compiled("evaluation", steps.make_eval_step, args, views)(*args)

    def _until_stopped(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            if number := self.vote().stop_signal:
                raise Stopped(number)
            yield batch

    def scale_learning_rate(self, factor: float) -> None:
        """Multiply the learning rate in the optimiser's state, and log it."""
        if factor == 1.0:
            return
        opt_state: Any = self.state.opt_state
        old = opt_state.hyperparams["learning_rate"]
        rate = np.asarray(jax.device_get(old) * factor, old.dtype)
        on_mesh = parallel.put_everywhere(rate, self.experiment.mesh)
        opt_state = opt_state._replace(
            hyperparams={**opt_state.hyperparams, "learning_rate": on_mesh}
        )
        self.state = dataclasses.replace(self.state, opt_state=opt_state)
        self.writers.text(f"learning rate now {float(rate):.3g}")

    @property
    def error(self) -> float | None:
        """Top-1 error of the current step; None: not evaluated."""
        return self.progress.error if self.progress.evaluated_step == self.step else None

    def save(self) -> None:
        """Write a checkpoint, or add the error to the one that this step has.

        Raises:
          FloatingPointError: a loss since the last log line, or a parameter, is not finite.
        """
        with self.paused(CHECKPOINTS):
            self.progress.log_window = self.log.window(self.step)
            if not _all_finite(self.state.params):
                raise FloatingPointError(
                    f"The parameters of step {self.step} are not finite; no checkpoint was written."
                )
            metadata = {
                "config": as_json(self.config),
                **self.progress.to_json(),
                "num_examples": self.experiment.train_source.num_examples,
                "versions": {"jax": jax.__version__},
            }
            self.checkpointer.save(self.step, self.state, metadata=metadata, top1_error=self.error)
        if self.saved_step != self.step:
            self.writers.text(f"checkpoint of step {self.step}")
        self.saved_step, self.saved_at = self.step, time.monotonic()


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]))
