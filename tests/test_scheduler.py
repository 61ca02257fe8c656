"""The scheduler by traces: what it decides, in which order, and what it never does.

Chunks here are of four tokens. A trace spells actions as "admit a 0>1" (choice 0 into slot 1),
"prefill a @1 4+3" (three tokens from position 4 on, in slot 1), "activate a @1 0>1" and
"decode 1,2 x4" (four steps of slots 1 and 2).
"""

import string
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from refimpl.engine.scheduler import Action, Activate, Admit, Decode, Prefill, Scheduler
from tests.work import work_of

CHUNK = 4


@dataclass(frozen=True)
class Piece:
    """A chunk."""

    start: int
    count: int


def cut(length: int, start: int) -> list[Piece]:
    return [Piece(at, min(CHUNK, length - at)) for at in range(start, length, CHUNK)]


class Driver:
    """A scheduler whose requests are letters, and whose actions cost nothing."""

    def __init__(self, *, slots: int, max_width: int | None = None, max_steps: int = 1) -> None:
        self.scheduler = Scheduler(
            slots=slots, cut=cut, max_width=max_width or slots, max_steps=max_steps
        )
        self.cached: dict[str, int] = {}

    def submit(self, name: str, *, length: int = 0, choices: int = 1) -> None:
        self.scheduler.submit(
            string.ascii_lowercase.index(name), prompt_length=length, choices=range(choices)
        )

    def cancel(self, name: str, choice: int = 0) -> int | None:
        return self.scheduler.cancel(string.ascii_lowercase.index(name), choice)

    def pause(self, name: str) -> None:
        self.scheduler.pause(string.ascii_lowercase.index(name))

    def resume(self, name: str) -> None:
        self.scheduler.resume(string.ascii_lowercase.index(name))

    def run(self, count: int) -> list[str]:
        """The next actions, spelt."""
        return [self._next() for _ in range(count)]

    def _next(self) -> str:
        action = self.scheduler.next()
        if isinstance(action, Admit):
            start = self.cached.get(string.ascii_lowercase[action.key], 0)
            self.scheduler.begin(action.key, start=start)
        return spelt(action)


def spelt(action: Action | None) -> str:
    match action:
        case None:
            return "nothing"
        case Admit(key, choices):
            return f"admit {_letter(key)} {_places(choices)}"
        case Prefill(key, slot, chunk):
            return f"prefill {_letter(key)} @{slot} {chunk.start}+{chunk.count}"
        case Activate(key, source, choices):
            return f"activate {_letter(key)} @{source} {_places(choices)}"
        case Decode(slots, steps):
            return f"decode {','.join(map(str, slots))} x{steps}"


def _letter(key: int) -> str:
    return string.ascii_lowercase[key]


def _places(choices: Sequence[tuple[int, int]]) -> str:
    return " ".join(f"{choice}>{slot}" for choice, slot in choices)


def test_nothing_to_do() -> None:
    driver = Driver(slots=2)
    assert driver.run(2) == ["nothing", "nothing"]
    assert driver.scheduler.is_idle
    assert (driver.scheduler.num_free, driver.scheduler.num_waiting) == (2, 0)


def test_a_prompt_is_prefilled_in_chunks_and_then_decoded() -> None:
    driver = Driver(slots=2)
    driver.submit("a", length=10)
    assert driver.run(7) == [
        "admit a 0>0",
        "prefill a @0 0+4",
        "prefill a @0 4+4",
        "prefill a @0 8+2",
        "activate a @0 0>0",
        "decode 0 x1",
        "decode 0 x1",
    ]
    driver.scheduler.finish(0)
    assert driver.run(1) == ["nothing"]
    assert driver.scheduler.is_idle


def test_what_is_in_the_prefix_cache_is_not_prefilled() -> None:
    driver = Driver(slots=1)
    driver.cached = {"a": 8, "b": 8}
    driver.submit("a", length=10)
    driver.submit("b", length=8)
    assert driver.run(4) == [
        "admit a 0>0", "prefill a @0 8+2", "activate a @0 0>0", "decode 0 x1",
    ]  # fmt: skip
    driver.scheduler.finish(0)
    assert driver.run(3) == ["admit b 0>0", "activate b @0 0>0", "decode 0 x1"]


