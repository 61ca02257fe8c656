"""The real Gemma 3 270M from its GGUF file, against transformers on the same dequantised weights.

Bound on log-probabilities: 1e-3 anywhere, past the sliding window of 512 too. Both sides are
float32 programs; transformers' own distance from a float64 run is up to 5e-4 in the long text,
nearly all of it in rope angles, which we form in the same order of operations.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from refimpl_kernels.matrix import QuantizedMatrix
from refimpl_weights import embedded

from refimpl.engine.engine import Engine, EngineOptions
from refimpl.engine.request import SamplingParams
from refimpl.model.gemma import Gemma, load_checkpoint

GOLDEN = Path(__file__).parent / "golden"
BOUND = 1e-3


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    gemma = load_checkpoint(embedded.assemble(), cache_dir=embedded.cache_folder())
    with Engine(gemma, EngineOptions(slots=2, context=4096, compile_at_start=False)) as started:
        yield started


@pytest.fixture(scope="module")
def gemma(engine: Engine) -> Gemma:
    return engine.gemma


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "real" / "270m.npz"))


@pytest.mark.parametrize("text", ["english", "mixed", "python", "long"])
def test_ids_of_the_texts(gemma: Gemma, golden: dict[str, np.ndarray], text: str) -> None:
    written = (GOLDEN / "texts" / f"{text}.txt").read_text(encoding="utf-8")
    assert gemma.tokenizer.encode(written) == golden[f"{text}.ids"].tolist()


@pytest.mark.parametrize("text", ["english", "mixed", "python", "long"])
def test_log_probabilities(engine: Engine, golden: dict[str, np.ndarray], text: str) -> None:
    ids, wanted = golden[f"{text}.ids"], golden[f"{text}.logprobs"]
    first, *rest = engine.score(ids.tolist())
    assert first is None
    entries = [entry for entry in rest if entry is not None]
    assert [entry.id for entry in entries] == ids[1:].tolist()
    assert np.abs(np.array([entry.logprob for entry in entries]) - wanted).max() < BOUND


@pytest.mark.parametrize("name", ["english", "mixed", "python", "long", "past_window"])
def test_greedy_continuations(engine: Engine, golden: dict[str, np.ndarray], name: str) -> None:
    ids = golden["long.ids" if name == "past_window" else f"{name}.ids"]
    prompt = ids[: int(golden[f"greedy.{name}.prompt_length"])].tolist()
    params = SamplingParams(max_tokens=64, temperature=0.0)
    [choice] = engine.complete(prompt, params).choices
    assert list(choice.token_ids) == golden[f"greedy.{name}.ids"].tolist()
    # No choice was near a tie, so equality says something.
    assert golden[f"greedy.{name}.margins"].min() > 10 * BOUND


@pytest.mark.parametrize("length", [641, 1300, 2100, 2888])
def test_a_step_behind_a_long_prompt(
    engine: Engine, golden: dict[str, np.ndarray], length: int
) -> None:
    """What decode computes where rings are full and a full-length cache is taken by groups.

    The last id of a prompt is decode's; the one allowed id is drawn, whatever its probability is.
    """
    ids = golden["long.ids"][: length + 1].tolist()
    params = SamplingParams(max_tokens=1, allowed_token_ids=ids[-1:], logprobs=0)
    [choice] = engine.complete(ids[:-1], params).choices
    assert choice.token_ids == (ids[-1],)
    assert choice.logprobs is not None
    assert abs(choice.logprobs[0].logprob - golden["long.logprobs"][length - 1]) < BOUND


def test_weights_stay_as_the_file_stores_them(gemma: Gemma) -> None:
    """Integers and scales, about 1.13 bytes a parameter; no float32 copy of a matrix."""
    table = gemma.parameters["embedder"]["table"]["weight"]
    assert isinstance(table, QuantizedMatrix)
    assert table.values.dtype == np.int8
    bytes_held = sum(leaf.nbytes for leaf in _leaves(gemma.parameters))
    assert bytes_held < 1.2 * gemma.config.parameter_count


def _leaves(tree: object) -> list[QuantizedMatrix | np.ndarray]:
    if isinstance(tree, dict):
        return [leaf for branch in tree.values() for leaf in _leaves(branch)]
    return [tree]  # type: ignore[list-item]
