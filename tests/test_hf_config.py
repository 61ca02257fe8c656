"""Hugging Face's config.json: every spelling read, every unknown refused, nothing else raised."""

import copy
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refimpl_weights.synthetic import TINY

from refimpl.errors import ConfigError
from refimpl.model.config import GemmaConfig
from refimpl.model.hf_config import from_hugging_face, to_hugging_face
from refimpl.model.layer_spec import AttentionKind, RopeSpec
from refimpl.model.variants import VARIANTS, variant

LOCAL, GLOBAL = AttentionKind.LOCAL, AttentionKind.GLOBAL
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6}


def flat(family: str, **keys) -> dict:
    """A text decoder's own file."""
    return {"model_type": family, **SIZES, **keys}


def nested(outer: dict | None = None, **keys) -> dict:
    """A multimodal file around a Gemma 3."""
    text = {"model_type": "gemma3_text", **SIZES, **keys}
    return {"model_type": "gemma3", "text_config": text, "vision_config": {}, **(outer or {})}


def refusal(config: dict, generation: dict | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        from_hugging_face(config, generation=generation)
    return str(caught.value)


# Reading.


def test_released_file_of_gemma_3_4b():
    # All that the hub's text_config holds; heads, vocabulary and the rest are the class's defaults.
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "eos_token_id": [1, 106],
        "image_token_index": 262144,
        "initializer_range": 0.02,
        "mm_tokens_per_image": 256,
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0",
        "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
    }
    assert from_hugging_face(config) == replace(variant("gemma-3-4b"), eos_ids=(1, 106))
    del config["eos_token_id"]
    assert from_hugging_face(config) == variant("gemma-3-4b")


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("gemma", (256_000, 16, 16, 8192, 256.0, None, None, None)),
        ("gemma2", (256_000, 8, 4, 8192, 256.0, 4096, 50.0, 30.0)),
        ("vaultgemma", (256_000, 8, 4, 8192, 256.0, 4096, 50.0, 30.0)),
        ("gemma3_text", (262_208, 8, 4, 131_072, 256.0, 4096, None, None)),
    ],
)
def test_absent_keys_have_the_defaults_of_transformers(family, expected):
    config = from_hugging_face(flat(family))
    assert expected == (
        config.vocab_size,
        config.num_heads,
        config.num_kv_heads,
        config.context_length,
        config.query_scalar,
        config.window,
        config.attention_cap,
        config.final_cap,
    )
    assert (config.head_width, config.norm_epsilon, config.norm_offset) == (256, 1e-6, 1.0)
    assert (config.has_tied_head, config.pad_id, config.bos_id) == (True, 0, 2)
    assert config.eos_ids == (1,)


@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        ("gemma", [GLOBAL] * 6),
        ("gemma2", [LOCAL, GLOBAL] * 3),
        ("vaultgemma", [LOCAL, GLOBAL] * 3),
        ("gemma3_text", [LOCAL] * 5 + [GLOBAL]),
    ],
)
def test_layers_where_the_file_names_none(family, kinds):
    assert list(from_hugging_face(flat(family)).layer_kinds) == kinds


def test_layers_by_name_and_by_period():
    names = ["full_attention", "sliding_attention", *["full_attention"] * 4]
    by_name = flat("gemma3_text", layer_types=names, sliding_window_pattern=6)
    assert from_hugging_face(by_name).layer_kinds == (GLOBAL, LOCAL, *[GLOBAL] * 4)
    for key in ("sliding_window_pattern", "_sliding_window_pattern"):
        kinds = from_hugging_face(flat("gemma3_text", **{key: 3})).layer_kinds
        assert kinds == (LOCAL, LOCAL, GLOBAL) * 2


