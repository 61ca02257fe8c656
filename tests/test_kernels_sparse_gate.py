"""The sparse gate against the spec, and the spec against float64."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import Array
from refimpl_kernels import spec
from refimpl_kernels.sparse_gate import sparse_gate

from tests.kernel_cases import (
    BFLOAT16_UNIT,
    UNIT,
    assert_same_bits,
    assert_within,
    float64,
    normal,
    row_stable,
    summed,
)

# The quantile of 95 %, which is what the released models have.
CUTOFF = 1.6448536
SHAPES = [(8,), (1, 1, 640), (5, 33), (2, 3, 256)]
CASES = {shape: jnp.asarray(3 * normal(*shape) + 0.5) for shape in SHAPES}
# Integers whose mean and mean square of differences float32 has exactly, in whatever order the sums
# run: differences are multiples of 1/16 below 16, their squares of 1/256 below 256.
INTEGERS = np.random.default_rng(0).integers(-8, 9, (64, 16))


def exact(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean and population deviation of each row in float64, and the result."""
    x = float64(x)
    mean, deviation = np.mean(x, -1, keepdims=True), np.std(x, -1, keepdims=True)
    return mean, deviation, np.maximum(x - (mean + CUTOFF * deviation), 0)


def bound(x: Array) -> np.ndarray:
    """Error of one float32 result.

    The mean errs by its sum and its division; the deviation by as much again, as every difference
    has the mean's error, and by half of what squares, their sum and the division err by, a
    difference and the root. The cutoff, its product, the threshold and the result round once each.
    """
    magnitude = np.abs(float64(x))
    mean, deviation, result = exact(np.asarray(x))
    of_mean = (summed(x.shape[-1]) + UNIT) * np.mean(magnitude, -1, keepdims=True)
    of_deviation = of_mean + (summed(x.shape[-1]) / 2 + 3 * UNIT) * deviation
    threshold = np.abs(mean + CUTOFF * deviation)
    rounded = 2 * CUTOFF * deviation + threshold + result
    return of_mean + CUTOFF * of_deviation + UNIT * rounded


def test_the_spec_is_the_formula_and_float32_is_the_spec() -> None:
    judged = jax.jit(partial(jax.tree.map, partial(spec.sparse_gate, cutoff=CUTOFF)))(CASES)
    found = jax.jit(partial(jax.tree.map, partial(sparse_gate, cutoff=CUTOFF)))(CASES)
    for shape, x in CASES.items():
        assert judged[shape].dtype == found[shape].dtype == jnp.float32
        assert_within(judged[shape], exact(np.asarray(x))[2], bound(x))
        assert_within(found[shape], judged[shape], 2 * bound(x))
        assert (np.asarray(found[shape]) > 0).any()


def test_the_deviation_is_the_populations() -> None:
    # Two numbers lie one deviation from their mean, or 0.71 of one that divides by one less.
    found = sparse_gate(jnp.asarray([[3.0, 5.0]]), cutoff=0.5)
    assert_same_bits(found, np.array([[0, 0.5]], np.float32))


in_bfloat16 = jax.jit(
    partial(sparse_gate, cutoff=CUTOFF), compiler_options={"xla_allow_excess_precision": False}
)


def test_in_bfloat16_each_step_is_rounded() -> None:
    x = INTEGERS.astype(ml_dtypes.bfloat16)
    mean = np.mean(INTEGERS, -1, keepdims=True, dtype=np.float64)
    variance = np.mean((INTEGERS - mean) ** 2, -1, keepdims=True)
    # A root is rounded to float32 and from there to bfloat16, as references do.
    deviation = np.sqrt(variance.astype(np.float32)).astype(x.dtype)
    margin = np.multiply(deviation, np.array(CUTOFF).astype(x.dtype))
    least = np.add(mean.astype(x.dtype), margin)
    expected = np.maximum(np.subtract(x, least), np.array(0).astype(x.dtype))
    assert_same_bits(in_bfloat16(jnp.asarray(x)), expected)

    # One unit of the mean, three of the margin for deviation, cutoff and their product, one each of
    # the threshold and the result. 1.05 is for products of the units.
    mean, deviation, result = exact(INTEGERS)
    few = np.abs(mean) + 3 * CUTOFF * deviation + np.abs(mean + CUTOFF * deviation) + result
    assert_within(expected, result, 1.05 * BFLOAT16_UNIT * few)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_row_has_the_same_bits_alone_and_among_others(dtype: jnp.dtype) -> None:
    rows = {width: jnp.asarray(normal(16, 1, width), dtype) for width in (24, 640, 2048)}
    compiled = row_stable(partial(jax.tree.map, partial(sparse_gate, cutoff=CUTOFF)))
    together = compiled(rows)
    for count in (1, 7):
        some = compiled({width: x[:count] for width, x in rows.items()})
        for width, found in some.items():
            assert_same_bits(found, together[width][:count])


gate = jax.jit(partial(sparse_gate, cutoff=CUTOFF))


@settings(max_examples=25, deadline=None)
@given(power=st.integers(-20, 20), shift=st.integers(-1000, 1000), seed=st.integers(0, 1000))
def test_scaling_scales_and_shifting_changes_nothing(power: int, shift: int, seed: int) -> None:
    x = np.random.default_rng(seed).integers(-8, 9, (64, 16))
    found = np.asarray(gate(jnp.asarray(x, jnp.float32)))
    assert_same_bits(gate(jnp.asarray(np.ldexp(x, power), jnp.float32)), np.ldexp(found, power))
    # The shifted mean and differences from it are exact; the threshold rounds to a larger number.
    shifted = gate(jnp.asarray(x + shift, jnp.float32))
    assert_within(shifted, found, 2 * UNIT * (abs(shift) + 40))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), power=st.integers(1, 5))
def test_no_row_keeps_more_than_cantelli_allows(seed: int, power: int) -> None:
    # At most 1 / (1 + c^2) of any numbers lie c deviations or more above their mean; odd powers
    # of normal numbers have long tails.
    kept = np.asarray(gate(jnp.asarray(normal(64, 16, seed=seed) ** (2 * power - 1))) > 0)
    assert kept.sum(axis=-1).max() <= 16 / (1 + CUTOFF**2)
    assert kept.any()
