"""Tables of `main --mode=describe`: layers, and what the devices of a mode exchange."""

import collections
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from alexnet_jax.data import augment
from alexnet_jax.models.alexnet import AlexNet
from alexnet_jax.models.summary import LayerSummary, summary
from alexnet_jax.training import experiment, parallel, steps
from alexnet_jax.training.config import Config
from alexnet_jax.training.parallel import P

# Phases of a training step: the activations up to the loss, their gradients, and the sums
# of the parameters' gradients, with the loss and the error.
PHASES = ("forward", "backward", "gradients")
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COLLECTIVE = re.compile(
    rf"= (?P<shape>\S.*?) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\((?P<rest>.*)$"
)
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


# Layers.


def describe(config: Config) -> str:
    """Return a table of shapes, parameters and multiply-adds per layer, for one image.

    If `model.num_classes` is 0, the classifier has the variant's own number of units: no
    data is read.

    Raises:
      ConfigError: the config is wrong.
    """
    experiment.validate(config, training=False)
    network = experiment.make_model(config, config.model.num_classes or None)
    size = config.data.crop_size
    header = f"{network.network.name}, images of {size} x {size} x 3, {network.dtype}"
    return "\n".join([header, "", *table(summary(network, size))])


def table(rows: list[LayerSummary]) -> list[str]:
    """Return the rows as aligned lines, with a heading and a line of sums."""
    cells: list[tuple[str, ...]] = [("layer", "output", "parameters", "multiply-adds")]
    for row in rows:
        counts = (f"{count:,}" if count else "" for count in (row.parameters, row.multiply_adds))
        cells.append((row.name, " x ".join(map(str, row.shape)), *counts))
    parameters = sum(row.parameters for row in rows)
    multiply_adds = sum(row.multiply_adds for row in rows)
    cells.append(("total", "", f"{parameters:,}", f"{multiply_adds:,}"))
    lines = _aligned(cells, left=1)
    rule = "-" * len(lines[0])
    return [lines[0], rule, *lines[1:-1], rule, lines[-1]]


