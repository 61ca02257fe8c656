"""Choosing the next token: the published sampler.

    token = argmax over the kept ids of (processed logit / temperature + Gumbel noise)

which draws from the softmax over the kept ids (the Gumbel-max trick, Gumbel 1954). The noise of an
id comes from a counter keyed by the request alone, so a draw does not depend on the batch, the
slot, or how often anybody drew before. All that follows the one division is integer arithmetic, so
the token is the same on every device that divides truly, and another implementation can agree on
every bit; see `tests/oracle/sampler.py` for one. XLA's GPU backend does not divide truly: on an
H200 one quotient in six was a unit in the last place off, which can turn a draw between two ids
whose scores are that close.

The definition, version 1. `logit` is a processed logit, as `refimpl_kernels.penalties` defines it;
only ids below the vocabulary's size take part, and the order of ids is (logit descending, id
ascending). Logits smaller than 2^-126 in magnitude count as 0. A temperature below 1e-5 takes the
first id in this order. Otherwise:

1.  distance = floor(2^24 min(64, (best - logit) / temperature)), where the subtraction and the
    division (a true one) are rounded to float32; 0 where logit = best.

2.  weight = 2^31 for distance 0, and otherwise about 2^31 exp(-distance / 2^24):
        D = min(distance, 24 * 2^24);  q = (D >> 13) * 23637 >> 25
        y = (4 D - 46516320 q - 23258160) << 6
        e = c0 + y c1 + ... + y^6 c6 by Horner's rule: v = c6;  v = ck + mulhi(v, y), k = 5 ... 0
        weight = 0 if q > 31, else min(2^31, (2 e + (2^q >> 1)) >> q)
    with c = EXPONENTIAL of `refimpl_kernels.truncation`, and mulhi and >> as in
    `refimpl_kernels.noise`. The error is below 1e-8 of the weight and 0.6 units.

3.  top_k, if it is positive, keeps the first top_k ids of the order.

4.  top_p, if P = floor(2^20 top_p) < 2^20, keeps the shortest prefix of those whose weights sum up
    to ceil(P * total / 2^20) or more, where total is the sum over the ids that top_k left; at least
    one id. So top_p = 0 keeps the first id.

5.  min_p keeps, of those, the ids with weight >= ceil(2^31 min_p). Ids with logit -inf are never
    kept. (top_k, top_p, min_p in this order, as in vLLM and Hugging Face transformers.)

6.  token = the kept id with the largest noise - distance, the lowest of equal ones, with the noise
    of `refimpl_kernels.noise` for (seed, choice, position, id), where position is the token's own.

If no id is kept since all logits are -inf, the token is 0.

What it costs, in ms, at v = 262,144 on two cores of a 2.8 GHz Ice Lake Xeon, the least of some
runs while other work had a good part of the machine:

    rows                              1       8
    all greedy                        0.6     2.0
    temperature alone                 1.9    10
    top_k = 50, or with top_p = 0.9   1.3     8
    min_p = 0.05                      1.4     8.5
    top_p within the best 256 ids     2.4    17
    top_k or top_p beyond those       6 for each row that asks for it, one after the other

Row by row, as the engine draws on a CPU, eight rows take as long as eight at once, within a tenth.

Noise is what costs with a temperature alone: 140 integer operations an id. Rows that are cut down
need it for the ids that are left; then the search for the best 256 costs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float32, Int32, UInt32

from refimpl_kernels.noise import bound_of_words, gumbel_of_words, noise_words
from refimpl_kernels.rows import best_columns, cut_off, first_where, max_of_rows, min_of_rows
from refimpl_kernels.truncation import (
    distance_of,
    head_of,
    ids_of,
    is_cutting,
    is_within,
    limits_of,
    no_head,
    rules_of,
)

SAMPLER_VERSION = 1

# As in vLLM: below this a temperature is greedy.
_COOLEST = 1e-5
# Columns of a row in which the noise is computed first.
_COLUMNS = 32
_NEVER = -(2**31)
# The smallest float32 that every device keeps apart from zero.
_SMALLEST = 2.0**-126


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingRows:
    """How each row of a batch is sampled.

    Attributes:
        temperature: below 1e-5 greedy.
        top_p: share of the mass that is kept, 0 to 1; 1 is off, 0 keeps the likeliest id.
        top_k: number of ids that are kept; 0 and below is off.
        min_p: least probability that is kept, as a fraction of the largest one; 0 is off.
        frequency: taken off a logit for each time its id was sampled; 0 is off.
        presence: taken off a logit once its id was sampled; 0 is off.
        repetition: divides positive logits of ids seen, and multiplies negative ones; 1 is off.
        seed: low and high word of the request's 64-bit seed.
        choice: which of the request's choices a row is, from 0.
        is_biased: whether the row's bias has anything but zeros; where not, it is not read.
    """

    temperature: Float32[Array, " b"]
    top_p: Float32[Array, " b"]
    top_k: Int32[Array, " b"]
    min_p: Float32[Array, " b"]
    frequency: Float32[Array, " b"]
    presence: Float32[Array, " b"]
    repetition: Float32[Array, " b"]
    seed: UInt32[Array, "b 2"]
    choice: Int32[Array, " b"]
    is_biased: Bool[Array, " b"]


def draw(
    processed: Float32[Array, "b v"],
    rows: SamplingRows,
    position: Int32[Array, " b"],
    *,
    vocab_size: int,
) -> Int32[Array, " b"]:
    """The next token of each row.

    Args:
        processed: logits as `process` leaves them; -inf where an id must not be chosen.
        position: of the token to be chosen, from 0 at the first token of the prompt.
        vocab_size: ids from here on are never chosen.
    """
    x = cut_off(processed, vocab_size)
    x = jnp.where(jnp.abs(x) < _SMALLEST, jnp.float32(0), x)
    # The barrier has the row written once instead of computed for each of its readers. If all are
    # greedy that costs (2.1 ms for eight rows, where it would be 1.4), but takes 8 MB less.
    x = lax.optimization_barrier(x)
    greedy = _first_best(x)
    is_random = rows.temperature >= _COOLEST
    drawn = lax.cond(
        jnp.any(is_random),
        lambda: _drawn(x, rows, position, is_random),
        lambda: greedy,
    )
    return jnp.where(is_random, drawn, greedy)


def _drawn(
    x: Float32[Array, "b v"],
    rows: SamplingRows,
    position: Int32[Array, " b"],
    is_random: Bool[Array, " b"],
) -> Int32[Array, " b"]:
    width = x.shape[1]
    rules = rules_of(
        best=max_of_rows(x),
        temperature=jnp.where(is_random, rows.temperature, 1),
        top_k=jnp.where(is_random, rows.top_k, 0),
        top_p=jnp.where(is_random, rows.top_p, 1),
        min_p=jnp.where(is_random, rows.min_p, 0),
        width=width,
    )
    is_cut = is_cutting(rules, width)
    head = lax.cond(jnp.any(is_cut), lambda: head_of(x, rules), lambda: no_head(x))
    limit = limits_of(x, rules, head)

    def scores(
        x: Float32[Array, "b w"],
        ids: Int32[Array, "#b w"],
        noise_of: Callable[[UInt32[Array, "b w"]], Int32[Array, "b w"]],
    ) -> Int32[Array, "b w"]:
        distance = distance_of(x, rules)
        kept = is_within(limit, x, ids) & (distance <= rules.farthest[:, None]) & (x > -jnp.inf)
        words = noise_words(rows.seed, rows.choice, position, ids)
        return jnp.where(kept, noise_of(words) - distance, _NEVER)

    return lax.cond(
        jnp.all(is_cut & head.is_enough | ~is_random),
        lambda: _winner(scores(head.values, head.ids, gumbel_of_words), head.ids),
        lambda: _drawn_from_rows(x, scores),
    )


def _drawn_from_rows(
    x: Float32[Array, "b v"], scores: Callable[..., Int32[Array, "b w"]]
) -> Int32[Array, " b"]:
    """The id with the highest score, whose noise is computed where a bound does not rule it out."""
    bounds = lax.optimization_barrier(scores(x, ids_of(x), bound_of_words).astype(jnp.float32))
    _, candidates, floor = best_columns(bounds, _COLUMNS)
    candidates = jnp.minimum(candidates, x.shape[1] - 1)
    score = scores(jnp.take_along_axis(x, candidates, axis=1), candidates, gumbel_of_words)
    # Rounding to float32 keeps the order: what exceeds the floor rounded exceeds what was rounded.
    is_settled = jnp.max(score, axis=1).astype(jnp.float32) > floor
    return lax.cond(
        jnp.all(is_settled),
        lambda: _winner(score, candidates),
        lambda: _winner(lax.optimization_barrier(scores(x, ids_of(x), gumbel_of_words)), ids_of(x)),
    )


def _winner(score: Int32[Array, "b w"], ids: Int32[Array, "#b w"]) -> Int32[Array, " b"]:
    """The id with the highest score, the lowest of equal ones."""
    is_best = score == max_of_rows(score)[:, None]
    return min_of_rows(jnp.where(is_best, ids, jnp.int32(2**31 - 1)))


def _first_best(x: Float32[Array, "b v"]) -> Int32[Array, " b"]:
    return jnp.minimum(first_where(x == max_of_rows(x)[:, None]), x.shape[1] - 1)


def split_seed(seed: int) -> tuple[int, int]:
    """Low and high 32-bit word of a 64-bit seed; negative ones in two's complement."""
    return seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
