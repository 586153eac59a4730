"""The paper's update rule and learning-rate schedules, in optax.

Krizhevsky et al. 2012, section 5: v <- 0.9 v - 0.0005 lr w - lr g; w <- w + v. The
learning rate is inside the velocity, so after a drop the old, larger steps fade out
over some ten steps. torch and `optax.sgd` multiply the velocity by the rate instead.
LARS, for batches of thousands: You, Gitman and Ginsburg 2017, arXiv:1708.03888.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

FORMS = ("paper", "torch")
SCHEDULES = ("constant", "plateau", "fixed", "cosine", "polynomial")


def make_optimizer(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    bias_lr_mult: float = 1.0,
    decay_bias: bool = True,
    form: str = "paper",
    layer_weight_decay: Mapping[str, float] | None = None,
    bias_learning_rate: float | None = None,
    layer_factors: Mapping[str, optax.Schedule] | None = None,
    trust_coefficient: float | None = None,
) -> optax.GradientTransformation:
    """Return SGD with momentum and weight decay, as in the paper.

    Args:
      learning_rate: a number, or a schedule of the step.
      momentum: 0.9 in the paper.
      weight_decay: factor on the weights in the gradient, 0.0005 in the paper.
      bias_lr_mult: learning rate of the biases divided by that of the weights: 1 in the
        paper's text, 2 in Caffe and in the first epochs of the original.
      decay_bias: decay biases and the scales of batch normalisation too. The original
        and Caffe do not decay biases; the paper does not say.
      form: "paper", the learning rate inside the velocity; "torch", outside.
      layer_weight_decay: weight decay of single layers, by name.
      bias_learning_rate: a constant rate of the biases, instead of `bias_lr_mult`. The
        original's run on ILSVRC-2012 kept 0.02 to the end.
      layer_factors: schedules of a factor on single layers' rates, by name (see
        `make_layer_factors`). A factor of 0 freezes the layer at once, whatever its
        velocity. `bias_learning_rate` ignores all other factors.
      trust_coefficient: for LARS, which scales each kernel's gradient (weight decay
        included) to this fraction of the kernel's own norm; 0.001 in `optax.lars` and
        NVCaffe. Biases and batch normalisation take the plain rate. None: no LARS.

    Returns:
      A transformation whose state has `hyperparams["learning_rate"]`: the rate of the
      last update. If `learning_rate` is a number, changing it changes the rate.
    """
    by_layer = dict(layer_weight_decay or {})

    def build(learning_rate: Any) -> optax.GradientTransformation:
        if bias_learning_rate is None:
            rates = [
                optax.scale_by_learning_rate(learning_rate),
                optax.masked(optax.scale(bias_lr_mult), _is_bias),
            ]
        else:
            rates = [
                optax.masked(optax.scale_by_learning_rate(learning_rate), _is_weight),
                optax.masked(optax.scale(-bias_learning_rate), _is_bias),
            ]
        factors = layer_factors or {}
        rate = optax.chain(*rates, *_factors(factors, bias_learning_rate is None))
        velocity = optax.trace(decay=momentum)
        return optax.chain(
            _decayed_weights(weight_decay, by_layer, decay_bias),
            *_trust(trust_coefficient),
            *((rate, velocity) if form == "paper" else (velocity, rate)),
            *_freezes(factors),
        )

    return optax.inject_hyperparams(build)(learning_rate=learning_rate)


def _where(keep: Callable[[str, str], bool]) -> Callable[[Any], Any]:
    """Return the optax mask of the leaves whose (layer, name) `keep` accepts."""
    return lambda params: jax.tree_util.tree_map_with_path(
        lambda path, _: keep(path[0].key, path[-1].key), params
    )


_is_bias = _where(lambda _, name: name == "bias")
_is_weight = _where(lambda _, name: name != "bias")
_is_kernel = _where(lambda _, name: name == "kernel")


def _decayed_weights(
    weight_decay: float, by_layer: dict[str, float], decay_bias: bool
) -> optax.GradientTransformation:
    """Return g + weight_decay * w, with the factor of the leaf's layer."""

    def decays(name: str) -> bool:
        return decay_bias or name not in ("bias", "scale")

    def only(wanted: str) -> Callable[[Any], Any]:
        return _where(lambda layer, name: layer == wanted and decays(name))

    others = _where(lambda layer, name: layer not in by_layer and decays(name))
    return optax.chain(
        optax.add_decayed_weights(weight_decay, others),
        *(optax.add_decayed_weights(factor, only(layer)) for layer, factor in by_layer.items()),
    )


def _trust(coefficient: float | None) -> list[optax.GradientTransformation]:
    """Return LARS: u * coefficient * |w| / |u| per kernel w, u = g + weight_decay * w.

    |u| as in `optax.lars`; You et al. have |g| + weight_decay * |w|.
    """
    if coefficient is None:
        return []
    ratio = optax.scale_by_trust_ratio(trust_coefficient=coefficient)
    return [optax.masked(ratio, _is_kernel)]


def _factors(
    by_layer: Mapping[str, optax.Schedule], with_biases: bool
) -> list[optax.GradientTransformation]:
    """Return transformations that scale single layers' updates."""

    def only(wanted: str) -> Callable[[Any], Any]:
        return _where(lambda layer, name: layer == wanted and (with_biases or name != "bias"))

    return [
        optax.masked(optax.scale_by_schedule(factor), only(layer))
        for layer, factor in by_layer.items()
    ]


