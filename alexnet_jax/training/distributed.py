"""Several processes of one run: connect them, compare their flags, vote.

A process that fails or disappears ends the others: an exchange with it fails, or JAX
misses its heartbeat.
"""

import collections
import contextlib
import importlib.metadata
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# A process without a heartbeat for this long counts as dead, and ends the run.
HEARTBEAT_SECONDS = 40
# Steps between a vote and its result.
VOTES_IN_FLIGHT = 2


class DeviceError(ValueError):
    """JAX has no devices here; the message says what to install or to set."""


class DistributedError(RuntimeError):
    """Processes cannot run together; the message says what to do."""


def start(
    mode: str = "auto",
    *,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    local_device_ids: Sequence[int] | None = None,
    connect_seconds: int = 180,
) -> bool:
    """Connect the processes of a run, before JAX starts its devices.

    `launch/README.md` describes the arguments, which are flags of `main`.

    Args:
      mode: "off": one process. "on": several, given by the next three arguments or found
        by JAX in the environment. "auto": "on" if one of the three is given, or if srun
        or mpirun started several tasks.

    Returns:
      True if there are several processes.

    Raises:
      DistributedError: arguments contradict each other or are missing, the port is in
        use, or JAX finds no cluster in the environment.
    """
    given: dict[str, Any] = {
        "coordinator_address": coordinator_address,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    by_flags = [f"--{name}" for name, value in given.items() if value is not None]
    missing = [f"--{name}" for name, value in given.items() if value is None]
    tasks = count_tasks(os.environ)
    if mode == "off" and by_flags:
        raise DistributedError(
            f"--distributed=off contradicts {', '.join(by_flags)}. Leave one or the other out."
        )
    if mode == "off" or (mode == "auto" and not by_flags and tasks == 1):
        return False
    if by_flags and missing:
        raise DistributedError(
            "several processes need --coordinator_address=HOST:PORT, --num_processes=N "
            f"and --process_id=I; missing: {', '.join(missing)}."
        )
    if not by_flags:
        given["num_processes"] = tasks if tasks > 1 else None
        if local_device_ids is None and _sees_own_gpus(os.environ):
            local_device_ids = []  # all; None: JAX takes the one with the task's number
    # The service would take SIGTERM away from the training loop.
    jax.config.update("jax_enable_preemption_service", False)
    giving_up = threading.Timer(connect_seconds, _give_up, (given, connect_seconds))
    giving_up.daemon = True
    giving_up.start()
    try:
        if process_id == 0:  # JAX's server would share a port with another run's
            port = int(str(coordinator_address).rpartition(":")[2])
            socket.create_server(("", port)).close()
        jax.distributed.initialize(
            **given,
            local_device_ids=local_device_ids,
            cluster_detection_method="deactivate" if by_flags else None,
            # Later than `_give_up`: at its own timeout JAX aborts with a stack trace.
            initialization_timeout=connect_seconds + 60,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=60,
        )
    except (ValueError, RuntimeError, IndexError, OSError, OverflowError) as error:
        raise DistributedError(
            f"the processes could not be connected: {error} Several processes need "
            "--coordinator_address=HOST:PORT (a free port), --num_processes=N and "
            "--process_id=I, or a task of SLURM (srun), Open MPI 4 or Kubernetes; "
            "--distributed=off runs one process alone."
        ) from error
    finally:
        giving_up.cancel()
    return True


def count_tasks(environ: Mapping[str, str]) -> int:
    """Return the number of tasks that mpirun or srun started; 1: neither did.

    JAX reads SLURM_NTASKS, the tasks of the job. A shell of `salloc` is one of them, and
    would wait for the others forever.
    """
    names = ("OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")  # JAX's order
    return int(next(filter(None, map(environ.get, names)), "1"))


def _sees_own_gpus(environ: Mapping[str, str]) -> bool:
    """Return True if no other task uses the GPUs that this one sees.

    The task is bound to one GPU, which is number 0 to it, or it is alone on its node.
    """
    is_bound = re.fullmatch(r"[^,]+", environ.get("CUDA_VISIBLE_DEVICES", ""))
    names = ("OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_STEP_TASKS_PER_NODE")
    tasks = next(filter(None, map(environ.get, names)), "")
    return bool(is_bound or re.fullmatch(r"1(\(x\d+\))?", tasks))  # SLURM: "1(x2)", "4(x2),1"


def _give_up(given: Mapping[str, Any], seconds: int) -> None:
    """End the process with a message because the others did not come."""
    address, count, this = given.values()
    print(
        f"error: {'' if this is None else f'process {this}: '}not all of "
        f"{count or 'the'} processes came to {address or 'process 0'} within {seconds} "
        "seconds. Start all of them, process 0 at that address, with no firewall between; "
        "--connect_seconds=N waits longer"
        + (", --distributed=off waits for none." if this is None else "."),
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def require_same(flags: Mapping[str, Any]) -> None:
    """Raise DistributedError in every process unless all have the same flags.

    Different processes would wait for each other forever, or train a mixture.
    """
    if jax.process_count() == 1:
        return
    flags = {**flags, "devices of a process": jax.local_device_count()}
    mine = np.frombuffer(json.dumps(flags).encode().ljust(2**16), np.uint8)
    first, *others = map(json.loads, map(bytes, multihost_utils.process_allgather(mine)))
    for process, other in enumerate(others, start=1):
        different = [
            f"--{name}={other.get(name)} (process 0: {first.get(name)})"
            for name in sorted({*first, *other})
            if other.get(name) != first.get(name)
        ]
        if different:
            raise DistributedError(
                f"not all processes were started alike: process {process} has "
                f"{', '.join(different)}. Start all with the same flags."
            )


def leave(status: int) -> NoReturn:
    """Exit; one of several processes exits without waiting for the others.

    They may be waiting for this one, until JAX's timeouts.
    """
    if not jax.distributed.is_initialized():
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(RuntimeError):  # JAX has no devices
        if jax.process_index() == 0:
            time.sleep(2)  # JAX aborts processes that outlive process 0
    os._exit(status)


def require_devices() -> None:
    """Start JAX's devices, after `start` and after JAX's settings.

    Raises:
      DeviceError: if JAX_PLATFORMS asks for devices that do not exist or do not start.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        # Without an NVIDIA GPU "cuda" is a bare AssertionError.
        settings: Any = jax.config
        plugins = importlib.metadata.entry_points(group="jax_plugins").names
        raise DeviceError(
            f"jax {jax.__version__} starts no devices with JAX_PLATFORMS="
            f"{settings.jax_platforms or ''!r} ({str(error) or 'no such device'}; installed: "
            f"{', '.join(['cpu', *sorted(plugins)])}). For an NVIDIA GPU, pip install "
            '"jax[cuda13]" and set JAX_PLATFORMS=cuda (nvidia-smi must list the GPU); '
            "for the CPU, set JAX_PLATFORMS=cpu or unset it."
        ) from error


class Vote(NamedTuple):
    """A process's wish, or the result: stop for this signal (0: none); save."""

    stop_signal: int
    save: bool


class Votes:
    """Let the processes of a run stop and save after the same step.

    The devices reduce the votes beside the training steps, and every process reads the
    result `VOTES_IN_FLIGHT` calls later. A single process has its result at once.
    """

    def __init__(self, mesh: Mesh):
        self._split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        whole = NamedSharding(mesh, PartitionSpec())
        self._largest = jax.jit(lambda a: a.max(axis=0), out_shardings=whole)
        self._pending: collections.deque[jax.Array] = collections.deque()
        self._stale = 0  # number of pending votes that are older than the last save

    def cast(self, wish: Vote) -> Vote:
        """Give this process's wish; return the newest result that all processes know."""
        if jax.process_count() == 1:
            return wish
        here = len(self._split.addressable_devices)
        rows = np.tile(np.asarray(wish, np.int32), (here, 1))
        shape = (self._split.mesh.size, len(wish))
        votes = jax.make_array_from_process_local_data(self._split, rows, shape)
        self._pending.append(self._largest(votes))
        if len(self._pending) <= VOTES_IN_FLIGHT:
            return Vote(0, False)
        number, save = map(int, jax.device_get(self._pending.popleft()))
        save = bool(save) and not self._stale
        self._stale = VOTES_IN_FLIGHT if save else max(0, self._stale - 1)
        return Vote(number, save)
