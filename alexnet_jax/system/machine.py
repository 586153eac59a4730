"""Date, machine, command and versions of a result, for benchmarks and sweeps."""

import importlib.metadata
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch")


def machine(command: str) -> dict[str, Any]:
    """Return date, command, processor, cores, memory and versions; JAX is not started."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "command": command,
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages in `PACKAGES`."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def in_words(about: dict[str, Any]) -> str:
    """Return the result of `machine` in one line."""
    cores = "1 core" if about["cores"] == 1 else f"{about['cores']} cores"
    place = f"{about['cpu']}, {cores}, {about['memory_gib']} GiB"
    if "gpu" in about:
        place = f"{about['gpu']}; {place}"
    return f"{place}; {', '.join(f'{k} {v}' for k, v in about['versions'].items())}"


def without_paths(arguments: Sequence[str]) -> str:
    """Return arguments in one line, with DIR and PATH in place of this machine's paths.

    Relative paths of the repository's own files stay.
    """
    root = Path(__file__).parents[2]
    words, out_is_next = [], False
    for word in arguments:
        name, equals, value = word.rpartition("=")
        if out_is_next or name == "--out":
            word = f"{name}{equals}DIR"
        elif (
            os.sep in value
            and not value.startswith("textures/")  # a data set's name
            and (os.path.isabs(value) or not (root / value.partition(":")[0]).is_file())
        ):
            kind, colon, _ = value.partition(":")  # for example folder:PATH
            kind = kind + colon if colon and os.sep not in kind else ""
            word = f"{name}{equals}{kind}PATH"
        words.append(word)
        out_is_next = word == "--out"
    return " ".join(words)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return cells as a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2] for line in lines if line.startswith("model name")]
    return names[0].strip() if names else platform.machine()
