"""The worker over programs that compute nothing: what it keeps, asks for and lets go of.

So ten thousand steps take seconds, and every call of a program is checked against the others.
"""

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from refimpl.engine.events import Admitted, Finished
from refimpl.engine.packing import SCORE_FIELDS, STEP_FIELDS
from tests.engines import prompt_ids, random_requests, request_of
from tests.fake_programs import BLOCK_BYTES, SLOTS, FakeDesk, sound_desk
from tests.work import work_of


def test_ten_thousand_random_steps_leave_nothing_behind() -> None:
    random = np.random.default_rng(3)
    desk = FakeDesk()
    subjects = random_requests(40, (1, 2, 20, 128, 129, 130, 200, 257, 258, 300))
    subjects += [request_of(prompt_ids(1, length), max_tokens=0) for length in (1, 130)]
    subjects += [
        request_of(prompt_ids(1, length), prompt_logprobs=1, max_tokens=0) for length in (1, 130)
    ]
    subjects += [request_of(prompt_ids(2, 140), max_tokens=2, n=13)]
    most_waiting = 0
    for _ in range(10_000):
        what = random.random()
        if what < 0.13:
            desk.submit(subjects[int(random.integers(len(subjects)))])
        elif what < 0.2 and desk.running:
            keys = list(desk.running)
            desk.worker.cancel(keys[int(random.integers(len(keys)))], "cancelled")
            desk.worker.cancel(-1)
        else:
            desk.worker.step()
        scheduler = desk.worker.scheduler
        most_waiting = max(most_waiting, scheduler.num_waiting)
        assert desk.worker.num_in_flight == len(desk.running)
        assert len(desk.worker._owners) + scheduler.num_free <= SLOTS
    assert desk.num_submitted > 1000
    assert most_waiting > 10
    while desk.worker.step():
        pass
    assert desk.num_finished == desk.num_submitted
    assert desk.worker.scheduler.is_idle
    assert desk.worker.scheduler.num_free == SLOTS
    assert not desk.worker._sessions
    assert not desk.worker._keys
    assert not desk.worker._owners
    assert not desk.worker._sources
    statistics = desk.worker.prefix.statistics
    assert statistics.stored_bytes == statistics.blocks * BLOCK_BYTES <= 5 * BLOCK_BYTES
    assert statistics.hits > 100
    assert statistics.evictions > 10


def test_a_request_is_told_once_that_it_has_a_slot_with_the_first_that_comes_of_it() -> None:
    desk, ids = sound_desk(), prompt_ids(1, 300)
    # Each with the tokens that it finds in the cache, of those that ran before it.
    asked = [
        (request_of(ids, max_tokens=3), 0),
        (request_of(ids, max_tokens=3, n=SLOTS + 2), 256),
        (request_of(ids[:150], max_tokens=3), 128),
        (request_of(ids[:128], max_tokens=3), 0),
        (request_of(ids, max_tokens=3, prompt_logprobs=0), 0),
        (request_of(ids, max_tokens=0, prompt_logprobs=0), 0),
        (request_of([2], max_tokens=3), 0),
    ]
    for request, cached in asked:
        before = time.monotonic()
        key = desk.submit(request)
        while desk.worker.step():
            pass
        [admitted] = desk.admissions(key)
        assert admitted.cached_tokens == cached
        assert before <= admitted.at <= time.monotonic()


def test_who_never_had_a_slot_is_told_of_none() -> None:
    desk = FakeDesk()
    running = desk.submit(request_of([2], max_tokens=300, n=SLOTS, ignore_eos=True))
    waiting = desk.submit(request_of(prompt_ids(1, 20), max_tokens=9))
    computed = desk.submit(request_of(prompt_ids(1, 20), max_tokens=0))
    for _ in range(3):
        desk.worker.step()
    for key in (running, waiting):
        desk.worker.cancel(key)
    assert [len(desk.admissions(key)) for key in (running, waiting, computed)] == [1, 0, 0]


