"""What llama.cpp's converter writes about a Gemma 3n or Gemma 4 beside its tensors.

Owns the keys of the architecture. Source: llama.cpp `conversion/base.py`, `conversion/gemma.py`.
"""

from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

import numpy as np
from gguf import GGUFWriter

from refimpl_weights import synthetic_decoders as decoders

_LOCAL, _GLOBAL = "sliding_attention", "full_attention"


def add_configuration(writer: GGUFWriter, config: Mapping[str, Any]) -> None:
    """Every key of the architecture, from the text model's part of a `config.json`."""
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    writer.add_sliding_window(config["sliding_window"])
    writer.add_sliding_window_pattern([kind == _LOCAL for kind in config["layer_types"]])
    writer.add_shared_kv_layers(config["num_kv_shared_layers"])
    writer.add_embedding_length_per_layer_input(config["hidden_size_per_layer_input"])
    if config["model_type"] == "gemma3n_text":
        _add_gemma3n(writer, config)
    else:
        _add_gemma4(writer, config)


def _add_gemma3n(writer: GGUFWriter, config: Mapping[str, Any]) -> None:
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_freq_base_swa(config["rope_local_base_freq"])
    writer.add_altup_active_idx(config["altup_active_idx"])
    writer.add_altup_num_inputs(config["altup_num_inputs"])
    shares = config["activation_sparsity_pattern"]
    writer.add_activation_sparsity_scale([_cutoff(share) for share in shares])


def _cutoff(share: float) -> float:
    """How many standard deviations above the mean a gate is kept, so that `share` are not."""
    # What torch's quantile function gives for 0, in float32.
    return float(np.float32(NormalDist().inv_cdf(share))) if share > 0 else -np.inf


def _add_gemma4(writer: GGUFWriter, config: Mapping[str, Any]) -> None:
    kinds, layers = config["layer_types"], config["num_hidden_layers"]
    shapes = [decoders.key_value_shape(config, layer) for layer in range(layers)]
    heads = [num_heads for num_heads, _ in shapes]
    writer.add_head_count_kv(heads if len(set(heads)) > 1 else heads[0])
    (_, local), (_, wide) = (shapes[kinds.index(kind)] for kind in (_LOCAL, _GLOBAL))
    writer.add_key_length(wide)
    writer.add_value_length(wide)
    writer.add_key_length_swa(local)
    writer.add_value_length_swa(local)
    writer.add_rope_dimension_count(wide)
    writer.add_rope_dimension_count_swa(local)
    ropes = config["rope_parameters"]
    writer.add_rope_freq_base(ropes[_GLOBAL]["rope_theta"])
    writer.add_rope_freq_base_swa(ropes[_LOCAL]["rope_theta"])
    width = config["intermediate_size"]
    if config["use_double_wide_mlp"]:
        first = layers - config["num_kv_shared_layers"]
        writer.add_feed_forward_length([width * (1 + (i >= first)) for i in range(layers)])
    else:
        writer.add_feed_forward_length(width)
    if config["enable_moe_block"]:
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["top_k_experts"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
