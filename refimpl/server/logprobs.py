"""The `logprobs` object: tokens as text, where they begin, how likely they were.

Owns the spelling of tokens and the arithmetic of `text_offset`, which counts code points from the
start of the prompt, echoed or not.
"""

import codecs
from collections.abc import Collection, Iterable
from typing import NamedTuple, TypedDict

from refimpl.engine.events import TokenLogprob
from refimpl.server.vocabulary import Tokenizer

# What stands for minus infinity, which JSON has no word for.
LEAST = -9999.0


class Logprobs(TypedDict):
    """Four lists of equal length, an entry for each token.

    Attributes:
        tokens: each one's text; `bytes:` and each byte as `\\xNN` where that is no whole character.
        token_logprobs: natural logarithms; null for the first token of a prompt.
        top_logprobs: the likeliest in the token's place and the token itself, by their text. Of
            two with the same text it is the likelier. Null for the first token of a prompt.
        text_offset: of the character that the token begins with or in.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(TypedDict):
    """What `prompt_logprobs` says of one id in one place.

    Attributes:
        logprob: natural logarithm.
        rank: 1 for the likeliest; null if it is not among those that were asked for.
        decoded_token: its text, as in `tokens`.
    """

    logprob: float
    rank: int | None
    decoded_token: str


class Entry(NamedTuple):
    """One token to be listed.

    Attributes:
        id: of the token.
        offset: where it begins.
        scored: how likely it was; None for the first of a prompt, or where nobody asked.
    """

    id: int
    offset: int
    scored: TokenLogprob | None


class Speller:
    """Tokens as text."""

    def __init__(self, tokenizer: Tokenizer, *, as_ids: bool) -> None:
        """A speller.

        Args:
            tokenizer: gives the bytes of a token.
            as_ids: spell all of them `token_id:N`.
        """
        self._tokenizer, self._as_ids = tokenizer, as_ids

    def spell(self, token_id: int) -> str:
        """The token's text."""
        if self._as_ids:
            return f"token_id:{token_id}"
        data = self._tokenizer.piece_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def logprobs(self, entries: Iterable[Entry], *, top: int) -> Logprobs:
        """The object for these tokens.

        Args:
            entries: in the order of the text.
            top: most of the likeliest to list in each place, besides the token itself.
        """
        listed = list(entries)
        return Logprobs(
            tokens=[self.spell(entry.id) for entry in listed],
            token_logprobs=[
                None if entry.scored is None else max(entry.scored.logprob, LEAST)
                for entry in listed
            ],
            top_logprobs=[self._top(entry.scored, top) for entry in listed],
            text_offset=[entry.offset for entry in listed],
        )

    def prompt_logprobs(
        self, scores: Iterable[TokenLogprob | None], *, top: int
    ) -> list[dict[str, PromptLogprob] | None]:
        """For each prompt token: the likeliest in its place and the token itself, by their id."""
        return [None if scored is None else self._ranked(scored, top) for scored in scores]

    def _top(self, scored: TokenLogprob | None, top: int) -> dict[str, float] | None:
        if scored is None:
            return None
        spelt = dict[str, float]()
        for token_id, logprob in (*scored.top[:top], (scored.id, scored.logprob)):
            text = self.spell(token_id)
            # Two tokens may have one text. The lower of their values would make a reader that asks
            # whether the token was the likeliest believe so when it was not.
            spelt[text] = max(spelt.get(text, LEAST), logprob)
        return spelt

    def _ranked(self, scored: TokenLogprob, top: int) -> dict[str, PromptLogprob]:
        ranked = {
            str(token_id): PromptLogprob(
                logprob=max(logprob, LEAST), rank=rank, decoded_token=self.spell(token_id)
            )
            for rank, (token_id, logprob) in enumerate(scored.top[:top], start=1)
        }
        own = PromptLogprob(
            logprob=max(scored.logprob, LEAST), rank=None, decoded_token=self.spell(scored.id)
        )
        return {**ranked, **({} if str(scored.id) in ranked else {str(scored.id): own})}


class Places:
    """Where tokens begin in the text that they make: "é" of two byte pieces is one place."""

    def __init__(self, tokenizer: Tokenizer, *, hidden: Collection[int], start: int = 0) -> None:
        """Begin a text.

        Args:
            tokenizer: gives the bytes of a token.
            hidden: ids that leave nothing in the text.
            start: where the text begins, in code points.
        """
        self._tokenizer, self._hidden = tokenizer, hidden
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._count = start

    def push(self, token_id: int) -> int:
        """The place of the next token, in code points."""
        if token_id in self._hidden:
            return self._count
        data = self._tokenizer.piece_bytes(token_id)
        pending = self._decoder.getstate()[0]
        place = self._count
        if pending and not _goes_on(pending, data[:1]):
            # What was begun stays without its end, and becomes U+FFFD before this token's own text.
            place += len(pending.decode(errors="replace"))
        self._count += len(self._decoder.decode(data))
        return place

    def end(self) -> int:
        """The place behind the last character, one without its end included."""
        return self._count + len(self._decoder.getstate()[0].decode(errors="replace"))


def _goes_on(pending: bytes, byte: bytes) -> bool:
    """Whether a byte continues the character that the pending ones begin."""
    data = pending + byte
    try:
        data.decode()
    except UnicodeDecodeError as error:
        # What begins a character and breaks off is one error, from the first byte to the last.
        return (error.start, error.end) == (0, len(data))
    return True
