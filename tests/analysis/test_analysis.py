"""The figures show their input."""

import numpy as np
import pytest

from alexnet_jax.analysis.figures import (
    feature_maps,
    filter_statistics,
    filter_statistics_by_column,
    first_layer_filters,
    nearest_images,
    training_curves,
)


def test_filters_have_one_panel_per_column():
    kernel = np.random.default_rng(0).normal(size=(11, 11, 3, 96))
    panels = first_layer_filters(kernel, columns=2).axes
    assert len(panels) == 2
    # Three rows of 16, as in the paper's figure 3.
    shown = panels[0].images[0].get_array()
    assert shown.shape == (3 * 12 - 1, 16 * 12 - 1, 3)
    one = kernel[..., 17]  # in the second row, with white around it
    stretched = (one - one.min()) / (one.max() - one.min())
    np.testing.assert_allclose(shown[12:23, 12:23], stretched, rtol=1e-5, atol=1e-6)
    assert (shown[11] == 1).all() and (shown[:, 11] == 1).all()
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
    assert lines == {"training": [[1.0, 90.0], [2.0, 40.0]], "held out": [[1.0, 50.0]]}
    assert loss.lines[0].get_xydata().tolist() == [[1.0, 2.0], [2.0, 1.0]]


def test_chance_and_learning_rates_are_drawn():
    rates = [0.01] * 5 + [0.001] * 5 + [1e-4] * 5
    records = [{"epoch": k, "train/loss": 2.0, "lr": rate} for k, rate in enumerate(rates)]
    quantities = ["loss", "lr", "top1_error"]
    figure = training_curves(records, quantities=quantities, num_classes=10)
    loss, rate, error = figure.axes
    assert set(loss.lines[1].get_ydata()) == {np.log(10)}
    assert (rate.get_yscale(), len(rate.lines)) == ("log", 1)
    assert [set(line.get_ydata()) for line in error.lines] == [{90.0}]
    cosine = [{"epoch": k, "lr": 1 + np.cos(k / 20 * np.pi)} for k in range(20)]
    (rate,) = training_curves(cosine, quantities=["lr"]).axes
    assert rate.get_yscale() == "linear"


def test_compared_runs_hold_their_records():
    runs = {
        "paper": [{"epoch": 0, "train/loss": 7.0}, {"epoch": 10, "train/loss": 6.9}],
        "caffe": [{"epoch": 10, "train/loss": 5.0}, {"epoch": 10, "eval/loss": 6.0}],
    }
    figure = training_curves(runs, quantities=["loss"])
    [axes] = figure.axes
    paper, caffe, held_out = axes.lines
    assert paper.get_xydata().tolist() == [[0, 7.0], [10, 6.9]]
    assert caffe.get_xydata().tolist() == [[10, 5.0]]
    assert held_out.get_xydata().tolist() == [[10, 6.0]]
    assert paper.get_color() != caffe.get_color() == held_out.get_color()
    (legend,) = figure.legends
    names = [words.get_text() for words in legend.get_texts()]
    assert names == ["paper", "caffe", "training", "held out"]
    assert legend.get_lines()[1].get_color() == caffe.get_color()


def test_six_runs_are_told_apart_and_seven_refused():
    records = [{"epoch": 1.0, "train/loss": 1.0, "eval/loss": 1.0}]
    figure = training_curves({str(k): records for k in range(6)}, quantities=["loss"])
    (axes,) = figure.axes
    held_out = axes.lines[1::2]
    assert len({line.get_color() for line in held_out}) == 6
    assert len({line.get_marker() for line in held_out}) == 6
    with pytest.raises(ValueError, match="at most 6 runs .*; 7 were given"):
        training_curves({str(k): records for k in range(7)})


def gratings(*angles):
    """Return grey gratings [11, 11, 3, n] whose edges have these angles in degrees."""
    x, y = np.meshgrid(np.arange(11.0), -np.arange(11.0))  # y grows upwards
    across = [np.radians(angle + 90) for angle in angles]
    waves = [np.sin(0.9 * (np.cos(a) * x + np.sin(a) * y)) for a in across]
    return np.stack([np.stack([wave] * 3, -1) for wave in waves], -1)


