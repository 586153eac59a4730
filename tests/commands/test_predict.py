"""`predict` names what is in an image, on the command line and as a figure."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from alexnet_jax import export, load, predict, report, retrieve
from alexnet_jax.analysis.figures import best_labels

NAMES = ["blue", "green", "red"]


@pytest.fixture(scope="module")
def paths(folder):
    return [str(path) for path in sorted(folder.glob("test/*/*.png"))]


def test_text_names_the_best_labels(workdir, paths, capsys):
    assert predict.main([f"--workdir={workdir}", *paths, "--top=2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[::3] == paths
    for path, line in zip(paths, lines[1::3], strict=True):
        assert re.fullmatch(rf" *\d+\.\d\d%  {path.split('/')[-2]}", line)


def test_json_holds_the_networks_probabilities(workdir, paths, monkeypatch, capsys):
    monkeypatch.setattr(predict, "BATCH", 4)  # several batches, the last one not full
    arguments = [f"--workdir={workdir}", "--format=json", *paths[:6]]
    assert predict.main(arguments) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    model, variables, preprocess = load(workdir)
    logits = jax.jit(model.apply)(variables, preprocess(paths[:6]))
    want = np.asarray(jax.nn.softmax(logits))
    assert [item["file"] for item in found] == paths[:6]
    for item, row in zip(found, want, strict=True):
        labels = [label["label"] for label in item["labels"]]
        assert labels == np.argsort(-row).tolist()  # all three: fewer than five
        for label in item["labels"]:
            assert label["name"] == label["words"] == NAMES[label["label"]]
            assert label["probability"] == pytest.approx(row[label["label"]], rel=1e-4)


def test_unreadable_image_does_not_stop_the_others(workdir, paths, tmp_path, capsys):
    broken, missing = tmp_path / "broken.jpg", tmp_path / "missing.jpg"
    broken.write_bytes(b"\xff\xd8 torn")
    figure, maps = tmp_path / "new" / "figure.png", tmp_path / "maps.png"
    base = [f"--workdir={workdir}", f"--figure={figure}", f"--feature_maps={maps}"]
    assert predict.main([*base, str(broken), paths[0], str(missing)]) == 1
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == paths[0]
    first, second = err.splitlines()
    assert f"cannot decode {broken}" in first and str(missing) in second
    assert Image.open(figure).size[0] > 100
    # The image and its three convolutions, before and after pooling and norm.
    width, height = Image.open(maps).size
    assert height > width / 2
    maps.unlink()
    assert predict.main([*base, str(broken)]) == 1
    assert not maps.exists()


def test_wrong_arguments_give_one_message(workdir, paths, tmp_path, capsys):
    assert predict.main([f"--workdir={tmp_path}", paths[0]]) == 1
    assert "is not the workdir of a run" in capsys.readouterr().err
    assert predict.main([f"--workdir={workdir}", "--step=3", paths[0]]) == 1
    assert "step 3" in capsys.readouterr().err
    for wrong in ([], ["--top=0", paths[0]]):
        with pytest.raises(SystemExit):
            predict.main([f"--workdir={workdir}", *wrong])
    assert "--top=0 must be at least 1" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_labels_without_names_are_numbered(workdir, paths, tmp_path, capsys):
    copy = shutil.copytree(workdir, tmp_path / "copy")
    classes = copy / "classes.json"
    classes.write_text('["blue", "green"]')
    assert predict.main([f"--workdir={copy}", paths[0]]) == 0
    words = [line.split("%  ")[1] for line in capsys.readouterr().out.splitlines()[1:]]
    assert sorted(words) == ["blue", "class 2", "green"]
    classes.write_text("[")
    assert predict.main([f"--workdir={copy}", paths[0]]) == 1
    assert f"{classes} is damaged" in capsys.readouterr().err


def test_weights_file_predicts_the_same_as_its_run(workdir, paths, tmp_path, capsys):
    weights = tmp_path / "net.safetensors"
    assert export.main([f"--workdir={workdir}", f"--out={weights}"]) == 0
    capsys.readouterr()
    said = []
    for where in (workdir, weights):
        assert predict.main([f"--workdir={where}", *paths[:3]]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and "red" in said[0]
    index = f"--index={tmp_path / 'index.npz'}"
    assert retrieve.main([f"--workdir={weights}", index, "--layer=pool3"]) == 1
    assert "give --source" in capsys.readouterr().err
    assert report.main([f"--workdir={weights}"]) == 1
    assert "is not the workdir of a run" in capsys.readouterr().err


def test_bars_are_the_probabilities():
    chances = np.array([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2]])
    images = np.zeros((2, 8, 8, 3), np.uint8)
    figure = best_labels(images, chances, ["a", "b", "c" * 40], labels=[2, 0])
    first, second, *below = figure.axes
    assert (first.get_title(), second.get_title()) == ("c" * 27 + "…", "a")
    widths = [[bar.get_width() for bar in axes.patches] for axes in below]
    assert widths == [[0.7, 0.2, 0.1], [0.5, 0.3, 0.2]]
    texts = [text.get_text() for text in below[0].texts]
    assert texts == ["b  70%", "c" * 21 + "…  20%", "a  10%"]
    # The correct one stands out.
    colors = [[bar.get_facecolor() for bar in axes.patches] for axes in below]
    assert colors[0][0] == colors[0][2] != colors[0][1]
    assert colors[1][0] == colors[0][1]
