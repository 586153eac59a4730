"""The figures show what they are given."""

import numpy as np
import pytest

from alexnet_jax.analysis import compare_losses, first_layer_filters, training_curves
from alexnet_jax.analysis.filters import _sheet


def test_every_kernel_has_its_tile():
    pictures = np.zeros((2, 3, 3, 6))
    pictures[...] = np.arange(6) / 10
    sheet = _sheet(pictures, across=3)
    assert sheet.shape == (2 * 3 - 1, 3 * 4 - 1, 3)
    assert [sheet[3 * (i // 3), 4 * (i % 3), 0] for i in range(6)] == pytest.approx(
        [0, 0.1, 0.2, 0.3, 0.4, 0.5]
    )
    assert (sheet[2] == 1).all() and (sheet[:, 3] == 1).all()  # white between them


def test_filters_have_a_panel_a_column():
    kernel = np.random.default_rng(0).normal(size=(11, 11, 3, 96))
    panels = first_layer_filters(kernel, columns=2).axes
    assert len(panels) == 2
    # Three rows of 16, as in the paper's figure 3.
    shown = panels[0].images[0].get_array()
    assert shown.shape == (3 * 12 - 1, 16 * 12 - 1, 3)
    assert "48 kernels" in panels[0].get_title(loc="left")
    with pytest.raises(ValueError, match="96 kernels do not divide into 5"):
        first_layer_filters(kernel, columns=5)


def test_curves_hold_the_records():
    records = [
        {"epoch": 1.0, "train/loss": 2.0, "train/top1_error": 0.9},
        {"epoch": 1.0, "eval/loss": 1.5, "eval/top1_error": 0.5},
        {"epoch": 2.0, "train/loss": 1.0, "train/top1_error": 0.4},
    ]
    loss, error = training_curves(records).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in error.lines}
    assert lines == {
        "training": [[1.0, 90.0], [2.0, 40.0]],
        "held out": [[1.0, 50.0]],
    }
    assert loss.lines[0].get_xydata().tolist() == [[1.0, 2.0], [2.0, 1.0]]


def test_compared_runs_hold_their_records():
    runs = {
        "paper": [{"step": 0, "train/loss": 7.0}, {"step": 10, "train/loss": 6.9}],
        "caffe": [{"step": 10, "train/loss": 5.0}, {"step": 10, "eval/loss": 6.0}],
    }
    [axes] = compare_losses(runs, chance=6.9).axes
    paper, caffe, chance = axes.lines
    assert paper.get_label() == "paper"
    assert paper.get_xydata().tolist() == [[0, 7.0], [10, 6.9]]
    assert caffe.get_xydata().tolist() == [[10, 5.0]]
    assert set(chance.get_ydata()) == {6.9}
