"""What a run has done so far, beside its arrays: JSON in each checkpoint."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import Mesh

from alexnet_jax.training import parallel
from alexnet_jax.training.optim import Plateau
from alexnet_jax.training.steps import TrainState


@dataclass
class Progress:
    """Progress of a run.

    Attributes:
      step: finished training steps.
      plateau: the rule that lowers the learning rate.
      evaluated_step: the newest step that was evaluated, with `plateau` up to date;
        -1: none was.
      error: the top-1 error of that evaluation, in [0, 1].
      target_reached: the training error came down to `config.stop_at_train_error`.
    """

    step: int
    plateau: Plateau
    evaluated_step: int = -1
    error: float | None = None
    target_reached: bool = False

    @classmethod
    def resume(cls, step: int, metadata: Mapping[str, Any], config: Any) -> Self:
        """Return the progress of a checkpoint's metadata; {} is that of a new run."""
        schedule = config.schedule
        plateau = Plateau(
            patience=schedule.patience,
            factor=schedule.factor,
            max_drops=schedule.max_drops,
            **metadata.get("plateau", {}),
        )
        # Older checkpoints say only that an evaluation of this step is missing.
        is_missing = not metadata or metadata.get("evaluation_owed", False)
        before = metadata.get("config", {}).get("stop_at_train_error")
        return cls(
            step,
            plateau,
            evaluated_step=metadata.get("evaluated_step", -1 if is_missing else step),
            error=metadata.get("error"),
            target_reached=metadata.get("target_reached", False)
            and before == config.stop_at_train_error,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the metadata for `resume`; the step is stored by the checkpoint."""
        return {
            "plateau": self.plateau.progress(),
            "evaluated_step": self.evaluated_step,
            "error": self.error,
            "target_reached": self.target_reached,
        }


def learning_rate_factor(metadata: Mapping[str, Any], config: Any) -> float:
    """Return the factor by which a resumed run's config changes the learning rate.

    Schedules read the config at every step. A rate that is constant, or lowered by the
    plateau rule, is in the checkpoint.
    """
    if not metadata or config.schedule.name not in ("constant", "plateau"):
        return 1.0
    return config.optim.learning_rate / metadata["config"]["optim"]["learning_rate"]


def scale_learning_rate(state: TrainState, factor: float, mesh: Mesh) -> TrainState:
    """Return the state with its learning rate multiplied."""
    opt_state: Any = state.opt_state
    rate = opt_state.hyperparams["learning_rate"]
    new = np.asarray(jax.device_get(rate) * factor, rate.dtype)
    new = parallel.put_everywhere(new, mesh)
    hyperparams = {**opt_state.hyperparams, "learning_rate": new}
    opt_state = opt_state._replace(hyperparams=hyperparams)
    return dataclasses.replace(state, opt_state=opt_state)
