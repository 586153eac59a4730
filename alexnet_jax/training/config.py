"""Every field of a config: default, unit, source and allowed values.

A config file is Python with a function `get_config()`, which starts from the one here:

    from alexnet_jax.training.config import get_config as defaults

    def get_config():
        config = defaults()
        config.optim.learning_rate = 0.02
        return config

On the command line: `--config.optim.learning_rate=0.02`.
"""

import difflib
import itertools
import json
import math
import runpy
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from flax import traverse_util
from ml_collections import ConfigDict, config_dict, config_flags

from alexnet_jax.data import augment as augment_lib
from alexnet_jax.models import alexnet, layers, variants
from alexnet_jax.models.summary import check_image_size
from alexnet_jax.training import optim as optim_lib
from alexnet_jax.training import parallel as parallel_lib

# An ml_collections.ConfigDict; type checkers cannot know its fields.
Config = Any


class ConfigError(ValueError):
    """A wrong config, or an unusable file of a workdir; lists every mistake."""


def get_config() -> Config:
    """Return the default configuration, locked: a misspelt field raises."""
    config: Config = ConfigDict()
    # Seed of all randomness: initial weights, order, augmentation, dropout.
    config.seed = 0
    # Length of the run in passes over the training split, for example 0.5 (paper, section 5:
    # "roughly 90 cycles"). Schedules extend over this length.
    config.num_epochs = 90.0
    # Number of steps after which the run stops, with the schedule unchanged; -1: off.
    config.max_steps = -1
    # Steps between two records of the log, which average the metrics of these steps.
    config.log_every_steps = 100
    # Epochs between two evaluations; 0: only one, at the end (the plateau schedule needs more).
    config.eval_every_epochs = 1.0
    # Number of test views that the final evaluation and --mode=eval average: 10 (paper,
    # section 4.1), 9 (cuda-convnet2 on CIFAR-10), or 1: the centre view only.
    config.eval_views = 1
    # Training error at which the run ends, averaged over log_every_steps (paper, figure 1:
    # 0.25); 0: off.
    config.stop_at_train_error = 0.0
    # Steps between two summaries, which give each layer's gradient norm and its share of
    # units that are zero for the whole batch; 0: off. A summary takes as long as a step.
    config.summaries_every_steps = 0
    # Number of steps that the profiler traces into WORKDIR/profile after each start; 0: none.
    config.profile = 0

    config.model = model = ConfigDict()
    # Layer table: paper, original, no_communication, six_conv, no_overlap, one_gpu, caffe,
    # caffenet, one_tower, owt, zfnet, cifar, cifar_13 or cifar_11; or a table of your own,
    # FILE.py:NAME.
    model.variant = "paper"
    # The table of FILE.py:NAME as JSON. The program fills it in and stores it with the run:
    # leave it empty.
    model.table = ""
    # Number of units of the classifier; 0: the number of classes of the data set.
    model.num_classes = 0
    # Factor on the number of features of every layer but the classifier.
    model.width = 1.0
    # Type of the computation: float32, bfloat16 (with float32 parameters) or float64.
    model.dtype = "float32"
    # Initial weights: paper (those that the network was published with), caffe or he.
    model.init = "paper"
    # Ablations (`alexnet_jax.models.ablations`); None keeps the value of the table.
    model.overrides = overrides = ConfigDict()
    # False removes all normalisation (paper, section 3.3); True means normalization=lrn.
    overrides.lrn = config_dict.placeholder(bool)
    # Number of maps n in LRN's window, an odd number (paper, section 3.3: 5).
    overrides.lrn_size = config_dict.placeholder(int)
    # Constant k that LRN adds to its sum, above 0 (paper: 2).
    overrides.lrn_k = config_dict.placeholder(float)
    # Factor alpha on LRN's sum of squares (paper: 1e-4).
    overrides.lrn_alpha = config_dict.placeholder(float)
    # Exponent beta of LRN (paper: 0.75).
    overrides.lrn_beta = config_dict.placeholder(float)
    # sum or mean: what LRN's alpha multiplies of the squares (paper: sum; the original: mean).
    overrides.lrn_alpha_mode = config_dict.placeholder(str)
    # True keeps LRN's window inside a column (paper); False lets it cross columns (Caffe).
    overrides.lrn_per_column = config_dict.placeholder(bool)
    # Side of every pooling window in pixels; at a stride of 2, windows of 2 do not overlap
    # (paper, section 3.4: 3).
    overrides.pool_window = config_dict.placeholder(int)
    # Stride of every pooling layer in pixels (paper, section 3.4: 2).
    overrides.pool_stride = config_dict.placeholder(int)
    # Kind of every pooling layer: max or avg.
    overrides.pool_kind = config_dict.placeholder(str)
    # Activation of every layer: relu, tanh or sigmoid (paper, section 3.1: relu).
    overrides.activation = config_dict.placeholder(str)
    # Number of columns that the kernels are divided into (paper, section 3.2: 2).
    overrides.columns = config_dict.placeholder(int)
    # Dropout rate (paper, section 4.2: 0.5); 0: none.
    overrides.dropout = config_dict.placeholder(float)
    # Kind of normalisation: lrn, batch (Ioffe and Szegedy 2015) or none.
    overrides.normalization = config_dict.placeholder(str)
    # The only layers that stay normalised, for example ("conv1",).
    overrides.norm_layers = config_dict.placeholder(tuple)
    # Place of normalisation: before or after the layer's activation.
    overrides.norm_place = config_dict.placeholder(str)
    # Convolutional layers to leave out, for example ("conv3",).
    overrides.skip = config_dict.placeholder(tuple)

    config.finetune = finetune = ConfigDict()
    # Trained weights to start from, except those of the classifier: the workdir of a run
    # (DIR, DIR@STEP) or a file that `alexnet_jax.load` reads; empty: none.
    finetune.source = ""
    # Layers besides the classifier that start from scratch, for example ("fc7",).
    finetune.new_layers = ()

    config.data = data = ConfigDict()
    # Images: textures, folder:PATH, fake, or name[:version] of a prepared tfds data set.
    data.source = "textures"
    # Directory of tfds data sets; empty: $TFDS_DATA_DIR, else ~/tensorflow_datasets.
    data.dir = ""
    # Split to train on; tfds data sets also take a slice, for example train[:90%].
    data.train_split = "train"
    # Split to evaluate on; empty: none. In folders test, val and validation are the same.
    data.eval_split = "test"
    # Number of images per step over all devices (paper, section 5: 128); fixed within a run.
    data.batch_size = 128
    # Side of the raw images in pixels (paper, section 2: 256).
    data.image_size = 256
    # Side of the network's input in pixels (paper, section 4.1: 224).
    data.crop_size = 224
    # Number of threads that decode images on the host.
    data.workers = 2

    config.augment = augment = ConfigDict()
    # True trains on random crops (paper, section 4.1), False on the centre.
    augment.crop = True
    # Area of the smallest crop as a share of the raw image's area, before the crop is resized
    # to crop_size (Szegedy et al. 2015: 0.08); 1: crops of crop_size, not resized.
    augment.min_area = 1.0
    # Mirror training images with probability 1/2 (paper, section 4.1).
    augment.flip = True
    # Standard deviation of the PCA colour noise; 0: none (paper, section 4.1: 0.1).
    augment.lighting = 0.1
    # How colour noise changes the image: paper adds it; original adds it and divides the image
    # by 1 + lighting.
    augment.lighting_form = "paper"
    # Epoch from which on there is no colour noise (the original: 67); -1: noise until the end.
    augment.lighting_until_epoch = -1.0
    # Parameter of mixup, which mixes each image and its label with another of the batch; the
    # share is drawn from Beta(mixup, mixup) (Zhang et al. 2018: 0.2); 0: off.
    augment.mixup = 0.0

    config.optim = optim = ConfigDict()
    # Learning rate, which does not scale with the batch size (paper, section 5: 0.01 for
    # batches of 128).
    optim.learning_rate = 0.01
    # Momentum, the factor on the velocity per step (paper, section 5: 0.9).
    optim.momentum = 0.9
    # Weight decay, the factor on the weights that are added to the gradient (paper, section 5:
    # 0.0005).
    optim.weight_decay = 5e-4
    # True gives layers the weight decay in the table if they have one (CIFAR-10 networks).
    optim.layer_weight_decay = True
    # Learning rate of the biases divided by that of the weights (Caffe: 2).
    optim.bias_lr_mult = 1.0
    # True keeps the biases' rate at bias_lr_mult * learning_rate, whatever the schedule (the
    # original's run on ILSVRC-2012).
    optim.constant_bias_lr = False
    # True applies weight decay to biases and to the scales of batch normalisation as well (the
    # original and Caffe do not; the paper does not say).
    optim.decay_bias = True
    # Place of the learning rate: paper multiplies the gradient inside the velocity, torch
    # multiplies the velocity.
    optim.form = "paper"
    # Number of parts that a device computes one after the other; 1: off. The run stays the
    # same in less memory, except that batch normalisation sees one part at a time.
    optim.accumulate_steps = 1
    # Share of the training target spread evenly over all classes; 0: none (Szegedy et
    # al. 2016: 0.1).
    optim.label_smoothing = 0.0
    # Decay of a moving average of the weights, for example 0.999; 0: none. The average replaces
    # the weights in evaluation, `alexnet_jax.load` and export.
    optim.ema_decay = 0.0
    # Trust coefficient of LARS, the norm of a kernel's gradient as a share of the kernel's norm
    # (NVCaffe: 0.001); 0: off.
    optim.trust_coefficient = 0.0

    config.schedule = schedule = ConfigDict()
    # Schedule of the learning rate: plateau (paper, section 5), fixed, cosine, polynomial or
    # constant.
    schedule.name = "plateau"
    # plateau and fixed: factor on the learning rate at a drop (paper, section 5: 0.1).
    schedule.factor = 0.1
    # plateau: number of evaluations without a better top-1 error before a drop.
    schedule.patience = 5
    # plateau: largest number of drops (paper, section 5: "reduced three times").
    schedule.max_drops = 3
    # fixed: epochs of the drops; the default is that of the original's run on ILSVRC-2012.
    schedule.drop_epochs = (25.0, 51.0, 79.0)
    # Factors on the learning rates of single layers, as rows (layer, first epoch, factor); a
    # factor of 0 freezes the layer.
    schedule.layer_factors = ()
    # cosine and polynomial: number of epochs in which the rate rises linearly at the start.
    schedule.warmup_epochs = 0.0
    # polynomial: power of 1 - t; t goes from 0 to 1 after the rise (You et al. 2017: 2).
    schedule.power = 2.0

    config.parallel = parallel = ConfigDict()
    # data: every device computes the whole network on a part of the batch; columns: each
    # device computes one column (paper, section 3.2); hybrid: the devices split the batch in
    # the convolutions and the units in the fully connected layers (arXiv:1404.5997).
    parallel.mode = "data"
    # Number of rows of the mesh, which split the batch; -1: all devices divided by `column`.
    parallel.data = -1
    # Number of devices per row, which split the network; -1: one per column in mode columns if
    # there are enough devices, all in mode hybrid, else 1.
    parallel.column = -1
    # Function that runs a step on all devices: shard_map, or pmap (mode data only, with the
    # same result).
    parallel.transform = "shard_map"

    config.checkpoint = checkpoint = ConfigDict()
    # Steps between two checkpoints; 0: off.
    checkpoint.every_steps = 0
    # Minutes between two checkpoints; 0: off. The end of the run and each best evaluation
    # always write one.
    checkpoint.every_minutes = 15.0
    # Number of newest checkpoints that are kept besides the best.
    checkpoint.keep = 2
    return config.lock()


