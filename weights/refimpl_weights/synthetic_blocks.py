"""From float32 weights to ggml blocks, for the K types, which the gguf package only reads.

For tiny synthetic files. Each scale is what covers its group's range and each integer the nearest;
llama.cpp searches for scales with a smaller error, so its files are better at the same size.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from gguf import GGMLQuantizationType, quants
from jaxtyping import Float32, Integer, Shaped, UInt8

from refimpl_weights.ggml_blocks import BLOCK_FORMATS


def quantize(
    weights: Float32[np.ndarray, "*rows columns"], tensor_type: GGMLQuantizationType
) -> Shaped[np.ndarray, "*rows stored"]:
    """The rows as the file stores them: bytes, except that F32 and F16 stay numbers.

    Raises:
        NotImplementedError: a type that nothing here can write.
    """
    if tensor_type not in _PACKERS:
        return quants.quantize(weights, tensor_type)
    layout = BLOCK_FORMATS[tensor_type].layout
    records = np.empty(weights.size // 256, layout)
    for field, content in _PACKERS[tensor_type](weights.reshape(-1, 256)).items():
        records[field] = content.reshape(records[field].shape)
    return records.view(np.uint8).reshape(*weights.shape[:-1], -1)


def _join(parts: UInt8[np.ndarray, "*b parts n"], *, bits: int) -> UInt8[np.ndarray, "*b n"]:
    """`8 // bits` unsigned integers into each byte, the first into the lowest bits."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return np.bitwise_or.reduce(parts << shifts, axis=-2)


def _nearest(
    weights: Float32[np.ndarray, "*b"], step: Float32[np.ndarray, "*#b"], *, low: int, high: int
) -> Integer[np.ndarray, "*b"]:
    """Which multiple of `step` is nearest, within [low, high]; any would do where a step is 0."""
    multiples = np.rint(weights / np.where(step == 0, np.float32(1), step))
    return np.clip(multiples, low, high).astype(np.int16)


def _half(numbers: Float32[np.ndarray, "*b"]) -> Float32[np.ndarray, "*b"]:
    """Rounded to what a float16 can hold."""
    return numbers.astype(np.float16).astype(np.float32)


def _affine(
    weights: Float32[np.ndarray, "blocks 256"], *, bits: int
) -> tuple[dict[str, np.ndarray], UInt8[np.ndarray, "blocks 8 32"]]:
    """Factors of a Q4_K or Q5_K block, and the unsigned integers that go with them."""
    groups = weights.reshape(-1, 8, 32)
    top = 2**bits - 1
    minimums = np.maximum(-groups.min(axis=-1), 0)
    scales = (groups.max(axis=-1) + minimums) / np.float32(top)
    scale = _half(scales.max(axis=-1, keepdims=True) / np.float32(63))
    minimum = _half(minimums.max(axis=-1, keepdims=True) / np.float32(63))
    s = _nearest(scales, scale, low=0, high=63).astype(np.uint8)
    m = _nearest(minimums, minimum, low=0, high=63).astype(np.uint8)

    shifted = groups + (minimum * m)[..., None]
    integers = _nearest(shifted, (scale * s)[..., None], low=0, high=top).astype(np.uint8)
    first, last = slice(0, 4), slice(4, 8)
    factors = [
        s[:, first] | (s[:, last] >> 4 << 6),
        m[:, first] | (m[:, last] >> 4 << 6),
        (s[:, last] & 15) | (m[:, last] << 4),
    ]
    record = {"scale": scale, "minimum": minimum, "factors": np.concatenate(factors, axis=-1)}
    return record, integers


def _pack_q4_k(weights: Float32[np.ndarray, "blocks 256"]) -> dict[str, np.ndarray]:
    record, integers = _affine(weights, bits=4)
    return {**record, "low": _join(integers.reshape(-1, 4, 2, 32), bits=4)}


def _pack_q5_k(weights: Float32[np.ndarray, "blocks 256"]) -> dict[str, np.ndarray]:
    record, integers = _affine(weights, bits=5)
    low = _join((integers & 15).reshape(-1, 4, 2, 32), bits=4)
    return {**record, "low": low, "high": _join(integers >> 4, bits=1)}


def _pack_q6_k(weights: Float32[np.ndarray, "blocks 256"]) -> dict[str, np.ndarray]:
    groups = weights.reshape(-1, 16, 16)
    # The weight of largest magnitude becomes -32, so a scale has the opposite sign of it.
    largest = np.take_along_axis(groups, np.abs(groups).argmax(-1, keepdims=True), -1)[..., 0]
    scales = largest / np.float32(-32)
    scale = _half(np.abs(scales).max(axis=-1, keepdims=True) / np.float32(127))
    factors = _nearest(scales, scale, low=-127, high=127).astype(np.int8)
    integers = _nearest(groups, (scale * factors)[..., None], low=-32, high=31)
    unsigned = (integers + 32).astype(np.uint8).reshape(-1, 256)
    return {
        "low": _join((unsigned & 15).reshape(-1, 2, 2, 64), bits=4),
        "high": _join((unsigned >> 4).reshape(-1, 2, 4, 32), bits=2),
        "factors": factors,
        "scale": scale,
    }


_PACKERS: Mapping[
    GGMLQuantizationType, Callable[[Float32[np.ndarray, "blocks 256"]], dict[str, np.ndarray]]
] = MappingProxyType(
    {
        GGMLQuantizationType.Q4_K: _pack_q4_k,
        GGMLQuantizationType.Q5_K: _pack_q5_k,
        GGMLQuantizationType.Q6_K: _pack_q6_k,
    }
)
