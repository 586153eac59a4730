"""Everything that is measured on a GPU, by one command in at most nine minutes.

    python -m benchmarks.speed.gpu --out=DIR [--short] [--minutes N]

Needs JAX for the GPU, and torch for the GPU for the comparisons. Each benchmark runs in
its own process and leaves its files in DIR; DIR/gpu.json and .md list the outcomes. When
the time is up, the running one is stopped, with its files kept, and the others are left
out. `--short` runs a little of each, to see that all work. Beside each measured step stands
the lower bound of `benchmarks.speed.gpu_plan`, which was compiled for an H200.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.speed import measure

PLAN_RESULT = Path(__file__).parents[1] / "results/gpu_plan/gpu_plan.json"
# Time for stopping a process and writing the last files.
_RESERVE_SECONDS = 10.0
# Command and most seconds. The important ones come first: the time may run out.
PLAN = (
    ("speed.train_step --precision bfloat16", 200),
    ("speed.operators", 120),
    ("speed.train_step --precision float32 --batch 128", 100),
    ("speed.inference --precision bfloat16", 90),
    ("speed.growth", 120),
    ("speed.train_step --precision tensorfloat32 --batch 128", 100),
    ("reliability.repeats", 100),
    ("speed.start_up --short", 60),
    ("speed.train_step --precision float32 --batch 1024", 100),
    ("speed.inference --precision float32", 90),
)
_MODULES = dict.fromkeys(words.split()[0] for words, _ in PLAN)
SHORT_PLAN = tuple((f"{module} --short", 100) for module in _MODULES)


def run(plan: tuple[tuple[str, float], ...], out: Path, budget: float) -> list[dict[str, Any]]:
    """Run the commands one after the other until `budget` seconds are over.

    Returns:
      Per command "done", "failed (STATUS)", "stopped" or "left out", and its seconds.
    """
    end = time.monotonic() + budget - _RESERVE_SECONDS
    found = []
    for words, most in plan:
        began = time.monotonic()
        result = "left out"
        if began < end:
            module, *arguments = words.split()
            folder = out / "-".join(words.replace("--", "").split())
            command = [sys.executable, "-m", f"benchmarks.{module}", f"--out={folder}"]
            process = subprocess.Popen([*command, *arguments], start_new_session=True)
            try:
                status = process.wait(min(most, end - began))
                result = f"failed ({status})" if status else "done"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)  # with torch's compile workers
                process.wait()
                result = "stopped"
        seconds = time.monotonic() - began
        found.append({"command": words, "result": result, "seconds": seconds})
    return found


def beside_the_plan(out: Path) -> list[list[str]]:
    """Return rows of setting, measured milliseconds per step, and the plan's lower bound."""
    programs = json.loads(PLAN_RESULT.read_text())["programs"]
    found = []
    for name, kind in (("train_step", "train"), ("inference", "apply")):
        for file in sorted(out.glob(f"*/{name}.json")):
            for setting in json.loads(file.read_text())["settings"]:
                batch = setting["batch"]
                case = f"{kind}, {setting['precision']}, batch {batch:,}"
                rate = statistics.median(setting["images_per_second"]["ours"])
                bound = programs.get(case, {}).get("lower_bound_ms")
                planned = f"{bound:.2f}" if bound else ""
                found.append([case, f"{batch / rate * 1e3:.2f}", planned])
    return found


def backend() -> str:
    """Return JAX's default backend."""
    import jax

    return jax.default_backend()


def main() -> None:
    parser = measure.command_line(__doc__)
    parser.add_argument("--minutes", type=float, default=9.0, help="in all; 9")
    chosen = parser.parse_args()
    # In a process that ends: a CUDA context kept here would hold memory.
    if measure.in_fresh_process(backend) != "gpu":
        raise SystemExit(
            "benchmarks.speed.gpu: JAX finds no GPU here. With one, `pip install "
            '"jax[cuda13]"`; without, run the benchmarks one by one (`python -m '
            "benchmarks.speed.train_step --out=DIR`) or `make bench`."
        )
    plan = SHORT_PLAN if chosen.short else PLAN
    found = run(plan, chosen.out, 60 * chosen.minutes)
    rows = [[o["command"], o["result"], f"{o['seconds']:,.0f}"] for o in found]
    table = measure.markdown_table(["benchmark", "result", "seconds"], rows)
    header = ["step", "measured ms", "lower bound ms, compiled for an H200"]
    table += f"\n\n{measure.markdown_table(header, beside_the_plan(chosen.out))}"
    measure.write_result(chosen.out, "gpu", {"sections": found}, table=table)
    if any(outcome["result"].startswith("failed") for outcome in found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
