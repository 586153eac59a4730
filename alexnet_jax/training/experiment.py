"""Build everything that a config describes: network, optimiser, mesh, data."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from alexnet_jax import data as data_lib
from alexnet_jax.data import augment
from alexnet_jax.data import statistics as statistics_lib
from alexnet_jax.data.sources import Source
from alexnet_jax.data.statistics import Statistics
from alexnet_jax.models import alexnet
from alexnet_jax.training import optim, parallel, steps
from alexnet_jax.training.config import Config, ConfigError, make_model, mesh_shape, validate

# main's exit status after a loss that is not finite; a sweep counts it as a result.
DIVERGED = 3
# Sample for the mean image if no full statistics are stored: its standard error is then
# below one grey level.
STATISTICS_SAMPLE = 10_000


@dataclass(frozen=True)
class Experiment:
    """Everything that a config builds; training changes nothing in it.

    Attributes:
      spec: network, optimiser, augmentation and mesh of the steps.
      eval_source: None: there is no evaluation split.
      steps_per_epoch: may be a fraction.
      total_steps: the step at which the run ends.
    """

    config: Config
    spec: steps.StepSpec
    train_source: Source
    eval_source: Source | None
    statistics: Statistics
    steps_per_epoch: float = 0.0
    total_steps: int = 0

    @property
    def model(self) -> alexnet.AlexNet:
        return self.spec.model

    @property
    def mesh(self) -> Mesh:
        return self.spec.mesh

    def init_state(self) -> steps.TrainState:
        """Return the state of a new run."""
        return steps.init_state(self.spec)

    def abstract_state(self) -> steps.TrainState:
        """Return shapes and shardings of the state, for restoring."""
        return steps.abstract_state(self.spec)

    def statistics_on_mesh(self) -> Statistics:
        """Return the statistics on every device of the mesh."""
        wide = jnp.promote_types(self.model.dtype, jnp.float32)
        arrays = jax.tree.map(lambda a: np.asarray(a, wide), self.statistics)
        return parallel.put_everywhere(arrays, self.mesh)

    def train_batches(self, start_step: int) -> data_lib.Batches:
        """Return this process's host batches from `start_step` on."""
        return data_lib.train_batches(
            self.train_source,
            batch_size=self.config.data.batch_size,
            seed=self.config.seed,
            start_step=start_step,
            positions=self.positions(),
            workers=self.config.data.workers,
        )

    def eval_batches(self) -> data_lib.Batches:
        """Return this process's part of batches that hold each example of the split once."""
        assert self.eval_source is not None
        return data_lib.eval_batches(
            self.eval_source,
            batch_size=self.config.data.batch_size,
            positions=self.positions(),
            workers=self.config.data.workers,
        )

    def positions(self) -> tuple[int, int]:
        """Return (low, high): the part of each global batch that this process reads."""
        batch_size = self.config.data.batch_size
        return parallel.positions(self.mesh, self.spec.mode, batch_size)

    def put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Put this process's host batch on the devices, as its part of the global batch."""
        batch_size = self.config.data.batch_size
        return parallel.put_batch(batch, self.mesh, self.spec.mode, batch_size)


def build(
    config: Config, *, statistics: Statistics | None = None, log: Callable[[str], object] = print
) -> Experiment:
    """Check a config and build everything that it describes.

    Args:
      config: see `config.get_config`.
      statistics: of the training split; None: read them from beside the data, or
        compute them from a sample.
      log: prints messages and warnings about the data, in process 0.

    Raises:
      ConfigError: the config is wrong.
      ValueError, FileNotFoundError: the data is missing or wrong.
    """
    validate(config, training=False)  # `loop` refuses fields without effect
    say = log if jax.process_index() == 0 else lambda line: None
    train, evaluation = _open_split(config, config.data.train_split), None
    if config.data.eval_split:
        evaluation = _open_split(config, config.data.eval_split)
        evaluation = data_lib.match_classes(evaluation, train.class_names, log=say)
    for line in data_lib.warnings_about(train, evaluation):
        say(line)
    steps_per_epoch = train.num_examples / config.data.batch_size
    total_steps = math.ceil(config.num_epochs * steps_per_epoch)
    return Experiment(
        config=config,
        spec=_spec_for(config, train, steps_per_epoch),
        train_source=train,
        eval_source=evaluation,
        statistics=statistics or _find_statistics(config, train, say),
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps if config.max_steps < 0 else min(total_steps, config.max_steps),
    )


