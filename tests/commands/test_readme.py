"""The examples and tables of README and docs are true, and the messages are the real ones."""

import collections
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from alexnet_jax.models.alexnet import create_model
from alexnet_jax.models.summary import summary
from alexnet_jax.training.loop import train_and_evaluate
from benchmarks.speed import parallel_modes
from configs import quickstart

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
NETWORKS = (ROOT / "docs" / "networks.md").read_text()
TROUBLESHOOTING = (ROOT / "docs" / "troubleshooting.md").read_text()


def test_table_of_variants():
    lines = re.findall(r"^\| `(\w+)` \|.*\| ([\d,]+) \| ([\d,]+) \|$", NETWORKS, re.MULTILINE)
    assert len(lines) >= 14
    for name, *counts in lines:
        rows = summary(create_model(name))
        parameters = sum(row.parameters for row in rows)
        multiply_adds = sum(row.multiply_adds for row in rows)
        assert counts == [f"{parameters:,}", f"{multiply_adds:,}"], name


@pytest.fixture(scope="module")
def workdir(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("readme")
    config = quickstart.get_config()
    config.data.source = f"folder:{folder}"
    config.data.batch_size = 4
    config.model.width = 1 / 16
    config.max_steps, config.eval_every_epochs, config.data.eval_split = 0, 0.0, ""
    train_and_evaluate(config, root / "run")
    return root / "run"


@pytest.mark.slow
def test_python_examples_run(workdir):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 7
    scope = {}
    for block in blocks:
        exec(block.replace("runs/quickstart", str(workdir)), scope)  # noqa: S102
    assert scope["features"]["fc7"].shape == (1, 4096)
    assert scope["state"].params["fc2"]["bias"].shape == (10,)
    assert scope["probabilities"].shape == (1, 3)


FOLDER = "--config=configs/folder.py"
MISTAKES = [
    [FOLDER, "--config.data.source=folder:PATH"],
    [FOLDER, "--config.data.source=folder:EMPTY"],
    [FOLDER, "--config.model.widht=0.25"],
    [FOLDER, "--config.data.batch_size=127", "--cpu_devices=2"],
    [FOLDER, "--config.data.crop_size=200"],
    [FOLDER, "--config.parallel.data=4", "--cpu_devices=1"],
    [
        *(FOLDER, "--coordinator_address=127.0.0.1:8476", "--num_processes=2"),
        *("--process_id=1", "--connect_seconds=2", "--cpu_devices=1"),
    ],
    [
        *("--config=configs/quickstart.py", "--config.model.width=0.5"),
        *("--workdir=WORKDIR", "--cpu_devices=2", "--config.data.batch_size=4"),
    ],
    [FOLDER, "--config.data.source=imagenet2012_256", "--config.data.dir=DATA"],
]
# Imports once and runs each command in a fork, because flags and devices are per process.
RUN_ALL = """
import json, os, sys
from alexnet_jax import main
for number, arguments in enumerate(json.loads(sys.argv[1])):
    if child := os.fork():
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status == 1, (arguments, status)
        continue
    os.dup2(os.open(str(number), os.O_WRONLY | os.O_CREAT), 2)
    os.chdir(sys.argv[2])
    sys.argv[:] = ["main", *arguments]
    main.run()
"""


@pytest.fixture(scope="module")
def messages(workdir, tmp_path_factory):
    """Return the message of each mistake, with names instead of paths."""
    root, out = tmp_path_factory.mktemp("mistakes"), tmp_path_factory.mktemp("said")
    places = {name: root / name for name in ("PATH", "EMPTY", "DATA")}
    for name in ("cat", "dog"):
        (root / "EMPTY" / "train" / name).mkdir(parents=True)
    image = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    image.save(root / "EMPTY" / "train" / "dog" / "1.png")
    before = sorted(root.rglob("*"))
    places["WORKDIR"] = workdir
    commands = []
    for arguments in MISTAKES:
        for name, path in places.items():
            arguments = [re.sub(f"(?<=[=:]){name}$", str(path), a) for a in arguments]
        commands.append([f"--workdir={root / 'run'}", *arguments])
    code = [sys.executable, "-c", RUN_ALL, json.dumps(commands), str(ROOT)]
    subprocess.run(code, cwd=out, check=True)
    assert sorted(root.rglob("*")) == before  # nothing half-written
    found = []
    for number in range(len(MISTAKES)):
        message = " ".join((out / str(number)).read_text().split())
        for name, path in places.items():
            message = message.replace(str(path), name)
        found.append(message)
    return found


@pytest.mark.parametrize("number", range(len(MISTAKES)))
def test_troubleshooting_messages(number, messages):
    section = TROUBLESHOOTING.partition("## Messages")[2].partition("\n## ")[0]
    said = re.findall(r"^\| .* \| `(.*)` \|$", section, re.MULTILINE)
    assert max(map(len, said)) < 200
    said += [" ".join(block.split()) for block in re.findall(r"```(.*?)```", section, re.DOTALL)]
    assert len(said) == len(MISTAKES)
    expected = said[number].replace("within 180 seconds", "within 2 seconds")
    expected = expected.replace("0.25 in the workdir", "0.0625 in the workdir")
    assert expected in messages[number].replace("EMPTY", "PATH")


def test_page_of_the_parallel_modes_holds_their_results():
    results = ROOT / "benchmarks" / "results" / "parallel_modes"
    found = json.loads((results / "modes.json").read_text())
    assert (results / "modes.md").read_text() == parallel_modes.page(found)


def test_readme_modes_equal_describe_on_two_devices():
    """Compare with the README, which adds the bytes of a mode's phases."""
    described = (ROOT / "benchmarks/results/parallel_modes/describe.txt").read_text()
    two_devices = described.partition("--cpu_devices=4")[0]
    lines = re.findall(
        r"^(data|columns|hybrid|) .*?([\d.]+)( +[\d,]+|)$", two_devices, re.MULTILINE
    )
    sent, memory, mode = collections.Counter(), {}, ""
    for name, megabytes, whole in lines:
        mode = name or mode
        sent[mode] += float(megabytes)
        memory |= {name: whole.strip()} if name else {}
    assert list(sent) == ["data", "columns", "hybrid"]
    for mode, total in sent.items():
        assert re.search(
            rf"^\| `{mode}` .* \| {total:.2f} \| {memory[mode]} \|$", README, re.MULTILINE
        )


def test_bytes_of_the_results_follow_from_the_formulas():
    results = ROOT / "benchmarks" / "results" / "parallel_modes" / "modes.json"
    rows = json.loads(results.read_text())["rows"]
    assert {row["devices"] for row in rows} == set(parallel_modes.SIZES)
    for row in rows:
        n, images = row["devices"], parallel_modes.IMAGES
        if row["mode"] == "data":
            whole = 4 * (60_965_224 + 2)  # parameters, loss and error in a ring
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
