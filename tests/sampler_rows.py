"""Rows of parameters for the sampler's tests, and logits that are hard on it."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from refimpl_kernels.compiling import row_stable_options
from refimpl_kernels.sampling import SamplingRows, draw, split_seed

from tests.oracle.sampler import Parameters


def rows_of(parameters: Sequence[Parameters], *, is_biased: bool = False) -> SamplingRows:
    """One row for each."""

    def column(name: str, dtype: type) -> Array:
        return jnp.asarray(np.array([getattr(one, name) for one in parameters], dtype))

    return SamplingRows(
        temperature=column("temperature", np.float32),
        top_p=column("top_p", np.float32),
        top_k=column("top_k", np.int32),
        min_p=column("min_p", np.float32),
        frequency=column("frequency", np.float32),
        presence=column("presence", np.float32),
        repetition=column("repetition", np.float32),
        seed=jnp.array([split_seed(one.seed) for one in parameters], jnp.uint32),
        choice=column("choice", np.int32),
        is_biased=jnp.full((len(parameters),), is_biased),
    )


def compiled(program: Callable[..., Any]) -> Callable[..., Any]:
    """A program as the engine compiles those that batch rows."""
    return jax.jit(program, compiler_options=row_stable_options(jax.default_backend()) or None)


@cache
def drawing(vocab_size: int) -> Callable[..., Array]:
    """(processed logits, rows, position) -> tokens."""
    return compiled(lambda x, rows, position: draw(x, rows, position, vocab_size=vocab_size))


def hard_logits(random: np.random.Generator, width: int) -> list[np.ndarray]:
    """Ties, none but ties, one above all, impossible ids, huge, tiny, near and close values."""
    plain = (random.normal(size=width) * 3).astype(np.float32)
    one_hot = np.where(np.arange(width) == width // 3, 60, 0).astype(np.float32)
    return [
        plain,
        np.round(plain),
        np.full(width, 1.5, np.float32),
        one_hot,
        np.where(random.random(width) < 0.7, -np.inf, plain).astype(np.float32),
        plain * np.float32(1e30),
        plain * np.float32(1e-30),
        plain * np.float32(0.05),
        np.round(plain * np.float32(0.3)) * np.float32(1e-3),
    ]


def random_parameters(random: np.random.Generator) -> Parameters:
    """Any combination of the rules, each of them often off."""

    def one_of(*values: float) -> float:
        return float(np.float32(random.choice(values)))

    return Parameters(
        temperature=one_of(0, 0.3, 1, 2),
        top_p=one_of(0, 0.1, 0.5, 0.9, 0.999, 1, 1),
        top_k=int(one_of(0, 0, -1, 1, 5, 50, 300, 5000)),
        min_p=one_of(0, 0, 0, 1e-6, 0.01, 0.2, 1),
        seed=int(random.integers(-(2**63), 2**63)),
        choice=int(random.integers(5)),
    )