_AT_LEAST_0 = (lambda v: v >= 0, "at least 0")
_AT_LEAST_1 = (lambda v: v >= 1, "at least 1")
_ABOVE_0 = (lambda v: v > 0, "above 0")


def _one_of(*choices: Any) -> tuple[Callable[[Any], bool], str]:
    return lambda v: v in choices, f"one of {', '.join(map(str, choices))}"


# Field -> (check, words): "must be {words}". The default gives the type. A field that
# is not here may hold any value of its type. NaN is in no range.
# fmt: off
RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "seed": (lambda v: 0 <= v < 2**32, "0 to 4294967295"),
    "num_epochs": (lambda v: 0 < v < math.inf, "above 0 and finite"),
    "max_steps": (lambda v: v >= -1, "-1 (off) or more"),
    "log_every_steps": _AT_LEAST_1,
    "eval_every_epochs": _AT_LEAST_0,
    "eval_views": _one_of(*augment_lib.VIEW_COUNTS),
    "stop_at_train_error": (lambda v: 0 <= v < 1, "0 (off) to below 1"),
    "summaries_every_steps": _AT_LEAST_0,
    "profile": _AT_LEAST_0,
    "model.num_classes": _AT_LEAST_0,
    "model.dtype": _one_of(*alexnet.DTYPES),
    "data.batch_size": _AT_LEAST_1,
    "data.image_size": _AT_LEAST_1,
    "data.crop_size": _AT_LEAST_1,
    "data.workers": _AT_LEAST_1,
    "augment.min_area": (lambda v: 0 < v <= 1, "above 0 and at most 1"),
    "augment.lighting": _AT_LEAST_0,
    "augment.lighting_form": _one_of(*augment_lib.LIGHTING_FORMS),
    "augment.lighting_until_epoch": (lambda v: v == -1 or v >= 0, "-1 or at least 0"),
    "augment.mixup": (lambda v: 0 <= v < math.inf, "0 (off) or more"),
    "optim.learning_rate": _ABOVE_0,
    "optim.momentum": (lambda v: 0 <= v < 1, "0 to below 1"),
    "optim.weight_decay": _AT_LEAST_0,
    "optim.bias_lr_mult": _AT_LEAST_0,
    "optim.form": _one_of(*optim_lib.FORMS),
    "optim.accumulate_steps": _AT_LEAST_1,
    "optim.label_smoothing": (lambda v: 0 <= v < 1, "0 (none) to below 1"),
    "optim.ema_decay": (lambda v: 0 <= v < 1, "0 (none) to below 1"),
    "optim.trust_coefficient": (lambda v: v >= 0, "0 (off) or more"),
    "schedule.name": _one_of(*optim_lib.SCHEDULES),
    "schedule.factor": (lambda v: 0 < v < 1, "above 0 and below 1"),
    "schedule.patience": _AT_LEAST_1,
    "schedule.max_drops": _AT_LEAST_0,
    "schedule.drop_epochs": (
        lambda v: all(isinstance(b, int | float) and a < b
                      for a, b in itertools.pairwise((0, *v))),
        "numbers above 0 that increase"),
    "schedule.warmup_epochs": _AT_LEAST_0,
    "schedule.power": _ABOVE_0,
    "parallel.mode": _one_of(*parallel_lib.MODES),
    "parallel.data": (lambda v: v == -1 or v >= 1, "-1 (all there are) or at least 1"),
    "parallel.column": (lambda v: v == -1 or v >= 1, "-1 (choose) or at least 1"),
    "parallel.transform": _one_of(*parallel_lib.TRANSFORMS),
    "checkpoint.every_steps": _AT_LEAST_0,
    "checkpoint.every_minutes": _AT_LEAST_0,
    "checkpoint.keep": _AT_LEAST_1,
}
# fmt: on


