"""The gated feed-forward branch: one for every token, and the experts beside it in some models."""

from statistics import NormalDist

import numpy as np

from tests.oracle.arrays import Floats
from tests.oracle.config import LayerConfig
from tests.oracle.elementary import Norm, einsum, gelu_tanh, softmax
from tests.oracle.names import Weights


def feed_forward(layer: LayerConfig, weights: Weights, stream: Floats, *, norm: Norm) -> Floats:
    """What the branch makes of the stream [b t d], before the norm on what it adds."""
    x = norm(stream, weights[f"{layer.norm_before_mlp}.weight"])
    dense = gated_mlp(weights, x, sparsity=layer.gate_sparsity)
    if layer.experts_per_token == 0:
        return dense

    # Gemma 4 26B-A4B. The router reads the stream itself and has its own norm; the experts read
    # it through a norm of theirs; and each of the two sums has one before they are added.
    shares = routing(weights, stream, norm=norm, count=layer.experts_per_token)
    x = norm(stream, weights["pre_feedforward_layernorm_2.weight"])
    dense = norm(dense, weights["post_feedforward_layernorm_1.weight"])
    return dense + norm(experts(weights, x, shares), weights["post_feedforward_layernorm_2.weight"])


def gated_mlp(weights: Weights, x: Floats, *, sparsity: float) -> Floats:
    """down(gelu(gate x) * up x) of x [b t d], the GeGLU of arXiv 2002.05202 without biases."""
    gate = einsum("btd,fd->btf", x, weights["mlp.gate_proj.weight"])
    up = einsum("btd,fd->btf", x, weights["mlp.up_proj.weight"])
    gate = gelu_tanh(sparse(gate, sparsity=sparsity))
    return einsum("btf,df->btd", gate * up, weights["mlp.down_proj.weight"])


def sparse(gate: Floats, *, sparsity: float) -> Floats:
    """gate [b t f] less a threshold, and zero where it is below (Gemma 3n).

    Taken for a sample of a normal distribution, a row has the share `sparsity` of its numbers below
    mean + quantile(sparsity) * standard deviation (that of the row itself: divided by f, not
    f - 1), and that is the threshold. A sparsity of 0 leaves the gate alone.
    """
    if sparsity == 0.0:
        return gate
    quantile = NormalDist().inv_cdf(sparsity)
    mean = gate.mean(axis=-1, keepdims=True)
    deviation = np.sqrt(np.mean((gate - mean) ** 2, axis=-1, keepdims=True))
    return np.maximum(gate - (mean + quantile * deviation), 0.0)


def routing(weights: Weights, stream: Floats, *, norm: Norm, count: int) -> Floats:
    """By how much each expert counts, [b t e]: zero for all but the `count` likeliest of a token.

    Those add up to one before each is multiplied by a learned number of its own.
    """
    z = norm(stream, None) * weights["router.scale"] / np.sqrt(stream.shape[-1])
    shares = softmax(einsum("btd,ed->bte", z, weights["router.proj.weight"]))
    likeliest = np.argsort(-shares, axis=-1, stable=True)[..., :count]
    chosen = np.zeros_like(shares)
    np.put_along_axis(chosen, likeliest, 1.0, axis=-1)
    shares = shares * chosen
    shares = shares / shares.sum(axis=-1, keepdims=True)
    return shares * weights["router.per_expert_scale"]


def experts(weights: Weights, x: Floats, shares: Floats) -> Floats:
    """The sum of what the experts make of x [b t d], each times its share [b t e].

    Every expert sees every token, which is the plainest way to write it and the slowest.
    """
    total = np.zeros_like(x)
    joined, down = weights["experts.gate_up_proj"], weights["experts.down_proj"]
    for index in range(shares.shape[-1]):
        gate, up = np.split(einsum("btd,fd->btf", x, joined[index]), 2, axis=-1)
        made = einsum("btf,df->btd", gelu_tanh(gate) * up, down[index])
        total = total + made * shares[..., index, None]
    return total
