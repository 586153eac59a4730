"""Training metrics between two log lines: their means, and two warnings."""

import math
from typing import Any

import jax
import numpy as np

from alexnet_jax.checkpoint import Checkpointer
from alexnet_jax.experiment import Experiment
from alexnet_jax.model import INITS
from alexnet_jax.timing import STEPS_IN_FLIGHT

# A loss as near to ln(classes), in nats, is that of guessing.
STALL_MARGIN = 0.02


class StepLog:
    """Metrics of the steps since the last log line, on the devices until then."""

    def __init__(self, experiment: Experiment, checkpointer: Checkpointer):
        self._config = experiment.config
        # The data's classes: units without any are learnt away at once.
        self._classes = experiment.train_source.num_classes
        self._checkpointer = checkpointer
        self._recent: list[dict[str, jax.Array]] = []
        self._has_warned = False

    def add(self, metrics: dict[str, jax.Array]) -> None:
        """Keep a step's metrics; wait until at most `STEPS_IN_FLIGHT` are under way."""
        self._recent.append(metrics)
        if len(self._recent) > STEPS_IN_FLIGHT:
            self._recent[-1 - STEPS_IN_FLIGHT]["loss"].block_until_ready()

    @property
    def is_whole(self) -> bool:
        """True if there are as many steps as in a line of the log."""
        return len(self._recent) == self._config.log_every_steps

    def means(self, step: int) -> dict[str, float]:
        """Return the scalars of the steps up to `step`, and forget them.

        Raises:
          FloatingPointError: if a loss is not finite.
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
        return {
            "train/loss": float(losses.mean()),
            "train/top1_error": float(np.mean([m["top1_error"] for m in recent])),
            "lr": float(recent[-1]["lr"]),
        }

    def stall_warning(self, step: int, loss: float) -> str | None:
        """Return a warning, once, if the network still guesses at `stall_after_steps`."""
        config, guessing = self._config, math.log(self._classes)
        after = config.stall_after_steps
        is_stalled = after and step >= after and abs(loss - guessing) <= STALL_MARGIN
        if not is_stalled or self._has_warned:
            return None
        self._has_warned = True
        inits = [init for init in INITS if init != config.model.init]
        return (
            f"WARNING: after {step} steps the loss is {loss:.4f}, that of guessing "
            f"(ln({self._classes}) = {guessing:.4f}): nothing is learnt. A network that "
            "starts with small weights may never leave this plateau, and whether it does "
            "depends on the biases and the seed (BVLC/caffe issues 401 and 2085). Start "
            "anew, in another --workdir, with one of: --config.model.init="
            f"{' or '.join(inits)}; another --config.seed; a warm-up, "
            "--config.schedule.name=cosine --config.schedule.warmup_epochs=1. Check the "
            "data as well: python -m alexnet_jax.prepare check --source="
            f"{config.data.source}"
        )


def divergence(problem: str, checkpointer: Checkpointer) -> FloatingPointError:
    """Return the error of a run that diverged: the last checkpoint, what to do next."""
    kept, folder = checkpointer.latest_whole_step(), checkpointer.directory
    good = f"The last good checkpoint is that of step {kept} in {folder}."
    if kept is None:
        good = f"There is no checkpoint in {folder} yet."
    return FloatingPointError(
        f"{problem} {good} Try a lower --config.optim.learning_rate. To find the layer, "
        "run the same command with --config.summaries_every_steps=1, which prints the "
        "gradient norm of each layer, or with JAX_DEBUG_NANS=1."
    )
