"""What may stand in Hugging Face's `config.json`: its keys, their kinds and their defaults.

Owns the tables and the refusal of whatever is not in them; `hf_config.py` turns what is left into a
`GemmaConfig`. A key is read, known not to matter to the forward pass, or an error.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from refimpl.model.value_kinds import (
    BOOLEAN,
    IDS,
    INTEGER,
    NUMBER,
    OBJECT,
    TEXT,
    TEXTS,
    Kind,
    kind_faults,
)

# Absent keys have the defaults of transformers' configuration classes, because released files rely
# on them: Gemma 3 4B's own file states neither its heads nor its vocabulary. Sizes without a
# default are those that every file states. From transformers 5.23, models/*/configuration_*.py.
_COMMON_DEFAULTS = {
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "tie_word_embeddings": True,
    "rope_theta": 10_000.0,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}
_GEMMA2_DEFAULTS = {
    **_COMMON_DEFAULTS,
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
DEFAULTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "gemma": {
            **_COMMON_DEFAULTS,
            "vocab_size": 256_000,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "max_position_embeddings": 8192,
            "sliding_window_pattern": 1,
        },
        "gemma2": _GEMMA2_DEFAULTS,
        "vaultgemma": _GEMMA2_DEFAULTS,
        "gemma3_text": {
            **_COMMON_DEFAULTS,
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
)
_STATED = ("hidden_size", "intermediate_size", "num_hidden_layers")
# A null means the default everywhere but here, where it switches something off.
_NULL_IS_OFF = ("attn_logit_softcapping", "final_logit_softcapping", "sliding_window")

_READ: dict[str, Kind] = {
    "model_type": TEXT,
    "vocab_size": INTEGER,
    "hidden_size": INTEGER,
    "intermediate_size": INTEGER,
    "num_hidden_layers": INTEGER,
    "num_attention_heads": INTEGER,
    "num_key_value_heads": INTEGER,
    "head_dim": INTEGER,
    "max_position_embeddings": INTEGER,
    "rms_norm_eps": NUMBER,
    "pad_token_id": INTEGER,
    "bos_token_id": INTEGER,
    "eos_token_id": IDS,
    "tie_word_embeddings": BOOLEAN,
    "rope_theta": NUMBER,
    "rope_local_base_freq": NUMBER,
    "rope_scaling": OBJECT,
    "rope_parameters": OBJECT,
    "query_pre_attn_scalar": NUMBER,
    "sliding_window": INTEGER,
    "sliding_window_pattern": INTEGER,
    "_sliding_window_pattern": INTEGER,
    "layer_types": TEXTS,
    "attn_logit_softcapping": NUMBER,
    "final_logit_softcapping": NUMBER,
}
# Keys above that a family's class in transformers passes over, so that a file which sets one to
# anything but what holds anyway means something else than what transformers computes.
_ALIEN = {
    "gemma": {
        "rope_local_base_freq", "query_pre_attn_scalar", "sliding_window",
        "sliding_window_pattern", "_sliding_window_pattern", "layer_types",
        "attn_logit_softcapping", "final_logit_softcapping",
    },
    "gemma2": {"rope_local_base_freq", "sliding_window_pattern", "_sliding_window_pattern"},
    "vaultgemma": {"rope_local_base_freq", "sliding_window_pattern", "_sliding_window_pattern"},
    "gemma3_text": set(),
}  # fmt: skip
# Training, generation and bookkeeping: none changes what the decoder computes.
_IGNORED = {
    "_name_or_path", "_attn_implementation_autoset", "architectures", "attention_dropout",
    "attn_implementation", "cache_implementation", "chunk_size_feed_forward", "dtype", "id2label",
    "initializer_range", "is_decoder", "is_encoder_decoder", "label2id", "output_attentions",
    "output_hidden_states", "problem_type", "return_dict", "torch_dtype", "transformers_version",
    "unsloth_fixed", "unsloth_version", "use_cache",
}  # fmt: skip
# Keys that change the function, with the only values that leave it the one we compute.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "use_bidirectional_attention": (False, None),
    "quantization_config": (None,),
    "hidden_activation": ("gelu_pytorch_tanh", None),
    # Gemma 1's first release says "gelu" here and means the tanh form (Hugging Face pull request
    # 29402); later families write the key and never read it.
    "hidden_act": ("gelu_pytorch_tanh", "gelu", None),
}

# What stands around a text decoder in a multimodal file. Its images' sizes and ids are not ours.
OUTER_READ = ("pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings")
_OUTER_IGNORED = _IGNORED | {
    "model_type", "text_config", "vision_config", "mm_tokens_per_image", "boi_token_index",
    "eoi_token_index", "image_token_index", "boi_token_id", "eoi_token_id", "image_token_id",
}  # fmt: skip


def text_faults(text: Mapping[str, Any], family: str) -> list[str]:
    """Everything in a text decoder's object that we cannot carry, one line each."""
    missing = [f"{key} is missing" for key in _STATED if text.get(key) is None]
    default = DEFAULTS[family].get
    alien = {
        key for key in _ALIEN[family] if text.get(key) not in (None, default(key.removeprefix("_")))
    }
    unknown = (set(text) - set(_READ) - _IGNORED - set(_REQUIRED)) | alien
    return missing + kind_faults(text, _READ) + _value_faults(text) + _unknown_fault(unknown)


def outer_faults(config: Mapping[str, Any]) -> list[str]:
    """The same for the object around a text decoder."""
    kinds = {key: _READ[key] for key in OUTER_READ}
    unknown = set(config) - set(OUTER_READ) - _OUTER_IGNORED - set(_REQUIRED)
    return kind_faults(config, kinds) + _value_faults(config) + _unknown_fault(unknown)


def filled(text: Mapping[str, Any], family: str) -> dict[str, Any]:
    """A text decoder's values, where absent with the family's default."""
    given = {k: v for k, v in text.items() if v is not None or k in _NULL_IS_OFF}
    return {**DEFAULTS[family], **given}


def _value_faults(values: Mapping[str, Any]) -> list[str]:
    return [
        f"{key} must be {' or '.join(map(repr, allowed))}, got {values[key]!r:.80}"
        for key, allowed in _REQUIRED.items()
        if key in values and values[key] not in allowed
    ]


def _unknown_fault(keys: set[str]) -> list[str]:
    if not keys:
        return []
    return [
        f"unknown keys {', '.join(sorted(keys))}: they may change the function; remove them if "
        "they do not"
    ]
