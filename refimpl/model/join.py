"""Several linear weights as one, so that one product computes what they share an input for."""

from collections.abc import Sequence

import numpy as np
from refimpl_weights.quantized import QuantizedArray

from refimpl.errors import CheckpointError


def join_outputs(
    parts: Sequence[np.ndarray | QuantizedArray],
) -> np.ndarray | QuantizedArray:
    """Weights of shape (outputs, inputs) one under the other, without loss.

    Of stacks (matrices, outputs, inputs) each matrix is joined with its counterparts.

    Quantized parts may differ in block size and in having minimums: the join takes the smallest
    block, repeating scales, and a minimum of zero where a part has none. Where dense and quantized
    parts mix, or dense types differ, all become float32, which holds each of them exactly.

    Raises:
        CheckpointError: block sizes that do not divide one another.
    """
    quantized = [part for part in parts if isinstance(part, QuantizedArray)]
    if len(quantized) == len(parts):
        return _join_quantized(quantized)
    dense = [part.dequantize() if isinstance(part, QuantizedArray) else part for part in parts]
    if len({part.dtype for part in dense}) > 1:
        dense = [part.astype(np.float32) for part in dense]
    return np.concatenate(dense, axis=-2)


def _join_quantized(parts: Sequence[QuantizedArray]) -> QuantizedArray:
    block = min(part.block for part in parts)
    if any(part.block % block for part in parts):
        raise CheckpointError(
            f"cannot join quantized tensors with blocks of {[part.block for part in parts]}: "
            "each must be a multiple of the smallest"
        )
    repeats = [part.block // block for part in parts]
    scales = [np.repeat(p.scales, r, axis=-1) for p, r in zip(parts, repeats, strict=True)]
    minimums = None
    if any(part.minimums is not None for part in parts):
        of_each = [
            np.zeros_like(scale) if p.minimums is None else np.repeat(p.minimums, r, axis=-1)
            for p, r, scale in zip(parts, repeats, scales, strict=True)
        ]
        minimums = np.concatenate(of_each, axis=-2)
    return QuantizedArray(
        values=np.concatenate([part.values for part in parts], axis=-2),
        scales=np.concatenate(scales, axis=-2),
        minimums=minimums,
    )
