"""Which tensors a Gemma 3n or Gemma 4 text model has, and how large their numbers are.

Owns the plan of what is drawn, in what order. Names and shapes are those of the released files;
scales are chosen so that each part matters: layer scalars far from 1, routers that are sure of
their choice, streams that differ, and logits of about 5, so that float32 can meet absolute bounds.
Norm weights of both generations are factors as they stand, without Gemma 3's "1 +".
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from refimpl_weights.synthetic_drawing import Drawn, matrix, norm

Config = Mapping[str, Any]

# What a layer that takes keys and values from an earlier one has of its own and does not use.
UNUSED = ("self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.k_norm.weight")


def decoder(config: Config) -> Iterator[Drawn]:
    """The text model's tensors without prefix, in the order in which they are drawn."""
    d, layers = config["hidden_size"], config["num_hidden_layers"]
    yield matrix("embed_tokens.weight", config["vocab_size"], d)
    if ple := config.get("hidden_size_per_layer_input"):
        yield matrix("per_layer_model_projection.weight", layers * ple, d)
        yield norm("per_layer_projection_norm.weight", ple, centre=1.0)
        # All layers' parts of an id's row lie one behind the other. Times sqrt(ple): about 1.
        shape = (config["vocab_size_per_layer_input"], layers * ple)
        yield Drawn("embed_tokens_per_layer.weight", shape, 0.0, math.sqrt(3.0 / ple))
    for stream in range(config.get("altup_num_inputs", 1) - 1):
        yield matrix(f"altup_projections.{stream}.weight", d, d)
        yield matrix(f"altup_unembed_projections.{stream}.weight", d, d)
    for layer in range(layers):
        for drawn in _layer(config, layer):
            yield drawn._replace(name=f"layers.{layer}.{drawn.name}")
    # Factors of both signs: the head is the embedding again, and with a plain final norm the
    # likeliest next token would be the last one over and over.
    yield norm("norm.weight", d, spread=2.0)


def unused(config: Config) -> set[str]:
    """Names of the tensors of key/value sharing layers that released files hold for nothing."""
    layers = config["num_hidden_layers"]
    shared = range(layers - config["num_kv_shared_layers"], layers)
    return {f"layers.{layer}.{name}" for layer in shared for name in UNUSED}


def foreign(config: Config) -> Iterator[Drawn]:
    """A few tensors of the other senses, behind "model.": a text model must pass over them."""
    width = config["text_config"]["hidden_size"]
    if config["model_type"] == "gemma3n":
        stem = "vision_tower.timm_model.conv_stem."
        yield Drawn(stem + "conv.weight", (8, 3, 3, 3), 0.0, 0.3)
        yield norm(stem + "bn.weight", 8, centre=1.0)
        yield matrix("audio_tower.subsample_conv_projection.input_proj_linear.weight", 8, 16)
        for sense in ("vision", "audio"):
            yield matrix(f"embed_{sense}.embedding.weight", 4, 8)
            yield norm(f"embed_{sense}.hard_embedding_norm.weight", 8, centre=1.0)
            yield norm(f"embed_{sense}.soft_embedding_norm.weight", 8, centre=1.0)
            yield matrix(f"embed_{sense}.embedding_projection.weight", width, 8)
    elif config["model_type"] == "gemma4_unified":
        yield norm("vision_embedder.patch_ln1.weight", 12, centre=1.0)
        yield matrix("vision_embedder.patch_dense.weight", 8, 12)
        yield matrix("embed_vision.embedding_projection.weight", width, 8)
        yield matrix("embed_audio.embedding_projection.weight", width, 8)
    else:
        yield matrix("vision_tower.patch_embedder.input_proj.weight", 8, 12)
        yield matrix("embed_vision.embedding_projection.weight", width, 8)
        if config.get("audio_config") is not None:
            yield Drawn("audio_tower.layers.0.self_attn.q_proj.input_min", (), -8.0, 1.0)
            yield matrix("audio_tower.layers.0.self_attn.q_proj.linear.weight", 8, 8)
            yield matrix("embed_audio.embedding_projection.weight", width, 8)


