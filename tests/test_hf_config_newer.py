"""config.json of Gemma 3n and Gemma 4: every spelling read, every unknown refused, nothing lost."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refimpl_weights.synthetic_configs import TINY
from refimpl_weights.synthetic_configs_newer import GEMMA4_UNIFIED

from refimpl.errors import ConfigError
from refimpl.model.config import GemmaConfig
from refimpl.model.hf_config import from_hugging_face, to_hugging_face
from refimpl.model.layer_spec import (
    AltUpSpec,
    AttentionKind,
    ExpertsSpec,
    PerLayerInputSpec,
    RopeSpec,
)
from refimpl.model.variants import VARIANTS, variant

LOCAL, GLOBAL = AttentionKind.LOCAL, AttentionKind.GLOBAL
WORDS = {LOCAL: "sliding_attention", GLOBAL: "full_attention"}
GEMMA4_FAMILIES = ["gemma4_text", "gemma4_unified_text"]
# The quantile of 0.95; in float32, as transformers computes it, 1.6448536.
CUTOFF = 1.6448536269514715
NEWER = sorted(name for name, config in VARIANTS.items() if config.norm_offset == 0.0)
EVERY_TINY = {
    **{name: TINY[name] for name in ("gemma4", "gemma4_e2b", "gemma4_moe", "gemma3n")},
    "gemma4_unified": GEMMA4_UNIFIED,
}


def flat(family: str, **keys: Any) -> dict[str, Any]:
    """A text decoder's own file. Gemma 3n shares no keys, which six layers could not."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6}
    own = {"num_kv_shared_layers": 0} if family == "gemma3n_text" else {}
    return {"model_type": family, **sizes, **own, **keys}


def nested(family: str, outer: dict[str, Any] | None = None, **keys: Any) -> dict[str, Any]:
    """A multimodal file around it."""
    text = flat(family, **keys)
    return {"model_type": family.removesuffix("_text"), "text_config": text, **(outer or {})}


