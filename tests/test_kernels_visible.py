"""What a query may see: the fast mask against the spec's, and how many keys both let through."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from refimpl_kernels import spec
from refimpl_kernels.attention import (
    attention_scores,
    blocked_attention,
    dense_attention,
    visible,
)

from tests.kernel_cases import UNIT, assert_same_bits, assert_within, normal

WINDOWS = (4, None)


@pytest.mark.parametrize("window", [None, *range(1, 9)])
def test_both_forms_of_the_mask_agree_everywhere(window: int | None) -> None:
    # Every pair of a query's and a key's position, all negative ones that matter included.
    positions = jnp.arange(-2, 8)[None]
    found = visible(positions, positions, window=window)
    assert_same_bits(found, spec.visible(positions, positions, window=window))
    expected = [
        [0 <= key <= query and (window is None or query - key < window) for key in range(-2, 8)]
        for query in range(-2, 8)
    ]
    np.testing.assert_array_equal(found[0], expected)


@pytest.mark.parametrize("window", [1, 4, 9])
def test_a_query_sees_exactly_a_window_of_keys(window: int) -> None:
    # The keys' order in memory is that of a ring, which no count may depend on.
    positions, places = jnp.arange(24)[None], jnp.roll(jnp.arange(24), 5)[None]
    counts = np.minimum(np.arange(24) + 1, window)
    for mask in (visible, spec.visible):
        found = mask(positions, places, window=window)
        np.testing.assert_array_equal(found[0].sum(axis=-1), counts)


@jax.jit
def attend(query: Array, key: Array, value: Array, positions: Array) -> list[list[Array]]:
    """For each of WINDOWS, what each implementation makes of it."""
    found = []
    where = {"query_positions": positions, "key_positions": positions}
    for window in WINDOWS:
        scores = attention_scores(query, key, scale=0.25, cap=None)
        heads, shape = (query, key, value), {"scale": 0.25, "window": window}
        mixtures = [
            spec.attention(*heads, **where, **shape),
            dense_attention(scores, value, visible(positions, positions, window=window)),
            blocked_attention(*heads, **where, **shape, block=8),
        ]
        found.append(mixtures)
    return found


def test_attention_weighs_exactly_a_window_of_keys() -> None:
    # A query of zeros weighs all it sees alike, and values that are unit vectors show the weights.
    query, key, value = jnp.zeros((1, 16, 1, 16)), normal(1, 16, 1, 16), jnp.eye(16)[None, :, None]
    found = attend(query, key, value, jnp.arange(16)[None])
    for window, mixtures in zip(WINDOWS, found, strict=True):
        counts = np.minimum(np.arange(16) + 1, window or 16)
        for mixed in mixtures:
            weights = np.asarray(mixed)[0, :, 0]
            np.testing.assert_array_equal((weights != 0).sum(axis=-1), counts)
            assert_within(weights.max(axis=-1), 1 / counts, 4 * UNIT)
