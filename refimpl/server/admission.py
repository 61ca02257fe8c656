"""What holds for a completion from its admission to its end: places, budget, deadline, figures.

The handler of a completion opens a `Ticket` by `Service.admit` before it does anything else, and
tells it what it learns. Leaving the block gives everything back, however that comes about.
"""

import time
from collections.abc import Iterable

from refimpl.server.limits import Place
from refimpl.server.metrics import Metrics, Moments
from refimpl.server.rates import Expense
from refimpl.server.trail import Trail


class Ticket:
    """A completion that is let in.

    Attributes:
        deadline: by when it must have ended, in seconds of `time.monotonic`.
    """

    def __init__(
        self,
        place: Place,
        expense: Expense | None,
        *,
        metrics: Metrics,
        trail: Trail,
        deadline: float,
    ) -> None:
        """Held by `Service.admit`."""
        self._place, self._expense = place, expense
        self._metrics, self._trail = metrics, trail
        self.deadline = deadline
        self._is_finished = False
        # When it went to the engine, and got its first slot.
        self._sent: float | None = None
        self._admitted: float | None = None
        # Of each choice, when its last token came.
        self._last = dict[int, float]()

    def hold(self, choices: int) -> None:
        """Have room for so many choices in all, prompts times candidates; before tokenising.

        Raises:
            Problem: 503 or 400, see `Queue.reserve`.
        """
        self._place.resize(choices)

    def start(
        self, *, prompt_tokens: int, n: int, max_tokens: int, user: str | None = None
    ) -> None:
        """Say what goes to the engine now.

        Args:
            prompt_tokens: of all prompts, each once.
            n: as in the request.
            max_tokens: as in the request; of each choice that is held.
            user: as in the request.

        Raises:
            Problem: 429, if the key has not so many tokens left.
        """
        most = max_tokens * self._place.choices
        if self._expense is not None:
            self._expense.expect(prompt_tokens + most)
            self._expense.use(prompt_tokens)
        self._place.expect(most)
        self._trail.prompt_tokens, self._trail.user = prompt_tokens, user
        self._metrics.started(prompt_tokens=prompt_tokens, n=n, max_tokens=max_tokens)
        self._sent = time.monotonic()

    def admitted(self, at: float) -> None:
        """One of its prompts has got its first slot.

        Args:
            at: when, in seconds of `time.monotonic`.
        """
        self._admitted = at if self._admitted is None else min(at, self._admitted)

    def tokens(self, count: int, *, choice: int = 0) -> None:
        """So many tokens of one choice have come.

        Args:
            count: at least 1.
            choice: tells apart all that are held, whatever prompt they belong to.
        """
        now = time.monotonic()
        if self._trail.first_token is None:
            self._trail.first_token = now
            self._metrics.first_token(now - self._trail.began)
        last = self._last.get(choice)
        self._metrics.tokens(count, seconds_since_last=None if last is None else now - last)
        self._last[choice] = now
        self._trail.completion_tokens += count
        self._place.made(count)
        if self._expense is not None:
            self._expense.use(count)

    def finished(self, reasons: Iterable[str]) -> None:
        """Everything has been generated.

        Args:
            reasons: the finish_reason of each choice in the reply.
        """
        assert self._sent is not None, "start comes first"
        now, trail = time.monotonic(), self._trail
        first = now if trail.first_token is None else trail.first_token
        moments = Moments(
            came=trail.began,
            sent=self._sent,
            admitted=self._admitted,
            first_token=first,
            last_token=max(self._last.values(), default=first),
            ended=now,
        )
        self._metrics.finished(reasons, tokens=trail.completion_tokens, moments=moments)
        self._is_finished = True

    def broke_off(self, status: int) -> None:
        """A stream under way ended with an error, of this status."""
        self._trail.stream_error = status

    def left(self) -> None:
        """The client has gone, which matters only if there was more to come."""
        if self._sent is not None and not self._is_finished:
            self._metrics.cancelled()
