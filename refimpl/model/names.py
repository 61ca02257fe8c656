"""Which tensors of a checkpoint make up which parameter of ours.

Two tables, one for each file format, written out name by name: nothing is guessed from shapes or
matched by patterns. A parameter of ours names its sources; several sources are joined along the
outputs (queries, keys and values; gate and up), and where files differ there are alternatives.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from refimpl.model.config import GemmaConfig

# The path of a parameter in the model, such as ("layers", 3, "attention", "output", "weight").
Path = tuple[Any, ...]

# Longest first, because the last is the beginning of the first.
TEXT_PREFIXES = ("model.language_model.", "language_model.model.", "model.")
HEAD_NAMES = ("lm_head.weight", "language_model.lm_head.weight", "output.weight")
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
    """
    ours: dict[str, str] = {}
    others: list[str] = []
    for name in names:
        if name.startswith(OTHER_PREFIXES):
            others.append(name)
        elif name in HEAD_NAMES:
            ours["lm_head.weight"] = name
        else:
            prefix = next((p for p in TEXT_PREFIXES if name.startswith(p)), "")
            ours[name.removeprefix(prefix)] = name
    return ours, tuple(others)


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
