"""The report of a run: content, escaping, no requests; the curves of several runs."""

import base64
import dataclasses
import io
import json
import re
import shlex
import shutil
import subprocess
from xml.etree import ElementTree

import jax
import numpy as np
import pytest
from PIL import Image

from alexnet_jax import load, report
from alexnet_jax.analysis.report import findings
from alexnet_jax.analysis.report import page as report_page
from alexnet_jax.data import DataError
from alexnet_jax.training import load as load_lib
from alexnet_jax.training import loop, timing
from alexnet_jax.training.config import as_json
from alexnet_jax.training.writers import read_metrics
from tests.training.runs import small_config

# Sorted like folders. The first is mathematics to matplotlib; the second holds markup, a
# quote and an entity.
NAMES = ["$^$", '<b>&"x"', "red"]
ODD = NAMES[1]
TRAIN, TEST = 24, 18


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    """Draw three colours under so much noise that some are mistaken."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", TRAIN), ("test", TEST)):
        for index in range(count):
            label = index % 3
            image = rng.integers(0, 120, (32, 32, 3))
            image[..., (label + (index % 7 == 0)) % 3] += 100
            target = root / split / NAMES[label]
            target.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.astype(np.uint8)).save(target / f"{index:03d}.png")
    return root


@pytest.fixture(scope="module")
def made(image_folder, tmp_path_factory):
    """Return (the workdir of a run, the lines that its report prints)."""
    workdir = tmp_path_factory.mktemp("report") / "run"
    workdir.mkdir()
    without_checkpoint = '{"first_step": 0, "last_step": 9, "seconds": {"total": 1.0}}'
    (workdir / "times.jsonl").write_text(f"{without_checkpoint}\n")
    config = small_config(image_folder, num_epochs=4.0, eval_views=10)
    config.eval_every_epochs = 2.0
    loop.train_and_evaluate(config, workdir)
    return workdir, report.report(workdir)


@pytest.fixture()
def copied(made, tmp_path):
    """Return a copy of the run's workdir without its report."""
    workdir = tmp_path / "run"
    shutil.copytree(made[0], workdir)
    for name in ("report.html", *report.FIGURES):
        (workdir / name).unlink()
    return workdir


def parse(html):
    """Return the page as an XML tree; raise if its tags are not balanced."""
    xml = re.sub(r"<(meta|img)\b([^>]*)>", r"<\1\2/>", html)
    return ElementTree.fromstring(xml.removeprefix("<!DOCTYPE html>\n"))


def read_page(workdir):
    return parse((workdir / "report.html").read_text("utf-8"))


def text(element):
    return " ".join("".join(element.itertext()).split())


def missing(page):
    return [text(e) for e in page.iterfind(".//*[@class='missing']")]


def tiles(page):
    return [(text(e[0]), text(e[1])) for e in page.iterfind(".//*[@class='tile']")]


def table(page, *header):
    found = [[[text(cell) for cell in row] for row in t.iter("tr")] for t in page.iter("table")]
    (rows,) = [rows for rows in found if rows[0] == [*header]]
    return rows[1:]


@pytest.fixture(scope="module")
def parsed(made):
    return read_page(made[0])


def test_page_loads_nothing(made, parsed):
    html = (made[0] / "report.html").read_text("utf-8")
    assert html.startswith('<!DOCTYPE html>\n<html lang="en">')
    attributes = [(e.tag, *item) for e in parsed.iter() for item in e.items()]
    policies = [value for *_, value in attributes if "default-src" in value]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    assert not {e.tag for e in parsed.iter()} & {"script", "link", "iframe", "object"}
    for tag, name, value in attributes:
        if name in ("src", "href", "action", "srcset", "data", "poster"):
            assert value.startswith("data:image/"), (tag, name)
        assert not name.startswith("on")
        assert "//" not in value or name == "src", (tag, name)
    style = text(next(parsed.iter("style")))
    assert not re.search(r"//|url\(|@import", style) and "@media print" in style


