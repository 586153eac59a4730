"""The README's examples run, its table is complete, its messages are the real ones."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from alexnet_jax import variants
from alexnet_jax.model import create_model, summary
from alexnet_jax.train import train_and_evaluate
from configs import quickstart

ROOT = Path(__file__).parent.parent
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
    if number == 7:
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
    expected = said[number].replace(
        "0.25 in", "0.0625 in" if number == 7 else "0.25 in"
    )
    # The advice ends with the literal word PATH as well.
    assert expected in message
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before
