"""The engine's thread: an inbox, deadlines, and one action of the worker after the other."""

import heapq
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from refimpl.engine.events import Event
from refimpl.engine.inbox import Delivery
from refimpl.engine.programs import Programs
from refimpl.engine.session import Session
from refimpl.engine.worker import Worker
from refimpl.errors import EngineError

Put = Callable[[Delivery], None]


@dataclass(frozen=True)
class _Submit:
    key: int
    session: Session
    put: Put


@dataclass(frozen=True)
class _Cancel:
    key: int


class _Stop:
    pass


class EngineLoop:
    """The engine's thread, from one start to one stop or failure.

    Attributes:
        error: why it ended; None while it runs.
        worker: what runs on it.
        thread: to be started once the worker has been.
    """

    def __init__(self, programs: Programs, *, prefix_bytes: int) -> None:
        """Everything but the start of the thread.

        Args:
            programs: what to run.
            prefix_bytes: budget of the prefix cache.
        """
        self.error: EngineError | None = None
        self.worker = Worker(programs, prefix_bytes=prefix_bytes, emit=self._emit)
        self.thread = threading.Thread(target=self._run, name="refimpl-engine", daemon=True)
        self._inbox = queue.SimpleQueue[_Submit | _Cancel | _Stop]()
        self._puts = dict[int, Put]()
        self._deadlines = list[tuple[float, int]]()
        self._lock = threading.Lock()

    def submit(self, key: int, session: Session, put: Put) -> None:
        """Send a request; from any thread.

        Args:
            key: a number that no other request has had.
            session: of the request.
            put: takes what comes of it, on the loop's thread.

        Raises:
            EngineError: the loop has ended.
        """
        with self._lock:
            if self.error is not None:
                raise self.error
            self._inbox.put(_Submit(key, session, put))

    def cancel(self, key: int) -> None:
        """End a request, if it has not ended; from any thread."""
        self._inbox.put(_Cancel(key))

    def stop(self) -> None:
        """End the loop after the action under way, and wait for that."""
        self._inbox.put(_Stop())
        self.thread.join()

    def _run(self) -> None:
        try:
            while self._take_messages():
                self._expire()
                self.worker.step()
            self._end(EngineError("the engine was closed before the request ended"))
        except Exception as error:
            # Whatever went wrong, the state may be lost: everybody learns of it.
            self._end(EngineError(f"the engine failed: {error!r}; start it again"), error)

    def _take_messages(self) -> bool:
        """Everything in the inbox; waits while there is nothing to do. False to stop."""
        while True:
            try:
                message = self._inbox.get(block=self.worker.scheduler.is_idle)
            except queue.Empty:
                return True
            match message:
                case _Submit():
                    self._begin(message)
                case _Cancel():
                    self.worker.cancel(message.key)
                case _Stop():
                    return False

    def _begin(self, message: _Submit) -> None:
        self._puts[message.key] = message.put
        deadline = message.session.request.deadline
        if deadline is not None:
            heapq.heappush(self._deadlines, (deadline, message.key))
        self.worker.submit(message.key, message.session)

    def _expire(self) -> None:
        heap = self._deadlines
        while heap and (heap[0][0] <= time.monotonic() or not self.worker.is_in_flight(heap[0][1])):
            _, key = heapq.heappop(heap)
            self.worker.cancel(key, "deadline")

    def _emit(self, key: int, events: list[Event]) -> None:
        if not events:
            return
        self._puts[key](events)
        if not self.worker.is_in_flight(key):
            del self._puts[key]

    def _end(self, error: EngineError, cause: Exception | None = None) -> None:
        error.__cause__ = cause
        with self._lock:
            self.error = error
        while True:
            try:
                message = self._inbox.get(block=False)
            except queue.Empty:
                break
            if isinstance(message, _Submit):
                self._puts[message.key] = message.put
        for put in self._puts.values():
            put(error)
        self._puts.clear()
