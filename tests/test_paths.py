"""Paths that cannot be used: one sentence each, at once, and nothing is left behind."""

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from absl.testing import flagsaver
from PIL import Image
from test_untrusted import place, small_config, whole_run  # noqa: F401

from alexnet_jax import export, main, predict, prepare, protocol, report, retrieve
from alexnet_jax import train as train_lib
from alexnet_jax.data import locks, paths
from alexnet_jax.data.files import replacing
from alexnet_jax.evaluate import Predictions

ROOT = Path(__file__).parent.parent
ODD = os.fsdecode(b"caf\xe9")  # Latin-1


def started(module, arguments, monkeypatch):
    """The exit status of a command."""
    if module is prepare:
        return prepare.main(["prepare", *arguments])
    if module is not main:
        return module.main(arguments)
    argv = ["main", "--config=configs/folder.py", *arguments]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", argv)
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as ended:
        main.run()
    return ended.value.code


@pytest.fixture(scope="module")
def places(whole_run, tmp_path_factory):  # noqa: F811
    """What the commands are given; `run` by a name that is no UTF-8 is `odd`."""
    folder = tmp_path_factory.mktemp("places")
    (folder / "file").touch()
    shutil.copytree(whole_run, folder / "run")
    (folder / ODD).symlink_to("run")
    (folder / "nowhere").symlink_to("gone")
    Image.new("RGB", (40, 40)).save(folder / "picture.png")
    found = {name: str(folder / name) for name in ("file", "run", "nowhere", "new")}
    (folder / "link.png").symlink_to("picture.png")
    found |= {name: str(folder / f"{name}.png") for name in ("picture", "link")}
    return found | {"odd": str(folder / ODD), "long": "x" * 300}


NO_HOME = "there is no home ~nobodyx here. Write the whole path"
# Said before any work is begun, and by the system when it is done.
FILE = "file is a file, where a folder has to be. Name a place that can be written to"
LATE = "file is a file, where a folder has to be. Name another path"
NO_UTF8 = (
    " is no UTF-8, as the paths of checkpoints and prepared data have to be. Rename"
)
OWN = "one of the pictures that are looked at. Name another file"
COMMA = "has a comma with nothing before or behind it"
MISTAKES = [
    (main, "--workdir={new} --config.data.source=folder:~nobodyx/p", NO_HOME),
    (
        main,
        "--workdir={new} --config.data.source=x --config.data.dir=~nobodyx",
        NO_HOME,
    ),
    (prepare, "statistics --source=folder:~nobodyx/p", NO_HOME),
    (prepare, "imagenet --source=~nobodyx/p --data_dir={new}", NO_HOME),
    (prepare, "textures --data_dir=~nobodyx", NO_HOME),
    (main, "--workdir=~nobodyx/run", NO_HOME),
    (main, "--mode=eval --workdir=~nobodyx/run", NO_HOME),
    (main, "--mode=eval --workdir={run} --predictions=~nobodyx/x.npz", NO_HOME),
    (
        retrieve,
        "--workdir={run} --index={new}.npz --layer=logits --source=folder:~nobodyx",
        NO_HOME,
    ),
    (
        main,
        "--workdir={new} --config.data.source=x --config.data.dir={file}",
        "not a fo",
    ),
    (prepare, "textures --data_dir={file}", "it is a file, where a folder has to be"),
    (prepare, "textures --data_dir={file}/x", LATE),
    (main, "--workdir={file}/x", FILE),
    (main, "--workdir={nowhere}", "nowhere is a link to nothing, where a folder has"),
    (main, "--workdir={long}", "File name too long. Name another path"),
    (main, "--mode=eval --workdir={run} --predictions={file}/x.npz", FILE),
    (
        main,
        "--mode=eval --workdir={run} --predictions={run}/statistics.npz",
        "statistics.npz is there, and is not replaced: ",
    ),
    (export, "--workdir={run} --out={file}/x.onnx", FILE),
    (report, "--workdir={run},{odd} --out={file}/x.png", FILE),
    (report, "--workdir={long}", "File name too long. Name another path"),
    (predict, "--workdir={run} --figure={file}/x.png {picture}", FILE),
    (predict, "--workdir={run} --feature_maps={file}/x.png {picture}", FILE),
    (retrieve, "--workdir={run} --index={file}/x.npz", FILE),
    (predict, "--workdir={run} --figure={picture} {new}.png {picture}", OWN),
    (predict, "--workdir={run} --feature_maps={picture} {link}", OWN),
    (retrieve, "--workdir={run} --index={new}.npz --figure={picture} {picture}", OWN),
    (main, "--workdir={odd}", NO_UTF8),
    (main, "--mode=eval --workdir={odd}", NO_UTF8),
    (predict, "--workdir={odd} {picture}", NO_UTF8),
    (report, "--workdir={odd}", NO_UTF8),
    (export, "--workdir={odd} --out={new}.onnx", NO_UTF8),
    (prepare, "textures --data_dir={odd}", NO_UTF8),
    (main, "--mode=eval --workdir={run},,{run}", COMMA),
    (main, "--mode=eval --workdir={run},", COMMA),
]


