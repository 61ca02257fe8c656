"""The engine from its callers' side: what comes back, how things end, and what faults do."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from refimpl.engine.engine import Engine
from refimpl.engine.events import (
    Admitted,
    Completion,
    Delta,
    Event,
    Finished,
    PromptScored,
    collect,
)
from refimpl.engine.request import Request, SamplingParams
from refimpl.engine.worker import Worker
from refimpl.errors import EngineError, InvalidRequestError
from tests.engines import (
    ARCHITECTURE,
    CONTEXT,
    Desk,
    bits,
    prompt_ids,
    random_requests,
    request_of,
    tiny_engine,
    tiny_programs,
    with_params,
)
from tests.oracle import log_probabilities
from tests.tiny_models import GOLDEN, golden_case

# The first test of each size compiles its programs.
pytestmark = pytest.mark.timeout(900)

SECONDS = 60.0
GREEDY = {"temperature": 0.0, "ignore_eos": True}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """Sixteen slots, one step a call."""
    with tiny_engine() as started:
        yield started


@pytest.fixture(scope="module")
def small() -> Iterator[Engine]:
    """Two slots, four steps a call."""
    with tiny_engine(slots=2, steps=4) as started:
        yield started


@pytest.fixture(scope="module")
def desk() -> Desk:
    """A worker of sixteen slots, driven by hand."""
    return Desk(tiny_programs())


@pytest.fixture
def fresh() -> Iterator[Engine]:
    """An engine that a test may break."""
    started = tiny_engine()
    started.start()
    yield started
    started.close()


def worker_of(engine: Engine) -> Worker:
    assert engine.worker is not None
    return engine.worker


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.002)


def is_at_rest(engine: Engine) -> bool:
    worker = worker_of(engine)
    return worker.scheduler.is_idle and worker.num_in_flight == 0


def completion_of(engine: Engine, request: Request) -> Completion:
    with contextlib.closing(engine.stream(request)) as events:
        return collect(request, events)


class Gate:
    """Lets the engine's thread make so many steps and no more."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self._permits = threading.Semaphore(0)
        self.steps = 0
        worker = worker_of(engine)
        step = worker.step

        def gated() -> bool:
            assert self._permits.acquire(timeout=SECONDS)
            did = step()
            self.steps += 1
            return did

        monkeypatch.setattr(worker, "step", gated)

    def let(self, count: int) -> None:
        """Allow that many, and wait until they are made."""
        done = self.steps + count
        self._permits.release(count)
        wait_until(lambda: self.steps >= done)

    def open(self) -> None:
        self._permits.release(1_000_000)


# What comes back


def test_every_way_to_ask_gives_the_same(engine: Engine) -> None:
    request = request_of(prompt_ids(1, 20), max_tokens=6, seed=4, n=2, logprobs=2)

    async def events() -> list[Event]:
        return [event async for event in engine.generate(request)]

    ways = [
        engine.complete(request.prompt_ids, request.params),
        asyncio.run(engine.complete_async(request.prompt_ids, request.params)),
        completion_of(engine, request),
        collect(request, asyncio.run(events())),
    ]
    assert {bits(way) for way in ways} == {bits(ways[0])}
    assert [len(choice.token_ids) for choice in ways[0].choices] == [6, 6]
    assert ways[0].prompt_tokens == 20
    assert ways[0].completion_tokens == 12


def test_a_completion_says_how_much_of_its_prompt_was_cached(engine: Engine) -> None:
    ids, params = prompt_ids(77, 200), SamplingParams(max_tokens=2, seed=1)
    before = time.monotonic()
    cold, warm = (engine.complete(ids, params) for _ in range(2))
    assert (cold.cached_tokens, warm.cached_tokens) == (0, 128)
    # Nothing else depends on it, which is why it is left out of what is compared.
    assert cold == warm
    assert bits(cold) == bits(warm)
    assert cold.admitted is not None
    assert warm.admitted is not None
    assert before <= cold.admitted.at < warm.admitted.at <= time.monotonic()
    nothing = engine.complete(ids, SamplingParams(max_tokens=0))
    assert (nothing.cached_tokens, nothing.admitted) == (0, None)


