"""Caches: what a program computes over one is what a full pass computes, ring or not."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from refimpl_weights.synthetic import TINY

from refimpl.errors import InvalidRequestError
from refimpl.model.cache import KVCache
from refimpl.model.implementations import Implementations, implementations_for
from refimpl.model.layer_spec import AttentionKind
from refimpl.model.numerics import FLOAT32, HF_BFLOAT16, Numerics
from tests.checkpoint_files import bare
from tests.oracle import forward, from_hugging_face
from tests.tiny_models import GOLDEN, cached_pass, full_pass, golden_case, tiny_model

PREFILL = implementations_for(FLOAT32, phase="prefill")
DECODE = implementations_for(FLOAT32, phase="decode")
CHUNK = 16
# What each call adds: a whole chunk, padded ones, and single tokens while the ring turns over.
PARTS = (16, 10, *[1] * 14)


def new_cache(name: str, *, ring: bool = True, length: int = 80, batch: int = 1) -> KVCache:
    """Blocks of 8, so that a window of 8 spans blocks and a ring of 24 turns over."""
    config = tiny_model(name).config
    return KVCache.create(config, batch=batch, length=length, chunk=CHUNK, block=8, ring=ring)


def run_in_parts(
    name: str,
    cache: KVCache,
    implementations: Implementations = DECODE,
    *,
    pad_to: int = CHUNK,
    numerics: Numerics = FLOAT32,
) -> np.ndarray:
    """All logits of the golden case "long", "t v", computed part by part."""
    tokens = golden_case(name, "long").tokens[0]
    run = cached_pass(name, implementations, numerics)
    logits, start = [], 0
    for count in PARTS:
        width = pad_to if count == 1 else CHUNK
        given, positions = np.zeros((1, width), np.int32), np.full((1, width), -1, np.int32)
        given[0, :count] = tokens[start : start + count]
        positions[0, :count] = np.arange(start, start + count)
        part, cache = run(cache, given, positions)
        logits.append(np.asarray(part, np.float32)[0, :count])
        start += count
    return np.concatenate(logits)


def whole(name: str) -> np.ndarray:
    """The same logits from one full pass."""
    golden = golden_case(name, "long")
    return np.asarray(full_pass(name)(golden.tokens, golden.positions)[0])[0]


@pytest.mark.parametrize("name", sorted(TINY))
def test_parts_over_a_cache_equal_a_full_pass(name: str) -> None:
    """Within 1e-5: the same sums, cut into other pieces and added in another order.

    What is computed is five windows long, the first call alone two.
    """
    assert np.abs(run_in_parts(name, new_cache(name)) - whole(name)).max() < 1e-5


@pytest.mark.parametrize("name", ["gemma3n", "gemma4_e2b"])
def test_66_steps_through_layers_that_read_keys_of_others_equal_a_full_pass(name: str) -> None:
    """Against the oracle, which has no cache, within 1e-5: the bound without a cache.

    Keys that were normalised or turned again at each step would be further off at every one.
    """
    golden = np.load(GOLDEN / f"{name}.npz")
    tokens = np.concatenate([golden["greedy.prompt"], golden["greedy.ids"]])
    run, cache = cached_pass(name, DECODE), new_cache(name)
    parts, start = (5, *[1] * 66), 0
    assert sum(parts) == len(tokens)
    logits = []
    for count in parts:
        given, positions = np.zeros((1, CHUNK), np.int32), np.full((1, CHUNK), -1, np.int32)
        given[0, :count] = tokens[start : start + count]
        positions[0, :count] = np.arange(start, start + count)
        part, cache = run(cache, given, positions)
        logits.append(np.asarray(part)[0, :count])
        start += count
    exact = forward(
        from_hugging_face(TINY[name]), bare(name), tokens[None], np.arange(len(tokens))[None]
    )
    assert np.abs(np.concatenate(logits) - exact.logits[0]).max() < 1e-5


def test_single_token_programs_equal_a_full_pass() -> None:
    got = run_in_parts("gemma3", new_cache("gemma3"), pad_to=1)
    assert np.abs(got - whole("gemma3")).max() < 1e-5


def test_prefill_programs_equal_a_full_pass() -> None:
    got = run_in_parts("gemma2", new_cache("gemma2"), PREFILL)
    assert np.abs(got - whole("gemma2")).max() < 1e-5


@pytest.mark.parametrize("name", ["gemma3", "gemma4_e2b"])
def test_ring_equals_full_length_bit_for_bit(name: str) -> None:
    ring, full = new_cache(name), new_cache(name, ring=False)
    assert ring.positions[AttentionKind.LOCAL].shape[1] == 24
    assert full.positions[AttentionKind.LOCAL].shape[1] == 80
    np.testing.assert_array_equal(run_in_parts(name, ring), run_in_parts(name, full))


def test_capacity_changes_no_bit() -> None:
    short, long = new_cache("gemma3"), new_cache("gemma3", length=256)
    np.testing.assert_array_equal(run_in_parts("gemma3", short), run_in_parts("gemma3", long))


def test_bfloat16_cache_is_within_roundings_of_a_full_pass() -> None:
    """Other cuts of a sum tip roundings over, 2^-8 of a value each; a wrong mask moves more."""
    config = tiny_model("gemma3").config
    cache = KVCache.create(config, batch=1, length=80, chunk=CHUNK, dtype=jnp.bfloat16, block=8)
    implementations = implementations_for(HF_BFLOAT16, phase="decode")
    parts = run_in_parts("gemma3", cache, implementations, numerics=HF_BFLOAT16)
    golden = golden_case("gemma3", "long", "bfloat16").logits[0]
    assert np.abs(parts - golden).mean() < 0.05


def test_rows_do_not_see_each_other_and_padding_writes_nothing() -> None:
    tokens = golden_case("gemma3", "long").tokens[0]
    positions = np.full((2, CHUNK), -1, np.int32)
    positions[0], positions[1, 12:] = np.arange(CHUNK), np.arange(4)
    given = np.stack([tokens[:CHUNK], tokens[16 : 16 + CHUNK]])
    run = cached_pass("gemma3", DECODE)
    logits, cache = run(new_cache("gemma3", batch=2), given, positions)
    for held in cache.positions.values():
        assert np.asarray(held)[1, :4].tolist() == [0, 1, 2, 3]
        assert np.all(np.asarray(held)[1, 4:] == -1)
    for values in cache.values:
        assert not np.asarray(values)[1, 4:].any()

    alone, _ = run(new_cache("gemma3"), given[1:], positions[1:])
    assert np.abs(np.asarray(logits)[1, 12:] - np.asarray(alone)[0, 12:]).max() < 1e-5


def test_a_call_larger_than_the_chunk_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"at most 16 positions in one call, got 17"):
        new_cache("gemma3").begin(jnp.arange(17, dtype=jnp.int32)[None])


def test_blocked_attention_without_a_cache_is_refused() -> None:
    model, tokens = tiny_model("gemma3"), jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(NotImplementedError, match="blocked attention needs a cache"):
        nnx.merge(model.graph, model.parameters)(
            tokens, tokens, implementations=Implementations(attention="blocked")
        )
