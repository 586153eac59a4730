"""Configs: types, known mistakes, command lines, config files, and a workdir's own."""

import dataclasses
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from absl.testing import flagsaver

from alexnet_jax import experiment, fields, main, train
from alexnet_jax.checkpoint import MANIFEST
from alexnet_jax.data import DataError
from alexnet_jax.data.statistics import Statistics
from alexnet_jax.experiment import ConfigError
from alexnet_jax.sweeps import plan as plan_lib
from configs import common

ROOT = Path(__file__).parent.parent
DEFAULTS = experiment.flat(common.get_config().to_dict())


def type_of(field):
    """The type of a field's values, as configs/common.py has it."""
    *path, name = field.split(".")
    config = common.get_config()
    for part in path:
        config = config[part]
    return config.get_type(name)


def small_config():
    config = common.get_config()
    config.data.source = "fake"
    config.data.image_size, config.data.crop_size, config.data.batch_size = 34, 32, 32
    config.model.variant, config.model.init = "cifar", "he"
    config.model.width = 0.25
    return config


@dataclasses.dataclass
class Pictures:
    """As much of a data set as a config is built with."""

    num_examples: int = 1_281_167
    num_classes: int = 10
    image_size: int = 34
    description: str = "pictures"
    left_out: str = ""
    statistics_path: Path | None = None
    class_names: tuple[str, ...] = tuple("abcdefghij")

    def labels_of(self, indices):
        return indices % self.num_classes


@pytest.fixture(autouse=True, scope="module")
def _no_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "_open_sources", lambda *_: (Pictures(), None))
        yield


STATISTICS = Statistics(
    np.zeros((34, 34, 3), np.float32),
    np.ones(3, np.float32),
    np.eye(3, dtype=np.float32),
    7,
)


WRONG = {
    bool: (3, "x", None),
    int: (True, 0.5, "x", None),
    float: ("x", (0.5,), None),
    str: (3, True, None),
    tuple: ("x", 3, None),
}


@pytest.mark.parametrize("field", sorted(DEFAULTS))
def test_every_field_refuses_another_type(field):
    """ml_collections refuses most; `validate` None, and True in place of a number."""
    for value in WRONG[type_of(field)]:
        if value is None and "overrides." in field:
            continue
        config = small_config()
        with pytest.raises((TypeError, ConfigError), match=field.rpartition(".")[2]):
            config.update_from_flattened_dict({field: value})
            experiment.validate(config, devices=False)


def test_every_field_has_a_type():
    assert set(fields._KINDS) == {f for f in DEFAULTS if "overrides." not in f}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("model.overrides.pool_window", 60), "pool_window=60 and pool_stride=2 do not"),
        (("model.overrides.columns", 0), "columns=0 must be a whole number of at least"),
        (("model.width", 0.0), "width=0.0 must be above 0"),
        (("num_epochs", math.nan), "num_epochs=nan is out of range: above 0."),
        (("optim.learning_rate", "fast"), "learning_rate='fast' must be a number"),
        (("data.batch_size", 32.0), "batch_size=32.0 must be a whole number"),
        (("augment.flip", 1), "flip=1 must be True or False"),
        (("schedule.drop_epochs", (1.0, "x")), "(1.0, 'x') must be numbers in a tuple"),
        (("data.image_size", 0), "image_size=0 is out of range: at least 1"),
        (("parallel.column", 0), "1 mistake in the config:\n  - --config.parallel.column"),
        (("model", 5), "--config.model.variant is missing"),
        (("data.batch_size", 2**31 - 8),
         "batch_size=2147483640: the loader holds 5 batches of 2,147,483,640 pictures"),
    ],
)  # fmt: skip
def test_known_mistakes_are_sentences(change, words):
    config = small_config()
    with config.ignore_type():
        config.update_from_flattened_dict(dict([change]))
    with pytest.raises(ConfigError, match=re.escape(words)):
        experiment.build(config, statistics=STATISTICS)


