"""Bugs that ports of Gemma have had in structure: norms, windows, caps, names, padding.

One test for each, named after its row in our list of known bugs; `test_port_bugs_rope.py`,
`_numerics.py` and `_ids.py` have the other rows. A test asserts what is right within a bound and,
where the bug can be played, that it is far outside of it. Where a docstring says "vllm #5908", that
is the number of an issue or pull request of the project.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from refimpl_weights import synthetic_gguf

from refimpl.model.cache import KVCache
from refimpl.model.config import GemmaConfig
from refimpl.model.gguf_config import from_gguf
from refimpl.model.hf_config import from_hugging_face, to_hugging_face
from refimpl.model.implementations import implementations_for
from refimpl.model.numerics import FLOAT32
from refimpl.model.variants import VARIANTS
from tests.tiny_models import TinyModel, tiny_model
from tests.tiny_variations import (
    GLOBAL,
    KIND_NAMES,
    LOCAL,
    judge,
    load_tiny,
    over_cache,
    text_tensors,
    traced,
    variation,
)

OVER_CACHE = implementations_for(FLOAT32, phase="prefill")

# Where each norm's result can be seen, and what the files call its weight.
TWO_NORMS = {"attention.input": "input_layernorm", "feed_forward.input": "post_attention_layernorm"}
VAULT_NORMS = {**TWO_NORMS, "feed_forward.input": "pre_feedforward_layernorm"}
FOUR_NORMS = {
    **VAULT_NORMS,
    "attention.output": "post_attention_layernorm",
    "feed_forward.output": "post_feedforward_layernorm",
}
HEAD_NORMS = {"attention.query": "self_attn.q_norm", "attention.key": "self_attn.k_norm"}
HUGGING_FACE_NORMS = {
    "gemma_mha": TWO_NORMS,
    "vaultgemma": VAULT_NORMS,
    "gemma2": FOUR_NORMS,
    "gemma3": FOUR_NORMS | HEAD_NORMS,
}
GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}


@cache
def first_layer(name: str) -> Mapping[str, np.ndarray]:
    """All intermediates of three single tokens in a model of one layer."""
    model = tiny_model(name)
    return trace_of_three(variation(model, layer_kinds=model.config.layer_kinds[:1]))


def trace_of_three(model: TinyModel) -> Mapping[str, np.ndarray]:
    # Position 0 turns nothing, so queries and keys are what their norms made of them.
    tokens, positions = np.array([[100], [300], [450]]), np.zeros((3, 1), np.int32)
    trace = traced(model, "layers.*", "final_norm")(tokens, positions)[1]
    return {key.removeprefix("layers.0."): np.asarray(value) for key, value in trace.items()}


def gain_error(normed: np.ndarray, gain: np.ndarray) -> float:
    """A norm's results over its gain have a mean square of 1, less the epsilon's share of 1e-5."""
    return float(np.abs(np.sqrt(np.mean((normed / gain) ** 2, axis=-1)) - 1).max())


def assert_gain(normed: np.ndarray, gain: np.ndarray) -> None:
    assert gain_error(normed, gain) < 1e-4
    assert gain_error(normed, gain + 1) > 0.02
    assert gain_error(normed, gain - 1) > 0.02


@pytest.mark.parametrize("name", HUGGING_FACE_NORMS)
def test_row_03_one_is_added_to_norm_weights_of_hugging_face_files(name: str) -> None:
    """The "1 +" forgotten, or added twice: safetensors of Gemma 1 to 3 hold the gain less one
    (transformers `GemmaRMSNorm`).
    """
    tensors, trace = text_tensors(name, layers=1), first_layer(name)
    for place, weight in HUGGING_FACE_NORMS[name].items():
        assert_gain(trace[place], 1 + tensors[f"layers.0.{weight}.weight"])
    assert_gain(trace["final_norm"], 1 + tensors["norm.weight"])


@pytest.mark.parametrize("architecture", synthetic_gguf.ARCHITECTURES)
def test_row_03_nothing_is_added_to_norm_weights_of_gguf_files(
    architecture: str, tmp_path: Path
) -> None:
    """The "1 +" added a second time: llama.cpp's converter has added it (`conversion/gemma.py`)."""
    path = tmp_path / "tiny.gguf"
    synthetic_gguf.write_gguf(path, architecture=architecture, tensor_type="F32", layers=1)
    tensors = synthetic_gguf.tensors(architecture, layers=1)
    trace = trace_of_three(load_tiny(path))
    places = {"gemma": VAULT_NORMS, "gemma2": FOUR_NORMS, "gemma3": FOUR_NORMS | HEAD_NORMS}
    for place, weight in places[architecture].items():
        assert_gain(trace[place], tensors[f"blk.0.{GGUF_NAMES[weight]}.weight"])
    assert_gain(trace["final_norm"], tensors["output_norm.weight"])


