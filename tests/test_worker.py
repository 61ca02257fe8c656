"""The worker over programs that compute nothing: what it keeps, asks for and lets go of.

So ten thousand steps take seconds, and every call of a program is checked against the others.
"""

import time
from dataclasses import replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refimpl.engine.events import Admitted, Event, Finished
from refimpl.engine.packing import ADMISSION_INTEGERS, SCORE_FIELDS, STEP_FIELDS
from refimpl.engine.programs import Programs
from refimpl.engine.request import Request
from refimpl.engine.session import Session
from refimpl.engine.worker import Worker
from tests.engines import CONTEXT, prompt_ids, random_requests, request_of, tiny_gemma
from tests.work import work_of

SLOTS = 5
BLOCK_BYTES = 4096


class FakePrograms(Programs):
    """Takes and gives what the programs do, and sees that each call fits to those before it."""

    @cached_property
    def filled(self) -> dict[int, int]:
        """How many positions of a prompt each slot holds."""
        return {}

    @cached_property
    def left(self) -> dict[int, int]:
        """How many tokens each slot may still make."""
        return {}

    @cached_property
    def block(self) -> jax.Array:
        """What a slot holds of any prompt."""
        return jnp.zeros((4, 16, 16), jnp.float32)

    @cached_property
    def random(self) -> np.random.Generator:
        return np.random.default_rng(0)

    def new_state(self) -> Any:
        return np.zeros(1)

    def warm_up(self, state: Any) -> Any:
        return iter(())

    @cached_property
    def prefill(self) -> Any:
        def run(_: Any, state: Any, packed: np.ndarray) -> Any:
            slot, start, count = (int(value) for value in packed[:3])
            assert start == 0 or self.filled[slot] == start
            self.filled[slot] = start + count
            self.left.pop(slot, None)
            return state, self.block

        return run

    @cached_property
    def score(self) -> Any:
        return lambda _, stream, targets: np.zeros((len(targets), SCORE_FIELDS), np.int32)

    @cached_property
    def bias(self) -> Any:
        return lambda _, state, slot, bias, in_prompt: state

    @cached_property
    def fork(self) -> Any:
        def run(_: Any, state: Any, packed: np.ndarray) -> Any:
            source, to = (int(value) for value in packed)
            assert source != to
            self.filled[to] = self.filled.get(source, 0)
            return state

        return run

    @cached_property
    def save(self) -> Any:
        def run(_: Any, state: Any, packed: np.ndarray) -> Any:
            slot, start = (int(value) for value in packed)
            assert self.filled[slot] == start + 128
            return {"keys": (self.block,), "values": ()}

        return run

    @cached_property
    def load(self) -> Any:
        def run(_: Any, state: Any, packed: np.ndarray, block: Any) -> Any:
            slot, start = (int(value) for value in packed)
            assert start == 0 or self.filled[slot] == start
            assert block["keys"][0] is self.block
            self.filled[slot] = start + 128
            return state

        return run

    @cached_property
    def reset(self) -> Any:
        def run(_: Any, state: Any, slot: np.ndarray) -> Any:
            self.left.pop(int(slot[0]), None)
            return state

        return run

    @cached_property
    def admit(self) -> Any:
        def run(_: Any, state: Any, packed: np.ndarray) -> Any:
            given = dict(zip(ADMISSION_INTEGERS, packed.tolist(), strict=False))
            slot = given["slot"]
            assert given["position"] == 0 or self.filled[slot] == given["position"]
            self.left[slot] = given["last_position"] - given["position"]
            return state

        return run

    @cached_property
    def decode(self) -> Any:
        def run(_: Any, state: Any, packed: np.ndarray) -> Any:
            steps, slots = int(packed[0]), packed[1:].tolist()
            named = [slot for slot in slots if slot >= 0]
            assert 1 <= steps <= self.max_steps
            assert len(set(named)) == len(named) > 0
            rows = np.full((self.max_steps, len(slots), STEP_FIELDS), -1, np.int32)
            for step in range(steps):
                for place, slot in enumerate(slots):
                    if slot >= 0:
                        rows[step, place] = self._row(slot)
            return state, rows

        return run

    def _row(self, slot: int) -> np.ndarray:
        self.left[slot] -= 1
        row = np.full(STEP_FIELDS, -1, np.int32)
        row[:3] = self.random.integers(3, 500), self.left[slot] > 0, self.random.random() > 0.02
        row[3:4] = np.array([-1], np.float32).view(np.int32)
        return row


