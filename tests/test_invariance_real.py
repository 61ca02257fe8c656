"""Promise: the real Gemma 3 270M, too, gives a request the same bits alone and among others.

Matrices of a tiny model are small enough for code paths that the real ones never take, and the
other way round; so a few requests are held here in the real sizes, one of them past a full ring.
"""

import numpy as np
import pytest
from refimpl_weights.embedded import cache_folder

from refimpl.engine.programs import Programs
from refimpl.engine.request import Request
from refimpl.model.gemma import load_checkpoint
from refimpl.model.registry import locate
from tests.engines import Desk, bits, random_requests

# Compiling takes most of it.
pytestmark = pytest.mark.timeout(900)

SLOTS = 2
LENGTHS = (1, 7, 129, 650)


@pytest.fixture(scope="module")
def desk() -> Desk:
    gemma = load_checkpoint(locate(None), cache_dir=cache_folder())
    # Of the size of those in test_golden_real.py, so that they are compiled once for both.
    return Desk(Programs(gemma=gemma, slots=SLOTS, context=4096), prefix_bytes=1 << 26)


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    return random_requests(31, LENGTHS)


@pytest.fixture(scope="module")
def alone(desk: Desk, requests: list[Request]) -> list[str]:
    def by_itself(request: Request) -> str:
        desk.worker.prefix.clear()
        return bits(desk.complete(request))

    return [by_itself(request) for request in requests]


def test_the_references_differ(alone: list[str]) -> None:
    """Equal results would prove nothing if all requests had the same."""
    assert len(set(alone)) == len(LENGTHS)


@pytest.mark.parametrize("seed", range(2))
def test_among_others_in_any_slot(
    desk: Desk, requests: list[Request], alone: list[str], seed: int
) -> None:
    """All at once in a random order, with a neighbour that is cancelled, cached or not."""
    random = np.random.default_rng(seed)
    if seed % 2 == 0:
        desk.worker.prefix.clear()
    order = [int(number) for number in random.permutation(len(requests))]
    stranger = desk.submit(requests[order[0]])
    keys = {number: desk.submit(requests[number]) for number in order}
    for _ in range(5):
        desk.worker.step()
    desk.worker.cancel(stranger)
    desk.run()
    for number, key in keys.items():
        assert bits(desk.completion(key)) == alone[number], requests[number]
