"""SIGINT, SIGTERM and SIGUSR1: messages, exit statuses, nothing half-written."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from alexnet_jax import prepare
from alexnet_jax.system import signals

STOPPED = "stopped by {}; start the same command again\n"


def send(number):
    os.kill(os.getpid(), number)


def handlers():
    return [signal.getsignal(number) for number in signals.SIGNALS]


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_command_prints_one_line_and_exits_with_status_of_signal(number, capfd):
    before = handlers()
    with pytest.raises(signals.Interrupted) as stopped, signals.interrupts():
        send(number)
    assert stopped.value.status == 128 + number
    assert capfd.readouterr().err == STOPPED.format(number.name)
    assert handlers() == before


def test_first_signal_asks_a_run_to_stop(capfd):
    before = handlers()
    with signals.stop_requests() as stop:
        assert stop.signal == 0
        send(signal.SIGUSR1)
        send(signal.SIGTERM)
        assert stop.signal == signal.SIGUSR1
    assert capfd.readouterr().err == (
        "SIGUSR1: stopping after this step, or this batch of an evaluation, with a "
        "checkpoint; a Ctrl-C ends at once\n"
    )
    assert handlers() == before


def test_second_ctrl_c_raises_in_a_notebook(capfd):
    with pytest.raises(KeyboardInterrupt), signals.stop_requests() as stop:
        send(signal.SIGINT)
        assert stop.signal == signal.SIGINT
        send(signal.SIGINT)
    assert "; a second Ctrl-C ends at once\n" in capfd.readouterr().err


def test_threads_leave_signals_alone():
    before, seen = handlers(), []

    def look():
        with signals.stop_requests() as stop, signals.interrupts():
            seen.append((stop.signal, handlers()))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [(0, before)]


def run_command(body, **options):
    code = f"import os, signal\nfrom alexnet_jax.system import signals\n{body}"
    return subprocess.run(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, check=False, **options
    )


INTERRUPT_TWICE = """
def command():
    with signals.{how}():
        os.kill(os.getpid(), signal.SIGINT)
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            os._exit(0)
signals.run(command)
"""


@pytest.mark.parametrize(
    "body, status",
    [
        ("signals.run(lambda: 7)", 7),
        ("signals.run(lambda: os.kill(os.getpid(), 15))", 143),
        # The operating system ends it, even while no Python code runs.
        (INTERRUPT_TWICE.format(how="stop_requests"), -signal.SIGINT),
    ],
)
def test_exit_status(body, status):
    assert run_command(body).returncode == status


def test_command_ends_quietly_if_its_pipe_closes():
    reading, writing = os.pipe()
    os.close(reading)
    body = "signals.run(lambda: print('line\\n' * 100_000) or 0)"
    done = run_command(body, stdout=writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")


def test_interrupted_preparation_leaves_no_data(tmp_path, monkeypatch, capfd):
    from alexnet_jax.data.textures import textures_dataset_builder as builder

    def draw_and_be_stopped(*_):
        send(signal.SIGTERM)
        raise AssertionError("it went on")

    monkeypatch.setattr(builder.Builder, "_generate_examples", draw_and_be_stopped)
    with pytest.raises(signals.Interrupted), signals.interrupts():
        prepare.main(["textures", f"--data_dir={tmp_path}"])
    assert STOPPED.format("SIGTERM") in capfd.readouterr().err
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in files if path.stat().st_size] == []
