"""First lines of a run's log: network, devices and data."""

import socket

import jax

from alexnet_jax.training import parallel
from alexnet_jax.training.experiment import Experiment


def describe_run(experiment: Experiment) -> list[str]:
    """Return lines that name the network, the devices and the data."""
    network, mesh = experiment.model.network, experiment.mesh
    train, evaluation = experiment.train_source, experiment.eval_source
    shapes = experiment.abstract_state().params
    parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    about = f"{parameters:,} parameters, {network.layers[-1].features} classes"
    device, processes = mesh.devices.flat[0], jax.process_count()
    kind = f"{mesh.size} x {device.device_kind} ({device.platform})"
    if processes > 1:
        kind += f" in {processes} processes"
    lines = [
        f"network {network.name}: {about}, images of {experiment.spec.crop_size} pixels",
        f"devices {kind}: {_mesh(experiment)}",
        f"training on {train.num_examples:,} images: {train.description}",
    ]
    if train.num_classes == 1000:
        from alexnet_jax.data.imagenet import OFFICIAL_COUNTS, wnids

        total = OFFICIAL_COUNTS["train"]
        if train.class_names == wnids() and train.num_examples < total:
            lines.append(
                f"WARNING: ILSVRC-2012 has {total:,} training images; published error "
                "rates are of all of them"
            )
    if evaluation is not None:
        lines.append(f"evaluating on {evaluation.num_examples:,} images: {evaluation.description}")
    return lines


def say_place(experiment: Experiment) -> None:
    """Print in each of several processes its host and its part of the batch."""
    if jax.process_count() > 1:
        low, high = experiment.positions()
        here, everywhere = jax.local_device_count(), jax.device_count()
        print(
            f"process {jax.process_index()} of {jax.process_count()} on "
            f"{socket.gethostname()}: {here} of {everywhere} devices; "
            f"{_mesh(experiment)}, examples {low} to {high - 1} of each batch",
            flush=True,
        )


def _mesh(experiment: Experiment) -> str:
    shape, spec = experiment.mesh.shape, experiment.spec
    by = "" if spec.transform == "shard_map" else f" by {spec.transform}"
    return f"mode {spec.mode}{by}, {shape[parallel.DATA]} data x {shape[parallel.COLUMN]} column"
