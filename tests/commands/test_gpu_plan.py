"""Programs compiled for an H200: reading their text, and limits on their bytes.

Most of it needs JAX's CUDA plug-in (`pip install -e '.[gpu-plan]'`), but no GPU.
"""

import json
import statistics

import jax
import jax.numpy as jnp
import pytest

from benchmarks.speed import gpu, gpu_plan, hlo
from benchmarks.speed.measure import Setting

EXCHANGE = """\
HloModule step, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %total = f32[] add(%a, %b)
}

%fused_slice (p0: bf16[64,32], p1: bf16[2,32]) -> bf16[2,32] {
  %p0 = bf16[64,32]{1,0} parameter(0)
  %p1 = bf16[2,32]{1,0} parameter(1)
  %part = bf16[2,32]{1,0} slice(%p0), slice={[0:2], [0:32]}
  ROOT %product = bf16[2,32]{1,0} multiply(%part, %p1), metadata={op_name="jit(f)/local_response_norm/mul"}
}

ENTRY %main (x: bf16[64,32], w: bf16[32,16], g: f32[10]) -> (bf16[64,16], f32[10]) {
  %x = bf16[64,32]{1,0} parameter(0)
  %w = bf16[32,16]{1,0} parameter(1)
  %g = f32[10]{0} parameter(2)
  %start = ((f32[10]{0}), f32[10]{0}) all-reduce-start(%g), to_apply=%sum, metadata={op_name="jit(f)/sum_gradients/psum"}
  %first = bf16[2,32]{1,0} slice(%x), slice={[0:2], [0:32]}
  %scaled = bf16[2,32]{1,0} fusion(%x, %first), kind=kLoop, calls=%fused_slice
  %all = f32[10]{0} all-reduce-done(%start)
  %y = bf16[64,16]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="jit(f)/transpose(jvp(_dense))/dot_general"}
  ROOT %result = (bf16[64,16]{1,0}, f32[10]{0}) tuple(%y, %all)
}
"""


def test_program_text_gives_kernels_bytes_and_exchanges():
    program = hlo.read(EXCHANGE)
    first, scaled, y = program.kernels
    assert (first.bytes, first.part) == (2 * 128, hlo.OTHER)
    # It reads a slice of x, and its other operand; it writes as much.
    assert (scaled.bytes, scaled.part, scaled.backward) == (3 * 128, "LRN", False)
    assert (y.bytes, y.flops) == (2 * (64 * 32 + 32 * 16 + 64 * 16), 2 * 64 * 32 * 16)
    assert (y.part, y.backward) == ("fully connected", True)
    (exchange,) = program.collectives
    assert (exchange.opcode, exchange.bytes) == ("all-reduce", 40)
    assert exchange.behind == [first, scaled]
    assert program.by_part()["LRN"] == {"kernels": 1, "bytes": 384, "flops": 0}


@pytest.fixture(scope="module")
def compiler():
    """Compile for an H200 as users do, or skip."""
    if reason := gpu_plan.missing():
        pytest.skip(reason)
    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    jax.config.update(name, False)
    yield
    jax.config.update(name, before)


def plan(*setting, mode=""):
    case = gpu_plan.Case("train", Setting(*setting), mode)
    return gpu_plan.record(gpu_plan.lower(case), case.setting.precision)


def test_a_sum_and_a_product_are_counted(compiler):
    (device,) = gpu_plan.devices(1)
    sharding = jax.sharding.SingleDeviceSharding(device)
    x = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16, sharding=sharding)
    found = gpu_plan.record(jax.jit(lambda x, y: x + y).lower(x, x), "bfloat16")
    assert (found["kernels"], found["bytes"], found["flops"]) == (1, 3 * 512 * 512 * 2, 0)
    found = gpu_plan.record(jax.jit(lambda x, y: x @ y).lower(x, x), "bfloat16")
    assert found["flops"] == 2 * 512**3
    assert found["lower_bound_ms"] >= max(found["memory_ms"], found["products_ms"])
    assert "| product | " in gpu_plan.tables({"product": found})


def test_bytes_of_a_training_step_do_not_grow(compiler):
    found = plan(128, "bfloat16")
    assert found["parts"]["LRN"]["bytes"] < 1.25e9
    assert found["parts"]["pooling"]["bytes"] < 0.38e9
    assert found["bytes"] < 4.6e9
    assert found["temporary_bytes"] < 0.5e9
    assert found["flops"] == pytest.approx(128 * 2 * 2.07e9, rel=0.02)


@pytest.mark.slow
def test_memory_of_a_large_batch_does_not_grow(compiler):
    found = plan(1024, "bfloat16")
    assert found["bytes"] < 22.5e9
    assert found["temporary_bytes"] < 2.9e9


@pytest.mark.slow
def test_largest_exchanges_overlap_the_backward_pass(compiler):
    fc7, fc6, others = plan(128, "bfloat16", mode="data")["exchanges"]
    assert [round(one["bytes"] / 4) for one in (fc7, fc6)] == [4096 * 4096, 9216 * 4096]
    assert fc6["backward_convolutions_behind"] >= 5
    assert others["bytes"] < fc7["bytes"]


def test_measurements_stand_beside_the_plan(tmp_path):
    programs = json.loads(gpu.PLAN_RESULT.read_text())["programs"]
    assert set(map(str, gpu_plan.CASES)) == set(programs)
    rates = [4.0e4, 6.0e4, 5.0e4]
    folder = tmp_path / "speed.train_step-precision-bfloat16"
    folder.mkdir()
    setting = {"batch": 128, "precision": "bfloat16", "images_per_second": {"ours": rates}}
    (folder / "train_step.json").write_text(json.dumps({"settings": [setting]}))
    ((case, measured, bound),) = gpu.beside_the_plan(tmp_path)
    assert case in programs
    assert float(measured) == pytest.approx(128 / statistics.median(rates) * 1e3)
    assert 0 < float(bound) < float(measured)
