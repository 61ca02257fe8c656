"""Readers that fall behind: what is held back, what is not, and what it changes, which is nothing.

A request that nobody reads comes to a halt by itself, so these tests wait for that and not for a
time.
"""

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from refimpl.engine import engine as engine_module
from refimpl.engine.engine import Engine, EngineOptions
from refimpl.engine.events import Completion, Event, collect
from refimpl.engine.inbox import Backlog
from refimpl.engine.loop import EngineLoop
from refimpl.engine.request import Request
from refimpl.engine.scheduler import Scheduler
from refimpl.errors import EngineError, InvalidRequestError
from tests.engines import bits, prompt_ids, random_requests, request_of, tiny_engine

# The first test compiles the programs.
pytestmark = pytest.mark.timeout(900)

SECONDS = 60.0
SLOTS = 16
LIMIT = 6
# Forty steps for each choice: far more than may lie unread.
LONG = request_of(prompt_ids(3, 5), max_tokens=40, seed=1, ignore_eos=True, n=2, logprobs=1)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """Sixteen slots, and six deliveries at most unread."""
    with tiny_engine(max_unread=LIMIT) as started:
        yield started


@pytest.fixture(scope="module")
def whole(engine: Engine) -> str:
    """What becomes of the long request where somebody reads."""
    return bits(completion_of(engine, LONG))


@pytest.fixture(autouse=True)
def nothing_is_left_behind(engine: Engine) -> Iterator[None]:
    yield
    wait_until(lambda: not loop_of(engine)._readers)
    assert scheduler_of(engine).num_free == SLOTS
    assert scheduler_of(engine).num_paused == 0
    assert scheduler_of(engine).is_idle
    assert loop_of(engine)._deadlines == []


def loop_of(engine: Engine) -> EngineLoop:
    assert engine._running is not None
    return engine._running


def scheduler_of(engine: Engine) -> Scheduler:
    return loop_of(engine).worker.scheduler


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.002)


def completion_of(engine: Engine, request: Request) -> Completion:
    with contextlib.closing(engine.stream(request)) as events:
        return collect(request, events)


def wait_for_pauses(engine: Engine, count: int) -> None:
    """Until so many requests are paused and nothing else runs."""
    wait_until(lambda: scheduler_of(engine).num_paused == count and scheduler_of(engine).is_idle)


def num_unread(engine: Engine) -> int:
    return sum(reader.backlog._unread for reader in loop_of(engine)._readers.values())


# Counting


def test_a_backlog_is_full_once_and_drained_once() -> None:
    drained = list[int]()
    backlog = Backlog(8, drained=lambda: drained.append(1))
    assert [backlog.sent() for _ in range(7)] == [False] * 7
    backlog.read()
    assert [backlog.sent() for _ in range(4)] == [False, True, False, False]
    for left in range(9, 4, -1):
        backlog.read()
        assert (left, drained) == (left, [])
    backlog.read()
    assert drained == [1]
    for _ in range(4):
        backlog.read()
    assert drained == [1]
    assert [backlog.sent() for _ in range(8)] == [False] * 7 + [True]


def test_a_backlog_of_one_waits_for_each_delivery() -> None:
    drained = list[int]()
    backlog = Backlog(1, drained=lambda: drained.append(1))
    for count in range(3):
        assert backlog.sent()
        assert len(drained) == count
        backlog.read()
        assert len(drained) == count + 1


def test_there_is_room_for_a_delivery() -> None:
    assert EngineOptions(max_unread=1).max_unread == 1
    with pytest.raises(InvalidRequestError, match="max_unread must be at least 1, got 0") as caught:
        EngineOptions(max_unread=0)
    assert caught.value.parameter == "max_unread"


# Readers that fall behind


def test_what_nobody_reads_pauses_and_goes_on_where_it_was(engine: Engine, whole: str) -> None:
    with contextlib.closing(engine.stream(LONG)) as stream:
        events = [next(stream)]
        wait_for_pauses(engine, 1)
        # Of the step that filled it both choices are there.
        assert LIMIT <= num_unread(engine) <= LIMIT + 1
        assert scheduler_of(engine).num_free == SLOTS - 2
        events += stream
    assert bits(collect(LONG, events)) == whole


def test_what_no_task_reads_pauses_and_goes_on_where_it_was(engine: Engine, whole: str) -> None:
    async def read_late() -> list[Event]:
        async with contextlib.aclosing(engine.generate(LONG)) as stream:
            events = [await anext(stream)]
            # The event loop runs meanwhile, and takes in what it is sent.
            await asyncio.to_thread(wait_for_pauses, engine, 1)
            assert LIMIT <= num_unread(engine) <= LIMIT + 1
            return events + [event async for event in stream]

    assert bits(collect(LONG, asyncio.run(read_late()))) == whole


def test_an_event_loop_that_stands_still_is_not_buried(engine: Engine, whole: str) -> None:
    async def stand_still() -> list[Event]:
        async with contextlib.aclosing(engine.generate(LONG)) as stream:
            events = [await anext(stream)]
            wait_for_pauses(engine, 1)
            assert num_unread(engine) <= LIMIT + 1
            return events + [event async for event in stream]

    assert bits(collect(LONG, asyncio.run(stand_still()))) == whole


