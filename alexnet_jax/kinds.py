"""Type checks for config values."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kind:
    """A type of values: in words, and whether a value is of it."""

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
TEXT = Kind("text", lambda value: isinstance(value, str))
NUMBERS = Kind("numbers in a tuple", _all(_is_number))
NAMES = Kind("names in a tuple", _all(TEXT.holds))
LAYER_FACTORS = Kind(
    "(layer, epoch, factor) tuples in a tuple",
    _all(_is_layer_factor),
)


def shown(value: Any) -> str:
    """Return a value as it is written, shortened for a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def problems(values: Mapping[str, Any], kinds: Mapping[str, Kind]) -> dict[str, str]:
    """Name -> what is wrong with its value, such as "'x' must be a number"."""
    return {
        name: f"{shown(value)} must be {kinds[name].words}"
        for name, value in values.items()
        if name in kinds and not kinds[name].holds(value)
    }
