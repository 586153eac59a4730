"""How every benchmark measures: candidates side by side in one run, beside ceilings.

Each benchmark is `python -m benchmarks.speed.NAME --out=DIR [--short]` and leaves
DIR/NAME.{json,md,png}. What is compared is called in turn, so that whatever else the
machine does falls on all candidates alike, and the machine's own limits are measured
in the same run. Needs no torch; where it is installed, the ceilings are the better of
JAX's and torch's.
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
    """What a network is measured at.

    Attributes:
      batch: images in a step.
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
        """The rates of timed calls."""
        return [self.batch * self.steps / s for s in seconds]


def command_line(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the two options of every benchmark.

    To be called before JAX starts: on a GPU JAX would reserve three quarters of the
    memory, and torch has to fit beside it.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--short", action="store_true", help="few rounds: does it run?")
    return parser


def alternate(
    candidates: Mapping[str, Callable[[], Any]], *, rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Calls the candidates in turn and times every call.

    Args:
      candidates: by name; a call returns only when its work is done (asynchronous
        devices waited for).
      rounds: each calls every candidate once, in the opposite order of the round
        before, so that none always comes after the same other one.
      warmup: untimed calls of each candidate before the first round.

    Returns:
      Seconds of each call, by name, in the order of the rounds.
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
    """How many times as fast `ours` is as `peer`: of each round, then over rounds.

    Returns:
      "median", "min" and "max" of the rounds' peer / ours; above 1, ours is faster.
    """
    found = [p / o for o, p in zip(seconds[ours], seconds[peer], strict=True)]
    return {"median": statistics.median(found), "min": min(found), "max": max(found)}


def spread(values: Iterable[float], form: str) -> str:
    """The text "median (least to most)", each number in the format `form`."""
    found = list(values)
    middle, least, most = statistics.median(found), min(found), max(found)
    return f"{middle:{form}} ({least:{form}} to {most:{form}})"


def gemm_rate(dtype: str = "float32", *, repeats: int = 5) -> float:
    """The rate of a large square matrix product, the better of JAX's and torch's.

    Args:
      dtype: "float32", "bfloat16", or "tensorfloat32", which on a GPU is float32
        whose products are rounded to 10 bits (a CPU has no such thing).
      repeats: timed calls; the fastest counts.

    Returns:
      Floating-point operations a second, 2 for each multiply-add.
    """
    import jax
    import jax.numpy as jnp

    platform_name = jax.default_backend()
    side = _GEMM_SIDE[platform_name]
    stored = "float32" if dtype == "tensorfloat32" else dtype
    precision = {"float32": "highest", "tensorfloat32": "tensorfloat32"}.get(dtype)
    a = jax.random.normal(jax.random.key(0), (side, side), jnp.dtype(stored))
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=precision))
    calls = [lambda: product(a, a).block_until_ready()]
    if torch := _torch_on(platform_name):
        torch.backends.cuda.matmul.allow_tf32 = dtype == "tensorfloat32"
        b = torch.randn(side, side, device=_device(platform_name))
        b = b.to(getattr(torch, stored))
        calls.append(lambda: _finished(torch, b @ b))
    return 2 * side**3 / min(_fastest(call, repeats) for call in calls)


def copy_bandwidth(*, repeats: int = 5) -> float:
    """Bytes a second, read and written, of copying a large array.

    The best of JAX, torch and NumPy; one that writes over an array of its own needs
    no new memory, which on a CPU counts.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    platform_name = jax.default_backend()
    count = _COPY_BYTES[platform_name] // 4
    x = jnp.ones(count, jnp.float32)
    scale = jax.jit(lambda x: 2.0 * x)
    calls = [lambda: scale(x).block_until_ready()]
    if platform_name == "cpu":
        source, target = np.ones(count, np.float32), np.empty(count, np.float32)
        calls.append(lambda: np.copyto(target, source))
    if torch := _torch_on(platform_name):
        a = torch.ones(count, device=_device(platform_name))
        b = torch.empty_like(a)
        calls.append(lambda: _finished(torch, b.copy_(a)))
    return 2 * 4 * count / min(_fastest(call, repeats) for call in calls)


def _fastest(call: Callable[[], Any], repeats: int) -> float:
    return min(alternate({"": call}, rounds=repeats)[""])


def _torch_on(platform_name: str) -> Any:
    """torch if it is installed and has that kind of device, else None."""
    try:
        import torch
    except ImportError:
        return None
    return torch if platform_name == "cpu" or torch.cuda.is_available() else None


def _device(platform_name: str) -> str:
    return "cuda" if platform_name == "gpu" else platform_name


def _finished(torch: Any, value: Any) -> Any:
    if value.is_cuda:
        torch.cuda.synchronize()
    return value


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """A module-level function's result, from a process that has done nothing yet.

    The process imports the function's module, and the one that runs as `__main__`.
    """
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def machine() -> dict[str, Any]:
    """What a result has to say about where it was measured, and by which command."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"python -m {spec.name if spec else 'benchmarks'}"
    found = machine_lib.machine(f"{program} {machine_lib.without_paths(sys.argv[1:])}")
    if (jax := sys.modules.get("jax")) and jax.default_backend() != "cpu":
        found["gpu"] = jax.devices()[0].device_kind
    return found


def write_result(
    out: Path, name: str, record: dict[str, Any], *, table: str, figure: Figure | None = None
) -> None:
    """Writes out/name.json (with `machine`), .md and .png, and prints the table."""
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


def bar_chart(
    rates: Mapping[str, Sequence[float]],
    *,
    title: str,
    unit: str,
    ceiling: float | None = None,
    ceiling_name: str = "ceiling",
    axes: Axes | None = None,
) -> Figure:
    """Horizontal bars, the first candidate on top, with the spread over the rounds.

    Args:
      rates: samples by name; a bar is their median, its whiskers least and most.
      title, unit: of the chart and of the rates.
      ceiling: a dashed line at this rate.
      ceiling_name: what the line is.
      axes: to draw into; without, a figure of its own.
    """
    if axes is None:
        size = (8, 1.2 + 0.4 * len(rates))
        axes = Figure(figsize=size, layout="constrained").subplots()
    medians = [statistics.median(samples) for samples in rates.values()]
    below = [m - min(s) for m, s in zip(medians, rates.values(), strict=True)]
    above = [max(s) - m for m, s in zip(medians, rates.values(), strict=True)]
    colours = ["C0" if name.startswith("ours") else "0.6" for name in rates]
    axes.barh(list(rates), medians, xerr=[below, above], color=colours, capsize=3)
    for i, median in enumerate(medians):
        axes.text(0, i, f" {median:,.4g}", va="center")
    if ceiling is not None:
        axes.axvline(ceiling, color="C3", linestyle="--", label=ceiling_name)
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1))
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.set_title(title, loc="left")  # the legend is on the right
    figure = axes.get_figure(root=True)
    assert figure is not None
    return figure
