"""What GGUF files of Gemma 3n and Gemma 4 say in their own way, from metadata and tensors together.

Sources: llama.cpp `conversion/gemma.py`, `src/models/gemma3n.cpp`, `src/models/gemma4.cpp`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from refimpl.errors import ConfigError
from refimpl.model.config import MOST_LAYERS, periodic_kinds
from refimpl.model.gate_sparsity import cutoff_of_multiplier
from refimpl.model.layer_spec import (
    AltUpSpec,
    AttentionKind,
    ExpertsSpec,
    PerLayerInputSpec,
    RopeSpec,
)

Shapes = Mapping[str, tuple[int, ...]]

# llama.cpp knows no other place, and every published file agrees.
_FIRST_SHARING_LAYER = 20
# The converter divides the angles of pairs that do not turn by 1e30.
_STANDING_STILL = 1e20

_COMMON_PARTS: dict[str, Any] = {
    "query_scalar": 1.0,
    "has_query_key_norm": True,
    "has_value_norm": True,
    "has_post_norms": True,
}


def gemma3n_parts(values: Mapping[str, Any], shapes: Shapes, vocab_size: int) -> dict[str, Any]:
    """The further arguments of `GemmaConfig` for a Gemma 3n.

    Raises:
        ConfigError: lists that do not name every layer, or a tensor that is missing.
    """
    kinds = _layer_kinds(values)
    sharing = values["attention.shared_kv_layers"]
    if sharing is None:
        sharing = max(len(kinds) - _FIRST_SHARING_LAYER, 0)
    multipliers = _for_each_layer(values, "activation_sparsity_scale", len(kinds))
    cutoffs = tuple(cutoff_of_multiplier(multiplier) for multiplier in multipliers)
    return {
        **_COMMON_PARTS,
        **_feed_forward(values, len(kinds)),
        "layer_kinds": kinds,
        "num_sharing_layers": sharing,
        "gate_cutoffs": cutoffs if any(cutoff is not None for cutoff in cutoffs) else None,
        "per_layer_input": _per_layer_input(values, shapes, vocab_size, has_rounded_scales=True),
        "altup": AltUpSpec(streams=values["altup.num_inputs"], active=values["altup.active_idx"]),
        # [rank, width], of every layer alike.
        "laurel_rank": _shape(shapes, "blk.0.laurel_l.weight")[0],
    }


def gemma4_parts(
    values: Mapping[str, Any],
    shapes: Shapes,
    vocab_size: int,
    *,
    rope: RopeSpec,
    rope_divisors: Sequence[float] | None,
) -> dict[str, Any]:
    """The further arguments of `GemmaConfig` for a Gemma 4, whose global layers rotate by `rope`.

    Raises:
        ConfigError: lists that do not name every layer, or a tensor that is missing.
    """
    kinds = _layer_kinds(values)
    sharing = values["attention.shared_kv_layers"]
    heads = values["attention.head_count_kv"] or values["attention.head_count"]
    local_heads, global_heads = _for_each_kind("attention.head_count_kv", heads, kinds)
    local_width, global_width = values["attention.key_length_swa"], values["attention.key_length"]
    return {
        **_COMMON_PARTS,
        **_feed_forward(values, len(kinds)),
        "layer_kinds": kinds,
        "head_width": local_width,
        "global_head_width": None if global_width == local_width else global_width,
        "num_kv_heads": local_heads,
        "global_num_kv_heads": None if global_heads == local_heads else global_heads,
        "values_are_keys": _values_are_keys(kinds[: max(len(kinds) - sharing, 0)], shapes),
        "num_sharing_layers": sharing,
        "has_layer_scalar": True,
        "global_rope": replace(rope, proportion=_proportion(rope_divisors, global_width)),
        "per_layer_input": _per_layer_input(values, shapes, vocab_size, has_rounded_scales=False),
        "experts": _experts(values),
    }


def _layer_kinds(values: Mapping[str, Any]) -> tuple[AttentionKind, ...]:
    """From a period, or from whether each layer has a window."""
    pattern, num_layers = values["attention.sliding_window_pattern"], values["block_count"]
    if isinstance(pattern, int):
        return periodic_kinds(num_layers, period=pattern)
    if num_layers > MOST_LAYERS:
        raise ConfigError(f"there must be at most {MOST_LAYERS} layers, got {num_layers}")
    is_local = _for_each_layer(values, "attention.sliding_window_pattern", num_layers)
    return tuple(AttentionKind.LOCAL if local else AttentionKind.GLOBAL for local in is_local)


def _for_each_layer(values: Mapping[str, Any], key: str, num_layers: int) -> list[Any]:
    listed = values[key]
    if len(listed) != num_layers:
        raise ConfigError(f"{key} must name all {num_layers} layers, got {len(listed)}")
    return listed


def _for_each_kind(
    key: str, value: int | list[int], kinds: tuple[AttentionKind, ...]
) -> tuple[int, int]:
    """The number of local and that of global layers, from one for all or one for each layer."""
    if isinstance(value, int):
        return value, value
    listed = _for_each_layer({key: value}, key, len(kinds))
    found = []
    for kind in AttentionKind:
        # A kind without layers has what the others have.
        of_kind = {number for number, other in zip(listed, kinds, strict=True) if other is kind}
        of_kind = of_kind or set(listed)
        if len(of_kind) > 1:
            raise ConfigError(f"{key} must be the same in all {kind} layers, got {listed!r:.80}")
        found.append(max(of_kind, default=0))
    return found[0], found[1]


def _feed_forward(values: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """One width for all, or one for each layer, of which the first stands for the rest."""
    key = "feed_forward_length"
    if isinstance(values[key], int):
        return {"feed_forward_width": values[key]}
    widths = _for_each_layer(values, key, num_layers)
    return {
        "feed_forward_width": next(iter(widths), 0),
        "layer_feed_forward_widths": tuple(widths) if len(set(widths)) > 1 else None,
    }


def _per_layer_input(
    values: Mapping[str, Any], shapes: Shapes, vocab_size: int, *, has_rounded_scales: bool
) -> PerLayerInputSpec | None:
    width = values["embedding_length_per_layer_input"]
    if width == 0:
        return None
    rows = _shape(shapes, "per_layer_token_embd.weight")[0]
    # Gemma 3n's own table ends before the pieces for images and sound; llama.cpp's converter pads
    # it, Ollama's does not. An id beyond a table gets row 0, so a table cut short would go unseen.
    least = vocab_size - vocab_size // 16 if has_rounded_scales else vocab_size
    if not least <= rows <= vocab_size:
        raise ConfigError(
            f"per_layer_token_embd.weight has {rows:,} rows and token_embd.weight {vocab_size:,}, "
            f"expected at least {least:,} and no more; was the conversion complete?"
        )
    return PerLayerInputSpec(width=width, vocab_size=rows, has_rounded_scales=has_rounded_scales)


def _experts(values: Mapping[str, Any]) -> ExpertsSpec | None:
    if values["expert_count"] == 0:
        return None
    return ExpertsSpec(
        count=values["expert_count"],
        chosen=values["expert_used_count"],
        width=values["expert_feed_forward_length"],
    )


def _values_are_keys(owners: tuple[AttentionKind, ...], shapes: Shapes) -> bool:
    """Whether global layers with keys of their own lack a projection of values."""
    found: set[bool] = set()
    for index, kind in enumerate(owners):
        if kind is AttentionKind.GLOBAL and f"blk.{index}.attn_qkv.weight" not in shapes:
            _shape(shapes, f"blk.{index}.attn_k.weight")
            found.add(f"blk.{index}.attn_v.weight" not in shapes)
    if len(found) > 1:
        raise ConfigError(
            "either all global layers have blk.*.attn_v.weight or none, got some with and some "
            "without; was the conversion complete?"
        )
    return True in found


def _proportion(divisors: Sequence[float] | None, head_width: int) -> float:
    """The share of the pairs that turn, from what the angles of each pair are divided by."""
    if divisors is None:
        raise ConfigError("rope_freqs.weight is missing, was the conversion complete?")
    rotated = sum(divisor == 1.0 for divisor in divisors)
    expected = [True] * rotated + [False] * (head_width // 2 - rotated)
    if [divisor == 1.0 for divisor in divisors] != expected or not all(
        divisor > _STANDING_STILL for divisor in divisors[rotated:]
    ):
        raise ConfigError(
            f"rope_freqs.weight must hold {head_width // 2} numbers, ones and then 1e30, "
            f"got {list(divisors)!r:.80}"
        )
    return rotated / max(len(divisors), 1)


def _shape(shapes: Shapes, name: str) -> tuple[int, ...]:
    """Of a matrix that has to be there."""
    shape = shapes.get(name)
    if shape is None or len(shape) != 2:
        raise ConfigError(f"{name} must be a matrix, got {'nothing' if shape is None else shape}")
    return shape
