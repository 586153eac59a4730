"""How long a start takes, and how much memory the paper's batch needs a device.

    python -m benchmarks.speed.start_up --out=DIR [--short]

Importing, and the full network's first training step at batch 128, with nothing kept
and from JAX's persistent compile cache; each in fresh processes. The memory is the
compiler's plan for a batch of 128 in two columns on two virtual CPU devices, as
`main --mode=describe` has it.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from matplotlib.figure import Figure

from benchmarks.speed import measure
from benchmarks.speed.measure import Setting

REPEATS = {"short": 1, "long": 5}
IMPORTS = (
    "import alexnet_jax",
    "from alexnet_jax import create_model",
    "import alexnet_jax.training.loop",
    "import torch",  # for comparison
)


def seconds_of(statement: str, repeats: int) -> list[float]:
    """Seconds of a statement in fresh processes, without the interpreter's start.

    The first process, which fills the file caches, is not counted. Empty where the
    statement fails.
    """
    code = (
        f"import time; start = time.perf_counter()\n{statement}\nprint(time.perf_counter() - start)"
    )
    found = []
    for _ in range(repeats + 1):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )
        if done.returncode:
            return []
        found.append(float(done.stdout.split()[-1]))
    return found[1:]


def first_step(batch: int, cache: str) -> dict[str, float]:
    """Seconds until the first step is compiled, and of the step itself after that.

    Args:
      batch: images.
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
    """Memory of one of two devices, a column each."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    from alexnet_jax.training import describe, experiment
    from configs import common

    config: Any = common.get_config()
    config.data.batch_size = batch
    network = experiment.make_model(config, None)
    return describe.summarize_mode(config, network, "columns", 1, 2).memory_bytes


def steps(batch: int, repeats: int) -> dict[str, list[dict[str, float]]]:
    """`first_step` with nothing kept, and from a cache that an earlier start filled."""
    cold = [measure.in_fresh_process(first_step, batch, "") for _ in range(repeats)]
    with tempfile.TemporaryDirectory() as cache:
        measure.in_fresh_process(first_step, batch, cache)
        warm = [measure.in_fresh_process(first_step, batch, cache) for _ in range(repeats)]
    return {"cold": cold, "from the cache": warm}


def table(record: dict[str, Any]) -> str:
    """Imports, compile times, memory."""
    imports = [
        [f"`{statement}`", f"{statistics.median(s):.2f}", f"{min(s):.2f} to {max(s):.2f}"]
        for statement, s in record["import_seconds"].items()
    ]
    starts = []
    for how, found in record["first_step_seconds"].items():
        middle = {k: statistics.median(f[k] for f in found) for k in found[0]}
        both = [f["trace"] + f["compile"] for f in found]
        spread = f"({min(both):.2f} to {max(both):.2f})"
        starts.append(
            [
                how,
                f"{middle['trace']:.2f}",
                f"{middle['compile']:.2f}",
                f"**{statistics.median(both):.2f}** {spread}",
                f"{middle['first step']:.2f}",
            ]
        )
    sentence = (
        f"A training step of {record['batch']} images in two columns needs "
        f"{record['two_columns_bytes'] / 1e9:.2f} GB on each of its two devices (the "
        "compiler's plan)."
    )
    return "\n\n".join(
        [
            measure.markdown_table(["in a fresh process", "seconds", "spread"], imports),
            measure.markdown_table(
                ["first training step", "trace s", "compile s", "both", "the step s"], starts
            ),
            sentence,
        ]
    )


def chart(record: dict[str, Any]) -> Figure:
    """Bars of seconds."""
    bars: dict[str, list[float]] = dict(record["import_seconds"])
    for how, found in record["first_step_seconds"].items():
        bars[f"first step, {how}"] = [f["trace"] + f["compile"] for f in found]
    named = {k if k == "import torch" else f"ours: {k}": v for k, v in bars.items()}
    return measure.bar_chart(named, title="Start-up", unit="seconds")


def main() -> None:
    chosen = measure.command_line(__doc__).parse_args()
    repeats = REPEATS["short" if chosen.short else "long"]
    batch = 16 if chosen.short else 128
    imports = {statement: seconds_of(statement, repeats) for statement in IMPORTS}
    record = {
        "batch": batch,
        "import_seconds": {k: v for k, v in imports.items() if v},
        "first_step_seconds": steps(batch, repeats),
        "two_columns_bytes": measure.in_fresh_process(two_columns_bytes, batch),
    }
    measure.write_result(chosen.out, "start_up", record, table=table(record), figure=chart(record))


if __name__ == "__main__":
    main()
