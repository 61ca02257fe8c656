"""Deliveries from the engine's thread into event loops: one wake-up for all that a step made.

A thread hands something to an event loop by `call_soon_threadsafe`, which writes to a socket and
wakes the loop. Many requests of one loop get tokens in the same step, and they share one wake-up.
"""

import asyncio
import threading
from collections import deque
from typing import ClassVar
from weakref import WeakKeyDictionary

from refimpl.engine.events import Event
from refimpl.errors import EngineError

Delivery = list[Event] | EngineError


class Inbox:
    """What one request of one event loop has been sent."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop, self._queue = loop, asyncio.Queue[Delivery]()
        self._post = _PostOffice.of(loop)

    def put(self, delivery: Delivery) -> None:
        """Send something; from any thread."""
        self._post.put(self._loop, self._queue, delivery)

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
    ) -> None:
        """Wake the loop, unless it has yet to wake up for what came before."""
        with self._lock:
            is_woken = bool(self._underway)
            self._underway.append((to, delivery))
            try:
                if not is_woken:
                    loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:
                # The loop was closed, at any time until now, and nobody is left to read this.
                if not loop.is_closed():
                    raise
                self._underway.clear()

    def _deliver(self) -> None:
        with self._lock:
            arrived, self._underway = self._underway, deque()
        for to, delivery in arrived:
            to.put_nowait(delivery)
