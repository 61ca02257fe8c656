"""Many completions at once, each as if it were alone.

One thread owns the device. Callers put requests into its inbox from any thread or event loop, and
get events back through a queue of their own; to stop a request is to close its iterator.
"""

import asyncio
import contextlib
import itertools
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from dataclasses import dataclass, replace

from refimpl.engine.events import Completion, Event, Finished, TokenLogprob, collect
from refimpl.engine.inbox import Backlog, Delivery, Inbox, LoopInbox, ThreadInbox
from refimpl.engine.loop import EngineLoop
from refimpl.engine.packing import MAX_STOP_IDS
from refimpl.engine.programs import Programs
from refimpl.engine.request import Request, SamplingParams
from refimpl.engine.session import Session
from refimpl.engine.worker import Worker
from refimpl.errors import EngineError, InvalidRequestError
from refimpl.model.gemma import Gemma
from refimpl.progress import Progress

OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How big an engine is.

    Attributes:
        slots: choices that run at the same time; what has no slot waits.
        context: most tokens of prompt and completion together; None for the smaller of the model's
            context and 4096. Memory for the caches of all slots is taken at the start. On a CPU
            under Linux, what no slot has written since then is given back meanwhile; a copy of a
            prompt, or a fault, writes the whole of a slot.
        steps: most decode steps in one call of the device, while nobody waits. More steps cost
            less per token on an accelerator, and tokens come in bursts of so many.
        prefix_bytes: memory for blocks of prompts that may come again; 0 keeps none. The default
            holds 1,792 tokens of Gemma 3 270M in float32, 1,152 of 1B, and 128 of 4B; a prompt's
            tokens beyond are computed each time.
        max_unread: deliveries that the reader of a request may leave unread; a call of decode
            makes one for each choice. Then the request pauses until half of them are read. It
            keeps its slots meanwhile, and is still held to its deadline.
        compile_at_start: compile every program before the first request. False compiles each at
            its first use, which is sooner done where one request is all there is.
    """

    slots: int = 8
    context: int | None = None
    steps: int = 1
    prefix_bytes: int = 64 << 20
    max_unread: int = 64
    compile_at_start: bool = True

    def __post_init__(self) -> None:
        """Refuse sizes that no engine can have.

        Raises:
            InvalidRequestError: naming the option.
        """
        for name, least in (("slots", 1), ("steps", 1), ("prefix_bytes", 0), ("max_unread", 1)):
            if getattr(self, name) < least:
                raise InvalidRequestError(
                    f"{name} must be at least {least}, got {getattr(self, name)}", parameter=name
                )
        if self.context is not None and self.context < 1:
            raise InvalidRequestError(
                f"context must be at least 1, got {self.context}", parameter="context"
            )


class Engine:
    """Runs requests on one model. Safe to call from any thread.

    engine = Engine(gemma)
    with engine:
        print(engine.complete("The capital of France is", SamplingParams(temperature=0)))
    """

    def __init__(self, gemma: Gemma, options: EngineOptions | None = None) -> None:
        """An engine that has yet to be started.

        Args:
            gemma: the model.
            options: sizes; see `EngineOptions`.
        """
        self.gemma, self.options = gemma, options or EngineOptions()
        longest = gemma.config.context_length
        self.context = min(self.options.context or 4096, longest)
        self._programs = Programs(
            gemma=gemma,
            slots=self.options.slots,
            context=self.context,
            max_steps=self.options.steps,
        )
        self._keys = itertools.count()
        self._lock = threading.Lock()
        self._running: EngineLoop | None = None

    def __enter__(self) -> "Engine":
        """Start, and show on a terminal how far that is."""
        if self.options.compile_at_start:
            with Progress() as bars:
                self.start(lambda _, done, total: bars.update("compiling", done, total))
        else:
            self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_healthy(self) -> bool:
        """Whether requests can be sent."""
        return self._running is not None and self._running.error is None

    @property
    def worker(self) -> Worker | None:
        """What runs on the engine's thread; for its statistics. None before the start."""
        return None if self._running is None else self._running.worker

    def start(self, progress: OnProgress | None = None) -> None:
        """Compile the programs, unless that is left to their first use, and take requests.

        What this machine has compiled before comes from the cache, if that is enabled.

        Args:
            progress: called with the program's name, its number, and how many there are.

        Raises:
            EngineError: it runs already.
        """
        with self._lock:
            if self._running is not None and self._running.error is None:
                raise EngineError("the engine runs already: close it before it is started again")
            # A loop that failed still holds its state, as big as the new one.
            self._running = None
            loop = EngineLoop(
                self._programs,
                prefix_bytes=self.options.prefix_bytes,
                max_unread=self.options.max_unread,
            )
            compiles = loop.worker.start(compile_all=self.options.compile_at_start)
            for name, number, total in compiles:
                if progress is not None:
                    progress(f"compiling {name}", number, total)
            loop.thread.start()
            self._running = loop

    def close(self) -> None:
        """Stop. Every request that has not ended ends with an error; closing twice does nothing."""
        with self._lock:
            running, self._running = self._running, None
        if running is not None:
            running.stop()

    def check(self, request: Request) -> None:
        """See whether the engine can do it, before anything is sent.

        Raises:
            InvalidRequestError: naming the parameter at fault.
        """
        gemma = self.gemma
        request.check(
            gemma.vocab_size,
            self.context,
            eos_ids=gemma.eos_ids,
            suppressed_ids=gemma.suppressed_ids,
        )
        most = MAX_STOP_IDS - len(gemma.eos_ids)
        if len(request.params.stop_token_ids) > most:
            raise InvalidRequestError(
                f"stop_token_ids takes at most {most} ids, got "
                f"{len(request.params.stop_token_ids)}: use stop strings for the others",
                parameter="stop_token_ids",
            )

    def stream(self, request: Request) -> Generator[Event, None, None]:
        """Events of a request, each as soon as it is known.

        The request is sent when the first event is asked for. Closing the iterator ends it.

        Raises:
            InvalidRequestError: see `check`; at once.
            EngineError: the engine does not run, or failed meanwhile.
        """
        self.check(request)
        return self._stream(request)

    async def generate(self, request: Request) -> AsyncGenerator[Event, None]:
        """As `stream`, for an event loop. Closing the iterator frees the slots within one step.

        Raises:
            InvalidRequestError, EngineError: as `stream`.
        """
        self.check(request)
        inbox = LoopInbox(asyncio.get_running_loop())
        sent = self._send(request, inbox)
        left = request.params.num_candidates
        try:
            while left:
                for event in sent.read(await inbox.get()):
                    left -= isinstance(event, Finished)
                    yield event
        finally:
            if left:
                sent.cancel()

    def complete(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None
    ) -> Completion:
        """Everything that a prompt leads to.

        Args:
            prompt: text, which gets the model's beginning of text, or ids, which are taken as they
                are.
            params: see `SamplingParams`.

        Raises:
            InvalidRequestError, EngineError: as `stream`.
        """
        return self._collected(self.request(prompt, params))

    async def complete_async(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None
    ) -> Completion:
        """As `complete`, for an event loop; cancelling the task ends the request."""
        request = self.request(prompt, params)
        async with contextlib.aclosing(self.generate(request)) as events:
            return collect(request, [event async for event in events])

    def score(
        self, prompt: str | Sequence[int], *, top: int = 0
    ) -> tuple[TokenLogprob | None, ...]:
        """What the model says of a text: each token's log-probability, given those before it.

        Args:
            prompt: as in `complete`.
            top: give so many of the likeliest at each place, too; 0 to 20.

        Returns:
            One for each token; None for the first, which follows nothing.

        Raises:
            InvalidRequestError, EngineError: as `stream`.
        """
        request = self.request(prompt, SamplingParams(max_tokens=0))
        scored = self._collected(replace(request, prompt_logprobs=top)).prompt_logprobs
        assert scored is not None, "it was asked for"
        return scored

    def request(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Request:
        """A request for a prompt of text or ids."""
        ids = self.gemma.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        return Request(prompt_ids=tuple(ids), params=params or SamplingParams())

    def _collected(self, request: Request) -> Completion:
        with contextlib.closing(self.stream(request)) as events:
            return collect(request, events)

    def _stream(self, request: Request) -> Generator[Event, None, None]:
        inbox = ThreadInbox()
        sent = self._send(request, inbox)
        left = request.params.num_candidates
        try:
            while left:
                for event in sent.read(inbox.get()):
                    left -= isinstance(event, Finished)
                    yield event
        finally:
            if left:
                sent.cancel()

    def _send(self, request: Request, inbox: Inbox) -> "_Sent":
        running = self._running
        if running is None:
            raise EngineError("the engine does not run: call start(), or use it in a with block")
        key = next(self._keys)
        session = Session(request, self.gemma.tokenizer, self.gemma.eos_ids)
        return _Sent(running, key, running.submit(key, session, inbox))


@dataclass(frozen=True)
class _Sent:
    """A request in the hands of its reader."""

    loop: EngineLoop
    key: int
    backlog: Backlog

    def read(self, delivery: Delivery) -> list[Event]:
        """Take note of a delivery; gives its events."""
        self.backlog.read()
        if isinstance(delivery, EngineError):
            raise delivery
        return delivery

    def cancel(self) -> None:
        """End the request, if it has not ended."""
        self.loop.cancel(self.key)
