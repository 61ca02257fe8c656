"""The forward pass of Gemma 1, 2, 3 and VaultGemma, in float64, from the published formulas.

Sources: the Gemma reports (arXiv 2403.08295, 2408.00118, 2503.19786) and the papers named at each
function. Everything is computed and kept in float64 and nothing is rounded on the way, so the only
disagreement with a float32 implementation of the same function is that implementation's rounding.
"""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import numpy as np

from tests.oracle.arrays import Booleans, Floats, Integers
from tests.oracle.config import LayerConfig, OracleConfig
from tests.oracle.rope import AngleFunction, exact_angles, rotate

# Named as in Hugging Face's files, less the prefix ("model." or its like): "norm.weight".
Weights = Mapping[str, np.ndarray]

einsum = partial(np.einsum, optimize=True)  # optimize: through matrix products where it can


class OracleResult(NamedTuple):
    """logits [b t v]; residuals: the scaled embedding, then the stream after each layer, each
    [b t d], before the final norm; scores: of each layer, scaled, capped and masked, [b n t s].
    """

    logits: Floats
    residuals: list[Floats]
    scores: list[Floats]


def forward(
    config: OracleConfig,
    weights: Weights,
    tokens: Integers,
    positions: Integers,
    *,
    visible: Booleans | None = None,
    angle_function: AngleFunction = exact_angles,
) -> OracleResult:
    """Logits and intermediates for tokens [b t] that stand at positions [b t].

    visible [b t] is False for padding, to which nothing attends. What comes out at a padded place
    is finite and means nothing. `angle_function` computes the angles of the rotary embedding, the
    one place where float32 programs differ from this one by more than a few roundings.

    Raises:
        ValueError: the weights are not exactly those the configuration asks for, or an id lies
            outside the vocabulary.
    """
    _check_names(config, weights)
    table = weights["embed_tokens.weight"]
    if tokens.min() < 0 or tokens.max() >= len(table):
        raise ValueError(f"ids: got {tokens.min()}..{tokens.max()}, expected 0..{len(table) - 1}")
    if visible is None:
        visible = np.ones(tokens.shape, np.bool_)

    stream = np.asarray(table[tokens], np.float64) * np.sqrt(table.shape[1])

    residuals, scores = [stream], []
    for index, layer in enumerate(config.layers):
        own = layer_weights(weights, index)
        angles = angle_function(
            positions, layer.head_width, base=layer.rope_base, factor=layer.rope_factor
        )
        seen = visibility(positions, visible, window=layer.window)
        stream, layer_scores = block(layer, own, stream, angles, seen, epsilon=config.norm_epsilon)
        residuals.append(stream)
        scores.append(layer_scores)

    return OracleResult(logits_of(config, weights, stream), residuals, scores)


def logits_of(config: OracleConfig, weights: Weights, stream: Floats) -> Floats:
    """Logits [b t v] from the stream [b t d] after the last layer."""
    x = rms_norm(stream, weights["norm.weight"], epsilon=config.norm_epsilon)
    tied = weights["embed_tokens.weight"]
    head = np.asarray(weights.get("lm_head.weight", tied), np.float64)
    return soft_cap(einsum("btd,vd->btv", x, head), config.logit_cap)


def block(
    layer: LayerConfig,
    weights: Weights,
    stream: Floats,
    angles: Floats,
    seen: Booleans,
    *,
    epsilon: float,
) -> tuple[Floats, Floats]:
    """One decoder layer: (stream [b t d] after it, its scores [b n t s]).

    angles [b t h/2] turn queries and keys; seen [b t s] says which keys each query sees.
    Pre-norm residual branches; Gemma 2 and 3 also normalise what a branch adds (Gemma 2 report,
    section 2).
    """

    def norm(x: Floats, name: str | None) -> Floats:
        return x if name is None else rms_norm(x, weights[f"{name}.weight"], epsilon=epsilon)

    x = norm(stream, "input_layernorm")
    x, scores = attention(layer, weights, x, angles, seen, epsilon=epsilon)
    stream = stream + norm(x, layer.norm_after_attention)

    x = norm(stream, layer.norm_before_mlp)
    x = gated_mlp(weights, x)
    return stream + norm(x, layer.norm_after_mlp), scores


