"""What "chain" promises beside the right numbers: bits that no companion changes, and no copy.

A row's bits must be those it has alone: with 1 to 15 companions, at any place among them, whatever
they hold, in a program of the same shape or another. A request's tokens rest on this.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import Array
from refimpl_kernels import linear as linear_module
from refimpl_kernels.gelu import gelu
from refimpl_kernels.lanes import sum_by_halves
from refimpl_kernels.linear import LinearImplementation, linear
from refimpl_kernels.matrix import (
    Matrix,
    OutputMajorMatrix,
    QuantizedMatrix,
    dequantize,
    padded_outputs,
    take_columns,
)
from refimpl_kernels.norm import rms_norm
from refimpl_weights.quantized import QuantizedArray

from refimpl.model.device import to_device
from tests.kernel_cases import STORED_AS, assert_same_bits, matrix, normal, row_stable

MOST = 16
SHAPES = {
    # Fewer outputs than a vector of the processor, one more, and an odd number of vectors.
    (64, 5): ("float32", "q32-", "o32-"),
    # One step, which is no loop any more.
    (4, 16): ("float32",),
    (64, 17): ("q32-", "o16"),
    # A lane of one step.
    (16, 24): ("o16-",),
    (96, 100): STORED_AS,
    # Fused projections and the way back of Gemma 3 270M.
    (640, 4096): ("float32", "q32-", "o32"),
    (2048, 640): ("bfloat16", "q32", "o32-"),
    # A unit a step, as a head has it.
    (96, 8192): ("float32", "q16", "q32-"),
    # More groups than are in memory at once.
    (4096, 40): ("q16-", "q32", "o16-", "o32"),
}


@row_stable
def compiled(x: Array, weights: dict[str, Matrix]) -> dict[str, Array]:
    """Compiled anew for every number of rows, as for programs of several widths."""
    return {name: linear(x, weight, implementation="chain") for name, weight in weights.items()}


def chain(x: np.ndarray, weights: dict[str, Matrix]) -> dict[str, np.ndarray]:
    return jax.device_get(compiled(x, weights))


def matrices(*forms: str, inputs: int, outputs: int) -> dict[str, Matrix]:
    return {stored_as: matrix(stored_as, inputs, outputs) for stored_as in forms}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_has_the_same_bits_alone_and_among_others(shape: tuple[int, int]) -> None:
    weights = matrices(*SHAPES[shape], inputs=shape[0], outputs=shape[1])
    x = normal(MOST, shape[0])
    each = [chain(x[i : i + 1], weights) for i in range(MOST)]
    alone = {name: np.concatenate([row[name] for row in each]) for name in weights}
    for count in (2, 3, 4, 8, MOST):
        for start in (0, MOST - count):
            some = slice(start, start + count)
            found = chain(x[some], weights)
            for name in weights:
                assert_same_bits(found[name], alone[name][some])


def test_where_lanes_are_no_reduction_they_are_summed_by_halves() -> None:
    lanes = total = normal(3, 24, 16)
    while total.shape[-1] > 1:
        half = total.shape[-1] // 2
        total = total[..., :half] + total[..., half:]
    assert_same_bits(jax.jit(sum_by_halves)(lanes), total[..., 0])


def test_a_row_keeps_its_bits_through_a_narrow_gate() -> None:
    """Chains of one step stand between others' operations, and must not be rounded with them."""
    x, given = jnp.asarray(normal(MOST, 40)), jnp.asarray(normal(MOST, 8))
    into, out = jnp.asarray(normal(40, 8)), jnp.asarray(normal(8, 40))

    @row_stable
    def gated(x: Array, given: Array) -> Array:
        narrow = gelu(linear(x, into, implementation="chain")) * given
        return rms_norm(linear(narrow, out, implementation="chain"), None, epsilon=1e-6, offset=0.0)

    together = gated(x, given)
    for count in (1, 2, 4, 8):
        assert_same_bits(gated(x[:count], given[:count]), together[:count])


