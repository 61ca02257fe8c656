"""Bugs that ports of Gemma have had in the rotary embedding.

One test for each, named after its row in our list of known bugs, see `test_port_bugs.py`.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from refimpl_kernels.rope import apply_rope, rope_angles
from refimpl_weights import synthetic
from refimpl_weights.synthetic_gguf import write_gguf

from refimpl.model.checkpoint import open_checkpoint
from refimpl.model.hf_config import from_hugging_face, to_hugging_face
from refimpl.model.layer_spec import RopeSpec
from refimpl.model.numerics import FLOAT32, PRESETS, Numerics
from refimpl.model.variants import VARIANTS
from tests.oracle.rope import exact_angles, float32_angles, rotate
from tests.tiny_models import tiny_model
from tests.tiny_variations import GLOBAL, LOCAL, traced, variation

POSITIONS = np.array([0, 1, 256, 257, 5_001, 8_191, 20_001])[:, None]
LOCAL_KEY, GLOBAL_KEY = "layers.0.attention.key", "layers.1.attention.key"


@cache
def keys_of_a_lone_token(numerics: Numerics) -> Mapping[str, np.ndarray]:
    """Keys "b 1 k h" of a local and a global layer, for one token alone at each of POSITIONS.

    All that it can attend to is itself, so the stream is the same at every position, and keys are
    those of position 0, turned.
    """
    model = variation(tiny_model("gemma3_linear", numerics), layer_kinds=(LOCAL, GLOBAL))
    tokens = np.full(POSITIONS.shape, 300, np.int32)
    _, trace = traced(model, LOCAL_KEY, GLOBAL_KEY)(tokens, POSITIONS.astype(np.int32))
    return {name: np.asarray(key).astype(np.float64) for name, key in trace.items()}


def rounded(x: np.ndarray) -> np.ndarray:
    """To bfloat16 and back."""
    return x.astype(ml_dtypes.bfloat16).astype(np.float64)


def turn_error(key: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """How far keys are from that of position 0 turned by the angles "b 1 r", over its length."""
    turned = rotate(np.broadcast_to(key[:1], key.shape), angles)
    return np.abs(key - turned).max(axis=(1, 2, 3)) / np.linalg.norm(key[0], axis=-1).max()


@pytest.mark.parametrize("numerics", PRESETS.values(), ids=list(PRESETS))
def test_row_05_rope_positions_and_angles_stay_float32(numerics: Numerics) -> None:
    """Positions cast to bfloat16, in which 257 is 256; or frequencies, or angles (transformers
    #29285; unsloth.ai/blog/gemma-bugs).
    """
    key = keys_of_a_lone_token(numerics)[LOCAL_KEY]
    exact = partial(exact_angles, base=1e4, factor=1.0)
    # Three roundings to bfloat16, each up to 2^-9; float32 angles add 4e-3 at position 20,001.
    bound = 2.0**-7
    assert turn_error(key, exact(POSITIONS, 16)).max() < bound

    cast_position = exact(rounded(POSITIONS), 16)
    cast_frequency = POSITIONS[..., None] * rounded(exact(POSITIONS[1:2], 16))
    cast_angle = rounded(exact(POSITIONS, 16))
    for wrong in (cast_position, cast_frequency, cast_angle):
        assert turn_error(key, wrong).max() > 10 * bound
    at_256, at_257 = key[2], key[3]
    assert np.abs(at_256 - at_257).max() > 0.1


@pytest.mark.parametrize(("theta", "last", "apart"), [(1e4, 8_191, 2.4e-4), (1e6, 131_071, 3.9e-3)])
def test_row_06_rope_angle_is_a_product_or_a_quotient_as_the_numerics_say(
    theta: float, last: int, apart: float
) -> None:
    """position * (1 / timescale) and position / timescale taken for the same in float32; they drift
    apart as positions grow (unsloth.ai/blog/gemma-bugs). XLA replaces the one by the other itself.
    """
    width, positions = 256, np.arange(last - 2000, last + 1)[None]
    timescale = np.array([theta ** (2 * i / width) for i in range(width // 2)], np.float32)
    position = positions.astype(np.float32)[..., None]
    product, quotient = position * (np.float32(1) / timescale), position / timescale
    angles = partial(rope_angles, head_width=width, theta=theta)
    compiled = jax.jit(partial(angles, form="multiply"))
    np.testing.assert_array_equal(compiled(positions), product)
    compiled = jax.jit(partial(angles, form="divide"))
    np.testing.assert_array_equal(compiled(positions), quotient)
    assert np.abs(product - quotient)[0, -1].max() == pytest.approx(apart, rel=0.02)

    forms = {name: numerics.rope_angle for name, numerics in PRESETS.items()}
    assert forms == {
        "float32": "multiply",
        "hf_bfloat16": "multiply",
        "deepmind_bfloat16": "divide",
    }


def test_row_06_model_forms_angles_as_its_numerics_say() -> None:
    """The same, where the choice has to reach the layers."""
    timescale = np.array([1e4 ** (i / 8) for i in range(8)], np.float32)
    position = POSITIONS[..., None].astype(np.float32)
    product, quotient = position * (np.float32(1) / timescale), position / timescale
    divide = replace(FLOAT32, name="divide", rope_angle="divide")
    for numerics, right, wrong in ((FLOAT32, product, quotient), (divide, quotient, product)):
        key = keys_of_a_lone_token(numerics)[LOCAL_KEY]
        # A float32 sine, cosine and three operations, each off by about 2^-24.
        assert turn_error(key, right.astype(np.float64)).max() < 1e-6
        assert turn_error(key, wrong.astype(np.float64)).max() > 1e-5


def test_row_07_rope_pairs_the_halves_of_a_head() -> None:
    """Neighbours turned together, (x0, x1), instead of (x0, x[h/2]), as Llama's own code and files
    that were permuted for it have it.
    """
    angles = rope_angles(jnp.array([[0, 1]]), head_width=4, theta=100.0)
    x = jnp.zeros((1, 2, 1, 4)).at[:, :, :, 0].set(1.0)
    [[[first], [second]]] = np.asarray(apply_rope(x, angles))
    np.testing.assert_array_equal(first, [1, 0, 0, 0])
    np.testing.assert_allclose(second, [math.cos(1), 0, math.sin(1), 0], rtol=0, atol=1e-7)

    key = keys_of_a_lone_token(FLOAT32)[LOCAL_KEY]
    angles = float32_angles(POSITIONS, 16, base=1e4, factor=1.0)
    assert turn_error(key, angles).max() < 1e-6
    halves_from_neighbours = np.arange(16).reshape(8, 2).T.reshape(-1)
    assert turn_error(key[..., halves_from_neighbours], angles)[1:].min() > 0.1


def test_row_13_rope_factor_stretches_global_layers_and_no_others(tmp_path: Path) -> None:
    """Gemma 3's linear factor of 8 missing, or given to local layers too; short prompts hide it
    (llama.cpp #14367, ollama #12348 and #13452, mlx-vlm #1709).
    """
    keys = keys_of_a_lone_token(FLOAT32)
    for name, base, *factors in ((LOCAL_KEY, 1e4, 1.0, 8.0), (GLOBAL_KEY, 1e6, 8.0, 1.0)):
        right, wrong = (
            turn_error(keys[name], float32_angles(POSITIONS, 16, base=base, factor=factor))
            for factor in factors
        )
        assert right.max() < 1e-6
        assert wrong[POSITIONS[:, 0] > 2000].min() > 0.1

    gguf = open_checkpoint(write_gguf(tmp_path / "a.gguf", architecture="gemma3", rope_factor=8.0))
    released = from_hugging_face(synthetic.TINY["gemma3_multimodal"])
    for config in (gguf.config, released, tiny_model("gemma3_linear").config):
        assert config.local_rope == RopeSpec(theta=1e4, factor=1.0)
        assert config.global_rope == RopeSpec(theta=1e6, factor=8.0)


def test_row_14_text_only_model_keeps_the_rope_factor() -> None:
    """google/gemma_pytorch's text-only class never passes the factor on, the multimodal one does
    (`gemma/model.py`, `_register_freqs_cis`). Here both are one class, which row 13 tests.
    """
    factors = {"270m": 1.0, "1b": 1.0, "4b": 8.0, "12b": 8.0, "27b": 8.0}
    for size, factor in factors.items():
        written = to_hugging_face(VARIANTS[f"gemma-3-{size}"])
        released = {key: value for key, value in written.items() if key != "rope_parameters"}
        scaling = {"rope_type": "linear", "factor": factor} if factor > 1 else None
        released |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": scaling}
        for text in (written, released):
            for config in (text, {"model_type": "gemma3", "text_config": text}):
                ropes = from_hugging_face(config).local_rope, from_hugging_face(config).global_rope
                assert ropes == (RopeSpec(theta=1e4), RopeSpec(theta=1e6, factor=factor))
