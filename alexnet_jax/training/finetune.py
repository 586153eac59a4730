"""Start a run from trained weights: keep all layers but the classifier.

The first layers of a network are useful for other images too; the last ones are
specific to their task (Yosinski et al. 2014, arXiv:1411.1792).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from alexnet_jax.models.layers import stage_name
from alexnet_jax.models.weights import Weights
from alexnet_jax.training import load, optim
from alexnet_jax.training.config import ConfigError, model_settings
from alexnet_jax.training.experiment import Experiment
from alexnet_jax.training.steps import TrainState


def begin(experiment: Experiment) -> tuple[Experiment, TrainState, list[str]]:
    """Return the first state of a run that starts from `config.finetune.source`.

    The classifier and `finetune.new_layers` start as in a run from scratch. The mean
    image is that of the weights, which were trained with it. The principal components of
    colour are those of the run's own images.

    Returns:
      (the experiment with the mean image of the weights; its first state; lines that
      describe its origin).

    Raises:
      ConfigError: if a layer is missing in the weights or has another shape there.
      FileNotFoundError, CheckpointError, WeightsError: as `load.load`.
    """
    config, source = experiment.config, experiment.config.finetune.source
    # Only a .caffemodel may not name its variant.
    is_caffe = source.lower().endswith(".caffemodel")
    variant = config.model.variant if is_caffe else None
    weights = load.read_network(source, variant=variant)
    new = [*config.finetune.new_layers, experiment.model.network.layers[-1].name]
    kept = _kept(experiment, weights, new)
    state = experiment.init_state()
    state = dataclasses.replace(
        state,
        params=over(state.params, kept["params"]),
        batch_stats=over(state.batch_stats, kept["batch_stats"]),
    )
    line = f"starting from the weights and the mean image of {source}, but new: "
    line += ", ".join(new)
    frozen = optim.frozen_layers(config.schedule.layer_factors)
    if frozen:
        line += f"; frozen: {', '.join(sorted(frozen))}"
    lines = [line]
    # Settings from JSON hold lists, settings of a config hold tuples.
    here, there = (
        {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}
        for settings in (model_settings(config, None), weights.settings)
    )
    other = [
        f"{name}={there.get(name)} there, {value} here"
        for name, value in here.items()
        if name not in ("num_classes", "dtype", "init") and there.get(name) != value
    ]
    if other:
        lines.append(
            "WARNING: the weights are of another network of the same shapes: " + "; ".join(other)
        )
    return _with_mean_of(experiment, weights), state, lines


def _with_mean_of(experiment: Experiment, weights: Weights) -> Experiment:
    """Return the experiment with the mean image of weights.

    If the sizes differ, it is the mean colour.
    """
    mean = experiment.statistics.mean_image
    if np.shape(weights.mean) == mean.shape:
        mean = np.asarray(weights.mean)
    else:
        colour = np.reshape(weights.mean, (-1, 3)).mean(axis=0, dtype=np.float64)
        mean = np.broadcast_to(colour.astype(mean.dtype), mean.shape)
    statistics = dataclasses.replace(experiment.statistics, mean_image=mean)
    return dataclasses.replace(experiment, statistics=statistics)


def _kept(experiment: Experiment, weights: Weights, new: list[str]) -> dict[str, dict[str, Any]]:
    """Return {"params": {layer: its arrays}, "batch_stats": ...} without new layers."""
    state = experiment.abstract_state()
    without = {*new, *(stage_name("norm", layer) for layer in new)}
    kept: dict[str, dict[str, Any]] = {"params": {}, "batch_stats": {}}
    problems = []
    for part, layers in kept.items():
        found = weights.variables.get(part, {})
        for layer, arrays in getattr(state, part).items():
            if layer in without:
                continue
            if layer not in found:
                problems.append(f"{layer} is not there")
                continue
            layers[layer] = found[layer]
            here = {name: tuple(leaf.shape) for name, leaf in arrays.items()}
            there = {name: np.shape(leaf) for name, leaf in found[layer].items()}
            problems += [
                f"{layer}/{name} is {there.get(name, 'missing')} there, {shape} here"
                for name, shape in here.items()
                if there.get(name) != shape
            ]
    if problems:
        source = experiment.config.finetune.source
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise ConfigError(
            f"--config.finetune.source={source} has not the layers of this network:\n"
            f"{listed}\nTake its own network, --config=configs/finetune.py:{source}, or "
            "let these layers start anew, --config.finetune.new_layers."
        )
    return kept


def over(tree: Any, kept: Mapping[str, Any]) -> Any:
    """Return the tree with the kept layers, sharded like the tree's own arrays."""

    def put(old: Any, new: Any) -> jax.Array:
        whole = np.asarray(new, old.dtype)
        return jax.make_array_from_callback(old.shape, old.sharding, lambda index: whole[index])

    layers = {layer: jax.tree.map(put, tree[layer], new) for layer, new in kept.items()}
    return tree | layers
