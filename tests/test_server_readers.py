"""Readers that are slow, or leave, over real sockets: what holds them up, and what they free.

What a slow reader does not take stays in buffers of a fixed size, then its request pauses.
"""

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes

from refimpl.engine.engine import Engine
from refimpl.engine.loop import EngineLoop
from tests.engines import tiny_engine
from tests.served import PATIENCE, Served, eventually, served
from tests.servers import MODEL

TEXT = "the quick brown fox"
# Frames with log-probabilities and noise are some kilobytes each, so that a stream is much
# larger than the buffers on its way.
LARGE = {
    "prompt": TEXT, "max_tokens": 360, "ignore_eos": True, "n": 8, "seed": 1, "logprobs": 20,
    "stream": True, "stream_options": {"include_obfuscation": True},
}  # fmt: skip
SLOTS = 16


@pytest.fixture
def engine() -> Iterator[Engine]:
    """Sixteen slots, and four deliveries at most unread."""
    made = tiny_engine(slots=SLOTS, max_unread=4)
    made.options = replace(made.options, compile_at_start=False)
    with made:
        yield made


def loop_of(engine: Engine) -> EngineLoop:
    assert engine._running is not None
    return engine._running


@contextlib.contextmanager
def sent(server: Served, body: dict[str, Any]) -> Iterator[socket.socket]:
    """A connection over which a request has gone, and nothing has been read."""
    data = json.dumps({"model": MODEL, **body}).encode()
    with socket.socket() as connection:
        # Small, and set before connecting, so that the system does not take the answer for us.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(PATIENCE)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: here\r\nConnection: close\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(data), data)
        )
        yield connection


def test_a_client_that_never_reads_and_leaves_frees_its_slots(engine):
    with served(engine, max_logprobs=20) as server:
        tasks, scheduler = server.num_tasks, loop_of(engine).worker.scheduler
        with sent(server, LARGE):
            eventually(lambda: scheduler.num_paused == 1)
        eventually(lambda: server.is_idle)
        eventually(lambda: server.num_tasks == tasks)


@dataclass
class Gate:
    """Lets an engine's thread go on step by step."""

    permits: threading.Semaphore
    num_begun: int = 0

    @classmethod
    def before(cls, engine: Engine) -> "Gate":
        gate, worker = cls(threading.Semaphore(0)), loop_of(engine).worker
        step = worker.step

        def gated() -> bool:
            gate.num_begun += 1
            assert gate.permits.acquire(timeout=PATIENCE)
            return step()

        worker.step = gated
        return gate


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_client_that_leaves_frees_its_slots_within_one_step(engine, is_streamed):
    with served(engine, max_logprobs=20) as server:
        loop, tasks = loop_of(engine), server.num_tasks
        scheduler = loop.worker.scheduler
        body = {"prompt": TEXT, "max_tokens": 300, "ignore_eos": True, "n": 3,
                "stream": is_streamed}  # fmt: skip
        gate = Gate.before(engine)
        with sent(server, body) as connection:
            gate.permits.release(6)
            # The seventh step is under way.
            eventually(lambda: gate.num_begun == 7)
            assert scheduler.num_free == SLOTS - 3
            if is_streamed:
                assert b" 200 " in connection.recv(4096)
        # Its leaving has come to the engine, which still is at that step.
        eventually(lambda: loop._inbox.qsize() == 1)
        gate.permits.release()
        eventually(lambda: server.is_idle)
        assert gate.num_begun == 7
        eventually(lambda: server.num_tasks == tasks)
        assert server.service.metrics.value("refimpl:requests_cancelled_total") == 1


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_client_that_resets_its_stream_of_http_2_frees_its_slots(engine, is_streamed):
    body = {"model": MODEL, "prompt": TEXT, "max_tokens": 360, "ignore_eos": True, "n": 8,
            "stream": is_streamed}  # fmt: skip
    with served(engine) as server, socket.create_connection(("127.0.0.1", server.port)) as other:
        client = H2Connection(H2Configuration(client_side=True))
        client.initiate_connection()
        client.send_headers(1, [
            (":method", "POST"), (":path", "/v1/completions"), (":scheme", "http"),
            (":authority", "here"), ("content-type", "application/json"),
        ])  # fmt: skip
        client.send_data(1, json.dumps(body).encode(), end_stream=True)
        other.sendall(client.data_to_send())
        eventually(lambda: loop_of(engine).worker.scheduler.num_free < SLOTS)
        client.reset_stream(1, ErrorCodes.CANCEL)
        other.sendall(client.data_to_send())
        metrics = server.service.metrics
        eventually(lambda: metrics.value("refimpl:requests_cancelled_total") == 1)
        eventually(lambda: server.is_idle)
        assert server.has_connections, "other streams of it may go on"
