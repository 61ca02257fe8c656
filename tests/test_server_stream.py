"""Streams: their frames and their end, errors before and within them, and clients that leave."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

import pytest
from quart import Response

from refimpl.engine.events import Delta, Event, Finished
from refimpl.errors import EngineError
from refimpl.server import stream
from refimpl.server.merging import merge
from tests.servers import MODEL, SLOTS, Client, client_of, tiny_client, until

TEXT = "is the "
# Long enough for what came before to be sent by itself: what an error overtakes is not.
READ = 0.02


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with tiny_client() as client:
        yield client


def test_frames_are_lines_of_data_with_an_end(client):
    got = client.complete(prompt=TEXT, max_tokens=3, stream=True)
    assert got.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert got.headers["Cache-Control"] == "no-cache"
    assert got.headers["X-Accel-Buffering"] == "no"
    assert got.body.endswith(b"\n\ndata: [DONE]\n\n")
    assert got.body.isascii()
    chunks = got.events
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    for chunk in chunks:
        assert chunk["object"] == "text_completion"
        assert list(chunk) == [
            "id", "object", "created", "model", "system_fingerprint", "choices",
        ]  # fmt: skip
        assert len(chunk["choices"]) == 1
        assert list(chunk["choices"][0]) == ["text", "index", "logprobs", "finish_reason"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [
        *[None] * (len(chunks) - 1), "length",
    ]  # fmt: skip


@pytest.mark.parametrize("prompts", [1, 3])
@pytest.mark.parametrize("n", [1, 3])
def test_each_index_has_one_finishing_chunk_and_it_is_its_last(client, prompts, n):
    got = client.complete(
        prompt=[TEXT] * prompts, n=n, max_tokens=6, temperature=1, seed=2, stream=True, logprobs=0
    )
    seen = dict[int, list[str | None]]()
    for chunk in got.events:
        [choice] = chunk["choices"]
        seen.setdefault(choice["index"], []).append(choice["finish_reason"])
        if choice["finish_reason"] is not None:
            assert choice["text"] == ""
            assert choice["logprobs"] == {
                "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": [],
            }  # fmt: skip
    assert sorted(seen) == list(range(prompts * n))
    for reasons in seen.values():
        assert reasons[-1] in ("stop", "length")
        assert reasons[:-1] == [None] * (len(reasons) - 1)
        assert len(reasons) <= 7


def test_usage_comes_only_if_asked_for(client):
    body = {"prompt": [TEXT, "a"], "n": 2, "max_tokens": 3, "stream": True, "ignore_eos": True}
    for options in (None, {}, {"include_usage": False}):
        assert all("usage" not in c for c in client.complete(**body, stream_options=options).events)

    *chunks, last = client.complete(**body, stream_options={"include_usage": True}).events
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"] == {
        "prompt_tokens": 6, "completion_tokens": 12, "total_tokens": 18,
        "prompt_tokens_details": {"cached_tokens": 0},
    }  # fmt: skip

    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = client.complete(**body, stream_options=options).events
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 12
    assert all(chunk["usage"]["prompt_tokens"] == 6 for chunk in chunks)
    assert last["usage"]["total_tokens"] == 18


def test_obfuscated_frames_do_not_tell_the_length_of_tokens(client):
    body = {"prompt": TEXT, "max_tokens": 8, "stream": True, "logprobs": 1}
    got = client.complete(**body, stream_options={"include_obfuscation": True})
    frames = got.body.split(b"\n\n")[:-2]
    assert len({len(frame) for frame in frames}) == 1
    texts = [chunk["choices"][0]["text"] for chunk in got.events]
    assert len({len(text) for text in texts}) > 1
    assert all(chunk["obfuscation"] for chunk in got.events)
    assert all("obfuscation" not in chunk for chunk in client.complete(**body).events)


def test_an_echoed_prompt_is_in_the_first_chunk_of_each_index(client):
    got = client.complete(prompt=["ab", "cd"], echo=True, n=2, max_tokens=2, stream=True)
    first = dict[int, str]()
    for chunk in got.events:
        [choice] = chunk["choices"]
        first.setdefault(choice["index"], choice["text"])
    assert first == {0: "ab", 1: "ab", 2: "cd", 3: "cd"}


def test_the_beginning_of_a_stop_string_waits(client):
    [plain] = client.complete(prompt=TEXT, max_tokens=24).choices
    stop = plain["text"][4:8]
    texts = [
        chunk["choices"][0]["text"]
        for chunk in client.complete(prompt=TEXT, max_tokens=24, stop=stop, stream=True).events
    ]
    assert "".join(texts) == plain["text"][: plain["text"].index(stop)]


@contextlib.contextmanager
def wrapped(client: Client, change: Callable[[AsyncGenerator[Event, None]], Any]) -> Iterator[None]:
    """The engine of a client with its events changed, for as long as the block runs."""
    engine = client.service.engine
    plain = engine.generate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "generate", lambda request: change(plain(request)))
        yield


async def fails_at_once(events: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
    await events.aclose()
    raise EngineError("a secret of the engine")
    yield Finished(0, "error", None, 0, None)


async def fails_later(events: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
    async with contextlib.aclosing(events):
        async for event in events:
            if isinstance(event, Delta):
                yield event
                break
    await asyncio.sleep(READ)
    raise EngineError("a secret of the engine")


def broken_off(reason: Any) -> Callable[[AsyncGenerator[Event, None]], Any]:
    async def change(events: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
        async with contextlib.aclosing(events):
            async for event in events:
                if isinstance(event, Delta):
                    yield event
                    break
        await asyncio.sleep(READ)
        yield Finished(0, reason, None, 1, -1.0)

    return change


@pytest.mark.parametrize("is_streamed", [False, True])
def test_an_error_before_the_first_token_is_one_of_http(client, is_streamed):
    with wrapped(client, fails_at_once):
        got = client.complete(prompt=TEXT, stream=is_streamed)
    assert got.status == 500
    assert got.error["type"] == "server_error"
    assert b"secret" not in got.body
    assert client.complete(prompt=TEXT).status == 200


@pytest.mark.parametrize(
    ("change", "kind", "status"),
    [
        (fails_later, "server_error", 500),
        (broken_off("error"), "server_error", 500),
        (broken_off("deadline"), "timeout", 504),
    ],
)
def test_an_error_after_the_first_token_is_an_event(client, change, kind, status):
    with wrapped(client, change):
        streamed = client.complete(prompt=TEXT, echo=True, stream=True)
        whole = client.complete(prompt=TEXT, echo=True)
    *chunks, last = streamed.events
    assert chunks[0]["choices"][0]["text"] == TEXT
    assert list(last) == ["error"]
    assert list(last["error"]) == ["message", "type", "param", "code"]
    assert last["error"]["type"] == kind
    assert b"secret" not in streamed.body
    assert (whole.status, whole.error) == (status, last["error"])
    assert client.service.queue.num_held == 0


def test_a_deadline_ends_a_request(client):
    hasty = client_of(client.service.engine, request_timeout=0.001)
    got = hasty.complete(prompt=TEXT, max_tokens=300, ignore_eos=True)
    assert got.status == 504
    assert got.error["type"] == "timeout"
    streamed = hasty.complete(prompt=TEXT, max_tokens=300, ignore_eos=True, stream=True)
    assert streamed.status == 504 or streamed.events[-1]["error"]["type"] == "timeout"
    assert hasty.service.queue.num_held == 0


async def left(client: Client, body: dict[str, Any], *, after_frames: int) -> None:
    """Send a request, read so many frames of its reply, and go."""
    connection = client.app.test_client().request(
        "/v1/completions", method="POST", headers={"Content-Type": "application/json"}
    )
    async with connection as sent:
        await sent.send(json.dumps({"model": MODEL, **body}).encode())
        await sent.send_complete()
        for _ in range(after_frames):
            await sent.receive()
        if not after_frames:
            worker = client.service.engine.worker
            assert worker is not None
            await until(lambda: worker.num_in_flight > 0)
        await sent.disconnect()


@pytest.mark.parametrize(
    ("is_streamed", "after_frames"), [(True, 1), (True, 3), (True, 0), (False, 0)]
)
def test_a_client_that_leaves_frees_its_slots(client, is_streamed, after_frames):
    worker = client.service.engine.worker
    body = {"prompt": [TEXT] * 2, "n": 3, "max_tokens": 370, "ignore_eos": True,
            "stream": is_streamed}  # fmt: skip
    before = client.service.metrics.value("refimpl:requests_cancelled_total") or 0

    async def scene() -> None:
        await left(client, body, after_frames=after_frames)
        await until(lambda: worker.num_in_flight == 0)
        assert worker.scheduler.num_free == SLOTS
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        assert others == []

    asyncio.run(scene())
    assert client.service.queue.num_held == 0
    assert client.service.metrics.value("refimpl:requests_cancelled_total") == before + 1


def test_a_stream_has_no_time_limit_of_quart(client):
    seen = list[Any]()

    @client.app.after_request
    async def look(response: Response) -> Response:
        seen.append(response.timeout)
        return response

    client.complete(prompt="a", max_tokens=1, stream=True)
    client.app.after_request_funcs[None].remove(look)
    assert seen == [None]


def test_the_first_bytes_leave_with_the_first_token(client):
    # All of the text is held back, as it may become the stop string until the end.
    text = client.complete(prompt=TEXT, max_tokens=6).choices[0]["text"]
    gone = list[int]()

    async def scene() -> None:
        connection = client.app.test_client().request(
            "/v1/completions", method="POST", headers={"Content-Type": "application/json"}
        )
        body = {"model": MODEL, "prompt": TEXT, "temperature": 0, "max_tokens": 6, "stream": True,
                "stop": text + "and so on"}  # fmt: skip
        async with connection as sent:
            await sent.send(json.dumps(body).encode())
            await sent.send_complete()
            gone.append(len(await sent.receive()))

    asyncio.run(scene())
    assert gone == [0]


async def counted(name: str, count: int, closed: list[str]) -> AsyncGenerator[str, None]:
    try:
        for number in range(count):
            yield f"{name}{number}"
            if number % 3 == 0:
                await asyncio.sleep(0)
    finally:
        closed.append(name)


def test_merged_streams_keep_their_own_order_and_come_in_batches():
    closed = list[str]()

    async def scene() -> list[list[tuple[int, str]]]:
        return [batch async for batch in merge([counted(name, 50, closed) for name in "ab"])]

    batches = asyncio.run(scene())
    for number, name in enumerate("ab"):
        own = [each for batch in batches for source, each in batch if source == number]
        assert own == [f"{name}{i}" for i in range(50)]
    assert sorted(closed) == ["a", "b"]
    # Three are ready at a time of each.
    assert len(batches) <= 60


def test_closing_merged_streams_closes_each_and_leaves_no_task():
    closed = list[str]()

    async def scene() -> None:
        merged = merge([counted(name, 10**9, closed) for name in "abc"])
        async with contextlib.aclosing(merged):
            await anext(merged)
        assert sorted(closed) == ["a", "b", "c"]
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(scene())


def test_an_error_of_one_of_merged_streams_ends_all_after_what_came_before():
    closed = list[str]()

    async def failing() -> AsyncGenerator[str, None]:
        yield "first"
        raise EngineError("broken")

    seen = list[str]()

    async def scene() -> None:
        async for batch in merge([failing(), counted("a", 10**9, closed)]):
            seen.extend(each for source, each in batch if source == 0)

    with pytest.raises(EngineError, match="broken"):
        asyncio.run(scene())
    assert seen == ["first"]
    assert closed == ["a"]


def test_a_merged_stream_that_is_not_read_is_not_read_on():
    made = list[int]()

    async def endless() -> AsyncGenerator[int, None]:
        for number in range(10**9):
            made.append(number)
            yield number

    async def scene() -> None:
        merged = merge([endless()])
        async with contextlib.aclosing(merged):
            await anext(merged)
            for _ in range(100):
                await asyncio.sleep(0)
            # A buffer of 256, what was taken out of it once, and the one in hand.
            assert len(made) <= 2 * 256 + 2

    asyncio.run(scene())


def test_a_begun_stream_gives_its_first_frame_and_then_the_others():
    async def scene() -> list[bytes]:
        async def rest() -> AsyncGenerator[bytes, None]:
            yield b"b"
            yield b"c"

        return [frame async for frame in stream.Begun(b"a", rest())]

    assert asyncio.run(scene()) == [b"a", b"b", b"c"]
    assert stream.frame('{"a":1}') == b'data: {"a":1}\n\n'
