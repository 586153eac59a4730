"""Asked to stop: what is said, and how the process ends."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import time

import pytest

from alexnet_jax import cli, pictures, prepare, stopping

STOPPED = "stopped by {}; start the same command again\n"


def send(number):
    os.kill(os.getpid(), number)


def handlers():
    return [signal.getsignal(number) for number in stopping.SIGNALS]


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_a_command_says_one_line_and_has_the_signals_status(number, capfd):
    before = handlers()
    with pytest.raises(stopping.Interrupted) as stopped, stopping.answering():
        try:
            send(number)
        finally:  # on its way out it is not disturbed again
            send(signal.SIGTERM)
            cleaned_up = True
    assert stopped.value.status == 128 + number
    assert cleaned_up
    assert capfd.readouterr().err == STOPPED.format(number.name)
    assert handlers() == before
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_garbage_collector_is_not_lost(number, capfd):
    """Python drops what a callback of it raises; jax has such a callback."""
    left = []

    def collecting(phase, info):
        if left:
            send(left.pop())

    gc.callbacks.append(collecting)
    try:
        with pytest.raises(stopping.Interrupted), stopping.answering():
            left.append(number)  # not before: Python collects when it likes
            gc.collect()
            time.sleep(60)
    finally:
        gc.callbacks.remove(collecting)
    assert capfd.readouterr().err == STOPPED.format(number.name)


@pytest.mark.parametrize("in_a_command", [True, False])
def test_a_run_is_asked_by_the_first_signal(in_a_command, capfd):
    with stopping.answering() if in_a_command else contextlib.nullcontext():
        with stopping.asking() as stop:
            assert stop.signal is None
            send(signal.SIGUSR1)
            send(signal.SIGTERM)
            assert stop.signal == signal.SIGUSR1
        if in_a_command:
            send(signal.SIGTERM)  # it is ending already
    err = capfd.readouterr().err
    assert err == (
        "SIGUSR1: stopping after this step, or this batch of an evaluation, with a "
        "checkpoint; a Ctrl-C ends at once\n"
    )


def test_outside_a_command_a_second_ctrl_c_is_pythons_own(capfd):
    with pytest.raises(KeyboardInterrupt), stopping.asking() as stop:
        send(signal.SIGINT)
        assert stop.signal == signal.SIGINT
        send(signal.SIGINT)
    assert "; a second Ctrl-C ends at once\n" in capfd.readouterr().err


def test_a_commands_status_is_the_processes():
    code = "import os\nfrom alexnet_jax import stopping\nstopping.run(lambda: {})"
    for command, status in (("7", 7), ("os.kill(os.getpid(), 15)", 143)):
        done = subprocess.run([sys.executable, "-c", code.format(command)], check=False)
        assert done.returncode == status


# The main thread is busy outside Python, as in a compilation, for very long.
BUSY = """
import hashlib
from alexnet_jax import stopping

with stopping.answering(), stopping.{how}():
    print("busy", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""


def busy(how):
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY.format(how=how)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "busy\n"
    return process


def test_signals_are_answered_while_the_main_thread_is_busy():
    process = busy("asking")
    process.send_signal(signal.SIGTERM)
    assert "SIGTERM: stopping after this step" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert err == "ended at once; start the same command again\n"
    assert process.returncode == 130


def test_a_wait_without_anything_to_save_ends_at_the_first_signal():
    process = busy("at_once")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert err == STOPPED.format("SIGTERM")
    assert process.returncode == 143


def test_data_that_were_being_prepared_are_not_half_there(tmp_path, monkeypatch, capfd):
    from alexnet_jax.data.textures import textures_dataset_builder as builder

    def draw_and_be_stopped(*_):
        send(signal.SIGTERM)
        raise AssertionError("it went on")

    arguments = ["prepare", "textures", f"--data_dir={tmp_path}"]
    with monkeypatch.context() as patch:
        patch.setattr(builder.Builder, "_generate_examples", draw_and_be_stopped)
        with pytest.raises(stopping.Interrupted), stopping.answering():
            prepare.main(arguments)
    assert STOPPED.format("SIGTERM") in capfd.readouterr().err
    assert not [
        path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size
    ]


def test_a_figure_that_was_being_drawn_leaves_the_old_one(tmp_path, capfd):
    """In the commands that look at pictures; `report` writes in the same way."""

    class Figure:
        def savefig(self, file, format, dpi):
            file.write(b"half")
            send(signal.SIGINT)

    path = tmp_path / "figure.png"
    path.write_bytes(b"whole")
    with pytest.raises(stopping.Interrupted), stopping.answering():
        cli.exit_status(lambda: pictures.save_figure(Figure(), path))
    assert capfd.readouterr().err == STOPPED.format("SIGINT")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"whole"]


def test_command_ends_quietly_when_its_reader_has_gone():
    code = (
        "from alexnet_jax import stopping\n"
        "stopping.run(lambda: print('line\\n' * 100_000) or 0)"
    )
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")
