"""Choosing the next token: greedy, or by temperature with noise that depends on nothing else."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float32, Int, Int32, UInt32

from refimpl_kernels.noise import NOISE_BITS, gumbel_noise
from refimpl_kernels.rows import cut_off, first_where, max_of_rows
from refimpl_kernels.truncation import (
    Head,
    Limit,
    head_of,
    is_within,
    limits_of,
    rules,
    weight_of,
)

SAMPLER_VERSION = 1

# As in vLLM: below this a temperature is greedy.
_COOLEST = 1e-5
_FARTHEST = 64.0
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
    x = jnp.where(jnp.abs(processed) < _SMALLEST, jnp.float32(0), processed)
    x = cut_off(x, vocab_size)
    best = max_of_rows(x)
    greedy = jnp.minimum(first_where(x == best[:, None]), vocab_size - 1)
    is_random = rows.temperature >= _COOLEST
    drawn = lax.cond(
        jnp.any(is_random),
        lambda: _drawn(x, best, rows, position, is_random),
        lambda: greedy,
    )
    return jnp.where(is_random, drawn, greedy)


def _drawn(
    x: Float32[Array, "b v"],
    best: Float32[Array, " b"],
    rows: SamplingRows,
    position: Int32[Array, " b"],
    is_random: Bool[Array, " b"],
) -> Int32[Array, " b"]:
    rule = rules(top_k=rows.top_k, top_p=rows.top_p, min_p=rows.min_p, width=x.shape[1])
    is_cut = (rule.top_k < x.shape[1]) | (rule.share < 1 << 20) | (rule.weight > 0)
    is_cut = is_random & is_cut
    temperature = jnp.where(is_random, rows.temperature, 1)[:, None]

    def distance(x: Float32[Array, "b w"]) -> Int32[Array, "b w"]:
        apart = jnp.where(x == best[:, None], 0, (best[:, None] - x) / temperature)
        return (jnp.minimum(apart, _FARTHEST) * (1 << NOISE_BITS)).astype(jnp.int32)

    def from_rows(limit: Limit) -> Int32[Array, " b"]:
        apart = distance(x)
        kept = is_within(x, limit) & (x > -jnp.inf)
        kept = lax.cond(
            jnp.any(rule.weight > 0),
            lambda: kept & (weight_of(apart) >= rule.weight[:, None]),
            lambda: kept,
        )
        ids = lax.broadcasted_iota(jnp.int32, (1, x.shape[1]), 1)
        score = gumbel_noise(rows.seed, rows.choice, position, ids) - apart
        score = lax.optimization_barrier(jnp.where(kept, score, _NEVER))
        return jnp.minimum(first_where(score == max_of_rows(score)[:, None]), x.shape[1] - 1)

    def from_head(head: Head) -> Int32[Array, " b"]:
        score = gumbel_noise(rows.seed, rows.choice, position, head.ids) - distance(head.values)
        score = jnp.where(head.kept, score, _NEVER)
        is_best = score == jnp.max(score, axis=1, keepdims=True)
        return jnp.min(jnp.where(is_best, head.ids, x.shape[1] - 1), axis=1)

    def cut() -> Int32[Array, " b"]:
        head = head_of(x, rule, distance)
        is_settled = head.is_all | ~is_cut

        def searched() -> Limit:
            limit = limits_of(x, rule, distance)
            return Limit(
                jnp.where(head.is_all, head.limit.value, limit.value),
                jnp.where(head.is_all, head.limit.last_id, limit.last_id),
            )

        limit = lax.cond(jnp.all(is_settled), lambda: head.limit, searched)
        limit = Limit(
            jnp.where(is_cut, limit.value, -jnp.inf), jnp.where(is_cut, limit.last_id, x.shape[1])
        )
        return lax.cond(
            jnp.all(head.is_all & is_cut | ~is_random),
            lambda: from_head(head),
            lambda: from_rows(limit),
        )

    everything = Limit(jnp.full_like(best, -jnp.inf), jnp.full(best.shape, x.shape[1], jnp.int32))
    return lax.cond(jnp.any(is_cut), cut, lambda: from_rows(everything))


def sample(
    logits: Float32[Array, " v"],
    *,
    temperature: Float32[Array, ""],
    seed: UInt32[Array, "2"],
    choice: Int[Array, ""],
    position: Int[Array, ""],
) -> Int32[Array, ""]:
    """The next token of one request that asks for nothing but a temperature.

    Args:
        logits: -inf where an id must not be chosen.
        temperature: 0 takes the highest logit, and of equal ones the lowest id.
        seed: low and high word of the request's 64-bit seed.
        choice: which of the request's choices this is, from 0.
        position: of the token to be chosen, from 0 at the first token of the prompt.
    """
    zero, one = jnp.zeros(1, jnp.float32), jnp.ones(1, jnp.float32)
    rows = SamplingRows(
        temperature=temperature[None],
        top_p=one,
        top_k=jnp.zeros(1, jnp.int32),
        min_p=zero,
        frequency=zero,
        presence=zero,
        repetition=one,
        seed=seed[None],
        choice=choice[None].astype(jnp.int32),
        is_biased=jnp.zeros(1, bool),
    )
    at = position[None].astype(jnp.int32)
    return draw(logits[None], rows, at, vocab_size=logits.shape[0])[0]


def split_seed(seed: int) -> tuple[int, int]:
    """Low and high 32-bit word of a 64-bit seed; negative ones in two's complement."""
    return seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
