"""The one place where a config meets the code: check it, build from it, load a run."""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from alexnet_jax import alexnet, augment, kinds, optim, parallel, steps, variants
from alexnet_jax import data as data_lib
from alexnet_jax import fields as fields_lib
from alexnet_jax.checkpoint import Checkpointer, CheckpointError, split_step
from alexnet_jax.data import images as images_lib
from alexnet_jax.data import statistics as statistics_lib
from alexnet_jax.data.files import replacing
from alexnet_jax.data.loader import PREFETCH
from alexnet_jax.data.sources import Source
from alexnet_jax.data.statistics import Statistics
from alexnet_jax.fields import ConfigError, flat
from alexnet_jax.layers import NORMS
from alexnet_jax.pretrained import SUFFIXES, Weights, WeightsError, read_weights
from alexnet_jax.summary import check_image_size

# A ml_collections.ConfigDict, whose fields no type checker can know.
Config = Any

CONFIG_FILE = "config.json"
STATISTICS_FILE = "statistics.npz"
CLASSES_FILE = "classes.json"
CHECKPOINTS = "checkpoints"
# main's exit status when the loss is no longer finite: for a sweep a result like others.
DIVERGED = 3
_MODEL_FIELDS = ("variant", "num_classes", "width", "dtype", "init")
# Pictures that the mean image is computed from when no full statistics are stored:
# its standard error is then below one grey level.
STATISTICS_SAMPLE = 10_000


@dataclass(frozen=True)
class Experiment:
    """What a config builds. Nothing in it changes while training.

    `steps_per_epoch` may be a fraction; `total_steps` is where the run ends.
    """

    config: Config
    model: alexnet.AlexNet
    tx: optax.GradientTransformation
    mesh: Mesh
    mode: str
    train_source: Source
    eval_source: Source | None
    statistics: Statistics
    steps_per_epoch: float
    total_steps: int

    @property
    def crop_size(self) -> int:
        return self.config.data.crop_size

    @property
    def augmentation(self) -> augment.Augmentation:
        """How training images are made of pictures."""
        return make_augmentation(self.config, self.steps_per_epoch)

    def init_state(self) -> steps.TrainState:
        """A new run's state."""
        return steps.init_state(
            self.model,
            self.tx,
            seed=self.config.seed,
            crop_size=self.crop_size,
            mesh=self.mesh,
            mode=self.mode,
        )

    def abstract_state(self) -> steps.TrainState:
        """Shapes and shardings of the state, for restoring."""
        return steps.abstract_state(
            self.model,
            self.tx,
            crop_size=self.crop_size,
            mesh=self.mesh,
            mode=self.mode,
        )

    def train_step(self) -> Callable[..., Any]:
        """The jitted (state, batch, statistics) -> (state, metrics)."""
        transform = self.config.parallel.transform
        return self._step(steps.make_train_step, transform=transform)

    def summary_step(self) -> Callable[..., dict[str, jax.Array]]:
        """The jitted (state, batch, statistics) -> scalars."""
        transform = self.config.parallel.transform
        return self._step(steps.make_summary_step, transform=transform)

    def _step(self, make: Callable[..., Any], **more: Any) -> Callable[..., Any]:
        return make(
            self.model,
            self.tx,
            self.augmentation,
            mesh=self.mesh,
            mode=self.mode,
            seed=self.config.seed,
            accumulate_steps=self.config.optim.accumulate_steps,
            label_smoothing=self.config.optim.label_smoothing,
            frozen=optim.frozen_layers(self.config.schedule.layer_factors),
            **more,
        )

    def eval_step(self, views: int = 1) -> Callable[..., Any]:
        """The jitted (params, batch_stats, batch, statistics) -> sums."""
        transform = self.config.parallel.transform
        return self._views_step(steps.make_eval_step, views, transform=transform)

    def predict_step(self, views: int = 1) -> Callable[..., Any]:
        """The jitted (params, batch_stats, batch, statistics) -> predictions."""
        return self._views_step(steps.make_predict_step, views)

    def _views_step(
        self, make: Callable[..., Any], views: int, **more: Any
    ) -> Callable[..., Any]:
        return make(
            self.model,
            mesh=self.mesh,
            mode=self.mode,
            crop_size=self.crop_size,
            views=views,
            parts=self.config.optim.accumulate_steps,
            **more,
        )

    def pixel_statistics(self) -> augment.PixelStatistics:
        """The statistics on every device of the mesh."""
        wide = jnp.promote_types(self.model.dtype, jnp.float32)
        names = ("mean_image", "pca_std_255", "pca_vectors")
        arrays = {
            name: np.asarray(getattr(self.statistics, name), wide) for name in names
        }
        return augment.PixelStatistics(**parallel.put_everywhere(arrays, self.mesh))

    def train_batches(self, start_step: int) -> data_lib.Batches:
        """This process's host batches from `start_step` on."""
        return data_lib.train_batches(
            self.train_source,
            batch_size=self.config.data.batch_size,
            seed=self.config.seed,
            start_step=start_step,
            positions=self.positions(),
            workers=self.config.data.workers,
        )

    def eval_batches(self) -> data_lib.Batches:
        """This process's part of batches that hold every example of the split once."""
        assert self.eval_source is not None
        return data_lib.eval_batches(
            self.eval_source,
            batch_size=self.config.data.batch_size,
            positions=self.positions(),
            workers=self.config.data.workers,
        )

    def positions(self) -> tuple[int, int]:
        """(lo, hi): the part of each global batch that this process reads."""
        return parallel.positions(self.mesh, self.mode, self.config.data.batch_size)

    def put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """A host batch of this process -> its part of a batch on the devices."""
        return parallel.put_batch(
            batch, self.mesh, self.mode, self.config.data.batch_size
        )


