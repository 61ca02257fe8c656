"""A mixture of experts: which experts a row goes to, and one product for all rows of an expert.

Every expert is a gated feed-forward of its own. Their matrices lie side by side, as columns of one
matrix [i, e o], so that they are stored, joined and quantized as any other matrix is.

    route        the experts of each row, and their weights
    mix_experts  what they make of the row, summed by these weights

The product is grouped: the pairs of row and expert are sorted by expert and cut into blocks of a
few rows of one expert each, and a loop takes one block after the other. So the work is that of the
chosen experts, and an expert that nobody chose is never read. How many rows a block has depends on
the shapes alone; with `linear` as a chain, a row's bits depend on nothing but the row.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Float32, Int

from refimpl_kernels.compiling import LANES, traced_once
from refimpl_kernels.gelu import Rounding, gelu
from refimpl_kernels.linear import LinearImplementation, linear
from refimpl_kernels.matrix import Matrix, slice_columns

# Most rows of one block. More would leave more of the last block of each expert empty.
MOST_ROWS = 64


class Route(NamedTuple):
    """The chosen experts of each row in ascending order, and what they count."""

    experts: Int[Array, "r c"]
    weights: Float32[Array, "r c"]


class _Blocks(NamedTuple):
    """Pairs of row and expert in groups of one expert, each group filled up to whole blocks.

    Attributes:
        num_blocks: in use.
        expert: of each block.
        pair: which pair of row and choice each place of each block holds; past the last for none.
    """

    num_blocks: Int[Array, ""]
    expert: Int[Array, " n"]
    pair: Int[Array, "n g"]


@traced_once("chosen")
def route(scores: Float[Array, "r e"], *, chosen: int) -> Route:
    """The experts with the highest scores; their weights are softmax(scores), scaled to sum to 1.

    Of equal scores the lower expert wins.
    """
    missing = -scores.shape[-1] % LANES
    wide = jnp.pad(scores.astype(jnp.float32), ((0, 0), (0, missing)), constant_values=-jnp.inf)
    likelihood = lax.optimization_barrier(jax.nn.softmax(wide, axis=-1))
    highest, experts = lax.top_k(likelihood, chosen)
    weights = highest / jnp.sum(highest, axis=-1, keepdims=True)
    # Ascending, because a sum over experts depends in its last bits on their order.
    experts, weights = lax.sort((experts, weights), dimension=1, num_keys=1)
    return Route(experts, weights)


@traced_once("implementation", "rounding")
def mix_experts(
    x: Float[Array, "r d"],
    routed: Route,
    gate_up: Matrix,
    down: Matrix,
    *,
    implementation: LinearImplementation,
    rounding: Rounding,
) -> Float[Array, "r d"]:
    """sum_e weight[e] (gelu(x G_e) * x U_e) D_e over the chosen experts, in the type of x.

    Products with weights are rounded to the type of x, and so is each of the sums, which run over
    the experts in ascending order (Hugging Face).

    Args:
        gate_up: [d, e 2f], for each expert its gate before its up projection.
        down: [f, e d].
        rounding: of the gelu.
    """
    r, d = x.shape
    chosen = routed.experts.shape[1]
    num_experts = down.shape[1] // d
    blocks = _blocks(routed.experts.reshape(-1), num_experts)

    def add(index: Array, found: Array) -> Array:
        expert, pair = blocks.expert[index], blocks.pair[index]
        rows = jnp.take(x, pair // chosen, axis=0, mode="fill", fill_value=0)
        hidden = linear(rows, _part(gate_up, expert, num_experts), implementation=implementation)
        gate, up = jnp.split(hidden, 2, axis=-1)
        hidden = gelu(gate, rounding=rounding) * up
        made = linear(hidden, _part(down, expert, num_experts), implementation=implementation)
        return found.at[pair].set(made, mode="drop")

    found = lax.fori_loop(0, blocks.num_blocks, add, jnp.zeros((r * chosen, d), x.dtype))
    weighted = found.reshape(r, chosen, d).astype(jnp.float32) * routed.weights[:, :, None]
    # Behind a barrier, or the compiler might round a product once together with the sum.
    weighted = lax.optimization_barrier(weighted.astype(x.dtype))
    total = weighted[:, 0]
    for choice in range(1, chosen):
        total = total + weighted[:, choice]
    return total


def _blocks(experts: Int[Array, " p"], num_experts: int) -> _Blocks:
    """Cut the pairs, given the expert of each, into blocks of one expert each."""
    pairs = experts.shape[0]
    rows = _rows_of_a_block(pairs, num_experts)
    # Every expert that is chosen may leave a block that is not full.
    most = pairs // rows + min(pairs, num_experts)

    order = jnp.argsort(experts, stable=True).astype(jnp.int32)
    sizes = jnp.bincount(experts, length=num_experts).astype(jnp.int32)
    blocks = -(-sizes // rows)
    ends = jnp.cumsum(blocks)
    index = jnp.arange(most, dtype=jnp.int32)
    expert = jnp.searchsorted(ends, index, side="right").astype(jnp.int32)
    expert = jnp.minimum(expert, num_experts - 1)

    nth = index - (ends - blocks)[expert]
    place = nth[:, None] * rows + jnp.arange(rows, dtype=jnp.int32)[None]
    first = (jnp.cumsum(sizes) - sizes)[expert]
    pair = jnp.take(order, first[:, None] + place, mode="clip")
    return _Blocks(ends[-1], expert, jnp.where(place < sizes[expert][:, None], pair, pairs))


def _rows_of_a_block(pairs: int, num_experts: int) -> int:
    """A power of two near the mean number of rows of an expert."""
    mean = max(pairs // num_experts, 1)
    return min(1 << (mean.bit_length() - 1), MOST_ROWS)


def _part(matrix: Matrix, expert: Int[Array, ""], num_experts: int) -> Matrix:
    """One expert's columns."""
    width = matrix.shape[1] // num_experts
    return slice_columns(matrix, expert * width, width)
