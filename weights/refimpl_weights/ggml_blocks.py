"""Which bits of which ggml block become which integer, scale and minimum.

A GGUF file keeps a quantised row as a run of blocks, each a small packed record. This file turns
records into plain arrays and nothing more: pure numpy, no files, no model, and no rounding, since
the only product formed here, a float16 factor times an integer of at most 8 bits, is exact in
float32. The records are those of `ggml-common.h` in llama.cpp, their meaning is that of the
functions `dequantize_row_*` in its `ggml-quants.c`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from gguf import GGMLQuantizationType
from jaxtyping import Float32, Int8, Shaped, UInt8

type Blocks = Shaped[np.ndarray, " blocks"]
"""Records of one type's layout."""

type Unpacked = tuple[
    Int8[np.ndarray, "blocks columns"],
    Float32[np.ndarray, "blocks groups"],
    Float32[np.ndarray, "blocks groups"] | None,
]
"""Integers, scales and minimums, in the sense of `QuantizedArray`."""


@dataclass(frozen=True)
class BlockFormat:
    """How one quantised type stores its weights.

    Attributes:
        layout: the record of one block, its fields in the file's order, little endian.
        columns: number of neighbouring weights in a block.
        group: number of neighbouring weights that share a scale; divides `columns`.
        unpack: from records to integers, scales and minimums.
    """

    layout: np.dtype
    columns: int
    group: int
    unpack: Callable[[Blocks], Unpacked]

    @property
    def has_minimums(self) -> bool:
        """Whether a weight is `scale * integer - minimum`, and not just the product."""
        return "minimum" in (self.layout.fields or {})

    def has_finite_factors(self, blocks: Blocks) -> bool:
        """Whether every float16 of the records is a number; no quantiser writes another."""
        names = ("scale", "minimum") if self.has_minimums else ("scale",)
        return all(bool(np.isfinite(blocks[name]).all()) for name in names)


def _split(packed: UInt8[np.ndarray, "*b n"], *, bits: int) -> UInt8[np.ndarray, "*b parts n"]:
    """The `8 // bits` unsigned integers inside each byte, lowest bits first.

    The parts' axis stands *before* the bytes', since ggml spreads neighbouring weights over
    neighbouring bytes: the low halves of 16 bytes are weights 0..15, their high halves 16..31.
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return (packed[..., None, :] >> shifts) & np.uint8((1 << bits) - 1)


def _signed(integers: UInt8[np.ndarray, "*b"], *, offset: int) -> Int8[np.ndarray, "*b"]:
    """`integers - offset`, for differences that fit a signed byte."""
    # The subtraction wraps at 256; the view reads the wrapped byte as two's complement.
    return (integers - np.uint8(offset)).view(np.int8)


def _factor(blocks: Blocks, field: str) -> Float32[np.ndarray, "blocks 1"]:
    """One float16 of each record, with an axis for the block's groups."""
    return blocks[field].astype(np.float32)[:, None]


# The types with one scale a block: 32 weights.


def _four_bits(blocks: Blocks) -> UInt8[np.ndarray, "blocks 32"]:
    return _split(blocks["low"], bits=4).reshape(-1, 32)


def _five_bits(blocks: Blocks) -> UInt8[np.ndarray, "blocks 32"]:
    # The fifth bits form one 32-bit word, and bit j of it belongs to weight j.
    fifth = np.unpackbits(blocks["high"], axis=-1, bitorder="little")
    return _four_bits(blocks) | (fifth << 4)


def _q4_0(blocks: Blocks) -> Unpacked:
    return _signed(_four_bits(blocks), offset=8), _factor(blocks, "scale"), None


def _q4_1(blocks: Blocks) -> Unpacked:
    # This type and Q5_1 add their minimum, the K types subtract theirs. Negation is exact.
    values = _signed(_four_bits(blocks), offset=0)
    return values, _factor(blocks, "scale"), -_factor(blocks, "minimum")


def _q5_0(blocks: Blocks) -> Unpacked:
    return _signed(_five_bits(blocks), offset=16), _factor(blocks, "scale"), None


def _q5_1(blocks: Blocks) -> Unpacked:
    values = _signed(_five_bits(blocks), offset=0)
    return values, _factor(blocks, "scale"), -_factor(blocks, "minimum")


def _q8_0(blocks: Blocks) -> Unpacked:
    return blocks["integers"], _factor(blocks, "scale"), None


# The nonlinear types: four bits choose one of sixteen integers, denser around zero.
_CODEBOOK = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.int8
)


def _iq4_nl(blocks: Blocks) -> Unpacked:
    return _CODEBOOK[_four_bits(blocks)], _factor(blocks, "scale"), None


def _iq4_xs(blocks: Blocks) -> Unpacked:
    values = _CODEBOOK[_split(blocks["low"].reshape(-1, 8, 16), bits=4).reshape(-1, 256)]
    # Six bits for each of eight groups. Here neighbouring groups share a byte, so the bytes' axis
    # goes before that of the parts.
    low = _split(blocks["factors_low"][..., None], bits=4).reshape(-1, 8)
    high = _split(blocks["factors_high"][..., None], bits=2).reshape(-1, 8)
    return values, _factor(blocks, "scale") * _signed(low | (high << 4), offset=32), None


# The K types: 256 weights, whose groups' scales are themselves integers times a float16.


def _q2_k(blocks: Blocks) -> Unpacked:
    low = _split(blocks["low"].reshape(-1, 2, 32), bits=2).reshape(-1, 256)
    scales = _factor(blocks, "scale") * (blocks["factors"] & 15)
    minimums = _factor(blocks, "minimum") * (blocks["factors"] >> 4)
    return _signed(low, offset=0), scales, minimums