@pytest.mark.parametrize(
    "module, arguments, words",
    [
        pytest.param(*m, id=f"{m[0].__name__.rpartition('.')[2]} {m[1]}")
        for m in MISTAKES
    ],
)
def test_wrong_paths_are_one_sentence(
    module, arguments, words, places, monkeypatch, capsys
):
    folder = Path(places["run"]).parent
    before = sorted(folder.rglob("*"))
    given = [word.format(**places) for word in arguments.split()]
    assert started(module, given, monkeypatch) == 1
    out, err = capsys.readouterr()
    assert words in err
    assert "[Errno" not in err and "Traceback" not in err
    assert err.count("\n") == 1 and not out
    left = {*folder.rglob("*")} - {*before}
    assert {path.name for path in left} <= {".readers"}


def test_an_empty_part_of_several_runs_is_a_mistake(places, capsys):
    for given in ("{run},,{run}", "{run},"):
        with pytest.raises(SystemExit) as ended:
            report.main([f"--workdir={given.format(**places)}", "--out=x.png"])
        assert ended.value.code == 2
        assert COMMA in capsys.readouterr().err


def test_a_home_is_found_in_every_command(places, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(Path(places["run"]).parent))
    assert export.main(["--workdir=~/run", f"--out={tmp_path / 'x.safetensors'}"]) == 0
    assert predict.main(["--workdir=~/run", places["picture"]]) == 0
    monkeypatch.setenv("HOME", str(tmp_path))
    assert export.main([f"--workdir={places['run']}", "--out=~/y.safetensors"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("x.safetensors", "y.safetensors")
    ]
    capsys.readouterr()
    for module, arguments in (
        (export, ["--workdir=~nobodyx/run", "--out=x.onnx"]),
        (export, ["--workdir=run", "--out=~nobodyx/x.onnx"]),
        (predict, ["--workdir=~nobodyx/run", places["picture"]]),
        (predict, ["--workdir=run", "--figure=~nobodyx/x.png", places["picture"]]),
        (report, ["--workdir=~nobodyx/run"]),
        (report, ["--workdir=run,~nobodyx/run", "--out=x.png"]),
        (report, ["--workdir=run,run", "--out=~nobodyx/x.png"]),
        (retrieve, ["--workdir=run", "--index=~nobodyx/x.npz"]),
    ):
        with pytest.raises(SystemExit) as ended:
            module.main(arguments)
        assert ended.value.code == 2
        assert NO_HOME in capsys.readouterr().err


def test_a_memory_that_is_too_small_is_one_sentence(places, monkeypatch, capsys):
    def refuse(*_):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nBuffers: ..."
        )

    monkeypatch.setattr(train_lib, "train_and_evaluate", refuse)
    assert started(main, [f"--workdir={places['new']}"], monkeypatch) == 1
    err = capsys.readouterr().err
    assert "allocating 9 bytes.). Set a larger --config.optim.accumulate_steps" in err
    assert err.count("\n") == 1 and "Traceback" not in err


FILES = [
    *("config.json", "classes.json", "metrics.jsonl", "times.jsonl", "statistics.npz"),
    *(".lock", "checkpoints/.readers", "checkpoints/.saving"),
]


