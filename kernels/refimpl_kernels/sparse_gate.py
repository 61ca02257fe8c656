"""The sparse activation of Gemma 3n: of a gate only what stands out is kept."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from refimpl_kernels.compiling import traced_once


@traced_once("cutoff")
def sparse_gate(x: Float[Array, "*b f"], *, cutoff: float) -> Float[Array, "*b f"]:
    """max(x - (mean + cutoff * deviation), 0) over the last axis, in the type of x.

    Mean and population deviation are summed in float32 and rounded to the type of x, as every step
    after them, the cutoff included: as Hugging Face's Gemma 3n does.

    Args:
        cutoff: in standard deviations; the standard normal quantile of the share that is dropped.
    """
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(wide - mean), axis=-1, keepdims=True)
    margin = jnp.sqrt(variance).astype(x.dtype) * jnp.asarray(cutoff, x.dtype)
    # Without the barrier product and sum might be rounded once together, for some numbers of rows.
    least = mean.astype(x.dtype) + jax.lax.optimization_barrier(margin)
    return jnp.maximum(x - least, 0)
