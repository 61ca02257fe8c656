"""Which tensors of a checkpoint make up which parameter of ours.

Two tables, one for each file format, written out name by name: nothing is guessed from shapes or
matched by patterns. A parameter of ours names its sources; several sources are joined along the
outputs (queries, keys and values; gate and up), and where files differ there are alternatives.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from refimpl.errors import CheckpointError
from refimpl.model.config import GemmaConfig
from refimpl.model.layer_spec import LayerSpec

# The path of a parameter in the model, such as ("layers", 3, "attention", "output", "weight").
Path = tuple[Any, ...]

# Longest first, because the last is the beginning of the first.
TEXT_PREFIXES = ("model.language_model.", "language_model.model.", "model.")
HEAD_NAMES = ("lm_head.weight", "language_model.lm_head.weight")
# The head, as the tables below call it.
HEADS = ("lm_head.weight", "output.weight")
# Parts of multimodal checkpoints that a text decoder has no use for.
OTHER_PREFIXES = tuple(
    prefix + part
    for prefix in ("", "model.")
    for part in (
        "vision_tower.", "multi_modal_projector.", "audio_tower.", "embed_vision.", "embed_audio.",
        "vision_embedder.",
    )
)  # fmt: skip


@dataclass(frozen=True)
class Sources:
    """Where one parameter comes from: the first alternative that the file holds entirely."""

    alternatives: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, *names: str) -> "Sources":
        """These tensors and no alternative."""
        return cls((names,))


# Shapes that tensors must have, by name.
Shapes = Mapping[str, tuple[int, ...]]
_Layer = dict[tuple[str, ...], Sources]


def hugging_face_sources(config: GemmaConfig) -> dict[Path, Sources]:
    """Names in a Hugging Face checkpoint, after the prefix of the text decoder."""
    further = range(0 if config.altup is None else config.altup.streams - 1)
    top = {
        ("embedder", "table", "weight"): Sources.of("embed_tokens.weight"),
        ("embedder", "head", "weight"): Sources.of("lm_head.weight"),
        ("final_norm", "scale"): Sources.of("norm.weight"),
        ("per_layer_embedder", "table", "weight"): Sources.of("embed_tokens_per_layer.weight"),
        ("per_layer_embedder", "projection", "weight"): Sources.of(
            "per_layer_model_projection.weight"
        ),
        ("per_layer_embedder", "norm", "scale"): Sources.of("per_layer_projection_norm.weight"),
        ("streams", "into", "weight"): Sources.of(
            *(f"altup_projections.{i}.weight" for i in further)
        ),
        ("streams", "back", "weight"): Sources.of(
            *(f"altup_unembed_projections.{i}.weight" for i in further)
        ),
    }
    return top | _every_layer(lambda spec: _hugging_face_layer(config, spec), config, "layers.")


def _hugging_face_layer(config: GemmaConfig, spec: LayerSpec) -> _Layer:
    layer: _Layer = {
        ("norm_before_attention", "scale"): Sources.of("input_layernorm.weight"),
        ("attention", "query_key_value", "weight"): Sources.of(
            *(f"self_attn.{part}_proj.weight" for part in _projections(spec))
        ),
        ("attention", "query_norm", "scale"): Sources.of("self_attn.q_norm.weight"),
        ("attention", "key_norm", "scale"): Sources.of("self_attn.k_norm.weight"),
        ("attention", "output", "weight"): Sources.of("self_attn.o_proj.weight"),
        ("norm_after_attention", "scale"): Sources.of("post_attention_layernorm.weight"),
        ("norm_before_feed_forward", "scale"): Sources.of("pre_feedforward_layernorm.weight"),
        ("feed_forward", "gate_up", "weight"): Sources.of(
            "mlp.gate_proj.weight", "mlp.up_proj.weight"
        ),
        ("feed_forward", "down", "weight"): Sources.of("mlp.down_proj.weight"),
        ("norm_after_feed_forward", "scale"): Sources.of("post_feedforward_layernorm.weight"),
        ("scalar", "factor"): Sources.of("layer_scalar"),
        ("per_layer_input", "gate", "weight"): Sources.of("per_layer_input_gate.weight"),
        ("per_layer_input", "output", "weight"): Sources.of("per_layer_projection.weight"),
        ("per_layer_input", "norm", "scale"): Sources.of("post_per_layer_input_norm.weight"),
        ("experts", "router", "weight"): Sources.of("router.proj.weight"),
        ("experts", "router_scale"): Sources.of("router.scale"),
        ("experts", "expert_scale"): Sources.of("router.per_expert_scale"),
        ("experts", "gate_up", "weight"): Sources.of("experts.gate_up_proj"),
        ("experts", "down", "weight"): Sources.of("experts.down_proj"),
        ("experts", "norm_before", "scale"): Sources.of("pre_feedforward_layernorm_2.weight"),
        ("experts", "norm_after", "scale"): Sources.of("post_feedforward_layernorm_2.weight"),
        ("experts", "norm_after_dense", "scale"): Sources.of("post_feedforward_layernorm_1.weight"),
        ("streams", "router_norm", "scale"): Sources.of("altup.router_norm.weight"),
        ("streams", "router", "weight"): Sources.of("altup.modality_router.weight"),
        ("streams", "prediction", "weight"): Sources.of("altup.prediction_coefs.weight"),
        ("streams", "correction", "weight"): Sources.of("altup.correction_coefs.weight"),
        ("streams", "output_scale"): Sources.of("altup.correct_output_scale"),
        ("laurel", "left", "weight"): Sources.of("laurel.linear_left.weight"),
        ("laurel", "right", "weight"): Sources.of("laurel.linear_right.weight"),
        ("laurel", "norm", "scale"): Sources.of("laurel.post_laurel_norm.weight"),
    }
    if config.family == "gemma":
        # Gemma 1 took Llama's names, in which this one is the norm before the feed-forward.
        layer["norm_before_feed_forward", "scale"] = Sources.of("post_attention_layernorm.weight")
    return layer


def gguf_sources(config: GemmaConfig) -> dict[Path, Sources]:
    """Names in a GGUF file."""
    top = {
        ("embedder", "table", "weight"): Sources.of("token_embd.weight"),
        ("embedder", "head", "weight"): Sources.of("output.weight"),
        ("final_norm", "scale"): Sources.of("output_norm.weight"),
        ("per_layer_embedder", "table", "weight"): Sources.of("per_layer_token_embd.weight"),
        ("per_layer_embedder", "projection", "weight"): Sources.of("per_layer_model_proj.weight"),
        ("per_layer_embedder", "norm", "scale"): Sources.of("per_layer_proj_norm.weight"),
        ("streams", "into", "weight"): Sources.of("altup_proj.weight"),
        ("streams", "back", "weight"): Sources.of("altup_unembd_proj.weight"),
    }
    return top | _every_layer(_gguf_layer, config, "blk.")


def _gguf_layer(spec: LayerSpec) -> _Layer:
    separate = tuple(f"attn_{part}.weight" for part in _projections(spec))
    layer: _Layer = {
        ("norm_before_attention", "scale"): Sources.of("attn_norm.weight"),
        ("attention", "query_key_value", "weight"): Sources((separate, ("attn_qkv.weight",))),
        ("attention", "query_norm", "scale"): Sources.of("attn_q_norm.weight"),
        ("attention", "key_norm", "scale"): Sources.of("attn_k_norm.weight"),
        ("attention", "output", "weight"): Sources.of("attn_output.weight"),
        ("norm_after_attention", "scale"): Sources.of("post_attention_norm.weight"),
        ("norm_before_feed_forward", "scale"): Sources.of("ffn_norm.weight"),
        ("feed_forward", "gate_up", "weight"): Sources.of("ffn_gate.weight", "ffn_up.weight"),
        ("feed_forward", "down", "weight"): Sources.of("ffn_down.weight"),
        ("norm_after_feed_forward", "scale"): Sources.of("post_ffw_norm.weight"),
        ("scalar", "factor"): Sources.of("layer_output_scale.weight"),
        ("per_layer_input", "gate", "weight"): Sources.of("inp_gate.weight"),
        ("per_layer_input", "output", "weight"): Sources.of("proj.weight"),
        ("per_layer_input", "norm", "scale"): Sources.of("post_norm.weight"),
        ("experts", "router", "weight"): Sources.of("ffn_gate_inp.weight"),
        ("experts", "router_scale"): Sources.of("ffn_gate_inp.scale"),
        ("experts", "expert_scale"): Sources.of("ffn_down_exps.scale"),
        ("experts", "gate_up", "weight"): Sources(
            (("ffn_gate_up_exps.weight",), ("ffn_gate_exps.weight", "ffn_up_exps.weight"))
        ),
        ("experts", "down", "weight"): Sources.of("ffn_down_exps.weight"),
        ("experts", "norm_before", "scale"): Sources.of("pre_ffw_norm_2.weight"),
        ("experts", "norm_after", "scale"): Sources.of("post_ffw_norm_2.weight"),
        ("experts", "norm_after_dense", "scale"): Sources.of("post_ffw_norm_1.weight"),
        ("streams", "router_norm", "scale"): Sources.of("altup_router_norm.weight"),
        ("streams", "router", "weight"): Sources.of("altup_router.weight"),
        ("streams", "prediction", "weight"): Sources.of("altup_predict_coef.weight"),
        ("streams", "correction", "weight"): Sources.of("altup_correct_coef.weight"),
        ("streams", "output_scale"): Sources.of("altup_correct_scale.weight"),
        ("laurel", "left", "weight"): Sources.of("laurel_l.weight"),
        ("laurel", "right", "weight"): Sources.of("laurel_r.weight"),
        ("laurel", "norm", "scale"): Sources.of("laurel_post_norm.weight"),
    }
    return layer


def hugging_face_unread(config: GemmaConfig) -> tuple[Shapes, ...]:
    """Tensors that a Hugging Face checkpoint may hold and that no layer reads, a layer each.

    Released files keep the keys and values of layers that read another layer's; files that were
    saved again do not.
    """
    return _unread(
        config,
        lambda i, part: f"layers.{i}.self_attn.{part}_proj.weight",
        lambda i: f"layers.{i}.self_attn.k_norm.weight",
    )


def gguf_unread(config: GemmaConfig) -> tuple[Shapes, ...]:
    """The same for a GGUF file."""
    return _unread(
        config,
        lambda i, part: f"blk.{i}.attn_{part}.weight",
        lambda i: f"blk.{i}.attn_k_norm.weight",
    )


def _unread(
    config: GemmaConfig, projection: Callable[[int, str], str], norm: Callable[[int], str]
) -> tuple[Shapes, ...]:
    found = list[Shapes]()
    for index, spec in enumerate(config.layers):
        if spec.donor is None:
            continue
        shape = (spec.num_kv_heads * spec.head_width, config.width)
        parts = _projections(replace(spec, donor=None))[1:]
        shapes: dict[str, tuple[int, ...]] = {projection(index, part): shape for part in parts}
        if config.has_query_key_norm:
            shapes[norm(index)] = (spec.head_width,)
        found.append(shapes)
    return tuple(found)


def strip_prefix(names: Iterable[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Names of the text decoder without their prefix, each with its full name; and the others.

    >>> strip_prefix(["model.norm.weight", "vision_tower.x", "lm_head.weight"])
    ({'norm.weight': 'model.norm.weight', 'lm_head.weight': 'lm_head.weight'}, ('vision_tower.x',))

    Raises:
        CheckpointError: two names mean the same tensor, so that one of them would go unread.
    """
    ours: dict[str, str] = {}
    others: list[str] = []
    double: list[str] = []
    for name in names:
        if name.startswith(OTHER_PREFIXES):
            others.append(name)
            continue
        prefix = next((p for p in TEXT_PREFIXES if name.startswith(p)), "")
        bare = "lm_head.weight" if name in HEAD_NAMES else name.removeprefix(prefix)
        if bare in ours:
            double.append(f"{ours[bare]} and {name}")
        ours[bare] = name
    if double:
        raise CheckpointError(
            f"two tensors for one parameter: {', '.join(double)}; keep one text decoder in the file"
        )
    return ours, tuple(others)