def test_figures_are_whole_and_described(parsed):
    kinds = []
    for image in parsed.iter("img"):
        assert len(image.get("alt")) > 20
        head, data = image.get("src").split(",", 1)
        kinds.append(re.fullmatch(r"data:image/(png|svg\+xml);base64", head)[1])
        decoded = base64.b64decode(data, validate=True)
        if kinds[-1] == "png":
            assert min(Image.open(io.BytesIO(decoded)).convert("RGB").size) > 50
        else:
            assert ElementTree.fromstring(decoded).tag.endswith("}svg")
    # Four curves and the statistics; eight examples, neighbours, kernels.
    assert (kinds.count("svg+xml"), kinds.count("png")) == (5, 10)


def test_headline_errors_equal_the_records(made, parsed):
    workdir, lines = made
    last = [r for r in read_metrics(workdir / "metrics.jsonl") if "eval/loss" in r][-1]
    error, views = (f"{100 * last[f'eval/{prefix}top1_error']:.2f}%" for prefix in ("", "views_"))
    parameters = sum(row.parameters for row in findings.read_run(workdir).layers)
    assert tiles(parsed) == [  # no top-5 error of three classes
        (error, f"top-1 error of {TEST} held-out images, centre view"),
        (views, f"top-1 error of {TEST} held-out images, 10 views"),
        ("66.7%", "error of guessing: 3 classes"),
        (f"{parameters:,}", "parameters"),
        ("4", f"epochs of {TRAIN} training images"),
        ("16", "steps of 6 images"),
    ]
    assert lines == [
        f"held-out errors: top-1 {error} ({TEST} images, step 16)",
        f"over several views: top-1 {views}",
        f"first-layer filters: {workdir / 'filters.png'}, filter_statistics.png",
        f"training curves:     {workdir / 'curves.png'}",
        f"report:              {workdir / 'report.html'}",
    ]
    for name in report.FIGURES:
        assert min(Image.open(workdir / name).size) > 100


@pytest.fixture(scope="module")
def reference(made, image_folder):
    """Return (probabilities, features, labels) of test and of training images, by `load`."""
    model, variables, preprocess = load(made[0])
    folders = [image_folder / split / name for split in ("test", "train") for name in NAMES]
    paths = [path for folder in folders for path in sorted(folder.iterdir())]
    apply = jax.jit(lambda images: model.apply(variables, images, method="features"))
    features = apply(preprocess(paths))
    odds = np.asarray(features["logits"], np.float64)
    odds = np.exp(odds - odds.max(1, keepdims=True))
    labels = np.array([NAMES.index(path.parent.name) for path in paths])
    pooled = np.asarray(features["pool3"], np.float64).reshape(len(paths), -1)
    arrays = odds / odds.sum(1, keepdims=True), pooled, labels
    return tuple(a[:TEST] for a in arrays), tuple(a[TEST:] for a in arrays)


def test_errors_and_confusions_match_the_predictions(parsed, reference):
    chances, _, labels = reference[0]
    predicted = chances.argmax(1)
    rows = table(parsed, "class", "", "top-1", "images")
    assert sorted(row[0] for row in rows) == sorted(NAMES)
    for name, _, top1, count in rows:
        own = predicted[labels == NAMES.index(name)]
        wrong = 100 * np.mean(own != NAMES.index(name))
        assert (top1, count) == (f"{wrong:.1f}%", str(len(own)))
    errors = [float(row[2][:-1]) for row in rows]
    assert errors == sorted(errors, reverse=True) and errors[0] > 0
    pairs = table(parsed, "class", "taken for", "times", "of its images")
    assert sum(int(row[2]) for row in pairs) == (labels != predicted).sum()
    for label, taken, times, _ in pairs:
        there = (labels == NAMES.index(label)) & (predicted == NAMES.index(taken))
        assert int(times) == there.sum() > 0


