"""GGUF metadata of Gemma 3n and Gemma 4: with the tensors' shapes, the architectures by name."""

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.errors import ConfigError
from refimpl.model.config import GemmaConfig
from refimpl.model.gguf_config import from_gguf
from refimpl.model.layer_spec import AltUpSpec, AttentionKind, ExpertsSpec, RopeSpec
from refimpl.model.variants import VARIANTS, variant

LOCAL, GLOBAL = AttentionKind.LOCAL, AttentionKind.GLOBAL
Shapes = dict[str, tuple[int, ...]]
# float32, as the reader gives it.
EPSILON, INFINITE, CUTOFF = 9.999999974752427e-07, 1.0000000150474662e30, 1.6448535919189453
DIVISORS = [1.0] * 64 + [INFINITE] * 192

# As it stands in llama.cpp's own vocabulary file, which was made from the released 26B-A4B.
REAL_26B: dict[str, Any] = {
    "general.architecture": "gemma4",
    "gemma4.block_count": 30,
    "gemma4.context_length": 262144,
    "gemma4.embedding_length": 2816,
    "gemma4.feed_forward_length": 2112,
    "gemma4.attention.head_count": 16,
    "gemma4.attention.head_count_kv": [8, 8, 8, 8, 8, 2] * 5,
    "gemma4.rope.freq_base": 1000000.0,
    "gemma4.rope.freq_base_swa": 10000.0,
    "gemma4.attention.layer_norm_rms_epsilon": EPSILON,
    "gemma4.expert_count": 128,
    "gemma4.expert_used_count": 8,
    "gemma4.attention.key_length": 512,
    "gemma4.attention.value_length": 512,
    "gemma4.final_logit_softcapping": 30.0,
    "gemma4.attention.sliding_window": 1024,
    "gemma4.attention.shared_kv_layers": 0,
    "gemma4.embedding_length_per_layer_input": 0,
    "gemma4.attention.sliding_window_pattern": [True, True, True, True, True, False] * 5,
    "gemma4.attention.key_length_swa": 256,
    "gemma4.attention.value_length_swa": 256,
    "gemma4.expert_feed_forward_length": 704,
    "gemma4.rope.dimension_count": 512,
    "gemma4.rope.dimension_count_swa": 256,
    "tokenizer.ggml.bos_token_id": 2,
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.ggml.unknown_token_id": 3,
    "tokenizer.ggml.padding_token_id": 0,
    "tokenizer.ggml.mask_token_id": 4,
    "tokenizer.ggml.add_bos_token": True,
}


def shapes_of(config: GemmaConfig) -> Shapes:
    """Of those tensors that say something about the architecture."""
    shapes: Shapes = {}
    for index, spec in enumerate(config.layers):
        if spec.donor is None:
            matrix = spec.num_kv_heads * spec.head_width, config.width
            shapes[f"blk.{index}.attn_k.weight"] = matrix
            if not spec.values_are_keys:
                shapes[f"blk.{index}.attn_v.weight"] = matrix
    if config.laurel_rank is not None:
        shapes["blk.0.laurel_l.weight"] = config.laurel_rank, config.width
    if config.per_layer_input is not None:
        # The converter fills the table up with zeros.
        columns = config.num_layers * config.per_layer_input.width
        shapes["per_layer_token_embd.weight"] = config.vocab_size, columns
    return shapes


