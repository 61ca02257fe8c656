"""Deliveries from the engine's thread to those who read them, and word of what was read.

A thread hands something to an event loop by `call_soon_threadsafe`, which writes to a socket and
wakes the loop. Many requests of one loop get tokens in the same step, and they share one wake-up.

Whoever reads slowly is not buried: `Backlog` counts what lies unread, and says when that is enough
and when there is room again.
"""

import asyncio
import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import ClassVar, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

from refimpl.engine.events import Event
from refimpl.errors import EngineError

Delivery = list[Event] | EngineError


class Backlog:
    """Deliveries of one request that were sent and not read; safe to use from two threads."""

    def __init__(self, limit: int, *, drained: Callable[[], None]) -> None:
        """Begin with nothing sent.

        Args:
            limit: so many unread ones are enough.
            drained: called on the reader's thread when it was enough, and half of it is left.
        """
        self._limit, self._drained = limit, drained
        self._lock = threading.Lock()
        self._unread = 0
        self._is_full = False

    def sent(self) -> bool:
        """Count one more; True if it is enough from now on."""
        with self._lock:
            self._unread += 1
            becomes_full = not self._is_full and self._unread >= self._limit
            self._is_full |= becomes_full
        return becomes_full

    def read(self) -> None:
        """Count one less."""
        with self._lock:
            self._unread -= 1
            becomes_free = self._is_full and self._unread <= self._limit // 2
            self._is_full &= not becomes_free
        if becomes_free:
            self._drained()


@runtime_checkable
class Inbox(Protocol):
    """What one request has been sent."""

    def put(self, delivery: Delivery) -> bool:
        """Send something; from any thread. False if nobody is left to read it."""
        ...


class ThreadInbox:
    """What one request has been sent, for a thread that waits."""

    def __init__(self) -> None:
        self._queue = queue.SimpleQueue[Delivery]()

    def put(self, delivery: Delivery) -> bool:
        """See `Inbox`."""
        self._queue.put(delivery)
        return True

    def get(self) -> Delivery:
        """The next thing sent."""
        return self._queue.get()


class LoopInbox:
    """What one request has been sent, for a task of an event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop, self._queue = loop, asyncio.Queue[Delivery]()
        self._post = _PostOffice.of(loop)

    def put(self, delivery: Delivery) -> bool:
        """See `Inbox`."""
        return self._post.put(self._loop, self._queue, delivery)

    async def get(self) -> Delivery:
        """The next thing sent."""
        return await self._queue.get()


class _PostOffice:
    """Everything under way to one event loop. It does not hold the loop, so both go together."""

    _offices: ClassVar = WeakKeyDictionary[asyncio.AbstractEventLoop, "_PostOffice"]()

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._underway = deque[tuple[asyncio.Queue[Delivery], Delivery]]()

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> "_PostOffice":
        """The one of this loop; called on the loop's own thread."""
        return cls._offices.setdefault(loop, cls())

    def put(
        self, loop: asyncio.AbstractEventLoop, to: asyncio.Queue[Delivery], delivery: Delivery
    ) -> bool:
        """Wake the loop, unless it has yet to wake up for what came before."""
        with self._lock:
            is_woken = bool(self._underway)
            self._underway.append((to, delivery))
            try:
                # A loop that was closed before it woke up never will.
                if not is_woken or loop.is_closed():
                    loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:
                # The loop was closed, at any time until now, and nobody is left to read this.
                if not loop.is_closed():
                    raise
                self._underway.clear()
                return False
        return True

    def _deliver(self) -> None:
        with self._lock:
            arrived, self._underway = self._underway, deque()
        for to, delivery in arrived:
            to.put_nowait(delivery)
