"""Sweeps: the shipped ones fit their configs, the arithmetic, and the launcher."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags
from PIL import Image

from alexnet_jax.sweeps import figures, summary
from alexnet_jax.sweeps import plan as plan_lib
from alexnet_jax.sweeps import run as launcher
from alexnet_jax.sweeps.plan import (
    EpochsTo,
    FinalError,
    Measurement,
    Paper,
    Plan,
    Row,
    Sweep,
    SweepError,
)
from alexnet_jax.sweeps.summary import Estimate
from alexnet_jax.training.config import as_json, flat
from alexnet_jax.training.load import run_file

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "configs" / "sweeps").glob("*.py"))
CIFAR = "configs/cifar10.py"


def make_sweep(*rows, **fields):
    fields = {"baseline": rows[0].name, "measured_on": "noise"} | fields
    return Sweep(about="Why?", config=CIFAR, rows=rows, **fields)


# The shipped sweeps.


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_main_parses_every_row_of_a_shipped_sweep(path, monkeypatch):
    plan = Plan(path.stem, run_file(str(path), "get_sweep"), seeds=(3,))
    for run in plan.runs:
        # As alexnet_jax.main parses its command line.
        monkeypatch.setattr(sys, "argv", ["main", *run.flags()])
        values = flags.FlagValues()
        config_flags.DEFINE_config_file("config", flag_values=values)
        values(sys.argv)
        parsed = flat(as_json(values.config))
        assert parsed == run.fields
        assert parsed["seed"] == 3
        if path.stem == "figure1":
            assert parsed["optim.weight_decay"] == 0
            assert not parsed["optim.layer_weight_decay"]  # the layers' own


# Overrides.


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"optim.learning_rat": 0.1}, "no field optim.learning_rat; did you mean .*_rate"),
        ({"max_steps": 1.5}, "max_steps=1.5: "),
        ({"model.overrides.lrn": None}, "model.overrides.lrn"),
        ({"model.variant": "papr"}, "no variant 'papr'"),
        ({"eval_views": 7}, "eval_views=7 must be one of"),
        ({"seed": 1}, "--seeds"),
    ],
)
def test_wrong_override_error_names_sweep_row_and_key(overrides, words):
    for rows, settings in (((Row("a", overrides),), {}), ((Row("a"),), overrides)):
        with pytest.raises(SweepError, match=f"(?s)^sweep 'mine', row 'a': .*{words}"):
            Plan("mine", make_sweep(*rows), (0,), settings)


def test_values_are_parsed_back_from_the_command_line():
    wanted = {
        "model.overrides.skip": ("conv2",),
        "model.overrides.lrn": False,
        "model.overrides.dropout": 0,
        "schedule.drop_epochs": (1.5, 2.0),
        "schedule.layer_factors": (("conv1", 67.0, 0.1),),
        "optim.learning_rate": 3e-05,
        "data.source": "folder:/a b/c=d",
        "data.dir": "",
    }
    config = plan_lib.make_config("configs/common.py", wanted, "")
    assert config.model.overrides.skip == ("conv2",)
    assert config.model.overrides.dropout == 0.0
    assert config.schedule.layer_factors == (("conv1", 67.0, 0.1),)
    assert (config.data.source, config.data.dir) == ("folder:/a b/c=d", "")


def test_settings_win_over_the_sweep_but_not_over_its_rows():
    sweep = make_sweep(
        Row("whole"), Row("other", {"augment.crop": True}), overrides={"max_steps": 5}
    )
    runs = Plan("mine", sweep, (0, 1), {"max_steps": "7", "num_epochs": "200"}).runs
    assert [run.name for run in runs] == [
        *("whole/seed_0", "whole/seed_1", "other/seed_0", "other/seed_1")
    ]
    fields = {"max_steps": 7, "augment.crop": True, "num_epochs": 200.0, "seed": 1}
    assert {name: runs[3].fields[name] for name in fields} == fields
    with pytest.raises(SweepError, match="rows of sweep 'mine' differ in it"):
        Plan("mine", sweep, (0,), {"augment.crop": "False"})


def test_contradictory_sweeps_are_refused():
    for rows, seeds in (
        ((Row("a b"), Row("a_b")), (0,)),
        ((Row("a_b"), Row("a_b")), (0,)),
        ((Row("a_b"),), (0, 0)),
    ):
        with pytest.raises(SweepError, match="two runs would share the folder a_b/seed_0"):
            Plan("mine", make_sweep(*rows), seeds)
    with pytest.raises(SweepError, match="must be a row: a"):
        make_sweep(Row("a"), baseline="b")
    with pytest.raises(SweepError, match="must be difference or ratio"):
        make_sweep(Row("a"), compare="rate")


# Metrics, search and summary, by hand.


def test_metrics_of_records():
    found = [
        {"step": 1, "epoch": 0.25, "train/top1_error": 0.5},
        {"step": 2, "epoch": 0.5, "train/top1_error": 0.25, "eval/top1_error": 0.4},
        {"step": 3, "epoch": 0.75, "train/top1_error": 0.3},
        {"step": 4, "epoch": 1.0, "eval/top1_error": 0.35},
    ]
    assert FinalError().measure(found) == Measurement(35.0)
    assert FinalError("eval/views_top1_error").measure(found) is None
    assert EpochsTo(0.25).measure(found) == Measurement(0.5)
    assert EpochsTo(0.2).measure(found) == Measurement(0.75, censored=True, last_error=0.3)
    # The record of step 5, where the run was stopped, averages too few steps to count.
    stopped = [
        {"step": 3, "epoch": 0.3, "train/top1_error": 0.5},
        {"step": 5, "epoch": 0.5, "train/top1_error": 0.1},
        {"step": 6, "epoch": 0.6, "train/top1_error": 0.2},
        {"step": 9, "epoch": 0.9, "train/top1_error": 0.24},
    ]
    assert EpochsTo(0.25).measure(stopped) == Measurement(0.9)


def never(epoch, error):
    return Measurement(epoch, censored=True, last_error=error)


@pytest.mark.parametrize(
    ("first", "second", "third", "words"),
    [
        ([3.0, 5.0], [2.0, 4.0], [9.0], ["4.00 ± 1.41", "**3.00 ± 1.41**", "9.00"]),
        # A candidate that reached the error in all seeds is better than one that did not.
        ([never(1, 0.4), 4.0], [8.0, 8.0], [1.0], [">2.50", "**8.00 ± 0.00**", "1.00"]),
        # If none reached it, the lowest last error is best.
        ([never(1, 0.4)], [never(1, 0.3)], [], [">1.00", "**>1.00**", "none"]),
    ],
)
def test_best_candidate_of_a_search(first, second, third, words):
    rates = (0.1, 0.2, 0.3)
    sweep = make_sweep(Row("a", search={"optim.learning_rate": rates}))
    results = {
        f"a-{rate}/seed_{seed}": Measurement(value) if isinstance(value, float) else value
        for rate, found in zip(rates, (first, second, third), strict=True)
        for seed, value in enumerate(found)
    }
    (line,) = summary.summarize(Plan("mine", sweep, range(len(first))), results)
    assert line.title == "a (0.2)"
    assert summary.summarize(Plan("mine", sweep, (0,)), {})[0].title == "a"
    table = summary.search_table(sweep, [line]).splitlines()
    cells = zip(rates, words, strict=True)
    assert table[2:] == [f"| a | {rate} | {cell} |" for rate, cell in cells]


def values(*numbers):
    return {seed: Measurement(number) for seed, number in enumerate(numbers)}


def test_the_summary_by_hand():
    base, row = values(40.0, 41.0, 42.0), values(41.0, 42.5, 43.5, 99.0)
    assert summary.mean_of_values([*base.values()]) == Estimate(41.0, 1.0, "", 3)
    effect = summary.compare(row, base, "difference")  # of seeds 0 to 2: 1, 1.5, 1.5
    assert effect.mean == pytest.approx(4 / 3)
    # Deviation sqrt(((1/3)^2 + 2 * (1/6)^2) / 2) = 0.288675, over sqrt(3).
    assert effect.spread == pytest.approx(1 / 6)
    assert effect.words("+.2f") == "+1.33 ± 0.17"
    ratio = summary.compare(values(6.0, 10.0), values(2.0, 2.0), "ratio")
    assert (ratio.mean, ratio.spread) == pytest.approx((4.0, 1.0))


def test_censored_runs_make_bounds():
    row = {0: never(60.0, 0.3)}
    assert summary.mean_of_values([*row.values()]) == Estimate(60.0, None, ">", 1)
    above = summary.compare(row, values(10.0), "ratio")
    assert above.words(".1f") == ">6.0"
    assert summary.compare(values(10.0), row, "difference").words("+.0f") == "<-50"
    assert summary.compare(row, row, "ratio") == Estimate()
    assert summary.verdict(above, Paper(effect=6.0), "ratio") == ""


AGREES, NO_EFFECT = "agrees within the noise", "; so would no effect"


@pytest.mark.parametrize(
    ("mean", "spread", "published", "words"),
    [
        (1.0, 0.2, {"effect": 1.4}, AGREES),
        (1.0, 0.6, {"effect": 1.4}, AGREES + NO_EFFECT),
        (1.0, 0.2, {"effect": 1.41}, "differs"),
        (5.0, 0.2, {"effect": 1.0}, "differs"),
        (5.0, 0.2, {"effect": 1.0, "at_least": True}, AGREES),
        (0.5, 0.2, {"effect": 1.0, "at_least": True}, "differs"),
        (1.0, None, {"effect": 1.4}, "one seed: no noise known"),
        (None, None, {"effect": 1.4}, ""),
        (1.0, 0.2, {"value": 40.7}, ""),
    ],
)
def test_the_verdict(mean, spread, published, words):
    effect, paper = Estimate(mean, spread), Paper(**published)
    assert summary.verdict(effect, paper, "difference") == words


def test_the_table_and_the_figures(tmp_path):
    paper = Paper(42.03, 1.4, "ImageNet", "section 3.3")
    rows = (Row("whole"), Row("less", paper=paper), Row("least", baseline="less"))
    sweep = make_sweep(*rows)
    plan = Plan("mine", sweep, (0, 1))
    numbers = map(Measurement, (40.0, 41.0, 41.0, 43.0, 42.0, 44.5))
    names = [run.name for run in plan.runs]
    lines = summary.summarize(plan, dict(zip(names, numbers, strict=True)))
    assert summary.summary_table(sweep, lines).splitlines()[2:] == [
        "| whole | 2 | 40.50 ± 0.71 |  |  |  |  |",
        f"| less | 2 | 42.00 ± 1.41 | +1.50 ± 0.50 | 42.03 | +1.40 | {AGREES} |",
        "| least | 2 | 43.25 ± 1.77 | +1.25 ± 0.25 (minus less) |  |  |  |",
    ]
    assert summary.published(sweep) == ["Published on ImageNet (section 3.3): less."]
    curve = [{"epoch": e, "train/top1_error": 1 / e} for e in (1, 2, 3)]
    drawn = figures.sweep_results(sweep, lines)
    for figure in (drawn, figures.error_curves({"relu": [curve, curve]}, 0.25)):
        figure.savefig(tmp_path / "figure.png")


# The launcher.


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["configs/sweeps/nothing.py"], "nothing.py: there is no such file"),
        ([CIFAR], "defines no get_sweep"),
        (["configs/sweeps/lrn.py", "--seeds=0,x"], "--seeds=0,x must be numbers"),
        (["configs/sweeps/lrn.py", "--seeds=1,1"], "each seed once"),
        (["configs/sweeps/lrn.py", "--jobs=0"], "--jobs=0 must be at least 1"),
        (["configs/sweeps/lrn.py", "--set", "num_epochs"], "must be FIELD=VALUE"),
    ],
)
def test_wrong_command_line_gives_one_error(arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert launcher.main([*arguments, f"--out={tmp_path / 'out'}"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert re.search(words, said.replace("\n", " "))
    assert not (tmp_path / "out").exists()


def job_in(folder, **fields):
    return launcher.Job(None, folder, [], FinalError(), **fields)


def test_a_finished_run_without_its_records_is_broken(tmp_path):
    (tmp_path / "status.json").write_text('{"state": "finished"}')
    job = job_in(tmp_path)
    job.take_over()
    assert (job.state, job.result) == ("broken", None)
    assert "has no record for eval/top1_error" in job.error


def test_a_killed_run_names_the_signal(tmp_path):
    job = job_in(tmp_path)
    assert job.last_words(1) == "(exit status 1, nothing in its log)"
    (tmp_path / "log.txt").write_text("no checkpoint in DIR: starting from scratch\n")
    first, *rest = job.last_words(-signal.SIGKILL).splitlines()
    assert first.startswith("killed by SIGKILL, perhaps for want of memory; the end of")
    assert rest == ["no checkpoint in DIR: starting from scratch"]
    (tmp_path / "log.txt").write_text("step 1\nerror: no such data\n")
    assert job.last_words(1) == "error: no such data"


def test_dry_run_prints_the_commands_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    out = tmp_path / "out"
    arguments = ["configs/sweeps/figure1.py", f"--out={out}", "--dry_run"]
    assert launcher.main([*arguments, "--seeds=0,1", "--slurm=--gres=none"]) == 0
    commands = capsys.readouterr().out.splitlines()
    assert len(commands) == 2 * (3 + 3 + 1 + 4)
    assert commands[0].startswith("sbatch --wait --parsable --nodes=1 ")
    assert "--gres=gpu:1" in commands[0].partition(" --gres=none ")[0]
    assert f"--workdir={out}/runs/relu-0.001/seed_0" in commands[0]
    assert not out.exists()


# Real runs.

SWEEP = """
from alexnet_jax.sweeps import Paper, Row, Sweep