# --- the command line ---------------------------------------------------------------


def parsed(monkeypatch, *arguments):
    """The config of a command line, as main has it; its flags are as before again."""
    argv = ["main", *arguments]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", argv)
    with flagsaver.flagsaver():
        assert main._parse(argv) == ["main"]
        return main._CONFIG.value


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--config.seed=x", "flag --config.seed=x"),
        ("--config.model.widht=1", "no such field: widht. Did you mean"),
        ("--config.optm.momentum=1", 'no such field: optm. Did you mean "optim"'),
        ("--config.model.overrides.depth=1", "no such field: depth"),
        ("--config.schedule.drop_epochs=(1.0,", "drop_epochs"),
        ("--nosuch=1", "Unknown command line flag 'nosuch'"),
        ("--workdir", "Missing value for flag --workdir"),
        ("--mode=dance", "--mode=dance"),
        ("--cpu_devices=0", "--cpu_devices=0"),
    ],
)
def test_what_a_command_line_says(argument, words, monkeypatch):
    with pytest.raises(ConfigError) as error:
        parsed(monkeypatch, "--config=configs/tiny.py", argument)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_tuples_on_the_command_line(monkeypatch):
    skip = "--config.model.overrides.skip=('conv3',)"
    drops = "--config.schedule.drop_epochs=(1.0, 2.0)"
    config = parsed(monkeypatch, "--config=configs/tiny.py", skip, drops)
    assert config.model.overrides.skip == ("conv3",)
    assert config.schedule.drop_epochs == (1.0, 2.0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config="], "--config=FILE is missing"),
        (["--config", "--workdir=DIR"], "--config=FILE is missing"),
        (["--config.seed=1"], "--config=FILE is missing"),
        (["--config=README.md"], "README.md is no Python file, as configs/paper.py is"),
        (["--config=configs/none.py"], f"none.py: there is no such file in {ROOT}"),
        (["--config.seed=1", "--config=configs/tiny.py"],
         r"config\.seed=1 in argv before a value for"),
    ],
)  # fmt: skip
def test_missing_config_file_is_named(arguments, words, monkeypatch):
    with pytest.raises(ConfigError, match=words):
        parsed(monkeypatch, *arguments)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def get_config():\n    pass\n", "return a ConfigDict; it returns NoneType"),
        ("seed = 1\n", "own.py could not be used: it defines no get_config()"),
    ],
)
def test_files_that_are_no_configs(text, words, monkeypatch, tmp_path):
    (tmp_path / "own.py").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(words)):
        parsed(monkeypatch, f"--config={tmp_path / 'own.py'}")


@pytest.mark.parametrize("error", ["ValueError", "AttributeError", "ZeroDivisionError"])
def test_what_a_config_file_raises_keeps_its_traceback(error, monkeypatch, tmp_path):
    path = tmp_path / "own.py"
    path.write_text(f"def get_config():\n    raise {error}('mine')\n")
    with pytest.raises(Exception, match="^mine$") as raised:
        parsed(monkeypatch, f"--config={path}")
    assert raised.typename == error
    last = raised.traceback[-1]
    assert (Path(last.path), last.lineno + 1) == (path, 2)


# --- a workdir's own config ---------------------------------------------------------


@pytest.fixture
def workdir(tmp_path):
    """Of a run that has begun, as far as its config is concerned."""
    step = tmp_path / "checkpoints" / "3"
    step.mkdir(parents=True)
    (step / MANIFEST).touch()
    experiment.write_config(tmp_path, small_config())
    STATISTICS.save(tmp_path / "statistics.npz")
    return tmp_path


