"""Training log: means of the metrics, and a warning of a stalled loss."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from alexnet_jax.models.alexnet import INITS
from alexnet_jax.training.experiment import Experiment
from alexnet_jax.training.timing import STEPS_IN_FLIGHT, StepClock
from alexnet_jax.training.writers import MultiWriter

# A loss this close to ln(classes), in nats, is that of guessing.
STALL_MARGIN = 0.02
# Caffe's users waited 5,000 to 15,000 steps (BVLC/caffe#401).
STALL_AFTER_STEPS = 5000


class StepLog:
    """Keep each step's metrics on the devices until a log line is due.

    `before`: loss and top-1 error of the steps since the last line of an earlier process.
    """

    def __init__(
        self,
        experiment: Experiment,
        writers: MultiWriter,
        clock: StepClock,
        before: Sequence[Sequence[float]] = (),
    ):
        self._experiment, self._config = experiment, experiment.config
        self._writers, self._clock = writers, clock
        self._before = [tuple(pair) for pair in before]
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

    def window(self, step: int) -> list[tuple[float, ...]]:
        """Return (loss, top-1 error) of each step since the last line, up to `step`.

        Raises:
          FloatingPointError: a loss is not finite.
        """
        recent: list[dict[str, Any]] = jax.device_get(self._recent)
        pairs = [(float(metrics["loss"]), float(metrics["top1_error"])) for metrics in recent]
        window = [*self._before, *pairs]
        first = step - len(window) + 1
        for number, (loss, _) in enumerate(window, first):
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"The loss of step {number} is {loss} (checked together: steps {first} to "
                    f"{step})."
                )
        return window

    def write(self, step: int, waited: float) -> bool:
        """Write the means since the last log line; `waited` is `Batches.wait_seconds`.

        Returns:
          True if the training error reached `stop_at_train_error`.

        Raises:
          FloatingPointError: a loss is not finite.
        """
        window, learning_rate = self.window(step), float(self._recent[-1]["lr"])
        self._before, self._recent = [], []
        loss, error = map(float, np.mean(window, axis=0))
        steps_per_second, wait_share = self._clock.lap(step, waited)
        means = {
            "train/loss": loss,
            "train/top1_error": error,
            "lr": learning_rate,
            "images_per_sec": steps_per_second * self._config.data.batch_size,
            "data_wait_frac": wait_share,
            "eta_seconds": (self._experiment.total_steps - step) / steps_per_second,
        }
        self._writers.write(step, means)
        self._warn_of_stall(step, loss)
        # The last line of a run may cover fewer steps.
        is_whole = len(window) >= self._config.log_every_steps
        return is_whole and error <= self._config.stop_at_train_error > 0

    def _warn_of_stall(self, step: int, loss: float) -> None:
        """Warn once if the network still guesses after `STALL_AFTER_STEPS` steps."""
        # Not the number of units: those without images are learnt away at once.
        classes = self._experiment.train_source.num_classes
        is_stalled = abs(loss - math.log(classes)) <= STALL_MARGIN
        if step >= STALL_AFTER_STEPS and is_stalled and not self._has_warned:
            self._has_warned = True
            inits = " or ".join(init for init in INITS if init != self._config.model.init)
            self._writers.text(
                f"WARNING: after {step} steps the loss is {loss:.4f}, that of guessing "
                f"(ln({classes})): small initial weights may never leave this plateau "
                "(BVLC/caffe issues 401 and 2085). Check the data (python -m alexnet_jax.prepare "
                f"check --source={self._config.data.source}), or start anew, in another --workdir, "
                f"with --config.model.init={inits}, another --config.seed, or a warm-up "
                "(--config.schedule.name=cosine --config.schedule.warmup_epochs=1)."
            )
