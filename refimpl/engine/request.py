"""What a caller asks of the engine.

Owns the meaning and the limits of every parameter. It knows no HTTP, no tokenizer and no device;
what comes back is in `refimpl.engine.events`.

Processing of the logits, in this order: raw logits (whose log-softmax is what every log-probability
here means), logit_bias, penalties, masks (allowed, banned, min_tokens), temperature, top_k, top_p,
min_p, draw.
"""

import reprlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from refimpl.errors import InvalidRequestError

MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 20


class _Limits(NamedTuple):
    low: int | float
    high: int | float
    advice: str

    def hold(self, value: int | float) -> bool:
        return self.low <= value <= self.high  # Never true of not-a-number.


# Counts are 32-bit on the device.
_MOST = 2**31 - 1
_TOP = _Limits(0, MAX_TOP_LOGPROBS, "0 gives the token's own alone, None gives none")

_INTEGERS = {
    "max_tokens": _Limits(0, _MOST, "0 generates nothing"),
    "min_tokens": _Limits(0, _MOST, "0 lets the text end at once"),
    "top_k": _Limits(-1, _MOST, "0 or -1 keeps every token"),
    "n": _Limits(1, MAX_CHOICES, "for more choices send more requests"),
}
_OPTIONAL_INTEGERS = {
    "best_of": _Limits(1, MAX_CHOICES, "None makes as many candidates as choices"),
    "logprobs": _TOP,
    "seed": _Limits(-(2**63), 2**63 - 1, "None draws a fresh one"),
}
_NUMBERS = {
    "temperature": _Limits(0, 2, "0 takes the likeliest token"),
    "top_p": _Limits(0, 1, "1 keeps every token, 0 the likeliest"),
    "min_p": _Limits(0, 1, "0 keeps every token"),
    "frequency_penalty": _Limits(-2, 2, "0 is none"),
    "presence_penalty": _Limits(-2, 2, "0 is none"),
    # Any above 0 whose inverse is a normal float32 too, since it divides and multiplies.
    "repetition_penalty": _Limits(1e-37, 1e37, "1 is none"),
}
_FLAGS = ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens")
_BIAS = _Limits(-100, 100, "-100 all but bans a token, 100 all but forces it")
_ID = _Limits(0, _MOST, "give ids of the model's vocabulary")
_DEADLINE = _Limits(-(2.0**53), 2.0**53, "None sets none")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen, when a text ends, and how many texts there are.

    Attributes:
        max_tokens: most tokens to generate for each choice.
        temperature: divides the logits; 0 takes the largest, the lowest id on ties. At most 2.
        top_p: keep the smallest set of tokens with at least this probability; 0 keeps one token.
        top_k: keep this many tokens; 0 and -1 keep all.
        min_p: keep tokens with at least this fraction of the likeliest one's probability.
        frequency_penalty: subtracted for each time that the token was generated; -2 to 2.
        presence_penalty: subtracted once if the token was generated at all; -2 to 2.
        repetition_penalty: of tokens in prompt or output, positive logits are divided by it and
            negative ones multiplied; above 0, and 1 is none.
        logit_bias: added to the logits of ids; -100 to 100.
        allowed_token_ids: only these are drawn; None allows all.
        banned_token_ids: these are never drawn.
        min_tokens: ids that end the text are not drawn before there are so many tokens. A stop
            string ends it nevertheless.
        stop: strings, each of which ends the text where it first occurs in it.
        stop_token_ids: ids that end the text, as those of an end of text do.
        ignore_eos: the model's own ends of text end nothing.
        include_stop_str_in_output: the text includes the stop string that ended it.
        skip_special_tokens: control pieces leave nothing in the text.
        seed: signed 64-bit; with it, the request has the same answer always. None draws one.
        n: number of choices, 1 to 128.
        best_of: number of candidates to pick the n choices from, n to 128; None makes n.
        logprobs: give each token's log-probability, and of the so many likeliest at its place,
            0 to 20. None gives none.
    """

    # Arguments are checked below, so a type checker at run time need not refuse them before.
    __no_type_check__ = True

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float], hash=False)
    allowed_token_ids: tuple[int, ...] | None = None
    banned_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    seed: int | None = None
    n: int = 1
    best_of: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        """Refuse what has the wrong type or is out of range, and bring the rest into one form.

        A whole number does for a float, and a list for a tuple.

        Raises:
            InvalidRequestError: naming the parameter.
        """
        for name, limits in _INTEGERS.items():
            self._set(name, _integer(name, getattr(self, name), limits))
        for name, limits in _OPTIONAL_INTEGERS.items():
            if getattr(self, name) is not None:
                self._set(name, _integer(name, getattr(self, name), limits))
        for name, limits in _NUMBERS.items():
            self._set(name, _number(name, getattr(self, name), limits))
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise _refusal(name, getattr(self, name), "be True or False")
        self._set("logit_bias", _bias(self.logit_bias))
        for name in ("banned_token_ids", "stop_token_ids"):
            self._set(name, _ids(name, getattr(self, name)))
        if self.allowed_token_ids is not None:
            self._set("allowed_token_ids", _ids("allowed_token_ids", self.allowed_token_ids))
        self._set("stop", _stops(self.stop))
        self._check_together()

    @property
    def num_candidates(self) -> int:
        """How many texts are generated."""
        return self.n if self.best_of is None else self.best_of

    def check_vocabulary(
        self,
        vocab_size: int,
        *,
        eos_ids: Collection[int] = (),
        suppressed_ids: Collection[int] = (),
    ) -> None:
        """Hold the ids against a vocabulary, and see that there is always a token to draw.

        Args:
            vocab_size: ids are below it.
            eos_ids: the model's own ends of text.
            suppressed_ids: what the model never draws.

        Raises:
            InvalidRequestError: naming the parameter.
        """
        named = {
            "logit_bias": self.logit_bias,
            "allowed_token_ids": self.allowed_token_ids or (),
            "banned_token_ids": self.banned_token_ids,
            "stop_token_ids": self.stop_token_ids,
        }
        for name, ids in named.items():
            _check_ids(name, ids, vocab_size)
        barred = {*self.banned_token_ids, *suppressed_ids}
        if self.min_tokens > 0:
            barred |= {*self.stop_token_ids, *(() if self.ignore_eos else eos_ids)}
        if self.allowed_token_ids is None:
            left = vocab_size - len(barred)
        else:
            left = len(set(self.allowed_token_ids) - barred)
        if left == 0:
            raise InvalidRequestError(
                "banned_token_ids and min_tokens leave no token to draw: ban fewer ids, allow "
                "more, or set min_tokens to 0",
                parameter="banned_token_ids" if self.min_tokens == 0 else "min_tokens",
            )

    def _check_together(self) -> None:
        if self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                f"min_tokens must be at most max_tokens, {self.max_tokens}, got {self.min_tokens}: "
                "lower it or raise max_tokens",
                parameter="min_tokens",
            )
        if self.best_of is not None and self.best_of < self.n:
            raise InvalidRequestError(
                f"best_of must be at least n, {self.n}, got {self.best_of}: raise it, lower n, or "
                "leave best_of out",
                parameter="best_of",
            )
        if self.allowed_token_ids == ():
            raise _refusal(
                "allowed_token_ids", (), "hold at least one id, or be None to allow every token"
            )

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt, and what to do with it.

    Attributes:
        prompt_ids: the prompt as it is fed to the model; nothing is put in front.
        params: how to go on from it.
        prompt_logprobs: score the prompt too: each token's log-probability given those before it,
            and of the so many likeliest at its place, 0 to 20. None does not.
        deadline: in seconds of `time.monotonic`; what is not finished by then ends. None never.
        id: for logs.
    """

    __no_type_check__ = True  # As above.

    prompt_ids: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    prompt_logprobs: int | None = None
    deadline: float | None = None
    id: str = ""

    def __post_init__(self) -> None:
        """Refuse what has the wrong type or is out of range.

        Raises:
            InvalidRequestError: naming the parameter, which is "prompt" for the ids.
        """
        object.__setattr__(self, "prompt_ids", _ids("prompt", self.prompt_ids))
        if not self.prompt_ids:
            raise InvalidRequestError(
                "the prompt is empty: give at least one token", parameter="prompt"
            )
        if self.prompt_logprobs is not None:
            count = _integer("prompt_logprobs", self.prompt_logprobs, _TOP)
            object.__setattr__(self, "prompt_logprobs", count)
        if self.deadline is not None:
            deadline = _number("deadline", self.deadline, _DEADLINE)
            object.__setattr__(self, "deadline", deadline)

    def check(
        self,
        vocab_size: int,
        context_length: int,
        *,
        eos_ids: Collection[int] = (),
        suppressed_ids: Collection[int] = (),
    ) -> None:
        """Hold the request against a model.

        Args:
            vocab_size: ids are below it.
            context_length: most tokens of prompt and output together that the engine takes; the
                model may take more.
            eos_ids: the model's own ends of text.
            suppressed_ids: what the model never draws.

        Raises:
            InvalidRequestError: naming the parameter.
        """
        _check_ids("prompt", self.prompt_ids, vocab_size)
        self.params.check_vocabulary(vocab_size, eos_ids=eos_ids, suppressed_ids=suppressed_ids)
        num_prompt, max_tokens = len(self.prompt_ids), self.params.max_tokens
        if num_prompt + max_tokens > context_length:
            raise InvalidRequestError(
                f"the engine's context is {context_length} tokens; the prompt has {num_prompt} and "
                f"max_tokens is {max_tokens}: shorten one of them",
                parameter="prompt" if num_prompt > context_length else "max_tokens",
            )


