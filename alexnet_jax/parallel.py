"""Everything that knows of more than one device.

One mesh of two axes, "data" and "column". Two modes:

- `data`: every device holds the whole network and its share of the batch; gradients
  are averaged over "data".
- `columns`: the paper's scheme (section 3.2). A device holds one column of every
  layer and, of the fully connected layers, one part of the units; the columns
  exchange features before conv3, fc6 and fc7, and add up their parts of the logits.

Parameters are always the one full tree; `PartitionSpec`s say how it is split. A
checkpoint therefore moves between any numbers of devices.
"""

import collections
import re
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from alexnet_jax.variants import Lrn, Variant

DATA = "data"
COLUMN = "column"
MODES = ("data", "columns")

P = PartitionSpec
PyTree = Any


def make_mesh(data: int, column: int = 1) -> Mesh:
    """A mesh of data x column devices, the first ones there are.

    Raises:
      ValueError: when there are fewer devices than that.
    """
    wanted, devices = data * column, jax.devices()
    if min(data, column) < 1:
        raise ValueError(
            f"A mesh of {data} x {column} devices: both numbers must be at least 1 "
            "(--config.parallel.data, --config.parallel.column)."
        )
    if wanted > len(devices):
        kind = devices[0].platform
        raise ValueError(
            f"Asked for {wanted} devices ({data} data x {column} column), found "
            f"{len(devices)} ({kind}); add --cpu_devices={wanted} for virtual ones on "
            "the CPU, or ask for fewer with --config.parallel.data and "
            "--config.parallel.column."
        )
    # Auto axes: the default, Explicit, refuses arrays that are not sharded already.
    return jax.make_mesh(
        (data, column),
        (DATA, COLUMN),
        axis_types=(AxisType.Auto, AxisType.Auto),
        devices=devices[:wanted],
    )


def check_mode(network: Variant, mode: str, columns: int) -> None:
    """Raises ValueError if the network cannot run in `mode` on that many columns."""
    if mode not in MODES:
        raise ValueError(
            f"--config.parallel.mode={mode!r} must be one of {', '.join(MODES)}."
        )
    if columns == 1:
        return
    if mode == "data":
        raise ValueError(
            f"--config.parallel.mode=data has no use for {columns} columns; set "
            "--config.parallel.column=1, or --config.parallel.mode=columns."
        )
    reason = _not_in_columns(network, columns)
    if reason:
        raise ValueError(
            f"Variant {network.name!r} cannot be split over {columns} columns: "
            f"{reason}. Take --config.parallel.mode=data, or variant 'paper'."
        )


def _not_in_columns(network: Variant, columns: int) -> str:
    if network.columns != columns:
        return f"it has {network.columns} column{'s' if network.columns > 1 else ''}"
    if any(isinstance(s, Lrn) and not s.per_column for s in network.stages):
        return "its local response normalisation looks across the columns"
    if len(network.denses) == 1:
        return "its classifier reads the feature maps themselves"
    return ""


# Exchanges. `axis_name` None: not split, nothing to do.


def gather_features(x: jax.Array, axis_name: str | None) -> jax.Array:
    """[..., C of this device] -> [..., C of all], in the order of the devices.

    Differentiated, it is a reduce-scatter: each device gets the sum of what all
    devices ask of its own features (the original's `Layer::bprop`).
    """
    if axis_name is None:
        return x
    return lax.all_gather(x, axis_name, axis=x.ndim - 1, tiled=True)


def sum_parts(x: jax.Array, axis_name: str | None) -> jax.Array:
    """The sum of the devices' parts, on every device."""
    return x if axis_name is None else lax.psum(x, axis_name)


def sum_shards(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """The sum of what each device worked out from its shard of an array.

    `spec` says how that array is split; parts that every device holds count once.
    """
    axes = tuple(axis for axis in spec if axis is not None)
    return lax.psum(x, axes) if axes else x


def vary(tree: PyTree, axis_name: str) -> PyTree:
    """Marks replicated arrays as each device's own along `axis_name`.

    Differentiated, this is the sum of the gradients over that axis: the one place
    where data-parallel gradients are reduced, in the parameters' own precision.
    """
    return jax.tree.map(lambda a: lax.pcast(a, axis_name, to="varying"), tree)


# How the parameters are split.


def param_specs(network: Variant, params: PyTree, mesh: Mesh, mode: str) -> PyTree:
    """The PartitionSpec of every leaf of `params` (or of `batch_stats`).

    In mode "columns" a layer's features, its last axis, are split over "column";
    the classifier is split by its inputs instead and its bias not at all.
    """
    if mode == "data" or mesh.shape[COLUMN] == 1:
        return jax.tree.map(lambda _: P(), params)
    classifier = network.layers[-1].name

    def spec(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        if path[0].key == classifier:
            return P(COLUMN, None) if leaf.ndim == 2 else P()
        return P(*[None] * (leaf.ndim - 1), COLUMN)

    return jax.tree_util.tree_map_with_path(spec, params)


def shardings(mesh: Mesh, specs: PyTree) -> PyTree:
    """A NamedSharding for every PartitionSpec."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        specs,
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )


def shard_map(
    step: Callable[..., Any], mesh: Mesh, in_specs: PyTree, out_specs: PyTree
) -> Callable[..., Any]:
    """`jax.shard_map` with its type check on, always: it places the reductions."""
    return jax.shard_map(
        step, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=True
    )


def put_batch(batch: PyTree, mesh: Mesh) -> PyTree:
    """Host arrays [this process's examples, ...] -> arrays split over "data"."""
    sharding = NamedSharding(mesh, P(DATA))
    return jax.tree.map(
        lambda a: jax.make_array_from_process_local_data(sharding, a), batch
    )


# What is sent.

_COLLECTIVE = re.compile(
    r"= (?P<shape>\S.*?) "
    r"(?P<kind>all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)"
    r"(?:-start)?\((?P<rest>.*)$"
)


def collectives(hlo: str) -> collections.Counter[str]:
    """Counts the collective operations in a compiled program's text.

    A group of one device sends nothing, though XLA may leave it in: not counted.

    Args:
      hlo: `jax.jit(f).lower(...).compile().as_text()`.

    Returns:
      For "all-gather", "all-reduce", ...: the number of arrays so exchanged (one
      operation may carry several).
    """
    count: collections.Counter[str] = collections.Counter()
    for line in hlo.splitlines():
        match = _COLLECTIVE.search(line)
        if match and _largest_group(match["rest"]) > 1:
            count[match["kind"]] += max(1, len(re.findall(r"\[", match["shape"])))
    return count


def _largest_group(attributes: str) -> int:
    listed = re.search(r"replica_groups=\{(\{.*?\})\}", attributes)
    if listed:
        groups = re.findall(r"\{([\d,]*)\}", listed[1])
        return max(len(group.split(",")) for group in groups)
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes)
    if iota:
        return int(iota[2])
    return 2  # a form not known here: better counted than missed