def test_one_that_ends_before_its_first_token_is_told_of_its_slot_with_the_end() -> None:
    desk = FakeDesk()
    key = desk.submit(request_of(prompt_ids(1, 300), max_tokens=9, n=2))
    for _ in range(2):  # It is admitted, and the first chunk of its prompt is computed.
        desk.worker.step()
    assert desk.deliveries[key] == []
    desk.worker.cancel(key, "deadline")
    [[admitted, *ends]] = desk.deliveries[key]
    assert isinstance(admitted, Admitted)
    assert ends == [Finished(choice, "deadline", None, 0, None) for choice in (0, 1)]


def test_steps_are_counted_by_their_tokens() -> None:
    desk = sound_desk()
    desk.submit(request_of(prompt_ids(1, 201), max_tokens=6, n=3, ignore_eos=True))
    while desk.worker.step():
        pass
    # Two chunks; six steps of three choices, in calls of four.
    assert desk.worker.step_tokens == {128: 1, 72: 1, 3: 6}
    desk.submit(request_of(prompt_ids(1, 201), max_tokens=2, ignore_eos=True))
    desk.submit(request_of([2], max_tokens=1, ignore_eos=True))
    while desk.worker.step():
        pass
    # The first chunk was in the cache, and only what is computed counts.
    assert desk.worker.step_tokens == {128: 1, 72: 2, 3: 6, 1: 3}


def work_of_steps(num_queued: int) -> list[int]:
    """The work of each of forty steps while so many more wait."""
    desk = FakeDesk(steps=1)
    request = request_of(prompt_ids(1, 200), max_tokens=30, seed=1, ignore_eos=True)
    for number in range(SLOTS + num_queued):
        desk.submit(replace(request, id=str(number)))
    return [work_of(desk.worker.step) for _ in range(40)]


def test_a_thousand_waiting_requests_do_not_slow_a_step_down() -> None:
    work_of_steps(2)  # What is done once is done.
    assert work_of_steps(10) == work_of_steps(1000)


def test_prompts_that_begin_alike_are_computed_once() -> None:
    desk = FakeDesk()
    request = request_of(prompt_ids(1, 300), max_tokens=2, seed=1)
    for hits in (0, 2, 4):
        desk.submit(request)
        while desk.worker.step():
            pass
        assert desk.worker.prefix.statistics.hits == hits
    assert desk.worker.prefix.statistics.blocks == 2


def test_blocks_of_a_prompt_that_broke_down_are_not_kept() -> None:
    desk = FakeDesk()
    run, sound = desk.programs.decode, [True]

    def decode(parameters: Any, state: Any, packed: np.ndarray) -> Any:
        state, rows = run(parameters, state, packed)
        rows[:, :, 2] = sound[0]
        return state, rows

    desk.programs.__dict__["decode"] = decode
    for sound[0], length, blocks in ((True, 300, 2), (True, 140, 2), (False, 140, 0)):
        desk.submit(request_of(prompt_ids(1, 300)[:length], max_tokens=2, seed=1))
        while desk.worker.step():
            pass
        # The second block stands on the first, which both prompts have.
        assert desk.worker.prefix.statistics.blocks == blocks
    desk.programs.__dict__["score"] = lambda _, stream, targets: np.full(
        (len(targets), SCORE_FIELDS), np.float32("nan").view(np.int32), np.int32
    )
    desk.submit(request_of(prompt_ids(1, 300), max_tokens=0, prompt_logprobs=1))
    while desk.worker.step():
        pass
    assert desk.worker.prefix.statistics.blocks == 0
    assert desk.num_finished == desk.num_submitted


def test_what_needs_no_computing_waits_for_nobody_and_holds_nobody_up() -> None:
    desk = FakeDesk(steps=1)
    decoding = desk.submit(request_of([2], max_tokens=300, n=SLOTS, ignore_eos=True))
    for _ in range(1000):
        desk.submit(request_of([2], max_tokens=0, prompt_logprobs=3))
        desk.submit(request_of([2, 3, 4], max_tokens=0))
    assert desk.num_finished == 2000
    assert list(desk.running) == [decoding]
    assert desk.worker.scheduler.num_waiting == 1