THETA, LOCAL_THETA, FACTOR = 5e5, 2e4, 4.0
BOTH = (RopeSpec(theta=LOCAL_THETA), RopeSpec(theta=THETA, factor=FACTOR))


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        # As released.
        (
            {
                "rope_theta": THETA,
                "rope_local_base_freq": LOCAL_THETA,
                "rope_scaling": {"rope_type": "linear", "factor": FACTOR},
            },
            BOTH,
        ),
        # An older spelling of the type; both at once, as transformers 4.4x wrote them.
        (
            {
                "rope_theta": THETA,
                "rope_local_base_freq": LOCAL_THETA,
                "rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 4},
            },
            BOTH,
        ),
        # As transformers 5 writes.
        (
            {
                "rope_parameters": {
                    "full_attention": {
                        "rope_type": "linear",
                        "rope_theta": THETA,
                        "factor": FACTOR,
                    },
                    "sliding_attention": {"rope_type": "default", "rope_theta": LOCAL_THETA},
                }
            },
            BOTH,
        ),
        # The bases outside: they fill in for those that are not inside.
        (
            {
                "rope_theta": THETA,
                "rope_local_base_freq": LOCAL_THETA,
                "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": FACTOR}},
            },
            BOTH,
        ),
        ({}, (RopeSpec(theta=1e4), RopeSpec(theta=1e6))),
        ({"rope_scaling": None}, (RopeSpec(theta=1e4), RopeSpec(theta=1e6))),
        ({"rope_theta": THETA}, (RopeSpec(theta=1e4), RopeSpec(theta=THETA))),
        ({"rope_local_base_freq": 7}, (RopeSpec(theta=7.0), RopeSpec(theta=1e6))),
        ({"rope_parameters": {}}, (RopeSpec(theta=1e4), RopeSpec(theta=1e6))),
        (
            {"rope_parameters": {"sliding_attention": None, "full_attention": None}},
            (RopeSpec(theta=1e4), RopeSpec(theta=1e6)),
        ),
    ],
)
def test_rotary_embedding_of_gemma_3(keys, expected):
    config = from_hugging_face(flat("gemma3_text", **keys))
    assert (config.local_rope, config.global_rope) == expected


@pytest.mark.parametrize("family", ["gemma", "gemma2", "vaultgemma"])
@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, RopeSpec(theta=1e4)),
        ({"rope_theta": THETA}, RopeSpec(theta=THETA)),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": THETA}},
            RopeSpec(theta=THETA),
        ),
        (
            {"rope_theta": THETA, "rope_scaling": {"type": "linear", "factor": FACTOR}},
            RopeSpec(theta=THETA, factor=FACTOR),
        ),
    ],
)
def test_rotary_embedding_of_older_families_is_one_for_all_layers(family, keys, expected):
    config = from_hugging_face(flat(family, **keys))
    assert (config.local_rope, config.global_rope) == (expected, expected)


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        # A kind of scaling that we do not compute.
        ("gemma3_text", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
        ("gemma3_text", {"rope_scaling": {"rope_type": "linear"}}),
        ("gemma3_text", {"rope_scaling": {"rope_type": "default", "factor": 4.0}}),
        ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "type": "dynamic", "factor": 4}}),
        ("gemma", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
        # transformers ignores an object without layer types in Gemma 3, and one with them before.
        ("gemma3_text", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
        ("gemma2", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}),
        # Two spellings that may contradict each other.
        ("gemma", {"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"type": "default"}}),
        # Wrong types all the way down.
        ("gemma", {"rope_parameters": {"rope_theta": "10000"}}),
        ("gemma3_text", {"rope_parameters": {"full_attention": "linear"}}),
        ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 0}}),
        ("gemma3_text", {"rope_theta": -1.0}),
    ],
)
def test_rotary_embedding_that_we_do_not_compute_is_refused(family, keys):
    message = refusal(flat(family, **keys))
    assert "rope" in message


def test_null_switches_a_cap_off_and_absence_does_not():
    assert from_hugging_face(flat("gemma2")).attention_cap == 50.0
    off = flat("gemma2", attn_logit_softcapping=None, final_logit_softcapping=None)
    config = from_hugging_face(off)
    assert (config.attention_cap, config.final_cap) == (None, None)
    on = flat("gemma3_text", attn_logit_softcapping=25, final_logit_softcapping=15.5)
    config = from_hugging_face(on)
    assert (config.attention_cap, config.final_cap) == (25.0, 15.5)


