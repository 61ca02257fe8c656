"""Linear maps against the spec, and the spec against float64."""

import inspect
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import Array
from refimpl_kernels import linear as linear_module
from refimpl_kernels import spec
from refimpl_kernels.linear import LinearImplementation, linear
from refimpl_kernels.matrix import (
    Matrix,
    OutputMajorMatrix,
    QuantizedMatrix,
    dequantize,
    slice_columns,
    take_columns,
)

from tests.kernel_cases import (
    STORED_AS,
    assert_rounded_once,
    assert_same_bits,
    assert_within,
    float64,
    matrix,
    normal,
    parts,
    row_stable,
    summed,
    turned,
)

IMPLEMENTATIONS: tuple[LinearImplementation, ...] = ("dot", "chain")
QUANTIZED = tuple(stored_as for stored_as in STORED_AS if stored_as[0] in "qo")

every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
every_stored_form = pytest.mark.parametrize("stored_as", STORED_AS)
every_quantized_form = pytest.mark.parametrize("stored_as", QUANTIZED)


class Case(NamedTuple):
    stored_as: str
    rows: tuple[int, ...]
    inputs: int
    outputs: int
    dtype: str

    def arrays(self) -> tuple[Array, Matrix]:
        x = jnp.asarray(normal(*self.rows, self.inputs), self.dtype)
        return x, matrix(self.stored_as, self.inputs, self.outputs)


