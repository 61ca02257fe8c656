"""Per-layer embeddings: every layer is told again, in a few numbers, which token it works on."""

import numpy as np

from tests.oracle.arrays import Floats, Integers
from tests.oracle.elementary import Norm, einsum, gelu_tanh
from tests.oracle.names import Weights


def per_layer_inputs(
    weights: Weights, tokens: Integers, embedding: Floats, *, layers: int, norm: Norm
) -> Floats:
    """What each layer is told, [l b t p], of tokens [b t] with scaled embedding [b t d].

    Two halves of equal size: numbers from a second table, scaled by the root of their count p, and
    a projection of the embedding. Both are packed layer after layer. Ids that the second table does
    not have read its row 0.
    """
    b, t, d = embedding.shape
    table = weights["embed_tokens_per_layer.weight"]
    p = table.shape[1] // layers
    is_in_table = (tokens >= 0) & (tokens < len(table))
    looked_up = np.asarray(table[np.where(is_in_table, tokens, 0)], np.float64) * np.sqrt(p)

    projection = np.asarray(weights["per_layer_model_projection.weight"], np.float64)
    projected = einsum("btd,ed->bte", embedding, projection) / np.sqrt(d)
    projected = norm(
        projected.reshape(b, t, layers, p), weights["per_layer_projection_norm.weight"]
    )
    both = (projected + looked_up.reshape(b, t, layers, p)) / np.sqrt(2.0)
    return np.moveaxis(both, 2, 0)


def per_layer_addition(weights: Weights, x: Floats, told: Floats, *, norm: Norm) -> Floats:
    """What a layer adds to the stream for what it was told [b t p], gated by x [b t d]."""
    gate = gelu_tanh(einsum("btd,pd->btp", x, weights["per_layer_input_gate.weight"]))
    added = einsum("btp,dp->btd", gate * told, weights["per_layer_projection.weight"])
    return norm(added, weights["post_per_layer_input_norm.weight"])