def test_row_30_post_attention_layernorm_of_gemma_1_is_the_norm_before_the_feed_forward() -> None:
    """Gemma 1 took Llama's names: there `post_attention_layernorm` acts on what the feed-forward
    reads, and from Gemma 2 on, under the same name, on what attention adds.
    """
    name = "layers.0.post_attention_layernorm.weight"
    for model, right, wrong in (
        ("gemma_mha", "feed_forward.input", "attention.output"),
        ("gemma2", "attention.output", "feed_forward.input"),
    ):
        gain, trace = 1 + text_tensors(model, layers=1)[name], first_layer(model)
        assert gain_error(trace[right], gain) < 1e-4
        assert gain_error(trace[wrong], gain) > 0.02


def gguf_metadata(config: GemmaConfig) -> dict[str, Any]:
    """What llama.cpp's converter writes; it stores no query scalar and no layer kinds."""
    architecture = {"gemma3_text": "gemma3"}.get(config.family, config.family)
    stored = {
        "context_length": config.context_length,
        "embedding_length": config.width,
        "block_count": config.num_layers,
        "feed_forward_length": config.feed_forward_width,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.key_length": config.head_width,
        "attention.value_length": config.head_width,
        "attention.sliding_window": config.window,
        "rope.freq_base": 1e6 if architecture == "gemma3" else None,
    }
    values = {f"{architecture}.{key}": value for key, value in stored.items() if value is not None}
    return {"general.architecture": architecture, **values}


def every_reading(variant: str) -> dict[str, GemmaConfig]:
    """A published size as our table has it and as its files say it."""
    config = VARIANTS[variant]
    # Our writer and our reader could agree on a wrong meaning of these words.
    words = [KIND_NAMES[kind] for kind in config.layer_kinds]
    written = to_hugging_face(config) | ({"layer_types": words} if config.family != "gemma" else {})
    read = {"table": config, "transformers 5": from_hugging_face(written)}
    if config.family == "vaultgemma" or config.norm_offset == 0.0:
        # No GGUF, or one that says it all: `test_gguf_config_newer.py`.
        return read
    released = {key: value for key, value in written.items() if key != "layer_types"}
    read["released"] = from_hugging_face(released)
    read["GGUF"] = from_gguf(gguf_metadata(config), vocab_size=config.vocab_size)
    return read


def test_row_08_query_scalar_is_not_always_the_head_width_nor_width_over_heads() -> None:
    """Gemma 2 9B scaled by 224 instead of 256, 27B by its head width of 128 instead of 144 or 168
    (transformers #31891, llama.cpp #8444 and #13951).
    """
    width_over_heads = {"gemma-2-27b": 144.0, "gemma-3-27b": 168.0}
    for variant, table in VARIANTS.items():
        # Since Gemma 3n scores are not scaled.
        expected = width_over_heads.get(variant, 256.0 if table.norm_offset else 1.0)
        for source, config in every_reading(variant).items():
            assert config.query_scalar == expected, (variant, source)
    assert VARIANTS["gemma-2-27b"].query_scale == pytest.approx(1 / 12, rel=1e-15)
    assert VARIANTS["gemma-2-9b"].width / VARIANTS["gemma-2-9b"].num_heads == 224


LENGTH, LAYER_KINDS = 40, (LOCAL, GLOBAL)
# The second row differs in its first token alone.
TOKENS = np.stack([np.arange(200, 240), np.arange(200, 240)]).astype(np.int32)
TOKENS[1, 0] = 300
POSITIONS = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), TOKENS.shape)


