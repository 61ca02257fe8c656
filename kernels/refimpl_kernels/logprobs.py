"""Log-probabilities from raw logits."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Float32, Int, Int32

from refimpl_kernels.rows import cut_off, max_of_rows, sum_of_rows, top_of_rows


def log_probabilities(
    logits: Float[Array, "*b v"], tokens: Int[Array, "*b"]
) -> Float32[Array, "*b"]:
    """log softmax(logits)[token], natural, in float32; before any temperature or penalty."""
    flat = logits.reshape(-1, logits.shape[-1]).astype(jnp.float32)
    chosen = jnp.take_along_axis(flat, tokens.reshape(-1, 1), axis=1)
    return _of_values(flat, chosen)[:, 0].reshape(tokens.shape)


def top_logprobs(
    logits: Float[Array, "b v"], tokens: Int[Array, " b"], *, vocab_size: int, k: int = 20
) -> tuple[Float32[Array, " b"], Int32[Array, "b k"], Float32[Array, "b k"]]:
    """The token's log-probability, the k likeliest ids below `vocab_size`, and theirs.

    Highest first, and of equal ones the lowest id; bit for bit what `log_probabilities` gives for
    these ids. The softmax is over all rows of the head, as Hugging Face's is, whether or not the
    vocabulary has a piece for each.
    """
    wide = logits.astype(jnp.float32)
    values, ids = top_of_rows(cut_off(wide, vocab_size), k)
    chosen = jnp.take_along_axis(wide, tokens[:, None], axis=1)
    every = _of_values(wide, jnp.concatenate([chosen, values], axis=1))
    return every[:, 0], ids, every[:, 1:]


def _of_values(
    logits: Float32[Array, "b v"], values: Float32[Array, "b k"]
) -> Float32[Array, "b k"]:
    # Taking the maximum off first keeps the digits that logit - logsumexp would cancel.
    best = max_of_rows(logits)[:, None]
    total = sum_of_rows(jnp.exp(logits - best))
    return values - best - jnp.log(total)[:, None]