def converted(name: str) -> dict[str, Any]:
    """A published size as llama.cpp's converter writes it."""
    config, architecture = variant(name), "gemma4" if "-4-" in name else "gemma3n"
    widths = [spec.feed_forward_width for spec in config.layers]
    kv_heads = [spec.num_kv_heads for spec in config.layers]
    global_width = config.global_head_width or config.head_width
    values = {
        "context_length": config.context_length,
        "embedding_length": config.width,
        "block_count": config.num_layers,
        "feed_forward_length": widths[0],
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": kv_heads if len(set(kv_heads)) > 1 else kv_heads[0],
        "attention.layer_norm_rms_epsilon": EPSILON,
        "attention.key_length": global_width,
        "attention.value_length": global_width,
        "attention.sliding_window": config.window,
        "attention.sliding_window_pattern": [kind is LOCAL for kind in config.layer_kinds],
        "attention.shared_kv_layers": config.num_sharing_layers,
        "rope.freq_base": 1e6,
        "rope.freq_base_swa": 1e4,
        "final_logit_softcapping": 30.0,
        "embedding_length_per_layer_input": 256 if config.per_layer_input else 0,
    }
    if architecture == "gemma3n":
        sparse = [-math.inf if spec.gate_cutoff is None else CUTOFF for spec in config.layers]
        values |= {
            "feed_forward_length": widths,
            "altup.num_inputs": 4,
            "altup.active_idx": 0,
            "activation_sparsity_scale": sparse,
        }
    else:
        values |= {
            "feed_forward_length": widths if len(set(widths)) > 1 else widths[0],
            "attention.key_length_swa": 256,
            "attention.value_length_swa": 256,
            "rope.dimension_count": 512,
            "rope.dimension_count_swa": 256,
        }
    named = {f"{architecture}.{key}": value for key, value in values.items()}
    return {"general.architecture": architecture, **named}


def read(
    metadata: dict[str, Any], shapes: Shapes, divisors: list[float] | None = DIVISORS
) -> GemmaConfig:
    vocab_size = 262_144 if metadata.get("general.architecture") == "gemma4" else 262_400
    return from_gguf(metadata, vocab_size=vocab_size, shapes=shapes, rope_divisors=divisors)


def refusal(
    metadata: dict[str, Any], shapes: Shapes, divisors: list[float] | None = DIVISORS
) -> str:
    with pytest.raises(ConfigError) as caught:
        read(metadata, shapes, divisors)
    return str(caught.value)


SHAPES_26B = shapes_of(variant("gemma-4-26b-a4b"))
E2B_3N, SHAPES_3N = converted("gemma-3n-e2b"), shapes_of(variant("gemma-3n-e2b"))
E2B, SHAPES_E2B = converted("gemma-4-e2b"), shapes_of(variant("gemma-4-e2b"))


# Reading.


def test_released_26b_is_the_variant():
    config = from_gguf(REAL_26B, vocab_size=262_144, shapes=SHAPES_26B, rope_divisors=DIVISORS)
    assert config == variant("gemma-4-26b-a4b")


NEWER = {name for name, config in VARIANTS.items() if config.norm_offset == 0.0}


@pytest.mark.parametrize("name", sorted(NEWER - {"gemma-4-26b-a4b"}))
def test_every_published_size_is_the_variant(name):
    expected = variant(name)
    config = from_gguf(
        converted(name),
        vocab_size=expected.vocab_size,
        shapes=shapes_of(expected),
        rope_divisors=DIVISORS if "-4-" in name else None,
    )
    if expected.per_layer_input is not None:
        # As many rows as the table has, whose last ones are zeros in Gemma 3n.
        inputs = replace(expected.per_layer_input, vocab_size=expected.vocab_size)
        expected = replace(expected, per_layer_input=inputs)
    # The format does not tell the 12B's family from the others'.
    assert config == replace(expected, family=config.family)
    assert config.family == ("gemma4_text" if "-4-" in name else "gemma3n_text")


def test_what_absent_keys_mean_in_gemma_3n():
    absent = {
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.sliding_window_pattern",
        "attention.shared_kv_layers",
        "rope.freq_base_swa",
        "final_logit_softcapping",
    }
    kept = {k: v for k, v in E2B_3N.items() if k.removeprefix("gemma3n.") not in absent}
    assert read(kept, SHAPES_3N) == replace(read(E2B_3N, SHAPES_3N), num_kv_heads=8)
    short = kept | {
        "gemma3n.block_count": 5,
        "gemma3n.feed_forward_length": 8192,
        "gemma3n.activation_sparsity_scale": [-math.inf] * 5,
    }
    config = read(short, SHAPES_3N)
    assert (config.num_sharing_layers, config.gate_cutoffs) == (0, None)


