"""What a request may say beyond OpenAI's contract: fields that other servers made common.

Owns the second table of the contract, and the names that are known but not carried.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from refimpl.server.errors import refusal
from refimpl.server.schema import Fields, Integer, Number, TokenId, TokenIds

# Every name that clients of other servers send and that means nothing here, with the values that
# ask for nothing. null does so for all of them.
NOT_CARRIED: dict[str, tuple[object, ...]] = {
    "cache_salt": (),
    "documents": (),
    "kv_transfer_params": (),
    "length_penalty": (1,),
    "logprob_token_ids": ([],),
    "priority": (0,),
    "prompt_embeds": (),
    "repetition_detection": (),
    "response_format": ({"type": "text"},),
    "session_id": (),
    "spaces_between_special_tokens": (True,),
    "stream_interval": (1,),
    "structured_outputs": (),
    "thinking_token_budget": (),
    "use_beam_search": (False,),
    "vllm_xargs": (),
}


class Extensions(Fields):
    """Fields that are no part of OpenAI's contract."""

    ignore_eos: bool = Field(default=False, description="Go on behind an end of text.")
    repetition_penalty: Number = Field(
        default=1.0,
        gt=0,
        description="Divides the positive logits of tokens in prompt and output, and multiplies "
        "the negative ones.",
    )
    top_k: Integer = Field(
        default=0,
        ge=-1,
        description="Draw from so many of the likeliest tokens; 0 and -1 from all.",
    )
    min_p: Number = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Draw from tokens at least this likely, next to the likeliest.",
    )
    min_tokens: Integer = Field(
        default=0, ge=0, description="Draw no end of text before there are so many tokens."
    )
    stop_token_ids: list[TokenId] = Field(
        default_factory=list[int], fail_fast=True, description="Ids that end the text."
    )
    include_stop_str_in_output: bool = Field(
        default=False, description="Leave the stop string in the text."
    )
    skip_special_tokens: bool = Field(
        default=True, description="Leave control tokens out of the text."
    )
    add_special_tokens: bool = Field(
        default=True, description="Begin the ids of a text with the model's beginning of text."
    )
    truncate_prompt_tokens: Integer | None = Field(
        default=None,
        ge=-1,
        description="Keep at most so many tokens of each prompt; -1 as many as leave room for "
        "max_tokens.",
    )
    truncation_side: Literal["left", "right"] = Field(
        default="left", description="The side on which the tokens of a longer prompt are dropped."
    )
    allowed_token_ids: TokenIds | None = Field(
        default=None, description="Only these ids are drawn."
    )
    bad_words: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list[str],
        fail_fast=True,
        description="Words that are one token each, and are not drawn.",
    )
    prompt_logprobs: Integer | None = Field(
        default=None,
        ge=0,
        description="Give the log-probability of each prompt token, and of so many of the "
        "likeliest in its place. Above 0 not with stream.",
    )
    return_token_ids: bool = Field(default=False, description="Give ids besides the text.")
    return_tokens_as_token_ids: bool = Field(
        default=False, description="Spell tokens `token_id:N`, which no two of them share."
    )
    request_id: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9_.:-]{1,128}$",
        description="The reply's id, behind `cmpl-`.",
    )


def refuse_not_carried(data: dict[str, Any]) -> dict[str, Any]:
    """What is left of a request without the fields that are known and ask for nothing.

    Raises:
        Problem: 400, if one asks for something.
    """
    for name in NOT_CARRIED.keys() & data.keys():
        value = data[name]
        if value is not None and not any(_is_same(value, neutral) for neutral in NOT_CARRIED[name]):
            raise refusal(f"'{name}' is not supported by this server: leave it out", name)
    return {name: value for name, value in data.items() if name not in NOT_CARRIED}


def _is_same(value: object, neutral: object) -> bool:
    """Equal, and of one type: 0 is not False."""
    return type(value) is type(neutral) and value == neutral
