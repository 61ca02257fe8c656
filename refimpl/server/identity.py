"""Which request this is: its id, for the client and for the log, and the headers of every reply.

A client may choose the id, if it is one that can do no harm in a header or a log.
"""

import re
import secrets
import time
from contextvars import ContextVar

from quart import Quart, Response, g, request

_HARMLESS = re.compile(r"[A-Za-z0-9_.:/+=@-]{1,128}")
# The date that OpenAI's own server gives as the version of its interface.
_VERSION = "2020-10-01"
# Streams are made after the request's context has ended, but in the same task.
_current: ContextVar[str] = ContextVar("request_id", default="")


def request_id() -> str:
    """The id of the request that this task answers; empty if there is none."""
    return _current.get()


def install(app: Quart) -> None:
    """Give every request an id, and every reply the headers that OpenAI's have."""

    @app.before_request
    async def begin() -> None:  # pyright: ignore[reportUnusedFunction]
        g.began = time.monotonic()
        wanted = request.headers.get("X-Request-Id", "")
        _current.set(wanted if _HARMLESS.fullmatch(wanted) else f"req_{secrets.token_hex(16)}")

    @app.after_request
    async def label(response: Response) -> Response:  # pyright: ignore[reportUnusedFunction]
        elapsed = time.monotonic() - g.began
        response.headers["x-request-id"] = request_id()
        # Of a stream, until its first token.
        response.headers["openai-processing-ms"] = str(round(elapsed * 1000))
        response.headers["openai-version"] = _VERSION
        response.headers.setdefault("access-control-expose-headers", "X-Request-ID")
        return response
