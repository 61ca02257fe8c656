"""What `config.json` of each synthetic checkpoint says.

Owns the tiny stand-ins for the released configurations, and nothing that reads them. Half of them
are in the spelling of the released files (`rope_theta`, `rope_local_base_freq`, `rope_scaling`,
`sliding_window_pattern`), half in that of transformers 5 (`rope_parameters`, `layer_types`). Of
Gemma 4, half say `global_head_dim` and `num_global_key_value_heads`, half `per_layer_config`.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from refimpl_weights import synthetic_tokenizer as tokenizer

_COMMON = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": tokenizer.BOS,
    "eos_token_id": tokenizer.EOS,
    "head_dim": 16,
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "pad_token_id": tokenizer.PAD,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "use_cache": True,
    "vocab_size": tokenizer.NUM_PIECES,
}
_GELU = {"hidden_activation": "gelu_pytorch_tanh"}
_GEMMA = {**_COMMON, "architectures": ["GemmaForCausalLM"], "model_type": "gemma"}
_GEMMA3 = {**_COMMON, **_GELU, "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}


def _sizes(*, hidden: int, ffn: int, layers: int, kv_heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
    }


TINY: Mapping[str, dict[str, Any]] = MappingProxyType({
    # "gelu" is what Google's first release says and means the tanh approximation.
    "gemma_mha": {
        **_GEMMA, **_sizes(hidden=32, ffn=64, layers=3, kv_heads=4),
        "hidden_act": "gelu",
        "rope_scaling": None,
        "rope_theta": 10000.0,
    },
    "gemma_mqa": {
        **_GEMMA, **_sizes(hidden=64, ffn=96, layers=3, kv_heads=1),
        "hidden_act": "gelu_pytorch_tanh",
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    },
    # As 27B: scores are scaled by (width / heads)^-1/2, which is not head_dim^-1/2.
    "gemma2": {
        **_COMMON, **_GELU, **_sizes(hidden=48, ffn=80, layers=4, kv_heads=2),
        "architectures": ["Gemma2ForCausalLM"],
        "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": 30.0,
        "hidden_act": "gelu_pytorch_tanh",
        "model_type": "gemma2",
        "query_pre_attn_scalar": 12,
        "rope_theta": 10000.0,
        "sliding_window": 8,
    },
    # A window is stated, and no layer uses it.
    "vaultgemma": {
        **_COMMON, **_GELU, **_sizes(hidden=40, ffn=56, layers=3, kv_heads=4),
        "architectures": ["VaultGemmaForCausalLM"],
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "layer_types": ["full_attention"] * 3,
        "model_type": "vaultgemma",
        "query_pre_attn_scalar": 10,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "sliding_window": 8,
    },
    # Five local layers, one global, two local: as 270M and 1B, in the hub's spelling.
    "gemma3": {
        **_GEMMA3, **_sizes(hidden=40, ffn=48, layers=8, kv_heads=1),
        "attn_logit_softcapping": None,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": None,
        "query_pre_attn_scalar": 16,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": 8,
        "sliding_window_pattern": 6,
    },
    # As 27B: linear rope scaling on global layers only, its own score scale; the newer spelling.
    "gemma3_linear": {
        **_GEMMA3, **_sizes(hidden=48, ffn=64, layers=7, kv_heads=2),
        "layer_types": ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"],
        "query_pre_attn_scalar": 12,
        "rope_parameters": {
            "full_attention": {"factor": 8.0, "rope_theta": 1000000.0, "rope_type": "linear"},
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
        },
        "sliding_window": 8,
    },
    # As 4B: the text model is nested, the vocabulary has rows that no piece names, and the file
    # holds a vision tower.
    "gemma3_multimodal": {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 507,
        "eoi_token_index": 508,
        "eos_token_id": [tokenizer.EOS, tokenizer.END_OF_TURN],
        "image_token_index": tokenizer.NUM_PIECES,
        "initializer_range": 0.02,
        "mm_tokens_per_image": 1,
        "model_type": "gemma3",
        "text_config": {
            **_COMMON, **_GELU, **_sizes(hidden=32, ffn=64, layers=7, kv_heads=2),
            "model_type": "gemma3_text",
            "query_pre_attn_scalar": 16,
            "rope_local_base_freq": 10000.0,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "rope_theta": 1000000.0,
            "sliding_window": 8,
            "sliding_window_pattern": 6,
            "vocab_size": tokenizer.NUM_PIECES + 64,
        },
        "vision_config": {
            "hidden_size": 16,
            "image_size": 28,
            "intermediate_size": 24,
            "model_type": "siglip_vision_model",
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "patch_size": 14,
            "vision_use_head": False,
        },
    },
})  # fmt: skip

_LOCAL, _GLOBAL = "sliding_attention", "full_attention"
_GEMMA4_TEXT = {
    **_COMMON, **_GELU,
    "attention_k_eq_v": False,
    "enable_moe_block": False,
    "final_logit_softcapping": 30.0,
    "hidden_size_per_layer_input": 0,
    "max_position_embeddings": 131072,
    "model_type": "gemma4_text",
    "moe_intermediate_size": None,
    "num_experts": None,
    "num_kv_shared_layers": 0,
    "rope_parameters": {
        _GLOBAL: {
            "partial_rotary_factor": 0.25,
            "rope_theta": 1000000.0,
            "rope_type": "proportional",
        },
        _LOCAL: {"rope_theta": 10000.0, "rope_type": "default"},
    },
    "sliding_window": 8,
    "top_k_experts": None,
    "use_bidirectional_attention": None,
    "use_double_wide_mlp": False,
    "vocab_size_per_layer_input": tokenizer.NUM_PIECES,
}  # fmt: skip
_GEMMA4 = {
    "architectures": ["Gemma4ForConditionalGeneration"],
    "audio_config": None,
    "eos_token_id": [tokenizer.EOS, tokenizer.END_OF_TURN],
    "image_token_id": tokenizer.NUM_PIECES + 1,
    "initializer_range": 0.02,
    "model_type": "gemma4",
    "tie_word_embeddings": True,
    "vision_config": {
        "head_dim": 8,
        "hidden_size": 8,
        "intermediate_size": 12,
        "model_type": "gemma4_vision",
        "num_attention_heads": 1,
        "num_hidden_layers": 1,
        "num_key_value_heads": 1,
        "patch_size": 2,
    },
}
_GEMMA4_DENSE = {
    **_GEMMA4_TEXT, **_sizes(hidden=40, ffn=48, layers=7, kv_heads=2),
    "attention_k_eq_v": True,
    "layer_types": [_LOCAL] * 5 + [_GLOBAL] * 2,
    "use_bidirectional_attention": "vision",
}  # fmt: skip

# Gemma 3n and Gemma 4.
TINY_NEWER: Mapping[str, dict[str, Any]] = MappingProxyType({
    # As 31B. Were the pattern of six all that counted, the last layer would be local.
    "gemma4": {
        **_GEMMA4,
        "text_config": {
            **_GEMMA4_DENSE,
            "global_head_dim": 32,
            "num_global_key_value_heads": 1,
        },
    },
    # As E2B: a global layer behind every four local ones and at the end. Layers 5 to 7 take keys
    # and values from 3 (local) and 4 (global), and are twice as wide.
    "gemma4_e2b": {
        **_GEMMA4,
        "audio_config": {
            "hidden_size": 8,
            "model_type": "gemma4_audio",
            "num_attention_heads": 1,
            "num_hidden_layers": 1,
            "output_proj_dims": 8,
            "subsampling_conv_channels": [4, 2],
        },
        "text_config": {
            **_GEMMA4_TEXT, **_sizes(hidden=32, ffn=32, layers=8, kv_heads=1),
            "global_head_dim": 32,
            "hidden_size_per_layer_input": 8,
            "layer_types": [*[_LOCAL] * 4, _GLOBAL, _LOCAL, _LOCAL, _GLOBAL],
            "num_global_key_value_heads": None,
            "num_kv_shared_layers": 3,
            "use_double_wide_mlp": True,
        },
    },
    # As 26B-A4B: experts in every layer. The text model alone, in the newer spelling.
    "gemma4_moe": {
        **_GEMMA4_TEXT, **_sizes(hidden=32, ffn=32, layers=4, kv_heads=2),
        "architectures": ["Gemma4ForCausalLM"],
        "attention_k_eq_v": True,
        "enable_moe_block": True,
        "layer_types": [_LOCAL, _GLOBAL] * 2,
        "moe_intermediate_size": 12,
        "num_experts": 8,
        "per_layer_config": {
            "1": {"head_dim": 32, "num_key_value_heads": 1},
            "3": {"head_dim": 32, "num_key_value_heads": 1},
        },
        "top_k_experts": 3,
    },
    # The vocabulary has rows that no piece names; ids from 480 on are none of the per-layer
    # vocabulary. Layers 3 to 5 take keys and values from 1 (local) and 2 (global).
    "gemma3n": {
        "architectures": ["Gemma3nForConditionalGeneration"],
        "audio_config": {"hidden_size": 8, "model_type": "gemma3n_audio", "vocab_size": 4},
        "eos_token_id": [tokenizer.EOS, tokenizer.END_OF_TURN],
        "initializer_range": 0.02,
        "model_type": "gemma3n",
        "text_config": {
            **_COMMON, **_GELU, **_sizes(hidden=32, ffn=128, layers=6, kv_heads=2),
            "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0, 0.0, 0.0],
            "altup_active_idx": 0,
            "altup_coef_clip": 120.0,
            "altup_correct_scale": True,
            "altup_num_inputs": 4,
            "final_logit_softcapping": 30.0,
            "hidden_size_per_layer_input": 8,
            "intermediate_size": [128] * 6,
            "laurel_rank": 4,
            "layer_types": [_LOCAL, _LOCAL, _GLOBAL] * 2,
            "model_type": "gemma3n_text",
            "num_kv_shared_layers": 3,
            "rope_local_base_freq": 10000.0,
            "rope_scaling": None,
            "rope_theta": 1000000.0,
            "sliding_window": 8,
            "vocab_size": tokenizer.NUM_PIECES + 16,
            "vocab_size_per_layer_input": tokenizer.NUM_PIECES - 32,
        },
        "vision_config": {
            "architecture": "mobilenetv5_300m_enc",
            "hidden_size": 8,
            "model_type": "gemma3n_vision",
            "vocab_size": 4,
        },
    },
})  # fmt: skip

# "gemma4" again, as the 12B spells it: other model types, other senses, the same text model.
GEMMA4_UNIFIED: dict[str, Any] = {
    **_GEMMA4,
    "architectures": ["Gemma4UnifiedForConditionalGeneration"],
    "audio_config": {"audio_embed_dim": 8, "model_type": "gemma4_unified_audio"},
    "model_type": "gemma4_unified",
    "text_config": {
        **{
            key: value
            for key, value in _GEMMA4_DENSE.items()
            if key not in ("enable_moe_block", "moe_intermediate_size", "num_experts",
                           "top_k_experts", "hidden_size_per_layer_input",
                           "vocab_size_per_layer_input")
        },
        "model_type": "gemma4_unified_text",
        "per_layer_config": {
            layer: {"head_dim": 32, "num_key_value_heads": 1} for layer in ("5", "6")
        },
    },
    "vision_config": {
        "mm_embed_dim": 8,
        "mm_posemb_size": 4,
        "model_type": "gemma4_unified_vision",
        "output_proj_dims": 8,
        "patch_size": 1,
        "pooling_kernel_size": 2,
    },
}  # fmt: skip