def validate(config: Config, *, devices: bool = True, training: bool = True) -> None:
    """Checks everything that can be checked without the data.

    Args:
      devices: whether to look for devices, and check what is asked of them.
      training: whether to refuse fields that would have no effect on a training.

    Raises:
      ConfigError: naming every field that is wrong, what it holds and what it may.
    """
    tree = config.to_dict()
    problems = fields_lib.kind_problems(tree)
    out_of_range = fields_lib.range_problems(tree)
    # What is computed from several fields needs all of them to be of their kind.
    if not problems:
        problems = _combination_problems(config)
        network = None
        try:
            count = config.model.num_classes or 2
            network = make_model(config, num_classes=count).network
        except ValueError as error:
            problems.append(str(error))
        if network is not None:
            try:
                check_image_size(network, config.data.crop_size)
            except ValueError as error:
                problems.append(str(error))
            problems += _layer_factor_problems(config, network)
            problems += _new_layer_problems(config, network)
            if training and not out_of_range:
                problems += _idle_schedule_problems(config)
                problems += _idle_field_problems(config, network)
            if devices:
                problems += _mesh_problems(config, network)
    _refuse(out_of_range + problems)


def _refuse(problems: list[str]) -> None:
    """Raises ConfigError if there are problems, with all of them."""
    if problems:
        lines = "\n".join(f"  - {problem}" for problem in problems)
        count = f"{len(problems)} mistake{'s' if len(problems) > 1 else ''}"
        raise ConfigError(f"{count} in the config:\n{lines}")


def _combination_problems(config: Config) -> list[str]:
    """Fields that do not go together."""
    problems = []
    if config.data.crop_size > config.data.image_size:
        problems.append(
            f"--config.data.crop_size={config.data.crop_size} is larger than "
            f"--config.data.image_size={config.data.image_size}."
        )
    if config.schedule.warmup_epochs >= config.num_epochs:
        problems.append(
            f"--config.schedule.warmup_epochs={config.schedule.warmup_epochs} must be "
            f"below --config.num_epochs={config.num_epochs}."
        )
    if config.model.dtype == "float64" and not jax.config.read("jax_enable_x64"):
        problems.append(
            "--config.model.dtype=float64 needs JAX_ENABLE_X64=1 in the environment."
        )
    return problems


