"""The prefix cache: keys that chain, and a naive cache that it must agree with at every step."""

import dataclasses
import gc
import random
import struct
import weakref
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.engine import prefix
from refimpl.engine.prefix import BlockKey, PrefixCache, PrefixStatistics

BLOCK = 2
Tokens = tuple[int, ...]


def cache_of(budget_bytes: int, *, salt: str = "model", block: int = BLOCK) -> PrefixCache[Any]:
    return PrefixCache[Any](budget_bytes=budget_bytes, salt=salt, block=block)


def store_all(cache: PrefixCache[Any], prompt: Tokens, *, nbytes: int = 1) -> list[bool]:
    """Store a prompt's blocks; the payload of each is the prompt up to its end."""
    keys = cache.keys(prompt)
    return [
        cache.store(keys[:end], prompt[: end * BLOCK], nbytes=nbytes)
        for end in range(1, len(keys) + 1)
    ]


def counts(statistics: PrefixStatistics) -> dict[str, int]:
    """What is not zero."""
    return {name: count for name, count in dataclasses.asdict(statistics).items() if count}


# Keys.


def test_a_key_is_what_its_docstring_says() -> None:
    root = blake2b(b"gemma float32", digest_size=32).digest()
    one = struct.pack("<3i", 2, 262_143, 0)
    two = struct.pack("<3i", 5, 6, 7)
    first = blake2b(root + one, digest_size=32).digest()
    second = blake2b(first + two, digest_size=32).digest()
    cache = cache_of(0, salt="gemma float32", block=3)
    assert cache.keys((2, 262_143, 0, 5, 6, 7, 8)) == [
        BlockKey(first, one),
        BlockKey(second, two),
    ]


def test_keys_are_of_whole_blocks() -> None:
    cache = cache_of(0, block=128)
    assert [len(cache.keys(range(length))) for length in (1, 127, 128, 129, 255, 256)] == [
        0, 0, 1, 1, 1, 2,
    ]  # fmt: skip


def test_any_row_of_ids_gives_the_same_keys() -> None:
    cache = cache_of(0)
    assert cache.keys([7, 8]) == cache.keys((7, 8)) == cache.keys(range(7, 9))
    assert cache.keys([7, 8]) == cache.keys(np.array([7, 8]).tolist())


def test_an_id_that_is_none_does_not_become_another() -> None:
    with pytest.raises(OverflowError):
        cache_of(0).keys((2**32, 0))


def test_keys_depend_on_all_that_goes_before() -> None:
    cache, other_model = cache_of(0), cache_of(0, salt="other model")
    prompts = [(1, 2, 3, 4), (9, 2, 3, 4), (1, 2, 9, 4), (2, 1, 3, 4)]
    first, second = ({cache.keys(prompt)[i].digest for prompt in prompts} for i in (0, 1))
    assert (len(first), len(second)) == (3, 4)
    assert not {key.digest for key in other_model.keys((1, 2, 3, 4))} & (first | second)


# Single steps.


def test_the_longest_kept_beginning_is_found() -> None:
    cache = cache_of(100)
    assert store_all(cache, (1, 2, 3, 4, 5, 6)) == [True] * 3
    for prompt, blocks in [
        ((1, 2, 3, 4, 5, 6, 7, 8), 3),
        ((1, 2, 3, 4, 5), 2),
        ((1, 2, 9, 4, 5, 6), 1),
        ((9, 2, 3, 4), 0),
        ((1,), 0),
    ]:
        found = cache.lookup(cache.keys(prompt))
        assert found == [prompt[:2], prompt[:4], prompt[:6]][:blocks]
    assert counts(cache.statistics) == {"blocks": 3, "stored_bytes": 3, "hits": 6, "misses": 5}


def test_a_block_without_its_parent_is_refused() -> None:
    cache = cache_of(100)
    keys = cache.keys((1, 2, 3, 4))
    assert not cache.store(keys, "second", nbytes=1)
    assert counts(cache.statistics) == {"refusals": 1}
    assert cache.store(keys[:1], "first", nbytes=1)
    assert cache.store(keys, "second", nbytes=1)
    assert cache.lookup(keys) == ["first", "second"]


def test_a_payload_over_the_budget_is_refused_without_harm() -> None:
    cache = cache_of(10)
    store_all(cache, (1, 2), nbytes=10)
    keys = cache.keys((3, 4))
    assert not cache.store(keys, "large", nbytes=11)
    assert cache.num_kept(keys) == 0
    assert cache.lookup(cache.keys((1, 2))) == [(1, 2)]
    assert counts(cache.statistics) == {
        "blocks": 1, "stored_bytes": 10, "hits": 1, "refusals": 1,
    }  # fmt: skip


