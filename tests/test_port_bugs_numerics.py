"""Bugs that ports of Gemma have had in their numbers: roundings, norms, GELU.

One test for each, named after its row in our list of known bugs, see `test_port_bugs.py`.
"""

import math
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from refimpl_kernels.gelu import gelu
from refimpl_weights import synthetic

from refimpl.engine.engine import Engine, EngineOptions
from refimpl.engine.programs import chunks_of
from refimpl.errors import ConfigError
from refimpl.model.cache import KVCache
from refimpl.model.gemma import load_checkpoint
from refimpl.model.hf_config import from_hugging_face
from refimpl.model.implementations import implementations_for
from refimpl.model.layers import Embedder, RMSNorm
from refimpl.model.numerics import (
    DEEPMIND_BFLOAT16,
    FLOAT32,
    HF_BFLOAT16,
    PRESETS,
    Numerics,
    preset,
)
from refimpl.model.trace import Taps
from refimpl.model.variants import VARIANTS
from tests.tiny_models import tiny_model
from tests.tiny_variations import (
    GLOBAL,
    LOCAL,
    judge,
    load_tiny,
    text_tensors,
    traced,
    variation,
    write_folder,
)

# 16-bit types of numpy, for results that are wrong on purpose.
BFLOAT16, FLOAT16 = ml_dtypes.bfloat16, np.float16


def rounded(x: np.ndarray) -> np.ndarray:
    """To bfloat16 and back."""
    return x.astype(BFLOAT16).astype(np.float64)


def normal(*shape: int) -> np.ndarray:
    """Standard normal numbers that bfloat16 holds exactly."""
    return rounded(np.random.default_rng(0).standard_normal(shape))


@pytest.mark.parametrize("numerics", PRESETS.values(), ids=list(PRESETS))
@pytest.mark.parametrize(
    ("variant", "exact", "in_bfloat16"),
    [("gemma-7b", 3072**0.5, 55.5), ("gemma-3-27b", 5376**0.5, 73.5)],
)
def test_row_01_embedding_scale_is_rounded_to_the_activation_type(
    numerics: Numerics, variant: str, exact: float, in_bfloat16: float
) -> None:
    """The factor sqrt(3072) = 55.4256 left as it is in bfloat16, where training had 55.5; or 55.5
    used in float32 (transformers #29402; unsloth.ai/blog/gemma-bugs).
    """
    embedder = Embedder(replace(VARIANTS[variant], vocab_size=8), numerics, rngs=nnx.Rngs(0))
    table = normal(embedder.table.weight.get_value().shape[0], 8)
    # A bfloat16 file in every case: the factor follows the activation, not the file.
    embedder.table.weight.set_value(jnp.asarray(table, jnp.bfloat16))
    got = np.asarray(embedder.encode(jnp.arange(8)[None])[0])

    factors = np.array([exact, in_bfloat16], np.float32)
    products = (table.T.astype(np.float32) * factors[:, None, None]).astype(numerics.dtype)
    right, wrong = products if numerics.activation == "float32" else products[::-1]
    assert got.dtype == numerics.dtype
    np.testing.assert_array_equal(got, right)
    # The factors differ by 1e-3 or 2e-3 and the last bit of a bfloat16 is 4e-3 to 8e-3 of it.
    assert np.mean(right != wrong) > 0.1


