"""A completion as server-sent events.

Owns the frames, their order and their end. The first of them is awaited before anything is sent,
so that what goes wrong until then is an error of HTTP; what goes wrong later is an event.
"""

import contextlib
import secrets
import string
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator

from refimpl.server.choices import Piece
from refimpl.server.contract import StreamOptions
from refimpl.server.errors import Problem, dumps
from refimpl.server.jobs import Job
from refimpl.server.reply import Reply

DONE = b"data: [DONE]\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
CONTENT_TYPE = "text/event-stream; charset=utf-8"

# Obfuscated frames have a length that is a multiple of this: longer than what most tokens make of
# a frame, so that most frames are of one size.
_BLOCK = 512
_NOISE = string.ascii_letters + string.digits


class Begun(AsyncIterator[bytes]):
    """A stream whose first frames are there already."""

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes, None]) -> None:
        self._first: bytes | None = first
        self._rest = rest

    async def __anext__(self) -> bytes:
        if self._first is not None:
            first, self._first = self._first, None
            return first
        return await anext(self._rest)

    async def aclose(self) -> None:
        """End the stream, and what makes it."""
        await self._rest.aclose()


async def begin(
    job: Job, resources: contextlib.ExitStack, *, problem_of: Callable[[Exception], Problem]
) -> Begun:
    """The stream of a job, once its first token exists.

    Args:
        job: not begun.
        resources: held until the stream ends or is closed.
        problem_of: what to tell of an error.

    Raises:
        Problem, InvalidRequestError, EngineError: nothing has been sent yet.
    """
    frames = _frames(job, resources, problem_of)
    return Begun(await anext(frames), frames)


async def _frames(
    job: Job, resources: contextlib.ExitStack, problem_of: Callable[[Exception], Problem]
) -> AsyncGenerator[bytes, None]:
    options = job.request.stream_options or StreamOptions()
    is_begun = False
    with resources:
        try:
            async with contextlib.aclosing(job.pieces()) as batches:
                async for pieces in batches:
                    frames = b"".join(_chunks(job, pieces, options))
                    # At the first token headers leave, even if its text has to wait.
                    if frames or not is_begun:
                        yield frames
                        is_begun = True
        except Exception as error:
            if not is_begun:
                raise
            problem = problem_of(error)
            job.broke_off(problem)
            yield frame(dumps(problem.to_json())) + DONE
            return
        yield _ending(job, options) + DONE


def frame(data: str) -> bytes:
    """An event."""
    return f"data: {data}\n\n".encode()


def _chunks(job: Job, pieces: list[Piece], options: StreamOptions) -> Iterator[bytes]:
    for piece in pieces:
        chunk = job.head.reply([piece])
        if options.continuous_usage_stats:
            chunk["usage"] = job.usage()
        elif options.include_usage:
            chunk["usage"] = None
        yield _spelt(chunk, options)


def _ending(job: Job, options: StreamOptions) -> bytes:
    if not options.include_usage:
        return b""
    chunk = job.head.reply([])
    chunk["usage"] = job.usage()
    return _spelt(chunk, options)


def _spelt(chunk: Reply, options: StreamOptions) -> bytes:
    if options.include_obfuscation:
        chunk["obfuscation"] = ""
        missing = -len(dumps(chunk)) % _BLOCK
        chunk["obfuscation"] = "".join(secrets.choice(_NOISE) for _ in range(missing))
    return frame(dumps(chunk))
