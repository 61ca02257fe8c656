"""Runs an app under Hypercorn: from the first connection, while the model loads, to the last.

    listening     from the start; /ready is 503 until the model is there
    draining      after Ctrl-C or SIGTERM: nothing new is let in, what runs goes on
    closing       when nothing runs any more, or time is up: then what runs ends with an error
    ended         all connections are closed, by force if their clients do not read

A second signal goes to closing at once.
"""

import asyncio
import signal
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any
from weakref import WeakSet

from hypercorn.asyncio import serve
from hypercorn.config import Config, Sockets
from quart import Quart

from refimpl.errors import InvalidRequestError
from refimpl.server import connections
from refimpl.server.access_log import AccessLog
from refimpl.server.keys import Keyring
from refimpl.server.lifecycle import Service
from refimpl.server.settings import ServerSettings

# Above the minute that load balancers keep connections for: who closes first must not be us, or a
# request under way is lost.
_KEEP_ALIVE_SECONDS = 75
_REQUESTS_PER_CONNECTION = 100_000
# Streams of one HTTP/2 connection; how much is taken on is for the queue to say.
_STREAMS_PER_CONNECTION = 1000
_BACKLOG = 512
_LONGEST_HEADERS = 16 << 10
# What connections have to send their last bytes once all else has ended.
_GRACE_SECONDS = 3.0


class Listener:
    """A socket that clients can reach, and all connections that came of it."""

    def __init__(self, settings: ServerSettings, keyring: Keyring) -> None:
        """Take the address.

        Raises:
            InvalidRequestError: the address cannot be had, or must not without keys; the
                certificate or its key cannot be used.
        """
        self.config = _config(settings, self)
        self.is_secure = self.config.ssl_enabled
        try:
            found = socket.getaddrinfo(
                settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
        except OSError as error:
            raise InvalidRequestError(
                f"--host {settings.host}: no such address: {error.strerror}", parameter="host"
            ) from error
        family, _, _, _, address = found[0]
        _refuse_exposure(settings, keyring, str(address[0]))
        self.socket = _CountingSocket(family)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self.socket.bind(address)
        except OSError as error:
            self.socket.close()
            raise InvalidRequestError(
                f"cannot listen on {settings.host} port {settings.port}: {error.strerror}; choose "
                "another --port, or 0 for any free one",
                parameter="port",
            ) from error
        self.socket.setblocking(False)
        # From now on clients are not refused, though they wait until the server runs.
        self.socket.listen(_BACKLOG)

    @property
    def url(self) -> str:
        """Where a client on this machine reaches it."""
        address, port = self.socket.getsockname()[:2]
        # The addresses that stand for all others are none to send to.
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, str(address))
        scheme = "https" if self.is_secure else "http"
        return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"

    def disconnect(self) -> None:
        """End all connections, whatever they have yet to send."""
        for connection in list(self.socket.connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                # It is closed already.
                continue


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
            ended=lambda trail: service.metrics.replied(trail.status),
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
        for number in (signal.SIGINT, signal.SIGTERM):
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
        await _first(_ended(server), self._abort.wait(), asyncio.sleep(_GRACE_SECONDS))
        self._listener.disconnect()
        await _first(_ended(server), asyncio.sleep(_GRACE_SECONDS))
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

    asyncio.run(main())
    if service.error is not None:
        raise service.error


class _CountingSocket(socket.socket):
    """Remembers what it accepts, because nobody else can say which connections there are."""

    def __init__(self, family: int) -> None:
        super().__init__(family, socket.SOCK_STREAM)
        self.connections = WeakSet[socket.socket]()

    def accept(self) -> tuple[socket.socket, Any]:
        connection, address = super().accept()
        self.connections.add(connection)
        return connection, address


class _Config(Config):
    """Hypercorn's, with a socket that is there already."""

    listener: Listener

    def create_sockets(self) -> Sockets:
        sockets: list[socket.socket] = [self.listener.socket]
        return Sockets(sockets, [], []) if self.ssl_enabled else Sockets([], sockets, [])


def _config(settings: ServerSettings, listener: Listener) -> _Config:
    config = _Config()
    config.listener = listener
    config.accesslog, config.loglevel = None, "WARNING"
    config.include_server_header = False
    config.backlog = _BACKLOG
    config.keep_alive_timeout = _KEEP_ALIVE_SECONDS
    config.keep_alive_max_requests = _REQUESTS_PER_CONNECTION
    config.h11_max_incomplete_size = _LONGEST_HEADERS
    config.h2_max_concurrent_streams = _STREAMS_PER_CONNECTION
    config.graceful_timeout = config.shutdown_timeout = _GRACE_SECONDS
    certificate, key = settings.tls_certificate, settings.tls_key
    if (certificate is None) != (key is None):
        raise InvalidRequestError(
            "--tls-certificate and --tls-key go together: give both or neither",
            parameter="tls_certificate" if certificate is None else "tls_key",
        )
    if certificate is not None and key is not None:
        config.certfile, config.keyfile = str(certificate), str(key)
        try:
            config.create_ssl_context()
        except (OSError, ssl.SSLError) as error:
            raise InvalidRequestError(
                f"cannot use the certificate {certificate} with the key {key}: {error}",
                parameter="tls_certificate",
            ) from error
    return config


def _refuse_exposure(settings: ServerSettings, keyring: Keyring, address: str) -> None:
    is_loopback = address == "::1" or address.startswith("127.")
    if not (keyring or is_loopback or settings.allow_unauthenticated):
        raise InvalidRequestError(
            f"without API keys the server listens on loopback only, and --host {settings.host} is "
            "an address that others can reach: give --api-keys, or --allow-unauthenticated to let "
            "everybody in",
            parameter="host",
        )


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
