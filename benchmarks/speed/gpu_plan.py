"""Compile training and inference for an H200, on a machine without a GPU, and count bytes.

    pip install -e '.[gpu-plan]'        # Python 3.12 or newer; no driver and no GPU needed
    python -m benchmarks.speed.gpu_plan --out=DIR [--short] [--only=WORD]

JAX's CUDA plug-in builds a topology of devices that are not there. XLA runs all of its
passes down to the binary, and the optimised program tells kernels, bytes, products, memory
and collectives. Nothing runs and nothing is tuned by timing. The milliseconds are lower bounds
from bandwidth and arithmetic, if every kernel reads from memory and not from a cache. They
are compiled for an H200, not measured on one.
"""

import importlib.metadata
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from alexnet_jax.data import augment
from alexnet_jax.models import ops
from alexnet_jax.training import optim, parallel, steps
from benchmarks.speed import hlo, jax_alexnet, measure
from benchmarks.speed.measure import Setting

# NVIDIA's figures for the H200 SXM. XLA's cost model and tiling read them.
H200 = """
gpu_device_info {
  name: "NVIDIA H200" device_vendor: "NVIDIA Corporation"
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 l2_cache_size: 52428800
  memory_bandwidth: 4800000000000 device_memory_size: 151397597184
  device_address_bits: 64 pcie_bandwidth: 34359738368 ecc_enabled: true
  driver_version: "13.0.0" runtime_version: "13.0.0" dnn_version: "9.10.0"
  compile_time_toolkit_version: "13.0.0"
  device_interconnect_info { active_links: 18 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200"
"""
BANDWIDTH = 4.8e12  # bytes per second
FLOP_RATE = {"bfloat16": 989e12, "tensorfloat32": 494e12, "float32": 67e12}  # per second
COMPILERS = ("jax-cuda13-plugin", "nvidia-cuda-nvcc")
IMAGE_SIZE = 256


@dataclass(frozen=True)
class Case:
    """A program: "train" on one device or on two in a mode, or "apply" (inference).

    `plain`: with the plain operators (`fast=False`) instead of those for a GPU.
    """

    kind: str
    setting: Setting
    mode: str = ""
    plain: bool = False

    def __str__(self) -> str:
        where = self.mode and f", {self.mode} on 2 devices"
        return f"{self.kind}, {self.setting}{where}{', plain operators' if self.plain else ''}"


CASES = (
    *(Case("train", Setting(batch, "bfloat16"), plain=True) for batch in (128, 1024)),
    *(
        Case("train", Setting(batch, precision))
        for precision in ("bfloat16", "float32", "tensorfloat32")
        for batch in (128, 1024)
    ),
    *(
        Case("train", Setting(batch, "bfloat16"), mode)
        for mode in parallel.MODES
        for batch in (128, 1024)
    ),
    *(
        Case("apply", Setting(batch, precision))
        for precision in ("bfloat16", "float32")
        for batch in (128, 1024)
    ),
)
SHORT = (Case("train", Setting(8, "bfloat16", width=1 / 16)),)


def missing() -> str:
    """Return why nothing can be compiled for a GPU here, or ""."""
    try:
        devices(1)
    except Exception as error:  # noqa: BLE001 - of whatever kind, by version and platform
        return (
            f"JAX cannot compile for a GPU here ({type(error).__name__}: {error}). Install "
            "the plug-in with `pip install -e '.[gpu-plan]'` on Linux, Python 3.12 or newer."
        )
    return ""


def devices(count: int) -> list[Any]:
    """Return H200s of one host that are not there."""
    found = topologies.get_topology_desc(
        platform="cuda",
        topology_name="h200",
        topology=f"1x1x{count}",  # slices x hosts x devices; fails without
        target_config=H200,
    )
    return list(found.devices)


def lower(case: Case) -> Any:
    """Return the lowered program of a case."""
    with ops.compiling_for("gpu"), jax_alexnet.precision(case.setting):
        return _lower_train(case) if case.kind == "train" else _lower_apply(case)


def _lower_train(case: Case) -> Any:
    """Lower the training step, with the paper's augmentation."""
    setting, mode = case.setting, case.mode or "data"
    shape = {"": (1, 1), "data": (2, 1)}.get(case.mode, (1, 2))
    mesh = Mesh(
        np.array(devices(shape[0] * shape[1])).reshape(shape),
        (parallel.DATA, parallel.COLUMN),
        axis_types=(AxisType.Auto, AxisType.Auto),
    )
    augmentation = augment.Augmentation(crop_size=jax_alexnet.CROP)
    model = jax_alexnet.network(setting).clone(fast=not case.plain)
    tx = optim.make_optimizer(0.01)
    spec = steps.StepSpec(model, tx, augmentation, mesh, mode)
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ([spec.batch_axes], []))
    images = (setting.batch, IMAGE_SIZE, IMAGE_SIZE, 3)
    batch = {
        "image": jax.ShapeDtypeStruct(images, jnp.uint8, sharding=split),
        "label": jax.ShapeDtypeStruct(images[:1], jnp.int32, sharding=split),
    }
    statistics = jax.eval_shape(lambda: augment.imagenet_statistics(IMAGE_SIZE))
    state = steps.abstract_state(spec)
    return steps.make_train_step(spec).lower(state, batch, _on(whole, statistics))


