"""Train, evaluate or describe a network from the command line.

One process, or one of several: see launch/README.md. Any field of the config is changed by
--config.FIELD=VALUE.

python -m alexnet_jax.main --config=configs/paper.py --workdir=DIR
python -m alexnet_jax.main --workdir=DIR --mode=eval
python -m alexnet_jax.main --config=configs/paper.py --mode=describe
"""

import argparse
import contextlib
import ctypes
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
from absl import logging

from alexnet_jax.data import DataError
from alexnet_jax.models.weights import WeightsError
from alexnet_jax.system import signals
from alexnet_jax.training import distributed, ensemble, load, loop
from alexnet_jax.training.checkpoint import CheckpointError
from alexnet_jax.training.config import Config, ConfigError, as_json, flat, set_fields, validate
from alexnet_jax.training.describe import describe, describe_modes
from alexnet_jax.training.evaluate import PredictionsError
from alexnet_jax.training.experiment import DIVERGED

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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (--help lists the flags).")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m alexnet_jax.main",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--config",
        help="a file of configs/, for example configs/paper.py; with --mode=eval by default the "
        "config of the (first) run in --workdir",
    )
    add(
        "--workdir",
        help="folder of the run; the same folder again resumes it. With --mode=eval also "
        "DIR@STEP, or several that are averaged: DIR,DIR@STEP,FILE.npz",
    )
    add("--mode", choices=["train", "eval", "describe"], default="train")
    add("--predictions", help="with --mode=eval: FILE.npz for the predictions")
    add("--cpu_devices", type=int, help="number of virtual devices of the CPU to run on")
    add(
        "--distributed",
        choices=["auto", "on", "off"],
        default="auto",
        help="on: this is one of several processes; auto: it is if the flags below say so, or if "
        "SLURM or Open MPI has started several tasks",
    )
    add("--coordinator_address", help="HOST:PORT of process 0, the same for all")
    add("--num_processes", type=int, help="number of processes")
    add("--process_id", type=int, help="number of this process, from 0")
    add("--local_device_ids", help="numbers of this process's GPUs, for example 0,1")
    add("--connect_seconds", type=int, default=180, help="how long to wait for the others")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Train, evaluate or describe, as the arguments say."""
    options, fields = _parser().parse_known_args(argv)
    mode, workdir = options.mode, options.workdir
    if mode != "describe" and not workdir:
        raise ConfigError("--workdir=DIR is missing. Name the folder that keeps the run.")
    if mode != "eval" and options.predictions is not None:
        raise ConfigError(
            f"--predictions={options.predictions} goes with --mode=eval; got --mode={mode}. Leave "
            "one of them out."
        )
    config = read_config(options, fields)
    if options.cpu_devices:  # has no effect after JAX has started
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", options.cpu_devices)
    gpus = options.local_device_ids
    distributed.start(
        options.distributed,
        coordinator_address=options.coordinator_address,
        num_processes=options.num_processes,
        process_id=options.process_id,
        local_device_ids=None if gpus is None else [int(gpu) for gpu in gpus.split(",")],
        connect_seconds=options.connect_seconds,
    )
    distributed.require_devices()
    flags = {f"config.{name}": value for name, value in flat(as_json(config)).items()}
    distributed.require_same({"mode": mode, "workdir": workdir} | flags)
    if mode == "describe":
        say = print if jax.process_index() == 0 else lambda *_, **__: None
        say(describe(config), flush=True)  # before the compilations
        say("\n" + describe_modes(config, lambda line: say(line, file=sys.stderr)))
        return
    _return_freed_arrays()
    _keep_compiled_programs()
    if mode == "train":
        loop.train_and_evaluate(config, workdir)
    else:
        members = ensemble.parse_members(workdir)
        ensemble.evaluate_runs(config, members, save_to=options.predictions)


def read_config(options: argparse.Namespace, fields: Sequence[str]) -> Config:
    """Return the config of --config, by default of the run to evaluate, with fields changed.

    Raises:
      ConfigError: the file or a field is wrong; lists all mistakes.
      Exception: any error of the Python file.
    """
    name = options.config
    if name is None and options.mode == "eval":
        name = ensemble.config_file(ensemble.parse_members(options.workdir))
    if not name:
        raise ConfigError(
            "--config=FILE is missing, for example --config=configs/paper.py, or the "
            "config.json of a run."
        )
    config = load.load_config(name)
    if found := set_fields(config, fields):
        validate(config, devices=False, training=options.mode == "train", found=found)
    return config


def _return_freed_arrays() -> None:
    """Let glibc map arrays of 1 MiB and more one by one, so that free() returns them.

    By itself glibc raises this threshold to 32 MiB, and the memory of a long run grows.
    """
    if sys.platform == "linux" and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        with contextlib.suppress(AttributeError):  # musl has no mallopt
            ctypes.CDLL(None).mallopt(-3, 2**20)  # -3: M_MMAP_THRESHOLD


def _keep_compiled_programs() -> None:
    """Keep compiled programs in the user's cache folder, unless JAX's settings name another.

    Not on the CPU: on some processors XLA refuses every stored program, each with a
    warning of illegal instructions (jax-ml/jax#38445, openxla/xla#44565, jax 0.10).
    """
    settings: Any = jax.config
    if settings.jax_compilation_cache_dir or jax.default_backend() == "cpu":
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    folder = cache / "alexnet_jax" / "jax"
    with contextlib.suppress(OSError):  # some containers have no home to write to
        folder.mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(folder))


def run() -> None:
    """Run the command: one message and status 1 for a user error, 3 for divergence."""
    logging.set_verbosity(logging.WARNING)  # hides messages of jax and orbax
    warnings.filterwarnings("ignore", module="PIL")  # for example of damaged EXIF
    signals.run(_run)


def _run() -> int:
    status = 1
    try:
        main()
        return 0
    except (BrokenPipeError, signals.Interrupted):
        raise
    except KeyboardInterrupt:  # the run has written its checkpoint
        return 130
    except FloatingPointError as error:
        message, status = str(error), DIVERGED
    except _USER_ERRORS as error:
        message = str(error)
    except Exception as error:
        first_line = str(error).partition("\n")[0]
        if first_line.startswith("RESOURCE_EXHAUSTED"):
            message = (
                f"the memory of a device is too small ({first_line}). Set a larger "
                "--config.optim.accumulate_steps, or take more devices; the same command "
                "resumes from the last checkpoint."
            )
        elif jax.distributed.is_initialized():
            traceback.print_exc()
            message = (
                "this process failed, or another one is gone, whose own output says why. "
                "The same command resumes from the last checkpoint."
            )
        else:
            raise
    print(f"error: {message}", file=sys.stderr)
    distributed.leave(status)


if __name__ == "__main__":
    run()