def test_first_come_first_served_even_if_a_later_one_is_shorter() -> None:
    driver = Driver(slots=1)
    driver.submit("a", length=5)
    driver.submit("b", length=9)
    driver.submit("c")
    served = []
    while not driver.scheduler.is_idle:
        (action,) = driver.run(1)
        if action.startswith("admit"):
            served.append(action)
        if action.startswith("decode"):
            driver.scheduler.finish(0)
    assert served == ["admit a 0>0", "admit b 0>0", "admit c 0>0"]


def test_one_chunk_between_two_calls_of_decode() -> None:
    driver = Driver(slots=2)
    driver.submit("a")
    driver.run(3)
    driver.submit("b", length=9)
    assert driver.run(9) == [
        "admit b 0>1",
        "prefill b @1 0+4",
        "decode 0 x1",
        "prefill b @1 4+4",
        "decode 0 x1",
        "prefill b @1 8+1",
        "decode 0 x1",
        "activate b @1 0>1",
        "decode 0,1 x1",
    ]


def test_prompts_take_turns_with_their_chunks() -> None:
    driver = Driver(slots=3)
    driver.submit("a", length=12)
    driver.submit("b", length=8)
    driver.submit("c", length=4)
    assert driver.run(12) == [
        "admit a 0>0",
        "admit b 0>1",
        "admit c 0>2",
        "prefill a @0 0+4",
        "prefill b @1 0+4",
        "prefill c @2 0+4",
        "prefill a @0 4+4",
        "prefill b @1 4+4",
        "activate c @2 0>2",
        # Now somebody decodes, and the prompts still take turns.
        "decode 2 x1",
        "prefill a @0 8+4",
        "decode 2 x1",
    ]
    assert driver.run(3) == ["activate b @1 0>1", "activate a @0 0>0", "decode 2,1,0 x1"]


def test_all_choices_of_a_request_share_one_prefill() -> None:
    driver = Driver(slots=4)
    driver.submit("a", length=6, choices=3)
    driver.submit("b")
    assert driver.run(6) == [
        "admit a 0>0 1>1 2>2",
        "admit b 0>3",
        "prefill a @0 0+4",
        "activate b @3 0>3",
        "decode 3 x1",
        "prefill a @0 4+2",
    ]
    assert driver.run(3) == ["decode 3 x1", "activate a @0 0>0 1>1 2>2", "decode 3,0,1,2 x1"]


def test_choices_without_a_slot_come_first_and_find_their_prompt_cached() -> None:
    driver = Driver(slots=2)
    driver.submit("a", length=8, choices=5)
    driver.submit("b")
    assert driver.run(5) == [
        "admit a 0>0 1>1",
        "prefill a @0 0+4",
        "prefill a @0 4+4",
        "activate a @0 0>0 1>1",
        "decode 0,1 x1",
    ]
    assert driver.scheduler.num_waiting == 2
    driver.cached["a"] = 8
    driver.scheduler.finish(1)
    assert driver.run(3) == ["admit a 2>1", "activate a @1 2>1", "decode 0,1 x1"]
    driver.scheduler.finish(0)
    driver.scheduler.finish(1)
    assert driver.run(3) == ["admit a 3>0 4>1", "activate a @0 3>0 4>1", "decode 0,1 x1"]
    assert driver.scheduler.num_waiting == 1
    driver.scheduler.finish(0)
    assert driver.run(3) == ["admit b 0>0", "activate b @0 0>0", "decode 1,0 x1"]


def test_the_rest_of_a_request_waits_for_its_own_prompt_and_others_for_the_rest() -> None:
    driver = Driver(slots=2)
    driver.submit("a")
    driver.run(3)
    driver.submit("b", length=8, choices=2)
    driver.submit("c")
    assert driver.run(2) == ["admit b 0>1", "prefill b @1 0+4"]
    driver.scheduler.finish(0)
    # Slot 0 is free, but the prompt of "b" is not cached yet, and "c" came later.
    assert driver.run(2) == ["prefill b @1 4+4", "activate b @1 0>1"]
    driver.cached["b"] = 8
    assert driver.run(2) == ["admit b 1>0", "decode 1 x1"]
    assert driver.run(2) == ["activate b @0 1>0", "decode 1,0 x1"]


