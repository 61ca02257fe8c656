"""The model on its way: the thread that loads it, what came of that, and how long it may yet take.

Loading is what is done before the first completion: weights are read, programs are compiled.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from refimpl.engine.engine import Engine

Progress = Callable[[str, int, int], None]
Clock = Callable[[], float]

# While nothing has been done yet that the rest could be told from. A client that asks as often
# does no harm.
UNKNOWN_WAIT = 5.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What loading gives.

    Attributes:
        engine: started.
        fingerprint: of weights, numerics, sampler, JAX and device.
        block: tokens in a block of the prefix cache.
        num_compilations: how many programs have been compiled in this process.
    """

    engine: "Engine"
    fingerprint: str
    block: int
    num_compilations: Callable[[], int]


Load = Callable[[Progress], Loaded]


class Pace:
    """How fast one stage of the loading goes, and so how long it may yet take."""

    def __init__(self, *, clock: Clock = time.monotonic) -> None:
        """Nothing is done."""
        self._clock = clock
        # When the stage began, how much was done then, how much is done now, and how much there is.
        self._stage: tuple[float, int, int, int] | None = None

    def report(self, done: int, total: int) -> None:
        """So much is done. Less than before, or another total, is another stage."""
        stage = self._stage
        if stage is None or total != stage[3] or done < stage[2]:
            self._stage = self._clock(), done, done, total
        else:
            self._stage = *stage[:2], done, total

    @property
    def seconds_left(self) -> float:
        """Until the stage ends, if it goes on as it went; `UNKNOWN_WAIT` before it goes."""
        if self._stage is None:
            return UNKNOWN_WAIT
        began, first, done, total = self._stage
        if done == first:
            return UNKNOWN_WAIT
        return (self._clock() - began) / (done - first) * (total - done)


class Loading:
    """One loading, on a thread of its own.

    Attributes:
        loaded: what it gave; None before.
        error: why it failed; None if it has not.
        pace: how fast it goes.
    """

    def __init__(self, load: Load, *, progress: Progress | None = None) -> None:
        """Not begun.

        Args:
            load: makes the engine and starts it; calls what it is given with what it does, how
                much is done, and how much there is.
            progress: is called the same way, on the thread.
        """
        self.loaded: Loaded | None = None
        self.error: BaseException | None = None
        self.pace = Pace()
        self._load, self._progress = load, progress
        self._is_unwanted = False
        self._thread = threading.Thread(target=self._run, name="refimpl-load", daemon=True)

    @property
    def is_running(self) -> bool:
        """Whether the thread is still at it."""
        return self._thread.is_alive()

    def begin(self, *, ended: Callable[[], None]) -> None:
        """Start; `ended` is called on the thread when there is an engine or an error."""
        self._ended = ended
        self._thread.start()

    def wait(self, timeout: float) -> None:
        """Until the thread has ended, but no longer than so many seconds."""
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def close(self, *, timeout: float) -> None:
        """Break it off at the next thing that it reports, and close the engine. Blocks.

        Args:
            timeout: seconds to wait for that; compiling a program may take longer.
        """
        self._is_unwanted = True
        self.wait(timeout)
        if self.loaded is not None:
            self.loaded.engine.close()

    def _run(self) -> None:
        try:
            loaded = self._load(self._report)
            if self._is_unwanted:
                loaded.engine.close()
            self.loaded = loaded
        except _UnwantedError:
            _log.debug("loading was broken off")
        except BaseException as error:
            # Of any kind: without a model there is no server, and whoever waits must learn of it.
            self.error = error
        finally:
            self._ended()

    def _report(self, label: str, done: int, total: int) -> None:
        if self._is_unwanted:
            raise _UnwantedError
        self.pace.report(done, total)
        if self._progress is not None:
            self._progress(label, done, total)


class _UnwantedError(Exception):
    """Nobody waits for the model any more."""
