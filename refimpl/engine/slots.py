"""What happens to a slot besides computing: taken, copied, saved, loaded and cleared.

Functions over the state, to be compiled with the state donated. None of them looks at weights, and
none changes a bit of what it moves.
"""

from dataclasses import replace

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float32, Int32, Shaped
from refimpl_kernels.sampling import SamplingRows

from refimpl.engine.packing import ADMISSION_FLOATS, ADMISSION_INTEGERS
from refimpl.engine.state import DecodeState
from refimpl.model.cache import BLOCK, KVCache

# Keys and values of BLOCK positions of one slot, for each layer "positions k h".
Block = dict[str, tuple[Array, ...]]


def admit(state: DecodeState, packed: Int32[Array, " p"]) -> DecodeState:
    """Let a slot decode from its prompt's last token on; see `packing.pack_admission`."""
    floats_at = len(ADMISSION_INTEGERS)
    ends_at = floats_at + len(ADMISSION_FLOATS)
    given = dict(zip(ADMISSION_INTEGERS, packed[:floats_at], strict=True))
    floats = lax.bitcast_convert_type(packed[floats_at:ends_at], jnp.float32)
    slot = given["slot"]
    seed = lax.bitcast_convert_type(jnp.stack([given["seed_low"], given["seed_high"]]), jnp.uint32)

    def put(held: Array, value: Array) -> Array:
        return _with_row(held, slot, value.astype(held.dtype))

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
        stop_ids=put(state.stop_ids, packed[ends_at:]),
        wants_top=put(state.wants_top, given["wants_top"] != 0),
        is_running=put(state.is_running, jnp.bool_(True)),
        sampling=SamplingRows(
            **numbers,
            top_k=put(sampling.top_k, given["top_k"]),
            seed=put(sampling.seed, seed),
            choice=put(sampling.choice, given["choice"]),
            is_biased=put(sampling.is_biased, given["is_biased"] != 0),
        ),
        counts=put(state.counts, jnp.zeros(state.counts.shape[1])),
    )


def set_bias(
    state: DecodeState,
    slot: Int32[Array, "1"],
    bias: Float32[Array, " v"],
    in_prompt: Bool[Array, " v"],
) -> DecodeState:
    """A slot's bias, and which ids its prompt holds."""
    return replace(
        state,
        bias=_with_row(state.bias, slot[0], bias),
        in_prompt=_with_row(state.in_prompt, slot[0], in_prompt),
    )


def fork(state: DecodeState, packed: Int32[Array, "3"]) -> DecodeState:
    """Copy what belongs to the prompt, from one slot to another.

    Block by block, as far as the prompt goes: what lies beyond takes no memory until it is written,
    and what an earlier request left there no query can see.

    Args:
        packed: the slot that holds the prompt, the one that is to, and how many of the prompt's
            positions are in it.
    """
    source, target, filled = packed[0], packed[1], packed[2]

    def copied(held: Array) -> Array:
        return _with_row(held, target, lax.dynamic_index_in_dim(held, source, keepdims=False))

    def with_block(held: Array, number: Array) -> Array:
        place = number * BLOCK, *[0] * (held.ndim - 2)
        block = lax.dynamic_slice(held, _indices(source, *place), (1, BLOCK, *held.shape[2:]))
        return lax.dynamic_update_slice(held, block, _indices(target, *place))

    def copy(number: Array, held: list[Array]) -> list[Array]:
        return [with_block(each, number) for each in held]

    cache, num_layers = state.cache, len(state.cache.keys)
    held = [*cache.keys, *cache.values]
    # One loop for rings and one for full-length caches.
    for length in sorted({each.shape[1] for each in held}):
        places = [place for place, each in enumerate(held) if each.shape[1] == length]
        count = -(-jnp.minimum(filled, length) // BLOCK)
        done = lax.fori_loop(0, count, copy, [held[place] for place in places])
        for place, each in zip(places, done, strict=True):
            held[place] = each
    return replace(
        state,
        cache=replace(
            cache,
            keys=tuple(held[:num_layers]),
            values=tuple(held[num_layers:]),
            positions={kind: copied(each) for kind, each in cache.positions.items()},
        ),
        bias=copied(state.bias),
        in_prompt=copied(state.in_prompt),
    )


def save(cache: KVCache, packed: Int32[Array, "2"]) -> Block:
    """Copy a block of a slot, from a first position on that a block begins at."""
    slot, start = packed[0], packed[1]

    def block(held: Array) -> Array:
        at = _indices(slot, start % held.shape[1], 0, 0)
        return lax.dynamic_slice(held, at, (1, BLOCK, *held.shape[2:]))[0]

    return {"keys": tuple(map(block, cache.keys)), "values": tuple(map(block, cache.values))}


def load(state: DecodeState, packed: Int32[Array, "2"], block: Block) -> DecodeState:
    """Put a block that was saved into a slot, at the position it was saved from."""
    slot, start = packed[0], packed[1]

    def put(held: Array, new: Array) -> Array:
        at = _indices(slot, start % held.shape[1], *[0] * (held.ndim - 2))
        return lax.dynamic_update_slice(held, new[None], at)

    cache = state.cache
    positions = start + jnp.arange(BLOCK, dtype=jnp.int32)
    loaded = replace(
        cache,
        keys=tuple(map(put, cache.keys, block["keys"])),
        values=tuple(map(put, cache.values, block["values"])),
        positions={kind: put(held, positions) for kind, held in cache.positions.items()},
    )
    return replace(state, cache=loaded)


def reset(state: DecodeState, slot: Int32[Array, "1"]) -> DecodeState:
    """Clear what a slot's layers hold: a number that is not finite would outlive its request.

    A place that the mask hides still counts with weight 0, and 0 times infinity is no number.
    """

    def cleared(held: Array, value: int = 0) -> Array:
        return _with_row(held, slot[0], jnp.full(held.shape[1:], value, held.dtype))

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


def _with_row(held: Shaped[Array, "b *r"], slot: Int32[Array, ""], row: Array) -> Array:
    """The array with a slot's part of it replaced.

    An update of a slice, in place. `held.at[slot].set` would be a scatter, which XLA compiles to a
    loop for each array.
    """
    return lax.dynamic_update_index_in_dim(held, row, slot, axis=0)


def _indices(*indices: Array | int) -> tuple[Array, ...]:
    return tuple(jnp.asarray(index, jnp.int32) for index in indices)
