"""A weight matrix, dense or quantized, and reading its columns.

Its shape is (i, o) however it is stored. There are two ways:

    [i, o]  one input's weights for all outputs lie side by side: a plain array, or a
            `QuantizedMatrix`. A tied embedding is both a head (as it is) and a table (by column).
    [o, i]  one output's weights lie side by side, as files have them: an `OutputMajorMatrix`, which
            is quantized.

`chain.py` and `lanes.py` say what each of them is good for.
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

    The device's form of a GGUF matrix: losslessly the file's numbers, transposed to [i, o]. The
    integers may have more columns, which nothing reads; see `padded_outputs`.
    """

    values: Int8[Array, "i p"]
    scales: Float32[Array, "j o"]
    minimums: Float32[Array, "j o"] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape[0], self.scales.shape[1]

    @property
    def block(self) -> int:
        """Number of neighbouring inputs that share a scale."""
        return self.values.shape[0] // self.scales.shape[0]

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OutputMajorMatrix:
    """weight[i, o] = scales[o, i // block] * values[o, i] - minimums[o, i // block].

    Losslessly a GGUF matrix, as it lies in the file.
    """

    values: Int8[Array, "o i"]
    scales: Float32[Array, "o j"]
    minimums: Float32[Array, "o j"] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape[::-1]

    @property
    def block(self) -> int:
        """Number of neighbouring inputs that share a scale."""
        return self.values.shape[1] // self.scales.shape[1]

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


Quantized = QuantizedMatrix | OutputMajorMatrix
Matrix = Array | Quantized

# Bytes of a cache line and of a page.
_LINE, _PAGE = 64, 4096


def padded_outputs(outputs: int) -> int:
    """Columns to store int8 values in, so that neighbouring rows do not fight for one place.

    A place in a CPU's first cache is chosen by the address within a page, and one in its table of
    pages by the last bits of the page's number. Rows a multiple of half a page apart share few
    places: for these a row is a line longer; and a page longer, too, where rows are a multiple of
    16 pages apart. With it eight rows times a head of 262,144 outputs, by units (see `chain.py`),
    took 47 ms instead of 68.
    """
    padded = outputs
    if outputs % (_PAGE // 2) == 0:
        padded += _LINE
    if outputs % (16 * _PAGE) == 0:
        padded += _PAGE
    return padded


def dequantize(matrix: Quantized) -> Float32[Array, "i o"]:
    """The weights as float32, equal bit for bit to ggml's dequantisation.

    Under any compiler: integers and scales of every ggml type have at most 24 significant bits
    together, so a product is exact, and fusing it with the difference rounds no differently.
    """
    if isinstance(matrix, OutputMajorMatrix):
        return dequantize_outputs(matrix).T
    i, o = matrix.shape
    blocks = matrix.values[:, :o].reshape(-1, matrix.block, o).astype(jnp.float32)
    blocks = blocks * matrix.scales[:, None]
    if matrix.minimums is not None:
        blocks = blocks - matrix.minimums[:, None]
    return blocks.reshape(i, o)


def dequantize_outputs(matrix: OutputMajorMatrix) -> Float32[Array, "o i"]:
    """The weights as float32, as they lie; see `dequantize`."""
    o, i = matrix.values.shape
    blocks = matrix.values.reshape(o, -1, matrix.block).astype(jnp.float32)
    blocks = blocks * matrix.scales[:, :, None]
    if matrix.minimums is not None:
        blocks = blocks - matrix.minimums[:, :, None]
    return blocks.reshape(o, i)


def slice_columns(matrix: Matrix, start: int | Int[Array, ""], length: int) -> Matrix:
    """The matrix of `length` outputs from `start` on."""
    axis = 0 if isinstance(matrix, OutputMajorMatrix) else 1

    def outputs(leaf: Array) -> Array:
        if isinstance(start, int):
            return jax.lax.slice_in_dim(leaf, start, start + length, axis=axis)
        return jax.lax.dynamic_slice_in_dim(leaf, start, length, axis=axis)

    return jax.tree.map(outputs, matrix)


def take_columns(matrix: Matrix, indices: Int[Array, "*b"]) -> Float[Array, "*b i"]:
    """Columns by index, dequantized: embedding rows, when the matrix is the tied head."""
    if isinstance(matrix, Array):
        return jnp.moveaxis(jnp.take(matrix, indices, axis=1), 0, -1)
    axis = 0 if isinstance(matrix, OutputMajorMatrix) else 1
    flat = jax.tree.map(lambda leaf: jnp.take(leaf, indices.reshape(-1), axis=axis), matrix)
    return dequantize(flat).T.reshape(*indices.shape, matrix.shape[0])
