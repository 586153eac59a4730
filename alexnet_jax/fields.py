"""What each field of a config may hold, by itself; `experiment` has what goes together.

configs/common.py explains them.
"""

import itertools
from collections.abc import Callable
from typing import Any

from alexnet_jax import alexnet, augment, kinds, optim, parallel


class ConfigError(ValueError):
    """What is wrong with a config, in words, all at once."""


# Field -> what kind of value it has; a test compares them with configs/common.py.
_KINDS: dict[str, kinds.Kind] = {
    "seed": kinds.WHOLE,
    "num_epochs": kinds.NUMBER,
    "max_steps": kinds.WHOLE,
    "log_every_steps": kinds.WHOLE,
    "eval_every_epochs": kinds.NUMBER,
    "eval_views": kinds.WHOLE,
    "stop_at_train_error": kinds.NUMBER,
    "summaries_every_steps": kinds.WHOLE,
    "stall_after_steps": kinds.WHOLE,
    "profile": kinds.WHOLE,
    "model.variant": kinds.TEXT,
    "model.num_classes": kinds.WHOLE,
    "model.width": kinds.NUMBER,
    "model.dtype": kinds.TEXT,
    "model.init": kinds.TEXT,
    "finetune.source": kinds.TEXT,
    "finetune.new_layers": kinds.NAMES,
    "data.source": kinds.TEXT,
    "data.dir": kinds.TEXT,
    "data.train_split": kinds.TEXT,
    "data.eval_split": kinds.TEXT,
    "data.batch_size": kinds.WHOLE,
    "data.image_size": kinds.WHOLE,
    "data.crop_size": kinds.WHOLE,
    "data.workers": kinds.WHOLE,
    "augment.crop": kinds.SWITCH,
    "augment.min_area": kinds.NUMBER,
    "augment.flip": kinds.SWITCH,
    "augment.lighting": kinds.NUMBER,
    "augment.lighting_form": kinds.TEXT,
    "augment.lighting_until_epoch": kinds.NUMBER,
    "optim.learning_rate": kinds.NUMBER,
    "optim.momentum": kinds.NUMBER,
    "optim.weight_decay": kinds.NUMBER,
    "optim.layer_weight_decay": kinds.SWITCH,
    "optim.bias_lr_mult": kinds.NUMBER,
    "optim.constant_bias_lr": kinds.SWITCH,
    "optim.decay_bias": kinds.SWITCH,
    "optim.form": kinds.TEXT,
    "optim.accumulate_steps": kinds.WHOLE,
    "optim.label_smoothing": kinds.NUMBER,
    "optim.trust_coefficient": kinds.NUMBER,
    "schedule.name": kinds.TEXT,
    "schedule.factor": kinds.NUMBER,
    "schedule.patience": kinds.WHOLE,
    "schedule.max_drops": kinds.WHOLE,
    "schedule.drop_epochs": kinds.NUMBERS,
    "schedule.layer_factors": kinds.LAYER_FACTORS,
    "schedule.warmup_epochs": kinds.NUMBER,
    "schedule.power": kinds.NUMBER,
    "parallel.mode": kinds.TEXT,
    "parallel.data": kinds.WHOLE,
    "parallel.column": kinds.WHOLE,
    "parallel.transform": kinds.TEXT,
    "checkpoint.every_steps": kinds.WHOLE,
    "checkpoint.every_minutes": kinds.NUMBER,
    "checkpoint.keep": kinds.WHOLE,
}
# Field -> (what its value must fulfil, in words). NaN fulfils none of them.
_AT_LEAST_0 = (lambda v: v >= 0, "0 or more")
_AT_LEAST_1 = (lambda v: v >= 1, "at least 1")
_ABOVE_0 = (lambda v: v > 0, "above 0")
_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "seed": (lambda v: 0 <= v < 2**32, "0 to 4294967295"),
    "num_epochs": _ABOVE_0,
    "max_steps": (lambda v: v >= -1, "-1 (off) or more"),
    "log_every_steps": _AT_LEAST_1,
    "eval_every_epochs": _AT_LEAST_0,
    "stop_at_train_error": (lambda v: 0 <= v < 1, "0 (off) to below 1"),
    "summaries_every_steps": _AT_LEAST_0,
    "stall_after_steps": _AT_LEAST_0,
    "profile": _AT_LEAST_0,
    "model.num_classes": _AT_LEAST_0,
    "data.batch_size": _AT_LEAST_1,
    "data.image_size": _AT_LEAST_1,
    "data.crop_size": _AT_LEAST_1,
    "data.workers": _AT_LEAST_1,
    "augment.min_area": (lambda v: 0 < v <= 1, "above 0, at most 1"),
    "augment.lighting": _AT_LEAST_0,
    "augment.lighting_until_epoch": (lambda v: v == -1 or v >= 0, "-1 or at least 0"),
    "optim.learning_rate": _ABOVE_0,
    "optim.momentum": (lambda v: 0 <= v < 1, "0 to below 1"),
    "optim.weight_decay": _AT_LEAST_0,
    "optim.bias_lr_mult": _AT_LEAST_0,
    "optim.accumulate_steps": _AT_LEAST_1,
    "optim.label_smoothing": (lambda v: 0 <= v < 1, "0 (none) to below 1"),
    "optim.trust_coefficient": (lambda v: v >= 0, "0 (off) or more"),
    "schedule.factor": (lambda v: 0 < v < 1, "above 0, below 1"),
    "schedule.patience": _AT_LEAST_1,
    "schedule.max_drops": _AT_LEAST_0,
    "schedule.drop_epochs": (
        lambda v: all(a < b for a, b in itertools.pairwise((0, *v))),
        "above 0 and increasing",
    ),
    "schedule.warmup_epochs": _AT_LEAST_0,
    "schedule.power": _ABOVE_0,
    "parallel.data": (lambda v: v == -1 or v >= 1, "-1 (all there are) or at least 1"),
    "parallel.column": (lambda v: v == -1 or v >= 1, "-1 (choose) or at least 1"),
    "checkpoint.every_steps": _AT_LEAST_0,
    "checkpoint.every_minutes": _AT_LEAST_0,
    "checkpoint.keep": _AT_LEAST_1,
}
_CHOICES: dict[str, tuple[Any, ...]] = {
    "eval_views": augment.VIEW_COUNTS,
    "model.dtype": alexnet.DTYPES,
    "optim.form": optim.FORMS,
    "schedule.name": optim.SCHEDULES,
    "augment.lighting_form": augment.LIGHTING_FORMS,
    "parallel.mode": parallel.MODES,
    "parallel.transform": parallel.TRANSFORMS,
}


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"data": {"dir": ""}} -> {"data.dir": ""}."""
    fields: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            fields |= flat(value, f"{prefix}{key}.")
        else:
            fields[prefix + key] = value
    return fields


def kind_problems(tree: dict[str, Any]) -> list[str]:
    """Return a message per field that is missing or has a value of another type.

    ml_collections has checked the types of the overrides.
    """
    fields = flat(tree)
    problems = [f"--config.{name} is missing." for name in _KINDS if name not in fields]
    wrong = kinds.problems(fields, _KINDS)
    return problems + [f"--config.{name}={words}." for name, words in wrong.items()]


def range_problems(tree: dict[str, Any]) -> list[str]:
    """Of the fields that are of their kind, those with a value that they cannot have."""
    fields = flat(tree)
    wrong = kinds.problems(fields, _KINDS)
    right = {name: value for name, value in fields.items() if name not in wrong}
    problems = [
        f"--config.{path}={kinds.shown(right[path])} is out of range: {words}."
        for path, (holds, words) in _RANGES.items()
        if path in right and not holds(right[path])
    ]
    return problems + [
        f"--config.{path}={kinds.shown(right[path])} must be one of "
        f"{', '.join(map(str, choices))}."
        for path, choices in _CHOICES.items()
        if path in right and right[path] not in choices
    ]
