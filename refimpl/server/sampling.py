"""From a request's fields to the engine's parameters.

Owns what needs the vocabulary for that: the ids of `logit_bias` and the words of `bad_words`.
"""

from collections.abc import Iterator

from refimpl.engine.request import SamplingParams
from refimpl.errors import TokenizerError
from refimpl.server.contract import CompletionRequest
from refimpl.server.errors import refusal
from refimpl.server.schema import brief
from refimpl.server.vocabulary import Tokenizer


def sampling_params(
    request: CompletionRequest, tokenizer: Tokenizer, *, vocab_size: int, seed: int
) -> SamplingParams:
    """The parameters for each of the request's prompts.

    Args:
        request: what was asked.
        tokenizer: knows the ids of words.
        vocab_size: ids are below it.
        seed: the request's own, or a fresh one, so that all of its prompts share it.

    Raises:
        Problem: 400, naming the field.
        InvalidRequestError: naming the field.
    """
    candidates = request.num_candidates
    return SamplingParams(
        max_tokens=request.max_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        min_p=request.min_p,
        frequency_penalty=request.frequency_penalty,
        presence_penalty=request.presence_penalty,
        repetition_penalty=request.repetition_penalty,
        logit_bias=_bias(request, vocab_size),
        allowed_token_ids=_optional_tuple(request.allowed_token_ids),
        banned_token_ids=tuple(_banned(request.bad_words, tokenizer)),
        min_tokens=request.min_tokens,
        stop=request.stops,
        stop_token_ids=tuple(request.stop_token_ids),
        ignore_eos=request.ignore_eos,
        include_stop_str_in_output=request.include_stop_str_in_output,
        skip_special_tokens=request.skip_special_tokens,
        seed=seed,
        n=request.n,
        best_of=candidates if candidates > request.n else None,
        logprobs=request.logprobs,
    )


def _optional_tuple(ids: list[int] | None) -> tuple[int, ...] | None:
    return None if ids is None else tuple(ids)


def _bias(request: CompletionRequest, vocab_size: int) -> dict[int, float]:
    most = len(str(vocab_size))
    bias = dict[int, float]()
    for key, value in request.logit_bias.items():
        digits = key.lstrip("0") or "0"
        if len(digits) > most or int(digits) >= vocab_size:
            raise refusal(
                f"Invalid key in 'logit_bias': {brief(key)}. Maximum value is {vocab_size - 1}.",
                "logit_bias",
            )
        if int(digits) in bias:
            raise refusal(f"'logit_bias' names id {digits} twice", "logit_bias")
        bias[int(digits)] = value
    return bias


def _banned(words: list[str], tokenizer: Tokenizer) -> Iterator[int]:
    """The ids of words, at the beginning of a text and behind a space.

    A ban works on single tokens. A spelling of several is banned only with one of its tokens, so
    one without any cannot be.
    """
    for word in words:
        bare = word.lstrip(" ")
        try:
            spellings = [tokenizer.encode(each, add_bos=False) for each in (bare, f" {bare}")]
        except TokenizerError as error:
            raise refusal(f"bad_words: {error}", "bad_words") from None
        single = {ids[0] for ids in spellings if len(ids) == 1}
        if not bare or any(single.isdisjoint(ids) for ids in spellings):
            longest = max(len(ids) for ids in spellings)
            raise refusal(
                f"'bad_words' takes words of one token, and {brief(word)} has {longest}: use "
                "'logit_bias' with -100 on those of its tokens that shall not occur",
                "bad_words",
            )
        yield from sorted(single)
