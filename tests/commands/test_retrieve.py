"""Neighbours by features: exact, from the command line, and of the right network."""

import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from alexnet_jax import load, retrieve
from alexnet_jax.analysis import retrieval
from alexnet_jax.analysis.codes import load_codes, train_coder
from alexnet_jax.analysis.features import Extractor
from alexnet_jax.analysis.retrieval import RetrievalError, nearest
from alexnet_jax.training import loop
from tests.training.runs import IMAGES, small_config


@pytest.fixture(scope="module")
def index_file(workdir, tmp_path_factory):
    path = tmp_path_factory.mktemp("index") / "deep" / "pool3.npz"
    arguments = [f"--workdir={workdir}", f"--index={path}", "--layer=pool3"]
    assert retrieve.main(arguments) == 0
    return path


def brute_force(features, queries, count):
    differences = features[None].astype(np.float64) - queries[:, None]
    distances = np.sqrt((differences**2).sum(-1))
    order = np.argsort(distances, axis=1, kind="stable")[:, :count]
    return np.take_along_axis(distances, order, 1), order


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_neighbours_equal_a_plain_search(block, monkeypatch):
    monkeypatch.setattr(retrieval, "BLOCK_BYTES", block * 4 * 20)
    rng = np.random.default_rng(0)
    features = rng.normal(size=(300, 20)).astype(np.float32)
    features[17] = features[211]  # a tie
    queries = np.concatenate([features[[211, 5]], rng.normal(size=(9, 20))])
    queries = queries.astype(np.float32)
    distances, rows = nearest(features, queries, 5)
    want_distances, want_rows = brute_force(features, queries, 5)
    np.testing.assert_array_equal(rows, want_rows)
    np.testing.assert_allclose(distances, want_distances, rtol=1e-12)
    assert rows[0, :2].tolist() == [17, 211] and distances[0, 1] == 0
    _, order = nearest(features[:3], queries, 9)
    np.testing.assert_array_equal(order, brute_force(features[:3], queries, 3)[1])


def test_neighbours_far_from_zero_are_told_apart():
    """Search where |q|^2 - 2 q x + |x|^2 alone, with terms of 1e8, would lose distances of 1."""
    rng = np.random.default_rng(1)
    features = (10_000 + rng.integers(0, 3, (40, 8))).astype(np.float32)
    queries = features[:6] + np.float32(0.25)
    want_distances, _ = brute_force(features, queries, 3)
    distances, _ = nearest(features, queries, 3)
    assert (distances[:, 0] == want_distances[:, 0]).mean() > 0.5
    pixels = rng.integers(0, 256, (50, 30), np.uint8)
    distances, rows = nearest(pixels, pixels[:4], 3)  # bytes, without wrapping round
    np.testing.assert_array_equal(rows, brute_force(pixels, pixels[:4], 3)[1])


def test_index_holds_the_features_of_the_training_images(index_file, workdir, folder):
    index = retrieval.load_index(index_file)
    model, variables, preprocess = load(workdir)
    paths = sorted(folder.glob("train/*/*.png"))
    features_of = jax.jit(model.apply, static_argnames="method")
    features = features_of(variables, preprocess(paths), method="features")["pool3"]
    np.testing.assert_allclose(
        index.features, np.reshape(features, (IMAGES, -1)), rtol=1e-4, atol=1e-5
    )
    names = [index.class_names[label] for label in index.labels]
    assert names == [path.parent.name for path in paths]
    assert index.pixels.shape == (IMAGES, 32 * 32 * 3)
    assert [p.name for p in index_file.parent.iterdir()] == ["pool3.npz"]


