"""What each family's `config.json` may hold beside what all may: keys, defaults, demands.

Owns one table per model type of Hugging Face. From transformers 5.23,
`models/*/configuration_*.py`; keys that only released files carry are marked.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from refimpl.model.value_kinds import BOOLEAN, INTEGER, NUMBER, NUMBERS, OBJECT, SIZES, Kind


@dataclass(frozen=True, kw_only=True)
class HfFamily:
    """A text decoder's class in transformers, as far as a file is concerned.

    Attributes:
        architecture: the name of the class that has the head.
        outer: model type of the multimodal file that holds such a decoder, where there is one.
        defaults: values of absent keys, because released files rely on them: Gemma 3 4B's own file
            states neither its heads nor its vocabulary. Sizes without a default are those that
            every file states.
        kinds: keys that this family has beside those of all, or of another kind than theirs.
        passed_over: keys of other families that this class never reads, so that a file which sets
            one to anything but what holds anyway means something else than what is computed.
        ignored: further keys that do not change the function.
        demanded: keys that change the function, with the only values that leave it the one we
            compute; they go before those of all families.
    """

    architecture: str
    outer: str | None = None
    defaults: Mapping[str, Any]
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    passed_over: frozenset[str] = frozenset()
    ignored: frozenset[str] = frozenset()
    demanded: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


_COMMON = {
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "tie_word_embeddings": True,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}
_ONE_ROPE = {"rope_theta": 10_000.0}
_TWO_ROPES = {"rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0}
_PATTERNS = frozenset({"sliding_window_pattern", "_sliding_window_pattern"})

_GEMMA = HfFamily(
    architecture="GemmaForCausalLM",
    defaults={
        **_COMMON,
        **_ONE_ROPE,
        "vocab_size": 256_000,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_position_embeddings": 8192,
        "sliding_window_pattern": 1,
    },
    passed_over=_PATTERNS
    | {
        "rope_local_base_freq", "query_pre_attn_scalar", "sliding_window", "layer_types",
        "attn_logit_softcapping", "final_logit_softcapping",
    },
)  # fmt: skip

_GEMMA2_DEFAULTS = {
    **_COMMON,
    **_ONE_ROPE,
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
_GEMMA2 = HfFamily(
    architecture="Gemma2ForCausalLM",
    defaults=_GEMMA2_DEFAULTS,
    passed_over=_PATTERNS | {"rope_local_base_freq"},
)
_VAULTGEMMA = HfFamily(
    architecture="VaultGemmaForCausalLM",
    defaults=_GEMMA2_DEFAULTS,
    passed_over=_PATTERNS | {"rope_local_base_freq"},
)

_GEMMA3 = HfFamily(
    architecture="Gemma3ForCausalLM",
    outer="gemma3",
    defaults={
        **_COMMON,
        **_TWO_ROPES,
        "vocab_size": 262_208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131_072,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
    },
)

_PER_LAYER_INPUTS: dict[str, Kind] = {
    "hidden_size_per_layer_input": INTEGER,
    "vocab_size_per_layer_input": INTEGER,
}
_GEMMA3N = HfFamily(
    architecture="Gemma3nForCausalLM",
    outer="gemma3n",
    defaults={
        **_COMMON,
        **_TWO_ROPES,
        "vocab_size": 262_400,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32_768,
        "sliding_window": 512,
        "sliding_window_pattern": 5,
        "final_logit_softcapping": 30.0,
        "hidden_size_per_layer_input": 256,
        "vocab_size_per_layer_input": 262_144,
        "num_kv_shared_layers": 15,
        "altup_num_inputs": 4,
        "altup_active_idx": 0,
        "laurel_rank": 64,
    },
    kinds={
        **_PER_LAYER_INPUTS,
        "intermediate_size": SIZES,
        "num_kv_shared_layers": INTEGER,
        "altup_num_inputs": INTEGER,
        "altup_active_idx": INTEGER,
        "altup_coef_clip": NUMBER,
        "laurel_rank": INTEGER,
        "activation_sparsity_pattern": NUMBERS,
    },
    passed_over=_PATTERNS | {"attn_logit_softcapping"},
    # Released files carry both; scores are not scaled, and a learning rate is for training.
    ignored=frozenset({"query_pre_attn_scalar", "altup_lr_multiplier"}),
    demanded={"altup_correct_scale": (True, None)},
)

_GEMMA4_DEFAULTS = {
    **_COMMON,
    "vocab_size": 262_144,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "sliding_window_pattern": 6,
    "num_global_key_value_heads": None,
    "attention_k_eq_v": False,
    "num_kv_shared_layers": 0,
    "use_double_wide_mlp": False,
}
_GEMMA4_KINDS: dict[str, Kind] = {
    "global_head_dim": INTEGER,
    "num_global_key_value_heads": INTEGER,
    "per_layer_config": OBJECT,
    "attention_k_eq_v": BOOLEAN,
    "num_kv_shared_layers": INTEGER,
    "use_double_wide_mlp": BOOLEAN,
}
_GEMMA4_PASSED_OVER = _PATTERNS | {
    "rope_theta", "rope_local_base_freq", "rope_scaling", "attn_logit_softcapping",
}  # fmt: skip
# Released files carry both; scores are not scaled, and the second names no option of the class.
_GEMMA4_IGNORED = frozenset({"query_pre_attn_scalar", "stream_and_decode_in_f32"})
# Only images look ahead in "vision"; in a text every position sees what stands before it. The
# second is the first files' word for the first.
_GEMMA4_DEMANDED = {
    "use_bidirectional_attention": ("vision", False, None),
    "attention_use_bidirectional": ("vision", False, None),
    # A list would name layers with experts; transformers knows no such list.
    "routed_layer_pattern": (None,),
}
_EXPERTS: dict[str, Kind] = {
    "enable_moe_block": BOOLEAN,
    "num_experts": INTEGER,
    "top_k_experts": INTEGER,
    "moe_intermediate_size": INTEGER,
    # The first files' word for the line above.
    "expert_intermediate_size": INTEGER,
}
_GEMMA4 = HfFamily(
    architecture="Gemma4ForCausalLM",
    outer="gemma4",
    defaults={
        **_GEMMA4_DEFAULTS,
        "max_position_embeddings": 131_072,
        "sliding_window": 512,
        "hidden_size_per_layer_input": 256,
        "vocab_size_per_layer_input": 262_144,
        "enable_moe_block": False,
    },
    kinds={**_GEMMA4_KINDS, **_PER_LAYER_INPUTS, **_EXPERTS},
    passed_over=_GEMMA4_PASSED_OVER,
    ignored=_GEMMA4_IGNORED,
    demanded=_GEMMA4_DEMANDED,
)
# The 12B: neither per-layer inputs nor experts, and a class that does not read them.
_GEMMA4_UNIFIED = HfFamily(
    architecture="Gemma4UnifiedForCausalLM",
    outer="gemma4_unified",
    defaults={
        **_GEMMA4_DEFAULTS,
        "max_position_embeddings": 262_144,
        "sliding_window": 1024,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 262_144,
        "enable_moe_block": False,
    },
    kinds={**_GEMMA4_KINDS, **_PER_LAYER_INPUTS, **_EXPERTS},
    passed_over=_GEMMA4_PASSED_OVER | frozenset({*_PER_LAYER_INPUTS, *_EXPERTS}),
    ignored=_GEMMA4_IGNORED,
    demanded=_GEMMA4_DEMANDED,
)

FAMILIES: Mapping[str, HfFamily] = MappingProxyType(
    {
        "gemma": _GEMMA,
        "gemma2": _GEMMA2,
        "vaultgemma": _VAULTGEMMA,
        "gemma3_text": _GEMMA3,
        "gemma3n_text": _GEMMA3N,
        "gemma4_text": _GEMMA4,
        "gemma4_unified_text": _GEMMA4_UNIFIED,
    }
)
# The multimodal file's model type, and that of the text decoder in it.
NESTED: Mapping[str, str] = MappingProxyType(
    {family.outer: name for name, family in FAMILIES.items() if family.outer is not None}
)