def build_for_evaluation(
    config: Config,
    *,
    class_names: Sequence[str] | None,
    mean: np.ndarray,
    log: Callable[[str], object] = print,
) -> Experiment:
    """Build the experiment of an evaluation, without opening the training split.

    Args:
      config: see `config.get_config`; it has an evaluation split.
      class_names: names by label that the network was trained on; None: unknown, take
        those of the evaluation split.
      mean: the image or colour that is subtracted from raw images.
      log: prints messages and warnings about the data.

    Returns:
      An experiment that cannot train; its `train_source` is the evaluation split.

    Raises:
      ConfigError, ValueError, FileNotFoundError: as `build`.
    """
    validate(config, training=False)
    source, side = _open_split(config, config.data.eval_split), config.data.image_size
    if class_names is not None:
        source = data_lib.match_classes(source, class_names, log=log)
    for line in data_lib.warnings_about(None, source):
        log(line)
    mean_image = np.broadcast_to(np.asarray(mean), (side, side, 3))
    return Experiment(
        config=config,
        spec=_spec_for(config, source, steps_per_epoch=1.0),
        train_source=source,
        eval_source=source,
        statistics=Statistics(mean_image, np.zeros(3), np.eye(3), 1, 1),
    )


def _open_split(config: Config, split: str) -> Source:
    return data_lib.open_source(
        config.data.source,
        split,
        data_dir=config.data.dir or None,
        image_size=config.data.image_size,
    )


def _spec_for(config: Config, source: Source, steps_per_epoch: float) -> steps.StepSpec:
    """Return the spec of a config's network, with the classes of `source`, on its mesh."""
    num_classes = config.model.num_classes or source.num_classes
    if num_classes < source.num_classes:
        raise ConfigError(
            f"--config.model.num_classes={num_classes} is fewer than the "
            f"{source.num_classes} classes of {source.description}; 0 counts them."
        )
    network = make_model(config, num_classes)
    mesh = parallel.make_mesh(*mesh_shape(config, network.network))
    return make_spec(config, network, mesh, steps_per_epoch)


def make_spec(
    config: Config, network: alexnet.AlexNet, mesh: Mesh, steps_per_epoch: float
) -> steps.StepSpec:
    """Return the arguments that all steps of a config share."""
    return steps.StepSpec(
        network,
        make_optimizer(config, network, steps_per_epoch),
        make_augmentation(config, steps_per_epoch),
        mesh,
        mode=config.parallel.mode,
        transform=config.parallel.transform,
        seed=config.seed,
        accumulate_steps=config.optim.accumulate_steps,
        label_smoothing=config.optim.label_smoothing,
        frozen=optim.frozen_layers(config.schedule.layer_factors),
        **(averaging(config.optim.ema_decay) if config.optim.ema_decay else {}),
    )


def averaging(decay: float) -> dict[str, Any]:
    """Return the arguments of `StepSpec` that keep a moving average of the parameters."""

    def after_update(state: steps.TrainState) -> steps.TrainState:
        average = optim.update_average(state.extra["average"], state.params, state.step, decay)
        return dataclasses.replace(state, extra=state.extra | {"average": average})

    return {"init_extra": _first_average, "after_update": after_update}


def _first_average(params: Any) -> dict[str, Any]:
    return {"average": params}


def make_augmentation(config: Config, steps_per_epoch: float) -> augment.Augmentation:
    """Return how a config makes training images of raw images."""
    fields = config.augment
    until = fields.lighting_until_epoch
    return augment.Augmentation(
        config.data.crop_size,
        fields.crop,
        fields.flip,
        fields.lighting,
        fields.lighting_form,
        None if until == -1 else round(until * steps_per_epoch),
        fields.min_area,
        fields.mixup,
    )


