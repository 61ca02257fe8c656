"""Weights as a file holds them, put on the device as the kernels want them."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from refimpl_kernels.matrix import QuantizedMatrix, padded_outputs
from refimpl_weights.memory import aligned_empty
from refimpl_weights.quantized import QuantizedArray

from refimpl.model.join import join_outputs


def to_device(parts: list[np.ndarray | QuantizedArray]) -> Array | QuantizedMatrix:
    """One tensor, or several joined along the outputs, in the precision of the file.

    Args:
        parts: vectors as they are, or matrices "o i", which become "i o", or stacks "e o i", which
            become "i e o", as one matrix. The list is emptied: the joined matrix is a copy, and the
            parts need not live beside it.

    Raises:
        CheckpointError: quantized parts whose blocks do not divide one another.
    """
    whole = parts[0] if len(parts) == 1 else join_outputs(parts)
    parts.clear()
    if isinstance(whole, QuantizedArray):
        return QuantizedMatrix(
            values=_transposed(whole.values, is_padded=True),
            scales=_transposed(whole.scales),
            minimums=None if whole.minimums is None else _transposed(whole.minimums),
        )
    return jnp.asarray(whole) if whole.ndim == 1 else _transposed(whole)


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