def get_sweep():
    return Sweep(
        about="Does it work?",
        config="configs/cifar10.py",
        overrides={"max_steps": 60, "num_epochs": 1000.0, "data.batch_size": 8,
                   "model.width": 0.25, "log_every_steps": 1,
                   "eval_every_epochs": 0.0},
        rows=(
            Row("whole"),
            Row("fails", {"data.eval_split": "nowhere"}, paper=Paper(effect=1.0)),
            Row("diverges", {"optim.learning_rate": 1e30}),
        ),
        baseline="whole",
        measured_on="noise",
        seeds=(0, 1),
    )
"""
ROWS = ("whole", "fails", "diverges")
ENVIRONMENT = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def wait_for(condition, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture
def command(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("train/a", "train/b", "test/a", "test/b"):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        for i in range(8):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    (tmp_path / "tiny.py").write_text(SWEEP)
    return [
        *(sys.executable, str(ROOT / "launch" / "sweep.py"), str(tmp_path / "tiny.py")),
        *(f"--out={tmp_path / 'out'}", "--set", f"data.source=folder:{tmp_path / 'data'}"),
    ]


def start(command, environment=ENVIRONMENT):
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)


def run(command, environment=ENVIRONMENT):
    """Return the command's standard error; its exit status must be 1."""
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 1, done.stderr
    return done.stderr


