"""Train, evaluate or describe a network from the command line.

One process, or one of several: see launch/README.md.

python -m alexnet_jax.main --config=configs/paper.py --workdir=DIR
python -m alexnet_jax.main --workdir=DIR --mode=eval
python -m alexnet_jax.main --config=configs/paper.py --mode=describe
"""

import contextlib
import ctypes
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from alexnet_jax.data import DataError
from alexnet_jax.models.weights import WeightsError
from alexnet_jax.system import signals
from alexnet_jax.training import distributed, ensemble, experiment, load, loop
from alexnet_jax.training.checkpoint import CheckpointError
from alexnet_jax.training.config import ConfigError, as_json, flat
from alexnet_jax.training.describe import describe, describe_modes
from alexnet_jax.training.evaluate import PredictionsError
from alexnet_jax.training.workdir import CONFIG_FILE, require_run

_NO_CONFIG = "--config=FILE is missing, such as --config=configs/paper.py."
_NO_WORKDIR = "--workdir=DIR is missing: the folder that keeps the run."
# User errors are one line; anything else keeps its traceback.
_USER_ERRORS = (
    ConfigError,
    DataError,
    CheckpointError,
    distributed.DistributedError,
    distributed.DeviceError,
    PredictionsError,
    WeightsError,
    OSError,
)


class _NotLoadedError(Exception):
    """Carries an error of a config file past absl, which would hide its traceback."""


class _ConfigFile(flags.ArgumentParser):
    """Parser for --config: a Python file, or the config.json of a workdir."""

    def parse(self, argument: str) -> ConfigDict:
        try:
            if argument[:1] in ("", "-"):  # "--config --workdir=DIR"
                raise ConfigError(_NO_CONFIG)
            return load.load_config(argument)
        except Exception as error:
            raise _NotLoadedError from error


_CONFIG = config_flags.DEFINE_config_file(
    "config",
    help_string="A file of configs/, such as configs/paper.py. With --mode=eval its "
    "default is the config of the (first) run in --workdir.",
)
flags.FLAGS["config"].parser = _ConfigFile()
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder of the run; the same folder again goes on with it. With --mode=eval also "
    "DIR@STEP, or several that are averaged, DIR,DIR@STEP,FILE.npz.",
)
_PREDICTIONS = flags.DEFINE_string(
    "predictions", None, "With --mode=eval: an .npz that is written with the predictions."
)
_MODE = flags.DEFINE_enum("mode", "train", ["train", "eval", "describe"], "What to do with it.")
_CPU_DEVICES = flags.DEFINE_integer(
    "cpu_devices",
    None,
    "Run on that many virtual devices of the CPU, whatever else there is.",
    lower_bound=1,
)
_DISTRIBUTED = flags.DEFINE_enum(
    "distributed",
    "auto",
    ["auto", "on", "off"],
    "on: this is one of several processes; auto: it is if the flags below say so, or if "
    "SLURM or Open MPI has started several tasks.",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "HOST:PORT of process 0, for all the same."
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "How many processes there are.", lower_bound=1
)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "Which of them this one is, from 0.", lower_bound=0
)
_LOCAL_DEVICE_IDS = flags.DEFINE_list(
    "local_device_ids", None, "Numbers of the GPUs of this process, such as 0,1."
)
_CONNECT_SECONDS = flags.DEFINE_integer(
    "connect_seconds", 180, "How long to wait for the other processes.", lower_bound=1
)


def main(argv: Sequence[str]) -> None:
    """Train, evaluate or describe, as the flags say."""
    if len(argv) > 1:
        raise ConfigError(
            f"unknown on the command line: {' '.join(argv[1:])}. A field of the config "
            "is changed with --config.FIELD=VALUE."
        )
    config, mode, workdir = _CONFIG.value, _MODE.value, _WORKDIR.value or ""
    if mode != "describe" and not workdir:
        raise ConfigError(_NO_WORKDIR)
    if mode != "eval" and _PREDICTIONS.value is not None:
        raise ConfigError("--predictions=FILE.npz goes with --mode=eval.")
    if _CPU_DEVICES.value:  # has no effect after JAX has started
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", _CPU_DEVICES.value)
    gpus = _LOCAL_DEVICE_IDS.value
    distributed.start(
        _DISTRIBUTED.value,
        coordinator_address=_COORDINATOR.value,
        num_processes=_NUM_PROCESSES.value,
        process_id=_PROCESS_ID.value,
        local_device_ids=None if gpus is None else [int(gpu) for gpu in gpus],
        connect_seconds=_CONNECT_SECONDS.value,
    )
    distributed.require_devices()
    fields = flat(as_json(config), "config.")
    distributed.require_same({"mode": mode, "workdir": workdir} | fields)
    if mode == "describe":

        def say(line: str, file: Any = None) -> None:
            if jax.process_index() == 0:
                print(line, file=file, flush=True)

        say(describe(config) + "\n")  # before the compilations
        say(describe_modes(config, lambda line: say(line, sys.stderr)))
        return
    _return_freed_arrays()
    _keep_compiled_programs()
    if mode == "eval":
        members = [ensemble.Member.parse(name) for name in workdir.split(",")]
        ensemble.evaluate_runs(config, members, save_to=_PREDICTIONS.value)
    else:
        loop.train_and_evaluate(config, workdir)


