"""A completion under way: its prompts, what the engine does for each, and what has come of it.

Owns the way from a parsed request to the engine's requests, and from their events to pieces. How
the pieces are sent is up to `stream` and `completions`.
"""

import contextlib
import secrets
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, replace

from refimpl.engine.engine import Engine
from refimpl.engine.events import Admitted, Delta, Event, Finished, PromptScored, collect
from refimpl.engine.request import Request, SamplingParams
from refimpl.server.admission import Ticket
from refimpl.server.choices import Piece, PromptWriter
from refimpl.server.contract import CompletionRequest
from refimpl.server.errors import Problem
from refimpl.server.infill import Infilled, InfillLimits, fim_request, infill
from refimpl.server.merging import merge
from refimpl.server.prompts import Prompt
from refimpl.server.reply import Head, Usage, usage
from refimpl.server.sampling import sampling_params
from refimpl.server.settings import ServerSettings

# What comes of one prompt for its choices: from the engine, or at once where a gap was filled.
type Coming = PromptScored | Delta | Finished | Infilled


@dataclass(frozen=True)
class Task:
    """What the engine does for one prompt.

    Attributes:
        prompt: as it was given.
        request: that gives the text.
        scoring: that gives the log-probabilities of the prompt, where `request` has another one.
        suffix: to be reached by resampling, or "".
    """

    prompt: Prompt
    request: Request
    scoring: Request | None = None
    suffix: str = ""


