"""Files of a workdir, of this version and older ones."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from alexnet_jax.data import DataError
from alexnet_jax.data.statistics import Statistics
from alexnet_jax.training import experiment, load, loop
from alexnet_jax.training.config import ConfigError, get_config
from alexnet_jax.training.step_folders import MANIFEST


def small_config():
    config = get_config()
    config.data.source = "fake"
    config.data.image_size, config.data.crop_size, config.data.batch_size = 34, 32, 32
    config.model.variant, config.model.init = "cifar", "he"
    config.model.width = 0.25
    return config


@dataclasses.dataclass
class Pictures:
    """A data source without images."""

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


@pytest.fixture
def workdir(tmp_path):
    """A workdir with a config, statistics and an empty checkpoint."""
    step = tmp_path / "checkpoints" / "3"
    step.mkdir(parents=True)
    (step / MANIFEST).touch()
    load.write_config(tmp_path, small_config())
    STATISTICS.save(tmp_path / "statistics.npz")
    return tmp_path


def stored(workdir, change):
    path = workdir / "config.json"
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def test_changed_fields_are_printed(workdir):
    assert loop.prepare(small_config(), workdir)[0] == []
    config = small_config()
    config.optim.learning_rate = 0.5
    config.data.workers = 3
    lines, _ = loop.prepare(config, workdir)
    assert lines == [
        "the config differs from this workdir's:",
        "  --config.data.workers: 2 in the workdir, now 3",
        "  --config.optim.learning_rate: 0.01 in the workdir, now 0.5",
    ]


def test_workdir_of_an_older_version_is_resumed(workdir):
    def older(tree):
        del tree["summaries_every_steps"], tree["model"]["overrides"]["skip"]
        del tree["finetune"]
        tree["optim"]["nesterov"] = True  # and one that there is not any more

    stored(workdir, older)
    assert loop.prepare(small_config(), workdir)[0] == []
    config = small_config()
    config.summaries_every_steps = 7  # the workdir has the default
    assert loop.prepare(config, workdir)[0][1:] == [
        "  --config.summaries_every_steps: 0 in the workdir, now 7"
    ]


def test_damaged_config_is_refused(workdir):
    path = workdir / "config.json"
    path.write_text("")
    for read in (loop.prepare, load.with_network_of):
        with pytest.raises(ConfigError, match=f"{path} is damaged: Expecting value"):
            read(small_config(), workdir)


def test_resumed_run_prints_its_mean_image(workdir, capsys):
    path = workdir / "statistics.npz"
    loop.prepare(small_config(), workdir)
    assert f"mean image: {path}, of 7 images\n" in capsys.readouterr().out
    dataclasses.replace(STATISTICS, split_examples=70).save(path)
    loop.prepare(small_config(), workdir)
    assert f"mean image: {path}, of 7 of 70 images\n" in capsys.readouterr().out


def test_statistics_of_another_size_are_refused(workdir):
    path = workdir / "statistics.npz"
    others = np.zeros((32, 32, 3), np.float32)
    dataclasses.replace(STATISTICS, mean_image=others).save(path)
    words = f"{path}: the mean image is 32 x 32 pixels, the pictures here are 34 x 34"
    with pytest.raises(DataError, match=re.escape(words)):
        loop.prepare(small_config(), workdir)
