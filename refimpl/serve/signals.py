"""What Ctrl-C and SIGTERM do while there is no server to heed them."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def ending_at_signals() -> Iterator[None]:
    """A signal ends the process at once, with status 0; on the main thread.

    So it does while a server is imported and put together, and from the server's end to that of
    the process. Python would die of SIGTERM, and might lose the exception that it makes of Ctrl-C:
    what is raised within a callback, as of the garbage collector, is dropped.
    """
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, _end_process) for number in numbers}
    try:
        yield
    except BaseException:
        for number, handler in before.items():
            signal.signal(number, handler)
        raise


def _end_process(*_: object) -> None:
    os._exit(0)
