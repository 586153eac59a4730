"""A run in its workdir: begin, or go on only if the config still fits the checkpoint."""

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from alexnet_jax.data import statistics as statistics_lib
from alexnet_jax.system.cli import expanded, require_writable
from alexnet_jax.system.files import HeldError, exclusive_lock
from alexnet_jax.training import experiment as experiment_lib
from alexnet_jax.training import load
from alexnet_jax.training.banner import say_place
from alexnet_jax.training.checkpoint import (
    Checkpointer,
    CheckpointError,
    has_checkpoint,
)
from alexnet_jax.training.config import (
    Config,
    ConfigError,
    as_json,
    flat,
    validate,
)
from alexnet_jax.training.experiment import Experiment
from alexnet_jax.training.steps import TrainState

# Held as long as a run trains; names the process that does.
LOCK_FILE = ".lock"


def checked_folder(workdir: str | os.PathLike[str]) -> Path:
    """Return the workdir, absolute; raise ConfigError or OSError if it cannot be one."""
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
    """Hold a workdir for this run; process 0 does so for all of its processes.

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
    """Return the config's differences from the workdir's, in lines, and the experiment.

    Raises:
      ConfigError: for a config that is wrong, or a workdir of another network.
    """
    validate(config, training=False)
    differences, statistics = [], None
    # What a run without a checkpoint left behind may be of other data.
    begun = has_checkpoint(workdir / load.CHECKPOINTS)
    if begun:
        saved = load.read_config(workdir)
        differences = [] if saved is None else compare(config, saved, workdir)
        stored = workdir / load.STATISTICS_FILE
        if stored.exists():
            statistics = statistics_lib.load(stored, config.data.image_size)
            if jax.process_index() == 0:
                print(load.about_mean(workdir, statistics, config), flush=True)
    experiment = experiment_lib.build(config, statistics=statistics)
    if begun:
        _require_same_classes(experiment.train_source.class_names, workdir)
    say_place(experiment)
    return differences, experiment


def compare(config: Config, saved: dict[str, Any], workdir: Path) -> list[str]:
    """Return lines that say how the config differs from that of a workdir.

    Raises:
      ConfigError: if it describes another network.
    """
    old = flat(as_json(load.from_stored(saved)))
    new = flat(as_json(config))
    changed = [key for key in sorted(new) if old[key] != new[key]]
    lines = [
        f"  --config.{key}: {old[key]} in the workdir, now {new[key]}"
        for key in changed
    ]
    fixed = ("model.", "data.image_size", "data.crop_size")
    if any(key.startswith(fixed) for key in changed):
        raise ConfigError(
            f"{workdir} holds another network:\n"
            + "\n".join(
                line
                for key, line in zip(changed, lines, strict=True)
                if key.startswith(fixed)
            )
            + "\nTake a new --workdir, or the config that this one was made with."
        )
    return ["the config differs from this workdir's:", *lines] if lines else []


def _require_same_classes(names: Sequence[str], workdir: Path) -> None:
    """Raise ConfigError if the labels mean something else than in the workdir."""
    old = load.read_class_names(workdir)
    if old is None or old == list(names):
        return
    pairs = itertools.zip_longest(old, names, fillvalue="none")
    label, (was, now) = next((k, p) for k, p in enumerate(pairs) if p[0] != p[1])
    raise ConfigError(
        f"{workdir} was trained on other classes: {len(old)} of them, label {label} was "
        f"{was!r}; here are {len(names)}, and label {label} is {now!r}. Take a new "
        "--workdir, or the pictures that it was trained on."
    )


def require_same_epochs(
    metadata: dict[str, Any], experiment: Experiment, workdir: Path
) -> None:
    """Raise ConfigError if an epoch has not as many steps as in the checkpoint.

    The epoch, the learning rate and the place in the data follow from the step.
    """
    old, new = (
        metadata["config"]["data"]["batch_size"],
        experiment.config.data.batch_size,
    )
    now = experiment.train_source.num_examples
    before = metadata.get(
        "num_examples", now
    )  # a workdir may be from before it was kept
    if old != new:
        change = f"has --config.data.batch_size={old}, not {new}"
        parts = experiment.config.optim.accumulate_steps
        parts = "N" if old % new else old // new * parts
        remedy = f"Keep {old}"
        if new < old:
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


def schedule_changes(metadata: dict[str, Any], config: Config) -> list[str]:
    """Return a line if a new length of the run changes the rest of its schedule."""
    old, name = metadata["config"].get("num_epochs"), config.schedule.name
    if name not in ("cosine", "polynomial") or old in (None, config.num_epochs):
        return []
    line = (
        f"the {name} schedule is laid out over {config.num_epochs:g} epochs instead of "
        f"{old:g}: from here on the learning rate is another"
    )
    return [line]


def restore(
    checkpointer: Checkpointer, experiment: Experiment, differences: Sequence[str]
) -> tuple[TrainState, dict[str, Any]] | None:
    """Return `Checkpointer.restore`; its error also says how the configs differ."""
    try:
        return checkpointer.restore(experiment.abstract_state())
    except CheckpointError as error:
        if not differences:
            raise
        lines = "\n".join(["", *differences])
        raise CheckpointError(f"{error}{lines}") from error
