"""A connection, to the mending of one habit of Hypercorn's.

Hypercorn 0.18 waits until a connection has been idle for the whole `keep_alive_timeout` even if its
client closed it long ago: clients that come and go leave that many sockets open.
"""

import hypercorn.asyncio.run
from hypercorn.asyncio.tcp_server import TCPServer


class Connection(TCPServer):
    """Ends once its client has closed it."""

    _is_closed = False

    async def _read_data(self) -> None:
        await super()._read_data()
        self._is_closed = True
        await self.idle_task.stop()

    async def _idle_timeout(self) -> None:
        # What was under way when the client left may begin another wait at its end.
        if not self._is_closed:
            await super()._idle_timeout()


def install() -> None:
    """Have Hypercorn make connections of this kind, in the whole process."""
    hypercorn.asyncio.run.TCPServer = Connection  # pyright: ignore[reportPrivateImportUsage]
