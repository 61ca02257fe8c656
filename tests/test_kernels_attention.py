"""Attention against the spec, and the spec against float64."""

from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import Array
from refimpl_kernels import spec
from refimpl_kernels.attention import (
    Rounding,
    ScaleSite,
    attention_scores,
    blocked_attention,
    dense_attention,
    soft_cap,
    visible,
)

from tests.kernel_cases import (
    BFLOAT16_UNIT,
    UNIT,
    AttentionCase,
    assert_same_bits,
    assert_within,
    float64,
    normal,
    summed,
)

BLOCK = 8
CASES = {
    "one query": AttentionCase(t=1, s=16, lengths=(5, 16), n=4, k=1, h=16),
    "a ring": AttentionCase(t=3, s=24, lengths=(11, 70), n=4, k=1, h=16, window=10),
    "groups": AttentionCase(t=20, s=32, lengths=(20, 32), n=4, k=2, h=64, window=7),
    "every head its own": AttentionCase(t=4, s=16, lengths=(0, 2, 9), n=3, k=3, h=16),
    "wide heads": AttentionCase(t=2, s=16, lengths=(8, 13), n=4, k=1, h=256, window=4),
    "capped": AttentionCase(t=5, s=24, lengths=(5, 24), n=4, k=2, h=64, cap=50.0, sharpness=30.0),
}
SITES: tuple[ScaleSite, ...] = ("scores", "query")

every_case = pytest.mark.parametrize("name", CASES)


class Results(NamedTuple):
    spec: Array
    dense: Array
    blocked: Array
    dense_in_bfloat16: Array


def dense(
    case: AttentionCase,
    query: Array,
    key: Array,
    value: Array,
    *,
    query_positions: Array,
    key_positions: Array,
) -> Array:
    scores = attention_scores(query, key, scale=case.scale, cap=case.cap)
    return dense_attention(
        scores, value, visible(query_positions, key_positions, window=case.window)
    )


@cache
def results(name: str) -> Results:
    """Each in a program of its own, lest XLA find what the spec shares with the fast paths."""
    case, (heads, positions) = CASES[name], CASES[name].arrays()
    shape = {"scale": case.scale, "window": case.window, "cap": case.cap}
    blocked = partial(blocked_attention, **shape, block=BLOCK)
    narrow = [array.astype(jnp.bfloat16) for array in heads]
    return Results(
        jax.jit(partial(spec.attention, **shape))(*heads, **positions),
        jax.jit(partial(dense, case))(*heads, **positions),
        jax.jit(blocked)(*heads, **positions),
        jax.jit(partial(dense, case))(*narrow, **positions),
    )


class Exact(NamedTuple):
    mixed: np.ndarray
    magnitude: np.ndarray
    largest_score: float
    score_error: float


@cache
def exact(case: AttentionCase, dtype: str = "float32") -> Exact:
    """By the formula, a head at a time in float64; the parts of the bounds beside it."""
    heads, positions = case.arrays()
    query, key, value = (float64(array.astype(dtype)) for array in heads)
    positions = jax.device_get(positions)
    mixed, magnitude = np.zeros(query.shape), np.zeros(query.shape)
    largest_score = largest_sum = 0.0
    for row, t, head in np.ndindex(query.shape[:3]):
        q = query[row, t, head]
        at, kv_head = positions["query_positions"][row, t], head * case.k // case.n
        places = positions["key_positions"][row]
        seen = (places >= 0) & (places <= at)
        if case.window is not None:
            seen &= places > at - case.window
        if not seen.any():
            continue
        keys, values = key[row, seen, kv_head], value[row, seen, kv_head]
        scores = keys @ q * case.scale
        largest_score = max(largest_score, np.abs(scores).max())
        largest_sum = max(largest_sum, (np.abs(keys) @ np.abs(q)).max() * case.scale)
        if case.cap is not None:
            scores = case.cap * np.tanh(scores / case.cap)
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        mixed[row, t, head] = weights @ values
        magnitude[row, t, head] = weights @ np.abs(values)
    return Exact(mixed, magnitude, largest_score, summed(case.h) * largest_sum)


def bound(case: AttentionCase) -> np.ndarray:
    """Error of one float32 attention.

    A weight errs relatively by twice what its score errs by absolutely: a sum over h, and 6 units
    of the score itself for scale, cap and differences, once more for each block of the running
    softmax. exp and quotient add 4 units, the sums over s of weights and values their own.
    """
    _, magnitude, largest_score, score_error = exact(case)
    differences = (6 + case.s // BLOCK) * UNIT * largest_score
    return magnitude * (2 * (score_error + differences) + 4 * UNIT + 2 * summed(case.s))


@every_case
def test_the_spec_is_the_formula(name: str) -> None:
    assert results(name).spec.dtype == jnp.float32
    assert_within(results(name).spec, exact(CASES[name]).mixed, bound(CASES[name]))


@every_case
@pytest.mark.parametrize("implementation", ["dense", "blocked"])
def test_float32_is_the_spec(name: str, implementation: str) -> None:
    found = getattr(results(name), implementation)
    assert found.dtype == jnp.float32
    assert_within(found, results(name).spec, 2 * bound(CASES[name]))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.cap is None])
