"""Kills and damaged checkpoints: both forms of benchmarks/reliability/kills.py."""

import json
import sys

import pytest

from benchmarks.reliability import kills


@pytest.mark.slow
def test_killed_runs_end_with_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["kills", "--short", f"--out={tmp_path}"])
    assert kills.main() == 0
    record = json.loads((tmp_path / "kills.json").read_text())
    assert record["summary"]["losses"] == []
    by_phase = record["summary"]["kills_by_phase"]
    for phase in (kills.COMPILING, kills.BEFORE_RENAME, kills.EVALUATION):
        assert by_phase[phase]["one process"] >= 1
    assert record["summary"]["kills"] == len(kills.SHORT_AIMS)
    assert record["summary"]["damaged_checkpoints"] >= 1


@pytest.mark.nightly
def test_sixty_kills_at_any_moment_end_with_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["kills", "--kills=60", f"--out={tmp_path}"])
    assert kills.main() == 0
    summary = json.loads((tmp_path / "kills.json").read_text())["summary"]
    assert summary["losses"] == [] and summary["kills"] >= 60