def _idle_schedule_problems(config: Config) -> list[str]:
    """A schedule that lowers the learning rate by events that never come."""
    schedule = config.schedule
    split, every = config.data.eval_split, config.eval_every_epochs
    if schedule.name == "plateau" and schedule.max_drops and not (split and every):
        problem = (
            "--config.schedule.name='plateau' lowers the learning rate by evaluations, "
            f"and --config.data.eval_split={split!r} with --config.eval_every_epochs="
            f"{every} leaves none. Evaluate, or take another schedule, such as constant "
            "or cosine, or --config.schedule.max_drops=0."
        )
        return [problem]
    first_drop = min(schedule.drop_epochs, default=0)
    if schedule.name == "fixed" and first_drop >= config.num_epochs:
        problem = (
            f"--config.schedule.drop_epochs={tuple(schedule.drop_epochs)} are all after "
            f"the end, --config.num_epochs={config.num_epochs}: the learning rate would "
            "never drop. Set earlier ones, or --config.schedule.name=constant."
        )
        return [problem]
    return []


@dataclass(frozen=True)
class _Need:
    """A condition on other fields, without which a field has no effect.

    Attributes:
      field: such as "schedule.power".
      idle: values that ask for nothing, the default first.
      others: the fields that decide.
      met: whether they, and the network, let the field have an effect.
      words: what it needs of them.
    """

    field: str
    idle: tuple[Any, ...]
    others: tuple[str, ...]
    met: Callable[[Config, variants.Variant], Any]
    words: str


def _on_schedule(*names: str) -> Callable[[Config, variants.Variant], bool]:
    return lambda c, _: c.schedule.name in names


def _with_stage(*kinds: type) -> Callable[[Config, variants.Variant], bool]:
    return lambda _, network: any(isinstance(s, kinds) for s in network.stages)


# Fields are not here if they only say what is so anyway: `optim.decay_bias=False` where
# nothing decays, `checkpoint.every_steps=0`. `eval_views` needs no evaluation split here,
# as --mode=eval reads it.
# fmt: off
_NEEDS = (
    _Need("eval_every_epochs", (1.0, 0.0), ("data.eval_split",),
          lambda c, _: c.data.eval_split, "a split"),
    _Need("eval_every_epochs", (1.0, 0.0), ("num_epochs",),
          lambda c, _: c.eval_every_epochs <= c.num_epochs, "a longer run"),
    _Need("eval_views", (1,), ("data.image_size", "data.crop_size"),
          lambda c, _: c.data.image_size > c.data.crop_size, "larger pictures"),
    _Need("finetune.new_layers", ((),), ("finetune.source",),
          lambda c, _: c.finetune.source, "weights to start from"),
    _Need("data.dir", ("",), ("data.source",),
          lambda c, _: not c.data.source.startswith("folder:") and c.data.source != "fake",
          "a tfds data set or textures"),
    _Need("augment.min_area", (1.0,), ("augment.crop",),
          lambda c, _: c.augment.crop, "random crops"),
    _Need("augment.lighting_form", ("paper",), ("augment.lighting",),
          lambda c, _: c.augment.lighting, "more than 0"),
    _Need("augment.lighting_until_epoch", (-1.0,), ("augment.lighting",),
          lambda c, _: c.augment.lighting, "more than 0"),
    _Need("augment.lighting_until_epoch", (-1.0,), ("num_epochs",),
          lambda c, _: c.augment.lighting_until_epoch < c.num_epochs, "a longer run"),
    _Need("optim.weight_decay", (5e-4,), ("model.variant", "optim.layer_weight_decay"),
          lambda c, n: not c.optim.layer_weight_decay
          or len(n.layer_weight_decay) < len(n.layers),
          "layers without a weight decay of their own"),
    _Need("optim.constant_bias_lr", (False,), ("schedule.name",),
          lambda c, _: c.schedule.name != "constant" or c.schedule.layer_factors,
          "another schedule"),
    _Need("optim.form", ("paper",), ("optim.momentum",),
          lambda c, _: c.optim.momentum, "more than 0"),
    _Need("schedule.factor", (0.1,), ("schedule.name",),
          _on_schedule("plateau", "fixed"), "plateau or fixed"),
    _Need("schedule.patience", (5,), ("schedule.name",),
          _on_schedule("plateau"), "plateau"),
    _Need("schedule.patience", (5,), ("schedule.max_drops",),
          lambda c, _: c.schedule.max_drops, "1 or more"),
    _Need("schedule.max_drops", (3, 0), ("schedule.name",),
          _on_schedule("plateau"), "plateau"),
    _Need("schedule.drop_epochs", ((25.0, 51.0, 79.0), ()), ("schedule.name",),
          _on_schedule("fixed"), "fixed"),
    _Need("schedule.layer_factors", ((),), ("num_epochs",),
          lambda c, _: min(e for _, e, _ in c.schedule.layer_factors) < c.num_epochs,
          "a longer run"),
    _Need("schedule.warmup_epochs", (0.0,), ("schedule.name",),
          _on_schedule("cosine", "polynomial"), "cosine or polynomial"),
    _Need("schedule.power", (2.0,), ("schedule.name",),
          _on_schedule("polynomial"), "polynomial"),
    _Need("model.overrides.dropout", (None, 0.0), ("model.variant",),
          _with_stage(variants.Dropout), "a network with dropout"),
    _Need("model.overrides.norm_place", (None,),
          ("model.variant", "model.overrides.lrn", "model.overrides.normalization"),
          _with_stage(*NORMS), "a network with normalisation"),
)
# fmt: on


