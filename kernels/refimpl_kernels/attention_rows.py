"""Attention of one query a row, as decode has it, one row after the other.

The same running softmax over fixed blocks of positions as `blocked_attention`, written as products
and sums instead of matrix products. A row walks over the blocks that it needs and over no others:
in a full-length cache first by sixteen at a time, then by four, then one by one; in a ring one by
one until it is full, then all of it at once, in the order of its places (a ring of more blocks than
a window can touch is walked one by one throughout). How a row's blocks are grouped depends on its
position and on the length of the ring, and row after row runs the same code on arrays of the same
shape: no row's bits depend on how many there are. That is tested for heads of whole vectors, 16
entries each, as all released models have; with 24, 40 or 72 entries it was found not to hold.

A score's sum over the head is 16 chains of products side by side, for each of the 16 entries of a
vector, whose results are then added one to the next; what is added to the mixed values is a chain
over 16 positions at a time. A reduction over 16 entries, of those that do not lie side by side, is
what XLA's CPU backend makes vectors of (see `chain.py`); one over more it takes apart into windows
and sums them one entry after the other, so what is reduced over tiles is reduced by 16 at most at a
time. Sixteen positions of keys, or of values, are one tile, which all queries that share it read
before the next one: so it comes from memory once.

Why groups: one block is too little for two threads, since to start the other one takes as long as
to read it. So XLA makes one kernel for one thread of the loop over single blocks, and one thread
reads 7 GB/s where two read 19 (a sum of 48 MB, nothing of it in caches). A loop over groups runs
each step on all threads (`on_all_threads`). Measured (270M, three global layers, nothing in caches,
2 threads): a row at position 8,000 takes 5.4 ms where single blocks took 7.3, eight rows at 2,000
take 9.7 ms where they took 14.1.

The blocks of a window, in their own order, lie in two places of a ring. A kernel that looks for the
place of what it reads is fast, but was vectorized in one way for one row and in another for two,
and summed in another order; and to copy the blocks first takes longer than to take them one by one.
In the order of its places, a full ring is one piece. Measured (fifteen local layers at position
8,000, else as above): eight rows take 17 ms where single blocks took 22, one row 3.3 where it took
3.4.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Bool, Float32, Int

from refimpl_kernels.attention import MASKED, block_range, check_blocks, soft_cap
from refimpl_kernels.compiling import LANES, on_all_threads, traced_once

# Blocks of a full-length cache that are taken at a time, before what is left is taken one by one.
GROUPS = (16, 4)


class _Softmax(NamedTuple):
    """Highest score, sum of weights and weighted sum of values so far."""

    highest: Float32[Array, "*b k g"]
    total: Float32[Array, "*b k g"]
    mixed: Float32[Array, "*b k g h"]


@traced_once("scale", "window", "cap", "block")
def row_attention(
    query: Float32[Array, "b 1 n h"],
    key: Float32[Array, "c s k h"],
    value: Float32[Array, "c s k h"],
    *,
    query_positions: Int[Array, "b 1"],
    key_positions: Int[Array, "c s"],
    scale: float,
    window: int | None = None,
    cap: float | None = None,
    block: int = 128,
    rows: Int[Array, " b"] | None = None,
) -> Float32[Array, "b 1 n h"]:
    """As `blocked_attention`, which says what the arguments are, for one query a row.

    Raises:
        NotImplementedError: more than one query a row, inputs that are not float32, or s is not a
            multiple of the block.
    """
    if query.shape[1] != 1:
        raise NotImplementedError(
            f"row_attention takes one query a row, got {query.shape[1]}; use blocked_attention"
        )
    check_blocks(query, key, value, block=block)
    b, _, n, h = query.shape
    k = key.shape[2]
    rows = jnp.arange(b, dtype=jnp.int32) if rows is None else rows
    seen = _Seen(key, value, key_positions, rows, query_positions[:, 0], window, block)
    grouped = query.reshape(b, k, n // k, h)

    def extended(state: _Softmax, i: Array, begin: Array, count: int) -> _Softmax:
        """A row's state with `count` blocks from `begin` on; all others as they were."""
        # Between barriers, arrays have the shapes of one row. Where reading or writing a row became
        # a part of the sums, one row alone was rounded otherwise than one of several.
        taken = jax.tree.map(lambda part: part[i], (grouped, state))
        queries, row = lax.optimization_barrier(taken)
        keys, values, mask = seen.blocks(i, begin, count)
        scores = soft_cap(_scores(queries, keys) * scale, cap)
        row = lax.optimization_barrier(_accumulate(row, scores, values, mask))

        def put(part: Array, new: Array) -> Array:
            return lax.dynamic_update_index_in_dim(part, new, i, axis=0)

        return jax.tree.map(put, state, row)

    state = _Softmax(
        jnp.full(grouped.shape[:-1], MASKED),
        jnp.zeros(grouped.shape[:-1]),
        jnp.zeros(grouped.shape),
    )
    for group, begin, counts in seen.groups():
        state = _over_groups(state, begin, counts, group, extended)
    total = jnp.where(state.total > 0, state.total, 1)
    return (state.mixed / total[..., None]).reshape(b, 1, n, h)


