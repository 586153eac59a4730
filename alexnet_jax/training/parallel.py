"""Meshes, modes, and what devices exchange: all that knows of more than one device.

One mesh of two axes, "data" and "column". Three modes:

- `data`: every device holds the whole network and its share of the batch; gradients
  are averaged over all devices.
- `columns`: the paper's scheme (section 3.2). A device holds one column of every
  layer and, of the fully connected layers, one part of the units; the columns
  exchange features before conv3, fc6 and fc7, and add up their parts of the logits.
- `hybrid`: Krizhevsky's "one weird trick" (arXiv:1404.5997, scheme a). Every device
  holds all convolutional layers and its own examples there; the fully connected
  layers are split over "column", whose devices exchange examples before fc6. Only
  the gradients of the convolutional layers, 4% of the parameters, are averaged over
  all devices.

With both axes longer than 1, rows of such devices share the batch.

Parameters are always the one full tree; `PartitionSpec`s say how it is split. A
checkpoint therefore moves between any numbers of devices.
"""

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from alexnet_jax.models.alexnet import AlexNet
from alexnet_jax.models.exchange import Exchange, Part, by_column
from alexnet_jax.models.layers import (
    Dense,
    Layer,
    Local,
    Lrn,
    Variant,
    stage_name,
)

DATA = "data"
COLUMN = "column"
MODES = ("data", "columns", "hybrid")
TRANSFORMS = ("shard_map", "pmap")

P = PartitionSpec
PyTree = Any


class DeviceError(ValueError):
    """jax has no devices here; the message says what to install or to set."""


