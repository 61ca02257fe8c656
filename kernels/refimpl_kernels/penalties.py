"""What a request does to its logits before it draws: bias, penalties, and ids it must not choose.

In this order, each step for the rows that ask for it:

    bias          logit + bias; -inf forbids an id
    repetition    logit / r if logit > 0, else logit / (1 / r), for ids in the prompt or sampled
                  (Keskar et al. 2019, CTRL, section 4.1, as in vLLM, for the prompt too)
    frequency     logit - count / (1 / frequency)       count = how often the id was sampled
    presence      logit - presence where count > 0
    ban           -inf

all in float32, 1 / r and 1 / frequency rounded to float32 first. These are quotients where products
would do, because a compiler may contract a product and the sum that follows it to one rounding, and
then the same request would round otherwise in another program. A quotient is never contracted; on
a GPU it may be a unit in the last place off (see `refimpl_kernels.sampling`).
"""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float32, Int32

from refimpl_kernels.sampling import SamplingRows


def process(
    logits: Float32[Array, "b v"],
    rows: SamplingRows,
    *,
    slot: Int32[Array, " b"],
    counts: Int32[Array, "s v"],
    in_prompt: Bool[Array, "s v"],
    bias: Float32[Array, "s v"],
    banned: Int32[Array, "b e"],
) -> Float32[Array, "b v"]:
    """Logits as the draw takes them; a row that asks for nothing comes out as it went in.

    Args:
        slot: which row of the next three belongs to a row of logits. They are read for the rules
            that are asked for alone: each is as large as the logits.
        counts: how often each id was sampled before this position.
        in_prompt: whether an id occurs in the prompt.
        bias: added to the logits; -inf for ids that are banned or not allowed.
        banned: ids that must not be chosen at this position; -1 for none.
    """
    is_penalised = (rows.frequency != 0) | (rows.presence != 0)
    is_repetitive = rows.repetition != 1

    def biased(x: Array) -> Array:
        return jnp.where(rows.is_biased[:, None], x + bias[slot], x)

    def repeated(x: Array) -> Array:
        seen = is_repetitive[:, None] & (in_prompt[slot] | (counts[slot] > 0))
        divisor = jnp.where(x > 0, rows.repetition[:, None], 1 / rows.repetition[:, None])
        return jnp.where(seen, x / jnp.where(seen, divisor, 1), x)

    def penalised(x: Array) -> Array:
        times = counts[slot]
        sampled = is_penalised[:, None] & (times > 0)
        # Off is 1 / 0 = inf, and count / inf = 0.
        divisor = jnp.where(sampled, 1 / rows.frequency[:, None], 1)
        less = x - times.astype(jnp.float32) / divisor
        return jnp.where(sampled, less - rows.presence[:, None], x)

    x = lax.cond(jnp.any(rows.is_biased), biased, _unchanged, logits)
    x = lax.cond(jnp.any(is_repetitive), repeated, _unchanged, x)
    x = lax.cond(jnp.any(is_penalised), penalised, _unchanged, x)
    b, v = x.shape
    # Out of range is dropped, and so is -1 once it is out of range.
    ids = jnp.where(banned < 0, v, banned)
    return lax.cond(
        jnp.any(banned >= 0),
        lambda x: x.at[jnp.arange(b)[:, None], ids].set(-jnp.inf, mode="drop"),
        _unchanged,
        x,
    )


def _unchanged(x: Array) -> Array:
    return x
