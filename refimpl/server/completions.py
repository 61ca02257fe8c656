"""`POST /v1/completions`.

Owns the order of things: read, check, be let in, tokenise, compute, reply.
"""

import contextlib
import time

from quart import Response, g, request

from refimpl.errors import EngineError
from refimpl.server import stream
from refimpl.server.body import read_json
from refimpl.server.choices import Piece, joined
from refimpl.server.contract import CompletionRequest, parse_request
from refimpl.server.errors import Problem, json_response, model_not_found, problem_of
from refimpl.server.jobs import Job
from refimpl.server.lifecycle import Service
from refimpl.server.prompts import Prompt, read_prompts
from refimpl.server.reply import Head, completion_id

IGNORED = "x-refimpl-ignored-fields"
WARNING = "x-refimpl-warning"


async def complete(service: Service) -> Response:
    """Answer the request under way, at once or as a stream.

    Raises:
        Problem, InvalidRequestError, EngineError, HTTPException: see `errors`.
    """
    settings = service.settings
    body = await read_json(request, max_depth=settings.max_json_depth)
    asked, ignored = parse_request(_with_model(body, service), settings)
    if asked.model not in service.names:
        raise model_not_found(asked.model)
    with contextlib.ExitStack() as held:
        ticket = held.enter_context(service.admit(g.get("key")))
        ticket.hold(asked.num_prompts * asked.num_candidates)
        engine = service.engine
        _check_total(asked, context=engine.context, most=settings.max_tokens_total)
        prompts = await read_prompts(asked, engine)
        head = Head(
            id=completion_id(asked.request_id),
            created=int(time.time()),
            model=asked.model,
            fingerprint=service.fingerprint,
        )
        job = Job(asked, prompts, engine=engine, settings=settings, head=head, ticket=ticket)
        ticket.start(
            prompt_tokens=job.prompt_tokens,
            n=asked.n,
            max_tokens=asked.max_tokens,
            user=asked.user or None,
        )
        headers = _notes(prompts, ignored)
        try:
            if asked.stream:
                return await _streamed(job, held.pop_all(), service=service, headers=headers)
            return json_response(await _whole(job), headers=headers)
        except EngineError as error:
            raise _problem_of(service, error) from error
    raise AssertionError("a block that holds a ticket swallows nothing")


def _with_model(body: object, service: Service) -> object:
    """The body with the name of the only model, if it has none and need not."""
    if (
        service.settings.require_model
        or not isinstance(body, dict)
        or body.get("model") is not None
    ):
        return body
    return {**body, "model": service.names[0]}


async def _whole(job: Job) -> object:
    choices = dict[int, list[Piece]]()
    for piece in await job.whole():
        choices.setdefault(piece.index, []).append(piece)
    reply = job.head.reply(joined(choices[index]) for index in sorted(choices))
    reply["usage"] = job.usage()
    return reply


async def _streamed(
    job: Job, held: contextlib.ExitStack, *, service: Service, headers: dict[str, str]
) -> Response:
    frames = await stream.begin(job, held, problem_of=lambda error: _problem_of(service, error))
    response = Response(
        frames, headers={**headers, **stream.HEADERS}, content_type=stream.CONTENT_TYPE
    )
    # Quart would cut it off without a word after a minute; the deadline is the engine's.
    response.timeout = None
    return response


def _problem_of(service: Service, error: Exception) -> Problem:
    """What to tell of an error, which closing the engine is not."""
    if isinstance(error, EngineError) and service.state == "draining":
        return service.unavailable("The server is shutting down, and the request had not ended.")
    return problem_of(error)


def _check_total(asked: CompletionRequest, *, context: int, most: int) -> None:
    # What goes beyond the context is refused for that.
    total = asked.num_prompts * asked.num_candidates * min(asked.max_tokens, context)
    if total > most:
        raise Problem(
            400,
            f"{asked.num_prompts} prompts with {asked.num_candidates} candidates of "
            f"{asked.max_tokens} tokens each may come to {total} tokens, and this server makes at "
            f"most {most} for one request - 'max_tokens'",
            param="max_tokens",
        )


def _notes(prompts: list[Prompt], ignored: list[str]) -> dict[str, str]:
    """Headers that say what the client might not expect."""
    headers = dict[str, str]()
    warnings = dict.fromkeys(prompt.warning for prompt in prompts if prompt.warning)
    if warnings:
        headers[WARNING] = "; ".join(warnings)
    if ignored:
        # A name may be any string, and a header may not.
        named = [name for name in ignored[:20] if name.isascii() and name.isidentifier()]
        headers[IGNORED] = ", ".join(f"{name:.60}" for name in named) or "(unprintable)"
    return headers
