"""How one tensor of a synthetic checkpoint is described, and how its numbers come about.

Owns the arithmetic from PCG64's raw bits to float32, which is the same on every machine. Knows
nothing of models.
"""

import math
from typing import NamedTuple

import numpy as np


class Drawn(NamedTuple):
    """A tensor to be drawn: uniform in [centre - spread, centre + spread)."""

    name: str
    shape: tuple[int, ...]
    centre: float
    spread: float


def matrix(name: str, outputs: int, inputs: int, *, gain: float = 1.0) -> Drawn:
    """Entries of standard deviation `gain / sqrt(inputs)`: outputs `gain` times as large as inputs.

    A uniform variable's bound is sqrt(3) standard deviations.
    """
    return Drawn(name, (outputs, inputs), 0.0, gain * math.sqrt(3.0 / inputs))


def norm(name: str, width: int, *, centre: float = 0.0, spread: float = 0.5) -> Drawn:
    """A vector of factors, one a channel."""
    return Drawn(name, (width,), centre, spread)


def draw(generator: np.random.PCG64, drawn: Drawn) -> np.ndarray:
    """The next numbers of the generator, one raw draw each, as the tensor that is described."""
    raw = generator.random_raw(math.prod(drawn.shape))
    # 53 bits are what a float64 holds exactly, so the only roundings are the two that IEEE 754
    # defines: of the product and sum in float64, and of the result to float32.
    unit = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1.0
    return (drawn.centre + drawn.spread * unit).astype(np.float32).reshape(drawn.shape)
