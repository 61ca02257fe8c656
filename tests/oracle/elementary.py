"""Functions of one array that several parts of the model use, in float64."""

from collections.abc import Callable
from functools import partial

import numpy as np

from tests.oracle.arrays import Floats

einsum = partial(np.einsum, optimize=True)  # optimize: through matrix products where it can

# `rms_norm` with a model's epsilon and offset filled in: norm(x, weight), or norm(x, None).
Norm = Callable[[Floats, np.ndarray | None], Floats]


def rms_norm(x: Floats, weight: np.ndarray | None, *, epsilon: float, offset: float) -> Floats:
    """x / sqrt(mean(x^2) + epsilon) * gain over the last axis (arXiv 1910.07467).

    The gain is offset + weight: Gemma 1 to 3 store its difference from one (offset 1), Gemma 3n
    and 4 the gain itself (offset 0). Without a weight it is 1, whatever the offset.
    """
    mean_square = np.mean(x**2, axis=-1, keepdims=True)
    gain = 1.0 if weight is None else offset + np.asarray(weight, np.float64)
    return x / np.sqrt(mean_square + epsilon) * gain


def gelu_tanh(x: Floats) -> Floats:
    """The tanh approximation of arXiv 1606.08415, which Gemma was trained with."""
    return 0.5 * x * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3)))


def soft_cap(x: Floats, cap: float | None) -> Floats:
    """cap * tanh(x / cap) (Gemma 2 report, section 2), or x where the model has no cap."""
    return x if cap is None else cap * np.tanh(x / cap)


def softmax(scores: Floats) -> Floats:
    """Softmax over the last axis. A row of -inf alone (a query that sees nothing) gives zeros."""
    top = scores.max(axis=-1, keepdims=True)
    exponentials = np.exp(scores - np.where(np.isfinite(top), top, 0.0))
    total = exponentials.sum(axis=-1, keepdims=True)
    return exponentials / np.where(total == 0.0, 1.0, total)
