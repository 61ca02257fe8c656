"""One line for each HTTP request, to standard error: what it was and how it ended.

Never in it: prompts, completions, keys. `status` 499 means that the client left before it had its
reply.
"""

import json
import logging
import re
import sys
import time
from collections.abc import Awaitable, Callable, MutableMapping
from datetime import UTC, datetime
from typing import Any, Literal

from refimpl.server.trail import CLIENT_LEFT, Trail, begin_trail
from refimpl.server.upgrades import refuse_websocket

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

LOGGER = "refimpl.server"
_FIELDS = "refimpl_fields"
# What can stand in a line of text without quotes: nothing that ends a word or a line.
_PLAIN = re.compile(r"[!#-<>-~]+")
_LONGEST_PATH = 200

_log = logging.getLogger(__name__)


class AccessLog:
    """Around an ASGI application: follows each request, to its last byte, and logs it."""

    def __init__(self, app: Application, *, ended: Callable[[Trail], None]) -> None:
        """Around `app`.

        Args:
            app: what answers.
            ended: called with the trail of each request, once it is complete.
        """
        self._app, self._ended = app, ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or whatever else a server asks of an application."""
        if scope["type"] == "websocket":
            await refuse_websocket(receive, send)
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # Quart's request has the same object as its `scope`.
        trail = begin_trail(scope)  # pyright: ignore[reportArgumentType]
        is_whole = False

        async def followed_receive() -> Message:
            message = await receive()
            # Where a connection serves one request, it is closed while the last bytes are sent.
            if message["type"] == "http.disconnect" and trail.ended is None and not is_whole:
                trail.status = CLIENT_LEFT
                trail.ended = time.monotonic()
            return message

        async def followed_send(message: Message) -> None:
            nonlocal is_whole
            is_whole = _is_last(message)
            await send(message)
            if trail.ended is None:
                _follow(trail, message)

        try:
            await self._app(scope, followed_receive, followed_send)
        finally:
            if trail.ended is None:
                # The server is stopping, or the application broke down in the middle.
                trail.ended = time.monotonic()
            self._ended(trail)
            _log.info("", extra={_FIELDS: fields_of(trail)})


def fields_of(trail: Trail) -> dict[str, object]:
    """What the line says, in order; what is not known is left out. Times are in seconds."""

    def since_began(moment: float | None) -> float | None:
        return None if moment is None else round(moment - trail.began, 6)

    fields: dict[str, object] = {
        "status": trail.status,
        "stream_error": trail.stream_error,
        "method": trail.method,
        "path": trail.path[:_LONGEST_PATH],
        "request_id": trail.request_id,
        "key": trail.key,
        "user": trail.user,
        "prompt_tokens": trail.prompt_tokens,
        "completion_tokens": None if trail.prompt_tokens is None else trail.completion_tokens,
        "first_token_seconds": since_began(trail.first_token),
        "total_seconds": since_began(trail.ended),
    }
    return {name: value for name, value in fields.items() if value is not None}


def configure(log_format: Literal["text", "json"]) -> None:
    """Send what the server logs to standard error, spelt so."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logger = logging.getLogger(LOGGER)
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO)


class TextFormatter(logging.Formatter):
    """A time, then words; what might hold spaces or the end of a line is quoted."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, and a traceback after it if there is one."""
        fields: dict[str, object] = getattr(record, _FIELDS, {})
        words = [_moment(record)]
        if not fields:
            words += [record.levelname.lower(), record.getMessage()]
        words += [f"{name}={_word(value)}" for name, value in fields.items()]
        if record.exc_info:
            words.append("\n" + self.formatException(record.exc_info))
        return " ".join(words)


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        line: dict[str, object] = {"time": _moment(record), "level": record.levelname.lower()}
        if message := record.getMessage():
            line["message"] = message
        line |= getattr(record, _FIELDS, {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _moment(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _word(value: object) -> str:
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


def _follow(trail: Trail, message: Message) -> None:
    if message["type"] == "http.response.start":
        trail.status = message["status"]
        ids = [value for name, value in message["headers"] if name.lower() == b"x-request-id"]
        trail.request_id = ids[0].decode("latin-1") if ids else None
    elif _is_last(message):
        trail.ended = time.monotonic()


def _is_last(message: Message) -> bool:
    return message["type"] == "http.response.body" and not message.get("more_body", False)