def refusal(config: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        from_hugging_face(config)
    return str(caught.value)


# Released files.


def released_3n(name: str) -> dict[str, Any]:
    """As the hub has it, but for the numbers of the encoders."""
    config = variant(name)
    return {
        "architectures": ["Gemma3nForConditionalGeneration"],
        "audio_config": {"model_type": "gemma3n_audio"},
        "audio_soft_tokens_per_image": 188,
        "audio_token_id": 262273,
        "boa_token_id": 256000,
        "boi_token_id": 255999,
        "eoa_token_id": 262272,
        "eoi_token_id": 262144,
        "eos_token_id": [1, 106],
        "image_token_id": 262145,
        "initializer_range": 0.02,
        "model_type": "gemma3n",
        "text_config": {
            "activation_sparsity_pattern": [0.95] * 10 + [0.0] * (config.num_layers - 10),
            "altup_active_idx": 0,
            "altup_coef_clip": 120.0,
            "altup_correct_scale": True,
            "altup_lr_multiplier": 1.0,
            "altup_num_inputs": 4,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "final_logit_softcapping": 30.0,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": 2048,
            "hidden_size_per_layer_input": 256,
            "initializer_range": 0.02,
            "intermediate_size": [config.feed_forward_width] * config.num_layers,
            "laurel_rank": 64,
            "layer_types": [WORDS[kind] for kind in config.layer_kinds],
            "max_position_embeddings": 32768,
            "model_type": "gemma3n_text",
            "num_attention_heads": 8,
            "num_hidden_layers": config.num_layers,
            "num_key_value_heads": 2,
            "num_kv_shared_layers": config.num_sharing_layers,
            "query_pre_attn_scalar": 256,
            "rms_norm_eps": 1e-06,
            "rope_local_base_freq": 10000.0,
            "rope_scaling": None,
            "rope_theta": 1000000.0,
            "sliding_window": 512,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "vocab_size": 262400,
            "vocab_size_per_layer_input": 262144,
        },
        "torch_dtype": "bfloat16",
        "transformers_version": "4.53.0.dev0",
        "vision_config": {"architecture": "mobilenetv5_300m_enc", "model_type": "gemma3n_vision"},
        "vision_soft_tokens_per_image": 256,
    }


@pytest.mark.parametrize("name", ["gemma-3n-e2b", "gemma-3n-e4b"])
def test_released_gemma_3n(name):
    assert from_hugging_face(released_3n(name)) == replace(variant(name), eos_ids=(1, 106))


def released_4(name: str) -> dict[str, Any]:
    """As the hub has it, but for the numbers of the encoders."""
    config = variant(name)
    widths = [spec.feed_forward_width for spec in config.layers]
    ple, experts = config.per_layer_input, config.experts
    family = config.family.removesuffix("_text")
    text = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attention_k_eq_v": config.values_are_keys,
        "bos_token_id": 2,
        "dtype": "bfloat16",
        "eos_token_id": 1,
        "final_logit_softcapping": 30.0,
        "global_head_dim": 512,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": config.width,
        "initializer_range": 0.02,
        "intermediate_size": widths[0],
        "layer_types": [WORDS[kind] for kind in config.layer_kinds],
        "max_position_embeddings": config.context_length,
        "model_type": config.family,
        "num_attention_heads": config.num_heads,
        "num_global_key_value_heads": config.global_num_kv_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "num_kv_shared_layers": config.num_sharing_layers,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "full_attention": {
                "partial_rotary_factor": 0.25,
                "rope_theta": 1000000.0,
                "rope_type": "proportional",
            },
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
        },
        "sliding_window": config.window,
        "tie_word_embeddings": True,
        "use_bidirectional_attention": None if ple else "vision",
        "use_cache": True,
        "use_double_wide_mlp": widths[-1] != widths[0],
        "vocab_size": 262144,
        "vocab_size_per_layer_input": 262144,
    }
    if family == "gemma4":
        text |= {
            "enable_moe_block": experts is not None,
            "hidden_size_per_layer_input": 256 if ple else 0,
            "moe_intermediate_size": experts.width if experts else None,
            "num_experts": experts.count if experts else None,
            "top_k_experts": experts.chosen if experts else None,
        }
    return {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "audio_config": {"model_type": f"{family}_audio"} if ple else None,
        "audio_token_id": 258881,
        "boa_token_id": 256000,
        "boi_token_id": 255999,
        "dtype": "bfloat16",
        "eoa_token_id": 258883,
        "eoa_token_index": 258883,
        "eoi_token_id": 258882,
        "eos_token_id": [1, 106],
        "image_token_id": 258880,
        "initializer_range": 0.02,
        "model_type": family,
        "text_config": text,
        "tie_word_embeddings": True,
        "transformers_version": "5.5.0.dev0",
        "video_token_id": 258884,
        "vision_config": {"model_type": f"{family}_vision"},
        "vision_soft_tokens_per_image": 280,
    }


@pytest.mark.parametrize("name", [name for name in NEWER if "-4-" in name])
def test_released_gemma_4(name):
    config = from_hugging_face(released_4(name), generation={"eos_token_id": [1, 106, 50]})
    assert config == replace(variant(name), eos_ids=(1, 106, 50))


def test_words_of_the_first_files_of_gemma_4():
    released = released_4("gemma-4-26b-a4b")
    text = released["text_config"]
    text["expert_intermediate_size"] = text.pop("moe_intermediate_size")
    text["attention_use_bidirectional"] = text.pop("use_bidirectional_attention")
    text |= {
        # Scores are scaled by one, whatever this says.
        "query_pre_attn_scalar": 256,
        "_sliding_window_pattern": 5,
        "stream_and_decode_in_f32": True,
        "routed_layer_pattern": None,
        "attn_logit_softcapping": None,
    }
    assert from_hugging_face(released).layers == variant("gemma-4-26b-a4b").layers
    assert from_hugging_face(released).experts == ExpertsSpec(count=128, chosen=8, width=704)
    assert from_hugging_face(released).query_scale == 1.0


def test_the_spelling_of_the_12b_survives_being_written():
    config = from_hugging_face(GEMMA4_UNIFIED)
    assert from_hugging_face(to_hugging_face(config)) == config


def test_the_two_gemma_4_are_one_architecture():
    unified = from_hugging_face(GEMMA4_UNIFIED)
    assert replace(unified, family="gemma4_text") == from_hugging_face(TINY["gemma4"])


