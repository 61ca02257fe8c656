"""Programs that compute nothing, and a worker over them: each call is checked against others."""

from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from refimpl.engine.events import Admitted, Event, Finished
from refimpl.engine.packing import ADMISSION_INTEGERS, SCORE_FIELDS, STEP_FIELDS
from refimpl.engine.programs import Programs
from refimpl.engine.request import Request
from refimpl.engine.session import Session
from refimpl.engine.worker import Worker
from tests.engines import CONTEXT, tiny_gemma

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
            source, to, length = (int(value) for value in packed)
            assert source != to
            # A prompt of one token has nothing prefilled; a slot has what was there before.
            assert length == 0 or self.filled[source] == length
            self.filled[to] = length
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
