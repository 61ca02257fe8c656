"""Products with a weight matrix, dense or quantized.

    dot    the library's matrix product. Fast for many rows; its bits depend on how many.
    chain  chains of multiply-adds over the inputs for each output element, in an order that depends
           on nothing but the matrix; see `chain.py` for one stored [i, o], `lanes.py` for [o, i].

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
from refimpl_kernels.lanes import lanes
from refimpl_kernels.matrix import (
    Matrix,
    OutputMajorMatrix,
    QuantizedMatrix,
    dequantize,
    dequantize_outputs,
    slice_columns,
)

LinearImplementation = Literal["dot", "chain"]

# Columns that "dot" widens to float32 at once: enough for a full-speed product, little enough that
# a vocabulary never exists as float32 beside the form it is stored in.
DOT_TILE = 4096


def linear(
    x: Float[Array, "*b i"], matrix: Matrix, *, implementation: LinearImplementation
) -> Float[Array, "*b o"]:
    """x @ matrix with float32 sums, rounded once to the type of x.

    Raises:
        NotImplementedError: "chain" on a quantized matrix whose block is not a multiple of 8, or of
            16 where it is stored by outputs.
        ValueError: the inputs of x and matrix differ, or the implementation is unknown.
    """
    if x.shape[-1] != matrix.shape[0]:
        raise ValueError(f"x has {x.shape[-1]} inputs, the matrix {matrix.shape[0]}")
    rows = x.reshape(-1, x.shape[-1])
    if implementation == "dot":
        product = _dot(rows, matrix)
    elif implementation == "chain":
        is_by_output = isinstance(matrix, OutputMajorMatrix)
        product = lanes(rows, matrix) if is_by_output else chain(rows, matrix)
    else:
        raise ValueError(f"implementation must be 'dot' or 'chain', got {implementation!r}")
    return product.astype(x.dtype).reshape(*x.shape[:-1], matrix.shape[1])


@traced_once()
def _dot(rows: Float[Array, "r i"], matrix: Matrix) -> Float32[Array, "r o"]:
    if isinstance(matrix, Array) and matrix.dtype == rows.dtype:
        return _product("ri,io->ro", rows, matrix)
    # The matrix waits for the rows: without them nothing keeps the compiler from widening the
    # matrices of all layers at the beginning, and then they are all in memory at once.
    wide, matrix = jax.lax.optimization_barrier((rows.astype(jnp.float32), matrix))
    outputs = matrix.shape[1]
    if outputs <= DOT_TILE:
        return _wide_product(wide, matrix)
    # Put in its place at once: a concatenation would hold all of it twice. Not a loop: XLA's CPU
    # backend would run its products on one thread.
    product = jnp.zeros((len(wide), outputs))
    for start in range(0, outputs, DOT_TILE):
        length = min(DOT_TILE, outputs - start)
        part = _wide_product(wide, slice_columns(matrix, start, length))
        product = jax.lax.dynamic_update_slice(product, part, (0, start))
        wide, matrix, product = jax.lax.optimization_barrier((wide, matrix, product))
    return product


def _wide_product(rows: Float32[Array, "r i"], matrix: Matrix) -> Float32[Array, "r o"]:
    """With the matrix in float32, which holds the numbers of every type that one is stored in."""
    if isinstance(matrix, OutputMajorMatrix):
        # The matrix on the left: transposed on the right, XLA's CPU backend takes twice as long.
        columns = jax.lax.optimization_barrier(rows.T)
        product = _product("oi,ir->or", dequantize_outputs(matrix), columns)
        return jax.lax.optimization_barrier(product).T
    is_quantized = isinstance(matrix, QuantizedMatrix)
    wide = dequantize(matrix) if is_quantized else matrix.astype(jnp.float32)
    return _product("ri,io->ro", rows, wide)


def _product(sums: str, left: Float[Array, "a b"], right: Float[Array, "b c"]) -> Array:
    return jnp.einsum(
        sums,
        left,
        right,
        precision=Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
