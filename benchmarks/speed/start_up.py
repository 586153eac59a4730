"""Time of imports and of the first training step, and the paper's memory per device.

    python -m benchmarks.speed.start_up --out=DIR [--short]

The first step is the full network's at batch 128, without and with JAX's persistent
compile cache; each in fresh processes. The memory is the compiler's plan for a batch of
128 in two columns on two virtual CPU devices, as `main --mode=describe` has it.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks.speed import measure
from benchmarks.speed.measure import Setting

IMPORTS = (
    "import alexnet_jax",
    "from alexnet_jax import create_model",
    "import alexnet_jax.training.loop",
    "import torch",  # for comparison
)


def seconds_of(statement: str, repeats: int) -> list[float]:
    """Return the seconds of a statement in fresh processes, without Python's own start.

    The first process, which fills the file caches, is not counted. Empty if the
    statement fails.
    """
    code = (
        f"import time; start = time.perf_counter()\n{statement}\nprint(time.perf_counter() - start)"
    )
    command = [sys.executable, "-c", code]
    found = []
    for _ in range(repeats + 1):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return []
        found.append(float(done.stdout.split()[-1]))
    return found[1:]


def first_step(batch: int, cache: str) -> dict[str, float]:
    """Return the seconds of tracing, compiling and running the first step.

    Args:
      cache: the folder of JAX's persistent compile cache; empty: none.
    """
    import jax

    if cache:
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    from benchmarks.speed import jax_alexnet

    step = jax_alexnet.training_step(Setting(batch))
    jax.block_until_ready(step.state)
    start = time.perf_counter()
    lowered = step.function.lower(*step[1:])
    traced = time.perf_counter()
    compiled = lowered.compile()
    ready = time.perf_counter()
    jax.block_until_ready(compiled(*step[1:]))
    return {
        "trace": traced - start,
        "compile": ready - traced,
        "first step": time.perf_counter() - ready,
    }


def two_columns_bytes(batch: int) -> int:
    """Return the memory of one of two devices with a column each."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    from alexnet_jax.training import describe, experiment
    from configs import common

    config: Any = common.get_config()
    config.data.batch_size = batch
    network = experiment.make_model(config, None)
    return describe.summarize_mode(config, network, "columns", 1, 2).memory_bytes


def table(record: dict[str, Any]) -> str:
    imports = [
        [f"`{statement}`", measure.spread(seconds, ".2f")]
        for statement, seconds in record["import_seconds"].items()
    ]
    starts = []
    for how, found in record["first_step_seconds"].items():
        trace, compile_, step = (
            f"{statistics.median(f[k] for f in found):.2f}"
            for k in ("trace", "compile", "first step")
        )
        both = measure.spread((f["trace"] + f["compile"] for f in found), ".2f")
        starts.append([how, trace, compile_, both, step])
    header = ["first training step", "trace s", "compile s", "both", "the step s"]
    import_table = measure.markdown_table(["in a fresh process", "seconds (spread)"], imports)
    return (
        f"{import_table}\n\n{measure.markdown_table(header, starts)}\n\n"
        f"A training step of {record['batch']} images in two columns needs "
        f"{record['two_columns_bytes'] / 1e9:.2f} GB on each of its two devices (the "
        "compiler's plan)."
    )


def main() -> None:
    chosen = measure.command_line(__doc__).parse_args()
    repeats, batch = (1, 16) if chosen.short else (5, 128)
    imports = {statement: seconds_of(statement, repeats) for statement in IMPORTS}
    first_steps = {}
    with tempfile.TemporaryDirectory() as cache:
        measure.in_fresh_process(first_step, batch, cache)  # fills it
        for how, folder in (("cold", ""), ("from the cache", cache)):
            first_steps[how] = [
                measure.in_fresh_process(first_step, batch, folder) for _ in range(repeats)
            ]
    record = {
        "batch": batch,
        "import_seconds": {k: v for k, v in imports.items() if v},
        "first_step_seconds": first_steps,
        "two_columns_bytes": measure.in_fresh_process(two_columns_bytes, batch),
    }
    bars = {k if "torch" in k else f"ours: {k}": v for k, v in record["import_seconds"].items()}
    for how, found in first_steps.items():
        bars[f"ours: first step, {how}"] = [f["trace"] + f["compile"] for f in found]
    figure = measure.bar_charts([measure.Bars("Start-up", "seconds", bars)])
    measure.write_result(chosen.out, "start_up", record, table=table(record), figure=figure)


if __name__ == "__main__":
    main()
