"""Time candidates side by side in one run, beside the machine's limits.

Each benchmark is `python -m benchmarks.speed.NAME --out=DIR [--short]` and writes
DIR/NAME.{json,md,png}. The candidates are called in turn, so that other work on the
machine slows all of them alike. torch is optional; if it is installed, the limits are
the better of JAX's and torch's.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from alexnet_jax.system import machine as machine_lib

markdown_table = machine_lib.markdown_table

# Sides of the square matrices of `gemm_rate`, and bytes of `copy_bandwidth`'s array:
# far beyond the caches, and a second or less a call.
_GEMM_SIDE = {"cpu": 3072, "gpu": 8192}
_COPY_BYTES = {"cpu": 2**28, "gpu": 2**31}


@dataclass(frozen=True)
class Setting:
    """Batch, precision and width that a network is measured at.

    Attributes:
      batch: images per step.
      precision: "float32", "tensorfloat32" or "bfloat16", as in `gemm_rate`; with
        bfloat16 the parameters stay float32.
      width: factor on the features of every layer but the classifier.
      steps: so many steps, one after the other, are one timed call; a GPU is waited
        for at the end of the call only.
    """

    batch: int = 128
    precision: str = "float32"
    width: float = 1.0
    steps: int = 1

    def __str__(self) -> str:
        width = f", width {self.width:g}" if self.width != 1 else ""
        return f"{self.precision}, batch {self.batch:,}{width}"

    def images_per_second(self, seconds: Sequence[float]) -> list[float]:
        """Return the rates of timed calls."""
        return [self.batch * self.steps / s for s in seconds]


def command_line(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with the two options of every benchmark; call it before JAX starts."""
    # On a GPU JAX would reserve three quarters of the memory, and torch has to fit beside it.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--short", action="store_true", help="few rounds: does it run?")
    return parser


