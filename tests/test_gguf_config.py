"""GGUF metadata: the same architectures as by name, and no guess that llama.cpp would not make."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refimpl_weights.gguf import GGUFFile
from refimpl_weights.synthetic_gguf import write_gguf

from refimpl.errors import ConfigError
from refimpl.model.config import GemmaConfig
from refimpl.model.gguf_config import from_gguf
from refimpl.model.layer_spec import AttentionKind, RopeSpec
from refimpl.model.variants import VARIANTS, variant

LOCAL, GLOBAL = AttentionKind.LOCAL, AttentionKind.GLOBAL

# As it stands in the released Gemma 3 270M; float32 numbers as the reader gives them.
REAL_270M = {
    "general.architecture": "gemma3",
    "general.name": "Gemma 3 270m",
    "general.file_type": 15,
    "gemma3.context_length": 32768,
    "gemma3.embedding_length": 640,
    "gemma3.block_count": 18,
    "gemma3.feed_forward_length": 2048,
    "gemma3.attention.head_count": 4,
    "gemma3.attention.head_count_kv": 1,
    "gemma3.attention.layer_norm_rms_epsilon": 9.999999974752427e-07,
    "gemma3.attention.key_length": 256,
    "gemma3.attention.value_length": 256,
    "gemma3.rope.freq_base": 1_000_000.0,
    "gemma3.attention.sliding_window": 512,
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.bos_token_id": 2,
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.ggml.unknown_token_id": 3,
    "tokenizer.ggml.padding_token_id": 0,
    "tokenizer.ggml.add_bos_token": True,
}


def stored(config: GemmaConfig, architecture: str, **keys) -> dict:
    """What llama.cpp's converter writes for a configuration, and further keys with "__" as dot."""
    metadata = {
        "context_length": config.context_length,
        "embedding_length": config.width,
        "block_count": config.num_layers,
        "feed_forward_length": config.feed_forward_width,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.layer_norm_rms_epsilon": 9.999999974752427e-07,
        "attention.key_length": config.head_width,
        "attention.value_length": config.head_width,
        **{key.replace("__", "."): value for key, value in keys.items()},
    }
    named = {f"{architecture}.{key}": value for key, value in metadata.items()}
    return {"general.architecture": architecture, **named}


def converted(name: str) -> dict:
    """A published size as llama.cpp's converter writes it."""
    config = variant(name)
    if config.family == "gemma":
        return stored(config, "gemma")
    if config.family == "gemma2":
        return stored(
            config,
            "gemma2",
            attention__sliding_window=4096,
            attn_logit_softcapping=50.0,
            final_logit_softcapping=30.0,
        )
    factor = config.global_rope.factor
    scaling = {"rope__scaling__type": "linear", "rope__scaling__factor": factor}
    return stored(
        config,
        "gemma3",
        attention__sliding_window=config.window,
        rope__freq_base=1e6,
        **(scaling if factor != 1 else {}),
    )


def refusal(metadata: dict) -> str:
    with pytest.raises(ConfigError) as caught:
        from_gguf(metadata, vocab_size=262_144)
    return str(caught.value)


# Reading.


def test_released_270m_is_the_variant_but_for_the_norm_offset():
    config = from_gguf(REAL_270M, vocab_size=262_144)
    assert config == replace(variant("gemma-3-270m"), norm_offset=0.0)
    assert config.norm_epsilon == 1e-6, "the float32 nearest to 1e-6 means 1e-6"


# Newer ones say more: `test_gguf_config_newer.py`.
OLDER = {name for name, config in VARIANTS.items() if config.norm_offset == 1.0}


@pytest.mark.parametrize("name", sorted(OLDER - {"vaultgemma-1b"}))
def test_every_published_size_is_the_variant_but_for_the_norm_offset(name):
    # The score scales of the two 27B are not stored: they follow from their numbers of layers.
    config = from_gguf(converted(name), vocab_size=variant(name).vocab_size)
    assert config == replace(variant(name), norm_offset=0.0)


