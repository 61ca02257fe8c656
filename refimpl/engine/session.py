"""One request in flight, on the host: what its tokens become.

Owns the texts of its choices and the events that the caller gets. The device's numbers come in as
rows of a step; what goes out does not depend on when they came.
"""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass

from refimpl.engine.events import (
    Admitted,
    Delta,
    Event,
    Finished,
    FinishReason,
    PromptScored,
    TokenLogprob,
)
from refimpl.engine.packing import StepRow
from refimpl.engine.request import Request
from refimpl.engine.text import StopStrings, TextAssembler
from refimpl.model.tokenizer import Tokenizer


@dataclass
class _Candidate:
    text: TextAssembler
    num_tokens: int = 0
    total_logprob: float = 0.0


class Session:
    """A request from its admission to the end of its last choice."""

    def __init__(self, request: Request, tokenizer: Tokenizer, eos_ids: Sequence[int]) -> None:
        """Begin a request that has been checked.

        Args:
            request: what was asked.
            tokenizer: gives the tokens' text.
            eos_ids: the model's own ends of text.
        """
        self.request = request
        params = request.params
        eos = () if params.ignore_eos else tuple(eos_ids)
        self.stop_ids = tuple(dict.fromkeys((*eos, *params.stop_token_ids)))
        self.seed = secrets.randbits(64) if params.seed is None else params.seed
        stops = StopStrings(params.stop)
        self._candidates = {
            choice: _Candidate(
                TextAssembler(
                    tokenizer,
                    stops,
                    include_stop=params.include_stop_str_in_output,
                    skip_special=params.skip_special_tokens,
                )
            )
            for choice in range(params.num_candidates)
        }
        self._scored: list[TokenLogprob | None] = [None]
        self._is_scored = False
        # Sent with the next events, so that it wakes nobody by itself.
        self._unsent = list[Event]()

    @property
    def running(self) -> tuple[int, ...]:
        """The choices that have not ended."""
        return tuple(self._candidates)

    def num_left(self, choice: int) -> int:
        """Tokens that a choice may still get; none if it has ended."""
        candidate = self._candidates.get(choice)
        return 0 if candidate is None else self.request.params.max_tokens - candidate.num_tokens

    @property
    def awaits_score(self) -> bool:
        """Whether the prompt is to be scored and has not been."""
        wanted = self.request.prompt_logprobs is not None
        return wanted and not self._is_scored

    def admit(self, *, cached_tokens: int) -> None:
        """It has a slot now, its first one.

        Args:
            cached_tokens: of the prompt, that came out of the prefix cache.
        """
        self._unsent.append(Admitted(time.monotonic(), cached_tokens))

    def scored(self, rows: Sequence[tuple[float, tuple[tuple[int, float], ...]]]) -> list[Event]:
        """Take the next prompt tokens' log-probabilities; gives the event once all are there."""
        ids, count = self.request.prompt_ids, self.request.prompt_logprobs
        for logprob, top in rows:
            self._scored.append(TokenLogprob(ids[len(self._scored)], logprob, top[:count]))
        self._is_scored = len(self._scored) == len(ids)
        return self._with_unsent([PromptScored(tuple(self._scored))]) if self._is_scored else []

    def push(self, choice: int, row: StepRow) -> tuple[list[Event], bool]:
        """Take a step of a choice; gives its events, and whether the choice goes on."""
        if not row.is_finite:
            return self.end(choice, "error"), False
        params, candidate = self.request.params, self._candidates[choice]
        candidate.num_tokens += 1
        candidate.total_logprob += row.logprob
        ended_by = row.token if row.token in self.stop_ids else None
        shown = ended_by is None or (
            params.include_stop_str_in_output and ended_by in params.stop_token_ids
        )
        text, stop = candidate.text.push(row.token) if shown else ("", None)
        goes_on = row.is_running and stop is None and ended_by is None
        if not goes_on and stop is None:
            rest, stop = candidate.text.flush()
            text += rest
        logprobs = ()
        if params.logprobs is not None:
            logprobs = (TokenLogprob(row.token, row.logprob, row.top[: params.logprobs]),)
        events = self._with_unsent([Delta(choice, text, (row.token,), logprobs)])
        if goes_on:
            return events, True
        cause = ended_by if stop is None else stop
        return [*events, self._finish(choice, "length" if cause is None else "stop", cause)], False

    def end(self, choice: int, reason: FinishReason) -> list[Event]:
        """End a choice from outside; the text held back comes out."""
        text, stop = self._candidates[choice].text.flush()
        events: list[Event] = [Delta(choice, text, (), ())] if text else []
        return self._with_unsent([*events, self._finish(choice, reason, stop)])

    def _with_unsent(self, events: list[Event]) -> list[Event]:
        unsent, self._unsent = self._unsent, []
        return unsent + events

    def _finish(self, choice: int, reason: FinishReason, stop: str | int | None) -> Finished:
        candidate = self._candidates.pop(choice)
        count = candidate.num_tokens
        mean = candidate.total_logprob / count if count else None
        return Finished(choice, reason, stop, count, mean)
