"""The report of a run: right, whole, self-contained; and runs beside each other."""

import base64
import html
import io
import json
import re
import shlex
import shutil
import subprocess
import time
from html.parser import HTMLParser
from xml.etree import ElementTree

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from test_train import small_config

from alexnet_jax import (
    config_files,
    findings,
    load,
    report,
    report_page,
    timing,
    train,
)
from alexnet_jax.analysis import page
from alexnet_jax.experiment import as_json
from alexnet_jax.writers import read_metrics

# Sorted as folders are. The first would be mathematics in a figure, the second markup,
# a quote and an entity in the page.
NAMES = ["$^$", '<b>&"x"', "red"]
ODD = NAMES[1]
TRAIN, TEST = 24, 18
VOID = {"meta", "img", "link", "br", "hr", "input"}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Three colours, under so much noise that some are taken for another."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for split, count in (("train", TRAIN), ("test", TEST)):
        for index in range(count):
            label = index % 3
            picture = rng.integers(0, 120, (32, 32, 3))
            picture[..., (label + (index % 7 == 0)) % 3] += 100
            target = root / split / NAMES[label]
            target.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture.astype(np.uint8)).save(target / f"{index:03d}.png")
    return root


@pytest.fixture(scope="module")
def made(pictures, tmp_path_factory):
    """(the workdir of a run, the lines of its report)."""
    workdir = tmp_path_factory.mktemp("report") / "run"
    workdir.mkdir()
    of_before = '{"first_step": 0, "last_step": 9, "seconds": {"total": 1.0}}\n'
    (workdir / "times.jsonl").write_text(of_before)  # of a start without a checkpoint
    config = small_config(pictures, num_epochs=4.0, eval_views=10)
    config.eval_every_epochs = 2.0
    train.train_and_evaluate(config, workdir)
    return workdir, report.report(workdir)


class Page(HTMLParser):
    """Balanced tags, and what is in them."""

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.attributes, self.words = [], [], [], []
        self.tables, self.tiles, self.missing = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag == "img":
            self.images.append(attributes)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if attributes.get("class") == "tile":
            self.tiles.append([])
        if attributes.get("class") == "missing":
            self.missing.append("")
        if tag not in VOID:
            self.open.append((tag, attributes))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        tags = [tag for tag, _ in self.open]
        classes = [attributes.get("class") for _, attributes in self.open]
        if tags and tags[-1] not in ("style", "title"):
            self.words.append(data)
        if "td" in tags or "th" in tags:
            self.tables[-1][-1][-1] += data
        if "tile" in classes and data.strip():
            self.tiles[-1].append(data)
        if "missing" in classes:
            self.missing[-1] += data

    def table(self, *header):
        (found,) = [t for t in self.tables if t[0] == [*header]]
        return found[1:]


def read_page(workdir):
    return Page((workdir / "report.html").read_text("utf-8"))


@pytest.fixture(scope="module")
def parsed(made):
    return read_page(made[0])


def test_the_page_asks_for_nothing(made, parsed):
    text = (made[0] / "report.html").read_text("utf-8")
    assert len(text) < 1_500_000
    assert text.startswith('<!DOCTYPE html>\n<html lang="en">')
    policies = [v for _, _, v in parsed.attributes if v and "default-src" in v]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    assert not {tag for tag, _, _ in parsed.attributes} & {"script", "link", "iframe"}
    for tag, name, value in parsed.attributes:
        if name in ("src", "href", "action", "srcset", "data", "poster"):
            assert value.startswith("data:image/"), (tag, name)
        assert not name.startswith("on")
        assert "//" not in value or name == "src", (tag, name)
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    assert "//" not in style and "url(" not in style and "@import" not in style


def test_every_figure_is_one(parsed):
    kinds = []
    for image in parsed.images:
        assert len(image["alt"]) > 20
        head, data = image["src"].split(",", 1)
        kind = re.fullmatch(r"data:image/(png|svg\+xml);base64", head)[1]
        kinds.append(kind)
        decoded = base64.b64decode(data, validate=True)
        if kind == "png":
            shape = np.asarray(Image.open(io.BytesIO(decoded)).convert("RGB")).shape
            assert min(shape[:2]) > 50
        else:
            root = ElementTree.fromstring(decoded)
            assert root.tag.endswith("}svg")
            hrefs = [v for e in root.iter() for k, v in e.attrib.items() if "href" in k]
            assert all(v.startswith(("#", "data:")) for v in hrefs)
    # Four curves and the statistics; eight pictures, neighbours, kernels.
    assert (kinds.count("svg+xml"), kinds.count("png")) == (5, 10)