def set_fields(config: Config, arguments: Sequence[str]) -> list[str]:
    """Set fields of a config, in place, by --config.FIELD=VALUE or --config.FIELD VALUE.

    Returns:
      A message per argument that is no field, or whose value has another type.
    """
    known = [f"--config.{name}" for name in flat(config.to_dict())]
    problems, waiting = [], list(arguments)
    while waiting:
        argument = waiting.pop(0)
        if "=" not in argument and waiting and not waiting[0].startswith("--"):
            argument += f"={waiting.pop(0)}"
        name = argument.partition("=")[0].replace("--noconfig.", "--config.")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ". Fields are --config.FIELD=VALUE."
            problems.append(f"{name}: there is no such field{hint}")
            continue
        parsed, argv = flags.FlagValues(), ["", argument]
        config_flags.DEFINE_config_dict("config", config, flag_values=parsed, sys_argv=argv)
        try:
            parsed(argv)
        except (flags.Error, TypeError, ValueError) as error:
            problems.append(" ".join(str(error).split()))
    return problems


def validate(
    config: Config, *, devices: bool = True, training: bool = True, found: Sequence[str] = ()
) -> None:
    """Check everything that can be checked without the data.

    Fills in `model.table` first, if `model.variant` is FILE.py:NAME.

    Args:
      devices: check the mesh against the devices of this machine.
      training: refuse fields that would have no effect on training.
      found: mistakes that `set_fields` found.

    Raises:
      ConfigError: lists every mistake: the field, its value, and the allowed values.
    """
    fields = flat(config.to_dict())
    wrong, mistyped = {}, False
    for name, default in flat(get_config().to_dict()).items():
        value = fields.get(name)
        # ml_collections checks types, except that any field takes None and an int True.
        is_bool = isinstance(value, bool)
        if default is not None and (value is None or is_bool != isinstance(default, bool)):
            wrong[name] = f"of type {type(default).__name__}, as its default {default!r}"
            mistyped = True
        elif name in RANGES and not RANGES[name][0](value):
            wrong[name] = RANGES[name][1]
    no_table = _read_table(config)
    problems = [*found, *no_table]
    problems += [f"--config.{name}={fields.get(name)!r} must be {wrong[name]}." for name in wrong]
    if no_table:
        wrong["model.variant"] = no_table[0]  # what depends on it is not checked
    if not mistyped:
        problems += _conflicts(config, wrong, devices, training)
    if problems:
        lines = "\n".join(f"  - {problem}" for problem in problems)
        count = f"{len(problems)} mistake{'s' if len(problems) > 1 else ''}"
        raise ConfigError(f"{count} in the config:\n{lines}")