def stored(workdir, change):
    path = workdir / "config.json"
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def test_a_field_that_differs_is_printed(workdir):
    assert train.prepare(small_config(), workdir)[0] == []
    config = small_config()
    config.optim.learning_rate = 0.5
    config.data.workers = 3
    lines, _ = train.prepare(config, workdir)
    assert lines == [
        "the config differs from this workdir's:",
        "  --config.data.workers: 2 in the workdir, now 3",
        "  --config.optim.learning_rate: 0.01 in the workdir, now 0.5",
    ]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model.width", 0.5),
        ("model.variant", "cifar_13"),
        ("model.overrides.dropout", 0.25),
        ("model.dtype", "bfloat16"),
        ("data.image_size", 40),
    ],
)
def test_another_network_is_refused_with_its_line(field, value, workdir):
    config = small_config()
    config.update_from_flattened_dict({field: value})
    if value == "cifar_13":
        config.data.crop_size = 24
    with pytest.raises(ConfigError, match=f"another network:\n(.*\n)*.*{field}: "):
        train.prepare(config, workdir)


def test_a_workdir_of_before_a_field_goes_on(workdir):
    def older(tree):
        del tree["stall_after_steps"], tree["model"]["overrides"]["skip"]
        del tree["finetune"]
        tree["optim"]["nesterov"] = True  # and one that there is not any more

    stored(workdir, older)
    lines, _ = train.prepare(small_config(), workdir)
    text = "\n".join(lines)
    assert "--config.stall_after_steps: newer than the workdir, now 5000" in text
    nesterov = (
        "--config.optim.nesterov: True in the workdir; there is no such field any"
    )
    assert nesterov in text
    assert "None" not in text
    assert "skip" not in text


def test_a_broken_config_of_a_workdir_is_said(workdir):
    path = workdir / "config.json"
    path.write_text("")
    for read in (train.prepare, experiment.with_network_of):
        with pytest.raises(ConfigError, match=f"{path} is damaged: Expecting value"):
            read(small_config(), workdir)


def test_statistics_that_are_missing_are_said(workdir):
    (workdir / "statistics.npz").unlink()
    with pytest.raises(FileNotFoundError, match="statistics.npz is missing: the mean"):
        experiment.read_network(workdir)


def test_a_resumed_run_says_where_its_mean_image_comes_from(workdir, capsys):
    path = workdir / "statistics.npz"
    train.prepare(small_config(), workdir)
    assert f"mean image: {path}, of 7 images\n" in capsys.readouterr().out
    dataclasses.replace(STATISTICS, split_examples=70).save(path)
    train.prepare(small_config(), workdir)
    assert f"mean image: {path}, of 7 of 70 images\n" in capsys.readouterr().out


def test_statistics_of_another_size_are_said(workdir):
    path = workdir / "statistics.npz"
    others = np.zeros((32, 32, 3), np.float32)
    dataclasses.replace(STATISTICS, mean_image=others).save(path)
    words = f"{path}: the mean image is 32 x 32 pixels, the pictures here are 34 x 34"
    with pytest.raises(DataError, match=re.escape(words)):
        train.prepare(small_config(), workdir)
    # Beside the data, under a name of their size.
    pictures = Pictures(statistics_path=path)
    with pytest.raises(DataError, match=re.escape(words)):
        experiment._find_own_statistics(small_config(), pictures, print)


def test_a_sweep_of_before_a_field_goes_on(workdir):
    """What was not said yet was the default."""
    row = plan_lib.Run("a", None, 0, "configs/tiny.py", {"optim.momentum": 0.5})
    config = plan_lib.set_fields(plan_lib.load_config(row.config), row.overrides, "")
    experiment.write_config(workdir, config)
    path = workdir / "config.json"
    assert plan_lib.differences(row, path) == []

    def older(tree):
        del tree["stall_after_steps"], tree["optim"]["momentum"], tree["finetune"]

    stored(workdir, older)
    assert plan_lib.differences(row, path) == [
        "optim.momentum: 0.9 there, 0.5 asked for"
    ]
    path.write_text("{")
    with pytest.raises(ConfigError, match="config.json is damaged"):
        plan_lib.differences(row, path)
