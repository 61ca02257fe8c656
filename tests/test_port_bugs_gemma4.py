"""Bugs that ports of Gemma 3n and 4 have had: shared keys, experts, scalars, p-RoPE, caps.

One test for each, named after its row in our list of known bugs, see `test_port_bugs.py`. Two rows
have their tests elsewhere: row 20, files with and without the tensors that sharing layers do not
use, in `test_checkpoint.py`, and row 26, runs of newlines, in `test_tokenizer_gemma4.py`.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from refimpl_kernels.rope import apply_rope
from refimpl_weights import synthetic

from refimpl.model.cache import KVCache
from refimpl.model.hf_config import from_hugging_face, to_hugging_face
from refimpl.model.implementations import implementations_for
from refimpl.model.numerics import FLOAT32
from refimpl.model.transformer import Transformer
from refimpl.model.variants import VARIANTS
from tests import oracle
from tests.oracle.rope import exact_angles, rotate
from tests.tiny_models import tiny_model
from tests.tiny_variations import GLOBAL, LOCAL, over_cache, traced

OVER_CACHE = implementations_for(FLOAT32, phase="prefill")
# Float32 against float64, of numbers of order one to ten.
BOUND = 1e-5
SHARING = ("gemma4_e2b",)
# Ten windows; of ids from 480 on, Gemma 3n's table of per-layer inputs has none.
LONG_TEXT = np.random.default_rng(0).integers(6, 508, 80, dtype=np.int32)
NEWER = [name for name in VARIANTS if name.startswith(("gemma-3n", "gemma-4"))]


@cache
def weights(name: str) -> Mapping[str, np.ndarray]:
    """The decoder's tensors in float64, as "norm.weight"."""
    prefix = "model." if name == "gemma4_moe" else "model.language_model."
    return {
        key.removeprefix(prefix): value.astype(np.float64)
        for key, value in synthetic.tensors(name).items()
        if key.startswith(prefix)
    }


def exactly(name: str, tokens: np.ndarray) -> np.ndarray:
    """The oracle's logits of tokens "b t"."""
    config = oracle.from_hugging_face(synthetic.TINY[name])
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    return oracle.forward(config, weights(name), tokens, positions).logits


@cache
def trace(name: str) -> Mapping[str, np.ndarray]:
    """All intermediates of a full pass over the first half of the long text, in float64."""
    positions = np.arange(40, dtype=np.int32)[None]
    taken = traced(tiny_model(name), "*")(LONG_TEXT[None, :40], positions)[1]
    return {key: np.asarray(value, np.float64) for key, value in taken.items()}


def rms(x: np.ndarray, weight: np.ndarray | float = 1.0) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * weight


def assert_near(got: np.ndarray, exact: np.ndarray) -> None:
    np.testing.assert_allclose(got, exact, rtol=0, atol=BOUND)


def assert_far(got: np.ndarray, wrong: np.ndarray) -> None:
    assert np.abs(got - wrong).max() > 100 * BOUND


def project(name: str, layer: int, x: np.ndarray, tensor: str) -> np.ndarray:
    return x @ weights(name)[f"layers.{layer}.{tensor}.weight"].T


