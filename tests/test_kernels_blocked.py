"""What attention over blocks promises beside the right numbers: bits that no neighbour changes.

A row's bits must be those it has alone in a full-length cache: in a ring, in a longer cache, beside
rows that are longer or empty, over whatever old keys lie where it may not look. With one query a
row, both forms are held to it; only a ring that is full is summed in another order by "rows".
"""

import inspect
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refimpl_kernels.attention import AttentionImplementation, blocked_attention
from refimpl_kernels.attention_rows import row_attention

from tests.kernel_cases import AttentionCase, assert_same_bits, row_stable

# Small, and the shape of Gemma 3 270M in blocks as its caches have them.
BLOCKS = {16: 8, 256: 128}
LOCAL = {
    16: AttentionCase(t=3, s=24, lengths=(2, 11, 24, 70), n=4, k=2, h=16, window=10),
    256: AttentionCase(t=1, s=640, lengths=(3, 700, 1409), n=4, k=1, h=256, window=512),
}
GLOBAL = {
    16: AttentionCase(t=2, s=64, lengths=(1, 9, 40, 0, 17, 64, 8, 33), n=4, k=2, h=16),
    256: AttentionCase(t=1, s=512, lengths=(5, 512, 130, 0, 256, 128, 1, 300), n=4, k=1, h=256),
}
ONE_QUERY = {
    "local": LOCAL[16]._replace(t=1),
    "global": GLOBAL[16]._replace(t=1),
    "local 256": LOCAL[256],
    "global 256": GLOBAL[256],
    # Blocks are taken by sixteen and by four; a full ring at once, also where a window touches more
    # blocks than it has, but not where it touches fewer.
    "local short ring": LOCAL[16]._replace(t=1, s=16, lengths=(3, 16, 17, 23, 70)),
    "local wide ring": LOCAL[16]._replace(t=1, s=40, lengths=(3, 40, 41, 70, 161)),
    "local groups": LOCAL[16]._replace(t=1, s=48, lengths=(3, 33, 48, 70, 161), window=40),
    "global groups": GLOBAL[16]._replace(t=1, s=272, lengths=(127, 128, 0, 129, 271, 168, 33)),
    "global groups 256": GLOBAL[256]._replace(s=2560, lengths=(2049, 700, 2560)),
}
every_head = pytest.mark.parametrize("h", BLOCKS)


@cache
def program(h: int, window: int | None, implementation: AttentionImplementation) -> Any:
    """Compiled anew for every shape, as programs are that promise the same bits."""
    attention = {"blocked": blocked_attention, "rows": row_attention}[implementation]

    def run(heads: Any, positions: Any) -> Any:
        shape = {"scale": h**-0.5, "window": window, "cap": 50.0, "block": BLOCKS[h]}
        return attention(*heads, **positions, **shape)

    return row_stable(run)


def attend(
    case: AttentionCase, arrays: Any = None, implementation: AttentionImplementation = "blocked"
) -> np.ndarray:
    heads, positions = case.arrays() if arrays is None else arrays
    return np.asarray(program(case.h, case.window, implementation)(heads, positions))


