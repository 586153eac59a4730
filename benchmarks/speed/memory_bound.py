"""LRN and max pooling, apart and together, on this processor and without AVX-512.

    python -m benchmarks.speed.memory_bound --out=DIR [--short] [--batch N]
        [--before=CHECKOUT]

The layers of the paper's network at batch 64. A gradient is timed by itself, with what the
forward pass has kept. With `--before` another checkout of this project takes turns, in
processes of its own. `XLA_FLAGS=--xla_cpu_max_isa=AVX2` compiles for a processor without
AVX-512.
"""

import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.speed import measure

PROCESSORS = {"as it is": "", "AVX2": "--xla_cpu_max_isa=AVX2"}
# Grid and channels of conv1, conv2 and conv5.
SHAPES = {"1": (55, 96), "2": (27, 256), "5": (13, 256)}
# The worker: compiles every call, then makes all of them for each line that it reads.
_WORKER = """
import inspect, json, sys, time
import jax, jax.numpy as jnp, numpy as np
from alexnet_jax.models import ops

def lrn(x, bias, **pool):
    return ops.local_response_norm(x, bias, relu=True, groups=2, **pool)

def both(x, bias):
    if "pool" in inspect.signature(ops.local_response_norm).parameters:
        return lrn(x, bias, pool={})
    return ops.max_pool(lrn(x, bias))

functions = {"norm": lrn, "pool": lambda x, bias: ops.max_pool(x), "norm and pool": both}
batch, shapes, rng, calls = int(sys.argv[1]), json.loads(sys.argv[2]), np.random.default_rng(0), {}
for number, (side, channels) in shapes.items():
    for kind, function in functions.items():
        if number == "5" and kind != "pool":
            continue
        x = jnp.asarray(60 * rng.standard_normal((batch, side, side, channels), np.float32))
        arguments = x, jnp.ones(channels)
        forward = ops.jit(lambda *a, f=function: jax.vjp(f, *a))
        y, pull = forward(*arguments)
        value = ops.jit(function).lower(*arguments).compile()
        gradient = ops.jit(lambda pull, g: pull(g)).lower(pull, y).compile()
        calls[f"{kind} {number} forward"] = value, arguments
        calls[f"{kind} {number} backward"] = gradient, (pull, y)
for line in sys.stdin:
    seconds = {}
    for name, (compiled, arguments) in calls.items():
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        seconds[name] = time.perf_counter() - start
    print(json.dumps(seconds), flush=True)
"""


def worker(batch: int, checkout: Path | None, flags: str) -> subprocess.Popen[str]:
    """Start a process that times all calls of a checkout, this one if None, per line."""
    command = [sys.executable, "-c", _WORKER, str(batch), json.dumps(SHAPES)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    # Python imports the package of its working directory.
    return subprocess.Popen(command, cwd=checkout, env=os.environ | {"XLA_FLAGS": flags}, **pipes)


def seconds_of(workers: dict[str, subprocess.Popen[str]], rounds: int) -> dict[str, Any]:
    """Return, by worker and call, the seconds of `rounds` rounds after two of warm-up."""
    found: dict[str, Any] = {name: defaultdict(list) for name in workers}
    for i in range(rounds + 2):
        for name, process in workers.items():
            assert process.stdin and process.stdout
            print(file=process.stdin, flush=True)
            for call, seconds in json.loads(process.stdout.readline()).items():
                if i > 1:
                    found[name][call].append(seconds)
    return found


def table(processors: dict[str, dict[str, Any]]) -> str:
    """Return, per processor and layer, the times now and before, and their ratios."""
    header = ["vectors", "layer", "forward ms", "backward ms", "backward / forward"]
    header += ["before: forward ms", "backward ms", "before / now, both passes (spread)"]
    rows = []
    for processor, seconds in processors.items():
        for call, forward in seconds["now"].items():
            layer, _, phase = call.rpartition(" ")
            if phase == "backward":
                continue
            backward = seconds["now"][f"{layer} backward"]
            share = statistics.median(backward) / statistics.median(forward)
            row = [processor, layer, *map(measure.milliseconds, (forward, backward))]
            row.append(f"{share:.1f}")
            if before := seconds.get("before"):
                passes = [before[f"{layer} {name}"] for name in ("forward", "backward")]
                sums = {
                    "now": list(map(sum, zip(forward, backward, strict=True))),
                    "before": list(map(sum, zip(*passes, strict=True))),
                }
                ratio = measure.ratio(sums, "now", "before")
                row += [*map(measure.milliseconds, passes), measure.spread(ratio.values(), ".2f")]
            rows.append(row + [""] * (len(header) - len(row)))
    return measure.markdown_table(header, rows)


def main() -> None:
    parser = measure.command_line(__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--before", type=Path, metavar="CHECKOUT")
    chosen = parser.parse_args()
    found = {}
    for processor, flags in PROCESSORS.items():
        workers = {"now": worker(chosen.batch, None, flags)}
        if chosen.before:
            workers["before"] = worker(chosen.batch, chosen.before, flags)
        found[processor] = seconds_of(workers, 2 if chosen.short else 9)
        for process in workers.values():
            process.communicate()
    record = {"batch": chosen.batch, "seconds": found}
    measure.write_result(chosen.out, "memory_bound", record, table=table(found))


if __name__ == "__main__":
    main()
