"""The training step and the classifier of a run, as the benchmarks call them."""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alexnet_jax import create_model
from alexnet_jax.data import augment
from alexnet_jax.models import ops
from alexnet_jax.models.alexnet import AlexNet
from alexnet_jax.training import describe, optim, parallel, steps
from benchmarks.speed.measure import Setting

CROP = 224


class Step(NamedTuple):
    """A training step and its arguments.

    Attributes:
      function: jitted (state, batch, statistics) -> (state, metrics), the state given
        away; to be traced inside `precision`.
    """

    function: Any
    state: steps.TrainState
    batch: dict[str, jax.Array]
    statistics: augment.Statistics


def precision(setting: Setting) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which a GPU multiplies float32 numbers in that precision."""
    levels = {"float32": "highest", "tensorfloat32": "tensorfloat32"}
    if ops.backend() == "cpu" or setting.precision not in levels:
        return contextlib.nullcontext()
    return jax.default_matmul_precision(levels[setting.precision])


def network(setting: Setting) -> AlexNet:
    """Return the paper's network."""
    wide = "bfloat16" if setting.precision == "bfloat16" else "float32"
    # The start does not matter here, but the model warns of a narrow "paper" one.
    init = "paper" if setting.width >= 1 else "he"
    return create_model("paper", width=setting.width, dtype=jnp.dtype(wide), init=init)


def raw_images(batch: int, side: int) -> jax.Array:
    """Return random raw images, uint8 [batch, side, side, 3]."""
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.integers(0, 256, (batch, side, side, 3), dtype=np.uint8))


def training_step(setting: Setting, augmentation: augment.Augmentation | None = None) -> Step:
    """Return the step of `alexnet_jax.training.loop` on one device, with a batch.

    Args:
      augmentation: of 256 x 256 images; None: 224 x 224 images minus their mean, which is
        all that the peer does.
    """
    model, mesh = network(setting), parallel.make_mesh(1, 1)
    side = CROP if augmentation is None else 256
    augmentation = augmentation or augment.Augmentation(
        crop_size=CROP, crop=False, flip=False, lighting=0.0
    )
    spec = steps.StepSpec(model, optim.make_optimizer(0.01), augmentation, mesh)
    labels = np.random.default_rng(1).integers(0, 1000, setting.batch)
    return Step(
        steps.make_train_step(spec),
        steps.init_state(spec),
        {"image": raw_images(setting.batch, side), "label": jnp.asarray(labels, jnp.int32)},
        augment.imagenet_statistics(side),
    )


class Trainer:
    """A call that makes `setting.steps` updates and returns the last loss, as the peer's.

    Attributes:
      memory_bytes: peak memory of the step in the compiler's plan.
    """

    def __init__(self, setting: Setting, augmentation: augment.Augmentation | None = None):
        step = training_step(setting, augmentation)
        self._setting = setting
        self._state, self._arguments = step.state, (step.batch, step.statistics)
        with precision(setting):
            self._step = step.function.lower(*step[1:]).compile()
        self.memory_bytes = describe.memory_bytes(self._step)

    def __call__(self) -> float:
        metrics: Any = {}
        for _ in range(self._setting.steps):
            self._state, metrics = self._step(self._state, *self._arguments)
        jax.block_until_ready(self._state)
        return float(metrics["loss"])


def logits_of(model: AlexNet) -> Callable[..., jax.Array]:
    """Return a function of (variables, raw images, mean image) that `classifier` calls."""

    def call(variables: Any, raw: jax.Array, mean: jax.Array) -> Any:
        images = augment.eval_images(raw, mean_image=mean, crop_size=CROP)
        return model.apply(variables, images)

    return call


def classifier(setting: Setting) -> Callable[[], jax.Array]:
    """Return a call that classifies the batch `setting.steps` times, to logits."""
    model = network(setting)
    raw = raw_images(setting.batch, CROP)
    mean = augment.imagenet_statistics(CROP).mean_image
    example = jnp.zeros((1, CROP, CROP, 3), jnp.float32)
    variables = jax.jit(model.init)(jax.random.key(0), example)

    with precision(setting):
        compiled = ops.jit(logits_of(model)).lower(variables, raw, mean).compile()

    def call() -> jax.Array:
        logits = raw
        for _ in range(setting.steps):
            logits = compiled(variables, raw, mean)
        return jax.block_until_ready(logits)

    return call