def test_many_steps_in_a_call_only_while_nobody_waits() -> None:
    driver = Driver(slots=1, max_steps=4)
    driver.submit("a")
    assert driver.run(3) == ["admit a 0>0", "activate a @0 0>0", "decode 0 x4"]
    driver.submit("b")
    assert driver.run(1) == ["decode 0 x1"]
    driver.cancel("b")
    assert driver.run(1) == ["decode 0 x4"]


def test_one_step_in_a_call_while_a_prompt_is_prefilled() -> None:
    driver = Driver(slots=2, max_steps=4)
    driver.submit("a")
    driver.run(3)
    driver.submit("b", length=6)
    assert driver.run(7) == [
        "admit b 0>1",
        "prefill b @1 0+4",
        "decode 0 x1",
        "prefill b @1 4+2",
        "decode 0 x1",
        "activate b @1 0>1",
        "decode 0,1 x4",
    ]


def test_more_slots_than_a_call_takes_go_round_robin() -> None:
    driver = Driver(slots=5, max_width=2)
    for name in "abcde":
        driver.submit(name)
    assert driver.run(10)[-1] == "activate e @4 0>4"
    assert driver.run(5) == [
        "decode 0,1 x1", "decode 2,3 x1", "decode 4,0 x1", "decode 1,2 x1", "decode 3,4 x1",
    ]  # fmt: skip
    driver.scheduler.finish(1)
    assert driver.run(2) == ["decode 0,2 x1", "decode 3,4 x1"]


def test_cancel_while_it_waits() -> None:
    driver = Driver(slots=1)
    for name in "abc":
        driver.submit(name)
    driver.run(3)
    assert driver.cancel("b") is None
    assert driver.scheduler.num_waiting == 1
    driver.scheduler.finish(0)
    assert driver.run(1) == ["admit c 0>0"]


def test_cancel_of_all_that_wait() -> None:
    driver = Driver(slots=1)
    driver.submit("a", choices=3)
    for choice in (1, 0, 2):
        assert driver.cancel("a", choice) is None
    assert driver.scheduler.is_idle
    assert driver.run(1) == ["nothing"]
    assert driver.scheduler.num_free == 1


def test_cancel_while_some_choices_wait() -> None:
    driver = Driver(slots=2)
    driver.submit("a", choices=4)
    driver.submit("b")
    driver.run(3)
    assert driver.cancel("a", 2) is None
    assert driver.cancel("a", 3) is None
    assert driver.scheduler.num_waiting == 1
    assert driver.cancel("a", 1) == 1
    assert driver.run(3) == ["admit b 0>1", "activate b @1 0>1", "decode 0,1 x1"]


def test_cancel_of_what_is_prefilled() -> None:
    driver = Driver(slots=1)
    driver.submit("a", length=9)
    driver.submit("b")
    assert driver.run(2) == ["admit a 0>0", "prefill a @0 0+4"]
    assert driver.cancel("a") is None
    assert driver.scheduler.num_free == 1
    assert driver.run(2) == ["admit b 0>0", "activate b @0 0>0"]


def test_cancel_of_a_copy_while_the_source_is_prefilled() -> None:
    driver = Driver(slots=3)
    driver.submit("a", length=5, choices=3)
    driver.run(2)
    assert driver.cancel("a", 1) is None
    assert driver.scheduler.num_free == 1
    assert driver.run(3) == ["prefill a @0 4+1", "activate a @0 0>0 2>2", "decode 0,2 x1"]


