"""The key-value pairs of a GGUF header.

Owns the types of values and their decoding. Knows no key by name. A pair is a key, the number of a
type, and the value; the value of an array is the number of its items' type, their count, and the
items.
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFValueType

from refimpl_weights.errors import FormatError, UnsupportedError
from refimpl_weights.gguf_cursor import CURE, LENGTH, Cursor

# How `struct` spells each scalar. A bool is read as the byte it is, so that a 2 can be refused.
_CODES: Mapping[int, str] = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "B",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}


@dataclass(frozen=True)
class UndecodedList:
    """Where the items of a list lie in the header."""

    item_type: int
    count: int
    start: int


class Metadata(Mapping[str, Any]):
    """Numbers, strings, bools, and lists of them.

    A list is decoded when it is first asked for, and then kept: few readers of a header want the
    vocabulary. A float32 comes as the Python float of the same value, so that 1e-6 reads
    9.999999974752427e-07.
    """

    def __init__(self, path: Path, header: bytes, values: dict[str, Any]) -> None:
        """Take the header's bytes and the values that `read_pairs` found in them."""
        self._path = path
        self._header = header
        self._values = values

    def __getitem__(self, key: str) -> Any:
        """The value of `key`.

        Raises:
            KeyError: the header has no such key.
            FormatError: the value is a list with a broken string or bool in it.
        """
        value = self._values[key]
        if isinstance(value, UndecodedList):
            what = f"{self._path}: metadata {key!r}"
            if value.item_type == GGUFValueType.STRING:
                value = _decode_strings(value, self._header, what=what)
            else:
                value = _decode_scalars(value, self._header, what=what)
            self._values[key] = value
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def read_pairs(cursor: Cursor, count: int) -> dict[str, Any]:
    """The pairs at the cursor, lists as `UndecodedList`.

    Raises:
        FormatError: a value is broken or does not fit the file, or a key comes twice.
        UnsupportedError: a value is of a type that GGUF does not define, or a list of lists.
    """
    values: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.string(what="a metadata key")
        if key in values:
            raise cursor.damage(f"metadata key {key!r:.99} comes twice")
        values[key] = _read_value(cursor, what=f"metadata {key!r:.99}")
    return values


def _read_value(cursor: Cursor, *, what: str) -> Any:
    value_type = cursor.integer("I", what=f"the type of {what}")
    if value_type == GGUFValueType.ARRAY:
        return _read_list(cursor, what=what)
    if value_type == GGUFValueType.STRING:
        return cursor.string(what=what)
    code = _code(cursor, value_type, what=what)
    if value_type == GGUFValueType.BOOL:
        return _boolean(cursor.integer(code, what=what), what=f"{cursor.path}: {what}")
    return cursor.number(code, what=what)


def _read_list(cursor: Cursor, *, what: str) -> UndecodedList:
    item_type = cursor.integer("I", what=f"the item type of {what}")
    count = cursor.integer("Q", what=f"the number of items of {what}")
    start = cursor.position
    if item_type == GGUFValueType.STRING:
        cursor.skip_strings(count, what=what)
    else:
        cursor.skip(count * struct.calcsize(f"<{_code(cursor, item_type, what=what)}"), what=what)
    return UndecodedList(item_type, count, start)


def _code(cursor: Cursor, value_type: int, *, what: str) -> str:
    if value_type not in _CODES:
        kind = "a list of lists" if value_type == GGUFValueType.ARRAY else f"type {value_type}"
        raise UnsupportedError(
            f"{cursor.path}: {what} is {kind}, expected numbers, strings or bools, or a list of "
            "one of these; the file is corrupt or newer than this reader"
        )
    return _CODES[value_type]


def _decode_scalars(listed: UndecodedList, header: bytes, *, what: str) -> list[Any]:
    code = _CODES[listed.item_type]
    numbers = struct.unpack_from(f"<{listed.count}{code}", header, listed.start)
    if listed.item_type == GGUFValueType.BOOL:
        return [_boolean(number, what=what) for number in numbers]
    return list(numbers)


def _decode_strings(listed: UndecodedList, header: bytes, *, what: str) -> list[str]:
    texts, begin, end = [], 0, listed.start
    try:
        for _ in range(listed.count):
            begin = end + LENGTH.size
            end = begin + LENGTH.unpack_from(header, end)[0]
            texts.append(header[begin:end].decode())
    except UnicodeDecodeError as error:
        item, data = f"{what}[{len(texts)}]", header[begin:end]
        raise FormatError(f"{item} is {data[:40]!r}, expected UTF-8; {CURE}") from error
    return texts


def _boolean(byte: int, *, what: str) -> bool:
    if byte not in (0, 1):
        raise FormatError(f"{what} is a bool with value {byte}, expected 0 or 1; {CURE}")
    return byte == 1