@pytest.mark.parametrize(
    "name, make",
    [
        *itertools.product(FILES, [os.mkdir, os.mkfifo]),
        *itertools.product(["checkpoints", "profile"], [Path.touch, os.mkfifo]),
    ],
)
def test_what_is_no_file_of_a_workdir_is_not_trained_over(name, make, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    make(path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(paths.PathError) as raised:
        train_lib.train_and_evaluate(small_config(), tmp_path)
    is_, belongs = {
        os.mkdir: ("a folder", "a file"),
        Path.touch: ("a file", "a folder"),
        os.mkfifo: ("no regular file", "a fi" if name in FILES else "a folder"),
    }[make]
    assert f"{path} is {is_}; {belongs}" in str(raised.value)
    assert "belongs there. Move it away, or name another folder" in str(raised.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", [".lock", "checkpoints/.readers"])
@pytest.mark.parametrize("target", ["mine", "nothing"])
def test_a_lock_that_is_a_link_is_said_at_the_start(name, target, tmp_path):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    (tmp_path / "mine").write_text("mine")
    path.symlink_to(tmp_path / target)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(paths.PathError, match=f"^{path} is a link; .*Move it away"):
        train_lib.train_and_evaluate(small_config(), tmp_path / "run")
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(OSError) as raised, locks.held(path, wait=False):
        pass
    said = paths.message_of(raised.value)
    assert f"cannot use {path}: it is a link, which a lock may not be. Name" in said


def test_other_files_of_a_workdir_may_be_links(tmp_path):
    (tmp_path / "elsewhere").touch()
    (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "elsewhere")
    paths.require_places(tmp_path, files=["metrics.jsonl"], folders=[])


def test_a_read_only_workdir_is_read_and_not_written(places, small_disk, capsys):
    disk = small_disk(8)
    run = shutil.copytree(places["run"], disk / "run")
    (run / "checkpoints" / ".readers").unlink(missing_ok=True)
    done = subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=False)
    if done.returncode:
        pytest.skip("no disk can be made read-only here")
    workdir = f"--workdir={run}"
    assert predict.main([workdir, places["picture"]]) == 0
    assert "%  class " in capsys.readouterr().out
    early, late = "cannot write ", "cannot use "
    for module, said, arguments in (
        (report, early, [workdir]),
        (export, early, [workdir, f"--out={run / 'x.safetensors'}"]),
        (predict, early, [workdir, f"--figure={disk / 'x.png'}", places["picture"]]),
        (retrieve, early, [workdir, f"--index={disk / 'x.npz'}"]),
        (prepare, late, ["prepare", "textures", f"--data_dir={disk}"]),
    ):
        assert module.main(arguments) == 1
        err = capsys.readouterr().err
        assert said in err and "read-only. Name " in err and err.count("\n") == 1
        assert "[Errno" not in err
    with pytest.raises(paths.PathError, match=f"cannot write to {run}: no permission"):
        train_lib.train_and_evaluate(small_config(), run)


def test_a_file_that_cannot_be_replaced_keeps_its_name_in_the_error(tmp_path):
    (tmp_path / "x.npz").mkdir()
    with pytest.raises(IsADirectoryError) as raised, replacing(tmp_path / "x.npz"):
        pass
    said = paths.message_of(raised.value)
    assert f"{tmp_path / 'x.npz'}: it is a folder, where a file has to be" in said
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]


@pytest.mark.parametrize(
    "error, words",
    [
        (
            PermissionError(13, "Permission denied", "a/b"),
            "cannot use a/b: no permissi",
        ),
        (
            PermissionError(13, "Permission denied", Path("a/b")),  # as of io.FileIO
            "cannot use a/b: no permission. Name another path",
        ),
        (OSError(30, "Read-only file system", "a/b"), "its file system is read-only"),
        (
            FileNotFoundError(2, "No such file", "a/b"),
            "cannot use a/b: No such file. N",
        ),
        (OSError(5, "Input/output error"), "the system says: Input/output error"),
        (OSError("in words"), "in words"),
        (ValueError("a\x1b[1m\nb"), "a\\x1b[1m\nb"),
    ],
)
def test_the_systems_own_errors_are_sentences(error, words):
    assert words in paths.message_of(error)
    assert "[Errno" not in paths.message_of(error)


# What is printed.

NAMES = ("\x1b[31mred\nb", "g\x07", "\x9b2J")
SHOWN = (r"\x1b[31mred\nb", r"g\x07", r"\x9b2J")


def test_names_of_classes_do_not_reach_the_terminal_as_they_are():
    chances = np.array([0.5, 0.3, 0.2])
    picture = np.zeros((4, 4, 3), np.uint8)
    found = predict.Prediction("p\x1b.png", chances, picture, NAMES)
    first, *lines = predict.as_text(found, 3).split("\n")
    assert first == r"p\x1b.png"
    assert tuple(line.split("%  ")[1] for line in lines) == SHOWN
    names = [label["name"] for label in predict.as_json(found, 3)["labels"]]
    assert tuple(names) == NAMES  # for other programs
    logs = np.log(np.tile(chances, (3, 1)))
    labels = np.array([0, 1, 2])
    predictions = Predictions(logs, None, 1, labels, NAMES, "pictures")
    lines = protocol.describe_mistakes(predictions)
    assert all(any(shown in line for line in lines) for shown in SHOWN)
    assert not any(paths.UNPRINTABLE.search(line) for line in lines)