def require_devices() -> None:
    """Start jax's devices, after `distributed.start` and jax's settings.

    Raises:
      DeviceError: if there are none of a kind that JAX_PLATFORMS asks for, or they do not
        start.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        # Without an NVIDIA GPU "cuda" is a bare AssertionError.
        unknown = not str(error) or "known backends" in str(error)
        if not unknown and jax.distributed.is_initialized():
            raise  # another process may be gone
        settings: Any = jax.config
        reason = "" if unknown else f": {str(error).partition(' (set JAX_')[0]}"
        plugins = importlib.metadata.entry_points(group="jax_plugins").names
        raise DeviceError(
            f"jax {jax.__version__} starts no devices with JAX_PLATFORMS="
            f"{settings.jax_platforms or ''!r}{reason} (installed: "
            f"{', '.join(['cpu', *sorted(plugins)])}). For an NVIDIA GPU, pip install "
            '"jax[cuda13]" and set JAX_PLATFORMS=cuda (nvidia-smi must list the GPU); '
            "for the CPU, set JAX_PLATFORMS=cpu or unset it."
        ) from error


def make_mesh(data: int, column: int = 1) -> Mesh:
    """Make a mesh of data x column devices, the first ones there are.

    With several processes it has to be all of them: a process without a device of
    the mesh would have nothing to do, and the others would wait for it.

    Raises:
      ValueError: if there are fewer devices than that, or, with several processes, some
        are left over or the processes have unequal numbers of them.
    """
    # In the order of the processes, so that the devices of a row are neighbours and
    # each process's examples follow one another.
    devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
    wanted = data * column
    if min(data, column) < 1:
        raise ValueError(
            f"A mesh of {data} x {column} devices: both numbers must be at least 1 "
            "(--config.parallel.data, --config.parallel.column)."
        )
    shape = f"{wanted} devices ({data} data x {column} column)"
    processes = jax.process_count()
    each = [sum(d.process_index == i for d in devices) for i in range(processes)]
    if len(set(each)) > 1:
        raise ValueError(
            f"The processes have {', '.join(map(str, each))} devices; all of them need "
            "as many."
        )
    found = f"{len(devices)} ({devices[0].platform})"
    if processes > 1 and wanted != len(devices):
        raise ValueError(
            f"Asked for {shape}, found {found} in {processes} processes, which have to "
            "be used all; change --config.parallel.data and --config.parallel.column, "
            "or the number of processes."
        )
    if wanted > len(devices):
        raise ValueError(
            f"Asked for {shape}, found {found}; add --cpu_devices={wanted} for virtual "
            "ones on the CPU, or ask for fewer with --config.parallel.data and "
            "--config.parallel.column."
        )
    # Auto axes: the default, Explicit, refuses arrays that are not sharded already.
    return Mesh(
        np.array(devices[:wanted]).reshape(data, column),
        (DATA, COLUMN),
        axis_types=(AxisType.Auto, AxisType.Auto),
    )


def check_mode(network: Variant, mode: str, columns: int) -> None:
    """Raise ValueError if the network cannot run in `mode` on that many columns."""
    if mode not in MODES:
        raise ValueError(
            f"--config.parallel.mode={mode!r} must be one of {', '.join(MODES)}."
        )
    if columns == 1:
        return
    if mode == "data":
        raise ValueError(
            f"--config.parallel.mode=data has no use for {columns} columns; set "
            "--config.parallel.column=1, or --config.parallel.mode=columns or hybrid."
        )
    if mode == "columns":
        reason = _not_in_columns(network, columns)
        instead = "--config.parallel.mode=data or hybrid, or variant 'paper'"
    else:
        reason = _not_in_hybrid(network, columns)
        instead = "another --config.parallel.column, or --config.parallel.mode=data"
    if reason:
        raise ValueError(
            f"Variant {network.name!r} cannot be split over {columns} columns: "
            f"{reason}. Take {instead}."
        )


def _not_in_columns(network: Variant, columns: int) -> str:
    if network.columns != columns:
        return f"it has {network.columns} column{'s' if network.columns > 1 else ''}"
    if any(isinstance(s, Lrn) and not s.per_column for s in network.stages):
        return "its local response normalisation looks across the columns"
    if any(isinstance(row, Local) for row in network.layers):
        return "its locally connected layers see all features"
    if len(network.denses) == 1:
        return "its classifier reads the feature maps themselves"
    return ""


def _not_in_hybrid(network: Variant, columns: int) -> str:
    for row in network.denses[:-1]:
        if row.features % columns:
            return f"the {row.features} units of {row.name} do not divide by {columns}"
        groups = network.columns if row.sees == "own" else 1
        if groups % columns and columns % groups:
            return f"{row.name} has {groups} columns of its own"
    return ""


def batch_axes(mesh: Mesh, mode: str) -> tuple[str, ...]:
    """Return the mesh axes that the batch is split over as it enters the network.

    Axes of one device are not among them: XLA would copy all gradients in a sum of one.
    """
    axes = (DATA, COLUMN) if mode == "hybrid" else (DATA,)
    return tuple(axis for axis in axes if mesh.shape[axis] > 1)


def batch_shards(data: int, column: int, mode: str) -> int:
    """Return into how many parts a mesh of data x column devices splits a batch."""
    return data * column if mode == "hybrid" else data


# What one device computes, and what it exchanges with the others of its row.


def local_model(model: AlexNet, mesh: Mesh, mode: str, parts: int = 1) -> AlexNet:
    """Return the clone of a model that runs on one device of `mesh`.

    Args:
      model: the whole network.
      mesh, mode: how it is split.
      parts: a device's share of a batch comes in so many parts, one after the other.

    Raises:
      ValueError: if the network cannot run in that mode.
    """
    columns, axes = mesh.shape[COLUMN], batch_axes(mesh, mode)
    check_mode(model.network, mode, columns)
    exchange = Exchange(axes)
    if columns > 1 and mode == "columns":
        exchange = Columns(axes, columns)
    elif columns > 1:
        exchange = Hybrid(axes, columns, parts)
    return model.clone(exchange=exchange)


@dataclass(frozen=True)
class Columns(Exchange):
    """Mode `columns`: a device has one part of the features of every layer."""

    columns: int

    def part(self, row: Layer, own: jax.Array) -> Part:
        return Part(own, self.batch_axes, self.columns, lax.axis_index(COLUMN))

    def gather_features(self, x: jax.Array) -> jax.Array:
        # Differentiated, it is a reduce-scatter: each device gets the sum of what all
        # devices ask of its own features (the original's `Layer::bprop`).
        return lax.all_gather(x, COLUMN, axis=x.ndim - 1, tiled=True)

    def dense_inputs(self, x: jax.Array, columns: int) -> jax.Array:
        if columns == 1:
            return by_column(self.gather_features(x), 1)
        return by_column(x, columns // self.columns)

    def classifier_inputs(self, x: jax.Array) -> jax.Array:
        return x  # units: `check_mode` refuses networks in which they are maps

    def sum_logits(self, parts: jax.Array) -> jax.Array:
        return lax.psum(parts, COLUMN)


@dataclass(frozen=True)
class Hybrid(Exchange):
    """Mode `hybrid`: data-parallel convolutions, then fully connected layers in parts.

    A device has all convolutional features of its own examples, and one part of the
    fully connected units for the examples of all devices of its row. `parts` as for
    `local_model`.
    """

    columns: int
    parts: int = 1

    def part(self, row: Layer, own: jax.Array) -> Part:
        if not isinstance(row, Dense):
            return Part(own, self.batch_axes)
        # The examples of the devices of the row, one device after the other. With
        # parts, those of neighbouring devices are so many times further apart.
        index = lax.axis_index(COLUMN)
        apart = len(own) * self.parts
        others = jnp.arange(self.columns) - index
        positions = (own + apart * others[:, None]).reshape(-1)
        axes = tuple(axis for axis in self.batch_axes if axis != COLUMN)
        return Part(positions, axes, self.columns, index)

    def dense_inputs(self, x: jax.Array, columns: int) -> jax.Array:
        # Maps: those of the row's examples. Units: all features of these.
        x = lax.all_gather(x, COLUMN, axis=0 if x.ndim == 4 else 1, tiled=True)
        x = by_column(x, columns)
        own = max(1, columns // self.columns)
        if columns == own:
            return x
        first = lax.axis_index(COLUMN) * columns // self.columns
        return lax.dynamic_slice_in_dim(x, first, own, axis=1)

    def classifier_inputs(self, x: jax.Array) -> jax.Array:
        if x.ndim == 2:
            return x
        x = x.reshape(x.shape[0], -1)  # no layer before it that was split
        return lax.all_to_all(x, COLUMN, split_axis=1, concat_axis=0, tiled=True)

    def sum_logits(self, parts: jax.Array) -> jax.Array:
        return lax.psum_scatter(parts, COLUMN, scatter_dimension=0, tiled=True)


# Sums over devices.


def sum_shards(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Return the sum of what each device worked out from its shard of an array.

    `spec` says how that array is split; parts that every device holds count once.
    """
    axes = _axes(spec)
    return lax.psum(x, axes) if axes else x