class Job:
    """One request of a client.

    Attributes:
        request: what was asked.
        head: of the reply.
        prompt_tokens: of all prompts, each once, suffixes included.
        cached_tokens: of them, that came out of the prefix cache; known with the first that comes
            of a prompt.
    """

    def __init__(
        self,
        request: CompletionRequest,
        prompts: list[Prompt],
        *,
        engine: Engine,
        settings: ServerSettings,
        head: Head,
        ticket: Ticket,
    ) -> None:
        """Prepare everything; nothing is sent to the engine yet.

        Args:
            request: what was asked.
            prompts: of the request.
            engine: does the work.
            settings: of the server.
            head: of the reply.
            ticket: learns what comes.

        Raises:
            Problem, InvalidRequestError: the engine cannot do it.
        """
        self.request, self.head = request, head
        self._engine, self._ticket = engine, ticket
        self._limits = InfillLimits(
            candidates=settings.infill_candidates,
            cuts=settings.infill_cuts,
            suffix_tokens=settings.infill_suffix_tokens,
        )
        gemma = engine.gemma
        params = sampling_params(
            request,
            gemma.tokenizer,
            vocab_size=gemma.vocab_size,
            # One for all prompts, so that each gives what it gives alone.
            seed=secrets.randbits(63) if request.seed is None else request.seed,
        )
        self._tasks = [self._task(prompt, params) for prompt in prompts]
        self._writers = [
            PromptWriter(
                request,
                task.prompt,
                number=number,
                tokenizer=gemma.tokenizer,
                # The form of a gap has ends of text of its own.
                eos_ids={*gemma.eos_ids, *task.request.params.stop_token_ids}
                - set(request.stop_token_ids),
                list_end_of_text=settings.list_end_of_text,
            )
            for number, task in enumerate(self._tasks)
        ]
        self.prompt_tokens = sum(len(task.request.prompt_ids) for task in self._tasks)
        self.cached_tokens = 0

    def usage(self) -> Usage:
        """What the job has taken so far."""
        return usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=sum(writer.completion_tokens for writer in self._writers),
            cached_tokens=self.cached_tokens,
        )

    def broke_off(self, problem: Problem) -> None:
        """A stream of its pieces ends with this error."""
        self._ticket.broke_off(problem.status)

    async def pieces(self) -> AsyncGenerator[list[Piece], None]:
        """More of any choices, as soon as it is known.

        Raises:
            Problem, InvalidRequestError, EngineError: it was broken off, or cannot be done.
        """
        reasons = list[str]()
        async with contextlib.aclosing(self._coming()) as batches:
            async for batch in batches:
                pieces = [piece for number, event in batch for piece in self._take(number, event)]
                reasons += [piece.finish_reason for piece in pieces if piece.finish_reason]
                yield pieces
        self._ticket.finished(reasons)

    async def whole(self) -> list[Piece]:
        """All pieces, once every choice has ended.

        Raises:
            Problem, InvalidRequestError, EngineError: as `pieces`.
        """
        events: list[list[Event]] = [[] for _ in self._tasks]
        pieces = list[Piece]()
        async with contextlib.aclosing(self._coming()) as batches:
            async for batch in batches:
                for number, event in batch:
                    if isinstance(event, Infilled):
                        pieces += self._take(number, event)
                    else:
                        events[number].append(event)
        for task, writer, came in zip(self._tasks, self._writers, events, strict=True):
            if came:
                pieces += writer.take_whole(collect(task.request, came))
        self._ticket.finished(piece.finish_reason for piece in pieces if piece.finish_reason)
        return pieces

    async def _coming(self) -> AsyncGenerator[list[tuple[int, Coming]], None]:
        """Everything that comes of all prompts; the ticket learns of slots and tokens."""
        async with contextlib.aclosing(
            merge([self._events(task) for task in self._tasks])
        ) as batches:
            async for batch in batches:
                came = list[tuple[int, Coming]]()
                for number, event in batch:
                    if isinstance(event, Admitted):
                        self._admitted(event)
                    else:
                        self._count(number, event)
                        came.append((number, event))
                if came:
                    yield came

    def _task(self, prompt: Prompt, params: SamplingParams) -> Task:
        asked = self.request
        # What echo lists, and what prompt_logprobs gives; each takes of the list what it wants.
        tops = [asked.logprobs if asked.echo else None, asked.prompt_logprobs]
        scored = max((top for top in tops if top is not None), default=None)
        request = Request(
            prompt_ids=prompt.ids,
            params=params,
            prompt_logprobs=scored,
            deadline=self._ticket.deadline,
            id=self.head.id,
        )
        self._engine.check(request)
        if not asked.suffix or asked.max_tokens == 0:
            return Task(prompt, request)
        form = fim_request(self._engine, request, suffix=asked.suffix, limits=self._limits)
        if form is None:
            return Task(prompt, request, suffix=asked.suffix)
        if scored is None:
            return Task(prompt, form)
        # The prompt is scored as it was given, not as it stands in the form.
        scoring = replace(request, params=SamplingParams(max_tokens=0))
        return Task(prompt, replace(form, prompt_logprobs=None), scoring=scoring)

    async def _events(self, task: Task) -> AsyncGenerator[Event | Infilled, None]:
        if task.suffix:
            yield await infill(self._engine, task.request, suffix=task.suffix, limits=self._limits)
            return
        if task.scoring is not None:
            async with contextlib.aclosing(self._engine.generate(task.scoring)) as events:
                async for event in events:
                    is_broken = isinstance(event, Finished) and event.reason != "length"
                    if is_broken or isinstance(event, Admitted | PromptScored):
                        yield event
        async with contextlib.aclosing(self._engine.generate(task.request)) as events:
            async for event in events:
                yield event

    def _take(self, number: int, event: Coming) -> Iterator[Piece]:
        if isinstance(event, Infilled):
            return self._writers[number].take_whole(event.completion)
        return self._writers[number].take(event)

    def _admitted(self, admitted: Admitted) -> None:
        self.cached_tokens += admitted.cached_tokens
        self._ticket.admitted(admitted.at)

    def _count(self, number: int, event: Coming) -> None:
        if isinstance(event, Infilled):
            if event.completion.admitted is not None:
                self._admitted(event.completion.admitted)
            self.prompt_tokens += event.suffix_tokens
            self._ticket.tokens(max(event.completion.completion_tokens, 1), choice=number)
        elif isinstance(event, Delta) and event.token_ids:
            choice = number * self.request.num_candidates + event.choice
            self._ticket.tokens(len(event.token_ids), choice=choice)
