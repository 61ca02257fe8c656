"""The forward pass of the Gemma text models, in float64, from the published formulas.

Sources: the Gemma reports (arXiv 2403.08295, 2408.00118, 2503.19786), the papers named at each
function, and for Gemma 3n and 4 the published code. Everything is computed and kept in float64 and
nothing is rounded on the way, so the only disagreement with a float32 implementation of the same
function is that implementation's rounding.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from tests.oracle.altup import correct, laurel, merge_streams, predict, split_stream
from tests.oracle.arrays import Booleans, Floats, Integers
from tests.oracle.attention import KeysAndValues, attention, keys_and_values, visibility
from tests.oracle.config import LayerConfig, OracleConfig
from tests.oracle.elementary import Norm, einsum, rms_norm, soft_cap
from tests.oracle.feed_forward import feed_forward
from tests.oracle.names import Weights, check_names, layer_weights
from tests.oracle.per_layer_inputs import per_layer_addition, per_layer_inputs
from tests.oracle.rope import AngleFunction, exact_angles


class OracleResult(NamedTuple):
    """logits [b t v]; residuals: the scaled embedding, then the stream after each layer, each
    [b t d] (with AltUp all the streams [i b t d], also in front of layer 0), before the final norm;
    scores: of each layer, scaled, capped and masked, [b n t s].
    """

    logits: Floats
    residuals: list[Floats]
    scores: list[Floats]


@dataclass(frozen=True)
class Pass:
    """What does not change from layer to layer: positions [b t], visible [b t] (False: padding),
    and what each layer is told of its tokens, [l b t p], where the model does that.
    """

    config: OracleConfig
    weights: Weights
    positions: Integers
    visible: Booleans
    told: Floats | None
    angle_function: AngleFunction


class LayerInputs(NamedTuple):
    """What a layer is given beside its stream: angles [b t h/2] turn queries and keys; seen
    [b t s] says which keys each query sees; told [b t p] is its part of `Pass.told`.
    """

    angles: Floats
    seen: Booleans
    donated: KeysAndValues | None
    told: Floats | None
    norm: Norm


class LayerOutputs(NamedTuple):
    """stream [b t d] or [i b t d]; scores [b n t s]; the keys and values that were read."""

    stream: Floats
    scores: Floats
    read: KeysAndValues


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
        ValueError: the weights are not those the configuration asks for, or an id lies outside the
            vocabulary.
    """
    current, stream = begin(
        config, weights, tokens, positions, visible=visible, angle_function=angle_function
    )
    residuals, scores = [stream], []
    read: dict[int, KeysAndValues] = {}
    for index in range(len(config.layers)):
        stream, layer_scores, read[index] = run_layer(current, index, stream, read)
        residuals.append(stream)
        scores.append(layer_scores)
    return OracleResult(logits_of(config, weights, stream), residuals, scores)


def begin(
    config: OracleConfig,
    weights: Weights,
    tokens: Integers,
    positions: Integers,
    *,
    visible: Booleans | None = None,
    angle_function: AngleFunction = exact_angles,
) -> tuple[Pass, Floats]:
    """What precedes the first layer: the pass, and the stream. Arguments as in `forward`."""
    check_names(config, weights)
    table = weights["embed_tokens.weight"]
    if tokens.min() < 0 or tokens.max() >= len(table):
        raise ValueError(f"ids: got {tokens.min()}..{tokens.max()}, expected 0..{len(table) - 1}")
    if visible is None:
        visible = np.ones(tokens.shape, np.bool_)

    stream = np.asarray(table[tokens], np.float64) * np.sqrt(table.shape[1])
    told = None
    if config.has_per_layer_inputs:
        layers, norm = len(config.layers), norm_of(config)
        told = per_layer_inputs(weights, tokens, stream, layers=layers, norm=norm)
    if config.streams > 1:
        stream = split_stream(weights, stream, streams=config.streams)
    return Pass(config, weights, positions, visible, told, angle_function), stream


def run_layer(
    current: Pass, index: int, stream: Floats, read: Mapping[int, KeysAndValues]
) -> LayerOutputs:
    """Layer `index` on the stream before it, and on what the layers before it have read."""
    layer = current.config.layers[index]
    given = LayerInputs(
        angles=current.angle_function(
            current.positions,
            layer.head_width,
            base=layer.rope_base,
            factor=layer.rope_factor,
            proportion=layer.rope_proportion,
        ),
        seen=visibility(current.positions, current.visible, window=layer.window),
        donated=None if layer.donor is None else read[layer.donor],
        told=None if current.told is None else current.told[index],
        norm=norm_of(current.config),
    )
    return block(layer, layer_weights(current.weights, index), stream, given)


def block(layer: LayerConfig, weights: Weights, stream: Floats, given: LayerInputs) -> LayerOutputs:
    """One decoder layer.

    Pre-norm residual branches; Gemma 2 and later also normalise what a branch adds (Gemma 2 report,
    section 2). With AltUp the branches work on one stream of several.
    """

    def norm(x: Floats, name: str | None) -> Floats:
        return x if name is None else given.norm(x, weights[f"{name}.weight"])

    predicted = None if layer.streams == 1 else predict(weights, stream, norm=given.norm)
    before = stream if predicted is None else predicted[0]

    x = norm(before, "input_layernorm")
    read = given.donated
    if read is None:
        read = keys_and_values(layer, weights, x, given.angles, norm=given.norm)
    attended, scores = attention(layer, weights, x, read, given.angles, given.seen, norm=given.norm)
    after = before + norm(attended, layer.norm_after_attention)
    if layer.has_laurel:
        after = (after + laurel(weights, x, norm=given.norm)) / np.sqrt(2.0)

    made = feed_forward(layer, weights, after, norm=given.norm)
    after = after + norm(made, layer.norm_after_mlp)

    if predicted is not None:
        after = correct(weights, predicted, after, norm=given.norm)
    if given.told is not None:
        after = add_what_was_told(layer, weights, after, given.told, norm=given.norm)
    if layer.has_scalar:
        after = after * weights["layer_scalar"]
    return LayerOutputs(after, scores, read)


def add_what_was_told(
    layer: LayerConfig, weights: Weights, stream: Floats, told: Floats, *, norm: Norm
) -> Floats:
    """The stream with the layer's per-layer input told [b t p] added.

    Of several streams the first says, scaled, what is let in, and only the others receive it.
    """
    if layer.streams == 1:
        return stream + per_layer_addition(weights, stream, told, norm=norm)
    first, others = stream[:1], stream[1:]
    asking = first[0] * weights["altup.correct_output_scale"]
    return np.concatenate([first, others + per_layer_addition(weights, asking, told, norm=norm)])


def logits_of(config: OracleConfig, weights: Weights, stream: Floats) -> Floats:
    """Logits [b t v] from the stream after the last layer, [b t d] or, with AltUp, [i b t d]."""
    x = merge_streams(weights, stream) if config.streams > 1 else stream
    x = norm_of(config)(x, weights["norm.weight"])
    tied = weights["embed_tokens.weight"]
    head = np.asarray(weights.get("lm_head.weight", tied), np.float64)
    return soft_cap(einsum("btd,vd->btv", x, head), config.logit_cap)


def norm_of(config: OracleConfig) -> Norm:
    """The model's own kind of norm."""
    return partial(rms_norm, epsilon=config.norm_epsilon, offset=config.norm_offset)


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
