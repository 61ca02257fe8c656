"""A server's beginning and end over real sockets, around a small app in a thread.

How it begins and ends does not depend on what it serves; `test_server_command` starts the real one.
"""

import asyncio
import http.client
import json
import re
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
from quart import Quart, Response

from refimpl.errors import InvalidRequestError
from refimpl.server import errors
from refimpl.server.keys import Keyring, read_keys
from refimpl.server.lifecycle import Service
from refimpl.server.listener import Listener
from refimpl.server.loading import Load, Loaded, Progress
from refimpl.server.run import Server
from refimpl.server.settings import ServerSettings

# Enough for a machine that has other things to do; nothing here waits for so long if all is well.
PATIENCE = 20.0


class FakeEngine:
    """Ends what runs when it is closed, as an engine does."""

    def __init__(self) -> None:
        self.is_healthy = True
        self.worker = None

    def close(self) -> None:
        self.is_healthy = False


def load_at_once(_: Progress) -> Loaded:
    return Loaded(
        engine=FakeEngine(),  # pyright: ignore[reportArgumentType]
        fingerprint="fp_1",
        block=128,
        num_compilations=lambda: 0,
    )


def small_app(service: Service) -> Quart:
    app = Quart(__name__)
    errors.register(app)

    @app.get("/ready")
    async def ready() -> Response:  # pyright: ignore[reportUnusedFunction]
        return Response(service.state, 200 if service.state == "ready" else 503)

    @app.post("/stream")
    async def stream() -> Response:  # pyright: ignore[reportUnusedFunction]
        held = ExitStack()
        held.enter_context(service.admit(None))
        engine = service.engine

        async def frames() -> AsyncGenerator[bytes, None]:
            try:
                while engine.is_healthy:
                    yield b"data: tick\n\n"
                    await asyncio.sleep(0.01)
                yield b"data: error\n\n"
            finally:
                held.close()

        response = Response(frames(), content_type="text/event-stream")
        response.timeout = None
        return response

    sent = list[int]()

    @app.get("/sent")
    async def say_sent() -> str:  # pyright: ignore[reportUnusedFunction]
        return str(sum(sent))

    @app.get("/flood")
    async def flood() -> Response:  # pyright: ignore[reportUnusedFunction]
        async def endless() -> AsyncGenerator[bytes, None]:
            # Far more than every buffer on the way takes.
            for _ in range(1 << 10):
                yield bytes(1 << 16)
                sent.append(1 << 16)

        response = Response(endless())
        response.timeout = None
        return response

    return app


@dataclass
class Running:
    """A server in a thread of this process."""

    service: Service
    server: Server
    listener: Listener
    thread: threading.Thread
    faults: list[BaseException] = field(default_factory=list)

    @property
    def port(self) -> int:
        return self.listener.socket.getsockname()[1]

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)

    def get(self, path: str, method: str = "GET") -> tuple[int, bytes]:
        with closing(self.connect()) as connection:
            connection.request(method, path)
            response = connection.getresponse()
            return response.status, response.read()

    def ended_within(self, seconds: float) -> bool:
        self.thread.join(seconds)
        return not self.thread.is_alive()


@contextmanager
def running(load: Load = load_at_once, **settings: Any) -> Iterator[Running]:
    service = Service(ServerSettings(port=0, **settings), names=("tiny",), load=load)
    listener = Listener(service.settings, service.keyring)
    server, faults = Server(small_app(service), service, listener), list[BaseException]()

    def run() -> None:
        try:
            asyncio.run(server.run())
        except BaseException as fault:
            faults.append(fault)
            raise

    thread = threading.Thread(target=run, name="server-under-test")
    thread.start()
    try:
        yield Running(service, server, listener, thread, faults)
    finally:
        # Whatever went wrong, nothing of it stays.
        for _ in range(2):
            if thread.is_alive():
                server.stop()
                thread.join(1)
        thread.join(PATIENCE)
        assert not thread.is_alive()
        assert faults == []


