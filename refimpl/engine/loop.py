"""The engine's thread: an inbox, deadlines, and one action of the worker after the other."""

import queue
import threading
import time
from bisect import bisect_left, insort
from dataclasses import dataclass

from refimpl.engine.events import Event
from refimpl.engine.inbox import Backlog, Inbox
from refimpl.engine.programs import Programs
from refimpl.engine.session import Session
from refimpl.engine.worker import Worker
from refimpl.errors import EngineError


@dataclass(frozen=True)
class _Submit:
    key: int
    session: Session
    inbox: Inbox
    backlog: Backlog


@dataclass(frozen=True)
class _Cancel:
    key: int


@dataclass(frozen=True)
class _Resume:
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

    def __init__(self, programs: Programs, *, prefix_bytes: int, max_unread: int) -> None:
        """Everything but the start of the thread.

        Args:
            programs: what to run.
            prefix_bytes: budget of the prefix cache.
            max_unread: deliveries that a request's reader may leave unread before it pauses.
        """
        self.error: EngineError | None = None
        self.worker = Worker(programs, prefix_bytes=prefix_bytes, emit=self._emit)
        self.thread = threading.Thread(target=self._run, name="refimpl-engine", daemon=True)
        self._max_unread = max_unread
        self._inbox = queue.SimpleQueue[_Submit | _Cancel | _Resume | _Stop]()
        self._readers = dict[int, _Submit]()
        # Of requests in flight, the first to come first.
        self._deadlines = list[tuple[float, int]]()
        self._lock = threading.Lock()

    def submit(self, key: int, session: Session, inbox: Inbox) -> Backlog:
        """Send a request; from any thread.

        Args:
            key: a number that no other request has had.
            session: of the request.
            inbox: gets what comes of it.

        Returns:
            Of the inbox; to be told whenever something was read.

        Raises:
            EngineError: the loop has ended.
        """
        backlog = Backlog(self._max_unread, drained=lambda: self._inbox.put(_Resume(key)))
        with self._lock:
            if self.error is not None:
                raise self.error
            self._inbox.put(_Submit(key, session, inbox, backlog))
        return backlog

    def cancel(self, key: int) -> None:
        """End a request, if it has not ended; from any thread."""
        self._inbox.put(_Cancel(key))

    def stop(self) -> None:
        """End the loop after the action under way, and wait for that."""
        self.worker.end_reading()
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
                message = self._inbox.get(
                    block=self.worker.scheduler.is_idle, timeout=self._until_deadline()
                )
            except queue.Empty:
                return True
            match message:
                case _Submit():
                    self._begin(message)
                case _Cancel():
                    self.worker.cancel(message.key)
                case _Resume():
                    self.worker.scheduler.resume(message.key)
                case _Stop():
                    return False

    def _begin(self, message: _Submit) -> None:
        self._readers[message.key] = message
        deadline = message.session.request.deadline
        if deadline is not None:
            insort(self._deadlines, (deadline, message.key))
        self.worker.submit(message.key, message.session)

    def _until_deadline(self) -> float | None:
        """Seconds until the first deadline, which may be of a request that is paused."""
        if not self._deadlines:
            return None
        return min(max(self._deadlines[0][0] - time.monotonic(), 0.0), threading.TIMEOUT_MAX)

    def _expire(self) -> None:
        while self._deadlines and self._deadlines[0][0] <= time.monotonic():
            self.worker.cancel(self._deadlines[0][1], "deadline")

    def _emit(self, key: int, events: list[Event]) -> None:
        if not events:
            return
        reader = self._readers[key]
        is_enough, is_read = reader.backlog.sent(), reader.inbox.put(events)
        if not self.worker.is_in_flight(key):
            self._forget(reader)
        elif not is_read:
            # Not at once: the worker is in the midst of a step.
            self.cancel(key)
        elif is_enough:
            self.worker.scheduler.pause(key)

    def _forget(self, reader: _Submit) -> None:
        del self._readers[reader.key]
        deadline = reader.session.request.deadline
        if deadline is not None:
            del self._deadlines[bisect_left(self._deadlines, (deadline, reader.key))]

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
                self._readers[message.key] = message
        for reader in self._readers.values():
            reader.inbox.put(error)
        self._readers.clear()
        self._deadlines.clear()
