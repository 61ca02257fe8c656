"""What is computed with the weights: a chunk of a prompt, its score, and steps of decode.

Functions over the state, to be compiled with the state donated.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Float32, Int32
from refimpl_kernels.logprobs import log_probabilities, top_logprobs
from refimpl_kernels.penalties import process
from refimpl_kernels.sampling import draw

from refimpl.engine.packing import STEP_FIELDS
from refimpl.engine.request import MAX_TOP_LOGPROBS
from refimpl.engine.state import DecodeState
from refimpl.model.cache import KVCache
from refimpl.model.gemma import Gemma
from refimpl.model.implementations import implementations_for

# A scored position needs a row of logits over the whole vocabulary, so few are made at once.
SCORE_ROWS = 32

Parameters = Mapping[str, Any]


@dataclass(frozen=True)
class Steps:
    """The model's part of the programs.

    Attributes:
        gemma: the model.
        max_steps: most steps of one call of `decode`.
    """

    gemma: Gemma
    max_steps: int

    def prefill(
        self, parameters: Parameters, state: DecodeState, packed: Int32[Array, " p"]
    ) -> tuple[DecodeState, Float[Array, "t d"]]:
        """A chunk of one slot's prompt into the cache; gives the stream, too.

        Args:
            packed: slot, first position, number of tokens, and the tokens with padding after them.
        """
        slot, start, count, tokens = packed[0], packed[1], packed[2], packed[3:]
        place = jnp.arange(tokens.shape[0], dtype=jnp.int32)
        positions = jnp.where(place < count, start + place, -1)
        x, cache = self._hidden(
            parameters, state.cache, tokens[None], positions[None], slot[None], phase="prefill"
        )
        return state.with_cache(cache), x[0]

    def score(
        self, parameters: Parameters, stream: Float[Array, "t d"], targets: Int32[Array, " t"]
    ) -> Int32[Array, "t f"]:
        """What the model says of each position's next token, a few positions at a time."""
        module = self.gemma.module(parameters)
        chosen = implementations_for(self.gemma.numerics, phase="prefill")

        def rows(part: tuple[Array, Array]) -> Array:
            x, wanted = part
            logits = module.logits(x[None], implementations=chosen)[0].astype(jnp.float32)
            logprob, ids, values = self._top(logits, wanted)
            return jnp.concatenate([_bits(logprob)[:, None], ids, _bits(values)], axis=1)

        parts = stream.reshape(-1, SCORE_ROWS, stream.shape[-1]), targets.reshape(-1, SCORE_ROWS)
        return lax.map(rows, parts).reshape(stream.shape[0], -1)

    def decode(
        self, parameters: Parameters, state: DecodeState, packed: Int32[Array, " p"]
    ) -> tuple[DecodeState, Int32[Array, "q w f"]]:
        """Some steps of some slots.

        Args:
            packed: number of steps, and the slots; -1 where there are fewer.

        Returns:
            The state, and for each step and slot what `packing.unpack_step` reads.
        """
        steps, slots = packed[0], packed[1:]
        rows = jnp.zeros((self.max_steps, slots.shape[0], STEP_FIELDS), jnp.int32)

        def step(carry: tuple[Array, DecodeState, Array]) -> tuple[Array, DecodeState, Array]:
            index, current, filled = carry
            current, row = self._step(parameters, current, slots)
            return index + 1, current, filled.at[index].set(row)

        start = jnp.int32(0), state, rows
        _, state, rows = lax.while_loop(lambda carry: carry[0] < steps, step, start)
        return state, rows

    def _step(
        self, parameters: Parameters, state: DecodeState, slots: Int32[Array, " w"]
    ) -> tuple[DecodeState, Int32[Array, "w f"]]:
        row = jnp.maximum(slots, 0)
        runs = (slots >= 0) & state.is_running[row]
        position = state.position[row]
        tokens, positions = state.token[row], jnp.where(runs, position, -1)
        x, cache = self._hidden(
            parameters, state.cache, tokens[:, None], positions[:, None], row, phase="decode"
        )
        chosen = implementations_for(self.gemma.numerics, phase="decode")
        logits = self.gemma.module(parameters).logits(x, implementations=chosen)[:, 0]
        logits = logits.astype(jnp.float32)
        token = self._chosen(state, logits, row, position + 1)
        logprob, top = self._logprobs(logits, token, state.wants_top[row] & runs)
        is_finite = jnp.isfinite(logprob)

        ends = jnp.any(token[:, None] == state.stop_ids[row], axis=1)
        goes_on = runs & is_finite & ~ends & (position + 1 < state.last_position[row])
        # Rows that do not run write out of bounds, and mode "drop" writes nothing there.
        to = jnp.where(runs, row, state.token.shape[0])
        state = replace(
            state.with_cache(cache),
            token=state.token.at[to].set(token, mode="drop"),
            position=state.position.at[to].set(position + 1, mode="drop"),
            is_running=state.is_running.at[to].set(goes_on, mode="drop"),
            counts=state.counts.at[to, token].add(1, mode="drop"),
        )
        fields = [token, goes_on.astype(jnp.int32), is_finite.astype(jnp.int32), _bits(logprob)]
        return state, jnp.concatenate([jnp.stack(fields, axis=1), top], axis=1)

    def _chosen(
        self,
        state: DecodeState,
        logits: Float32[Array, "w v"],
        row: Int32[Array, " w"],
        position: Int32[Array, " w"],
    ) -> Int32[Array, " w"]:
        """The next token of each row, which will have this position."""
        sampling = jax.tree.map(lambda held: held[row], state.sampling)
        is_early = position < state.first_stop[row]
        banned = jnp.where(is_early[:, None], state.stop_ids[row], -1)
        is_changed = (
            sampling.is_biased
            | (sampling.frequency != 0)
            | (sampling.presence != 0)
            | (sampling.repetition != 1)
            | jnp.any(banned >= 0, axis=1)
        )

        # Rows of the vocabulary are read from the state only if some request needs them.
        def changed() -> Array:
            return process(
                logits,
                sampling,
                counts=state.counts[row],
                in_prompt=state.in_prompt[row],
                bias=state.bias[row],
                banned=banned,
            )

        processed = lax.cond(jnp.any(is_changed), changed, lambda: logits)
        if self.gemma.suppressed_ids:
            never = jnp.asarray(self.gemma.suppressed_ids, jnp.int32)
            processed = processed.at[:, never].set(-jnp.inf)
        return draw(processed, sampling, position, vocab_size=self.gemma.vocab_size)

    def _logprobs(
        self,
        logits: Float32[Array, "w v"],
        token: Int32[Array, " w"],
        wants_top: Bool[Array, " w"],
    ) -> tuple[Float32[Array, " w"], Int32[Array, "w g"]]:
        """Raw log-probability of each token; packed, the likeliest ids where they are wanted."""
        nothing = jnp.full((token.shape[0], 2 * MAX_TOP_LOGPROBS), -1, jnp.int32)

        def with_top() -> tuple[Array, Array]:
            logprob, ids, values = self._top(logits, token)
            top = jnp.concatenate([ids, _bits(values)], axis=1)
            return logprob, jnp.where(wants_top[:, None], top, nothing)

        def alone() -> tuple[Array, Array]:
            return log_probabilities(logits, token), nothing

        return lax.cond(jnp.any(wants_top), with_top, alone)

    def _top(
        self, logits: Float32[Array, "w v"], token: Int32[Array, " w"]
    ) -> tuple[Float32[Array, " w"], Int32[Array, "w k"], Float32[Array, "w k"]]:
        """Log-probability of each token, the likeliest ids and theirs; -1 where there are fewer."""
        k = min(MAX_TOP_LOGPROBS, self.gemma.vocab_size)
        logprob, ids, values = top_logprobs(logits, token, vocab_size=self.gemma.vocab_size, k=k)
        missing = ((0, 0), (0, MAX_TOP_LOGPROBS - k))
        return logprob, jnp.pad(ids, missing, constant_values=-1), jnp.pad(values, missing)

    def _hidden(
        self,
        parameters: Parameters,
        cache: KVCache,
        tokens: Int32[Array, "b t"],
        positions: Int32[Array, "b t"],
        rows: Int32[Array, " b"],
        *,
        phase: Literal["prefill", "decode"],
    ) -> tuple[Float[Array, "b t d"], KVCache]:
        x, filled = self.gemma.module(parameters).hidden(
            tokens,
            positions,
            cache.of_rows(rows),
            implementations=implementations_for(self.gemma.numerics, phase=phase),
        )
        assert filled is not None  # a cache went in
        return x, filled


def _bits(x: Float32[Array, "*b"]) -> Int32[Array, "*b"]:
    return lax.bitcast_convert_type(x, jnp.int32)
