"""Rotary embedding against the spec, and angles and spec against float64."""

from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import Array
from refimpl_kernels import spec
from refimpl_kernels.rope import AngleForm, RopeRounding, apply_rope, rope_angles

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

FORMS: tuple[AngleForm, ...] = ("multiply", "divide")
ROUNDINGS: tuple[RopeRounding, ...] = ("float32", "activation")
every_form = pytest.mark.parametrize("form", FORMS)


class Case(NamedTuple):
    shape: tuple[int, int, int, int]
    theta: float
    factor: float
    proportion: float
    dtype: str

    @property
    def rope(self) -> dict[str, Any]:
        return {"theta": self.theta, "factor": self.factor, "proportion": self.proportion}

    def arrays(self) -> tuple[Array, Array]:
        b, t, _, _ = self.shape
        positions = np.random.default_rng(0).integers(0, 8192, (b, t))
        return jnp.asarray(normal(*self.shape), self.dtype), jnp.asarray(positions, jnp.int32)


CASES = [
    Case(shape, theta, factor, proportion, dtype)
    for shape, theta, factor, proportion in [
        ((1, 1, 1, 16), 1e4, 1.0, 1.0),
        ((2, 5, 4, 64), 1e6, 8.0, 1.0),
        ((1, 3, 2, 256), 1e6, 1.0, 1.0),
        ((3, 1, 8, 256), 1e4, 1.0, 1.0),
        ((2, 3, 2, 512), 1e6, 1.0, 0.25),
    ]
    for dtype in ("float32", "bfloat16")
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


Inputs = dict[Case, tuple[Array, Array]]


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
            case: spec.rope(x, positions, **case.rope) for case, (x, positions) in inputs.items()
        }

    def run_fast(inputs: Inputs) -> dict[Case, list[Array]]:
        found = {}
        for case, (x, positions) in inputs.items():
            angles = rope_angles(positions, head_width=case.shape[-1], **case.rope)
            found[case] = [apply_rope(x, angles, rounding=rounding) for rounding in ROUNDINGS]
        return found

    inputs = {case: case.arrays() for case in CASES}
    judged, fast = jax.jit(run_spec)(inputs), jax.jit(run_fast)(inputs)
    return {case: Results(judged[case], *fast[case]) for case in CASES}


def exact_angles(
    positions: np.ndarray,
    *,
    head_width: int,
    theta: float,
    factor: float = 1.0,
    proportion: float = 1.0,
) -> np.ndarray:
    share = np.arange(0, head_width, 2) / head_width
    return positions[..., None] * np.where(share < proportion, theta**-share, 0) / factor


