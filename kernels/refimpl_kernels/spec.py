"""What every operation means: plain jnp, float32, no concern for speed or memory.

The fast paths are judged by these functions, so nothing here is shared with them. Inputs of any
float type are widened to float32 first; results are float32. Formulas follow the Gemma reports
(arXiv 2403.08295, 2408.00118, 2503.19786) and the papers named at each function.
"""

import jax.numpy as jnp
from jax import Array
from jax.lax import Precision
from jaxtyping import Bool, Float, Float32, Int, Int8


def rms_norm(
    x: Float[Array, "*b d"], scale: Float[Array, " d"] | None, *, epsilon: float, offset: float
) -> Float32[Array, "*b d"]:
    """x / sqrt(mean(x^2) + epsilon) * (offset + scale), over the last axis; arXiv 1910.07467.

    `offset` is 1 where checkpoints store the scale less one. `scale` None means a factor of one.
    """
    wide = jnp.asarray(x, jnp.float32)
    normalised = wide / jnp.sqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    if scale is None:
        return normalised
    factor = jnp.float32(offset) + jnp.asarray(scale, jnp.float32)
    return normalised * factor.reshape((1,) * (x.ndim - 1) + (-1,))


def rope(
    x: Float[Array, "b t n h"],
    positions: Int[Array, "b t"],
    *,
    theta: float,
    factor: float = 1.0,
    proportion: float = 1.0,
) -> Float32[Array, "b t n h"]:
    """Rotate the pair (x[i], x[i + h/2]) by positions * theta^(-2i/h) / factor; arXiv 2104.09864.

    `factor` above one is linear position interpolation (arXiv 2306.15595). With a `proportion`
    below one only the first pairs are rotated, i < proportion * h/2, at the same frequencies.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half) / factor
    frequencies = jnp.where(jnp.arange(half) < int(proportion * half), frequencies, 0.0)
    angles = jnp.asarray(positions, jnp.float32)[:, :, None, None] * frequencies[None, None, None]
    first = jnp.asarray(x[..., :half], jnp.float32)
    second = jnp.asarray(x[..., half:], jnp.float32)
    return jnp.concatenate(
        [
            first * jnp.cos(angles) - second * jnp.sin(angles),
            second * jnp.cos(angles) + first * jnp.sin(angles),
        ],
        axis=-1,
    )


def soft_cap(x: Float[Array, "*a"], cap: float | None) -> Float32[Array, "*a"]:
    """cap * tanh(x / cap); the identity where cap is None. Gemma 2 report, section 2."""
    wide = jnp.asarray(x, jnp.float32)
    return wide if cap is None else cap * jnp.tanh(wide / cap)


def visible(
    query_positions: Int[Array, "b t"], key_positions: Int[Array, "b s"], *, window: int | None
) -> Bool[Array, "b t s"]:
    """Which keys a query may see: not after it and, with a window W, among the last W (itself too).

    A negative position marks padding or an empty place in a cache, which nothing sees.

        window 3     key 0 1 2 3 4
        query 0          x
        query 1          x x
        query 2          x x x
        query 3            x x x
        query 4              x x x
    """
    query = query_positions[:, :, None]
    key = key_positions[:, None, :]
    seen = (key >= 0) & (key <= query)
    return seen if window is None else seen & (key > query - window)


def attention(
    query: Float[Array, "b t n h"],
    key: Float[Array, "b s k h"],
    value: Float[Array, "b s k h"],
    *,
    query_positions: Int[Array, "b t"],
    key_positions: Int[Array, "b s"],
    scale: float,
    window: int | None = None,
    cap: float | None = None,
) -> Float32[Array, "b t n h"]:
    """softmax(mask(soft_cap(q . k * scale))) v, query head j reading key/value head j k // n.

    Grouped-query attention after arXiv 2305.13245. A query that sees no key gives zeros, so that
    padding never puts a nan into a result.
    """
    repeats = query.shape[2] // key.shape[2]
    wide_query = jnp.asarray(query, jnp.float32)
    wide_key = jnp.repeat(jnp.asarray(key, jnp.float32), repeats, axis=2)
    wide_value = jnp.repeat(jnp.asarray(value, jnp.float32), repeats, axis=2)

    scores = jnp.einsum("btnh,bsnh->bnts", wide_query, wide_key, precision=Precision.HIGHEST)
    scores = soft_cap(scores * scale, cap)

    mask = visible(query_positions, key_positions, window=window)[:, None]
    highest = jnp.max(scores, axis=-1, keepdims=True, where=mask, initial=-1e30)
    raised = jnp.where(mask, jnp.exp(jnp.minimum(scores - highest, 0.0)), 0.0)
    total = jnp.sum(raised, axis=-1, keepdims=True)
    weights = jnp.where(total > 0, raised / jnp.where(total > 0, total, 1.0), 0.0)
    return jnp.einsum("bnts,bsnh->btnh", weights, wide_value, precision=Precision.HIGHEST)


def linear(x: Float[Array, "*b i"], weight: Float[Array, "i o"]) -> Float32[Array, "*b o"]:
    """x @ weight."""
    return jnp.einsum(
        "...i,io->...o",
        jnp.asarray(x, jnp.float32),
        jnp.asarray(weight, jnp.float32),
        precision=Precision.HIGHEST,
    )


def dequantize(
    values: Int8[Array, "i o"],
    scales: Float32[Array, "j o"],
    minimums: Float32[Array, "j o"] | None = None,
) -> Float32[Array, "i o"]:
    """scales * values - minimums, a scale for each of j equal runs of inputs, as in ggml."""
    repeats = values.shape[0] // scales.shape[0]
    weight = jnp.repeat(scales, repeats, axis=0) * jnp.asarray(values, jnp.float32)
    return weight if minimums is None else weight - jnp.repeat(minimums, repeats, axis=0)


def gelu(x: Float[Array, "*a"]) -> Float32[Array, "*a"]:
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))); arXiv 1606.08415, section 2."""
    wide = jnp.asarray(x, jnp.float32)
    return 0.5 * wide * (1 + jnp.tanh(jnp.sqrt(2 / jnp.pi) * (wide + 0.044715 * wide**3)))


