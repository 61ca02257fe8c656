"""The objects of a reply, whole or chunk by chunk.

Owns their names and their order of fields. The types are what `/openapi.json` shows.
"""

import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NotRequired, TypedDict

from refimpl.server.choices import Piece
from refimpl.server.logprobs import Logprobs, PromptLogprob

OBJECT = "text_completion"


class PromptTokensDetails(TypedDict):
    """What became of the prompts' tokens.

    Attributes:
        cached_tokens: that were not computed, as the prefix cache had them; of each prompt once.
    """

    cached_tokens: int


class Usage(TypedDict):
    """What a request took.

    Attributes:
        prompt_tokens: of each prompt once, however many choices there are.
        completion_tokens: generated for all candidates, those not chosen included.
        total_tokens: both.
        prompt_tokens_details: of those of the prompts.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class ReplyChoice(TypedDict):
    """One text, or in a chunk more of it.

    Attributes:
        text: without the prompt, unless that is echoed.
        index: its prompt's number times n, and its own.
        logprobs: null if they were not asked for.
        finish_reason: null in a chunk with more to come.
        token_ids: those generated, if asked for.
        prompt_token_ids: with them, the prompt; of a stream in a choice's first chunk.
        prompt_logprobs: of each prompt token, if asked for; of a stream in a choice's first chunk.
    """

    text: str
    index: int
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length", "content_filter"] | None
    token_ids: NotRequired[list[int]]
    prompt_token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[list[dict[str, PromptLogprob] | None]]


class Reply(TypedDict):
    """A completion, or a chunk of one.

    Attributes:
        id: of the completion, the same in all of its chunks.
        object: always "text_completion".
        created: in seconds of Unix time.
        model: the name that was asked for.
        system_fingerprint: of all that makes the numbers: with it, a seed gives the same answer.
        choices: in the order of their index; one in a chunk, and none in that with the usage.
        usage: in chunks only if asked for, and null before the end.
        obfuscation: noise that hides the length of a chunk, if asked for.
    """

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ReplyChoice]
    usage: NotRequired[Usage | None]
    obfuscation: NotRequired[str]


@dataclass(frozen=True, kw_only=True)
class Head:
    """What all chunks of a reply have in common.

    Attributes:
        id: of the completion.
        created: in seconds of Unix time.
        model: the name that was asked for.
        fingerprint: of the server.
    """

    id: str
    created: int
    model: str
    fingerprint: str

    def reply(self, choices: Iterable[Piece]) -> Reply:
        """A reply, or a chunk, with these choices and no usage."""
        return Reply(
            id=self.id,
            object=OBJECT,
            created=self.created,
            model=self.model,
            system_fingerprint=self.fingerprint,
            choices=[_choice(piece) for piece in choices],
        )


def completion_id(request_id: str | None) -> str:
    """The id of a reply: a new one, unless the client named it."""
    return f"cmpl-{request_id or secrets.token_hex(16)}"


def usage(*, prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> Usage:
    """The usage of a whole request."""
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=cached_tokens),
    )


def _choice(piece: Piece) -> ReplyChoice:
    choice = ReplyChoice(
        text=piece.text,
        index=piece.index,
        logprobs=piece.logprobs,
        finish_reason=piece.finish_reason,
    )
    if piece.token_ids is not None:
        choice["token_ids"] = piece.token_ids
    if piece.prompt_ids is not None:
        choice["prompt_token_ids"] = piece.prompt_ids
    if piece.prompt_logprobs is not None:
        choice["prompt_logprobs"] = piece.prompt_logprobs
    return choice
