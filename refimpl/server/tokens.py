"""`POST /tokenize`, `POST /detokenize` and `GET /tokenizer_info`, as vLLM has them."""

import asyncio
from typing import NotRequired, TypedDict

from pydantic import Field

from refimpl.errors import TokenizerError
from refimpl.server.errors import model_not_found, refusal
from refimpl.server.lifecycle import Service
from refimpl.server.schema import Fields, TokenId, parse


class TokenizeRequest(Fields):
    """A text to be encoded."""

    prompt: str = Field(description="The text.")
    model: str | None = Field(default=None, description="A name that `GET /v1/models` lists.")
    add_special_tokens: bool = Field(
        default=True, description="Begin with the model's beginning of text."
    )
    return_token_strs: bool = Field(
        default=False, description="Give the pieces as the vocabulary spells them, too."
    )


class DetokenizeRequest(Fields):
    """Ids to be decoded."""

    tokens: list[TokenId] = Field(fail_fast=True, description="The ids.")
    model: str | None = Field(default=None, description="A name that `GET /v1/models` lists.")


class Tokens(TypedDict):
    """A text as ids.

    Attributes:
        count: how many there are.
        max_model_len: most tokens of prompt and completion together.
        tokens: the ids.
        token_strs: their pieces, if asked for.
    """

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: NotRequired[list[str]]


class Text(TypedDict):
    """The text of ids, control tokens spelt."""

    prompt: str


class TokenizerInfo(TypedDict):
    """What a client needs to encode by itself.

    Attributes:
        tokenizer_class: always "GemmaTokenizer".
        vocab_size: ids are below it.
        bos_token: begins every text.
        eos_token: ends a text.
        eos_token_ids: of all that end a text.
        pad_token: fills up a batch.
        unk_token: stands for nothing; every byte has a token.
        chat_template: always null: a completion's prompt is taken as it is.
    """

    tokenizer_class: str
    vocab_size: int
    bos_token: str
    eos_token: str
    eos_token_ids: list[int]
    pad_token: str
    unk_token: str
    chat_template: None


async def tokenize(service: Service, body: object) -> Tokens:
    """The ids of a text.

    Raises:
        Problem: 400, 404, 503.
    """
    asked = parse(TokenizeRequest, body)
    _check_name(service, asked.model)
    engine = service.engine
    tokenizer = engine.gemma.tokenizer
    try:
        # A long text would keep the event loop from everybody else.
        ids = await asyncio.to_thread(
            tokenizer.encode, asked.prompt, add_bos=asked.add_special_tokens
        )
    except TokenizerError as error:
        raise refusal(str(error), "prompt") from None
    tokens = Tokens(count=len(ids), max_model_len=engine.context, tokens=ids)
    if asked.return_token_strs:
        tokens["token_strs"] = [tokenizer.piece(token_id) for token_id in ids]
    return tokens


def detokenize(service: Service, body: object) -> Text:
    """The text of ids.

    Raises:
        Problem: 400, 404, 503.
    """
    asked = parse(DetokenizeRequest, body)
    _check_name(service, asked.model)
    try:
        return Text(prompt=service.engine.gemma.tokenizer.decode(asked.tokens))
    except TokenizerError as error:
        raise refusal(str(error), "tokens") from None


def tokenizer_info(service: Service) -> TokenizerInfo:
    """About the tokenizer.

    Raises:
        Problem: 503, there is no model yet.
    """
    gemma = service.engine.gemma
    tokenizer = gemma.tokenizer
    return TokenizerInfo(
        tokenizer_class="GemmaTokenizer",
        vocab_size=tokenizer.vocab_size,
        bos_token=tokenizer.piece(tokenizer.bos_id),
        eos_token=tokenizer.piece(gemma.eos_ids[0]),
        eos_token_ids=list(gemma.eos_ids),
        pad_token=tokenizer.piece(tokenizer.pad_id),
        unk_token=tokenizer.piece(tokenizer.unk_id),
        chat_template=None,
    )


def _check_name(service: Service, name: str | None) -> None:
    if name is not None and name not in service.names:
        raise model_not_found(name)