def _layer(config: Config, layer: int) -> Iterator[Drawn]:
    d = config["hidden_size"]
    # What a layer adds stays small beside the stream, or rounding errors grow with every layer:
    # less from each branch where there are three, and less of the normed input where Gemma 3n's
    # low-rank residual adds it to the stream.
    ple = config.get("hidden_size_per_layer_input")
    branch = 0.25 if ple else 0.35
    yield norm("input_layernorm.weight", d, centre=0.7 if "laurel_rank" in config else 1.0)
    yield from _attention(config, layer)
    yield norm("post_attention_layernorm.weight", d, centre=branch)
    yield norm("pre_feedforward_layernorm.weight", d, centre=1.0)
    yield from _feed_forward(config, layer)
    yield norm("post_feedforward_layernorm.weight", d, centre=branch)
    if config.get("enable_moe_block"):
        yield from _experts(config)
    if ple:
        yield matrix("per_layer_input_gate.weight", ple, d, gain=0.8)
        yield matrix("per_layer_projection.weight", d, ple)
        yield norm("post_per_layer_input_norm.weight", d, centre=branch)
    if "altup_num_inputs" in config:
        yield from _altup(config)
    else:
        yield Drawn("layer_scalar", (1,), 0.9, 0.15)


def _attention(config: Config, layer: int) -> Iterator[Drawn]:
    """Scores are not divided by sqrt(head width); the weights of the two norms do it instead."""
    d, n = config["hidden_size"], config["num_attention_heads"]
    k, h = key_value_shape(config, layer)
    is_global = config["layer_types"][layer] == "full_attention"
    yield matrix("self_attn.q_proj.weight", n * h, d)
    yield matrix("self_attn.k_proj.weight", k * h, d)
    if not (is_global and config.get("attention_k_eq_v")):
        yield matrix("self_attn.v_proj.weight", k * h, d)
    yield matrix("self_attn.o_proj.weight", d, n * h)
    yield norm("self_attn.q_norm.weight", h, centre=1.0)
    yield norm("self_attn.k_norm.weight", h, centre=0.3, spread=0.1)


def key_value_shape(config: Config, layer: int) -> tuple[int, int]:
    """Key/value heads and head width of a layer, in either spelling of global layers' own ones."""
    sizes = (config["num_key_value_heads"], config["head_dim"])
    if "per_layer_config" in config:
        own = config["per_layer_config"].get(str(layer), {})
        return own.get("num_key_value_heads", sizes[0]), own.get("head_dim", sizes[1])
    if config["layer_types"][layer] == "full_attention" and "global_head_dim" in config:
        heads = config["num_global_key_value_heads"]
        return sizes[0] if heads is None else heads, config["global_head_dim"]
    return sizes


def _feed_forward(config: Config, layer: int) -> Iterator[Drawn]:
    d, f = config["hidden_size"], config["intermediate_size"]
    f = f[layer] if isinstance(f, list) else f
    sharing = layer >= config["num_hidden_layers"] - config["num_kv_shared_layers"]
    if config.get("use_double_wide_mlp") and sharing:
        f *= 2
    yield matrix("mlp.gate_proj.weight", f, d, gain=1.2)
    yield matrix("mlp.up_proj.weight", f, d)
    yield matrix("mlp.down_proj.weight", d, f)


def _experts(config: Config) -> Iterator[Drawn]:
    """The router, the experts (gate rows in front of up rows) and the norms around them."""
    d, f, experts = (config[key] for key in ("hidden_size", "moe_intermediate_size", "num_experts"))
    # The router divides its normed input by sqrt(d). With logits this far apart, no token of the
    # golden cases is torn between two experts.
    yield matrix("router.proj.weight", experts, d, gain=3.0 * math.sqrt(d))
    yield norm("router.scale", d, centre=1.0, spread=0.6)
    yield norm("router.per_expert_scale", experts, centre=1.0)
    yield Drawn("experts.gate_up_proj", (experts, 2 * f, d), 0.0, 1.2 * math.sqrt(3.0 / d))
    yield Drawn("experts.down_proj", (experts, d, f), 0.0, math.sqrt(3.0 / f))
    yield norm("post_feedforward_layernorm_1.weight", d, centre=0.35)
    yield norm("post_feedforward_layernorm_2.weight", d, centre=0.35)
    yield norm("pre_feedforward_layernorm_2.weight", d, centre=1.0)


def _altup(config: Config) -> Iterator[Drawn]:
    """Alternating updates of the streams, and the low-rank residual beside attention."""
    d, streams, rank = (config[key] for key in ("hidden_size", "altup_num_inputs", "laurel_rank"))
    yield norm("altup.correct_output_scale", d, centre=0.8)
    yield matrix("altup.correction_coefs.weight", streams, streams, gain=0.3)
    yield matrix("altup.prediction_coefs.weight", streams**2, streams, gain=0.15)
    # The router's input is divided by d; its tanh shall bend.
    yield matrix("altup.modality_router.weight", streams, d, gain=0.8 * d)
    yield norm("altup.router_norm.weight", d, centre=1.0)
    yield matrix("laurel.linear_left.weight", rank, d)
    yield matrix("laurel.linear_right.weight", d, rank)
    yield norm("laurel.post_laurel_norm.weight", d, centre=0.25)
