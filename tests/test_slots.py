"""What programs do to one slot, and leave alone in the others."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refimpl.engine import slots
from refimpl.engine.state import DecodeState
from refimpl.model.cache import BLOCK
from tests.engines import tiny_programs


def numbered(state: DecodeState) -> DecodeState:
    """Every key and value a number of its own slot."""

    def of_slots(held: jax.Array) -> jax.Array:
        slot = jnp.arange(held.shape[0], dtype=held.dtype) + 1
        return jnp.broadcast_to(slot[:, None, None, None], held.shape)

    cache = state.cache
    return replace(
        state,
        cache=replace(
            cache,
            keys=tuple(map(of_slots, cache.keys)),
            values=tuple(map(of_slots, cache.values)),
            positions={kind: held.at[2].set(7) for kind, held in cache.positions.items()},
        ),
    )


@pytest.mark.parametrize("filled", [0, 1, BLOCK, BLOCK + 1, 3 * BLOCK])
def test_a_fork_copies_the_blocks_of_the_prompt_and_no_others(filled: int) -> None:
    state = numbered(tiny_programs().new_state())
    forked = jax.jit(slots.fork)(state, jnp.array([2, 5, filled], jnp.int32)).cache
    assert {held.shape[1] for held in forked.keys} == {2 * BLOCK, 3 * BLOCK}
    for held in (*forked.keys, *forked.values):
        copied = min(-(-filled // BLOCK) * BLOCK, held.shape[1])
        assert (np.asarray(held[5, :copied]) == 3).all()
        assert (np.asarray(held[5, copied:]) == 6).all()
        others = [slot for slot in range(held.shape[0]) if slot != 5]
        assert (np.asarray(held)[others] == np.array(others)[:, None, None, None] + 1).all()
    for held in forked.positions.values():
        assert (np.asarray(held)[[2, 5]] == 7).all()
