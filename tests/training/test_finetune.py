"""Runs that start from trained weights."""

import importlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from PIL import Image

from alexnet_jax import export, load
from alexnet_jax.models import variants
from alexnet_jax.models.weights.files import Weights
from alexnet_jax.models.weights.safetensors import save_safetensors
from alexnet_jax.training import experiment, finetune, loop
from alexnet_jax.training import load as load_lib
from alexnet_jax.training.config import ConfigError
from alexnet_jax.training.writers import read_metrics
from tests.models.test_variants import TWO_SIXES
from tests.training.runs import columns_config, small_config
from tests.training.test_distributed import run_together

ROOT = Path(__file__).parents[2]
KEPT = ("conv1", "conv2", "conv3")


@pytest.fixture
def source(workdir):
    """Return the workdir of a network of three classes, with its own mean image."""
    return workdir


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Return a class folder of two other classes, dark and bright."""
    root = tmp_path_factory.mktemp("shapes")
    rng = np.random.default_rng(1)
    for index in range(24):
        label = index % 2
        image = rng.integers(150 * label, 150 * label + 100, (32, 32, 3))
        target = root / ("train" if index < 18 else "test") / ["dark", "bright"][label]
        target.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.astype(np.uint8)).save(target / f"{index:03d}.png")
    return root


def config_from(source, shapes):
    config = small_config(shapes, num_epochs=1.0)
    config.schedule.name, config.schedule.patience = "cosine", 5
    config.finetune.source = str(source)
    return config


def leaves(state):
    """Return all variables of a state by name, such as `params/conv1/kernel`."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return {name: np.asarray(leaf) for name, leaf in flatten_dict(variables, sep="/").items()}


def trained_leaves(source):
    return {name: np.asarray(leaf) for name, leaf in flatten_dict(load(source)[1], sep="/").items()}


def test_weights_and_mean_are_kept_except_the_classifier(source, shapes):
    config = config_from(source, shapes)
    config.model.overrides.activation = "tanh"  # of the same shapes
    built = experiment.build(config)
    scratch, trained = leaves(built.init_state()), trained_leaves(source)
    begun, state, lines = finetune.begin(built)
    for name, array in leaves(state).items():
        kept = name.split("/")[1] in KEPT
        want = trained[name] if kept else scratch[name]
        np.testing.assert_array_equal(array, want, err_msg=name)
        assert kept or array.shape[-1] == 2
    mean = load_lib.read_network(source).mean
    np.testing.assert_array_equal(begun.statistics.mean_image, mean)
    assert np.abs(mean - built.statistics.mean_image).max() > 1
    own = built.statistics.pca_std_255
    np.testing.assert_array_equal(begun.statistics.pca_std_255, own)
    line = f"starting from the weights and the mean image of {source}, but new: fc10"
    warning = "WARNING: the weights are of another network of the same shapes: "
    assert lines == [line, f"{warning}activation=None there, tanh here"]


def test_mean_colour_is_used_for_another_image_size(source, shapes):
    config = config_from(source, shapes)
    config.data.image_size = 40
    begun, *_ = finetune.begin(experiment.build(config))
    colour = load_lib.read_network(source).mean.mean(axis=(0, 1))
    mean = begun.statistics.mean_image
    assert mean.shape == (40, 40, 3)
    np.testing.assert_allclose(mean, np.broadcast_to(colour, mean.shape), rtol=1e-6)


