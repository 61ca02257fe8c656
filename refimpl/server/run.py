"""Runs an app under Hypercorn: from the first connection, while the model loads, to the last.

    listening     from the start; /ready is 503 until the model is there
    draining      after Ctrl-C or SIGTERM: nothing new is let in, what runs goes on
    closing       when nothing runs any more, or time is up: then what runs ends with an error
    ended         all connections are closed, by force if their clients do not read

A second signal goes to closing at once.
"""

import asyncio
import signal
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from hypercorn.asyncio import serve
from quart import Quart

from refimpl.server import connections
from refimpl.server.access_log import AccessLog
from refimpl.server.lifecycle import Service
from refimpl.server.listener import GRACE_SECONDS, Listener

_STOPPING = (signal.SIGINT, signal.SIGTERM)


class Server:
    """One run of an app; `stop` ends it."""

    def __init__(self, app: Quart, service: Service, listener: Listener) -> None:
        """Not running yet.

        Args:
            app: what answers.
            service: what it was made around.
            listener: where.
        """
        self._app, self._service, self._listener = app, service, listener
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop, self._abort = asyncio.Event(), asyncio.Event()
        self._loaded, self._is_over = asyncio.Event(), asyncio.Event()
        app.asgi_app = AccessLog(  # pyright: ignore[reportAttributeAccessIssue]
            app.asgi_app,  # pyright: ignore[reportArgumentType]
            ended=lambda trail: service.metrics.replied(trail.outcome),
        )

    async def run(self, *, on_ready: Callable[[], None] = lambda: None) -> None:
        """Serve until `stop`, or until the service fails to load.

        Args:
            on_ready: called once the model is there.
        """
        self._loop = asyncio.get_running_loop()
        connections.install()
        self._service.begin(ended=lambda: self._call(self._loaded.set))
        server = asyncio.create_task(
            serve(
                self._app, self._listener.config, shutdown_trigger=self._is_over.wait, mode="asgi"
            )
        )
        try:
            await _first(self._loaded.wait(), self._stop.wait(), _ended(server))
            if self._service.state == "ready":
                on_ready()
                await _first(self._stop.wait(), _ended(server))
            await self._drain(server)
        finally:
            await self._close(server)

    def stop(self) -> None:
        """Drain, or if it drains already, stop at once. From any thread."""
        self._call(self._abort.set if self._stop.is_set() else self._stop.set)

    def install_signal_handlers(self) -> None:
        """Stop at Ctrl-C and at SIGTERM; inside of the event loop of the main thread."""
        loop = asyncio.get_running_loop()
        for number in _STOPPING:
            loop.add_signal_handler(number, self.stop)

    async def _drain(self, server: asyncio.Task[None]) -> None:
        self._service.drain()
        await _first(
            self._service.queue.wait_until_empty(),
            asyncio.sleep(self._service.drain_seconds_left),
            self._abort.wait(),
            _ended(server),
        )

    async def _close(self, server: asyncio.Task[None]) -> None:
        # Whatever runs still ends with an error, which its reader has some time to be told.
        is_closed = asyncio.Event()

        def close() -> None:
            self._service.close()
            self._call(is_closed.set)

        # No thread of a pool: those are waited for at the end, however long it takes.
        threading.Thread(target=close, name="refimpl-close", daemon=True).start()
        await _first(is_closed.wait(), self._abort.wait())
        self._is_over.set()
        await _first(_ended(server), self._abort.wait(), asyncio.sleep(GRACE_SECONDS))
        self._listener.disconnect()
        await _first(_ended(server), asyncio.sleep(GRACE_SECONDS))
        server.cancel()
        [fault] = await asyncio.gather(server, return_exceptions=True)
        self._listener.socket.close()
        if isinstance(fault, Exception):
            raise fault

    def _call(self, do: Callable[[], None]) -> None:
        if self._loop is None:
            do()
            return
        try:
            self._loop.call_soon_threadsafe(do)
        except RuntimeError:
            # It is over, and nobody waits any more.
            if not self._loop.is_closed():
                raise


def run(app: Quart, service: Service, listener: Listener, *, on_ready: Callable[[], None]) -> None:
    """Serve until a signal, on the main thread; the service is closed afterwards.

    Raises:
        BaseException: whatever kept the service from loading.
    """

    async def main() -> None:
        server = Server(app, service, listener)
        server.install_signal_handlers()
        await server.run(on_ready=on_ready)

    handlers = {number: signal.getsignal(number) for number in _STOPPING}
    try:
        asyncio.run(main())
    finally:
        # The event loop leaves Python's own, whichever there were before.
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if service.error is not None:
        raise service.error


async def _first(*waits: Coroutine[Any, Any, Any]) -> None:
    """Until one of them ends; the others are cancelled."""
    tasks = [asyncio.create_task(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _ended(task: Awaitable[Any]) -> None:
    """Until a task has ended, however; it goes on if this is cancelled."""
    await asyncio.wait([asyncio.ensure_future(task)])
