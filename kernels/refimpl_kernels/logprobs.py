"""Log-probabilities from raw logits."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Float32, Int


def log_probabilities(
    logits: Float[Array, "*b v"], tokens: Int[Array, "*b"]
) -> Float32[Array, "*b"]:
    """log softmax(logits)[token], natural, in float32; before any temperature or penalty."""
    wide = logits.astype(jnp.float32)
    # Taking the maximum off first keeps the digits that logit - logsumexp would cancel.
    shifted = wide - jnp.max(wide, axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(shifted, tokens[..., None], axis=-1)[..., 0]
    return chosen - jnp.log(jnp.sum(jnp.exp(shifted), axis=-1))