class Pass(NamedTuple):
    """Results of TOKENS in one model."""

    logits: np.ndarray
    trace: Mapping[str, np.ndarray]


@cache
def two_layers(**changes: Any) -> Pass:
    """Gemma 2's first two layers, one local, one global; a full pass."""
    model = variation(tiny_model("gemma2"), **{"layer_kinds": LAYER_KINDS, **changes})
    logits, trace = traced(model, "layers.*")(TOKENS, POSITIONS)
    return Pass(np.asarray(logits), {key: np.asarray(value) for key, value in trace.items()})


@cache
def two_layers_over_a_cache() -> np.ndarray:
    """All logits again, from eight tokens at a time and a ring of 16 places."""
    model = variation(tiny_model("gemma2"), layer_kinds=LAYER_KINDS)
    memory = KVCache.create(model.config, batch=2, length=LENGTH, chunk=8, block=8)
    run, parts = over_cache(model, OVER_CACHE), []
    for begin in range(0, LENGTH, 8):
        part = slice(begin, begin + 8)
        logits, memory = run(memory, TOKENS[:, part], POSITIONS[:, part])
        parts.append(np.asarray(logits))
    return np.concatenate(parts, axis=1)


@cache
def two_layers_exactly() -> np.ndarray:
    return judge("gemma2", LAYER_KINDS, TOKENS).logits


def error(logits: np.ndarray) -> float:
    return float(np.abs(logits - two_layers_exactly()).max())


# Float32 against the float64 oracle; logits reach 10.
BOUND = 2e-5


def test_row_09_attention_scores_are_capped() -> None:
    """Gemma 2's cap of 50 dropped, as fast attention kernels had no place for it (vllm #5908,
    transformers #32522).
    """
    right = two_layers()
    scores = right.trace["layers.1.attention.scores"]
    query, key = (right.trace[f"layers.1.attention.{name}"] for name in ("query", "key"))
    grouped = query.reshape(2, LENGTH, key.shape[2], -1, key.shape[3]).astype(np.float64)
    uncapped = np.einsum("btkgh,bskh->bkgts", grouped, key) * 12**-0.5
    assert np.abs(uncapped).max() > 50
    assert np.abs(scores - 50 * np.tanh(uncapped / 50)).max() < 1e-4

    assert error(right.logits) < BOUND
    assert error(two_layers_over_a_cache()) < BOUND
    assert error(two_layers(attention_cap=None).logits) > 100 * BOUND


def test_row_10_local_layers_see_a_window() -> None:
    """The sliding window ignored, or cut out of the wrong place of mask or cache (transformers
    #32522 and #35681, sglang #4823, keras-hub #2186).
    """
    assert tiny_model("gemma2").config.window == 8
    assert error(two_layers().logits) < BOUND
    assert error(two_layers_over_a_cache()) < BOUND
    ignored = two_layers(layer_kinds=(GLOBAL, GLOBAL)).logits
    assert np.abs(ignored - two_layers_exactly())[:, :8].max() < BOUND  # Short prompts hide it.
    assert error(ignored) > 100 * BOUND


@pytest.mark.parametrize("memory", ["full pass", "ring"])
def test_row_11_window_counts_the_query_itself(memory: str) -> None:
    """W + 1 keys visible, or W - 1, by an inclusive bound (transformers #29623 and #39408,
    Megatron-Bridge #2656).
    """
    # With one local layer, a token changes the logits of the last place iff that place sees it.
    model = variation(tiny_model("gemma3"), layer_kinds=(LOCAL,))
    length = 24
    tokens = np.full((length + 1, length), 200, np.int32)
    np.fill_diagonal(tokens, 300)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    if memory == "full pass":
        logits = traced(model)(tokens, positions)[0]
    else:
        ring = KVCache.create(model.config, batch=length + 1, length=length, chunk=8, block=8)
        run = over_cache(model, OVER_CACHE)
        _, ring = run(ring, tokens[:, :8], positions[:, :8])
        _, ring = run(ring, tokens[:, 8:16], positions[:, 8:16])
        logits, _ = run(ring, tokens[:, 16:], positions[:, 16:])
    last = np.asarray(logits)[:, -1]
    change = np.abs(last[:-1] - last[-1]).max(axis=-1)
    assert np.flatnonzero(change > 1e-3).tolist() == list(range(length - 8, length))
    # Zero, but that a batch's rows may be summed in different orders.
    assert change[: length - 8].max() < 1e-6


