"""RMSNorm against the spec, and the spec against float64."""

from functools import cache, partial
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
from refimpl_kernels.norm import NormRounding, rms_norm

from tests.kernel_cases import (
    BFLOAT16_UNIT,
    UNIT,
    assert_rounded_once,
    assert_same_bits,
    assert_within,
    float64,
    normal,
    row_stable,
    summed,
)

EPSILON = 1e-6
ROUNDINGS: tuple[NormRounding, ...] = ("float32", "activation")


class Case(NamedTuple):
    shape: tuple[int, ...]
    offset: float
    dtype: str
    has_scale: bool = True

    def arrays(self) -> tuple[Array, Array | None]:
        scale = jnp.asarray(normal(self.shape[-1], seed=1), self.dtype)
        return jnp.asarray(3 * normal(*self.shape), self.dtype), scale if self.has_scale else None


CASES = [
    Case(shape, offset, dtype)
    for shape in [(8,), (1, 1, 640), (5, 33), (2, 3, 4, 256), (1, 2048)]
    for offset in (0.0, 1.0)
    for dtype in ("float32", "bfloat16")
] + [Case((3, 64), 1.0, dtype, has_scale=False) for dtype in ("float32", "bfloat16")]

every_case = pytest.mark.parametrize("case", CASES, ids=str)


Inputs = dict[Case, tuple[Array, Array | None]]


class Results(NamedTuple):
    spec: Array
    once: Array
    each_step: Array


@cache
def results() -> dict[Case, Results]:
    """All cases in one program, as to compile is most of the time that a case takes.

    The spec has a program of its own, lest XLA find what it shares with the fast path.
    """

    def run_spec(inputs: Inputs) -> dict[Case, Array]:
        return {
            case: spec.rms_norm(x, scale, epsilon=EPSILON, offset=case.offset)
            for case, (x, scale) in inputs.items()
        }

    def run_fast(inputs: Inputs) -> dict[Case, list[Array]]:
        return {
            case: [
                rms_norm(x, scale, epsilon=EPSILON, offset=case.offset, rounding=rounding)
                for rounding in ROUNDINGS
            ]
            for case, (x, scale) in inputs.items()
        }

    inputs = {case: case.arrays() for case in CASES}
    judged, fast = jax.jit(run_spec)(inputs), jax.jit(run_fast)(inputs)
    return {case: Results(judged[case], *fast[case]) for case in CASES}


def exact(x: np.ndarray, scale: np.ndarray | None, offset: float) -> np.ndarray:
    x = x.astype(np.float64)
    normalised = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPSILON)
    return normalised if scale is None else normalised * (offset + scale.astype(np.float64))


def bound(case: Case) -> np.ndarray:
    """Error of one float32 RMSNorm.

    The root halves the error of the mean square. The division by the width, the epsilon, root,
    reciprocal and two products round once each, XLA's rsqrt perhaps twice: 7 roundings. offset +
    scale may cancel, so its rounding is relative to the larger of them.
    """
    x, scale = (None if array is None else np.asarray(array) for array in case.arrays())
    assert x is not None
    relative = summed(case.shape[-1]) / 2 + 7 * UNIT
    return relative * np.abs(exact(x, scale, case.offset)) + UNIT * np.abs(exact(x, None, 0.0))


@every_case
def test_the_spec_is_the_formula(case: Case) -> None:
    x, scale = (None if array is None else np.asarray(array) for array in case.arrays())
    assert x is not None
    assert results()[case].spec.dtype == jnp.float32
    assert_within(results()[case].spec, exact(x, scale, case.offset), bound(case))


@every_case
def test_float32_is_the_spec_and_bfloat16_is_the_spec_rounded_once(case: Case) -> None:
    found = results()[case]
    if case.dtype == "bfloat16":
        assert_rounded_once(found.once, found.spec, 2 * bound(case))
    else:
        assert found.once.dtype == jnp.float32
        assert_within(found.once, found.spec, 2 * bound(case))
        assert_within(found.each_step, found.spec, 2 * bound(case))


@pytest.mark.parametrize("case", [case for case in CASES if case.dtype == "bfloat16"], ids=str)
def test_rounding_each_step_costs_a_few_units(case: Case) -> None:
    # Squares, mean, epsilon and root round relative to the result, halved by the root where they
    # come before it: 2.5 units. Two products: 2. The factor: 1 of the larger of offset and scale.
    found = results()[case]
    x = np.asarray(case.arrays()[0])
    few = BFLOAT16_UNIT * (4.5 * np.abs(float64(found.spec)) + np.abs(exact(x, None, 0.0)))
    assert found.each_step.dtype == jnp.bfloat16
    # The units of all factors multiply; 1.05 is above (1 + 2^-8)^6 and what float32 adds.
    assert_within(found.each_step, found.spec, 1.05 * few)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_each_step_is_rounded_where_numerics_say_so(offset: float) -> None:
    # Small integers, so that squares and their sum are exact and no order of the sum shows.
    x = np.random.default_rng(2).integers(-8, 9, (16, 64)).astype(ml_dtypes.bfloat16)
    x[0] = 0  # which the epsilon keeps from becoming nan
    scale = normal(64).astype(ml_dtypes.bfloat16)
    epsilon, one = (np.array(number).astype(x.dtype) for number in (EPSILON, offset))
    mean = np.mean(np.square(x).astype(np.float32), axis=-1, keepdims=True).astype(x.dtype)
    root = np.sqrt(np.add(mean, epsilon).astype(np.float64))
    normalised = np.multiply(x, (1 / root).astype(x.dtype))
    expected = np.multiply(normalised, np.add(one, scale))

    step_by_step = jax.jit(
        partial(rms_norm, epsilon=EPSILON, offset=offset, rounding="activation"),
        compiler_options={"xla_allow_excess_precision": False},
    )
    found = step_by_step(jnp.asarray(x), jnp.asarray(scale))
    assert_same_bits(found, expected)
    assert (float64(found[0]) == 0).all()


def test_a_row_has_the_same_bits_alone_and_among_others() -> None:
    # Whole vectors of 512 bits and others, of released models and not.
    widths = (24, 40, 96, 256, 640, 1152, 2048)
    rows = {width: jnp.asarray(normal(16, 1, width)) for width in widths}
    scales = {width: jnp.asarray(normal(width)) for width in widths}
    compiled = row_stable(
        lambda x: jax.tree.map(partial(rms_norm, epsilon=EPSILON, offset=1.0), x, scales)
    )
    together = compiled(rows)
    for count in (1, 2, 6, 7):
        some = compiled({width: x[:count] for width, x in rows.items()})
        for width in widths:
            assert_same_bits(some[width], together[width][:count])


UNSCALED = jax.jit(partial(rms_norm, epsilon=0.0, offset=1.0))


@settings(max_examples=20, deadline=None)
@given(power=st.integers(-20, 20), seed=st.integers(0, 1000))
def test_without_epsilon_a_power_of_two_changes_no_bit(power: int, seed: int) -> None:
    x, scale = normal(4, 64, seed=seed), jnp.asarray(normal(64))
    scaled = jnp.asarray(np.ldexp(x, power))
    assert_same_bits(UNSCALED(scaled, scale), UNSCALED(jnp.asarray(x), scale))
