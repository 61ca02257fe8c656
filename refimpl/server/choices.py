"""From the engine's events to pieces of choices, the same whether they are streamed or not.

Owns which tokens are listed, and when: a token is listed once text from the place where it begins
is certain to stay, so that one that turns out to be part of a stop string never is. A reply is all
pieces of each choice in a row.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from refimpl.engine.events import (
    Choice,
    Completion,
    Delta,
    Finished,
    FinishReason,
    PromptScored,
    TokenLogprob,
)
from refimpl.server.contract import CompletionRequest
from refimpl.server.errors import engine_failed, not_finite, timed_out
from refimpl.server.logprobs import Entry, Logprobs, Places, PromptLogprob, Speller
from refimpl.server.prompts import Prompt
from refimpl.server.vocabulary import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Piece:
    """More of one choice.

    Attributes:
        index: of the choice among all of the reply.
        text: what has become certain.
        logprobs: of tokens in it; None if nobody asked.
        token_ids: as `logprobs`.
        prompt_ids: the prompt, in a choice's first piece; None in others, or if nobody asked.
        prompt_logprobs: as `prompt_ids`.
        finish_reason: why the choice ended, in its last piece, which has nothing else.
    """

    index: int
    text: str = ""
    logprobs: Logprobs | None = None
    token_ids: list[int] | None = None
    prompt_ids: list[int] | None = None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None
    finish_reason: Literal["stop", "length"] | None = None


@dataclass
class _Open:
    """A choice that has not ended: its tokens' places, and which of them are not listed yet."""

    places: Places
    shown: int
    waiting: deque[Entry] = field(default_factory=deque[Entry])


