"""Chi-square of 100,000 draws for each parameter: the token follows the distribution asked for.

Seeds are fixed; p > 1e-4 is asked for, so that a right sampler would have failed one time in ten
thousand when the seeds were chosen.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from refimpl_kernels.penalties import process
from refimpl_kernels.sampling import SamplingRows, draw

from tests.oracle.sampler import Parameters
from tests.sampler_rows import compiled, rows_of

WIDTH, VOCABULARY, BATCH, DRAWS = 16, 13, 10_000, 100_000
LOGITS = np.random.default_rng(21).normal(size=WIDTH).astype(np.float32) * np.float32(1.5)
COUNTS = np.array([0, 3, 0, 1, 2, 0, 0, 5, 0, 0, 1, 0, 0, 0, 0, 0], np.int32)
IN_PROMPT = np.arange(WIDTH) % 3 == 0
NO_BIAS = np.zeros(WIDTH, np.float32)
SOME_BIAS = np.where(np.arange(WIDTH) == 4, 2.5, NO_BIAS - 0.3).astype(np.float32)
ALLOWED = np.where(np.isin(np.arange(WIDTH), [1, 2, 6, 9]), 0, -np.inf).astype(np.float32)
BANNED = np.where(np.isin(np.arange(WIDTH), [0, 7]), -np.inf, 0).astype(np.float32)


@dataclass(frozen=True)
class Case:
    """What a row asks for."""

    parameters: dict[str, Any]
    bias: np.ndarray | None = None
    stop_ids: tuple[int, ...] = ()


CASES = {
    "temperature 1": Case({}),
    "temperature 0.6": Case({"temperature": 0.6}),
    "temperature 2": Case({"temperature": 2}),
    "top_p": Case({"top_p": 0.8}),
    "top_k": Case({"top_k": 5}),
    "min_p": Case({"min_p": 0.15}),
    "frequency": Case({"frequency": 0.4}),
    "presence": Case({"presence": -0.9}),
    "repetition": Case({"repetition": 1.6}),
    "logit_bias": Case({}, SOME_BIAS),
    "allowed ids": Case({}, ALLOWED),
    "banned ids": Case({}, BANNED),
    "min_tokens": Case({}, None, (2, 7, -1)),
    "all together": Case(
        {
            "temperature": 1.4,
            "top_p": 0.9,
            "top_k": 9,
            "min_p": 0.03,
            "frequency": 0.2,
            "presence": 0.3,
            "repetition": 0.8,
        },
        SOME_BIAS + BANNED,
        (3, -1, -1),
    ),
}


def expected_probabilities(case: Case) -> np.ndarray:
    """By plain formulas in float64."""
    one = Parameters(**case.parameters)
    x = LOGITS.astype(np.float64) + (0 if case.bias is None else case.bias)
    seen = IN_PROMPT | (COUNTS > 0)
    x = np.where(seen, np.where(x > 0, x / one.repetition, x * one.repetition), x)
    x -= COUNTS * one.frequency + (COUNTS > 0) * one.presence
    x[[i for i in case.stop_ids if i >= 0]] = -np.inf
    x = x[:VOCABULARY] / one.temperature

    order = np.argsort(-x, kind="stable")
    order = order[: one.top_k] if one.top_k else order
    p = np.exp(x[order] - x[order[0]])
    below = (np.cumsum(p) - p) / p.sum()
    kept = order[(below < one.top_p) & (p >= one.min_p)]
    weights = np.zeros(VOCABULARY)
    weights[kept] = np.exp(x[kept])
    return weights / weights.sum()


def tail(chi_square: float, degrees: int) -> float:
    """P(X >= chi_square): Abramowitz and Stegun 26.4.4 and 26.4.5."""
    half = chi_square / 2
    total = math.erfc(math.sqrt(half)) if degrees % 2 else math.exp(-half)
    for k in range(1 if degrees % 2 else 2, degrees, 2):
        total += math.exp(k / 2 * math.log(half) - half - math.lgamma(k / 2 + 1))
    return total


@pytest.mark.parametrize(
    ("chi_square", "degrees", "p"),
    [(3.841, 1, 0.05), (5.991, 2, 0.05), (18.307, 10, 0.05), (37.697, 15, 0.001)],
)
def test_the_tail_is_that_of_the_tables(chi_square: float, degrees: int, p: float) -> None:
    assert tail(chi_square, degrees) == pytest.approx(p, rel=1e-3)


def _drawn(rows: SamplingRows, position: Array, bias: Array, stop_ids: Array) -> Array:
    def repeated(row: np.ndarray | Array) -> Array:
        return jnp.broadcast_to(row, (BATCH, len(row)))

    processed = process(
        repeated(LOGITS),
        rows,
        slot=jnp.arange(BATCH),
        counts=repeated(COUNTS),
        in_prompt=repeated(IN_PROMPT),
        bias=repeated(bias),
        banned=repeated(stop_ids),
    )
    return draw(processed, rows, position, vocab_size=VOCABULARY)


DRAWN = compiled(_drawn)


@pytest.mark.parametrize("name", CASES)
def test_draws_follow_the_distribution(name: str) -> None:
    case = CASES[name]
    one = Parameters(seed=1234, **case.parameters)
    rows = rows_of([one] * BATCH, is_biased=case.bias is not None)
    bias = NO_BIAS if case.bias is None else case.bias
    stop_ids = np.array(case.stop_ids or (-1, -1, -1), np.int32)
    seen = np.zeros(VOCABULARY)
    for start in range(0, DRAWS, BATCH):
        position = np.arange(start, start + BATCH, dtype=np.int32)
        tokens = np.asarray(DRAWN(rows, position, bias, stop_ids))
        seen += np.bincount(tokens, minlength=VOCABULARY)
    expected = DRAWS * expected_probabilities(case)
    possible = expected > 0
    assert seen[~possible].sum() == 0
    assert seen.sum() == DRAWS
    assert expected[possible].min() > 5  # Cochran's rule for the normal approximation
    chi_square = float(np.sum((seen - expected)[possible] ** 2 / expected[possible]))
    assert tail(chi_square, int(possible.sum()) - 1) > 1e-4
