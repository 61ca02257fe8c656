"""Carries out what the scheduler decides: the only one to touch the device.

Owns the state on the device, the prefix cache and the sessions in flight. One call of `step` is
one action; it runs on the engine's thread.

While one call of decode computes, the next one of the same slots is sent after it, where nobody
waits for a slot. So the device does not wait for the host, which needs some milliseconds a call.
What the second call computes for a choice that the first one's results end is not looked at.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import Array
from refimpl_kernels.sampling import split_seed

from refimpl.engine.events import Event, FinishReason
from refimpl.engine.memory import release_freed
from refimpl.engine.packing import (
    StepRow,
    pack_admission,
    unpack_score,
    unpack_step,
)
from refimpl.engine.prefix import BlockKey, PrefixCache
from refimpl.engine.programs import Chunk, Programs, chunks_of
from refimpl.engine.scheduler import Activate, Admit, Decode, Prefill, Scheduler
from refimpl.engine.session import Session
from refimpl.engine.slots import Block
from refimpl.engine.state import DecodeState
from refimpl.model.cache import BLOCK

Emit = Callable[[int, list[Event]], None]

# On a CPU, blocks of prompts that come and go between other arrays leave holes in the memory that
# the C library keeps: 1,530 MB at the peak of a long load, 1,430 where they are given back at every
# fourth block. That takes 3 to 10 milliseconds, and to compute four blocks about a second (270M).
_BLOCKS_PER_RELEASE = 4


@dataclass(frozen=True)
class _Call:
    """A call of decode that was sent to the device.

    Attributes:
        owners: for each slot, in the order of the rows, the request and choice that had it.
        rows: what it gives.
        steps: how many steps it makes.
    """

    owners: dict[int, tuple[int, int]]
    rows: Any
    steps: int


class Worker:
    """Runs requests over one state. What comes of them goes to `emit`, by the request's key.

    Attributes:
        prefix: blocks of prompts that were computed.
        scheduler: says what to do next.
        step_tokens: how many steps, of prefill or decode, computed so many tokens.
    """

    def __init__(self, programs: Programs, *, prefix_bytes: int, emit: Emit) -> None:
        """Begin without a state; `start` makes one.

        Args:
            programs: what to run.
            prefix_bytes: budget of the prefix cache; 0 keeps nothing.
            emit: called on the thread that calls `step` and `cancel`.
        """
        self._programs, self._emit = programs, emit
        self._parameters = programs.gemma.parameters
        self._sessions = dict[int, Session]()
        self._keys = dict[int, list[BlockKey]]()
        self._owners = dict[int, tuple[int, int]]()
        # Where the prompts are that are being prefilled.
        self._sources = dict[int, int]()
        # Slots of which no step was read yet, so that nobody knows whether a number broke.
        self._unseen = set[int]()
        self._state: DecodeState | None = None
        self._under_way: _Call | None = None
        self._num_saved = 0
        self.step_tokens = Counter[int]()
        self.prefix = PrefixCache[Block](budget_bytes=prefix_bytes, salt="", block=BLOCK)
        self.scheduler = Scheduler(
            slots=programs.slots,
            cut=lambda length, start: chunks_of(length, start=start),
            max_width=programs.widths[-1],
            max_steps=programs.max_steps,
        )

    @property
    def num_in_flight(self) -> int:
        """Requests that have not ended."""
        return len(self._sessions)

    def is_in_flight(self, key: int) -> bool:
        """Whether a request has not ended."""
        return key in self._sessions

    def start(self, *, compile_all: bool = True) -> Iterator[tuple[str, int, int]]:
        """Make the state and compile every program; gives each one's name, number and how many.

        Args:
            compile_all: False makes the state alone and gives nothing.
        """
        # A first request needs no more than these, and would wait for the others.
        self._programs.read_ahead(*(() if compile_all else ("prefill", "decode", "admit")))
        state = self._programs.new_state()
        calls = list(self._programs.warm_up(state)) if compile_all else []
        for number, (name, call) in enumerate(calls):
            yield name, number, len(calls)
            state = call()
            release_freed()
        if compile_all:
            self.end_reading()
        self._state = jax.block_until_ready(state)

    def end_reading(self) -> None:
        """Forget programs that were read ahead and that nobody has asked for."""
        self._programs.end_reading()

    def submit(self, key: int, session: Session) -> None:
        """Put a request at the end of the queue."""
        self._sessions[key] = session
        params = session.request.params
        # The last token is decoded, and that needs no chunk.
        length = len(session.request.prompt_ids) - 1
        if params.max_tokens == 0 and not (session.awaits_score and length):
            # Nothing to compute. In the queue, many of these would keep others from decoding.
            scored = session.scored([]) if session.awaits_score else []
            self._emit(key, [*scored, *self._end_all(key, "length")])
            return
        # A prompt's score needs one slot only.
        choices = session.running if params.max_tokens else session.running[:1]
        self.scheduler.submit(key, prompt_length=length, choices=choices)

    def cancel(self, key: int, reason: FinishReason = "cancelled") -> None:
        """End a request, wherever it is; its slots are free for the next action."""
        session = self._sessions.get(key)
        if session is None:
            return
        for choice in session.running:
            slot = self.scheduler.cancel(key, choice)
            if slot is not None:
                del self._owners[slot]
                self._reset_if_unseen(slot)
        source = self._sources.pop(key, None)
        if source is not None:
            self._reset_if_unseen(source)
        self._emit(key, self._end_all(key, reason))

    def step(self) -> bool:
        """Do the next thing; False if there is nothing to do."""
        if self._under_way is not None:
            self._read(self._under_way)
            return True
        action = self.scheduler.next()
        match action:
            case None:
                return False
            case Admit():
                self._admit(action)
            case Prefill():
                self._prefill(action)
            case Activate():
                self._activate(action)
            case Decode():
                self._read(self._send(action))
        return True

    def _reset_if_unseen(self, slot: int) -> None:
        # Nobody has seen yet whether its numbers are finite, and zero times nan is nan.
        if slot in self._unseen:
            self._unseen.remove(slot)
            self._run(self._programs.reset, np.array([slot], np.int32))

    def _run(
        self, program: Callable[..., DecodeState], *arrays: np.ndarray | Array | Block
    ) -> None:
        assert self._state is not None, "start comes first"
        self._state = program(self._parameters, self._state, *jax.device_put(arrays))

    def _admit(self, action: Admit) -> None:
        session, slot = self._sessions[action.key], action.choices[0][1]
        request = session.request
        bias = _bias_of(session, self._programs.gemma.config.vocab_size)
        if bias is not None:
            self._run(self._programs.bias, np.array([slot], np.int32), *bias)
        self._sources[action.key] = slot
        self._unseen.add(slot)
        # Choices that found no slot then are admitted later.
        is_first = action.key not in self._keys
        keys = self.prefix.keys(request.prompt_ids[:-1])
        self._keys[action.key] = keys
        # What scores a prompt needs every position computed.
        blocks = [] if session.awaits_score else self.prefix.lookup(keys)
        for number, block in enumerate(blocks):
            place = np.array([slot, number * BLOCK], np.int32)
            self._run(self._programs.load, place, block)
        start = len(blocks) * BLOCK
        if is_first:
            session.admit(cached_tokens=start)
        self.scheduler.begin(action.key, start=start)

    def _prefill(self, action: Prefill) -> None:
        assert isinstance(action.chunk, Chunk)
        chunk, session = action.chunk, self._sessions[action.key]
        packed = np.zeros(3 + chunk.padded, np.int32)
        packed[:3] = action.slot, chunk.start, chunk.count
        end = chunk.start + chunk.count
        packed[3 : 3 + chunk.count] = session.request.prompt_ids[chunk.start : end]
        assert self._state is not None
        self._state, stream = self._programs.prefill(
            self._parameters, self._state, jax.device_put(packed)
        )
        self.step_tokens[chunk.count] += 1
        self._save(action, chunk)
        if session.awaits_score:
            self._score(action.key, session, chunk, stream)

    def _save(self, action: Prefill, chunk: Chunk) -> None:
        """Keep the chunk's block, if it is a whole one that is not kept yet."""
        keys = self._keys[action.key][: chunk.start // BLOCK + 1]
        if chunk.count < BLOCK or self.prefix.num_kept(keys) == len(keys):
            return
        place = np.array([action.slot, chunk.start], np.int32)
        block = self._programs.save(self._parameters, self._state, jax.device_put(place))
        nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(block))
        if not self.prefix.store(keys, block, nbytes=nbytes):
            return
        self._num_saved += 1
        if self._num_saved % _BLOCKS_PER_RELEASE == 0 and jax.default_backend() == "cpu":
            release_freed()

    def _score(self, key: int, session: Session, chunk: Chunk, stream: Array) -> None:
        targets = np.zeros(chunk.padded, np.int32)
        following = session.request.prompt_ids[chunk.start + 1 : chunk.start + 1 + chunk.count]
        targets[: chunk.count] = following
        rows = self._programs.score(self._parameters, stream, jax.device_put(targets))
        scored = [unpack_score(row) for row in jax.device_get(rows)[: chunk.count]]
        if all(math.isfinite(logprob) for logprob, _ in scored):
            self._emit(key, session.scored(scored))
        else:
            self.prefix.discard(self._keys[key])
            self.cancel(key, "error")

    def _activate(self, action: Activate) -> None:
        session = self._sessions[action.key]
        del self._sources[action.key]
        if session.awaits_score:  # A prompt of one token has nothing to compute.
            self._emit(action.key, session.scored([]))
        if session.request.params.max_tokens == 0:
            self.scheduler.finish(action.choices[0][1])
            self._emit(action.key, self._end_all(action.key, "length"))
            return
        # All copies are made before the source goes on and writes over what they need.
        for _, slot in action.choices:
            if slot != action.source:
                length = len(session.request.prompt_ids) - 1
                self._run(self._programs.fork, np.array([action.source, slot, length], np.int32))
                self._unseen.add(slot)
        for choice, slot in action.choices:
            self._owners[slot] = action.key, choice
            packed = pack_admission(
                slot=slot,
                prompt_ids=session.request.prompt_ids,
                params=session.request.params,
                seed=split_seed(session.seed),
                choice=choice,
                stop_ids=session.stop_ids,
                is_biased=_is_biased(session),
            )
            self._run(self._programs.admit, packed)

    def _send(self, action: Decode) -> _Call:
        width = next(width for width in self._programs.widths if width >= len(action.slots))
        packed = np.full(1 + width, -1, np.int32)
        packed[0] = action.steps
        packed[1 : 1 + len(action.slots)] = action.slots
        assert self._state is not None
        self._state, rows = self._programs.decode(
            self._parameters, self._state, jax.device_put(packed)
        )
        return _Call({slot: self._owners[slot] for slot in action.slots}, rows, action.steps)

    def _read(self, call: _Call) -> None:
        """Hand on what a call gives, for those that still have the slot that they had then."""
        ahead = self.scheduler.decode_ahead() if self._goes_on_after(call) else None
        self._under_way = None if ahead is None else self._send(ahead)
        fetched = jax.device_get(call.rows)[: call.steps]
        taken = list[int]()
        for place, (slot, owner) in enumerate(call.owners.items()):
            rows = [unpack_step(row) for row in fetched[:, place]]
            self._unseen.discard(slot)
            if self._owners.get(slot) == owner:
                taken.append(self._take(slot, rows))
            elif not all(row.is_finite for row in rows):
                # It ended while this was computed, and nobody has the slot yet.
                self._run(self._programs.reset, np.array([slot], np.int32))
        for step in range(max(taken, default=0)):
            self.step_tokens[sum(count > step for count in taken)] += 1

    def _goes_on_after(self, call: _Call) -> bool:
        """Whether some choice may get tokens after this call's."""
        return any(
            self._sessions[key].num_left(choice) > call.steps
            for slot, (key, choice) in call.owners.items()
            if self._owners.get(slot) == (key, choice)
        )

    def _take(self, slot: int, rows: list[StepRow]) -> int:
        """What the steps gave one slot; says how many of them were for it, until its end."""
        key, choice = self._owners[slot]
        session, events = self._sessions[key], list[Event]()
        taken = len(rows)
        for number, row in enumerate(rows, 1):
            if not row.is_finite:
                # It may come from a block of the prompt, and would be handed on with it.
                self.prefix.discard(self._keys[key])
            new, goes_on = session.push(choice, row)
            events += new
            if not goes_on:
                taken = number
                del self._owners[slot]
                self.scheduler.finish(slot)
                # A later step of the call may have broken down when the text had ended already.
                if not all(each.is_finite for each in rows):
                    self._run(self._programs.reset, np.array([slot], np.int32))
                break
        self._forget_if_ended(key)
        self._emit(key, events)
        return taken

    def _end_all(self, key: int, reason: FinishReason) -> list[Event]:
        session = self._sessions[key]
        events = list[Event]()
        for choice in session.running:
            events += session.end(choice, reason)
        self._forget_if_ended(key)
        return events

    def _forget_if_ended(self, key: int) -> None:
        if not self._sessions[key].running:
            del self._sessions[key]
            self._keys.pop(key, None)
            # A request that ended while it was paused is so no more.
            self.scheduler.resume(key)


def _is_biased(session: Session) -> bool:
    params = session.request.params
    return bool(
        params.logit_bias or params.banned_token_ids or params.allowed_token_ids is not None
    )


def _bias_of(session: Session, vocab_size: int) -> tuple[np.ndarray, np.ndarray] | None:
    """What is added to every logit, and which ids the prompt holds; None if neither matters."""
    params = session.request.params
    if not _is_biased(session) and params.repetition_penalty == 1:
        return None
    bias = np.zeros(vocab_size, np.float32)
    for token, value in params.logit_bias.items():
        bias[token] = value
    if params.allowed_token_ids is not None:
        allowed = np.zeros(vocab_size, bool)
        allowed[list(params.allowed_token_ids)] = True
        bias[~allowed] = -np.inf
    bias[list(params.banned_token_ids)] = -np.inf
    in_prompt = np.zeros(vocab_size, bool)
    in_prompt[list(session.request.prompt_ids)] = True
    return bias, in_prompt
