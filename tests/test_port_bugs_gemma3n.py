"""Roundings and sums in which programs for Gemma 3n, and for Gemma 4's small sizes, differ.

One test for each, see `test_port_bugs.py`; rows of known bugs that concern both generations are in
`test_port_bugs_gemma4.py`.
"""

from functools import partial
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from refimpl_weights import synthetic

from refimpl.model.layers import RMSNorm
from refimpl.model.numerics import HF_BFLOAT16
from refimpl.model.transformer import Transformer
from tests.tiny_models import TinyModel, tiny_model
from tests.tiny_variations import traced

BFLOAT16 = ml_dtypes.bfloat16
# What XLA must be told so that every rounding that is written down takes place.
EXACT_ROUNDINGS: Any = HF_BFLOAT16.compiler_options


def rounded(x: Any) -> np.ndarray:
    """To bfloat16 and back."""
    return np.asarray(x, np.float32).astype(BFLOAT16).astype(np.float64)


def normal(*shape: int) -> np.ndarray:
    """Standard normal numbers that bfloat16 holds exactly."""
    return rounded(np.random.default_rng(0).standard_normal(shape))


def rms(x: np.ndarray, weight: np.ndarray | float = 1.0) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * weight


def module(model: TinyModel) -> Transformer:
    return nnx.merge(model.graph, model.parameters)


def scale_of(norm: RMSNorm) -> jax.Array:
    assert norm.scale is not None
    return norm.scale.get_value()


def share(got: np.ndarray, expected: np.ndarray) -> float:
    """Of elements that agree to the bit."""
    return float(np.mean(np.asarray(got, np.float64) == expected))


@pytest.mark.parametrize("name", ["gemma3n", "gemma4_e2b"])
def test_scales_of_per_layer_inputs_are_rounded_in_gemma_3n_alone(name: str) -> None:
    """d^-1/2 and 2^-1/2 taken in bfloat16 for Gemma 4, whose code has Python's numbers there, or in
    float32 for Gemma 3n, whose code rounds them (transformers `modeling_gemma3n.py`, `_gemma4.py`).
    """
    model = tiny_model(name, HF_BFLOAT16)
    embedder = module(model).per_layer_embedder
    assert embedder is not None
    tokens, x = np.arange(100, 400)[None], normal(1, 300, 32)
    run = jax.jit(partial(embedder, implementation="dot"), compiler_options=EXACT_ROUNDINGS)
    got = run(jnp.asarray(tokens), jnp.asarray(x, jnp.bfloat16))

    table, weight, scale = (
        np.asarray(array, np.float64)
        for array in (
            embedder.table.weight.get_value(),
            embedder.projection.weight.get_value(),
            scale_of(embedder.norm),
        )
    )
    embedded = rounded(table.T[tokens] * rounded(embedder.width**0.5))
    embedded = embedded.reshape(1, 300, -1, embedder.width)
    projected = rounded(x @ weight)

    def expected(of_projection: Any, of_mean: Any) -> np.ndarray:
        scaled = rounded(projected * of_projection).reshape(embedded.shape)
        return rounded(rounded(rounded(rms(scaled, scale)) + embedded) * of_mean)

    exact, in_bfloat16 = (32**-0.5, 2**-0.5), (rounded(32**-0.5), rounded(2**-0.5))
    right, wrong = (in_bfloat16, exact) if name == "gemma3n" else (exact, in_bfloat16)
    # Sums in float32 tip a rounding over here and there.
    assert share(got, expected(*right)) > 0.999
    assert share(got, expected(right[0], wrong[1])) < 0.98
    assert share(got, expected(wrong[0], right[1])) < 0.99


def test_ids_outside_the_table_of_per_layer_inputs_have_those_of_id_0() -> None:
    """Ids of images and sounds, and padding rows of the vocabulary, looked up beyond the table's
    end, where an index is clamped to the last row or wraps around (transformers `Gemma3nModel`).
    """
    model = tiny_model("gemma3n")
    embedder = module(model).per_layer_embedder
    assert embedder is not None
    assert (embedder.vocab_size, model.config.vocab_size) == (480, 528)
    tokens = np.array([[0, 1, 479, 480, 500, 527]])
    x = np.broadcast_to(normal(32), (1, 6, 32))
    got = np.asarray(
        jax.jit(partial(embedder, implementation="dot"))(
            jnp.asarray(tokens), jnp.asarray(x, jnp.float32)
        )
    )[0]
    for outside in got[3:]:
        np.testing.assert_array_equal(outside, got[0])
    for inside in got[1:3]:
        assert np.abs(inside - got[0]).max() > 0.1


def activated(gate: np.ndarray, less: int | None) -> np.ndarray:
    """gelu of what the gate keeps, of a deviation divided by f - less; None keeps everything."""
    if less is not None:
        cutoff = NormalDist().inv_cdf(0.95)
        deviation = np.std(gate, axis=-1, ddof=less, keepdims=True)
        gate = np.maximum(gate - (np.mean(gate, axis=-1, keepdims=True) + cutoff * deviation), 0)
    return 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))