# Absent keys.


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("gemma3n_text", (262_400, 8, 2, 32_768, 512, 30.0, None)),
        ("gemma4_text", (262_144, 8, 4, 131_072, 512, None, 512)),
        ("gemma4_unified_text", (262_144, 8, 4, 262_144, 1024, None, 512)),
    ],
)
def test_absent_keys_have_the_defaults_of_transformers(family, expected):
    config = from_hugging_face(flat(family))
    assert expected == (
        config.vocab_size,
        config.num_heads,
        config.num_kv_heads,
        config.context_length,
        config.window,
        config.final_cap,
        config.global_head_width,
    )
    assert (config.head_width, config.norm_epsilon, config.query_scalar) == (256, 1e-6, 1.0)
    assert (config.norm_offset, config.has_tied_head, config.attention_cap) == (0.0, True, None)
    assert config.has_query_key_norm
    assert config.has_value_norm
    assert config.has_post_norms
    assert config.has_layer_scalar is (family != "gemma3n_text")
    assert (config.pad_id, config.bos_id, config.eos_ids) == (0, 2, (1,))


def test_absent_parts():
    gemma3n = from_hugging_face(flat("gemma3n_text"))
    inputs = PerLayerInputSpec(width=256, vocab_size=262_144, has_rounded_scales=True)
    assert gemma3n.per_layer_input == inputs
    assert (gemma3n.altup, gemma3n.laurel_rank) == (AltUpSpec(streams=4, active=0), 64)
    gemma4 = from_hugging_face(flat("gemma4_text"))
    assert gemma4.per_layer_input == PerLayerInputSpec(width=256, vocab_size=262_144)
    assert from_hugging_face(flat("gemma4_unified_text")).per_layer_input is None
    for config in (gemma4, from_hugging_face(flat("gemma4_unified_text"))):
        assert (config.experts, config.altup, config.laurel_rank) == (None, None, None)
        assert (config.num_sharing_layers, config.values_are_keys) == (0, False)


@pytest.mark.parametrize("width", [0, None])
def test_no_per_layer_inputs(width):
    config = from_hugging_face(flat("gemma4_text", hidden_size_per_layer_input=width))
    assert config.per_layer_input is None
    message = refusal(flat("gemma3n_text", hidden_size_per_layer_input=width))
    assert "per_layer_input.width must be at least 1, got 0" in message


def test_null_caps_nothing():
    assert from_hugging_face(flat("gemma3n_text", final_logit_softcapping=None)).final_cap is None
    assert from_hugging_face(flat("gemma4_text", final_logit_softcapping=30)).final_cap == 30.0


# Layers.


def test_layers_where_the_file_names_none():
    assert from_hugging_face(flat("gemma3n_text")).layer_kinds == (*[LOCAL] * 4, GLOBAL, LOCAL)
    for family in GEMMA4_FAMILIES:
        assert from_hugging_face(flat(family)).layer_kinds == (*[LOCAL] * 5, GLOBAL)
        longer = from_hugging_face(flat(family, num_hidden_layers=8))
        assert longer.layer_kinds == (*[LOCAL] * 5, GLOBAL, LOCAL, GLOBAL)


def test_the_last_layer_of_gemma_4_is_global_whatever_the_file_says():
    words = [WORDS[LOCAL]] * 6
    assert from_hugging_face(flat("gemma3n_text", layer_types=words)).layer_kinds == (LOCAL,) * 6
    config = from_hugging_face(flat("gemma4_text", layer_types=words))
    assert config.layer_kinds == (*[LOCAL] * 5, GLOBAL)


def test_layers_without_keys_take_those_of_the_last_of_their_kind_that_has():
    words = [WORDS[kind] for kind in (LOCAL, LOCAL, GLOBAL, LOCAL, GLOBAL, GLOBAL)]
    keys = {"layer_types": words, "num_kv_shared_layers": 3, "intermediate_size": 10}
    donors = [None, None, None, 1, 2, 2]
    for family in ("gemma3n_text", *GEMMA4_FAMILIES):
        config = from_hugging_face(flat(family, **keys))
        assert [spec.donor for spec in config.layers] == donors
        assert {spec.feed_forward_width for spec in config.layers} == {10}
    for family in GEMMA4_FAMILIES:
        wider = from_hugging_face(flat(family, **keys, use_double_wide_mlp=True))
        assert [spec.feed_forward_width for spec in wider.layers] == [10, 10, 10, 20, 20, 20]
        alone = flat(family, layer_types=words, use_double_wide_mlp=True)
        assert from_hugging_face(alone).layer_feed_forward_widths is None


