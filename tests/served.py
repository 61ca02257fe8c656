"""The real server over a tiny engine: on a loopback socket, in a thread of the test's process."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from refimpl.engine.engine import Engine
from refimpl.server.app import create_app
from refimpl.server.lifecycle import Service
from refimpl.server.listener import Listener
from refimpl.server.loading import Loaded
from refimpl.server.run import Server
from refimpl.server.settings import ServerSettings
from tests.servers import FINGERPRINT, NAMES

# Enough for a machine that has other things to do; nothing waits for so long if all is well.
PATIENCE = 60.0


@dataclass(frozen=True)
class Served:
    """A server that is ready.

    Attributes:
        service: what it was made around.
        url: where it listens.
        port: of the url.
        loop: that it runs in, on another thread.
        listener: that its connections come from.
    """

    service: Service
    url: str
    port: int
    loop: asyncio.AbstractEventLoop
    listener: Listener

    @property
    def num_tasks(self) -> int:
        """Tasks of the server's loop that have not ended."""

        async def count() -> int:
            # The one that counts is none of the server's.
            return len(asyncio.all_tasks()) - 1

        return asyncio.run_coroutine_threadsafe(count(), self.loop).result(PATIENCE)

    @property
    def has_connections(self) -> bool:
        """Whether a connection is open."""
        return any(each.fileno() != -1 for each in list(self.listener.socket.connections))

    @property
    def is_idle(self) -> bool:
        """Whether nobody holds a slot, a place in the queue or one in the engine."""
        statistics, queue = self.service.statistics(), self.service.queue
        assert statistics is not None, "the engine is gone"
        held = (statistics.slots_in_use, statistics.running, statistics.waiting, queue.num_held)
        return held == (0, 0, 0, 0) and queue.num_requests == 0


@contextmanager
def served(engine: Engine, **settings: Any) -> Iterator[Served]:
    """A server over an engine that runs; it has ended, without a fault, when the block is left."""
    loaded = Loaded(engine=engine, fingerprint=FINGERPRINT, block=128, num_compilations=lambda: 0)
    chosen = ServerSettings(port=0, drain_seconds=0, **settings)
    service = Service(chosen, names=NAMES, load=lambda _: loaded)
    listener = Listener(chosen, service.keyring)
    server, is_ready = Server(create_app(service), service, listener), threading.Event()
    loops, faults = list[asyncio.AbstractEventLoop](), list[BaseException]()

    async def main() -> None:
        loops.append(asyncio.get_running_loop())
        await server.run(on_ready=is_ready.set)

    def run() -> None:
        try:
            asyncio.run(main())
        except BaseException as fault:
            faults.append(fault)

    thread = threading.Thread(target=run, name="server-under-test")
    thread.start()
    try:
        assert is_ready.wait(PATIENCE), faults
        port = listener.socket.getsockname()[1]
        yield Served(service, listener.url, port, loops[0], listener)
    finally:
        server.stop()
        thread.join(PATIENCE)
        assert not thread.is_alive()
        assert faults == []


def eventually(is_so: Callable[[], bool], *, within: float = PATIENCE) -> None:
    """Wait until something is so; fails if it never is."""
    until = time.monotonic() + within
    while not is_so():
        assert time.monotonic() < until, "it did not come about"
        time.sleep(0.005)
