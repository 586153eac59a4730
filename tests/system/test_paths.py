"""Paths that cannot be used: one message, before any long work, and nothing left behind."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import flagsaver
from PIL import Image

from alexnet_jax import create_model, export, main, predict, prepare, report, retrieve
from alexnet_jax.data.statistics import Statistics
from alexnet_jax.training.checkpoint import Checkpointer
from alexnet_jax.training.config import as_json
from alexnet_jax.training.workdir import write_class_names, write_config
from configs import common

ROOT = Path(__file__).parents[2]


def exit_status(module, arguments, monkeypatch):
    """Return the exit status of a command."""
    if module is not main:
        return module.main(arguments)
    argv = ["main", "--config=configs/folder.py", *arguments]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", argv)
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as ended:
        main.run()
    return ended.value.code


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Make a run, an image and a file; return their paths and one that is free."""
    folder = tmp_path_factory.mktemp("places")
    (folder / "file").touch()
    Image.new("RGB", (40, 40)).save(folder / "image.png")
    config = common.get_config()
    config.data.source = "fake"
    config.data.image_size, config.data.crop_size = 34, 32
    config.model.variant, config.model.init = "cifar", "he"
    config.model.width, config.model.num_classes = 1 / 16, 10
    model = create_model("cifar", width=1 / 16, init="he", num_classes=10)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    with Checkpointer(folder / "run" / "checkpoints") as checkpoints:
        checkpoints.save(
            3,
            {"step": np.int32(3), **variables},
            metadata={"config": as_json(config)},
            top1_error=0.5,
        )
    write_config(folder / "run", config)
    write_class_names(folder / "run", [f"class {k}" for k in range(10)])
    mean = np.full((34, 34, 3), 99, np.float32)
    statistics = Statistics(mean, np.ones(3, "f4"), np.eye(3, dtype="f4"), 7, 7)
    statistics.save(folder / "run" / "statistics.npz")
    found = {name: str(folder / name) for name in ("file", "run", "new")}
    return found | {"image": str(folder / "image.png")}


NO_HOME = "there is no home ~nobodyx here. Write the whole path"
FILE = "file is a file, where a folder has to be. Name a place that can be written to"
COMMA = "has a comma with nothing before or behind it"
MISTAKES = [
    (main, "--workdir=~nobodyx/run", NO_HOME),
    (main, "--workdir={file}/x", FILE),
    (main, "--mode=eval --workdir={run} --predictions={file}/x.npz", FILE),
    (prepare, "textures --data_dir={file}", FILE),
    (export, "--workdir={run} --out={file}/x.onnx", FILE),
    (report, "--workdir={run},{run} --out={file}/x.png", FILE),
    (predict, "--workdir={run} --figure={file}/x.png {image}", FILE),
    (retrieve, "--workdir={run} --index={file}/x.npz --layer=pool3", FILE),
    (main, "--mode=eval --workdir={run},,{run}", COMMA),
]


@pytest.mark.parametrize(
    "module, arguments, words",
    [pytest.param(*m, id=f"{m[0].__name__.rpartition('.')[2]} {m[1]}") for m in MISTAKES],
)
def test_wrong_path_gives_one_message(module, arguments, words, places, monkeypatch, capsys):
    folder = Path(places["run"]).parent
    before = sorted(folder.rglob("*"))
    given = [word.format(**places) for word in arguments.split()]
    assert exit_status(module, given, monkeypatch) == 1
    out, err = capsys.readouterr()
    assert words in err
    assert "Traceback" not in err
    assert err.count("\n") == 1 and not out
    left = {*folder.rglob("*")} - {*before}
    assert {path.name for path in left} <= {".readers"}


def test_home_is_expanded_in_every_command(places, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(Path(places["run"]).parent))
    assert export.main(["--workdir=~/run", f"--out={tmp_path / 'x.safetensors'}"]) == 0
    assert predict.main(["--workdir=~/run", places["image"]]) == 0