def sparse_gate(x: Float[Array, "*b f"], *, cutoff: float) -> Float32[Array, "*b f"]:
    """max(x - (mean + cutoff * deviation), 0) over the last axis; Gemma 3n's sparse activation.

    The deviation is the population's. Of normally distributed gates a `cutoff` of 1.645 keeps 5 %.
    """
    wide = jnp.asarray(x, jnp.float32)
    mean = jnp.mean(wide, axis=-1, keepdims=True)
    deviation = jnp.sqrt(jnp.mean((wide - mean) ** 2, axis=-1, keepdims=True))
    return jnp.maximum(wide - (mean + cutoff * deviation), 0.0)


def with_magnitude_of(
    x: Float[Array, "*b d"], pattern: Float[Array, "*b d"], *, least: float
) -> Float32[Array, "*b d"]:
    """x * sqrt(mean(pattern^2) / max(mean(x^2), least)), over the last axis."""
    wide, wide_pattern = jnp.asarray(x, jnp.float32), jnp.asarray(pattern, jnp.float32)
    wanted = jnp.mean(wide_pattern**2, axis=-1, keepdims=True)
    found = jnp.maximum(jnp.mean(wide**2, axis=-1, keepdims=True), least)
    return wide * jnp.sqrt(wanted / found)


def expert_weights(scores: Float[Array, "r e"], *, chosen: int) -> Float32[Array, "r e"]:
    """The largest `chosen` of softmax(scores), scaled to a sum of one; zero for the other experts.

    Of equal scores the lower expert's counts as the larger.
    """
    wide = jnp.asarray(scores, jnp.float32)
    likelihood = jnp.exp(wide - jnp.max(wide, axis=-1, keepdims=True))
    rank = jnp.argsort(jnp.argsort(-wide, axis=-1, stable=True), axis=-1)
    kept = jnp.where(rank < chosen, likelihood, 0.0)
    return kept / jnp.sum(kept, axis=-1, keepdims=True)


def experts(
    x: Float[Array, "r d"],
    weights: Float[Array, "r e"],
    gate_up: Float[Array, "e d g"],
    down: Float[Array, "e f d"],
) -> Float32[Array, "r d"]:
    """sum_e weights[e] (gelu(x G_e) * x U_e) D_e; every expert computed, most with weight zero.

    `gate_up` has each expert's gate before its up projection, so g is twice f.
    """
    x, weights, gate_up, down = (
        jnp.asarray(given, jnp.float32) for given in (x, weights, gate_up, down)
    )
    gate, up = jnp.split(
        jnp.einsum("rd,edf->ref", x, gate_up, precision=Precision.HIGHEST), 2, axis=-1
    )
    hidden = gelu(gate) * up
    return jnp.einsum("re,ref,efd->rd", weights, hidden, down, precision=Precision.HIGHEST)
