"""The texts that one candidate for a gap offers: itself, and what is left of it at each cut.

Owns where a text may be cut and which ids stand for a piece of it. It knows no engine.
"""

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from refimpl.engine.events import Choice
from refimpl.engine.request import SamplingParams


@runtime_checkable
class Tokenizer(Protocol):
    """What is needed of a model's tokenizer."""

    @property
    def special_ids(self) -> frozenset[int]: ...
    def piece_bytes(self, token_id: int) -> bytes: ...
    def encode(self, text: str, *, add_bos: bool = True) -> list[int]: ...


@dataclass(frozen=True)
class Middle:
    """A text that may fill the gap.

    Attributes:
        choice: what is returned if it is the best.
        ids: what is scored, between prompt and suffix: the ids as they were generated, without one
            that ended the text.
    """

    choice: Choice
    ids: tuple[int, ...]


def middles_of(
    tokenizer: Tokenizer, params: SamplingParams, candidate: Choice, *, most: int
) -> list[Middle]:
    """What a candidate offers, the shortest text first and the whole last.

    A text is cut between two tokens, never within a character, and not before `min_tokens`. Of
    more places than are wanted, those are kept that are spaced most evenly over the tokens, the
    first of them, which leaves no text at all if `min_tokens` is 0, always among them.

    Args:
        tokenizer: of the model that made the candidate.
        params: what it was made with.
        candidate: with the log-probability of every token.
        most: texts to give; 1 gives the whole alone.
    """
    cuts = list(_cuts(tokenizer, candidate, skips_special=params.skip_special_tokens))
    count, text = cuts[-1]
    # A stop string may begin or end within a token, and a text may break off within a character.
    rest = tokenizer.encode(candidate.text[len(text) :], add_bos=False)
    whole = Middle(candidate, (*candidate.token_ids[:count], *rest))
    inner = [cut for cut in cuts if cut[0] >= params.min_tokens and cut[1] != candidate.text]
    return [*(_shortened(candidate, *cut) for cut in _thinned(inner, most - 1)), whole]


def _cuts(
    tokenizer: Tokenizer, candidate: Choice, *, skips_special: bool
) -> Iterator[tuple[int, str]]:
    """How many tokens make a beginning of the candidate's text, and which."""
    decoder, text = codecs.getincrementaldecoder("utf-8")("replace"), ""
    # The id that ended a text is no part of it.
    ids = candidate.token_ids[:-1] if isinstance(candidate.stop, int) else candidate.token_ids
    yield 0, ""
    for count, token_id in enumerate(ids, 1):
        if not (skips_special and token_id in tokenizer.special_ids):
            text += decoder.decode(tokenizer.piece_bytes(token_id))
        if len(text) > len(candidate.text):
            return
        if not decoder.getstate()[0]:
            yield count, text


def _thinned(cuts: Sequence[tuple[int, str]], most: int) -> list[tuple[int, str]]:
    if len(cuts) <= most:
        return list(cuts)
    # The whole text stands behind the last of them.
    return [cuts[number * len(cuts) // most] for number in range(most)]


def _shortened(candidate: Choice, count: int, text: str) -> Middle:
    ids, logprobs = candidate.token_ids[:count], candidate.logprobs
    assert logprobs is not None, "candidates are made with them"
    mean = sum(entry.logprob for entry in logprobs[:count]) / count if count else None
    choice = replace(
        candidate,
        text=text,
        token_ids=ids,
        logprobs=logprobs[:count],
        finish_reason="stop",
        stop=None,
        mean_logprob=mean,
    )
    return Middle(choice, ids)