def _integer(name: str, value: object, limits: _Limits, *, subject: str = "") -> int:
    plain = value.item() if isinstance(value, np.generic) else value
    # A bool is a number to Python, but never what somebody means by one.
    if isinstance(plain, int) and not isinstance(plain, bool) and limits.hold(plain):
        return plain
    wanted = f"be an integer from {limits.low} to {limits.high}"
    raise _refusal(name, value, wanted, advice=limits.advice, subject=subject)


def _number(name: str, value: object, limits: _Limits, *, subject: str = "") -> float:
    plain = value.item() if isinstance(value, np.generic) else value
    if isinstance(plain, int | float) and not isinstance(plain, bool) and limits.hold(plain):
        return float(plain)
    wanted = f"be a number from {limits.low} to {limits.high}"
    raise _refusal(name, value, wanted, advice=limits.advice, subject=subject)


def _ids(name: str, values: object) -> tuple[int, ...]:
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise _refusal(name, values, "be a tuple of token ids")
    return tuple(_integer(name, value, _ID, subject=f"an id of {name}") for value in values)


def _bias(values: object) -> dict[int, float]:
    name = "logit_bias"
    if not isinstance(values, Mapping):
        raise _refusal(name, values, "map token ids to numbers")
    return {
        _integer(name, token_id, _ID, subject=f"an id of {name}"): _number(
            name, value, _BIAS, subject=f"a value of {name}"
        )
        for token_id, value in values.items()
    }


def _stops(values: object) -> tuple[str, ...]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise _refusal("stop", values, "be a tuple of strings, also for a single one")
    strings = tuple(values)
    for value in strings:
        if not isinstance(value, str) or not value:
            raise _refusal("stop", value, "hold strings of at least one character")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise _refusal("stop", value, "hold Unicode text; no text has a lone surrogate in it")
    return strings


def _check_ids(name: str, ids: Iterable[int], vocab_size: int) -> None:
    strange = next((i for i in ids if not 0 <= i < vocab_size), None)
    if strange is not None:
        raise InvalidRequestError(
            f"{name} has token id {strange}, which is outside the vocabulary of {vocab_size}: give "
            f"ids from 0 to {vocab_size - 1}",
            parameter=name,
        )


def _refusal(
    name: str, value: object, wanted: str, *, advice: str = "", subject: str = ""
) -> InvalidRequestError:
    if isinstance(value, int) and value.bit_length() > 64:
        # Python refuses to spell the largest integers, and a log wants none of them.
        got = f"an integer of {value.bit_length()} bits"
    else:
        got = reprlib.repr(value)
    message = f"{subject or name} must {wanted}, got {got}"
    return InvalidRequestError(f"{message}; {advice}" if advice else message, parameter=name)
