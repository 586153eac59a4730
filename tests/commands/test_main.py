"""The command line of alexnet_jax.main: mistakes, signals, imports."""

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
    "platform, cache, settings, expected",
    [
        ("gpu", "x", {}, "{0}/x/alexnet_jax/jax"),
        ("gpu", "file", {}, None),  # a place that cannot be written to
        ("cpu", "x", {}, None),
        ("gpu", "x", {"jax_compilation_cache_dir": "mine"}, "mine"),
    ],
)
def test_compiled_programs_are_kept_on_accelerators(
    platform, cache, settings, expected, tmp_path, monkeypatch
):
    (tmp_path / "file").touch()
    fake = types.SimpleNamespace(**{"jax_compilation_cache_dir": None} | settings)
    fake.update = fake.__setattr__
    monkeypatch.setattr(main.jax, "config", fake)
    monkeypatch.setattr(main.jax, "default_backend", lambda: platform)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / cache))
    main._keep_compiled_programs()
    folder = expected and expected.format(tmp_path)
    assert fake.jax_compilation_cache_dir == folder


def start_main(*args, **env):
    """Start the command, with its output and errors in one stream."""
    return subprocess.Popen(
        [sys.executable, "-m", "alexnet_jax.main", "--cpu_devices=2", *args],
        cwd=ROOT,
        env={**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "0", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_training_on_two_virtual_devices_never_imports_tensorflow(tmp_path):
    """Replace tensorflow and torch by modules that leave a mark if imported."""
    marker = tmp_path / "imported"
    for name in ("tensorflow", "torch"):
        (tmp_path / f"{name}.py").write_text(
            f"open({str(marker)!r}, 'w').close()\nraise ImportError('imported')\n"
        )
    process = start_main(
        "--config=configs/quickstart.py",
        f"--workdir={tmp_path / 'run'}",
        "--config.data.source=textures/tiny",
        f"--config.data.dir={tmp_path / 'data'}",
        "--config.data.batch_size=8",
        "--config.model.width=0.05",
        "--config.max_steps=2",
        PYTHONPATH=str(tmp_path),
        JAX_DISABLE_MOST_OPTIMIZATIONS="1",
    )
    out, _ = process.communicate()
    assert process.returncode == 0, out
    assert not marker.exists()
    for words in (
        "devices 2 x cpu (cpu): mode columns, 1 data x 2 column",
        "no checkpoint in",
        "compiled the training step in ",
        "ln(10) = 2.3026",
        "on 100 images",
    ):
        assert words in out


@pytest.mark.slow
def test_ctrl_c_ends_a_run_with_a_checkpoint(tmp_path):
    process = start_main(
        "--config=configs/paper.py",
        f"--workdir={tmp_path}",
        "--config.data.source=fake",
        "--config.data.batch_size=8",
        "--config.model.width=0.05",
    )
    assert any("loss at step 0" in line for line in process.stdout)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "SIGINT: stopping after this step" in out
    (step,) = re.findall(r"stopped at step (\d+) by SIGINT", out)
    assert (tmp_path / "checkpoints" / step).exists()
    assert "Traceback" not in out


def run_in_process(monkeypatch, *args):
    """Run the command; return its exit status."""
    monkeypatch.setattr(sys, "argv", ["main", *map(str, args)])
    with pytest.raises(SystemExit) as ended:
        main.run()
    return ended.value.code


FOLDER = f"--config={ROOT}/configs/folder.py"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([FOLDER, "--config.model.widht=1"], "there is no such field; did you mean"),
        ([FOLDER, "--mode=x"], "argument --mode: invalid choice: 'x'"),
        ([FOLDER, "--config.data.source=folder:nowhere"], "nowhere does not exist"),
        ([FOLDER, "--config.data.batch_size=0"], "1 mistake in the config:"),
        ([FOLDER, "--workdir="], "--workdir=DIR is missing"),
        ([], "--config=FILE is missing"),
    ],
)  # fmt: skip
def test_mistakes_on_the_command_line_give_one_message(args, words, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    assert run_in_process(monkeypatch, f"--workdir={run}", *args) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error
    assert not run.exists()  # nothing half-written


def test_describe_from_any_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    config = ROOT / "configs" / "paper.py"
    assert run_in_process(monkeypatch, f"--config={config}", "--mode=describe") == 0
    out = capsys.readouterr().out
    assert "conv1   55 x 55 x 96      34,944    105,415,200" in out
    assert out.split("total")[1].split()[:2] == ["60,965,224", "724,406,816"]
    # One device: nothing is sent, and what it needs is between its state and 3 GB.
    last = out.splitlines()[-1].split()
    assert last[:5] == ["columns", "1", "x", "1", "none"]
    assert 2 * 4 * 60.97 < float(last[-1].replace(",", "")) < 3000


MEMORY = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmore")


@pytest.mark.parametrize(
    "error, status, words",
    [
        (FloatingPointError("The loss is nan."), 3, "error: The loss is nan."),
        (OSError("no room"), 1, "error: no room\n"),
        (MEMORY, 1, "error: the memory of a device is too small (RESOURCE_EXHAUSTED: "),
    ],
)
def test_exit_status_of_errors(error, status, words, monkeypatch, capsys):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(main, "main", fail)
    with pytest.raises(SystemExit) as ended:
        main._run()
    assert ended.value.code == status
    assert capsys.readouterr().err.startswith(words)
