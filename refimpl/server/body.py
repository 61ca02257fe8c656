"""The body of a request as JSON, read strictly.

Owns what is no JSON to us though Python's reader takes it: keys that come twice, NaN and
infinities, numbers too large, nesting too deep, lone surrogates.
"""

import json
import re
from typing import Any

from quart import Request

from refimpl.server.errors import Problem, refusal

# Strings as wholes, ended or not, so that brackets within them do not count. The loop gives nothing
# back, which keeps the time linear.
_STRUCTURE = re.compile(r'"(?:[^"\\]|\\.)*+"?|[\[\]{}]', re.DOTALL)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_MOST_DIGITS = 400


async def read_json(request: Request, *, max_depth: int) -> Any:
    """The body's value.

    Args:
        request: its body is read whole; Quart holds it to the limits of size and time.
        max_depth: deepest nesting of arrays and objects.

    Raises:
        Problem: 400, it is no JSON or not sent as such.
        HTTPException: 408 or 413, too slow or too large.
    """
    if request.mimetype != "application/json":
        got = f"'{request.mimetype:.100}'" if request.mimetype else "none"
        # 400 and not 415, as OpenAI and vLLM do.
        raise refusal(f"the Content-Type must be application/json, got {got}", None)
    data = await request.get_data()
    assert isinstance(data, bytes), "text was not asked for"
    return parse_json(data, max_depth=max_depth)


def parse_json(data: bytes, *, max_depth: int) -> Any:
    """The value of a JSON text.

    Raises:
        Problem: 400.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _malformed(f"it is not UTF-8 at byte {error.start}") from None
    _check_depth(text, max_depth)
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_constant,
            parse_float=_float,
            parse_int=_integer,
        )
    except json.JSONDecodeError as error:
        raise _malformed(f"{error.msg} at line {error.lineno}, column {error.colno}") from None
    if _SURROGATE.search(text):
        _check_surrogates(value)
    return value


def _malformed(why: str) -> Problem:
    return refusal(f"We could not parse the JSON body of your request: {why}.", None)


def _check_depth(text: str, most: int) -> None:
    depth = 0
    for match in _STRUCTURE.finditer(text):
        if match[0] in "[{":
            depth += 1
            if depth > most:
                raise _malformed(f"it is nested more than {most} deep")
        elif match[0] in "]}":
            depth -= 1


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen = set[str]()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise _malformed(f"the key {twice!a:.100} comes twice in one object")
    return value


def _constant(name: str) -> Any:
    raise _malformed(f"{name} is no number of JSON")


def _float(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise _malformed(f"the number {digits:.40} is too large")
    return value


def _integer(digits: str) -> int:
    # Python refuses to read thousands of digits, and takes long over hundreds of them.
    if len(digits) > _MOST_DIGITS:
        raise _malformed(f"a number has {len(digits)} digits")
    return int(digits)


def _check_surrogates(value: Any) -> None:
    """Half a character, which `\\ud83d` alone is, has no UTF-8 form and so no tokens."""
    for name, part in value.items() if isinstance(value, dict) else [(None, value)]:
        try:
            json.dumps([name, part], ensure_ascii=False).encode()
        except UnicodeEncodeError:
            field = None if name is None else ascii(name).strip("'")
            raise refusal(
                "a string has a lone surrogate in it, which is no character; send the whole pair, "
                "or the character itself",
                field,
            ) from None