def test_bfloat16_is_the_formula_but_for_its_roundings(name: str) -> None:
    mixed, magnitude, largest_score, _ = exact(CASES[name], "bfloat16")
    # The score rounds as a product and when it is scaled; weights and result round once. float32's
    # own errors fit the hundredth part.
    off = np.expm1(2 * 2 * BFLOAT16_UNIT * largest_score) + 2 * BFLOAT16_UNIT
    found = results(name).dense_in_bfloat16
    assert found.dtype == jnp.bfloat16
    assert_within(found, mixed, 1.01 * off * magnitude)


def test_a_query_that_sees_nothing_gives_zeros() -> None:
    # Here row 0 has no token at all, and row 1 two for four queries.
    for found in results("every head its own"):
        assert (float64(found)[0] == 0).all()
        assert (float64(found)[1, :2] == 0).all()
        assert (float64(found)[1, 2:] != 0).all()


def test_the_cap_shows_where_scores_exceed_it() -> None:
    case = CASES["capped"]
    assert exact(case).largest_score > 50
    uncapped = exact(case._replace(cap=None)).mixed
    assert np.abs(results("capped").dense - uncapped).max() > 0.1


def test_a_soft_cap_is_the_formula() -> None:
    x = np.linspace(-200, 200, 801).astype(np.float32)
    expected = 30 * np.tanh(float64(x) / 30)
    # tanh: 5 units; the division's one reaches it by u sech^2(u) < 0.45; the product, one.
    for cap in (soft_cap, spec.soft_cap):
        assert_within(jax.jit(partial(cap, cap=30.0))(x), expected, 7 * UNIT * np.abs(expected))
        assert_same_bits(cap(jnp.asarray(x), None), x)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("h", [16, 64, 256])
def test_a_power_of_two_scales_query_or_scores_alike(h: int, dtype: jnp.dtype) -> None:
    query, key = (jnp.asarray(normal(1, 4, n, h), dtype) for n in (4, 2))

    @jax.jit
    def scores(query: Array, key: Array) -> dict[tuple[float, ScaleSite], Array]:
        return {
            (scale, site): attention_scores(query, key, scale=scale, cap=50.0, scale_site=site)
            for scale in (h**-0.5, 144**-0.5)
            for site in SITES
        }

    found = scores(query, key)
    assert_same_bits(found[h**-0.5, "scores"], found[h**-0.5, "query"])
    assert (float64(found[144**-0.5, "scores"]) != float64(found[144**-0.5, "query"])).any()


@pytest.mark.parametrize("site", SITES)
def test_bfloat16_scores_round_where_numerics_say_so(site: ScaleSite) -> None:
    # Small integers, so that sums over h are exact and no order of the sum shows.
    random = np.random.default_rng(0)
    query, key = random.integers(-8, 9, (2, 1, 6, 1, 32)).astype(ml_dtypes.bfloat16)
    scale = 168**-0.5

    def rounded(x: np.ndarray) -> np.ndarray:
        return x.astype(np.float32).astype(query.dtype)

    if site == "query":
        # A query of bfloat16 takes the scale as bfloat16.
        scaled = rounded(float64(query) * float64(rounded(np.array(scale))))
        scores = rounded(float64(scaled)[0, :, 0] @ float64(key)[0, :, 0].T)
    else:
        scores = rounded(float64(query)[0, :, 0] @ float64(key)[0, :, 0].T)
        scores = rounded(float64(scores) * np.float32(scale))
    curve = rounded(np.tanh(float64(rounded(float64(scores) / 50))))
    expected = rounded(float64(curve) * 50)

    step_by_step = jax.jit(
        partial(attention_scores, scale=scale, cap=50.0, scale_site=site),
        compiler_options={"xla_allow_excess_precision": False},
    )
    found = step_by_step(jnp.asarray(query), jnp.asarray(key))
    assert_same_bits(found[0, 0, 0], expected)


@pytest.mark.parametrize("softmax", ["float32", "activation"])
def test_bfloat16_weights_round_where_numerics_say_so(softmax: Rounding) -> None:
    scores = jnp.asarray(3 * normal(1, 1, 2, 5, 24), jnp.bfloat16)
    value = jnp.asarray(normal(1, 24, 1, 16), jnp.bfloat16)
    mask = jnp.asarray(normal(1, 5, 24) > 0)
    found = jax.jit(partial(dense_attention, softmax=softmax))(scores, value, mask)

    shown = np.where(mask[0], float64(scores)[0, 0], -np.inf)
    weights = np.exp(shown - shown.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    expected = np.einsum("gts,sh->tgh", weights, float64(value)[0, :, 0])
    magnitude = np.einsum("gts,sh->tgh", weights, np.abs(float64(value))[0, :, 0])
    # Weights and result round once. Each step rounded, the differences (below 20 here), exp, sum
    # and quotient do too.
    assert np.ptp(float64(scores)) < 20
    roundings = {"float32": 2, "activation": 20 + 3 + 2}[softmax]
    assert found.dtype == jnp.bfloat16
    assert_within(found[0], expected, 1.05 * roundings * BFLOAT16_UNIT * magnitude)
