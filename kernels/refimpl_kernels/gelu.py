"""The tanh form of GELU, in the two orders of rounding that the references use."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from refimpl_kernels.compiling import LANES, traced_once

Rounding = Literal["float32", "activation"]


@traced_once("rounding")
def gelu(x: Float[Array, "*a"], *, rounding: Rounding = "float32") -> Float[Array, "*a"]:
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), in the type of x.

    Every Gemma uses the tanh form, also where a Gemma 1 configuration says "gelu".

    Args:
        rounding: "float32" rounds once at the end (PyTorch); "activation" rounds each step (JAX).
    """
    width = x.shape[-1] if x.ndim else LANES
    if width % LANES:
        around = [(0, 0)] * (x.ndim - 1)
        wide = gelu(jnp.pad(x, [*around, (0, -width % LANES)]), rounding=rounding)
        return lax.optimization_barrier(wide)[..., :width]
    dtype = jnp.dtype(jnp.float32) if rounding == "float32" else x.dtype
    return jax.nn.gelu(x.astype(dtype), approximate=True).astype(x.dtype)
