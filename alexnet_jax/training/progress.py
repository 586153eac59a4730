"""Progress of a run apart from its arrays: JSON in each checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from alexnet_jax.training.optim import Plateau


@dataclass
class Progress:
    """Progress of a run.

    Attributes:
      step: number of finished training steps.
      plateau: state of the rule that lowers the learning rate.
      evaluated_step: the newest evaluated step, which `plateau` includes; -1: none.
      error: the top-1 error of that evaluation, in [0, 1].
      target_reached: the training error reached `config.stop_at_train_error`.
    """

    step: int
    plateau: Plateau
    evaluated_step: int = -1
    error: float | None = None
    target_reached: bool = False

    @classmethod
    def resume(cls, step: int, metadata: Mapping[str, Any], config: Any) -> Self:
        """Return the progress that a checkpoint's metadata holds; {}: of a new run."""
        schedule = config.schedule
        plateau = Plateau(
            patience=schedule.patience,
            factor=schedule.factor,
            max_drops=schedule.max_drops,
            **metadata.get("plateau", {}),
        )
        # Older checkpoints store only that the evaluation of this step is missing.
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