def test_a_slot_that_breaks_down_behind_a_stop_string_is_reset() -> None:
    """The device does not know of stop strings: its later steps of the call are real ones."""
    desk = FakeDesk(steps=2)
    letter = desk.gemma.tokenizer.encode("e")[-1]
    assert desk.gemma.tokenizer.decode([letter]) == "e"

    def decode(_: Any, state: Any, packed: np.ndarray) -> Any:
        rows = np.full((2, len(packed) - 1, STEP_FIELDS), -1, np.int32)
        rows[:, 0, :3] = (letter, 1, 1), (letter, 0, 0)
        rows[:, 0, 3:4] = np.array([-1], np.float32).view(np.int32)
        return state, rows

    cleared = list[int]()
    reset = desk.programs.reset

    def noted(parameters: Any, state: Any, slot: np.ndarray) -> Any:
        cleared.append(int(slot[0]))
        return reset(parameters, state, slot)

    desk.programs.__dict__ |= {"decode": decode, "reset": noted}
    desk.submit(request_of(prompt_ids(1, 5), max_tokens=9, stop=("e",)))
    while desk.worker.step():
        pass
    assert desk.num_finished == 1
    # Once for this call, and once for the one that was sent ahead.
    assert cleared == [0, 0]


def noted(desk: FakeDesk, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by each call of decode that is sent, and each slot whose results are looked at."""
    log = list[str]()
    send, take = desk.worker._send, desk.worker._take

    def noted_send(action: Any) -> Any:
        log.append("send")
        return send(action)

    def noted_take(slot: int, rows: Any) -> int:
        log.append("take")
        return take(slot, rows)

    monkeypatch.setattr(desk.worker, "_send", noted_send)
    monkeypatch.setattr(desk.worker, "_take", noted_take)
    return log


def test_the_next_call_is_sent_before_results_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = sound_desk(steps=1)
    log = noted(desk, monkeypatch)
    desk.submit(request_of([2], max_tokens=3, ignore_eos=True))
    while desk.worker.step():
        pass
    # And none is sent that nobody could get a token of.
    assert log == ["send", "send", "take", "send", "take", "take"]


def test_what_was_computed_ahead_for_a_choice_that_has_ended_is_not_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = sound_desk(steps=1)
    log = noted(desk, monkeypatch)
    key = desk.submit(request_of([2], max_tokens=9, ignore_eos=True))
    while "take" not in log:
        desk.worker.step()
    desk.worker.cancel(key)
    assert not desk.running
    assert desk.worker.scheduler.num_free == SLOTS
    other = desk.submit(request_of([2], max_tokens=2, ignore_eos=True))
    while desk.worker.step():
        pass
    assert log == ["send", "send", "take", *["send", "send", "take", "take"]]
    assert len(desk.deliveries[other]) == 2


def test_what_broke_down_for_a_request_that_had_ended_is_cleared() -> None:
    desk, cleared = sound_desk(steps=1), list[int]()
    sound = desk.programs.decode

    def broken(parameters: Any, state: Any, packed: np.ndarray) -> Any:
        state, rows = sound(parameters, state, packed)
        rows[:, :, 2] = False
        return state, rows

    def reset(_: Any, state: Any, slot: np.ndarray) -> Any:
        cleared.append(int(slot[0]))
        return state

    desk.programs.__dict__["reset"] = reset
    first = desk.submit(request_of(prompt_ids(1, 3), max_tokens=50, ignore_eos=True))
    # Admitted, prefilled and activated; then one call is read, and the next one under way.
    for _ in range(4):
        desk.worker.step()
    desk.programs.__dict__["decode"] = broken
    desk.worker.step()
    desk.programs.__dict__["decode"] = sound
    desk.worker.cancel(first)
    second = desk.submit(request_of(prompt_ids(2, 3), max_tokens=50, ignore_eos=True))
    assert cleared == []
    desk.worker.step()
    assert cleared == [0]
    assert desk.worker.is_in_flight(second)
