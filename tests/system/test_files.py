"""Atomic writes, locks and progress lines."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from alexnet_jax.system import cli
from alexnet_jax.system.files import HeldError, atomic_write, exclusive_lock, read_npz


def test_atomic_write_replaces_whole_files_only(tmp_path):
    path = tmp_path / "new" / "x.json"
    with atomic_write(path) as file:
        file.write(b"whole")
        assert not path.exists()
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert {p.name: p.read_bytes() for p in path.parent.iterdir()} == {"x.json": b"whole"}
    (tmp_path / "x.npz").mkdir()
    with pytest.raises(IsADirectoryError, match=r"x\.npz"), atomic_write(tmp_path / "x.npz"):
        pass
    assert sorted(os.listdir(tmp_path)) == ["new", "x.npz"]


def test_damaged_npz_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "x.npz"
    with pytest.raises(ValueError, match=r"x\.npz: there is no such file"):
        read_npz(path, ["a"], ValueError)
    path.write_bytes(b"PK broken")
    with pytest.raises(ValueError, match=r"x\.npz is no \.npz that can be read"):
        read_npz(path, ["a"], ValueError)


_HOLD = """
import pathlib, sys
from alexnet_jax.system.files import exclusive_lock
with exclusive_lock(pathlib.Path(sys.argv[1]), wait=False):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_refused_process_is_told_who_holds_the_lock(tmp_path):
    path = tmp_path / ".lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(path)],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        for _ in range(2):  # who is refused must not wipe out the holder's line
            with pytest.raises(HeldError) as error, exclusive_lock(path, wait=False):
                pass
            who = f"process {holder.pid} on {socket.gethostname()} since 2"
            assert str(error.value).startswith(f"{path} is held by {who}")
            assert "sys.stdin.read()" in error.value.holder
        holder.kill()
    with exclusive_lock(path, wait=False):  # the lock of a killed process is free
        pass


def test_log_file_gets_lines_instead_of_a_bar(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr("tqdm.std.time", lambda: now)
    with cli.progress("preparing", 1000, "images") as update:
        update(400)  # made by an earlier start
        for now in (30.0, 64.0, 100.0, 128.0):
            update(100)
    with cli.progress("checking", 5, "images") as update:
        update(5)  # within the minute
    out, err = capsys.readouterr()
    assert not out
    assert err.split("\n")[:2] == [
        "\rpreparing: 600/1000 images,  9.38 images/s, 00:42 left",
        "\rpreparing: 800/1000 images,  3.12 images/s, 01:04 left",
    ]
    assert "checking" not in err
