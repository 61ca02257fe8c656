"""Sizes of memory as people write them."""

import re

from refimpl.errors import InvalidRequestError

_UNITS = {
    "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40,
}  # fmt: skip
_BY_SMALL_LETTERS = {name.lower(): size for name, size in _UNITS.items()}


def parse_size(text: str, *, option: str, least: int = 1) -> int:
    """Bytes of a size with its unit, rounded down.

    >>> parse_size("80GB", option="memory"), parse_size("1.5 KiB", option="memory")
    (80000000000, 1536)

    Args:
        option: whose value it is.
        least: that it must be.

    Raises:
        InvalidRequestError: no number, no unit, or too little.
    """
    found = re.fullmatch(r"\s*([0-9]{1,15})(?:\.([0-9]{1,15}))?\s*([a-z]+)\s*", text.lower())
    unit = None if found is None else _BY_SMALL_LETTERS.get(found[3])
    if found is None or unit is None:
        raise InvalidRequestError(
            f"--{option} takes a number and a unit ({', '.join(_UNITS)}), as in 80GB or 512MiB; "
            f"got {text!r:.100}",
            parameter=option,
        )
    digits = found[2] or ""
    size = int(found[1] + digits) * unit // 10 ** len(digits)
    if size < least:
        raise InvalidRequestError(
            f"--{option} must be at least {least} B, got {text!r}", parameter=option
        )
    return size


def show_size(size: int) -> str:
    """Bytes with three digits or more, in the largest unit of which there is one.

    >>> show_size(61_394_690_680), show_size(999), show_size(-1_234_567)
    ('61.4 GB', '999 B', '-1.23 MB')
    """
    sign, size = ("-" if size < 0 else ""), abs(size)
    for name in ("TB", "GB", "MB", "kB"):
        value = size / _UNITS[name]
        if value >= 1:
            digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
            return f"{sign}{value:,.{digits}f} {name}"
    return f"{sign}{size} B"