@pytest.mark.parametrize(
    ("architecture", "layers", "scalar"),
    [
        ("gemma2", 46, 2304 / 8),
        ("gemma3", 62, 2304 / 8),
        # Another model's number of layers is nothing special.
        ("gemma2", 62, 256.0),
        ("gemma3", 46, 256.0),
        ("gemma", 46, 256.0),
        ("gemma2", 42, 256.0),
    ],
)
def test_score_scale_follows_from_the_number_of_layers(architecture, layers, scalar):
    config = replace(variant("gemma-2-2b"), layer_kinds=(GLOBAL,) * layers)
    keys = {"attention__sliding_window": 16, "rope__freq_base": 1e6}
    metadata = stored(config, architecture, **(keys if architecture != "gemma" else {}))
    assert from_gguf(metadata, vocab_size=9).query_scalar == scalar


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        (
            "gemma",
            {
                "family": "gemma",
                "num_kv_heads": 1,
                "layer_kinds": (GLOBAL,) * 2,
                "window": None,
            },
        ),
        (
            "gemma2",
            {
                "family": "gemma2",
                "num_kv_heads": 2,
                "layer_kinds": (LOCAL, GLOBAL) * 2,
                "window": 8,
                "attention_cap": 50.0,
                "final_cap": 30.0,
                "has_post_norms": True,
            },
        ),
        (
            "gemma3",
            {
                "family": "gemma3_text",
                "num_kv_heads": 1,
                "layer_kinds": (LOCAL,) * 5 + (GLOBAL,),
                "window": 8,
                "global_rope": RopeSpec(theta=1e6, factor=8.0),
                "has_post_norms": True,
                "has_query_key_norm": True,
            },
        ),
    ],
)
def test_synthetic_files(tmp_path, architecture, expected):
    factor = 8.0 if architecture == "gemma3" else None
    path = write_gguf(tmp_path / "x.gguf", architecture=architecture, rope_factor=factor)
    common = {
        "vocab_size": 512,
        "width": 256,
        "num_heads": 4,
        "head_width": 64,
        "feed_forward_width": 512,
        "context_length": 32768,
        "query_scalar": 64.0,
        "norm_offset": 0.0,
        "eos_ids": (1, 6),
    }
    assert from_gguf(GGUFFile(path).metadata, vocab_size=512) == GemmaConfig(**common, **expected)