@pytest.mark.parametrize(("inputs", "outputs"), [(64, 2048), (64, 65536)])
@pytest.mark.parametrize("implementation", ["chain", "dot"])
def test_columns_for_the_caches_count_for_nothing(
    inputs: int, outputs: int, implementation: LinearImplementation
) -> None:
    held = matrix("q32-", inputs, outputs)
    assert isinstance(held, QuantizedMatrix)
    missing = padded_outputs(outputs) - outputs
    assert missing > 0
    values = jnp.pad(held.values, ((0, 0), (0, missing)), constant_values=99)
    padded = replace(held, values=values)
    assert padded.shape == held.shape
    x, ids = jnp.asarray(normal(3, inputs)), jnp.asarray([0, outputs - 1])
    product = partial(linear, x, implementation=implementation)
    for got, expected in (
        (product(padded), product(held)),
        (dequantize(padded), dequantize(held)),
        (take_columns(padded, ids), take_columns(held, ids)),
    ):
        assert_same_bits(got, expected)


def test_a_loaded_table_has_them_and_another_matrix_stays_as_it_lies() -> None:
    values = np.arange(4096 * 32, dtype=np.int64).reshape(4096, 32).astype(np.int8)
    stored = QuantizedArray(values, np.ones((4096, 1), np.float32), None)
    table = to_device([stored], is_table=True)
    assert isinstance(table, QuantizedMatrix)
    assert table.values.shape == (32, 4096 + 64)
    loaded = to_device([stored], is_table=False)
    assert isinstance(loaded, OutputMajorMatrix)
    assert loaded.values.shape == (4096, 32)
    for found in (table, loaded):
        np.testing.assert_array_equal(dequantize(found), values.T)


def test_a_row_of_bfloat16_does_too() -> None:
    weights = matrices("float32", "q32-", inputs=96, outputs=100)
    x = normal(MOST, 96).astype(ml_dtypes.bfloat16)
    together = chain(x, weights)
    for count in (1, 4):
        found = chain(x[:count], weights)
        for name in weights:
            assert_same_bits(found[name], together[name][:count])


def test_companions_may_hold_anything() -> None:
    weights, x = matrices(*STORED_AS, inputs=96, outputs=100), normal(4, 96)
    expected = chain(x, weights)
    for companion in (0.0, 1e30, np.inf, np.nan):
        x[1:3] = companion
        found = chain(x, weights)
        for name in weights:
            assert_same_bits(found[name][::3], expected[name][::3])


def test_the_program_around_it_changes_no_bit() -> None:
    x, weight = normal(MOST, 96), matrix("q32-", 96, 96)

    @jax.jit
    def two_layers(x: Array) -> tuple[Array, Array]:
        hidden = jnp.tanh(linear(x, weight, implementation="chain"))
        return hidden, linear(hidden, weight, implementation="chain")

    hidden, _ = jax.device_get(two_layers(x))
    expected = chain(hidden, {"q32-": weight})["q32-"]
    for count in (1, 4):
        assert_same_bits(two_layers(x[:count])[1], expected[:count])


def temporary_bytes(stored_as: str, *, implementation: LinearImplementation, rows: int) -> int:
    """What the head of Gemma 3 270M needs beside its weights and results."""
    inputs, outputs = 640, 262144

    def head(x: Array, weight: Array, *scales: Array) -> Array:
        stored = QuantizedMatrix(weight, *scales) if scales else weight
        return linear(x, stored, implementation=implementation)

    arguments = [((rows, inputs), "float32")]
    if stored_as == "q32-":
        arguments += [((inputs, outputs), "int8"), *[((inputs // 32, outputs), "float32")] * 2]
    else:
        arguments += [((inputs, outputs), stored_as)]
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in arguments]
    analysis = row_stable(head).lower(*shapes).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


@pytest.mark.parametrize("stored_as", ["bfloat16", "q32-"])
@pytest.mark.parametrize("count", [1, 8])
def test_the_chain_holds_no_wide_copy_of_the_weights(stored_as: str, count: int) -> None:
    # Two buffers of sums at most, and some scalars; the weights in float32 are 671 MB.
    sums = count * 262144 * 4
    assert temporary_bytes(stored_as, implementation="chain", rows=count) <= 2 * sums + 4096


@pytest.mark.parametrize("stored_as", ["bfloat16", "q32-"])
def test_dot_holds_a_tile_of_the_weights(stored_as: str) -> None:
    # A tile of weights is held twice: its values times scales, and less the minimums. The sums are
    # the result alone, which is not counted here: no other form of them is held.
    tile = 640 * linear_module.DOT_TILE * 4
    sums = 32 * 262144 * 4
    found = temporary_bytes(stored_as, implementation="dot", rows=32)
    assert found <= 2 * tile + sums // 8
