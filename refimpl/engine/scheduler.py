"""What the engine does next. Owns the queue and the slots; knows counters, and nothing of devices.

    queue      groups in the order they came; a group is one request, of one or more choices
    admitted   as many of a group's choices as there are free slots; the first of the slots is
               prefilled, the others get copies of it
    decoding   slots that make tokens
    paused     requests whose reader is behind: their slots keep what they hold and sit out, and
               their other choices leave the queue, so that they hold up nobody

First come, first served. While slots decode, at most one chunk of prefill runs between two calls of
decode, and prompts being prefilled take turns with their chunks, so that neither a long prompt nor
many of them make anybody wait for long. Choices that found no slot stay at the head of the queue;
their prompt is in the prefix cache by then.

Every decision takes time proportional to the number of slots, however many requests wait.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable


@runtime_checkable
class ChunkLike(Protocol):
    """Part of a prompt."""

    @property
    def start(self) -> int: ...
    @property
    def count(self) -> int: ...


@dataclass(frozen=True)
class Admit:
    """Give these slots to these choices; answer with `Scheduler.begin`."""

    key: int
    choices: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Prefill:
    """Run a chunk of the prompt in this slot."""

    key: int
    slot: int
    chunk: ChunkLike


@dataclass(frozen=True)
class Activate:
    """The prompt is in `source`: copy it to the other slots, and let all of them decode."""

    key: int
    source: int
    choices: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Decode:
    """Run up to `steps` steps of these slots."""

    slots: tuple[int, ...]
    steps: int


Action = Admit | Prefill | Activate | Decode


@dataclass
class _Group:
    key: int
    prompt_length: int
    waiting: deque[int]
    source: int = -1
    slots: dict[int, int] = field(default_factory=dict[int, int])
    chunks: deque[ChunkLike] = field(default_factory=deque[ChunkLike])


class Scheduler:
    """Decides, one action at a time. Not thread-safe: the engine's thread owns it."""

    def __init__(
        self,
        *,
        slots: int,
        cut: Callable[[int, int], Sequence[ChunkLike]],
        max_width: int,
        max_steps: int = 1,
    ) -> None:
        """Begin with every slot free.

        Args:
            slots: how many there are.
            cut: the chunks of so many tokens, from a start on.
            max_width: most slots of one call of decode.
            max_steps: most steps of one call of decode.
        """
        self._cut, self._max_width, self._max_steps = cut, max_width, max_steps
        self._free = deque(range(slots))
        # By key, and in the order they came: one that is cancelled leaves at once.
        self._queue = OrderedDict[int, _Group]()
        self._prefilling = deque[_Group]()
        self._decoding = dict[int, tuple[int, int]]()
        # Of those that are paused: the slots, and by key what has left the queue.
        self._sitting_out = dict[int, tuple[int, int]]()
        self._paused = dict[int, _Group | None]()
        self._may_prefill = True

    @property
    def num_waiting(self) -> int:
        """Requests of which some choice has no slot yet, but those that are paused."""
        return len(self._queue)

    @property
    def num_free(self) -> int:
        """Slots that nobody has."""
        return len(self._free)

    @property
    def num_paused(self) -> int:
        """Requests that are paused."""
        return len(self._paused)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do, as things are. Some may wait for what is paused."""
        return not (self._prefilling or self._decoding or (self._queue and self._free))

    def submit(self, key: int, *, prompt_length: int, choices: Sequence[int]) -> None:
        """Put a request at the end of the queue.

        Args:
            key: names it from now on.
            prompt_length: tokens to prefill before the first step of decode.
            choices: which of its choices to run.
        """
        assert choices, "a request has a choice"
        self._queue[key] = _Group(key, prompt_length, deque(choices))

    def next(self) -> Action | None:
        """What to do now; None if there is nothing."""
        admit = self._admit()
        if admit is not None:
            return admit
        if self._prefilling and (self._may_prefill or not self._decoding):
            return self._prefill()
        if self._decoding:
            self._may_prefill = True
            return self._decode()
        return None

    def decode_ahead(self) -> Decode | None:
        """What to do after the call of decode under way, if that need not wait for its results.

        It does not wait where the same slots decode again and nobody waits for one of them. Some of
        them may have ended by then, for which it computes nothing of use.
        """
        if self._queue or self._prefilling or not 0 < len(self._decoding) <= self._max_width:
            return None
        return Decode(tuple(self._decoding), self._max_steps)

    def begin(self, key: int, *, start: int) -> None:
        """An admitted request's prompt is in its first slot up to `start`; prefill the rest."""
        group = next(group for group in self._prefilling if group.key == key)
        group.chunks = deque(self._cut(group.prompt_length, start))

    def finish(self, slot: int) -> None:
        """A slot's choice has ended: the slot is free."""
        del (self._decoding if slot in self._decoding else self._sitting_out)[slot]
        self._free.append(slot)

    def pause(self, key: int) -> None:
        """Leave a request out until it is resumed; a prompt being prefilled is finished."""
        self._paused.setdefault(key, self._queue.pop(key, None))
        _move(key, self._decoding, self._sitting_out)

    def resume(self, key: int) -> None:
        """Go on with a request, before all that waits now; nothing if it is not paused."""
        if key not in self._paused:
            return
        group = self._paused.pop(key)
        if group is not None:
            self._queue[key] = group
            self._queue.move_to_end(key, last=False)
        _move(key, self._sitting_out, self._decoding)

    def cancel(self, key: int, choice: int) -> int | None:
        """Forget a choice, wherever it is.

        Returns:
            The slot that it decoded in, which is free now; None if it had none or did not decode.
        """
        waiting = self._queue.get(key) or self._paused.get(key)
        if waiting is not None and choice in waiting.waiting:
            waiting.waiting.remove(choice)
            if not waiting.waiting:
                self._leave_queue(key)
            return None
        for group in self._prefilling:
            if group.key == key and choice in group.slots:
                self._cancel_prefilling(group, choice)
                return None
        for slot, owner in (*self._decoding.items(), *self._sitting_out.items()):
            if owner == (key, choice):
                self.finish(slot)
                return slot
        return None

    def _leave_queue(self, key: int) -> None:
        """Nobody waits any more; a request that is paused stays so."""
        if self._queue.pop(key, None) is None:
            self._paused[key] = None

    def _cancel_prefilling(self, group: _Group, choice: int) -> None:
        slot = group.slots.pop(choice)
        # The first slot holds the prompt that the others will copy.
        if slot != group.source:
            self._free.append(slot)
        if not group.slots:
            self._free.append(group.source)
            self._prefilling.remove(group)

    def _admit(self) -> Admit | None:
        if not (self._queue and self._free):
            return None
        waiting = next(iter(self._queue.values()))
        # The rest of a request waits until its prompt is in the prefix cache.
        if any(group.key == waiting.key for group in self._prefilling):
            return None
        count = min(len(self._free), len(waiting.waiting))
        slots = {waiting.waiting.popleft(): self._free.popleft() for _ in range(count)}
        if not waiting.waiting:
            del self._queue[waiting.key]
        source = next(iter(slots.values()))
        self._prefilling.append(
            _Group(waiting.key, waiting.prompt_length, deque(), source=source, slots=slots)
        )
        return Admit(waiting.key, tuple(slots.items()))

    def _prefill(self) -> Prefill | Activate:
        group = self._prefilling.popleft()
        if group.chunks:
            self._prefilling.append(group)
            self._may_prefill = False
            return Prefill(group.key, group.source, group.chunks.popleft())
        choices = tuple(group.slots.items())
        active = self._sitting_out if group.key in self._paused else self._decoding
        active |= {slot: (group.key, choice) for choice, slot in choices}
        if group.source not in group.slots.values():
            self._free.append(group.source)
        return Activate(group.key, group.source, choices)

    def _decode(self) -> Decode:
        slots = tuple(self._decoding)
        if len(slots) > self._max_width:
            # Those that had their turn go to the end.
            slots = slots[: self._max_width]
            for slot in slots:
                self._decoding[slot] = self._decoding.pop(slot)
        # Who waits for a slot should not wait for steps of a request that has ended already.
        return Decode(slots, 1 if self._queue or self._prefilling else self._max_steps)


def _move(key: int, source: dict[int, tuple[int, int]], to: dict[int, tuple[int, int]]) -> None:
    """Move the slots of a request."""
    for slot in [slot for slot, owner in source.items() if owner[0] == key]:
        to[slot] = source.pop(slot)
