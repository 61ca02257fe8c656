"""Weights as a file holds them, put on the device as the kernels want them."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from refimpl_kernels.lanes import is_for_lanes
from refimpl_kernels.matrix import Matrix, OutputMajorMatrix, QuantizedMatrix, padded_outputs
from refimpl_weights.memory import aligned_empty
from refimpl_weights.quantized import QuantizedArray

from refimpl.model.join import join_outputs


def to_device(parts: list[np.ndarray | QuantizedArray], *, is_table: bool) -> Matrix:
    """One tensor, or several joined along the outputs, in the precision of the file.

    A quantized matrix "o i" stays as it lies, if `lanes` can take it and nobody looks up its
    columns; any other becomes "i o". The matrices of a stack "e o i" come to lie side by side, as
    one.

    Args:
        parts: vectors as they are, matrices or stacks. The list is emptied: the joined matrix is a
            copy, and the parts need not live beside it.
        is_table: whether columns are looked up, as ids are in an embedding.

    Raises:
        CheckpointError: quantized parts whose blocks do not divide one another.
    """
    whole = parts[0] if len(parts) == 1 else join_outputs(parts)
    parts.clear()
    if not isinstance(whole, QuantizedArray):
        return jnp.asarray(whole) if whole.ndim == 1 else _transposed(whole)
    values, scales, minimums = whole.values, whole.scales, whole.minimums
    if not is_table and is_for_lanes(values.shape[-1], whole.block):
        return OutputMajorMatrix(
            values=_as_it_lies(values),
            scales=_as_it_lies(scales),
            minimums=None if minimums is None else _as_it_lies(minimums),
        )
    return QuantizedMatrix(
        values=_transposed(values, is_padded=True),
        scales=_transposed(scales),
        minimums=None if minimums is None else _transposed(minimums),
    )


def _as_it_lies(array: np.ndarray) -> Array:
    """A copy on the device, in memory aligned so that a CPU device takes it over as it is."""
    array = array.reshape(-1, array.shape[-1])
    copy = aligned_empty(array.shape, array.dtype)
    copy[...] = array
    return jax.device_put(copy, may_alias=True)


def _transposed(array: np.ndarray, *, is_padded: bool = False, band: int = 512) -> Array:
    """A transposed copy on the device.

    Made in bands that fit the processor's cache, several times faster than in one go, and in
    memory aligned so that a CPU device takes it over without another copy. The matrices of a stack
    come to lie side by side.
    """
    array = array.reshape(-1, array.shape[-1])
    outputs, inputs = array.shape
    columns = padded_outputs(outputs) if is_padded else outputs
    turned = aligned_empty((inputs, columns), array.dtype)
    turned[:, outputs:] = 0
    for row in range(0, outputs, band):
        turned[:, row : min(row + band, outputs)] = array[row : row + band].T
    return jax.device_put(turned, may_alias=True)
