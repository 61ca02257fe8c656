"""How much the server takes on: a bounded queue, and when somebody whom it refuses may come again.

A place is one choice that waits or runs. Places are taken before anything is computed for a
request, tokenising included, so that what is refused costs next to nothing.

All of this belongs to one event loop; nothing here is safe to call from another thread.
"""

import asyncio
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from refimpl.server.errors import SERVER, Problem, refusal

Clock = Callable[[], float]

# A client of OpenAI's waits as long as it is told to up to here, and gives up above.
LONGEST_WAIT = 120
# Of throughput: what was measured so many busy seconds ago counts half.
HALF_LIFE = 30.0


class Throughput:
    """Tokens a second while there is work, the last minute of it counting most."""

    def __init__(self, *, clock: Clock = time.monotonic) -> None:
        """Nothing is measured yet."""
        self._clock, self._since = clock, clock()
        self._is_busy = False
        self._tokens = self._seconds = 0.0

    def add(self, tokens: int) -> None:
        """So many tokens were made since the last call."""
        self._advance()
        self._tokens += tokens

    def set_busy(self, is_busy: bool) -> None:
        """From now on there is work, or there is none."""
        self._advance()
        self._is_busy = is_busy

    @property
    def per_second(self) -> float | None:
        """None if no token has been made."""
        self._advance()
        return self._tokens / self._seconds if self._tokens and self._seconds else None

    def _advance(self) -> None:
        now = self._clock()
        elapsed, self._since = now - self._since, now
        if self._is_busy:
            decay = 0.5 ** (elapsed / HALF_LIFE)
            self._tokens *= decay
            # The integral of the weight over the time that has passed.
            self._seconds = self._seconds * decay + HALF_LIFE / math.log(2) * (1 - decay)


class Queue:
    """The places of all requests that wait or run."""

    def __init__(
        self,
        most: int,
        *,
        check: Callable[[], None] = lambda: None,
        clock: Clock = time.monotonic,
    ) -> None:
        """An empty queue.

        Args:
            most: places that there are.
            check: called before a place is taken; raises what keeps the server from taking any.
            clock: seconds.
        """
        self.most, self._check = most, check
        self.throughput = Throughput(clock=clock)
        self._places = set[Place]()
        self._num_held = 0
        self._is_empty = asyncio.Event()
        self._is_empty.set()

    @property
    def num_held(self) -> int:
        """Places taken."""
        return self._num_held

    @property
    def num_requests(self) -> int:
        """Requests that have places."""
        return len(self._places)

    @property
    def outstanding(self) -> int:
        """Tokens that may yet be made for all who have places."""
        return sum(place.outstanding for place in self._places)

    @contextmanager
    def reserve(self, choices: int = 1) -> "Iterator[Place]":
        """Hold places for as long as the block runs.

        Args:
            choices: how many; `Place.resize` changes it once the number is known.

        Raises:
            Problem: 503 if there is no room, or if the server takes nothing; 400 if there would
                not be room ever.
        """
        self._check()
        place = Place(self)
        self._places.add(place)
        self._is_empty.clear()
        try:
            place.resize(choices)
            yield place
        finally:
            self._places.discard(place)
            self._take(-place.choices)
            if not self._places:
                self._is_empty.set()

    async def wait_until_empty(self) -> None:
        """Until no request has a place."""
        await self._is_empty.wait()

    def seconds_until(self, choices: int) -> int:
        """How long until so many places should be free; from 1 to `LONGEST_WAIT`.

        The tokens that are outstanding are taken to end evenly: of the backlog, so large a part
        has to be worked off as the missing places are of those held, at the throughput measured.
        """
        missing = self.num_held + choices - self.most
        rate = self.throughput.per_second
        if missing <= 0 or rate is None:
            return 1
        work = self.outstanding * min(1.0, missing / self.num_held)
        return min(LONGEST_WAIT, max(1, math.ceil(work / rate)))

    def _take(self, choices: int) -> None:
        """Count places taken, or given back if negative."""
        if choices > 0 and self._num_held + choices > self.most:
            wait = self.seconds_until(choices)
            raise Problem(
                503,
                f"The server is full: {self._num_held} of {self.most} places are taken, and this "
                f"request needs {choices} more. Try again in {wait} s.",
                type=SERVER,
                code="overloaded",
                headers={"Retry-After": str(wait)},
            )
        self._num_held += choices
        self.throughput.set_busy(self._num_held > 0)


class Place:
    """What one request holds of the queue.

    Attributes:
        choices: places that it has.
        outstanding: tokens that may yet be made for it.
    """

    def __init__(self, queue: Queue) -> None:
        """Nothing held yet."""
        self._queue = queue
        self.choices = self.outstanding = 0

    def resize(self, choices: int) -> None:
        """Hold so many places from now on.

        Raises:
            Problem: as `Queue.reserve`; what was held before is held still.
        """
        most = self._queue.most
        if choices > most:
            raise refusal(
                f"The request makes {choices} choices at a time, and this server takes at most "
                f"{most}: send fewer prompts, or lower n or best_of.",
                "prompt",
            )
        self._queue._take(choices - self.choices)
        self.choices = choices

    def expect(self, tokens: int) -> None:
        """So many tokens may be made, all choices together."""
        self.outstanding = tokens

    def made(self, tokens: int) -> None:
        """So many tokens have come."""
        self._queue.throughput.add(tokens)
        self.outstanding = max(0, self.outstanding - tokens)