def test_cancel_of_the_choice_whose_slot_is_the_source() -> None:
    driver = Driver(slots=3)
    driver.submit("a", length=5, choices=3)
    driver.run(2)
    assert driver.cancel("a", 0) is None
    # The prompt is still needed there; the slot is free once it has been copied.
    assert driver.scheduler.num_free == 0
    assert driver.run(2) == ["prefill a @0 4+1", "activate a @0 1>1 2>2"]
    assert driver.scheduler.num_free == 1
    driver.submit("b")
    assert driver.run(2) == ["admit b 0>0", "decode 1,2 x1"]
    assert driver.run(2) == ["activate b @0 0>0", "decode 1,2,0 x1"]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_cancel_of_every_choice_while_the_prompt_is_prefilled(order: tuple[int, ...]) -> None:
    driver = Driver(slots=3)
    driver.submit("a", length=5, choices=3)
    driver.run(2)
    for choice in order:
        assert driver.cancel("a", choice) is None
    assert driver.scheduler.num_free == 3
    assert driver.scheduler.is_idle
    assert driver.run(1) == ["nothing"]


def test_cancel_while_it_decodes() -> None:
    driver = Driver(slots=2)
    driver.submit("a", choices=2)
    driver.run(3)
    assert driver.cancel("a", 1) == 1
    assert driver.scheduler.num_free == 1
    assert driver.run(1) == ["decode 0 x1"]
    assert driver.cancel("a", 1) is None
    assert driver.cancel("a", 0) == 0
    assert driver.scheduler.is_idle


def test_cancel_of_what_nobody_knows() -> None:
    driver = Driver(slots=1)
    assert driver.cancel("z") is None
    driver.submit("a")
    assert driver.cancel("a", 7) is None
    assert driver.run(1) == ["admit a 0>0"]


def test_what_is_paused_sits_out_and_keeps_its_slots() -> None:
    driver = Driver(slots=4, max_steps=8)
    driver.submit("a", choices=2)
    driver.submit("b")
    assert driver.run(5)[-1] == "decode 0,1,2 x8"
    driver.pause("a")
    assert driver.run(2) == ["decode 2 x8", "decode 2 x8"]
    assert (driver.scheduler.num_free, driver.scheduler.num_paused) == (1, 1)
    driver.resume("a")
    assert driver.run(1) == ["decode 2,0,1 x8"]
    assert driver.scheduler.num_paused == 0


def test_when_all_is_paused_there_is_nothing_to_do() -> None:
    driver = Driver(slots=1)
    driver.submit("a")
    driver.run(3)
    driver.pause("a")
    assert driver.scheduler.is_idle
    assert driver.run(2) == ["nothing", "nothing"]
    driver.resume("a")
    assert not driver.scheduler.is_idle
    assert driver.run(1) == ["decode 0 x1"]


def test_what_waits_for_the_slot_of_a_paused_request_gives_nothing_to_do() -> None:
    driver = Driver(slots=1)
    driver.submit("a")
    driver.submit("b")
    driver.run(3)
    driver.pause("a")
    assert driver.scheduler.is_idle
    assert driver.run(1) == ["nothing"]
    assert driver.cancel("a") == 0
    assert not driver.scheduler.is_idle
    assert driver.run(3)[-1] == "decode 0 x1"


def test_choices_of_a_paused_request_do_not_wait_in_front_of_others() -> None:
    driver = Driver(slots=2, max_steps=8)
    driver.submit("a", choices=4)
    driver.submit("b")
    driver.submit("c")
    assert driver.run(3)[-1] == "decode 0,1 x1"
    driver.pause("a")
    assert driver.scheduler.num_waiting == 2
    # Of a step's slots some may end after the request was paused.
    driver.scheduler.finish(0)
    assert driver.run(3) == ["admit b 0>0", "activate b @0 0>0", "decode 0 x1"]
    driver.scheduler.finish(1)
    driver.resume("a")
    # It came before c.
    assert driver.run(3) == ["admit a 2>1", "activate a @1 2>1", "decode 0,1 x1"]
    driver.scheduler.finish(0)
    assert driver.run(1) == ["admit a 3>0"]


def test_a_prompt_is_prefilled_while_its_request_is_paused() -> None:
    driver = Driver(slots=2)
    driver.submit("a", length=5, choices=3)
    driver.submit("b", length=3)
    driver.run(3)
    driver.pause("a")
    assert driver.run(2) == ["activate a @0 0>0 1>1", "nothing"]
    assert driver.cancel("a", 1) == 1
    assert driver.run(4) == [
        "admit b 0>1", "prefill b @1 0+3", "activate b @1 0>1", "decode 1 x1",
    ]  # fmt: skip
    driver.resume("a")
    assert driver.run(1) == ["decode 1,0 x1"]


