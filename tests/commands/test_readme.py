"""The README's examples run, its table is complete, its messages are the real ones."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from alexnet_jax.models import variants
from alexnet_jax.models.alexnet import create_model
from alexnet_jax.models.summary import summary
from alexnet_jax.training.loop import train_and_evaluate
from benchmarks.speed import parallel_modes
from configs import quickstart

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_table_of_variants():
    for name in variants.VARIANTS:
        rows = summary(create_model(name))
        parameters = sum(row.parameters for row in rows)
        multiply_adds = sum(row.multiply_adds for row in rows)
        line = next(x for x in README.splitlines() if x.startswith(f"| `{name}` |"))
        assert line.endswith(f"| {parameters:,} | {multiply_adds:,} |")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    root = tmp_path_factory.mktemp("readme")
    config = quickstart.get_config()
    config.data.source = "textures/tiny"
    config.data.dir = str(root / "data")
    config.data.batch_size = 4
    config.model.width = 1 / 16
    config.max_steps = 1
    train_and_evaluate(config, root / "run")
    return root / "run"


def test_python_examples_run(workdir, capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 3
    scope = {}
    for block in blocks:
        exec(block.replace("runs/quickstart", str(workdir)), scope)  # noqa: S102
    assert "'fc7': (1, 4096)" in capsys.readouterr().out
    assert scope["probabilities"].shape == (1, 10)


def run_main(*args):
    done = subprocess.run(
        [sys.executable, "-m", "alexnet_jax.main", *args],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    return " ".join(done.stderr.split())


MISTAKES = [
    ["--config.data.source=folder:PATH"],
    ["--config.data.source=folder:PATH"],
    ["--config.data.source=imagenet2012_256", "--config.data.dir=DATA"],
    ["--config.model.widht=0.25"],
    ["--config.data.batch_size=127", "--cpu_devices=2"],
    ["--config.data.crop_size=200"],
    ["--config.parallel.data=4", "--cpu_devices=1"],
    [
        *("--coordinator_address=127.0.0.1:8476", "--num_processes=2"),
        *("--process_id=1", "--connect_seconds=2", "--cpu_devices=1"),
    ],
    ["--config.model.width=0.5"],
]


@pytest.mark.parametrize("number", range(len(MISTAKES)))
def test_troubleshooting_messages(number, workdir, tmp_path):
    table = README[README.index("## Troubleshooting") :]
    said = re.findall(r"^\| .* \| `(error: .*)` \|$", table, re.MULTILINE)
    assert len(said) == len(MISTAKES)
    args, run = MISTAKES[number], tmp_path / "run"
    config = "--config=configs/folder.py"
    if number == 1:
        from PIL import Image

        for name in ("cat", "dog"):
            (tmp_path / "PATH" / "train" / name).mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(
            tmp_path / "PATH" / "train" / "dog" / "1.png"
        )
    last = number == len(MISTAKES) - 1
    if last:
        run = workdir
        config = "--config=configs/quickstart.py"
        args = [*args, "--cpu_devices=2", "--config.data.batch_size=4"]
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    places = {"PATH": tmp_path / "PATH", "DATA": tmp_path / "DATA", "WORKDIR": workdir}
    for name in ("PATH", "DATA"):
        args = [re.sub(f"(?<=[=:]){name}$", str(places[name]), arg) for arg in args]
    message = run_main(config, f"--workdir={run}", *args)
    for name, path in places.items():
        message = message.replace(str(path), name)
    expected = said[number].replace("within 180 seconds", "within 2 seconds")
    if last:
        expected = expected.replace("0.25 in", "0.0625 in")
    # The advice ends with the literal word PATH as well.
    assert expected in message
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_tables_of_parallelism_are_of_the_results():
    """docs/parallelism.md holds what benchmarks/speed/parallel_modes.py makes of its file."""
    text = (ROOT / "docs" / "parallelism.md").read_text()
    results = ROOT / "benchmarks" / "results" / "parallel_modes"
    rows = json.loads((results / "modes.json").read_text())["rows"]
    for name, table in parallel_modes.tables(rows).items():
        assert table in text, name
    described = (results / "describe.txt").read_text()
    assert re.search(r"```\n(\$ .*?)\n```", text, re.DOTALL)[1] in described
    # The README's is the one of two devices.
    assert README[README.index("mode     mesh") :].partition("```")[0] in described


def test_bytes_of_the_results_are_those_of_the_arithmetic():
    """Data parallelism's ring: 2 (n - 1) / n of all parameters, loss and error."""
    results = ROOT / "benchmarks" / "results" / "parallel_modes" / "modes.json"
    rows = json.loads(results.read_text())["rows"]
    assert {row["devices"] for row in rows} == set(parallel_modes.SIZES)
    for row in rows:
        n, images = row["devices"], parallel_modes.IMAGES
        if row["mode"] == "data":
            whole = 4 * (60_965_224 + 2)
            assert row["gradients_bytes"] == round(2 * (n - 1) / n * whole)
        if row["mode"] == "columns":
            # A row of two has 2 x 128 images; a column sends half of each feature.
            values = 21_632 + 4_608 + 2_048
            assert row["backward_bytes"] == 2 * images * 4 * values
        if row["mode"] == "hybrid":
            # c - 1 times its own: pool5, its part of fc6, its part of the logits.
            c = row["column"]
            values = 9_216 + 4_096 // c * c + 1_000
            assert row["forward_bytes"] == (c - 1) * images * 4 * values


def test_tables_of_performance_are_of_the_results():
    """docs/performance.md shows every table of the results as it was written."""
    text = (ROOT / "docs" / "performance.md").read_text()
    tables = sorted((ROOT / "benchmarks" / "results" / "performance").glob("*.md"))
    assert len(tables) == 8
    for path in tables:
        assert json.loads(path.with_suffix(".json").read_text()), path
        rows = [row for row in path.read_text().splitlines() if row.startswith("|")]
        assert rows and all(row in text for row in rows), path
