"""What Ctrl-C and SIGTERM do while nothing is there to heed them, and nothing to lose.

Python makes an exception of Ctrl-C, and that may be lost: what is raised within a callback, as JAX
has one of the garbage collector, is dropped.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def ending_at_signals() -> Iterator[None]:
    """A signal ends the process at once, with status 0; on the main thread.

    So it does while a server is imported and put together, and from the server's end to that of
    the process.
    """
    with _handled_by(_end_process, signal.SIGINT, signal.SIGTERM, are_restored=False):
        yield


@contextmanager
def ending_at_interrupt() -> Iterator[None]:
    """Ctrl-C ends the process at once, with a word and status 130; on the main thread.

    So it does while a model is loaded and compiled for: what is kept on disk is whole or not there,
    and to stop a compiler takes longer than to leave it.
    """
    with _handled_by(_interrupt, signal.SIGINT, are_restored=True):
        yield


@contextmanager
def _handled_by(
    handler: Callable[..., None], *numbers: signal.Signals, are_restored: bool
) -> Iterator[None]:
    """Signals have another handler; afterwards the one before, if so told or at an exception."""
    before = {number: signal.signal(number, handler) for number in numbers}

    def restore() -> None:
        for number, usual in before.items():
            signal.signal(number, usual)

    try:
        yield
    except BaseException:
        restore()
        raise
    if are_restored:
        restore()


def _end_process(*_: object) -> None:
    os._exit(0)


def _interrupt(*_: object) -> None:
    # A bar may have hidden the cursor. Not by `sys.stderr`, in the midst of which this may be.
    shown = b"\r\x1b[2K\x1b[?25h" if sys.stderr.isatty() else b""
    os.write(2, shown + b"refimpl: interrupted\n")
    os._exit(130)