def _q3_k(blocks: Blocks) -> Unpacked:
    low = _split(blocks["low"].reshape(-1, 2, 32), bits=2).reshape(-1, 256)
    high = _split(blocks["high"], bits=1).reshape(-1, 256)
    low_factors = _split(blocks["factors"][:, :8], bits=4).reshape(-1, 16)
    high_factors = _split(blocks["factors"][:, 8:], bits=2).reshape(-1, 16)
    factors = _signed(low_factors | (high_factors << 4), offset=32)
    return _signed(low | (high << 2), offset=4), _factor(blocks, "scale") * factors, None


def _scales_and_minimums(
    blocks: Blocks,
) -> tuple[Float32[np.ndarray, "blocks 8"], Float32[np.ndarray, "blocks 8"]]:
    """Both factors of the eight groups of a Q4_K or Q5_K block, six bits each in twelve bytes.

    In three runs of four bytes, a, b and c, for j = 0..3:

        a[j] = high two bits of scale 4+j   | all six of scale j
        b[j] = high two bits of minimum 4+j | all six of minimum j
        c[j] = low four bits of minimum 4+j | low four of scale 4+j
    """
    a, b, c = np.moveaxis(blocks["factors"].reshape(-1, 3, 4), 1, 0)
    scales = np.concatenate([a & 63, (a >> 6 << 4) | (c & 15)], axis=-1)
    minimums = np.concatenate([b & 63, (b >> 6 << 4) | (c >> 4)], axis=-1)
    return _factor(blocks, "scale") * scales, _factor(blocks, "minimum") * minimums


def _q4_k(blocks: Blocks) -> Unpacked:
    low = _split(blocks["low"].reshape(-1, 4, 32), bits=4).reshape(-1, 256)
    return _signed(low, offset=0), *_scales_and_minimums(blocks)


def _q5_k(blocks: Blocks) -> Unpacked:
    low = _split(blocks["low"].reshape(-1, 4, 32), bits=4).reshape(-1, 256)
    high = _split(blocks["high"], bits=1).reshape(-1, 256)
    return _signed(low | (high << 4), offset=0), *_scales_and_minimums(blocks)


def _q6_k(blocks: Blocks) -> Unpacked:
    low = _split(blocks["low"].reshape(-1, 2, 64), bits=4).reshape(-1, 256)
    high = _split(blocks["high"].reshape(-1, 2, 32), bits=2).reshape(-1, 256)
    values = _signed(low | (high << 4), offset=32)
    return values, _factor(blocks, "scale") * blocks["factors"], None


# Our field names and llama.cpp's: scale = d, minimum = m or dmin, integers and low = qs (ql in
# Q6_K), high = qh (hmask in Q3_K), factors = scales (scales_l and scales_h in IQ4_XS).
_SCALE = ("scale", "<f2", ())
_MINIMUM = ("minimum", "<f2", ())


def _bytes(field: str, count: int) -> tuple[str, str, tuple[int]]:
    return field, "u1", (count,)


def _format(
    unpack: Callable[[Blocks], Unpacked],
    *record: tuple[str, str, tuple[int, ...]],
    columns: int,
    group: int,
) -> BlockFormat:
    return BlockFormat(np.dtype(list(record)), columns, group, unpack)


_Q = GGMLQuantizationType
_SMALL = {"columns": 32, "group": 32}
_WIDE_32 = {"columns": 256, "group": 32}
_WIDE_16 = {"columns": 256, "group": 16}

BLOCK_FORMATS: Mapping[GGMLQuantizationType, BlockFormat] = MappingProxyType(
    {
        _Q.Q4_0: _format(_q4_0, _SCALE, _bytes("low", 16), **_SMALL),
        _Q.Q4_1: _format(_q4_1, _SCALE, _MINIMUM, _bytes("low", 16), **_SMALL),
        _Q.Q5_0: _format(_q5_0, _SCALE, _bytes("high", 4), _bytes("low", 16), **_SMALL),
        _Q.Q5_1: _format(_q5_1, _SCALE, _MINIMUM, _bytes("high", 4), _bytes("low", 16), **_SMALL),
        _Q.Q8_0: _format(_q8_0, _SCALE, ("integers", "i1", (32,)), **_SMALL),
        _Q.IQ4_NL: _format(_iq4_nl, _SCALE, _bytes("low", 16), **_SMALL),
        _Q.IQ4_XS: _format(
            _iq4_xs,
            _SCALE,
            _bytes("factors_high", 2),
            _bytes("factors_low", 4),
            _bytes("low", 128),
            **_WIDE_32,
        ),
        _Q.Q2_K: _format(
            _q2_k, _bytes("factors", 16), _bytes("low", 64), _SCALE, _MINIMUM, **_WIDE_16
        ),
        _Q.Q3_K: _format(
            _q3_k, _bytes("high", 32), _bytes("low", 64), _bytes("factors", 12), _SCALE, **_WIDE_16
        ),
        _Q.Q4_K: _format(
            _q4_k, _SCALE, _MINIMUM, _bytes("factors", 12), _bytes("low", 128), **_WIDE_32
        ),
        _Q.Q5_K: _format(
            _q5_k,
            _SCALE,
            _MINIMUM,
            _bytes("factors", 12),
            _bytes("high", 32),
            _bytes("low", 128),
            **_WIDE_32,
        ),
        _Q.Q6_K: _format(
            _q6_k,
            _bytes("low", 128),
            _bytes("high", 64),
            ("factors", "i1", (16,)),
            _SCALE,
            **_WIDE_16,
        ),
    }
)
"""Every quantised type that we read."""