def _idle_field_problems(config: Config, network: variants.Variant) -> list[str]:
    """Fields that ask for something, and cannot have an effect beside the others."""
    fields = flat(config.to_dict())
    problems = []
    for need in _NEEDS:
        value = fields.get(need.field)
        if isinstance(value, list):
            value = tuple(value)
        if value in need.idle or need.met(config, network):
            continue
        others = {name: fields.get(name) for name in need.others}
        beside = ", ".join(
            f"--config.{name}={kinds.shown(other)}"
            for name, other in others.items()
            if other is not None
        )
        default = need.idle[0]
        left = "out" if default is None else f"at {kinds.shown(default)}"
        problems.append(
            f"--config.{need.field}={kinds.shown(value)} has no effect with {beside}; it "
            f"needs {need.words}, or to be left {left}."
        )
    return problems


def _layer_factor_problems(config: Config, network: variants.Variant) -> list[str]:
    """What is wrong with `schedule.layer_factors`: layers, order, values."""
    names = [row.name for row in network.layers]
    before: dict[str, float] = {}
    for layer, epoch, factor in config.schedule.layer_factors:
        right = layer in names and epoch > before.get(layer, -1)
        if not (right and epoch >= 0 and factor >= 0):
            problem = (
                f"--config.schedule.layer_factors: {(layer, epoch, factor)} must be "
                f"(layer, epoch, factor), the layer one of {', '.join(names)}, its "
                "epochs 0 or more and increasing, the factor 0 or more."
            )
            return [problem]
        before[layer] = epoch
    return []


def _new_layer_problems(config: Config, network: variants.Variant) -> list[str]:
    names = [row.name for row in network.layers]
    return [
        f"--config.finetune.new_layers: {layer!r} must be one of {', '.join(names)}."
        for layer in config.finetune.new_layers
        if layer not in names
    ]


def _mesh_problems(config: Config, network: variants.Variant) -> list[str]:
    known = config.parallel.mode in parallel.MODES and config.data.batch_size >= 1
    shape = config.parallel.data, config.parallel.column
    if not known or not all(side == -1 or side >= 1 for side in shape):
        return []  # said already
    try:
        rows, columns = mesh_shape(config, network)
        parallel.check_mode(network, config.parallel.mode, columns)
        parallel.make_mesh(rows, columns)
    except ValueError as error:
        return [str(error)]
    if config.optim.trust_coefficient > 0 and columns > 1:
        problem = (
            f"--config.optim.trust_coefficient={config.optim.trust_coefficient} is of "
            f"the norms of whole layers, which --config.parallel.mode="
            f"{config.parallel.mode} splits over {columns} columns; set "
            "--config.parallel.mode=data or --config.parallel.column=1."
        )
        return [problem]
    if config.parallel.transform == "pmap":
        if config.parallel.mode != "data":
            problem = (
                "--config.parallel.transform=pmap splits nothing but the batch: it goes "
                f"with --config.parallel.mode=data, not {config.parallel.mode}."
            )
            return [problem]
        if jax.process_count() > 1:
            problem = (
                "--config.parallel.transform=pmap is for one process; "
                f"{jax.process_count()} take shard_map."
            )
            return [problem]
    batch, parts = config.data.batch_size, max(1, config.optim.accumulate_steps)
    devices = parallel.batch_shards(rows, columns, config.parallel.mode)
    step = devices * parts
    if batch % step == 0:
        return []
    below, above = batch // step * step, -(-batch // step) * step
    nearest = " or ".join(str(size) for size in (below, above) if size > 0)
    each = "" if parts == 1 else f" in --config.optim.accumulate_steps={parts} parts"
    problem = (
        f"--config.data.batch_size={batch} does not divide over {devices} devices{each}; "
        f"the nearest that do: {nearest}."
    )
    return [problem]