def test_row_12_pattern_of_layers_begins_local() -> None:
    """Global layers at the wrong places, such as first in Gemma 2, which begins with a local one
    (transformers `configuration_gemma2.py`).
    """
    global_layers = {
        "gemma-2-2b": range(1, 26, 2),
        "gemma-2-9b": range(1, 42, 2),
        "gemma-2-27b": range(1, 46, 2),
        "gemma-3-270m": (5, 11, 17),
        "gemma-3-1b": (5, 11, 17, 23),
        "gemma-3-4b": (5, 11, 17, 23, 29),
        "gemma-3-12b": (5, 11, 17, 23, 29, 35, 41, 47),
        "gemma-3-27b": (5, 11, 17, 23, 29, 35, 41, 47, 53, 59),
        "gemma-3n-e2b": (4, 9, 14, 19, 24, 29),
        "gemma-3n-e4b": (4, 9, 14, 19, 24, 29, 34),
        "gemma-4-e2b": (4, 9, 14, 19, 24, 29, 34),
        "gemma-4-e4b": (5, 11, 17, 23, 29, 35, 41),
        "gemma-4-12b": (5, 11, 17, 23, 29, 35, 41, 47),
        "gemma-4-26b-a4b": (5, 11, 17, 23, 29),
        "gemma-4-31b": (5, 11, 17, 23, 29, 35, 41, 47, 53, 59),
    }
    for variant, table in VARIANTS.items():
        expected = list(global_layers.get(variant, range(table.num_layers)))
        for source, config in every_reading(variant).items():
            found = [i for i, kind in enumerate(config.layer_kinds) if kind is GLOBAL]
            assert found == expected, (variant, source)

    # And in the model: at a distance of more than a window, only the second layer sees a token.
    first, second = (two_layers().trace[f"layers.{layer}.residual"][:, 20:] for layer in (0, 1))
    assert np.abs(first[0] - first[1]).max() == 0
    assert np.abs(second[0] - second[1]).max() > 1e-3


def test_row_32_left_padding_changes_nothing() -> None:
    """Positions taken from places in the batch, padding included, or padding attended to. Prefill
    and decode may then disagree on where a row is (transformers' `generate` counts tokens, its
    `forward` places).
    """
    model = variation(tiny_model("gemma3"), layer_kinds=(LOCAL,))
    count, padding = 12, 4
    tokens = np.zeros((2, count + padding), np.int32)
    tokens[0, padding:] = tokens[1, :count] = np.arange(200, 200 + count)
    positions = np.full(tokens.shape, -1, np.int32)
    positions[0, padding:] = positions[1, :count] = np.arange(count)
    exact = judge("gemma3", [LOCAL], np.arange(200, 201 + count)[None]).logits[0]

    run = over_cache(model, OVER_CACHE)
    empty = KVCache.create(model.config, batch=2, length=64, chunk=16, block=8)
    logits, memory = run(empty, tokens, positions)
    for got in (np.asarray(logits)[0, padding:], np.asarray(logits)[1, :count]):
        assert np.abs(got - exact[:-1]).max() < BOUND

    def error_of_next(position: int) -> float:
        following, at = np.full(tokens.shape, 200 + count, np.int32), np.full_like(positions, -1)
        at[:, 0] = position
        logits, _ = run(memory, following, at)
        return float(np.abs(np.asarray(logits)[:, 0] - exact[-1]).max())

    assert error_of_next(count) < BOUND
    assert error_of_next(count + padding) > 100 * BOUND
    by_place = np.broadcast_to(np.arange(count + padding, dtype=np.int32), tokens.shape)
    attended = np.asarray(run(empty, tokens, by_place)[0])[0, padding:]
    assert np.abs(attended - exact[:-1]).max() > 100 * BOUND
