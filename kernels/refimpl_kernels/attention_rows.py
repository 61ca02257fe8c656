"""Attention of one query a row, as decode has it, one row after the other.

The same running softmax over fixed blocks of positions as `blocked_attention`, written as products
and sums instead of matrix products. So XLA's CPU backend makes one kernel of all of it, in which
each row walks over the blocks that it needs itself and over no others. Row after row runs the same
code on arrays of the same shape: no row's bits depend on how many there are.

A score's sum over the head is 16 chains of products side by side, for each of the 16 entries of a
vector, whose results are then added one to the next; what is added to the mixed values is a chain
over 16 positions at a time. A reduction over 16 entries, of those that do not lie side by side, is
what the backend makes vectors of (see `chain.py`).

Measured (270M, one thread): 24 microseconds a block of 128 positions, two thirds of the time that
matrix products take, which one thread needs to read the keys and values from memory.
"""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float32, Int

from refimpl_kernels.attention import MASKED, block_range, check_blocks, soft_cap
from refimpl_kernels.compiling import LANES, traced_once

# Highest score, sum of weights and weighted sum of values so far.
_Softmax = tuple[Float32[Array, "k g"], Float32[Array, "k g"], Float32[Array, "k g h"]]


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
    first, _ = block_range(query_positions, window=window, block=block)
    position = query_positions[:, 0]
    rows = jnp.arange(b, dtype=jnp.int32) if rows is None else rows
    grouped = query.reshape(b, k, n // k, h)

    def attend(i: Array, mixed: Float32[Array, "b k g h"]) -> Float32[Array, "b k g h"]:
        def step(j: Array, state: _Softmax) -> _Softmax:
            wanted = first[i] + j
            begin = wanted % (key.shape[1] // block) * block
            held = [_take(array, rows[i], begin, block) for array in (key, value, key_positions)]
            distance = position[i] - held[2]
            # A ring place may still hold an older block, which had its turn under its own number.
            mask = (distance >= 0) & (held[2] // block == wanted)
            mask = mask if window is None else mask & (distance < window)
            scores = soft_cap(_scores(grouped[i], held[0]) * scale, cap)
            return _accumulate(state, scores, held[1], mask[None, None])

        start = (
            jnp.full(grouped.shape[1:-1], MASKED),
            jnp.zeros(grouped.shape[1:-1]),
            jnp.zeros(grouped.shape[1:]),
        )
        # A row of padding has position -1 and no block at all.
        count = position[i] // block + 1 - first[i]
        _, total, sums = lax.fori_loop(0, count, step, start)
        row = sums / jnp.where(total > 0, total, 1)[..., None]
        return lax.dynamic_update_index_in_dim(mixed, row, i, axis=0)

    mixed = lax.fori_loop(0, b, attend, jnp.zeros_like(grouped))
    return mixed.reshape(b, 1, n, h)


def _take(array: Array, row: Int[Array, ""], begin: Int[Array, ""], length: int) -> Array:
    """`length` entries of the second axis of one row."""
    start = (row, begin, *[jnp.zeros_like(row)] * (array.ndim - 2))
    sizes = (1, length, *array.shape[2:])
    return lax.dynamic_slice(array, start, sizes, allow_negative_indices=False)[0]


def _scores(
    query: Float32[Array, "k g h"], key: Float32[Array, "s k h"]
) -> Float32[Array, "k g s"]:
    """Products of queries and keys, before scale and cap."""
    lanes = [_in_vectors(x, axis=-1) for x in (query, key.swapaxes(0, 1))]
    products = lanes[0][:, :, None] * lanes[1][:, None]
    chains = lax.reduce(products, jnp.float32(0), lax.add, (3,))
    return lax.reduce(lax.optimization_barrier(chains), jnp.float32(0), lax.add, (3,))


def _accumulate(
    state: _Softmax,
    scores: Float32[Array, "k g s"],
    value: Float32[Array, "s k h"],
    mask: Bool[Array, "1 1 s"],
) -> _Softmax:
    """One step of the running softmax; where the mask shows nothing it changes no bit."""
    highest, total, mixed = state
    new_highest = jnp.maximum(highest, jnp.max(jnp.where(mask, scores, MASKED), axis=-1))
    kept = jnp.exp(highest - new_highest)
    raised = jnp.where(mask, jnp.exp(scores - new_highest[..., None]), 0)
    raised = lax.optimization_barrier(raised)
    weights = _in_vectors(raised, axis=-1)[..., None]
    values = _in_vectors(value.swapaxes(0, 1), axis=1)[:, None]
    chains = lax.reduce(weights * values, jnp.float32(0), lax.add, (3,))
    added = lax.reduce(lax.optimization_barrier(chains), jnp.float32(0), lax.add, (2,))
    return new_highest, total * kept + raised.sum(axis=-1), mixed * kept[..., None] + added


def _in_vectors(x: Array, *, axis: int) -> Array:
    """x with an axis cut into pieces of 16 entries, the last filled up with zeros."""
    axis %= x.ndim
    missing = [(0, -size % LANES if i == axis else 0) for i, size in enumerate(x.shape)]
    x = jnp.pad(x, missing) if any(after for _, after in missing) else x
    return x.reshape(*x.shape[:axis], -1, LANES, *x.shape[axis + 1 :])
