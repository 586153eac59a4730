"""Eight virtual CPU devices for every test, and programs that compile quickly, once."""

import atexit
import contextlib
import gc
import importlib.metadata
import io
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

OPTIMIZED = bool(os.environ.get("ALEXNET_TEST_OPTIMIZED"))

# Many tests train the same small networks. pytest's processes and those that the tests
# start inherit this cache of compiled programs. It is deleted at the end, because programs
# belong to one processor.
if not OPTIMIZED and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _compiled = tempfile.mkdtemp(prefix="alexnet_test_programs_")
    atexit.register(shutil.rmtree, _compiled, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# Programs that run long are compiled without the setting below (`small.fast_loops`); they
# get LLVM's cheap passes only. XLA's older emitter of fused loops compiles in a third less
# time, to slower loops. jaxlib 0.11 has only the newer one, and aborts at an unknown flag.
if not OPTIMIZED:
    flags = "--xla_backend_optimization_level=1 --xla_llvm_disable_expensive_passes=true"
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        flags += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}"

import jax
import pytest

# These have no effect after JAX has started its devices.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# The tests compile hundreds of programs and run most of them once. With LLVM's
# expensive passes they take three times as long; the HLO, and so what is computed
# and exchanged, is the same. `make test-all` runs them as users do.
if not OPTIMIZED:
    jax.config.update("jax_disable_most_optimizations", True)


def pytest_collection_finish():
    """Freeze what is imported, so that no garbage collection goes through it again."""
    gc.freeze()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return class folders of three colours, which no test may change."""
    from tests.training import runs

    root = tmp_path_factory.mktemp("images")
    runs.draw_colours(root)
    return root


@pytest.fixture(scope="session")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """Return (last state, workdir) of a finished run; tests that change it take a copy."""
    from alexnet_jax.training import loop, step_log
    from tests.training import runs

    workdir = tmp_path_factory.mktemp("finished") / "run"
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_log, "STALL_AFTER_STEPS", 10)
        state = loop.train_and_evaluate(runs.small_config(folder), workdir)
    assert "WARNING" not in out.getvalue()  # it learns
    return state, workdir


@pytest.fixture(scope="session")
def workdir(finished: tuple[Any, Path]) -> Path:
    return finished[1]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Return a function that makes an empty folder on a tmpfs of so many mebibytes.

    Skip the test if nothing can be mounted.
    """
    with contextlib.ExitStack() as mounts:

        def mount(mebibytes: int) -> Path:
            folder = Path(tempfile.mkdtemp(prefix="small_disk_", dir=tmp_path))
            return mounts.enter_context(_mounted(folder, mebibytes))

        yield mount


@contextlib.contextmanager
def _mounted(folder: Path, mebibytes: int) -> Iterator[Path]:
    command = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)]
    try:
        plain = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("a small disk needs the command mount")
    if plain.returncode == 0:
        try:
            yield folder
        finally:
            # Lazily, because a killed process may still be there.
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
        return
    # Without root, mount in a namespace of its own, which a process holds open.
    holder = subprocess.Popen(
        ["unshare", "-rm", "sh", "-c", '"$@" && echo mounted && exec cat', "-", *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdin and holder.stdout and holder.stderr
        if holder.stdout.readline() != "mounted\n":
            reasons = plain.stderr.strip(), holder.stderr.read().strip()
            pytest.skip("no tmpfs can be mounted here: " + "; ".join(reasons))
        try:
            yield Path(f"/proc/{holder.pid}/root{folder}")
        finally:
            holder.stdin.close()
