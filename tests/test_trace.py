"""Traces: the names that are promised, every bit kept, and the place where two part."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from refimpl_weights.synthetic import TINY

from refimpl.errors import TraceError
from refimpl.model import trace
from refimpl.model.checkpoint import open_checkpoint
from refimpl.model.config import GemmaConfig
from refimpl.model.hf_config import from_hugging_face
from refimpl.model.parameters import load_model
from refimpl.model.trace import Taps
from refimpl.model.transformer import Transformer
from tests.checkpoint_files import small, write

TOKENS = [2, 17, 300, 5, 400, 401, 17, 9, 250, 11]

OF_A_LAYER = [
    "attention.input",
    "attention.query",
    "attention.key",
    "attention.value",
    "attention.scores",
    "attention.mixed",
    "attention.output",
    "middle",
    "feed_forward.input",
    "feed_forward.gate",
    "feed_forward.up",
    "feed_forward.output",
    "residual",
]


OF_SOME_MODELS = ("streams", "layers.3.experts.router", "layers.3.per_layer_input")


def promised(num_layers: int) -> list[str]:
    """Every name, in the order of the forward pass."""
    layers = [f"layers.{layer}.{name}" for layer in range(num_layers) for name in OF_A_LAYER]
    return ["embed", *layers, "final_norm", "logits"]


def noted(config: GemmaConfig, *wanted: str) -> dict[str, tuple[int, ...]]:
    """Names that a forward pass notes, in its order, with their shapes; nothing is computed."""
    taps = Taps(wanted)
    ids = jnp.zeros((2, 5), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(5, dtype=jnp.int32), (2, 5))

    def run() -> None:
        Transformer(config, rngs=nnx.Rngs(0))(ids, positions, taps=taps)

    nnx.eval_shape(run)
    return {name: value.shape for name, value in taps.values.items()}


@dataclass(frozen=True)
class Model:
    """A tiny Gemma 3 of two layers, and a compiled pass that notes everything."""

    config: GemmaConfig
    state: Any
    compiled: Callable[[Any], dict[str, Any]]

    def trace(self, **changes: Callable[[np.ndarray], np.ndarray]) -> dict[str, np.ndarray]:
        """Everything noted, with parameters changed; "__" in their names stands for a dot."""
        flat = nnx.to_flat_state(self.state)
        changed = []
        for path, variable in flat:
            change = changes.pop("__".join(map(str, path)), None)
            value = np.array(variable.get_value())
            changed.append((path, variable if change is None else nnx.Param(change(value))))
        assert not changes, f"no such parameters: {changes}"
        values = self.compiled(nnx.from_flat_state(changed))
        return {name: np.asarray(value) for name, value in values.items()}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    folder = write(tmp_path_factory.mktemp("model"), *small())
    checkpoint = open_checkpoint(folder)
    graph, state = nnx.split(load_model(checkpoint))
    ids = jnp.asarray([TOKENS], jnp.int32)
    positions = jnp.arange(len(TOKENS), dtype=jnp.int32)[None]

    def run(state: Any) -> dict[str, Any]:
        taps = Taps(["*"])
        nnx.merge(graph, state)(ids, positions, taps=taps)
        return taps.values

    # Compiled once, run often on ten tokens: compiling is all the time.
    compiled = jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})
    return Model(checkpoint.config, state, compiled)


@pytest.fixture(scope="module")
def everything(model) -> dict[str, np.ndarray]:
    """A trace of the unchanged model."""
    return model.trace()


# Names.


@pytest.mark.parametrize("name", ["gemma_mqa", "gemma2", "vaultgemma", "gemma3"])
def test_all_names_and_only_they_in_the_order_of_the_forward_pass(name):
    config = from_hugging_face(TINY[name])
    assert list(noted(config, "*")) == promised(config.num_layers)


def test_the_module_promises_these_names_in_its_text():
    documented = [
        line.split()[0]
        for line in (trace.__doc__ or "").splitlines()
        if line.startswith("    ") and line.strip()
    ]
    said_with_another = ("key", "value", "gate", "up")
    assert [name for name in documented if name not in OF_SOME_MODELS] == [
        name.replace("layers.0.", "layers.3.")
        for name in promised(1)
        if not name.endswith(said_with_another)
    ]


def test_parts_that_only_some_models_have():
    """Noted by the models that have them, in the order in which the module names them."""
    u, b, t, d, e = 4, 2, 5, 32, 8
    expected = {
        "gemma3n": {"streams": (u, b, t, d), "layers.3.per_layer_input": (b, t, d)},
        "gemma4_e2b": {"layers.3.per_layer_input": (b, t, d)},
        "gemma4_moe": {"layers.3.experts.router": (b, t, e)},
    }
    for model, shapes in expected.items():
        names = noted(from_hugging_face(TINY[model]), "*")
        assert {name: names[name] for name in OF_SOME_MODELS if name in names} == shapes
        assert list(names) == trace.in_order(names)


def test_shapes():
    # Multi-query: one head of keys and values for four of queries.
    shapes = noted(from_hugging_face(TINY["gemma_mqa"]), "*")
    b, t, d, n, k, h, f, v = 2, 5, 64, 4, 1, 16, 96, 512
    of_a_layer = {
        "attention.input": (b, t, d),
        "attention.query": (b, t, n, h),
        "attention.key": (b, t, k, h),
        "attention.value": (b, t, k, h),
        "attention.scores": (b, k, n // k, t, t),
        "attention.mixed": (b, t, n, h),
        "attention.output": (b, t, d),
        "middle": (b, t, d),
        "feed_forward.input": (b, t, d),
        "feed_forward.gate": (b, t, f),
        "feed_forward.up": (b, t, f),
        "feed_forward.output": (b, t, d),
        "residual": (b, t, d),
    }
    assert shapes == {
        "embed": (b, t, d),
        **{f"layers.{i}.{name}": shape for i in range(3) for name, shape in of_a_layer.items()},
        "final_norm": (b, t, d),
        "logits": (b, t, v),
    }


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ([], []),
        (["logits"], ["logits"]),
        (["embed", "layers.*.residual"], ["embed", "layers.0.residual", "layers.1.residual"]),
        (["layers.1.attention.*"], [f"layers.1.{name}" for name in OF_A_LAYER[:7]]),
        (["layers.[1-9].middle", "final?norm"], ["layers.1.middle", "final_norm"]),
        # Twice wanted is once noted; what does not exist is not made up; case counts.
        (["embed", "e*"], ["embed"]),
        (["layers.2.residual", "Logits", "layers"], []),
    ],
)
def test_patterns(wanted, expected):
    config = from_hugging_face({**TINY["gemma_mqa"], "num_hidden_layers": 2})
    assert list(noted(config, *wanted)) == expected


def test_one_string_is_not_a_list_of_patterns():
    # As a sequence of letters, "logits*" would hold the pattern "*".
    with pytest.raises(TraceError, match="must be a list of patterns, got 'logits"):
        Taps("logits*")


def test_names_say_what_the_values_are(model, everything):
    # Each value from others by its definition, in float64; float32 sums of some dozen terms of
    # order 10 are within 1e-5 of it.
    got = {name: value.astype(np.float64) for name, value in everything.items()}
    config = model.config
    stream = got["embed"]
    for layer in range(config.num_layers):
        of = {name: got[f"layers.{layer}.{name}"] for name in OF_A_LAYER}
        np.testing.assert_allclose(of["middle"], stream + of["attention.output"], atol=1e-5)
        stream = of["middle"] + of["feed_forward.output"]
        np.testing.assert_allclose(of["residual"], stream, atol=1e-5)

        key = of["attention.key"][:, :, 0]
        query = of["attention.query"]
        scores = np.einsum("btgh,bsh->bgts", query, key)[:, None] * config.query_scale
        np.testing.assert_allclose(of["attention.scores"], scores, atol=1e-5)

        place = np.arange(len(TOKENS))
        distance = place[:, None] - place
        unseen = (distance < 0) | (distance >= config.window)
        weights = np.exp(np.where(unseen, -np.inf, scores[:, 0]))
        weights /= weights.sum(axis=-1, keepdims=True)
        value = of["attention.value"][:, :, 0]
        mixed = np.einsum("bgts,bsh->btgh", weights, value)
        np.testing.assert_allclose(of["attention.mixed"], mixed, atol=1e-5)
    assert np.abs(got["layers.1.residual"] - stream).max() < 1e-5
    assert got["logits"].shape == (1, len(TOKENS), config.vocab_size)


# Order.


def test_order_is_taken_from_the_names():
    names = promised(12)
    assert trace.in_order(sorted(names)) == names
    assert trace.in_order(reversed(names)) == names


def test_foreign_names_come_last_and_stay_as_they_are():
    foreign = ["vision.1", "layers.1", "layers.x.middle", "layers.1.attention", "layers.01.what"]
    assert trace.in_order([*foreign, "logits", "embed"]) == ["embed", "logits", *foreign]


# Files.


def test_a_trace_survives_its_file_bit_for_bit(tmp_path):
    payload = np.array([0x7FC00001, 0xFFC12345, 0x80000000, 0x00000001], np.uint32)
    saved = {
        "embed": jnp.arange(12, dtype=jnp.float32).reshape(3, 4).T,
        "layers.0.middle": payload.view(np.float32),
        "layers.2.attention.scores": np.array([np.inf, -np.inf, 0.1], ml_dtypes.bfloat16),
        "layers.10.residual": jnp.full((2, 0, 3), 1.0, jnp.bfloat16),
        "final_norm": np.arange(24, dtype=np.float16).reshape(2, 3, 4)[:, ::2, ::-1],
        "logits": np.float64(0.1),
        "another.thing": np.arange(3),
    }
    # Written in no particular order.
    trace.save(tmp_path / "x.safetensors", dict(sorted(saved.items(), reverse=True)))
    loaded = trace.load(tmp_path / "x.safetensors")
    assert list(loaded) == list(saved)
    for name, value in saved.items():
        value = np.asarray(value)
        assert (loaded[name].dtype, loaded[name].shape) == (value.dtype, value.shape), name
        assert loaded[name].tobytes() == value.tobytes(), name


def test_a_whole_trace_survives_its_file(tmp_path, everything):
    trace.save(tmp_path / "x", everything)
    loaded = trace.load(tmp_path / "x")
    assert list(loaded) == promised(2)
    differences = trace.compare(everything, loaded, bound=0.0)
    assert [difference.largest for difference in differences] == [0.0] * len(promised(2))


def test_files_that_cannot_be(tmp_path):
    values = {"embed": np.zeros(2, np.float32)}
    with pytest.raises(TraceError, match=r"cannot write the trace .* is the folder there"):
        trace.save(tmp_path / "nowhere" / "x", values)
    with pytest.raises(TraceError, match="cannot write the trace"):
        trace.save(tmp_path / "x", {"embed": np.array([object()])})
    with pytest.raises(TraceError, match=r"cannot read the trace .*nowhere"):
        trace.load(tmp_path / "nowhere")
    (tmp_path / "foreign").write_bytes(b"something else altogether")
    with pytest.raises(TraceError, match=r"cannot read the trace .*not a safetensors file"):
        trace.load(tmp_path / "foreign")


# Where two passes part.


def first_difference(ours: dict[str, Any], theirs: dict[str, Any], bound: float) -> str:
    """The name that the report marks as the first, which must be the only one marked."""
    lines = trace.report(trace.compare(ours, theirs, bound=bound)).splitlines()
    marked = [line for line in lines if line.endswith("<- first")]
    assert len(marked) == 1
    assert next(line for line in lines if line.startswith("[DIFF]")) == marked[0]
    return marked[0].split()[1]


@pytest.mark.parametrize(
    ("parameter", "first"),
    [
        ("embedder__table__weight", "embed"),
        ("layers__0__norm_before_attention__scale", "layers.0.attention.input"),
        ("layers__0__attention__query_norm__scale", "layers.0.attention.query"),
        ("layers__0__attention__key_norm__scale", "layers.0.attention.key"),
        ("layers__1__attention__output__weight", "layers.1.attention.output"),
        ("layers__1__norm_after_attention__scale", "layers.1.attention.output"),
        ("layers__1__norm_before_feed_forward__scale", "layers.1.feed_forward.input"),
        ("layers__1__feed_forward__gate_up__weight", "layers.1.feed_forward.gate"),
        ("layers__1__feed_forward__down__weight", "layers.1.feed_forward.output"),
        ("final_norm__scale", "final_norm"),
    ],
)
def test_the_first_difference_is_where_the_mistake_is(model, everything, parameter, first):
    def bend(weight: np.ndarray) -> np.ndarray:
        # The row of token 2 or the first output, in a model whose values are of order 1.
        weight[..., 2 if parameter.startswith("embedder") else 0] += np.float32(0.1)
        return weight

    bent = model.trace(**{parameter: bend})
    assert first_difference(everything, bent, bound=1e-4) == first
    # What comes before it is not merely close.
    before = promised(2)[: promised(2).index(first)]
    differences = {d.name: d for d in trace.compare(everything, bent, bound=1e-4)}
    assert [differences[name].largest for name in before] == [0.0] * len(before)
    assert not differences["logits"].is_within


def test_the_first_difference_does_not_depend_on_the_order_of_dictionaries(model, everything):
    def bend(weight: np.ndarray) -> np.ndarray:
        return weight + np.float32(0.1)

    bent = model.trace(layers__1__norm_before_attention__scale=bend)
    for ours in (everything, dict(sorted(everything.items(), reverse=True))):
        assert first_difference(ours, bent, bound=1e-4) == "layers.1.attention.input"
