"""Who may use the server: bearer keys, of which only SHA-256 is kept.

Keys come from a TOML file, which has their hashes alone,

    [[keys]]
    name = "alice"
    sha256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
    requests_per_minute = 60      # this and the next two may be left out: no limit
    tokens_per_minute = 100000
    concurrency = 4

or from a variable, which has the keys themselves with commas between. `new_key` makes one.

Without any keys everybody is let in, whatever they say. With keys, everything is guarded but for
the paths in `OPEN`; a check of health must not need a secret.
"""

import hashlib
import hmac
import secrets
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from quart import Quart, Response, g, request

from refimpl.errors import InvalidRequestError
from refimpl.server.errors import Problem
from refimpl.server.rates import Allowance, Budget
from refimpl.server.trail import current_trail

OPEN = frozenset({"/health", "/ready"})
SCHEME = "bearer"

_Limit = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, eq=False)
class Key:
    """Somebody who is let in.

    Attributes:
        name: for logs.
        digest: SHA-256 of the key.
        budget: what is left of what it may use.
    """

    name: str
    digest: bytes
    budget: Budget


class Keyring:
    """All keys."""

    def __init__(self, keys: Sequence[Key] = ()) -> None:
        """With no keys, everybody is let in."""
        self.keys = tuple(keys)

    def __bool__(self) -> bool:
        return bool(self.keys)

    def find(self, authorization: str | None) -> Key | None:
        """Whose key a request carries; None where there are no keys.

        Args:
            authorization: the header of that name.

        Raises:
            Problem: 401, for a key that is missing or wrong.
        """
        if not self.keys:
            return None
        scheme, _, token = (authorization or "").strip().partition(" ")
        token = token.strip()
        if scheme.lower() != SCHEME or not token:
            raise _unauthorized(
                "You didn't provide an API key. Send one in the header Authorization: Bearer KEY."
            )
        # Headers are bytes that were read as Latin-1; a key's hash is that of the bytes.
        digest = hashlib.sha256(token.encode("latin-1", "replace")).digest()
        found = None
        # All are compared, each in constant time, so that time tells nothing.
        for key in self.keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        if found is None:
            raise _unauthorized("Incorrect API key provided.", code="invalid_api_key")
        return found


def install(app: Quart, keyring: Keyring) -> None:
    """Guard every route of the app, unknown ones too; `g.key` is the key of a request."""

    @app.before_request
    async def guard() -> Response | None:  # pyright: ignore[reportUnusedFunction]
        g.key = None
        if request.path.rstrip("/") in OPEN:
            return None
        if is_preflight():
            # It cannot carry a key. What it is told, if anything, is up to `cors`.
            return Response(status=204)
        g.key = keyring.find(request.headers.get("Authorization"))
        if g.key is not None:
            current_trail().key = g.key.name
        return None

    @app.after_request
    async def say_what_is_left(  # pyright: ignore[reportUnusedFunction]
        response: Response,
    ) -> Response:
        key: Key | None = g.get("key")
        if key is not None:
            for name, value in key.budget.headers().items():
                response.headers.setdefault(name, value)
        return response


def is_preflight() -> bool:
    """Whether the request is a browser's question if it may send another one."""
    return (
        request.method == "OPTIONS"
        and "Origin" in request.headers
        and "Access-Control-Request-Method" in request.headers
    )


def new_key() -> str:
    """A key that nobody can guess."""
    return "sk-" + secrets.token_urlsafe(32)


def digest_of(key: str) -> str:
    """What the file has of a key: SHA-256 of its UTF-8, in hexadecimal."""
    return hashlib.sha256(key.encode()).hexdigest()


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(min_length=1, max_length=64, pattern=r"^[\w.@+-]+$")
    sha256: str = Field(pattern=r"^[0-9a-fA-F]{64}$")
    requests_per_minute: _Limit | None = None
    tokens_per_minute: _Limit | None = None
    concurrency: _Limit | None = None


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    keys: list[_Entry] = Field(min_length=1)


def read_keys(path: Path | None = None, *, plain: str = "") -> Keyring:
    """The keys of a file and of a variable together.

    Args:
        path: of the file.
        plain: keys themselves, with commas between; they get the names key-1, key-2 and so on.

    Raises:
        InvalidRequestError: the file cannot be read, or is not as it should be, or two keys are
            the same or have one name. No message holds a key.
    """
    keys = [] if path is None else _from_file(path)
    texts = [text.strip() for text in plain.split(",") if text.strip()]
    keys += [
        Key(f"key-{number}", bytes.fromhex(digest_of(text)), Budget(Allowance()))
        for number, text in enumerate(texts, start=1)
    ]
    for what, values in (
        ("name", [key.name for key in keys]),
        ("sha256", [key.digest.hex() for key in keys]),
    ):
        double = next((value for value in values if values.count(value) > 1), None)
        if double is not None:
            raise InvalidRequestError(
                f"two API keys have the {what} {double}: give each its own", parameter="api_keys"
            )
    return Keyring(keys)


def _from_file(path: Path) -> list[Key]:
    try:
        entries = _File.model_validate(tomllib.loads(path.read_text(encoding="utf-8"))).keys
    except OSError as error:
        raise InvalidRequestError(
            f"cannot read the API keys in {path}: {error.strerror or error}", parameter="api_keys"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"{path} is not TOML: {error}", parameter="api_keys") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        # Without the value, and without its cause: either may be a key.
        raise InvalidRequestError(
            f"{path}: {place}: {first['msg'][:1].lower()}{first['msg'][1:]}", parameter="api_keys"
        ) from None
    return [
        Key(
            entry.name,
            bytes.fromhex(entry.sha256),
            Budget(
                Allowance(
                    requests_per_minute=entry.requests_per_minute,
                    tokens_per_minute=entry.tokens_per_minute,
                    concurrency=entry.concurrency,
                )
            ),
        )
        for entry in entries
    ]


def _unauthorized(message: str, *, code: str | None = None) -> Problem:
    return Problem(401, message, code=code, headers={"WWW-Authenticate": "Bearer"})