def _return_freed_arrays() -> None:
    """Let glibc map arrays of 1 MiB and more one by one, so that free() returns them.

    By itself glibc raises this threshold to 32 MiB, and the memory of a long run grows.
    """
    if sys.platform == "linux" and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        with contextlib.suppress(AttributeError):  # musl has no mallopt
            ctypes.CDLL(None).mallopt(-3, 2**20)  # -3: M_MMAP_THRESHOLD


def _keep_compiled_programs() -> None:
    """Keep compiled programs in the user's cache folder, unless JAX's settings differ.

    Not on the CPU: on some processors XLA refuses every stored program, each with a
    warning of illegal instructions (jax-ml/jax#38445, openxla/xla#44565, jax 0.10).
    """
    settings: Any = jax.config
    if settings.jax_compilation_cache_dir or not settings.jax_enable_compilation_cache:
        return
    if jax.default_backend() == "cpu":
        return
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = os.path.join(base, "alexnet_jax", "jax")
    with contextlib.suppress(OSError):  # some containers have no home to write to
        os.makedirs(folder, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", folder)


def _parse(argv: Sequence[str]) -> list[str]:
    """Parse the flags; --mode=eval takes the config of the run that it evaluates."""
    flags.FLAGS.set_gnu_getopt()
    try:
        rest = flags.FLAGS(list(argv), known_only=True)
        if not flags.FLAGS["config"].present:
            rest.insert(1, f"--config={_stored_config()}")
        return flags.FLAGS(rest)
    except _NotLoadedError as error:
        assert error.__cause__ is not None
        raise error.__cause__ from None
    except ConfigError:
        raise
    except (AttributeError, KeyError) as error:
        # ml_collections: "'FIELD'\nDid you mean ...", of a group in a second error.
        inner = error.args[0]
        text = inner.args[0] if isinstance(inner, KeyError) else inner
        words = text.replace("'", "").replace("\n", ". ")
        raise ConfigError(f"the config has no such field: {words}") from error
    except (flags.Error, TypeError, ValueError) as error:
        words = " ".join(str(error).split())
        raise ConfigError(f"the command line: {words}") from error


def _stored_config() -> Path:
    """Return the config of the first run in --workdir, for --mode=eval."""
    if _MODE.value != "eval":
        raise ConfigError(_NO_CONFIG)
    if not _WORKDIR.value:
        raise ConfigError(_NO_WORKDIR)
    for member in map(ensemble.Member.parse, _WORKDIR.value.split(",")):
        if member.is_run:
            require_run(member.path)
            return member.path / CONFIG_FILE
    raise ConfigError(f"{_NO_CONFIG} Files do not say which pictures they are to be tested on.")


def run() -> None:
    """Run the command: one message and status 1 for a user error, 3 for divergence."""
    logging.set_verbosity(logging.WARNING)  # hides messages of jax and orbax
    warnings.filterwarnings("ignore", module="PIL")  # for example of damaged EXIF
    signals.run(_run)


def _run() -> int:
    status = 1
    try:
        app.run(main, flags_parser=_parse)  # raises SystemExit
    except (BrokenPipeError, signals.Interrupted):
        raise
    except KeyboardInterrupt:  # the run has written its checkpoint
        return 130
    except FloatingPointError as error:
        message, status = str(error), experiment.DIVERGED
    except _USER_ERRORS as error:
        message = str(error)
    except Exception as error:
        first_line = str(error).partition("\n")[0]
        if first_line.startswith("RESOURCE_EXHAUSTED"):
            message = (
                f"the memory of a device is too small ({first_line}). Set a larger "
                "--config.optim.accumulate_steps (the same run in less memory, but for "
                "batch normalisation), or take more devices; the same command goes on, "
                "from the last checkpoint if there is one."
            )
        elif jax.distributed.is_initialized():
            traceback.print_exc()
            message = (
                "this process failed, or another one is gone, whose own output says why. "
                "The same command goes on, from the last checkpoint if there is one."
            )
        else:
            raise
    print(f"error: {message}", file=sys.stderr)
    distributed.leave(status)


if __name__ == "__main__":
    run()