def test_spelling_of_ollama():
    ollama = dict(E2B_3N)
    for key, alias in {
        "attention.key_length": "head_dim",
        "rope.freq_base_swa": "rope.freq_base_local",
    }.items():
        ollama[f"gemma3n.{alias}"] = ollama.pop(f"gemma3n.{key}")
    del ollama["gemma3n.attention.value_length"]
    ollama |= {"gemma3n.altup.correct_scale": True, "gemma3n.altup.lr_multiplier": 1.0}
    assert read(ollama, SHAPES_3N) == read(E2B_3N, SHAPES_3N)
    changed = ollama | {"gemma3n.head_dim": 128, "gemma3n.rope.freq_base_local": 2e4}
    config = read(changed, SHAPES_3N)
    assert (config.head_width, config.local_rope.theta) == (128, 2e4)


def test_what_absent_keys_mean_in_gemma_4():
    absent = {
        "attention.head_count_kv",
        "attention.value_length",
        "attention.value_length_swa",
        "attention.shared_kv_layers",
        "rope.dimension_count",
        "rope.dimension_count_swa",
        "rope.freq_base_swa",
        "final_logit_softcapping",
        "expert_count",
        "expert_used_count",
        "expert_feed_forward_length",
    }
    kept = {k: v for k, v in REAL_26B.items() if k.removeprefix("gemma4.") not in absent}
    expected = replace(
        read(REAL_26B, SHAPES_26B), num_kv_heads=16, global_num_kv_heads=None, experts=None
    )
    assert read(kept, SHAPES_26B) == expected


def test_a_period_of_layers():
    kinds = read(E2B_3N | {"gemma3n.attention.sliding_window_pattern": 2}, SHAPES_3N).layer_kinds
    assert kinds == (LOCAL, GLOBAL) * 15


def test_numbers_that_only_shapes_tell():
    shapes = SHAPES_3N | {
        "blk.0.laurel_l.weight": (17, 2048),
        "per_layer_token_embd.weight": (262_144, 30 * 256),
    }
    config = read(E2B_3N, shapes)
    assert config.laurel_rank == 17
    assert config.per_layer_input is not None
    assert config.per_layer_input.vocab_size == 262_144


@pytest.mark.parametrize(
    ("metadata", "shapes", "rows"),
    [(E2B_3N, SHAPES_3N, 99), (E2B_3N, SHAPES_3N, 300_000), (E2B, SHAPES_E2B, 262_143)],
)
def test_a_table_of_inputs_with_other_rows_than_ids_is_refused(metadata, shapes, rows):
    changed = shapes | {"per_layer_token_embd.weight": (rows, 35 * 256)}
    with pytest.raises(ConfigError, match=rf"per_layer_token_embd.weight has {rows:,} rows"):
        read(metadata, changed)


@pytest.mark.parametrize(("rotated", "proportion"), [(1, 1 / 256), (64, 0.25), (256, 1.0)])
def test_pairs_that_turn(rotated, proportion):
    divisors = [1.0] * rotated + [INFINITE] * (256 - rotated)
    config = read(REAL_26B, SHAPES_26B, divisors)
    assert config.global_rope == RopeSpec(theta=1e6, proportion=proportion)
    assert config.local_rope == RopeSpec(theta=1e4)


def test_stretched_global_layers():
    scaling = {"gemma4.rope.scaling.type": "linear", "gemma4.rope.scaling.factor": 8.0}
    config = read(REAL_26B | scaling, SHAPES_26B)
    assert config.global_rope == RopeSpec(theta=1e6, factor=8.0, proportion=0.25)
    assert config.local_rope == RopeSpec(theta=1e4)