@pytest.mark.slow
def test_an_interrupted_sweep_resumes_and_skips_finished_runs(command, tmp_path):
    out = tmp_path / "out"
    whole = out / "runs" / "whole" / "seed_0"
    metrics = whole / "metrics.jsonl"
    command += ["max_steps=300", "--jobs=2", "--seeds=0"]
    process = start(command)
    wait_for(whole.exists)
    assert "is held by process" in run(command)  # while the other's runs are starting
    wait_for(lambda: metrics.exists() and metrics.stat().st_size)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped" in (out / "summary.md").read_text()
    assert not (whole / "status.json").exists()

    said = run(command)
    for words in ("broken:", "error:", "nowhere"):
        assert words in said
    assert "resuming from step" in (whole / "log.txt").read_text()
    status = json.loads((whole / "status.json").read_text())
    assert status["versions"]["jax"] == jax.__version__
    record = json.loads((out / "sweep.json").read_text())
    states = {name: run["state"] for name, run in record["runs"].items()}
    ends = zip(ROWS, ("finished", "broken", "diverged"), strict=True)
    assert states == {f"{row}/seed_0": end for row, end in ends}
    assert "The loss of step" in record["runs"]["diverges/seed_0"]["error"]
    for shown in (status["command"], record["machine"], record["settings"]):
        assert str(tmp_path) not in json.dumps(shown)
    rows = csv.DictReader((out / "summary.csv").open())
    counts = {row["row"]: row["seeds"] for row in rows}
    assert counts == {"whole": "1", "fails": "0", "diverges": "0"}
    assert (out / "summary.png").read_bytes().startswith(b"\x89PNG")
    assert "- fails/seed_0: broken" in (out / "summary.md").read_text()

    log = (whole / "log.txt").read_bytes()
    run(command)
    assert (whole / "log.txt").read_bytes() == log
    said = run([*command, "--set", "optim.momentum=0.8"])
    assert "is of other settings:" in said
    assert "--config.optim.momentum: 0.9 there, 0.8 asked for" in said