def test_many_at_once_in_one_event_loop(engine: Engine) -> None:
    requests = random_requests(21, range(1, 60))

    async def all_of_them() -> list[Completion]:
        return await asyncio.gather(
            *(engine.complete_async(each.prompt_ids, each.params) for each in requests)
        )

    for request, got in zip(requests, asyncio.run(all_of_them()), strict=True):
        alone = completion_of(engine, replace(request, prompt_logprobs=None))
        assert bits(got) == bits(alone)


@pytest.mark.parametrize("size", ["engine", "small"])
def test_events_are_well_formed(size: str, request: pytest.FixtureRequest) -> None:
    engine: Engine = request.getfixturevalue(size)
    for asked in random_requests(22, (1, 2, 30, 129, 140, 10, 11, 12, 13, 14)):
        asked = replace(asked, prompt_logprobs=3)
        with contextlib.closing(engine.stream(asked)) as stream:
            admitted, scored, *events = stream
        assert isinstance(admitted, Admitted)
        assert isinstance(scored, PromptScored)
        assert len(scored.entries) == len(asked.prompt_ids)
        assert scored.entries[0] is None
        for choice in range(asked.params.num_candidates):
            own = [e for e in events if isinstance(e, Delta | Finished) and e.choice == choice]
            assert [isinstance(event, Finished) for event in own] == [False] * (len(own) - 1) + [
                True
            ]
            deltas = [event for event in own if isinstance(event, Delta)]
            end = own[-1]
            assert isinstance(end, Finished)
            assert end.num_tokens == sum(len(delta.token_ids) for delta in deltas)
            assert 1 <= end.num_tokens <= asked.params.max_tokens
            for delta in deltas:
                wanted = 0 if asked.params.logprobs is None else len(delta.token_ids)
                assert len(delta.logprobs) == wanted
                assert all(len(e.top) == asked.params.logprobs for e in delta.logprobs)
                assert tuple(e.id for e in delta.logprobs) in ((), delta.token_ids)
            assert end.reason in ("stop", "length")
        assert len(events) == len({id(event) for event in events})


def test_greedy_continuation_is_hugging_face_s(engine: Engine, small: Engine) -> None:
    golden = np.load(GOLDEN / f"{ARCHITECTURE}.npz")
    params = SamplingParams(max_tokens=64, **GREEDY)
    for each in (engine, small):
        got = each.complete(golden["greedy.prompt"].tolist(), params)
        assert got.choices[0].token_ids == tuple(golden["greedy.ids"].tolist())


def test_prompt_log_probabilities_are_hugging_face_s(engine: Engine) -> None:
    golden = golden_case(ARCHITECTURE, "long")
    ids = golden.tokens[:1]
    wanted = log_probabilities(golden.logits.astype(np.float64), ids)[0]
    request = request_of(ids[0].tolist(), prompt_logprobs=0, max_tokens=0)
    entries = completion_of(engine, request).prompt_logprobs
    assert entries is not None
    got = [entry.logprob for entry in entries if entry is not None]
    # Logits differ by at most 2e-5, and a log-softmax by at most twice that.
    assert np.abs(np.array(got) - wanted).max() < 4e-5
    assert [entry.id for entry in entries if entry is not None] == ids[0, 1:].tolist()


@pytest.mark.parametrize("length", [1, 31, 32, 33, 127, 128, 129, 257])
def test_scores_of_a_prompt_are_those_of_its_generation(engine: Engine, length: int) -> None:
    prompt = prompt_ids(length, length)
    made = engine.complete(prompt, SamplingParams(max_tokens=40, seed=3, logprobs=5)).choices[0]
    assert made.logprobs is not None
    whole = request_of((*prompt, *made.token_ids), prompt_logprobs=5, max_tokens=1)
    scored = completion_of(engine, whole).prompt_logprobs
    assert scored is not None
    assert len(scored) == length + len(made.token_ids)
    for mine, again in zip(made.logprobs, scored[length:], strict=True):
        assert again is not None
        assert again.id == mine.id
        # Chunks and single steps add the same numbers in another order.
        assert abs(again.logprob - mine.logprob) < 1e-5
        assert [i for i, _ in again.top] == [i for i, _ in mine.top]


