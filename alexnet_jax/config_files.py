"""Config and sweep files: Python that is run, and so can fail in any way.

Whatever one raises is said in a sentence. What goes wrong in this package's own code is
no mistake of a file's, and keeps its traceback.
"""

import contextlib
import os
import runpy
import sys
import sysconfig
import traceback
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict
from ml_collections.config_dict import RequiredValueError

from alexnet_jax import experiment, stopping
from alexnet_jax.fields import COPY, ConfigError, flat

# The default of every field; beside the package.
COMMON = Path(__file__).parent.parent / "configs" / "common.py"
_PACKAGE = str(Path(__file__).parent)
_LIBRARIES = tuple(
    sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")
)
_MOST_CHARACTERS = 500


def load_config(name: str) -> ConfigDict:
    """The config of a file such as "configs/quickstart.py", locked; else as `load`.

    Or of a workdir, "runs/quickstart/config.json".

    Raises:
      ConfigError: as `load`, and for anything else than a config.
    """
    if Path(name).name == experiment.CONFIG_FILE:
        return _load_stored(Path(name))
    config = load(name, "get_config")
    if not isinstance(config, ConfigDict) or isinstance(config, FrozenConfigDict):
        raise ConfigError(
            f"{name}: get_config() must return a ConfigDict; it returns "
            f"{type(config).__name__}."
        )
    try:
        flat(config.lock().to_dict())
    except RequiredValueError as error:  # nothing could be set before it is locked
        raise ConfigError(
            f"{name}: a field is a required placeholder; give it a value in the file."
        ) from error
    except Exception as error:  # of what fields refer to, or hold: others, themselves
        raise ConfigError(
            f"{name}: its fields cannot be read ({_words(error)})."
        ) from error
    return config


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
    try:
        config.update_from_flattened_dict(fields)
    except TypeError as error:  # of an override
        raise ConfigError(f"{path} is damaged: {_words(error)}. {COPY}") from error
    return config


def _as_tuples(value: Any) -> Any:
    """Lists of JSON as the tuples that they were."""
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def load(name: str, function: str) -> Any:
    """What a function of a Python file returns; "FILE:TEXT" is function("TEXT").

    Raises:
      ConfigError: there is no such Python file, it has no such function, or it has
        raised something: of what kind, with what words, in which line of which file.
      Exception: what this package's own code has raised, other than a ValueError:
        that is how it answers a wrong argument.
      Interrupted: the command was asked to stop.
    """
    path, colon, argument = name.partition(":")
    if not os.path.exists(path):
        raise ConfigError(f"{path}: there is no such file in {Path.cwd()}.")
    if not path.endswith(".py"):  # a run's config.json, say
        raise ConfigError(f"{path} is no Python file, as configs/paper.py is.")
    try:
        names = runpy.run_path(path)
        found = names.get(function)
        if callable(found):
            with _as_module(names):
                return found(argument) if colon else found()
    except stopping.Interrupted:
        raise
    except BaseException as error:
        if _is_ours(error):
            raise
        raise ConfigError(_sentence(path, error)) from error
    raise ConfigError(f"{path} could not be used: it defines no {function}().")


@contextlib.contextmanager
def _as_module(names: Mapping[str, Any]) -> Iterator[None]:
    """What a file has defined can be looked up, as classes that it makes then do."""
    module = types.ModuleType(names["__name__"])
    vars(module).update(names)
    sys.modules[module.__name__] = module
    try:
        yield
    finally:
        sys.modules.pop(module.__name__, None)


def shortened(text: str) -> str:
    """A text, but for the rest of a very long one."""
    if len(text) <= _MOST_CHARACTERS:
        return text
    return f"{text[: _MOST_CHARACTERS - 3]}..."


def _sentence(path: str, error: BaseException) -> str:
    """What a file has raised, and where."""
    words = _words(error)
    place = _place(error)
    if place:
        words += f"; {place[0]}, line {place[1]}"
    hint = ""
    if isinstance(error, SystemExit | KeyboardInterrupt):
        hint = " Such a file must not end the command."
    return f"{path} could not be read ({words}).{hint}"


def _words(error: BaseException) -> str:
    """Of what kind it is and what it says, in one line."""
    if isinstance(error, SyntaxError):  # of which Python would show the code as well
        words = f"{type(error).__name__}: {error.msg}"
    else:
        # Whatever its own class's __str__ may do.
        words = "".join(traceback.format_exception_only(error))
    return shortened(" ".join(words.removeprefix("<run_path>.").split()))


def _place(error: BaseException) -> tuple[str, int | None] | None:
    """The last line that was run of a file that is neither ours nor a library's."""
    if isinstance(error, SyntaxError) and os.path.isfile(error.filename or ""):
        return str(error.filename), error.lineno
    places = [place for place in _places(error) if not _is_in(place[0], _PACKAGE)]
    return places[-1] if places else None


def _is_ours(error: BaseException) -> bool:
    """Whether code of this package, not of the file, has raised it in error."""
    places = _places(error)
    ours = bool(places) and _is_in(places[-1][0], _PACKAGE)
    return ours and not isinstance(error, ValueError)


def _places(error: BaseException) -> list[tuple[str, int]]:
    """(file, line) of the calls that led to an error, from `load` on; no libraries."""
    frames = list(traceback.walk_tb(error.__traceback__))[1:]
    places = [(frame.f_code.co_filename, line) for frame, line in frames]
    return [
        (file, line)
        for file, line in places
        if _is_in(file, _PACKAGE) or not _is_in(file, "<", *_LIBRARIES)
    ]


def _is_in(file: str, *folders: str) -> bool:
    """Whether code lies in one of them; "<": in no file."""
    return file.startswith(tuple(f if f == "<" else f + os.sep for f in folders))
