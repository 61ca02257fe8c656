"""GGUF metadata to a `GemmaConfig`, with what GGUF does not store filled in.

Not stored, and known from the architecture: that Gemma 2 alternates and Gemma 3 has a global layer
every six; the score scale (llama.cpp takes width / heads for Gemma 2 with 46 layers and Gemma 3
with 62, the two 27B, else the head width); the embedding scale; the tie of head and embedding,
which is whether the file holds `output.weight`. Norm scales of these families are stored as they
multiply, one already added.

Sources: llama.cpp `gguf-py/gguf/constants.py`, `conversion/gemma.py`, `src/llama-model.cpp`,
`src/models/gemma*.cpp`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from refimpl.errors import ConfigError
from refimpl.model.config import GemmaConfig, periodic_kinds
from refimpl.model.layer_spec import RopeSpec
from refimpl.model.value_kinds import INTEGER, NUMBER, TEXT, Kind, kind_faults, optional_float

_FAMILIES = {"gemma": "gemma", "gemma2": "gemma2", "gemma3": "gemma3_text"}
_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}

_COMMON: dict[str, Kind] = {
    "context_length": INTEGER,
    "embedding_length": INTEGER,
    "block_count": INTEGER,
    "feed_forward_length": INTEGER,
    "attention.head_count": INTEGER,
    "attention.head_count_kv": INTEGER,
    "attention.layer_norm_rms_epsilon": NUMBER,
    "attention.key_length": INTEGER,
    "attention.value_length": INTEGER,
    "rope.dimension_count": INTEGER,
    "rope.freq_base": NUMBER,
    "rope.scaling.type": TEXT,
    "rope.scaling.factor": NUMBER,
}
_WITH_LOCAL_LAYERS: dict[str, Kind] = {
    **_COMMON,
    "attention.sliding_window": INTEGER,
    "attention.sliding_window_pattern": INTEGER,
    "rope.freq_base_swa": NUMBER,
    "attn_logit_softcapping": NUMBER,
    "final_logit_softcapping": NUMBER,
}
_READ = {"gemma": _COMMON, "gemma2": _WITH_LOCAL_LAYERS, "gemma3": _WITH_LOCAL_LAYERS}
_IGNORED = {
    # What the file was made from; the embedding's shape is the truth about the vocabulary.
    "vocab_size",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
}

# What llama.cpp takes for a key that the file lacks; None is for keys that then follow others, or
# switch something off. A key without a default must be there.
_COMMON_DEFAULTS = {
    "attention.head_count_kv": None,
    "attention.value_length": None,
    "rope.dimension_count": None,
    "rope.scaling.type": "linear",
    "rope.scaling.factor": 1.0,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma": {
        **_COMMON_DEFAULTS,
        "attention.sliding_window_pattern": 1,
        "rope.freq_base": 10_000.0,
    },
    "gemma2": {
        **_COMMON_DEFAULTS,
        "attention.sliding_window": 4096,
        "attention.sliding_window_pattern": 2,
        "rope.freq_base": 10_000.0,
        "rope.freq_base_swa": None,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    # Nothing for rope.freq_base: llama.cpp's 10,000 is no base that a Gemma 3 was trained with.
    "gemma3": {
        **_COMMON_DEFAULTS,
        "attention.sliding_window_pattern": 6,
        "rope.freq_base_swa": 10_000.0,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    },
}
_TOKEN_IDS = ("padding_token_id", "bos_token_id", "eos_token_id", "eot_token_id", "eom_token_id")


def from_gguf(
    metadata: Mapping[str, Any], *, vocab_size: int, has_tied_head: bool = True
) -> GemmaConfig:
    """The architecture that a GGUF file describes.

    Args:
        metadata: the file's key-value pairs.
        vocab_size: rows of its `token_embd.weight`.
        has_tied_head: whether it lacks `output.weight`.

    Raises:
        ConfigError: not an architecture we carry, or keys that are missing, not understood or of a
            value that does not fit; all are listed at once.
    """
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in _FAMILIES:
        raise ConfigError(
            f"general.architecture must be one of {', '.join(_FAMILIES)}, "
            f"got {architecture!r:.80}; this project runs Gemma text decoders only"
        )
    prefix = f"{architecture}."
    stored = {key.removeprefix(prefix): metadata[key] for key in metadata if key.startswith(prefix)}
    faults = [*_faults(stored, architecture), *_token_id_faults(metadata)]
    if faults:
        raise ConfigError(f"cannot carry this GGUF file ({prefix}*): " + "; ".join(faults))

    values = {**_DEFAULTS[architecture], **stored}
    head_width, num_heads = values["attention.key_length"], values["attention.head_count"]
    num_kv_heads = values["attention.head_count_kv"]
    num_layers, width = values["block_count"], values["embedding_length"]
    local_rope, global_rope = _ropes(values, is_gemma3=architecture == "gemma3")
    is_27b = num_layers == _LAYERS_OF_27B.get(architecture)
    return GemmaConfig(
        family=_FAMILIES[architecture],
        vocab_size=vocab_size,
        width=width,
        num_heads=num_heads,
        head_width=head_width,
        num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
        feed_forward_width=values["feed_forward_length"],
        layer_kinds=periodic_kinds(num_layers, period=values["attention.sliding_window_pattern"]),
        window=values.get("attention.sliding_window"),
        context_length=values["context_length"],
        local_rope=local_rope,
        global_rope=global_rope,
        # No heads is refused with the other contradictions, not by a division.
        query_scalar=width / max(num_heads, 1) if is_27b else float(head_width),
        attention_cap=optional_float(values.get("attn_logit_softcapping")),
        final_cap=optional_float(values.get("final_logit_softcapping")),
        has_query_key_norm=architecture == "gemma3",
        has_post_norms=architecture != "gemma",
        norm_offset=0.0,
        # Stored as float32, whose 1e-6 is 9.99999997e-07 in float64.
        norm_epsilon=float(f"{values['attention.layer_norm_rms_epsilon']:.6g}"),
        has_tied_head=has_tied_head,
        pad_id=metadata.get("tokenizer.ggml.padding_token_id", 0),
        bos_id=metadata.get("tokenizer.ggml.bos_token_id", 2),
        eos_ids=_eos_ids(metadata),
    )


def _faults(stored: Mapping[str, Any], architecture: str) -> Iterator[str]:
    """Everything in the architecture's keys that we cannot carry, one line each."""
    kinds = _READ[architecture]
    missing = [key for key in kinds if key not in stored and key not in _DEFAULTS[architecture]]
    if missing:
        yield f"{', '.join(missing)} missing, was the conversion complete?"
    yield from kind_faults(stored, kinds)
    for key in sorted(set(stored) - set(kinds) - _IGNORED):
        yield f"{key} is unknown and may change the function"
    head_width = stored.get("attention.key_length")
    for key in ("attention.value_length", "rope.dimension_count"):
        if stored.get(key, head_width) != head_width:
            yield f"{key} must equal attention.key_length {head_width}, got {stored[key]}"
    scaling = stored.get("rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        yield f"rope.scaling.type must be none or linear, got {scaling!r:.80}"


def _token_id_faults(metadata: Mapping[str, Any]) -> list[str]:
    ids = {f"tokenizer.ggml.{name}": INTEGER for name in _TOKEN_IDS}
    return kind_faults(metadata, ids)


def _ropes(values: Mapping[str, Any], *, is_gemma3: bool) -> tuple[RopeSpec, RopeSpec]:
    """Rotary embedding of local and of global layers."""
    factor = values["rope.scaling.factor"] if values["rope.scaling.type"] == "linear" else 1.0
    global_rope = RopeSpec(theta=float(values["rope.freq_base"]), factor=float(factor))
    local_theta = values.get("rope.freq_base_swa")
    return (
        RopeSpec(
            theta=global_rope.theta if local_theta is None else float(local_theta),
            # Gemma 3 stretches global layers only; its local ones never see that far.
            factor=1.0 if is_gemma3 else global_rope.factor,
        ),
        global_rope,
    )


def _eos_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """Every id that ends a text, the end of a turn included where the file names it."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    ids = [metadata.get(f"tokenizer.ggml.{key}") for key in keys]
    return tuple(dict.fromkeys(i for i in ids if i is not None)) or (1,)