def test_gates_are_cut_by_the_populations_deviation_in_the_first_layers() -> None:
    """The deviation divided by f - 1, as llama.cpp's Gemma 3n has it (`gemma3n.cpp`), or gates
    cut in all layers or in none.
    """
    model = tiny_model("gemma3n")
    tokens = np.random.default_rng(0).integers(6, 480, (1, 24), dtype=np.int32)
    taken = {
        key: np.asarray(value, np.float64)
        for key, value in traced(model, "layers.[12].feed_forward.*")(
            tokens, np.arange(24, dtype=np.int32)[None]
        )[1].items()
    }
    tensors = synthetic.tensors("gemma3n")
    for layer, is_sparse in ((1, True), (2, False)):
        at, own = f"layers.{layer}.feed_forward.", f"model.language_model.layers.{layer}."
        down = tensors[own + "mlp.down_proj.weight"].astype(np.float64)
        norm = tensors[own + "post_feedforward_layernorm.weight"].astype(np.float64)
        right, *wrong = (0, 1, None) if is_sparse else (None, 0, 1)
        hidden = {
            less: activated(taken[at + "gate"], less) * taken[at + "up"] for less in (0, 1, None)
        }
        error = {
            less: np.abs(taken[at + "output"] - rms(x @ down.T, norm)).max()
            for less, x in hidden.items()
        }
        assert error[right] < 1e-5
        assert min(error[less] for less in wrong) > 1e-3


def test_altup_rounds_its_coefficients_and_adds_products_before_it_rounds() -> None:
    """Coefficients kept in float32 from end to end, as DeepMind's code has them, where Hugging Face
    rounds the routed numbers, the coefficients and the sum over streams (`Gemma3nTextAltUp`).
    """
    model = tiny_model("gemma3n", HF_BFLOAT16)
    altup = module(model).layers[0].streams
    x = normal(4, 1, 200, 32)
    predict = jax.jit(
        partial(altup.predict, implementation="dot"), compiler_options=EXACT_ROUNDINGS
    )
    got = np.asarray(predict(jnp.asarray(x, jnp.bfloat16))[0], np.float64)

    names = ("router_norm.scale", "router.weight", "prediction.weight")
    norm, router, prediction = (
        np.asarray(nnx.to_pure_dict(nnx.state(altup))[part][leaf], np.float64)
        for part, leaf in (name.split(".") for name in names)
    )

    def expected(keep: Any, of_sum: Any) -> np.ndarray:
        scaled = rounded(rounded(rms(x[0], norm)) * rounded(1 / 32))
        routed = keep(np.tanh(rounded(scaled @ router)))
        coefficients = keep(routed @ prediction).reshape(1, 200, 4, 4)
        return rounded(x + of_sum(np.einsum("btij,jbtd->ibtd", coefficients, x)))

    unrounded = np.asarray
    assert share(got, expected(rounded, rounded)) > 0.99
    assert share(got, expected(unrounded, rounded)) < 0.9
    assert share(got, expected(rounded, unrounded)) < 0.95


def test_streams_of_small_numbers_are_divided_by_no_less_than_the_root_of_the_least() -> None:
    """The mean square kept from zero after its root, at 1e-12, as DeepMind's code does, where
    Hugging Face keeps the square from zero at 1e-5; the same unless activations are tiny.
    """
    model = tiny_model("gemma3n")
    projections = module(model).streams
    matrix = np.asarray(model.parameters["streams"]["into"]["weight"], np.float64)[:, :32]
    x = 1e-3 * normal(1, 4, 32)
    got = np.asarray(
        jax.jit(partial(projections.enter, implementation="dot"))(jnp.asarray(x, jnp.float32))
    )
    size, projected = np.sqrt(np.mean(x**2, axis=-1, keepdims=True)), x @ matrix
    found = np.mean(projected**2, axis=-1, keepdims=True)
    assert found.max() < 1e-5
    np.testing.assert_allclose(got[1], projected * size / 1e-5**0.5, rtol=1e-4)
    assert np.abs(got[1] / (projected * size / np.sqrt(found))).max() < 0.6


def test_laurel_divides_by_a_root_that_is_not_rounded() -> None:
    """The sum multiplied by 2^-1/2 in bfloat16, as DeepMind's code does, where Hugging Face divides
    by a Python number, which PyTorch does not round.
    """
    model = tiny_model("gemma3n", HF_BFLOAT16)
    laurel = module(model).layers[0].laurel
    assert laurel is not None
    y, x = normal(2, 1, 200, 32)
    run = jax.jit(partial(laurel, implementation="dot"), compiler_options=EXACT_ROUNDINGS)
    got = run(jnp.asarray(y, jnp.bfloat16), jnp.asarray(x, jnp.bfloat16))

    left, right, norm = (
        np.asarray(array, np.float64)
        for array in (
            laurel.left.weight.get_value(),
            laurel.right.weight.get_value(),
            scale_of(laurel.norm),
        )
    )
    narrow = rounded(rounded(y @ left) @ right)
    both = rounded(x + rounded(y + rounded(rms(narrow, norm))))
    assert share(got, rounded(both / 2**0.5)) > 0.99
    assert share(got, rounded(both * rounded(2**-0.5))) < 0.98
