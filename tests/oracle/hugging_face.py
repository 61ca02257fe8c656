"""Reads Hugging Face's config.json of every Gemma text model."""

from typing import Any

from tests.oracle.config import LayerConfig, LayerKind, OracleConfig

Config = dict[str, Any]

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
    "gemma3n_text": _FOUR_NORMS,
    "gemma4_text": _FOUR_NORMS,
    "gemma4_unified_text": _FOUR_NORMS,
}
_TEXT_PART = {
    "gemma3": "gemma3_text",
    "gemma3n": "gemma3n_text",
    "gemma4": "gemma4_text",
    "gemma4_unified": "gemma4_unified_text",
}
_GEMMA_4 = ("gemma4_text", "gemma4_unified_text")
_UNSCALED = ("gemma3n_text", *_GEMMA_4)  # scores are not scaled, weights are the gain itself
_BY_KIND = ("gemma3_text", *_UNSCALED)  # two settings of rope, queries and keys normalised

# Keys that released files leave out, and what their absence means. Nothing else may be absent:
# the library's own defaults are no guide (VaultGemma's are Gemma 2's caps and pattern, which the
# released model does not have; Gemma 3's window is 4096, which no released model has).
_IMPLIED: dict[str, Config] = {
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
    "gemma3n_text": {"sliding_window_pattern": 5},
    "gemma4_text": {"sliding_window_pattern": 6},
    # The architecture knows neither experts nor per-layer inputs.
    "gemma4_unified_text": {
        "sliding_window_pattern": 6,
        "enable_moe_block": False,
        "hidden_size_per_layer_input": None,
    },
}


def from_hugging_face(config: Config) -> OracleConfig:
    """Reads config.json of gemma, gemma2, vaultgemma, gemma3_text, gemma3n_text, gemma4_text or
    gemma4_unified_text, or of gemma3, gemma3n, gemma4, gemma4_unified (their text part).

    All spellings are understood. Rope: `rope_theta`, `rope_local_base_freq`, `rope_scaling` and
    `sliding_window_pattern` of released files, `rope_parameters` and `layer_types` of files saved
    by transformers 5. Gemma 4's global layers: `global_head_dim` with
    `num_global_key_value_heads`, or `per_layer_config`, which has the last word.

    Raises:
        ValueError: the file asks for something this oracle does not compute.
        KeyError: a number is missing that has no agreed meaning when absent.
    """
    text_part = _TEXT_PART.get(config["model_type"])
    if text_part is not None:
        config = {**config["text_config"], "model_type": text_part}
    model_type = config["model_type"]
    if model_type not in _NORM_NAMES:
        known = sorted({*_NORM_NAMES, *_TEXT_PART})
        raise ValueError(f"model_type: got {model_type!r}, expected one of {known}")
    config = {**_IMPLIED[model_type], **config}
    _refuse_what_is_not_computed(config)

    kinds = _layer_kinds(config)
    return OracleConfig(
        layers=tuple(_layer(config, kinds, index) for index in range(len(kinds))),
        norm_epsilon=config.get("rms_norm_eps", 1e-6),
        logit_cap=config["final_logit_softcapping"],
        norm_offset=0.0 if model_type in _UNSCALED else 1.0,
    )


def _layer(config: Config, kinds: list[LayerKind], index: int) -> LayerConfig:
    model_type, kind = config["model_type"], kinds[index]
    rope_base, rope_factor, rope_proportion = _rope(config, kind)
    after_attention, before_mlp, after_mlp = _NORM_NAMES[model_type]
    head_width, kv_heads = _heads(config, kind, index)
    return LayerConfig(
        heads=config["num_attention_heads"],
        kv_heads=kv_heads,
        head_width=head_width,
        query_scale=_query_scale(config),
        window=config["sliding_window"] if kind == "sliding_attention" else None,
        rope_base=rope_base,
        rope_factor=rope_factor,
        rope_proportion=rope_proportion,
        score_cap=None if model_type in _UNSCALED else config["attn_logit_softcapping"],
        normalizes_queries_and_keys=model_type in _BY_KIND,
        normalizes_values=model_type in _UNSCALED,
        norm_after_attention=after_attention,
        norm_before_mlp=before_mlp,
        norm_after_mlp=after_mlp,
        **_newer_parts(config, kinds, index),
    )


def _newer_parts(config: Config, kinds: list[LayerKind], index: int) -> dict[str, Any]:
    """The fields of `LayerConfig` that only Gemma 3n and 4 change."""
    if config["model_type"] == "gemma3n_text":
        return {
            "donor": _donor(config, kinds, index),
            "gate_sparsity": config["activation_sparsity_pattern"][index],
            "has_per_layer_input": True,
            "has_laurel": True,
            "streams": config["altup_num_inputs"],
        }
    if config["model_type"] in _GEMMA_4:
        is_full = kinds[index] == "full_attention"
        return {
            "values_are_keys": config["attention_k_eq_v"] and is_full,
            "donor": _donor(config, kinds, index),
            "experts_per_token": config["top_k_experts"] if config["enable_moe_block"] else 0,
            "has_per_layer_input": bool(config["hidden_size_per_layer_input"]),
            "has_scalar": True,
        }
    return {}


