"""Train, evaluate or describe a network from the command line.

python -m alexnet_jax.main --config=configs/paper.py --workdir=DIR
python -m alexnet_jax.main --config=configs/paper.py --workdir=DIR --mode=eval
python -m alexnet_jax.main --config=configs/paper.py --mode=describe
"""

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from alexnet_jax import train
from alexnet_jax.checkpoint import CheckpointError
from alexnet_jax.data import DataError
from alexnet_jax.describe import describe
from alexnet_jax.experiment import ConfigError

_CONFIG = config_flags.DEFINE_config_file(
    "config", help_string="A file of configs/, such as configs/paper.py."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; the same folder again goes on with it."
)
_MODE = flags.DEFINE_enum(
    "mode", "train", ["train", "eval", "describe"], "What to do with it."
)
_CPU_DEVICES = flags.DEFINE_integer(
    "cpu_devices",
    None,
    "Run on that many virtual devices of the CPU, whatever else there is.",
    lower_bound=1,
)
# What a user can mend is said in words; anything else keeps its traceback.
_USER_ERRORS = (
    ConfigError,
    DataError,
    CheckpointError,
    OSError,
    FloatingPointError,
)


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise ConfigError(
            f"unknown on the command line: {' '.join(argv[1:])}. A field of the config "
            "is changed with --config.FIELD=VALUE."
        )
    if not flags.FLAGS["config"].present:
        raise ConfigError("--config=FILE is missing, such as configs/paper.py.")
    filename = config_flags.get_config_filename(flags.FLAGS["config"])
    if not Path(filename.partition(":")[0]).is_file():
        raise ConfigError(f"--config={filename}: there is no such file in {Path.cwd()}")
    workdir = _WORKDIR.value or ""
    if _MODE.value != "describe" and not workdir:
        raise ConfigError("--workdir=DIR is missing: the folder that keeps the run.")
    if _CPU_DEVICES.value:
        # Before jax starts; afterwards it has no effect.
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", _CPU_DEVICES.value)
    if _MODE.value != "describe":
        _keep_compiled_programs()
    if _MODE.value == "describe":
        print(describe(_CONFIG.value))
    elif _MODE.value == "eval":
        train.evaluate_workdir(_CONFIG.value, workdir)
    else:
        train.train_and_evaluate(_CONFIG.value, workdir)


def _keep_compiled_programs() -> None:
    """Keeps compiled programs in the user's cache folder, for the next start.

    Not if jax's own settings say where, or that nothing is to be kept. And not on the
    CPU: there are processors on which XLA refuses every stored program, its own
    included, each with a line that warns of illegal instructions (jax-ml/jax#38445,
    openxla/xla#44565, open with jax 0.10).
    """
    settings: Any = jax.config
    chosen = settings.jax_compilation_cache_dir
    enabled = settings.jax_enable_compilation_cache
    if chosen or not enabled or jax.default_backend() == "cpu":
        return
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(base) / "alexnet_jax" / "jax"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # no home to write to, as in some containers: a convenience less
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))


def _parse(argv: Sequence[str]) -> list[str]:
    """absl's flag parsing, with the mistakes of config flags in words too."""
    try:
        return flags.FLAGS(list(argv))
    except (AttributeError, KeyError) as error:
        # ml_collections puts one error's text, quotes and all, into another's.
        hint = re.sub(r"\\n|\s+", ". ", str(error.args[0]), count=1)
        hint = re.sub(r"[\\']", "", hint)
        raise ConfigError(f"the config has no such field: {hint}") from error
    except (flags.Error, OSError, TypeError, ValueError) as error:
        raise ConfigError(
            f"the command line: {' '.join(str(error).split())}"
        ) from error


def run() -> None:
    """The command: exit status 1 and one message for what the user can mend."""
    logging.set_verbosity(logging.WARNING)  # jax's and orbax's chatter
    # The files of configs/ import one another, wherever the command is started.
    sys.path.append(str(Path(__file__).parent.parent))
    try:
        app.run(main, flags_parser=_parse)
    except _USER_ERRORS as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    run()
