"""What a Gemma 4's `config.json` says beyond what all families say, in and out.

Source: transformers 5.23, `models/gemma4/configuration_gemma4.py` and `modeling_gemma4.py`, and the
same of `gemma4_unified`, whose text decoder is the same.
"""

from collections.abc import Mapping
from typing import Any

from refimpl.errors import ConfigError
from refimpl.model.config import GemmaConfig
from refimpl.model.hf_layers import layer_kinds, layer_types, rope_objects, two_stated_ropes
from refimpl.model.layer_spec import AttentionKind, ExpertsSpec, PerLayerInputSpec, RopeSpec
from refimpl.model.value_kinds import INTEGER, kind_faults

_ROPES = RopeSpec(theta=1e4), RopeSpec(theta=1e6, proportion=0.25)
_GLOBAL_HEAD_WIDTH = 512
_OVERRIDES = {"head_dim": INTEGER, "num_key_value_heads": INTEGER}


def gemma4_parts(values: Mapping[str, Any]) -> dict[str, Any]:
    """The further arguments of `GemmaConfig` that a file's values make.

    Raises:
        ConfigError: layers that do not fit each other, or experts without numbers.
    """
    kinds = layer_kinds(values)
    if kinds:
        # transformers forces the last layer to look back all the way.
        kinds = (*kinds[:-1], AttentionKind.GLOBAL)
    heads = _heads(values, kinds)
    width = values["intermediate_size"]
    sharing = values["num_kv_shared_layers"]
    is_wider = values["use_double_wide_mlp"] and sharing > 0
    local_rope, global_rope = two_stated_ropes(values, default=_ROPES)
    return {
        **heads,
        "layer_kinds": kinds,
        "local_rope": local_rope,
        "global_rope": global_rope,
        "feed_forward_width": width,
        "layer_feed_forward_widths": _doubled(width, len(kinds), sharing) if is_wider else None,
        "values_are_keys": values["attention_k_eq_v"],
        "num_sharing_layers": sharing,
        "query_scalar": 1.0,
        "has_query_key_norm": True,
        "has_value_norm": True,
        "has_post_norms": True,
        "norm_offset": 0.0,
        "has_layer_scalar": True,
        "per_layer_input": _per_layer_input(values),
        "experts": _experts(values),
    }


def gemma4_keys(config: GemmaConfig) -> dict[str, Any]:
    """The keys of transformers' class beyond those of all families."""
    return {
        "layer_types": layer_types(config.layer_kinds),
        "sliding_window": config.window,
        "final_logit_softcapping": config.final_cap,
        "rope_parameters": rope_objects(config.local_rope, config.global_rope),
        "per_layer_config": _per_layer_config(config),
        "attention_k_eq_v": config.values_are_keys,
        "num_kv_shared_layers": config.num_sharing_layers,
        "use_double_wide_mlp": config.layer_feed_forward_widths is not None,
        **(_optional_keys(config) if config.family == "gemma4_text" else {}),
    }


def _optional_keys(config: GemmaConfig) -> dict[str, Any]:
    """Of the parts that only some models have, and the 12B's class does not know."""
    ple, experts = config.per_layer_input, config.experts
    keys: dict[str, Any] = {
        "hidden_size_per_layer_input": 0 if ple is None else ple.width,
        "enable_moe_block": experts is not None,
    }
    if ple is not None:
        keys["vocab_size_per_layer_input"] = ple.vocab_size
    if experts is not None:
        keys["num_experts"] = experts.count
        keys["top_k_experts"] = experts.chosen
        keys["moe_intermediate_size"] = experts.width
    return keys


def _heads(values: Mapping[str, Any], kinds: tuple[AttentionKind, ...]) -> dict[str, int | None]:
    """Width and number of key/value heads of each kind of layer."""
    common = values["head_dim"], values["num_key_value_heads"]
    # Only keys that are values too have their own number of heads in global layers.
    own_heads = values["num_global_key_value_heads"] if values["attention_k_eq_v"] else None
    stated = values.get("global_head_dim"), own_heads
    if "per_layer_config" in values:
        local, everywhere = _heads_by_layer(values["per_layer_config"] or {}, kinds, common)
        if any(one not in (None, other) for one, other in zip(stated, everywhere, strict=True)):
            raise ConfigError(
                "global_head_dim and num_global_key_value_heads, and per_layer_config, are two "
                f"spellings of one thing, got {stated} and {everywhere}; remove the wrong one"
            )
    else:
        local = common
        everywhere = (
            _GLOBAL_HEAD_WIDTH if stated[0] is None else stated[0],
            common[1] if stated[1] is None else stated[1],
        )
    return {
        "head_width": local[0],
        "num_kv_heads": local[1],
        "global_head_width": None if everywhere[0] == local[0] else everywhere[0],
        "global_num_kv_heads": None if everywhere[1] == local[1] else everywhere[1],
    }


