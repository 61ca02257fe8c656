"""Engines over tiny models for tests. Compiled once for each size; everything else is made anew.

The tests of the engine hold for every architecture. They run for Gemma 3 unless the environment
names another tiny model: REFIMPL_TEST_ARCHITECTURE=gemma3n pytest tests/test_engine.py ...
"""

import gc
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
from filelock import FileLock
from refimpl_weights import synthetic

from refimpl.engine.engine import Engine, EngineOptions
from refimpl.engine.events import Completion, Event, collect
from refimpl.engine.programs import Programs
from refimpl.engine.request import Request, SamplingParams
from refimpl.engine.session import Session
from refimpl.engine.worker import Worker
from refimpl.model.gemma import Gemma, load_checkpoint
from tests import compiled

ARCHITECTURE = os.environ.get("REFIMPL_TEST_ARCHITECTURE", "gemma3")
# Three blocks of the prefix cache.
CONTEXT = 384


@cache
def tiny_gemma(name: str) -> Gemma:
    """The synthetic checkpoint of this name."""
    with tempfile.TemporaryDirectory() as folder:
        synthetic.write_checkpoint(folder, name)
        return load_checkpoint(folder)


def tiny_programs(name: str = ARCHITECTURE, *, slots: int = 16, steps: int = 1) -> Programs:
    """Programs, compiled, once for each size."""
    return _programs(name, slots, steps)


@cache
def _programs(name: str, slots: int, steps: int) -> Programs:
    made = Programs(gemma=tiny_gemma(name), slots=slots, context=CONTEXT, max_steps=steps)
    # Of the processes of a run that want the same programs, one compiles and the others wait and
    # read: each has but its share of the machine.
    with FileLock(compiled.folder() / f"{name}-{slots}-{steps}.lock"):
        Desk(made)
    return made


def forget_programs() -> None:
    """Let go of all models and programs.

    For files with many architectures: each engine's programs take thousands of memory maps, of
    which Linux gives a process 65,530, and XLA crashes when there are no more.
    """
    _programs.cache_clear()
    tiny_gemma.cache_clear()
    gc.collect()


def tiny_engine(
    name: str = ARCHITECTURE,
    *,
    slots: int = 16,
    steps: int = 1,
    prefix_bytes: int = 1 << 24,
    max_unread: int = 64,
) -> Engine:
    """An engine of its own over programs that all engines of its size share."""
    options = EngineOptions(
        slots=slots,
        context=CONTEXT,
        steps=steps,
        prefix_bytes=prefix_bytes,
        max_unread=max_unread,
    )
    engine = Engine(tiny_gemma(name), options)
    engine._programs = tiny_programs(name, slots=slots, steps=steps)
    return engine


class Desk:
    """A worker driven by hand, on the thread of the test."""

    def __init__(self, programs: Programs, *, prefix_bytes: int = 1 << 24) -> None:
        self.worker = Worker(programs, prefix_bytes=prefix_bytes, emit=self._emit)
        for _ in self.worker.start():
            pass
        self._gemma = programs.gemma
        self._requests = dict[int, Request]()
        self.events = dict[int, list[Event]]()

    def submit(self, request: Request) -> int:
        """Put a request into the queue; gives its key."""
        key = len(self._requests)
        self._requests[key], self.events[key] = request, []
        session = Session(request, self._gemma.tokenizer, self._gemma.eos_ids)
        self.worker.submit(key, session)
        return key

    def run(self) -> None:
        """Until nothing is left to do."""
        while self.worker.step():
            pass

    def completion(self, key: int) -> Completion:
        """What a request that has ended came to."""
        return collect(self._requests[key], self.events[key])

    def complete(self, request: Request) -> Completion:
        """A request by itself, from its submission to its end."""
        key = self.submit(request)
        self.run()
        return self.completion(key)

    def _emit(self, key: int, events: list[Event]) -> None:
        self.events[key] += events


def bits(completion: Completion) -> str:
    """A completion, spelt so that floats with different bits differ (there is no nan)."""
    return repr(completion)


def prompt_ids(seed: int, length: int) -> tuple[int, ...]:
    """A beginning of text and random ids of ordinary pieces."""
    ids = np.random.default_rng(seed).integers(4, 480, size=length)
    return (2, *(int(i) for i in ids[1:]))


def request_of(ids: Sequence[int], *, prompt_logprobs: int | None = None, **params: Any) -> Request:
    """A request with these sampling parameters."""
    return Request(
        prompt_ids=tuple(ids), params=SamplingParams(**params), prompt_logprobs=prompt_logprobs
    )


def with_params(request: Request, **params: Any) -> Request:
    """The request with other sampling parameters."""
    return replace(request, params=replace(request.params, **params))


def random_requests(seed: int, lengths: Iterable[int]) -> list[Request]:
    """One request for each prompt length, with any combination of sampling parameters."""
    random = np.random.default_rng(seed)
    return [_random_request(random, length) for length in lengths]


def _random_request(random: np.random.Generator, length: int) -> Request:
    def one_of(*values: Any) -> Any:
        return values[int(random.integers(len(values)))]

    def ids(most: int) -> tuple[int, ...]:
        return tuple(int(i) for i in random.integers(3, 500, size=int(random.integers(most))))

    max_tokens = int(random.integers(1, 13))
    n = int(one_of(1, 1, 1, 2, 3))
    prompt = prompt_ids(int(random.integers(1 << 30)), length)
    return request_of(
        prompt,
        prompt_logprobs=one_of(None, None, None, 0, 5),
        max_tokens=max_tokens,
        temperature=one_of(0.0, 0.0, 0.3, 1.0, 1.0, 2.0),
        top_p=one_of(1.0, 1.0, 0.9, 0.5, 0.0),
        top_k=one_of(0, 0, 1, 5, 50),
        min_p=one_of(0.0, 0.0, 0.01, 0.2),
        frequency_penalty=one_of(0.0, 0.0, 1.5, -2.0),
        presence_penalty=one_of(0.0, 0.0, 0.7, -1.0),
        repetition_penalty=one_of(1.0, 1.0, 1.3, 0.7),
        logit_bias=one_of({}, {}, {int(random.integers(500)): 5.0, 7: -100.0}),
        allowed_token_ids=one_of(None, None, None, (9, *range(20, 60))),
        banned_token_ids=one_of((), (), ids(6)),
        min_tokens=one_of(0, 0, min(3, max_tokens)),
        stop=one_of((), (), ("e",), ("the", "in", " ")),
        stop_token_ids=one_of((), (), ids(20)),
        ignore_eos=one_of(False, True),
        seed=int(random.integers(-(2**63), 2**63)),
        n=n,
        best_of=one_of(None, None, None, n + 1),
        logprobs=one_of(None, 0, 3, 20),
    )