@pytest.mark.parametrize("shared", [-1, 6, 5])
def test_layers_without_a_donor_are_refused(shared):
    # Of five without keys, the global one finds only a local one that has some.
    for family in ("gemma3n_text", *GEMMA4_FAMILIES):
        assert "must" in refusal(flat(family, num_kv_shared_layers=shared))


def test_slices_of_gemma_3n_have_layers_of_different_widths():
    widths = [96, 96, 48, 48, 96, 96]
    config = from_hugging_face(flat("gemma3n_text", intermediate_size=widths))
    assert [spec.feed_forward_width for spec in config.layers] == widths
    assert to_hugging_face(config)["intermediate_size"] == widths
    same = from_hugging_face(flat("gemma3n_text", intermediate_size=[96] * 6))
    assert same == from_hugging_face(flat("gemma3n_text"))
    message = refusal(flat("gemma3n_text", intermediate_size=[96] * 5))
    assert "one for each of 6 layers, got 5" in message
    assert "must be an integer" in refusal(flat("gemma4_text", intermediate_size=[96] * 6))


# Heads.


def four_layers(**keys: Any) -> dict[str, Any]:
    """A Gemma 4 of two local and two global layers."""
    words = [WORDS[LOCAL], WORDS[GLOBAL]] * 2
    return flat("gemma4_text", num_hidden_layers=4, layer_types=words, **keys)


def heads(config: GemmaConfig) -> list[tuple[int, int]]:
    return [(spec.head_width, spec.num_kv_heads) for spec in config.layers]


OWN = {"head_dim": 32, "num_key_value_heads": 1}


@pytest.mark.parametrize(
    ("keys", "local", "everywhere"),
    [
        ({}, (256, 4), (512, 4)),
        ({"global_head_dim": None}, (256, 4), (512, 4)),
        ({"global_head_dim": 32}, (256, 4), (32, 4)),
        ({"global_head_dim": 256}, (256, 4), (256, 4)),
        # Their own number of heads have only keys that are values too.
        ({"num_global_key_value_heads": 1}, (256, 4), (512, 4)),
        ({"num_global_key_value_heads": 1, "attention_k_eq_v": True}, (256, 4), (512, 1)),
        ({"num_global_key_value_heads": None, "attention_k_eq_v": True}, (256, 4), (512, 4)),
        # As transformers 5 writes, its zeros in front included.
        ({"per_layer_config": {"1": OWN, "3": OWN}}, (256, 4), (32, 1)),
        ({"per_layer_config": {"01": OWN, "03": OWN}}, (256, 4), (32, 1)),
        ({"per_layer_config": {"1": {"head_dim": 32}, "3": {"head_dim": 32}}}, (256, 4), (32, 4)),
        ({"per_layer_config": {str(i): OWN for i in range(4)}}, (32, 1), (32, 1)),
        # There and empty, it says that all layers are alike.
        ({"per_layer_config": {}}, (256, 4), (256, 4)),
        ({"per_layer_config": None}, (256, 4), (256, 4)),
    ],
)
def test_heads_of_each_kind_of_layer(keys, local, everywhere):
    config = from_hugging_face(four_layers(**keys))
    assert heads(config) == [local, everywhere] * 2
    assert heads(from_hugging_face(to_hugging_face(config))) == [local, everywhere] * 2
    assert config.values_are_keys is keys.get("attention_k_eq_v", False)


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        ({"4": OWN}, "must name layers in 0..3, got '4'"),
        ({"-1": OWN}, "must name layers in 0..3, got '-1'"),
        ({"full_attention": OWN}, "must name layers in 0..3, got 'full_attention'"),
        ({"9" * 5000: OWN}, "must name layers in 0..3"),
        ({"1": {"sliding_window": 4}}, "must be an object of head_dim and num_key_value_heads"),
        ({"1": [32]}, "must be an object of head_dim and num_key_value_heads, got [32]"),
        ({"1": {"head_dim": "32"}}, "per_layer_config[1].head_dim must be an integer, got '32'"),
        ({"1": OWN}, "must give all global layers the same head_dim and num_key_value_heads"),
        ({"0": OWN}, "must give all local layers the same head_dim and num_key_value_heads"),
    ],
)
def test_heads_that_are_refused(overrides, fault):
    assert fault in refusal(four_layers(per_layer_config=overrides))