def _conflicts(config: Config, wrong: Collection[str], devices: bool, training: bool) -> list[str]:
    """Return a message per mistake in fields of valid types; `wrong`: known ones."""
    data, schedule, problems = config.data, config.schedule, []
    if data.crop_size > data.image_size:
        problems.append(
            f"--config.data.crop_size={data.crop_size} is larger than "
            f"--config.data.image_size={data.image_size}."
        )
    if schedule.warmup_epochs >= config.num_epochs:
        problems.append(
            f"--config.schedule.warmup_epochs={schedule.warmup_epochs} must be "
            f"below --config.num_epochs={config.num_epochs}."
        )
    if config.model.dtype == "float64" and not jax.config.read("jax_enable_x64"):
        problems.append("--config.model.dtype=float64 needs JAX_ENABLE_X64=1 in the environment.")
    if {"model.num_classes", "model.dtype", "model.variant"} & set(wrong):
        return problems + _model_problems(config, wrong)
    try:
        network = make_model(config, config.model.num_classes or 2).network
    except ValueError as error:
        return problems + (_model_problems(config, wrong) or [str(error)])
    names = [row.name for row in network.layers]
    problems += [
        f"--config.finetune.new_layers: {layer!r} must be one of {', '.join(names)}."
        for layer in config.finetune.new_layers
        if layer not in names
    ]
    try:
        check_image_size(network, data.crop_size)
    except ValueError as error:
        problems.append(str(error))
    bad_row = _bad_layer_factor(schedule.layer_factors, names)
    if bad_row is not None:
        problems.append(
            f"--config.schedule.layer_factors: {bad_row!r} must be (layer, epoch, "
            f"factor), the layer one of {', '.join(names)}, its epochs 0 or more "
            "and increasing, the factor 0 or more."
        )
    elif training and not wrong:
        problems += _idle_problems(config, network)
    shape = ("parallel.", "data.batch_size", "optim.accumulate_steps")
    if devices and not any(name.startswith(shape) for name in wrong):
        problems += _mesh_problems(config, network)
    return problems