def _lower_apply(case: Case) -> Any:
    """Lower the program that `benchmarks.speed.inference` times."""
    whole = NamedSharding(Mesh(np.array(devices(1)), ("x",)), PartitionSpec())
    model = jax_alexnet.network(case.setting)
    image = (jax_alexnet.CROP, jax_alexnet.CROP, 3)
    raw = jax.ShapeDtypeStruct((case.setting.batch, *image), jnp.uint8)
    mean = jax.ShapeDtypeStruct(image, jnp.float32)
    example = jax.ShapeDtypeStruct((1, *image), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), example)
    arguments = (_on(whole, tree) for tree in (variables, raw, mean))
    return ops.jit(jax_alexnet.logits_of(model)).lower(*arguments)


def _on(sharding: NamedSharding, tree: Any) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)


def record(lowered: Any, precision: str) -> dict[str, Any]:
    """Compile a lowered program and return its figures, for JSON."""
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    program, memory = hlo.read(compiled.as_text()), compiled.memory_analysis()
    rate = FLOP_RATE[precision]
    largest = sorted(program.kernels, key=lambda kernel: -kernel.bytes)[:20]
    return {
        "kernels": len(program.kernels),
        "library_calls": sum(bool(kernel.call) for kernel in program.kernels),
        "bytes": program.bytes,
        "flops": program.flops,
        "memory_ms": program.bytes / BANDWIDTH * 1e3,
        "products_ms": program.flops / rate * 1e3,
        # Each kernel takes the longer of the two.
        "lower_bound_ms": sum(max(k.bytes / BANDWIDTH, k.flops / rate) for k in program.kernels)
        * 1e3,
        "temporary_bytes": memory.temp_size_in_bytes,
        "parts": program.by_part(),
        "exchanges": [_exchange(collective) for collective in program.collectives],
        "largest_kernels": [asdict(kernel) for kernel in largest],
        "compile_seconds": seconds,
    }


def _exchange(collective: hlo.Collective) -> dict[str, Any]:
    """Return a collective, with the kernels that run while it does."""
    behind = collective.behind
    return {
        "opcode": collective.opcode,
        "bytes": collective.bytes,
        "kernels_behind": len(behind),
        "memory_ms_behind": sum(kernel.bytes for kernel in behind) / BANDWIDTH * 1e3,
        "backward_convolutions_behind": sum(k.backward and "conv" in k.call for k in behind),
    }


def tables(records: dict[str, dict[str, Any]]) -> str:
    """Return the programs' figures, their bytes by part and their exchanges, in Markdown."""
    header = ["compiled for an H200", "kernels", "GB moved", "memory ms", "products ms"]
    header += ["lower bound ms", "temporary GB"]
    programs = [
        [
            name,
            str(row["kernels"]),
            f"{row['bytes'] / 1e9:.2f}",
            *(f"{row[f'{kind}_ms']:.2f}" for kind in ("memory", "products", "lower_bound")),
            f"{row['temporary_bytes'] / 1e9:.2f}",
        ]
        for name, row in records.items()
    ]
    found = [measure.markdown_table(header, programs)]
    names = sorted({part for row in records.values() for part in row["parts"]})
    by_part = [
        [name, *(f"{row['parts'].get(part, {'bytes': 0})['bytes'] / 1e6:,.0f}" for part in names)]
        for name, row in records.items()
    ]
    found.append(measure.markdown_table(["megabytes moved, compiled for an H200", *names], by_part))
    header = ["exchange, compiled for two H200s", "", "MB", "kernels behind it", "their memory ms"]
    header.append("backward convolutions behind it")
    exchanges = [
        [
            name,
            one["opcode"],
            f"{one['bytes'] / 1e6:,.1f}",
            str(one["kernels_behind"]),
            f"{one['memory_ms_behind']:.3f}",
            str(one["backward_convolutions_behind"]),
        ]
        for name, row in records.items()
        for one in row["exchanges"]
    ]
    if exchanges:
        found.append(measure.markdown_table(header, exchanges))
    return "\n\n".join(found)


def main() -> None:
    parser = measure.command_line(__doc__)
    parser.add_argument("--only", default="", metavar="WORD", help='for example "columns"')
    chosen = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # for constants
    if reason := missing():
        raise SystemExit(f"benchmarks.speed.gpu_plan: {reason}")
    records = {}
    for case in SHORT if chosen.short else CASES:
        if chosen.only in str(case):
            print(f"{case} ...", file=sys.stderr, flush=True)
            records[str(case)] = record(lower(case), case.setting.precision)
    compilers = {name: importlib.metadata.version(name) for name in COMPILERS}
    words = ", ".join(f"{name} {version}" for name, version in compilers.items())
    measure.write_result(
        chosen.out,
        "gpu_plan",
        {"compiled_for": "NVIDIA H200", "compilers": compilers, "programs": records},
        table=f"Compiled for an NVIDIA H200 by {words}. Nothing ran.\n\n{tables(records)}",
    )


if __name__ == "__main__":
    main()
