"""What is computed with the weights: a chunk of a prompt, its score, and steps of decode.

Functions over the state, to be compiled with the state donated.
"""

from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Float32, Int32
from refimpl_kernels.compiling import on_all_threads
from refimpl_kernels.logprobs import log_probabilities, top_logprobs
from refimpl_kernels.penalties import process
from refimpl_kernels.sampling import draw

from refimpl.engine.forward import Entered, Forward, Parameters, Stream
from refimpl.engine.packing import STEP_FIELDS
from refimpl.engine.request import MAX_TOP_LOGPROBS
from refimpl.engine.state import DecodeState
from refimpl.model.gemma import Gemma

# A scored position needs a row of logits over the whole vocabulary, so few are made at once: 34 MB
# for 32 of Gemma 3. What is computed of a row takes three times as much, so fewer still are ranked.
SCORE_ROWS = 32
RANKED_ROWS = 8


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
        state, entered = self.prefill_enter(parameters, state, packed)
        state, x = self._through_layers(parameters, state, entered, phase="prefill")
        return self.prefill_leave(parameters, state, x, packed)

    def prefill_enter(
        self, parameters: Parameters, state: DecodeState, packed: Int32[Array, " p"]
    ) -> tuple[DecodeState, Entered]:
        """The part of `prefill` before the layers."""
        slot, start, count, tokens = packed[0], packed[1], packed[2], packed[3:]
        place = jnp.arange(tokens.shape[0], dtype=jnp.int32)
        positions = jnp.where(place < count, start + place, -1)
        cache, entered = self.forward("prefill").enter(
            parameters, state.cache, tokens[None], positions[None], slot[None]
        )
        return state.with_cache(cache), entered

    def prefill_leave(
        self, parameters: Parameters, state: DecodeState, x: Stream, packed: Int32[Array, " p"]
    ) -> tuple[DecodeState, Float[Array, "t d"]]:
        """The part of `prefill` after the layers."""
        del packed
        return state, self.forward("prefill").leave(parameters, x)[0]

    def score(
        self, parameters: Parameters, stream: Float[Array, "t d"], targets: Int32[Array, " t"]
    ) -> Int32[Array, "t f"]:
        """What the model says of each position's next token, a few positions at a time."""
        module = self.gemma.module(parameters)
        chosen = self.forward("prefill").implementations

        def ranked(part: tuple[Array, Array]) -> Array:
            logprob, ids, values = self._top(*part)
            return jnp.concatenate([_bits(logprob)[:, None], ids, _bits(values)], axis=1)

        def rows(part: tuple[Array, Array]) -> Array:
            x, wanted = part
            logits = module.logits(x[None], implementations=chosen)[0].astype(jnp.float32)
            logits = lax.optimization_barrier(logits)
            parts = logits.reshape(-1, RANKED_ROWS, logits.shape[-1])
            return lax.map(ranked, (parts, wanted.reshape(-1, RANKED_ROWS)))

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
        steps, w = packed[0], packed.shape[0] - 1
        rows = jnp.zeros((self.max_steps, w, STEP_FIELDS), jnp.int32)

        def step(carry: tuple[Array, DecodeState, Array]) -> tuple[Array, DecodeState, Array]:
            index, current, filled = carry
            current, entered = self.decode_enter(parameters, current, packed)
            current, x = self._through_layers(parameters, current, entered, phase="decode")
            current, row = self._draw(current, self._logits(parameters, x), packed[1:])
            return index + 1, current, filled.at[index].set(row)

        start = jnp.int32(0), state, rows
        _, state, rows = lax.while_loop(lambda carry: carry[0] < steps, step, start)
        return state, rows

    def decode_enter(
        self, parameters: Parameters, state: DecodeState, packed: Int32[Array, " p"]
    ) -> tuple[DecodeState, Entered]:
        """The part of a step before the layers."""
        row, runs = _running(state, packed[1:])
        tokens, positions = state.token[row], jnp.where(runs, state.position[row], -1)
        cache, entered = self.forward("decode").enter(
            parameters, state.cache, tokens[:, None], positions[:, None], row
        )
        return state.with_cache(cache), entered

    def decode_leave(
        self, parameters: Parameters, state: DecodeState, x: Stream, packed: Int32[Array, " p"]
    ) -> tuple[DecodeState, Int32[Array, " r"]]:
        """The part of a step from the layers to the logits, which it leaves in the state.

        Returns:
            The state, and the slots for `draw_each`: as many as the state has rows of logits.
        """
        logits = self._logits(parameters, x)
        state = replace(state, logits=lax.dynamic_update_slice(state.logits, logits, (0, 0)))
        missing = state.logits.shape[0] - logits.shape[0]
        return state, jnp.pad(packed[1:], (0, missing), constant_values=-1)

    def draw_each(
        self, state: DecodeState, slots: Int32[Array, " r"]
    ) -> tuple[DecodeState, Int32[Array, "1 r f"]]:
        """The part of a step after the logits, row after row; gives the rows of this one step.

        So one program draws whatever the width was, where another for each width would take as long
        to compile and as much memory; and a row takes the working memory of one.

        Args:
            slots: of the rows of logits; -1 where there are fewer.
        """
        rows = jnp.zeros((1, slots.shape[0], STEP_FIELDS), jnp.int32)

        def step(index: Array, carry: tuple[DecodeState, Array]) -> tuple[DecodeState, Array]:
            current, filled = carry
            index = on_all_threads(index)
            logits = lax.dynamic_slice_in_dim(current.logits, index, 1)
            slot = lax.dynamic_slice_in_dim(slots, index, 1)
            current, row = self._draw(current, lax.optimization_barrier(logits), slot)
            return current, filled.at[0, index].set(row[0])

        # At least one, as a first call with no slots is to leave nothing for a request to do first.
        number = jnp.arange(1, 1 + slots.shape[0], dtype=jnp.int32)
        count = jnp.max(jnp.where(slots >= 0, number, 1))
        return lax.fori_loop(0, count, step, (state, rows))

    def _logits(self, parameters: Parameters, x: Stream) -> Float32[Array, "w v"]:
        """Of the next tokens, from what the last layer gives."""
        forward = self.forward("decode")
        x = forward.leave(parameters, x)
        logits = self.gemma.module(parameters).logits(x, implementations=forward.implementations)
        return logits[:, 0].astype(jnp.float32)

    def _draw(
        self, state: DecodeState, logits: Float32[Array, "w v"], slots: Int32[Array, " w"]
    ) -> tuple[DecodeState, Int32[Array, "w f"]]:
        """A token for each slot, and what is said of it."""
        row, runs = _running(state, slots)
        position = state.position[row]
        token = self._chosen(state, logits, row, position + 1)
        logprob, top = self._logprobs(logits, token, state.wants_top[row] & runs)
        is_finite = jnp.isfinite(logprob)

        ends = jnp.any(token[:, None] == state.stop_ids[row], axis=1)
        goes_on = runs & is_finite & ~ends & (position + 1 < state.last_position[row])
        # Rows that do not run write out of bounds, and mode "drop" writes nothing there.
        to = jnp.where(runs, row, state.token.shape[0])
        state = replace(
            state,
            token=state.token.at[to].set(token, mode="drop"),
            position=state.position.at[to].set(position + 1, mode="drop"),
            is_running=state.is_running.at[to].set(goes_on, mode="drop"),
            counts=state.counts.at[to, token].add(1, mode="drop"),
        )
        fields = [token, goes_on.astype(jnp.int32), is_finite.astype(jnp.int32), _bits(logprob)]
        return state, jnp.concatenate([jnp.stack(fields, axis=1), top], axis=1)

    def forward(self, phase: Literal["prefill", "decode"]) -> Forward:
        """The parts of the model's pass."""
        return Forward(self.gemma, phase)

    def _through_layers(
        self,
        parameters: Parameters,
        state: DecodeState,
        entered: Entered,
        *,
        phase: Literal["prefill", "decode"],
    ) -> tuple[DecodeState, Stream]:
        forward = self.forward(phase)
        layers = forward.within_one_program(parameters["layers"])
        cache, x = forward.through_layers(layers, state.cache, entered)
        return state.with_cache(cache), x

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

        def changed() -> Array:
            return process(
                logits,
                sampling,
                slot=row,
                counts=state.counts,
                in_prompt=state.in_prompt,
                bias=state.bias,
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


def _running(
    state: DecodeState, slots: Int32[Array, " w"]
) -> tuple[Int32[Array, " w"], Bool[Array, " w"]]:
    """A slot to read for each row, and whether the row computes something for it."""
    row = jnp.maximum(slots, 0)
    return row, (slots >= 0) & state.is_running[row]


def _bits(x: Float32[Array, "*b"]) -> Int32[Array, "*b"]:
    return lax.bitcast_convert_type(x, jnp.int32)
