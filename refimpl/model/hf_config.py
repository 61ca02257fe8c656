"""Hugging Face's `config.json` to a `GemmaConfig`, and back.

Reads what hubs hold: the released spelling (`rope_theta`, `rope_local_base_freq`, `rope_scaling`,
`sliding_window_pattern`), that of transformers 5 (`rope_parameters`, `layer_types`), and text
decoders nested in a multimodal configuration. Nothing is dropped in silence: a key is read, known
not to matter to the forward pass, or an error.

Absent keys have the defaults of transformers' configuration classes, because released files rely
on them: Gemma 3 4B's own file states neither its heads nor its vocabulary.
"""

from collections.abc import Mapping
from typing import Any

from refimpl.errors import ConfigError
from refimpl.model.config import AttentionKind, GemmaConfig, RopeSpec, periodic_kinds

# transformers 5.23, models/*/configuration_*.py.
_COMMON_DEFAULTS: dict[str, Any] = {
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "tie_word_embeddings": True,
    "rope_theta": 10_000.0,
}
_GEMMA2_DEFAULTS: dict[str, Any] = {
    "vocab_size": 256_000,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 2,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma": {
        "vocab_size": 256_000,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_position_embeddings": 8192,
    },
    "gemma2": _GEMMA2_DEFAULTS,
    "vaultgemma": _GEMMA2_DEFAULTS,
    "gemma3_text": {
        "vocab_size": 262_208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131_072,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
    },
}
_NESTED = {"gemma3": "gemma3_text"}

_READ = {
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_activation", "hidden_act",
    "max_position_embeddings", "rms_norm_eps", "pad_token_id", "bos_token_id", "eos_token_id",
    "tie_word_embeddings", "rope_theta", "rope_local_base_freq", "rope_scaling",
    "rope_parameters", "query_pre_attn_scalar", "sliding_window", "sliding_window_pattern",
    "_sliding_window_pattern", "layer_types", "attn_logit_softcapping", "final_logit_softcapping",
}  # fmt: skip
# Training, generation and bookkeeping of transformers: none changes what the decoder computes.
_IGNORED = {
    "_name_or_path", "_attn_implementation_autoset", "architectures", "attention_dropout",
    "attn_implementation", "cache_implementation", "chunk_size_feed_forward", "dtype", "id2label",
    "initializer_range", "is_decoder", "is_encoder_decoder", "label2id", "output_attentions",
    "output_hidden_states", "problem_type", "return_dict", "torch_dtype", "transformers_version",
    "use_cache",
}  # fmt: skip
# Keys that change the function, with the only values that leave it the one we compute.
_REQUIRED: dict[str, list[Any]] = {
    "attention_bias": [False, None],
    "use_bidirectional_attention": [False, None],
    "quantization_config": [None],
}
# Gemma 1's first release says "gelu" and means the tanh form (Hugging Face pull request 29402).
_ACTIVATIONS = ("gelu_pytorch_tanh", "gelu")


def from_hugging_face(
    config: Mapping[str, Any], *, generation: Mapping[str, Any] | None = None
) -> GemmaConfig:
    """The architecture that a `config.json` describes.

    Args:
        config: the file's object.
        generation: the object of `generation_config.json`, whose end-of-text ids are added.

    Raises:
        ConfigError: not a Gemma text decoder we carry, a key we do not understand, or a value that
            does not fit; the message lists every fault.
    """
    text, family = _text_decoder(config)
    _refuse_unknown(text)
    given = {key: value for key, value in text.items() if value is not None}
    filled = {**_COMMON_DEFAULTS, **_DEFAULTS[family], **given}
    # An explicit null switches a cap off; everywhere else it means the default.
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        filled[cap] = text.get(cap, _DEFAULTS[family].get(cap))
    missing = [
        k for k in ("hidden_size", "intermediate_size", "num_hidden_layers") if k not in given
    ]
    if missing:
        raise ConfigError(
            f"config.json lacks {', '.join(missing)}; is it the file of a {family} checkpoint?"
        )
    local_rope, global_rope = _ropes(filled)
    is_gemma1, is_gemma3 = family == "gemma", family == "gemma3_text"
    kinds = _layer_kinds(filled, is_gemma1)
    try:
        return GemmaConfig(
            family=family,
            vocab_size=filled["vocab_size"],
            width=filled["hidden_size"],
            num_heads=filled["num_attention_heads"],
            head_width=filled["head_dim"],
            num_kv_heads=filled["num_key_value_heads"],
            feed_forward_width=filled["intermediate_size"],
            layer_kinds=kinds,
            window=filled.get("sliding_window"),
            context_length=filled["max_position_embeddings"],
            local_rope=local_rope,
            global_rope=global_rope,
            query_scalar=filled["head_dim"] if is_gemma1 else filled["query_pre_attn_scalar"],
            attention_cap=filled["attn_logit_softcapping"],
            final_cap=filled["final_logit_softcapping"],
            has_query_key_norm=is_gemma3,
            has_post_norms=family in ("gemma2", "gemma3_text"),
            norm_epsilon=filled["rms_norm_eps"],
            has_tied_head=filled["tie_word_embeddings"],
            pad_id=filled["pad_token_id"],
            bos_id=filled["bos_token_id"],
            eos_ids=_eos_ids(config, filled, generation or {}),
        )
    except TypeError as error:
        raise ConfigError(f"a value in config.json has the wrong type: {error}") from error


