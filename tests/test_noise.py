"""The noise: threefry against its published answers, the Gumbel numbers against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refimpl_kernels.noise import (
    NOISE_BITS,
    bound_of_words,
    gumbel_noise,
    gumbel_of_words,
    noise_words,
)
from refimpl_kernels.noise import threefry_2x32 as threefry_of_kernels
from refimpl_kernels.sampling import split_seed

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
UNIT = 2.0**-NOISE_BITS


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


# Known answers from Random123's kat_vectors file: key, counter, result.
KNOWN = [
    ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
    ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
    ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
]


@pytest.mark.parametrize(("key", "counter", "expected"), KNOWN)
def test_threefry_is_the_published_one(key, counter, expected) -> None:
    words = [jnp.array([word], jnp.uint32) for word in (*key, *counter)]
    assert tuple(int(word[0]) for word in threefry_of_kernels(*words)) == expected
    assert threefry_2x32(key, counter) == expected


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63)])
def test_words_are_what_the_docstring_says(seed: int) -> None:
    choice, position, num_ids = 3, 70_000, 50
    got = noise_words(
        jnp.array([split_seed(seed)], jnp.uint32),
        jnp.array([choice], jnp.int32),
        jnp.array([position], jnp.int32),
        jnp.arange(num_ids, dtype=jnp.int32)[None],
    )
    key = threefry_2x32((seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF), (choice, position))
    expected = [threefry_2x32(key, (i, 0))[0] for i in range(num_ids)]
    np.testing.assert_array_equal(np.asarray(got)[0], np.array(expected, np.uint32))


def gumbel_float64(word: np.ndarray) -> np.ndarray:
    """-log(-log((word + 1/2) / 2^32)), with the logarithm near 1 taken from the other side."""
    u = (word.astype(np.float64) + 0.5) / 2**32
    rest = (np.bitwise_not(word).astype(np.float64) + 0.5) / 2**32
    return -np.log(np.where(u < 0.5, -np.log(u), -np.log1p(-rest)))


GUMBEL = jax.jit(gumbel_of_words)
BOUND = jax.jit(bound_of_words)


@pytest.mark.parametrize("start", [0, 2**31 - 2**21, 2**32 - 2**22], ids=hex)
def test_noise_is_gumbel_at_the_ends_and_at_the_seam(start: int) -> None:
    word = np.arange(start, start + 2**22, dtype=np.int64).astype(np.uint32)
    error = np.asarray(GUMBEL(word)) * UNIT - gumbel_float64(word)
    assert np.max(np.abs(error)) < 1.7e-7  # as the docstring says
    assert np.all(np.asarray(BOUND(word)) >= np.asarray(GUMBEL(word)))


def test_noise_is_gumbel_all_over() -> None:
    # Every 509th word; 509 is prime, so no bit pattern is left out for long.
    word = np.arange(0, 2**32, 509, dtype=np.int64).astype(np.uint32)
    noise = np.asarray(GUMBEL(word)) * UNIT
    assert np.max(np.abs(noise - gumbel_float64(word))) < 1.7e-7
    bound = np.asarray(BOUND(word)) * UNIT
    assert np.all(bound >= noise)
    assert np.max((bound - noise)[word >= 2**31]) < 0.43
    assert np.max((bound - noise)[noise > 4]) < 0.07
    assert noise.min() > -3.13
    assert noise.max() < 22.88


def test_noise_depends_on_seed_choice_position_and_id_alone() -> None:
    """A row's noise is the same wherever it stands, and no two of the four can be swapped."""
    seed = jnp.array([[1, 2], [2, 1], [1, 2], [1, 2]], jnp.uint32)
    choice, position = jnp.array([3, 3, 4, 3], jnp.int32), jnp.array([4, 4, 3, 4], jnp.int32)
    noise = np.asarray(gumbel_noise(seed, choice, position, jnp.arange(64, dtype=jnp.int32)[None]))
    np.testing.assert_array_equal(noise[0], noise[3])
    for other in (1, 2):
        assert np.mean(noise[0] == noise[other]) == 0
    some = gumbel_noise(seed[:1], choice[:1], position[:1], jnp.array([[63, 5]], jnp.int32))
    np.testing.assert_array_equal(np.asarray(some)[0], noise[0, [63, 5]])