def test_null_window_is_no_window():
    everywhere = ["full_attention"] * 6
    config = from_hugging_face(flat("gemma2", layer_types=everywhere, sliding_window=None))
    assert config.window is None
    message = refusal(flat("gemma2", sliding_window=None))
    assert "local layers need a window" in message


def test_null_of_any_other_key_is_its_default():
    keys = dict.fromkeys(
        ("head_dim", "vocab_size", "rms_norm_eps", "pad_token_id", "eos_token_id", "layer_types")
    )
    assert from_hugging_face(flat("gemma2", **keys)) == from_hugging_face(flat("gemma2"))


@pytest.mark.parametrize("family", ["gemma", "gemma2", "vaultgemma", "gemma3_text"])
@pytest.mark.parametrize(
    "keys",
    [
        # Gemma 1's first release says "gelu", and means the tanh form.
        {"hidden_act": "gelu"},
        {"hidden_act": "gelu_pytorch_tanh"},
        {"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"},
        {"hidden_act": "gelu", "hidden_activation": None},
    ],
)
def test_every_spelling_of_the_tanh_gelu(family, keys):
    assert from_hugging_face(flat(family, **keys)) == from_hugging_face(flat(family))


@pytest.mark.parametrize(
    "keys", [{"hidden_activation": "gelu"}, {"hidden_activation": "silu"}, {"hidden_act": "relu"}]
)
def test_another_activation_is_refused(keys):
    message = refusal(flat("gemma2", **keys))
    assert f"got {next(iter(keys.values()))!r}" in message


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (flat("gemma3_text"), {"eos_token_id": [1, 106]}, (1, 106)),
        (flat("gemma3_text", eos_token_id=[1, 106]), {"eos_token_id": [1, 106]}, (1, 106)),
        (flat("gemma2", eos_token_id=1), {"eos_token_id": [1, 107]}, (1, 107)),
        (flat("gemma2", eos_token_id=[107]), {"eos_token_id": 1}, (107, 1)),
        (flat("gemma3_text", eos_token_id=None), {}, (1,)),
        (nested({"eos_token_id": [1, 106]}), None, (1, 106)),
        (nested({"eos_token_id": [1, 106]}, eos_token_id=1), {"eos_token_id": 50}, (1, 106, 50)),
    ],
)
def test_every_place_that_names_an_end_of_text_counts(config, generation, expected):
    assert from_hugging_face(config, generation=generation).eos_ids == expected


def test_nested_decoder_reads_as_the_flat_one():
    keys = {"num_attention_heads": 4, "sliding_window": 32, "rope_theta": 5e5}
    assert from_hugging_face(nested(**keys)) == from_hugging_face(flat("gemma3_text", **keys))
    anonymous = nested(**keys)
    del anonymous["text_config"]["model_type"]
    assert from_hugging_face(anonymous) == from_hugging_face(flat("gemma3_text", **keys))


def test_what_stands_around_a_nested_decoder():
    outer = {"bos_token_id": 3, "pad_token_id": 4, "tie_word_embeddings": True}
    config = from_hugging_face(nested(outer))
    assert (config.bos_id, config.pad_id, config.has_tied_head) == (3, 4, True)
    # Its own ids go before.
    assert from_hugging_face(nested(outer, bos_token_id=2)).bos_id == 2
    # Either object may say that the head was trained apart.
    assert not from_hugging_face(nested({"tie_word_embeddings": False})).has_tied_head
    assert not from_hugging_face(nested(outer, tie_word_embeddings=False)).has_tied_head


# Refusing.


@pytest.mark.parametrize(
    ("config", "fault"),
    [
        ({}, "model_type must be one of"),
        ({"model_type": "llama"}, "got 'llama'"),
        ({"model_type": ["gemma"]}, "got ['gemma']"),
        ({"model_type": "gemma3n_audio", **SIZES}, "got 'gemma3n_audio'"),
        ({"model_type": "gemma3"}, "must hold a text_config object, got None"),
        ({"model_type": "gemma3", "text_config": [1]}, "must hold a text_config object, got [1]"),
        (
            {"model_type": "gemma3", "text_config": {"model_type": "gemma2"}},
            "text_config.model_type must be 'gemma3_text', got 'gemma2'",
        ),
    ],
)
def test_not_a_decoder_that_we_carry(config, fault):
    message = refusal(config)
    assert fault in message


