"""What a config builds, as tables: `main --mode=describe`."""

import collections
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from alexnet_jax.data import augment
from alexnet_jax.models.alexnet import AlexNet
from alexnet_jax.models.summary import LayerSummary, summary
from alexnet_jax.training import (
    communication,
    experiment,
    parallel,
    steps,
)
from alexnet_jax.training.config import Config
from alexnet_jax.training.parallel import P


def describe(config: Config) -> str:
    """Shapes, parameters and multiply-adds of every layer, for one image.

    Without `model.num_classes` the classifier has as many units as the variant's
    own: no data is looked at.

    Raises:
      ConfigError: for a config that is wrong.
    """
    experiment.validate(config, training=False)
    network = experiment.make_model(config, config.model.num_classes or None)
    size = config.data.crop_size
    rows = summary(network, size)
    header = f"{network.network.name}, images of {size} x {size} x 3, {network.dtype}"
    return "\n".join([header, "", *table(rows)])


@dataclass(frozen=True)
class ModeSummary:
    """A training step on a mesh, as it was compiled.

    Attributes:
      mode: of parallel.MODES; `data` x `column` devices.
      exchanges: every array that devices exchange in a step.
      memory_bytes: a device needs: its part of state, batch and statistics, and what
        the step holds at its fullest, as the compiler has planned it.
    """

    mode: str
    data: int
    column: int
    exchanges: list[communication.Exchange]
    memory_bytes: int

    def counts(self, phase: str) -> collections.Counter[str]:
        """Arrays exchanged in one of communication.PHASES, by the kind of operation."""
        return communication.counts(self._in(phase))

    def sent_bytes(self, phase: str) -> int:
        """What a device sends in that phase."""
        return communication.sent_bytes(self._in(phase))

    def _in(self, phase: str) -> list[communication.Exchange]:
        return [e for e in self.exchanges if e.phase == phase]


def meshes(
    config: Config, network: AlexNet, devices: int
) -> tuple[list[tuple[str, int, int]], list[str]]:
    """For each mode the mesh of that many devices, if it fits, and why others do not.

    Returns:
      (mode, data, column) for each that fits, the config's own mesh of its own mode;
      and a line for each that does not.
    """
    table, batch = network.network, config.data.batch_size
    shapes = {
        "data": (devices, 1),
        "columns": (devices // table.columns, table.columns),
        "hybrid": (1, devices),
    }
    shapes[config.parallel.mode] = experiment.mesh_shape(config, table)
    found, left_out = [], []
    for mode, (data, column) in shapes.items():
        if mode != config.parallel.mode:
            if devices == 1:
                continue  # the same in every mode
            if data * column != devices or (mode == "columns" and column == 1):
                columns = f"{table.columns} column{'s' if table.columns > 1 else ''}"
                left_out.append(f"{mode}: {devices} devices, {columns}")
                continue
        try:
            parallel.check_mode(table, mode, column)
        except ValueError as error:
            left_out.append(f"{mode}: {error}")
            continue
        shards = parallel.batch_shards(data, column, mode)
        if batch % shards:
            left_out.append(f"{mode}: {batch} images do not divide by {shards}")
        else:
            found.append((mode, data, column))
    return found, left_out


def summarize_mode(
    config: Config, network: AlexNet, mode: str, data: int, column: int
) -> ModeSummary:
    """Compiles the training step of a config on a mesh; nothing is computed."""
    mesh = parallel.make_mesh(data, column)
    # An epoch's length moves the schedule only.
    tx = experiment.make_optimizer(config, network, steps_per_epoch=1000.0)
    spec = steps.StepSpec(
        network,
        tx,
        experiment.make_augmentation(config, steps_per_epoch=1000.0),
        mesh,
        mode=mode,
        transform=config.parallel.transform if mode == "data" else "shard_map",
        seed=config.seed,
        accumulate_steps=config.optim.accumulate_steps,
        label_smoothing=config.optim.label_smoothing,
    )
    examples = NamedSharding(mesh, P(spec.batch_axes))
    whole = NamedSharding(mesh, P())
    wide = jnp.promote_types(network.dtype, jnp.float32)
    side, batch = config.data.image_size, config.data.batch_size
    shape = jax.ShapeDtypeStruct
    step = steps.make_train_step(spec)
    compiled = step.lower(
        steps.abstract_state(spec),
        {
            "image": shape((batch, side, side, 3), jnp.uint8, sharding=examples),
            "label": shape((batch,), jnp.int32, sharding=examples),
        },
        jax.tree.map(
            lambda a: shape(a.shape, wide, sharding=whole),
            jax.eval_shape(lambda: augment.imagenet_statistics(side)),
        ),
    ).compile()
    return ModeSummary(
        mode,
        data,
        column,
        communication.exchanges(compiled.as_text()),
        memory_bytes(compiled),
    )


def memory_bytes(compiled: jax.stages.Compiled) -> int:
    """What a program needs at its fullest on a device, as the compiler has planned.

    0 where the backend does not tell.
    """
    plan = compiled.memory_analysis()
    if plan is None:
        return 0
    # Results that take the place of arguments are counted once.
    arguments = plan.argument_size_in_bytes - plan.alias_size_in_bytes
    return arguments + plan.output_size_in_bytes + plan.temp_size_in_bytes


def describe_modes(config: Config, log: Callable[[str], object] = print) -> str:
    """What every mode that fits the devices there are sends and needs.

    Args:
      config: valid.
      log: told what is being compiled; each mode takes as long as a run's start.
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
    reasons = ["", *(f"not {line}" for line in left_out)] if left_out else []
    return "\n".join([header, "", *mode_table(rows), *reasons])


def mode_table(rows: list[ModeSummary]) -> list[str]:
    """A line for each phase in which a mode exchanges anything, with a heading."""
    cells = [("mode", "mesh", "phase", "arrays exchanged", "MB sent", "MB of memory")]
    for row in rows:
        mesh, memory = f"{row.data} x {row.column}", f"{row.memory_bytes / 1e6:,.0f}"
        phases = [
            (phase, communication.in_words(row.counts(phase)), row.sent_bytes(phase))
            for phase in communication.PHASES
            if row.counts(phase)
        ]
        first = (row.mode, mesh, memory)
        for phase, exchanged, sent in phases or [("", "none", 0)]:
            mode, mesh, memory = first
            cells.append((mode, mesh, phase, exchanged, f"{sent / 1e6:,.2f}", memory))
            first = ("", "", "")
    widths = [max(len(row[i]) for row in cells) for i in range(6)]
    lines = [
        "  ".join(
            f"{cell:>{width}}" if i >= 4 else f"{cell:<{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def table(rows: list[LayerSummary]) -> list[str]:
    """The rows as aligned lines, with a heading and a line of sums."""
    cells = [("layer", "output", "parameters", "multiply-adds")]
    for row in rows:
        shape = " x ".join(str(n) for n in row.shape)
        parameters = f"{row.parameters:,}" if row.parameters else ""
        multiply_adds = f"{row.multiply_adds:,}" if row.multiply_adds else ""
        cells.append((row.name, shape, parameters, multiply_adds))
    parameters = f"{sum(row.parameters for row in rows):,}"
    multiply_adds = f"{sum(row.multiply_adds for row in rows):,}"
    cells.append(("total", "", parameters, multiply_adds))
    widths = [max(len(row[i]) for row in cells) for i in range(4)]
    lines = [
        f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}"
        for a, b, c, d in cells
    ]
    rule = "-" * len(lines[0])
    return [lines[0], rule, *lines[1:-1], rule, lines[-1]]
