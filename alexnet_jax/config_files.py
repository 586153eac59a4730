"""Config and sweep files: Python that is run."""

import runpy
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from alexnet_jax import experiment
from alexnet_jax.fields import ConfigError, flat

# The default of every field; beside the package.
COMMON = Path(__file__).parent.parent / "configs" / "common.py"


def load_config(name: str) -> ConfigDict:
    """The config of a file such as "configs/quickstart.py", locked; else as `load`.

    Or of a workdir, "runs/quickstart/config.json".

    Raises:
      ConfigError: as `load`, and for anything else than a config.
    """
    if Path(name).name == experiment.CONFIG_FILE:
        return _load_stored(Path(name))
    config = load(name, "get_config")
    if not isinstance(config, ConfigDict):
        raise ConfigError(
            f"{name}: get_config() must return a ConfigDict; it returns "
            f"{type(config).__name__}."
        )
    return config.lock()


def _load_stored(path: Path) -> ConfigDict:
    """A workdir's config, of this version or an older one.

    Fields that it lacks have their default; those that there are no longer are left out.

    Raises:
      ConfigError: there is none, or it is damaged.
    """
    stored = experiment.read_config(path.parent)
    if stored is None:
        raise ConfigError(f"{path}: there is no such file.")
    config = load_config(str(COMMON))
    known = flat(config.to_dict())
    fields = {name: _as_tuples(v) for name, v in flat(stored).items() if name in known}
    config.update_from_flattened_dict(fields)
    return config


def _as_tuples(value: Any) -> Any:
    """Lists of JSON as the tuples that they were."""
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def load(name: str, function: str) -> Any:
    """What a function of a Python file returns; "FILE:TEXT" is function("TEXT").

    Raises:
      ConfigError: there is no such Python file, or it has no such function.
      Exception: whatever the file raises.
    """
    path, colon, argument = name.partition(":")
    if not Path(path).is_file():
        raise ConfigError(f"{path}: there is no such file in {Path.cwd()}.")
    if not path.endswith(".py"):
        raise ConfigError(f"{path} is no Python file, as configs/paper.py is.")
    found = runpy.run_path(path).get(function)
    if found is None:
        raise ConfigError(f"{path} could not be used: it defines no {function}().")
    return found(argument) if colon else found()
