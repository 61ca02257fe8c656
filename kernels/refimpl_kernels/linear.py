"""Products with a weight matrix, dense or quantized.

    dot    the library's matrix product. Fast for many rows; its bits depend on how many.
    chain  one multiply-add chain over the inputs for each output element; see `chain.py`.

Both accumulate in float32 whatever the types, and round once to the type of x.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import Precision
from jaxtyping import Float, Float32

from refimpl_kernels.chain import chain
from refimpl_kernels.compiling import traced_once
from refimpl_kernels.matrix import Matrix, QuantizedMatrix, dequantize, slice_columns

LinearImplementation = Literal["dot", "chain"]

# Columns that "dot" widens to float32 at once: enough for a full-speed product, little enough that
# a vocabulary never exists as float32 beside the form it is stored in.
DOT_TILE = 16384


def linear(
    x: Float[Array, "*b i"], matrix: Matrix, *, implementation: LinearImplementation
) -> Float[Array, "*b o"]:
    """x @ matrix with float32 sums, rounded once to the type of x.

    Raises:
        NotImplementedError: "chain" on a quantized matrix whose block is not a multiple of 8.
        ValueError: the inputs of x and matrix differ, or the implementation is unknown.
    """
    if x.shape[-1] != matrix.shape[0]:
        raise ValueError(f"x has {x.shape[-1]} inputs, the matrix {matrix.shape[0]}")
    rows = x.reshape(-1, x.shape[-1])
    if implementation == "dot":
        product = _dot(rows, matrix)
    elif implementation == "chain":
        product = chain(rows, matrix)
    else:
        raise ValueError(f"implementation must be 'dot' or 'chain', got {implementation!r}")
    return product.astype(x.dtype).reshape(*x.shape[:-1], matrix.shape[1])


@traced_once()
def _dot(rows: Float[Array, "r i"], matrix: Matrix) -> Float32[Array, "r o"]:
    if not isinstance(matrix, QuantizedMatrix) and matrix.dtype == rows.dtype:
        return _product(rows, matrix)
    # The matrix waits for the rows: without them nothing keeps the compiler from widening the
    # matrices of all layers at the beginning, and then they are all in memory at once.
    wide, matrix = jax.lax.optimization_barrier((rows.astype(jnp.float32), matrix))
    outputs = matrix.shape[1]
    # Not a loop: XLA's CPU backend would run its products on one thread.
    parts, start = list[Array](), 0
    while start < outputs:
        length = min(DOT_TILE, outputs - start)
        parts.append(_product(wide, _wide_columns(matrix, start, length)))
        wide, matrix, _ = jax.lax.optimization_barrier((wide, matrix, parts[-1]))
        start += length
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def _wide_columns(matrix: Matrix, start: int, length: int) -> Float32[Array, "i o"]:
    """Some columns in float32, which holds the numbers of every type that a matrix is stored in."""
    part = slice_columns(matrix, start, length)
    return dequantize(part) if isinstance(part, QuantizedMatrix) else part.astype(jnp.float32)


def _product(rows: Float[Array, "r i"], weight: Float[Array, "i o"]) -> Float32[Array, "r o"]:
    return jnp.einsum(
        "ri,io->ro",
        rows,
        weight,
        precision=Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