def scores(query: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Products of queries and keys, "b k g t s"; Gemma 3n and 4 do not scale them."""
    b, t, _, h = query.shape
    return np.einsum("btkgh,bskh->bkgts", query.reshape(b, t, key.shape[2], -1, h), key)


def turned(name: str, layer: int, x: np.ndarray) -> np.ndarray:
    """Heads "b t k h" turned as the layer turns keys."""
    spec = tiny_model(name).config.layers[layer]
    rope, positions = spec.rope, np.arange(x.shape[1])[None]
    angles = exact_angles(
        positions, spec.head_width, base=rope.theta, factor=1.0, proportion=rope.proportion
    )
    return rotate(x, angles)


@cache
def over_a_cache(name: str) -> np.ndarray:
    """All logits "t v" of the long text: a chunk of 16, then 64 steps of one token."""
    memory = KVCache.create(tiny_model(name).config, batch=1, length=80, chunk=16, block=8)
    run, logits, start = over_cache(tiny_model(name), OVER_CACHE), [], 0
    for count in (16, *[1] * 64):
        given, positions = np.zeros((1, 16), np.int32), np.full((1, 16), -1, np.int32)
        given[0, :count] = LONG_TEXT[start : start + count]
        positions[0, :count] = np.arange(start, start + count)
        part, memory = run(memory, given, positions)
        logits.append(np.asarray(part)[0, :count])
        start += count
    return np.concatenate(logits)


@pytest.mark.parametrize("name", SHARING)
def test_row_18_layers_share_keys_and_values_without_a_cache_too(name: str) -> None:
    """Sharing done by reading the donor's place in a cache: a full pass, which has none, gave
    garbage, or used the sharing layers' own projections (mlx-lm #323, transformers #45242).
    """
    taken, layer = trace(name), tiny_model(name).config.num_layers - 1
    assert_near(taken["logits"], exactly(name, LONG_TEXT[None, :40]))
    assert_near(taken["logits"][0], over_a_cache(name)[:40])

    # Released files have projections for these layers, which must not be read.
    query = taken[f"layers.{layer}.attention.query"]
    own = project(name, layer, taken[f"layers.{layer}.attention.input"], "self_attn.k_proj")
    own = own.reshape(*query.shape[:2], -1, query.shape[-1])
    own = turned(name, layer, rms(own, weights(name)[f"layers.{layer}.self_attn.k_norm.weight"]))
    assert_far(taken[f"layers.{layer}.attention.scores"], scores(query, own))


@pytest.mark.parametrize("name", SHARING)
def test_row_19_layers_that_share_keys_use_them_as_the_donor_made_them(name: str) -> None:
    """Keys taken from the donor's cache normalised or turned once more by each layer that shares
    them; short answers hide it (gemma #368 and #392).
    """
    assert_near(over_a_cache(name), exactly(name, LONG_TEXT[None])[0])

    taken, sharing = trace(name), 0
    for layer, spec in enumerate(tiny_model(name).config.layers):
        if spec.donor is None:
            continue
        sharing += 1
        found = taken[f"layers.{layer}.attention.scores"]
        query = taken[f"layers.{layer}.attention.query"]
        key = taken[f"layers.{spec.donor}.attention.key"]
        assert_near(found, scores(query, key))
        assert_far(found, scores(query, rms(key)))
        assert_far(found, scores(query, turned(name, layer, key)))
    assert sharing == 3


def test_row_21_layers_without_keys_are_twice_as_wide_in_e2b_alone() -> None:
    """Feed-forwards of one width in all layers, where 20 of E2B's 35 have two of it (Megatron-
    Bridge #4683).
    """
    config = VARIANTS["gemma-4-e2b"]
    for read in (config, from_hugging_face(to_hugging_face(config))):
        widths = [spec.feed_forward_width for spec in read.layers]
        assert widths == [6144] * 15 + [12288] * 20
    for name in NEWER:
        if name != "gemma-4-e2b":
            assert len({spec.feed_forward_width for spec in VARIANTS[name].layers}) == 1

    layers = tiny_model("gemma4_e2b").parameters["layers"]
    shapes = [layers[index]["feed_forward"]["gate_up"]["weight"].shape for index in range(8)]
    assert shapes == [(32, 2 * 32)] * 5 + [(32, 2 * 64)] * 3


def test_row_22_the_router_reads_the_stream_and_not_what_experts_read() -> None:
    """The router fed with what the norm before the experts or the dense branch gives, so that
    tokens are normalised twice, once with a weight that is not the router's (Automodel #1852).
    """
    name, taken = "gemma4_moe", trace("gemma4_moe")
    for layer in range(4):
        stream, own = taken[f"layers.{layer}.middle"], f"layers.{layer}."
        factor = weights(name)[own + "router.scale"] / 32**0.5

        def routed(x: np.ndarray, layer: int = layer, factor: np.ndarray = factor) -> np.ndarray:
            return project(name, layer, rms(x) * factor, "router.proj")

        found = taken[f"layers.{layer}.experts.router"]
        assert_near(found, routed(stream))
        for norm in ("pre_feedforward_layernorm", "pre_feedforward_layernorm_2"):
            assert_far(found, routed(rms(stream, weights(name)[f"{own}{norm}.weight"])))


@pytest.mark.parametrize("name", ["gemma4_moe", "gemma4_e2b"])
def test_row_23_the_scalar_is_the_whole_streams(name: str) -> None:
    """The layer's scalar applied to what a branch adds, as in models that scale residuals, and not
    to all that leaves the layer (quant.cpp #96).
    """
    taken, scalars = trace(name), []
    for layer in range(tiny_model(name).config.num_layers):
        at = f"layers.{layer}."
        (scalar,) = weights(name)[at + "layer_scalar"]
        scalars.append(scalar)
        before, added = taken[at + "middle"], taken[at + "feed_forward.output"]
        given = taken.get(at + "per_layer_input", np.zeros_like(added))
        found = taken[at + "residual"]
        assert_near(found, scalar * (before + added + given))
        if abs(scalar - 1) > 0.01:
            assert_far(found, before + scalar * (added + given))
            assert_far(found, before + added + given)
    assert max(abs(scalar - 1) for scalar in scalars) > 0.1


def test_row_24_values_that_are_keys_are_taken_before_the_keys_norm_and_rotation() -> None:
    """Values copied from finished keys. They are the raw projection, under a norm of their own that
    has no weight (Megatron-Bridge #4683).
    """
    name, taken = "gemma4_moe", trace("gemma4_moe")
    for layer, spec in enumerate(tiny_model(name).config.layers):
        at = f"layers.{layer}.attention."
        assert spec.values_are_keys is (spec.kind is GLOBAL)
        tensor = "self_attn.k_proj" if spec.values_are_keys else "self_attn.v_proj"
        raw = project(name, layer, taken[at + "input"], tensor)
        raw = raw.reshape(1, 40, spec.num_kv_heads, spec.head_width)
        assert_near(taken[at + "value"], rms(raw))
        if spec.values_are_keys:
            normed = rms(raw, weights(name)[f"layers.{layer}.self_attn.k_norm.weight"])
            assert_near(taken[at + "key"], turned(name, layer, normed))
            for wrong in (raw, normed, taken[at + "key"], rms(taken[at + "key"])):
                assert_far(taken[at + "value"], wrong)


POSITIONS = np.array([[0, 1, 257, 70_000, 262_143]])


def test_row_25_a_quarter_of_the_pairs_turns_and_its_exponents_count_the_whole_head() -> None:
    """A quarter of the dimensions turned as a small head, dimension i with i + 64, or with the
    wavelengths of one; or frequencies stored as float16 (kekzl/imp #9).
    """
    small = replace(
        VARIANTS["gemma-4-31b"], layer_kinds=(LOCAL, GLOBAL), vocab_size=8, eos_ids=(1,)
    )
    module = nnx.eval_shape(lambda: Transformer(small, rngs=nnx.Rngs(0)))
    angles = module.angles(jnp.asarray(POSITIONS, jnp.int32))
    assert angles[LOCAL].shape == (1, 5, 128)
    assert angles[GLOBAL].shape == (1, 5, 256)

    found = np.asarray(angles[GLOBAL], np.float64)
    frequency = 1e6 ** (-2 * np.arange(64) / 512)
    exact = POSITIONS[..., None] * frequency
    # Frequency, its reciprocal and the product round once each.
    np.testing.assert_allclose(found[..., :64], exact, rtol=3.001 * 2.0**-24)
    assert not found[..., 64:].any()
    of_a_small_head = POSITIONS[..., None] * 1e6 ** (-2 * np.arange(64) / 128)
    in_float16 = POSITIONS[..., None] * frequency.astype(np.float16).astype(np.float64)
    for wrong in (of_a_small_head, in_float16):
        assert np.abs(found[..., :64] - wrong).max() > 1

    x = np.random.default_rng(0).standard_normal((1, 5, 2, 512), dtype=np.float32)
    for kind, width, turning in (
        (GLOBAL, 512, [*range(64), *range(256, 320)]),
        (LOCAL, 256, list(range(256))),
    ):
        heads = x[..., :width]
        is_moved = np.asarray(apply_rope(jnp.asarray(heads), angles[kind])) != heads
        assert np.flatnonzero(is_moved.any(axis=(0, 1, 2))).tolist() == turning


@pytest.mark.parametrize("name", ["gemma4_moe", "gemma4_e2b", "gemma3n"])
def test_row_27_logits_are_capped(name: str) -> None:
    """The cap of 30 not read, or dropped, as DeepMind's Gemma 3n has none; the likeliest token is
    the same, its probability is not.
    """
    taken = trace(name)
    uncapped = taken["final_norm"] @ weights(name)["embed_tokens.weight"].T
    assert_near(taken["logits"], 30 * np.tanh(uncapped / 30))
    assert_far(taken["logits"], uncapped)
    for variant in NEWER:
        config = VARIANTS[variant]
        assert config.final_cap == from_hugging_face(to_hugging_face(config)).final_cap == 30.0
