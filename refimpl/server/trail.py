"""What one HTTP request came to: written down as it goes, for the access log."""

import time
from dataclasses import dataclass, field

from quart import request

# Where a request's trail is, in the scope that ASGI passes along.
_SCOPE_KEY = "refimpl.trail"
# In the log: the client has left before it had its reply.
CLIENT_LEFT = 499


@dataclass(kw_only=True)
class Trail:
    """What is known of a request. Times are in seconds of `time.monotonic`.

    Attributes:
        method: of HTTP.
        path: of the URL, without the query.
        began: when it came.
        status: of the reply; None if there was none.
        stream_error: status that the reply would have had, of an error that ended a stream instead.
        request_id: as the reply has it.
        key: name of the API key.
        user: as the client says.
        prompt_tokens: of all prompts; None for what is no completion.
        completion_tokens: generated so far.
        first_token: when the first token came.
        ended: when the last byte was sent, or the client left.
    """

    method: str
    path: str
    began: float = field(default_factory=time.monotonic)
    status: int | None = None
    stream_error: int | None = None
    request_id: str | None = None
    key: str | None = None
    user: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int = 0
    first_token: float | None = None
    ended: float | None = None

    @property
    def outcome(self) -> int | None:
        """The status that says how it ended, be it that of the reply or of what broke it off."""
        return self.status if self.stream_error is None else self.stream_error


def begin_trail(scope: dict[str, object]) -> Trail:
    """A trail for a request that has just come."""
    trail = Trail(method=str(scope["method"]), path=str(scope["path"]))
    scope[_SCOPE_KEY] = trail
    return trail


def current_trail() -> Trail:
    """The trail of the request under way; one that nobody reads if there is no access log."""
    scope: dict[str, object] = request.scope  # pyright: ignore[reportAssignmentType]
    trail = scope.get(_SCOPE_KEY)
    return trail if isinstance(trail, Trail) else begin_trail(scope)
