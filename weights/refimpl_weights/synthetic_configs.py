"""What `config.json` of each synthetic checkpoint says.

Owns the table of tiny stand-ins for the released configurations, and nothing that reads them. Half
of them are in the spelling of the released files (`rope_theta`, `rope_local_base_freq`,
`rope_scaling`, `sliding_window_pattern`), half in that of transformers 5 (`rope_parameters`,
`layer_types`). Those of Gemma 3n and Gemma 4 stand in `synthetic_configs_newer.py`.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from refimpl_weights import synthetic_configs_newer as newer
from refimpl_weights import synthetic_tokenizer as tokenizer
from refimpl_weights.synthetic_config_parts import COMMON, GELU, sizes

_GEMMA = {**COMMON, "architectures": ["GemmaForCausalLM"], "model_type": "gemma"}
_GEMMA3 = {**COMMON, **GELU, "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}

TINY: Mapping[str, dict[str, Any]] = MappingProxyType({
    # "gelu" is what Google's first release says and means the tanh approximation.
    "gemma_mha": {
        **_GEMMA, **sizes(hidden=32, ffn=64, layers=3, kv_heads=4),
        "hidden_act": "gelu",
        "rope_scaling": None,
        "rope_theta": 10000.0,
    },
    "gemma_mqa": {
        **_GEMMA, **sizes(hidden=64, ffn=96, layers=3, kv_heads=1),
        "hidden_act": "gelu_pytorch_tanh",
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    },
    # As 27B: scores are scaled by (width / heads)^-1/2, which is not head_dim^-1/2.
    "gemma2": {
        **COMMON, **GELU, **sizes(hidden=48, ffn=80, layers=4, kv_heads=2),
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
        **COMMON, **GELU, **sizes(hidden=40, ffn=56, layers=3, kv_heads=4),
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
        **_GEMMA3, **sizes(hidden=40, ffn=48, layers=8, kv_heads=1),
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
        **_GEMMA3, **sizes(hidden=48, ffn=64, layers=7, kv_heads=2),
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
            **COMMON, **GELU, **sizes(hidden=32, ffn=64, layers=7, kv_heads=2),
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
    "gemma4": newer.GEMMA4,
    "gemma4_e2b": newer.GEMMA4_E2B,
    "gemma4_moe": newer.GEMMA4_MOE,
    "gemma3n": newer.GEMMA3N,
})  # fmt: skip
