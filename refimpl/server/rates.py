"""What each key may use: requests and tokens a minute, and requests at a time.

A budget is a token bucket: it holds a minute's worth at most, and fills evenly. So in any t seconds
nobody gets more than the limit times 1 + t / 60. What a request may come to - its prompt, and
max_tokens of every candidate - is taken when it begins, and what it did not use is given back at
its end, as OpenAI does.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from refimpl.server.errors import Problem
from refimpl.server.limits import LONGEST_WAIT, Clock

RATE_LIMITED = "rate_limit_exceeded"


@dataclass(frozen=True, kw_only=True)
class Allowance:
    """What a key may use; None is without limit.

    Attributes:
        requests_per_minute: at least 1.
        tokens_per_minute: at least 1.
        concurrency: requests at a time, at least 1.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None


class Bucket:
    """A budget that fills evenly."""

    def __init__(self, per_minute: int, *, clock: Clock = time.monotonic) -> None:
        """A full one."""
        self.limit, self._clock = per_minute, clock
        self._level, self._since = float(per_minute), clock()

    @property
    def remaining(self) -> int:
        """What can be taken now."""
        self._fill()
        return max(0, math.floor(self._level))

    @property
    def seconds_until_full(self) -> float:
        """How long it takes to fill up if nothing is taken."""
        self._fill()
        return (self.limit - self._level) * 60 / self.limit

    def seconds_until(self, amount: int) -> float:
        """How long until so much can be taken; 0 if it can be now."""
        self._fill()
        return max(0.0, (amount - self._level) * 60 / self.limit)

    def take(self, amount: int) -> None:
        """Use so much, or give it back if negative. It may go below nothing."""
        self._fill()
        self._level = min(float(self.limit), self._level - amount)

    def _fill(self) -> None:
        now = self._clock()
        self._level = min(float(self.limit), self._level + (now - self._since) * self.limit / 60)
        self._since = now


class Budget:
    """What one key has left."""

    def __init__(self, allowance: Allowance, *, clock: Clock = time.monotonic) -> None:
        """All of it."""
        self._most = allowance.concurrency
        self._running = 0
        per_minute = {
            "requests": allowance.requests_per_minute,
            "tokens": allowance.tokens_per_minute,
        }
        self._buckets = {
            name: Bucket(limit, clock=clock) for name, limit in per_minute.items() if limit
        }

    @contextmanager
    def spend(self) -> "Iterator[Expense]":
        """Count a request for as long as the block runs.

        Raises:
            Problem: 429, if it is one too many now or in this minute.
        """
        if self._most is not None and self._running >= self._most:
            raise self._refusal(
                f"{self._most} requests of this key are running, which is the most at a time", 1.0
            )
        requests = self._buckets.get("requests")
        if requests is not None:
            wait = requests.seconds_until(1)
            if wait > 0:
                raise self._refusal(f"this key may send {requests.limit} requests a minute", wait)
            requests.take(1)
        expense = Expense(self)
        self._running += 1
        try:
            yield expense
        finally:
            self._running -= 1
            expense.settle()

    def headers(self) -> dict[str, str]:
        """What is left, as OpenAI's headers say it."""
        headers = dict[str, str]()
        for name, bucket in self._buckets.items():
            headers[f"x-ratelimit-limit-{name}"] = str(bucket.limit)
            headers[f"x-ratelimit-remaining-{name}"] = str(bucket.remaining)
            headers[f"x-ratelimit-reset-{name}"] = spell_seconds(bucket.seconds_until_full)
        return headers

    def take_tokens(self, tokens: int) -> None:
        """Use tokens of this minute, or give them back if negative.

        Raises:
            Problem: 429, if there are not so many.
        """
        bucket = self._buckets.get("tokens")
        if bucket is None:
            return
        if tokens > bucket.limit:
            problem = self._refusal(
                f"the request may come to {tokens} tokens, and this key has {bucket.limit} a "
                "minute: lower max_tokens, or send fewer prompts at a time",
                float(LONGEST_WAIT),
            )
            # Clients of OpenAI's would otherwise send it again and again.
            problem.headers["x-should-retry"] = "false"
            raise problem
        wait = bucket.seconds_until(tokens)
        if tokens > 0 and wait > 0:
            raise self._refusal(
                f"the request may come to {tokens} tokens, and of this key's {bucket.limit} a "
                f"minute {bucket.remaining} are left",
                wait,
            )
        bucket.take(tokens)

    def _refusal(self, why: str, wait: float) -> Problem:
        seconds = max(1, math.ceil(wait))
        return Problem(
            429,
            f"Rate limit reached: {why}. Try again in {seconds} s.",
            type=RATE_LIMITED,
            code=RATE_LIMITED,
            headers={"Retry-After": str(seconds), **self.headers()},
        )


class Expense:
    """What one request has taken of its key's tokens."""

    def __init__(self, budget: Budget) -> None:
        """Nothing yet."""
        self._budget = budget
        self._taken = self._used = 0

    def expect(self, tokens: int) -> None:
        """Take what the request may come to.

        Raises:
            Problem: 429, if there are not so many.
        """
        self._budget.take_tokens(tokens)
        self._taken += tokens

    def use(self, tokens: int) -> None:
        """So many of them are used up."""
        self._used += tokens

    def settle(self) -> None:
        """Give back what was not used."""
        self._budget.take_tokens(-max(0, self._taken - self._used))
        self._taken = self._used = 0


def spell_seconds(seconds: float) -> str:
    """A time as in OpenAI's headers, rounded up.

    >>> spell_seconds(0.0), spell_seconds(0.2), spell_seconds(59.5), spell_seconds(360.0)
    ('0s', '1s', '1m0s', '6m0s')
    """
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
