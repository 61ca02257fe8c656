"""All kernels together: a decode step's row has the same bits alone and among others.

Each kernel keeps its promise in a program of its own. In one program XLA fuses neighbours, and how
it does so depends on sizes, so a layer is held to the promise too, in the sizes of Gemma 3 270M.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from refimpl_kernels.attention_rows import row_attention
from refimpl_kernels.gelu import gelu
from refimpl_kernels.linear import linear
from refimpl_kernels.norm import rms_norm
from refimpl_kernels.rope import apply_rope, rope_angles

from tests.kernel_cases import AttentionCase, assert_same_bits, matrix, normal, row_stable

WIDTH, HIDDEN = 640, 2048
CASE = AttentionCase(
    t=1, s=640, lengths=(700, 3, 512, 1409, 1, 640, 130, 256), n=4, k=1, h=256, window=512
)

GLOBAL = CASE._replace(s=2560, lengths=(2049, 3, 700, 2560, 1, 640), window=None)


def weights() -> dict[str, Any]:
    query_width = CASE.n * CASE.h
    return {
        "scale": jnp.asarray(normal(WIDTH)),
        "query_scale": jnp.asarray(normal(CASE.h)),
        "query": matrix("q32-", WIDTH, query_width),
        "output": matrix("q32-", query_width, WIDTH),
        "gate_up": matrix("q32-", WIDTH, 2 * HIDDEN),
        "down": matrix("bfloat16", HIDDEN, WIDTH),
    }


def layer(
    weights: dict[str, Any],
    x: Array,
    key: Array,
    value: Array,
    positions: dict[str, Array],
    *,
    window: int | None,
) -> Array:
    """A layer of Gemma 3 whose keys and values are in the cache already."""

    def norm(x: Array, scale: str) -> Array:
        return rms_norm(x, weights[scale], epsilon=1e-6, offset=1.0)

    def chain(x: Array, name: str) -> Array:
        return linear(x, weights[name], implementation="chain")

    angles = rope_angles(positions["query_positions"], head_width=CASE.h, theta=1e4)
    query = chain(norm(x, "scale"), "query").reshape(*x.shape[:2], CASE.n, CASE.h)
    query = apply_rope(norm(query, "query_scale"), angles)
    mixed = row_attention(
        query,
        key,
        value,
        query_positions=positions["query_positions"],
        key_positions=positions["key_positions"],
        scale=CASE.scale,
        window=window,
    )
    x = x + norm(chain(mixed.reshape(*x.shape[:2], -1), "output"), "scale")
    gate, up = jnp.split(chain(norm(x, "scale"), "gate_up"), 2, axis=-1)
    return x + norm(chain(gelu(gate) * up, "down"), "scale")


@pytest.mark.parametrize("case", [CASE, GLOBAL], ids=["local", "global"])
def test_a_row_has_the_same_bits_alone_and_among_others(case: AttentionCase) -> None:
    (_, key, value), positions = jax.device_get(case.arrays())
    rows = (normal(len(case.lengths), 1, WIDTH), key, value, positions)
    held, run = weights(), row_stable(partial(layer, window=case.window))
    together = run(held, *rows)
    assert np.isfinite(together).all()
    for count in (1, 3):
        for start in (0, len(case.lengths) - count):
            some = slice(start, start + count)
            found = run(held, *jax.tree.map(lambda array, some=some: array[some], rows))
            assert_same_bits(found, np.asarray(together)[some])