def test_two_spellings_of_heads_that_disagree():
    overrides = {"1": OWN, "3": OWN}
    agreeing = four_layers(per_layer_config=overrides, global_head_dim=32)
    assert heads(from_hugging_face(agreeing)) == [(256, 4), (32, 1)] * 2
    message = refusal(four_layers(per_layer_config=overrides, global_head_dim=64))
    assert "two spellings of one thing, got (64, None) and (32, 1)" in message


# Rotary embedding.

PROPORTIONAL = {"rope_type": "proportional", "rope_theta": 5e5, "partial_rotary_factor": 0.5}
DEFAULT = {"rope_type": "default", "rope_theta": 2e4}


@pytest.mark.parametrize(
    ("parameters", "local", "everywhere"),
    [
        (None, RopeSpec(theta=1e4), RopeSpec(theta=1e6, proportion=0.25)),
        (
            {"full_attention": PROPORTIONAL, "sliding_attention": DEFAULT},
            RopeSpec(theta=2e4),
            RopeSpec(theta=5e5, proportion=0.5),
        ),
        (
            {
                "full_attention": {"type": "proportional", "rope_theta": 5e5, "factor": 8},
                "sliding_attention": {"rope_theta": 2e4},
            },
            RopeSpec(theta=2e4),
            RopeSpec(theta=5e5, factor=8.0),
        ),
        (
            {
                "full_attention": {**PROPORTIONAL, "factor": 2.0},
                "sliding_attention": {"rope_type": "linear", "rope_theta": 2e4, "factor": 4.0},
            },
            RopeSpec(theta=2e4, factor=4.0),
            RopeSpec(theta=5e5, factor=2.0, proportion=0.5),
        ),
        # Not what it seems to say: all pairs turn, as they do without the last key.
        (
            {"full_attention": {**DEFAULT, "partial_rotary_factor": 1.0},
             "sliding_attention": DEFAULT},
            RopeSpec(theta=2e4),
            RopeSpec(theta=2e4),
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("family", GEMMA4_FAMILIES)
def test_rotary_embedding_of_gemma_4(family, parameters, local, everywhere):
    config = from_hugging_face(flat(family, rope_parameters=parameters))
    assert (config.local_rope, config.global_rope) == (local, everywhere)
    assert from_hugging_face(to_hugging_face(config)) == config


@pytest.mark.parametrize(
    "keys",
    [
        # transformers fills in nothing here.
        {"rope_parameters": {"full_attention": PROPORTIONAL}},
        {"rope_parameters": {"full_attention": PROPORTIONAL, "sliding_attention": None}},
        {"rope_parameters": {"full_attention": PROPORTIONAL, "sliding_attention": {}}},
        {"rope_parameters": {}},
        {"rope_parameters": PROPORTIONAL},
        # The default type does not know this key: transformers would turn all pairs.
        {
            "rope_parameters": {
                "full_attention": {**DEFAULT, "partial_rotary_factor": 0.25},
                "sliding_attention": DEFAULT,
            }
        },
        {
            "rope_parameters": {
                "full_attention": {**PROPORTIONAL, "partial_rotary_factor": 1.5},
                "sliding_attention": DEFAULT,
            }
        },
        {
            "rope_parameters": {
                "full_attention": {**PROPORTIONAL, "partial_rotary_factor": "1/4"},
                "sliding_attention": DEFAULT,
            }
        },
        {"rope_theta": 1e6},
        {"rope_local_base_freq": 1e4},
        {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ],
)
def test_rotary_embedding_of_gemma_4_that_is_refused(keys):
    assert "rope" in refusal(flat("gemma4_text", **keys))


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_theta": 5e5, "rope_local_base_freq": 2e4},
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 5e5},
                "sliding_attention": DEFAULT,
            }
        },
    ],
)
def test_rotary_embedding_of_gemma_3n(keys):
    config = from_hugging_face(flat("gemma3n_text", **keys))
    assert (config.local_rope, config.global_rope) == (RopeSpec(theta=2e4), RopeSpec(theta=5e5))


