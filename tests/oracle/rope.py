"""Rotary position embedding (arXiv 2104.09864), and the one rounding that is worth imitating."""

from typing import Protocol

import numpy as np

from tests.oracle.arrays import Floats, Integers


class AngleFunction(Protocol):
    """Angles [b t h/2] at positions [b t] for heads of width h: pair i turns by the i-th."""

    def __call__(
        self, positions: Integers, h: int, /, *, base: float, factor: float, proportion: float = 1.0
    ) -> Floats: ...


def exact_angles(
    positions: Integers, h: int, /, *, base: float, factor: float, proportion: float = 1.0
) -> Floats:
    """position / factor * base^(-2i/h); the factor is position interpolation (arXiv 2306.15595).

    Only the first floor(proportion * h / 2) pairs turn, as fast as if all did; the angle of the
    others is zero everywhere (Gemma 4).
    """
    pair = np.arange(h // 2)
    frequencies = np.where(pair < _turning(h, proportion), base ** (-2.0 * pair / h), 0.0)
    return positions[..., None] / factor * frequencies


def float32_angles(
    positions: Integers, h: int, /, *, base: float, factor: float, proportion: float = 1.0
) -> Floats:
    """The same with every operation rounded to float32, in the order that Hugging Face has them:
    position * ((1 / base^(2i/h)) / factor).

    Three of the operations round (2i/h is exact, and so is a division by 8): at position p an angle
    is off by up to 3 p 2^-24, which at p = 5000 is 9e-4. So a float32 program runs, far from the
    start, a model with slightly different angles; with those angles given, the rest of its
    arithmetic can be judged as sharply there as at position 0.
    """
    one = np.float32(1.0)
    exponents = np.arange(0, h, 2).astype(np.float32) / np.float32(h)
    # Through float64, because a float32 power is rounded differently by different processors.
    powers = (base ** exponents.astype(np.float64)).astype(np.float32)
    frequencies = one / powers / np.float32(factor)
    frequencies[_turning(h, proportion) :] = 0.0
    return (positions[..., None].astype(np.float32) * frequencies).astype(np.float64)


def _turning(h: int, proportion: float) -> int:
    """How many of the h/2 pairs turn."""
    return int(proportion * h // 2)


def rotate(x: Floats, angles: Floats) -> Floats:
    """x [b t n h] with pair i, which is (x_i, x_(i + h/2)), turned by the i-th of angles [b t h/2].

    The pairs are taken from the two halves of a head; they are not neighbours.
    """
    first, second = np.split(x, 2, axis=-1)
    cosine, sine = np.cos(angles)[:, :, None], np.sin(angles)[:, :, None]
    return np.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
