"""A network from a user's file: trained with mixup and an average, resumed, loaded, exported."""

import runpy

import jax
import numpy as np
import pytest

import alexnet_jax
from alexnet_jax import export
from alexnet_jax.models.layers import Conv, Dense, Variant
from alexnet_jax.training import describe, loop
from alexnet_jax.training.config import ConfigError, get_config, validate
from alexnet_jax.training.load import load_config

FILE = """
from alexnet_jax.models.layers import Activation, BatchNorm, Conv, Dense, Variant
from alexnet_jax.models.variants import DROPPED, NORM_POOL, POOLED

MINE = Variant("mine", columns=2, grid=16, crop_size=32, layers=(
    Conv("conv1", 16, 5, stride=2, padding=2, then=NORM_POOL),
    Conv("conv2", 16, 3, padding=1, sees="own", then=(BatchNorm(), Activation("relu"))),
    Conv("conv3", 16, 3, padding=1, then=POOLED),
    Dense("fc4", 16, bias=1.0, then=DROPPED),
    Dense("fc5", 10, then=()),
))
"""


def own_config(path, mode, source="fake"):
    config = get_config()
    config.model.variant, config.model.init = f"{path}:MINE", "he"
    config.data.source, config.data.batch_size = source, 8
    config.data.image_size, config.data.crop_size = 36, 32
    config.parallel.mode, config.parallel.data, config.parallel.column = mode, 1, 2
    config.schedule.name, config.eval_every_epochs = "constant", 0.0
    config.optim.ema_decay, config.augment.mixup = 0.9, 0.2
    config.max_steps = 2
    return config


def assert_same(tree, other):
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("mode", ["columns", pytest.param("hybrid", marks=pytest.mark.slow)])
def test_a_table_from_a_file_is_stored_with_its_run(mode, folder, tmp_path, capsys):
    path, workdir = tmp_path / "my_networks.py", tmp_path / "run"
    path.write_text(FILE)
    state = loop.train_and_evaluate(own_config(path, mode, f"folder:{folder}"), workdir)
    path.unlink()  # the run has all that it needs

    model, variables, _ = alexnet_jax.load(workdir)
    assert [row.name for row in model.network.layers] == ["conv1", "conv2", "conv3", "fc4", "fc5"]
    assert_same(variables["params"], state.extra["average"])
    with pytest.raises(AssertionError):
        assert_same(variables["params"], state.params)

    config = load_config(str(workdir / "config.json"))
    assert "conv3" in describe.describe(config)
    config.max_steps = 3
    resumed = loop.train_and_evaluate(config, workdir)
    assert int(resumed.step) == 3 and "resuming from step 2" in capsys.readouterr().out

    out = tmp_path / "mine.safetensors"
    export.main([f"--workdir={workdir}", f"--out={out}"])
    again, exported, _ = alexnet_jax.load(out)
    assert again.network == model.network
    assert_same(exported["params"], resumed.extra["average"])


def test_another_table_in_the_file_is_another_network(folder, tmp_path):
    path, workdir = tmp_path / "my_networks.py", tmp_path / "run"
    path.write_text(FILE)
    config = own_config(path, "columns", f"folder:{folder}")
    config.max_steps = 0
    loop.train_and_evaluate(config, workdir)
    path.write_text(FILE.replace('"fc4", 16', '"fc4", 32'))
    with pytest.raises(ConfigError, match=r"model.table: one table in the workdir, now another"):
        loop.train_and_evaluate(own_config(path, "columns", f"folder:{folder}"), workdir)


def test_wrong_table_names_are_refused(tmp_path):
    path = tmp_path / "my_networks.py"
    with pytest.raises(ConfigError, match=r"my_networks.py: there is no such file in /"):
        validate(own_config(path, "data"))
    path.write_text(FILE.replace("MINE", "YOURS"))
    with pytest.raises(ConfigError, match=r"my_networks.py has no table .MINE.; its tables: YOURS"):
        validate(own_config(path, "data"))


def test_own_network_is_saved_and_loaded(tmp_path):
    (tmp_path / "my_networks.py").write_text(FILE)
    table = runpy.run_path(str(tmp_path / "my_networks.py"))["MINE"]
    model = alexnet_jax.create_model(table, init="he")
    variables = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    names = [f"class {i}" for i in range(10)]
    path = tmp_path / "mine.safetensors"
    alexnet_jax.save(path, model, variables, mean=[1, 2, 3], image_size=36, class_names=names)
    again, found, preprocess = alexnet_jax.load(path)
    assert again.network == model.network
    assert_same(found, variables)
    images = preprocess(np.full((36, 36, 3), 5, np.uint8))
    np.testing.assert_array_equal(images[0, 0, 0], [4, 3, 2])


def test_wrong_tables_are_refused(tmp_path):
    row = Conv("conv1", 8, 3)
    with pytest.raises(ValueError, match="has two rows named 'conv1'"):
        Variant("twice", columns=1, grid=30, crop_size=32, layers=(row, row))
    with pytest.raises(ValueError, match="conv1 needs feature maps, and comes after a Dense row"):
        Variant("late", columns=1, grid=30, crop_size=32, layers=(Dense("fc", 8), row))
    path = tmp_path / "my_networks.py"
    path.write_text(FILE.replace("grid=16", "grid=17"))
    with pytest.raises(ConfigError, match=r"crop_size=33, or grid=16 in a table of your own"):
        validate(own_config(path, "data"))
