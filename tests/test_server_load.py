"""Many clients at once over real sockets, of whom some leave and some send nonsense.

Nothing of them stays, and whoever stays gets the answer that the request has alone, to the bit.
"""

import asyncio
import contextlib
import gc
import json
import os
import random
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx2
import pytest

from refimpl.engine.memory import release_freed
from tests.engines import prompt_ids, tiny_engine
from tests.served import PATIENCE, Served, eventually, served
from tests.servers import MODEL

COMPLETIONS = "/v1/completions"
MAX_BODY = 1 << 16
TEXT = "the quick brown fox"

# Every way to sample and to be answered; each has one right answer.
REQUESTS: list[dict[str, Any]] = [
    {"prompt": TEXT, "temperature": 0},
    {"prompt": TEXT, "temperature": 0, "logprobs": 5, "echo": True},
    {"prompt": "a", "seed": 1, "n": 2},
    {"prompt": ["one", "two"], "seed": 2, "top_p": 0.9, "logprobs": 0},
    {"prompt": list(prompt_ids(3, 300)), "seed": 3, "top_k": 20},
    {"prompt": list(prompt_ids(3, 260)), "seed": 4, "temperature": 0.5, "logprobs": 2},
    {"prompt": TEXT, "seed": 5, "frequency_penalty": 1.5, "presence_penalty": -1, "n": 3},
    {"prompt": TEXT, "seed": 6, "stop": ["e", " "], "repetition_penalty": 1.3},
    {"prompt": [[2, 70, 71], [2, 72]], "seed": 7, "logit_bias": {"9": 5}, "logprobs": 1},
    {"prompt": "é😀" * 8, "seed": 8, "temperature": 2, "min_p": 0.01},
    {"prompt": TEXT, "max_tokens": 0, "echo": True, "logprobs": 1},
    {"prompt": "", "seed": -9, "max_tokens": 40, "ignore_eos": True},
]

# Bodies with something wrong, and the status that each gets, be the server full or not.
NONSENSE: list[tuple[bytes, int]] = [
    (b"{", 400),
    (b"\xff\xfe", 400),
    (b"[" * 5000, 400),
    (b"null", 400),
    (b'{"model": "google/tiny", "prompt": [1, "a"]}', 400),
    (b'{"model": "google/tiny", "prompt": "a", "n": 1e999}', 400),
    (b'{"model": "google/tiny", "what": 1}', 400),
    (b'{"model": "nobody\'s"}', 404),
    (b'{"prompt": "' + bytes(MAX_BODY) + b'"}', 413),
]
# What is wrong only beside the prompt's tokens, which nobody counts before there is room.
TOO_LONG = b'{"model": "google/tiny", "prompt": "a", "max_tokens": 5000}'


@dataclass
class Tally:
    """What became of all requests.

    Attributes:
        counts: of requests, by what their clients did.
        wrong: numbers of the requests whose answer was not the one that they have alone.
        seconds: that it took.
    """

    counts: Counter[str] = field(default_factory=Counter[str])
    wrong: list[int] = field(default_factory=list[int])
    seconds: float = 0.0

    @property
    def compared(self) -> int:
        """Answers that were held to the one made alone."""
        return self.counts["streamed"] + self.counts["whole"]


@dataclass(frozen=True)
class Standing:
    """What the process holds while nobody is there.

    Attributes:
        handles: open files and sockets.
        tasks: of the server's event loop.
        memory: resident, in bytes, with nothing in it that is only waiting to be collected.
    """

    handles: int
    tasks: int
    memory: int


def standing(server: Served) -> Standing:
    """Once whoever was there is gone, which must come to pass."""
    eventually(lambda: server.is_idle)
    # Then only what runs the server is left, and a task for each connection is not.
    eventually(lambda: not server.has_connections)
    gc.collect()
    release_freed()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Standing(
        handles=len(os.listdir("/proc/self/fd")),
        tasks=server.num_tasks,
        memory=pages * os.sysconf("SC_PAGE_SIZE"),
    )


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    engine = tiny_engine()
    engine.options = replace(engine.options, compile_at_start=False)
    with engine, served(engine, max_body_bytes=MAX_BODY) as running:
        yield running


