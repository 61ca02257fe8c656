"""What a Gemma 3n's `config.json` says beyond what all families say, in and out.

Source: transformers 5.23, `models/gemma3n/configuration_gemma3n.py` and `modeling_gemma3n.py`.
"""

from collections.abc import Mapping
from typing import Any

from refimpl.errors import ConfigError
from refimpl.model.config import GemmaConfig
from refimpl.model.gate_sparsity import cutoff_of_share, share_below
from refimpl.model.hf_layers import layer_kinds, layer_types, rope_objects, two_ropes
from refimpl.model.layer_spec import AltUpSpec, PerLayerInputSpec

_SPARSE_LAYERS, _SPARSITY = 10, 0.95


def gemma3n_parts(values: Mapping[str, Any]) -> dict[str, Any]:
    """The further arguments of `GemmaConfig` that a file's values make.

    Raises:
        ConfigError: layers that do not fit each other.
    """
    kinds = layer_kinds(values)
    local_rope, global_rope = two_ropes(values)
    widths = _feed_forward_widths(values["intermediate_size"], len(kinds))
    return {
        "layer_kinds": kinds,
        "local_rope": local_rope,
        "global_rope": global_rope,
        "feed_forward_width": widths[0] if widths else 0,
        "layer_feed_forward_widths": widths if len(set(widths)) > 1 else None,
        "num_sharing_layers": values["num_kv_shared_layers"],
        "query_scalar": 1.0,
        "has_query_key_norm": True,
        "has_value_norm": True,
        "has_post_norms": True,
        "norm_offset": 0.0,
        "gate_cutoffs": _gate_cutoffs(values.get("activation_sparsity_pattern"), len(kinds)),
        "per_layer_input": PerLayerInputSpec(
            width=values["hidden_size_per_layer_input"] or 0,
            vocab_size=values["vocab_size_per_layer_input"],
            has_rounded_scales=True,
        ),
        "altup": AltUpSpec(streams=values["altup_num_inputs"], active=values["altup_active_idx"]),
        "laurel_rank": values["laurel_rank"],
    }


def gemma3n_keys(config: GemmaConfig) -> dict[str, Any]:
    """The keys of transformers' class beyond those of all families."""
    ple, altup = config.per_layer_input, config.altup
    cutoffs = config.gate_cutoffs or (None,) * config.num_layers
    return {
        "layer_types": layer_types(config.layer_kinds),
        "sliding_window": config.window,
        "final_logit_softcapping": config.final_cap,
        "rope_parameters": rope_objects(config.local_rope, config.global_rope),
        "intermediate_size": [spec.feed_forward_width for spec in config.layers],
        "num_kv_shared_layers": config.num_sharing_layers,
        "activation_sparsity_pattern": [share_below(cutoff) for cutoff in cutoffs],
        "hidden_size_per_layer_input": None if ple is None else ple.width,
        "vocab_size_per_layer_input": None if ple is None else ple.vocab_size,
        "altup_num_inputs": None if altup is None else altup.streams,
        "altup_active_idx": None if altup is None else altup.active,
        "altup_correct_scale": True,
        "laurel_rank": config.laurel_rank,
    }


def _feed_forward_widths(size: int | list[int], num_layers: int) -> tuple[int, ...]:
    """One for each layer: slices of a larger model may have layers of different widths."""
    if isinstance(size, int):
        return (size,) * num_layers
    if len(size) != num_layers:
        raise ConfigError(
            f"intermediate_size must be one integer or one for each of {num_layers} layers, "
            f"got {len(size)}"
        )
    return tuple(size)


def _gate_cutoffs(
    pattern: list[int | float] | None, num_layers: int
) -> tuple[float | None, ...] | None:
    """From the share of the gate that is cut off in each layer."""
    if pattern is None:
        sparse = _SPARSE_LAYERS if num_layers > _SPARSE_LAYERS else 0
        pattern = [_SPARSITY] * sparse + [0.0] * (num_layers - sparse)
    if len(pattern) != num_layers:
        raise ConfigError(
            f"activation_sparsity_pattern must name all {num_layers} layers, got {len(pattern)}"
        )
    cutoffs = tuple(cutoff_of_share(share) for share in pattern)
    return cutoffs if any(cutoff is not None for cutoff in cutoffs) else None