def test_a_block_that_does_not_fit_beside_its_ancestors_is_refused_without_harm() -> None:
    cache = cache_of(10)
    store_all(cache, (9, 9), nbytes=4)
    store_all(cache, (1, 2, 3, 4), nbytes=3)
    assert store_all(cache, (1, 2, 3, 4, 5, 6), nbytes=5) == [True, True, False]
    assert cache.statistics.blocks == 3
    assert cache.statistics.evictions == 0
    assert store_all(cache, (1, 2, 3, 4, 5, 6), nbytes=4) == [True, True, True]
    assert counts(cache.statistics) == {
        "blocks": 3, "stored_bytes": 10, "evictions": 1, "refusals": 1,
    }  # fmt: skip


def test_what_was_not_used_for_longest_goes_first() -> None:
    cache = cache_of(3)
    for prompt in [(1, 1), (2, 2), (3, 3)]:
        store_all(cache, prompt)
    cache.lookup(cache.keys((1, 1)))
    store_all(cache, (2, 2))  # A second time, which is a use.
    assert cache.num_kept(cache.keys((3, 3))) == 1  # Only a look.
    store_all(cache, (4, 4))
    assert [cache.num_kept(cache.keys((i, i))) for i in (1, 2, 3, 4)] == [1, 1, 0, 1]


def test_no_block_goes_before_its_descendants() -> None:
    cache = cache_of(4)
    long = (1, 2, 3, 4, 5, 6, 7, 8)
    store_all(cache, long)
    for left in (3, 2, 1, 0):
        store_all(cache, (100 + left, 0))
        assert cache.num_kept(cache.keys(long)) == left
        assert cache.statistics.blocks == 4


def test_the_first_payload_of_a_block_stays() -> None:
    cache = cache_of(10)
    keys = cache.keys((1, 2))
    assert cache.store(keys, "first", nbytes=3)
    assert cache.store(keys, "second", nbytes=5)
    assert cache.lookup(keys) == ["first"]
    assert cache.statistics.stored_bytes == 3


def test_a_cache_without_budget_keeps_nothing() -> None:
    cache = cache_of(0)
    assert store_all(cache, (1, 2, 3, 4)) == [False, False]
    assert counts(cache.statistics) == {"refusals": 2}


class Array:
    """A payload whose end can be seen."""


def test_a_payload_lives_until_cache_and_user_let_go() -> None:
    cache = PrefixCache[Array](budget_bytes=1, salt="", block=BLOCK)
    one, two = cache.keys((1, 1)), cache.keys((2, 2))
    payload = Array()
    alive = weakref.ref(payload)
    cache.store(one, payload, nbytes=1)
    del payload
    [held] = cache.lookup(one)
    cache.store(two, Array(), nbytes=1)
    assert cache.num_kept(one) == 0
    assert alive() is held
    del held
    gc.collect()
    assert alive() is None


def test_what_is_discarded_takes_along_all_that_stands_on_it() -> None:
    cache = cache_of(100)
    for prompt in ((1, 1, 2, 2, 3, 3), (1, 1, 4, 4), (5, 5, 2, 2)):
        store_all(cache, prompt, nbytes=3)
    assert counts(cache.statistics) == {"blocks": 6, "stored_bytes": 18}
    cache.discard(cache.keys((9, 9)))
    cache.discard([])
    assert cache.statistics.blocks == 6
    # All that begins with its first block, whatever was used last.
    cache.lookup(cache.keys((1, 1, 4, 4)))
    cache.discard(cache.keys((1, 1, 2, 2)))
    assert (cache.statistics.blocks, cache.statistics.stored_bytes) == (2, 6)
    assert cache.num_kept(cache.keys((5, 5, 2, 2))) == 2
    assert store_all(cache, (1, 1, 2, 2, 3, 3)) == [True] * 3


def test_a_cleared_cache_holds_nothing_and_goes_on() -> None:
    cache = cache_of(100)
    payload = Array()
    alive = weakref.ref(payload)
    keys = cache.keys((1, 2, 3, 4))
    assert [cache.store(keys[:end], payload, nbytes=7) for end in (1, 2)] == [True, True]
    cache.lookup(cache.keys((1, 2)))
    cache.clear()
    del payload
    gc.collect()
    assert alive() is None
    assert counts(cache.statistics) == {"hits": 1}
    assert cache.lookup(cache.keys((1, 2))) == []
    assert store_all(cache, (1, 2, 3, 4)) == [True, True]


