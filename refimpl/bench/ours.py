"""This project as a subject: the engine as it serves, with slots and context as planned."""

import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from importlib.metadata import version
from typing import Any

from refimpl.bench.subject import OURS, SHORT_PROMPT, Setup, prompt_ids
from refimpl.engine.events import Delta
from refimpl.engine.request import Request, SamplingParams
from refimpl.errors import InvalidRequestError
from refimpl.loading import load

# When a stream's tokens came, and how many at once.
Arrivals = Sequence[tuple[float, int]]
# From a model and a setup to an engine that has yet to be started.
MakeEngine = Callable[[Any, Setup], Any]


def make_engine(gemma: Any, setup: Setup) -> Any:
    """The engine to measure."""
    # Imported here, because imports are part of what is measured.
    from refimpl.engine.engine import Engine, EngineOptions

    options = EngineOptions(
        slots=setup.slots,
        context=setup.context,
        compile_at_start=not setup.is_for_one,
    )
    return Engine(gemma, options)


class Ours:
    """A `Subject`."""

    name = OURS
    package = "refimpl"

    def __init__(self, setup: Setup, *, make: MakeEngine = make_engine) -> None:
        """Nothing is loaded yet."""
        self._setup, self._make = setup, make
        self._gemma: Any = None
        self._engine: Any = None
        self._numbers = itertools.count()

    @property
    def version(self) -> str:
        """Of the package."""
        return version("refimpl")

    @property
    def engine(self) -> Any:
        """What runs it, once it has been compiled."""
        return self._engine

    def load(self) -> float:
        """See `Subject`; most of the imports are JAX."""
        begin = time.perf_counter()
        self._gemma = load(str(self._setup.path))
        return time.perf_counter() - begin

    def compile(self) -> float:
        """See `Subject`."""
        begin = time.perf_counter()
        self._engine = self._make(self._gemma, self._setup)
        self._engine.start()
        return time.perf_counter() - begin

    def prefill(self, num_tokens: int) -> float:
        """See `Subject`."""
        return self._until_first_token(prompt_ids(num_tokens, number=next(self._numbers)))

    def decode(self, streams: int, num_tokens: int) -> float:
        """See `Subject`. The streams are choices of one request, so that they begin together.

        Raises:
            InvalidRequestError: no tokens came while all streams ran.
        """
        request = Request(
            prompt_ids=tuple(prompt_ids(2, number=next(self._numbers))),
            params=_greedy(max_tokens=num_tokens + 1, n=streams),
        )
        arrivals: list[list[tuple[float, int]]] = [[] for _ in range(streams)]
        with closing(self._engine.stream(request)) as events:
            for event in events:
                if isinstance(event, Delta) and event.token_ids:
                    now = time.perf_counter()
                    arrivals[event.choice].append((now, len(event.token_ids)))
        return step_seconds(arrivals) * num_tokens

    def first_token(self) -> float:
        """See `Subject`."""
        return self._until_first_token(SHORT_PROMPT)

    def close(self) -> None:
        """See `Subject`."""
        if self._engine is not None:
            self._engine.close()
        self._engine = self._gemma = None

    def _until_first_token(self, prompt: str | list[int]) -> float:
        begin = time.perf_counter()
        self._engine.complete(prompt, _greedy(max_tokens=1))
        return time.perf_counter() - begin


def step_seconds(arrivals: Sequence[Arrivals]) -> float:
    """Seconds from one token to the next while all streams run.

    They are those of the stream that began last, until another one ends. Its clock starts when its
    first tokens have come, so what counts is what came after them, however many come at a time.

    >>> step_seconds([[(1.0, 1), (3.0, 1), (5.0, 1), (6.0, 1)], [(3.5, 1), (5.5, 1), (7.0, 1)]])
    2.0

    Raises:
        InvalidRequestError: no tokens came while all streams ran.
    """
    last = max(arrivals, key=lambda stream: stream[0][0])
    until = min(stream[-1][0] for stream in arrivals)
    later = [(moment, count) for moment, count in last[1:] if moment <= until]
    if not later:
        raise InvalidRequestError(
            "the streams did not run at the same time for long enough to tell their rate; raise "
            "--tokens",
            parameter="tokens",
        )
    return (later[-1][0] - last[0][0]) / sum(count for _, count in later)


def _greedy(*, max_tokens: int, n: int = 1) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True, n=n)
