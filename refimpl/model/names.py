"""Which tensors of a checkpoint make up which parameter of ours.

Two tables, one for each file format, written out name by name: nothing is guessed from shapes or
matched by patterns. A parameter of ours names its sources; several sources are joined along the
outputs (queries, keys and values; gate and up), and where files differ there are alternatives.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from refimpl.errors import CheckpointError
from refimpl.model.config import GemmaConfig

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


_Layer = dict[tuple[str, ...], Sources]


def hugging_face_sources(config: GemmaConfig) -> dict[Path, Sources]:
    """Names in a Hugging Face checkpoint, after the prefix of the text decoder."""
    attention, ffn = "self_attn.", "mlp."
    layer: _Layer = {
        ("norm_before_attention", "scale"): Sources.of("input_layernorm.weight"),
        ("attention", "query_key_value", "weight"): Sources.of(
            f"{attention}q_proj.weight", f"{attention}k_proj.weight", f"{attention}v_proj.weight"
        ),
        ("attention", "query_norm", "scale"): Sources.of(f"{attention}q_norm.weight"),
        ("attention", "key_norm", "scale"): Sources.of(f"{attention}k_norm.weight"),
        ("attention", "output", "weight"): Sources.of(f"{attention}o_proj.weight"),
        ("norm_after_attention", "scale"): Sources.of("post_attention_layernorm.weight"),
        ("norm_before_feed_forward", "scale"): Sources.of("pre_feedforward_layernorm.weight"),
        ("feed_forward", "gate_up", "weight"): Sources.of(
            f"{ffn}gate_proj.weight", f"{ffn}up_proj.weight"
        ),
        ("feed_forward", "down", "weight"): Sources.of(f"{ffn}down_proj.weight"),
        ("norm_after_feed_forward", "scale"): Sources.of("post_feedforward_layernorm.weight"),
    }
    if config.family == "gemma":
        # Gemma 1 took Llama's names, in which this one is the norm before the feed-forward.
        layer["norm_before_feed_forward", "scale"] = Sources.of("post_attention_layernorm.weight")
    top = {
        ("embedder", "table", "weight"): Sources.of("embed_tokens.weight"),
        ("embedder", "head", "weight"): Sources.of("lm_head.weight"),
        ("final_norm", "scale"): Sources.of("norm.weight"),
    }
    return top | _every_layer(layer, config, "layers.")


def gguf_sources(config: GemmaConfig) -> dict[Path, Sources]:
    """Names in a GGUF file."""
    layer: _Layer = {
        ("norm_before_attention", "scale"): Sources.of("attn_norm.weight"),
        ("attention", "query_key_value", "weight"): Sources(
            (("attn_q.weight", "attn_k.weight", "attn_v.weight"), ("attn_qkv.weight",))
        ),
        ("attention", "query_norm", "scale"): Sources.of("attn_q_norm.weight"),
        ("attention", "key_norm", "scale"): Sources.of("attn_k_norm.weight"),
        ("attention", "output", "weight"): Sources.of("attn_output.weight"),
        ("norm_after_attention", "scale"): Sources.of("post_attention_norm.weight"),
        ("norm_before_feed_forward", "scale"): Sources.of("ffn_norm.weight"),
        ("feed_forward", "gate_up", "weight"): Sources.of("ffn_gate.weight", "ffn_up.weight"),
        ("feed_forward", "down", "weight"): Sources.of("ffn_down.weight"),
        ("norm_after_feed_forward", "scale"): Sources.of("post_ffw_norm.weight"),
    }
    top = {
        ("embedder", "table", "weight"): Sources.of("token_embd.weight"),
        ("embedder", "head", "weight"): Sources.of("output.weight"),
        ("final_norm", "scale"): Sources.of("output_norm.weight"),
    }
    return top | _every_layer(layer, config, "blk.")


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
            return (config.num_heads * spec.head_width, key_width, key_width)
        case ("layers", int(layer), "feed_forward", "gate_up", "weight"):
            return (config.layers[layer].feed_forward_width,) * 2
    raise ValueError(f"nothing is joined into {path}")


def _every_layer(layer: _Layer, config: GemmaConfig, prefix: str) -> dict[Path, Sources]:
    return {
        ("layers", index, *path): Sources(
            tuple(
                tuple(f"{prefix}{index}.{name}" for name in names) for names in sources.alternatives
            )
        )
        for index in range(config.num_layers)
        for path, sources in layer.items()
    }
