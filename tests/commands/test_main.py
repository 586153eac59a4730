"""The command line of alexnet_jax.main: mistakes, signals, what it imports."""

import json
import os
import re
import signal
import subprocess
import sys
import types
from pathlib import Path

import jax
import pytest

from alexnet_jax import main

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "platform, environment, expected",
    [
        ("gpu", {"XDG_CACHE_HOME": "{0}/x"}, "{0}/x/alexnet_jax/jax"),
        ("gpu", {"XDG_CACHE_HOME": "", "HOME": "{0}"}, "{0}/.cache/alexnet_jax/jax"),
        # A place that cannot be written to is none.
        ("gpu", {"XDG_CACHE_HOME": "{0}/file"}, None),
        ("cpu", {"XDG_CACHE_HOME": "{0}/x"}, None),
    ],
)
def test_compiled_programs_are_kept_on_accelerators(
    platform, environment, expected, tmp_path, monkeypatch
):
    (tmp_path / "file").touch()
    settings = types.SimpleNamespace(
        jax_compilation_cache_dir=None, jax_enable_compilation_cache=True
    )
    settings.update = settings.__setattr__
    monkeypatch.setattr(main.jax, "config", settings)
    monkeypatch.setattr(main.jax, "default_backend", lambda: platform)
    for name, value in environment.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    main._keep_compiled_programs()
    found = settings.jax_compilation_cache_dir
    assert found == (expected and expected.format(tmp_path))
    # jax's own settings go first.
    settings.jax_compilation_cache_dir = "mine"
    main._keep_compiled_programs()
    assert settings.jax_compilation_cache_dir == "mine"
    settings.jax_compilation_cache_dir = None
    settings.jax_enable_compilation_cache = False
    main._keep_compiled_programs()
    assert settings.jax_compilation_cache_dir is None


def run_main(*args, cwd=ROOT, **env):
    env = {"JAX_ENABLE_COMPILATION_CACHE": "0", **env}  # the user's stays as it is
    return subprocess.run(
        [sys.executable, "-m", "alexnet_jax.main", *args],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )


def test_training_on_two_virtual_devices_never_imports_tensorflow(tmp_path):
    """Nor torch, not even where they are installed: ones that only tell on their users."""
    marker = tmp_path / "imported"
    for name in ("tensorflow", "torch"):
        (tmp_path / f"{name}.py").write_text(
            f"open({str(marker)!r}, 'w').close()\nraise ImportError('imported')\n"
        )
    done = run_main(
        "--config=configs/quickstart.py",
        f"--workdir={tmp_path / 'run'}",
        "--cpu_devices=2",
        "--config.data.source=textures/tiny",
        f"--config.data.dir={tmp_path / 'data'}",
        "--config.data.batch_size=8",
        "--config.model.width=0.05",
        "--config.max_steps=2",
        PYTHONPATH=str(tmp_path),
        JAX_DISABLE_MOST_OPTIMIZATIONS="1",
    )
    assert not marker.exists()
    assert done.returncode == 0, done.stderr
    for words in (
        "devices 2 x cpu (cpu): mode columns, 1 data x 2 column",
        "no checkpoint in",
        "compiling the training step ...",
        "compiled the training step in ",
        "loss at step 0: ",
        "ln(10) = 2.3026",
        "on 100 images",
    ):
        assert words in done.stdout