@pytest.mark.parametrize("name", ONE_QUERY)
def test_rows_one_after_the_other_keep_their_bits(name: str) -> None:
    """In a longer cache, alone or among others, over whatever lies out of sight."""
    case = ONE_QUERY[name]
    rows = partial(attend, implementation="rows")
    (query, key, value), positions = jax.tree.map(np.array, case.arrays())
    together = rows(case)
    longer = -(-max(case.lengths) // BLOCKS[case.h]) * BLOCKS[case.h] + case.s
    # A ring that is full, and no wider than a window, is summed in the order of its places.
    block = BLOCKS[case.h]
    is_wide = case.window is None or case.s // block > -(-(case.window - 1) // block) + 1
    one_order = [row for row, length in enumerate(case.lengths) if is_wide or length <= case.s]
    assert one_order
    assert_same_bits(rows(case._replace(s=longer))[one_order], together[one_order])
    for row, length in enumerate(case.lengths):
        held = positions["key_positions"][row]
        unseen = held < 0 if case.window is None else (held < 0) | (held < length - case.window)
        key[row, unseen], value[row, unseen] = 1e30, -1e30
        arrays = (query, key, value), positions
        alone = jax.tree.map(lambda array, row=row: jnp.asarray(array[row : row + 1]), arrays)
        assert_same_bits(rows(case, alone), together[row : row + 1])


@pytest.mark.parametrize("name", ["global groups", "global groups 256", "local groups"])
def test_rows_find_their_slots_under_what_was_there_before(name: str) -> None:
    """In a cache of more slots, and beyond the query what an earlier request left there."""
    case = ONE_QUERY[name]
    (query, key, value), positions = jax.tree.map(np.array, case.arrays())
    slots = [2, 0, 1]
    taken = query[slots], positions["query_positions"][slots]
    wanted = attend(case, ((query, key, value), positions), "rows")[slots]
    for row, length in enumerate(case.lengths):
        beyond = positions["key_positions"][row] < 0
        places = np.flatnonzero(beyond)
        positions["key_positions"][row, beyond] = places + -(-length // case.s) * case.s
        key[row, beyond], value[row, beyond] = 1e30, -1e30
    positions |= {"query_positions": taken[1], "rows": np.array(slots, np.int32)}
    arrays = jax.tree.map(jnp.asarray, ((taken[0], key, value), positions))
    assert_same_bits(attend(case, arrays, "rows"), wanted)


@pytest.mark.parametrize("name", ONE_QUERY)
def test_rows_one_after_the_other_are_blocked_attention(name: str) -> None:
    case = ONE_QUERY[name]
    # Sums of up to 2,560 products of values near 1, whose weights sum to 1, in another order.
    np.testing.assert_allclose(attend(case, implementation="rows"), attend(case), atol=3e-6, rtol=0)


def test_rows_one_after_the_other_take_one_query_each() -> None:
    heads, positions = AttentionCase(t=2).arrays()
    with pytest.raises(NotImplementedError, match="one query a row, got 2; use blocked_attention"):
        inspect.unwrap(row_attention)(*heads, **positions, scale=1.0, block=8)


@every_head
def test_a_ring_gives_the_bits_of_a_full_length_cache(h: int) -> None:
    ring = LOCAL[h]
    full = ring._replace(s=-(-max(ring.lengths) // BLOCKS[h]) * BLOCKS[h])
    assert full.s > ring.s
    assert_same_bits(attend(ring), attend(full))


@settings(max_examples=15, deadline=None)
@given(length=st.integers(1, 100))
def test_at_whatever_position_a_ring_stands(length: int) -> None:
    ring = AttentionCase(t=1, s=24, lengths=(length,), n=4, k=2, h=16, window=10)
    assert_same_bits(attend(ring), attend(ring._replace(s=104)))


@every_head
def test_a_longer_cache_changes_no_bit(h: int) -> None:
    case = GLOBAL[h]
    assert_same_bits(attend(case), attend(case._replace(s=2 * case.s)))


@every_head
def test_a_row_has_the_same_bits_alone_and_among_others(h: int) -> None:
    case = GLOBAL[h]
    arrays = jax.device_get(case.arrays())
    together = attend(case)
    assert (together[3] == 0).all()  # which is empty
    for rows in (range(0, 1), range(1, 2), range(1, 4), range(5, 8)):
        some = jax.tree.map(lambda array, rows=rows: jnp.asarray(array[rows]), arrays)
        assert_same_bits(attend(case, some), together[rows])


@every_head
def test_a_row_among_others_in_a_ring_too(h: int) -> None:
    case = LOCAL[h]
    arrays = jax.device_get(case.arrays())
    together = attend(case)
    for row in range(len(case.lengths)):
        alone = jax.tree.map(lambda array, row=row: jnp.asarray(array[row : row + 1]), arrays)
        assert_same_bits(attend(case, alone), together[row : row + 1])


def test_what_a_query_cannot_see_may_be_any_number() -> None:
    case = LOCAL[16]
    (query, key, value), positions = jax.device_get(case.arrays())
    last = positions["query_positions"].max(axis=1, keepdims=True)
    first = positions["query_positions"].min(axis=1, keepdims=True) - 10
    held = positions["key_positions"]
    unseen = (held < 0) | (held <= first) | (held > last)
    assert unseen.any(axis=1).all()
    for number in (0.0, 1e30, -1e30):
        other_key, other_value = (
            jnp.asarray(np.where(unseen[..., None, None], np.float32(number), array))
            for array in (key, value)
        )
        assert_same_bits(attend(case, ((query, other_key, other_value), positions)), attend(case))


def test_blocks_that_only_another_query_needs_change_no_bit() -> None:
    # Two queries of one row. When the second stands at the beginning, the first one passes by
    # every block from there on, in all of which but the last two it sees nothing.
    case = AttentionCase(t=2, s=64, lengths=(64,), n=4, k=2, h=16, window=10)
    heads, positions = jax.device_get(case.arrays())
    beside = []
    for second in (63, 30, 0, -1):
        positions["query_positions"] = np.array([[63, second]], np.int32)
        beside.append(attend(case, (heads, positions))[0, 0])
    for found in beside[1:]:
        assert_same_bits(found, beside[0])


def test_another_type_than_float32_is_refused() -> None:
    unchecked = inspect.unwrap(blocked_attention)  # the tests' type checks would refuse it first
    heads, positions = AttentionCase().arrays()
    narrow = [array.astype(jnp.bfloat16) for array in heads]
    with pytest.raises(NotImplementedError, match=r"in float32, got bfloat16, .*; use dense"):
        unchecked(*narrow, **positions, scale=1.0, block=8)


def test_a_cache_of_broken_blocks_is_refused() -> None:
    heads, positions = AttentionCase(s=20).arrays()
    refused = partial(blocked_attention, *heads, scale=1.0, block=8)
    with pytest.raises(NotImplementedError, match="a multiple of 8, got 20"):
        refused(**positions)
