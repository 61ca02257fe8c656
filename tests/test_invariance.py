"""Promise: nothing about a request's result shows what else ran, where, when, or in how many steps.

A result is the whole completion: ids, log-probabilities, top lists, text, reasons, prompt scores.
The reference of each request is computed alone, one step a call, with nothing cached; everything
else must equal it bit for bit. The comparisons are counted, and the count is held at the end.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import pytest

from refimpl.engine.events import Completion
from refimpl.engine.request import Request
from tests.engines import (
    ARCHITECTURE,
    Desk,
    bits,
    prompt_ids,
    random_requests,
    request_of,
    tiny_engine,
    tiny_gemma,
    tiny_programs,
    with_params,
)

# One token (no prefill), both sides of both chunk lengths and of one and two prefix blocks.
LENGTHS = (1, 2, 3, 17, 32, 33, 34, 64, 96, 127, 128, 129, 130, 140, 200, 256, 257, 258, 290, 370)
COMPARED = [0]

# The first test of each size compiles its programs.
pytestmark = pytest.mark.timeout(900)


def desk(*, slots: int = 16, steps: int = 1) -> Desk:
    return _desk(slots, steps)


@cache
def _desk(slots: int, steps: int) -> Desk:
    return Desk(tiny_programs(slots=slots, steps=steps))


@cache
def subjects() -> tuple[Request, ...]:
    return tuple(random_requests(2, LENGTHS * 2))


@cache
def reference(number: int) -> str:
    return bits(alone(subjects()[number], desk()))


def alone(request: Request, at: Desk) -> Completion:
    """A request with nothing beside it and nothing cached."""
    at.worker.prefix.clear()
    return at.complete(request)


def hold(number: int, got: str) -> None:
    COMPARED[0] += 1
    assert got == reference(number), f"request {number}: {subjects()[number]}"


def together(at: Desk, numbers: Sequence[int], random: np.random.Generator) -> None:
    """Submit requests at random times, with neighbours that are cancelled, and hold them all."""
    keys = list[int]()
    strangers = list[int]()
    for number in numbers:
        keys.append(at.submit(subjects()[number]))
        for _ in range(int(random.integers(4))):
            at.worker.step()
        if random.random() < 0.3:
            neighbour = subjects()[int(random.integers(len(subjects())))]
            strangers.append(at.submit(with_params(neighbour, seed=int(random.integers(99)))))
        if strangers and random.random() < 0.5:
            at.worker.cancel(strangers.pop(int(random.integers(len(strangers)))))
    at.run()
    for number, key in zip(numbers, keys, strict=True):
        hold(number, bits(at.completion(key)))


def test_the_references_differ() -> None:
    """Equal results would prove nothing if all requests had the same."""
    assert len({reference(number) for number in range(len(subjects()))}) == len(subjects())


def test_alone_in_every_slot() -> None:
    at = desk()
    for number in (0, 3, 11, 18, 25):
        seen = set[int]()
        for _ in range(16):
            # Slots that are free are taken in turn; one choice of it is always in the first.
            seen.add(next(iter(at.worker.scheduler._free)))
            hold(number, bits(alone(subjects()[number], at)))
            # Sixteen, less what the request's other choices took, is no multiple of their number.
            skip = (1 - subjects()[number].params.num_candidates) % 16
            at.worker.scheduler._free.rotate(-skip)
        assert seen == set(range(16))


def test_among_companions_of_any_kind() -> None:
    random = np.random.default_rng(3)
    at = desk()
    for turn in range(30):
        if turn % 3 == 0:
            at.worker.prefix.clear()
        numbers = random.choice(len(subjects()), size=int(random.integers(2, 17)), replace=False)
        together(at, [int(number) for number in numbers], random)


def test_all_at_once() -> None:
    """More requests than slots, submitted before the first step."""
    at = desk()
    at.worker.prefix.clear()
    for _ in range(2):
        keys = [at.submit(request) for request in subjects()]
        at.run()
        for number, key in enumerate(keys):
            hold(number, bits(at.completion(key)))


def test_cold_and_warm_prefix() -> None:
    at = desk()
    for number, request in enumerate(subjects()):
        blocks = (len(request.prompt_ids) - 1) // 128
        hold(number, bits(alone(request, at)))
        hits = at.worker.prefix.statistics.hits
        hold(number, bits(at.complete(request)))
        used = at.worker.prefix.statistics.hits - hits
        assert used == (0 if request.prompt_logprobs is not None else blocks)


def test_a_prefix_that_another_request_left() -> None:
    """Prompts that begin alike and part within a block, or after one."""
    at = desk()
    for number, request in enumerate(subjects()):
        ids = request.prompt_ids
        for common in (128, 256):
            if len(ids) <= common:
                continue
            at.worker.prefix.clear()
            other = (*ids[:common], *prompt_ids(number, 40))
            at.complete(request_of(other, max_tokens=3, seed=1))
            hold(number, bits(at.complete(request)))
            at.worker.prefix.clear()
            # Only the first block is left: the second is computed after a loaded one.
            at.complete(request_of((*ids[:130], 9), max_tokens=1, seed=1))
            hold(number, bits(at.complete(request)))


def test_a_prefix_cache_that_keeps_nothing_or_little() -> None:
    block = next(iter(desk().worker.prefix._entries.values())).nbytes
    random = np.random.default_rng(8)
    for prefix_bytes in (0, 3 * block):
        at = Desk(tiny_programs(), prefix_bytes=prefix_bytes)
        for _ in range(2):
            numbers = random.permutation(len(subjects()))
            together(at, [int(number) for number in numbers], random)
        assert at.worker.prefix.statistics.stored_bytes <= prefix_bytes


def test_text_and_ids_and_threads() -> None:
    """Through an engine: from several threads at once, as text and as ids."""
    with tiny_engine() as engine, ThreadPoolExecutor(8) as threads:

        def by_ids(number: int) -> str:
            request = subjects()[number]
            return bits(engine.complete(request.prompt_ids, request.params))

        numbers = [n for n, request in enumerate(subjects()) if request.prompt_logprobs is None]
        for number, got in zip(numbers * 3, threads.map(by_ids, numbers * 3), strict=True):
            hold(number, got)

        texts = ["the other day", "a", "", "in the end " * 20]
        params = subjects()[0].params
        for text in texts:
            ids = tiny_gemma(ARCHITECTURE).tokenizer.encode(text)
            by_text = threads.map(engine.complete, [text] * 3, [params] * 3)
            COMPARED[0] += 3
            assert {bits(each) for each in by_text} == {bits(engine.complete(ids, params))}


def test_choices_do_not_depend_on_how_many_there_are_nor_on_the_slots() -> None:
    for length in (1, 40, 140):
        request = request_of(
            prompt_ids(77, length), max_tokens=4, seed=-5, logprobs=4, temperature=1.5,
            repetition_penalty=1.2, stop=("a",), n=1,
        )  # fmt: skip
        many = alone(with_params(request, n=37), desk()).choices
        few_slots = alone(with_params(request, n=37), desk(slots=2, steps=4)).choices
        three = alone(with_params(request, n=3), desk()).choices
        assert len({choice.token_ids for choice in many}) > 20
        COMPARED[0] += 37 + 3 + 1
        assert repr(many) == repr(few_slots)
        assert repr(many[:3]) == repr(three)
        assert repr(many[:1]) == repr(alone(request, desk()).choices)


def test_many_steps_in_a_call() -> None:
    """On an engine of other sizes: two slots, four steps."""
    at = desk(slots=2, steps=4)
    for number, request in enumerate(subjects()):
        hold(number, bits(alone(request, at)))
    random = np.random.default_rng(4)
    for _ in range(2):
        numbers = random.permutation(len(subjects()))
        together(at, [int(number) for number in numbers], random)


def test_there_were_enough_comparisons() -> None:
    """Last, since it counts what the tests above have compared."""
    assert COMPARED[0] >= 1000
