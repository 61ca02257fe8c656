"""Hugging Face's `config.json` to a `GemmaConfig`, and back.

Reads what hubs hold: the released spelling (`rope_theta`, `rope_local_base_freq`, `rope_scaling`,
`sliding_window_pattern`), that of transformers 5 (`rope_parameters`, `layer_types`), and text
decoders nested in a multimodal configuration. Which keys there are is `hf_keys.py`'s business.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from refimpl.errors import ConfigError
from refimpl.model import hf_keys
from refimpl.model.config import GemmaConfig, periodic_kinds
from refimpl.model.layer_spec import AttentionKind, RopeSpec
from refimpl.model.value_kinds import IDS, NUMBER, TEXT, kind_faults, optional_float

_NESTED = {"gemma3": "gemma3_text"}
_ARCHITECTURES = {
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "vaultgemma": "VaultGemmaForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
_KINDS = {"sliding_attention": AttentionKind.LOCAL, "full_attention": AttentionKind.GLOBAL}


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
    text, family = _text_decoder(config)
    generation = generation or {}
    faults = hf_keys.text_faults(text, family)
    faults += [] if text is config else hf_keys.outer_faults(config)
    faults += kind_faults(generation, {"eos_token_id": IDS})
    if faults:
        raise ConfigError("cannot carry this config.json: " + "; ".join(faults))

    outer = {key: config[key] for key in hf_keys.OUTER_READ if config.get(key) is not None}
    values = hf_keys.filled({**outer, **text}, family)
    local_rope, global_rope = _ropes(values, family)
    is_gemma1, is_gemma3 = family == "gemma", family == "gemma3_text"
    return GemmaConfig(
        family=family,
        vocab_size=values["vocab_size"],
        width=values["hidden_size"],
        num_heads=values["num_attention_heads"],
        head_width=values["head_dim"],
        num_kv_heads=values["num_key_value_heads"],
        feed_forward_width=values["intermediate_size"],
        layer_kinds=_layer_kinds(values),
        window=values.get("sliding_window"),
        context_length=values["max_position_embeddings"],
        local_rope=local_rope,
        global_rope=global_rope,
        query_scalar=float(values["head_dim" if is_gemma1 else "query_pre_attn_scalar"]),
        attention_cap=optional_float(values["attn_logit_softcapping"]),
        final_cap=optional_float(values["final_logit_softcapping"]),
        has_query_key_norm=is_gemma3,
        has_post_norms=family in ("gemma2", "gemma3_text"),
        norm_epsilon=float(values["rms_norm_eps"]),
        # Either object may say that the head was trained apart; the default of both is that not.
        has_tied_head=values["tie_word_embeddings"] and outer.get("tie_word_embeddings", True),
        pad_id=values["pad_token_id"],
        bos_id=values["bos_token_id"],
        eos_ids=_eos_ids(values, config, generation),
    )


def to_hugging_face(config: GemmaConfig) -> dict[str, Any]:
    """The `config.json` object, in the spelling of transformers 5.

    `norm_offset` has no key there: these families' safetensors always store norm scales less one.

    Raises:
        ConfigError: the family's class in transformers cannot say what this configuration says.
    """
    if config.family not in _ARCHITECTURES:
        raise ConfigError(
            f"family must be one of {', '.join(_ARCHITECTURES)}, got {config.family!r}"
        )
    written: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[config.family]],
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


def _family_keys(config: GemmaConfig) -> dict[str, Any]:
    global_rope = _rope_object(config.global_rope)
    if config.family == "gemma":
        return {"hidden_act": "gelu_pytorch_tanh", "rope_parameters": global_rope}
    names = {kind: name for name, kind in _KINDS.items()}
    scalar = config.query_scalar
    keys = {
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": [names[kind] for kind in config.layer_kinds],
        "sliding_window": config.window,
        # transformers wants an integer here and refuses 144.0.
        "query_pre_attn_scalar": int(scalar) if scalar.is_integer() else scalar,
        "attn_logit_softcapping": config.attention_cap,
        "final_logit_softcapping": config.final_cap,
        "rope_parameters": global_rope,
    }
    if config.family == "gemma3_text":
        local_rope = _rope_object(config.local_rope)
        keys["rope_parameters"] = {"full_attention": global_rope, "sliding_attention": local_rope}
    return keys


def _text_decoder(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """The part that describes the text decoder, and its model type."""
    family = config.get("model_type")
    if isinstance(family, str) and family in _NESTED:
        text = config.get("text_config")
        if not isinstance(text, Mapping):
            raise ConfigError(
                f"a {family} config.json must hold a text_config object, got {text!r:.80}"
            )
        nested_family = text.get("model_type", _NESTED[family])
        if nested_family != _NESTED[family]:
            raise ConfigError(
                f"text_config.model_type must be {_NESTED[family]!r}, got {nested_family!r:.80}"
            )
        return text, nested_family
    if not isinstance(family, str) or family not in hf_keys.DEFAULTS:
        raise ConfigError(
            f"model_type must be one of {', '.join([*hf_keys.DEFAULTS, *_NESTED])}, "
            f"got {family!r:.80}; this project runs Gemma text decoders only"
        )
    return config, family


def _layer_kinds(values: Mapping[str, Any]) -> tuple[AttentionKind, ...]:
    num_layers = values["num_hidden_layers"]
    types = values.get("layer_types")
    if types is None:
        period = values.get("_sliding_window_pattern", values["sliding_window_pattern"])
        return periodic_kinds(num_layers, period=period)
    strange = sorted(set(types) - set(_KINDS))
    if strange or len(types) != num_layers:
        raise ConfigError(
            f"layer_types must be {num_layers} of {', '.join(_KINDS)}, got {len(types)}"
            + (f" with {', '.join(strange)}" if strange else "")
        )
    return tuple(_KINDS[name] for name in types)


def _ropes(values: Mapping[str, Any], family: str) -> tuple[RopeSpec, RopeSpec]:
    """Rotary embedding of local and of global layers, from whichever spelling is there."""
    parameters, scaling = values.get("rope_parameters"), values.get("rope_scaling")
    if parameters is not None and scaling is not None:
        raise ConfigError(
            "rope_parameters and rope_scaling are two spellings of one thing, got both; remove one"
        )
    theta = values["rope_theta"]
    if family != "gemma3_text":
        # One rotary embedding for all layers, and so one scaling.
        rope = _rope(parameters or scaling or {}, theta)
        return rope, rope
    local_theta = values["rope_local_base_freq"]
    if parameters is None:
        # Interpolation stretches global layers only; local ones never see that far.
        return _rope({}, local_theta), _rope(scaling or {}, theta)
    if not set(parameters) <= set(_KINDS):
        raise ConfigError(
            f"rope_parameters of {family} must hold {' and '.join(_KINDS)}, got {dict(parameters)}"
        )
    return (
        _rope(parameters.get("sliding_attention") or {}, local_theta),
        _rope(parameters.get("full_attention") or {}, theta),
    )


def _rope(parameters: Any, theta: int | float) -> RopeSpec:
    """One rotary embedding, from an object with the base or, where that is absent, `theta`."""
    kinds = {"rope_type": TEXT, "type": TEXT, "rope_theta": NUMBER, "factor": NUMBER}
    if not isinstance(parameters, Mapping) or kind_faults(parameters, kinds):
        raise ConfigError(f"rope parameters must be an object of texts and numbers: {parameters}")
    given = {key: value for key, value in parameters.items() if value is not None}
    types = {given[key] for key in ("rope_type", "type") if key in given} or {"default"}
    is_linear = types == {"linear"}
    expected = {"rope_type", "type", "rope_theta"} | ({"factor"} if is_linear else set())
    if (
        not (is_linear or types == {"default"})
        or not set(given) <= expected
        or (is_linear and "factor" not in given)
    ):
        raise ConfigError(
            "rope parameters must be of rope_type default with rope_theta, or of rope_type linear "
            f"with rope_theta and factor, got {dict(parameters)}"
        )
    return RopeSpec(
        theta=float(given.get("rope_theta", theta)), factor=float(given.get("factor", 1.0))
    )


def _rope_object(rope: RopeSpec) -> dict[str, Any]:
    if rope.factor == 1.0:
        return {"rope_type": "default", "rope_theta": rope.theta}
    return {"rope_type": "linear", "rope_theta": rope.theta, "factor": rope.factor}


def _eos_ids(*places: Mapping[str, Any]) -> tuple[int, ...]:
    """Every id that ends a text, of all the places that name one, without repetition."""
    named = [place.get("eos_token_id") for place in places]
    listed = [ids if isinstance(ids, list) else [ids] for ids in named]
    return tuple(dict.fromkeys(i for ids in listed for i in ids if i is not None))
