"""The value type for block-quantised weights: its arithmetic, its shape and its guard."""

import numpy as np
import pytest
from refimpl_weights.quantized import QuantizedArray


def test_a_weight_is_its_integer_times_its_blocks_scale() -> None:
    array = QuantizedArray(
        values=np.array([[1, -2, 3, 4], [5, 6, -128, 127]], np.int8),
        scales=np.array([[0.5, 2.0], [-1.0, 0.25]], np.float32),
    )
    assert array.shape == (2, 4)
    assert array.block == 2
    assert array.nbytes == 8 + 16
    expected = np.array([[0.5, -1.0, 6.0, 8.0], [-5.0, -6.0, -32.0, 31.75]], np.float32)
    np.testing.assert_array_equal(array.dequantize(), expected, strict=True)


def test_minimums_are_subtracted_after_the_product() -> None:
    array = QuantizedArray(
        values=np.array([[1, 2, 3, 4]], np.int8),
        scales=np.array([[0.5, 2.0]], np.float32),
        minimums=np.array([[1.0, -8.0]], np.float32),
    )
    assert array.nbytes == 4 + 8 + 8
    expected = np.array([[-0.5, 0.0, 14.0, 16.0]], np.float32)
    np.testing.assert_array_equal(array.dequantize(), expected, strict=True)


def test_the_product_is_rounded_to_float32_before_the_minimum_is_subtracted() -> None:
    # (1 + 2^-23) * 3 = 3 + 3 * 2^-23 lies between two float32 numbers, 2^-22 apart, and rounds to
    # 3 + 2^-21. A fused multiply-subtract would leave 3 * 2^-23 of it, which float32 could hold.
    one_and_a_bit = np.nextafter(np.float32(1), np.float32(2))
    array = QuantizedArray(
        values=np.array([[3]], np.int8),
        scales=np.array([[one_and_a_bit]], np.float32),
        minimums=np.array([[3.0]], np.float32),
    )
    assert array.dequantize()[0, 0] == 2.0**-21


def test_a_stack_of_matrices_is_each_of_its_matrices() -> None:
    generator = np.random.default_rng(0)
    values = generator.integers(-128, 128, (3, 4, 64), dtype=np.int8)
    scales, minimums = generator.standard_normal((2, 3, 4, 2), dtype=np.float32)
    stack = QuantizedArray(values, scales, minimums)
    assert stack.shape == (3, 4, 64)
    assert stack.block == 32
    for index in range(3):
        matrix = QuantizedArray(values[index], scales[index], minimums[index])
        np.testing.assert_array_equal(stack.dequantize()[index], matrix.dequantize(), strict=True)


@pytest.mark.parametrize("blocks", [0, 3])
def test_columns_that_do_not_divide_into_the_blocks_are_refused(blocks: int) -> None:
    with pytest.raises(ValueError, match=f"64 columns do not divide into {blocks} blocks"):
        QuantizedArray(np.zeros((2, 64), np.int8), np.zeros((2, blocks), np.float32))