def mesh_shape(config: Config, network: variants.Variant) -> tuple[int, int]:
    """(data, column) of the mesh, where the config leaves it open (-1)."""
    devices = jax.device_count()
    data, column = config.parallel.data, config.parallel.column
    if column == -1:
        match config.parallel.mode:
            case "columns" if devices >= network.columns * max(1, data):
                column = network.columns
            case "hybrid":
                column = max(1, devices // max(1, data))
            case _:
                column = 1
    if data == -1:
        data = max(1, devices // column)
    return data, column


def make_model(config: Config, num_classes: int | None) -> alexnet.AlexNet:
    """The network of a config; None: with the variant's own number of classes."""
    return alexnet.from_settings(model_settings(config, num_classes))


def model_settings(config: Config, num_classes: int | None) -> dict[str, Any]:
    """The arguments of `alexnet.create_model`."""
    fields = config.model
    return {
        "variant": fields.variant,
        "num_classes": num_classes,
        "width": fields.width,
        "dtype": fields.dtype if fields.dtype in alexnet.DTYPES else "float32",
        "init": fields.init,
        **fields.get("overrides", {}),
    }


def build(
    config: Config,
    *,
    statistics: Statistics | None = None,
    log: Callable[[str], object] = print,
) -> Experiment:
    """Checks a config and builds everything that it describes.

    Args:
      config: see `configs/common.py`.
      statistics: of the training split, if already known (a resumed run has them);
        else they are read from beside the data, or computed from a sample.
      log: where process 0 says what is being done, and what is doubtful of the data.

    Raises:
      ConfigError: for anything wrong with the config itself.
      ValueError, FileNotFoundError: for anything wrong with the data.
    """
    validate(config, training=False)  # `train` refuses what a training ignores
    train, evaluation = _open_sources(config, log)
    if jax.process_index() == 0:
        for line in data_lib.warnings_about(train, evaluation):
            log(line)
    network = make_model(config, _num_classes(config, train))
    mode = config.parallel.mode
    rows, columns = mesh_shape(config, network.network)
    steps_per_epoch = train.num_examples / config.data.batch_size
    mesh = parallel.make_mesh(rows, columns)
    _require_memory(config, mesh)
    total_steps = math.ceil(config.num_epochs * steps_per_epoch)
    if config.max_steps >= 0:
        total_steps = min(total_steps, config.max_steps)
    return Experiment(
        config=config,
        model=network,
        tx=make_optimizer(config, network, steps_per_epoch),
        mesh=mesh,
        mode=mode,
        train_source=train,
        eval_source=evaluation,
        statistics=statistics or _find_statistics(config, train, log),
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
    )


def build_for_evaluation(
    config: Config,
    *,
    class_names: Sequence[str] | None,
    statistics: Statistics,
    log: Callable[[str], object] = print,
) -> Experiment:
    """Builds what a trained network is tested in; the training split is not opened.

    Args:
      config: see `configs/common.py`; it has an evaluation split.
      class_names: those that the network was trained on, by label; None: not known, so
        those of the evaluation split.
      statistics: those that it was trained with.
      log: told of trained classes that the evaluation split has no images of.

    Returns:
      An experiment that cannot train: the evaluation split is its `train_source` too.

    Raises:
      ConfigError, ValueError, FileNotFoundError: as `build`.
    """
    validate(config, training=False)
    source = _open_split(config, config.data.eval_split)
    if class_names is not None:
        source = data_lib.match_classes(source, class_names, log=log)
    network = make_model(config, _num_classes(config, source))
    mesh = parallel.make_mesh(*mesh_shape(config, network.network))
    _require_memory(config, mesh)
    return Experiment(
        config=config,
        model=network,
        tx=optax.identity(),
        mesh=mesh,
        mode=config.parallel.mode,
        train_source=source,
        eval_source=source,
        statistics=statistics,
        steps_per_epoch=0.0,
        total_steps=0,
    )


def _require_memory(config: Config, mesh: Mesh) -> None:
    """Raises ConfigError for batches that this machine cannot hold.

    Linux lends more memory than there is, and then ends a process without a word.
    """
    batch, side, count = config.data.batch_size, config.data.image_size, PREFETCH + 1
    low, high = parallel.positions(mesh, config.parallel.mode, batch)
    needed = count * (high - low) * side * side * 3
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not said on this system
        return
    if needed > memory:
        raise ConfigError(
            f"--config.data.batch_size={batch}: the loader holds {count} batches of "
            f"{high - low:,} pictures of {side} x {side} pixels, {needed / 1e9:,.1f} GB; "
            f"this machine has {memory / 1e9:,.1f} GB. Take a smaller one."
        )


def make_augmentation(config: Config, steps_per_epoch: float) -> augment.Augmentation:
    """How a config makes training images of pictures."""
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
    )


def _open_sources(
    config: Config, log: Callable[[str], object]
) -> tuple[Source, Source | None]:
    train = _open_split(config, config.data.train_split)
    if not config.data.eval_split:
        return train, None
    evaluation = _open_split(config, config.data.eval_split)
    evaluation = data_lib.match_classes(
        evaluation,
        train.class_names,
        log=log if jax.process_index() == 0 else lambda line: None,
    )
    return train, evaluation


def _open_split(config: Config, split: str) -> Source:
    return data_lib.open_source(
        config.data.source,
        split,
        data_dir=config.data.dir or None,
        image_size=config.data.image_size,
    )


def _num_classes(config: Config, train: Source) -> int:
    asked = config.model.num_classes
    if asked and asked < train.num_classes:
        raise ConfigError(
            f"--config.model.num_classes={asked} is fewer than the "
            f"{train.num_classes} classes of {train.description}; 0 counts them."
        )
    return asked or train.num_classes


def make_optimizer(
    config: Config, network: alexnet.AlexNet, steps_per_epoch: float
) -> optax.GradientTransformation:
    """The update rule and the schedule of a config."""
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
            network.network.layer_weight_decay
            if config.optim.layer_weight_decay
            else None
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


def _find_statistics(
    config: Config, source: Source, log: Callable[[str], object]
) -> Statistics:
    """The stored statistics of the data, else those of a sample.

    Process 0 finds them for all: the same to the last bit, and read once.
    """
    if jax.process_count() == 1:
        return _find_own_statistics(config, source, log)
    side = source.image_size
    found: dict[str, Any] = {
        "mean_image": np.zeros((side, side, 3), np.float32),
        "pca_std_255": np.zeros(3, np.float32),
        "pca_vectors": np.zeros((3, 3), np.float32),
        "num_examples": np.int32(0),
        "split_examples": np.int32(0),
    }
    if jax.process_index() == 0:
        own = _find_own_statistics(config, source, log)
        found = {k: np.asarray(getattr(own, k), v.dtype) for k, v in found.items()}
    shared = jax.device_get(multihost_utils.broadcast_one_to_all(found))
    count, split = (int(shared.pop(k)) for k in ("num_examples", "split_examples"))
    arrays = {name: np.asarray(array) for name, array in shared.items()}
    return Statistics(**arrays, num_examples=count, split_examples=split)


def _find_own_statistics(
    config: Config, source: Source, log: Callable[[str], object]
) -> Statistics:
    path, why = source.statistics_path, ""
    # The mean image of trained weights is their own (`finetune.with_mean_of`).
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
    return statistics_lib.compute(
        source, max_examples=count, workers=config.data.workers
    )


def pipeline(config: Config, *, start_step: int = 0) -> Iterator[dict[str, Any]]:
    """The training batches as the network sees them, endless, for a notebook.

    Yields {"image": float32 [B, crop, crop, 3], "label": int32 [B]}: cropped, flipped
    and lit exactly as training at that step does it inside its own jitted step.
    """
    experiment = build(config)
    statistics = experiment.pixel_statistics()
    key = steps.purpose_key(config.seed, steps.AUGMENT)

    @jax.jit
    def augmented(pictures: jax.Array, step: jax.Array) -> jax.Array:
        step_key = jax.random.fold_in(key, step)
        return augment.train_images(
            pictures, step_key, 0, statistics, experiment.augmentation, step=step
        )

    with experiment.train_batches(start_step) as batches:
        for step, batch in enumerate(batches, start_step):
            images = augmented(batch["image"], jnp.int32(step))
            yield {"image": images, "label": jnp.asarray(batch["label"])}


def load(
    path: str | os.PathLike[str],
    *,
    step: int | None = None,
    variant: str | None = None,
) -> tuple[alexnet.AlexNet, dict[str, Any], Callable[[Any], jax.Array]]:
    """A trained network, for a notebook: `model, variables, preprocess = load(PATH)`.

    Args:
      path: the workdir of a run, DIR or DIR@STEP, or a file of weights: `.safetensors`,
        `.caffemodel`, `.pth` (see `pretrained.read_weights`).
      step: which checkpoint of a run; else the one with the lowest top-1 error, and
        without any evaluation the newest.
      variant: of a file that does not say it.

    Returns:
      model: the whole network, for one device.
      variables: what `model.apply` takes.
      preprocess: a path, a Pillow picture, a uint8 array [H, W, 3], or a list of
        these (see `load_picture`) -> images [B, crop, crop, 3], the centre view minus
        the mean.

    Raises:
      FileNotFoundError: if `path` is neither a workdir nor a file.
      CheckpointError: if it holds no whole checkpoint.
      WeightsError: if it is a file that cannot be used, and why; or another variant.
      DataError, ConfigError: if the statistics or the class names are damaged.
      DeviceError: if jax has no devices.
    """
    weights = read_network(path, step=step, variant=variant)
    return weights.make_model(), weights.variables, make_preprocess(weights)


def make_preprocess(weights: Weights) -> Callable[[Any], jax.Array]:
    """The third of what `load` returns."""
    size, crop_size = weights.image_size, weights.crop_size
    mean_image = jnp.broadcast_to(jnp.asarray(weights.mean), (size, size, 3))

    def preprocess(pictures: Any) -> jax.Array:
        if not isinstance(pictures, (list, tuple)):
            pictures = [pictures]
        stack = np.stack([images_lib.load_picture(p, size) for p in pictures])
        return augment.eval_images(
            jnp.asarray(stack), mean_image=mean_image, crop_size=crop_size
        )

    return preprocess


def read_network(
    path: str | os.PathLike[str],
    *,
    step: int | None = None,
    variant: str | None = None,
) -> Weights:
    """What `load` builds from: settings, weights, sizes, mean and names.

    Arguments and errors are those of `load`.
    """
    parallel.require_devices()
    if is_weights_file(path):
        if step is not None:
            raise WeightsError(f"{path} is a file of weights; it has no step {step}.")
        weights = read_weights(path, variant=variant)
        on_device = jax.tree.map(jnp.asarray, weights.variables)
        return dataclasses.replace(weights, variables=on_device)
    folder, which = split_step(os.fspath(path))
    if step is not None and folder != os.fspath(path):
        raise CheckpointError(f"{path} says which step already; got step {step} too.")
    workdir = Path(folder).absolute()
    require_run(workdir)
    statistics = read_statistics(workdir)
    with Checkpointer(workdir / CHECKPOINTS, read_only=True) as checkpointer:
        chosen = checkpointer.find(which if step is None else step)
        variables, metadata = checkpointer.restore_params(step=chosen)
    config: Config = ConfigDict(metadata["config"])
    if variant not in (None, config.model.variant):
        raise WeightsError(
            f"{path} holds a network of variant {config.model.variant}; got "
            f"variant={variant!r}."
        )
    side = config.data.image_size
    statistics_lib.require_size(
        statistics,
        side,
        workdir / STATISTICS_FILE,
        remedy=statistics_lib.TRAIN_AGAIN,
    )
    names = read_class_names(workdir)
    classifier = variants.get(config.model.variant).layers[-1].name
    units = variables["params"][classifier]["bias"].shape[0]
    return Weights(
        settings=model_settings(config, units),
        variables=variables,
        mean=statistics.mean_image,
        image_size=side,
        crop_size=config.data.crop_size,
        class_names=None if names is None else tuple(names),
    )


def read_statistics(workdir: Path, image_size: int | None = None) -> Statistics:
    """The statistics that a workdir was trained with.

    Args:
      image_size: side of the pictures that they have to be of; None: of any.

    Raises:
      FileNotFoundError, DataError: they are not there, or not those of such pictures.
    """
    path = workdir / STATISTICS_FILE
    try:
        return statistics_lib.load(path, image_size, remedy=statistics_lib.TRAIN_AGAIN)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path} is missing: the mean image that the network of this run is given "
            "its pictures without. Copy it from where the run was trained."
        ) from error


