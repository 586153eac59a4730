"""Start several processes on one machine, to rehearse for a cluster.

    python launch/multiprocess.py -n 2 -- --config=configs/paper.py --workdir=DIR ...

starts `python -m alexnet_jax.main ...` twice. The two processes connect over this machine's
own network. By default they run on the CPU, with one device each or the number that
--cpu_devices gives. With `--gpus=K` each process has K GPUs instead. Every line of output
begins with the number of its process.

If a process fails or is killed, the others are ended within seconds, and the exit status is
that of the first. The same command resumes from the last checkpoint. Ctrl-C, SIGTERM and
SIGUSR1 are passed on: all processes write a checkpoint together and end.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
POLL_SECONDS = 0.1
# After one process has failed, the others have this time to end by themselves.
GRACE_SECONDS = 10.0

Processes = Sequence[subprocess.Popen[str]]


def main(argv: Sequence[str] | None = None) -> int:
    """Start the processes, wait for them and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", type=int, required=True, help="number of processes")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs per process; 0: on the CPU")
    parser.add_argument("arguments", nargs="+", help="arguments of alexnet_jax.main")
    options = parser.parse_args(argv)
    if options.n < 1 or options.gpus < 0:
        parser.error("-n must be at least 1 and --gpus at least 0")
    port = free_port()
    processes = [
        start(options.arguments, index, options.n, port, options.gpus) for index in range(options.n)
    ]
    readers = [
        threading.Thread(target=relay, args=(process, index))
        for index, process in enumerate(processes)
    ]
    for reader in readers:
        reader.start()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _: send(processes, number))
    status = wait(processes)
    for reader in readers:
        reader.join()
    return 128 - status if status < 0 else status


def start(
    arguments: Sequence[str], index: int, count: int, port: int, gpus: int
) -> subprocess.Popen[str]:
    """Start process `index` of `count`, in a process group of its own."""
    command = [
        *(sys.executable, "-m", "alexnet_jax.main", *arguments, "--distributed=on"),
        *(f"--coordinator_address=127.0.0.1:{port}", f"--num_processes={count}"),
        f"--process_id={index}",
    ]
    if gpus:
        own = range(index * gpus, (index + 1) * gpus)
        command.append(f"--local_device_ids={','.join(map(str, own))}")
    elif not any(argument.startswith("--cpu_devices") for argument in arguments):
        command.append("--cpu_devices=1")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        # So Ctrl-C at the terminal reaches only the launcher, which passes it on once.
        start_new_session=True,
    )


def relay(process: subprocess.Popen[str], index: int) -> None:
    """Print each line of a process with the number of the process before it."""
    assert process.stdout is not None
    for line in process.stdout:
        try:
            print(f"[{index}] {line}", end="", flush=True)
        except OSError:  # nobody reads the output; a full pipe would stop the process
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def send(processes: Processes, number: int) -> None:
    """Send a signal to all processes that still run."""
    for process in processes:
        process.send_signal(number)


def wait(processes: Processes) -> int:
    """Wait for all processes and return the first bad status. If one fails, end the others."""
    deadline, first = float("inf"), 0
    while any(process.poll() is None for process in processes):
        time.sleep(POLL_SECONDS)
        failed = [(i, p.returncode) for i, p in enumerate(processes) if p.poll()]
        if failed and not first:
            first, deadline = failed[0][1], time.monotonic() + GRACE_SECONDS
            report(*failed[0])
        if time.monotonic() > deadline:
            send(processes, signal.SIGKILL)
    # All may have failed between two polls.
    return first or next((p.returncode for p in processes if p.returncode), 0)


def report(index: int, status: int) -> None:
    """Print how a process ended and what to do."""
    how = f"ended with status {status}"
    if status < 0:
        how = f"was killed by {signal.Signals(-status).name}"
    # A status from 128 up means a signal, after which there is nothing to fix.
    hint = "The same command resumes from the last checkpoint, if there is one."
    if 0 < status < 128:
        hint = "Its own lines above say why."
    print(f"multiprocess.py: process {index} {how}. {hint}", file=sys.stderr, flush=True)


def free_port() -> int:
    """Return a port of this machine on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
