"""Choosing the next token: greedy, or by temperature with noise that depends on nothing else.

    token = argmax over ids of (logit / temperature + gumbel(seed, choice, position, id))

which draws from softmax(logits / temperature) exactly (the Gumbel-max trick, Gumbel 1954). The
noise of an id comes from a counter, threefry2x32 with 20 rounds (Salmon et al. 2011), keyed by the
request alone; so a draw does not depend on the batch, the slot, or how often anybody drew before.
"""

import jax.numpy as jnp
from jax import Array
from jax.extend.random import threefry_2x32
from jaxtyping import Float32, Int, UInt32


def sample(
    logits: Float32[Array, " v"],
    *,
    temperature: Float32[Array, ""],
    seed: UInt32[Array, "2"],
    choice: Int[Array, ""],
    position: Int[Array, ""],
) -> Int[Array, ""]:
    """The next token of one request.

    Args:
        logits: -inf where an id must not be chosen.
        temperature: 0 takes the highest logit, and of equal ones the lowest id.
        seed: low and high word of the request's 64-bit seed.
        choice: which of the request's choices this is, from 0.
        position: of the token to be chosen, from 0 at the first token of the prompt.
    """
    cool = jnp.where(temperature > 0, temperature, 1)
    noise = gumbel(seed, choice, position, num_ids=logits.shape[0])
    noisy = logits / cool + noise
    return jnp.argmax(jnp.where(temperature > 0, noisy, logits)).astype(jnp.int32)


def gumbel(
    seed: UInt32[Array, "2"], choice: Int[Array, ""], position: Int[Array, ""], *, num_ids: int
) -> Float32[Array, " v"]:
    """Standard Gumbel noise for the ids 0 .. num_ids - 1.

    key  = threefry2x32(key=(seed low, seed high), counter=(choice, position))
    word = threefry2x32(key=key, counter=(id, 0)), first word
    u    = (word // 2^9 + 1/2) / 2^23, never 0 or 1
    g    = -log(-log(u))
    """
    where = jnp.stack([choice, position]).astype(jnp.uint32)
    key = threefry_2x32(seed, where)
    ids = jnp.arange(num_ids, dtype=jnp.uint32)
    # threefry_2x32 takes the first half of a flat array as first words, the rest as second words.
    words = threefry_2x32(key, jnp.concatenate([ids, jnp.zeros_like(ids)]))[:num_ids]
    uniform = ((words >> 9).astype(jnp.float32) + 0.5) * jnp.float32(2**-23)
    return -jnp.log(-jnp.log(uniform))


def split_seed(seed: int) -> tuple[int, int]:
    """Low and high 32-bit word of a 64-bit seed; negative ones in two's complement."""
    return seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
