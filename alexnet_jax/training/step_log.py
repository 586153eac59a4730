"""Training log: means of the metrics, divergence, and a warning of a stalled loss."""

import math
from typing import Any

import jax
import numpy as np

from alexnet_jax.models.alexnet import INITS
from alexnet_jax.training.checkpoint import Checkpointer
from alexnet_jax.training.experiment import Experiment
from alexnet_jax.training.timing import STEPS_IN_FLIGHT, StepClock
from alexnet_jax.training.writers import MultiWriter

# A loss this close to ln(classes), in nats, is that of guessing.
STALL_MARGIN = 0.02
# Caffe's users waited 5,000 to 15,000 steps (BVLC/caffe#401).
STALL_AFTER_STEPS = 5000


class StepLog:
    """Keep each step's metrics on the devices until a log line is due."""

    def __init__(
        self,
        experiment: Experiment,
        checkpointer: Checkpointer,
        writers: MultiWriter,
        clock: StepClock,
    ):
        self._experiment, self._config = experiment, experiment.config
        self._checkpointer, self._writers, self._clock = checkpointer, writers, clock
        self._recent: list[dict[str, jax.Array]] = []
        self._has_warned = False

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Keep a step's metrics; wait until at most `STEPS_IN_FLIGHT` steps are running."""
        if step == 1:
            classes = self._experiment.model.network.layers[-1].features
            self._writers.text(
                f"loss at step 0: {float(metrics['loss']):.4f}, "
                f"ln({classes}) = {math.log(classes):.4f}"
            )
        self._recent.append(metrics)
        if len(self._recent) > STEPS_IN_FLIGHT:
            self._recent[-1 - STEPS_IN_FLIGHT]["loss"].block_until_ready()
        self._writers.progress(step)

    def write(self, step: int, waited: float) -> bool:
        """Write the means since the last log line.

        Args:
          step: the newest step.
          waited: `Batches.wait_seconds`.

        Returns:
          True if the training error reached `stop_at_train_error`.

        Raises:
          FloatingPointError: a loss is not finite.
        """
        recent: list[dict[str, Any]] = jax.device_get(self._recent)
        self._recent.clear()
        losses = np.array([metrics["loss"] for metrics in recent])
        finite = np.isfinite(losses)
        if not finite.all():
            least, index = step - len(losses) + 1, int(np.argmin(finite))
            raise divergence(
                f"The loss of step {least + index} is {losses[index]} (checked "
                f"together: steps {least} to {step}).",
                self._checkpointer,
            )
        loss, pace = float(losses.mean()), self._clock.lap(step, waited)
        error = float(np.mean([metrics["top1_error"] for metrics in recent]))
        steps_left = self._experiment.total_steps - step
        scalars = {
            "train/loss": loss,
            "train/top1_error": error,
            "lr": float(recent[-1]["lr"]),
            "images_per_sec": pace.steps_per_second * self._config.data.batch_size,
            "data_wait_frac": pace.wait_share,
            "eta_seconds": steps_left / pace.steps_per_second,
        }
        self._writers.write(step, step / self._experiment.steps_per_epoch, scalars)
        self._warn_of_stall(step, loss)
        # A line before a stop or after a resume may cover fewer steps.
        is_whole = len(recent) == self._config.log_every_steps
        return is_whole and error <= self._config.stop_at_train_error > 0

    def _warn_of_stall(self, step: int, loss: float) -> None:
        """Warn once if the network still guesses after `STALL_AFTER_STEPS` steps."""
        config = self._config
        # Not the number of units: those without images are learnt away at once.
        classes = self._experiment.train_source.num_classes
        guessing = math.log(classes)
        is_stalled = step >= STALL_AFTER_STEPS and abs(loss - guessing) <= STALL_MARGIN
        if not is_stalled or self._has_warned:
            return
        self._has_warned = True
        inits = [init for init in INITS if init != config.model.init]
        self._writers.text(
            f"WARNING: after {step} steps the loss is {loss:.4f}, that of guessing "
            f"(ln({classes}) = {guessing:.4f}): nothing is learnt. A network that "
            "starts with small weights may never leave this plateau, and whether it does "
            "depends on the biases and the seed (BVLC/caffe issues 401 and 2085). Start "
            "anew, in another --workdir, with one of: --config.model.init="
            f"{' or '.join(inits)}; another --config.seed; a warm-up, "
            "--config.schedule.name=cosine --config.schedule.warmup_epochs=1. Check the "
            "data as well: python -m alexnet_jax.prepare check --source="
            f"{config.data.source}"
        )


def divergence(problem: str, checkpointer: Checkpointer) -> FloatingPointError:
    """Return the error of a diverged run: the last good checkpoint and what to do."""
    kept, folder = checkpointer.find("latest"), checkpointer.directory
    good = f"The last good checkpoint is that of step {kept} in {folder}."
    if kept is None:
        good = f"There is no checkpoint in {folder} yet."
    return FloatingPointError(
        f"{problem} {good} Try a lower --config.optim.learning_rate. To find the layer, "
        "run the same command with --config.summaries_every_steps=1, which prints the "
        "gradient norm of each layer."
    )