@pytest.mark.parametrize("wrap", [flat, nested], ids=["flat", "nested"])
def test_unknown_keys_are_named(wrap):
    keys = {"altup_num_inputs": 4, "layer_scalar": True}
    message = refusal(flat("gemma3_text", **keys) if wrap is flat else nested(**keys))
    assert "unknown keys altup_num_inputs, layer_scalar" in message


def test_unknown_keys_around_a_nested_decoder_are_named():
    message = refusal(nested({"vision_use_gate": True, "audio_config": {}}))
    assert "unknown keys audio_config, vision_use_gate" in message


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("gemma", "sliding_window", 4096),
        ("gemma", "layer_types", ["full_attention"] * 6),
        ("gemma", "attn_logit_softcapping", 50.0),
        ("gemma", "query_pre_attn_scalar", 144),
        ("gemma", "rope_local_base_freq", 1e4),
        ("gemma2", "rope_local_base_freq", 1e4),
        # Gemma 2 alternates whatever this says.
        ("gemma2", "sliding_window_pattern", 6),
        ("vaultgemma", "_sliding_window_pattern", 6),
    ],
)
def test_a_key_that_the_family_passes_over_is_refused(family, key, value):
    message = refusal(flat(family, **{key: value}))
    assert f"unknown keys {key}" in message
    assert from_hugging_face(flat(family, **{key: None})) == from_hugging_face(flat(family))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("use_bidirectional_attention", True),
        ("attention_bias", True),
    ],
)
@pytest.mark.parametrize("wrap", ["flat", "nested", "outer"])
def test_another_function_is_refused(key, value, wrap):
    config = {
        "flat": flat("gemma3_text", **{key: value}),
        "nested": nested(**{key: value}),
        "outer": nested({key: value}),
    }[wrap]
    message = refusal(config)
    assert f"{key} must be" in message
    assert f"got {value!r}" in message


@pytest.mark.parametrize("key", list(SIZES))
def test_missing_size_is_named(key):
    config = flat("gemma3_text")
    del config[key]
    message = refusal(config)
    assert f"{key} is missing" in message


def test_all_faults_are_listed_at_once():
    config = flat("gemma3_text", head_dim="256", attention_bias=True, magic=1)
    del config["hidden_size"]
    message = refusal(config, {"eos_token_id": "1"})
    for fault in ("hidden_size is missing", "head_dim", "attention_bias", "magic", "eos_token_id"):
        assert fault in message


@pytest.mark.parametrize(
    "layer_types",
    [
        ["full_attention"] * 5,
        ["full_attention"] * 7,
        [],
        ["full_attention"] * 5 + ["chunked_attention"],
        ["full"] * 6,
    ],
)
def test_layer_types_of_wrong_length_or_spelling(layer_types):
    message = refusal(flat("gemma3_text", layer_types=layer_types))
    assert f"must be 6 of sliding_attention, full_attention, got {len(layer_types)}" in message
    for name in set(layer_types) - {"full_attention"}:
        assert name in message


@pytest.mark.parametrize("period", [0, -6])
def test_a_period_that_is_none(period):
    message = refusal(flat("gemma3_text", sliding_window_pattern=period))
    assert f"a period of 1 or more, got {period}" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "2560"),
        ("hidden_size", 2560.0),
        ("hidden_size", True),
        ("num_hidden_layers", "26"),
        ("num_hidden_layers", [26]),
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", 10**400),
        ("vocab_size", -1),
        ("rms_norm_eps", math.nan),
        ("rms_norm_eps", 0),
        ("query_pre_attn_scalar", math.inf),
        ("query_pre_attn_scalar", 10**400),
        ("tie_word_embeddings", "false"),
        ("tie_word_embeddings", 0),
        ("eos_token_id", "1"),
        ("eos_token_id", [1, None]),
        ("eos_token_id", {"id": 1}),
        ("bos_token_id", 1.0),
        ("layer_types", "sliding_attention"),
        ("layer_types", 6),
        ("layer_types", [["full_attention"]] * 6),
        ("rope_scaling", "linear"),
        ("rope_parameters", [1e4]),
        ("final_logit_softcapping", "30"),
        ("final_logit_softcapping", False),
        ("hidden_activation", ["gelu_pytorch_tanh"]),
    ],
)
def test_wrong_value_is_named(key, value):
    message = refusal(flat("gemma3_text", **{key: value}))
    # The name in the file, or ours where the value is of the right kind and makes no sense.
    ours = {"num_hidden_layers": "layers", "rms_norm_eps": "norm_epsilon"}
    assert key in message or ours[key] in message


