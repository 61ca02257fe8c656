"""RMSNorm in the two orders of rounding of the Gemma references; scaling to a magnitude."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from refimpl_kernels.compiling import traced_once

NormRounding = Literal["float32", "activation"]


@traced_once("epsilon", "offset", "rounding")
def rms_norm(
    x: Float[Array, "*b d"],
    scale: Float[Array, " d"] | None,
    *,
    epsilon: float,
    offset: float,
    rounding: NormRounding = "float32",
) -> Float[Array, "*b d"]:
    """x * rsqrt(mean(x^2) + epsilon) * (offset + scale) over the last axis, in the type of x.

    Args:
        x: any float type; the result has the same.
        scale: as stored in the checkpoint, or None for a norm without weights.
        epsilon: added to the mean square.
        offset: 1.0 where the checkpoint stores the scale less one, else 0.0.
        rounding: "float32" computes everything in float32 and rounds once at the end, as Hugging
            Face does; "activation" rounds each step to the type of x, as DeepMind's gemma does.
            In float32 the two are the same function.
    """
    if rounding == "float32":
        computed = _normalise(x.astype(jnp.float32), scale, epsilon, offset)
        return computed.astype(x.dtype)
    return _normalise(x, scale, epsilon, offset)


@traced_once("least")
def with_magnitude_of(
    x: Float[Array, "*b d"], pattern: Float[Array, "*b d"], *, least: float
) -> Float[Array, "*b d"]:
    """x scaled to the root mean square of `pattern`, over the last axis, in the type of x.

    Every step is rounded to the type of x, as Hugging Face's Gemma 3n rounds it.

    Args:
        least: lower bound of the mean square that x is divided by the root of.
    """
    wanted = jnp.sqrt(_mean_square(pattern))
    # The barrier keeps the compiler from making a reciprocal root of it; see `_inverse_root`.
    found = jax.lax.optimization_barrier(
        jnp.sqrt(jnp.maximum(_mean_square(x), jnp.asarray(least, x.dtype)))
    )
    return x * wanted / found


def _mean_square(x: Array) -> Array:
    squares = jnp.square(x)
    if x.dtype != jnp.float32:
        # From 4,096 elements on, the compiler would sum squares that it has not rounded.
        squares = jax.lax.optimization_barrier(squares)
    # The sum itself always runs in float32: jnp.mean and torch.mean both widen a narrow type.
    return jnp.mean(squares, axis=-1, keepdims=True, dtype=jnp.float32).astype(x.dtype)


def _normalise(x: Array, scale: Array | None, epsilon: float, offset: float) -> Array:
    mean_square = _mean_square(x) + jnp.asarray(epsilon, x.dtype)
    normalised = x * _inverse_root(mean_square)
    if scale is None:
        return normalised
    factor = jnp.asarray(offset, x.dtype) + scale.astype(x.dtype)
    return normalised * jnp.expand_dims(factor, range(x.ndim - 1))


def _inverse_root(square: Array) -> Array:
    """1 / sqrt(square), rounded to the type of the square once, after both steps in float32.

    Not rsqrt: XLA's CPU backend has one for each width of vector, and they round differently. The
    barrier keeps it from making one of the two steps; the root comes last because it halves the
    error of what it is taken of.
    """
    inverse = jax.lax.optimization_barrier(1 / square.astype(jnp.float32))
    return jnp.sqrt(inverse).astype(square.dtype)
