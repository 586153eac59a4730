"""Peak memory of a training step, ours and the peer's, measured the same way.

On a CPU each side runs in a fresh process: the peak of the resident memory during a
step, after one that compiled it, minus the memory before the network was made. On a GPU the peer's is `torch.cuda.max_memory_allocated` of a step. Ours also has
the compiler's plan, which on a GPU is the number to put beside it.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.speed import measure
from benchmarks.speed.measure import Setting

PLAN = "ours, the compiler's plan"
RESIDENT = "growth of the process's peak resident memory"
ALLOCATED = "torch.cuda.max_memory_allocated"


def of_training(
    setting: Setting, ours: Any, form: Any, peer: Callable[[], Any] | None
) -> dict[str, float]:
    """Return the bytes at the fullest of a step, by how they were measured.

    Args:
      ours: the `jax_alexnet.Trainer`.
      form, peer: the peer's form, for a process of its own, and its call; None
        without torch.
    """
    import jax

    found = {PLAN: float(ours.memory_bytes)}
    if jax.default_backend() == "cpu":
        found[f"ours, {RESIDENT}"] = measure.in_fresh_process(_growth, setting, None)
        if form is not None:
            found[f"{form.name}, {RESIDENT}"] = measure.in_fresh_process(_growth, setting, form)
    elif peer is not None:
        import torch

        torch.cuda.reset_peak_memory_stats()
        peer()
        found[f"{form.name}, {ALLOCATED}"] = float(torch.cuda.max_memory_allocated())
    return found


def _growth(setting: Setting, form: Any) -> float:
    """Return the growth of this process in a step of the peer's form; None: of ours."""
    if form is None:
        import jax.numpy as jnp

        from benchmarks.speed import jax_alexnet

        jnp.zeros(()).block_until_ready()  # the runtime itself is not counted
        make: Callable[[], Any] = partial(jax_alexnet.Trainer, setting)
    else:
        from benchmarks.speed import torch_alexnet

        make = partial(torch_alexnet.trainer, setting, form)
    before = status_bytes("VmRSS")
    call = make()
    call()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    call()
    return status_bytes("VmHWM") - before


def status_bytes(field: str) -> float:
    """Return a size of this process from /proc, such as "VmRSS"."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return 1024.0 * int(line.split()[1])
