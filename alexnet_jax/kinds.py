"""Of what kind a setting's value must be: looked at before anything is made of it.

Settings come from config files, from command lines and from files that others have
written. A value of another kind would be found deep inside, or not at all.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kind:
    """What values there are: in words, and whether a value is one."""

    words: str
    holds: Callable[[Any], bool]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or isinstance(value, float)


def _all(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and all(map(holds, value))


def _is_layer_factor(value: Any) -> bool:
    whole = isinstance(value, list | tuple) and len(value) == 3
    return whole and isinstance(value[0], str) and all(map(_is_number, value[1:]))


WHOLE = Kind("a whole number", _is_whole)
NUMBER = Kind("a number", _is_number)
SWITCH = Kind("True or False", lambda value: isinstance(value, bool))
# No path and no name of a system's can hold a NUL.
TEXT = Kind(
    "text without NUL", lambda value: isinstance(value, str) and "\0" not in value
)
NUMBERS = Kind("numbers in a tuple", _all(_is_number))
NAMES = Kind("names in a tuple", _all(TEXT.holds))
LAYER_FACTORS = Kind(
    "(layer, epoch, factor) tuples in a tuple",
    _all(_is_layer_factor),
)


def shown(value: Any) -> str:
    """A value in a message: as it is written, but never pages of it."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # of thousands of digits, or nested so deep
        return f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def problems(values: Mapping[str, Any], kinds: Mapping[str, Kind]) -> dict[str, str]:
    """Name -> what is wrong with its value, such as "'x' must be a number"."""
    return {
        name: f"{shown(value)} must be {kinds[name].words}"
        for name, value in values.items()
        if name in kinds and not kinds[name].holds(value)
    }