def test_headline_errors_are_those_of_the_records(made, parsed):
    last = [r for r in read_metrics(made[0] / "metrics.jsonl") if "eval/loss" in r][-1]
    tiles = {words: number for number, words in parsed.tiles}
    where = f"top-1 error of {TEST} held-out pictures"
    assert tiles[f"{where}, centre view"] == f"{100 * last['eval/top1_error']:.2f}%"
    views = f"{100 * last['eval/views_top1_error']:.2f}%"
    assert tiles[f"{where}, 10 views"] == views
    assert tiles["error of guessing: 3 classes"] == "66.7%"
    assert tiles[f"of 4 epochs of {TRAIN} training pictures"] == "4"
    assert tiles["steps of 6 images"] == "16"
    assert not any("top-5" in words for words in tiles)  # of three classes
    assert tiles["parameters"].replace(",", "").isdecimal()
    lines = made[1]
    assert lines[0].startswith(
        f"held-out errors: top-1 {100 * last['eval/top1_error']:.2f}%"
    )
    assert lines[1] == f"over several views: top-1 {views}"
    assert not any("top-5" in words for words in (*parsed.words, *lines))
    assert [line.split("/")[-1] for line in lines[2:]] == [
        *("filters.png, filter_statistics.png", "curves.png", "report.html")
    ]
    for name in report.FIGURES:
        assert min(Image.open(made[0] / name).size) > 100


@pytest.fixture(scope="module")
def looked(made, pictures):
    """(probabilities, features, labels) of test and training pictures, straight."""
    model, variables, preprocess = load(made[0])
    folders = [pictures / split / name for split in ("test", "train") for name in NAMES]
    paths = [path for folder in folders for path in sorted(folder.iterdir())]
    apply = jax.jit(lambda images: model.apply(variables, images, method="features"))
    features = apply(preprocess(paths))
    odds = np.asarray(features["logits"], np.float64)
    odds = np.exp(odds - odds.max(1, keepdims=True))
    labels = np.array([NAMES.index(path.parent.name) for path in paths])
    pooled = np.asarray(features["pool3"], np.float64).reshape(len(paths), -1)
    arrays = odds / odds.sum(1, keepdims=True), pooled, labels
    return tuple(a[:TEST] for a in arrays), tuple(a[TEST:] for a in arrays)


def test_errors_and_confusions_are_those_of_each_picture(parsed, looked):
    chances, _, labels = looked[0]
    predicted = chances.argmax(1)
    rows = parsed.table("class", "", "top-1", "pictures")
    assert sorted(row[0] for row in rows) == sorted(NAMES)
    for name, _, top1, count in rows:
        own = predicted[labels == NAMES.index(name)]
        wrong = 100 * np.mean(own != NAMES.index(name))
        assert (top1, count) == (f"{wrong:.1f}%", str(len(own)))
    errors = [float(row[2][:-1]) for row in rows]
    assert errors == sorted(errors, reverse=True) and errors[0] > 0
    for label, taken, times, _ in parsed.table(
        "class", "taken for", "times", "of its pictures"
    ):
        there = (labels == NAMES.index(label)) & (predicted == NAMES.index(taken))
        assert int(times) == there.sum() > 0


def test_examples_are_the_surest_mistakes_and_right_ones(made, looked):
    chances, _, labels = looked[0]
    held_out = findings.look_at_held_out(findings.read_run(made[0]))
    chosen, wrong = held_out.examples(8)
    mistakes = np.flatnonzero(chances.argmax(1) != labels)
    assert wrong == min(4, len(mistakes)) and set(chosen[:wrong]) <= {*mistakes}
    surest = np.sort(chances[mistakes].max(1))[::-1][:wrong]
    np.testing.assert_allclose(chances[chosen[:wrong]].max(1), surest, atol=1e-5)
    right = chosen[wrong:]
    assert len(chosen) == 8 and right == sorted(set(right))
    assert (chances[right].argmax(1) == labels[right]).all()


