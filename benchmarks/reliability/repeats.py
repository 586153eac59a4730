"""Check that training repeats bit for bit: the same steps in fresh processes.

    python -m benchmarks.reliability.repeats --out=DIR [--short]

Trains the paper's network with augmentation and dropout from one seed on one device. On a
GPU also with XLA's deterministic kernels (XLA_FLAGS=--xla_gpu_deterministic_ops=true).
"""

import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.speed import measure
from benchmarks.speed.gpu import backend
from benchmarks.speed.measure import Setting

DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


def parameters(setting: Setting, flags: str) -> dict[str, np.ndarray]:
    """Return the parameters after `setting.steps` updates; call it in a fresh process."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    import jax

    from alexnet_jax.data import augment
    from benchmarks.speed import jax_alexnet

    augmentation = augment.Augmentation(jax_alexnet.CROP)
    step = jax_alexnet.training_step(setting, augmentation)
    state = step.state
    with jax_alexnet.precision(setting):
        for _ in range(setting.steps):
            state, _ = step.function(state, step.batch, step.statistics)
    leaves = jax.tree_util.tree_flatten_with_path(jax.device_get(state.params))[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def compare(runs: Sequence[dict[str, np.ndarray]]) -> dict[str, Any]:
    """Compare the runs after the first with the first.

    Returns:
      "equal": True if all have the same bits; "difference": the largest
      |a - b| / |b| (norms) of any parameter of any run.
    """
    first, *others = runs
    equal = all(np.array_equal(run[name], array) for run in others for name, array in first.items())
    differences = [
        float(np.linalg.norm(run[name] - array) / np.linalg.norm(array))
        for run in others
        for name, array in first.items()
    ]
    return {"equal": equal, "difference": max(differences)}


def plan(on_gpu: bool, short: bool) -> list[tuple[Setting, str]]:
    """Return the settings to repeat, each with XLA flags."""
    width = 1.0 if on_gpu and not short else 0.25
    batch, steps = 128 if on_gpu else 16, 2 if short else 20
    kinds = ["float32"] if short and not on_gpu else ["float32", "bfloat16"]
    kinds += ["tensorfloat32"] if on_gpu else []
    flags = ("", DETERMINISTIC) if on_gpu else ("",)
    return [(Setting(batch, kind, width, steps), flag) for kind in kinds for flag in flags]


def main() -> None:
    """Repeat every setting and write the results."""
    options = measure.command_line(__doc__).parse_args()
    # In a process of its own: this one must not take the GPU's memory.
    on_gpu = measure.in_fresh_process(backend) == "gpu"
    count = 2 if options.short else 3
    found, rows = [], []
    for setting, flags in plan(on_gpu, options.short):
        name = f"{setting} {flags}".strip()
        print(f"{name} ...", file=sys.stderr, flush=True)
        runs = [measure.in_fresh_process(parameters, setting, flags) for _ in range(count)]
        same = compare(runs)
        about = {"setting": str(setting), "flags": flags, "steps": setting.steps}
        found.append({**about, "processes": count, **same})
        bits, difference = "yes" if same["equal"] else "no", f"{same['difference']:.1e}"
        rows.append([name, str(setting.steps), str(count), bits, difference])
    header = ["setting", "steps", "processes", "same bits", "largest difference"]
    table = measure.markdown_table(header, rows)
    measure.write_result(options.out, "repeats", {"found": found}, table=table)


if __name__ == "__main__":
    main()
