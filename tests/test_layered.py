"""Programs of one layer each: the bits of the whole in one program, and few programs for many
layers."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from refimpl_kernels.matrix import OutputMajorMatrix
from refimpl_weights.synthetic import TINY
from refimpl_weights.synthetic_gguf import write_gguf

from refimpl.engine import programs as programs_module
from refimpl.engine.executables import Executable
from refimpl.engine.layered import Layered
from refimpl.engine.program import Program
from refimpl.engine.programs import Programs
from refimpl.model.gemma import Gemma, load_checkpoint
from tests.engines import (
    CONTEXT,
    Desk,
    bits,
    forget_programs,
    prompt_ids,
    request_of,
    tiny_gemma,
)

# The long form compiles all programs of a model, twice.
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(autouse=True)
def one_at_a_time() -> Iterator[None]:
    yield
    forget_programs()


def answers(at: Desk) -> list[str]:
    """Alone without prefill, with a short and a long chunk; then two together."""
    alone = [
        bits(at.complete(request_of(prompt_ids(3, length), max_tokens=9, seed=5, logprobs=3)))
        for length in (1, 20, 140)
    ]
    scored = request_of(prompt_ids(8, 40), max_tokens=1, seed=1, prompt_logprobs=2)
    keys = [at.submit(request_of(prompt_ids(4 + i, 30 + i), max_tokens=9, seed=i)) for i in (0, 1)]
    at.run()
    return [*alone, bits(at.complete(scored)), *(bits(at.completion(key)) for key in keys)]


def programs(name: str, *, steps: int) -> Programs:
    return Programs(gemma=tiny_gemma(name), slots=2, context=CONTEXT, max_steps=steps)


# In a run of the suite, test_invariance.py holds Gemma 3 against its own program of several steps,
# and test_invariance_architectures.py others against Hugging Face.
@pytest.mark.long
@pytest.mark.parametrize("name", sorted(TINY))
def test_the_bits_are_those_of_one_program(name: str) -> None:
    layered, whole = programs(name, steps=1), programs(name, steps=2)
    assert isinstance(layered.decode, Layered)
    assert isinstance(whole.decode, Program)
    assert answers(Desk(layered)) == answers(Desk(whole))


def compiled(gemma: Gemma, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often programs of each name are compiled for one chunk of prompt and one step.

    They are counted, and give zeros: to compile them would take most of the time.
    """
    counts = Counter[str]()

    def counted(self: Program, leaves: list[Any], tree: Any, _: tuple[int, ...]) -> Executable:
        counts[self.name] += 1
        trees: list[Any] = []

        def flat(*given: Any) -> list[Any]:
            result, result_tree = jax.tree.flatten(self._function(*jax.tree.unflatten(tree, given)))
            trees.append(result_tree)
            return result

        zeros = [jnp.zeros(one.shape, one.dtype) for one in jax.eval_shape(flat, *leaves)]
        return Executable(lambda *_: zeros, trees[0])

    monkeypatch.setattr(Program, "_compiled", counted)
    monkeypatch.setattr(programs_module, "store_of_this_machine", lambda _: None)
    fresh = Programs(gemma=gemma, slots=1, context=CONTEXT)
    state, parameters = fresh.new_state(), gemma.parameters
    for _ in range(2):
        state, _ = fresh.prefill(parameters, state, jnp.zeros(35, jnp.int32))
        state, _ = fresh.decode(parameters, state, jnp.array([1, -1], jnp.int32))
    return counts


def test_layers_of_one_kind_share_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    gemma = tiny_gemma("gemma3")
    assert len(gemma.config.layers) > len(set(gemma.config.layers)) == 2
    assert compiled(gemma, monkeypatch) == {
        f"{phase} {part}": 1
        for phase in ("prefill", "decode")
        for part in ("enter", "local", "global", "leave")
    } | {"decode draw": 1}


def test_other_weights_of_a_layer_are_a_program_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "x.gguf", architecture="gemma3", tensor_type="Q4_0")
    gemma = load_checkpoint(path)
    local = [i for i, spec in enumerate(gemma.config.layers) if spec == gemma.config.layers[0]]
    assert len(local) > 1
    before = compiled(gemma, monkeypatch)
    parameters: Any = jax.tree.map(lambda leaf: leaf, gemma.parameters)
    matrix = parameters["layers"][local[-1]]["feed_forward"]["down"]["weight"]
    assert isinstance(matrix, OutputMajorMatrix)
    assert matrix.minimums is None
    changed = replace(matrix, minimums=jnp.zeros_like(matrix.scales))
    parameters["layers"][local[-1]]["feed_forward"]["down"]["weight"] = changed
    after = compiled(replace(gemma, parameters=parameters), monkeypatch)
    assert (before["decode local"], after["decode local"]) == (1, 2)
    assert before["decode global"] == after["decode global"] == 1


def test_a_part_that_was_not_given_cannot_be_computed_with() -> None:
    gemma = tiny_gemma("gemma3")
    tokens = jnp.zeros((1, 2), jnp.int32)
    outer = {name: part for name, part in gemma.parameters.items() if name != "layers"}
    module = gemma.module(outer)
    x, _ = module.enter(tokens)
    assert module.leave(x).shape == (1, 2, gemma.config.width)
    with pytest.raises(Exception, match="ShapeDtypeStruct"):
        module.hidden(tokens, jnp.arange(2, dtype=jnp.int32)[None])
