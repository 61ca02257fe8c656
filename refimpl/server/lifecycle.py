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
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Literal

from refimpl.server.admission import Ticket
from refimpl.server.errors import SERVER, Problem
from refimpl.server.keys import Key, Keyring
from refimpl.server.limits import LONGEST_WAIT, Queue
from refimpl.server.loading import Load, Loaded, Loading, Progress
from refimpl.server.metrics import EngineStatistics, Metrics
from refimpl.server.settings import ServerSettings
from refimpl.server.trail import current_trail

if TYPE_CHECKING:
    from refimpl.engine.engine import Engine

State = Literal["loading", "ready", "draining", "failed"]

# What clients are told of a server that is not ready.
CODES = {"loading": "model_loading", "draining": "shutting_down", "failed": "failed"}
_ENDING = "The server is shutting down."


class Service:
    """An engine to be, and everything that stands between it and the routes.

    Attributes:
        settings: of the server.
        names: by which requests may call the model; the first is its own.
        created: when it was made, in seconds since 1970.
        keyring: who may use it.
        queue: places of requests.
        metrics: what is counted.
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
        self._loading = Loading(load, progress=progress)
        self._is_closing = False
        self._drain_until: float | None = None

    @property
    def error(self) -> BaseException | None:
        """Why it could not load; None if it could, or may yet."""
        return self._loading.error

    @property
    def state(self) -> State:
        """Where in its life it is."""
        loaded = self._loading.loaded
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
        return self._loading.is_running

    @property
    def retry_after(self) -> int | None:
        """In how many seconds somebody who finds it not ready may come again; None for never.

        While it loads: when what is under way should end, at the speed measured. While it drains:
        when another one may stand in its place.
        """
        match self.state:
            case "loading":
                wait = self._loading.pace.seconds_left
            case "draining":
                wait = self.drain_seconds_left
            case "ready":
                wait = 0.0
            case "failed":
                return None
        return min(LONGEST_WAIT, max(1, math.ceil(wait)))

    def begin(self, *, ended: Callable[[], None] = lambda: None) -> None:
        """Start to load; `ended` is called on that thread when it is ready or has failed."""
        self._loading.begin(ended=ended)

    def wait_until_loaded(self, timeout: float) -> None:
        """Until it is ready or has failed, but no longer than so many seconds. Blocks."""
        self._loading.wait(timeout)

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
        loaded = self._loading.loaded
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
            # A copy: steps go on.
            step_tokens=dict(worker.step_tokens),
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
        self._loading.close(timeout=timeout)

    def unavailable(self, message: str) -> Problem:
        """The error reply of a server that is not ready: why, and when to come again."""
        wait, headers = self.retry_after, dict[str, str]()
        if wait is not None:
            message += f" Try again in {wait} s."
            headers["Retry-After"] = str(wait)
        return Problem(503, message, type=SERVER, code=CODES.get(self.state), headers=headers)

    def _require(self) -> Loaded:
        state, loaded = self.state, self._loading.loaded
        if state == "failed":
            raise self.unavailable("The model is not there any more: the server failed.")
        if loaded is None:
            is_loading = state == "loading"
            raise self.unavailable("The model is loading." if is_loading else _ENDING)
        return loaded

    def _check_open(self) -> None:
        """Raise what keeps a completion out."""
        self._require()
        if self._drain_until is not None:
            raise self.unavailable(_ENDING)