# Against a naive cache.


class Kept(NamedTuple):
    """A block of the naive cache."""

    nbytes: int
    used: int


class NaiveCache:
    """The same rules over whole prefixes: no digests, no order kept, every rule looked up."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.kept: dict[Tokens, Kept] = {}
        self.time = self.evictions = 0

    @property
    def stored_bytes(self) -> int:
        return sum(kept.nbytes for kept in self.kept.values())

    def lookup(self, prompt: Tokens) -> list[Tokens]:
        paths = [prompt[:end] for end in range(BLOCK, len(prompt) + 1, BLOCK)]
        missing = next((i for i, path in enumerate(paths) if path not in self.kept), len(paths))
        self.use(paths[:missing])
        return paths[:missing]

    def store(self, path: Tokens, nbytes: int) -> bool:
        ancestors = [path[:end] for end in range(BLOCK, len(path), BLOCK)]
        if path not in self.kept:
            if any(ancestor not in self.kept for ancestor in ancestors):
                return False
            if nbytes + sum(self.kept[a].nbytes for a in ancestors) > self.budget_bytes:
                return False
            self.kept[path] = Kept(nbytes, 0)
        self.use([*ancestors, path])
        while self.stored_bytes > self.budget_bytes:
            parents = {path[:-BLOCK] for path in self.kept}
            leaves = [path for path in self.kept if path not in parents]
            del self.kept[min(leaves, key=lambda leaf: self.kept[leaf].used)]
            self.evictions += 1
        return True

    def use(self, paths: list[Tokens]) -> None:
        self.time += 1
        for path in paths:
            self.kept[path] = Kept(self.kept[path].nbytes, self.time)


def step(cache: PrefixCache[Any], naive: NaiveCache, prompt: Tokens, nbytes: int | None) -> None:
    """Look a prompt up, or store its last block, in both; they must agree."""
    keys = cache.keys(prompt)
    if nbytes is None:
        assert cache.lookup(keys) == naive.lookup(prompt)
    elif keys:
        path = prompt[: len(keys) * BLOCK]
        assert cache.store(keys, path, nbytes=nbytes) == naive.store(path, nbytes)
    statistics = cache.statistics
    assert statistics.stored_bytes == naive.stored_bytes <= naive.budget_bytes
    assert statistics.evictions == naive.evictions
    assert statistics.blocks == len(naive.kept)


PROMPTS = st.lists(st.integers(0, 1), max_size=5 * BLOCK).map(tuple)


@given(
    budget_bytes=st.integers(0, 20),
    steps=st.lists(st.tuples(PROMPTS, st.none() | st.integers(0, 6)), max_size=40),
)
@settings(deadline=None, max_examples=200)
def test_it_is_the_naive_cache(budget_bytes: int, steps: list[tuple[Tokens, int | None]]) -> None:
    cache, naive = cache_of(budget_bytes), NaiveCache(budget_bytes)
    for prompt, nbytes in steps:
        step(cache, naive, prompt, nbytes)
        assert all(cache.num_kept(cache.keys(path)) == len(path) // BLOCK for path in naive.kept)


def random_prompt(draw: random.Random) -> Tokens:
    return tuple(draw.choices((0, 1, 2), weights=(6, 1, 1), k=draw.randrange(7 * BLOCK)))


def test_ten_thousand_operations_leave_the_bytes_exact() -> None:
    draw = random.Random(20)
    cache, naive = cache_of(60), NaiveCache(60)
    for _ in range(10_000):
        prompt = random_prompt(draw)
        step(cache, naive, prompt, draw.choice([None, draw.randrange(1, 12)]))
    statistics = cache.statistics
    assert min(statistics.evictions, statistics.refusals, statistics.hits) > 100
    assert min(statistics.blocks, statistics.misses) > 5


def test_not_even_equal_digests_give_a_wrong_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Digests of one byte: many blocks share theirs, so that many are refused."""
    monkeypatch.setattr(prefix, "_DIGEST_BYTES", 1)
    draw, cache = random.Random(5), cache_of(60)
    found = refused = 0
    for _ in range(3000):
        prompt = random_prompt(draw)
        payloads = cache.lookup(cache.keys(prompt))
        assert payloads == [prompt[: (i + 1) * BLOCK] for i in range(len(payloads))]
        found += len(payloads)
        refused += store_all(cache, prompt, nbytes=1).count(False)
    assert found > 1000
    assert refused > 1000
    assert cache.statistics.stored_bytes == cache.statistics.blocks <= 60
