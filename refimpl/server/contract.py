"""The request of `POST /v1/completions`: one schema for parsing, for OpenAPI and for the docs page.

Owns names, types, ranges and defaults, and what the server's settings cap. What needs the model -
ids of the vocabulary, the length of the context - is in `prompts` and `sampling`.
"""

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field, field_validator

from refimpl.server.errors import Problem, refusal
from refimpl.server.extensions import Extensions, refuse_not_carried
from refimpl.server.schema import Fields, Integer, Number, TokenIds, brief, parse
from refimpl.server.settings import ServerSettings

PromptForm = (
    str
    | Annotated[list[str], Field(min_length=1, fail_fast=True)]
    | TokenIds
    | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)]
)
StopString = Annotated[str, Field(min_length=1)]


class StreamOptions(Fields):
    """How a stream is sent."""

    include_usage: bool = Field(
        default=False, description="Send one more chunk at the end, with the usage and no choices."
    )
    include_obfuscation: bool = Field(
        default=False,
        description="Give every chunk a string of random length, so that who sees only sizes does "
        "not learn those of the tokens.",
    )
    continuous_usage_stats: bool = Field(
        default=False, description="Give the usage so far in every chunk. Not of OpenAI's contract."
    )


class CompletionRequest(Extensions):
    """Text to go on from, and how."""

    model: str = Field(description="A name that `GET /v1/models` lists.")
    prompt: PromptForm | None = Field(
        default=None,
        description="A text, texts, ids or lists of ids. Texts begin with the model's beginning of "
        "text; ids are taken as they are. Nothing, or an empty text, is a new document.",
    )
    best_of: Integer = Field(
        default=0,
        ge=0,
        le=20,
        description="Candidates for each prompt, of which the n with the highest mean "
        "log-probability of a token are the choices. 0 is n. Above n not with stream.",
    )
    echo: bool = Field(default=False, description="Begin the text with the prompt.")
    frequency_penalty: Number = Field(
        default=0.0, ge=-2, le=2, description="Subtracted from a logit for each time it was drawn."
    )
    logit_bias: dict[
        Annotated[str, Field(pattern=r"^[0-9]+$")], Annotated[Number, Field(ge=-100, le=100)]
    ] = Field(
        default_factory=dict[str, float],
        description="Added to the logits of ids, which are decimal strings.",
    )
    logprobs: Integer | None = Field(
        default=None,
        ge=0,
        description="Give each token's log-probability, and of so many of the likeliest in its "
        "place. The token that ends a text is one of them, unless the server is set otherwise.",
    )
    max_tokens: Integer = Field(
        default=16, ge=0, description="Most tokens to generate for each choice."
    )
    n: Integer = Field(default=1, ge=1, le=128, description="Choices for each prompt.")
    presence_penalty: Number = Field(
        default=0.0, ge=-2, le=2, description="Subtracted from a logit once it was drawn."
    )
    seed: Integer | None = Field(
        default=None, ge=-(2**63), le=2**63 - 1, description="The same seed gives the same answer."
    )
    stop: StopString | Annotated[list[StopString], Field(fail_fast=True)] = Field(
        default_factory=list[str], description="Texts, each of which ends the text before it."
    )
    stream: bool = Field(
        default=False, description="Send the text while it is made, as server-sent events."
    )
    stream_options: StreamOptions | None = Field(default=None, description="Only with stream.")
    suffix: str = Field(
        default="",
        description="Text that comes after the completion. For a model that was not trained to "
        "fill gaps, several completions are drawn and cut, each is scored with the suffix behind "
        "it, and the likeliest is kept; a stream has it in one piece at the end.",
    )
    temperature: Number = Field(
        default=1.0, ge=0, le=2, description="Divides the logits; 0 draws the likeliest token."
    )
    top_p: Number = Field(
        default=1.0,
        ge=0,
        le=1,
        description="Draw from the fewest tokens that are this likely together.",
    )
    user: str = Field(default="", description="A name of the end user, for the server's log.")

    @property
    def num_candidates(self) -> int:
        """Texts to make for each prompt."""
        return self.best_of or self.n

    @property
    def stops(self) -> tuple[str, ...]:
        """Every stop string."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def num_prompts(self) -> int:
        """Prompts in the request."""
        if isinstance(self.prompt, list) and not isinstance(self.prompt[0], int):
            return len(self.prompt)
        return 1

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _check_keys(cls, bias: object) -> object:
        if isinstance(bias, dict):
            for key in bias:
                if not (isinstance(key, str) and key.isascii() and key.isdecimal()):
                    raise ValueError(
                        f"Invalid key in 'logit_bias': {brief(key)}. You should only be submitting "
                        "non-negative integers."
                    )
        return bias


def parse_request(data: object, settings: ServerSettings) -> tuple[CompletionRequest, list[str]]:
    """Read a body; gives the request, and the names of fields that were ignored.

    Raises:
        Problem: 400, naming the field at fault.
    """
    ignored = list[str]()
    if isinstance(data, dict):
        data = refuse_not_carried(data)
        ignored = [name for name in data if name not in CompletionRequest.model_fields]
        if settings.unknown_fields == "ignore":
            data = {name: value for name, value in data.items() if name not in ignored}
        elif ignored:
            raise _unrecognized(ignored)
    request = parse(CompletionRequest, data)
    _check_together(request)
    _check_caps(request, settings)
    return request, ignored


def _unrecognized(names: list[str]) -> Problem:
    arguments = "argument" if len(names) == 1 else "arguments"
    # So many names are enough to see what is wrong.
    listed = ", ".join(f"{name:.60}" for name in names[:10])
    return refusal(f"Unrecognized request {arguments} supplied: {listed}", names[0])


def _check_together(request: CompletionRequest) -> None:
    n, best_of = request.n, request.num_candidates
    if n > best_of:
        raise refusal(
            f"you must set 'n' ({n}) to be at most 'best_of' ({best_of}): raise 'best_of', or "
            "leave it out",
            "best_of",
        )
    if request.stream and best_of > n:
        raise refusal(
            f"'best_of' ({best_of}) above 'n' ({n}) cannot be streamed: which candidates are best "
            "is known at the end. Leave out 'stream' or 'best_of'",
            "best_of",
        )
    if request.stream_options is not None and not request.stream:
        raise refusal("'stream_options' goes with 'stream': true only", "stream_options")
    if request.stream and request.prompt_logprobs:
        raise refusal(
            "'prompt_logprobs' above 0 cannot be streamed: leave out 'stream', or use 'echo' with "
            "'logprobs'",
            "prompt_logprobs",
        )
    if request.min_tokens > request.max_tokens:
        raise refusal(
            f"'min_tokens' ({request.min_tokens}) must be at most 'max_tokens' "
            f"({request.max_tokens})",
            "min_tokens",
        )


def _check_caps(request: CompletionRequest, settings: ServerSettings) -> None:
    for name, what, value, most in _capped(request, settings):
        if value > most:
            raise refusal(f"{what}{value} is greater than the maximum of {most} - '{name}'", name)
    if request.num_prompts > settings.max_prompts:
        raise refusal(
            f"{request.num_prompts} prompts are more than the {settings.max_prompts} that this "
            "server takes in one request - 'prompt'",
            "prompt",
        )
    candidates = request.num_prompts * request.num_candidates
    if candidates > settings.max_candidates:
        blamed = "best_of" if request.best_of else "n"
        raise refusal(
            f"{request.num_prompts} prompts with {request.num_candidates} candidates each are "
            f"{candidates} texts, and this server makes at most {settings.max_candidates} for one "
            f"request - '{blamed}'",
            blamed if request.num_candidates > 1 else "prompt",
        )


def _capped(
    request: CompletionRequest, settings: ServerSettings
) -> Iterator[tuple[str, str, int, int]]:
    """Fields, what of them is counted, how much of it there is, and the most that may be."""
    yield "logprobs", "", request.logprobs or 0, settings.max_logprobs
    yield "prompt_logprobs", "", request.prompt_logprobs or 0, settings.max_logprobs
    yield "stop", "a number of strings of ", len(request.stops), settings.max_stop
    for stop in request.stops:
        yield "stop", "a length of ", len(stop), settings.max_stop_length
    yield "logit_bias", "a number of entries of ", len(request.logit_bias), settings.max_logit_bias
    yield "user", "a length of ", len(request.user), settings.max_user_length