@contextlib.asynccontextmanager
async def connected(server: Served) -> AsyncGenerator[httpx2.AsyncClient, None]:
    # One that reads the certificates of the world, as it does by default, takes long to make.
    async with httpx2.AsyncClient(
        base_url=server.url, timeout=PATIENCE * 4, verify=False, trust_env=False
    ) as client:
        yield client


def body_of(number: int, *, is_streamed: bool) -> dict[str, Any]:
    extra: dict[str, Any] = {"stream": is_streamed, "return_token_ids": True}
    if is_streamed:
        extra["stream_options"] = {"include_usage": True}
    return {"model": MODEL, **REQUESTS[number], **extra}


def answer_of(chunks: list[dict[str, Any]]) -> str:
    """All that is said of each choice, and the usage, whether it came at once or in pieces."""
    choices, usage = dict[int, dict[str, Any]](), None
    for chunk in chunks:
        assert "error" not in chunk, chunk
        usage = chunk.get("usage") or usage
        # How much of a prompt was cached depends on who came before, and nothing else does.
        if usage is not None:
            usage = {key: usage[key] for key in usage if key != "prompt_tokens_details"}
        for piece in chunk["choices"]:
            _add(choices.setdefault(piece["index"], {}), piece)
    # Floats are spelt so that different bits are different letters.
    return json.dumps([usage, [choices[index] for index in sorted(choices)]], sort_keys=True)


def _add(choice: dict[str, Any], piece: dict[str, Any]) -> None:
    for name, value in piece.items():
        if isinstance(value, dict):
            _add(choice.setdefault(name, {}), value)
        elif isinstance(value, str | list):
            choice[name] = choice[name] + value if name in choice else value
        elif value is not None:
            choice[name] = value


async def streamed(
    client: httpx2.AsyncClient, number: int, *, most: float = float("inf")
) -> str | None:
    """The answer to a request, frame by frame; None if it left after so many frames."""
    body, chunks = body_of(number, is_streamed=True), list[dict[str, Any]]()
    async with client.stream("POST", COMPLETIONS, json=body) as response:
        if response.status_code == 503:
            raise ServerFullError
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                return answer_of(chunks)
            if line:
                chunks.append(json.loads(line.removeprefix("data: ")))
            if len(chunks) >= most:
                return None
    raise AssertionError("a stream ended without its end")


async def whole(client: httpx2.AsyncClient, number: int) -> str:
    """The answer to a request, at once."""
    response = await client.post(COMPLETIONS, json=body_of(number, is_streamed=False))
    if response.status_code == 503:
        raise ServerFullError
    assert response.status_code == 200, response.text
    return answer_of([response.json()])


class ServerFullError(Exception):
    """There was no room in the queue, which may be."""


async def send_nonsense(client: httpx2.AsyncClient, data: bytes, status: int) -> None:
    headers = {"Content-Type": "application/json"}
    response = await client.post(COMPLETIONS, content=data, headers=headers)
    if data == TOO_LONG and response.status_code == 503:
        raise ServerFullError
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]


async def send_half(server: Served) -> None:
    """The beginning of a request, and no more of it."""
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"
        b'Content-Length: 1000\r\n\r\n{"model": '
    )
    await writer.drain()
    writer.transport.abort()


# What a client may do, and how often it does.
WAYS = {"streamed": 60, "whole": 8, "left": 14, "left early": 6, "half": 4, "nonsense": 8}


