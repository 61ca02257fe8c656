"""What may stand in GGUF metadata: each architecture's keys, their kinds, and what absence means.

Owns the tables and the refusal of whatever is not in them; `gguf_config.py` turns what is left into
a `GemmaConfig`.

Sources: llama.cpp `gguf-py/gguf/constants.py`, `conversion/gemma.py`, `src/llama-model.cpp`,
`src/models/gemma*.cpp`; Ollama `convert/convert_gemma3n.go`, which spells three keys of Gemma 3n in
its own way.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from refimpl.model.value_kinds import (
    BOOLEANS,
    CUTOFFS,
    INTEGER,
    NUMBER,
    PATTERN,
    SIZES,
    TEXT,
    Kind,
    kind_faults,
)


@dataclass(frozen=True, kw_only=True)
class GgufArchitecture:
    """An architecture of llama.cpp, as far as its keys are concerned.

    Attributes:
        family: Hugging Face's model type of the same decoder.
        kinds: keys that are read.
        defaults: what llama.cpp takes for a key that the file lacks; None is for keys that then
            follow others, or switch something off. A key without a default must be there.
        same: pairs of keys, of which the first must equal the second where both are stored.
        aliases: other spellings of keys.
        ignored: keys that do not change the function.
        demanded: keys that change it, with the only value that leaves it the one we compute.
    """

    family: str
    kinds: Mapping[str, Kind]
    defaults: Mapping[str, Any]
    same: tuple[tuple[str, str], ...] = (
        ("attention.value_length", "attention.key_length"),
        ("rope.dimension_count", "attention.key_length"),
    )
    aliases: Mapping[str, str] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    demanded: Mapping[str, Any] = field(default_factory=dict)


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
_COMMON_DEFAULTS = {
    "attention.head_count_kv": None,
    "attention.value_length": None,
    "rope.dimension_count": None,
    "rope.scaling.type": "linear",
    "rope.scaling.factor": 1.0,
}
_IGNORED = {
    # What the file was made from; the embedding's shape is the truth about the vocabulary.
    "vocab_size",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
}

_GEMMA = GgufArchitecture(
    family="gemma",
    kinds=_COMMON,
    defaults={
        **_COMMON_DEFAULTS,
        "attention.sliding_window_pattern": 1,
        "rope.freq_base": 10_000.0,
    },
)
_GEMMA2 = GgufArchitecture(
    family="gemma2",
    kinds=_WITH_LOCAL_LAYERS,
    defaults={
        **_COMMON_DEFAULTS,
        "attention.sliding_window": 4096,
        "attention.sliding_window_pattern": 2,
        "rope.freq_base": 10_000.0,
        "rope.freq_base_swa": None,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
)
# From here on nothing for rope.freq_base: llama.cpp's 10,000 is no base that these were trained
# with.
_GEMMA3 = GgufArchitecture(
    family="gemma3_text",
    kinds=_WITH_LOCAL_LAYERS,
    defaults={
        **_COMMON_DEFAULTS,
        "attention.sliding_window_pattern": 6,
        "rope.freq_base_swa": 10_000.0,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    },
)

_SINCE_3N: dict[str, Kind] = {
    **_COMMON,
    "feed_forward_length": SIZES,
    "attention.sliding_window": INTEGER,
    "attention.shared_kv_layers": INTEGER,
    "rope.freq_base_swa": NUMBER,
    "final_logit_softcapping": NUMBER,
    "embedding_length_per_layer_input": INTEGER,
}
_DEFAULTS_SINCE_3N = {
    **_COMMON_DEFAULTS,
    "rope.freq_base_swa": 10_000.0,
    "final_logit_softcapping": 30.0,
}
_GEMMA3N = GgufArchitecture(
    family="gemma3n_text",
    kinds={
        **_SINCE_3N,
        "attention.sliding_window_pattern": PATTERN,
        "altup.num_inputs": INTEGER,
        "altup.active_idx": INTEGER,
        "activation_sparsity_scale": CUTOFFS,
    },
    defaults={
        **_DEFAULTS_SINCE_3N,
        # The embedding's width shared among the heads.
        "attention.key_length": None,
        "attention.sliding_window_pattern": 5,
        # All from layer 20 on.
        "attention.shared_kv_layers": None,
    },
    aliases={
        "head_dim": "attention.key_length",
        "rope.freq_base_local": "rope.freq_base_swa",
    },
    # For training.
    ignored=frozenset({"altup.lr_multiplier"}),
    demanded={"altup.correct_scale": True},
)
_GEMMA4 = GgufArchitecture(
    family="gemma4_text",
    kinds={
        **_SINCE_3N,
        "attention.head_count_kv": SIZES,
        "attention.sliding_window_pattern": BOOLEANS,
        "attention.key_length_swa": INTEGER,
        "attention.value_length_swa": INTEGER,
        "rope.dimension_count_swa": INTEGER,
        "expert_count": INTEGER,
        "expert_used_count": INTEGER,
        "expert_feed_forward_length": INTEGER,
    },
    defaults={
        **_DEFAULTS_SINCE_3N,
        "attention.shared_kv_layers": 0,
        "attention.value_length_swa": None,
        "rope.dimension_count_swa": None,
        "expert_count": 0,
        "expert_used_count": 0,
        "expert_feed_forward_length": 0,
    },
    same=(
        ("attention.value_length", "attention.key_length"),
        ("rope.dimension_count", "attention.key_length"),
        ("attention.value_length_swa", "attention.key_length_swa"),
        ("rope.dimension_count_swa", "attention.key_length_swa"),
    ),
)

ARCHITECTURES: Mapping[str, GgufArchitecture] = MappingProxyType(
    {
        "gemma": _GEMMA,
        "gemma2": _GEMMA2,
        "gemma3": _GEMMA3,
        "gemma3n": _GEMMA3N,
        "gemma4": _GEMMA4,
    }
)


def stored_values(metadata: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The keys of an architecture, without its name and in one spelling."""
    prefix, aliases = f"{name}.", ARCHITECTURES[name].aliases
    stored = {key.removeprefix(prefix): metadata[key] for key in metadata if key.startswith(prefix)}
    for alias, key in aliases.items():
        if alias in stored and key not in stored:
            stored[key] = stored.pop(alias)
    return stored


def faults(stored: Mapping[str, Any], architecture: GgufArchitecture) -> Iterator[str]:
    """Everything in an architecture's keys that we cannot carry, one line each."""
    kinds = architecture.kinds
    missing = [key for key in kinds if key not in stored and key not in architecture.defaults]
    if missing:
        yield f"{', '.join(missing)} missing, was the conversion complete?"
    yield from kind_faults(stored, kinds)
    known = {*kinds, *_IGNORED, *architecture.ignored, *architecture.demanded}
    for key in sorted(set(stored) - known):
        yield f"{key} is unknown and may change the function"
    for key, value in architecture.demanded.items():
        if stored.get(key, value) is not value:
            yield f"{key} must be {value}, got {stored[key]!r:.80}"
    for key, other in architecture.same:
        if other in stored and stored.get(key, stored[other]) != stored[other]:
            yield f"{key} must equal {other} {stored[other]}, got {stored[key]}"
    scaling = stored.get("rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        yield f"rope.scaling.type must be none or linear, got {scaling!r:.80}"
