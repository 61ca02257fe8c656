"""Where a server listens: the address, the socket, and what Hypercorn is told of both.

An address that others can reach is taken only with keys, or if it is meant to be open.
"""

import socket
import ssl
from typing import Any
from weakref import WeakSet

from hypercorn.config import Config, Sockets

from refimpl.errors import InvalidRequestError
from refimpl.server.keys import Keyring
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
GRACE_SECONDS = 3.0


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
    config.graceful_timeout = config.shutdown_timeout = GRACE_SECONDS
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