class PromptWriter:
    """All choices of one prompt.

    Attributes:
        completion_tokens: generated so far, those of candidates that were not chosen included.
    """

    def __init__(
        self,
        request: CompletionRequest,
        prompt: Prompt,
        *,
        number: int,
        tokenizer: Tokenizer,
        eos_ids: Iterable[int],
        list_end_of_text: bool = True,
    ) -> None:
        """Begin.

        Args:
            request: what was asked.
            prompt: one of its prompts.
            number: which one, from 0.
            tokenizer: of the model.
            eos_ids: ids that end a text by themselves.
            list_end_of_text: list such an id, too, where it ended the text.
        """
        self.completion_tokens = 0
        self._request, self._prompt, self._tokenizer = request, prompt, tokenizer
        self._first_index = number * request.n
        self._speller = Speller(tokenizer, as_ids=request.return_tokens_as_token_ids)
        eos = set[int]() if request.ignore_eos else set(eos_ids)
        self._unlisted = set[int]() if list_end_of_text else eos
        stops = set(request.stop_token_ids)
        self._ends = eos if request.include_stop_str_in_output else eos | stops
        self._control = tokenizer.special_ids if request.skip_special_tokens else frozenset[int]()
        self._is_open = False
        self._choices = dict[int, _Open]()

    def take(self, event: PromptScored | Delta | Finished) -> Iterator[Piece]:
        """The pieces that an event leads to.

        Raises:
            Problem: the request was broken off.
        """
        if not self._is_open:
            yield from self._begin(event.entries if isinstance(event, PromptScored) else None)
        match event:
            case Delta():
                self.completion_tokens += len(event.token_ids)
                yield from self._more(event)
            case Finished():
                yield from self._finish(event.choice, event.reason, event.stop)
            case PromptScored():
                pass

    def take_whole(self, completion: Completion) -> Iterator[Piece]:
        """The pieces of a completion that is not streamed.

        Raises:
            Problem: the request was broken off.
        """
        yield from self._begin(completion.prompt_logprobs)
        self.completion_tokens = completion.completion_tokens
        for choice in completion.choices:
            yield from self._more(_delta_of(choice))
            yield from self._finish(choice.index, choice.finish_reason, choice.stop)

    def _begin(self, scores: tuple[TokenLogprob | None, ...] | None) -> Iterator[Piece]:
        """What each choice begins with: the prompt, if it is echoed."""
        self._is_open = True
        request, prompt = self._request, self._prompt
        for choice in range(request.n):
            places = Places(self._tokenizer, hidden=self._control, start=len(prompt.text))
            self._choices[choice] = _Open(places, shown=len(prompt.text))
        if not (request.echo or request.return_token_ids or request.prompt_logprobs is not None):
            return
        entries = self._prompt_entries(scores) if request.echo else []
        opening = Piece(
            index=self._first_index,
            text=prompt.text if request.echo else "",
            logprobs=self._logprobs(entries),
            token_ids=[] if request.return_token_ids else None,
            prompt_ids=list(prompt.ids) if request.return_token_ids else None,
            prompt_logprobs=self._prompt_logprobs(scores),
        )
        for choice in range(request.n):
            yield replace(opening, index=self._first_index + choice)

    def _prompt_entries(self, scores: tuple[TokenLogprob | None, ...] | None) -> list[Entry]:
        if self._request.logprobs is None:
            return []
        ids = self._prompt.ids
        assert scores is not None, "they were asked for"
        places = Places(self._tokenizer, hidden=self._control)
        # The beginning of text that the server put there is no part of the text.
        offsets = [
            0 if number == 0 and self._prompt.is_bos_ours else places.push(token_id)
            for number, token_id in enumerate(ids)
        ]
        return [Entry(*each) for each in zip(ids, offsets, scores, strict=True)]

    def _more(self, delta: Delta) -> Iterator[Piece]:
        choice = self._choices[delta.choice]
        scores = delta.logprobs or (None,) * len(delta.token_ids)
        for token_id, scored in zip(delta.token_ids, scores, strict=True):
            is_end = token_id in self._ends
            place = choice.places.end() if is_end else choice.places.push(token_id)
            choice.waiting.append(Entry(token_id, place, scored))
        choice.shown += len(delta.text)
        listed = list[Entry]()
        while choice.waiting and choice.waiting[0].offset < choice.shown:
            listed.append(choice.waiting.popleft())
        yield from self._piece(delta.choice, delta.text, listed)

    def _finish(self, number: int, reason: FinishReason, stop: str | int | None) -> Iterator[Piece]:
        if reason not in ("stop", "length"):
            raise {"deadline": timed_out, "error": not_finite}.get(reason, engine_failed)()
        choice = self._choices.pop(number)
        # What a stop string has left waiting begins within it, or behind it.
        left = [] if isinstance(stop, str) else list(choice.waiting)
        if left and left[-1].id == stop and stop in self._unlisted:
            left.pop()
        yield from self._piece(number, "", left)
        yield Piece(
            index=self._first_index + number,
            logprobs=self._logprobs([]),
            token_ids=[] if self._request.return_token_ids else None,
            finish_reason=reason,
        )

    def _piece(self, choice: int, text: str, entries: list[Entry]) -> Iterator[Piece]:
        is_listed = self._request.logprobs is not None or self._request.return_token_ids
        if text or (entries and is_listed):
            ids = [entry.id for entry in entries] if self._request.return_token_ids else None
            yield Piece(
                index=self._first_index + choice,
                text=text,
                logprobs=self._logprobs(entries),
                token_ids=ids,
            )

    def _logprobs(self, entries: list[Entry]) -> Logprobs | None:
        top = self._request.logprobs
        return None if top is None else self._speller.logprobs(entries, top=top)

    def _prompt_logprobs(
        self, scores: tuple[TokenLogprob | None, ...] | None
    ) -> list[dict[str, PromptLogprob] | None] | None:
        top = self._request.prompt_logprobs
        if top is None:
            return None
        assert scores is not None, "they were asked for"
        return self._speller.prompt_logprobs(scores, top=top)


def joined(pieces: Iterable[Piece]) -> Piece:
    """All pieces of one choice as one, in the order in which they came."""
    whole, *rest = pieces
    for piece in rest:
        whole = Piece(
            index=whole.index,
            text=whole.text + piece.text,
            logprobs=_joined_logprobs(whole.logprobs, piece.logprobs),
            token_ids=_joined_lists(whole.token_ids, piece.token_ids),
            prompt_ids=whole.prompt_ids,
            prompt_logprobs=whole.prompt_logprobs,
            finish_reason=piece.finish_reason,
        )
    return whole


def _joined_lists[T](first: list[T] | None, second: list[T] | None) -> list[T] | None:
    return None if first is None else first + (second or [])


def _joined_logprobs(first: Logprobs | None, second: Logprobs | None) -> Logprobs | None:
    if first is None or second is None:
        return None
    return Logprobs(
        tokens=first["tokens"] + second["tokens"],
        token_logprobs=first["token_logprobs"] + second["token_logprobs"],
        top_logprobs=first["top_logprobs"] + second["top_logprobs"],
        text_offset=first["text_offset"] + second["text_offset"],
    )


def _delta_of(choice: Choice) -> Delta:
    """A whole choice as if it had come at once."""
    return Delta(choice.index, choice.text, choice.token_ids, choice.logprobs or ())
