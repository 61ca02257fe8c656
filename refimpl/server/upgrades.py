"""What asks for a WebSocket is refused: there are none here, and Quart would call it our error."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from refimpl.server.errors import dumps, refusal

Message = MutableMapping[str, Any]


async def refuse_websocket(
    receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
) -> None:
    """Answer a handshake with an error object, as ASGI lets a server do that Hypercorn is."""
    await receive()
    problem = refusal("There are no WebSockets here: send the request without 'Upgrade'.", None)
    body = dumps(problem.to_json()).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    await send(
        {
            "type": "websocket.http.response.start",
            "status": problem.status,
            "headers": headers,
        }
    )
    await send({"type": "websocket.http.response.body", "body": body})