def test_neighbours_are_counted(made, parsed, looked):
    (_, queries, labels), (_, index, train_labels) = looked
    distances = np.linalg.norm(queries[:, None] - index[None], axis=-1)
    nearest = np.argsort(distances, axis=1, kind="stable")[:, :5]
    share = np.mean(train_labels[nearest] == labels[:, None])
    words = "".join(parsed.words)
    found = re.search(
        r"features in (\w+), .* All (\d+) training pictures were searched\. Of the 5 "
        r"nearest to each of (\d+) held-out pictures ([\d.]+)% are of its class",
        words,
    )
    assert found.groups()[:3] == ("pool3", str(TRAIN), str(TEST))
    assert float(found[4]) == pytest.approx(100 * share, abs=0.06)


def test_what_is_capped_is_spread_and_said(made, monkeypatch):
    monkeypatch.setattr(findings, "MOST_HELD_OUT", 9)
    monkeypatch.setattr(findings, "MOST_INDEXED", 12)
    run = findings.read_run(made[0])
    held_out = findings.look_at_held_out(run)
    assert held_out.total == TEST
    assert np.bincount(held_out.predictions.labels).tolist() == [3, 3, 3]
    alike = findings.look_for_alike(run, held_out)
    assert np.bincount(alike.index.labels).tolist() == [4, 4, 4]
    assert (alike.rows < 12).all() and alike.total == TRAIN
    # Rows are of the sample, and so are the pictures that are drawn.
    place = int(alike.rows[0, 0])
    image = np.empty((1, 34, 34, 3), np.uint8)
    label = np.empty(1, np.int32)
    alike.indexed.fetch(np.array([place]), image, label)
    assert label[0] == alike.index.labels[place]
    features = run.logits_of.of("pool3")(image)
    np.testing.assert_allclose(features[0], alike.index.features[place], rtol=1e-4)


def test_names_are_escaped(made, parsed):
    text = (made[0] / "report.html").read_text("utf-8")
    assert ODD not in text and html.escape(ODD) in text
    assert ODD in "".join(parsed.words)
    assert any(ODD in image["alt"] for image in parsed.images)
    assert page.table([ODD], [[ODD]], columns="l").count("<b>") == 0


def test_the_configuration_and_its_command(made, parsed):
    config = json.loads((made[0] / "config.json").read_text())
    rows = {
        field: value for field, value, *_ in parsed.table("field", "here", "default")
    }
    assert rows["model.variant"] == "cifar" and rows["schedule.patience"] == "1"
    assert "optim.momentum" not in rows  # as in common.py
    everything = dict(parsed.table("field", "value"))
    assert everything["optim.momentum"] == "0.9"
    # Its commands name the workdir, and this config.
    words = "".join(parsed.words).replace("\\\n", " ")
    _, test, train = words.split("-m alexnet_jax.main")
    workdir = f"--workdir={made[0]}"
    assert shlex.split(test)[:2] == [workdir, "--mode=eval"]
    name, _, path = shlex.split(train)[1].partition("=")
    assert shlex.split(train)[0] == workdir and name == "--config"
    assert as_json(config_files.load_config(path)) == config


