"""Rotary position embedding: angles once for each kind of layer, then one rotation for each use."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Float32, Int

from refimpl_kernels.compiling import traced_once

AngleForm = Literal["multiply", "divide"]
RopeRounding = Literal["float32", "activation"]


def rope_angles(
    positions: Int[Array, "b t"],
    *,
    head_width: int,
    theta: float,
    factor: float = 1.0,
    proportion: float = 1.0,
    form: AngleForm = "multiply",
) -> Float32[Array, "b t h"]:
    """The angle of each pair of dimensions at each position, in radians; h is half a head here.

    angle = position * theta^(-2i / head_width) / factor for i < head_width / 2.

    Positions and angles stay float32: in bfloat16 the positions 256 and 257 are the same number.
    The two forms differ by 2.4e-4 radians at position 8,191 and by 4e-3 at 131,071, because a
    float32 product of a large position with a rounded frequency is not the quotient.

    Args:
        proportion: share of the pairs that are rotated, those with the smallest i; the others have
            an angle of zero, and the exponents stay those of the whole head (Gemma 4's p-RoPE).
        form: "multiply" takes position * (1 / timescale) as Hugging Face and llama.cpp do;
            "divide" takes position / timescale as DeepMind's gemma does.
    """
    # On the host, so that every backend starts from the same constants. The power goes through
    # float64: numpy's float32 power is off by a unit where the processor has AVX-512, and a unit
    # of a timescale is 3e-4 radians at position 5,000.
    exponent = np.arange(0, head_width, 2, dtype=np.float32) / np.float32(head_width)
    timescale = (theta ** exponent.astype(np.float64)).astype(np.float32)
    # A pair that is not rotated has an infinite timescale.
    timescale[int(proportion * head_width / 2) :] = np.inf
    wide = positions.astype(jnp.float32)[..., None]
    if form == "divide":
        # XLA makes a division by a broadcast value a product with its reciprocal, which is the
        # other form. Behind the barrier it cannot see that the divisor is broadcast.
        divisor = jnp.broadcast_to(timescale, (*positions.shape, timescale.size))
        return wide / jax.lax.optimization_barrier(divisor) / jnp.float32(factor)
    return wide * (np.float32(1.0) / timescale / np.float32(factor))[None, None]


@traced_once("rounding")
def apply_rope(
    x: Float[Array, "b t n h"],
    angles: Float32[Array, "b t r"],
    *,
    rounding: RopeRounding = "float32",
) -> Float[Array, "b t n h"]:
    """Rotate the pair (x[i], x[i + h/2]) by the angle i, in the type of x.

    Args:
        angles: from `rope_angles`; r is half of h.
        rounding: "float32" multiplies in float32 and rounds once (DeepMind); "activation" rounds
            sine, cosine and both products to the type of x (Hugging Face).
    """
    dtype = jnp.dtype(jnp.float32) if rounding == "float32" else x.dtype
    cosine = jnp.cos(angles).astype(dtype)[:, :, None]
    sine = jnp.sin(angles).astype(dtype)[:, :, None]
    first, second = jnp.split(x.astype(dtype), 2, axis=-1)
    rotated = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