def eventually(is_so: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE
    while not is_so():
        assert time.monotonic() < until, "it did not come about"
        time.sleep(0.01)


def wait_ready(server: Running) -> None:
    eventually(lambda: server.get("/ready")[0] == 200)


def test_it_answers_while_it_loads():
    may_load = threading.Event()

    def load(progress: Progress) -> Loaded:
        assert may_load.wait(PATIENCE)
        return load_at_once(progress)

    with running(load) as server:
        assert server.get("/ready") == (503, b"loading")
        status, body = server.get("/stream", "POST")
        assert (status, json.loads(body)["error"]["code"]) == (503, "model_loading")
        may_load.set()
        wait_ready(server)


def test_draining_lets_what_runs_end_and_nothing_new_begin():
    with running(drain_seconds=PATIENCE) as server, closing(server.connect()) as connection:
        wait_ready(server)
        connection.request("POST", "/stream")
        response = connection.getresponse()
        assert response.read(12) == b"data: tick\n\n"
        server.server.stop()
        eventually(lambda: server.service.state == "draining")
        assert server.get("/ready") == (503, b"draining")
        status, body = server.get("/stream", "POST")
        assert (status, json.loads(body)["error"]["code"]) == (503, "shutting_down")
        assert response.read(12) == b"data: tick\n\n", "what runs goes on"
        connection.close()
        # Now that nothing runs any more, it does not wait for the time to be up.
        assert server.ended_within(10)


def test_when_time_is_up_what_runs_is_told_and_ended():
    with running(drain_seconds=0.3) as server, closing(server.connect()) as connection:
        wait_ready(server)
        connection.request("POST", "/stream")
        response = connection.getresponse()
        began = time.monotonic()
        server.server.stop()
        rest = response.read()
        assert rest.endswith(b"data: error\n\n")
        assert rest.startswith(b"data: tick\n\n")
        assert server.ended_within(10)
        assert 0.3 <= time.monotonic() - began < 10


def test_stopping_twice_does_not_wait():
    with running(drain_seconds=600) as server, closing(server.connect()) as connection:
        wait_ready(server)
        connection.request("POST", "/stream")
        connection.getresponse()
        server.server.stop()
        eventually(lambda: server.service.state == "draining")
        server.server.stop()
        assert server.ended_within(10)


def test_a_client_that_does_not_read_keeps_nothing_from_ending():
    with running(drain_seconds=0) as server, closing(server.connect()) as connection:
        wait_ready(server)
        connection.request("GET", "/flood")
        time.sleep(0.3)
        # Only what buffers on the way hold; the rest is not even made.
        assert 0 < int(server.get("/sent")[1]) < 32 << 20
        server.server.stop()
        assert server.ended_within(15)


def test_it_ends_by_itself_if_it_cannot_load():
    def load(_: Progress) -> Loaded:
        raise InvalidRequestError("no such model")

    with running(load) as server:
        assert server.ended_within(10)
        assert str(server.service.error) == "no such model"


def test_a_connection_that_is_kept_alive_does_not_keep_the_server():
    with running() as server, closing(server.connect()) as connection:
        wait_ready(server)
        connection.request("GET", "/ready")
        connection.getresponse().read()
        server.server.stop()
        assert server.ended_within(10)


def test_a_reply_that_ends_its_connection_is_not_taken_for_a_client_that_left():
    with running() as server:
        wait_ready(server)
        with closing(server.connect()) as connection:
            connection.request("GET", "/nowhere", headers={"Connection": "close"})
            assert connection.getresponse().status == 404
        figures = server.service.metrics
        eventually(lambda: figures.value("refimpl:errors_total", status="404") == 1)
        assert figures.value("refimpl:errors_total", status="499") is None


def test_a_websocket_is_refused_with_an_error_object():
    handshake = {
        "Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    }  # fmt: skip
    with running() as server, closing(server.connect()) as connection:
        connection.request("GET", "/ready", headers=handshake)
        response = connection.getresponse()
        error = json.loads(response.read())["error"]
        assert (response.status, error["type"]) == (400, "invalid_request_error")
        assert error["message"].startswith("There are no WebSockets here")


def test_a_connection_ends_with_its_client_and_not_when_it_would_have_been_idle_for_long():
    with running() as server:
        wait_ready(server)
        with closing(server.connect()) as connection:
            connection.request("GET", "/ready")
            connection.getresponse().read()
            eventually(lambda: len(open_connections(server)) == 1)
        eventually(lambda: not open_connections(server))


def open_connections(server: Running) -> list[socket.socket]:
    return [each for each in list(server.listener.socket.connections) if each.fileno() != -1]


# Where it listens.


def listen(*, keyring: Keyring | None = None, **settings: Any) -> str:
    listener = Listener(ServerSettings(port=0, **settings), keyring or Keyring())
    with closing(listener.socket):
        return listener.url


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.3.2.1", "::1"])
def test_loopback_needs_no_keys(host):
    assert re.fullmatch(r"http://(127\.[.\d]+|\[::1\]):\d+", listen(host=host))


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_an_address_that_others_can_reach_needs_keys_or_to_be_meant(host):
    with pytest.raises(InvalidRequestError, match=r"loopback only.*--allow-unauthenticated") as no:
        listen(host=host)
    assert no.value.parameter == "host"
    assert listen(host=host, allow_unauthenticated=True).startswith("http://")
    assert listen(host=host, keyring=read_keys(plain="sk-1")).startswith("http://")


def test_a_port_that_is_taken_and_a_host_that_is_none():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = ServerSettings(port=taken.getsockname()[1])
        with pytest.raises(
            InvalidRequestError, match=r"cannot listen on 127\.0\.0\.1 port \d+: Ad"
        ):
            Listener(settings, Keyring())
    with pytest.raises(InvalidRequestError, match=r"--host no\.such\.invalid: no such address"):
        listen(host="no.such.invalid")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for this machine, signed by itself, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    paths = folder / "certificate.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext",
         "subjectAltName=IP:127.0.0.1,DNS:localhost", "-out", paths[0], "-keyout", paths[1]],
        check=True, capture_output=True, timeout=30,
    )  # fmt: skip
    return paths


def test_tls_with_http_1_and_2(certificate):
    with running(tls_certificate=certificate[0], tls_key=certificate[1]) as server:
        trusting = ssl.create_default_context(cafile=str(certificate[0]))
        for is_second, version in ((False, "HTTP/1.1"), (True, "HTTP/2")):
            with httpx2.Client(
                http1=not is_second, http2=is_second, verify=trusting, timeout=PATIENCE
            ) as client:
                eventually(lambda c=client: c.get(f"{server.listener.url}/ready").is_success)
                reply = client.get(f"{server.listener.url}/ready")
                assert (reply.http_version, reply.text) == (version, "ready")
        assert server.listener.url.startswith("https://")


def test_a_certificate_needs_its_key_and_both_must_be_some(certificate, tmp_path):
    with pytest.raises(InvalidRequestError, match="go together") as caught:
        listen(tls_certificate=certificate[0])
    assert caught.value.parameter == "tls_key"
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("nothing")
    for paths in ((nonsense, nonsense), (tmp_path / "gone.pem", certificate[1])):
        with pytest.raises(InvalidRequestError, match="cannot use the certificate"):
            listen(tls_certificate=paths[0], tls_key=paths[1])