def _heads_by_layer(
    overrides: Mapping[str, Any], kinds: tuple[AttentionKind, ...], common: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The same, from what each layer has of its own."""
    by_layer = dict.fromkeys(range(len(kinds)), common)
    for name, override in overrides.items():
        index = int(name) if str(name).isdecimal() and len(str(name)) < 5 else -1
        if index not in by_layer:
            raise ConfigError(
                f"per_layer_config must name layers in 0..{len(kinds) - 1}, got {name!r:.80}"
            )
        by_layer[index] = _own_heads(name, override, common)
    found = []
    for kind in AttentionKind:
        of_kind = {by_layer[i] for i, other in enumerate(kinds) if other is kind} or {common}
        if len(of_kind) > 1:
            raise ConfigError(
                f"per_layer_config must give all {kind} layers the same head_dim and "
                f"num_key_value_heads, got {sorted(of_kind)!r:.80}"
            )
        found += of_kind
    return found[0], found[1]


def _own_heads(name: str, override: Any, common: tuple[int, int]) -> tuple[int, int]:
    """Of one layer."""
    if not isinstance(override, Mapping) or not set(override) <= set(_OVERRIDES):
        raise ConfigError(
            f"per_layer_config[{name}] must be an object of {' and '.join(_OVERRIDES)}, "
            f"got {override!r:.80}"
        )
    faults = kind_faults(override, _OVERRIDES)
    if faults:
        raise ConfigError(f"per_layer_config[{name}]." + "; ".join(faults))
    given = {key: value for key, value in override.items() if value is not None}
    return given.get("head_dim", common[0]), given.get("num_key_value_heads", common[1])


def _per_layer_config(config: GemmaConfig) -> dict[str, dict[str, int]]:
    """What global layers have of their own, by the number of the layer."""
    own = {
        "head_dim": config.global_head_width,
        "num_key_value_heads": config.global_num_kv_heads,
    }
    overrides = {key: value for key, value in own.items() if value is not None}
    return {
        str(index): dict(overrides)
        for index, kind in enumerate(config.layer_kinds)
        if kind is AttentionKind.GLOBAL and overrides
    }


def _doubled(width: int, num_layers: int, sharing: int) -> tuple[int, ...]:
    """Layers without keys of their own are twice as wide."""
    return tuple(width if i < num_layers - sharing else 2 * width for i in range(num_layers))


def _per_layer_input(values: Mapping[str, Any]) -> PerLayerInputSpec | None:
    width = values["hidden_size_per_layer_input"]
    if not width:
        return None
    rows, ids = values["vocab_size_per_layer_input"], values["vocab_size"]
    if rows < ids:
        # Unlike Gemma 3n's, Hugging Face's Gemma 4 has no input for the other ids.
        raise ConfigError(
            f"vocab_size_per_layer_input must be at least vocab_size {ids}, got {rows}"
        )
    return PerLayerInputSpec(width=width, vocab_size=rows)


def _experts(values: Mapping[str, Any]) -> ExpertsSpec | None:
    if not values["enable_moe_block"]:
        return None
    names = ("num_experts", "top_k_experts", "moe_intermediate_size")
    old, new = values.get("expert_intermediate_size"), values.get("moe_intermediate_size")
    if old is not None and new is not None and old != new:
        raise ConfigError(
            "expert_intermediate_size is the old name of moe_intermediate_size, got "
            f"{old} and {new}; remove the wrong one"
        )
    count, chosen, width = values.get(names[0]), values.get(names[1]), old if new is None else new
    if count is None or chosen is None or width is None:
        raise ConfigError(
            f"enable_moe_block needs {', '.join(names)}, got {count}, {chosen} and {width}"
        )
    return ExpertsSpec(count=count, chosen=chosen, width=width)
