"""Grouped-query attention: keys and values, whose they are, and who sees them."""

from typing import NamedTuple

import numpy as np

from tests.oracle.arrays import Booleans, Floats, Integers
from tests.oracle.config import LayerConfig
from tests.oracle.elementary import Norm, einsum, soft_cap, softmax
from tests.oracle.names import Weights
from tests.oracle.rope import rotate


class KeysAndValues(NamedTuple):
    """Both [b s k h], ready for use: keys normalised and turned, values normalised."""

    keys: Floats
    values: Floats


def keys_and_values(
    layer: LayerConfig, weights: Weights, x: Floats, angles: Floats, *, norm: Norm
) -> KeysAndValues:
    """Keys and values of x [b s d], the layer's normalised input.

    Keys are normalised before they are rotated (Gemma 3). Values are normalised without a weight
    (Gemma 3n, 4). Where a model has no projection of values (global layers of some Gemma 4), the
    projected keys stand in for it as they are before the norm and the rotation of keys.
    """
    b, s, _ = x.shape
    shape = (b, s, layer.kv_heads, layer.head_width)

    keys = einsum("bsd,ed->bse", x, weights["self_attn.k_proj.weight"]).reshape(shape)
    if layer.values_are_keys:
        values = keys
    else:
        values = einsum("bsd,ed->bse", x, weights["self_attn.v_proj.weight"]).reshape(shape)
    if layer.normalizes_values:
        values = norm(values, None)
    if layer.normalizes_queries_and_keys:
        keys = norm(keys, weights["self_attn.k_norm.weight"])
    return KeysAndValues(rotate(keys, angles), values)


def attention(
    layer: LayerConfig,
    weights: Weights,
    x: Floats,
    read: KeysAndValues,
    angles: Floats,
    seen: Booleans,
    *,
    norm: Norm,
) -> tuple[Floats, Floats]:
    """Grouped-query attention (arXiv 2305.13245): (output [b t d], scores [b n t s]).

    Query head j reads key/value head j // g of `read`, the layer's own or its donor's. Queries are
    normalised before they are rotated (Gemma 3); scores are scaled, then capped (Gemma 2), then
    masked by seen [b t s].
    """
    b, t, d = x.shape
    n, k, h = layer.heads, layer.kv_heads, layer.head_width

    query = einsum("btd,nhd->btnh", x, weights["self_attn.q_proj.weight"].reshape(n, h, d))
    if layer.normalizes_queries_and_keys:
        query = norm(query, weights["self_attn.q_norm.weight"])
    query = rotate(query, angles).reshape(b, t, k, n // k, h)

    scores = einsum("btkgh,bskh->bkgts", query, read.keys) * layer.query_scale
    scores = soft_cap(scores, layer.score_cap)
    scores = np.where(seen[:, None, None], scores, -np.inf)

    mixed = einsum("bkgts,bskh->btkgh", softmax(scores), read.values).reshape(b, t, n, h)
    output = einsum("btnh,dnh->btd", mixed, weights["self_attn.o_proj.weight"].reshape(d, n, h))
    return output, scores.reshape(b, n, t, t)


def visibility(positions: Integers, visible: Booleans, *, window: int | None) -> Booleans:
    """Which keys each query sees, [b t s], from positions [b t] and visible [b t].

    Position p sees p - window + 1 .. p: `window` keys, itself included. Without a window: 0 .. p.
    """
    distance = positions[:, :, None] - positions[:, None, :]
    seen = (distance >= 0) & visible[:, None, :]
    return seen if window is None else seen & (distance < window)
