"""Begin a run in a workdir, or resume it if config and data still fit the checkpoint."""

import contextlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from alexnet_jax.system.cli import expanded, require_writable
from alexnet_jax.system.files import HeldError, exclusive_lock
from alexnet_jax.training import experiment as experiment_lib
from alexnet_jax.training.banner import say_place
from alexnet_jax.training.checkpoint import (
    Checkpointer,
    CheckpointError,
    has_checkpoint,
    split_step,
)
from alexnet_jax.training.config import Config, ConfigError, as_json, flat
from alexnet_jax.training.experiment import Experiment
from alexnet_jax.training.steps import TrainState
from alexnet_jax.training.workdir import (
    CHECKPOINTS,
    CONFIG_FILE,
    STATISTICS_FILE,
    about_mean,
    from_stored,
    read_class_names,
    read_config,
    read_statistics,
)

# Held while a run trains; names its process.
LOCK_FILE = ".lock"


def checked_folder(workdir: str | os.PathLike[str]) -> Path:
    """Return the absolute workdir; raise ConfigError or OSError if it cannot be one."""
    if "://" in os.fspath(workdir):
        raise ConfigError(
            f"--workdir={workdir} must be a local or mounted folder: a run is resumed from "
            "what is renamed there at once."
        )
    if "," in os.fspath(workdir):
        raise ConfigError(
            f"--workdir={workdir} has a comma, which separates runs in --mode=eval and in "
            "the report: they could not read this one. Name a folder without a comma."
        )
    path = expanded(workdir).absolute()
    if path.exists() and not path.is_dir():
        raise ConfigError(f"--workdir={workdir} is a file; name a folder, or none yet.")
    require_writable(path)
    return path


@contextlib.contextmanager
def alone_in(workdir: Path) -> Iterator[None]:
    """Hold the lock of a workdir; process 0 does so for all processes of the run.

    Raises:
      ConfigError: another run holds it; names that run.
    """
    with contextlib.ExitStack() as held:
        holder = ""
        if jax.process_index() == 0:
            try:
                held.enter_context(exclusive_lock(workdir / LOCK_FILE, wait=False))
            except HeldError as error:
                holder = error.holder
        refused = bool(holder)
        if jax.process_count() > 1:
            refused = multihost_utils.broadcast_one_to_all(np.int32(refused))
        if refused:
            raise ConfigError(
                f"{workdir} is in use by {holder or 'another run, see process 0'}. Two "
                "runs in one workdir would spoil each other's: wait for that one, end "
                "it, or take another --workdir."
            )
        yield


def prepare(config: Config, workdir: Path) -> tuple[list[str], Experiment]:
    """Return lines that name the changed config fields, and the experiment.

    Raises:
      ConfigError: the config is wrong, or the workdir holds another network or classes.
    """
    differences, statistics, class_names = [], None, None
    # Files of a run without a checkpoint are leftovers, perhaps of other data.
    if has_checkpoint(workdir / CHECKPOINTS):
        saved = read_config(workdir)
        differences = [] if saved is None else compare(config, saved, workdir)
        if (workdir / STATISTICS_FILE).exists():
            statistics = read_statistics(workdir, config.data.image_size)
            if jax.process_index() == 0:
                print(about_mean(workdir, statistics, config), flush=True)
        class_names = read_class_names(workdir)
    else:
        _require_source(config.finetune.source)
    experiment = experiment_lib.build(config, statistics=statistics)
    if class_names is not None:
        _require_same_classes(class_names, experiment.train_source.class_names, workdir)
    say_place(experiment)
    return differences, experiment


def _require_source(source: str) -> None:
    """Raise ConfigError if `finetune.source` is neither a run nor a file."""
    is_run = (Path(split_step(source)[0]) / CONFIG_FILE).exists()
    if source and not is_run and not Path(source).is_file():
        raise ConfigError(
            f"--config.finetune.source={source} is neither the workdir of a run nor a "
            "file of weights; name one: --config=configs/finetune.py:DIR_OR_FILE."
        )