def test_many_classes_show_top5_errors_and_the_worst_classes(made, monkeypatch):
    run = findings.read_run(made[0])
    held_out = findings.classify_held_out(run)
    names, labels = [f"c{k}" for k in range(TEST)], np.arange(TEST)
    logs = np.log(np.eye(TEST, dtype=np.float32) + 1e-6)
    logs[[4, 7], [5, 8]] = 0.5  # two are wrong, with the right class second
    predictions = dataclasses.replace(
        held_out.predictions, centre=logs, labels=labels, class_names=tuple(names)
    )
    held_out = findings.HeldOut(held_out.images, predictions, total=99)
    monkeypatch.setattr(report_page, "classify_held_out", lambda run: held_out)
    monkeypatch.setattr(report_page, "_predictions", lambda *_: None)
    monkeypatch.setattr(report_page, "_neighbours", lambda *_: None)
    monkeypatch.setattr(report_page, "_ALL_CLASSES", TEST - 1)
    monkeypatch.setattr(report_page, "_WORST", 3)
    records = [r | {"eval/top5_error": 0.25} for r in run.records]
    run = dataclasses.replace(run, names=names, records=records)
    page = parse(report_page.build_page(run).decode())
    assert table(page, "class", "", "top-1", "top-5", "images") == [
        ["c4", "", "100.0%", "0.0%", "1"],
        ["c7", "", "100.0%", "0.0%", "1"],
        ["c0", "", "0.0%", "0.0%", "1"],
    ]
    assert "Error of each class, the 3 worst" in text(page)
    assert "18 (spread evenly) of 99 held-out images" in text(page)
    assert "top-1 error 11.11%, top-5 0.00%." in text(page)
    assert ("25.00%", "top-5 error of the same") in tiles(page)
    assert ("94.4%", "error of guessing: 18 classes, top-5 72.2%") in tiles(page)


def test_examples_are_the_surest_mistakes_and_some_hits(made, reference):
    chances, _, labels = reference[0]
    held_out = findings.classify_held_out(findings.read_run(made[0]))
    chosen, wrong = findings.examples(held_out.predictions, 8)
    mistakes = np.flatnonzero(chances.argmax(1) != labels)
    assert wrong == min(4, len(mistakes)) and set(chosen[:wrong]) <= {*mistakes}
    surest = np.sort(chances[mistakes].max(1))[::-1][:wrong]
    np.testing.assert_allclose(chances[chosen[:wrong]].max(1), surest, atol=1e-5)
    right = chosen[wrong:]
    assert len(chosen) == 8 and right == sorted(set(right))
    assert (chances[right].argmax(1) == labels[right]).all()


def test_neighbours_are_counted(parsed, reference):
    (_, queries, labels), (_, index, train_labels) = reference
    distances = np.linalg.norm(queries[:, None] - index[None], axis=-1)
    nearest = np.argsort(distances, axis=1, kind="stable")[:, :5]
    share = np.mean(train_labels[nearest] == labels[:, None])
    found = re.search(
        r"features in (\w+), .* All (\d+) training images were searched\. Of the 5 "
        r"nearest to each of (\d+) held-out images ([\d.]+)% are of its class",
        text(parsed),
    )
    assert found.groups()[:3] == ("pool3", str(TRAIN), str(TEST))
    assert float(found[4]) == pytest.approx(100 * share, abs=0.06)


@pytest.mark.slow
def test_large_splits_are_sampled_evenly(made, monkeypatch):
    monkeypatch.setattr(findings, "MOST_HELD_OUT", 9)
    monkeypatch.setattr(report_page, "MOST_INDEXED", 12)
    run = findings.read_run(made[0])
    held_out = findings.classify_held_out(run)
    assert held_out.total == TEST
    assert np.bincount(held_out.predictions.labels).tolist() == [3, 3, 3]
    page = text(parse(report_page.build_page(run).decode()))
    assert f"9 (spread evenly) of {TEST} held-out images" in page
    # The images that are drawn are compared with those of the index.
    assert f"12 (spread evenly) of {TRAIN} training images were searched" in page


def test_names_are_escaped(made, parsed):
    assert "<b>&" not in (made[0] / "report.html").read_text("utf-8")
    assert ODD in text(parsed)
    assert any(ODD in image.get("alt") for image in parsed.iter("img"))


