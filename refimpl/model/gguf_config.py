"""GGUF metadata to a `GemmaConfig`, with what GGUF does not store filled in.

Not stored, and known from the architecture: that Gemma 2 alternates and Gemma 3 has a global layer
every six; the score scale (llama.cpp takes width / heads for Gemma 2 with 46 layers and Gemma 3
with 62, the two 27B, else the head width, and 1 since Gemma 3n); the embedding scale; the tie of
head and embedding, which is whether the file holds `output.weight`. Since Gemma 3n some numbers are
nowhere but in the shapes of tensors. Norm scales are stored as they multiply, one already added.

Which keys there are is `gguf_keys.py`'s business, with the sources.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from refimpl.errors import ConfigError
from refimpl.model.config import GemmaConfig, periodic_kinds
from refimpl.model.gguf_keys import ARCHITECTURES, faults, stored_values
from refimpl.model.gguf_newer import Shapes, gemma3n_parts, gemma4_parts
from refimpl.model.layer_spec import RopeSpec
from refimpl.model.value_kinds import INTEGER, kind_faults, optional_float

_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}
_TOKEN_IDS = ("padding_token_id", "bos_token_id", "eos_token_id", "eot_token_id", "eom_token_id")
_NO_SHAPES: Shapes = MappingProxyType({})


def from_gguf(
    metadata: Mapping[str, Any],
    *,
    vocab_size: int,
    has_tied_head: bool = True,
    shapes: Shapes = _NO_SHAPES,
    rope_divisors: Sequence[float] | None = None,
) -> GemmaConfig:
    """The architecture that a GGUF file describes.

    `eos_ids` are those that these keys name. A Gemma 4 that chats ends its turns with other pieces,
    too, which the tokenizer knows by their names.

    Args:
        metadata: the file's key-value pairs.
        vocab_size: rows of its `token_embd.weight`.
        has_tied_head: whether it lacks `output.weight`.
        shapes: of its tensors, row-major, by name; needed since Gemma 3n.
        rope_divisors: the numbers in its `rope_freqs.weight`, where it holds one; needed for Gemma
            4, whose global layers do not rotate the pairs with large ones ("p-RoPE").

    Raises:
        ConfigError: not an architecture we carry, or keys that are missing, not understood or of a
            value that does not fit; all are listed at once.
    """
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ConfigError(
            f"general.architecture must be one of {', '.join(ARCHITECTURES)}, "
            f"got {name!r:.80}; this project runs Gemma text decoders only"
        )
    architecture, stored = ARCHITECTURES[name], stored_values(metadata, name)
    found = [*faults(stored, architecture), *_token_id_faults(metadata)]
    if found:
        raise ConfigError(f"cannot carry this GGUF file ({name}.*): " + "; ".join(found))

    values = {**architecture.defaults, **stored}
    local_rope, global_rope = _ropes(values, is_one=name in ("gemma", "gemma2"))
    common: dict[str, Any] = {
        "family": architecture.family,
        "vocab_size": vocab_size,
        **_sizes(values),
        "local_rope": local_rope,
        "global_rope": global_rope,
        "attention_cap": optional_float(values.get("attn_logit_softcapping")),
        "final_cap": optional_float(values.get("final_logit_softcapping")),
        "norm_offset": 0.0,
        # Stored as float32, whose 1e-6 is 9.99999997e-07 in float64.
        "norm_epsilon": float(f"{values['attention.layer_norm_rms_epsilon']:.6g}"),
        "has_tied_head": has_tied_head,
        "pad_id": metadata.get("tokenizer.ggml.padding_token_id", 0),
        "bos_id": metadata.get("tokenizer.ggml.bos_token_id", 2),
        "eos_ids": _eos_ids(metadata),
    }
    if name == "gemma3n":
        parts = gemma3n_parts(values, shapes, vocab_size)
    elif name == "gemma4":
        parts = gemma4_parts(
            values, shapes, vocab_size, rope=global_rope, rope_divisors=rope_divisors
        )
    else:
        parts = _older_parts(values, name)
    return GemmaConfig(**{**common, **parts})


def _sizes(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those that all architectures name alike."""
    width, num_heads = values["embedding_length"], values["attention.head_count"]
    num_kv_heads, head_width = values["attention.head_count_kv"], values["attention.key_length"]
    return {
        "width": width,
        "num_heads": num_heads,
        # No heads is refused with the other contradictions, not by a division.
        "head_width": width // max(num_heads, 1) if head_width is None else head_width,
        "num_kv_heads": num_heads if num_kv_heads is None else num_kv_heads,
        "feed_forward_width": values["feed_forward_length"],
        "window": values.get("attention.sliding_window"),
        "context_length": values["context_length"],
    }


def _older_parts(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What Gemma 1 to 3 do not store."""
    num_layers, width = values["block_count"], values["embedding_length"]
    is_27b = num_layers == _LAYERS_OF_27B.get(name)
    return {
        "layer_kinds": periodic_kinds(
            num_layers, period=values["attention.sliding_window_pattern"]
        ),
        "query_scalar": width / max(values["attention.head_count"], 1)
        if is_27b
        else float(values["attention.key_length"]),
        "has_query_key_norm": name == "gemma3",
        "has_post_norms": name != "gemma",
    }


def _token_id_faults(metadata: Mapping[str, Any]) -> list[str]:
    ids = {f"tokenizer.ggml.{name}": INTEGER for name in _TOKEN_IDS}
    return kind_faults(metadata, ids)


def _ropes(values: Mapping[str, Any], *, is_one: bool) -> tuple[RopeSpec, RopeSpec]:
    """Rotary embedding of local and of global layers."""
    factor = values["rope.scaling.factor"] if values["rope.scaling.type"] == "linear" else 1.0
    global_rope = RopeSpec(theta=float(values["rope.freq_base"]), factor=float(factor))
    local_theta = values.get("rope.freq_base_swa")
    return (
        RopeSpec(
            theta=global_rope.theta if local_theta is None else float(local_theta),
            # Since Gemma 3 global layers only are stretched; local ones never see that far.
            factor=global_rope.factor if is_one else 1.0,
        ),
        global_rope,
    )


def _eos_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """Every id that ends a text, the end of a turn included where the file names it."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    ids = [metadata.get(f"tokenizer.ggml.{key}") for key in keys]
    return tuple(dict.fromkeys(i for i in ids if i is not None)) or (1,)
