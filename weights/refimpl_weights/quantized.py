"""A matrix as a GGUF file stores it: small integers with a scale for each block of columns.

Owns the value type only. Which bits of which GGUF block become which integer is
`ggml_blocks.py`'s business; what a product with such a matrix looks like is the kernels'.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int8


# eq=False: a generated `==` would compare arrays and fail for want of one truth value.
@dataclass(frozen=True, eq=False)
class QuantizedArray:
    """`weight[r, c] = scales[r, c // block] * values[r, c] - minimums[r, c // block]`.

    The products are formed in float32 in exactly this order, which is ggml's, so `dequantize` gives
    the same bits as llama.cpp for every type we read. No bit of the file is lost: scales that the
    file keeps as a float16 times a small integer are exact in float32.

    Attributes:
        values: integers, rows are outputs, columns are inputs (the file's own order). A stack of
            matrices (the experts of a layer, say) has its leading axes before the rows.
        scales: one for each row and block of columns.
        minimums: as `scales`, or None for the types that have none.

    Raises:
        ValueError: the columns do not divide into as many blocks as there are scales.
    """

    values: Int8[np.ndarray, "*rows columns"]
    scales: Float32[np.ndarray, "*rows blocks"]
    minimums: Float32[np.ndarray, "*rows blocks"] | None = None

    def __post_init__(self) -> None:
        columns, blocks = self.values.shape[-1], self.scales.shape[-1]
        if blocks == 0 or columns % blocks:
            raise ValueError(
                f"{columns} columns do not divide into {blocks} blocks of one length; "
                "give one scale for each block of columns"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weights, `(rows, columns)` for a matrix."""
        return self.values.shape

    @property
    def block(self) -> int:
        """Number of neighbouring columns that share a scale."""
        return self.values.shape[-1] // self.scales.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes in memory, which is more than in the file: a 4-bit integer takes a whole byte."""
        minimums = 0 if self.minimums is None else self.minimums.nbytes
        return self.values.nbytes + self.scales.nbytes + minimums

    def dequantize(self) -> Float32[np.ndarray, "*rows columns"]:
        """The weights as float32, equal bit for bit to ggml's own dequantisation."""
        grouped = self.values.reshape(*self.scales.shape, self.block).astype(np.float32)
        grouped *= self.scales[..., None]
        if self.minimums is not None:
            grouped -= self.minimums[..., None]
        return grouped.reshape(self.shape)
