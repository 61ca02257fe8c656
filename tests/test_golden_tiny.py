"""Our forward pass against Hugging Face's eager models and our float64 oracle, by architecture.

float32: logits and the residual stream after every layer within 2e-5, absolutely, in models whose
logits reach 4 to 6 and whose stream has a root mean square of 1 to 2. A mistake in a formula moves
a logit by at least 1e-3 (tests/golden/mistakes.py).

The NumPy oracle shares no line with what it judges. Against it: 1e-5. Far from the start it takes
float32 rope angles: an angle of 5,000 radians has an error of 2e-4 in float32, in every program
that forms it so.

bfloat16: the same bits, as far as float32 sums allow. A sum of products in another order differs in
the last bit of its float32, which now and then tips a rounding to bfloat16 over; and a tipped
rounding is passed on and grows. So one layer at a time is compared, given Hugging Face's own stream
before it. (On the machine that the goldens were made on, whole passes have equal bits, too, in six
of the seven models up to Gemma 3.)
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from refimpl_weights.synthetic import TINY

from refimpl.model.cache import FullPass, KVCache, Memory
from refimpl.model.implementations import REFERENCE, implementations_for
from refimpl.model.numerics import FLOAT32, HF_BFLOAT16
from refimpl.model.trace import Taps
from tests.checkpoint_files import bare
from tests.oracle import float32_angles, forward, from_hugging_face
from tests.oracle.rope import exact_angles
from tests.tiny_models import GOLDEN, cached_pass, full_pass, golden_case, tiny_model

CASES = ("short", "long", "far", "very_far", "left_padded", "right_padded")
BOUND, ORACLE_BOUND = 2e-5, 1e-5

PREFILLED = ("gemma2", "gemma3n")

every_model = pytest.mark.parametrize("name", sorted(TINY))
# What takes a program of its own is done to these in the long run: they take the same ways through
# the model as "gemma_mqa" and "gemma3", and differ from them in numbers only.
TWINS = ("gemma_mha", "gemma3_multimodal")
every_way = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.long if name in TWINS else ()) for name in sorted(TINY)],
)


@every_model
def test_float32_logits_and_every_residual(name: str) -> None:
    stored = np.load(GOLDEN / f"{name}.npz")
    for case in (case for case in CASES if f"{case}.ids" in stored):
        golden = golden_case(name, case)
        rows, length = golden.is_token.shape
        logits, trace = full_pass(name)(golden.tokens, golden.positions)
        for (stage, got), wanted in zip(trace.items(), golden.residual, strict=True):
            difference = np.abs(np.asarray(got)[..., :rows, :length, :] - wanted)
            difference = difference[..., golden.is_token, :].max()
            assert difference < BOUND, f"{case}, {stage}: {difference:.1e}"
        difference = np.abs(np.asarray(logits)[:rows, :length] - golden.logits)[golden.is_token]
        assert difference.max() < BOUND, f"{case}, logits: {difference.max():.1e}"


@pytest.mark.parametrize(
    ("name", "case"),
    [
        (name, case)
        for name in TINY
        for case in CASES
        if f"{case}.ids" in np.load(GOLDEN / f"{name}.npz")
    ],
)
def test_logits_and_every_residual_of_the_oracle(name: str, case: str) -> None:
    golden = golden_case(name, case)
    rows, length = golden.is_token.shape
    tokens, positions = golden.tokens[:rows, :length], golden.positions[:rows, :length]

    logits, trace = full_pass(name)(golden.tokens, golden.positions)
    ours = [np.asarray(value)[..., :rows, :length, :] for value in trace.values()]

    exact = forward(
        from_hugging_face(TINY[name]),
        bare(name),
        tokens,
        np.maximum(positions, 0),
        visible=golden.is_token,
        angle_function=float32_angles if case.endswith("far") else exact_angles,
    )
    assert len(ours) == len(exact.residuals)
    for index, (got, wanted) in enumerate(zip(ours, exact.residuals, strict=True)):
        difference = np.abs(got - wanted)[..., golden.is_token, :].max()
        assert difference < ORACLE_BOUND, f"stream {index}: {difference:.1e}"
    got = np.asarray(logits)[:rows, :length]
    difference = np.abs(got - exact.logits)[golden.is_token].max()
    assert difference < ORACLE_BOUND, f"logits: {difference:.1e}"


@every_way
def test_bfloat16_layer_by_layer(name: str) -> None:
    """All but a few elements have the same bits, and a tipped rounding moves those by little."""
    model = tiny_model(name, HF_BFLOAT16)
    golden = golden_case(name, "long", "bfloat16")

    def every_layer(parameters: Any, before: Any, tokens: Any, positions: Any) -> Any:
        module = nnx.merge(model.graph, parameters)
        angles, after = module.angles(positions), []
        # One memory for all, from which layers without keys take those of others.
        memory: Memory = FullPass(positions)
        embed = module.embedder.encode(tokens)
        embedder = module.per_layer_embedder
        inputs = embedder(tokens, embed, implementation="dot") if embedder else None
        for index, (block, x) in enumerate(zip(module.layers, before, strict=True)):
            given = None if inputs is None else inputs[:, :, index]
            y, memory = block(
                x, positions, angles, memory, given=given,
                implementations=REFERENCE, taps=Taps(),
            )  # fmt: skip
            after.append(y)
        last = module.streams.leave(
            jnp.asarray(golden.residual[-1], jnp.bfloat16), implementation="dot"
        )
        first = module.streams.enter(embed, implementation="dot")
        return first, jnp.stack(after), module.logits(module.final_norm(last))

    compiled = jax.jit(every_layer, compiler_options=HF_BFLOAT16.compiler_options)
    before = jnp.asarray(golden.residual[:-1], jnp.bfloat16)
    tokens, positions = jnp.asarray(golden.tokens[:1]), jnp.asarray(golden.positions[:1])
    first, got, logits = compiled(model.parameters, before, tokens, positions)
    for layer, (ours, theirs) in enumerate(
        zip(np.asarray(got, np.float32), golden.residual[1:], strict=True)
    ):
        assert np.mean(ours == theirs) > 0.98, f"layer {layer}"
        # Numbers between 1 and 2 lie 2^-7 apart in bfloat16.
        units = np.abs(ours - theirs) / (2**-7 * np.maximum(np.abs(theirs), 1.0))
        assert units.max() <= 2, f"layer {layer}: {units.max():.1f} units"

    # The head after the last norm; and the scaled embedding, a single product, to the bit.
    assert np.mean(np.asarray(logits, np.float32) == golden.logits) > 0.98
    first, wanted = (
        np.reshape(np.asarray(x, np.float32), (-1, *before.shape[-3:])) for x in (first, before[0])
    )
    np.testing.assert_array_equal(first[0], wanted[0])
    # Further streams are projections.
    assert np.mean(first == wanted) > 0.98


@every_way
def test_greedy_ids_of_64_steps(name: str) -> None:
    """Hugging Face's choices, made by prefill and 63 decode steps over a ring cache."""
    golden = np.load(GOLDEN / f"{name}.npz")
    prompt, wanted = golden["greedy.prompt"], golden["greedy.ids"]
    # The other models' prompts go through the program of decode, which takes seconds less to make.
    phase = "prefill" if name in PREFILLED else "decode"
    prefill = cached_pass(name, implementations_for(FLOAT32, phase=phase))
    decode = cached_pass(name, implementations_for(FLOAT32, phase="decode"))
    cache = KVCache.create(tiny_model(name).config, batch=1, length=80, chunk=16, block=8)
    given, position, chosen = list(prompt), 0, []
    while len(chosen) < len(wanted):
        tokens, positions = np.zeros((1, 16), np.int32), np.full((1, 16), -1, np.int32)
        tokens[0, : len(given)] = given
        positions[0, : len(given)] = np.arange(position, position + len(given))
        run = decode if chosen else prefill
        logits, cache = run(cache, tokens, positions)
        position += len(given)
        given = [int(np.asarray(logits)[0, len(given) - 1].argmax())]
        chosen += given
    np.testing.assert_array_equal(chosen, wanted)
    # No choice was near a tie, so equality says something.
    assert golden["greedy.margins"].min() > 100 * BOUND