def _read_table(config: Config) -> list[str]:
    """Fill in `model.table` from FILE.py:NAME, unless a run has stored it; return mistakes."""
    path, _, name = str(config.model.variant).rpartition(":")
    if not path.endswith(".py") or config.model.table:
        return []
    if not Path(path).is_file():
        return [f"--config.model.variant: {path}: there is no such file in {Path.cwd()}."]
    found = runpy.run_path(path)
    tables = {key: value for key, value in found.items() if isinstance(value, layers.Variant)}
    if name not in tables:
        there = ", ".join(tables) or "none"
        return [f"--config.model.variant: {path} has no table {name!r}; its tables: {there}."]
    config.model.table = layers.table_to_json(tables[name])
    return []


def _model_problems(config: Config, known_wrong: Collection[str]) -> list[str]:
    """Return the other mistakes of the model's settings, each taken by itself."""
    problems = []
    known = config.model.variant in variants.VARIANTS
    base = {"variant": config.model.variant if known else "paper", "init": "he"}
    base |= {"table": config.model.table}
    for name, value in model_settings(config, 2).items():
        if f"model.{name}" in known_wrong:
            continue
        try:
            alexnet.from_settings({**base, name: value})
        except ValueError as error:
            problems.append(str(error))
    return problems


def _bad_layer_factor(rows: Sequence[Any], names: Sequence[str]) -> Any:
    """Return the first row that is no (layer, epoch, factor); None: all are."""
    last: dict[str, float] = {}
    for row in rows:
        try:
            layer, epoch, factor = row
            valid = layer in names and epoch > last.get(layer, -1) and min(epoch, factor) >= 0
        except (TypeError, ValueError):  # the outer parentheses are forgotten easily
            return row
        if not valid:
            return row
        last[layer] = epoch
    return None