def begin(experiment: Experiment) -> tuple[Experiment, TrainState, list[str]]:
    """Return the experiment, first state and lines about the origin of a new run."""
    if not experiment.config.finetune.source:
        return experiment, experiment.init_state(), ["starting from scratch"]
    from alexnet_jax.training import finetune  # with the formats of weight files

    return finetune.begin(experiment)


def compare(config: Config, saved: dict[str, Any], workdir: Path) -> list[str]:
    """Return lines that tell how the config differs from that of a workdir.

    Raises:
      ConfigError: it describes another network.
    """
    old = flat(as_json(from_stored(saved)))
    new = flat(as_json(config))
    changed = {
        key: f"  --config.{key}: {old[key]} in the workdir, now {new[key]}"
        for key in sorted(new)
        if old[key] != new[key]
    }
    fixed = ("model.", "data.image_size", "data.crop_size")
    if network := [line for key, line in changed.items() if key.startswith(fixed)]:
        lines = "\n".join(network)
        raise ConfigError(
            f"{workdir} holds another network:\n{lines}\nTake a new --workdir, or the "
            "config that this one was made with."
        )
    if not changed:
        return []
    lines = ["the config differs from this workdir's:", *changed.values()]
    name = config.schedule.name
    if "num_epochs" in changed and name in ("cosine", "polynomial"):
        lines.append(
            f"the {name} schedule is laid out over {config.num_epochs:g} epochs instead "
            f"of {old['num_epochs']:g}: from here on the learning rate is another"
        )
    return lines


def _require_same_classes(old: Sequence[str], new: Sequence[str], workdir: Path) -> None:
    """Raise ConfigError if a label has another name than in the workdir."""
    pairs = itertools.zip_longest(old, new, fillvalue="none")
    for label, (was, now) in enumerate(pairs):
        if was != now:
            raise ConfigError(
                f"{workdir} was trained on other classes: {len(old)} of them, label "
                f"{label} was {was!r}; here are {len(new)}, and label {label} is {now!r}. "
                "Take a new --workdir, or the pictures that it was trained on."
            )


def require_same_epochs(metadata: Mapping[str, Any], experiment: Experiment, workdir: Path) -> None:
    """Raise ConfigError if an epoch has another number of steps than in the checkpoint.

    The epoch, the learning rate and the position in the data follow from the step.
    """
    old = metadata["config"]["data"]["batch_size"]
    new = experiment.config.data.batch_size
    now = experiment.train_source.num_examples
    before = metadata.get("num_examples", now)  # not in checkpoints of early versions
    if old != new:
        change = f"has --config.data.batch_size={old}, not {new}"
        remedy = f"Keep {old}"
        if old % new == 0:
            parts = experiment.config.optim.accumulate_steps * old // new
            remedy += (
                f"; --config.optim.accumulate_steps={parts} is the same run in less memory "
                "(but for batch normalisation)"
            )
    elif before != now:
        change = f"was trained on {before:,} pictures, and there are {now:,} now"
        remedy = "Bring the old ones back"
    else:
        return
    raise ConfigError(
        f"{workdir} {change}: its steps would mean other epochs, learning rates and "
        f"places in the data. {remedy}. Or take a new --workdir; "
        f"--config=configs/finetune.py:{workdir} starts it from these weights."
    )


def learning_rate_factor(metadata: Mapping[str, Any], config: Config) -> float:
    """Return the factor by which the config changes a resumed run's learning rate.

    A rate that is constant, or lowered by the plateau rule, is stored in the checkpoint.
    The other schedules read the config at every step.
    """
    if not metadata or config.schedule.name not in ("constant", "plateau"):
        return 1.0
    return config.optim.learning_rate / metadata["config"]["optim"]["learning_rate"]


def restore(
    checkpointer: Checkpointer, experiment: Experiment, differences: Sequence[str]
) -> tuple[TrainState, dict[str, Any]] | None:
    """Return `Checkpointer.restore`; its error also tells how the configs differ."""
    try:
        return checkpointer.restore(experiment.abstract_state())
    except CheckpointError as error:
        if not differences:
            raise
        lines = "\n".join(["", *differences])
        raise CheckpointError(f"{error}{lines}") from error