def test_orientations_of_gratings_are_found():
    found = filter_statistics(gratings(0, 30, 45, 90, 135, 170))
    want = np.radians([0, 30, 45, 90, 135, 170])
    apart = np.abs(found.orientation - want)
    np.testing.assert_array_less(np.minimum(apart, np.pi - apart), np.radians(3))
    assert (found.coherence > 0.9).all() and (found.colour < 1e-12).all()


def test_colour_is_the_share_that_grey_does_not_explain():
    grey = np.ones((3, 3))
    kernels = [
        np.stack([grey, -grey, 0 * grey], -1),  # red against green: all colour
        np.stack([grey, 0 * grey, 0 * grey], -1),  # 1 - 3 (1/3)^2 = 2/3
        np.stack([grey, grey, grey], -1),
        np.zeros((3, 3, 3)),
    ]
    found = filter_statistics(np.stack(kernels, -1))
    np.testing.assert_allclose(found.colour[:3], [1, 2 / 3, 0], atol=1e-12)
    assert np.isfinite(found.coherence).all() and found.coherence.max() == 0
    x, y = np.meshgrid(np.arange(11.0) - 5, np.arange(11.0) - 5)
    spot = np.exp(-(x**2 + y**2) / 8)[..., None, None] * np.ones((1, 1, 3, 1))
    assert filter_statistics(spot).coherence[0] < 1e-6


def test_statistics_are_drawn_by_column():
    kernel = np.concatenate([gratings(*range(0, 180, 15)), np.ones((11, 11, 3, 12))], -1)
    kernel[:, :, 1:, 12:] = 0
    left, right = filter_statistics_by_column(kernel, columns=2).axes
    labels = [text.get_text() for text in left.get_legend().get_texts()]
    assert labels == ["column 1: median 0% colour", "column 2: median 67% colour"]
    heights = [bar.get_height() for bar in right.patches]
    assert sum(heights[:8]) == 12 and sum(heights[8:]) == 0


def test_feature_maps_are_the_strongest_of_each_layer():
    image = np.zeros((32, 32, 3), np.uint8)
    conv = np.zeros((1, 4, 4, 3))
    conv[0, ..., 1], conv[0, ..., 2] = 2.0, np.arange(16).reshape(4, 4)
    features = {"conv1": conv, "fc6": np.ones((1, 10))}
    shown, maps = feature_maps(image, features, most=2).axes
    assert shown.images[0].get_array().shape == (32, 32, 3)
    assert maps.get_ylabel() == "conv1\n4×4×3\n35% zero"  # 17 of 48
    strip = np.asarray(maps.images[0].get_array())
    assert strip.shape == (4 * 13, 2 * 4 * 13 + 3)  # each value 13 pixels wide and high
    np.testing.assert_allclose(strip[6::13, 6:52:13], np.arange(16).reshape(4, 4) / 15)
    assert (strip[:, 52:55] == 1).all() and (strip[:, 55:] == 0).all()  # gap, constant


def test_neighbours_stand_beside_their_query():
    rng = np.random.default_rng(0)
    queries = rng.integers(0, 255, (2, 8, 8, 3), np.uint8)
    found = rng.integers(0, 255, (2, 3, 8, 8, 3), np.uint8)
    flat = found.reshape(6, 8, 8, 3)
    groups = [("nearest in fc7", flat, [*"abcdef"]), ("nearest in pixels", flat[::-1], [*"ghijkl"])]
    figure = nearest_images(queries, ["q", "r"], groups)
    shown = [np.asarray(axes.images[0].get_array()) for axes in figure.axes]
    np.testing.assert_array_equal(shown, [*queries, *flat, *flat[::-1]])
    assert [axes.get_title() for axes in figure.axes] == [*"qrabcdefghijkl"]
    headings = [part.get_suptitle() for part in figure.subfigs]
    assert headings == ["query", "nearest in fc7", "nearest in pixels"]
