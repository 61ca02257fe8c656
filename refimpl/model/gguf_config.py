"""GGUF metadata to a `GemmaConfig`, with what GGUF does not store filled in.

Not stored, and known from the architecture: that Gemma 2 alternates and Gemma 3 has a global layer
every six; the score scale (llama.cpp takes width / heads for 46 and 62 layers, the two 27B, else
the head width); the embedding scale; the tie of head and embedding, which is whether the file holds
`output.weight`. Norm scales of these families are stored as they multiply, one already added.

Sources: llama.cpp `gguf-py/gguf/constants.py`, `conversion/gemma.py`, `src/models/gemma*.cpp`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from refimpl.errors import ConfigError
from refimpl.model.config import GemmaConfig, RopeSpec, periodic_kinds

_FAMILIES = {"gemma": "gemma", "gemma2": "gemma2", "gemma3": "gemma3_text"}
_PERIODS = {"gemma": 1, "gemma2": 2, "gemma3": 6}
_LAYERS_OF_27B = (46, 62)

_READ = {
    "context_length", "embedding_length", "block_count", "feed_forward_length",
    "attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon",
    "attention.key_length", "attention.value_length", "attention.sliding_window",
    "attention.sliding_window_pattern", "rope.freq_base", "rope.freq_base_swa",
    "rope.scaling.type", "rope.scaling.factor", "rope.dimension_count",
    "attn_logit_softcapping", "final_logit_softcapping",
}  # fmt: skip
_IGNORED = {
    # What the file was made from; the embedding's shape is the truth about the vocabulary.
    "vocab_size",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
}


def from_gguf(
    metadata: Mapping[str, Any], *, vocab_size: int, has_tied_head: bool = True
) -> GemmaConfig:
    """The architecture that a GGUF file describes.

    Args:
        metadata: the file's key-value pairs.
        vocab_size: rows of its `token_embd.weight`.
        has_tied_head: whether it lacks `output.weight`.

    Raises:
        ConfigError: not an architecture we carry, a key missing, a key of the architecture that we
            do not understand, or a value that does not fit.
    """
    architecture = metadata.get("general.architecture")
    if architecture not in _FAMILIES:
        raise ConfigError(
            f"general.architecture must be one of {', '.join(_FAMILIES)}, got {architecture!r}; "
            "this project runs Gemma text decoders only"
        )
    read = _reader(metadata, architecture)
    head_width, num_heads = read("attention.key_length"), read("attention.head_count")
    _refuse(metadata, architecture, head_width)
    num_layers, width = read("block_count"), read("embedding_length")
    local_rope, global_rope = _ropes(read, is_gemma3=architecture == "gemma3")
    is_27b = num_layers in _LAYERS_OF_27B and architecture != "gemma"
    return GemmaConfig(
        family=_FAMILIES[architecture],
        vocab_size=vocab_size,
        width=width,
        num_heads=num_heads,
        head_width=head_width,
        num_kv_heads=read("attention.head_count_kv", num_heads),
        feed_forward_width=read("feed_forward_length"),
        layer_kinds=periodic_kinds(
            num_layers,
            period=read("attention.sliding_window_pattern", _PERIODS[architecture]),
        ),
        window=None if architecture == "gemma" else read("attention.sliding_window"),
        context_length=read("context_length"),
        local_rope=local_rope,
        global_rope=global_rope,
        query_scalar=width / num_heads if is_27b else head_width,
        attention_cap=read("attn_logit_softcapping", None),
        final_cap=read("final_logit_softcapping", None),
        has_query_key_norm=architecture == "gemma3",
        has_post_norms=architecture != "gemma",
        norm_offset=0.0,
        # Stored as float32, whose 1e-6 is 9.99999997e-07 in float64.
        norm_epsilon=float(f"{read('attention.layer_norm_rms_epsilon'):.6g}"),
        has_tied_head=has_tied_head,
        pad_id=metadata.get("tokenizer.ggml.padding_token_id", 0),
        bos_id=metadata.get("tokenizer.ggml.bos_token_id", 2),
        eos_ids=_eos_ids(metadata),
    )


_ABSENT = object()


def _reader(metadata: Mapping[str, Any], architecture: str) -> Callable[..., Any]:
    def read(key: str, default: Any = _ABSENT) -> Any:
        full = f"{architecture}.{key}"
        value = metadata.get(full, default)
        if value is _ABSENT:
            raise ConfigError(f"the GGUF file lacks {full}; was its conversion complete?")
        return value

    return read


def _refuse(metadata: Mapping[str, Any], architecture: str, head_width: int) -> None:
    prefix = f"{architecture}."
    keys = {key.removeprefix(prefix) for key in metadata if key.startswith(prefix)}
    faults = sorted(
        f"{prefix}{key} is unknown and may change the function" for key in keys - _READ - _IGNORED
    )
    for key in ("attention.value_length", "rope.dimension_count"):
        if metadata.get(prefix + key, head_width) != head_width:
            faults.append(
                f"{prefix}{key} must equal attention.key_length {head_width}, "
                f"got {metadata[prefix + key]}"
            )
    if faults:
        raise ConfigError("cannot carry this GGUF file: " + "; ".join(faults))


def _ropes(read: Callable[..., Any], *, is_gemma3: bool) -> tuple[RopeSpec, RopeSpec]:
    theta = float(read("rope.freq_base", 10_000.0))
    kind = read("rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise ConfigError(f"rope.scaling.type must be none or linear, got {kind!r}")
    factor = float(read("rope.scaling.factor", 1.0)) if kind == "linear" else 1.0
    global_rope = RopeSpec(theta=theta, factor=factor)
    if not is_gemma3:
        return global_rope, global_rope
    # Interpolation stretches global layers only; local ones never see that far.
    return RopeSpec(theta=float(read("rope.freq_base_swa", 10_000.0))), global_rope


def _eos_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """Every id that ends a text, the end of a turn included where the file names it."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    ids = [metadata.get(f"tokenizer.ggml.{key}") for key in keys]
    return tuple(dict.fromkeys(i for i in ids if i is not None)) or (1,)
