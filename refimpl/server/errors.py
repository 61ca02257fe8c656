"""Errors as OpenAI's clients know them: a status, and an object that says what went wrong.

Owns the shape of every error reply, and which of them an exception becomes. A message says no more
than its reader may know: nothing of what the server is made of, and never much of the input.
"""

import json
import logging
from collections.abc import Mapping

from quart import Quart, Response, request
from werkzeug.exceptions import HTTPException

from refimpl.errors import EngineError, InvalidRequestError, TokenizerError
from refimpl.server.identity import request_id

MAX_MESSAGE = 1000
MAX_PARAM = 100

INVALID = "invalid_request_error"
SERVER = "server_error"

# Names under which the engine knows what a request calls otherwise.
_FIELDS = {"banned_token_ids": "bad_words", "prompt_ids": "prompt"}

_log = logging.getLogger(__name__)


class Problem(Exception):  # noqa: N818 - the word of RFC 9457
    """An error reply.

    Attributes:
        status: of HTTP.
        message: for a person; what was got, what was expected, what to do.
        type: the kind of error, in OpenAI's words.
        param: the field at fault, or None.
        code: for a program, or None.
        headers: to send with it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.type, self.code = status, type, code
        self.message = _bounded(message, MAX_MESSAGE)
        self.param = None if param is None else _bounded(param, MAX_PARAM)
        self.headers = dict(headers or {})

    def to_json(self) -> dict[str, dict[str, str | None]]:
        """The body of the reply, and the data of an error event."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}


def refusal(message: str, param: str | None, *, code: str | None = None) -> Problem:
    """What a request asks for cannot be done."""
    return Problem(400, message, param=param, code=code)


def model_not_found(name: str) -> Problem:
    """No model of this name is served."""
    return Problem(
        404,
        f"The model '{name:.200}' does not exist here. GET /v1/models lists the names it has.",
        param="model",
        code="model_not_found",
    )


def timed_out() -> Problem:
    """A request that had not ended at its deadline."""
    return Problem(
        504,
        "The request did not end within the server's time limit. Ask for fewer tokens or choices.",
        type="timeout",
    )


def engine_failed() -> Problem:
    """The engine broke down, or was stopped."""
    return Problem(
        500, "The server had an error while it processed the request. Try again.", type=SERVER
    )


def not_finite() -> Problem:
    """The model's numbers became infinite, or no numbers at all."""
    return Problem(
        500,
        "The model's numbers were not finite any more, so that no token could be chosen: its "
        "checkpoint is damaged, or needs other numerics.",
        type=SERVER,
    )


def problem_of(error: Exception) -> Problem:
    """The error reply for an exception; what nobody foresaw is logged and becomes a 500."""
    match error:
        case Problem():
            return error
        case InvalidRequestError():
            return refusal(str(error), _field(error.parameter))
        case TokenizerError():
            return refusal(str(error), "prompt")
        case HTTPException():
            return _problem_of_http(error)
        case EngineError():
            _log.error("request_id=%s the engine ended the request: %s", request_id(), error)
            return engine_failed()
    _log.error("request_id=%s an error that nobody foresaw", request_id(), exc_info=error)
    return engine_failed()


def json_response(
    value: object, status: int = 200, *, headers: Mapping[str, str] | None = None
) -> Response:
    """A reply of JSON."""
    return Response(dumps(value), status, dict(headers or {}), content_type="application/json")


def dumps(value: object) -> str:
    """JSON in ASCII, so that a reader that ends lines at U+2028 or U+0085, as some do, is safe."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def register(app: Quart) -> None:
    """Make every error of the app an error object."""

    async def reply(error: Exception) -> Response:
        problem = problem_of(error)
        return json_response(problem.to_json(), problem.status, headers=problem.headers)

    app.register_error_handler(Exception, reply)
    app.register_error_handler(HTTPException, reply)


def _problem_of_http(error: HTTPException) -> Problem:
    where = f"{request.method} {request.path:.200}"
    match error.code:
        case 404:
            return Problem(404, f"Invalid URL ({where})")
        case 405:
            return _wrong_method(error)
        case 408:
            return Problem(408, "The body did not arrive in time. Send it again.", type="timeout")
        case 413:
            message = "The body is too large. Send fewer or shorter prompts in one request."
            return Problem(413, message, code="request_too_large")
        case code if code is not None and 400 <= code < 500:
            return Problem(code, f"{error.name} ({where})")
    return engine_failed()


def _wrong_method(error: HTTPException) -> Problem:
    allowed = sorted(getattr(error, "valid_methods", None) or ())
    if set(allowed) <= {"OPTIONS", "POST"}:
        message = "Only POST requests are accepted."
    else:
        message = (
            f"Not allowed to {request.method} on {request.path:.200} "
            "(HINT: Perhaps you meant to use a different HTTP method?)"
        )
    headers = {"Allow": ", ".join(allowed)}
    return Problem(405, message, code="method_not_supported", headers=headers)


def _field(parameter: str | None) -> str | None:
    return None if parameter is None else _FIELDS.get(parameter, parameter)


def _bounded(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."
