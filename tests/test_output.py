"""Standard output that breaks: a run goes on without it, other commands end."""

import io
import os
import sys
import threading

import pytest

from alexnet_jax import output, stopping

LINES = [f"line {number}\n" for number in range(2000)]
GOES_ON = (
    "standard output cannot be written ({}): the run goes on without; its records are "
    "in the workdir\n"
)
CLOSED, FULL = "Broken pipe", "No space left on device"


def broken(how, *, unbuffered=False):
    """A standard output of a process that cannot be written, as Python makes it."""
    if how == FULL:
        descriptor = os.open("/dev/full", os.O_WRONLY)
    else:
        reading, descriptor = os.pipe()
        os.close(reading)
    if unbuffered:
        return io.TextIOWrapper(io.FileIO(descriptor, "w"), write_through=True)
    return io.TextIOWrapper(io.BufferedWriter(io.FileIO(descriptor, "w")))


@pytest.mark.parametrize("unbuffered", [False, True])
@pytest.mark.parametrize("how", [CLOSED, FULL])
def test_a_run_goes_on_without_its_lines(how, unbuffered, monkeypatch, capsys):
    stream = broken(how, unbuffered=unbuffered)
    monkeypatch.setattr(sys, "stdout", stream)
    with output.dropped():
        sys.stdout.writelines(LINES)
        print("a line that is waited for", flush=True)
    assert capsys.readouterr().err == GOES_ON.format(how)
    assert sys.stdout is stream
    print("later", flush=True)
    stream.close()  # nor does the end of the process fail


@pytest.mark.parametrize("lines", [LINES, ["in a buffer until the end"]])
@pytest.mark.parametrize(
    ("how", "words"),
    [(CLOSED, ""), (FULL, f"error: standard output cannot be written: {FULL}\n")],
)
def test_a_command_ends(how, words, lines, monkeypatch, capsys):
    def command():
        sys.stdout.writelines(lines)
        return 0

    monkeypatch.setattr(sys, "stdout", broken(how))
    with pytest.raises(SystemExit) as ended:
        stopping.run(command)
    assert ended.value.code == 1
    assert capsys.readouterr().err == words
    sys.stdout.close()


def test_a_command_keeps_its_own_status(monkeypatch):
    stream = broken(FULL)
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(SystemExit) as ended:
        stopping.run(lambda: 7)
    assert ended.value.code == 7
    stream.close()


def test_standard_error_that_breaks_changes_nothing(monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, broken(CLOSED))
    with output.dropped():
        for stream in (sys.stdout, sys.stderr):
            print("line", file=stream, flush=True)
    for stream in (sys.stdout, sys.stderr):
        stream.close()


def test_a_stream_that_was_closed_at_the_start(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with output.dropped():
        sys.stdout.writelines(LINES)
    assert sys.stdout is None


def test_a_terminal_that_is_not_waited_for_gets_every_line(monkeypatch):
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    stream = io.TextIOWrapper(io.BufferedWriter(io.FileIO(writing, "w")))
    monkeypatch.setattr(sys, "stdout", stream)
    found = []

    def read():
        with open(reading) as file:
            found.append(file.read())

    reader = threading.Thread(target=read)
    lines = LINES * 10  # more than a pipe holds
    with output.dropped():
        timer = threading.Timer(0.2, reader.start)
        timer.start()
        sys.stdout.writelines(lines)
    stream.close()
    timer.join()
    reader.join()
    assert found == ["".join(lines)]


def test_a_notebooks_own_stream_stays(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    with output.dropped():
        print("line")
        assert sys.stdout is stream
    assert stream.getvalue() == "line\n"
