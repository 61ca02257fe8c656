"""The life of a server: it loads, is ready, drains, and is closed; or it fails.

A `Service` is what the routes are made around. It answers from the first moment: the model is
loaded and its programs are compiled on a thread of their own meanwhile.

    service = Service(settings, names=("google/gemma-3-270m", "gemma3:270m"), load=load)
    app = create_app(service)

    async def completions():
        with service.admit(g.key) as ticket:            # 503 or 429 if it cannot be
            ticket.hold(len(prompts) * candidates)       # 503 if there is not so much room
            ids = ...                                    # tokenise
            ticket.start(prompt_tokens=..., n=..., max_tokens=..., user=...)
            async with aclosing(service.engine.generate(request)) as events:
                ...
                ticket.tokens(len(delta.token_ids), choice=delta.choice)
            ticket.finished(reasons)
"""

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from refimpl.server.admission import Ticket
from refimpl.server.errors import SERVER, Problem
from refimpl.server.keys import Key, Keyring
from refimpl.server.limits import Queue
from refimpl.server.metrics import EngineStatistics, Metrics
from refimpl.server.settings import ServerSettings
from refimpl.server.trail import current_trail

if TYPE_CHECKING:
    from refimpl.engine.engine import Engine

State = Literal["loading", "ready", "draining", "failed"]
Progress = Callable[[str, int, int], None]

# Nobody can tell how long loading takes; a client that asks as often does no harm.
_LOADING_WAIT = 5.0

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