def bfloat16_units(got: np.ndarray, exact: np.ndarray) -> float:
    """The largest error in units of the last place of a bfloat16, which has 7 bits after the 1."""
    unit = 2.0 ** (np.floor(np.log2(np.abs(exact))) - 7)
    return float((np.abs(got.astype(np.float64) - exact) / unit).max())


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_row_02_rms_norm_rounds_once_at_the_end(stored: str) -> None:
    """1 + w formed in bfloat16, or the normalised stream cast to bfloat16 before it is scaled (vllm
    #3653; unsloth.ai/blog/gemma-bugs).
    """
    width = 256
    x, scale = 3 * normal(64, width), 0.3 * normal(1, width)[0]
    scale = scale.astype(stored).astype(np.float64)
    norm = RMSNorm(width, VARIANTS["gemma-2b"], HF_BFLOAT16)
    assert norm.scale is not None
    norm.scale.set_value(jnp.asarray(scale, stored))
    got = np.asarray(norm(jnp.asarray(x, jnp.bfloat16)))
    assert got.dtype == BFLOAT16

    x = rounded(x)
    normalised = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6)
    exact = normalised * (1 + scale)
    # Half a unit for the rounding; the float32 before it is off by some 2^-16 of a unit.
    assert bfloat16_units(got, exact) < 0.501
    assert bfloat16_units(rounded(normalised * rounded(1 + scale)), exact) > 0.8
    assert bfloat16_units(rounded(rounded(normalised) * (1 + scale)), exact) > 0.8


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def test_row_04_gelu_is_the_tanh_form_also_where_the_file_says_gelu() -> None:
    """The exact GELU, because Gemma 1's config.json says "gelu" (transformers #29402, and again
    #49051; gemma_pytorch #37).
    """
    assert synthetic.TINY["gemma_mha"]["hidden_act"] == "gelu"
    model = variation(tiny_model("gemma_mha"), layer_kinds=(GLOBAL,))
    tokens = np.arange(100, 112, dtype=np.int32)[None]
    _, trace = traced(model, "layers.0.feed_forward.*")(tokens, np.arange(12)[None])
    gate, up, got = (
        np.asarray(trace[f"layers.0.feed_forward.{name}"], np.float64)
        for name in ("gate", "up", "output")
    )
    down = text_tensors("gemma_mha", layers=1)["layers.0.mlp.down_proj.weight"].astype(np.float64)
    gelu_erf = 0.5 * gate * (1 + np.vectorize(math.erf)(gate / math.sqrt(2)))
    # Float32 sums of 64 products of order one.
    assert np.abs(got - (gelu_tanh(gate) * up) @ down.T).max() < 5e-6
    assert np.abs(got - (gelu_erf * up) @ down.T).max() > 2e-4

    # From Gemma 2 on the file says what is meant.
    with pytest.raises(ConfigError, match="hidden_activation must be 'gelu_pytorch_tanh'"):
        from_hugging_face({**synthetic.TINY["gemma2"], "hidden_activation": "gelu"})


def test_row_15_float16_checkpoint_runs_without_overflow(tmp_path: Path) -> None:
    """Float16 activations, which Gemma 3's stream overflows (unsloth.ai/blog/gemma3; unsloth-zoo
    #174 and #600). No numerics compute in float16, whatever type the file has.
    """
    assert {numerics.activation for numerics in PRESETS.values()} == {"float32", "bfloat16"}
    with pytest.raises(ConfigError, match=r"numerics must be one of .*, got 'float16'"):
        preset("float16")

    tensors = {key: a.astype(FLOAT16) for key, a in text_tensors("gemma3", layers=1).items()}
    tensors["layers.0.post_attention_layernorm.weight"] += FLOAT16(60_000)
    folder = write_folder(tmp_path, "gemma3", tensors)
    tokens = np.arange(100, 112, dtype=np.int32)[None]
    exact = judge("gemma3", [LOCAL], tokens, tensors=tensors)
    assert np.abs(exact.residuals[1]).max() > np.finfo(FLOAT16).max

    # The stream's largest values set the error of all: 2e-6 of them in float32, 2^-6 in bfloat16.
    for numerics, bound in ((FLOAT32, 2e-6), (HF_BFLOAT16, 2.0**-6)):
        model = load_tiny(folder, numerics)
        logits, trace = traced(model, "layers.0.residual")(tokens, np.arange(12)[None])
        residual = np.asarray(trace["layers.0.residual"]).astype(np.float64)
        for got, right in ((residual, exact.residuals[1]), (np.asarray(logits), exact.logits)):
            assert np.abs(got.astype(np.float64) - right).max() < bound * np.abs(right).max()


TOKENS = np.arange(100, 140, dtype=np.int32)[None]
EVERYTHING = ("layers.*", "final_norm", "logits")


