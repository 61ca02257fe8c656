"""A product with a weight matrix in which no row's bits depend on the rows beside it.

Each output element is one chain over the inputs, from the first to the last:

    sum = 0;  sum = round(sum + x[i] * weight[i, o])  for each i,

a fused multiply-add in float32, of the weight as `dequantize` gives it. Stored weights are read
once and widened a few inputs at a time, never as a whole.

Two properties of XLA's CPU backend (jaxlib 0.12) give the code its form. It does not compute
several outputs of a kernel from one reading of the weights, except that the two parts of a complex
number are computed together: so two rows ride in one complex number. And it makes one kernel for
one thread of a whole loop, unless the loop holds an operation that it has no kernel for, such as a
sort: so a loop of large steps holds one, and each of its steps runs on all threads.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Float32, Int

from refimpl_kernels.compiling import LEAST_WIDTH, traced_once
from refimpl_kernels.matrix import Matrix, QuantizedMatrix

# Inputs per loop step. The factors of so many inputs, for two rows, fit the vector registers of a
# CPU; 64 are 5 to 10 times slower. Eight serve what is no multiple of sixteen.
STEPS = (16, 8)

# Sums from which on a step is large enough to be worth the start of a kernel on every thread.
MANY_SUMS = 1 << 17


@traced_once()
def chain(rows: Float[Array, "r i"], matrix: Matrix) -> Float32[Array, "r o"]:
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
    if outputs < LEAST_WIDTH:
        missing = ((0, 0), (0, LEAST_WIDTH - outputs))
        padded = jax.tree.map(lambda leaf: jnp.pad(leaf, missing), matrix)
        return chain(rows, padded)[:, :outputs]
    wide = _paired(rows.astype(jnp.float32))
    is_large = rows.shape[0] * outputs >= MANY_SUMS

    def add(index: Array, packed: Array) -> Array:
        begin = step * (_through_a_sort(index) if is_large else index)
        return _packed(_step(_unpacked(packed), wide, matrix, begin=begin, count=step))

    start = _packed([jnp.zeros((len(part), outputs)) for part in wide])
    packed = lax.fori_loop(0, inputs // step, add, start)
    if inputs == step:
        # The compiler puts a loop's only step among its neighbours, where it may round otherwise.
        packed = lax.optimization_barrier(packed)
    sums = _unpacked(packed)
    return jnp.stack(sums, axis=1).reshape(-1, outputs)[: len(rows)]


def _step(
    sums: list[Float32[Array, "p o"]],
    wide: list[Float32[Array, "p i"]],
    matrix: Matrix,
    *,
    begin: Int[Array, ""],
    count: int,
) -> list[Float32[Array, "p o"]]:
    """Add the products of a few inputs, one after the other, to every sum."""
    some = [_slice(part, begin, count, axis=1) for part in wide]
    for e in range(count):
        weight = _row(matrix, begin, e)
        sums = [total + x[:, e, None] * weight for total, x in zip(sums, some, strict=True)]
    return sums


def _row(matrix: Matrix, begin: Int[Array, ""], e: int) -> Float32[Array, "1 o"]:
    """The weights of input `begin` + e. By themselves: several would be widened in memory first."""
    if not isinstance(matrix, QuantizedMatrix):
        return _wide_row(matrix, begin + e)
    block = lax.div(begin, jnp.int32(matrix.block))
    row = _wide_row(matrix.values, begin + e) * _wide_row(matrix.scales, block)
    return row if matrix.minimums is None else row - _wide_row(matrix.minimums, block)


def _wide_row(array: Array, index: Int[Array, ""]) -> Float32[Array, "1 o"]:
    return _slice(array, index, 1).astype(jnp.float32)


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


def _through_a_sort(index: Int[Array, ""]) -> Int[Array, ""]:
    return lax.sort(jnp.stack([index, index]))[0]


# Without the arithmetic that would let an index count from the end.
_slice = partial(lax.dynamic_slice_in_dim, allow_negative_indices=False)
