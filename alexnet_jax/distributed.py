"""Several processes: how they find one another, and how they part.

`jax.distributed` does the work. Here is what it leaves to its caller: whether there is
a cluster at all, which GPUs are this process's own, and errors in words instead of an
abort inside XLA.
"""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jax
from jax._src import distributed as jax_distributed

# A process that has not been heard of for so long is dead, and the run with it.
HEARTBEAT_SECONDS = 40
# How long a process that has ended waits for the others to end.
SHUTDOWN_SECONDS = 60
# Process 0 keeps the connections of all; it leaves last, so that a mistake that all
# make is said by all.
LEAVE_SECONDS = 2.0
_GO_ON = (
    "its own output says why. The same command goes on, from the last checkpoint if "
    "there is one."
)
_MISTAKE = "alexnet_jax/mistake"  # under which all find what process 0 leaves with


class DistributedError(RuntimeError):
    """Processes that cannot run together; the message says what to do."""


def start(
    mode: str = "auto",
    *,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    local_device_ids: Sequence[int] | None = None,
    connect_seconds: int = 180,
) -> bool:
    """Connects this process with the others of its run; before anything else of jax.

    Args:
      mode: "off": this process is alone. "on": there are others, named by the
        arguments or by the environment of SLURM or Open MPI. "auto": on if any
        argument is given, or the environment is of one of several tasks.
      coordinator_address: HOST:PORT of process 0, for all processes the same.
      num_processes, process_id: how many there are, and which one this is, from 0.
      local_device_ids: numbers of the GPUs that are this process's own; else SLURM
        and Open MPI give each process of a node an equal share, and without them it
        has all that it sees.
      connect_seconds: how long to wait for the others.

    Returns:
      Whether there are others.

    Raises:
      DistributedError: for arguments that do not fit together, an environment as of
        `find_launcher`, a port that is taken, or GPUs that cannot be shared evenly.
        When the others do not come in time the process ends with exit status 1 and a
        message: XLA can only abort.
    """
    given = {
        "coordinator_address": coordinator_address,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    some = [f"--{name}" for name, value in given.items() if value is not None]
    if mode == "off":
        if some:
            raise DistributedError(f"--distributed=off contradicts {', '.join(some)}.")
        return False
    launcher, tasks = (None, 1) if some else find_launcher(os.environ)
    if mode == "auto" and not some and tasks == 1:
        return False
    if launcher is None:
        _check_arguments(given)
    else:
        given["num_processes"] = tasks
    if coordinator_address and process_id == 0:
        _check_port_is_free(coordinator_address)
    # SIGTERM is the trainer's to answer; the service would swallow it.
    jax.config.update("jax_enable_preemption_service", False)
    giving_up = threading.Timer(connect_seconds, _give_up, (given, connect_seconds))
    giving_up.daemon = True
    giving_up.start()
    try:
        jax.distributed.initialize(
            **given,
            local_device_ids=local_device_ids,
            # Nothing else is asked, as Kubernetes' server would be.
            cluster_detection_method=launcher or "deactivate",
            # XLA's own end of patience is an abort with a stack trace.
            initialization_timeout=connect_seconds + 60,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        raise DistributedError(f"the processes could not be connected: {error}") from (
            error
        )
    finally:
        giving_up.cancel()
    settings: Any = jax.config
    if local_device_ids is None and settings.jax_platforms != "cpu":
        _take_share_of_gpus()
    return True


def _check_arguments(given: Mapping[str, Any]) -> None:
    missing = [name for name, value in given.items() if value is None]
    if missing:
        raise DistributedError(
            "several processes need --coordinator_address=HOST:PORT, --num_processes=N "
            f"and --process_id=I, or a task of SLURM or Open MPI; missing: "
            f"{', '.join('--' + name for name in missing)}."
        )
    address, count, this = given.values()
    if not re.fullmatch(r".+:\d+", address):
        raise DistributedError(
            f"--coordinator_address={address} must be HOST:PORT of process 0."
        )
    if not 0 <= this < count:
        raise DistributedError(
            f"--process_id={this} must be 0 to {count - 1} with --num_processes={count}."
        )


# Variables that mpirun and srun set for their tasks and jax reads, the number of tasks
# first. In jax's order: mpirun may itself be a step of SLURM. SLURM_NTASKS can be the job's
# number: in a shell that salloc opens, which is one task.
_VARIABLES = {
    "ompi": "OMPI_COMM_WORLD_SIZE OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_LOCAL_RANK "
    "OMPI_MCA_orte_hnp_uri",
    "slurm": "SLURM_STEP_NUM_TASKS SLURM_STEP_NODELIST SLURM_NTASKS SLURM_PROCID "
    "SLURM_LOCALID SLURM_JOB_ID",
}


def find_launcher(environ: Mapping[str, str]) -> tuple[str | None, int]:
    """Return jax's name for what started this process, and the number of its tasks.

    (None, 1) if neither Open MPI's mpirun nor SLURM's srun did, or only as one task of
    which some variables are missing.

    Raises:
      DistributedError: if some variables of several tasks are missing.
    """
    for name, variables in _VARIABLES.items():
        there = {v: environ[v] for v in variables.split() if environ.get(v)}
        # Outside of srun, as in a batch script, SLURM has a job but no step.
        if any(v.startswith(("OMPI_", "SLURM_STEP_")) for v in there):
            tasks = there.get(variables.split()[0], "0")
            missing = [v for v in variables.split() if v not in there]
            if missing and tasks == "1":
                continue
            if missing:
                raise DistributedError(
                    "the environment of srun or mpirun is half set: it has "
                    f"{', '.join(there)}, but not {', '.join(missing)}. Add "
                    "--distributed=off to run one process alone, or "
                    "--coordinator_address, --num_processes and --process_id to run "
                    "several."
                )
            return name, int(tasks)
    return None, 1


def tasks_on_node(environ: Mapping[str, str]) -> tuple[int, int] | None:
    """Return how many tasks are on this node, and which this is; None if nobody says."""
    if tasks := environ.get("OMPI_COMM_WORLD_LOCAL_SIZE"):
        return int(tasks), int(environ["OMPI_COMM_WORLD_LOCAL_RANK"])
    text = environ.get("SLURM_STEP_TASKS_PER_NODE", "")  # "4(x2),1": 4, 4, 1
    counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    per_node = [int(count) for count, times in counts for _ in range(int(times or 1))]
    node = int(environ.get("SLURM_NODEID", 0))
    if node < len(per_node):
        return per_node[node], int(environ.get("SLURM_LOCALID", 0))
    return None


def _check_port_is_free(address: str) -> None:
    port = int(address.rpartition(":")[2])
    try:
        # On every address, as the coordinator will.
        socket.create_server(("", port)).close()
    except (OSError, OverflowError) as error:
        raise DistributedError(
            f"process 0 cannot listen on port {port} of --coordinator_address="
            f"{address} ({error}); is another run using it? Take another port, for all "
            "processes the same."
        ) from error


def _give_up(given: Mapping[str, Any], seconds: int) -> None:
    """Ends the process with the reason why it is still alone."""
    state = jax_distributed.global_state
    address = given["coordinator_address"] or state.coordinator_address
    this, count = state.process_id, given["num_processes"]
    if this == 0:
        reason = f"not all of {count} processes came within {seconds} seconds"
    else:
        reason = _why_unreachable(str(address), seconds)
    message = (
        f"error: process {this}: {reason}. Are all processes started, with the same "
        "--coordinator_address and --num_processes, and no firewall between them? "
        "--connect_seconds changes how long they wait."
        + ("" if given["coordinator_address"] else " --distributed=off waits for none.")
    )
    print(message, file=sys.stderr, flush=True)
    os._exit(1)


def _why_unreachable(address: str, seconds: int) -> str:
    error = _connect_to(address)
    if error is not None:
        return (
            f"the coordinator {address} (process 0) could not be reached within "
            f"{seconds} seconds ({error.strerror or error})"
        )
    return (
        f"the coordinator {address} answers, but not all processes came within "
        f"{seconds} seconds"
    )


def _connect_to(address: str) -> OSError | None:
    """What is in the way of a connection; None: somebody listens there."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        return error
    return None


# GPUs.


def _take_share_of_gpus() -> None:
    """Make this process's share of its node's GPUs the ones that jax sees.

    jax would take the GPU with the number of the task on its node. With fewer tasks than
    GPUs the rest would be idle, and a task to which SLURM shows only its own GPU would look
    for another.
    """
    place, gpus = tasks_on_node(os.environ), count_gpus(os.environ)
    if place and gpus:
        share = share_of_gpus(gpus, *place)
        chosen = "all" if share is None else ",".join(map(str, share))
        jax.config.update("jax_cuda_visible_devices", chosen)


def count_gpus(environ: Mapping[str, str]) -> int:
    """Return how many GPUs CUDA shows this process; 0 if nothing says it."""
    if (chosen := environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return len(chosen.split(","))
    if shutil.which("nvidia-smi") is None:
        return 0
    command = ["nvidia-smi", "--list-gpus"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return len(done.stdout.splitlines())


def share_of_gpus(gpus: int, tasks: int, local_id: int) -> list[int] | None:
    """The numbers of the GPUs that are this task's among those it sees; None: all.

    Raises:
      DistributedError: when `gpus` do not divide over `tasks`.
    """
    # One GPU is what a launcher shows that binds GPUs to tasks by itself.
    if tasks == 1 or gpus <= 1:
        return None
    if gpus % tasks:
        raise DistributedError(
            f"{tasks} processes on this node and {gpus} GPUs: as many processes as "
            "GPUs, or one (--ntasks-per-node)."
        )
    each = gpus // tasks
    return list(range(local_id * each, (local_id + 1) * each))


# What is said, and leaving.


def require_same(flags: Mapping[str, Any]) -> None:
    """Compares a run's flags with process 0's; does nothing where there is only one.

    Processes that do different things wait for each other forever, or train a network
    that nobody asked for.

    Raises:
      DistributedError: in every process, naming the flags that differ, with both values.
    """
    if not jax.distributed.is_initialized():
        return
    state: Any = jax_distributed.global_state
    this, wait = state.process_id, 60_000
    given, found, all_found = (f"alexnet_jax/flags{end}" for end in ("", "/{}", "/all"))
    mine = json.dumps(flags)
    if this == 0:
        state.client.key_value_set(given, mine)
        others = range(1, state.num_processes)
        said = [
            state.client.blocking_key_value_get(found.format(i), wait) for i in others
        ]
        state.client.key_value_set(all_found, "; ".join(filter(None, said)))
    else:
        first = json.loads(state.client.blocking_key_value_get(given, wait))
        own = json.loads(mine)
        different = [
            f"--{name}={own.get(name)} (process 0: {first.get(name)})"
            for name in sorted({*own, *first})
            if own.get(name) != first.get(name)
        ]
        words = f"process {this} has {', '.join(different)}" if different else ""
        state.client.key_value_set(found.format(this), words)
    if words := state.client.blocking_key_value_get(all_found, wait):
        raise DistributedError(f"not all processes were started alike: {words}.")


def banner(devices_in_words: str) -> str:
    """The line with which each of several processes begins."""
    here, everywhere = jax.local_device_count(), jax.device_count()
    return (
        f"process {jax.process_index()} of {jax.process_count()} on "
        f"{socket.gethostname()}: {here} of {everywhere} devices; {devices_in_words}"
    )


def leave(message: str, status: int, *, all_say_it: bool = False) -> NoReturn:
    """Ends the process with a message; one of several does not wait for the others.

    They are not coming: most wait for this one, in an exchange or at the end.

    Args:
      message: for standard error, none if it is empty.
      status: the exit status.
      all_say_it: the others have probably made the same mistake. What process 0 says
        is then not repeated.
    """
    if not jax.distributed.is_initialized():
        if message:
            print(message, file=sys.stderr)
        sys.exit(status)
    this = jax_distributed.global_state.process_id
    if message and all_say_it and _is_said_by_process_0(message):
        message = "error: the same as in process 0"
    if message:
        print(f"process {this}: {message}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if this == 0:
        time.sleep(LEAVE_SECONDS)
    os._exit(status)


def _is_said_by_process_0(message: str) -> bool:
    """Whether another process leaves, or is about to leave, with the same message."""
    state: Any = jax_distributed.global_state
    wait = round(1000 * LEAVE_SECONDS / 2)
    try:
        if state.process_id == 0:
            state.client.key_value_set(_MISTAKE, message)
            return False
        return state.client.blocking_key_value_get(_MISTAKE, wait) == message
    except RuntimeError:  # XLA's: it has made no mistake, or is gone
        return False


@contextlib.contextmanager
def heeding_process_0() -> Iterator[None]:
    """Within, this process ends, with a line, before process 0 does with a mistake.

    For a save, in which Orbax's threads wait for what process 0 makes: XLA would hear
    that it is gone before they do, and can only abort.
    """
    state: Any = jax_distributed.global_state
    if not jax.distributed.is_initialized() or state.process_id == 0:
        yield
        return
    over = threading.Event()

    def heed() -> None:
        while not over.wait(LEAVE_SECONDS / 10):
            with contextlib.suppress(RuntimeError):  # XLA's: nothing is said
                state.client.key_value_try_get(_MISTAKE)
                break
        if not over.wait(LEAVE_SECONDS / 4):  # it has made no mistake of its own
            leave(f"error: process 0 is gone; {_GO_ON}", 1)

    thread = threading.Thread(target=heed, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def describe_failure(error: BaseException) -> str:
    """A message for an error that is nobody's mistake in this process, or its trace."""
    text = str(error)
    lost = re.search(
        r"Gloo|NCCL|coordination|heartbeat|Connection (closed|reset)", text
    )
    if not lost:
        return "".join(traceback.format_exception(error)).rstrip()
    return f"error: {_who_is_gone()} is gone ({text.splitlines()[0][:200]}); {_GO_ON}"


def _who_is_gone() -> str:
    state: Any = jax_distributed.global_state
    address = str(state.coordinator_address)
    if state.process_id == 0 or _connect_to(address) is None:
        return "another process"
    return f"process 0 (the coordinator, {address})"
