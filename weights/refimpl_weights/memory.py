"""Memory that a device takes over without a copy."""

import math

import numpy as np
from numpy.typing import DTypeLike

# Bytes; XLA shares a host buffer that starts at a multiple of this.
ALIGNMENT = 64


def aligned_empty(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """An array of whatever is in memory, beginning at a multiple of `ALIGNMENT` bytes."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)