def vary(tree: PyTree, specs: PyTree, axes: tuple[str, ...]) -> PyTree:
    """Mark arrays as each device's own along the `axes` they are not split over.

    Without it `shard_map` would sum a gradient over these axes by itself, once for
    each use of the array; `sum_gradients` does it once in all.
    """

    def mark(a: jax.Array, spec: PartitionSpec) -> jax.Array:
        others = replicated_axes(spec, axes)
        return lax.pcast(a, others, to="varying") if others else a

    return jax.tree.map(mark, tree, specs)


def sum_gradients(grads: PyTree, specs: PyTree, axes: tuple[str, ...]) -> PyTree:
    """Sum gradients over those of the `axes` that their arrays are not split over.

    The one place where data-parallel gradients are reduced, in the parameters' own
    precision. `shard_map` would refuse a step without it; under `pmap` such a step
    trains on the gradient of device 0, and nothing warns.
    """
    leaves, tree = jax.tree.flatten(grads)
    kinds = [replicated_axes(spec, axes) for spec in tree.flatten_up_to(specs)]
    # One exchange for all leaves of a kind, in an order that all processes have.
    for kind in dict.fromkeys(kinds):
        if not kind:
            continue
        at = [i for i, other in enumerate(kinds) if other == kind]
        for i, total in zip(at, lax.psum([leaves[i] for i in at], kind), strict=True):
            leaves[i] = total
    return tree.unflatten(leaves)


def replicated_axes(spec: PartitionSpec, axes: tuple[str, ...]) -> tuple[str, ...]:
    """Return those of `axes` that an array of that spec is not split over."""
    return tuple(axis for axis in axes if axis not in _axes(spec))


def _axes(spec: PartitionSpec) -> tuple[str, ...]:
    return tuple(axis for axis in spec if axis is not None)