def _freezes(by_layer: Mapping[str, optax.Schedule]) -> list[optax.GradientTransformation]:
    """Return transformations that stop a layer while its factor is 0.

    The original skipped the update at a rate of 0, so no old velocity moved the layer.
    """

    def moves(factor: optax.Schedule) -> optax.Schedule:
        return lambda count: jnp.where(jnp.asarray(factor(count)) == 0, 0.0, 1.0)

    return _factors({layer: moves(f) for layer, f in by_layer.items()}, True)


def make_layer_factors(
    changes: Iterable[tuple[str, float, float]], *, steps_per_epoch: float
) -> dict[str, optax.Schedule]:
    """Return schedules of factors on single layers' learning rates.

    Args:
      changes: (layer, epoch, factor), for each layer in increasing order: from that
        epoch on the layer learns at `factor` times the rate of the others. The original
        slowed conv1 down twelve epochs before the others, and froze it five epochs
        later: ("conv1", 67, 0.1), ("conv1", 72, 0).
      steps_per_epoch: may be a fraction.
    """
    by_layer: dict[str, list[tuple[int, float]]] = {}
    for layer, epoch, factor in changes:
        by_layer.setdefault(layer, []).append((round(epoch * steps_per_epoch), factor))
    return {
        layer: optax.join_schedules(
            [optax.constant_schedule(1.0)] + [optax.constant_schedule(factor) for _, factor in at],
            [step for step, _ in at],
        )
        for layer, at in by_layer.items()
    }


def frozen_layers(changes: Iterable[tuple[str, float, float]]) -> frozenset[str]:
    """Return the layers that `make_layer_factors` freezes in all steps."""
    changes = list(changes)
    from_start = {layer for layer, epoch, factor in changes if epoch == factor == 0}
    return frozenset(from_start - {layer for layer, _, factor in changes if factor})


def make_schedule(
    name: str,
    learning_rate: float,
    *,
    steps_per_epoch: float,
    num_epochs: float,
    drop_epochs: tuple[float, ...] = (),
    factor: float = 0.1,
    warmup_epochs: float = 0.0,
    power: float = 2.0,
) -> optax.ScalarOrSchedule:
    """Return the learning rate, as a number or as a function of the step.

    Args:
      name: one of
        "constant", "plateau": the number itself (see `Plateau`);
        "fixed": times `factor` at each of `drop_epochs` (the original dropped after
          epochs 25, 51 and 79 of 91);
        "cosine": to 0 at `num_epochs`, after a linear rise over `warmup_epochs`;
        "polynomial": the same with (1 - t)^power, t from 0 after the rise to 1 at the
          end (You et al. 2017: power 2).
      steps_per_epoch: may be a fraction.
    """
    if name in ("constant", "plateau"):
        return learning_rate
    if name == "fixed":
        drops = {round(epoch * steps_per_epoch): factor for epoch in drop_epochs}
        return optax.piecewise_constant_schedule(learning_rate, drops)
    rise = round(warmup_epochs * steps_per_epoch)
    end = max(1, round(num_epochs * steps_per_epoch))
    if name == "cosine":
        return optax.warmup_cosine_decay_schedule(
            init_value=0.0 if warmup_epochs else learning_rate,
            peak_value=learning_rate,
            warmup_steps=rise,
            decay_steps=end,
        )
    assert name == "polynomial", name
    fall = optax.polynomial_schedule(learning_rate, 0.0, power, max(1, end - rise))
    if not rise:
        return fall
    warmup = optax.linear_schedule(0.0, learning_rate, rise)
    return optax.join_schedules([warmup, fall], [rise])


def update_average(average: Any, params: Any, step: jax.Array, decay: float) -> Any:
    """Return the moving average of the parameters after one more step.

    Early steps count more: the decay is (1 + step) / (10 + step) if that is less, as in
    `tf.train.ExponentialMovingAverage`. So the first weights do not stay in the average.

    Args:
      average, params: two trees of the same structure.
      step: number of finished steps, those of `params`.
      decay: in [0, 1), for example 0.999: the weight of the old average.
    """
    decay_now = jnp.minimum(decay, (1 + step) / (10 + step))
    return optax.incremental_update(params, average, 1 - decay_now)


@dataclass(frozen=True)
class Plateau:
    """The paper's rule: divide by ten when the validation error stops improving.

    "The learning rate was ... reduced three times prior to termination" (section 5).
    The rate drops after `patience` evaluations in a row without a new best error.
    """

    patience: int
    factor: float = 0.1
    max_drops: int = 3
    best: float = float("inf")
    waited: int = 0
    drops: int = 0

    def after(self, error: float) -> tuple["Plateau", float]:
        """Return the rule after an evaluation, and the factor on the rate (or 1)."""
        if error < self.best:
            return dataclasses.replace(self, best=error, waited=0), 1.0
        waited = self.waited + 1
        if waited < self.patience or self.drops >= self.max_drops:
            return dataclasses.replace(self, waited=waited), 1.0
        dropped = dataclasses.replace(self, waited=0, drops=self.drops + 1)
        return dropped, self.factor

    def progress(self) -> dict[str, float]:
        """Return the fields that a checkpoint keeps; JSON has no infinity."""
        best = self.best if math.isfinite(self.best) else sys.float_info.max
        return {"best": best, "waited": self.waited, "drops": self.drops}
