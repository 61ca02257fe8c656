"""How many parameters an architecture has, part by part.

The formulas are the shape rules of the published checkpoints, written down a second time: a test
holds them against the tree of parameters and against the published counts.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from refimpl.model.config import GemmaConfig
    from refimpl.model.layer_spec import LayerSpec


def parameter_count(config: "GemmaConfig") -> int:
    """Parameters of a text decoder, a tied head counted once, padding rows included."""
    total = config.vocab_size * config.width * (1 if config.has_tied_head else 2) + config.width
    if config.per_layer_input is not None:
        packed = config.num_layers * config.per_layer_input.width
        total += packed * (config.per_layer_input.vocab_size + config.width)
        total += config.per_layer_input.width
    if config.altup is not None:
        # Every stream but the first is projected from the embedding, and back before the head.
        total += 2 * (config.altup.streams - 1) * config.width**2
    return total + sum(_layer(config, spec) for spec in config.layers)


def _layer(config: "GemmaConfig", spec: "LayerSpec") -> int:
    width = config.width
    total = _attention(config, spec) + 3 * width * spec.feed_forward_width
    total += width * (4 if config.has_post_norms else 2)
    total += 1 if config.has_layer_scalar else 0
    if config.per_layer_input is not None:
        total += 2 * width * config.per_layer_input.width + width
    if config.experts is not None:
        count, hidden = config.experts.count, config.experts.width
        total += 3 * count * width * hidden
        # The router with its two scales, and three norms around the branches.
        total += count * width + width + count + 3 * width
    if config.altup is not None:
        n = config.altup.streams
        # Router and its norm, coefficients of prediction and of correction, the output's scale.
        total += n * width + width + n**3 + n**2 + width
    if config.laurel_rank is not None:
        total += 2 * width * config.laurel_rank + width
    return total


def _attention(config: "GemmaConfig", spec: "LayerSpec") -> int:
    total = 2 * config.width * config.num_heads * spec.head_width
    total += spec.head_width if config.has_query_key_norm else 0
    if spec.donor is None:
        projections = 1 if spec.values_are_keys else 2
        total += projections * config.width * spec.num_kv_heads * spec.head_width
        total += spec.head_width if config.has_query_key_norm else 0
    return total