@pytest.fixture()
def copied(made, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(made[0], workdir)
    (workdir / "report.html").unlink()
    return workdir


def test_a_run_whose_pictures_are_gone_has_the_rest(copied):
    config = json.loads((copied / "config.json").read_text())
    config["data"]["source"] = "folder:/gone/<i>"
    (copied / "config.json").write_text(json.dumps(config))
    report.report(copied)
    found = read_page(copied)
    assert len(found.missing) == 3  # errors, predictions, neighbours
    assert all(
        "in /gone/<i> (/gone/<i> does not exist)" in words for words in found.missing
    )
    assert len(found.images) == 6  # curves, kernels, their statistics
    assert len(found.tiles) > 5


def test_pictures_of_other_classes_are_not_taken_for_the_runs(copied):
    (copied / "classes.json").write_text(json.dumps(["blue", "green", "red"]))
    run = findings.read_run(copied)
    missing = findings.look_at_held_out(run)
    assert "classes that were never trained: $^$" in missing.reason
    run.config["data"]["eval_split"] = ""
    assert "has no held-out pictures" in findings.look_at_held_out(run).reason


def test_a_run_without_evaluations_and_records(copied, monkeypatch):
    def not_looked(*_):
        return findings.Missing("not in this test")

    monkeypatch.setattr(report_page, "look_at_held_out", not_looked)
    metrics = copied / "metrics.jsonl"
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    kept = [json.dumps(r) for r in records if "train/loss" in r]
    metrics.write_text("".join(f"{line}\n" for line in kept))
    lines = report.report(copied)
    assert not any("errors" in line for line in lines)
    said = read_page(copied).missing
    assert "Held-out errors: metrics.jsonl holds no evaluation yet" in said
    metrics.unlink()
    (copied / "times.jsonl").unlink()
    report.report(copied)
    said = read_page(copied).missing
    assert "Training curves: metrics.jsonl holds no record of training" in said
    assert "Times: neither times.jsonl nor metrics.jsonl has any" in said


def test_nothing_half_written_stays(copied, monkeypatch):
    for name in report.FIGURES:
        (copied / name).unlink()
    before = sorted(path.name for path in copied.iterdir())
    save, calls = Figure.savefig, []

    def torn(figure, file, **options):
        calls.append(options)
        if "dpi" in options and options["dpi"] == 150:  # those that are files
            file.write(b"half")
            raise OSError("No space left on device")
        save(figure, file, **options)

    monkeypatch.setattr(
        report_page, "look_at_held_out", lambda run: findings.Missing("not here")
    )
    monkeypatch.setattr(Figure, "savefig", torn)
    assert report.main([f"--workdir={copied}"]) == 1
    assert len(calls) > 3
    assert sorted(path.name for path in copied.iterdir()) == before


@pytest.mark.parametrize("name", ["report.html", "curves.png"])
def test_blocked_output_path_fails_early(name, copied, monkeypatch, capsys):
    monkeypatch.setattr(report, "read_run", lambda workdir: pytest.fail("begun"))
    for figure in report.FIGURES:
        (copied / figure).unlink()
    (copied / name).mkdir()
    before = sorted(path.name for path in copied.iterdir())
    assert report.main([f"--workdir={copied}"]) == 1
    said = f"error: cannot write {copied / name}: it is no file. Name another place"
    assert capsys.readouterr().err.startswith(said)
    assert sorted(path.name for path in copied.iterdir()) == before


def test_a_folder_that_is_no_run_is_one_message(tmp_path, copied, capsys):
    assert report.main([f"--workdir={tmp_path / 'none'}"]) == 1
    assert (
        "is not the workdir of a run: it has no config.json" in capsys.readouterr().err
    )
    shutil.rmtree(copied / "checkpoints")
    assert report.main([f"--workdir={copied}"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "no checkpoint" in error
    assert error.count("\n") == 1
    assert not (copied / "report.html").exists()


# Where the time went.


def test_a_run_keeps_its_times(made):
    workdir, _ = made
    (start,) = timing.read_times(workdir / "times.jsonl")
    assert (start.first_step, start.last_step) == (0, 16)
    seconds = dict(start.seconds)
    total = seconds.pop("total")
    assert set(seconds) == {
        *("training", "waiting for data", "compiling", "evaluation", "checkpoints")
    }
    assert min(seconds.values()) >= 0 and sum(seconds.values()) <= total
    # The records say the same of the training.
    spent = findings.time_spent(findings.read_run(workdir))
    of_records = 16 * 6 / spent.images_per_sec
    both = seconds["training"] + seconds["waiting for data"]
    assert both == pytest.approx(of_records, rel=0.01)
    assert sum(part.seconds for part in spent.parts) == pytest.approx(total, abs=0.01)
    assert spent.unrecorded_steps == 0


def test_time_is_counted_once(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    watch = timing.StepClock()
    now[0] += 5
    watch.restart(3, 0.5)
    with watch.spending("evaluation"):
        now[0] += 2
        with watch.spending("compiling"):
            now[0] += 30
        now[0] += 1
    with pytest.raises(OSError), watch.spending("checkpoints"):
        now[0] += 4
        raise OSError
    now[0] += 8
    assert watch.lap(9, 2.5) == (6 / 8, 2 / 8)  # steps per second, share of waiting
    path = tmp_path / "times.jsonl"
    watch.append_to(path, first_step=3, last_step=9)
    with open(path, "a") as file:
        file.write('{"first_step": 1, "sec')  # torn by a kill
    (times,) = timing.read_times(path)
    assert times == timing.Times(
        3,
        9,
        {
            "total": 50.0,
            "compiling": 30.0,
            "evaluation": 3.0,
            "checkpoints": 4.0,
            "training": 6.0,
            "waiting for data": 2.0,
        },
    )
    assert timing.read_times(tmp_path / "none.jsonl") == []


def a_run(records, times):
    config = {"data": {"batch_size": 10}}
    return findings.Run(
        *(None, config, records, times, 0, {}, [], [], None),  # type: ignore[arg-type]
    )


def test_times_of_several_starts_are_added_up():
    rates = [(100, 50.0, 0.0), (200, 100.0, 0.5)]
    records = [
        {"step": step, "epoch": 1.0, "images_per_sec": rate, "data_wait_frac": waited}
        for step, rate, waited in rates
    ]
    spent = findings.time_spent(a_run(records, []))
    assert spent.total is None and spent.unrecorded_steps == 200
    assert dict(spent.parts) == {"training": 25.0, "waiting for data": 5.0}
    assert spent.images_per_sec == 2000 / 30
    starts = [
        timing.Times(0, 60, {"total": 20.0, "training": 12.0, "compiling": 3.0}),
        timing.Times(90, 200, {"total": 30.0, "training": 20.0, "compiling": 4.0}),
    ]
    spent = findings.time_spent(a_run(records, starts))
    assert (spent.total, spent.unrecorded_steps) == (50.0, 30)
    assert [*spent.parts] == [
        ("training", 32.0),
        ("starting and the rest", 11.0),
        ("compiling", 7.0),
    ]


# Several runs.


def test_several_runs_are_drawn_together(made, copied, tmp_path, capsys):
    out = tmp_path / "deep" / "both.svg"
    arguments = [f"--workdir={made[0]},{copied}", f"--out={out}"]
    assert report.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{made[0].parent.name}/run: held-out errors: top-1 ")
    assert lines[-1] == f"curves of 2 runs: {out}"
    assert ElementTree.parse(out).getroot().tag.endswith("}svg")
    assert [path.name for path in out.parent.iterdir()] == ["both.svg"]


def test_what_cannot_be_compared_is_said(made, tmp_path, capsys):
    both = f"--workdir={made[0]},{tmp_path}"
    assert report.main([both, f"--out={tmp_path / 'a.png'}"]) == 1
    assert f"error: {tmp_path} is not the workdir of a run" in capsys.readouterr().err
    assert report.main([both, f"--out={tmp_path / 'a.gif'}"]) == 1
    assert "must end in one of .png, .svg, .pdf" in capsys.readouterr().err
    twice = f"--workdir={made[0]},{made[0]}"
    assert report.main([twice, f"--out={tmp_path / 'a.png'}"]) == 1
    assert "--workdir names a run twice" in capsys.readouterr().err
    seven = [made[0].with_name(name) for name in "abcdefg"]
    for run in seven:
        run.symlink_to(made[0])
    arguments = [
        f"--workdir={','.join(map(str, seven))}",
        f"--out={tmp_path / 'a.png'}",
    ]
    assert report.main(arguments) == 1
    assert "at most 6 runs" in capsys.readouterr().err
    for wrong in ([both], [f"--workdir={made[0]}", "--out=a.png"], []):
        with pytest.raises(SystemExit) as stopped:
            report.main(wrong)
        assert stopped.value.code == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_no_part_is_wider_than_a_phone(made, tmp_path):
    """In headless Chromium, in a frame of 375 pixels; and nothing is refused there."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium on this machine: the page's layout is not looked at")
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
