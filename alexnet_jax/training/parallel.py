"""Meshes, parallel modes, partition specs and collectives.

A mesh has two axes, "data" and "column". There are three modes:

- `data`: every device holds the whole network and its shard of the batch. Gradients
  are averaged over all devices.
- `columns`: the paper's scheme (section 3.2). A device holds one column of every
  convolutional layer and one part of the units of every fully connected layer. The
  columns exchange features before conv3, fc6 and fc7, and sum their parts of the logits.
- `hybrid`: Krizhevsky's "one weird trick" (arXiv:1404.5997, scheme a). Every device
  holds all convolutional layers and runs them on its own examples. The fully connected
  layers are split over "column", whose devices exchange examples before fc6. Only the
  gradients of the convolutional layers, 4% of the parameters, are averaged over all
  devices.

If both axes are longer than 1, rows of such devices share the batch.

Parameters are always one full tree, split by `PartitionSpec`s. So a checkpoint moves
between any numbers of devices.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from alexnet_jax.models import ops
from alexnet_jax.models.alexnet import AlexNet
from alexnet_jax.models.exchange import Exchange, Part, by_column
from alexnet_jax.models.layers import Dense, Layer, Local, Lrn, Variant, stage_name

DATA = "data"
COLUMN = "column"
MODES = ("data", "columns", "hybrid")
TRANSFORMS = ("shard_map", "pmap")

P = PartitionSpec
PyTree = Any


def make_mesh(data: int, column: int = 1) -> Mesh:
    """Return a mesh of data x column devices, the first ones there are.

    Several processes must use all of their devices: one without a device of the mesh
    would have nothing to do, and the others would wait for it.

    Raises:
      ValueError: there are too few devices. With several processes: some devices are
        left over, or the processes have different numbers of devices.
    """
    # Sorted by process: the devices of a row are neighbours, and the examples of a
    # process are consecutive.
    devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
    wanted, processes = data * column, jax.process_count()
    shape = f"{wanted} devices ({data} data x {column} column)"
    each = [sum(d.process_index == i for d in devices) for i in range(processes)]
    if len(set(each)) > 1:
        raise ValueError(
            f"The processes have {', '.join(map(str, each))} devices; expected the same number. "
            "Set --local_device_ids or --cpu_devices."
        )
    found = f"{len(devices)} ({devices[0].platform})"
    if processes > 1 and wanted != len(devices):
        raise ValueError(
            f"Asked for {shape}, found {found} in {processes} processes, which have to "
            "be used all; change --config.parallel.data and --config.parallel.column, "
            "or the number of processes."
        )
    if not 1 <= wanted <= len(devices):
        raise ValueError(
            f"Asked for {shape}, found {found}; add --cpu_devices={wanted} for virtual "
            "ones on the CPU, or ask for fewer with --config.parallel.data and "
            "--config.parallel.column."
        )
    # The default, Explicit axes, refuses arrays that are not sharded already.
    return Mesh(
        np.array(devices[:wanted]).reshape(data, column),
        (DATA, COLUMN),
        axis_types=(AxisType.Auto, AxisType.Auto),
    )


def check_mode(network: Variant, mode: str, columns: int) -> None:
    """Raise ValueError if the network cannot run in `mode` on that many columns."""
    if mode not in MODES:
        raise ValueError(f"--config.parallel.mode={mode!r} must be one of {', '.join(MODES)}.")
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
    """Return the mesh axes that images are split over.

    Axes of length 1 are left out: XLA would copy all gradients to sum one of them.
    """
    axes = (DATA, COLUMN) if mode == "hybrid" else (DATA,)
    return tuple(axis for axis in axes if mesh.shape[axis] > 1)


def batch_shards(data: int, column: int, mode: str) -> int:
    """Return the number of shards of a batch on a mesh of data x column devices."""
    return data * column if mode == "hybrid" else data


# The network on one device, and its exchange with the others of its row.


def local_model(model: AlexNet, mesh: Mesh, mode: str, parts: int = 1) -> AlexNet:
    """Return a clone of the whole `model` that runs on one device of `mesh`.

    Args:
      parts: number of micro-batches per device, for the positions of examples.

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
    """Exchange of mode `columns`: a device has one part of every layer's features."""

    columns: int

    def part(self, row: Layer, own: jax.Array) -> Part:
        return Part(own, self.batch_axes, self.columns, lax.axis_index(COLUMN))

    def gather_features(self, x: jax.Array) -> jax.Array:
        # Its gradient is a reduce-scatter: each device gets the gradients of its own
        # features, summed over all devices (the original's `Layer::bprop`).
        return lax.all_gather(x, COLUMN, axis=x.ndim - 1, tiled=True)

    def dense_inputs(self, x: jax.Array, columns: int) -> jax.Array:
        if columns == 1:
            return by_column(self.gather_features(x), 1)
        return by_column(x, columns // self.columns)

    def classifier_inputs(self, x: jax.Array) -> jax.Array:
        return x  # [B, units]; `check_mode` refuses networks with feature maps here

    def sum_logits(self, parts: jax.Array) -> jax.Array:
        return lax.psum(parts, COLUMN)


@dataclass(frozen=True)
class Hybrid(Exchange):
    """Exchange of mode `hybrid`: data-parallel convolutions, split dense layers.

    A device has all convolutional features of its own examples, and one part of the
    fully connected units for all examples of its row. `parts` is that of `local_model`.
    """

    columns: int
    parts: int = 1

    def part(self, row: Layer, own: jax.Array) -> Part:
        if not isinstance(row, Dense):
            return Part(own, self.batch_axes)
        # The examples of the row, device by device. With `parts` micro-batches, the
        # examples of neighbouring devices are `parts` times further apart.
        index = lax.axis_index(COLUMN)
        apart = len(own) * self.parts
        others = jnp.arange(self.columns) - index
        positions = (own + apart * others[:, None]).reshape(-1)
        axes = tuple(axis for axis in self.batch_axes if axis != COLUMN)
        return Part(positions, axes, self.columns, index)

    def dense_inputs(self, x: jax.Array, columns: int) -> jax.Array:
        # Feature maps: gather the examples of the row. Units: gather the features.
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
        x = x.reshape(x.shape[0], -1)  # no split layer comes before
        return lax.all_to_all(x, COLUMN, split_axis=1, concat_axis=0, tiled=True)

    def sum_logits(self, parts: jax.Array) -> jax.Array:
        return lax.psum_scatter(parts, COLUMN, scatter_dimension=0, tiled=True)


# Sums over devices.


def sum_shards(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Sum `x` over the devices that hold different shards of an array of that spec.

    Replicas of a shard count once.
    """
    axes = tuple(axis for axis in spec if axis is not None)
    return lax.psum(x, axes) if axes else x


def vary(tree: PyTree, specs: PyTree, axes: tuple[str, ...]) -> PyTree:
    """Mark replicated arrays as varying along those of `axes` that do not split them.

    Otherwise `shard_map` sums a gradient over these axes by itself, at each use of the
    array. `sum_gradients` sums it once.
    """

    def mark(a: jax.Array, spec: PartitionSpec) -> jax.Array:
        others = replicated_axes(spec, axes)
        return lax.pcast(a, others, to="varying") if others else a

    return jax.tree.map(mark, tree, specs)


@jax.named_scope("sum_gradients")
def sum_gradients(grads: PyTree, specs: PyTree, axes: tuple[str, ...]) -> PyTree:
    """Sum gradients over those of `axes` that do not split their arrays.

    This is the one place where data-parallel gradients are reduced, in the precision of
    the parameters. Without it `shard_map` refuses the step, but `pmap` silently trains
    on the gradient of device 0.
    """
    leaves, tree = jax.tree.flatten(grads)
    kinds = [replicated_axes(spec, axes) for spec in tree.flatten_up_to(specs)]
    total_size = sum(leaf.size for leaf in leaves)
    # One exchange for all leaves of a kind, in the same order in all processes.
    for kind in filter(None, dict.fromkeys(kinds)):
        at = [i for i, other in enumerate(kinds) if other == kind]
        if ops.exchanges_in_background():
            # The gradients of fc6 and fc7, nine tenths of all numbers, are known before the
            # backward pass of the convolutions. The barrier keeps XLA from exchanging the
            # others first.
            large = [i for i in at if leaves[i].size > total_size / 10]
            at = [i for i in at if i not in large]
            for i in large[::-1]:
                leaves[i] = lax.psum(leaves[i], kind)
            tied = lax.optimization_barrier([leaves[i] for i in (*at, *large)])
            for i, leaf in zip(at, tied, strict=False):
                leaves[i] = leaf
        for i, total in zip(at, lax.psum([leaves[i] for i in at], kind), strict=True):
            leaves[i] = total
    return tree.unflatten(leaves)


def replicated_axes(spec: PartitionSpec, axes: tuple[str, ...]) -> tuple[str, ...]:
    """Return those of `axes` that do not split an array of that spec."""
    return tuple(axis for axis in axes if axis not in spec)


# Partition specs of the parameters.


def param_specs(network: Variant, params: PyTree, mesh: Mesh, mode: str) -> PyTree:
    """Return the PartitionSpec of every leaf of `params` (or of `batch_stats`).

    The last axis, a layer's features, is split over "column": in mode "columns" of all
    layers, in mode "hybrid" of the fully connected layers. The classifier is split by
    its inputs instead, and its bias is whole.
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


# Two wrappers around a step.


def on_devices(
    step: Callable[..., Any],
    mesh: Mesh,
    in_specs: tuple[PyTree, ...],
    out_specs: PyTree,
    transform: str = "shard_map",
) -> Callable[..., Any]:
    """Return a function of whole arrays that runs `step` on every device.

    The result is to be jitted.

    Args:
      step: takes the shards of one device.
      in_specs, out_specs: PartitionSpecs, one tree per argument and one for the result.
      transform: "shard_map", always with its type check: a missing reduction is an
        error. "pmap" gives the same numbers in mode "data", in which nothing but the
        batch is split; on a single row it is `shard_map`.
    """
    if transform == "pmap" and mesh.shape[DATA] > 1:
        return _pmap(step, mesh, in_specs)
    return jax.shard_map(step, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=True)


def _pmap(step: Callable[..., Any], mesh: Mesh, in_specs: tuple[PyTree, ...]) -> Callable[..., Any]:
    """Map `step` over the rows of the mesh; whole arguments have no device axis."""
    split = [spec == P((DATA,)) for spec in in_specs]
    mapped = jax.pmap(
        step,
        axis_name=DATA,
        in_axes=tuple(0 if yes else None for yes in split),
        out_axes=None,  # equal on all devices: one of them, unstacked
        devices=list(mesh.devices.flat),
    )

    def call(*args: PyTree) -> PyTree:
        rows = mesh.shape[DATA]
        stacked = (
            jax.tree.map(lambda a: a.reshape(rows, -1, *a.shape[1:]), arg) if yes else arg
            for arg, yes in zip(args, split, strict=True)
        )
        return mapped(*stacked)

    return call


# From the host to the devices.


def positions(mesh: Mesh, mode: str, batch_size: int) -> tuple[int, int]:
    """Return (lo, hi): this process needs the examples lo:hi of a global batch.

    In mode "columns" the devices of a row need the same examples.
    """
    sharding = NamedSharding(mesh, P(batch_axes(mesh, mode)))
    parts = sharding.addressable_devices_indices_map((batch_size,)).values()
    bounds = {part[0].indices(batch_size)[:2] for part in parts if part is not None}
    return min(lo for lo, _ in bounds), max(hi for _, hi in bounds)


def put_batch(batch: PyTree, mesh: Mesh, mode: str, batch_size: int) -> PyTree:
    """Put host arrays of the examples at `positions` on devices, split like the batch."""
    sharding = NamedSharding(mesh, P(batch_axes(mesh, mode)))
    return jax.tree.map(
        lambda a: jax.make_array_from_process_local_data(sharding, a, (batch_size, *a.shape[1:])),
        batch,
    )


def put_everywhere(tree: PyTree, mesh: Mesh) -> PyTree:
    """Put host arrays, the same in every process, whole on every device."""
    sharding = NamedSharding(mesh, P())
    return jax.tree.map(
        lambda a: jax.make_array_from_process_local_data(sharding, a, a.shape), tree
    )
