"""What comes back for a request: events while it runs, and what they add up to.

Owns the forms of a result and the choice among candidates. It knows neither how tokens are made
nor how a reply is spelt.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from refimpl.engine.request import Request

FinishReason = Literal["stop", "length", "cancelled", "deadline", "error"]


@dataclass(frozen=True)
class TokenLogprob:
    """A token's raw log-probability, and those of the likeliest in its place.

    Attributes:
        id: of the token.
        logprob: natural logarithm, before bias, penalties and temperature.
        top: ids and log-probabilities, likeliest first, the lower id first on ties; as many as
            were asked for. It holds the token itself only if that is among them.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Admitted:
    """The request has got its first slot: told once, together with the first that comes of it.

    A request that ends while it waits, and one for which nothing is to be computed, get none.

    Attributes:
        at: when that was, in seconds of `time.monotonic`.
        cached_tokens: of the prompt, whose keys and values came out of the prefix cache.
    """

    at: float
    cached_tokens: int


@dataclass(frozen=True)
class PromptScored:
    """The prompt's log-probabilities, once for all choices and before them.

    Attributes:
        entries: one for each prompt token; None for the first, which follows nothing.
    """

    entries: tuple[TokenLogprob | None, ...]


@dataclass(frozen=True)
class Delta:
    """More of one choice. It may bring tokens whose text is to come, and text of tokens before.

    Attributes:
        choice: which of the candidates, 0 to best_of - 1.
        text: of all deltas in a row it is the choice's text.
        token_ids: of all deltas in a row they are all that was generated: the id that ended the
            text, and tokens of a stop string, too.
        logprobs: one for each of the token ids, or empty if the request wants none.
    """

    choice: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class Finished:
    """The end of one choice; after it comes nothing more of it.

    Attributes:
        choice: which of the candidates, 0 to best_of - 1.
        reason: why it ended.
        stop: the stop string or the id that ended it, if the reason is "stop".
        num_tokens: number of token ids in its deltas.
        mean_logprob: of those tokens, raw; None if there are none.
    """

    choice: int
    reason: FinishReason
    stop: str | int | None
    num_tokens: int
    mean_logprob: float | None


type Event = Admitted | PromptScored | Delta | Finished


@dataclass(frozen=True)
class Choice:
    """One whole text.

    Attributes:
        index: its place among the choices, the best first if there were more candidates.
        text: without the stop string, unless that was asked for.
        token_ids: all that was generated, with the id or the stop string that ended it.
        logprobs: one for each token id; None if they were not asked for.
        finish_reason: why it ended.
        stop: the stop string or the id that ended it, if any.
        mean_logprob: of its tokens, raw; None if there are none.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None
    finish_reason: FinishReason
    stop: str | int | None
    mean_logprob: float | None


@dataclass(frozen=True)
class Completion:
    """All that came back for a request.

    Attributes:
        choices: n of them.
        prompt_tokens: length of the prompt.
        completion_tokens: generated for all candidates, those not chosen included.
        prompt_logprobs: one for each prompt token, None for the first; None if not asked for.
        admitted: when the request got its first slot; None if it had none. It depends on what else
            runs, and all else does not, so that equality and `repr` leave it out.
    """

    choices: tuple[Choice, ...]
    prompt_tokens: int
    completion_tokens: int
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None
    admitted: Admitted | None = field(default=None, compare=False, repr=False)

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that came out of the prefix cache."""
        return 0 if self.admitted is None else self.admitted.cached_tokens


def collect(request: Request, events: Iterable[Event]) -> Completion:
    """Add up a request's events.

    Of more candidates than choices, the n with the highest mean log-probability are kept, best
    first, the lower candidate on ties. One that was broken off comes after all that were not.

    Args:
        request: what was asked.
        events: all of them, of any number of choices mixed.
    """
    params, prompt_logprobs, admitted = request.params, None, None
    deltas: list[list[Delta]] = [[] for _ in range(params.num_candidates)]
    ends: dict[int, Finished] = {}
    for event in events:
        match event:
            case Admitted():
                admitted = event
            case PromptScored(entries):
                prompt_logprobs = entries
            case Delta():
                deltas[event.choice].append(event)
            case Finished():
                ends[event.choice] = event
    assert len(ends) == params.num_candidates, "every candidate ends with Finished"
    kept = list(range(params.num_candidates))
    if params.num_candidates > params.n:
        kept = sorted(kept, key=lambda candidate: _rank(ends[candidate]))[: params.n]
    return Completion(
        choices=tuple(
            _choice(index, deltas[i], ends[i], with_logprobs=params.logprobs is not None)
            for index, i in enumerate(kept)
        ),
        prompt_tokens=len(request.prompt_ids),
        completion_tokens=sum(end.num_tokens for end in ends.values()),
        prompt_logprobs=prompt_logprobs,
        admitted=admitted,
    )


def _rank(end: Finished) -> tuple[bool, float]:
    broken_off = end.reason not in ("stop", "length")
    mean = -math.inf if end.mean_logprob is None else end.mean_logprob
    # Numbers that became not-a-number would make every order possible.
    return broken_off, math.inf if math.isnan(mean) else -mean


def _choice(index: int, deltas: list[Delta], end: Finished, *, with_logprobs: bool) -> Choice:
    logprobs = tuple(entry for delta in deltas for entry in delta.logprobs)
    return Choice(
        index=index,
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token_id for delta in deltas for token_id in delta.token_ids),
        logprobs=logprobs if with_logprobs else None,
        finish_reason=end.reason,
        stop=end.stop,
        mean_logprob=end.mean_logprob,
    )