def test_projections_of_values():
    assert read(REAL_26B, SHAPES_26B).values_are_keys
    local = {name: shape for name, shape in SHAPES_26B.items() if "attn_v" in name}
    assert len(local) == 25
    everywhere = SHAPES_26B | {f"blk.{i}.attn_v.weight": (1024, 2816) for i in range(30)}
    assert not read(REAL_26B, everywhere).values_are_keys
    # Queries, keys and values in one matrix.
    assert not read(
        REAL_26B, {f"blk.{i}.attn_qkv.weight": (1, 2816) for i in range(30)}
    ).values_are_keys
    # Of layers that take their keys elsewhere, it does not matter what the file has.
    assert not read(E2B, SHAPES_E2B).values_are_keys
    with_unused = SHAPES_E2B | {f"blk.{i}.attn_k.weight": (256, 1536) for i in range(15, 35)}
    assert read(E2B, with_unused) == read(E2B, SHAPES_E2B)


def test_streams_and_gates():
    keys = {
        "gemma3n.altup.num_inputs": 3,
        "gemma3n.altup.active_idx": 1,
        "gemma3n.activation_sparsity_scale": [1.6, *[-math.inf] * 29],
    }
    config = read(E2B_3N | keys, SHAPES_3N)
    assert config.altup == AltUpSpec(streams=3, active=1)
    assert config.gate_cutoffs == (1.6, *[None] * 29)


def test_experts():
    keys = {"gemma4.expert_count": 4, "gemma4.expert_used_count": 3}
    config = read(REAL_26B | keys, SHAPES_26B)
    assert config.experts == ExpertsSpec(count=4, chosen=3, width=704)


# Refusing.


@pytest.mark.parametrize(
    ("key", "value", "fault"),
    [
        ("attention.head_count_kv", [8] * 29, "head_count_kv must name all 30 layers, got 29"),
        ("attention.head_count_kv", [8, 4] * 15, "must be the same in all local layers"),
        ("attention.head_count_kv", 3, "must be a multiple of num_kv_heads"),
        ("attention.sliding_window_pattern", [True] * 3, "must name all 30 layers, got 3"),
        ("attention.sliding_window_pattern", [0, 1] * 15, "must be a list of true and false"),
        ("attention.sliding_window_pattern", 6, "must be a list of true and false, got 6"),
        ("feed_forward_length", [2112] * 31, "feed_forward_length must name all 30 layers, got 31"),
        ("feed_forward_length", "2112", "feed_forward_length must be an integer or a list"),
        ("attention.value_length", 256, "must equal attention.key_length 512, got 256"),
        ("attention.value_length_swa", 512, "must equal attention.key_length_swa 256, got 512"),
        ("rope.dimension_count", 128, "must equal attention.key_length 512, got 128"),
        ("rope.dimension_count_swa", 64, "must equal attention.key_length_swa 256, got 64"),
        ("attention.shared_kv_layers", 30, "num_sharing_layers must be 0 or more"),
        ("attention.shared_kv_layers", -1, "num_sharing_layers must be 0 or more"),
        ("expert_used_count", 0, "experts.chosen must be at least 1, got 0"),
        ("expert_used_count", 129, "experts.chosen must be at most experts.count 128, got 129"),
        ("expert_feed_forward_length", 0, "experts.width must be at least 1, got 0"),
        ("expert_feed_forward_length", [704] * 30, "must be an integer, got [704,"),
        ("expert_gating_func", 2, "expert_gating_func is unknown and may change the function"),
        ("altup.num_inputs", 4, "altup.num_inputs is unknown and may change the function"),
        ("block_count", 10**6, "at most 1024 layers, got 1000000"),
        ("block_count", 0, "must name all 0 layers"),
        ("attention.layer_norm_rms_epsilon", math.inf, "must be a finite number, got inf"),
    ],
)
def test_wrong_value_of_gemma_4_is_refused(key, value, fault):
    assert fault in refusal(REAL_26B | {f"gemma4.{key}": value}, SHAPES_26B)