def make_optimizer(
    config: Config, network: alexnet.AlexNet, steps_per_epoch: float
) -> optax.GradientTransformation:
    """Return the update rule of a config, with its schedule."""
    schedule = optim.make_schedule(
        config.schedule.name,
        config.optim.learning_rate,
        steps_per_epoch=steps_per_epoch,
        num_epochs=config.num_epochs,
        drop_epochs=tuple(config.schedule.drop_epochs),
        factor=config.schedule.factor,
        warmup_epochs=config.schedule.warmup_epochs,
        power=config.schedule.power,
    )
    return optim.make_optimizer(
        schedule,
        momentum=config.optim.momentum,
        weight_decay=config.optim.weight_decay,
        bias_lr_mult=config.optim.bias_lr_mult,
        decay_bias=config.optim.decay_bias,
        form=config.optim.form,
        layer_weight_decay=(
            network.network.layer_weight_decay if config.optim.layer_weight_decay else None
        ),
        bias_learning_rate=(
            config.optim.bias_lr_mult * config.optim.learning_rate
            if config.optim.constant_bias_lr
            else None
        ),
        layer_factors=optim.make_layer_factors(
            config.schedule.layer_factors, steps_per_epoch=steps_per_epoch
        ),
        trust_coefficient=config.optim.trust_coefficient or None,
    )


def _find_statistics(config: Config, source: Source, log: Callable[[str], object]) -> Statistics:
    """Return the stored statistics of the data, else those of a sample.

    Process 0 finds them for all processes: the same bits, and read once.
    """
    if jax.process_index() == 0:
        found = _read_or_compute_statistics(config, source, log)
    else:
        mean_image = np.zeros((source.image_size, source.image_size, 3))
        found = Statistics(mean_image, np.zeros(3), np.zeros((3, 3)), 0, 0)
    if jax.process_count() == 1:
        return found
    leaves = [np.asarray(x, np.float32 if np.ndim(x) else np.int32) for x in astuple(found)]
    leaves = jax.device_get(multihost_utils.broadcast_one_to_all(leaves))
    mean_image, std, vectors = map(np.asarray, leaves[:3])
    return Statistics(mean_image, std, vectors, *map(int, leaves[3:]))


def _read_or_compute_statistics(
    config: Config, source: Source, log: Callable[[str], object]
) -> Statistics:
    path, why = source.statistics_path, ""
    # Trained weights bring their own mean image (`finetune.begin`).
    what = "colour PCA" if config.finetune.source else "mean image"
    if path is not None and path.exists():
        stored = statistics_lib.load(path, source.image_size)
        if stored.split_examples == source.num_examples:
            log(f"{what}: {path}, of {stored.extent}")
            return stored
        why = f", since {path} is of {stored.extent}"
    count, total = min(STATISTICS_SAMPLE, source.num_examples), source.num_examples
    log(f"{what}: computing it from {count:,} of {total:,} images{why}")
    if path is not None and (why or count < total):
        log("  (python -m alexnet_jax.prepare statistics stores that of all)")
    return statistics_lib.compute(source, max_examples=count, workers=config.data.workers)


def pipeline(config: Config, *, start_step: int = 0) -> Iterator[dict[str, Any]]:
    """Yield training batches as the network sees them, without end, for a notebook.

    Yields {"image": float32 [B, crop, crop, 3], "label": int32 [B]}: cropped, flipped
    and lit exactly as in the training step of that number.
    """
    experiment = build(config)
    statistics = experiment.statistics_on_mesh()
    key = steps.purpose_key(config.seed, steps.AUGMENT)

    @jax.jit
    def augmented(raw_images: jax.Array, step: jax.Array) -> jax.Array:
        step_key = jax.random.fold_in(key, step)
        return augment.train_images(
            raw_images, step_key, 0, statistics, experiment.spec.augmentation, step=step
        )

    with experiment.train_batches(start_step) as batches:
        for step, batch in enumerate(batches, start_step):
            images = augmented(batch["image"], jnp.int32(step))
            yield {"image": images, "label": jnp.asarray(batch["label"])}