def _idle_problems(config: Config, network: layers.Variant) -> list[str]:
    """Return a message per changed field that can have no effect on training."""
    c, schedule, augment = config, config.schedule, config.augment
    split, every, epochs = c.data.eval_split, c.eval_every_epochs, c.num_epochs
    problems = []
    if schedule.name == "plateau" and schedule.max_drops and not (split and every):
        problems.append(
            "--config.schedule.name='plateau' lowers the learning rate by evaluations; "
            f"--config.data.eval_split={split!r} with --config.eval_every_epochs={every} "
            "leaves none. Take constant or cosine, or --config.schedule.max_drops=0."
        )
    if schedule.name == "fixed" and min(schedule.drop_epochs, default=0) >= epochs:
        problems.append(
            f"--config.schedule.drop_epochs={tuple(schedule.drop_epochs)} are all after the end, "
            f"--config.num_epochs={epochs}. Set earlier ones, or --config.schedule.name=constant."
        )

    def has(*kinds: type) -> bool:
        return any(isinstance(stage, kinds) for stage in network.stages)

    until_end = f"to be below num_epochs={epochs}"
    first_factor = min((epoch for _, epoch, _ in schedule.layer_factors), default=0)
    own_decay = c.optim.layer_weight_decay and len(network.layer_weight_decay)
    # (field, True if it has an effect or requests nothing, what it needs for one). Fields
    # that only state what is so anyway are not here, for example decay_bias=False without
    # decay. `eval_views` is for --mode=eval too.
    # fmt: off
    rows = (
        ("eval_every_epochs", split or not every, "data.eval_split"),
        ("eval_every_epochs", every <= epochs, f"at most num_epochs={epochs}"),
        ("eval_views", c.data.image_size > c.data.crop_size, "data.image_size above data.crop_size"),
        ("finetune.new_layers", c.finetune.source, "finetune.source"),
        ("data.dir", not (c.data.source.startswith("folder:") or c.data.source == "fake"),
         "a data.source that is a tfds data set or textures"),
        ("augment.min_area", augment.crop, "augment.crop=True"),
        ("augment.lighting_form", augment.lighting, "augment.lighting above 0"),
        ("augment.lighting_until_epoch", augment.lighting, "augment.lighting above 0"),
        ("augment.lighting_until_epoch", augment.lighting_until_epoch < epochs, until_end),
        ("optim.weight_decay", own_decay < len(network.layers),
         "a layer without a weight decay of its own, or optim.layer_weight_decay=False"),
        ("optim.constant_bias_lr", schedule.name != "constant" or schedule.layer_factors,
         "another schedule.name than constant"),
        ("optim.form", c.optim.momentum, "optim.momentum above 0"),
        ("schedule.factor", schedule.name in ("plateau", "fixed"),
         "schedule.name=plateau or fixed"),
        ("schedule.patience", schedule.name == "plateau", "schedule.name=plateau"),
        ("schedule.patience", schedule.max_drops, "schedule.max_drops above 0"),
        ("schedule.max_drops", schedule.name == "plateau" or not schedule.max_drops,
         "schedule.name=plateau"),
        ("schedule.drop_epochs", schedule.name == "fixed" or not schedule.drop_epochs,
         "schedule.name=fixed"),
        ("schedule.layer_factors", first_factor < epochs, f"an epoch before num_epochs={epochs}"),
        ("schedule.warmup_epochs", schedule.name in ("cosine", "polynomial"),
         "schedule.name=cosine or polynomial"),
        ("schedule.power", schedule.name == "polynomial", "schedule.name=polynomial"),
        ("model.overrides.dropout", has(layers.Dropout) or not c.model.overrides.dropout,
         "a network with dropout"),
        ("model.overrides.norm_place", has(*layers.NORMS), "a network with normalisation"),
    )
    # fmt: on
    fields, defaults = flat(config.to_dict()), flat(get_config().to_dict())
    for name, has_effect, needs in rows:
        value, default = fields[name], defaults[name]
        value = tuple(value) if isinstance(value, list) else value
        if not has_effect and value != default:
            left = "out" if default is None else f"at {default!r}"
            problems.append(
                f"--config.{name}={value!r} has no effect: it needs {needs}, or to be left {left}."
            )
    return problems