@pytest.mark.parametrize(
    ("key", "value", "fault"),
    [
        ("activation_sparsity_scale", [CUTOFF] * 3, "must name all 30 layers, got 3"),
        ("activation_sparsity_scale", [math.inf] * 30, "must be a list of numbers below infinity"),
        ("altup.correct_scale", False, "altup.correct_scale must be True, got False"),
        ("altup.active_idx", 4, "altup must have 2 streams or more, one of them active"),
        ("embedding_length_per_layer_input", -1, "per_layer_input.width must be at least 1"),
        ("attention.sliding_window_pattern", 0, "a period of 1 or more, got 0"),
        ("expert_count", 8, "expert_count is unknown and may change the function"),
    ],
)
def test_wrong_value_of_gemma_3n_is_refused(key, value, fault):
    assert fault in refusal(E2B_3N | {f"gemma3n.{key}": value}, SHAPES_3N)


@pytest.mark.parametrize(
    ("metadata", "needed"),
    [
        (
            E2B_3N,
            ["activation_sparsity_scale", "altup.num_inputs", "embedding_length_per_layer_input"],
        ),
        (
            REAL_26B,
            ["attention.sliding_window_pattern", "attention.key_length_swa", "rope.freq_base"],
        ),
    ],
    ids=["gemma3n", "gemma4"],
)
def test_missing_keys_are_named_at_once(metadata, needed):
    kept = {k: v for k, v in metadata.items() if k.partition(".")[2] not in needed}
    message = refusal(kept, {})
    assert "missing, was the conversion complete?" in message
    assert all(key in message for key in needed)


@pytest.mark.parametrize(
    ("metadata", "shapes", "name"),
    [
        (E2B_3N, SHAPES_3N, "blk.0.laurel_l.weight"),
        (E2B_3N, SHAPES_3N, "per_layer_token_embd.weight"),
        (E2B, SHAPES_E2B, "per_layer_token_embd.weight"),
        (REAL_26B, SHAPES_26B, "blk.5.attn_k.weight"),
    ],
)
def test_missing_tensors_are_named(metadata, shapes, name):
    without = {key: shape for key, shape in shapes.items() if key != name}
    assert f"{name} must be a matrix, got nothing" in refusal(metadata, without)
    assert f"{name} must be a matrix, got (64,)" in refusal(metadata, shapes | {name: (64,)})


def test_values_in_some_global_layers_only():
    some = SHAPES_26B | {"blk.5.attn_v.weight": (1024, 2816)}
    assert "either all global layers have blk.*.attn_v.weight or none" in refusal(REAL_26B, some)


@pytest.mark.parametrize(
    "divisors",
    [
        # Too few, none that turns, others that turn slowly, and not the first ones.
        [1.0] * 64,
        [INFINITE] * 256,
        [1.0] * 64 + [8.0] * 192,
        [INFINITE] * 192 + [1.0] * 64,
        [1.0] * 64 + [math.nan] * 192,
    ],
)
def test_pairs_that_turn_in_another_way(divisors):
    message = refusal(REAL_26B, SHAPES_26B, divisors)
    assert "rope_freqs.weight must hold 256 numbers" in message or "proportion" in message


def test_pairs_of_which_nothing_is_said():
    assert "rope_freqs.weight is missing" in refusal(REAL_26B, SHAPES_26B, None)


VALUES = (
    st.booleans()
    | st.integers(-2, 300)
    | st.integers()
    | st.floats()
    | st.lists(st.integers(0, 3) | st.booleans() | st.floats(), max_size=3)
    | st.just([8] * 30)
    | st.just([True] * 30)
)
BASES = [(REAL_26B, SHAPES_26B), (E2B, SHAPES_E2B), (E2B_3N, SHAPES_3N)]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data(), base=st.sampled_from(range(len(BASES))))
def test_changed_metadata_give_a_configuration_or_a_config_error(data, base):
    metadata, shapes = BASES[base]
    keys = st.sampled_from(sorted(metadata))
    changes = data.draw(st.dictionaries(keys, VALUES, max_size=3))
    removed = data.draw(st.sets(keys, max_size=1))
    try:
        config = read({k: v for k, v in (metadata | changes).items() if k not in removed}, shapes)
    except ConfigError:
        return
    assert config.parameter_count > 0
