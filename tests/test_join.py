"""Several weights as one: without loss, whatever their blocks and types."""

import re

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from refimpl_weights.quantized import QuantizedArray

from refimpl.errors import CheckpointError
from refimpl.model.join import join_outputs


@st.composite
def quantized_parts(draw) -> list[QuantizedArray]:
    """Parts of 192 columns with blocks that divide one another, with and without minimums."""
    parts = []
    for block in draw(st.lists(st.sampled_from([16, 32, 64, 192]), min_size=1, max_size=4)):
        rows = draw(st.integers(1, 3))
        floats = hnp.arrays(
            np.float32, (rows, 192 // block), elements=st.floats(-100, 100, width=16)
        )
        parts.append(
            QuantizedArray(
                values=draw(hnp.arrays(np.int8, (rows, 192))),
                scales=draw(floats),
                minimums=draw(st.none() | floats),
            )
        )
    return parts


@settings(max_examples=60, deadline=None, derandomize=True)
@given(parts=quantized_parts())
def test_joining_quantized_parts_is_lossless(parts):
    joined = join_outputs(parts)
    assert isinstance(joined, QuantizedArray)
    # What a part stands for, zeros of either sign alike: x - 0 has lost the sign of a zero.
    np.testing.assert_array_equal(
        joined.dequantize(), np.concatenate([part.dequantize() for part in parts])
    )
    assert joined.block == min(part.block for part in parts)
    assert (joined.minimums is None) == all(part.minimums is None for part in parts)


def test_blocks_that_do_not_divide_one_another():
    def part(block: int) -> QuantizedArray:
        return QuantizedArray(np.ones((1, 96), np.int8), np.ones((1, 96 // block), np.float32))

    with pytest.raises(CheckpointError, match=re.escape("blocks of [32, 48]")):
        join_outputs([part(32), part(48)])


def test_joining_dense_parts_keeps_their_type_where_they_share_it():
    part = np.arange(6, dtype=np.float32).reshape(2, 3).astype(ml_dtypes.bfloat16)
    joined = join_outputs([part, part[:1]])
    assert isinstance(joined, np.ndarray)
    assert joined.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(joined, [[0, 1, 2], [3, 4, 5], [0, 1, 2]])


def test_joining_unlike_parts_gives_float32_which_holds_each():
    dense = np.array([[1.0, -3.0]], ml_dtypes.bfloat16)
    half = np.array([[6.1e-5, 65504.0]], np.float16)
    quantized = QuantizedArray(
        np.array([[5, -7]], np.int8), np.array([[0.1]], np.float32), np.array([[0.5]], np.float32)
    )
    joined = join_outputs([dense, half, quantized])
    assert isinstance(joined, np.ndarray)
    assert joined.dtype == np.float32
    rows = [dense.astype(np.float32), half.astype(np.float32), quantized.dequantize()]
    np.testing.assert_array_equal(joined, np.concatenate(rows))
