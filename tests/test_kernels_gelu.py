"""GELU against the spec, and the spec against float64."""

from typing import Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refimpl_kernels import spec
from refimpl_kernels.gelu import gelu

from tests.kernel_cases import (
    BFLOAT16_UNIT,
    UNIT,
    assert_rounded_once,
    assert_same_bits,
    assert_within,
    float64,
    normal,
    row_stable,
)

# Everything between the two flat ends, closely; and far outside, where the cube is large.
GRID = np.concatenate([np.linspace(-12, 12, 4801), [-1e4, -50, 50, 1e4]]).astype(np.float32)
# x * (1 + tanh) / 2, so errors are relative to x. tanh errs by its own 5 units (XLA's is a
# rational function) and by its argument's 5, times u sech^2(u) < 0.45; 1 + tanh, product: 3 more.
ERROR = (5 + 5 * 0.45 + 3) * UNIT


def exact(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def test_the_spec_is_the_formula() -> None:
    assert_within(jax.jit(spec.gelu)(GRID), exact(GRID), ERROR * np.abs(GRID))


@pytest.mark.parametrize("rounding", ["float32", "activation"])
def test_in_float32_both_roundings_are_the_spec(
    rounding: Literal["float32", "activation"],
) -> None:
    found = jax.jit(lambda x: gelu(x, rounding=rounding))(GRID)
    assert found.dtype == jnp.float32
    assert_within(found, spec.gelu(jnp.asarray(GRID)), 2 * ERROR * np.abs(GRID))


def test_bfloat16_is_rounded_once() -> None:
    x = jnp.asarray(GRID, jnp.bfloat16)
    assert_rounded_once(jax.jit(gelu)(x), spec.gelu(x), 2 * ERROR * np.abs(float64(x)))


def test_each_step_is_rounded_where_numerics_say_so() -> None:
    x = GRID.astype(ml_dtypes.bfloat16)
    root, cubic, one, half = np.array([np.sqrt(2 / np.pi), 0.044715, 1, 0.5]).astype(x.dtype)
    bent = np.add(x, np.multiply(cubic, np.multiply(x, np.multiply(x, x))))
    curve = np.tanh(float64(np.multiply(root, bent))).astype(x.dtype)
    expected = np.multiply(x, np.multiply(half, np.add(one, curve)))

    step_by_step = jax.jit(
        lambda x: gelu(x, rounding="activation"),
        compiler_options={"xla_allow_excess_precision": False},
    )
    assert_same_bits(step_by_step(jnp.asarray(x)), expected)

    # The argument rounds seven times, constants included, times 0.45 as above; tanh once, and
    # 1 + tanh once at up to 2, halved; two products.
    units = (7 * 0.45 + 1 + 2) / 2 + 2
    assert_within(expected, exact(x), units * BFLOAT16_UNIT * np.abs(float64(x)))


# Narrow rows, too: without padding, LLVM would make vectors across them, and round otherwise.
@pytest.mark.parametrize("width", [4, 8, 24, 2048])
def test_a_row_has_the_same_bits_alone_and_among_others(width: int) -> None:
    x = jnp.asarray(3 * normal(512, 1, width))[: max(8, 4096 // width)]
    compiled = row_stable(gelu)
    together = compiled(x)
    for rows in (1, 2, 3):
        assert_same_bits(compiled(x[:rows]), together[:rows])


BOTH_SIDES = jax.jit(lambda x: (gelu(x), gelu(-x)))


@settings(max_examples=30, deadline=None)
@given(x=st.floats(-1e5, 1e5, width=32))
def test_the_two_sides_differ_by_x(x: float) -> None:
    # gelu(x) - gelu(-x) = x (1 + tanh) / 2 + x (1 - tanh) / 2
    right, left = BOTH_SIDES(jnp.full(1, x, jnp.float32))
    # Numbers below the smallest normal one may be flushed to zero.
    tiny = float(np.finfo(np.float32).tiny)
    assert_within(float64(right) - float64(left), np.array([x]), 2 * ERROR * abs(x) + tiny)
