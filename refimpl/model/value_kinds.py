"""What kind of value a key of a configuration file may hold.

JSON and GGUF give numbers, texts, truth values, lists and objects; a file that says "26" where 26
is meant, or 256.0, is refused by name before anything is computed from it.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# Above every size and every number that means something here.
_LARGEST_INTEGER = 2**31
_LARGEST_NUMBER = 1e30


@dataclass(frozen=True)
class Kind:
    """A kind of value.

    Attributes:
        name: for messages, such as "an integer".
        accepts: whether a value is of this kind.
    """

    name: str
    accepts: Callable[[Any], bool]


def _is_integer(value: Any) -> bool:
    # A bool is an int to Python, and no size to anybody.
    return type(value) is int and abs(value) < _LARGEST_INTEGER


def _is_number(value: Any) -> bool:
    # Infinity fails the comparison, and so does nan.
    return type(value) in (int, float) and abs(value) < _LARGEST_NUMBER


def _is_boolean(value: Any) -> bool:
    return type(value) is bool


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _are_ids(value: Any) -> bool:
    return all(_is_integer(item) for item in (value if isinstance(value, list) else [value]))


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(_is_number(item) for item in value)


def _are_cutoffs(value: Any) -> bool:
    return isinstance(value, list) and all(_is_number(i) or i == -math.inf for i in value)


def _are_booleans(value: Any) -> bool:
    return isinstance(value, list) and all(_is_boolean(item) for item in value)


def _is_pattern(value: Any) -> bool:
    return _is_integer(value) or _are_booleans(value)


def _is_object(value: Any) -> bool:
    return isinstance(value, Mapping)


INTEGER = Kind("an integer", _is_integer)
NUMBER = Kind("a finite number", _is_number)
BOOLEAN = Kind("true or false", _is_boolean)
TEXT = Kind("a text", _is_text)
TEXTS = Kind("a list of texts", _are_texts)
IDS = Kind("an id or a list of ids", _are_ids)
SIZES = Kind("an integer or a list of integers", _are_ids)
NUMBERS = Kind("a list of finite numbers", _are_numbers)
CUTOFFS = Kind("a list of numbers below infinity", _are_cutoffs)
BOOLEANS = Kind("a list of true and false", _are_booleans)
PATTERN = Kind("an integer or a list of true and false", _is_pattern)
OBJECT = Kind("an object", _is_object)


def kind_faults(values: Mapping[str, Any], kinds: Mapping[str, Kind]) -> list[str]:
    """One line for each value that is not of its key's kind; an absent one or None is no fault."""
    return [
        f"{key} must be {kind.name}, got {values[key]!r:.80}"
        for key, kind in kinds.items()
        if values.get(key) is not None and not kind.accepts(values[key])
    ]


def optional_float(value: int | float | None) -> float | None:
    """A number that a file may give as an integer, or leave out."""
    return None if value is None else float(value)