class _Seen(NamedTuple):
    """What the rows see of a cache, taken by blocks."""

    key: Float32[Array, "c s k h"]
    value: Float32[Array, "c s k h"]
    key_positions: Int[Array, "c s"]
    rows: Int[Array, " b"]
    position: Int[Array, " b"]
    window: int | None
    block: int

    @property
    def num_blocks(self) -> int:
        """Blocks that the cache has room for."""
        return self.key.shape[1] // self.block

    def groups(self) -> Iterator[tuple[int, Int[Array, " b"], Int[Array, " b"]]]:
        """How many blocks are taken at a time, from which block on, and how often, for each row."""
        begin, _ = block_range(self.position[:, None], window=self.window, block=self.block)
        # A row of padding has position -1 and no block at all.
        left = self.position // self.block + 1 - begin
        if self.window is None:
            for size in GROUPS:
                if size <= self.num_blocks:
                    yield size, begin, left // size
                    begin, left = begin + left // size * size, left % size
        elif self.num_blocks <= -(-(self.window - 1) // self.block) + 1:
            # A ring, of no more blocks than a window can touch.
            is_full = self.position >= self.key.shape[1]
            yield self.num_blocks, begin, is_full.astype(jnp.int32)
            left = jnp.where(is_full, 0, left)
        yield 1, begin, left

    def blocks(self, i: Array, begin: Array, count: int) -> tuple[Array, Array, Bool[Array, "s"]]:
        """Keys and values of blocks begin to begin + count - 1, and which of them row i sees."""
        key, value, held = [
            self._taken(array, self.rows[i], begin, count)
            for array in (self.key, self.value, self.key_positions)
        ]
        distance, number = self.position[i] - held, held // self.block - begin
        # A place that holds nothing has position -1, before every block. To know that is also all
        # that a whole ring needs the loop's index for, without which it would run on one thread.
        mask = (distance >= 0) & (number >= 0)
        return key, value, mask if self.window is None else mask & (distance < self.window)

    def _taken(self, array: Array, row: Array, begin: Array, count: int) -> Array:
        # A whole ring is taken from its first place on, whichever block lies there.
        is_whole = count == self.num_blocks
        place = jnp.zeros_like(row) if is_whole else begin % self.num_blocks * self.block
        start = (row, place, *[jnp.zeros_like(row)] * (array.ndim - 2))
        sizes = (1, count * self.block, *array.shape[2:])
        return lax.dynamic_slice(array, start, sizes, allow_negative_indices=False)[0]


def _over_groups(
    state: _Softmax,
    begin: Int[Array, " b"],
    counts: Int[Array, " b"],
    group: int,
    extended: Callable[[_Softmax, Array, Array, int], _Softmax],
) -> _Softmax:
    """Each row's state after `counts` groups of blocks from `begin` on, row after row."""
    ends = jnp.cumsum(counts)

    def step(index: Array, state: _Softmax) -> _Softmax:
        index = on_all_threads(index) if group > 1 else index
        i = jnp.sum(ends <= index, dtype=jnp.int32)
        number = index - (ends[i] - counts[i])
        return extended(state, i, begin[i] + number * group, group)

    return lax.fori_loop(0, ends[-1], step, state)


def _scores(
    query: Float32[Array, "k g h"], key: Float32[Array, "s k h"]
) -> Float32[Array, "t k g p"]:
    """Products of queries and keys, before scale and cap, in tiles of p positions."""
    queries, keys = _in_vectors(query), _in_vectors(_tiled(key))
    products = queries[None, :, :, None] * keys[:, :, None]
    chains = lax.reduce(products, jnp.float32(0), lax.add, (4,))
    scores = lax.reduce(lax.optimization_barrier(chains), jnp.float32(0), lax.add, (4,))
    return lax.optimization_barrier(scores)


def _accumulate(
    state: _Softmax,
    scores: Float32[Array, "t k g p"],
    value: Float32[Array, "s k h"],
    mask: Bool[Array, " s"],
) -> _Softmax:
    """One step of the running softmax; where the mask shows nothing it changes no bit."""
    highest, total, mixed = state
    shown = mask.reshape(len(scores), 1, 1, -1)
    best = _by_sixteen(jnp.where(shown, scores, MASKED), lax.max, MASKED, axes=(0, 3))
    new_highest = jnp.maximum(highest, best)
    kept = jnp.exp(highest - new_highest)
    raised = jnp.where(shown, jnp.exp(scores - new_highest[None, ..., None]), 0)
    raised = lax.optimization_barrier(raised)
    products = raised[..., None] * _tiled(value)[:, :, None]
    chains = lax.reduce(products, jnp.float32(0), lax.add, (3,))
    added = _by_sixteen(lax.optimization_barrier(chains), lax.add, 0, axes=(0,))
    raised = _by_sixteen(raised, lax.add, 0, axes=(0, 3))
    return _Softmax(new_highest, total * kept + raised, mixed * kept[..., None] + added)


def _by_sixteen(
    x: Float32[Array, "*a"],
    operation: Callable[[Array, Array], Array],
    initial: ArrayLike,
    *,
    axes: tuple[int, ...],
) -> Float32[Array, "*b"]:
    """x reduced over one axis after the other, at most 16 neighbours of it at a time.

    Where no number up to 16 divides what is left of an axis, it is reduced in one.
    """
    for number, axis in enumerate(axes):
        axis -= number
        before, (length, *after) = x.shape[:axis], x.shape[axis:]
        while length > 1:
            part = max((d for d in range(2, LANES + 1) if length % d == 0), default=length)
            length //= part
            x = x.reshape(*before, length, part, *after)
            reduced = lax.reduce(x, jnp.asarray(initial, x.dtype), operation, (axis + 1,))
            x = lax.optimization_barrier(reduced)
        x = x.reshape(*before, *after)
    return x


def _tiled(x: Float32[Array, "s k h"]) -> Float32[Array, "t k p h"]:
    """Tiles of p positions: 16, or where that does not divide them, what does of both."""
    tile = math.gcd(len(x), LANES)
    return x.reshape(-1, tile, *x.shape[1:]).swapaxes(1, 2)


def _in_vectors(x: Float32[Array, "*a h"]) -> Float32[Array, "*a v l"]:
    """x with its last axis cut into vectors of 16 entries, the last filled up with zeros."""
    missing = -x.shape[-1] % LANES
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x
    return x.reshape(*x.shape[:-1], -1, LANES)