def test_images_are_looked_up(index_file, workdir, folder, tmp_path, capsys):
    paths = [str(path) for path in sorted(folder.glob("train/*/*.png"))]
    figure = tmp_path / "figure.png"
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    base = [f"--workdir={workdir}", f"--index={index_file}", "--top=3"]
    arguments = [paths[3], str(broken), paths[20], f"--figure={figure}"]
    assert retrieve.main([*base, "--format=json", *arguments]) == 1
    out, err = capsys.readouterr()
    first, second = (json.loads(line) for line in out.splitlines())
    assert (first["file"], second["file"]) == (paths[3], paths[20])
    for answer, row in ((first, 3), (second, 20)):
        assert len(answer["neighbours"]) == 3
        best = answer["neighbours"][0]
        assert best["row"] == row and best["distance"] < 1e-3
        assert best["file"] == paths[row]
        assert best["name"] == paths[row].split("/")[-2]
    assert f"cannot decode {broken}" in err
    assert Image.open(figure).size[0] > 300
    assert retrieve.main([*base, paths[0]]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == paths[0] and len(lines) == 4
    assert lines[1].endswith(f" 0  blue  {paths[0]}")


def _lose_one(train):
    (train / "red" / "000.png").unlink()


def _exchange_two(train):
    first, second = sorted((train / "blue").iterdir())[:2]
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(kept)


def _exchange_labels(train):
    for name, new in (("blue", "x"), ("green", "blue"), ("x", "green")):
        (train / name).rename(train / new)


OTHERS = "has other images now than the index. Make it again"


@pytest.mark.parametrize(
    "change, words",
    [
        pytest.param(_lose_one, OTHERS, marks=pytest.mark.slow),
        (_exchange_two, OTHERS),
        pytest.param(_exchange_labels, OTHERS, marks=pytest.mark.slow),
        (shutil.rmtree, "Expected "),
    ],
)
def test_changed_images_are_neither_named_nor_drawn(
    change, words, index_file, workdir, folder, tmp_path, capsys
):
    images, path = tmp_path / "images", tmp_path / "index.npz"
    shutil.copytree(folder, images)
    index = retrieval.load_index(index_file)
    dataclasses.replace(index, source=f"folder:{images}").save(path)
    asked = str(min(folder.glob("train/blue/*.png")))
    base = [f"--workdir={workdir}", f"--index={path}", "--top=2", asked]
    assert retrieve.main(base) == 0
    before, said = capsys.readouterr()
    assert before.count(str(images)) == 2 and not said
    change(images / "train")
    assert retrieve.main(base) == 0
    after, said = capsys.readouterr()
    names = [line.partition(str(images))[0].rstrip() for line in before.splitlines()]
    assert after.splitlines() == names
    assert said.startswith("no files are named: ") and words in said
    assert "--config" not in said and said.count("\n") == 1
    figure = tmp_path / "figure.png"
    assert retrieve.main([*base, f"--figure={figure}"]) == 1
    assert f"error: {said.partition(': ')[2]}" in capsys.readouterr().err
    assert not figure.exists()


def test_images_are_looked_up_by_codes(index_file, workdir, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(train_coder.__kwdefaults__, "steps", 20)
    paths = [str(path) for path in sorted(folder.glob("train/*/*.png"))]
    there, figure = tmp_path / "pool3.npz", tmp_path / "figure.png"
    shutil.copy(index_file, there)
    base = [f"--workdir={workdir}", f"--index={there}", "--top=3", "--bits=40"]
    assert retrieve.main(base) == 0  # makes them and asks nothing
    features = retrieval.load_index(there).features
    codes = load_codes(tmp_path / "pool3.40bits.npz")
    assert codes.packed.shape == (IMAGES, 5)
    different = np.unpackbits(codes.packed[:, None] ^ codes.packed, axis=2).sum(axis=2)
    said = capsys.readouterr().err
    assert f": 40 bits an image, 5 bytes instead of {4 * features.shape[1]:,}. Of the" in said
    others, hits = np.setdiff1d(np.arange(IMAGES), [0, 12, 24]), []
    for row in (0, 12, 24):
        _, (exact,) = brute_force(features[others], features[[row]], 10)
        near = np.argsort(different[row, others], kind="stable")[:10]
        hits.append(len({*exact} & {*near}) / 10)
    told = re.search(r"of 3 images that training left out, (\d+)% are .* and 100% among 100", said)
    assert told[1] == f"{100 * np.mean(hits):.0f}"

    assert retrieve.main([*base, "--format=json", paths[3], f"--figure={figure}"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)["neighbours"]
    order = np.argsort(different[3], kind="stable")[:3]
    assert [item["row"] for item in found] == order.tolist() and not err
    assert [item["bits"] for item in found] == different[3, order].tolist()
    assert "distance" not in found[0] and Image.open(figure).size[0] > 300
    assert retrieve.main([*base, paths[3]]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["0", "bits", str(order[0]), "blue", paths[order[0]]]

    exact = [*base[:3], "--format=json", paths[3]]
    assert retrieve.main(exact) == 0
    assert retrieve.main([*exact, "--bits=40", f"--shortlist={IMAGES}"]) == 0
    plain, listed = capsys.readouterr().out.splitlines()
    assert plain == listed

    codes.save(tmp_path / "pool3.48bits.npz")
    assert retrieve.main([*base[:3], "--bits=48"]) == 0
    assert "48bits.npz: codes of another index or length" in capsys.readouterr().err
    assert load_codes(tmp_path / "pool3.48bits.npz").coder.bits == 48


def test_mismatched_index_is_refused(index_file, workdir, folder, tmp_path, capsys):
    image = str(next(folder.glob("train/*/*.png")))

    def said(*arguments):
        assert retrieve.main(list(arguments)) == 1
        return capsys.readouterr().err

    new = f"--index={tmp_path / 'new.npz'}"
    words = "layer 'fc7' must be one of conv1, conv2, conv3, logits, norm1"
    assert words in said(f"--workdir={workdir}", new)
    there = f"--index={index_file}"
    assert "is of --layer=pool3, not of conv1" in said(
        f"--workdir={workdir}", there, "--layer=conv1", image
    )
    other = tmp_path / "other"
    loop.train_and_evaluate(small_config(folder, seed=1, max_steps=1), other)
    words = "the index is of another network than the workdir's"
    assert words in said(f"--workdir={other}", there, image)
    assert "is not the workdir of a run" in said(f"--workdir={tmp_path}", new)
    for wrong in (["--top=0"], ["--figure=a.png"], ["--bits=0"], ["--shortlist=9", image]):
        with pytest.raises(SystemExit):
            retrieve.main([f"--workdir={workdir}", there, *wrong])
    assert {path.name for path in tmp_path.iterdir()} == {"other"}


def test_non_finite_features_are_not_stored(workdir, tmp_path, capsys, monkeypatch):
    batch = np.zeros((2, 32, 32, 3), np.uint8), np.array([[0.0], [np.nan]], np.float32)
    monkeypatch.setattr(Extractor, "over", lambda *_: [batch])
    path = tmp_path / "new.npz"
    arguments = [f"--workdir={workdir}", f"--index={path}", "--layer=pool3"]
    assert retrieve.main(arguments) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: features of pool3 are infinite or NaN")
    assert not path.exists()


@pytest.mark.parametrize("load", [retrieval.load_index, load_codes])
def test_other_files_are_refused(load, tmp_path):
    path = tmp_path / "index.npz"
    with pytest.raises(RetrievalError, match="there is no such file"):
        load(path)
    np.savez(path, labels=[1])
    with pytest.raises(RetrievalError, match="was not made by alexnet_jax.retrieve: it has no"):
        load(path)
