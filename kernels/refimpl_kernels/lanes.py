"""A product with a matrix stored [o, i], in which no row's bits depend on the rows beside it.

The inputs are dealt out to LANES lanes, input i to lane i % LANES. Each lane is a chain of fused
multiply-adds in float32 with the dequantized weights, from the lane's first input to its last,

    lane = 0;  lane = round(lane + x[i] * weight[i, o])  for each i of the lane,

and the output is the sum of the lanes. Where there are many inputs, they are cut into segments of
up to LANES * MOST_TERMS, each of which has lanes of its own, and the sums of the segments are added
from the first to the last. No addition is of two products, of which a compiler might round one or
the other first, and dequantizing is exact (`matrix.dequantize`). The lanes of a segment are summed
by halves: lane l and lane l + 8, then l and l + 4, and so on. On a CPU they are left to a
reduction, whose order is the compiler's: it depends on the matrix's shape, but not on the number of
rows (tests/test_kernels_chain.py holds it to that).

This is for the matrices of layers, `chain.py` for a head. The products are written out one by one,
without a loop, so XLA's CPU backend makes one vectorised kernel of them and runs it on all threads;
the weights are read in one stream, and those of a segment stay in registers for all rows. Kernels
that follow each other this closely find the other threads awake: they begin after 10 microseconds,
where those after a pause begin after 50.

Measured (a layer's four matrices in 270M's shapes, Q8_0, Xeon with AVX-512, 2 threads, in turns
with `chain`): 0.48 ms for one row, where the chain takes 0.95; for two 0.65 and 0.94, for eight
1.36 and 2.39. The head in this form takes 14 to 18 ms for one row, in the chain 13 to 15. What was
tried and left out: the chain in integers with a scale every two terms (5 % faster, but sums of two
products); segments of 40 terms (a quarter slower for eight rows, whose weights then leave the
registers); two rows in a complex number, as in `chain` (five times slower); each lane as a
reduction over its terms instead of one written out (eight times slower); memory in huge pages (no
faster); several streams of weights at once, the outputs of a matrix taken from two to eight places
in turns (each term transposed by itself: 5 to 13 % faster for one row, 10 % slower for eight;
transposed as a whole the matrix is copied first, which takes five times as long).

What limits it is that a processor fetches ahead within a page of 4 KB only. The same loop in C, for
the shape of the head, takes as long as XLA's (15.2 and 15.8 ms); with a prefetch of a page ahead,
which XLA does not emit, 9.1 to 10.3; reading alone 7.1 to 7.6.

On a GPU XLA's order of a reduction depends on the number of rows, so there the halves are written
out: on one H200 a row's bits were the same among 1, 2, 8 and 16. A product took 18 to 25
microseconds for one row, where the chain takes 300 to 900.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Float32

from refimpl_kernels.compiling import LANES, traced_once
from refimpl_kernels.matrix import OutputMajorMatrix

# Most products of a chain: so many that their weights fit the registers.
MOST_TERMS = 24


def is_for_lanes(inputs: int, block: int) -> bool:
    """Whether inputs in blocks of one scale can be dealt out so that a lane's step has one scale.

    Args:
        block: number of inputs that share a scale.
    """
    return inputs % LANES == 0 and block % LANES == 0


@traced_once()
def lanes(rows: Float[Array, "r i"], matrix: OutputMajorMatrix) -> Float32[Array, "r o"]:
    """rows @ matrix, each element as a sum of LANES multiply-add chains.

    Raises:
        NotImplementedError: the inputs or the matrix's block are no multiple of LANES.
    """
    inputs, outputs = matrix.shape
    if not is_for_lanes(inputs, matrix.block):
        raise NotImplementedError(
            f"'chain' takes {LANES} inputs of a matrix stored by outputs at a step, got {inputs} "
            f"inputs in blocks of {matrix.block}; use 'dot'"
        )
    block = matrix.block // LANES
    terms = _terms(inputs // LANES, block)
    # Rows that are there, or every output would compute them anew.
    wide = lax.optimization_barrier(rows.astype(jnp.float32))
    x = wide.reshape(len(rows), -1, terms, LANES).swapaxes(0, 1)[None]
    values = matrix.values.reshape(outputs, -1, 1, terms, LANES)
    factors = (outputs, -1, 1, terms // block, 1)
    scales = matrix.scales.reshape(factors)
    minimums = None if matrix.minimums is None else matrix.minimums.reshape(factors)
    # Zeros that the compiler does not know for zeros: it would leave the first sum out, and make
    # the second one of two products.
    zeros = lax.optimization_barrier(jnp.zeros((LANES,), jnp.float32))
    total = jnp.broadcast_to(zeros, (outputs, x.shape[1], len(rows), LANES))
    for term in range(terms):
        weights = values[..., term, :].astype(jnp.float32)
        weights = weights * scales[..., term // block, :]
        if minimums is not None:
            weights = weights - minimums[..., term // block, :]
        total = total + x[..., term, :] * weights
    # Whoever reads the result must not compute it anew for each of its own elements.
    of_segments = lax.optimization_barrier(_sum_of_lanes(total))
    summed = of_segments[:, 0]
    for segment in range(1, of_segments.shape[1]):
        summed = summed + of_segments[:, segment]
    return lax.optimization_barrier(summed.T)


def _sum_of_lanes(lanes: Float32[Array, "o s r l"]) -> Float32[Array, "o s r"]:
    if jax.default_backend() == "cpu":
        # Written out, they would go to memory before they are summed.
        return lax.reduce(lanes, jnp.float32(0), lax.add, (3,))
    return sum_by_halves(lax.optimization_barrier(lanes))


def sum_by_halves(x: Float32[Array, "*b l"]) -> Float32[Array, "*b"]:
    """Sum over the last axis, a power of two: of x[l] and x[l + half], until one is left."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x[..., 0]


def _terms(steps: int, block: int) -> int:
    """How many of a lane's steps are written out: a part of them, in whole blocks."""
    fitting = [n for n in range(block, MOST_TERMS + 1, block) if steps % n == 0]
    return max(fitting, default=block)
