"""What every device would hold of a model and an engine's state, and how much of both fits.

All bytes come from the shapes and shardings of the real tree and the real state, which are built
without being allocated. The engine's numbers (chunk, block, rows of its state) are its own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh

from refimpl.engine.programs import CHUNKS
from refimpl.engine.state import DecodeState
from refimpl.model.cache import BLOCK, KVCache
from refimpl.model.config import GemmaConfig
from refimpl.model.layer_spec import AttentionKind
from refimpl.model.numerics import Numerics
from refimpl.model.sharding import (
    Divided,
    bytes_of_a_device,
    divide,
    divide_keys,
    divide_parameters,
    mesh_of,
)
from refimpl.model.storage import Storage
from refimpl.plan.working import Working, working_memory

# Where a search for slots ends: more than any device has served.
MOST_SLOTS = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes that each device holds. Every device holds as much as the others.

    Attributes:
        weights: parameters.
        caches: keys, values and their positions, by kind of layer.
        rows: what else the engine keeps of each slot, most of it over the vocabulary.
        prefix: blocks of prompts that are kept.
        working: what the programs need while they run.
        margin: left free.
    """

    weights: int
    caches: dict[AttentionKind, int]
    rows: int
    prefix: int
    working: Working
    margin: int

    @property
    def total(self) -> int:
        return (
            self.weights
            + sum(self.caches.values())
            + self.rows
            + self.prefix
            + self.working.total
            + self.margin
        )


class StateArrays(NamedTuple):
    """The arrays of an engine's `DecodeState`, each once, by how they are divided.

    Attributes:
        keys: cached keys and values "b s k h" of the layers of each kind; by heads.
        positions: of each kind of layer, "b s"; whole.
        vocabulary: "b v"; by token.
        others: some numbers of each slot; whole.
    """

    keys: dict[AttentionKind, list[Any]]
    positions: dict[AttentionKind, Any]
    vocabulary: list[Any]
    others: list[Any]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A model on some devices.

    Attributes:
        config: the architecture.
        devices: how many, all alike.
        memory: bytes of each.
        storage: the precision of the weights.
        numerics: where the forward pass rounds; its activation type is that of the caches.
        margin: bytes of each device to leave free.
        prefix_bytes: for blocks of prompts, in all. Taken as if every device held them whole, which
            is so where key/value heads are not divided.
    """

    config: GemmaConfig
    devices: int
    memory: int
    storage: Storage
    numerics: Numerics
    margin: int
    prefix_bytes: int

    @cached_property
    def mesh(self) -> AbstractMesh:
        return mesh_of(self.devices)

    @cached_property
    def parameters(self) -> tuple[Divided, ...]:
        """Every parameter, divided."""
        return divide_parameters(self.config, self.mesh, self.storage)

    @cached_property
    def weight_bytes(self) -> int:
        """Of each device."""
        return bytes_of_a_device([parameter.arrays for parameter in self.parameters])

    def need(self, *, slots: int, context: int) -> Need:
        """What each device would hold."""
        # Slots are the first axis of every array of the state, and never divided.
        one = _bytes_of_a_slot(self.config, self.numerics, self.devices, _blocks(context))
        return Need(
            weights=self.weight_bytes,
            caches={kind: slots * held for kind, held in one.caches.items()},
            rows=slots * one.rows,
            prefix=self.prefix_bytes,
            working=working_memory(
                self.config,
                mesh=self.mesh,
                is_wide=self.storage.name == "float32",
                numerics=self.numerics,
                slots=slots,
                context=context,
            ),
            margin=self.margin,
        )

    def fits(self, *, slots: int, context: int) -> bool:
        """Whether that is no more than a device has."""
        return self.need(slots=slots, context=context).total <= self.memory

    def largest_context(self, *, slots: int) -> int:
        """Positions that so many slots can have each, at most the model's own context; 0: none.

        Caches grow by whole blocks.
        """
        own = self.config.context_length

        def holds(blocks: int) -> bool:
            return self.fits(slots=slots, context=min(blocks * BLOCK, own))

        return min(BLOCK * _largest(_blocks(own), holds), own)

    def most_slots(self, *, context: int) -> int:
        """Slots that can have so many positions each; 0: none."""
        return _largest(MOST_SLOTS, lambda slots: self.fits(slots=slots, context=context))


class _Slot(NamedTuple):
    """Bytes on each device of one slot's part of the state."""

    caches: dict[AttentionKind, int]
    rows: int


@cache
def _bytes_of_a_slot(config: GemmaConfig, numerics: Numerics, devices: int, blocks: int) -> _Slot:
    state = divided_state(config, numerics, mesh_of(devices), slots=1, context=blocks * BLOCK)
    return _Slot(
        caches={
            kind: bytes_of_a_device((state.keys[kind], positions))
            for kind, positions in state.positions.items()
        },
        rows=bytes_of_a_device((state.vocabulary, state.others)),
    )


def divided_state(
    config: GemmaConfig, numerics: Numerics, mesh: AbstractMesh, *, slots: int, context: int
) -> StateArrays:
    """The shapes and types of the state that `Programs.new_state` allocates, with shardings."""

    def create() -> StateArrays:
        held = KVCache.create(
            config, batch=slots, length=context, chunk=CHUNKS[-1], dtype=numerics.dtype
        )
        state = DecodeState.create(held, slots=slots, num_logits=config.vocab_size)
        keys: dict[AttentionKind, list[Any]] = {kind: [] for kind in held.positions}
        for owner, *arrays in zip(held.owners, held.keys, held.values, strict=True):
            keys[config.layers[owner].kind] += arrays
        vocabulary = [state.counts, state.in_prompt, state.bias]
        named = {id(array) for array in jax.tree.leaves((keys, held.positions, vocabulary))}
        others = [array for array in jax.tree.leaves(state) if id(array) not in named]
        return StateArrays(keys, held.positions, vocabulary, others)

    whole = jax.eval_shape(create)
    everywhere = partial(divide, mesh=mesh, axis=None)
    return StateArrays(
        keys=jax.tree.map(partial(divide_keys, mesh=mesh), whole.keys),
        positions=jax.tree.map(everywhere, whole.positions),
        vocabulary=jax.tree.map(partial(divide, mesh=mesh, axis=1), whole.vocabulary),
        others=jax.tree.map(everywhere, whole.others),
    )


def _blocks(context: int) -> int:
    return -(-context // BLOCK)


def _largest(most: int, holds: Callable[[int], bool]) -> int:
    """The largest number of 1..most of which it holds, given that it holds of all below; else 0."""
    if holds(most):
        return most
    # From small numbers up, because the first that is too large is often far below `most`.
    low, high = 0, 1
    while high < most and holds(high):
        low, high = high, 2 * high
    high = min(high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