def test_no_tokens(engine: Engine) -> None:
    got = engine.complete([2, 7], SamplingParams(max_tokens=0, n=3))
    assert [(c.text, c.token_ids, c.finish_reason) for c in got.choices] == [("", (), "length")] * 3
    assert got.completion_tokens == 0
    assert got.prompt_logprobs is None


@pytest.mark.parametrize("length", [1, 2, 129])
def test_no_tokens_but_a_score(engine: Engine, length: int) -> None:
    request = request_of(prompt_ids(5, length), prompt_logprobs=1, max_tokens=0, n=2)
    got = completion_of(engine, request)
    assert [choice.finish_reason for choice in got.choices] == ["length", "length"]
    assert got.prompt_logprobs is not None
    assert len(got.prompt_logprobs) == length
    assert worker_of(engine).scheduler.num_free == 16


def test_many_choices_on_few_slots(small: Engine) -> None:
    for length in (3, 140):
        params = SamplingParams(max_tokens=2, seed=8, n=128, temperature=2.0, ignore_eos=True)
        got = small.complete(prompt_ids(9, length), params)
        assert [choice.index for choice in got.choices] == list(range(128))
        assert {len(choice.token_ids) for choice in got.choices} == {2}
        assert len({choice.token_ids for choice in got.choices}) > 100
        assert got.completion_tokens == 256
    wait_until(lambda: is_at_rest(small))
    assert worker_of(small).scheduler.num_free == 2


def test_best_of_keeps_the_likeliest(engine: Engine) -> None:
    params = SamplingParams(max_tokens=5, seed=8, n=7, temperature=1.5)
    every = engine.complete([2, 50, 60], params).choices
    best = engine.complete([2, 50, 60], replace(params, n=3, best_of=7))
    ranked = sorted(every, key=lambda c: (-(c.mean_logprob or 0.0), c.index))[:3]
    assert [c.token_ids for c in best.choices] == [c.token_ids for c in ranked]
    assert best.completion_tokens == sum(len(c.token_ids) for c in every)


# How texts end, and which ids are drawn


def greedy(engine: Engine, **params: Any) -> Completion:
    return engine.complete([2, 50, 60], SamplingParams(max_tokens=8, temperature=0.0, **params))


@pytest.mark.parametrize("size", ["engine", "small"])
def test_ends_of_a_text(size: str, request: pytest.FixtureRequest) -> None:
    engine: Engine = request.getfixturevalue(size)
    free = greedy(engine, ignore_eos=True).choices[0]
    assert free.finish_reason == "length"
    assert len(free.token_ids) == 8
    fifth = free.token_ids[4]
    first = free.token_ids.index(fifth)

    ended = greedy(engine, ignore_eos=True, stop_token_ids=(fifth,)).choices[0]
    assert ended.token_ids == free.token_ids[: first + 1]
    assert (ended.finish_reason, ended.stop) == ("stop", fifth)

    stop = free.text[3:5]
    cut = greedy(engine, ignore_eos=True, stop=(stop,)).choices[0]
    assert (cut.finish_reason, cut.stop) == ("stop", stop)
    assert cut.text == free.text[: free.text.index(stop)]
    assert cut.token_ids == free.token_ids[: len(cut.token_ids)]
    kept = greedy(engine, ignore_eos=True, stop=(stop,), include_stop_str_in_output=True).choices[0]
    assert kept.text == cut.text + stop


def test_end_of_text_and_ignore_eos(engine: Engine) -> None:
    eos = engine.gemma.eos_ids[0]
    forced = {"logit_bias": {eos: 100.0}}
    ended = greedy(engine, **forced).choices[0]
    assert (ended.token_ids, ended.finish_reason, ended.stop) == ((eos,), "stop", eos)
    ignored = greedy(engine, ignore_eos=True, **forced).choices[0]
    assert (ignored.token_ids, ignored.finish_reason) == ((eos,) * 8, "length")
    later = greedy(engine, min_tokens=3, **forced).choices[0]
    assert eos not in later.token_ids[:3]
    assert (later.token_ids[3:], later.finish_reason) == ((eos,), "stop")