def joined_outputs(config: GemmaConfig, path: Path) -> tuple[int, ...]:
    """How many outputs each tensor has of those that are joined into the parameter at `path`.

    Raises:
        ValueError: the parameter is one tensor everywhere.
    """
    match path:
        case ("layers", int(layer), "attention", "query_key_value", "weight"):
            spec = config.layers[layer]
            key_width = spec.num_kv_heads * spec.head_width
            further = len(_projections(spec)) - 1
            return (config.num_heads * spec.head_width, *[key_width] * further)
        case ("layers", int(layer), "feed_forward", "gate_up", "weight"):
            return (config.layers[layer].feed_forward_width,) * 2
        case ("layers", int(), "experts", "gate_up", "weight") if config.experts is not None:
            return (config.experts.count * config.experts.width,) * 2
        case ("streams", "into" | "back", "weight") if config.altup is not None:
            return (config.width,) * (config.altup.streams - 1)
    raise ValueError(f"nothing is joined into {path}")


def stack_height(config: GemmaConfig, path: Path) -> int:
    """How many matrices a file may hold as one stack for the parameter at `path`, else 1."""
    match path:
        case ("layers", int(), "experts", "gate_up" | "down", "weight") if config.experts:
            return config.experts.count
        case ("streams", "into" | "back", "weight") if config.altup:
            return config.altup.streams - 1
    return 1


def _projections(spec: LayerSpec) -> str:
    """Which of queries, keys and values a layer projects."""
    if spec.donor is not None:
        return "q"
    return "qk" if spec.values_are_keys else "qkv"


def _every_layer(
    table: Callable[[LayerSpec], _Layer], config: GemmaConfig, prefix: str
) -> dict[Path, Sources]:
    return {
        ("layers", index, *path): Sources(
            tuple(
                tuple(f"{prefix}{index}.{name}" for name in names) for names in sources.alternatives
            )
        )
        for index, spec in enumerate(config.layers)
        for path, sources in table(spec).items()
    }
