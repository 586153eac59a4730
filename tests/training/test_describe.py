"""What the tables of --mode=describe say about devices."""

import jax
import pytest

from alexnet_jax.models import variants
from alexnet_jax.training import communication, describe, experiment
from alexnet_jax.training.parallel import MODES
from configs import common
from tests.models.test_variants import TWO_SIXES

FULL_IMAGE_VALUES = {"conv3": 13 * 13 * 128, "fc6": 6 * 6 * 128, "fc7": 2048}


def config_on(mode, data, column, **changes):
    config = common.get_config()
    config.parallel.mode = mode
    config.parallel.data, config.parallel.column = data, column
    for name, value in changes.items():
        setattr(config.model, name, value)
    return config


def network_of(config):
    return experiment.make_model(config, None)


@pytest.mark.parametrize(
    "devices, batch, variant, expected",
    [
        (1, 128, "paper", [("columns", 1, 1)]),
        (2, 128, "paper", [("data", 2, 1), ("columns", 1, 2), ("hybrid", 1, 2)]),
        (8, 128, "paper", [("data", 8, 1), ("columns", 4, 2), ("hybrid", 1, 8)]),
        (8, 128, "owt", [("data", 8, 1), ("hybrid", 1, 8)]),
        # Of 12 pictures only columns can give each row as many.
        (8, 12, "paper", [("columns", 4, 2)]),
        (3, 12, "paper", [("data", 3, 1), ("columns", 3, 1)]),
    ],
)
def test_the_modes_that_fit(devices, batch, variant, expected, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    mode = "columns" if variant == "paper" else "data"
    config = config_on(mode, -1, -1, variant=variant)
    if devices in (1, 3):
        config.parallel.data, config.parallel.column = devices, 1
    config.data.batch_size = batch
    found, left_out = describe.meshes(config, network_of(config), devices)
    assert found == expected
    named = {line.partition(":")[0] for line in left_out} | {mode for mode, *_ in found}
    assert named == set(MODES) or devices == 1


def test_what_does_not_fit_is_said(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 3)
    config = config_on("columns", 1, 2)
    _, left_out = describe.meshes(config, network_of(config), 3)
    assert left_out[0] == "data: 128 images do not divide by 3"
    assert "4096 units of fc6 do not divide by 3" in left_out[1]


def test_the_paper_in_two_columns_at_full_width():
    """Volumes of section 3.2 and the 3 GB of its cards, from the compiled program."""
    config = config_on("columns", 1, 2)
    found = describe.summarize_mode(config, network_of(config), "columns", 1, 2)
    assert dict(found.counts("forward")) == {"all-gather": 3, "all-reduce": 1}
    assert dict(found.counts("backward")) == {"reduce-scatter": 3}
    assert not found.counts("gradients")
    each_way = 128 * 4 * sum(FULL_IMAGE_VALUES.values())
    assert found.sent_bytes("backward") == each_way
    assert found.sent_bytes("forward") == each_way + 128 * 4 * 1000
    state = 2 * 4 * 60_965_224 / 2  # weights and velocities, half of them
    assert state < found.memory_bytes < 1.5e9


def test_a_table_has_a_line_for_each_phase():
    exchange = communication.Exchange("all-reduce", "f32", (1000, 500), 4, "gradients")
    rows = [
        describe.ModeSummary("data", 1, 1, [], 2_000_000),
        describe.ModeSummary("hybrid", 1, 4, [exchange] * 3, 1_234_567_890),
    ]
    lines = describe.mode_table(rows)
    assert lines[0].split("  ")[0] == "mode"
    assert lines[2].split() == ["data", "1", "x", "1", "none", "0.00", "2"]
    assert lines[3].split() == (
        ["hybrid", "1", "x", "4", "gradients", "3", "all-reduce", "9.00", "1,235"]
    )


def test_every_mode_is_described(monkeypatch, capsys):
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    config = config_on("data", 2, 1, variant="cifar")
    config.data.image_size = config.data.crop_size = 32
    text = describe.describe_modes(config)
    assert capsys.readouterr().out.count("compiling mode") == 2
    assert [line.split()[0] for line in text.splitlines() if " x " in line[8:18]] == [
        *("data", "hybrid"),
    ]


def test_two_layers_of_one_number_are_described_in_every_mode(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    monkeypatch.setitem(variants.VARIANTS, TWO_SIXES.name, TWO_SIXES)
    config = config_on("data", 2, 1, variant=TWO_SIXES.name)
    config.data.image_size = config.data.crop_size = TWO_SIXES.crop_size
    layers = [line.split()[0] for line in describe.describe(config).splitlines()[4:-2]]
    assert layers == ["conv1", "conv6", "norm6", "fc6", "norm_fc6", "fc8"]
    text = describe.describe_modes(config, log=lambda _: None)
    found = [line.split()[0] for line in text.splitlines() if " x " in line[8:18]]
    assert found == ["data", "columns", "hybrid"]
