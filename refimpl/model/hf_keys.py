"""What may stand in Hugging Face's `config.json`: its keys and their kinds.

Owns the tables of what all families share and the refusal of whatever is in no table;
`hf_families.py` has what each family adds, and `hf_config.py` turns what is left into a
`GemmaConfig`. A key is read, known not to matter to the forward pass, or an error.
"""

from collections.abc import Mapping
from typing import Any

from refimpl.model.hf_families import HfFamily
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

_STATED = ("hidden_size", "intermediate_size", "num_hidden_layers")
# A null means the default everywhere but here, where it switches something off.
_NULL_IS_OFF = (
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "sliding_window",
    "hidden_size_per_layer_input",
    "per_layer_config",
)

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
# Training, generation and bookkeeping: none changes what the decoder computes.
_IGNORED = {
    "_name_or_path", "_attn_implementation_autoset", "architectures", "attention_dropout",
    "attn_implementation", "cache_implementation", "chunk_size_feed_forward", "dtype", "id2label",
    "initializer_range", "is_decoder", "is_encoder_decoder", "label2id", "output_attentions",
    "output_hidden_states", "problem_type", "return_dict", "torch_dtype", "transformers_version",
    "unsloth_fixed", "unsloth_version", "use_cache",
}  # fmt: skip
# Keys that change the function, with the only values that leave it the one we compute.
_DEMANDED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "use_bidirectional_attention": (False, None),
    "quantization_config": (None,),
    "hidden_activation": ("gelu_pytorch_tanh", None),
    # Gemma 1's first release says "gelu" here and means the tanh form (Hugging Face pull request
    # 29402); later families write the key and never read it.
    "hidden_act": ("gelu_pytorch_tanh", "gelu", None),
}

# What stands around a text decoder in a multimodal file. Images' and sounds' sizes and ids are not
# ours.
OUTER_READ = ("pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings")
_OUTER_IGNORED = _IGNORED | {
    "model_type", "text_config", "vision_config", "mm_tokens_per_image", "boi_token_index",
    "eoi_token_index", "image_token_index", "boi_token_id", "eoi_token_id", "image_token_id",
}  # fmt: skip
_OUTER_IGNORED_WITH_SOUND = _OUTER_IGNORED | {
    "audio_config", "audio_token_id", "audio_soft_tokens_per_image", "boa_token_id",
    "eoa_token_id", "eoa_token_index", "video_token_id", "vision_soft_tokens_per_image",
}  # fmt: skip


def text_faults(text: Mapping[str, Any], family: HfFamily) -> list[str]:
    """Everything in a text decoder's object that we cannot carry, one line each."""
    kinds = {**_READ, **family.kinds}
    demanded = {**_DEMANDED, **family.demanded}
    missing = [f"{key} is missing" for key in _STATED if text.get(key) is None]
    known = {*kinds, *demanded, *_IGNORED, *family.ignored}
    unknown = (set(text) - known) | _passed_over(text, family)
    return missing + kind_faults(text, kinds) + _demand_faults(text, demanded) + _unknown(unknown)


def outer_faults(config: Mapping[str, Any], family: HfFamily) -> list[str]:
    """The same for the object around a text decoder."""
    kinds = {key: _READ[key] for key in OUTER_READ}
    demanded = {**_DEMANDED, **family.demanded}
    ignored = _OUTER_IGNORED if family.outer == "gemma3" else _OUTER_IGNORED_WITH_SOUND
    unknown = set(config) - set(OUTER_READ) - ignored - set(demanded)
    return kind_faults(config, kinds) + _demand_faults(config, demanded) + _unknown(unknown)


def filled(text: Mapping[str, Any], family: HfFamily) -> dict[str, Any]:
    """A text decoder's values, where absent with the family's default."""
    given = {k: v for k, v in text.items() if v is not None or k in _NULL_IS_OFF}
    return {**family.defaults, **given}


def _passed_over(text: Mapping[str, Any], family: HfFamily) -> set[str]:
    """Keys that the family's class does not read, set to something that would matter."""
    default = family.defaults.get
    strange = {
        key
        for key in family.passed_over
        if text.get(key) not in (None, default(key.removeprefix("_")))
    }
    if text.get("layer_types") is not None:
        # Every layer is named, so that no pattern decides anything.
        strange -= {"sliding_window_pattern", "_sliding_window_pattern"}
    return strange


def _demand_faults(values: Mapping[str, Any], demanded: Mapping[str, tuple[Any, ...]]) -> list[str]:
    return [
        f"{key} must be {' or '.join(map(repr, allowed))}, got {values[key]!r:.80}"
        for key, allowed in demanded.items()
        if key in values and values[key] not in allowed
    ]


def _unknown(keys: set[str]) -> list[str]:
    if not keys:
        return []
    return [
        f"unknown keys {', '.join(sorted(keys))}: they may change the function; remove them if "
        "they do not"
    ]
