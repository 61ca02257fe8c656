"""What the battery of the kernels shares: seeded arrays, rounding units and comparisons.

The bounds. A float32 operation errs by at most UNIT of its result. k of them in a row err by
sqrt(k) UNIT of the sum of magnitudes, times a small number, unless all errors point one way
(Higham and Mary, SIAM J. Sci. Comput. 41(5), 2019); `summed` takes 2 for that number. A result in
bfloat16 that is rounded once lies within half a spacing of the float32 result, and `rounded_once`
holds it to that. Every test adds to these only what its operation adds, and says what.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import ArrayLike
from refimpl_kernels.compiling import row_stable_options
from refimpl_kernels.experts import Route
from refimpl_kernels.matrix import Matrix, OutputMajorMatrix, QuantizedMatrix

UNIT = 2.0**-24
BFLOAT16_UNIT = 2.0**-8


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Standard normal numbers in float32, the same for the same arguments."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape, dtype=np.float32)


def float64(array: ArrayLike) -> np.ndarray:
    return np.asarray(array).astype(np.float64)


def summed(k: int) -> float:
    """Error of a float32 sum of k products, relative to the sum of their magnitudes."""
    return 2 * (k + 1) ** 0.5 * UNIT


def assert_within(actual: ArrayLike, expected: ArrayLike, bound: ArrayLike) -> None:
    """Every element within its own absolute bound; a nan is within none."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    error = np.abs(float64(actual) - float64(expected))
    bound = np.broadcast_to(float64(bound), error.shape)
    if not (error <= bound).all():
        worst = np.unravel_index(np.argmax(np.nan_to_num(error - bound, nan=np.inf)), error.shape)
        raise AssertionError(
            f"{(~(error <= bound)).sum()} of {error.size} elements out of bounds; at {worst} "
            f"got {actual[worst]}, expected {expected[worst]} within {bound[worst]:.3g}"
        )


def assert_rounded_once(actual: Array, expected: ArrayLike, bound: ArrayLike) -> None:
    """Of type bfloat16, and as near to the float32 result as one rounding leaves it."""
    assert actual.dtype == jnp.bfloat16
    _, exponent = np.frexp(float64(expected))
    half_spacing = np.ldexp(1.0, exponent - 9)
    assert_within(actual, expected, half_spacing + float64(bound))


def assert_same_bits(actual: ArrayLike, expected: ArrayLike) -> None:
    """Same type, shape and bits; unlike ==, this tells -0 from 0, and a nan equals itself."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    differ = actual.view(f"u{actual.itemsize}") != expected.view(f"u{expected.itemsize}")
    assert not differ.any(), f"{differ.sum()} of {differ.size} elements differ"


def row_stable(function: Callable[..., Any]) -> jax.stages.Wrapped:
    """The function compiled as programs are that promise the same bits under any load."""
    platform = jax.default_backend()
    options = row_stable_options(platform)
    return jax.jit(function, compiler_options=options or None)


STORED_AS = ("float32", "bfloat16", "float16", "q16", "q16-", "q32", "q32-", "o16-", "o32")


def matrix(stored_as: str, inputs: int, outputs: int) -> Matrix:
    """Random weights; "q32-" is quantized in blocks of 32 with minimums, "q16" in 16s without.

    "o32-" and "o16" hold the same numbers, stored by outputs. Scales are as in ggml: a float16
    times an integer of six bits.
    """
    if stored_as.startswith("o"):
        return turned(matrix(f"q{stored_as[1:]}", inputs, outputs))
    if not stored_as.startswith("q"):
        return jnp.asarray(normal(inputs, outputs), stored_as)
    random = np.random.default_rng([inputs, outputs])
    blocks = (inputs // int(stored_as[1:3]), outputs)
    values = random.integers(-128, 128, (inputs, outputs), dtype=np.int8)
    scales, minimums = (
        random.uniform(1e-4, 1e-3, blocks).astype(np.float16).astype(np.float32)
        * random.integers(1, 64, blocks).astype(np.float32)
        for _ in range(2)
    )
    minimums = jnp.asarray(100 * minimums) if stored_as.endswith("-") else None
    return QuantizedMatrix(jnp.asarray(values), jnp.asarray(scales), minimums)


def turned(matrix: Matrix) -> Matrix:
    """A quantized matrix stored by outputs where it was by inputs, or by inputs."""
    assert not isinstance(matrix, Array)
    is_by_output = isinstance(matrix, OutputMajorMatrix)
    kind = QuantizedMatrix if is_by_output else OutputMajorMatrix
    minimums = None if matrix.minimums is None else matrix.minimums.T
    return kind(matrix.values.T, matrix.scales.T, minimums)


def parts(matrix: Matrix) -> tuple[np.ndarray, np.ndarray]:
    """In float64, what the matrix holds: products of scale and value, and minimums or zeros."""
    if isinstance(matrix, OutputMajorMatrix):
        return parts(turned(matrix))
    if not isinstance(matrix, QuantizedMatrix):
        return float64(matrix), np.zeros(matrix.shape)
    scales, minimums = (
        np.zeros(matrix.shape) if leaf is None else np.repeat(float64(leaf), matrix.block, axis=0)
        for leaf in (matrix.scales, matrix.minimums)
    )
    return scales * float64(matrix.values), minimums


def dense_weights(routed: Route, num_experts: int) -> np.ndarray:
    """A column for each expert, as the spec gives weights."""
    dense = np.zeros((len(routed.experts), num_experts), np.float32)
    np.put_along_axis(dense, np.asarray(routed.experts), np.asarray(routed.weights), axis=-1)
    return dense


class AttentionCase(NamedTuple):
    """Queries at the end of sequences of several lengths, keys in caches of one.

    Attributes:
        lengths: filled positions of each row; the queries are the last t of them. A row that has
            fewer than t is padded in front.
        s: places in the cache. The key of position p lies at p % s, so a longer row is a ring.
        sharpness: what queries are multiplied by.
    """

    t: int = 1
    s: int = 16
    lengths: tuple[int, ...] = (16,)
    n: int = 1
    k: int = 1
    h: int = 16
    window: int | None = None
    cap: float | None = None
    sharpness: float = 1.0

    @property
    def scale(self) -> float:
        return self.h**-0.5

    def arrays(self) -> tuple[tuple[Array, Array, Array], dict[str, Array]]:
        """Query, key and value; positions of queries and keys. What no one may see is filled."""
        b, last = len(self.lengths), max(self.lengths)
        query = self.sharpness * normal(b, self.t, self.n, self.h)
        keys, values = normal(2, b, last, self.k, self.h)
        held, held_values = normal(2, b, self.s, self.k, self.h, seed=1)
        places = np.full((b, self.s), -1, np.int32)
        for row, length in enumerate(self.lengths):
            for position in range(length):
                places[row, position % self.s] = position
                held[row, position % self.s] = keys[row, position]
                held_values[row, position % self.s] = values[row, position]
        ends = np.array(self.lengths)[:, None]
        positions = np.maximum(ends - self.t + np.arange(self.t), -1).astype(np.int32)
        heads = (jnp.asarray(query), jnp.asarray(held), jnp.asarray(held_values))
        return heads, {
            "query_positions": jnp.asarray(positions),
            "key_positions": jnp.asarray(places),
        }