class Service:
    """An engine to be, and everything that stands between it and the routes.

    Attributes:
        settings: of the server.
        names: by which requests may call the model; the first is its own.
        created: when it was made, in seconds since 1970.
        keyring: who may use it.
        queue: places of requests.
        metrics: what is counted.
        error: why it failed; None if it has not.
    """

    def __init__(
        self,
        settings: ServerSettings,
        *,
        names: Sequence[str],
        load: Load,
        keyring: Keyring | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Nothing is loaded before `begin`.

        Args:
            settings: of the server.
            names: of the model; the first is its own. Aliases are in the settings.
            load: makes the engine and starts it; runs on a thread of its own, and calls what it is
                given with what it does, how much is done, and how much there is.
            keyring: who may use it; None for everybody.
            progress: is called the same way, on that thread.
        """
        self.settings, self.keyring = settings, keyring or Keyring()
        self.names = tuple(dict.fromkeys((*names, *settings.aliases)))
        self.created = int(time.time())
        self.queue = Queue(settings.max_queue, check=self._check_open)
        self.metrics = Metrics(self.names[0], read=self.statistics)
        self.error: BaseException | None = None
        self._load, self._progress = load, progress
        self._loaded: Loaded | None = None
        self._is_closing = False
        self._drain_until: float | None = None
        self._thread = threading.Thread(target=self._run, name="refimpl-load", daemon=True)

    @property
    def state(self) -> State:
        """Where in its life it is."""
        loaded = self._loaded
        if self.error is not None or (
            loaded is not None and not loaded.engine.is_healthy and not self._is_closing
        ):
            return "failed"
        if self._drain_until is not None:
            return "draining"
        return "loading" if loaded is None else "ready"

    @property
    def engine(self) -> "Engine":
        """The engine.

        Raises:
            Problem: 503, before there is one and after it has failed.
        """
        return self._require().engine

    @property
    def fingerprint(self) -> str:
        """What a reply's `system_fingerprint` says.

        Raises:
            Problem: 503, as `engine`.
        """
        return self._require().fingerprint

    @property
    def is_loading(self) -> bool:
        """Whether the thread that loads is still at it."""
        return self._thread.is_alive()

    def begin(self, *, ended: Callable[[], None] = lambda: None) -> None:
        """Start to load; `ended` is called on that thread when it is ready or has failed."""
        self._ended = ended
        self._thread.start()

    @contextmanager
    def admit(self, key: Key | None) -> Iterator[Ticket]:
        """Let a completion in, for as long as the block runs; inside of a Quart request.

        Args:
            key: whose it is, as the guard of `keys` found.

        Raises:
            Problem: 503, while it loads, drains, has failed, or is full; 429, if it is one too
                many for the key.
        """
        trail = current_trail()
        ticket = None
        try:
            with ExitStack() as stack:
                place = stack.enter_context(self.queue.reserve())
                expense = None if key is None else stack.enter_context(key.budget.spend())
                ticket = Ticket(
                    place,
                    expense,
                    metrics=self.metrics,
                    trail=trail,
                    deadline=time.monotonic() + self.settings.request_timeout,
                )
                yield ticket
        except Problem as problem:
            if problem.status in (429, 503):
                self.metrics.rejected(problem.code or "")
            raise
        except (asyncio.CancelledError, GeneratorExit):
            if ticket is not None:
                ticket.left()
            raise

    def statistics(self) -> EngineStatistics | None:
        """How the engine stands; None without one."""
        loaded = self._loaded
        worker = None if loaded is None else loaded.engine.worker
        if loaded is None or worker is None:
            return None
        slots, waiting = loaded.engine.options.slots, worker.scheduler.num_waiting
        prefix = worker.prefix.statistics
        return EngineStatistics(
            running=max(0, worker.num_in_flight - waiting),
            waiting=waiting,
            slots=slots,
            slots_in_use=slots - worker.scheduler.num_free,
            prefix_tokens_looked_up=(prefix.hits + prefix.misses) * loaded.block,
            prefix_tokens_found=prefix.hits * loaded.block,
            prefix_bytes=prefix.stored_bytes,
            compilations=loaded.num_compilations(),
        )

    def drain(self) -> None:
        """Take nothing new; what runs goes on."""
        if self._drain_until is None:
            self._drain_until = time.monotonic() + self.settings.drain_seconds

    @property
    def drain_seconds_left(self) -> float:
        """How long what runs may go on, once it drains."""
        assert self._drain_until is not None, "drain comes first"
        return max(0.0, self._drain_until - time.monotonic())

    def close(self, *, timeout: float = 10.0) -> None:
        """End whatever runs with an error, and free what is held. Blocks.

        Loading ends at the next thing that it reports, which may be a program to compile.

        Args:
            timeout: seconds to wait for that.
        """
        self._is_closing = True
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout)
        loaded = self._loaded
        if loaded is not None:
            loaded.engine.close()

    def _run(self) -> None:
        try:
            loaded = self._load(self._report)
            if self._is_closing:
                loaded.engine.close()
            self._loaded = loaded
        except _ClosedError:
            _log.debug("loading was broken off")
        except BaseException as error:
            # Of any kind: without a model there is no server, and whoever waits must learn of it.
            self.error = error
        finally:
            self._ended()

    def _report(self, label: str, done: int, total: int) -> None:
        if self._is_closing:
            raise _ClosedError
        if self._progress is not None:
            self._progress(label, done, total)

    def _require(self) -> Loaded:
        state, loaded = self.state, self._loaded
        if state == "failed":
            raise _unavailable("The model is not there any more: the server failed.", "failed")
        if loaded is None:
            raise _unavailable("The model is loading.", "model_loading", wait=_LOADING_WAIT)
        return loaded

    def _check_open(self) -> None:
        """Raise what keeps a completion out."""
        self._require()
        if self._drain_until is not None:
            raise _unavailable(
                "The server is shutting down.", "shutting_down", wait=self.drain_seconds_left
            )


class _ClosedError(Exception):
    """Loading is not wanted any more."""


def _unavailable(message: str, code: str, *, wait: float | None = None) -> Problem:
    advice, headers = "", dict[str, str]()
    if wait is not None:
        seconds = max(1, math.ceil(wait))
        advice, headers = f" Try again in {seconds} s.", {"Retry-After": str(seconds)}
    return Problem(503, message + advice, type=SERVER, code=code, headers=headers)