def test_configuration_and_commands(made, parsed):
    config = json.loads((made[0] / "config.json").read_text())
    rows = {row[0]: row[1:] for row in table(parsed, "field", "here", "default")}
    assert rows["model.variant"] == ["cifar", "paper"]
    assert rows["schedule.patience"] == ["1", "5"]
    assert "optim.momentum" not in rows  # at its default
    everything = dict(table(parsed, "field", "value"))
    assert everything["optim.momentum"] == "0.9"
    words = "".join(parsed.itertext()).replace("\\\n", " ")
    _, test, resume = words.split("-m alexnet_jax.main")
    workdir = f"--workdir={made[0]}"
    assert shlex.split(test)[:2] == [workdir, "--mode=eval"]
    assert shlex.split(resume)[0] == workdir
    name, _, path = shlex.split(resume)[1].partition("=")
    assert name == "--config" and as_json(load_lib.load_config(path)) == config


def test_report_names_missing_images(copied):
    config = json.loads((copied / "config.json").read_text())
    config["data"]["source"] = "folder:/gone/<i>"
    (copied / "config.json").write_text(json.dumps(config))
    report.report(copied)
    page = read_page(copied)
    reason = "in /gone/<i> (/gone/<i> does not exist)"
    assert [reason in told for told in missing(page)] == [True] * 3
    assert len([*page.iter("img")]) == 6  # curves, kernels, their statistics
    assert len(tiles(page)) == 6


def test_other_classes_and_no_held_out_images(copied):
    run = findings.read_run(copied)
    (copied / "classes.json").write_text(json.dumps(["blue", "green", "red"]))
    with pytest.raises(DataError, match=r"classes that were never trained: \$\^\$"):
        findings.classify_held_out(run)
    run.config["data"]["eval_split"] = ""
    with pytest.raises(DataError, match="this run has no held-out images"):
        findings.classify_held_out(run)


@pytest.mark.slow
def test_run_without_evaluations_or_records(copied):
    metrics = copied / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(line for line in lines if "train/loss" in line))
    assert not any("errors" in line for line in report.report(copied))
    told = missing(read_page(copied))
    assert "Held-out errors: metrics.jsonl holds no evaluation yet" in told
    metrics.unlink()
    (copied / "times.jsonl").unlink()
    report.report(copied)
    told = missing(read_page(copied))
    assert "Training curves: metrics.jsonl holds no record of training" in told
    assert "Times: neither times.jsonl nor metrics.jsonl has any" in told


def test_blocked_output_path_fails_early(copied, monkeypatch, capsys):
    monkeypatch.setattr(report, "read_run", lambda workdir: pytest.fail("begun"))
    (copied / "curves.png").mkdir()
    assert report.main([f"--workdir={copied}"]) == 1
    error = f"error: cannot write {copied / 'curves.png'}: it is not a file."
    assert capsys.readouterr().err.startswith(error)
    assert not (copied / "report.html").exists()