CASES = [
    Case(stored_as, rows, inputs, outputs, dtype)
    for stored_as in STORED_AS
    for rows, inputs, outputs, dtype in [
        ((), 32, 7, "float32"),
        ((2, 3), 64, 33, "float32"),
        ((2, 3), 64, 33, "bfloat16"),
        ((1,), 640, 48, "float32"),
    ]
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
Inputs = dict[Case, tuple[Array, Matrix]]


def spec_linear(x: Array, weight: Matrix) -> Array:
    if isinstance(weight, OutputMajorMatrix):
        return spec_linear(x, turned(weight))
    if isinstance(weight, QuantizedMatrix):
        return spec.linear(x, spec.dequantize(weight.values, weight.scales, weight.minimums))
    return spec.linear(x, weight)


@cache
def results() -> dict[Case, dict[str, Array]]:
    """All cases in one program, as to compile is most of the time that a case takes.

    The spec has a program of its own, lest XLA find what it shares with the fast paths.
    """

    def run_spec(inputs: Inputs) -> dict[Case, Array]:
        return {case: spec_linear(x, weight) for case, (x, weight) in inputs.items()}

    def run_fast(inputs: Inputs) -> dict[Case, dict[str, Array]]:
        return {
            case: {name: linear(x, weight, implementation=name) for name in IMPLEMENTATIONS}
            for case, (x, weight) in inputs.items()
        }

    inputs = {case: case.arrays() for case in CASES}
    judged, fast = jax.jit(run_spec)(inputs), jax.jit(run_fast)(inputs)
    return {case: {"spec": judged[case], **fast[case]} for case in CASES}


def exact(x: Array, weight: Matrix) -> tuple[np.ndarray, np.ndarray]:
    """The product in float64, and the bound of one in float32."""
    products, minimums = parts(weight)
    magnitude = np.abs(float64(x)) @ (np.abs(products) + np.abs(minimums))
    return float64(x) @ (products - minimums), summed(x.shape[-1] + 1) * magnitude


@every_case
def test_the_spec_is_the_product(case: Case) -> None:
    expected, bound = exact(*case.arrays())
    assert results()[case]["spec"].dtype == jnp.float32
    assert_within(results()[case]["spec"], expected, bound)


@every_case
@every_implementation
def test_float32_is_the_spec_and_bfloat16_is_the_spec_rounded_once(
    case: Case, implementation: LinearImplementation
) -> None:
    found, expected = results()[case][implementation], results()[case]["spec"]
    _, bound = exact(*case.arrays())
    if case.dtype == "bfloat16":
        assert_rounded_once(found, expected, 2 * bound)
    else:
        assert found.dtype == jnp.float32
        assert_within(found, expected, 2 * bound)


INTEGERS = jax.jit(
    lambda x, weight: [linear(x, weight, implementation=name) for name in IMPLEMENTATIONS]
)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_integers_that_fit_float32_multiply_exactly(seed: int) -> None:
    random = np.random.default_rng(seed)
    x = random.integers(-100, 101, (3, 32))
    values = random.integers(-128, 128, (32, 20), dtype=np.int8)
    scales, minimums = random.integers(1, 9, (2, 2, 20)).astype(np.float32)
    weight = QuantizedMatrix(jnp.asarray(values), jnp.asarray(scales), jnp.asarray(minimums))
    wide = np.repeat(scales, 16, axis=0) * values - np.repeat(minimums, 16, axis=0)
    for found in INTEGERS(jnp.asarray(x, jnp.float32), weight):
        # Sums stay below 32 * 100 * (8 * 128 + 8) < 2^24, where float32 has every integer.
        np.testing.assert_array_equal(found, x @ wide.astype(np.int64))


@every_stored_form
def test_more_outputs_than_a_tile_are_the_spec(
    stored_as: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_module, "DOT_TILE", 64)
    x, weight = jnp.asarray(normal(3, 64)), matrix(stored_as, 64, 200)  # 3 tiles and an eighth
    found = jax.jit(lambda x, weight: linear(x, weight, implementation="dot"))(x, weight)
    expected, bound = exact(x, weight)
    assert_within(found, expected, bound)


@every_quantized_form
def test_dequantized_weights_are_the_spec_bit_for_bit(stored_as: str) -> None:
    weight = matrix(stored_as, 64, 24)
    assert isinstance(weight, QuantizedMatrix | OutputMajorMatrix)
    by_input = turned(weight) if isinstance(weight, OutputMajorMatrix) else weight
    assert isinstance(by_input, QuantizedMatrix)
    expected = spec.dequantize(by_input.values, by_input.scales, by_input.minimums)
    products, minimums = parts(weight)
    assert_same_bits(expected, (products - minimums).astype(np.float32))
    assert_same_bits(dequantize(weight), expected)
    # A compiler may round product and difference once: no change, as these products are exact.
    assert_same_bits(jax.jit(dequantize)(weight), expected)


@every_stored_form
@pytest.mark.parametrize("shape", [(), (5,), (2, 1, 3)])
def test_taken_columns_are_the_weights_columns(stored_as: str, shape: tuple[int, ...]) -> None:
    weight = matrix(stored_as, 64, 24)
    indices = np.random.default_rng(0).integers(0, 24, shape).astype(np.int32)
    found = jax.jit(take_columns)(weight, jnp.asarray(indices))
    products, minimums = parts(weight)
    dense = np.asarray(products - minimums)[:, indices]
    dtype = weight.dtype if isinstance(weight, Array) else jnp.float32
    assert found.dtype == dtype
    assert_same_bits(found, np.moveaxis(dense, 0, -1).astype(dtype))


@pytest.mark.parametrize("stored_as", ["q16-", "o16-"])
def test_a_quantized_matrix_knows_its_shape_block_and_size(stored_as: str) -> None:
    weight = matrix(stored_as, 64, 24)
    assert isinstance(weight, QuantizedMatrix | OutputMajorMatrix)
    assert (weight.shape, weight.block) == ((64, 24), 16)
    assert weight.nbytes == 64 * 24 + 2 * 4 * 24 * 4
    some = slice_columns(weight, 5, 7)
    assert isinstance(some, type(weight))
    assert (some.shape, some.block) == ((64, 7), 16)
    assert_same_bits(dequantize(some), dequantize(weight)[:, 5:12])


@every_implementation
def test_other_inputs_than_the_matrix_has_are_refused(implementation: LinearImplementation) -> None:
    with pytest.raises(ValueError, match="x has 16 inputs, the matrix 32"):
        linear(jnp.zeros((1, 16)), jnp.zeros((32, 4)), implementation=implementation)


def test_an_unknown_implementation_is_refused() -> None:
    unchecked = inspect.unwrap(linear)  # the tests' type checks would refuse the name first
    with pytest.raises(ValueError, match="'dot' or 'chain', got 'sum'"):
        unchecked(jnp.zeros((1, 16)), jnp.zeros((16, 4)), implementation="sum")


def test_a_quantized_block_that_is_no_multiple_of_eight_is_for_dot_alone() -> None:
    weight = QuantizedMatrix(jnp.ones((16, 16), jnp.int8), jnp.asarray(normal(4, 16)))
    x = jnp.asarray(normal(2, weight.shape[0]))
    with pytest.raises(NotImplementedError, match=r"takes 8 inputs at a step, got .*; use 'dot'"):
        linear(x, weight, implementation="chain")
    expected, bound = exact(x, weight)
    assert_within(jax.jit(partial(linear, implementation="dot"))(x, weight), expected, bound)


@pytest.mark.parametrize(("inputs", "blocks"), [(32, 4), (24, 1)])
def test_a_block_stored_by_outputs_that_is_no_multiple_of_sixteen_is_too(
    inputs: int, blocks: int
) -> None:
    scales = jnp.asarray(normal(8, blocks))
    weight = OutputMajorMatrix(jnp.ones((8, inputs), jnp.int8), scales)
    x = jnp.asarray(normal(2, inputs))
    with pytest.raises(NotImplementedError, match=r"takes 16 inputs .* at a step, .*; use 'dot'"):
        linear(x, weight, implementation="chain")
    expected, bound = exact(x, weight)
    assert_within(jax.jit(partial(linear, implementation="dot"))(x, weight), expected, bound)


@pytest.mark.parametrize("inputs", [1, 4, 20])
def test_any_number_of_inputs_is_a_chain_of_just_those(inputs: int) -> None:
    x, weight = jnp.asarray(normal(3, inputs)), jnp.asarray(normal(inputs, 16))
    padded = [((0, 0), (0, -inputs % 8)), ((0, -inputs % 8), (0, 0))]
    run = row_stable(partial(linear, implementation="chain"))
    whole = run(*(jnp.pad(array, pad) for array, pad in zip((x, weight), padded, strict=True)))
    assert_same_bits(run(x, weight), whole)
    expected, bound = exact(x, weight)
    assert_within(whole, expected, bound)