# Sparse gates, streams and experts.


@pytest.mark.parametrize(
    ("layers", "pattern", "cutoffs"),
    [
        (12, None, (*[CUTOFF] * 10, None, None)),
        # Without a pattern, ten layers or fewer are dense.
        (10, None, None),
        (3, [0.0, 0, 0.0], None),
        (3, [0.95, 0.0, 0.8], (CUTOFF, None, 0.8416212335729144)),
        # Half or less cut off: the cut lies at or below the mean.
        (3, [0.5, 0.0, 0.3], (0.0, None, -0.5244005127080407)),
    ],
)
def test_sparse_gates(layers, pattern, cutoffs):
    sizes = {"num_hidden_layers": layers, "activation_sparsity_pattern": pattern}
    config = from_hugging_face(flat("gemma3n_text", **sizes))
    assert config.gate_cutoffs == cutoffs
    written = to_hugging_face(config)["activation_sparsity_pattern"]
    assert written == (pattern or [0.95 if i < 10 < layers else 0.0 for i in range(layers)])


@pytest.mark.parametrize(
    ("pattern", "fault"),
    [
        ([0.95] * 5, "must name all 6 layers, got 5"),
        ([1.0] * 6, "at least 0 and below 1, got 1.0"),
        ([-0.5] * 6, "at least 0 and below 1, got -0.5"),
        # transformers' class takes a number, and fails over its length.
        (0.95, "must be a list of finite numbers, got 0.95"),
        (["0.95"] * 6, "must be a list of finite numbers"),
    ],
)
def test_sparse_gates_that_are_refused(pattern, fault):
    assert fault in refusal(flat("gemma3n_text", activation_sparsity_pattern=pattern))


def test_streams():
    keys = {"altup_num_inputs": 3, "altup_active_idx": 1, "altup_coef_clip": None}
    config = from_hugging_face(flat("gemma3n_text", **keys, laurel_rank=5))
    assert (config.altup, config.laurel_rank) == (AltUpSpec(streams=3, active=1), 5)
    assert "altup must have 2 streams" in refusal(flat("gemma3n_text", altup_active_idx=4))
    message = refusal(flat("gemma3n_text", altup_correct_scale=False))
    assert "altup_correct_scale must be True or None, got False" in message


EXPERTS = {
    "enable_moe_block": True,
    "num_experts": 8,
    "top_k_experts": 2,
    "moe_intermediate_size": 12,
}


def test_experts():
    expected = ExpertsSpec(count=8, chosen=2, width=12)
    assert from_hugging_face(flat("gemma4_text", **EXPERTS)).experts == expected
    both = flat("gemma4_text", **EXPERTS, expert_intermediate_size=12)
    assert from_hugging_face(both).experts == expected
    switched_off = flat("gemma4_text", **(EXPERTS | {"enable_moe_block": False}))
    assert from_hugging_face(switched_off).experts is None


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"num_experts": None}, "got None, 2 and 12"),
        ({"top_k_experts": None}, "got 8, None and 12"),
        ({"moe_intermediate_size": None}, "got 8, 2 and None"),
        ({"expert_intermediate_size": 13}, "old name of moe_intermediate_size, got 13 and 12"),
        ({"top_k_experts": 9}, "experts.chosen must be at most experts.count 8, got 9"),
    ],
)
def test_experts_that_are_refused(changes, fault):
    assert fault in refusal(flat("gemma4_text", **(EXPERTS | changes)))