def test_others_run_on_beside_those_that_are_paused(engine: Engine, whole: str) -> None:
    requests = random_requests(50, (1, 5, 40, 129, 200))
    alone = [bits(completion_of(engine, request)) for request in requests]
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(contextlib.closing(engine.stream(LONG))) for _ in range(5)]
        begun = [[next(stream)] for stream in slow]
        wait_for_pauses(engine, 5)
        assert [bits(completion_of(engine, request)) for request in requests] == alone
        assert scheduler_of(engine).num_paused == 5
        for events, stream in zip(begun, slow, strict=True):
            assert bits(collect(LONG, [*events, *stream])) == whole


def test_more_choices_than_slots_beside_one_that_is_paused(engine: Engine) -> None:
    many = replace(LONG, params=replace(LONG.params, n=40, max_tokens=9))
    alone = bits(completion_of(engine, many))
    with contextlib.closing(engine.stream(many)) as stream:
        events = [next(stream)]
        # Its choices that wait for a slot do not keep others from theirs.
        wait_for_pauses(engine, 1)
        assert num_unread(engine) <= LIMIT + SLOTS
        stuck = engine.stream(LONG)
        with ThreadPoolExecutor(1) as threads:
            other = threads.submit(list, stuck)
            events += stream
            assert len(collect(LONG, other.result(SECONDS)).choices) == 2
    assert bits(collect(many, events)) == alone


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_the_pace_of_readers_changes_no_bit(limit: int) -> None:
    requests = random_requests(51 + limit, (1, 2, 7, 33, 128, 129, 140, 200))

    def read_slowly(engine: Engine, request: Request) -> Completion:
        pauses = random.Random(request.params.seed)
        with contextlib.closing(engine.stream(request)) as stream:
            events = list[Event]()
            for event in stream:
                events.append(event)
                time.sleep(pauses.choice((0, 0, 0, 0.001, 0.004)))
            return collect(request, events)

    with tiny_engine(max_unread=limit) as engine:
        alone = [bits(completion_of(engine, request)) for request in requests]
        with ThreadPoolExecutor(8) as threads:
            together = threads.map(read_slowly, [engine] * 16, requests * 2)
            assert [bits(completion) for completion in together] == alone * 2
        wait_until(lambda: not loop_of(engine)._readers)
        assert scheduler_of(engine).num_paused == 0
        assert scheduler_of(engine).num_free == SLOTS


# Ends of what is paused


def test_a_deadline_ends_what_is_paused(engine: Engine) -> None:
    deadline = time.monotonic() + 1
    with contextlib.closing(engine.stream(replace(LONG, deadline=deadline))) as stream:
        events = [next(stream)]
        wait_for_pauses(engine, 1)
        # Nothing else happens that could wake the engine's thread.
        wait_until(lambda: not loop_of(engine)._readers)
        assert time.monotonic() >= deadline
        events += stream
    choices = collect(LONG, events).choices
    assert [choice.finish_reason for choice in choices] == ["deadline"] * 2
    # As many as had been made when it paused.
    assert [len(choice.token_ids) for choice in choices] in ([3, 3], [4, 3], [4, 4])


def test_closing_what_is_paused_frees_its_slots(engine: Engine) -> None:
    stream = engine.stream(LONG)
    next(stream)
    wait_for_pauses(engine, 1)
    stream.close()
    wait_until(lambda: scheduler_of(engine).num_free == SLOTS)


def test_an_event_loop_that_is_gone_frees_its_slots(engine: Engine) -> None:
    loop = asyncio.new_event_loop()
    stream = engine.generate(LONG)
    loop.run_until_complete(anext(stream))
    loop.close()
    # Its generator is still there, but nobody can go on with it.
    wait_until(lambda: scheduler_of(engine).num_free == SLOTS)
    del stream


def test_closing_the_engine_ends_what_is_paused() -> None:
    with tiny_engine(max_unread=2) as engine:
        stream = engine.stream(LONG)
        next(stream)
        wait_for_pauses(engine, 1)
    with pytest.raises(EngineError, match="closed before the request ended"):
        list(stream)


def test_the_engine_s_thread_rests_while_all_is_paused(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.closing(engine.stream(LONG)) as stream:
        next(stream)
        wait_for_pauses(engine, 1)
        steps = list[int]()
        step = loop_of(engine).worker.step
        monkeypatch.setattr(loop_of(engine).worker, "step", lambda: steps.append(1) or step())
        time.sleep(0.1)
        # The one before it came to rest may end now.
        assert len(steps) <= 1


def test_a_deadline_is_forgotten_with_its_request(engine: Engine) -> None:
    far = replace(LONG, deadline=time.monotonic() + 1e9)
    with contextlib.closing(engine.stream(far)) as stream:
        next(stream)
        assert [deadline for deadline, _ in loop_of(engine)._deadlines] == [far.deadline]
        near = [replace(LONG, deadline=time.monotonic() + 1000) for _ in range(3)]
        assert len([completion_of(engine, request) for request in near]) == 3
        wait_until(lambda: len(loop_of(engine)._readers) == 1)
        assert [deadline for deadline, _ in loop_of(engine)._deadlines] == [far.deadline]
        list(stream)
    wait_until(lambda: not loop_of(engine)._readers)
    assert loop_of(engine)._deadlines == []


# The start


def test_a_with_block_shows_how_far_the_start_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = list[tuple[str, int, int]]()

    class Bars(engine_module.Progress):
        def update(self, label: str, done: int, total: int) -> None:
            shown.append((label, done, total))
            super().update(label, done, total)

    monkeypatch.setattr(engine_module, "Progress", Bars)
    with tiny_engine(max_unread=LIMIT):
        pass
    total = len(shown)
    assert total > 10
    assert shown == [("compiling", done, total) for done in range(total)]
    # What is no terminal is shown nothing.
    assert capsys.readouterr() == ("", "")