def _mesh_problems(config: Config, network: layers.Variant) -> list[str]:
    mode, transform = config.parallel.mode, config.parallel.transform
    batch, parts = config.data.batch_size, config.optim.accumulate_steps
    try:
        rows, columns = mesh_shape(config, network)
        parallel_lib.check_mode(network, mode, columns)
        parallel_lib.make_mesh(rows, columns)
    except ValueError as error:
        return [str(error)]
    problems = []
    if transform == "pmap" and (mode != "data" or jax.process_count() > 1):
        problems.append(
            "--config.parallel.transform=pmap splits nothing but the batch of one "
            "process: it goes with --config.parallel.mode=data; take shard_map."
        )
    devices = parallel_lib.batch_shards(rows, columns, mode)
    step = devices * parts
    if config.augment.mixup and batch % step == 0 and batch // step % 2:
        problems.append(
            f"--config.augment.mixup={config.augment.mixup} mixes pairs of images on a device; "
            f"a part of --config.data.batch_size={batch} has {batch // step} there, and needs an "
            "even number."
        )
    if batch % step:
        below, above = batch // step * step, -(-batch // step) * step
        nearest = " or ".join(str(size) for size in (below, above) if size > 0)
        each = "" if parts == 1 else f" in --config.optim.accumulate_steps={parts} parts"
        problems.append(
            f"--config.data.batch_size={batch} does not divide over {devices} devices{each}; "
            f"the nearest that do: {nearest}."
        )
    return problems


def mesh_shape(config: Config, network: layers.Variant) -> tuple[int, int]:
    """Return (data, column) of the mesh, with -1 resolved for the devices there are."""
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
    """Return the network of a config; None: with the variant's own number of classes."""
    return alexnet.from_settings(model_settings(config, num_classes))


def model_settings(config: Config, num_classes: int | None) -> dict[str, Any]:
    """Return the arguments of `alexnet.create_model`."""
    settings = config.model.to_dict()
    overrides = settings.pop("overrides")
    return {**settings, "num_classes": num_classes, **overrides}


def as_json(config: Config) -> dict[str, Any]:
    """Return the config as plain JSON values (tuples become lists)."""
    return json.loads(config.to_json())


def flat(tree: dict[str, Any]) -> dict[str, Any]:
    """{"data": {"dir": ""}} -> {"data.dir": ""}."""
    return traverse_util.flatten_dict(tree, sep=".")