# Replaces SLURM's sbatch by a job that runs until it is cancelled.
SBATCH = """#!/usr/bin/env bash
echo "17;cluster"
echo "$@" >"{folder}/arguments"
if [ "$PYTHON" = refused ]; then echo "sbatch: error: no such partition"; exit 1; fi
while [ ! -e "{folder}/cancelled" ]; do sleep 0.05; done
exit 143
"""


@pytest.mark.slow
def test_slurm_jobs_are_submitted_cancelled_and_reported(command, tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    scripts = {
        "sbatch": SBATCH.format(folder=programs),
        "squeue": f'#!/bin/sh\n[ -e "{programs}/cancelled" ] || echo 17\n',
        "scancel": f'#!/bin/sh\necho "$1" >"{programs}/cancelled"\n',
    }
    for name, text in scripts.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    environment = {**ENVIRONMENT, "PATH": f"{programs}:{os.environ['PATH']}"}
    command += ["--slurm"]
    process = start(command, environment)
    submitted = [tmp_path / f"out/runs/{row}/seed_{i}/sbatch.txt" for row in ROWS for i in (0, 1)]
    wait_for(lambda: all(path.exists() and path.read_text() for path in submitted))
    assert "SLURM job 17 of an earlier sweep is still queued" in run(command, environment)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert (programs / "cancelled").read_text() == "17\n"
    arguments = (programs / "arguments").read_text()
    assert "--wait --parsable --nodes=1" in arguments
    assert f"{ROOT}/launch/slurm.sbatch --workdir={tmp_path}/out/runs/" in arguments

    said = run(command, {**environment, "PYTHON": "refused"})
    assert "sbatch: error: no such partition" in said