def test_messages_stay_short():
    assert len(refusal(flat("gemma3_text", hidden_size=["x" * 100] * 1000))) < 400


# Changing a valid file a little: a configuration or one kind of error, whatever is changed.

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 300)
    | st.integers()
    | st.floats()
    | st.sampled_from(["", "linear", "default", "full_attention", "gemma2", "gelu"])
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["rope_type", "type", "factor", "rope_theta", "full_attention", "x"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)
KEYS = sorted({key for config in TINY.values() for key in config} | {"text_config", "unheard_of"})


@settings(max_examples=250, deadline=None, derandomize=True)
@given(
    base=st.sampled_from(sorted(TINY)),
    changes=st.dictionaries(st.sampled_from(KEYS), JSON, max_size=3),
    removed=st.sets(st.sampled_from(KEYS), max_size=2),
    is_inner=st.booleans(),
    generation=st.none() | st.fixed_dictionaries({"eos_token_id": JSON}),
)
def test_a_changed_file_gives_a_configuration_or_a_config_error(
    base, changes, removed, is_inner, generation
):
    config = copy.deepcopy(TINY[base])
    part = config["text_config"] if is_inner and "text_config" in config else config
    part.update(changes)
    for key in removed:
        part.pop(key, None)
    try:
        read = from_hugging_face(config, generation=generation)
    except ConfigError:
        return
    # What is read has been checked, so it can be counted and written again.
    assert read.parameter_count > 0
    assert from_hugging_face(to_hugging_face(read)) == read


# Writing.


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_variant_survives_being_written(name):
    assert from_hugging_face(to_hugging_face(VARIANTS[name])) == VARIANTS[name]


@pytest.mark.parametrize("name", sorted(TINY))
def test_tiny_configuration_survives_being_written(name):
    config = from_hugging_face(TINY[name])
    assert from_hugging_face(to_hugging_face(config)) == config


def test_a_whole_number_is_written_as_an_integer():
    # transformers' class refuses 168.0 here.
    scalar = to_hugging_face(variant("gemma-3-27b"))["query_pre_attn_scalar"]
    assert (scalar, type(scalar)) == (168, int)


@pytest.mark.parametrize(
    ("name", "changes", "lost"),
    [
        ("gemma-2b", {"attention_cap": 50.0}, "attention_cap"),
        ("gemma-2b", {"query_scalar": 144.0}, "query_scalar"),
        ("gemma-2-2b", {"local_rope": RopeSpec(theta=2e4)}, "local_rope"),
        ("gemma-2-2b", {"has_query_key_norm": True}, "has_query_key_norm"),
        ("vaultgemma-1b", {"has_post_norms": True}, "has_post_norms"),
    ],
)
def test_what_a_family_cannot_say_is_not_written(name, changes, lost):
    with pytest.raises(ConfigError, match=f"cannot express this configuration's {lost}"):
        to_hugging_face(replace(variant(name), **changes))


def test_a_family_that_transformers_does_not_have():
    with pytest.raises(ConfigError, match=r"family must be one of .*, got 'gemma9'"):
        to_hugging_face(replace(variant("gemma-2b"), family="gemma9"))


def test_the_norm_offset_is_that_of_the_format():
    stored_whole: GemmaConfig = replace(variant("gemma-3-270m"), norm_offset=0.0)
    assert from_hugging_face(to_hugging_face(stored_whole)).norm_offset == 1.0