@pytest.mark.parametrize(
    ("keys", "local", "everywhere_else"),
    [
        ({}, RopeSpec(theta=1e4), RopeSpec(theta=1e6)),
        (
            {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
            RopeSpec(theta=1e4),
            RopeSpec(theta=1e6, factor=8.0),
        ),
        # llama.cpp takes a factor without a type for a linear one.
        ({"rope.scaling.factor": 8.0}, RopeSpec(theta=1e4), RopeSpec(theta=1e6, factor=8.0)),
        (
            {"rope.scaling.type": "none", "rope.scaling.factor": 8.0},
            RopeSpec(theta=1e4),
            RopeSpec(theta=1e6),
        ),
        ({"rope.scaling.type": "linear"}, RopeSpec(theta=1e4), RopeSpec(theta=1e6)),
        ({"rope.freq_base_swa": 2e4}, RopeSpec(theta=2e4), RopeSpec(theta=1e6)),
    ],
)
def test_rotary_embedding_of_gemma_3(keys, local, everywhere_else):
    metadata = REAL_270M | {f"gemma3.{key}": value for key, value in keys.items()}
    config = from_gguf(metadata, vocab_size=262_144)
    assert (config.local_rope, config.global_rope) == (local, everywhere_else)


def test_rotary_embedding_of_gemma_2():
    metadata = converted("gemma-2-2b") | {"gemma2.rope.scaling.factor": 4.0}
    config = from_gguf(metadata, vocab_size=9)
    assert config.local_rope == config.global_rope == RopeSpec(theta=1e4, factor=4.0)
    config = from_gguf(metadata | {"gemma2.rope.freq_base_swa": 2e4}, vocab_size=9)
    assert config.local_rope == RopeSpec(theta=2e4, factor=4.0)


def test_the_first_files_of_gemma_2_lack_what_llama_cpp_fills_in():
    metadata = stored(variant("gemma-2-9b"), "gemma2")
    config = from_gguf(metadata, vocab_size=256_000)
    assert config == replace(variant("gemma-2-9b"), norm_offset=0.0)


@pytest.mark.parametrize("period", [1, 2, 3])
def test_a_stored_period_of_layers(period):
    metadata = REAL_270M | {"gemma3.attention.sliding_window_pattern": period}
    kinds = from_gguf(metadata, vocab_size=262_144).layer_kinds
    assert kinds == ((LOCAL,) * (period - 1) + (GLOBAL,)) * (18 // period)


def test_as_many_key_heads_as_heads_where_the_file_does_not_say():
    metadata = converted("gemma-7b")
    del metadata["gemma.attention.head_count_kv"]
    assert from_gguf(metadata, vocab_size=9).num_kv_heads == 16


def test_every_id_that_ends_a_text():
    ids = {"eos_token_id": 1, "eot_token_id": 106, "eom_token_id": 106}
    metadata = REAL_270M | {f"tokenizer.ggml.{key}": value for key, value in ids.items()}
    assert from_gguf(metadata, vocab_size=262_144).eos_ids == (1, 106)
    without = {key: value for key, value in REAL_270M.items() if "token_id" not in key}
    config = from_gguf(without, vocab_size=262_144)
    assert (config.pad_id, config.bos_id, config.eos_ids) == (0, 2, (1,))


def test_head_and_vocabulary_come_from_the_tensors():
    config = from_gguf(
        REAL_270M | {"gemma3.vocab_size": 17}, vocab_size=262_144, has_tied_head=False
    )
    assert (config.vocab_size, config.has_tied_head) == (262_144, False)


# Refusing.


@pytest.mark.parametrize("architecture", [None, "llama", "gemma4n", "gemma-embedding", ["gemma"]])
def test_architecture_that_we_do_not_carry(architecture):
    message = refusal(REAL_270M | {"general.architecture": architecture})
    expected = "gemma, gemma2, gemma3, gemma3n, gemma4"
    assert f"must be one of {expected}, got {architecture!r}" in message


NEEDED = [
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
    "attention.key_length",
    "attention.sliding_window",
    "rope.freq_base",
]


@pytest.mark.parametrize("key", NEEDED)
def test_missing_key_is_named(key):
    metadata = dict(REAL_270M)
    del metadata[f"gemma3.{key}"]
    message = refusal(metadata)
    assert f"{key} missing" in message


def test_all_missing_keys_are_named_at_once():
    message = refusal({"general.architecture": "gemma3"})
    assert ", ".join(NEEDED[:7]) in message
    assert all(key in message for key in NEEDED)


@pytest.mark.parametrize(
    ("architecture", "key"),
    [
        ("gemma3", "attention.causal"),
        ("gemma3", "pooling_type"),
        ("gemma3", "rope.scale_linear"),
        ("gemma3", "expert_count"),
        # Known, but not to this architecture.
        ("gemma", "attention.sliding_window"),
        ("gemma", "final_logit_softcapping"),
        ("gemma", "rope.freq_base_swa"),
    ],
)
def test_key_that_the_architecture_does_not_have(architecture, key):
    base = REAL_270M if architecture == "gemma3" else converted("gemma-2b")
    message = refusal(base | {f"{architecture}.{key}": 1})
    assert f"{key} is unknown and may change the function" in message


def test_keys_outside_the_architecture_are_none_of_its_business():
    metadata = REAL_270M | {"general.quantized_by": "x", "llama.expert_count": 8, "split.no": 0}
    assert from_gguf(metadata, vocab_size=262_144) == from_gguf(REAL_270M, vocab_size=262_144)


@pytest.mark.parametrize("key", ["attention.value_length", "rope.dimension_count"])
def test_widths_that_must_be_the_head_width(key):
    assert f"{key} must equal attention.key_length 256, got 128" in refusal(
        REAL_270M | {f"gemma3.{key}": 128}
    )


@pytest.mark.parametrize(
    ("key", "value", "fault"),
    [
        ("gemma3.rope.scaling.type", "yarn", "rope.scaling.type must be none or linear, got 'yar"),
        ("gemma3.rope.scaling.type", 1, "rope.scaling.type must be a text, got 1"),
        ("gemma3.rope.scaling.factor", 0.0, "global_rope.factor must be above 0"),
        ("gemma3.attention.head_count_kv", [1] * 18, "head_count_kv must be an integer, got [1,"),
        ("gemma3.attention.head_count_kv", 0, "num_kv_heads must be at least 1, got 0"),
        ("gemma3.attention.head_count_kv", 3, "must be a multiple of num_kv_heads"),
        ("gemma3.attention.head_count", 0, "num_heads must be at least 1, got 0"),
        ("gemma3.attention.sliding_window", 0, "local layers need a window"),
        ("gemma3.attention.sliding_window_pattern", 0, "a period of 1 or more, got 0"),
        ("gemma3.attention.sliding_window_pattern", [True] * 18, "must be an integer, got [True,"),
        ("gemma3.attention.layer_norm_rms_epsilon", math.nan, "must be a finite number, got nan"),
        ("gemma3.block_count", 0, "at least one layer"),
        ("gemma3.block_count", 10**6, "at most 1024 layers"),
        ("gemma3.final_logit_softcapping", -30.0, "final_cap must be above 0"),
        ("tokenizer.ggml.bos_token_id", "2", "bos_token_id must be an integer, got '2'"),
        ("tokenizer.ggml.eot_token_id", 262_144, "eos_ids must be in 0..262143, got [262144]"),
    ],
)
def test_wrong_value_is_refused(key, value, fault):
    message = refusal(REAL_270M | {key: value})
    assert fault in message


def test_no_heads_in_a_27b():
    message = refusal(converted("gemma-3-27b") | {"gemma3.attention.head_count": 0})
    assert "num_heads must be at least 1" in message


def test_all_faults_are_listed_at_once():
    changes = {
        "gemma3.attention.value_length": 128,
        "gemma3.block_count": "18",
        "gemma3.magic": 1,
        "tokenizer.ggml.eos_token_id": 1.0,
    }
    metadata = REAL_270M | changes
    del metadata["gemma3.context_length"]
    message = refusal(metadata)
    for key in ("value_length", "block_count", "magic", "eos_token_id", "context_length"):
        assert key in message


VALUES = (
    st.booleans()
    | st.integers(-2, 300)
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.lists(st.integers(0, 3) | st.booleans(), max_size=3)
)
ALL_KEYS = sorted(
    {
        *REAL_270M,
        "gemma3.rope.scaling.type",
        "gemma3.rope.scaling.factor",
        "gemma3.rope.freq_base_swa",
    }
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    changes=st.dictionaries(st.sampled_from(ALL_KEYS), VALUES, max_size=3),
    removed=st.sets(st.sampled_from(ALL_KEYS), max_size=1),
)
def test_changed_metadata_give_a_configuration_or_a_config_error(changes, removed):
    metadata = {k: v for k, v in (REAL_270M | changes).items() if k not in removed}
    try:
        config = from_gguf(metadata, vocab_size=262_144)
    except ConfigError:
        return
    assert config.parameter_count > 0
