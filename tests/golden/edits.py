# pyright: reportMissingImports=false
"""Gemma 3n and Gemma 4, loaded and then made wrong in one way each.

Owns edits of a loaded transformers model, as mistakes.py owns those of a configuration; they serve
the same purpose.
"""

from typing import Any

import torch
from mistakes import Change


def edits(name: str) -> dict[str, Change]:
    """Edits of the loaded model that the "long" case has to tell from the right one."""
    if name not in ("gemma3n", "gemma4", "gemma4_e2b", "gemma4_moe"):
        return {}
    found: dict[str, Change] = {"values not normalised": every_layer(drop_value_norm)}
    if name != "gemma3n":
        found["no layer scalar"] = every_layer(lambda layer: layer.layer_scalar.fill_(1))
        found["layer scalar on the last branch alone"] = every_layer(scale_last_branch)
        found["first dimensions of a global head rotated"] = every_layer(rotate_first_dimensions)
    if name in ("gemma4", "gemma4_moe"):
        found["values are normalised keys"] = every_layer(take_value_after_key_norm)
    if name == "gemma4_moe":
        found |= edits_of_experts()
    if name in ("gemma4_e2b", "gemma3n"):
        found |= edits_of_per_layer_inputs()
        found["local keys and values of an earlier layer"] = move_local_donor
    if name == "gemma3n":
        found |= edits_of_streams()
    return found


def every_layer(edit: Change) -> Change:
    """An edit of a model from an edit of one layer."""

    def change(model: Any) -> None:
        for layer in model.model.layers:
            edit(layer)

    return change


def drop_value_norm(layer: Any) -> None:
    """Values as the projection gives them."""
    if hasattr(layer.self_attn, "v_norm"):
        layer.self_attn.v_norm = torch.nn.Identity()


def take_value_after_key_norm(layer: Any) -> None:
    """Where keys are values, too: taken behind the keys' norm and not in front of it."""
    attention = layer.self_attn
    if attention.v_proj is None:
        attention.v_norm = torch.nn.Sequential(attention.k_norm, attention.v_norm)


def scale_last_branch(layer: Any) -> None:
    """The layer scalar moves from the whole stream to the branch that is added last."""
    last = "post_per_layer_input_norm"
    norm = getattr(layer, last if hasattr(layer, last) else "post_feedforward_layernorm")
    norm.weight.mul_(layer.layer_scalar)
    layer.layer_scalar.fill_(1)