def about_mean(workdir: Path, statistics: Statistics, config: Any) -> str:
    """The line that says where a run's mean image is from, and of how many images."""
    tuned = config.get("finetune", {}).get("source")
    images = "the weights" if tuned else statistics.extent
    return f"mean image: {workdir / STATISTICS_FILE}, of {images}"


def is_weights_file(path: str | os.PathLike[str]) -> bool:
    """Whether a path is to be read as a file of weights: a file, or named like one."""
    named = os.fspath(path).lower().endswith(SUFFIXES)
    return Path(path).is_file() or (named and not Path(path).is_dir())


def require_run(workdir: Path) -> None:
    """Raises FileNotFoundError if a folder is not the workdir of a run."""
    if not (workdir / CONFIG_FILE).exists():
        raise FileNotFoundError(
            f"{workdir} is not the workdir of a run: it has no {CONFIG_FILE}. Give the "
            "folder that was given as --workdir, or a file of weights."
        )


# What a run's config says of its network.
_NETWORK_FIELDS = ("model.", "data.image_size", "data.crop_size")


def with_network_of(config: Config, path: str | os.PathLike[str]) -> Config:
    """A copy of a config that has the network, and the sizes, of a trained one.

    `path` and errors are those of `load`.
    """
    if is_weights_file(path):
        weights = read_weights(path)
        fields = {
            f"model.{'' if name in _MODEL_FIELDS else 'overrides.'}{name}": value
            for name, value in weights.settings.items()
        }
        fields["data.image_size"] = weights.image_size
        fields["data.crop_size"] = weights.crop_size
    else:
        workdir = Path(split_step(os.fspath(path))[0])
        require_run(workdir)
        fields = flat(read_config(workdir) or {})
        fields = {k: v for k, v in fields.items() if k.startswith(_NETWORK_FIELDS)}
    own: Config = ConfigDict(config.to_dict())
    with own.ignore_type():
        own.update_from_flattened_dict(fields)
    return own