def test_allowed_banned_and_biased_ids(engine: Engine) -> None:
    free = greedy(engine, ignore_eos=True).choices[0].token_ids
    allowed = {free[0], free[1], 33, 44}
    few = engine.complete(
        [2, 50], SamplingParams(max_tokens=40, seed=1, temperature=2.0, ignore_eos=True,
                                allowed_token_ids=tuple(allowed)),
    ).choices[0]  # fmt: skip
    assert set(few.token_ids) == allowed
    without = greedy(engine, ignore_eos=True, banned_token_ids=tuple(set(free))).choices[0]
    assert not set(without.token_ids) & set(free)
    assert greedy(engine, ignore_eos=True, logit_bias={77: 100.0}).choices[0].token_ids == (77,) * 8
    # What one request was told is nothing to the next in its slot.
    for _ in range(16):
        assert greedy(engine, ignore_eos=True).choices[0].token_ids == free


def test_penalties_count_what_was_sampled(engine: Engine) -> None:
    bias, penalty, prompt = {77: 50.0, 78: 49.0, 79: 48.0}, 2.0, [2, 50]
    params = SamplingParams(
        max_tokens=8, temperature=0, ignore_eos=True, logit_bias=bias, frequency_penalty=penalty
    )
    chosen = list(engine.complete(prompt, params).choices[0].token_ids)

    def raw(context: list[int], token: int) -> float:
        only = SamplingParams(max_tokens=1, allowed_token_ids=(token,), ignore_eos=True)
        logprob = engine.complete(context, only).choices[0].mean_logprob
        assert logprob is not None
        return logprob

    moved = 0
    for place, token in enumerate(chosen):
        before = chosen[:place]
        biased = {each: raw(prompt + before, each) + bias[each] for each in bias}
        penalised = {each: biased[each] - penalty * before.count(each) for each in bias}
        # Log-probabilities are rounded once more than the logits that they come from.
        assert penalised[token] > max(penalised.values()) - 1e-4
        moved += biased[token] < max(biased.values()) - 1e-4
    assert moved


def test_what_the_engine_cannot_do_is_refused_before_it_is_sent(engine: Engine) -> None:
    for ids, params, parameter in (
        ([2] * CONTEXT, SamplingParams(max_tokens=1), "max_tokens"),
        ([2, 512], SamplingParams(), "prompt"),
        ([2], SamplingParams(stop_token_ids=tuple(range(40))), "stop_token_ids"),
    ):
        with pytest.raises(InvalidRequestError) as caught:
            engine.complete(ids, params)
        assert caught.value.parameter == parameter
    longest = engine.complete([2] * (CONTEXT - 3), SamplingParams(max_tokens=3, **GREEDY))
    assert len(longest.choices[0].token_ids) == 3


# How requests end from outside

LONG = request_of(prompt_ids(3, 5), max_tokens=300, seed=1, ignore_eos=True, n=5)


