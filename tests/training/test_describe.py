"""Tables of --mode=describe, and the exchanges of compiled programs on CPU and GPU."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from alexnet_jax.models import variants
from alexnet_jax.training import describe, experiment, parallel
from alexnet_jax.training.describe import Exchange
from configs import common
from tests.models.test_variants import TWO_SIXES

FULL_IMAGE_VALUES = {"conv3": 13 * 13 * 128, "fc6": 6 * 6 * 128, "fc7": 2048}
N = 4


def config_on(mode, data, column, **changes):
    config = common.get_config()
    config.parallel.mode = mode
    config.parallel.data, config.parallel.column = data, column
    for name, value in changes.items():
        setattr(config.model, name, value)
    return config


def network_of(config):
    return experiment.make_model(config, None)


@pytest.mark.parametrize(
    "devices, batch, variant, expected",
    [
        (1, 128, "paper", [("columns", 1, 1)]),
        (8, 128, "paper", [("data", 8, 1), ("columns", 4, 2), ("hybrid", 1, 8)]),
        (8, 128, "owt", [("data", 8, 1), ("hybrid", 1, 8)]),
        # Only columns can give each row as many of 12 images.
        (8, 12, "paper", [("columns", 4, 2)]),
    ],
)
def test_modes_that_fit(devices, batch, variant, expected, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    mode = "columns" if variant == "paper" else "data"
    config = config_on(mode, -1, 1 if devices == 1 else -1, variant=variant)
    config.data.batch_size = batch
    found, left_out = describe.meshes(config, network_of(config), devices)
    assert found == expected
    named = {line.partition(":")[0] for line in left_out} | {mode for mode, *_ in found}
    assert named == set(parallel.MODES) or devices == 1


def test_modes_that_do_not_fit_have_a_reason(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 3)
    config = config_on("columns", 1, 2)
    _, left_out = describe.meshes(config, network_of(config), 3)
    assert left_out[0] == "data: 128 images do not divide by 3; use a multiple"
    assert "4096 units of fc6 do not divide by 3" in left_out[1]


@pytest.mark.slow
def test_paper_in_two_columns_at_full_width():
    """Compare the compiled program with the volumes of section 3.2 and its 3 GB cards."""
    config = config_on("columns", 1, 2)
    found = describe.summarize_mode(config, network_of(config), "columns", 1, 2)
    assert dict(found.counts("forward")) == {"all-gather": 3, "all-reduce": 1}
    assert dict(found.counts("backward")) == {"reduce-scatter": 3}
    assert not found.counts("gradients")
    each_way = 128 * 4 * sum(FULL_IMAGE_VALUES.values())
    assert found.sent_bytes("backward") == each_way
    assert found.sent_bytes("forward") == each_way + 128 * 4 * 1000
    state = 2 * 4 * 60_965_224 / 2  # weights and velocities, half of them
    assert state < found.memory_bytes < 1.5e9


def test_table_has_a_line_per_phase():
    gradients = Exchange("all-reduce", "f32", (1000, 500), 4, "gradients")
    features = Exchange("all-gather", "f32", (1000, 500), 4, "gradients")
    rows = [
        describe.ModeSummary("data", 1, 1, [], 2_000_000),
        describe.ModeSummary("hybrid", 1, 4, [gradients, features], 1_234_567_890),
    ]
    lines = describe.mode_table(rows)
    assert lines[0].split("  ")[0] == "mode"
    assert lines[2].split() == ["data", "1", "x", "1", "none", "0.00", "2"]
    assert re.sub("  +", "|", lines[3]) == (
        "hybrid|1 x 4|gradients|1 all-gather, 1 all-reduce|4.50|1,235"
    )


@pytest.mark.slow
def test_layers_of_equal_number_are_described_in_every_mode(monkeypatch, capsys):
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    monkeypatch.setitem(variants.VARIANTS, TWO_SIXES.name, TWO_SIXES)
    config = config_on("data", 2, 1, variant=TWO_SIXES.name)
    config.data.image_size = config.data.crop_size = TWO_SIXES.crop_size
    layers = [line.split()[0] for line in describe.describe(config).splitlines()[4:-2]]
    assert layers == ["conv1", "conv6", "norm6", "fc6", "norm_fc6", "fc8"]
    text = describe.describe_modes(config)
    assert capsys.readouterr().out.count("compiling mode") == 3
    found = [line.split()[0] for line in text.splitlines() if " x " in line[8:18]]
    assert found == ["data", "columns", "hybrid"]


# The exchanges of a compiled program.


@pytest.mark.parametrize(
    "groups, devices",
    [
        ("replica_groups={{0,2,4,6},{1,3,5,7}}", 4),
        ("replica_groups={{0,1},{2,3,4},{5}}", 3),
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", 2),
        ("replica_groups=mesh['data'=4,'column'=2] {'column'}", 2),
        ("replica_groups=mesh['data'=4,'column'=2] {'data','column'}", 8),
        ("replica_groups=mesh['data'=8,'column'=2] {'data':(1)2,'column'}", 4),
        ("replica_groups=mesh[data=4,column=2] {data}", 4),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", 4),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(0,2,1,3) {'a','b'}", 4),
        ("source_target_pairs={{0,1},{1,0}}", 2),
        # Groups of a single device send nothing.
        ("replica_groups={{0},{1}}", None),
        ("replica_groups=[2,1]<=[2]", None),
        ("replica_groups=mesh['a'=4,'b'=1] {'b'}", None),
        ("source_target_pairs={{0,0},{1,1}}", None),
    ],
)
def test_formats_of_replica_groups(groups, devices):
    kind = "collective-permute" if "pairs" in groups else "all-reduce"
    text = f"%a = f32[8]{{0}} {kind}(%x), channel_id=1, {groups}, to_apply=%add"
    assert [e.devices for e in describe.exchanges(text)] == ([devices] if devices else [])


def test_every_array_of_an_operation_counts():
    found = describe.exchanges("""
      %b = (f32[8]{0}, f32[2,2]{1,0}) all-reduce(%x, %y), replica_groups={{0,1}}
      %c = f32[8]{0} all-gather(%x), replica_groups=[1,2]<=[2], dimensions={0}
      %d = f32[8]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}
    """)
    assert describe.counts(found) == {"all-reduce": 2, "all-gather": 1, "collective-permute": 1}
    assert found[-1].sent_bytes == 32


def test_asynchronous_collectives_of_a_gpu():
    """Read forms that list operands before results, and all-reduce, which does not."""
    text = """
      %a = (f32[2,3]{1,0}, f32[8,3]{1,0}) all-gather-start(%x), replica_groups=[1,4]<=[4]
      %b = f32[8,3]{1,0} all-gather-done(%a)
      %c = (f32[8]{0}, f32[4]{0}) all-reduce-start(%x, %y), replica_groups=[1,4]<=[4]
      %d = ((f32[8]{0}), f32[2]{0}) reduce-scatter-start(%x), replica_groups={{0,1,2,3}}
    """
    assert [(e.kind, e.shape) for e in describe.exchanges(text)] == [
        ("all-gather", (8, 3)),
        ("all-reduce", (8,)),
        ("all-reduce", (4,)),
        ("reduce-scatter", (2,)),
    ]


@pytest.mark.parametrize(
    "kind, exchange, sent",
    [
        # [8, 6] on four devices: the whole is 192 bytes, a device's part 48.
        ("all-gather", lambda x: lax.all_gather(x, "data", tiled=True), 3 * 48),
        ("all-reduce", lambda x: lax.psum(x, "data"), 2 * 3 / 4 * 48),
        ("all-to-all", lambda x: lax.all_to_all(x, "data", 0, 0, tiled=True), 36),
        (
            "reduce-scatter",
            lambda x: lax.psum_scatter(
                lax.all_gather(x, "data", tiled=True) * (1 + lax.axis_index("data")),
                "data",
                tiled=True,
            ),
            3 * 48,
        ),
    ],
)
def test_bytes_of_real_programs(kind, exchange, sent):
    mesh = parallel.make_mesh(N, 1)
    split = parallel.P("data")
    step = jax.shard_map(exchange, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
    x = jnp.zeros((8, 6), jnp.float32) if kind != "all-to-all" else jnp.zeros((16, 3))
    hlo = jax.jit(step).lower(x).compile().as_text()
    (found,) = [e for e in describe.exchanges(hlo) if e.kind == kind]
    assert (found.devices, found.sent_bytes) == (N, sent)


def test_phases_of_a_real_program():
    mesh, split, whole = parallel.make_mesh(N, 1), parallel.P("data"), parallel.P()

    def step(w, x):
        def loss(w):
            y = lax.all_gather(x * w, "data", tiled=True)
            return jnp.sum(y**2 * (1 + lax.axis_index("data")))

        return lax.psum(jax.grad(loss)(lax.pcast(w, "data", to="varying")), "data")

    mapped = jax.shard_map(step, mesh=mesh, in_specs=(whole, split), out_specs=whole)
    args = jnp.float32(2.0), jnp.ones(8)
    found = describe.exchanges(jax.jit(mapped).lower(*args).compile().as_text())
    assert [(e.kind, e.phase) for e in found] == [
        ("all-gather", "forward"),
        ("reduce-scatter", "backward"),
        ("all-reduce", "gradients"),
    ]