def alternate(
    candidates: Mapping[str, Callable[[], Any]], *, rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Call the candidates in turn and return the seconds of each call, by name.

    Args:
      candidates: a call returns only when its work is done (it waits for the devices).
      rounds: each calls every candidate once, in the opposite order of the round
        before, so that none always comes after the same other one.
      warmup: untimed calls of each candidate before the first round.
    """
    for _ in range(warmup):
        for call in candidates.values():
            call()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for i in range(rounds):
        names = list(candidates)
        for name in names[::-1] if i % 2 else names:
            start = time.perf_counter()
            candidates[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: Mapping[str, Sequence[float]], ours: str, peer: str) -> dict[str, float]:
    """Return median, min and max over the rounds of peer / ours; above 1, ours is faster."""
    found = [p / o for o, p in zip(seconds[ours], seconds[peer], strict=True)]
    return {"median": statistics.median(found), "min": min(found), "max": max(found)}


def spread(values: Iterable[float], form: str) -> str:
    """Return "median (least to most)", each number in the format `form`."""
    found = list(values)
    middle, least, most = statistics.median(found), min(found), max(found)
    return f"{middle:{form}} ({least:{form}} to {most:{form}})"


def milliseconds(seconds: Sequence[float]) -> str:
    """Return the median in milliseconds."""
    return f"{statistics.median(seconds) * 1e3:,.2f}"


def gemm_rate(dtype: str = "float32", *, repeats: int = 5) -> float:
    """Return the rate of a large square matrix product, the better of JAX's and torch's.

    Args:
      dtype: "float32", "bfloat16", or "tensorfloat32", which on a GPU is float32
        whose products are rounded to 10 bits (a CPU has no such thing).
      repeats: timed calls; the fastest counts.

    Returns:
      Floating-point operations per second, 2 for each multiply-add.
    """
    import jax
    import jax.numpy as jnp

    side = _GEMM_SIDE[jax.default_backend()]
    stored = "float32" if dtype == "tensorfloat32" else dtype
    precision = {"float32": "highest", "tensorfloat32": "tensorfloat32"}.get(dtype)
    a = jax.random.normal(jax.random.key(0), (side, side), jnp.dtype(stored))
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=precision))
    calls = [lambda: product(a, a).block_until_ready()]
    torch, device = _torch()
    if torch:
        torch.backends.cuda.matmul.allow_tf32 = dtype == "tensorfloat32"
        b = torch.randn(side, side, device=device).to(getattr(torch, stored))
        calls.append(lambda: _finished(torch, b @ b))
    return 2 * side**3 / _fastest(calls, repeats)


def copy_bandwidth(*, repeats: int = 5) -> float:
    """Return the bytes per second, read and written, of copying a large array.

    The best of JAX, torch and NumPy; one that writes over an array of its own needs
    no new memory, which on a CPU counts.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    count = _COPY_BYTES[jax.default_backend()] // 4
    x = jnp.ones(count, jnp.float32)
    scale = jax.jit(lambda x: 2.0 * x)
    calls = [lambda: scale(x).block_until_ready()]
    if jax.default_backend() == "cpu":
        source, target = np.ones(count, np.float32), np.empty(count, np.float32)
        calls.append(lambda: np.copyto(target, source))
    torch, device = _torch()
    if torch:
        a = torch.ones(count, device=device)
        b = torch.empty_like(a)
        calls.append(lambda: _finished(torch, b.copy_(a)))
    return 2 * 4 * count / _fastest(calls, repeats)


def _fastest(calls: Sequence[Callable[[], Any]], repeats: int) -> float:
    return min(min(alternate({"": call}, rounds=repeats)[""]) for call in calls)


def _torch() -> tuple[Any, str]:
    """Return torch, or None without it, and its name of JAX's device."""
    import jax

    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    try:
        import torch
    except ImportError:
        return None, device
    return (torch if device == "cpu" or torch.cuda.is_available() else None), device


def _finished(torch: Any, value: Any) -> Any:
    if value.is_cuda:
        torch.cuda.synchronize()
    return value


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """Return a module-level function's result from a process that has done nothing yet.

    The process imports the function's module, and the one that runs as `__main__`.
    """
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def machine() -> dict[str, Any]:
    """Return where a result was measured, and by which command."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"python -m {spec.name if spec else 'benchmarks'}"
    found = machine_lib.machine(f"{program} {machine_lib.without_paths(sys.argv[1:])}")
    if (jax := sys.modules.get("jax")) and jax.default_backend() != "cpu":
        found["gpu"] = jax.devices()[0].device_kind
    return found


def write_result(
    out: Path, name: str, record: dict[str, Any], *, table: str, figure: Figure | None = None
) -> None:
    """Write out/name.json (with `machine`), .md and .png, and print the table."""
    out.mkdir(parents=True, exist_ok=True)
    about = machine()
    text = json.dumps({"machine": about, **record}, indent=1)
    (out / f"{name}.json").write_text(text + "\n")
    page = (
        f"# {name} ({about['date']})\n\n    {about['command']}\n\n"
        f"{machine_lib.in_words(about)}\n\n{table}\n"
    )
    (out / f"{name}.md").write_text(page)
    if figure is not None:
        figure.savefig(out / f"{name}.png", dpi=110)
    print(page)


@dataclass(frozen=True)
class Bars:
    """A chart of horizontal bars, the first candidate on top.

    Attributes:
      rates: samples by name; a bar is their median, its whiskers least and most.
      ceiling: a dashed line at this rate, named `ceiling_name`.
    """

    title: str
    unit: str
    rates: Mapping[str, Sequence[float]]
    ceiling: float | None = None
    ceiling_name: str = "ceiling"

    def draw(self, axes: Axes) -> None:
        medians = [statistics.median(samples) for samples in self.rates.values()]
        below = [m - min(s) for m, s in zip(medians, self.rates.values(), strict=True)]
        above = [max(s) - m for m, s in zip(medians, self.rates.values(), strict=True)]
        colours = ["C0" if name.startswith("ours") else "0.6" for name in self.rates]
        axes.barh(list(self.rates), medians, xerr=[below, above], color=colours, capsize=3)
        for i, median in enumerate(medians):
            axes.text(0, i, f" {median:,.4g}", va="center")
        if self.ceiling is not None:
            axes.axvline(self.ceiling, color="C3", linestyle="--", label=self.ceiling_name)
            axes.legend(loc="lower right", bbox_to_anchor=(1, 1))
        axes.invert_yaxis()
        axes.set_xlabel(self.unit)
        axes.set_title(self.title, loc="left")  # the legend is on the right


def bar_charts(charts: Sequence[Bars]) -> Figure:
    """Return a figure of charts, one below the other."""
    heights = [1.2 + 0.35 * len(chart.rates) for chart in charts]
    figure = Figure(figsize=(9, sum(heights)), layout="constrained")
    panels = figure.subplots(len(charts), squeeze=False, gridspec_kw={"height_ratios": heights})
    for chart, axes in zip(charts, panels[:, 0], strict=True):
        chart.draw(axes)
    return figure