def test_row_31_compiled_bfloat16_has_the_bits_of_single_operations() -> None:
    """XLA keeps float32 between fused bfloat16 operations unless told not to, so that results
    change with what it fuses (google-deepmind/gemma guards Gemma 3n's norms against it).
    """
    numerics = DEEPMIND_BFLOAT16  # Rounds at more places than the other.
    model = variation(tiny_model("gemma2", numerics), layer_kinds=(LOCAL,))
    tokens, positions = jnp.asarray(TOKENS), jnp.arange(40)[None]
    taps = Taps(EVERYTHING)
    nnx.merge(model.graph, model.parameters)(tokens, positions, taps=taps)
    compiled = traced(model, *EVERYTHING)(tokens, positions)[1]
    assert len(compiled) == len(taps.values) == 15
    for name, single in taps.values.items():
        np.testing.assert_array_equal(np.asarray(compiled[name]), np.asarray(single), name)

    untold = jax.jit(lambda *arrays: nnx.merge(model.graph, model.parameters)(*arrays)[0])
    assert np.mean(np.asarray(untold(tokens, positions) != compiled["logits"])) > 0.1


def test_row_31_engine_compiles_bfloat16_so(tmp_path: Path) -> None:
    """The same, where the option has to reach the engine's programs."""
    folder = write_folder(tmp_path, "gemma3", text_tensors("gemma3", layers=1))
    gemma = load_checkpoint(folder, numerics=HF_BFLOAT16)
    options, ids = EngineOptions(slots=1, context=1024, compile_at_start=False), TOKENS[0].tolist()
    with Engine(gemma, options) as engine:
        scored = engine.score(ids)[1:]
    got = np.array([entry.logprob for entry in scored if entry is not None], np.float32)

    # The engine's chunk: all but the last token, with nothing in the places after them.
    [chunk] = chunks_of(len(ids) - 1)
    tokens = np.zeros((1, chunk.padded), np.int32)
    positions = np.full((1, chunk.padded), -1, np.int32)
    tokens[0, : chunk.count], positions[0, : chunk.count] = ids[:-1], range(chunk.count)
    implementations = implementations_for(HF_BFLOAT16, phase="prefill")

    def logprobs(options: dict[str, bool] | None) -> np.ndarray:
        def run(tokens: jax.Array, positions: jax.Array, cache: KVCache) -> jax.Array:
            module = gemma.module(gemma.parameters)
            logits, _ = module(tokens, positions, cache, implementations=implementations)
            return jax.nn.log_softmax(logits.astype(jnp.float32))

        cache = KVCache.create(
            gemma.config, batch=1, length=1024, chunk=chunk.padded, dtype=HF_BFLOAT16.dtype
        )
        found = jax.jit(run, compiler_options=options)(tokens, positions, cache)
        return np.asarray(found)[0, np.arange(len(ids) - 1), ids[1:]]

    right, untold = logprobs(HF_BFLOAT16.compiler_options), logprobs(None)
    # Not equal: a float32 sum in another order tips a rounding to bfloat16 over, here and there.
    assert np.abs(got - right).mean() < np.abs(untold - right).mean() / 4


def test_row_33_gelu_is_computed_and_not_looked_up_in_float16() -> None:
    """llama.cpp on a CPU looks GELU up in a table of float16 numbers (`GGML_GELU_FP16`). Held
    against it, an activation may differ by 2^-10 of its input: no bug of a port, but its size.
    """
    x = np.linspace(-12, 12, 100_001, dtype=np.float32)
    exact, size = gelu_tanh(x.astype(np.float64)), np.abs(x)
    # About eight float32 operations, none off by more than 2^-24 of x.
    assert (np.abs(np.asarray(gelu(jnp.asarray(x))) - exact) <= 8 * 2.0**-24 * size).all()
    looked_up = gelu_tanh(x.astype(FLOAT16).astype(np.float64)).astype(FLOAT16).astype(np.float64)
    # Input and output are rounded by 2^-11 each; GELU's slope is at most 1.13.
    assert (np.abs(looked_up - exact) < 1.1 * 2.0**-10 * size + 2.0**-24).all()
    assert np.abs(looked_up - exact).max() > 1e-3