def _aligned(rows: list[tuple[str, ...]], left: int) -> list[str]:
    """Return rows as lines: the first `left` columns flush left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    form = "  ".join(f"{{:{'<' if i < left else '>'}{width}}}" for i, width in enumerate(widths))
    return [form.format(*row).rstrip() for row in rows]


# Modes.


@dataclass(frozen=True)
class ModeSummary:
    """A training step that was compiled for a mesh.

    Attributes:
      mode: one of `parallel.MODES`, on `data` x `column` devices.
      exchanges: all arrays that devices exchange in a step.
      memory_bytes: per device, see `memory_bytes`.
    """

    mode: str
    data: int
    column: int
    exchanges: list["Exchange"]
    memory_bytes: int

    def counts(self, phase: str) -> collections.Counter[str]:
        """Return the number of arrays exchanged in one of `PHASES`, per kind."""
        return counts(e for e in self.exchanges if e.phase == phase)

    def sent_bytes(self, phase: str) -> int:
        """Return the number of bytes that a device sends in one of `PHASES`."""
        return round(sum(e.sent_bytes for e in self.exchanges if e.phase == phase))


def describe_modes(config: Config, log: Callable[[str], object] = print) -> str:
    """Return a table of what each mode that fits these devices sends and needs.

    Args:
      config: a valid config.
      log: prints progress; compiling a mode takes as long as the start of a run.
    """
    network = experiment.make_model(config, config.model.num_classes or None)
    rows = []
    fitting, left_out = meshes(config, network, jax.device_count())
    for mode, data, column in fitting:
        log(f"compiling mode {mode} on {data} data x {column} column ...")
        rows.append(summarize_mode(config, network, mode, data, column))
    batch, kind = config.data.batch_size, jax.devices()[0].platform
    header = (
        f"A training step of {batch} images on {jax.device_count()} x {kind}: what a "
        "device sends and needs, from the compiled program"
    )
    reasons = [f"not {line}" for line in left_out]
    return "\n".join([header, "", *mode_table(rows), *([""] if reasons else []), *reasons])


def mode_table(rows: list[ModeSummary]) -> list[str]:
    """Return a heading and a line per phase in which a mode exchanges anything."""
    cells = [("mode", "mesh", "phase", "arrays exchanged", "MB sent", "MB of memory")]
    for row in rows:
        mode, mesh = row.mode, f"{row.data} x {row.column}"
        memory = f"{row.memory_bytes / 1e6:,.0f}"
        for phase in [p for p in PHASES if row.counts(p)] or [""]:
            counted = row.counts(phase)
            arrays = ", ".join(f"{counted[kind]} {kind}" for kind in KINDS if counted[kind])
            sent = f"{row.sent_bytes(phase) / 1e6:,.2f}"
            cells.append((mode, mesh, phase, arrays or "none", sent, memory))
            mode = mesh = memory = ""
    lines = _aligned(cells, left=4)
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def meshes(
    config: Config, network: AlexNet, devices: int
) -> tuple[list[tuple[str, int, int]], list[str]]:
    """Return the modes that fit `devices`, and the reasons of those that do not.

    Returns:
      (mode, data, column) per mode that fits, the config's mode on its own mesh; and a
      line per mode that does not fit.
    """
    variant, batch, own = network.network, config.data.batch_size, config.parallel.mode
    shapes = {
        "data": (devices, 1),
        "columns": (devices // variant.columns, variant.columns),
        "hybrid": (1, devices),
    }
    shapes[own] = experiment.mesh_shape(config, variant)
    found, left_out = [], []
    for mode in (own,) if devices == 1 else shapes:  # on one device all modes are the same
        data, column = shapes[mode]
        shards = parallel.batch_shards(data, column, mode)
        try:
            if mode != own and (data * column != devices or (mode, column) == ("columns", 1)):
                count = variant.columns
                if count == 1:
                    raise ValueError("the network has one column; choose one with several")
                raise ValueError(
                    f"{devices} devices do not divide by {count} columns; use a multiple"
                )
            parallel.check_mode(variant, mode, column)
            if batch % shards:
                raise ValueError(f"{batch} images do not divide by {shards}; use a multiple")
            found.append((mode, data, column))
        except ValueError as error:
            left_out.append(f"{mode}: {error}")
    return found, left_out


def summarize_mode(
    config: Config, network: AlexNet, mode: str, data: int, column: int
) -> ModeSummary:
    """Compile the training step of a config on a mesh, without running it."""
    mesh = parallel.make_mesh(data, column)
    # Only the schedule depends on the number of steps per epoch.
    spec = experiment.make_spec(config, network, mesh, steps_per_epoch=1000.0)
    transform = spec.transform if mode == "data" else "shard_map"
    spec = replace(spec, mode=mode, transform=transform)
    side, batch = config.data.image_size, config.data.batch_size
    wide = jnp.promote_types(network.dtype, jnp.float32)

    def array(shape: tuple[int, ...], dtype: Any, split: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, split))

    examples = P(spec.batch_axes)
    images = array((batch, side, side, 3), jnp.uint8, examples)
    labels = array((batch,), jnp.int32, examples)
    statistics = jax.tree.map(
        lambda a: array(a.shape, wide, P()),
        jax.eval_shape(lambda: augment.imagenet_statistics(side)),
    )
    state, step = steps.abstract_state(spec), steps.make_train_step(spec)
    compiled = step.lower(state, {"image": images, "label": labels}, statistics).compile()
    return ModeSummary(mode, data, column, exchanges(compiled.as_text()), memory_bytes(compiled))


def memory_bytes(compiled: jax.stages.Compiled) -> int:
    """Return the peak memory of a program per device, as the compiler planned it.

    It includes the arguments. 0: the backend does not tell.
    """
    plan = compiled.memory_analysis()
    if plan is None:
        return 0
    # Results that replace arguments are counted once.
    arguments = plan.argument_size_in_bytes - plan.alias_size_in_bytes
    return arguments + plan.output_size_in_bytes + plan.temp_size_in_bytes


# The collective operations of a compiled program, read from its text.


@dataclass(frozen=True)
class Exchange:
    """One array that a collective operation gives every device of a group.

    Attributes:
      kind: one of `KINDS`.
      dtype, shape: of the result on one device; XLA's name of the dtype ("f32").
      devices: number of devices in the group, at least 2.
      phase: one of `PHASES`.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    devices: int
    phase: str

    @property
    def sent_bytes(self) -> float:
        """Number of bytes that a device sends in a ring, which sends least.

        For an array of S bytes over n devices: (n - 1) / n of S in an all-gather,
        reduce-scatter or all-to-all, twice that in an all-reduce.
        """
        bits = re.search(r"\d+", self.dtype)
        result = math.prod(self.shape) * (int(bits[0]) // 8 if bits else 1)
        others = (self.devices - 1) / self.devices
        shares = {
            "all-gather": others,
            "all-to-all": others,
            "all-reduce": 2 * others,
            "reduce-scatter": self.devices - 1,  # the result is one device's part
            "collective-permute": 1,
        }
        return result * shares[self.kind]


def exchanges(hlo: str) -> list[Exchange]:
    """Return every array that a compiled program exchanges.

    A group of one device sends nothing, though XLA may keep it: it is left out.

    Args:
      hlo: `jax.jit(f).lower(...).compile().as_text()`.
    """
    found = []
    for line in hlo.splitlines():
        match = _COLLECTIVE.search(line)
        if not match:
            continue
        devices = _largest_group(match["rest"])
        if devices < 2:
            continue
        arrays = [
            (dtype, tuple(int(n) for n in dims.split(",") if n))
            for dtype, dims in _ARRAY.findall(match["shape"])
        ]
        if match["kind"] == "all-to-all" and len(arrays) > 1:
            # The form with a result per device: one array, in pieces.
            dtype, shape = arrays[0]
            arrays = [(dtype, (len(arrays), *shape))]
        elif match["start"] and match["kind"] != "all-reduce":
            # Such an operation returns its operands before its results.
            operands = match["rest"].partition(")")[0].count("%")
            arrays = arrays[operands : 2 * operands]
        # JAX names each operation after the transformations that it came from.
        name = line.partition('op_name="')[2].partition('"')[0]
        phase = "backward" if "transpose(" in name else "forward"
        phase = phase if "jvp(" in name else "gradients"
        found += [Exchange(match["kind"], dtype, shape, devices, phase) for dtype, shape in arrays]
    return found


def counts(found: Iterable[Exchange]) -> collections.Counter[str]:
    """Return the number of arrays exchanged, per kind of operation.

    One operation may carry several arrays, and XLA merges operations as it likes. The
    number of arrays does not depend on that.
    """
    return collections.Counter(exchange.kind for exchange in found)


def _largest_group(attributes: str) -> int:
    """Return the number of devices in the largest group of an operation.

    XLA writes the groups as lists, as an iota ([groups, devices]<=[...]), or as axes of a
    mesh. A permutation's groups are its pairs.

    Raises:
      ValueError: the groups are written in another form.
    """
    if lists := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,{}]+)\}\}", attributes):
        return max(len(set(group.split(","))) for group in lists[1].split("},{"))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(iota[1])
    if mesh := re.search(r"replica_groups=mesh\[(.+?)\].*? \{(.+?)\}", attributes):
        sizes = dict(axis.split("=") for axis in mesh[1].split(","))
        # "'data':(1)2" is a part of an axis, of 2 devices.
        axes = (axis.partition(":") for axis in mesh[2].split(","))
        return math.prod(int(part.rpartition(")")[2] or sizes[axis]) for axis, _, part in axes)
    raise ValueError(
        "unknown form of replica groups in the compiled program, try another version "
        f"of jax that requirements.txt allows: {attributes}"
    )
