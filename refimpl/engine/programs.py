"""The compiled programs over a model's state: all of them, in one table, each of fixed shapes.

    prefill C   a chunk of at most C tokens of one slot's prompt into the cache
    score C     what the model says of such a chunk's next tokens
    admit       what a slot needs to know before it is decoded
    fork        one slot's prompt into another slot
    bias        a slot's bias, and which ids its prompt holds
    save, load  a block of one slot's cache out of the state, and into it
    reset       zeros into one slot's cache
    decode W    one or more steps of at most W slots

Why a request gets the same bits whatever else runs: a prompt is cut by its own length alone
(`chunks_of`) and prefilled by itself. In decode each row's numbers come from kernels that treat a
row alike at any width W and in any place (`linear` as a chain, blocked attention over the slot's
own blocks), compiled with `row_stable_options`; the tests hold every width against every other.
A prompt's last token is not prefilled but decoded, so that all tokens come out of one program.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int32
from refimpl_kernels.compiling import row_stable_options
from refimpl_kernels.logprobs import log_probabilities, top_logprobs
from refimpl_kernels.penalties import process
from refimpl_kernels.sampling import SamplingRows, draw

from refimpl.engine.packing import (
    ADMISSION_FLOATS,
    ADMISSION_INTEGERS,
    MAX_STOP_IDS,
    STEP_FIELDS,
)
from refimpl.engine.request import MAX_TOP_LOGPROBS
from refimpl.engine.state import DecodeState
from refimpl.model.cache import BLOCK, KVCache
from refimpl.model.gemma import Gemma
from refimpl.model.implementations import implementations_for

# The longest chunk is a block of the prefix cache, so that what is saved was computed in whole
# chunks. A short prompt, or the end of a long one, does not pay for a whole one.
CHUNKS = (32, BLOCK)
WIDTHS = (1, 2, 4, 8, 16)
# A scored position needs a row of logits over the whole vocabulary, so few are made at once.
SCORE_ROWS = 16

Parameters = Mapping[str, Any]
Block = dict[str, tuple[Float[Array, "_ _ _"], ...]]


@dataclass(frozen=True)
class Chunk:
    """Part of a prompt: its first position, how many tokens, and the length it is padded to."""

    start: int
    count: int
    padded: int


def chunks_of(num_tokens: int, *, start: int = 0) -> list[Chunk]:
    """How a prompt is cut from `start`, a multiple of a block, on.

    The cut depends on the prompt's length alone: from wherever it starts, the chunks after that
    place are the same.

    >>> chunks_of(140)
    [Chunk(start=0, count=128, padded=128), Chunk(start=128, count=12, padded=32)]
    """
    cut = []
    while start < num_tokens:
        left = num_tokens - start
        padded = next((length for length in CHUNKS if length >= left), CHUNKS[-1])
        cut.append(Chunk(start, min(left, padded), padded))
        start += padded
    return cut


@dataclass(frozen=True, kw_only=True)
class Programs:
    """The programs of one model, for one number of slots. Each compiles at its first call.

    Attributes:
        gemma: the model.
        slots: rows of the state.
        context: positions that a slot can hold.
        max_steps: most steps of one call of decode.
    """

    gemma: Gemma
    slots: int
    context: int
    max_steps: int = 1

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths that decode is compiled for."""
        enough = next((width for width in WIDTHS if width >= self.slots), WIDTHS[-1])
        return tuple(width for width in WIDTHS if width <= enough)

    def new_state(self) -> DecodeState:
        """A state in which no slot runs."""
        cache = KVCache.create(
            self.gemma.config,
            batch=self.slots,
            length=self.context,
            chunk=CHUNKS[-1],
            dtype=self.gemma.numerics.dtype,
        )
        return DecodeState.create(cache, slots=self.slots, num_logits=self.gemma.config.vocab_size)

    @cached_property
    def prefill(self) -> Callable[..., tuple[DecodeState, Array]]:
        """(parameters, state, [slot, start, count, *tokens]) -> state, stream "t d"."""
        return self._compiled(self._prefill)

    @cached_property
    def score(self) -> Callable[..., Array]:
        """(parameters, stream "t d", targets "t") -> packed rows "t SCORE_FIELDS"."""
        return self._compiled(self._score, donated=None)

    @cached_property
    def admit(self) -> Callable[..., DecodeState]:
        """(parameters, state, packed admission) -> state."""
        return self._compiled(self._admit)

    @cached_property
    def bias(self) -> Callable[..., DecodeState]:
        """(parameters, state, slot, bias "v", in_prompt "v") -> state."""
        return self._compiled(self._bias)

    @cached_property
    def fork(self) -> Callable[..., DecodeState]:
        """(parameters, state, [from, to]) -> state."""
        return self._compiled(self._fork)

    @cached_property
    def save(self) -> Callable[..., Block]:
        """(parameters, state, [slot, start]) -> block."""
        return self._compiled(self._save, donated=None)

    @cached_property
    def load(self) -> Callable[..., DecodeState]:
        """(parameters, state, [slot, start], block) -> state."""
        return self._compiled(self._load)

    @cached_property
    def reset(self) -> Callable[..., DecodeState]:
        """(parameters, state, [slot]) -> state."""
        return self._compiled(self._reset)

    @cached_property
    def decode(self) -> Callable[..., tuple[DecodeState, Array]]:
        """(parameters, state, [steps, *slots]) -> state, rows "max_steps w STEP_FIELDS"."""
        return self._compiled(self._decode)

    def warm_up(self, state: DecodeState) -> Iterator[tuple[str, Callable[[], DecodeState]]]:
        """Each program by name, with a call that changes nothing in the state but compiles it.

        The calls must be made in turn; each gives the state for the next.
        """
        current = state

        def run(program: Callable[..., Any], *arrays: Any) -> DecodeState:
            nonlocal current
            result = program(self.gemma.parameters, current, *jax.device_put(arrays))
            current = result[0] if isinstance(result, tuple) else result
            return current

        def scored(chunk: int) -> DecodeState:
            stream = jnp.zeros((chunk, self.gemma.config.width), self.gemma.numerics.dtype)
            self.score(self.gemma.parameters, stream, jnp.zeros(chunk, jnp.int32))
            return current

        def saved_and_loaded() -> DecodeState:
            at = np.zeros(2, np.int32)
            block = self.save(self.gemma.parameters, current, jax.device_put(at))
            return run(self.load, at, block)

        v = self.gemma.config.vocab_size
        for chunk in CHUNKS:
            yield f"prefill {chunk}", partial(run, self.prefill, np.zeros(3 + chunk, np.int32))
        for width in self.widths:
            idle = np.full(1 + width, -1, np.int32)
            yield f"decode {width}", partial(run, self.decode, idle)
        nobody = np.zeros(len(ADMISSION_INTEGERS + ADMISSION_FLOATS) + MAX_STOP_IDS, np.int32)
        yield "admit", partial(run, self.admit, nobody)
        yield "fork", partial(run, self.fork, np.zeros(2, np.int32))
        slot, no_bias = np.zeros(1, np.int32), np.zeros(v, np.float32)
        yield "bias", partial(run, self.bias, slot, no_bias, np.zeros(v, bool))
        yield "save and load", saved_and_loaded
        yield "reset", partial(run, self.reset, slot)
        for chunk in CHUNKS:
            yield f"score {chunk}", partial(scored, chunk)

    def _compiled(
        self, program: Callable[..., Any], *, donated: int | None = 1
    ) -> Callable[..., Any]:
        # The state is donated: it comes back as the result, and its memory is written in place.
        options = {
            **row_stable_options(jax.default_backend()),
            **self.gemma.numerics.compiler_options,
        }
        return jax.jit(
            program,
            donate_argnums=() if donated is None else donated,
            compiler_options=options or None,
        )

    def _prefill(
        self, parameters: Parameters, state: DecodeState, packed: Int32[Array, " p"]
    ) -> tuple[DecodeState, Float[Array, "t d"]]:
        slot, start, count, tokens = packed[0], packed[1], packed[2], packed[3:]
        place = jnp.arange(tokens.shape[0], dtype=jnp.int32)
        positions = jnp.where(place < count, start + place, -1)
        x, cache = self._hidden(
            parameters, state.cache, tokens[None], positions[None], slot[None], phase="prefill"
        )
        return state.with_cache(cache), x[0]

    def _score(
        self, parameters: Parameters, stream: Float[Array, "t d"], targets: Int32[Array, " t"]
    ) -> Int32[Array, "t f"]:
        module = self.gemma.module(parameters)
        chosen = implementations_for(self.gemma.numerics, phase="prefill")

        def rows(part: tuple[Array, Array]) -> Array:
            x, wanted = part
            logits = module.logits(x[None], implementations=chosen)[0].astype(jnp.float32)
            logprob, ids, values = top_logprobs(
                logits, wanted, vocab_size=self.gemma.vocab_size, k=MAX_TOP_LOGPROBS
            )
            return jnp.concatenate([_bits(logprob)[:, None], ids, _bits(values)], axis=1)

        parts = stream.reshape(-1, SCORE_ROWS, stream.shape[-1]), targets.reshape(-1, SCORE_ROWS)
        return lax.map(rows, parts).reshape(stream.shape[0], -1)

    def _admit(
        self, parameters: Parameters, state: DecodeState, packed: Int32[Array, " p"]
    ) -> DecodeState:
        del parameters
        split = len(ADMISSION_INTEGERS), len(ADMISSION_INTEGERS) + len(ADMISSION_FLOATS)
        given = dict(zip(ADMISSION_INTEGERS, packed[: split[0]], strict=True))
        floats = lax.bitcast_convert_type(packed[split[0] : split[1]], jnp.float32)
        slot = given["slot"]
        seed = jnp.stack([given["seed_low"], given["seed_high"]])

        def put(held: Array, value: Array) -> Array:
            return held.at[slot].set(value.astype(held.dtype))

        sampling = state.sampling
        numbers = {
            name: put(getattr(sampling, name), value)
            for name, value in zip(ADMISSION_FLOATS, floats, strict=True)
        }
        return replace(
            state,
            token=put(state.token, given["token"]),
            position=put(state.position, given["position"]),
            last_position=put(state.last_position, given["last_position"]),
            first_stop=put(state.first_stop, given["first_stop"]),
            stop_ids=put(state.stop_ids, packed[split[1] :]),
            wants_top=put(state.wants_top, given["wants_top"] != 0),
            is_running=put(state.is_running, jnp.bool_(True)),
            sampling=SamplingRows(
                **numbers,
                top_k=put(sampling.top_k, given["top_k"]),
                seed=put(sampling.seed, lax.bitcast_convert_type(seed, jnp.uint32)),
                choice=put(sampling.choice, given["choice"]),
                is_biased=put(sampling.is_biased, given["is_biased"] != 0),
            ),
            counts=put(state.counts, jnp.zeros(state.counts.shape[1])),
        )

    def _bias(
        self,
        parameters: Parameters,
        state: DecodeState,
        slot: Int32[Array, "1"],
        bias: Float[Array, " v"],
        in_prompt: Array,
    ) -> DecodeState:
        del parameters
        return replace(
            state,
            bias=state.bias.at[slot[0]].set(bias),
            in_prompt=state.in_prompt.at[slot[0]].set(in_prompt),
        )

    def _fork(
        self, parameters: Parameters, state: DecodeState, packed: Int32[Array, "2"]
    ) -> DecodeState:
        del parameters

        def copied(held: Array) -> Array:
            return held.at[packed[1]].set(held[packed[0]])

        cache = state.cache
        return replace(
            state,
            cache=replace(
                cache,
                keys=tuple(map(copied, cache.keys)),
                values=tuple(map(copied, cache.values)),
                positions={kind: copied(held) for kind, held in cache.positions.items()},
            ),
            bias=copied(state.bias),
            in_prompt=copied(state.in_prompt),
        )

    def _save(self, parameters: Parameters, state: DecodeState, packed: Int32[Array, "2"]) -> Block:
        del parameters
        slot, start = packed[0], packed[1]

        def block(held: Array) -> Array:
            at = (slot, start % held.shape[1], 0, 0)
            return lax.dynamic_slice(held, _same_type(at), (1, BLOCK, *held.shape[2:]))[0]

        cache = state.cache
        return {
            "keys": tuple(map(block, cache.keys)),
            "values": tuple(map(block, cache.values)),
        }

    def _load(
        self, parameters: Parameters, state: DecodeState, packed: Int32[Array, "2"], block: Block
    ) -> DecodeState:
        del parameters
        slot, start = packed[0], packed[1]

        def put(held: Array, new: Array) -> Array:
            at = (slot, start % held.shape[1], *[0] * (held.ndim - 2))
            return lax.dynamic_update_slice(held, new[None], _same_type(at))

        cache = state.cache
        positions = start + jnp.arange(BLOCK, dtype=jnp.int32)
        loaded = replace(
            cache,
            keys=tuple(map(put, cache.keys, block["keys"])),
            values=tuple(map(put, cache.values, block["values"])),
            positions={kind: put(held, positions) for kind, held in cache.positions.items()},
        )
        return replace(state, cache=loaded)

    def _reset(
        self, parameters: Parameters, state: DecodeState, slot: Int32[Array, "1"]
    ) -> DecodeState:
        del parameters

        def cleared(held: Array, value: int = 0) -> Array:
            return held.at[slot[0]].set(jnp.asarray(value, held.dtype))

        cache = state.cache
        return replace(
            state,
            cache=replace(
                cache,
                keys=tuple(map(cleared, cache.keys)),
                values=tuple(map(cleared, cache.values)),
                positions={kind: cleared(held, -1) for kind, held in cache.positions.items()},
            ),
        )

    def _decode(
        self, parameters: Parameters, state: DecodeState, packed: Int32[Array, " p"]
    ) -> tuple[DecodeState, Int32[Array, "q w f"]]:
        steps, slots = packed[0], packed[1:]
        rows = jnp.zeros((self.max_steps, slots.shape[0], STEP_FIELDS), jnp.int32)

        def more(carry: tuple[Array, DecodeState, Array]) -> Array:
            return carry[0] < steps

        def step(carry: tuple[Array, DecodeState, Array]) -> tuple[Array, DecodeState, Array]:
            index, current, filled = carry
            current, row = self._step(parameters, current, slots)
            return index + 1, current, filled.at[index].set(row)

        _, state, rows = lax.while_loop(more, step, (jnp.int32(0), state, rows))
        return state, rows

    def _step(
        self, parameters: Parameters, state: DecodeState, slots: Int32[Array, " w"]
    ) -> tuple[DecodeState, Int32[Array, "w f"]]:
        row = jnp.maximum(slots, 0)
        runs = (slots >= 0) & state.is_running[row]
        position = state.position[row]
        x, cache = self._hidden(
            parameters,
            state.cache,
            state.token[row][:, None],
            jnp.where(runs, position, -1)[:, None],
            row,
            phase="decode",
        )
        chosen = implementations_for(self.gemma.numerics, phase="decode")
        every = self.gemma.module(parameters).logits(x, implementations=chosen)
        logits = every[:, 0].astype(jnp.float32)
        token = self._chosen(state, logits, row, position + 1)
        logprob, top = self._logprobs(logits, token, state.wants_top[row] & runs)
        is_finite = jnp.isfinite(logprob) | ~runs

        ends = jnp.any(token[:, None] == state.stop_ids[row], axis=1)
        goes_on = runs & is_finite & ~ends & (position + 1 < state.last_position[row])
        # Rows that do not run write out of bounds, and mode "drop" writes nothing there.
        to = jnp.where(runs, row, self.slots)
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
        logits: Float[Array, "w v"],
        row: Int32[Array, " w"],
        position: Int32[Array, " w"],
    ) -> Int32[Array, " w"]:
        """The next token of each row, which will have this position."""
        sampling = jax.tree.map(lambda held: held[row], state.sampling)
        too_early = position < state.first_stop[row]
        banned = jnp.where(too_early[:, None], state.stop_ids[row], -1)
        is_changed = (
            sampling.is_biased
            | (sampling.frequency != 0)
            | (sampling.presence != 0)
            | (sampling.repetition != 1)
            | jnp.any(banned >= 0, axis=1)
        )

        def processed() -> Array:
            return process(
                logits,
                sampling,
                counts=state.counts[row],
                in_prompt=state.in_prompt[row],
                bias=state.bias[row],
                banned=banned,
            )

        changed = lax.cond(jnp.any(is_changed), processed, lambda: logits)
        return draw(changed, sampling, position, vocab_size=self.gemma.vocab_size)

    def _logprobs(
        self, logits: Float[Array, "w v"], token: Int32[Array, " w"], wants_top: Array
    ) -> tuple[Float[Array, " w"], Int32[Array, "w g"]]:
        """Raw log-probability of each token; packed, the likeliest ids where they are wanted."""
        nothing = jnp.full((token.shape[0], 2 * MAX_TOP_LOGPROBS), -1, jnp.int32)

        def with_top() -> tuple[Array, Array]:
            logprob, ids, values = top_logprobs(
                logits, token, vocab_size=self.gemma.vocab_size, k=MAX_TOP_LOGPROBS
            )
            top = jnp.concatenate([ids, _bits(values)], axis=1)
            return logprob, jnp.where(wants_top[:, None], top, nothing)

        def alone() -> tuple[Array, Array]:
            return log_probabilities(logits, token), nothing

        return lax.cond(jnp.any(wants_top), with_top, alone)

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


def _bits(x: Float[Array, "*b"]) -> Int32[Array, "*b"]:
    return lax.bitcast_convert_type(x, jnp.int32)


def _same_type(indices: tuple[Array | int, ...]) -> tuple[Array, ...]:
    return tuple(jnp.asarray(index, jnp.int32) for index in indices)