def _query_scale(config: Config) -> float:
    """Gemma 1 divides by the root of the head width; Gemma 2 and 3 name the number, because it is
    d / n instead for the 27B sizes (144 and 168, at head width 128); later models do not scale,
    whatever number the file may name.
    """
    if config["model_type"] in _UNSCALED:
        return 1.0
    is_first = config["model_type"] == "gemma"
    return (config["head_dim"] if is_first else config["query_pre_attn_scalar"]) ** -0.5


def _heads(config: Config, kind: LayerKind, index: int) -> tuple[int, int]:
    """(head width, key/value heads) of a layer: Gemma 4 has other ones in its full layers."""
    own = {"head_dim": config["head_dim"], "num_key_value_heads": config["num_key_value_heads"]}
    if config["model_type"] in _GEMMA_4:
        by_index = config.get("per_layer_config")
        if by_index is not None:
            # JSON has no integers for keys; a dictionary that was never written may.
            changes = by_index.get(str(index), by_index.get(index, {}))
            if not set(changes) <= set(own):
                raise ValueError(
                    f"per_layer_config: got {sorted(changes)} for layer {index}, expected no keys "
                    f"but {sorted(own)}"
                )
            own |= changes
        elif kind == "full_attention":
            own["head_dim"] = config["global_head_dim"]
            # The library reads the number of heads only together with this flag.
            if config["attention_k_eq_v"] and config.get("num_global_key_value_heads") is not None:
                own["num_key_value_heads"] = config["num_global_key_value_heads"]
    return own["head_dim"], own["num_key_value_heads"]


def _donor(config: Config, kinds: list[LayerKind], index: int) -> int | None:
    """The layer whose keys and values this one reads: for each of the last ones, the last of its
    kind among those before them.
    """
    first_sharing = len(kinds) - config["num_kv_shared_layers"]
    if index < first_sharing:
        return None
    donors = [i for i in range(first_sharing) if kinds[i] == kinds[index]]
    if not donors:
        raise ValueError(
            f"num_kv_shared_layers: got {len(kinds) - first_sharing} of {len(kinds)} layers, "
            f"expected a layer with {kinds[index]!r} before them"
        )
    return donors[-1]


def _layer_kinds(config: Config) -> list[LayerKind]:
    """The kind of every layer: as listed, or every P-th full and the others sliding.

    Layer i, counted from 0, is full iff (i + 1) % P == 0: Gemma 2 (P = 2) starts with a sliding
    layer, and a Gemma 3 (P = 6) whose depth is no multiple of 6 ends with sliding ones. The last
    layer of Gemma 4 is full, whatever the file says.
    """
    count = config["num_hidden_layers"]
    if config["model_type"] == "gemma":
        return ["full_attention"] * count
    kinds: list[LayerKind] | None = config.get("layer_types")
    if kinds is None:
        period = config.get("_sliding_window_pattern") or config["sliding_window_pattern"]
        kinds = [
            "full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(count)
        ]
    if len(kinds) != count or not set(kinds) <= {"sliding_attention", "full_attention"}:
        raise ValueError(
            f"layer_types: got {kinds}, expected {count} entries, each 'sliding_attention' or "
            "'full_attention'"
        )
    is_last_full = config["model_type"] in _GEMMA_4
    return [*kinds[:-1], "full_attention"] if is_last_full else list(kinds)


def _rope(config: Config, kind: LayerKind) -> tuple[float, float, float]:
    """(base, linear factor, proportion of pairs that turn) in layers of this kind.

    Gemma 3 and later have two bases, and a factor or a proportion belongs to the full layers alone.
    """
    has_two = config["model_type"] in _BY_KIND
    settings = config.get("rope_parameters")
    if settings is None:
        is_local = has_two and kind == "sliding_attention"
        base = config["rope_local_base_freq"] if is_local else config["rope_theta"]
        scaling = (None if is_local else config.get("rope_scaling")) or {}
    else:
        scaling = settings[kind] if has_two else settings
        base = scaling["rope_theta"]

    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if rope_type == "proportional":
        return float(base), scaling.get("factor", 1.0), scaling["partial_rotary_factor"]
    if rope_type not in ("default", "linear"):
        raise ValueError(
            f"rope_type: got {rope_type!r}, expected 'default', 'linear' or 'proportional'"
        )
    return float(base), float(scaling["factor"]) if rope_type == "linear" else 1.0, 1.0


def _refuse_what_is_not_computed(config: Config) -> None:
    accepted: dict[str, tuple[Any, ...]] = {
        "attention_bias": (None, False),
        # "vision" lets the tokens of one image see each other; text has none.
        "use_bidirectional_attention": (None, False, "vision"),
        "attention_use_bidirectional": (None, False, "vision"),  # an older spelling
        "altup_active_idx": (None, 0),
        "altup_correct_scale": (None, True),
    }
    for key, values in accepted.items():
        if config.get(key) not in values:
            raise ValueError(f"{key}: got {config[key]!r}, expected absence or one of {values[1:]}")

    activation = config.get("hidden_activation") or config.get("hidden_act", "gelu_pytorch_tanh")
    # Gemma 1 was released with hidden_act "gelu" and trained with the tanh form; only there does
    # the word mean that.
    activations = {"gelu_pytorch_tanh"} | ({"gelu"} if config["model_type"] == "gemma" else set())
    if activation not in activations:
        raise ValueError(f"activation: got {activation!r}, expected one of {sorted(activations)}")