def read_config(workdir: Path) -> dict[str, Any] | None:
    """The config that a workdir was trained with, None if it is not a workdir.

    Raises:
      ConfigError: if the file is damaged.
    """
    return _read_json(workdir / CONFIG_FILE)


def write_config(workdir: Path, config: Config) -> None:
    """Stores the config in its workdir, at once or not at all."""
    _write_json(workdir / CONFIG_FILE, as_json(config))


def read_class_names(workdir: Path) -> list[str] | None:
    """The names by label that a workdir was trained with; None if it does not say.

    Raises:
      ConfigError: if the file is damaged.
    """
    return _read_json(workdir / CLASSES_FILE)


def write_class_names(workdir: Path, names: Sequence[str]) -> None:
    """Stores what the labels mean, at once or not at all."""
    _write_json(workdir / CLASSES_FILE, list(names))


def _read_json(path: Path) -> Any:
    """Return what a file of a workdir holds, None if it is not there.

    Raises:
      ConfigError: if the file is damaged.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ConfigError(
            f"{path} is damaged: {error}. Copy it from where the run was trained."
        ) from error


def _write_json(path: Path, value: Any) -> None:
    with replacing(path) as file:
        file.write(f"{json.dumps(value, indent=2)}\n".encode())


def as_json(config: Config) -> dict[str, Any]:
    """The config as plain JSON values (tuples become lists)."""
    return json.loads(config.to_json())
