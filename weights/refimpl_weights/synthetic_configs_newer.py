"""What `config.json` of each synthetic checkpoint of Gemma 3n and Gemma 4 says.

Owns these tiny stand-ins for the released configurations, one constant each. Of Gemma 4, some say
`global_head_dim` and `num_global_key_value_heads`, others `per_layer_config`.
"""

from typing import Any

from refimpl_weights import synthetic_tokenizer as tokenizer
from refimpl_weights.synthetic_config_parts import COMMON, GELU, sizes

_LOCAL, _GLOBAL = "sliding_attention", "full_attention"
_GEMMA4_TEXT = {
    **COMMON, **GELU,
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
_GEMMA4_WHOLE = {
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
    **_GEMMA4_TEXT, **sizes(hidden=40, ffn=48, layers=7, kv_heads=2),
    "attention_k_eq_v": True,
    "layer_types": [_LOCAL] * 5 + [_GLOBAL] * 2,
    "use_bidirectional_attention": "vision",
}  # fmt: skip

# As 31B. Were the pattern of six all that counted, the last layer would be local.
GEMMA4: dict[str, Any] = {
    **_GEMMA4_WHOLE,
    "text_config": {
        **_GEMMA4_DENSE,
        "global_head_dim": 32,
        "num_global_key_value_heads": 1,
    },
}

# As E2B: a global layer behind every four local ones and at the end. Layers 5 to 7 take keys and
# values from 3 (local) and 4 (global), and are twice as wide.
GEMMA4_E2B: dict[str, Any] = {
    **_GEMMA4_WHOLE,
    "audio_config": {
        "hidden_size": 8,
        "model_type": "gemma4_audio",
        "num_attention_heads": 1,
        "num_hidden_layers": 1,
        "output_proj_dims": 8,
        "subsampling_conv_channels": [4, 2],
    },
    "text_config": {
        **_GEMMA4_TEXT, **sizes(hidden=32, ffn=32, layers=8, kv_heads=1),
        "global_head_dim": 32,
        # Were it 8, the gates of a token may all be nearly shut, and the norm after them makes
        # float32 roundings large: full and cached pass would differ by more than 1e-5.
        "hidden_size_per_layer_input": 16,
        "layer_types": [*[_LOCAL] * 4, _GLOBAL, _LOCAL, _LOCAL, _GLOBAL],
        "num_global_key_value_heads": None,
        "num_kv_shared_layers": 3,
        "use_double_wide_mlp": True,
    },
}  # fmt: skip

# As 26B-A4B: experts in every layer. The text model alone, in the newer spelling.
GEMMA4_MOE: dict[str, Any] = {
    **_GEMMA4_TEXT, **sizes(hidden=32, ffn=32, layers=4, kv_heads=2),
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
}  # fmt: skip

# The vocabulary has rows that no piece names; ids from 480 on are none of the per-layer
# vocabulary. Layers 3 to 5 take keys and values from 1 (local) and 2 (global).
GEMMA3N: dict[str, Any] = {
    "architectures": ["Gemma3nForConditionalGeneration"],
    "audio_config": {"hidden_size": 8, "model_type": "gemma3n_audio", "vocab_size": 4},
    "eos_token_id": [tokenizer.EOS, tokenizer.END_OF_TURN],
    "initializer_range": 0.02,
    "model_type": "gemma3n",
    "text_config": {
        **COMMON, **GELU, **sizes(hidden=32, ffn=128, layers=6, kv_heads=2),
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
}  # fmt: skip

# "gemma4" again, as the 12B spells it: other model types, other senses, the same text model.
GEMMA4_UNIFIED: dict[str, Any] = {
    **_GEMMA4_WHOLE,
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
