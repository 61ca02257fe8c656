"""A product with a matrix stored [i, o], in which no row's bits depend on the rows beside it.

The inputs are taken 16 at a time (8, where they or a quantized matrix's blocks are no multiple of
16), from the first to the last. Each such unit is one chain of fused multiply-adds in float32,

    unit = 0;  unit = round(unit + x[i] * weight[i, o])  for each i of the unit,

and enters the output's sum: sum = round(sum + unit). In a quantized matrix the chain goes over the
integers as they are, and their scale (and minimum) comes in once a unit,

    unit = 0;  unit = round(unit + x[i] * values[i, o])  for each i of the unit
    sum = round(sum + scale * unit);  sum = round(sum - minimum * (the sum of the unit's x)).

No sum is of two products, of which a compiler might round one or the other first. Stored weights
are read once and widened in registers, never as a whole.

Three properties of XLA's CPU backend (jaxlib 0.12) give the code its form. A reduction over 16
entries inside of a kernel is unrolled, so that the outputs beside each other become a vector; over
64 it is not, and takes one output at a time. It does not compute several outputs of a kernel from
one reading of the weights, except that the two parts of a complex number are computed together: so
two rows ride in one complex number. And it makes one kernel for one thread of a whole loop: so a
loop of large steps asks for all threads (`on_all_threads`).

Measured (270M, Xeon with AVX-512, 2 threads, vectors of 512 bits): the head of 262,144 outputs
takes 10 ms for one row and 36 for eight; all matrices of the 18 layers, on one thread, 15 ms and
45, so that quantized ones are not stored in this way (see `lanes.py`). What was tried and left out:
products in 8-bit integers of three digits for each input, whose sums need no order (as fast for
eight rows, slower for one); weights in tiles, so that memory is read in one stream (slower); units
of 32 (no faster).
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Float32, Int, Shaped

from refimpl_kernels.compiling import LANES, on_all_threads, traced_once
from refimpl_kernels.matrix import QuantizedMatrix

# Inputs per loop step, the first that divides the inputs and a quantized matrix's block.
STEPS = (16, 8)

# Sums from which on a step is large enough to be worth the start of a kernel on every thread.
MANY_SUMS = 1 << 17


@traced_once()
def chain(rows: Float[Array, "r i"], matrix: Array | QuantizedMatrix) -> Float32[Array, "r o"]:
    """rows @ matrix, each element as one multiply-add chain.

    Raises:
        NotImplementedError: a quantized matrix with a block that is not a multiple of 8.
    """
    inputs, outputs = matrix.shape
    if not isinstance(matrix, QuantizedMatrix) and inputs % STEPS[-1]:
        # A product with zero leaves a sum as it is.
        missing = -inputs % STEPS[-1]
        rows = jnp.pad(rows, ((0, 0), (0, missing)))
        return chain(rows, jnp.pad(matrix, ((0, missing), (0, 0))))
    block = matrix.block if isinstance(matrix, QuantizedMatrix) else inputs
    step = next((step for step in STEPS if inputs % step == 0 and block % step == 0), None)
    if step is None:
        raise NotImplementedError(
            f"'chain' takes {STEPS[-1]} inputs at a step, got {inputs} inputs in blocks of "
            f"{block}; use 'dot'"
        )
    if outputs % LANES:
        missing = ((0, 0), (0, -outputs % LANES))
        padded = jax.tree.map(lambda leaf: jnp.pad(leaf, missing), matrix)
        return chain(rows, padded)[:, :outputs]
    wide = _paired(rows.astype(jnp.float32))
    is_large = rows.shape[0] * outputs >= MANY_SUMS

    def add(index: Array, packed: Array) -> Array:
        begin = step * (on_all_threads(index) if is_large else index)
        some = [_slice(part, (0, begin), (len(part), step)) for part in wide]
        return _packed([
            _extended(total, x, matrix, begin=begin, outputs=outputs)
            for total, x in zip(_unpacked(packed), some, strict=True)
        ])  # fmt: skip

    start = _packed([jnp.zeros((len(part), outputs)) for part in wide])
    packed = lax.fori_loop(0, inputs // step, add, start)
    if inputs == step:
        # The compiler puts a loop's only step among its neighbours, where it may round otherwise.
        packed = lax.optimization_barrier(packed)
    return jnp.stack(_unpacked(packed), axis=1).reshape(-1, outputs)[: len(rows)]


def _extended(
    total: Float32[Array, "p o"],
    x: Float32[Array, "p e"],
    matrix: Array | QuantizedMatrix,
    *,
    begin: Int[Array, ""],
    outputs: int,
) -> Float32[Array, "p o"]:
    """Sums, and what one unit of inputs adds to each of them."""
    count = x.shape[1]
    if not isinstance(matrix, QuantizedMatrix):
        return total + _unit(x, _slice(matrix, (begin, 0), (count, outputs)))
    # The integers may have more columns, for the caches alone; see `matrix.padded_outputs`.
    values = _slice(matrix.values, (begin, 0), (count, outputs))
    block = lax.div(begin, jnp.int32(matrix.block))
    total = total + _unit(x, values) * _slice(matrix.scales, (block, 0), (1, outputs))
    if matrix.minimums is None:
        return total
    whole = lax.reduce(x, jnp.float32(0), lax.add, (1,))[:, None]
    return total - whole * _slice(matrix.minimums, (block, 0), (1, outputs))


def _unit(x: Float32[Array, "p e"], weights: Shaped[Array, "e o"]) -> Float32[Array, "p o"]:
    """The chains over the inputs of one unit."""
    products = x[:, :, None] * weights.astype(jnp.float32)[None]
    return lax.reduce(products, jnp.float32(0), lax.add, (1,))


def _slice(array: Array, begin: tuple[Array | int, Array | int], sizes: tuple[int, int]) -> Array:
    # Without the arithmetic that would let an index count from the end.
    start = [jnp.int32(index) for index in begin]
    return lax.dynamic_slice(array, start, sizes, allow_negative_indices=False)


def _paired(rows: Float32[Array, "r i"]) -> list[Float32[Array, "p i"]]:
    """Even rows and odd rows, with a row of zeros where one is missing; or the only row."""
    if len(rows) == 1:
        return [rows]
    rows = jnp.pad(rows, ((0, len(rows) % 2), (0, 0)))
    return [rows[0::2], rows[1::2]]


def _packed(parts: list[Float32[Array, "p o"]]) -> Array:
    return parts[0] if len(parts) == 1 else lax.complex(*parts)


def _unpacked(packed: Array) -> list[Float32[Array, "p o"]]:
    return [lax.real(packed), lax.imag(packed)] if jnp.iscomplexobj(packed) else [packed]