class FakeDesk:
    """A worker over fake programs, and all that came of it."""

    def __init__(self, *, steps: int = 4) -> None:
        self.gemma = tiny_gemma("gemma3")
        self.programs = FakePrograms(
            gemma=self.gemma, slots=SLOTS, context=CONTEXT, max_steps=steps
        )
        self.worker = Worker(self.programs, prefix_bytes=5 * BLOCK_BYTES, emit=self._emit)
        assert list(self.worker.start()) == []
        self.running = dict[int, set[int]]()
        self.deliveries = dict[int, list[list[Event]]]()
        self.num_submitted = self.num_finished = 0

    def submit(self, request: Request) -> int:
        key = self.num_submitted
        self.num_submitted += 1
        self.running[key] = set(range(request.params.num_candidates))
        self.deliveries[key] = []
        self.worker.submit(key, Session(request, self.gemma.tokenizer, self.gemma.eos_ids))
        return key

    def admissions(self, key: int) -> list[Admitted]:
        """That were told of a request, each of which must begin what comes of it."""
        assert [] not in self.deliveries[key]
        told = [
            (number, place, event)
            for number, events in enumerate(self.deliveries[key])
            for place, event in enumerate(events)
            if isinstance(event, Admitted)
        ]
        assert all((number, place) == (0, 0) for number, place, _ in told)
        # Never by itself, for that would wake up whoever reads.
        assert all(len(events) > 1 for events in self.deliveries[key][: len(told)])
        return [event for _, _, event in told]

    def _emit(self, key: int, events: list[Event]) -> None:
        if events:
            self.deliveries[key].append(events)
        for event in events:
            if isinstance(event, Finished):
                # No choice ends twice.
                self.running[key].remove(event.choice)
        if events and not self.running[key]:
            del self.running[key]
            self.num_finished += 1
            assert not self.worker.is_in_flight(key)


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


def sound_desk(*, steps: int = 4) -> FakeDesk:
    """One whose numbers are always finite."""
    desk = FakeDesk(steps=steps)
    run = desk.programs.decode

    def decode(parameters: Any, state: Any, packed: np.ndarray) -> Any:
        state, rows = run(parameters, state, packed)
        rows[:, :, 2] = True
        return state, rows

    desk.programs.__dict__["decode"] = decode
    return desk


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


class BreakingPrograms(FakePrograms):
    """Ones whose numbers break down from a word on."""

    @cached_property
    def breaks(self) -> list[bool]:
        return [False]

    @cached_property
    def resets(self) -> list[int]:
        """Which slots were cleared."""
        return []

    @cached_property
    def reset(self) -> Any:
        def run(_: Any, state: Any, slot: np.ndarray) -> Any:
            self.resets.append(int(slot[0]))
            return state

        return run

    def _row(self, slot: int) -> np.ndarray:
        row = super()._row(slot)
        row[2] = not self.breaks[0]
        return row


def test_what_broke_down_for_a_request_that_had_ended_is_cleared() -> None:
    gemma = tiny_gemma("gemma3")
    programs = BreakingPrograms(gemma=gemma, slots=2, context=CONTEXT)
    worker = Worker(programs, prefix_bytes=0, emit=lambda key, events: None)
    list(worker.start())

    def submit(key: int) -> None:
        request = request_of(prompt_ids(key, 3), max_tokens=50, seed=1, ignore_eos=True)
        worker.submit(key, Session(request, gemma.tokenizer, gemma.eos_ids))

    submit(0)
    # Admitted, prefilled and activated; then one call is read, and the next one under way.
    for _ in range(4):
        worker.step()
    programs.breaks[0] = True
    worker.step()
    worker.cancel(0)
    programs.breaks[0] = False
    assert programs.resets == []
    submit(1)
    worker.step()
    assert programs.resets == [0]
    assert worker.is_in_flight(1)