# How the parameters are split.


def param_specs(network: Variant, params: PyTree, mesh: Mesh, mode: str) -> PyTree:
    """Return the PartitionSpec of every leaf of `params` (or of `batch_stats`).

    In mode "columns" a layer's features, its last axis, are split over "column", in
    mode "hybrid" only those of the fully connected layers; the classifier is split by
    its inputs instead and its bias not at all.
    """
    if mode == "data" or mesh.shape[COLUMN] == 1:
        return jax.tree.map(lambda _: P(), params)
    classifier = network.layers[-1].name
    rows = network.denses if mode == "hybrid" else network.layers
    split = {row.name for row in rows} | {stage_name("norm", r.name) for r in rows}

    def spec(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        if path[0].key == classifier:
            return P(COLUMN, None) if leaf.ndim == 2 else P()
        if path[0].key not in split:
            return P()
        return P(*[None] * (leaf.ndim - 1), COLUMN)

    return jax.tree_util.tree_map_with_path(spec, params)


def shardings(mesh: Mesh, specs: PyTree) -> PyTree:
    """Return a NamedSharding for every PartitionSpec."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        specs,
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )


# One step, two wrappers.


def on_devices(
    step: Callable[..., Any],
    mesh: Mesh,
    in_specs: tuple[PyTree, ...],
    out_specs: PyTree,
    transform: str = "shard_map",
) -> Callable[..., Any]:
    """Return `step`, what one device does, as a function of whole arrays, to be jitted.

    Args:
      step: is run on every device, with its shards of the arguments.
      in_specs, out_specs: PartitionSpecs, a tree for each argument and for the result.
      transform: "shard_map", with its type check on, always: a missing reduction is
        an error. "pmap" for whatever is written for it; where nothing but the batch
        is split (mode "data") it gives the same numbers. Over one row there is
        nothing to map.
    """
    if transform == "pmap" and mesh.shape[DATA] > 1:
        return _pmap(step, mesh, in_specs)
    return jax.shard_map(
        step, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=True
    )


def _pmap(
    step: Callable[..., Any], mesh: Mesh, in_specs: tuple[PyTree, ...]
) -> Callable[..., Any]:
    """Map `step` over the rows of the mesh; what is not split has no device axis."""
    split = [spec == P((DATA,)) for spec in in_specs]
    mapped = jax.pmap(
        step,
        axis_name=DATA,
        in_axes=tuple(0 if yes else None for yes in split),
        out_axes=None,  # the same on all devices: one of them, unstacked
        devices=list(mesh.devices.flat),
    )

    def call(*args: PyTree) -> PyTree:
        rows = mesh.shape[DATA]
        stacked = (
            jax.tree.map(lambda a: a.reshape(rows, -1, *a.shape[1:]), arg)
            if yes
            else arg
            for arg, yes in zip(args, split, strict=True)
        )
        return mapped(*stacked)

    return call


# From the host to the devices.


def positions(mesh: Mesh, mode: str, batch_size: int) -> tuple[int, int]:
    """Return (lo, hi), the positions of a global batch that this process needs.

    Devices of one row that are columns need the same examples.
    """
    sharding = NamedSharding(mesh, P(batch_axes(mesh, mode)))
    parts = sharding.addressable_devices_indices_map((batch_size,)).values()
    bounds = {part[0].indices(batch_size)[:2] for part in parts if part is not None}
    return min(lo for lo, _ in bounds), max(hi for _, hi in bounds)


def put_batch(batch: PyTree, mesh: Mesh, mode: str, batch_size: int) -> PyTree:
    """Put host arrays of the examples at `positions` on devices, split like the batch."""
    sharding = NamedSharding(mesh, P(batch_axes(mesh, mode)))
    return jax.tree.map(
        lambda a: jax.make_array_from_process_local_data(
            sharding, a, (batch_size, *a.shape[1:])
        ),
        batch,
    )


def put_everywhere(tree: PyTree, mesh: Mesh) -> PyTree:
    """Put host arrays, the same in every process, whole on every device."""
    sharding = NamedSharding(mesh, P())
    return jax.tree.map(
        lambda a: jax.make_array_from_process_local_data(sharding, a, a.shape), tree
    )
