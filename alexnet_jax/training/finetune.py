"""Start a run from trained weights: keep all layers but the classifier.

The first layers of a network are useful for other images too; the last ones are
specific to their task (Yosinski et al. 2014, arXiv:1411.1792).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
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
    weights = load.read_network(source, variant=config.model.variant if is_caffe else None)
    new = [*config.finetune.new_layers, experiment.model.network.layers[-1].name]
    kept, state = _kept(experiment, weights, new), experiment.init_state()
    changes = {part: getattr(state, part) | layers for part, layers in kept.items()}
    if init_extra := experiment.spec.init_extra:
        changes["extra"] = jax.tree.map(jnp.copy, init_extra(changes["params"]))
    state = dataclasses.replace(state, **changes)
    line = f"starting from the weights and the mean image of {source}, but new: {', '.join(new)}"
    if frozen := optim.frozen_layers(config.schedule.layer_factors):
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
    mean = experiment.statistics.mean_image
    if np.shape(weights.mean) != mean.shape:  # of images of another size: its mean colour
        colour = np.reshape(weights.mean, (-1, 3)).mean(axis=0, dtype=np.float64)
        mean = np.broadcast_to(colour.astype(mean.dtype), mean.shape)
    else:
        mean = np.asarray(weights.mean)
    statistics = dataclasses.replace(experiment.statistics, mean_image=mean)
    return dataclasses.replace(experiment, statistics=statistics), state, lines


def _kept(experiment: Experiment, weights: Weights, new: list[str]) -> dict[str, dict[str, Any]]:
    """Return the variables of the layers that are not new, on the devices."""
    state = experiment.abstract_state()
    without = {*new, *(stage_name("norm", layer) for layer in new)}
    problems, kept = [], {}
    for part in ("params", "batch_stats"):
        found = weights.variables.get(part, {})
        expected = {k: v for k, v in getattr(state, part).items() if k not in without}
        for layer, arrays in expected.items():
            if layer not in found:
                problems.append(f"{layer} is not there")
                continue
            there = {name: np.shape(leaf) for name, leaf in found[layer].items()}
            problems += [
                f"{layer}/{name} is {there.get(name, 'missing')} there, {leaf.shape} here"
                for name, leaf in arrays.items()
                if there.get(name) != leaf.shape
            ]
        kept[part] = {layer: found[layer] for layer in expected if layer in found}
    if problems:
        source = experiment.config.finetune.source
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise ConfigError(
            f"--config.finetune.source={source} does not hold the layers of this network:\n"
            f"{listed}\nTake its own network, --config=configs/finetune.py:{source}, or "
            "start these layers from scratch with --config.finetune.new_layers."
        )
    return put_variables(experiment, kept)


def put_variables(
    experiment: Experiment, variables: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return variables, of all or of some layers, on the devices as a state has them."""
    state = experiment.abstract_state()

    def put(expected: Any, array: Any) -> jax.Array:
        whole = np.asarray(array, expected.dtype)
        return jax.make_array_from_callback(
            expected.shape, expected.sharding, lambda index: whole[index]
        )

    return {
        part: {
            layer: jax.tree.map(put, getattr(state, part)[layer], arrays)
            for layer, arrays in variables.get(part, {}).items()
        }
        for part in ("params", "batch_stats")
    }
