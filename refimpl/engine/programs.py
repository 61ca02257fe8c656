"""The compiled programs over a model's state, each of a few fixed shapes.

    extend    a chunk of one prompt into the cache
    prefill   the last chunk of a prompt into the cache, the first token out
    decode    one token into the cache, the next one out
    score     a chunk of one prompt into the cache, the log-probability of each next token out

A chunk has one of the lengths in CHUNKS, padded with position -1; a cache one of the lengths that
`cache_length` gives. So a handful of compiled forms serves every prompt.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Float32, Int, UInt32
from refimpl_kernels.logprobs import log_probabilities
from refimpl_kernels.sampling import sample

from refimpl.model.cache import KVCache
from refimpl.model.gemma import Gemma
from refimpl.model.implementations import Implementations, implementations_for

# Short prompts should not wait for a long chunk; long prompts should not take many.
CHUNKS = (32, 128, 512)
# A scored position needs a row of logits over the whole vocabulary, so chunks are smaller.
SCORE_CHUNK = 128
_SHORTEST_CACHE = 1024

Phase = Literal["prefill", "decode"]
Sampling = tuple[Float32[Array, ""], UInt32[Array, "2"], Int[Array, ""]]


def cache_length(positions: int, *, context_length: int) -> int:
    """The capacity for this many positions: a power of two, at most the model's context."""
    length = _SHORTEST_CACHE
    while length < positions:
        length *= 2
    return min(length, context_length)


def chunks_of(num_tokens: int, *, lengths: tuple[int, ...] = CHUNKS) -> list[tuple[int, int, int]]:
    """How a prompt is cut: start, number of tokens, and padded length of each chunk.

    The cut depends on the prompt's length alone, never on what else runs.

    >>> chunks_of(600, lengths=(32, 128, 512))
    [(0, 512, 512), (512, 88, 128)]
    """
    cut, start = [], 0
    while start < num_tokens:
        left = num_tokens - start
        padded = next((length for length in lengths if length >= left), lengths[-1])
        cut.append((start, min(left, padded), padded))
        start += padded
    return cut


def padded_chunk(
    ids: list[int], start: int, count: int, padded: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and positions of one chunk, `[1, padded]` each; padding has position -1."""
    tokens = np.zeros((1, padded), np.int32)
    positions = np.full((1, padded), -1, np.int32)
    tokens[0, :count] = ids[start : start + count]
    positions[0, :count] = np.arange(start, start + count)
    return tokens, positions


@dataclass(frozen=True)
class Programs:
    """The programs of one model. Compiled on first use of each shape."""

    gemma: Gemma

    def new_cache(self, length: int) -> KVCache:
        """An empty cache of one row."""
        return KVCache.create(
            self.gemma.config,
            batch=1,
            length=length,
            chunk=CHUNKS[-1],
            dtype=self.gemma.numerics.dtype,
        )

    @cached_property
    def extend(self) -> Callable[..., KVCache]:
        """(parameters, cache, tokens, positions) -> cache."""
        return self._compiled(self._extend)

    @cached_property
    def prefill(self) -> Callable[..., tuple[Array, Array, KVCache]]:
        """(parameters, cache, tokens, positions, last, sampling) -> token, logprob, cache.

        `last` is the index of the chunk's last token that is no padding; the token that follows it
        is chosen as in `decode`.
        """
        return self._compiled(self._prefill)

    @cached_property
    def decode(self) -> Callable[..., tuple[Array, Array, KVCache]]:
        """(parameters, cache, token, position, sampling) -> next token, its logprob, cache."""
        return self._compiled(self._decode)

    @cached_property
    def score(self) -> Callable[..., tuple[Array, KVCache]]:
        """(parameters, cache, tokens, positions, targets) -> logprob of each target, cache."""
        return self._compiled(self._score)

    def _compiled(self, program: Callable[..., Any]) -> Callable[..., Any]:
        # The cache is donated: it comes back as the result, and its memory is written in place.
        options = self.gemma.numerics.compiler_options
        return jax.jit(program, donate_argnums=1, compiler_options=options or None)

    def _extend(
        self,
        parameters: Mapping[str, Any],
        cache: KVCache,
        tokens: Int[Array, "1 t"],
        positions: Int[Array, "1 t"],
    ) -> KVCache:
        return self._hidden(parameters, cache, tokens, positions, "prefill")[1]

    def _prefill(
        self,
        parameters: Mapping[str, Any],
        cache: KVCache,
        tokens: Int[Array, "1 t"],
        positions: Int[Array, "1 t"],
        last: Int[Array, ""],
        sampling: Sampling,
    ) -> tuple[Int[Array, ""], Float32[Array, ""], KVCache]:
        x, filled = self._hidden(parameters, cache, tokens, positions, "prefill")
        # Only one row needs logits; the head has more weights than a small model's layers.
        row = jax.lax.dynamic_slice_in_dim(x, last, 1, axis=1)
        position = jax.lax.dynamic_index_in_dim(positions[0], last, keepdims=False)
        token, logprob = self._choose(parameters, row, position, sampling)
        return token, logprob, filled

    def _decode(
        self,
        parameters: Mapping[str, Any],
        cache: KVCache,
        token: Int[Array, ""],
        position: Int[Array, ""],
        sampling: Sampling,
    ) -> tuple[Int[Array, ""], Float32[Array, ""], KVCache]:
        x, filled = self._hidden(
            parameters, cache, token[None, None], position[None, None], "decode"
        )
        chosen, logprob = self._choose(parameters, x, position, sampling)
        return chosen, logprob, filled

    def _score(
        self,
        parameters: Mapping[str, Any],
        cache: KVCache,
        tokens: Int[Array, "1 t"],
        positions: Int[Array, "1 t"],
        targets: Int[Array, "1 t"],
    ) -> tuple[Float32[Array, "1 t"], KVCache]:
        x, filled = self._hidden(parameters, cache, tokens, positions, "prefill")
        logits = self.gemma.module(parameters).logits(
            x, implementations=self._implementations("prefill")
        )
        return log_probabilities(logits, targets), filled

    def _hidden(
        self,
        parameters: Mapping[str, Any],
        cache: KVCache,
        tokens: Int[Array, "b t"],
        positions: Int[Array, "b t"],
        phase: Phase,
    ) -> tuple[Float[Array, "b t d"], KVCache]:
        x, filled = self.gemma.module(parameters).hidden(
            tokens, positions, cache, implementations=self._implementations(phase)
        )
        assert filled is not None  # a cache went in
        return x, filled

    def _choose(
        self,
        parameters: Mapping[str, Any],
        x: Float[Array, "1 1 d"],
        position: Int[Array, ""],
        sampling: Sampling,
    ) -> tuple[Int[Array, ""], Float32[Array, ""]]:
        """The token after the one at `position`, and its raw log-probability."""
        temperature, seed, choice = sampling
        module = self.gemma.module(parameters)
        logits = module.logits(x, implementations=self._implementations("decode"))[0, 0]
        logits = logits.astype(jnp.float32)
        # Rows of the embedding that no piece names are padding; they must never be drawn.
        is_piece = jnp.arange(logits.shape[0]) < self.gemma.vocab_size
        token = sample(
            jnp.where(is_piece, logits, -jnp.inf),
            temperature=temperature,
            seed=seed,
            choice=choice,
            position=position + 1,
        )
        return token, log_probabilities(logits, token)

    def _implementations(self, phase: Phase) -> Implementations:
        return implementations_for(self.gemma.numerics, phase=phase)
