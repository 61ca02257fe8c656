"""A product with a weight matrix in which no row's bits depend on the rows beside it.

Each output element is one chain over the inputs, from the first to the last:

    sum = 0;  sum = round(sum + x[i] * weight[i, o])  for each i,

a fused multiply-add in float32, of the weight as `dequantize` gives it. Stored weights are read
once and widened a few inputs at a time, never as a whole.

A wide quantized matrix, such as a head, takes 16 inputs as a unit: a chain over the integers as
they are, which then enters the sum with its scale (and minimum) once,

    unit = 0;  unit = round(unit + x[i] * values[i, o])  for each i of the unit
    sum = round(sum + scale * unit);  sum = round(sum - minimum * (the sum of the unit's x)).

No sum is of two products, of which a compiler might round one or the other first.

Two properties of XLA's CPU backend (jaxlib 0.12) give the code its form. It does not compute
several outputs of a kernel from one reading of the weights, except that the two parts of a complex
number are computed together: so two rows ride in one complex number. And it makes one kernel for
one thread of a whole loop, unless the loop holds an operation that it has no kernel for, such as a
sort: so a loop of large steps holds one, and each of its steps runs on all threads.

Measured (270M, Xeon 2.8 GHz, 2 threads): by units and with `matrix.padded_outputs` the head of
262,144 outputs takes 13 ms instead of 19 for one row, and 50 instead of 78 for eight.
"""

import functools
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

# Outputs from which on a quantized matrix is taken by units.
WIDE = 8192

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
    # Unknown to the compiler, which would leave a 0 out: then a unit began with two products.
    zero = lax.optimization_barrier(jnp.float32(0))

    def add(index: Array, packed: Array) -> Array:
        begin, sums = step * (_through_a_sort(index) if is_large else index), _unpacked(packed)
        if isinstance(matrix, QuantizedMatrix) and outputs >= WIDE:
            return _packed(_unit(sums, wide, matrix, zero, begin=begin, count=step))
        return _packed(_step(sums, wide, matrix, begin=begin, count=step))

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


def _unit(
    sums: list[Float32[Array, "p o"]],
    wide: list[Float32[Array, "p i"]],
    matrix: QuantizedMatrix,
    zero: Float32[Array, ""],
    *,
    begin: Int[Array, ""],
    count: int,
) -> list[Float32[Array, "p o"]]:
    """Add to every sum the chain over a few inputs, times their scale."""
    outputs = matrix.shape[1]
    some = [_slice(part, begin, count, axis=1) for part in wide]
    made = [jnp.broadcast_to(zero, total.shape) for total in sums]
    for e in range(count):
        values = _wide_row(matrix.values, begin + e, outputs=outputs)
        made = [unit + x[:, e, None] * values for unit, x in zip(made, some, strict=True)]
    block = lax.div(begin, jnp.int32(matrix.block))
    scale = _wide_row(matrix.scales, block, outputs=outputs)
    sums = [total + unit * scale for total, unit in zip(sums, made, strict=True)]
    if matrix.minimums is None:
        return sums
    minimum = _wide_row(matrix.minimums, block, outputs=outputs)
    whole = [functools.reduce(jnp.add, (x[:, e, None] for e in range(count))) for x in some]
    return [total - x * minimum for total, x in zip(sums, whole, strict=True)]


def _row(matrix: Matrix, begin: Int[Array, ""], e: int) -> Float32[Array, "1 o"]:
    """The weights of input `begin` + e. By themselves: several would be widened in memory first."""
    wide_row = partial(_wide_row, outputs=matrix.shape[1])
    if not isinstance(matrix, QuantizedMatrix):
        return wide_row(matrix, begin + e)
    block = lax.div(begin, jnp.int32(matrix.block))
    row = wide_row(matrix.values, begin + e) * wide_row(matrix.scales, block)
    return row if matrix.minimums is None else row - wide_row(matrix.minimums, block)


def _wide_row(array: Array, index: Int[Array, ""], *, outputs: int) -> Float32[Array, "1 o"]:
    # The columns beyond are there for the caches alone; see `matrix.padded_outputs`.
    begin = (index, jnp.int32(0))
    row = lax.dynamic_slice(array, begin, (1, outputs), allow_negative_indices=False)
    return row.astype(jnp.float32)


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