def exact(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rotation in float64, |a| + |b| of each pair, and each angle."""
    x, positions = (np.asarray(array) for array in case.arrays())
    angles = exact_angles(positions, head_width=case.shape[-1], **case.rope)[:, :, None]
    first, second = np.split(float64(x), 2, axis=-1)
    turned = (first + 1j * second) * np.exp(1j * angles)
    magnitude = np.abs(first) + np.abs(second)
    return np.concatenate([turned.real, turned.imag], -1), np.tile(magnitude, 2), np.tile(angles, 2)


def bound(case: Case) -> np.ndarray:
    """Error of one float32 rotation.

    The angle errs by 4 roundings of its own in the fast form. The spec takes the power in float32,
    whose exponent -i ln(theta) is below 14 and rounded: 14 more. Sine, cosine (2 units each), the
    products and the sum add 5 units of the pair.
    """
    _, magnitude, angles = exact(case)
    return magnitude * (18 * UNIT * angles + 5 * UNIT)


@every_case
def test_the_spec_is_the_formula(case: Case) -> None:
    found = results()[case].spec
    assert found.dtype == jnp.float32
    assert_within(found, exact(case)[0], bound(case))


@every_case
def test_float32_is_the_spec_and_bfloat16_is_the_spec_rounded_once(case: Case) -> None:
    found = results()[case]
    if case.dtype == "bfloat16":
        assert_rounded_once(found.once, found.spec, 2 * bound(case))
    else:
        assert found.once.dtype == jnp.float32
        assert_within(found.once, found.spec, 2 * bound(case))
        assert_same_bits(found.each_step, found.once)


@pytest.mark.parametrize("case", [case for case in CASES if case.dtype == "bfloat16"], ids=str)
def test_rounding_each_step_costs_a_few_units(case: Case) -> None:
    # Sine or cosine and the product round by a unit of each term, the sum by one of both.
    found, magnitude = results()[case], exact(case)[1]
    assert found.each_step.dtype == jnp.bfloat16
    assert_within(found.each_step, found.spec, 3.05 * BFLOAT16_UNIT * magnitude + 2 * bound(case))


def test_each_step_is_rounded_where_numerics_say_so() -> None:
    x = normal(2, 5, 4, 64).astype(ml_dtypes.bfloat16)
    angles = jnp.asarray(100 * normal(2, 5, 32))
    cosine, sine = (
        np.asarray(wave)[:, :, None].astype(x.dtype) for wave in (jnp.cos(angles), jnp.sin(angles))
    )
    first, second = np.split(x, 2, axis=-1)
    expected = [
        np.subtract(np.multiply(first, cosine), np.multiply(second, sine)),
        np.add(np.multiply(second, cosine), np.multiply(first, sine)),
    ]
    step_by_step = jax.jit(
        partial(apply_rope, rounding="activation"),
        compiler_options={"xla_allow_excess_precision": False},
    )
    assert_same_bits(step_by_step(jnp.asarray(x), angles), np.concatenate(expected, -1))


@every_form
@pytest.mark.parametrize(
    ("theta", "head_width", "last"), [(1e4, 256, 8191), (1e6, 256, 262143), (1e4, 16, 262143)]
)
def test_angles_err_by_their_roundings(
    form: AngleForm, theta: float, head_width: int, last: int
) -> None:
    positions = np.unique(np.append(np.arange(0, last, 61), [1, 2, 255, 256, 257, last]))
    angles = jax.jit(partial(rope_angles, head_width=head_width, theta=theta, form=form))
    found = angles(jnp.asarray(positions[None], jnp.int32))
    expected = exact_angles(positions[None], head_width=head_width, theta=theta)
    # Positions and exponents are exact. The timescale rounds, the reciprocal, and the product; or
    # the timescale and the quotient. 1.0001 is for the units' products.
    roundings = {"multiply": 3, "divide": 2}[form]
    assert_within(found, expected, 1.0001 * roundings * UNIT * expected)


@pytest.mark.parametrize(
    ("theta", "position", "difference"),
    [(1e4, 8191, 2.4e-4), (1e6, 131071, 3.9e-3), (1e6, 262143, 1.56e-2)],
)
def test_the_two_forms_differ_as_documented(theta: float, position: int, difference: float) -> None:
    positions = jnp.full((1, 1), position, jnp.int32)
    by_product, by_quotient = (
        jax.jit(partial(rope_angles, head_width=256, theta=theta, form=form))(positions)
        for form in FORMS
    )
    found = np.max(np.abs(float64(by_product) - float64(by_quotient)))
    # Every step is one correctly rounded operation, so the figure is the same on every machine.
    assert found == pytest.approx(difference, rel=0.02)


@every_form
def test_a_factor_of_eight_slows_positions_down_eightfold(form: AngleForm) -> None:
    positions = jnp.asarray([[0, 1, 77, 4095]], jnp.int32)
    angles = partial(rope_angles, head_width=64, theta=1e6, form=form)
    assert_same_bits(angles(8 * positions, factor=8.0), angles(positions))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_neighbouring_positions_differ_where_bfloat16_has_no_odd_numbers(
    dtype: jnp.dtype, rounding: RopeRounding
) -> None:
    angles = rope_angles(jnp.asarray([[256, 257]], jnp.int32), head_width=64, theta=1e4)
    x = jnp.ones((1, 2, 1, 64), dtype)
    found = float64(jax.jit(partial(apply_rope, rounding=rounding))(x, angles))
    # Pair 0 turns by one radian, which moves it by 2 sin(1/2) sqrt(2) = 1.36.
    moved = np.hypot(*(found[0, 1, 0] - found[0, 0, 0])[[0, 32]])
    assert moved == pytest.approx(1.356, abs=4 * BFLOAT16_UNIT)


def test_a_dimension_turns_into_the_one_half_a_head_away() -> None:
    unit = jnp.eye(8)[None, None]  # eight heads, head i pointing along dimension i
    angles = rope_angles(jnp.asarray([[3]], jnp.int32), head_width=8, theta=1e4)
    turned = np.asarray(jax.jit(apply_rope)(unit, angles))[0, 0]
    cosine, sine = np.diag(np.cos(angles[0, 0])), np.diag(np.sin(angles[0, 0]))
    expected = np.block([[cosine, sine], [-sine, cosine]])
    assert_within(turned, expected, 4 * UNIT)


def test_position_zero_changes_no_bit() -> None:
    x = jnp.asarray(normal(1, 1, 4, 64), jnp.bfloat16)
    angles = rope_angles(jnp.zeros((1, 1), jnp.int32), head_width=64, theta=1e4)
    for rounding in ROUNDINGS:
        assert_same_bits(apply_rope(x, angles, rounding=rounding), x)


@every_form
def test_a_proportion_turns_the_first_pairs_as_all_and_the_others_not_at_all(
    form: AngleForm,
) -> None:
    positions = jnp.asarray([[0, 1, 257, 65_537, 262_143]], jnp.int32)
    angles = partial(rope_angles, head_width=512, theta=1e6, form=form)
    some = jax.jit(partial(angles, proportion=0.25))(positions)
    assert_same_bits(some[..., :64], jax.jit(angles)(positions)[..., :64])
    assert_same_bits(some[..., 64:], np.zeros((1, 5, 192), np.float32))

    x = jnp.asarray(normal(1, 5, 2, 512))
    for dtype in (jnp.float32, jnp.bfloat16):
        for rounding in ROUNDINGS:
            turned = apply_rope(x.astype(dtype), some, rounding=rounding)
            for still in (slice(64, 256), slice(320, 512)):
                assert_same_bits(turned[..., still], x[..., still].astype(dtype))


ROTATE = jax.jit(
    lambda x, positions: apply_rope(x, rope_angles(positions, head_width=64, theta=1e4))
)


@settings(max_examples=25, deadline=None)
@given(near=st.integers(0, 500), far=st.integers(0, 500), shift=st.integers(0, 500))
def test_a_product_depends_on_the_distance_alone(near: int, far: int, shift: int) -> None:
    x = jnp.asarray(normal(1, 4, 1, 64))
    positions = jnp.asarray([[near, far, near + shift, far + shift]], jnp.int32)
    query, key, later_query, later_key = float64(ROTATE(x.at[0, 2:].set(x[0, :2]), positions))[
        0, :, 0
    ]
    # Four angles of at most 1,000 radians, 3 roundings each; sine, cosine, products as above.
    lengths = np.linalg.norm(x[0, 0]) * np.linalg.norm(x[0, 1])
    assert_within(query @ key, later_query @ later_key, lengths * (12 * 1000 + 20) * UNIT)
    assert np.linalg.norm(query) == pytest.approx(np.linalg.norm(x[0, 0]), rel=5 * UNIT)


def test_a_row_has_the_same_bits_alone_and_among_others() -> None:
    x, positions = jnp.asarray(normal(8, 1, 4, 256)), jnp.arange(8)[:, None] * 1000
    compiled = row_stable(
        lambda x, positions: apply_rope(x, rope_angles(positions, head_width=256, theta=1e6))
    )
    together = compiled(x, positions)
    for rows in (1, 3):
        assert_same_bits(compiled(x[:rows], positions[:rows]), together[:rows])
