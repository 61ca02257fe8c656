"""Hugging Face's `config.json` to a `GemmaConfig`, and back.

Reads what hubs hold: the released spelling (`rope_theta`, `rope_local_base_freq`, `rope_scaling`,
`sliding_window_pattern`), that of transformers 5 (`rope_parameters`, `layer_types`), and text
decoders nested in a multimodal configuration. Which keys there are is the business of `hf_keys.py`
and `hf_families.py`; what the newer families alone say is read in a module of their own.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from refimpl.errors import ConfigError
from refimpl.model import hf_keys
from refimpl.model.config import GemmaConfig
from refimpl.model.hf_families import FAMILIES, NESTED
from refimpl.model.hf_gemma3n import gemma3n_keys, gemma3n_parts
from refimpl.model.hf_gemma4 import gemma4_keys, gemma4_parts
from refimpl.model.hf_layers import (
    layer_kinds,
    layer_types,
    one_rope,
    rope_object,
    rope_objects,
    two_ropes,
)
from refimpl.model.value_kinds import IDS, kind_faults, optional_float

_GELU = "gelu_pytorch_tanh"


def from_hugging_face(
    config: Mapping[str, Any], *, generation: Mapping[str, Any] | None = None
) -> GemmaConfig:
    """The architecture that a `config.json` describes.

    Args:
        config: the file's object.
        generation: the object of `generation_config.json`, whose end-of-text ids are added.

    Raises:
        ConfigError: not a Gemma text decoder we carry, or keys and values that we do not
            understand or that contradict each other; all of a kind are listed at once.
    """
    text, name = _text_decoder(config)
    family, generation = FAMILIES[name], generation or {}
    faults = hf_keys.text_faults(text, family)
    faults += [] if text is config else hf_keys.outer_faults(config, family)
    faults += kind_faults(generation, {"eos_token_id": IDS})
    if faults:
        raise ConfigError("cannot carry this config.json: " + "; ".join(faults))

    outer = {key: config[key] for key in hf_keys.OUTER_READ if config.get(key) is not None}
    values = hf_keys.filled({**outer, **text}, family)
    common: dict[str, Any] = {
        "family": name,
        "vocab_size": values["vocab_size"],
        "width": values["hidden_size"],
        "num_heads": values["num_attention_heads"],
        "head_width": values["head_dim"],
        "num_kv_heads": values["num_key_value_heads"],
        "feed_forward_width": values["intermediate_size"],
        "window": values.get("sliding_window"),
        "context_length": values["max_position_embeddings"],
        "attention_cap": optional_float(values["attn_logit_softcapping"]),
        "final_cap": optional_float(values["final_logit_softcapping"]),
        "norm_epsilon": float(values["rms_norm_eps"]),
        # Either object may say that the head was trained apart; the default of both is that not.
        "has_tied_head": values["tie_word_embeddings"] and outer.get("tie_word_embeddings", True),
        "pad_id": values["pad_token_id"],
        "bos_id": values["bos_token_id"],
        "eos_ids": _eos_ids(values, config, generation),
    }
    return GemmaConfig(**{**common, **_parts(values, name)})


def to_hugging_face(config: GemmaConfig) -> dict[str, Any]:
    """The `config.json` object, in the spelling of transformers 5.

    `norm_offset` has no key there: what safetensors store belongs to the family.

    Raises:
        ConfigError: the family's class in transformers cannot say what this configuration says.
    """
    if config.family not in FAMILIES:
        raise ConfigError(f"family must be one of {', '.join(FAMILIES)}, got {config.family!r}")
    written: dict[str, Any] = {
        "architectures": [FAMILIES[config.family].architecture],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.feed_forward_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_width,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.has_tied_head,
        "attention_bias": False,
        "pad_token_id": config.pad_id,
        "bos_token_id": config.bos_id,
        "eos_token_id": list(config.eos_ids),
        **_family_keys(config),
    }
    read_back = from_hugging_face(written)
    lost = [
        field.name
        for field in fields(GemmaConfig)
        if field.name != "norm_offset"
        and getattr(read_back, field.name) != getattr(config, field.name)
    ]
    if lost:
        raise ConfigError(
            f"a {config.family} config.json cannot express this configuration's {', '.join(lost)}"
        )
    return written


def _parts(values: Mapping[str, Any], family: str) -> dict[str, Any]:
    """The arguments of `GemmaConfig` that families spell, or mean, in their own way."""
    if family == "gemma3n_text":
        return gemma3n_parts(values)
    if family in ("gemma4_text", "gemma4_unified_text"):
        return gemma4_parts(values)
    is_gemma3 = family == "gemma3_text"
    local_rope, global_rope = two_ropes(values) if is_gemma3 else (one_rope(values),) * 2
    return {
        "layer_kinds": layer_kinds(values),
        "local_rope": local_rope,
        "global_rope": global_rope,
        "query_scalar": float(values["head_dim" if family == "gemma" else "query_pre_attn_scalar"]),
        "has_query_key_norm": is_gemma3,
        "has_post_norms": family in ("gemma2", "gemma3_text"),
    }


def _family_keys(config: GemmaConfig) -> dict[str, Any]:
    """What `_parts` reads, written."""
    global_rope = rope_object(config.global_rope)
    if config.family == "gemma":
        return {"hidden_act": _GELU, "rope_parameters": global_rope}
    if config.family == "gemma3n_text":
        return {"hidden_activation": _GELU, **gemma3n_keys(config)}
    if config.family in ("gemma4_text", "gemma4_unified_text"):
        return {"hidden_activation": _GELU, **gemma4_keys(config)}
    scalar = config.query_scalar
    keys = {
        "hidden_activation": _GELU,
        "layer_types": layer_types(config.layer_kinds),
        "sliding_window": config.window,
        # transformers wants an integer here and refuses 144.0.
        "query_pre_attn_scalar": int(scalar) if scalar.is_integer() else scalar,
        "attn_logit_softcapping": config.attention_cap,
        "final_logit_softcapping": config.final_cap,
        "rope_parameters": global_rope,
    }
    if config.family == "gemma3_text":
        keys["rope_parameters"] = rope_objects(config.local_rope, config.global_rope)
    return keys


def _text_decoder(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """The part that describes the text decoder, and its model type."""
    family = config.get("model_type")
    if isinstance(family, str) and family in NESTED:
        text = config.get("text_config")
        if not isinstance(text, Mapping):
            raise ConfigError(
                f"a {family} config.json must hold a text_config object, got {text!r:.80}"
            )
        nested_family = text.get("model_type", NESTED[family])
        if nested_family != NESTED[family]:
            raise ConfigError(
                f"text_config.model_type must be {NESTED[family]!r}, got {nested_family!r:.80}"
            )
        return text, nested_family
    if not isinstance(family, str) or family not in FAMILIES:
        raise ConfigError(
            f"model_type must be one of {', '.join([*FAMILIES, *NESTED])}, "
            f"got {family!r:.80}; this project runs Gemma text decoders only"
        )
    return config, family


def _eos_ids(*places: Mapping[str, Any]) -> tuple[int, ...]:
    """Every id that ends a text, of all the places that name one, without repetition."""
    named = [place.get("eos_token_id") for place in places]
    listed = [ids if isinstance(ids, list) else [ids] for ids in named]
    return tuple(dict.fromkeys(i for ids in listed for i in ids if i is not None))
