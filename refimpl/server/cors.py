"""Which web pages may call the server from a browser (cross-origin resource sharing).

Off unless origins are set. Keys are sent in a header and never as cookies, so credentials are never
allowed.
"""

from collections.abc import Collection

from quart import Quart, Response, request

from refimpl.server.keys import is_preflight

ANY = "*"
# What a page may read, besides what every page may.
EXPOSED = (
    "x-request-id, openai-processing-ms, openai-version, retry-after, "
    "x-ratelimit-limit-requests, x-ratelimit-remaining-requests, x-ratelimit-reset-requests, "
    "x-ratelimit-limit-tokens, x-ratelimit-remaining-tokens, x-ratelimit-reset-tokens"
)
_SECONDS_TO_REMEMBER = 600


def install(app: Quart, origins: Collection[str]) -> None:
    """Let pages of these origins call the app, or of any if `ANY` is among them."""
    if not origins:
        return

    @app.after_request
    async def allow(response: Response) -> Response:  # pyright: ignore[reportUnusedFunction]
        # A cache must not give one origin the reply to another.
        response.headers.add("Vary", "Origin")
        origin = request.headers.get("Origin")
        if origin is None or not (ANY in origins or origin in origins):
            return response
        headers = {"Access-Control-Allow-Origin": ANY if ANY in origins else origin}
        if is_preflight():
            asked = request.headers.get("Access-Control-Request-Headers", "")
            headers |= {
                "Access-Control-Allow-Methods": "GET, POST",
                "Access-Control-Allow-Headers": asked or "authorization, content-type",
                "Access-Control-Max-Age": str(_SECONDS_TO_REMEMBER),
            }
        else:
            headers["Access-Control-Expose-Headers"] = EXPOSED
        response.headers.update(headers)
        return response
