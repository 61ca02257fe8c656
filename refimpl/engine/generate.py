"""One request at a time: complete a prompt, or score a text."""

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import Array
from refimpl_kernels.sampling import split_seed

from refimpl.engine.programs import (
    CHUNKS,
    SCORE_CHUNK,
    Programs,
    Sampling,
    cache_length,
    chunks_of,
    padded_chunk,
)
from refimpl.errors import InvalidRequestError
from refimpl.model.cache import KVCache
from refimpl.model.gemma import Gemma


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen.

    Attributes:
        max_tokens: most tokens to generate.
        temperature: 0 is greedy; at most 2.
        seed: 64-bit; the same seed gives the same tokens. None draws one.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
            InvalidRequestError: naming the parameter.
        """
        if self.max_tokens < 0:
            raise InvalidRequestError(
                f"max_tokens must be at least 0, got {self.max_tokens}", parameter="max_tokens"
            )
        if not 0 <= self.temperature <= 2:
            raise InvalidRequestError(
                f"temperature must be between 0 (greedy) and 2, got {self.temperature}",
                parameter="temperature",
            )
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise InvalidRequestError(
                f"seed must be a signed 64-bit integer, got {self.seed}", parameter="seed"
            )


@dataclass(frozen=True)
class Token:
    """A generated token.

    Attributes:
        id: in the vocabulary.
        logprob: its raw log-probability, before temperature.
        ends_text: whether it is one of the ids that end a text.
    """

    id: int
    logprob: float
    ends_text: bool


def generate(programs: Programs, prompt: Sequence[int], params: SamplingParams) -> Iterator[Token]:
    """Tokens after the prompt, each as soon as it is known, up to and including an end of text.

    Raises:
        InvalidRequestError: an empty prompt, an id outside the vocabulary, or more positions than
            the model's context.
    """
    gemma, ids = programs.gemma, list(prompt)
    _check(gemma, ids, max_tokens=params.max_tokens)
    return _generate(programs, ids, params)


def _generate(programs: Programs, ids: list[int], params: SamplingParams) -> Iterator[Token]:
    if params.max_tokens == 0:
        return
    gemma = programs.gemma
    length = cache_length(len(ids) + params.max_tokens, context_length=gemma.config.context_length)
    sampling = _sampling(params)
    token, logprob, cache = _prefill(programs, ids, length, sampling)
    end = len(ids) + params.max_tokens
    for position in range(len(ids), end):
        chosen = Token(int(token), float(logprob), int(token) in gemma.eos_ids)
        yield chosen
        if chosen.ends_text or position + 1 == end:
            return
        token, logprob, cache = programs.decode(
            gemma.parameters, cache, token, np.int32(position), sampling
        )


def _prefill(
    programs: Programs, ids: list[int], length: int, sampling: Sampling
) -> tuple[Array, Array, KVCache]:
    """The first token, its log-probability, and a cache that holds the prompt."""
    cache = programs.new_cache(length)
    *whole, last = chunks_of(len(ids), lengths=CHUNKS)
    for start, count, padded in whole:
        chunk = padded_chunk(ids, start, count, padded)
        cache = programs.extend(programs.gemma.parameters, cache, *chunk)
    start, count, padded = last
    chunk = padded_chunk(ids, start, count, padded)
    return programs.prefill(programs.gemma.parameters, cache, *chunk, np.int32(count - 1), sampling)


def score(
    programs: Programs,
    ids: Sequence[int],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[float | None]:
    """The log-probability of each token given those before it; None for the first.

    Args:
        progress: called with tokens scored so far and in all.

    Raises:
        InvalidRequestError: as `generate`.
    """
    gemma, ids = programs.gemma, list(ids)
    _check(gemma, ids, max_tokens=0)
    cache = programs.new_cache(cache_length(len(ids), context_length=gemma.config.context_length))
    logprobs: list[float | None] = [None]
    following = [*ids[1:], 0]
    for start, count, padded in chunks_of(len(ids), lengths=(SCORE_CHUNK,)):
        tokens, positions = padded_chunk(ids, start, count, padded)
        targets, _ = padded_chunk(following, start, count, padded)
        scored, cache = programs.score(gemma.parameters, cache, tokens, positions, targets)
        logprobs += [float(value) for value in np.asarray(scored)[0, :count]]
        if progress is not None:
            progress(start + count, len(ids))
    return logprobs[:-1]


def _sampling(params: SamplingParams) -> Sampling:
    seed = secrets.randbits(64) if params.seed is None else params.seed
    return (
        jnp.float32(params.temperature),
        jnp.array(split_seed(seed), jnp.uint32),
        jnp.int32(0),
    )


def _check(gemma: Gemma, ids: list[int], *, max_tokens: int) -> None:
    if not ids:
        raise InvalidRequestError("the prompt is empty: give at least one token")
    strange = next((i for i in ids if not 0 <= i < gemma.config.vocab_size), None)
    if strange is not None:
        raise InvalidRequestError(
            f"token id {strange} is outside the vocabulary of {gemma.config.vocab_size}",
            parameter="prompt",
        )
    context = gemma.config.context_length
    if len(ids) + max_tokens > context:
        raise InvalidRequestError(
            f"the model's context is {context} tokens; the prompt has {len(ids)} and max_tokens "
            f"is {max_tokens}: shorten one of them",
            parameter="prompt" if len(ids) > context else "max_tokens",
        )
