"""Log-probabilities against float64, and the top list: order, ties, and the very same bits."""

import jax.numpy as jnp
import numpy as np
import pytest
from refimpl_kernels.logprobs import log_probabilities, top_logprobs

from tests.sampler_rows import compiled, hard_logits


def log_softmax_float64(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def top(vocab_size: int):
    return compiled(lambda x, tokens: top_logprobs(x, tokens, vocab_size=vocab_size))


LOG_PROBABILITIES = compiled(log_probabilities)


def test_log_probabilities_sum_to_one_and_take_large_logits() -> None:
    logits = jnp.array([[1e4, 1e4 - 1, 0.0], [-50.0, 0.0, 50.0]], jnp.float32)
    every = jnp.stack([log_probabilities(logits, jnp.full(2, i, jnp.int32)) for i in range(3)])
    np.testing.assert_allclose(np.exp(np.asarray(every, np.float64)).sum(axis=0), 1, rtol=1e-6)
    assert float(every[1, 0] - every[0, 0]) == -1.0


@pytest.mark.parametrize("width", [60, 20_000, 262_144])
def test_top_lists_are_those_of_a_stable_sort(width: int) -> None:
    vocab_size = width - 7
    several = hard_logits(np.random.default_rng(width), width)
    program = top(vocab_size)
    for logits in np.stack([several[i] for i in (0, 1, 2, 3, 7, 8)]).reshape(3, 2, width):
        tokens = np.array([vocab_size - 1, 5], np.int32)
        logprob, ids, values = (np.asarray(x) for x in program(logits, tokens))
        exact = log_softmax_float64(logits)
        order = np.argsort(-logits[:, :vocab_size], axis=1, kind="stable")[:, :20]
        np.testing.assert_array_equal(ids, order)
        # float32: half a unit of numbers up to 60, and as much for the logarithm of the sum.
        np.testing.assert_allclose(values, np.take_along_axis(exact, order, 1), atol=6e-6)
        np.testing.assert_allclose(logprob, exact[[0, 1], tokens], atol=6e-6)
        assert np.all(np.diff(values, axis=1) <= 0)


def test_values_of_the_list_have_the_bits_of_the_token_itself() -> None:
    logits = np.random.default_rng(1).normal(size=(2, 20_000)).astype(np.float32) * 4
    program = top(19_990)
    _, ids, values = program(logits, np.zeros(2, np.int32))
    for rank in range(20):
        tokens = np.asarray(ids)[:, rank]
        again, _, _ = program(logits, tokens)
        np.testing.assert_array_equal(np.asarray(again), np.asarray(values)[:, rank])
        alone = LOG_PROBABILITIES(logits, tokens)
        np.testing.assert_array_equal(np.asarray(alone), np.asarray(values)[:, rank])


def test_a_row_has_the_same_bits_alone_and_among_others() -> None:
    logits = np.random.default_rng(2).normal(size=(8, 20_000)).astype(np.float32) * 4
    tokens = np.arange(8, dtype=np.int32) * 2000
    program = top(19_990)
    together = [np.asarray(x) for x in program(logits, tokens)]
    for i in range(8):
        alone = program(logits[i : i + 1], tokens[i : i + 1])
        for one, all_of_them in zip(alone, together, strict=True):
            np.testing.assert_array_equal(np.asarray(one)[0], all_of_them[i])


def test_leading_axes_are_rows() -> None:
    logits = np.random.default_rng(3).normal(size=(2, 3, 50)).astype(np.float32)
    tokens = np.arange(6, dtype=np.int32).reshape(2, 3)
    got = np.asarray(LOG_PROBABILITIES(logits, tokens))
    exact = np.take_along_axis(log_softmax_float64(logits), tokens[..., None], -1)[..., 0]
    np.testing.assert_allclose(got, exact, atol=1e-6)
