"""Faults of data: nothing is lost, nothing is let in, and each is one message."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from alexnet_jax.data import locks

REPOSITORY = Path(__file__).parents[1]


# One process at a time.

_HOLD = """
import pathlib, runpy, sys
held = runpy.run_path("alexnet_jax/data/locks.py")["held"]
with held(pathlib.Path(sys.argv[1]), wait=False):
    print("held", flush=True)
    sys.stdin.read()
"""


def refused(path: Path) -> str:
    with pytest.raises(locks.HeldError) as error, locks.held(path, wait=False):
        pass
    assert str(error.value) == f"{path} is held by {error.value.holder}"
    return error.value.holder


def test_who_is_refused_is_told_who_holds_it(tmp_path):
    path = tmp_path / ".lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(path)],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        for _ in range(2):  # who is refused must not wipe out the holder's line
            who = refused(path)
            assert f"process {holder.pid} on {socket.gethostname()} since 2" in who
            assert "UTC" in who and "sys.stdin.read()" in who
        holder.kill()
    assert path.read_text()  # it was killed: its line is still there, but nobody's
    with locks.held(path, wait=True):
        assert json.loads(path.read_text())["pid"] == os.getpid()
        assert f"process {os.getpid()} on" in refused(path)
    assert path.read_text() == ""


def test_a_lock_file_that_says_nothing(tmp_path):
    path = tmp_path / ".lock"
    for said in (b"", b"{", b"[]", b"\xff", b'{"pid": 1}', b"null"):
        with locks.held(path, wait=False):
            path.write_bytes(said)
            assert refused(path) == "another process"
            assert path.read_bytes() == said


def test_a_full_disk_holds_a_lock_all_the_same(small_disk):
    disk = small_disk(1)
    (disk / ".lock").touch()
    with pytest.raises(OSError, match="No space left"):
        (disk / "full").write_bytes(bytes(2 << 20))
    with locks.held(disk / ".lock", wait=False):
        assert refused(disk / ".lock") == "another process"
