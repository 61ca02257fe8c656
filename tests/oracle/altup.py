"""AltUp (arXiv 2301.13310) and LAuReL (arXiv 2411.07501), the wider stream of Gemma 3n.

Letters beside the usual ones: i and j count the streams. Only stream 0 passes through a layer. The
others are guessed from all of them before it, and corrected by how far the guess of stream 0 was
off.
"""

import numpy as np

from tests.oracle.arrays import Floats
from tests.oracle.elementary import Norm, einsum
from tests.oracle.names import Weights


def split_stream(weights: Weights, embedding: Floats, *, streams: int) -> Floats:
    """The streams [i b t d] before layer 0: the embedding [b t d], and projections of it."""
    projected = [
        _like(embedding, _project(weights, f"altup_projections.{i}.weight", embedding))
        for i in range(streams - 1)
    ]
    return np.stack([embedding, *projected])


def merge_streams(weights: Weights, streams: Floats) -> Floats:
    """One stream [b t d] after the last layer: the mean of stream 0 and projections of the rest."""
    first, *others = streams
    projected = [
        _like(first, _project(weights, f"altup_unembed_projections.{i}.weight", other))
        for i, other in enumerate(others)
    ]
    return np.mean([first, *projected], axis=0)


def predict(weights: Weights, streams: Floats, *, norm: Norm) -> Floats:
    """A guess at the streams [i b t d] after the layer: each, plus a mixture of all."""
    routed = _routed(weights, streams[0], norm=norm)
    mixing = einsum("btj,ej->bte", routed, weights["altup.prediction_coefs.weight"])
    count = len(streams)
    mixing = mixing.reshape(*routed.shape[:-1], count, count)  # [b t i j], to stream i from j
    return streams + einsum("btij,jbtd->ibtd", mixing, streams)


def correct(weights: Weights, predicted: Floats, activated: Floats, *, norm: Norm) -> Floats:
    """The streams [i b t d]: each guess moved by a multiple of what the guess of stream 0 missed.

    activated [b t d] is what the layer made of that guess.
    """
    routed = _routed(weights, activated, norm=norm)
    weight = einsum("btj,ij->ibt", routed, weights["altup.correction_coefs.weight"]) + 1.0
    return predicted + weight[..., None] * (activated - predicted[0])


def laurel(weights: Weights, x: Floats, *, norm: Norm) -> Floats:
    """x [b t d] plus what a product of low rank makes of it, normalised."""
    low = einsum("btd,rd->btr", x, weights["laurel.linear_left.weight"])
    made = einsum("btr,dr->btd", low, weights["laurel.linear_right.weight"])
    return x + norm(made, weights["laurel.post_laurel_norm.weight"])


def _routed(weights: Weights, x: Floats, *, norm: Norm) -> Floats:
    """Numbers in -1..1, [b t j], on which the coefficients depend."""
    x = norm(x, weights["altup.router_norm.weight"]) / x.shape[-1]
    return np.tanh(einsum("btd,jd->btj", x, weights["altup.modality_router.weight"]))


def _project(weights: Weights, name: str, x: Floats) -> Floats:
    return einsum("btd,ed->bte", x, np.asarray(weights[name], np.float64))


def _like(model: Floats, x: Floats) -> Floats:
    """x [b t d] made as large as model [b t d], by the root of the mean of squares over d."""
    size, wanted = np.mean(x**2, axis=-1), np.mean(model**2, axis=-1)
    # The square is kept from zero at 1e-5, as in the published code.
    return x * np.sqrt(wanted / np.maximum(size, 1e-5))[..., None]
