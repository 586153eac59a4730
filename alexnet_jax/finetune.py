"""Starts a run from trained weights: all layers but the classifier are taken over.

The first layers of a network learn what other pictures need as well; what is new is
what the last ones make of it (Yosinski et al. 2014, arXiv:1411.1792).
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from alexnet_jax import experiment as experiment_lib
from alexnet_jax import optim
from alexnet_jax.checkpoint import split_step
from alexnet_jax.experiment import Config, ConfigError, Experiment
from alexnet_jax.layers import stage_name
from alexnet_jax.pretrained import Weights
from alexnet_jax.steps import TrainState


def begin(experiment: Experiment) -> tuple[Experiment, TrainState, list[str]]:
    """The first state of a run, and where its weights come from.

    Of a run that starts from trained weights (`config.finetune`) these, with the
    classifier and `new_layers` as the run from scratch starts them. Their mean image
    stays with them, since it is what they were trained to see less of; the principal
    components of colour are those of the run's own pictures.

    Returns:
      (the experiment, with the mean that belongs to the weights; its first state; lines
      that say where it comes from).

    Raises:
      ConfigError: if a layer that is to be taken over is not there, or has another
        shape.
      FileNotFoundError, CheckpointError, WeightsError: as `experiment.load`.
    """
    fields = experiment.config.finetune
    if not fields.source:
        return experiment, experiment.init_state(), ["starting from scratch"]
    # Caffe's files alone may not say which network they are of.
    caffe = fields.source.lower().endswith(".caffemodel")
    variant = experiment.config.model.variant if caffe else None
    weights = experiment_lib.read_network(fields.source, variant=variant)
    anew = _new_layers(experiment)
    kept = _kept(experiment, weights, anew)
    state = experiment.init_state()
    state = dataclasses.replace(
        state,
        params=over(state.params, kept["params"]),
        batch_stats=over(state.batch_stats, kept["batch_stats"]),
    )
    experiment = with_mean_of(experiment, weights)
    return experiment, state, _describe(experiment, weights, anew)


def with_mean_of(experiment: Experiment, weights: Weights) -> Experiment:
    """With the mean image that weights were trained to see less of."""
    mean = experiment.statistics.mean_image
    if np.shape(weights.mean) == mean.shape:
        mean = np.asarray(weights.mean)
    else:  # of pictures of another size
        pixel = np.reshape(weights.mean, (-1, 3)).mean(axis=0, dtype=np.float64)
        mean = np.broadcast_to(pixel.astype(mean.dtype), mean.shape)
    statistics = dataclasses.replace(experiment.statistics, mean_image=mean)
    return dataclasses.replace(experiment, statistics=statistics)


def check_source(config: Config) -> None:
    """Raises ConfigError if there is nothing where the weights are to come from."""
    source = config.finetune.source
    folder, _ = split_step(source)
    there = (Path(folder) / experiment_lib.CONFIG_FILE).exists()
    if source and not there and not Path(source).is_file():
        raise ConfigError(
            f"--config.finetune.source={source} is neither the workdir of a run nor a "
            "file of weights; name one: --config=configs/finetune.py:DIR_OR_FILE."
        )


def _new_layers(experiment: Experiment) -> list[str]:
    network = experiment.model.network
    return [*experiment.config.finetune.new_layers, network.layers[-1].name]


def _kept(
    experiment: Experiment, weights: Weights, anew: list[str]
) -> dict[str, dict[str, Any]]:
    """{"params": {layer: its arrays}, "batch_stats": ...} of the layers taken over."""
    here = experiment.abstract_state()
    wanted = {"params": here.params, "batch_stats": here.batch_stats}
    without = {*anew, *(stage_name("norm", layer) for layer in anew)}
    kept: dict[str, dict[str, Any]] = {}
    problems = []
    for part, layers in wanted.items():
        found = weights.variables.get(part, {})
        kept[part] = {}
        for layer, arrays in layers.items():
            if layer in without:
                continue
            problem = _difference(layer, arrays, found.get(layer))
            if problem:
                problems.append(f"  - {problem}")
            else:
                kept[part][layer] = {name: found[layer][name] for name in arrays}
    if problems:
        source = experiment.config.finetune.source
        raise ConfigError(
            f"--config.finetune.source={source} has not the layers of this network:\n"
            + "\n".join(problems)
            + f"\nTake its own network, --config=configs/finetune.py:{source}, or let "
            "these layers start anew, --config.finetune.new_layers."
        )
    return kept


def _difference(
    layer: str, wanted: Mapping[str, Any], found: Mapping[str, Any] | None
) -> str:
    """In words; empty if there is none."""
    if found is None:
        return f"{layer} is not there"
    for name, leaf in wanted.items():
        if name not in found:
            return f"{layer} has no {name} there"
        if np.shape(found[name]) != leaf.shape:
            return f"{layer}/{name} is {np.shape(found[name])} there, {leaf.shape} here"
    return ""


def over(tree: Any, kept: Mapping[str, Any]) -> Any:
    """The tree with the layers that are kept, each array where the tree's is."""

    def put(old: Any, new: Any) -> jax.Array:
        whole = np.asarray(new, old.dtype)
        return jax.make_array_from_callback(
            old.shape, old.sharding, lambda index: whole[index]
        )

    layers = {layer: jax.tree.map(put, tree[layer], new) for layer, new in kept.items()}
    return tree | layers


def _describe(experiment: Experiment, weights: Weights, anew: list[str]) -> list[str]:
    source = experiment.config.finetune.source
    frozen = optim.frozen_layers(experiment.config.schedule.layer_factors)
    line = (
        f"starting from the weights and the mean image of {source}, but new: "
        f"{', '.join(anew)}"
    )
    lines = [line + (f"; frozen: {', '.join(sorted(frozen))}" if frozen else "")]
    here = experiment_lib.model_settings(experiment.config, None)
    other = [
        f"{name}={weights.settings.get(name)} there, {value} here"
        for name, value in here.items()
        if name not in ("num_classes", "dtype", "init")
        and _plain(weights.settings.get(name)) != _plain(value)
    ]
    if other:
        lines.append(
            "WARNING: the weights are of another network of the same shapes: "
            + "; ".join(other)
        )
    return lines


def _plain(value: Any) -> Any:
    """As JSON has it, which knows no tuples."""
    return list(value) if isinstance(value, tuple) else value
