"""tanh whose bits in a row do not depend on the number of rows."""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from refimpl_kernels.compiling import LANES


def tanh(x: Float[Array, "*a"]) -> Float[Array, "*a"]:
    """tanh(x) in the type of x, computed in whole vectors.

    XLA's CPU backend has one approximation for vectors and another for what is left of them.
    """
    width = x.shape[-1] if x.ndim else LANES
    if width % LANES == 0:
        return jnp.tanh(x)
    around = [(0, 0)] * (x.ndim - 1)
    return lax.optimization_barrier(jnp.tanh(jnp.pad(x, [*around, (0, -width % LANES)])))[
        ..., :width
    ]