def test_folder_that_is_not_a_run_gives_one_message(tmp_path, copied, capsys):
    assert report.main([f"--workdir={tmp_path / 'none'}"]) == 1
    error = capsys.readouterr().err
    assert "is not the workdir of a run: it has no config.json" in error
    shutil.rmtree(copied / "checkpoints")
    assert report.main([f"--workdir={copied}"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "no checkpoint" in error
    assert error.count("\n") == 1
    assert not (copied / "report.html").exists()


# Times.


def test_times_of_a_run_add_up(made):
    (start,) = timing.read_times(made[0] / "times.jsonl")
    seconds = dict(start.seconds)
    total = seconds.pop("total")
    assert min(seconds.values()) >= 0 and sum(seconds.values()) <= total
    # The records give the same time of training.
    spent = findings.time_spent(findings.read_run(made[0]))
    both = seconds["training"] + seconds["waiting for data"]
    assert both == pytest.approx(16 * 6 / spent.images_per_sec, rel=0.01)
    assert sum(spent.parts.values()) == pytest.approx(total, abs=0.01)
    assert spent.unrecorded_steps == 0


def test_stopwatch_counts_time_once(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(timing.time, "monotonic", lambda: now[0])
    watch = timing.StepClock()
    now[0] += 5
    watch.restart(3, 0.5)
    with watch.spending("evaluation"):
        now[0] += 2
        with watch.spending("compiling"):
            now[0] += 30
        now[0] += 1
    now[0] += 8
    assert watch.lap(9, 2.5) == (6 / 8, 2 / 8)  # steps per second, share of waiting
    path = tmp_path / "times.jsonl"
    watch.append_to(path, first_step=3, last_step=9)
    with open(path, "a") as file:
        file.write('{"first_step": 1, "sec')  # torn by a kill
    (times,) = timing.read_times(path)
    seconds = {"total": 46.0, "compiling": 30.0, "evaluation": 3.0, "training": 6.0}
    assert times.seconds == seconds | {"waiting for data": 2.0}


def test_times_of_several_starts_are_added_up(made):
    run = findings.read_run(made[0])
    rates = [(100, 50.0, 0.0), (200, 100.0, 0.5)]
    records = [
        {"step": step, "epoch": 1.0, "images_per_sec": rate, "data_wait_frac": waited}
        for step, rate, waited in rates
    ]
    run.config["data"]["batch_size"] = 10
    run = dataclasses.replace(run, records=records, times=[])
    spent = findings.time_spent(run)
    assert spent.total is None and spent.unrecorded_steps == 200
    assert spent.parts == {"training": 25.0, "waiting for data": 5.0}
    assert spent.images_per_sec == 2000 / 30
    starts = [
        timing.Times(0, 60, {"total": 20.0, "training": 12.0, "compiling": 3.0}),
        timing.Times(90, 200, {"total": 30.0, "training": 20.0, "compiling": 4.0}),
    ]
    spent = findings.time_spent(dataclasses.replace(run, times=starts))
    assert (spent.total, spent.unrecorded_steps) == (50.0, 30)
    parts = [("training", 32.0), ("starting and the rest", 11.0), ("compiling", 7.0)]
    assert [*spent.parts.items()] == parts  # the longest first


# Several runs.


def test_curves_of_several_runs(made, copied, tmp_path, capsys):
    out = tmp_path / "deep" / "both.svg"
    assert report.main([f"--workdir={made[0]},{copied}", f"--out={out}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{made[0].parent.name}/run: held-out errors: top-1 ")
    assert lines[-1] == f"curves of 2 runs: {out}"
    assert ElementTree.parse(out).getroot().tag.endswith("}svg")
    assert [path.name for path in out.parent.iterdir()] == ["both.svg"]


def test_wrong_comparisons_are_refused(made, tmp_path, capsys):
    run, out = made[0], tmp_path / "a.png"
    (tmp_path / "links").mkdir()
    seven = [tmp_path / "links" / name for name in "abcdefg"]
    for link in seven:
        link.symlink_to(run)
    for workdirs, error in (
        ([run, tmp_path], f"error: {tmp_path} is not the workdir of a run"),
        ([run, run], f"--workdir names {run} twice"),
        (seven, "at most 6 runs"),
    ):
        workdir = f"--workdir={','.join(map(str, workdirs))}"
        assert report.main([workdir, f"--out={out}"]) == 1
        assert error in capsys.readouterr().err
    several = f"--workdir={run},{run}"
    for wrong in ([several], [f"--workdir={run}", "--out=a.png"], [several, "--out=a.gif"], []):
        with pytest.raises(SystemExit) as stopped:
            report.main(wrong)
        assert stopped.value.code == 2
    assert not out.exists()


@pytest.mark.slow
def test_page_fits_a_phone(made, tmp_path):
    """Render with headless Chromium in a frame of 375 pixels, with every figure."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("the layout of the page needs Chromium; there is none here")
    address = (made[0] / "report.html").as_uri()
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe id="f" src="{address}" style="width:375px;height:812px"></iframe>'
        '<p id="found"></p><script>onload = () => {'
        'const d = document.getElementById("f").contentDocument;'
        "const e = d.documentElement;"
        "const whole = [...d.images].every(i => i.complete && i.naturalWidth > 0);"
        'document.getElementById("found").textContent ='
        "[e.clientWidth, e.scrollWidth, d.images.length, whole].join(' ');}</script>"
    )
    done = subprocess.run(
        [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu"),
            *("--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'user'}"),
            *("--dump-dom", frame.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    found = re.search(r'<p id="found">(\d+) (\d+) (\d+) (\w+)</p>', done.stdout)
    width, scrolled, images, whole = found.groups()
    assert 355 <= int(width) <= 375 and int(scrolled) <= int(width)
    assert (int(images), whole) == (15, "true")