def test_a_run_keeps_frozen_layers_and_resumes_without_its_source(source, shapes, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    config = config_from(copy, shapes)
    config.finetune.new_layers = ("conv3",)
    config.schedule.layer_factors = (("conv1", 0, 0), ("fc10", 0, 10))
    straight = leaves(loop.train_and_evaluate(config, tmp_path / "straight"))
    assert "but new: conv3, fc10; frozen: conv1\n" in capsys.readouterr().out
    config.max_steps = 1
    loop.train_and_evaluate(config, tmp_path / "twice")
    shutil.rmtree(copy)
    config.max_steps = -1
    twice = leaves(loop.train_and_evaluate(config, tmp_path / "twice"))
    trained = trained_leaves(source)
    for name, array in straight.items():
        np.testing.assert_array_equal(array, twice[name], err_msg=name)
        assert np.array_equal(array, trained[name]) == ("conv1" in name), name
    # The mean image stays with the weights.
    mean = load_lib.read_network(tmp_path / "twice").mean
    np.testing.assert_array_equal(mean, load_lib.read_network(source).mean)
    assert read_metrics(tmp_path / "twice" / "metrics.jsonl")[-1]["step"] == 3


def test_columns_share_the_weights_of_one_device(folder, tmp_path):
    config = columns_config(folder, eval_split="", eval_every_epochs=0.0, max_steps=0)
    loop.train_and_evaluate(config, tmp_path / "source")
    config.seed, config.finetune.source = 1, str(tmp_path / "source@latest")
    _, state, _ = finetune.begin(experiment.build(config))
    trained = trained_leaves(tmp_path / "source")
    for name, array in leaves(state).items():
        same = np.array_equal(array, trained[name])
        assert same == (name != "params/fc8/kernel"), name
    kernel = state.params["fc6"]["kernel"]
    assert len(kernel.sharding.device_set) == 2 and not kernel.is_fully_replicated


def test_a_new_layer_restarts_its_own_norm_only(shapes, tmp_path, monkeypatch):
    monkeypatch.setitem(variants.VARIANTS, TWO_SIXES.name, TWO_SIXES)
    config = small_config(shapes)
    config.model.variant = TWO_SIXES.name
    config.data.image_size = config.data.crop_size = side = TWO_SIXES.crop_size
    built = experiment.build(config)
    scratch = leaves(built.init_state())
    trained = {name: leaf + np.float32(1) for name, leaf in scratch.items()}
    settings = {"variant": TWO_SIXES.name, "num_classes": 2, "init": "he"}
    mean = np.full(3, 99, np.float32)
    weights = Weights(settings, unflatten_dict(trained, sep="/"), mean, side, side)
    config.finetune.source = str(tmp_path / "trained.safetensors")
    save_safetensors(config.finetune.source, weights)
    config.finetune.new_layers = ("fc6",)
    found = leaves(finetune.begin(built)[1])
    for name, leaf in found.items():
        is_new = name.split("/")[1] in ("fc6", "norm_fc6", "fc8")
        want = scratch[name] if is_new else trained[name]
        np.testing.assert_array_equal(leaf, want, err_msg=name)
    assert {"batch_stats/norm6/mean", "batch_stats/norm_fc6/mean"} < set(found)


def test_the_config_takes_the_network_of_its_source(source):
    module = importlib.import_module("configs.finetune")
    config = module.get_config(str(source))
    assert config.finetune.source == str(source)
    assert (config.model.variant, config.model.init) == ("cifar", "he")
    assert (config.data.image_size, config.data.crop_size) == (34, 32)
    assert config.model.num_classes == 0
    assert config.schedule.layer_factors == (("fc10", 0.0, 10.0),)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"model.width": 0.5},
            r"does not hold the layers .*:\n(  - conv\d/\w+ is \(.*\) there, .* here\n){6}Take",
        ),
        ({"model.variant": "cifar_11"}, r"\n  - local\w+ is not there\n"),
        ({"finetune.new_layers": ("fc9",)}, "'fc9' must be one of conv1, conv2, conv3"),
        ({"finetune.source": "nowhere@3"}, "nowhere is not the workdir of a run"),
    ],
)
def test_weights_of_another_network_are_refused(source, shapes, tmp_path, changes, words):
    config = config_from(source, shapes)
    config.update_from_flattened_dict(changes)
    if "model.variant" in changes:
        config.data.crop_size = 24
    with pytest.raises((ConfigError, FileNotFoundError), match=words):
        loop.train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_start_from_a_file(source, shapes, tmp_path):
    """Start processes that both read the file before they connect."""
    weights = tmp_path / "net.safetensors"
    assert export.main([f"--workdir={source}", f"--out={weights}"]) == 0
    config_file = f"{ROOT}/configs/finetune.py:{weights}"
    fields = f"--config.data.source=folder:{shapes}", "--config.data.batch_size=6"
    run_together(config_file, tmp_path / "run", 2, *fields, "--config.max_steps=0")
    trained, begun = (trained_leaves(where) for where in (source, tmp_path / "run"))
    for name in trained:
        if name.split("/")[1] in KEPT:
            np.testing.assert_array_equal(trained[name], begun[name], err_msg=name)
    assert begun["params/fc10/bias"].shape == (2,)
