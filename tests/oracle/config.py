"""What one forward pass must know about a Gemma model, read from Hugging Face's config.json."""

from dataclasses import dataclass
from typing import Any, Literal

LayerKind = Literal["sliding_attention", "full_attention"]


@dataclass(frozen=True)
class LayerConfig:
    """One decoder layer, with everything that depends on its place or kind resolved."""

    heads: int
    kv_heads: int
    head_width: int
    query_scale: float  # what query . key is multiplied by
    window: int | None  # keys a query sees, itself included; None: all before it
    rope_base: float
    rope_factor: float  # positions are divided by it (linear interpolation); 1.0: unscaled
    score_cap: float | None
    normalizes_queries_and_keys: bool
    # Names of weights; None: the model has no such norm. The norm before attention is always
    # `input_layernorm`.
    norm_after_attention: str | None
    norm_before_mlp: str
    norm_after_mlp: str | None


@dataclass(frozen=True)
class OracleConfig:
    """A whole model. Widths that the weights show (d, f, v) are read off the weights."""

    layers: tuple[LayerConfig, ...]
    norm_epsilon: float
    logit_cap: float | None


# Names of the norms (after attention, before MLP, after MLP). One name, two meanings: in Gemma 1,
# as in Llama, `post_attention_layernorm` acts on the stream on its way into the MLP; from Gemma 2
# on it acts on what attention adds to the stream.
_TWO_NORMS = (None, "post_attention_layernorm", None)
_TWO_NORMS_NEW_NAME = (None, "pre_feedforward_layernorm", None)
_FOUR_NORMS = (
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
_NORM_NAMES = {
    "gemma": _TWO_NORMS,
    "gemma2": _FOUR_NORMS,
    "vaultgemma": _TWO_NORMS_NEW_NAME,
    "gemma3_text": _FOUR_NORMS,
}

# Keys that released files leave out, and what their absence means. Nothing else may be absent:
# the library's own defaults are no guide (VaultGemma's are Gemma 2's caps and pattern, which the
# released model does not have; Gemma 3's window is 4096, which no released model has).
_IMPLIED: dict[str, dict[str, Any]] = {
    "gemma": {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    "gemma2": {"sliding_window_pattern": 2},
    "vaultgemma": {},
    # The released 4B's text_config holds six keys.
    "gemma3_text": {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window_pattern": 6,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    },
}


def from_hugging_face(config: dict[str, Any]) -> OracleConfig:
    """Reads config.json of gemma, gemma2, vaultgemma, gemma3_text, or gemma3 (its text part).

    Both spellings of the rope settings are understood: `rope_theta`, `rope_local_base_freq`,
    `rope_scaling` and `sliding_window_pattern` of released files, `rope_parameters` and
    `layer_types` of files saved by transformers 5.

    Raises:
        ValueError: the file asks for something this oracle does not compute.
        KeyError: a number is missing that has no agreed meaning when absent.
    """
    if config["model_type"] == "gemma3":
        config = {"model_type": "gemma3_text", **config["text_config"]}
    model_type = config["model_type"]
    if model_type not in _NORM_NAMES:
        raise ValueError(f"model_type: got {model_type!r}, expected one of {sorted(_NORM_NAMES)}")
    config = {**_IMPLIED[model_type], **config}
    _refuse_what_is_not_computed(config)

    return OracleConfig(
        layers=tuple(_layer(config, kind) for kind in _layer_kinds(config)),
        norm_epsilon=config.get("rms_norm_eps", 1e-6),
        logit_cap=config["final_logit_softcapping"],
    )


def _layer(config: dict[str, Any], kind: LayerKind) -> LayerConfig:
    rope_base, rope_factor = _rope(config, kind)
    after_attention, before_mlp, after_mlp = _NORM_NAMES[config["model_type"]]
    # Gemma 1 divides by the root of the head width; later models name the number, because it is
    # d / n instead for the 27B sizes (144 and 168, at head width 128).
    is_first = config["model_type"] == "gemma"
    scalar = config["head_dim"] if is_first else config["query_pre_attn_scalar"]
    return LayerConfig(
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_width=config["head_dim"],
        query_scale=scalar**-0.5,
        window=config["sliding_window"] if kind == "sliding_attention" else None,
        rope_base=rope_base,
        rope_factor=rope_factor,
        score_cap=config["attn_logit_softcapping"],
        normalizes_queries_and_keys=config["model_type"] == "gemma3_text",
        norm_after_attention=after_attention,
        norm_before_mlp=before_mlp,
        norm_after_mlp=after_mlp,
    )


def _layer_kinds(config: dict[str, Any]) -> list[LayerKind]:
    """The kind of every layer: as listed, or every P-th full and the others sliding.

    Layer i, counted from 0, is full iff (i + 1) % P == 0: Gemma 2 (P = 2) starts with a sliding
    layer, and a Gemma 3 (P = 6) whose depth is no multiple of 6 ends with sliding ones.
    """
    count = config["num_hidden_layers"]
    if config["model_type"] == "gemma":
        return ["full_attention"] * count
    listed = config.get("layer_types")
    if listed is None:
        period = config.get("_sliding_window_pattern") or config["sliding_window_pattern"]
        return [
            "full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(count)
        ]
    if len(listed) != count or not set(listed) <= {"sliding_attention", "full_attention"}:
        raise ValueError(
            f"layer_types: got {listed}, expected {count} entries, each 'sliding_attention' or "
            "'full_attention'"
        )
    return list(listed)


def _rope(config: dict[str, Any], kind: LayerKind) -> tuple[float, float]:
    """(base, linear factor) of the rotary embedding in layers of this kind.

    Gemma 3 has two bases, and its factor belongs to the full layers alone.
    """
    has_two = config["model_type"] == "gemma3_text"
    settings = config.get("rope_parameters")
    if settings is None:
        is_local = has_two and kind == "sliding_attention"
        base = config["rope_local_base_freq"] if is_local else config["rope_theta"]
        scaling = (None if is_local else config.get("rope_scaling")) or {}
    else:
        scaling = settings[kind] if has_two else settings
        base = scaling["rope_theta"]

    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if rope_type not in ("default", "linear"):
        raise ValueError(f"rope_type: got {rope_type!r}, expected 'default' or 'linear'")
    return float(base), float(scaling["factor"]) if rope_type == "linear" else 1.0


def _refuse_what_is_not_computed(config: dict[str, Any]) -> None:
    for key in ("attention_bias", "use_bidirectional_attention"):
        if config.get(key):
            raise ValueError(f"{key}: got {config[key]!r}, expected it to be absent or false")

    activation = config.get("hidden_activation") or config.get("hidden_act", "gelu_pytorch_tanh")
    # Gemma 1 was released with hidden_act "gelu" and trained with the tanh form; only there does
    # the word mean that.
    accepted = {"gelu_pytorch_tanh"} | ({"gelu"} if config["model_type"] == "gemma" else set())
    if activation not in accepted:
        raise ValueError(f"activation: got {activation!r}, expected one of {sorted(accepted)}")
