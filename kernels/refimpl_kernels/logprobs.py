"""Log-probabilities from raw logits."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Float32, Int


def log_probabilities(
    logits: Float[Array, "*b v"], tokens: Int[Array, "*b"]
) -> Float32[Array, "*b"]:
    """log softmax(logits)[token], natural, in float32; before any temperature or penalty."""
    wide = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(wide, tokens[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(wide, axis=-1)