def rotate_first_dimensions(layer: Any) -> None:
    """Rotates dimension i with i + r/2, i < r/2, for r rotated ones; right is i + half the head."""
    attention = layer.self_attn
    if attention.layer_type != "full_attention":
        return
    width = attention.head_dim
    pairs = width // 8  # a quarter of the head is rotated
    order = torch.arange(width)
    order[pairs : 2 * pairs] = torch.arange(width // 2, width // 2 + pairs)
    order[width // 2 : width // 2 + pairs] = torch.arange(pairs, 2 * pairs)
    for norm in (attention.q_norm, getattr(attention, "k_norm", None)):
        if norm is not None:
            norm.register_forward_hook(lambda _, args, output: output[..., order])


def move_local_donor(model: Any) -> None:
    """Local layers share what the last local layer but one made."""
    local = [
        layer.self_attn
        for layer in model.model.layers
        if layer.self_attn.is_sliding and not layer.self_attn.is_kv_shared_layer
    ]
    local[-2].store_full_length_kv, local[-1].store_full_length_kv = True, False


def edits_of_experts() -> dict[str, Change]:
    """What goes wrong in routers and experts.

    Weights of experts that do not sum to 1 are not among it: the norm behind the experts undoes
    any factor that all of a token's weights have in common.
    """

    def drop_scale(layer: Any) -> None:
        layer.router.scale.data.fill_(1)

    def drop_expert_scale(layer: Any) -> None:
        layer.router.per_expert_scale.data.fill_(1)

    def normalise_twice(layer: Any) -> None:
        norm = layer.pre_feedforward_layernorm_2
        layer.router.register_forward_pre_hook(lambda _, args: (norm(args[0]),))

    def swap_gate_and_up(layer: Any) -> None:
        fused = layer.experts.gate_up_proj
        fused.copy_(fused.roll(fused.shape[1] // 2, dims=1))

    def swap_branch_norms(layer: Any) -> None:
        one, two = layer.post_feedforward_layernorm_1, layer.post_feedforward_layernorm_2
        layer.post_feedforward_layernorm_1, layer.post_feedforward_layernorm_2 = two, one

    def share_input_norm(layer: Any) -> None:
        layer.pre_feedforward_layernorm_2 = layer.pre_feedforward_layernorm

    def drop_dense_branch(layer: Any) -> None:
        layer.post_feedforward_layernorm_1.weight.zero_()

    return {
        "router input not scaled": every_layer(drop_scale),
        "experts not scaled": every_layer(drop_expert_scale),
        "router reads the normalised stream": every_layer(normalise_twice),
        "up rows of experts in front of gate rows": every_layer(swap_gate_and_up),
        "norms of the two branches swapped": every_layer(swap_branch_norms),
        "experts read the dense branch's norm": every_layer(share_input_norm),
        "no dense branch": every_layer(drop_dense_branch),
    }


def edits_of_per_layer_inputs() -> dict[str, Change]:
    """What goes wrong in per-layer embeddings."""

    def drop_scale(model: Any) -> None:
        model.model.embed_tokens_per_layer.embed_scale.fill_(1)

    def drop_projection(model: Any) -> None:
        model.model.per_layer_projection_norm.weight.zero_()

    def drop_norm_weight(model: Any) -> None:
        model.model.per_layer_projection_norm.weight.fill_(1)

    def add_nothing(layer: Any) -> None:
        layer.post_per_layer_input_norm.weight.zero_()

    def interleave(model: Any) -> None:
        table = model.model.embed_tokens_per_layer.weight
        width = model.config.hidden_size_per_layer_input
        rows = table.view(len(table), width, -1)
        table.copy_(rows.transpose(1, 2).reshape(table.shape))

    return {
        "per-layer embedding not scaled": drop_scale,
        "per-layer embedding not projected from the stream": drop_projection,
        "per-layer norm without its weight": drop_norm_weight,
        "per-layer embedding by channel, then by layer": interleave,
        "no per-layer input": every_layer(add_nothing),
    }


def edits_of_streams() -> dict[str, Change]:
    """What goes wrong in alternating updates and in the low-rank residual."""

    def transpose_coefficients(layer: Any) -> None:
        weight = layer.altup.prediction_coefs.weight
        weight.copy_(weight.view(4, 4, 4).transpose(0, 1).reshape(16, 4))

    def drop_router_scale(layer: Any) -> None:
        layer.altup.router_input_scale.fill_(1)

    def drop_correction(layer: Any) -> None:
        layer.altup.correction_coefs.weight.zero_()

    def drop_low_rank(layer: Any) -> None:
        layer.laurel.post_laurel_norm.weight.zero_()

    def increment_active_stream(layer: Any) -> None:
        layer.register_forward_hook(lambda _, args, streams: streams + added(layer, args, streams))

    def added(layer: Any, args: Any, streams: torch.Tensor) -> torch.Tensor:
        branch = layer.altup.scale_corrected_output(streams[0])
        branch = layer.act_fn(layer.per_layer_input_gate(branch)) * args[2]
        branch = layer.post_per_layer_input_norm(layer.per_layer_projection(branch))
        return torch.stack([branch, *torch.zeros_like(streams[1:])])

    def one_projection(model: Any) -> None:
        for projections in (model.model.altup_projections, model.model.altup_unembed_projections):
            for other in projections[1:]:
                other.weight.copy_(projections[0].weight)

    return {
        "coefficients of prediction not transposed": every_layer(transpose_coefficients),
        "input of the streams' router not scaled": every_layer(drop_router_scale),
        "no learned correction": every_layer(drop_correction),
        "no low-rank residual": every_layer(drop_low_rank),
        "per-layer input added to the active stream": every_layer(increment_active_stream),
        "one projection for all streams": one_projection,
    }