def test_cancel_while_it_is_paused() -> None:
    driver = Driver(slots=2)
    driver.submit("a", choices=4)
    driver.run(3)
    driver.pause("a")
    assert [driver.cancel("a", choice) for choice in (2, 0, 3, 1)] == [None, 0, None, 1]
    assert driver.scheduler.num_free == 2
    driver.resume("a")
    assert (driver.scheduler.num_paused, driver.scheduler.num_waiting) == (0, 0)
    assert driver.run(1) == ["nothing"]


def test_to_pause_or_resume_twice_is_to_do_it_once() -> None:
    driver = Driver(slots=1)
    driver.submit("a", choices=2)
    driver.run(3)
    for _ in range(2):
        driver.pause("a")
    assert (driver.scheduler.num_paused, driver.scheduler.num_waiting) == (1, 0)
    for _ in range(2):
        driver.resume("a")
    assert (driver.scheduler.num_paused, driver.scheduler.num_waiting) == (0, 1)
    assert driver.run(1) == ["decode 0 x1"]


def _work_of_a_day(num_queued: int) -> list[int]:
    """The work of each decision while so many wait: decode, admit, prefill, cancel, submit."""
    scheduler = Scheduler(slots=2, cut=cut, max_width=2)
    for key in range(2 + num_queued):
        scheduler.submit(key, prompt_length=9, choices=range(3))
    work = []
    for number in range(60):
        actions = list[Action | None]()
        work.append(work_of(lambda actions=actions: actions.append(scheduler.next())))
        (action,) = actions
        if isinstance(action, Admit):
            work.append(work_of(lambda key=action.key: scheduler.begin(key, start=0)))
        if isinstance(action, Decode) and number % 3 == 0:
            work.append(work_of(lambda slot=action.slots[0]: scheduler.finish(slot)))
        if number % 10 == 5:
            # From the middle of the queue, and a new one at its end.
            key = num_queued // 2 + number
            work += [work_of(lambda c=c, key=key: scheduler.cancel(key, c)) for c in range(3)]
            key = 10_000 + number
            new = {"prompt_length": 1, "choices": range(2)}
            work.append(work_of(lambda key=key, new=new: scheduler.submit(key, **new)))
    return work


def test_decisions_do_not_depend_on_how_many_wait() -> None:
    few, many = _work_of_a_day(200), _work_of_a_day(20_000)
    assert few == many


def test_what_is_cancelled_behind_one_that_waits_leaves_nothing_behind() -> None:
    driver = Driver(slots=1)
    driver.submit("a")
    driver.run(3)
    driver.submit("b")
    before = _held(driver.scheduler)
    for _ in range(1000):
        driver.submit("c", choices=2)
        driver.cancel("c", 0)
        driver.cancel("c", 1)
    assert _held(driver.scheduler) == before


def _held(scheduler: Scheduler) -> int:
    """Entries in all of its containers."""
    containers = [held for held in vars(scheduler).values() if hasattr(held, "__len__")]
    assert containers
    return sum(len(held) for held in containers)


@dataclass
class Known:
    """What must be true of one request."""

    number: int
    length: int
    waiting: list[int]
    prefilling: dict[int, int] = field(default_factory=dict[int, int])
    source: int | None = None
    filled: int = 0
    decoding: dict[int, int] = field(default_factory=dict[int, int])
    was_prefilled: bool = False
    is_paused: bool = False

    @property
    def queues(self) -> bool:
        return bool(self.waiting) and not self.is_paused


