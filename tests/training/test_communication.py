"""Reading a compiled program's exchanges: forms of CPU and GPU, counts and bytes."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from alexnet_jax.training import communication, parallel
from alexnet_jax.training.communication import Exchange

N = 4


def test_groups_of_a_single_device_do_not_count():
    text = """
      %a = f32[8]{0} all-reduce(%x), replica_groups={{0},{1}}, to_apply=%add
      %b = (f32[8]{0}, f32[2,2]{1,0}) all-reduce(%x, %y), replica_groups={{0,1}}
      %c = f32[8]{0} all-gather(%x), replica_groups=[1,2]<=[2], dimensions={0}
      %d = f32[8]{0} all-gather(%x), replica_groups=[2,1]<=[2], dimensions={0}
    """
    assert communication.collectives(text) == {"all-reduce": 2, "all-gather": 1}


@pytest.mark.parametrize(
    "groups, devices",
    [
        ("replica_groups={{0,1,2,3}}", 4),
        ("replica_groups={{0,2,4,6},{1,3,5,7}}", 4),
        ("replica_groups={{0,1},{2,3,4},{5}}", 3),
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups=[1,8]<=[8]", 8),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", 2),
        ("replica_groups=mesh['data'=4,'column'=2] {'data'}", 4),
        ("replica_groups=mesh['data'=4,'column'=2] {'column'}", 2),
        ("replica_groups=mesh['data'=4,'column'=2] {'data','column'}", 8),
        ("replica_groups=mesh['data'=8,'column'=1] {'data'}", 8),
        ("replica_groups=mesh['data'=8] {'data':(2)4}", 4),
        ("replica_groups=mesh['data'=8,'column'=2] {'data':(1)2,'column'}", 4),
        ("replica_groups=mesh[data=4,column=2] {data}", 4),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", 4),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(0,2,1,3) {'a','b'}", 4),
    ],
)
def test_forms_of_replica_groups(groups, devices):
    text = f"%a = f32[8]{{0}} all-reduce(%x), channel_id=1, {groups}, to_apply=%add"
    assert [e.devices for e in communication.exchanges(text)] == [devices]


def test_group_of_one_device_on_a_mesh():
    text = (
        "%a = f32[8]{0} all-reduce(%x), channel_id=1, "
        "replica_groups=mesh['data'=4,'column'=1] {'column'}, to_apply=%add"
    )
    assert communication.exchanges(text) == []


def test_pairs_of_a_permutation():
    text = (
        "%a = f32[8]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}\n"
        "%b = f32[8]{0} collective-permute(%x), source_target_pairs={{0,0},{1,1}}"
    )
    (found,) = communication.exchanges(text)
    assert (found.devices, found.sent_bytes) == (2, 32)


@pytest.mark.parametrize(
    "groups", ["replica_groups={}", "replica_groups=torus[2,4]", "to_apply=%add"]
)
def test_unknown_form_of_replica_groups(groups):
    """An error that shows it: a guess would be wrong bytes."""
    with pytest.raises(ValueError, match=f"unknown form.*{re.escape(groups)}"):
        communication.exchanges(f"%a = f32[8]{{0}} all-reduce(%x), {groups}")


def test_the_asynchronous_forms_of_a_gpu():
    """They list their operands before their results, but for all-reduce."""
    text = """
      %a = (f32[2,3]{1,0}, f32[8,3]{1,0}) all-gather-start(%x), replica_groups=[1,4]<=[4]
      %b = f32[8,3]{1,0} all-gather-done(%a)
      %c = (f32[8]{0}, f32[4]{0}) all-reduce-start(%x, %y), replica_groups=[1,4]<=[4]
      %d = ((f32[8]{0}), f32[2]{0}) reduce-scatter-start(%x), replica_groups={{0,1,2,3}}
    """
    found = communication.exchanges(text)
    assert [(e.kind, e.shape) for e in found] == [
        ("all-gather", (8, 3)),
        ("all-reduce", (8,)),
        ("all-reduce", (4,)),
        ("reduce-scatter", (2,)),
    ]


@pytest.mark.parametrize(
    "dtype, size",
    [("f64", 8), ("f32", 4), ("bf16", 2), ("s32", 4), ("u8", 1), ("pred", 1)],
)
def test_sizes_of_numbers(dtype, size):
    exchange = Exchange("all-gather", dtype, (3, 5), 2, "forward")
    assert exchange.result_bytes == 15 * size


@pytest.mark.parametrize(
    "kind, exchange, sent",
    [
        # [8, 6] on four devices: the whole is 192 bytes, a device's part 48.
        ("all-gather", lambda x: lax.all_gather(x, "data", tiled=True), 3 * 48),
        ("all-reduce", lambda x: lax.psum(x, "data"), 2 * 3 / 4 * 48),
        (
            "all-to-all",
            lambda x: lax.all_to_all(x, "data", 0, 0, tiled=True),
            3 / 4 * 48,
        ),
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
    step = jax.shard_map(
        exchange, mesh=mesh, in_specs=split, out_specs=split, check_vma=False
    )
    x = jnp.zeros((8, 6), jnp.float32) if kind != "all-to-all" else jnp.zeros((16, 3))
    hlo = jax.jit(step).lower(x).compile().as_text()
    found = [e for e in communication.exchanges(hlo) if e.kind == kind]
    assert len(found) == 1
    assert found[0].devices == N
    assert found[0].sent_bytes == sent


def test_phases_are_told_apart():
    """By what jax derived an operation from, which XLA keeps beside it."""
    mesh, split, whole = parallel.make_mesh(N, 1), parallel.P("data"), parallel.P()

    def step(w, x):
        def loss(w):
            y = lax.all_gather(x * w, "data", tiled=True)
            return jnp.sum(y**2 * (1 + lax.axis_index("data")))

        return lax.psum(jax.grad(loss)(lax.pcast(w, "data", to="varying")), "data")

    mapped = jax.shard_map(step, mesh=mesh, in_specs=(whole, split), out_specs=whole)
    args = jnp.float32(2.0), jnp.ones(8)
    found = communication.exchanges(jax.jit(mapped).lower(*args).compile().as_text())
    assert [(e.kind, e.phase) for e in found] == [
        ("all-gather", "forward"),
        ("reduce-scatter", "backward"),
        ("all-reduce", "gradients"),
    ]


def test_words():
    counts = communication.collectives(
        "%b = (f32[8]{0}, f32[2]{0}) all-reduce(%x, %y), replica_groups={{0,1}}\n"
        "%c = f32[8]{0} all-gather(%x), replica_groups={{0,1}}, dimensions={0}"
    )
    assert communication.in_words(counts) == "1 all-gather, 2 all-reduce"
    assert communication.in_words(communication.collectives("")) == "-"
