"""What is done to logits before the draw: each step, their order, and nothing where none is due."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from refimpl_kernels.penalties import process

from tests.oracle import sampler as oracle
from tests.oracle.sampler import Parameters
from tests.sampler_rows import compiled, rows_of

WIDTH = 400
PROCESS = compiled(process)


def inputs(random: np.random.Generator, b: int) -> dict[str, Any]:
    """Logits, counts, prompts and biases of b rows."""
    bias = random.normal(size=(b, WIDTH)) * (random.random((b, WIDTH)) < 0.1)
    bias[random.random((b, WIDTH)) < 0.05] = -np.inf
    return {
        "logits": (random.normal(size=(b, WIDTH)) * 5).astype(np.float32),
        "counts": random.integers(0, 300, (b, WIDTH), np.int32)
        * (random.random((b, WIDTH)) < 0.3),
        "in_prompt": random.random((b, WIDTH)) < 0.2,
        "bias": bias.astype(np.float32),
        "banned": np.where(random.random((b, 3)) < 0.5, random.integers(0, WIDTH, (b, 3)), -1)
        .astype(np.int32),
    }  # fmt: skip


def processed(
    parameters: list[Parameters], given: dict[str, Any], *, is_biased: bool
) -> np.ndarray:
    rows = rows_of(parameters, is_biased=is_biased)
    return np.asarray(PROCESS(given["logits"], rows, **in_slots(given)))


def in_slots(given: dict[str, Any]) -> dict[str, Any]:
    """What belongs to the rows, in slots from the last to the first, and one that nobody has."""
    held = {
        key: np.concatenate([given[key][::-1], np.ones_like(given[key][:1])])
        for key in ("counts", "in_prompt", "bias")
    }
    slot = np.arange(len(given["logits"]), dtype=np.int32)[::-1]
    return {"slot": slot, "banned": given["banned"], **held}


PENALTIES = {
    "nothing": {},
    "frequency": {"frequency": 0.37},
    "negative frequency": {"frequency": -1.9},
    "presence": {"presence": 1.3},
    "repetition": {"repetition": 1.1},
    "reward": {"repetition": 0.7},
    "all": {"frequency": 0.11, "presence": -0.7, "repetition": 1.7},
}


@pytest.mark.parametrize("is_biased", [False, True])
def test_rows_come_out_as_the_oracle_has_them_alone(is_biased: bool) -> None:
    """Bit for bit, though the rows beside them ask for other things."""
    parameters = [Parameters(**changed) for changed in PENALTIES.values()]
    for seed in range(5):
        given = inputs(np.random.default_rng(seed), len(parameters))
        got = processed(parameters, given, is_biased=is_biased)
        for i, one in enumerate(parameters):
            expected = oracle.process(
                given["logits"][i],
                one,
                counts=given["counts"][i],
                in_prompt=given["in_prompt"][i],
                bias=given["bias"][i] if is_biased else None,
                banned=tuple(j for j in given["banned"][i].tolist() if j >= 0),
            )
            np.testing.assert_array_equal(got[i].view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("name", PENALTIES)
def test_formulas_in_float64(name: str) -> None:
    one = Parameters(**PENALTIES[name])
    given = inputs(np.random.default_rng(9), 7)
    x = given["logits"].astype(np.float64) + given["bias"]
    seen = given["in_prompt"] | (given["counts"] > 0)
    x = np.where(seen, np.where(x > 0, x / one.repetition, x * one.repetition), x)
    x -= given["counts"] * one.frequency + (given["counts"] > 0) * one.presence
    for row, ids in enumerate(given["banned"]):
        x[row, ids[ids >= 0]] = -np.inf
    got = processed([one] * 7, given, is_biased=True)
    # Parameters and quotients are rounded to float32, four times in all, numbers up to 600.
    np.testing.assert_allclose(got, x, rtol=3e-7, atol=1.5e-4)


def test_a_row_that_asks_for_nothing_comes_out_as_it_went_in() -> None:
    """Also beside rows that ask for all, with the sign of its zeros."""
    given = inputs(np.random.default_rng(4), 7)
    given["logits"][:, :50] = -0.0
    given["banned"][0] = -1
    given["counts"] = given["counts"].copy()
    parameters = [Parameters(), *[Parameters(**PENALTIES["all"])] * 6]
    got = processed(parameters, given, is_biased=False)
    np.testing.assert_array_equal(got[0].view(np.uint32), given["logits"][0].view(np.uint32))
    assert np.any(got[1] != given["logits"][1])


def test_bits_do_not_depend_on_what_the_program_does_next() -> None:
    """No contraction: a sum that follows in the same program does not change a bit."""
    given = inputs(np.random.default_rng(6), 7)
    logits, rest = given["logits"], in_slots(given)
    rows = rows_of([Parameters(**PENALTIES["all"])] * 7, is_biased=True)
    alone = np.asarray(PROCESS(logits, rows, **rest))

    def followed(logits: Any, rows: Any, rest: Any) -> Any:
        x = process(logits * 1, rows, **rest)
        return x - jnp.max(jnp.where(jnp.isfinite(x), x, 0)), x

    less, x = compiled(followed)(logits, rows, rest)
    np.testing.assert_array_equal(np.asarray(x), alone)
    highest = np.max(np.where(np.isfinite(alone), alone, 0))
    np.testing.assert_array_equal(np.asarray(less), alone - highest)