class SchedulerMachine(RuleBasedStateMachine):
    """Any course of submissions, pauses and ends, against a model of who holds what."""

    def __init__(self) -> None:
        super().__init__()
        self.slots, self.width = 5, 3
        self.scheduler = Scheduler(slots=self.slots, cut=cut, max_width=self.width, max_steps=4)
        self.known = dict[int, Known]()
        self.held = dict[int, int]()
        self.key = 0
        self.queue = list[int]()
        self.chunks_since_decode = 0
        self.waits = dict[int, int]()

    @rule(length=st.integers(0, 14), choices=st.integers(1, 8))
    def submit(self, length: int, choices: int) -> None:
        self.scheduler.submit(self.key, prompt_length=length, choices=range(choices))
        self.known[self.key] = Known(self.key, length, list(range(choices)))
        self.queue.append(self.key)
        self.key += 1

    @rule(times=st.integers(1, 6))
    def run(self, times: int) -> None:
        for _ in range(times):
            self._step()

    @precondition(lambda self: any(one.decoding for one in self.known.values()))
    @rule(data=st.data())
    def pause(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from([k for k in self.known.values() if k.decoding]))
        self.scheduler.pause(one.number)
        one.is_paused = True
        self._unqueue(one)
        for slot in one.decoding:
            self.waits.pop(slot, None)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def resume(self, data: st.DataObject) -> None:
        self._resume(self.known[data.draw(st.sampled_from(sorted(self.known)))])

    @precondition(lambda self: any(one.decoding for one in self.known.values()))
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from([s for k in self.known.values() for s in k.decoding]))
        self.scheduler.finish(slot)
        self._free_decoding(slot)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.known)))
        one = self.known[key]
        choices = [*one.waiting, *one.prefilling, *one.decoding.values()]
        self._cancel(one, data.draw(st.sampled_from(choices)))

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def cancel_all(self, data: st.DataObject) -> None:
        one = self.known[data.draw(st.sampled_from(sorted(self.known)))]
        choices = [*one.waiting, *one.prefilling, *one.decoding.values()]
        for choice in data.draw(st.permutations(choices)):
            self._cancel(one, choice)

    @invariant()
    def every_slot_is_in_one_place(self) -> None:
        assert self.scheduler.num_free == self.slots - len(self.held)
        assert self.scheduler.is_idle == self._is_idle()
        assert self.scheduler.num_waiting == len(self.queue)
        assert self.queue == [k for k in self.queue if self.known[k].queues]
        assert self.scheduler.num_paused == sum(k.is_paused for k in self.known.values())

    def teardown(self) -> None:
        for one in self.known.values():
            self._resume(one)
        for _ in range(10_000):
            if self.scheduler.is_idle:
                break
            action = self._step()
            if isinstance(action, Decode):
                for slot in action.slots:
                    self.scheduler.finish(slot)
                    self._free_decoding(slot)
        assert self.scheduler.is_idle
        assert self.scheduler.num_free == self.slots
        assert not self.known
        assert self.scheduler.next() is None
        assert _held(self.scheduler) == self.slots

    def _is_idle(self) -> bool:
        has_room = len(self.held) < self.slots
        return not (self.queue and has_room) and not any(
            one.prefilling or (one.decoding and not one.is_paused) for one in self.known.values()
        )

    def _unqueue(self, one: Known) -> None:
        if one.number in self.queue:
            self.queue.remove(one.number)

    def _resume(self, one: Known) -> None:
        self.scheduler.resume(one.number)
        if one.is_paused:
            one.is_paused = False
            if one.waiting:
                self.queue.insert(0, one.number)
            self.waits |= dict.fromkeys(one.decoding, 0)

    def _cancel(self, one: Known, choice: int) -> None:
        freed = self.scheduler.cancel(one.number, choice)
        if choice in one.waiting:
            one.waiting.remove(choice)
            if not one.waiting:
                self._unqueue(one)
            assert freed is None
        elif choice in one.prefilling:
            slot = one.prefilling.pop(choice)
            if slot != one.source:
                del self.held[slot]
            if not one.prefilling:
                assert one.source is not None
                del self.held[one.source]
                one.source = None
            assert freed is None
        else:
            slot = next(slot for slot, c in one.decoding.items() if c == choice)
            assert freed == slot
            self._free_decoding(slot)
        self._forget_if_ended(one)

    def _step(self) -> Action | None:
        action = self.scheduler.next()
        match action:
            case None:
                # Nothing to do although somebody waits would be the end of them.
                assert self._is_idle()
            case Admit():
                self._admitted(action)
            case Prefill():
                self._prefilled(action)
            case Activate():
                self._activated(action)
            case Decode():
                self._decoded(action)
        return action

    def _admitted(self, action: Admit) -> None:
        one = self.known[action.key]
        assert one.number == self.queue[0], "first come, first served"
        assert one.source is None, "one prefill of a request at a time"
        assert [choice for choice, _ in action.choices] == one.waiting[: len(action.choices)]
        free = self.slots - len(self.held)
        assert len(action.choices) == min(free, len(one.waiting))
        one.waiting = one.waiting[len(action.choices) :]
        if not one.waiting:
            self._unqueue(one)
        for choice, slot in action.choices:
            assert slot not in self.held
            assert 0 <= slot < self.slots
            self.held[slot] = action.key
            one.prefilling[choice] = slot
        one.source = action.choices[0][1]
        # Once prefilled, whole chunks are cached.
        one.filled = one.length // CHUNK * CHUNK if one.was_prefilled else 0
        self.scheduler.begin(action.key, start=one.filled)

    def _prefilled(self, action: Prefill) -> None:
        one = self.known[action.key]
        assert action.slot == one.source
        assert action.chunk.start == one.filled
        one.filled += action.chunk.count
        self.chunks_since_decode += 1
        if any(k.decoding and not k.is_paused for k in self.known.values()):
            assert self.chunks_since_decode <= 1, "one chunk between two calls of decode"

    def _activated(self, action: Activate) -> None:
        one = self.known[action.key]
        assert one.filled == one.length
        assert action.source == one.source
        assert action.choices == tuple(one.prefilling.items())
        if one.source not in one.prefilling.values():
            del self.held[action.source]
        for choice, slot in action.choices:
            one.decoding[slot] = choice
            if not one.is_paused:
                self.waits[slot] = 0
        one.prefilling, one.source, one.was_prefilled = {}, None, True
        # Others may have been prefilled before anybody decoded.
        self.chunks_since_decode = 0

    def _decoded(self, action: Decode) -> None:
        decoding = {
            slot for one in self.known.values() if not one.is_paused for slot in one.decoding
        }
        assert len(set(action.slots)) == len(action.slots) == min(len(decoding), self.width)
        assert set(action.slots) <= decoding
        busy = any(one.queues or one.prefilling for one in self.known.values())
        assert action.steps == (1 if busy else 4)
        self.chunks_since_decode = 0
        for slot in decoding:
            self.waits[slot] = 0 if slot in action.slots else self.waits[slot] + 1
            # Five slots in calls of three: nobody sits out twice in a row.
            assert self.waits[slot] <= 1

    def _free_decoding(self, slot: int) -> None:
        one = next(one for one in self.known.values() if slot in one.decoding)
        del one.decoding[slot], self.held[slot]
        self.waits.pop(slot, None)
        self._forget_if_ended(one)

    def _forget_if_ended(self, one: Known) -> None:
        if not (one.waiting or one.prefilling or one.decoding):
            # As the worker does when a request has ended.
            self.scheduler.resume(one.number)
            self.known.pop(one.number, None)


SchedulerMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, derandomize=True
)
test_any_course_of_events = SchedulerMachine.TestCase


def test_what_decodes_next_is_known_ahead_where_nobody_waits_for_a_slot() -> None:
    driver = Driver(slots=2, max_steps=4)
    assert driver.scheduler.decode_ahead() is None
    driver.submit("a")
    assert driver.scheduler.decode_ahead() is None, "a is to be admitted first"
    assert driver.run(2) == ["admit a 0>0", "activate a @0 0>0"]
    ahead = driver.scheduler.decode_ahead()
    assert spelt(ahead) == "decode 0 x4"
    assert driver.run(1) == ["decode 0 x4"], "and it is what comes"
    driver.submit("b", choices=2)
    assert driver.scheduler.decode_ahead() is None, "b has a slot to get"
    assert driver.run(2) == ["admit b 0>1", "activate b @1 0>1"]
    assert driver.scheduler.decode_ahead() is None, "one of b still waits for a slot"


def test_nothing_is_known_ahead_where_slots_take_turns() -> None:
    driver = Driver(slots=2, max_width=1)
    driver.submit("a", choices=2)
    assert driver.run(2) == ["admit a 0>0 1>1", "activate a @0 0>0 1>1"]
    assert driver.scheduler.decode_ahead() is None
