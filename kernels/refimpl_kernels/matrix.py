"""A weight matrix, dense or quantized, and reading its columns.

A matrix is stored [i, o], so that one input's weights for all outputs lie side by side: a chain of
products over the inputs reads memory in order, and a tied embedding is both a head (as it is) and
a table (by column).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Float32, Int, Int8


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedMatrix:
    """weight[i, o] = scales[i // block, o] * values[i, o] - minimums[i // block, o].

    The device's form of a GGUF matrix: losslessly the file's numbers, transposed to [i, o].
    """

    values: Int8[Array, "i o"]
    scales: Float32[Array, "j o"]
    minimums: Float32[Array, "j o"] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def block(self) -> int:
        """Number of neighbouring inputs that share a scale."""
        return self.values.shape[0] // self.scales.shape[0]

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


Matrix = Array | QuantizedMatrix


def dequantize(matrix: QuantizedMatrix) -> Float32[Array, "i o"]:
    """The weights as float32, equal bit for bit to ggml's dequantisation.

    Under any compiler: integers and scales of every ggml type have at most 24 significant bits
    together, so a product is exact, and fusing it with the difference rounds no differently.
    """
    i, o = matrix.values.shape
    blocks = matrix.values.reshape(-1, matrix.block, o).astype(jnp.float32)
    blocks = blocks * matrix.scales[:, None]
    if matrix.minimums is not None:
        blocks = blocks - matrix.minimums[:, None]
    return blocks.reshape(i, o)


def slice_columns(matrix: Matrix, start: int | Int[Array, ""], length: int) -> Matrix:
    """The matrix of `length` outputs from `start` on."""

    def columns(leaf: Array) -> Array:
        if isinstance(start, int):
            return leaf[:, start : start + length]
        return jax.lax.dynamic_slice_in_dim(leaf, start, length, axis=1)

    return jax.tree.map(columns, matrix)


def take_columns(matrix: Matrix, indices: Int[Array, "*b"]) -> Float[Array, "*b i"]:
    """Columns by index, dequantized: embedding rows, when the matrix is the tied head."""
    if not isinstance(matrix, QuantizedMatrix):
        return jnp.moveaxis(jnp.take(matrix, indices, axis=1), 0, -1)
    flat = jax.tree.map(lambda leaf: jnp.take(leaf, indices.reshape(-1), axis=1), matrix)
    return dequantize(flat).T.reshape(*indices.shape, matrix.shape[0])
