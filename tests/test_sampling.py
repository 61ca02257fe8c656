"""The sampler: greedy ties, the noise as its docstring defines it, and what is drawn in the end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refimpl_kernels.logprobs import log_probabilities
from refimpl_kernels.sampling import gumbel, sample, split_seed

SAMPLE = jax.jit(sample)
ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def threefry_2x32(key: tuple[int, int], counter: tuple[int, int]) -> tuple[int, int]:
    """Threefry 2x32, 20 rounds, after Salmon et al. 2011, table 2; plain Python integers."""
    mask = 0xFFFFFFFF
    schedule = (*key, key[0] ^ key[1] ^ 0x1BD11BDA)
    one, two = (counter[0] + key[0]) & mask, (counter[1] + key[1]) & mask
    for group in range(5):
        for rotation in ROTATIONS[group % 2]:
            one = (one + two) & mask
            two = ((two << rotation | two >> (32 - rotation)) & mask) ^ one
        one = (one + schedule[(group + 1) % 3]) & mask
        two = (two + schedule[(group + 2) % 3] + group + 1) & mask
    return one, two


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


def test_threefry_of_this_test_is_the_published_one() -> None:
    """Known answers from Random123's kat_vectors file."""
    assert threefry_2x32((0, 0), (0, 0)) == (0x6B200159, 0x99BA4EFE)
    ones = (0xFFFFFFFF, 0xFFFFFFFF)
    assert threefry_2x32(ones, ones) == (0x1CB996FC, 0xBB002BE7)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63)])
def test_noise_is_what_its_docstring_says(seed: int) -> None:
    choice, position, num_ids = 3, 70_000, 50
    got = np.asarray(gumbel(words(seed), jnp.int32(choice), jnp.int32(position), num_ids=num_ids))
    low, high = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    key = threefry_2x32((low, high), (choice, position))
    first_words = np.array([threefry_2x32(key, (i, 0))[0] for i in range(num_ids)])
    uniform = (first_words // 2**9 + 0.5) / 2**23
    # Two float32 logarithms; the inner one loses most where u is near 1.
    np.testing.assert_allclose(got, -np.log(-np.log(uniform)), rtol=1e-5, atol=1e-5)


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
