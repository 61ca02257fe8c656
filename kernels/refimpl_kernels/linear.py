"""Products with a weight matrix, dense or quantized, and reading columns of one.

    dot    the library's matrix product. Fast for many rows; its bits depend on how many.
    chain  one multiply-add chain over the inputs for each output element. Streams the stored
           weights once with no wider copy, and its bits depend neither on the number of rows nor
           on what the other rows hold.

Both accumulate in float32 whatever the types, and round once to the type of x.

A matrix is stored [i, o], so that one input's weights for all outputs lie side by side: the chain
reads memory in order, and a tied embedding is both a head (as it is) and a table (by column).
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import Precision
from jaxtyping import Float, Float32, Int, Int8

LinearImplementation = Literal["dot", "chain"]

# Inputs per loop step of the chain. Eight rows of weights and one row of sums fit the vector
# registers of a CPU; 32 spill and are 5 to 10 times slower.
CHAIN_STEP = 8

# Fewest outputs that the chain takes as they are. LLVM rounds a product and its sum once, with a
# fused multiply-add, except where a few outputs make it vectorise across rows: then it rounds
# twice, for some numbers of rows and not for others. Seen up to 8 outputs; 16 fill any vector.
CHAIN_OUTPUTS = 16

# Columns that "dot" widens to float32 at once: enough for a full-speed product, little enough that
# a vocabulary never exists as float32 beside the form it is stored in.
DOT_TILE = 16384


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

    def columns(self, start: int, length: int) -> "QuantizedMatrix":
        """The matrix of `length` outputs from `start` on."""
        return jax.tree.map(lambda leaf: leaf[:, start : start + length], self)


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


def take_columns(matrix: Matrix, indices: Int[Array, "*b"]) -> Float[Array, "*b i"]:
    """Columns by index, dequantized: embedding rows, when the matrix is the tied head."""
    if not isinstance(matrix, QuantizedMatrix):
        return jnp.moveaxis(jnp.take(matrix, indices, axis=1), 0, -1)
    flat = jax.tree.map(lambda leaf: jnp.take(leaf, indices.reshape(-1), axis=1), matrix)
    return dequantize(flat).T.reshape(*indices.shape, matrix.shape[0])


def linear(
    x: Float[Array, "*b i"], matrix: Matrix, *, implementation: LinearImplementation
) -> Float[Array, "*b o"]:
    """x @ matrix with float32 sums, rounded once to the type of x.

    Raises:
        NotImplementedError: "chain" on a number of inputs, or a block, that is not a multiple of 8.
        ValueError: the inputs of x and matrix differ, or the implementation is unknown.
    """
    if x.shape[-1] != matrix.shape[0]:
        raise ValueError(f"x has {x.shape[-1]} inputs, the matrix {matrix.shape[0]}")
    rows = x.reshape(-1, x.shape[-1])
    if implementation == "dot":
        product = _dot(rows, matrix)
    elif implementation == "chain":
        product = _chain(rows, matrix)
    else:
        raise ValueError(f"implementation must be 'dot' or 'chain', got {implementation!r}")
    return product.astype(x.dtype).reshape(*x.shape[:-1], matrix.shape[1])


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
    if isinstance(matrix, QuantizedMatrix):
        return dequantize(matrix.columns(start, length))
    return matrix[:, start : start + length].astype(jnp.float32)


def _product(rows: Float[Array, "r i"], weight: Float[Array, "i o"]) -> Float32[Array, "r o"]:
    return jnp.einsum(
        "ri,io->ro",
        rows,
        weight,
        precision=Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def _chain(rows: Float[Array, "r i"], matrix: Matrix) -> Float32[Array, "r o"]:
    inputs, outputs = matrix.shape
    block = matrix.block if isinstance(matrix, QuantizedMatrix) else CHAIN_STEP
    if inputs % CHAIN_STEP or block % CHAIN_STEP:
        raise NotImplementedError(
            f"'chain' takes {CHAIN_STEP} inputs at a step, got {inputs} inputs in blocks of "
            f"{block}; use 'dot'"
        )
    if outputs < CHAIN_OUTPUTS:
        missing = ((0, 0), (0, CHAIN_OUTPUTS - outputs))
        padded = jax.tree.map(lambda leaf: jnp.pad(leaf, missing), matrix)
        return _chain(rows, padded)[:, :outputs]
    wide = rows.astype(jnp.float32)

    def step(s: Array, sums: Array) -> Array:
        begin = s * CHAIN_STEP
        some = jax.lax.dynamic_slice_in_dim(wide, begin, CHAIN_STEP, axis=1)
        return _chain_step(sums, some, matrix, begin=begin, block=block)

    start = jnp.zeros((rows.shape[0], outputs))
    return jax.lax.fori_loop(0, inputs // CHAIN_STEP, step, start)


def _chain_step(
    sums: Float32[Array, "r o"],
    some: Float32[Array, "r e"],
    matrix: Matrix,
    *,
    begin: Array,
    block: int,
) -> Float32[Array, "r o"]:
    """Add the products of CHAIN_STEP inputs, one after the other, to every sum."""
    if not isinstance(matrix, QuantizedMatrix):
        weights = jax.lax.dynamic_slice_in_dim(matrix, begin, CHAIN_STEP).astype(jnp.float32)
        for e in range(CHAIN_STEP):
            sums = sums + some[:, e, None] * weights[e, None]
        return sums
    values = jax.lax.dynamic_slice_in_dim(matrix.values, begin, CHAIN_STEP).astype(jnp.float32)
    part = some[:, 0, None] * values[0, None]
    for e in range(1, CHAIN_STEP):
        part = part + some[:, e, None] * values[e, None]
    at = begin // block
    sums = sums + part * jax.lax.dynamic_slice_in_dim(matrix.scales, at, 1)
    if matrix.minimums is None:
        return sums
    offset = some.sum(axis=1, keepdims=True)
    return sums - offset * jax.lax.dynamic_slice_in_dim(matrix.minimums, at, 1)
