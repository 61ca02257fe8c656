"""The sampler: greedy ties, the noise as its docstring defines it, and what is drawn in the end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refimpl_kernels.logprobs import log_probabilities
from refimpl_kernels.sampling import sample, split_seed

SAMPLE = jax.jit(sample)


def words(seed: int) -> jax.Array:
    return jnp.array(split_seed(seed), jnp.uint32)


def draw(logits: np.ndarray, *, temperature: float, seed: int, position: int) -> int:
    return int(
        SAMPLE(
            jnp.asarray(logits, jnp.float32),
            temperature=jnp.float32(temperature),
            seed=words(seed),
            choice=jnp.int32(0),
            position=jnp.int32(position),
        )
    )


def test_zero_temperature_takes_the_lowest_of_equal_ids() -> None:
    assert draw(np.array([0.0, 2.0, 1.0, 2.0]), temperature=0.0, seed=5, position=9) == 1


def test_impossible_ids_are_never_drawn() -> None:
    logits = np.array([-np.inf, 0.0, -np.inf, 0.0])
    drawn = {draw(logits, temperature=2.0, seed=s, position=1) for s in range(64)}
    assert drawn == {1, 3}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    """Chi-square of 20,000 draws over 8 ids; 33.1 is the 1 - 2.5e-5 quantile for 7 degrees."""
    logits = jnp.array([0.0, 1.0, -1.0, 2.0, 0.5, 0.25, -2.0, 1.5])
    count = 20_000

    def one(position: jax.Array) -> jax.Array:
        return sample(
            logits,
            temperature=jnp.float32(temperature),
            seed=words(1234),
            choice=jnp.int32(0),
            position=position,
        )

    drawn = np.asarray(jax.jit(jax.vmap(one))(jnp.arange(count, dtype=jnp.int32)))
    seen = np.bincount(drawn, minlength=8)
    scaled = np.exp(np.asarray(logits, np.float64) / temperature)
    expected = count * scaled / scaled.sum()
    assert np.sum((seen - expected) ** 2 / expected) < 33.1


def test_log_probabilities_sum_to_one_and_take_large_logits() -> None:
    logits = jnp.array([[1e4, 1e4 - 1, 0.0], [-50.0, 0.0, 50.0]], jnp.float32)
    every = jnp.stack([log_probabilities(logits, jnp.full(2, i, jnp.int32)) for i in range(3)])
    np.testing.assert_allclose(np.exp(np.asarray(every, np.float64)).sum(axis=0), 1, rtol=1e-6)
    assert float(every[1, 0] - every[0, 0]) == -1.0
