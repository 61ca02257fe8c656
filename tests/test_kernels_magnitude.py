"""Scaling to a magnitude against the spec, and the spec against float64."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import Array
from refimpl_kernels import spec
from refimpl_kernels.norm import rms_norm, with_magnitude_of

from tests.kernel_cases import (
    UNIT,
    assert_same_bits,
    assert_within,
    float64,
    normal,
    row_stable,
    summed,
)

LEAST = 1e-5


class Pair(NamedTuple):
    x: Array
    pattern: Array


def pair(*shape: int, dtype: str = "float32") -> Pair:
    x, pattern = normal(*shape), 5 * normal(*shape, seed=1)
    return Pair(jnp.asarray(x, dtype), jnp.asarray(pattern, dtype))


def scaled(pair: Pair) -> Array:
    return with_magnitude_of(pair.x, pair.pattern, least=LEAST)


PAIRS = {str(shape): pair(*shape) for shape in [(8,), (1, 1, 640), (5, 33), (2, 3, 256)]}
# Divided by the root of `LEAST`, and by 0.01.
PAIRS["tiny"] = Pair(jnp.asarray(1e-3 * normal(4, 32)), jnp.asarray(normal(4, 32, seed=1)))
PAIRS["zero"] = Pair(jnp.zeros((4, 32)), jnp.asarray(normal(4, 32, seed=1)))


def exact(pair: Pair) -> np.ndarray:
    x, pattern = float64(pair.x), float64(pair.pattern)
    found = np.maximum(np.mean(x**2, axis=-1, keepdims=True), LEAST)
    return x * np.sqrt(np.mean(pattern**2, axis=-1, keepdims=True) / found)


def test_the_spec_is_the_formula_and_float32_is_the_spec() -> None:
    judged = jax.jit(
        lambda pairs: {
            name: spec.with_magnitude_of(*pair, least=LEAST) for name, pair in pairs.items()
        }
    )(PAIRS)
    found = jax.jit(lambda pairs: {name: scaled(pair) for name, pair in pairs.items()})(PAIRS)
    for name, pair in PAIRS.items():
        # Roots halve what the two mean squares err by, their sums, divisions and squares; roots,
        # product, quotient and the least round once each.
        bound = (summed(pair.x.shape[-1]) + 2 * UNIT + 5 * UNIT) * np.abs(exact(pair))
        assert judged[name].dtype == found[name].dtype == jnp.float32
        assert_within(judged[name], exact(pair), bound)
        assert_within(found[name], judged[name], 2 * bound)
    assert not np.any(found["zero"])


def test_what_is_smaller_than_the_least_stays_smaller() -> None:
    small = jnp.full((1, 16), 2.0**-20)
    # The mean square 2^-40 counts as 2^-10, and its root as 2^-5: all exact.
    found = with_magnitude_of(small, jnp.full((1, 16), 3.0), least=2.0**-10)
    assert_same_bits(found, np.full((1, 16), 3 * 2.0**-15, np.float32))


def test_in_bfloat16_each_step_is_rounded() -> None:
    # Small integers, so that squares and their sum are exact and no order of the sum shows.
    x, pattern = np.random.default_rng(3).integers(-8, 9, (2, 16, 64)).astype(ml_dtypes.bfloat16)
    x[0] = 0

    def root(square: np.ndarray) -> np.ndarray:
        return np.sqrt(square.astype(np.float64)).astype(x.dtype)

    def mean_square(x: np.ndarray) -> np.ndarray:
        return np.mean(np.square(x).astype(np.float32), axis=-1, keepdims=True).astype(x.dtype)

    found = np.maximum(mean_square(x), np.array(LEAST).astype(x.dtype))
    expected = np.divide(np.multiply(x, root(mean_square(pattern))), root(found))
    step_by_step = jax.jit(scaled, compiler_options={"xla_allow_excess_precision": False})
    assert_same_bits(step_by_step(Pair(jnp.asarray(x), jnp.asarray(pattern))), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_has_the_same_bits_alone_and_among_others(dtype: str) -> None:
    rows = [pair(16, 1, width, dtype=dtype) for width in (24, 640, 2048)]
    compiled = row_stable(lambda pairs: [scaled(pair) for pair in pairs])
    together = compiled(rows)
    for count in (1, 7):
        some = compiled([Pair(x[:count], pattern[:count]) for x, pattern in rows])
        for found, expected in zip(some, together, strict=True):
            assert_same_bits(found, expected[:count])


unbounded = jax.jit(partial(with_magnitude_of, least=0.0))


@settings(max_examples=20, deadline=None)
@given(power=st.integers(-20, 20), seed=st.integers(0, 1000))
def test_the_result_has_the_patterns_magnitude_whatever_that_of_x(power: int, seed: int) -> None:
    x, pattern = normal(4, 64, seed=seed), normal(4, 64, seed=seed + 1)
    found = unbounded(jnp.asarray(x), jnp.asarray(pattern))
    larger = unbounded(jnp.asarray(np.ldexp(x, power)), jnp.asarray(pattern))
    assert_same_bits(larger, found)
    wanted = np.mean(float64(pattern) ** 2, axis=-1)
    # A square has twice the relative error of what is squared.
    assert_within(
        np.mean(float64(found) ** 2, axis=-1), wanted, 2 * (summed(64) + 7 * UNIT) * wanted
    )


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: with_magnitude_of(x, x[::-1], least=1e-5),
        lambda x: rms_norm(x, None, epsilon=1e-6, offset=0.0, rounding="activation"),
    ],
    ids=["with_magnitude_of", "rms_norm"],
)
def test_squares_are_rounded_in_large_arrays_too(operation: Callable[[Array], Array]) -> None:
    """Reductions of 4,096 elements or more took squares that nobody had rounded to bfloat16."""
    x = jnp.asarray(normal(1000, 32), jnp.bfloat16)
    compiled = jax.jit(operation, compiler_options={"xla_allow_excess_precision": False})
    together = compiled(x)
    some = jnp.concatenate([x[:50], x[-50:]])
    assert_same_bits(compiled(some), jnp.concatenate([together[:50], together[-50:]]))