def test_closing_the_iterator_frees_the_slots_within_one_step(
    fresh: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(fresh, monkeypatch)
    events = fresh.stream(LONG)
    thread = threading.Thread(target=lambda: gate.let(8))
    thread.start()
    assert isinstance(next(events), Admitted)
    thread.join()
    assert worker_of(fresh).scheduler.num_free == 11
    events.close()
    gate.let(1)
    wait_until(lambda: worker_of(fresh).scheduler.num_free == 16)
    assert worker_of(fresh).scheduler.is_idle
    assert gate.steps == 9


def test_closing_an_async_iterator_frees_the_slots_within_one_step(
    fresh: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(fresh, monkeypatch)

    async def begin_and_leave() -> None:
        async with contextlib.aclosing(fresh.generate(LONG)) as events:
            thread = threading.Thread(target=lambda: gate.let(8))
            thread.start()
            assert isinstance(await anext(events), Admitted)
            await asyncio.to_thread(thread.join)
        # Left at once, while the engine's thread stands before its next step.
        assert gate.steps == 8

    asyncio.run(begin_and_leave())
    gate.let(1)
    wait_until(lambda: worker_of(fresh).scheduler.num_free == 16)
    assert gate.steps == 9


def test_a_cancelled_task_frees_its_slots(engine: Engine) -> None:
    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.complete_async(LONG.prompt_ids, LONG.params), 0.05)

    asyncio.run(give_up())
    wait_until(lambda: is_at_rest(engine))
    assert worker_of(engine).scheduler.num_free == 16


def test_an_iterator_closed_before_its_first_event_ends_the_request(
    fresh: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(fresh, monkeypatch)
    events = fresh.stream(LONG)
    # Whether it was sent by now or not, the engine has had its time to see it.
    time.sleep(0.05)
    events.close()
    gate.open()
    fresh.complete([2], SamplingParams(max_tokens=1))
    wait_until(lambda: is_at_rest(fresh))
    # The request alone would take 300 steps.
    assert gate.steps < 20


def test_a_deadline_that_has_passed(engine: Engine) -> None:
    request = replace(LONG, deadline=time.monotonic() - 1)
    got = completion_of(engine, request)
    assert [(c.finish_reason, c.token_ids) for c in got.choices] == [("deadline", ())] * 5


def test_a_deadline_ends_what_waits_and_what_runs(
    fresh: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(fresh, monkeypatch)
    endless = with_params(LONG, n=14)
    with ThreadPoolExecutor(3) as threads:
        others = threads.submit(completion_of, fresh, with_params(endless, max_tokens=20))
        gate.let(3)
        deadline = time.monotonic() + 0.5
        # Two choices find slots, three wait for one.
        partly = threads.submit(completion_of, fresh, replace(LONG, deadline=deadline))
        waiting = threads.submit(completion_of, fresh, replace(LONG, deadline=deadline))
        wait_until(lambda: fresh._running is not None and fresh._running._inbox.qsize() == 2)
        gate.let(6)
        assert worker_of(fresh).scheduler.num_free == 0
        assert worker_of(fresh).scheduler.num_waiting == 2
        time.sleep(max(0.0, deadline - time.monotonic()) + 0.01)
        gate.open()
        assert [c.finish_reason for c in waiting.result(SECONDS).choices] == ["deadline"] * 5
        assert {c.finish_reason for c in partly.result(SECONDS).choices} == {"deadline"}
        lengths = [len(choice.token_ids) for choice in partly.result().choices]
        assert min(lengths[:2]) > 0
        assert lengths[2:] == [0, 0, 0]
        assert {c.finish_reason for c in others.result(SECONDS).choices} == {"length"}


def test_a_deadline_far_away_changes_nothing(engine: Engine) -> None:
    request = request_of([2, 5], max_tokens=4, seed=2)
    far = replace(request, deadline=time.monotonic() + 1000)
    assert bits(completion_of(engine, far)) == bits(completion_of(engine, request))


def test_closing_the_engine_ends_every_iterator(fresh: Engine) -> None:
    async def wait_for_the_end() -> None:
        with pytest.raises(EngineError, match="closed"):
            async for _ in fresh.generate(LONG):
                pass

    with ThreadPoolExecutor(8) as threads:
        waiting = [threads.submit(completion_of, fresh, LONG) for _ in range(6)]
        looping = threads.submit(asyncio.run, wait_for_the_end())
        wait_until(lambda: worker_of(fresh).num_in_flight == 7)
        fresh.close()
        for each in waiting:
            with pytest.raises(EngineError, match="closed"):
                each.result(SECONDS)
        looping.result(SECONDS)
    assert not fresh.is_healthy
    fresh.close()
    with pytest.raises(EngineError, match="does not run"):
        fresh.complete([2], SamplingParams())


def test_an_engine_starts_once_at_a_time_and_again_after_it_was_closed() -> None:
    engine = tiny_engine()
    with engine:
        first = engine.complete([2, 9], SamplingParams(max_tokens=5, seed=1))
        with pytest.raises(EngineError, match="runs already"):
            engine.start()
        assert engine.is_healthy
    assert not engine.is_healthy
    with engine:
        assert bits(engine.complete([2, 9], SamplingParams(max_tokens=5, seed=1))) == bits(first)


# Faults


@pytest.mark.parametrize("program", ["decode", "prefill", "admit", "fork"])
def test_a_program_that_fails_ends_all_and_the_next_start_is_clean(
    fresh: Engine, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    before = bits(completion_of(fresh, with_params(LONG, max_tokens=5)))

    def fails(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    gate = Gate(fresh, monkeypatch)
    with ThreadPoolExecutor(4) as threads:
        waiting = [threads.submit(completion_of, fresh, LONG) for _ in range(4)]
        loop = fresh._running
        assert loop is not None
        wait_until(lambda: loop._inbox.qsize() + worker_of(fresh).num_in_flight == 4)
        with monkeypatch.context() as broken:
            broken.setitem(fresh._programs.__dict__, program, fails)
            gate.open()
            for each in waiting:
                with pytest.raises(EngineError, match="out of memory"):
                    each.result(SECONDS)
            loop.thread.join(SECONDS)
    assert not fresh.is_healthy
    with pytest.raises(EngineError, match="start it again"):
        fresh.complete([2], SamplingParams())
    assert not loop._readers
    fresh.start()
    assert fresh.is_healthy
    assert worker_of(fresh).scheduler.num_free == 16
    assert bits(completion_of(fresh, with_params(LONG, max_tokens=5))) == before


def poison(worker: Worker, slot: int) -> None:
    """Not-a-number into everything that a slot holds."""
    assert worker._state is not None
    cache = worker._state.cache
    values = tuple(layer.at[slot].set(jax.numpy.float32("nan")) for layer in cache.values)
    worker._state = replace(worker._state, cache=replace(cache, values=values))


def test_numbers_that_are_not_finite_end_their_request_and_no_other(desk: Desk) -> None:
    requests = [request_of(prompt_ids(i, 9), max_tokens=6, seed=i, logprobs=2) for i in range(6)]
    alone = [bits(desk.complete(request)) for request in requests]
    keys = [desk.submit(request) for request in requests]
    while desk.worker.scheduler.num_free > 10 or len(desk.worker._owners) < 6:
        desk.worker.step()
    desk.worker.step()
    sick = next(slot for slot, (key, _) in desk.worker._owners.items() if key == keys[3])
    poison(desk.worker, sick)
    desk.run()
    for number, key in enumerate(keys):
        got = desk.completion(key)
        if number != 3:
            assert bits(got) == alone[number]
        else:
            assert got.choices[0].finish_reason == "error"
            assert len(got.choices[0].token_ids) < 6
            ok = got.choices[0].logprobs
            assert ok is not None
            assert all(np.isfinite(entry.logprob) for entry in ok)
    assert desk.worker.scheduler.num_free == 16
    for _ in range(16):
        assert bits(desk.complete(requests[3])) == alone[3]


def test_one_choice_may_end_with_an_error_and_the_others_go_on(desk: Desk) -> None:
    request = request_of(prompt_ids(1, 9), max_tokens=6, seed=1, n=4, ignore_eos=True)
    alone = desk.complete(request).choices
    key = desk.submit(request)
    while len(desk.worker._owners) < 4:
        desk.worker.step()
    poison(desk.worker, next(s for s, owner in desk.worker._owners.items() if owner == (key, 2)))
    desk.run()
    got = desk.completion(key).choices
    assert [choice.finish_reason for choice in got] == ["length", "length", "error", "length"]
    assert [repr(got[i]) for i in (0, 1, 3)] == [repr(alone[i]) for i in (0, 1, 3)]


@pytest.mark.parametrize("length", [9, 140])
def test_what_is_not_finite_in_a_prompt_leaves_nothing_behind(desk: Desk, length: int) -> None:
    """It is cancelled before its first token; the next ones in the slot do not suffer."""
    desk.worker.prefix.clear()
    request = request_of(prompt_ids(4, length), max_tokens=3, seed=1)
    whole = bits(desk.complete(request))
    desk.worker.prefix.clear()
    key = desk.submit(request)
    desk.worker.step()
    (group,) = desk.worker.scheduler._prefilling
    poison(desk.worker, group.source)
    desk.worker.step()
    desk.worker.cancel(key)
    desk.worker.prefix.clear()
    for _ in range(17):
        assert bits(desk.complete(request)) == whole


def test_what_is_not_finite_after_a_fork_leaves_nothing_behind(desk: Desk) -> None:
    """It is cancelled before its first token; the next ones in these slots write further on."""
    desk.worker.prefix.clear()
    short = request_of(prompt_ids(5, 120), max_tokens=20, seed=1, n=2, ignore_eos=True)
    whole = bits(desk.complete(short))
    key = desk.submit(request_of(prompt_ids(4, 140), max_tokens=3, seed=1, n=2))
    while len(desk.worker._owners) < 2:
        desk.worker.step()
    for slot in desk.worker._owners:
        poison(desk.worker, slot)
    desk.worker.cancel(key)
    desk.worker.prefix.clear()
    for _ in range(9):
        assert bits(desk.complete(short)) == whole


def test_a_score_that_is_not_finite_is_an_error_and_leaves_nothing_behind(desk: Desk) -> None:
    desk.worker.prefix.clear()
    request = request_of(prompt_ids(4, 140), prompt_logprobs=0, max_tokens=0)
    whole = bits(desk.complete(request))
    desk.worker.prefix.clear()
    key = desk.submit(request)
    desk.worker.step()
    (group,) = desk.worker.scheduler._prefilling
    # The first chunk writes over its own places; the second sees what stands before it.
    desk.worker.step()
    poison(desk.worker, group.source)
    desk.run()
    assert desk.completion(key).choices[0].finish_reason == "error"
    desk.worker.prefix.clear()
    for _ in range(17):
        assert bits(desk.complete(request)) == whole


# What it costs


def mixed_run(engine: Engine) -> None:
    """Every program, from several threads, with ends of every kind."""
    requests = random_requests(30, (1, 2, 20, 33, 100, 128, 129, 140, 257, 260, 300, 140))
    requests += [replace(LONG, deadline=time.monotonic() + 0.1)]
    requests += [request_of(prompt_ids(2, 150), prompt_logprobs=2, max_tokens=0)]
    with ThreadPoolExecutor(6) as threads:
        leaving = [engine.stream(LONG) for _ in range(2)]
        for events in leaving:
            next(events)
        done = list(threads.map(completion_of, [engine] * len(requests), requests))
        for events in leaving:
            events.close()
    assert len(done) == len(requests)
    wait_until(lambda: is_at_rest(engine))


def test_no_hidden_transfers(fresh: Engine) -> None:
    # For the whole process, since a context manager would hold on this thread alone.
    jax.config.update("jax_transfer_guard", "disallow")
    try:
        # The guard has teeth: this hands NumPy's array to a compiled function.
        with pytest.raises(Exception, match="isallowed host-to-device transfer"):
            jax.jit(jax.numpy.negative)(np.ones(3, np.float32))
        mixed_run(fresh)
    finally:
        jax.config.update("jax_transfer_guard", "allow")
    assert fresh.is_healthy


def test_nothing_is_compiled_after_the_start(fresh: Engine) -> None:
    compiled = list[str]()

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event.endswith("compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        mixed_run(fresh)
        assert compiled == []
        # The listener does hear what is compiled.
        jax.jit(lambda x: x * 3.25)(jax.numpy.float32(2))
        assert compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_five_hundred_random_steps_leave_nothing_behind(small: Engine) -> None:
    random = np.random.default_rng(12)
    open_ones = list[tuple[Request, Iterator[Event]]]()
    subjects = random_requests(31, (1, 5, 20, 129, 140, 260))
    loop = small._running
    assert loop is not None
    for _ in range(500):
        what = random.random()
        if what < 0.45 or not open_ones:
            request = subjects[int(random.integers(len(subjects)))]
            if random.random() < 0.3:
                request = replace(request, deadline=time.monotonic() + random.random() * 0.05)
            open_ones.append((request, small.stream(request)))
            continue
        request, events = open_ones.pop(int(random.integers(len(open_ones))))
        if what < 0.75:
            for event in events:
                if random.random() < 0.3 or isinstance(event, Finished):
                    break
            events.close()  # pyright: ignore[reportAttributeAccessIssue]
        else:
            assert len(collect(request, events).choices) == request.params.n
    for request, events in open_ones:
        collect(request, events)
    wait_until(lambda: is_at_rest(small))
    worker = worker_of(small)
    assert worker.scheduler.num_free == 2
    held = (worker._sessions, worker._keys, worker._owners, worker._sources, loop._readers)
    assert [len(each) for each in held] == [0] * 5
    small.complete([2], SamplingParams(max_tokens=1))
    wait_until(lambda: is_at_rest(small))
    assert not loop._deadlines
    assert worker.prefix.statistics.stored_bytes <= 1 << 24