# Refusing.


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("gemma3n_text", "sliding_window_pattern", 6),
        ("gemma3n_text", "attn_logit_softcapping", 50.0),
        ("gemma3n_text", "attention_k_eq_v", True),
        ("gemma3n_text", "stream_and_decode_in_f32", True),
        ("gemma4_text", "_sliding_window_pattern", 5),
        ("gemma4_text", "attn_logit_softcapping", 50.0),
        ("gemma4_text", "laurel_rank", 64),
        ("gemma4_unified_text", "hidden_size_per_layer_input", 256),
        ("gemma4_unified_text", "enable_moe_block", True),
        ("gemma4_unified_text", "num_experts", 8),
        ("gemma3_text", "enable_moe_block", False),
        ("gemma3_text", "per_layer_config", {}),
    ],
)
def test_a_key_that_the_family_does_not_read_is_refused(family, key, value):
    assert f"unknown keys {key}" in refusal(flat(family, **{key: value}))


@pytest.mark.parametrize("wrap", [flat, nested])
@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("gemma3n_text", "use_bidirectional_attention", "vision"),
        ("gemma4_text", "use_bidirectional_attention", "all"),
        ("gemma4_text", "attention_use_bidirectional", True),
        ("gemma4_unified_text", "use_bidirectional_attention", "all"),
        ("gemma4_text", "routed_layer_pattern", [0, 1]),
        ("gemma4_text", "attention_bias", True),
        ("gemma4_text", "hidden_activation", "silu"),
        ("gemma4_text", "quantization_config", {"bits": 4}),
    ],
)
def test_another_function_is_refused(
    wrap: Callable[..., dict[str, Any]], family: str, key: str, value: object
):
    assert f"{key} must be" in refusal(wrap(family, **{key: value}))


def test_unknown_keys_around_a_decoder_are_named():
    outer = {"audio_config": {}, "video_token_id": 5, "magic": 1}
    assert "unknown keys magic:" in refusal(nested("gemma4_text", outer))
    assert "unknown keys audio_config, magic, video_token_id" in refusal(
        {**nested("gemma3_text", outer)}
    )


@pytest.mark.parametrize(("outer", "inner"), [("gemma4", "gemma4_unified_text"), ("gemma3n", "x")])
def test_another_decoder_inside_is_refused(outer, inner):
    message = refusal({"model_type": outer, "text_config": {"model_type": inner}})
    assert f"text_config.model_type must be '{outer}_text', got '{inner}'" in message


@pytest.mark.parametrize(
    ("name", "changes", "lost"),
    [
        ("gemma-3n-e2b", {"laurel_rank": None}, "laurel_rank"),
        ("gemma-3n-e2b", {"global_head_width": 512}, "global_head_width"),
        ("gemma-4-31b", {"query_scalar": 256.0}, "query_scalar"),
        ("gemma-4-31b", {"layer_feed_forward_widths": (21504,) * 60}, "layer_feed_forward_widths"),
        ("gemma-4-12b", {"experts": ExpertsSpec(count=2, chosen=1, width=3)}, "experts"),
        ("gemma-4-e2b", {"gate_cutoffs": (1.0,) * 35}, "gate_cutoffs"),
    ],
)
def test_what_a_family_cannot_say_is_not_written(name, changes, lost):
    with pytest.raises(ConfigError, match=f"cannot express this configuration's {lost}"):
        to_hugging_face(replace(variant(name), **changes))


# Changing a valid file a little: a configuration or one kind of error, whatever is changed.

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 300)
    | st.floats()
    | st.sampled_from(["", "proportional", "full_attention", "vision", "0"])
    | st.integers(),
    lambda inner: (
        st.lists(inner, max_size=8)
        | st.dictionaries(
            st.sampled_from(["rope_type", "rope_theta", "full_attention", "1", "head_dim"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)
KEYS = sorted({key for config in EVERY_TINY.values() for key in config.get("text_config", config)})


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    base=st.sampled_from(sorted(EVERY_TINY)),
    changes=st.dictionaries(st.sampled_from(KEYS), JSON, max_size=3),
    removed=st.sets(st.sampled_from(KEYS), max_size=2),
)
def test_a_changed_file_gives_a_configuration_or_a_config_error(base, changes, removed):
    config = copy.deepcopy(EVERY_TINY[base])
    part = config.get("text_config", config)
    part.update(changes)
    for key in removed:
        part.pop(key, None)
    try:
        read = from_hugging_face(config)
    except ConfigError:
        return
    assert read.parameter_count > 0
    assert from_hugging_face(to_hugging_face(read)) == read