class Visitor:
    """One client after the other, each of whom does something at random."""

    def __init__(self, server: Served, expected: list[str], tally: Tally, *, seed: int) -> None:
        self._server, self._expected, self._tally = server, expected, tally
        self._random = random.Random(seed)

    async def visit(self, until: float) -> None:
        while time.monotonic() < until:
            # Some come back on the connection that they have, others on a new one.
            async with connected(self._server) as client:
                for _ in range(self._random.randrange(1, 5)):
                    [way] = self._random.choices([*WAYS], weights=[*WAYS.values()])
                    try:
                        await self._send(client, way)
                        self._tally.counts[way] += 1
                    except ServerFullError:
                        self._tally.counts["full"] += 1
                        await asyncio.sleep(0.1)

    async def _send(self, client: httpx2.AsyncClient, way: str) -> None:
        number = self._random.randrange(len(REQUESTS))
        match way:
            case "streamed":
                self._compare(number, await streamed(client, number))
            case "whole":
                self._compare(number, await whole(client, number))
            case "left":
                await streamed(client, number, most=self._random.randrange(1, 4))
            case "left early":
                with contextlib.suppress(TimeoutError):
                    # Anywhere between its first byte and the middle of the answer.
                    async with asyncio.timeout(self._random.uniform(0, 0.2)):
                        await whole(client, number)
            case "half":
                await send_half(self._server)
            case _:
                await send_nonsense(client, *self._random.choice([*NONSENSE, (TOO_LONG, 400)]))

    def _compare(self, number: int, answer: str | None) -> None:
        if answer != self._expected[number]:
            self._tally.wrong.append(number)


async def alone(server: Served) -> list[str]:
    """What each request comes to while nothing else runs; in pieces and at once it is the same."""
    async with connected(server) as client:
        answers = [await streamed(client, number) for number in range(len(REQUESTS))]
        assert answers == [await whole(client, number) for number in range(len(REQUESTS))]
    return [answer for answer in answers if answer is not None]


async def crowd(server: Served, expected: list[str], *, clients: int, seconds: float) -> Tally:
    """So many visitors for so long."""
    tally, began = Tally(), time.monotonic()
    visitors = [Visitor(server, expected, tally, seed=seed) for seed in range(clients)]
    async with asyncio.TaskGroup() as group:
        for visitor in visitors:
            group.create_task(visitor.visit(began + seconds))
    tally.seconds = time.monotonic() - began
    return tally


def load(server: Served, *, clients: int, seconds: float, growth: int) -> tuple[Tally, Standing]:
    """Visitors by the number; afterwards the server holds what it held before, and little more.

    Args:
        server: that they come to.
        clients: at the same time.
        seconds: that they come for.
        growth: bytes of resident memory that may be more than before.

    Returns:
        What became of them, and what the process holds now.
    """
    expected = asyncio.run(alone(server))
    # A first crowd: buffers, threads and free lists get as large as they will be.
    asyncio.run(crowd(server, expected, clients=clients, seconds=seconds / 5))
    before = standing(server)
    tally = asyncio.run(crowd(server, expected, clients=clients, seconds=seconds))
    after = standing(server)
    assert tally.wrong == []
    assert (after.handles, after.tasks) == (before.handles, before.tasks)
    assert after.memory - before.memory < growth, tally
    assert asyncio.run(alone(server)) == expected
    return tally, before


def test_a_crowd_leaves_nothing_behind_and_changes_no_answer(server):
    # Far above what the allocator keeps of so little, far below a block of the cache a request.
    tally, _ = load(server, clients=20, seconds=3, growth=16 << 20)
    assert tally.compared >= 10
    assert tally.counts["left"] + tally.counts["left early"] + tally.counts["half"] >= 1


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_great_crowd_for_a_minute(server, record_property):
    # Of four hundred requests and more, 40 KiB for each would be beyond the bound.
    tally, before = load(server, clients=200, seconds=60, growth=16 << 20)
    for name, value in (("tally", tally), ("before", before), ("after", standing(server))):
        record_property(name, repr(value))
    # How many there are is the machine's matter; two for each client make it a crowd.
    assert tally.compared >= 400
    assert set(tally.counts) >= set(WAYS)
