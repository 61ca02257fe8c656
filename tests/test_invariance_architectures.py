"""The same promise as in test_invariance.py, for every other architecture, more briefly.

Two slots, so two widths, in a run of the suite: layers that read the keys of others, experts,
per-layer inputs and several streams. Sixteen slots and the rest of the architectures in the long
run.
"""

from collections.abc import Iterator

import numpy as np
import pytest
from refimpl_weights.synthetic import TINY

from refimpl.engine.request import Request
from tests.engines import (
    Desk,
    bits,
    forget_programs,
    prompt_ids,
    random_requests,
    request_of,
    tiny_programs,
)
from tests.tiny_models import GOLDEN

# One token (no prefill), both chunk lengths, one prefix block and two.
LENGTHS = (1, 20, 33, 130, 260)
BRIEFLY = ("gemma3n", "gemma4_moe")

# Compiles all programs of a model.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(autouse=True)
def one_at_a_time() -> Iterator[None]:
    yield
    forget_programs()


def alone(request: Request, at: Desk) -> str:
    """A request with nothing beside it and nothing cached."""
    at.worker.prefix.clear()
    return bits(at.complete(request))


def compared(name: str, *, slots: int, turns: int) -> int:
    """How often a request had the same bits in company, at random times, as alone."""
    random, subjects = np.random.default_rng(6), random_requests(5, LENGTHS)
    at = Desk(tiny_programs(name, slots=slots))
    references = [alone(request, at) for request in subjects]
    assert len(set(references)) == len(references)
    count = 0
    for turn in range(turns):
        if turn % 2:
            at.worker.prefix.clear()
        numbers = [int(number) for number in random.permutation(len(subjects))] * 2
        keys = list[int]()
        for number in numbers:
            keys.append(at.submit(subjects[number]))
            for _ in range(int(random.integers(4))):
                at.worker.step()
            if random.random() < 0.3:
                stranger = at.submit(request_of(prompt_ids(turn, 70), max_tokens=9, seed=turn))
                at.worker.step()
                at.worker.cancel(stranger)
        at.run()
        for number, key in zip(numbers, keys, strict=True):
            assert bits(at.completion(key)) == references[number], subjects[number]
            count += 1
    assert at.worker.prefix.statistics.hits > 0
    return count


@pytest.mark.parametrize("name", BRIEFLY)
def test_in_company_as_alone(name: str) -> None:
    assert compared(name, slots=2, turns=6) == 60


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (name not in BRIEFLY)) for name in TINY]
)
def test_greedy_continuation_is_hugging_face_s(name: str) -> None:
    """By the programs of the engine, in which each layer is one by itself."""
    golden = np.load(GOLDEN / f"{name}.npz")
    prompt = golden["greedy.prompt"].tolist()
    request = request_of(prompt, max_tokens=64, temperature=0.0, ignore_eos=True)
    got = Desk(tiny_programs(name, slots=2)).complete(request)
    assert got.choices[0].token_ids == tuple(golden["greedy.ids"].tolist())


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(TINY))
def test_in_company_as_alone_at_every_width(name: str) -> None:
    assert compared(name, slots=16, turns=20) == 200