def attention(
    layer: LayerConfig,
    weights: Weights,
    x: Floats,
    angles: Floats,
    seen: Booleans,
    *,
    epsilon: float,
) -> tuple[Floats, Floats]:
    """Grouped-query attention (arXiv 2305.13245): (output [b t d], scores [b n t s]).

    Query head j reads key/value head j // g. Queries and keys are normalised before they are
    rotated (Gemma 3); scores are scaled, then capped (Gemma 2), then masked.
    """
    b, t, d = x.shape
    n, k, h = layer.heads, layer.kv_heads, layer.head_width

    query = einsum("btd,nhd->btnh", x, weights["self_attn.q_proj.weight"].reshape(n, h, d))
    key = einsum("bsd,khd->bskh", x, weights["self_attn.k_proj.weight"].reshape(k, h, d))
    value = einsum("bsd,khd->bskh", x, weights["self_attn.v_proj.weight"].reshape(k, h, d))
    if layer.normalizes_queries_and_keys:
        query = rms_norm(query, weights["self_attn.q_norm.weight"], epsilon=epsilon)
        key = rms_norm(key, weights["self_attn.k_norm.weight"], epsilon=epsilon)
    query, key = rotate(query, angles), rotate(key, angles)

    query = query.reshape(b, t, k, n // k, h)
    scores = einsum("btkgh,bskh->bkgts", query, key) * layer.query_scale
    scores = soft_cap(scores, layer.score_cap)
    scores = np.where(seen[:, None, None], scores, -np.inf)

    mixed = einsum("bkgts,bskh->btkgh", softmax(scores), value).reshape(b, t, n, h)
    output = einsum("btnh,dnh->btd", mixed, weights["self_attn.o_proj.weight"].reshape(d, n, h))
    return output, scores.reshape(b, n, t, t)


def visibility(positions: Integers, visible: Booleans, *, window: int | None) -> Booleans:
    """Which keys each query sees, [b t s], from positions [b t] and visible [b t].

    Position p sees p - window + 1 .. p: `window` keys, itself included. Without a window: 0 .. p.
    """
    distance = positions[:, :, None] - positions[:, None, :]
    seen = (distance >= 0) & visible[:, None, :]
    return seen if window is None else seen & (distance < window)


def gated_mlp(weights: Weights, x: Floats) -> Floats:
    """down(gelu(gate x) * up x) of x [b t d], the GeGLU of arXiv 2002.05202 without biases."""
    gate = einsum("btd,fd->btf", x, weights["mlp.gate_proj.weight"])
    up = einsum("btd,fd->btf", x, weights["mlp.up_proj.weight"])
    return einsum("btf,df->btd", gelu_tanh(gate) * up, weights["mlp.down_proj.weight"])


def gelu_tanh(x: Floats) -> Floats:
    """The tanh approximation of arXiv 1606.08415, which Gemma was trained with."""
    return 0.5 * x * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3)))


def rms_norm(x: Floats, weight: np.ndarray, *, epsilon: float) -> Floats:
    """x / sqrt(mean(x^2) + epsilon) * (1 + weight) over the last axis (arXiv 1910.07467).

    Gemma 1 to 3 store the gain's difference from one; no released file stores the gain itself.
    """
    mean_square = np.mean(x**2, axis=-1, keepdims=True)
    return x / np.sqrt(mean_square + epsilon) * (1.0 + np.asarray(weight, np.float64))


def soft_cap(x: Floats, cap: float | None) -> Floats:
    """cap * tanh(x / cap) (Gemma 2 report, section 2), or x where the model has no cap."""
    return x if cap is None else cap * np.tanh(x / cap)


def softmax(scores: Floats) -> Floats:
    """Softmax over the last axis. A row of -inf alone (a query that sees nothing) gives zeros."""
    top = scores.max(axis=-1, keepdims=True)
    exponentials = np.exp(scores - np.where(np.isfinite(top), top, 0.0))
    total = exponentials.sum(axis=-1, keepdims=True)
    return exponentials / np.where(total == 0.0, 1.0, total)


def log_probabilities(logits: Floats, tokens: Integers) -> Floats:
    """log p of each token after the first, given those before it: [b t-1].

    logits [b t v] at place i judge tokens [b t] at place i + 1.
    """
    shifted = logits[:, :-1] - logits[:, :-1].max(axis=-1, keepdims=True)
    normalized = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return np.take_along_axis(normalized, tokens[:, 1:, None], axis=-1)[..., 0]


def sample_greedy(
    config: OracleConfig, weights: Weights, prompt: Integers, *, count: int
) -> Integers:
    """The `count` ids that follow prompt [t], each the likeliest, the lowest id when tied."""
    tokens = np.asarray(prompt)
    for _ in range(count):
        logits = forward(config, weights, tokens[None], np.arange(len(tokens))[None]).logits
        tokens = np.append(tokens, np.argmax(logits[0, -1]))
    return tokens[len(prompt) :]


def weight_names(config: OracleConfig) -> set[str]:
    """Every weight a model of this configuration has (a tied head is no weight of its own)."""
    names = {"embed_tokens.weight", "norm.weight"}
    for index, layer in enumerate(config.layers):
        modules = ["input_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
        modules += [f"self_attn.{which}_proj" for which in "qkvo"]
        if layer.normalizes_queries_and_keys:
            modules += ["self_attn.q_norm", "self_attn.k_norm"]
        norms = (layer.norm_after_attention, layer.norm_before_mlp, layer.norm_after_mlp)
        modules += [norm for norm in norms if norm is not None]
        names |= {f"layers.{index}.{module}.weight" for module in modules}
    return names


def layer_weights(weights: Weights, index: int) -> dict[str, Floats]:
    """One layer's weights in float64, named within the layer; never the whole model at once."""
    prefix = f"layers.{index}."
    return {
        name.removeprefix(prefix): np.asarray(value, np.float64)
        for name, value in weights.items()
        if name.startswith(prefix)
    }


def _check_names(config: OracleConfig, weights: Weights) -> None:
    expected, got = weight_names(config), set(weights) - {"lm_head.weight"}
    if got != expected:
        raise ValueError(
            f"weights: missing {sorted(expected - got)}, not understood {sorted(got - expected)}; "
            "the names are Hugging Face's without the prefix before 'layers.'"
        )
