"""Which experts rows go to: routes against the spec, and the blocks that pairs are cut into."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from refimpl_kernels import experts as experts_module
from refimpl_kernels import spec
from refimpl_kernels.experts import MOST_ROWS, route

from tests.kernel_cases import (
    UNIT,
    assert_same_bits,
    assert_within,
    dense_weights,
    float64,
    normal,
    summed,
)

SCORES = {
    (rows, experts, chosen): jnp.asarray(3 * normal(rows, experts))
    for rows, experts, chosen in [(1, 4, 1), (7, 8, 3), (40, 128, 8), (5, 4, 4)]
}


def test_a_route_is_the_spec_and_the_spec_the_formula() -> None:
    judged = jax.jit(
        lambda given: {at: spec.expert_weights(x, chosen=at[2]) for at, x in given.items()}
    )(SCORES)
    routes = jax.jit(lambda given: {at: route(x, chosen=at[2]) for at, x in given.items()})(SCORES)
    for at, scores in SCORES.items():
        wide = float64(scores)
        raised = np.exp(wide - wide.max(axis=-1, keepdims=True))
        kept = np.where(raised >= np.sort(raised, axis=-1)[:, -at[2]][:, None], raised, 0)
        expected = kept / kept.sum(axis=-1, keepdims=True)
        # A difference of scores errs by a unit of itself and exp by two; so does the sum's every
        # term, and the sum, the softmax's own quotient and the quotient round too.
        largest = np.abs(wide - wide.max(axis=-1, keepdims=True)).max()
        bound = (2 * (largest + 2) * UNIT + summed(at[1]) + summed(at[2]) + 2 * UNIT) * expected
        assert_within(judged[at], expected, bound)
        assert_within(dense_weights(routes[at], at[1]), judged[at], 2 * bound)
        assert (np.diff(np.asarray(routes[at].experts), axis=-1) > 0).all()


ROUTE_THREE = jax.jit(partial(route, chosen=3))


def test_of_equal_scores_the_lower_expert_wins() -> None:
    scores = np.array(
        [[2, 2, 2, 2, 2, 2, 2, 2], [0, 1, 0, 1, 0, 1, 0, 1], [5, 0, 3, 0, 0, 3, 0, 3]], np.float32
    )
    routed = ROUTE_THREE(jnp.asarray(scores))
    assert routed.experts.tolist() == [[0, 1, 2], [1, 3, 5], [0, 2, 5]]
    judged = spec.expert_weights(jnp.asarray(scores), chosen=3)
    assert ((np.asarray(judged) > 0) == (dense_weights(routed, 8) > 0)).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), shift=st.integers(-1000, 1000))
def test_scores_of_few_values_choose_as_the_spec_whatever_is_added(seed: int, shift: int) -> None:
    # Many are equal, and sums of these integers are exact.
    scores = np.random.default_rng(seed).integers(-3, 4, (4, 8)).astype(np.float32)
    routed = ROUTE_THREE(jnp.asarray(scores))
    judged = np.asarray(spec.expert_weights(jnp.asarray(scores), chosen=3))
    np.testing.assert_array_equal(judged > 0, dense_weights(routed, 8) > 0)
    for found, expected in zip(ROUTE_THREE(jnp.asarray(scores + shift)), routed, strict=True):
        assert_same_bits(found, expected)


def test_a_route_of_bfloat16_is_that_of_the_same_numbers_in_float32() -> None:
    scores = jnp.asarray(normal(4, 8), jnp.bfloat16)
    for found, expected in zip(
        ROUTE_THREE(scores), ROUTE_THREE(scores.astype(jnp.float32)), strict=True
    ):
        assert_same_bits(found, expected)


BLOCKS = jax.jit(experts_module._blocks, static_argnums=1)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from([(24, 8, 2), (80, 4, 16), (320, 128, 2), (2000, 8, MOST_ROWS)]),
    seed=st.integers(0, 1000),
    most=st.integers(1, 128),
)
def test_every_pair_is_in_one_block_and_no_block_is_empty(
    shape: tuple[int, int, int], seed: int, most: int
) -> None:
    pairs, num_experts, rows = shape
    chosen = np.random.default_rng(seed).integers(0, min(most, num_experts), pairs)
    blocks = BLOCKS(jnp.asarray(chosen, jnp.int32), num_experts)
    in_use = int(blocks.num_blocks)
    assert blocks.pair.shape == (pairs // rows + min(pairs, num_experts), rows)
    assert in_use == sum(-(-size // rows) for size in np.bincount(chosen)) <= len(blocks.pair)

    held = np.asarray(blocks.pair)[:in_use]
    is_pair = held < pairs
    assert is_pair.any(axis=1).all()
    assert sorted(held[is_pair]) == list(range(pairs))
    owners = np.broadcast_to(np.asarray(blocks.expert)[:in_use, None], held.shape)
    np.testing.assert_array_equal(owners[is_pair], chosen[held[is_pair]])
