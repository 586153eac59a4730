"""Begin a run in a workdir, or resume it if config and data still fit the checkpoint."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from alexnet_jax.data.statistics import load as load_statistics
from alexnet_jax.training import experiment as experiment_lib
from alexnet_jax.training.checkpoint import all_steps
from alexnet_jax.training.config import Config, ConfigError, as_json, flat
from alexnet_jax.training.experiment import Experiment
from alexnet_jax.training.steps import TrainState
from alexnet_jax.training.workdir import (
    CHECKPOINTS,
    STATISTICS_FILE,
    about_mean,
    from_stored,
    read_class_names,
    read_config,
    require_run,
)


def prepare(config: Config, workdir: Path) -> tuple[Experiment, TrainState | None, list[str]]:
    """Build the experiment of a new run, or of the one in the workdir.

    Writes nothing. Prints how the config differs from that of the workdir.

    Returns:
      (experiment; first state of a new run, None if there is a checkpoint; lines about the
      origin of the first state).

    Raises:
      ConfigError: the config is wrong, or the workdir holds another network or classes.
    """
    # Files of a run without a checkpoint are leftovers, perhaps of other data.
    if all_steps(workdir / CHECKPOINTS):
        require_run(workdir)
        lines = compare(config, read_config(workdir), workdir)
        statistics = None
        if (workdir / STATISTICS_FILE).exists():
            statistics = load_statistics(workdir / STATISTICS_FILE, config.data.image_size)
            lines = [about_mean(workdir, statistics, config), *lines]
        if jax.process_index() == 0 and lines:
            print("\n".join(lines), flush=True)
        experiment = experiment_lib.build(config, statistics=statistics)
        _require_same_classes(experiment, workdir)
        return experiment, None, []
    experiment = experiment_lib.build(config)
    if config.finetune.source:
        from alexnet_jax.training import finetune  # with the formats of weight files

        return finetune.begin(experiment)
    return experiment, experiment.init_state(), ["starting from scratch"]


def compare(config: Config, saved: dict[str, Any], workdir: Path) -> list[str]:
    """Return lines that tell how the config differs from that of a workdir.

    Raises:
      ConfigError: it describes another network.
    """
    old, new = flat(as_json(from_stored(saved))), flat(as_json(config))
    if old["model.table"] != new["model.table"]:
        old["model.table"], new["model.table"] = "one table", "another"
    changed = {
        name: f"  --config.{name}: {old[name]} in the workdir, now {new[name]}"
        for name in sorted(new)
        if old[name] != new[name]
    }
    fixed = ("model.", "data.image_size", "data.crop_size")
    if network := [line for name, line in changed.items() if name.startswith(fixed)]:
        raise ConfigError(
            "\n".join([f"{workdir} holds another network:", *network])
            + ".\nTake a new --workdir, or the config that this one was made with."
        )
    if not changed:
        return []
    lines = ["the config differs from this workdir's:", *changed.values()]
    name = config.schedule.name
    if "num_epochs" in changed and name in ("cosine", "polynomial"):
        lines.append(
            f"the {name} schedule is laid out over {config.num_epochs:g} epochs instead of "
            f"{old['num_epochs']:g}: from here on the learning rate is another"
        )
    return lines


def _require_same_classes(experiment: Experiment, workdir: Path) -> None:
    """Raise ConfigError if a label has another name than in the workdir."""
    old, new = read_class_names(workdir), experiment.train_source.class_names
    if old is None:
        return
    pairs = itertools.zip_longest(old, new, fillvalue="none")
    for label, (was, now) in enumerate(pairs):
        if was != now:
            raise ConfigError(
                f"{workdir} was trained on other classes: {len(old)} of them, label "
                f"{label} was {was!r}; here are {len(new)}, and label {label} is {now!r}. "
                "Take a new --workdir, or the images that it was trained on."
            )


def require_same_epochs(metadata: Mapping[str, Any], experiment: Experiment, workdir: Path) -> None:
    """Raise ConfigError if an epoch has another number of steps than in the checkpoint.

    The epoch, the learning rate and the position in the data follow from the step.
    """
    old = metadata["config"]["data"]["batch_size"]
    new = experiment.config.data.batch_size
    now = experiment.train_source.num_examples
    before = metadata.get("num_examples", now)  # not in checkpoints of early versions
    if (old, before) == (new, now):
        return
    change = f"was trained on {before:,} images, and there are {now:,} now"
    remedy = "Bring the old ones back"
    if old != new:
        change = f"has --config.data.batch_size={old}, not {new}"
        remedy = f"Keep {old}"
        if old % new == 0:
            parts = experiment.config.optim.accumulate_steps * old // new
            remedy += (
                f"; --config.optim.accumulate_steps={parts} is the same run in less memory "
                "(except for batch normalisation)"
            )
    raise ConfigError(
        f"{workdir} {change}: its steps would mean other epochs, learning rates and "
        f"places in the data. {remedy}. Or take a new --workdir; "
        f"--config=configs/finetune.py:{workdir} starts it from these weights."
    )