def start_main(*args, **env):
    """The command, its output and its errors in one stream of lines."""
    return subprocess.Popen(
        [sys.executable, "-m", "alexnet_jax.main", "--cpu_devices=2", *args],
        cwd=ROOT,
        env={**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "0", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def read_until(process, words):
    for line in process.stdout:
        if words in line:
            return
    raise AssertionError(f"it ended without saying {words}")


@pytest.mark.slow
def test_ctrl_c_ends_a_run_with_a_checkpoint(tmp_path):
    process = start_main(
        "--config=configs/paper.py",
        f"--workdir={tmp_path}",
        "--config.data.source=fake",
        "--config.data.batch_size=8",
        "--config.model.width=0.05",
    )
    read_until(process, "loss at step 0")
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "SIGINT: stopping after this step" in out
    (step,) = re.findall(r"stopped at step (\d+) by SIGINT", out)
    assert (tmp_path / "checkpoints" / step).exists()
    assert "Traceback" not in out


FOLDER = ("--config=configs/folder.py", "--workdir={run}", "--cpu_devices=1")
# What is given, and what has to be said.
MISTAKES = {
    (
        *FOLDER,
        "stray",
    ): "error: unknown on the command line: stray. A field of the config",
    (*FOLDER, "--config.model.widht=1"): "no such field: widht. Did you mean",
    (*FOLDER, "--config.seed=x"): "error: the command line: flag --config.seed=x",
    (*FOLDER, "--nosuch=1"): (
        "error: the command line: Unknown command line flag 'nosuch'"
    ),
    (*FOLDER, "--config.data.source=folder:nowhere"): "nowhere does not exist",
    (*FOLDER, "--config.data.batch_size=0"): "1 mistake in the config:",
    (): "error: --config=FILE is missing",
    ("--config=configs/paper.py",): "error: --workdir=DIR is missing",
}
# The command as it is started, but imported once: a fork for each of its mistakes.
FORKS = """
import json, os, sys
from alexnet_jax import main
for number, args in enumerate(json.loads(sys.argv[1])):
    if not os.fork():
        os.dup2(os.open(f"{sys.argv[2]}/{number}", os.O_CREAT | os.O_WRONLY), 2)
        sys.argv[1:] = args
        main.run()
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.fixture(scope="module")
def mistaken(tmp_path_factory):
    """(exit status, standard error) of each of `MISTAKES`, and the workdir asked for."""
    folder = tmp_path_factory.mktemp("mistakes")
    run = folder / "run"
    commands = [[arg.format(run=run) for arg in args] for args in MISTAKES]
    done = subprocess.run(
        [sys.executable, "-c", FORKS, json.dumps(commands), str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    said = [(folder / str(number)).read_text() for number in range(len(commands))]
    statuses = [int(line) for line in done.stdout.splitlines()]
    return dict(zip(MISTAKES, zip(statuses, said, strict=True), strict=True)), run


@pytest.mark.parametrize("args", MISTAKES)
def test_mistakes_on_the_command_line_are_one_message(args, mistaken):
    (status, said), run = mistaken[0][args], mistaken[1]
    assert status == 1
    assert MISTAKES[args] in said
    assert "Traceback" not in said
    assert not run.exists()  # nothing half-written


def test_describe_from_any_folder(tmp_path):
    config = ROOT / "configs" / "paper.py"
    quickly = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = run_main(f"--config={config}", "--mode=describe", cwd=tmp_path, **quickly)
    assert done.returncode == 0, done.stderr
    assert "conv1   55 x 55 x 96      34,944    105,415,200" in done.stdout
    assert "total" in done.stdout
    assert done.stdout.split("total")[1].split()[:2] == ["60,965,224", "724,406,816"]
    # One device: nothing is sent, and what it needs is between its state and 3 GB.
    last = done.stdout.splitlines()[-1].split()
    assert last[:5] == ["columns", "1", "x", "1", "none"]
    assert 2 * 4 * 60.97 < float(last[-1].replace(",", "")) < 3000


MEMORY = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmore")


@pytest.mark.parametrize(
    "error, status, words",
    [
        (
            FloatingPointError("The loss of step 7 is nan."),
            3,
            "error: The loss of step 7",
        ),
        (OSError("no room"), 1, "error: no room\n"),
        (MEMORY, 1, "error: the memory of a device is too small (RESOURCE_EXHAUSTED: "),
    ],
)
def test_exit_status_of_errors(error, status, words, monkeypatch, capsys):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(main.app, "run", fail)
    with pytest.raises(SystemExit) as ended:
        main._run()
    assert ended.value.code == status
    assert capsys.readouterr().err.startswith(words)


def test_other_errors_keep_their_traceback(tmp_path, monkeypatch):
    config = tmp_path / "broken.py"
    config.write_text("def get_config():\n    raise ValueError('mine')\n")
    done = run_main(f"--config={config}", f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 1
    assert f'File "{config}", line 2, in get_config' in done.stderr
    assert done.stderr.endswith("ValueError: mine\n")
