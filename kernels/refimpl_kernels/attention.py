"""Grouped-query attention over keys that lie at known positions, in a cache or beside the queries.

Keys carry their absolute position, and a negative one marks a place that holds nothing. So one
function serves a full pass, a full-length cache and a ring, and masks never depend on where in
memory a key lies.

    dense    all scores at once. Can round as the bfloat16 references do, and can hand out scores.
    blocked  running softmax (arXiv 1805.02867) over fixed blocks of positions; float32 only.
    rows     the same for one query a row, one row after the other and blocks in groups; see
             `attention_rows.py`.

Why fixed blocks: a sum over s depends in its last bits on how it is split. "blocked" splits by
absolute position (block j holds positions j*block .. j*block + block - 1), visits the blocks in
order, and a block in which a query sees nothing changes no bit of its result. Hence a ring gives
the same bits as a full-length cache, and a short request the same bits beside a long one.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import Precision
from jaxtyping import Bool, Float, Float32, Int

from refimpl_kernels.compiling import traced_once
from refimpl_kernels.tanh import tanh

AttentionImplementation = Literal["dense", "blocked", "rows"]
Rounding = Literal["float32", "activation"]
ScaleSite = Literal["scores", "query"]

# finfo.min, not -inf: -inf minus -inf is nan, and a row that sees nothing must stay finite.
MASKED = jnp.finfo(jnp.float32).min


def visible(
    query_positions: Int[Array, "b t"], key_positions: Int[Array, "b s"], *, window: int | None
) -> Bool[Array, "b t s"]:
    """True where the key is filled, not after the query and less than the window before it."""
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    seen = (distance >= 0) & (key_positions >= 0)[:, None, :]
    return seen if window is None else seen & (distance < window)


def soft_cap(x: Float[Array, "*a"], cap: float | None) -> Float[Array, "*a"]:
    """cap * tanh(x / cap) in the type of x; the identity where cap is None."""
    return x if cap is None else tanh(x / cap) * cap


def attention_scores(
    query: Float[Array, "b t n h"],
    key: Float[Array, "b s k h"],
    *,
    scale: float,
    cap: float | None,
    scale_site: ScaleSite = "scores",
) -> Float[Array, "b k g t s"]:
    """Scaled and capped scores before the mask, in the type of the query.

    Args:
        scale_site: "scores" multiplies the products (Hugging Face), "query" the query (DeepMind).
            A power of two gives the same bits either way; 144^-1/2 and 168^-1/2 do not.
    """
    b, t, n, h = query.shape
    grouped = query.reshape(b, t, key.shape[2], n // key.shape[2], h)
    if scale_site == "query":
        grouped = grouped * scale
    scores = jnp.einsum(
        "btkgh,bskh->bkgts",
        grouped,
        key,
        precision=Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    ).astype(query.dtype)
    if scale_site == "scores":
        # In float32: PyTorch does not round a Python number to the type of what it multiplies.
        scores = (scores.astype(jnp.float32) * scale).astype(query.dtype)
    return soft_cap(scores, cap)


def dense_attention(
    scores: Float[Array, "b k g t s"],
    value: Float[Array, "b s k h"],
    mask: Bool[Array, "b t s"],
    *,
    softmax: Rounding = "float32",
) -> Float[Array, "b t n h"]:
    """Mask, softmax and weighted sum of values, all scores at once.

    Args:
        softmax: "float32" widens the scores and rounds the weights once (Hugging Face);
            "activation" stays in the type of the scores (DeepMind).
    """
    dtype = jnp.dtype(jnp.float32) if softmax == "float32" else scores.dtype
    shown = mask[:, None, None]
    masked = jnp.where(shown, scores.astype(dtype), jnp.finfo(dtype).min)
    # A query that sees nothing would weigh every key alike; it gets zeros instead, as in the spec.
    weights = jnp.where(shown, jax.nn.softmax(masked, axis=-1), 0).astype(value.dtype)
    mixed = jnp.einsum(
        "bkgts,bskh->btkgh",
        weights,
        value,
        precision=Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    ).astype(value.dtype)
    b, t, k, g, h = mixed.shape
    return mixed.reshape(b, t, k * g, h)


@traced_once("scale", "window", "cap", "block")
def blocked_attention(
    query: Float32[Array, "b t n h"],
    key: Float32[Array, "c s k h"],
    value: Float32[Array, "c s k h"],
    *,
    query_positions: Int[Array, "b t"],
    key_positions: Int[Array, "c s"],
    scale: float,
    window: int | None = None,
    cap: float | None = None,
    block: int = 128,
    rows: Int[Array, " b"] | None = None,
) -> Float32[Array, "b t n h"]:
    """Attention by running softmax over blocks of positions, in time linear in what is visible.

    The key of position p must lie at index p % s, and s must be a multiple of `block`.

    Args:
        rows: which row of keys and values each row of queries attends to; None for its own. So a
            few rows of a large cache are read in place.

    Raises:
        NotImplementedError: inputs are not float32, or s is not a multiple of the block.
    """
    check_blocks(query, key, value, block=block)
    b, t, n, h = query.shape
    k = key.shape[2]
    grouped = query.reshape(b, t, k, n // k, h).transpose(0, 2, 3, 1, 4)

    first, count = block_range(query_positions, window=window, block=block)
    rows = jnp.arange(b, dtype=jnp.int32) if rows is None else rows

    def step(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        wanted = first + i
        begin = wanted % (key.shape[1] // block) * block
        block_key = _take(key, rows, begin, block)
        block_value = _take(value, rows, begin, block)
        block_positions = _take(key_positions, rows, begin, block)
        # A ring place may still hold an older block, which had its turn under its own number.
        block_positions = jnp.where(
            block_positions // block == wanted[:, None], block_positions, -1
        )
        mask = visible(query_positions, block_positions, window=window)[:, None, None]
        scores = jnp.einsum("bkgth,bskh->bkgts", grouped, block_key, precision=Precision.HIGHEST)
        return _accumulate(state, soft_cap(scores * scale, cap), block_value, mask)

    start = (
        jnp.full(grouped.shape[:-1], MASKED),
        jnp.zeros(grouped.shape[:-1]),
        jnp.zeros(grouped.shape),
    )
    _, total, mixed = jax.lax.fori_loop(0, count, step, start)
    mixed = mixed / jnp.where(total > 0, total, 1)[..., None]
    return mixed.transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)


def check_blocks(query: Array, key: Array, value: Array, *, block: int) -> None:
    """Refuse what attention over blocks cannot do.

    Raises:
        NotImplementedError: arrays that are not float32, or s is not a multiple of the block.
    """
    if not query.dtype == key.dtype == value.dtype == jnp.float32:
        raise NotImplementedError(
            f"blocked attention computes in float32, got {query.dtype}, {key.dtype} and "
            f"{value.dtype}; use dense_attention, which can round as the bfloat16 references do"
        )
    if key.shape[1] % block:
        raise NotImplementedError(
            f"blocked attention needs a key length that is a multiple of {block}, "
            f"got {key.shape[1]}"
        )


def block_range(
    query_positions: Int[Array, "b t"], *, window: int | None, block: int
) -> tuple[Int[Array, " b"], Int[Array, ""]]:
    """The first block that each row needs, and how many the neediest row needs."""
    filled = query_positions >= 0
    last = jnp.max(query_positions, axis=1)
    if window is None:
        first = jnp.zeros_like(last)
    else:
        beyond = jnp.iinfo(query_positions.dtype).max
        earliest = jnp.min(jnp.where(filled, query_positions, beyond), axis=1)
        first = jnp.where(last >= 0, jnp.maximum(earliest - window + 1, 0) // block, 0)
    # A row of padding alone has last = -1, and -1 // block + 1 is no block at all.
    return first, jnp.max(last // block + 1 - first)


def _take(array: Array, rows: Int[Array, " b"], begin: Int[Array, " b"], length: int) -> Array:
    """`length` entries of the second axis of some rows, from a place of each row's own."""

    def one(row: Array, at: Array) -> Array:
        start = (row, at, *[jnp.zeros_like(at)] * (array.ndim - 2))
        return jax.lax.dynamic_slice(array, start, (1, length, *array.shape[2:]))[0]

    return jax.vmap(one)(rows, begin)


def _accumulate(
    state: tuple[Array, Array, Array],
    scores: Float32[Array, "b k g t s"],
    value: Float32[Array, "b s k h"],
    mask: Bool[Array, "b #k #g t s"],
) -> tuple[Array, Array, Array]:
    """One step of the running softmax: highest score, sum of weights, weighted sum of values.

    Where the mask shows nothing, `kept` is exactly 1 and `raised` exactly 0: no bit changes.
    """
    highest, total, mixed = state
    new_highest = jnp.maximum(highest, jnp.max(scores, axis=-1, where=mask, initial=MASKED))
    kept = jnp.exp(highest - new_highest)
    raised = jnp.where(mask, jnp.exp(scores - new_highest[..., None]), 0)
    added = jnp.einsum("bkgts,bskh->bkgth", raised, value, precision=Precision.HIGHEST)
    return new_highest, total * kept + raised.sum(axis=-1), mixed * kept[..., None] + added