def to_hugging_face(config: GemmaConfig) -> dict[str, Any]:
    """The `config.json` object, in the spelling of transformers 5.

    `norm_offset` has no key there: these families' safetensors always store norm scales less one.
    """
    names = {AttentionKind.LOCAL: "sliding_attention", AttentionKind.GLOBAL: "full_attention"}
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
        "rope_parameters": _rope_object(config.global_rope),
    }
    if config.family == "gemma":
        return {**written, "hidden_act": "gelu_pytorch_tanh"}
    written |= {
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": [names[kind] for kind in config.layer_kinds],
        "sliding_window": config.window,
        "query_pre_attn_scalar": config.query_scalar,
        "attn_logit_softcapping": config.attention_cap,
        "final_logit_softcapping": config.final_cap,
    }
    if config.family == "gemma3_text":
        written["rope_parameters"] = {
            "full_attention": _rope_object(config.global_rope),
            "sliding_attention": _rope_object(config.local_rope),
        }
    return written


_ARCHITECTURES = {
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "vaultgemma": "VaultGemmaForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}


def _text_decoder(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """The part that describes the text decoder, and its model type."""
    family = config.get("model_type")
    if family in _NESTED:
        text = config.get("text_config")
        if not isinstance(text, Mapping):
            raise ConfigError(
                f"a {family} config.json must hold a text_config object, got {text!r}"
            )
        nested_family = text.get("model_type", _NESTED[family])
        if nested_family != _NESTED[family]:
            raise ConfigError(
                f"text_config.model_type must be {_NESTED[family]!r}, got {nested_family!r}"
            )
        return text, nested_family
    if family not in _DEFAULTS:
        raise ConfigError(
            f"model_type must be one of {', '.join([*_DEFAULTS, *_NESTED])}, got {family!r}; "
            "this project runs Gemma text decoders only"
        )
    return config, family


def _refuse_unknown(text: Mapping[str, Any]) -> None:
    faults = [
        f"{key} must be {' or '.join(map(repr, _REQUIRED[key]))}, got {text[key]!r}"
        for key in text
        if key in _REQUIRED and text[key] not in _REQUIRED[key]
    ]
    faults += [
        f"{key} must be one of {', '.join(_ACTIVATIONS)}, got {text[key]!r}"
        for key in ("hidden_activation", "hidden_act")
        if text.get(key) is not None and text[key] not in _ACTIVATIONS
    ]
    unknown = sorted(set(text) - _READ - _IGNORED - set(_REQUIRED))
    if unknown:
        faults.append(
            f"unknown keys {', '.join(unknown)}: they may change the function; remove them if they "
            "do not"
        )
    if faults:
        raise ConfigError("cannot carry this config.json: " + "; ".join(faults))


def _layer_kinds(filled: Mapping[str, Any], is_global: bool) -> tuple[AttentionKind, ...]:
    num_layers = filled["num_hidden_layers"]
    if is_global:
        return (AttentionKind.GLOBAL,) * num_layers
    types = filled.get("layer_types")
    if types is None:
        period = filled.get("_sliding_window_pattern", filled["sliding_window_pattern"])
        return periodic_kinds(num_layers, period=period)
    names = {"sliding_attention": AttentionKind.LOCAL, "full_attention": AttentionKind.GLOBAL}
    strange = sorted({str(name) for name in types} - set(names))
    if strange or len(types) != num_layers:
        raise ConfigError(
            f"layer_types must be {num_layers} of {', '.join(names)}, got {len(types)}"
            + (f" with {', '.join(strange)}" if strange else "")
        )
    return tuple(names[name] for name in types)


def _ropes(filled: Mapping[str, Any]) -> tuple[RopeSpec, RopeSpec]:
    """Rotary embedding of local and of global layers, from whichever spelling is there."""
    theta = filled["rope_theta"]
    local_theta = filled.get("rope_local_base_freq", theta)
    parameters = filled.get("rope_parameters")
    if parameters is None:
        scaling = filled.get("rope_scaling") or {}
        if "rope_local_base_freq" not in filled and scaling:
            # One rotary embedding for all layers (Gemma 1 and 2): scaling would hold for all.
            return _rope(scaling, theta), _rope(scaling, theta)
        return RopeSpec(theta=float(local_theta)), _rope(scaling, theta)
    if "full_attention" in parameters or "sliding_attention" in parameters:
        return (
            _rope(parameters.get("sliding_attention") or {}, local_theta),
            _rope(parameters.get("full_attention") or {}, theta),
        )
    return _rope(parameters, theta), _rope(parameters, theta)


def _rope(parameters: Mapping[str, Any], theta: float) -> RopeSpec:
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    unknown = set(parameters) - {"rope_type", "type", "factor", "rope_theta"}
    if kind not in ("default", "linear") or unknown:
        raise ConfigError(
            "rope parameters must be of type default or linear with rope_theta and factor, "
            f"got {dict(parameters)}"
        )
    factor = parameters.get("factor", 1.0) if kind == "linear" else 1.0
    return RopeSpec(theta=float(parameters.get("rope_theta", theta)), factor=float(factor))


def _rope_object(rope: RopeSpec) -> dict[str, Any]:
    if rope.factor == 1.0:
        return {"rope_type": "default", "rope_theta": rope.theta}
    return {"rope_type": "linear", "rope_theta": rope.theta, "factor": rope.factor}


def _eos_ids(
    config: Mapping[str, Any], filled: Mapping[str, Any], generation: Mapping[str, Any]
) -> tuple[int, ...]:
    """Every id that ends a text, of all the places that name one, without repetition."""
    places = (filled["eos_token_id"], config.get("eos_token_id"), generation.get("eos_token_id"))
    listed = [place if isinstance(place, list) else [place] for place in places]
    return tuple(dict.fromkeys(i for ids in listed for i in ids if i is not None))
