"""Integer arithmetic for numbers that must come out the same everywhere.

Floating-point logarithms and exponentials differ from library to library, and compilers contract
`a * b + c` as they please. Integers do neither. JAX has 32 bits without its x64 mode, so products
and sums that need more are put together here.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Int32, UInt32

from refimpl_kernels.rows import column_sums

LIMB_BITS = 20
_LIMB = (1 << LIMB_BITS) - 1
_DIGIT_BITS = 10
_DIGIT = (1 << _DIGIT_BITS) - 1


class Wide(NamedTuple):
    """Numbers below 2^52: high * 2^20 + low, with low < 2^20.

    Attributes:
        high: the upper 32 bits.
        low: the lower 20 bits.
    """

    high: UInt32[Array, "*b"]
    low: UInt32[Array, "*b"]


def unsigned(x: Int32[Array, "*b"]) -> UInt32[Array, "*b"]:
    """The same 32 bits, read as an unsigned number."""
    return lax.bitcast_convert_type(x, jnp.uint32)


def signed(x: UInt32[Array, "*b"]) -> Int32[Array, "*b"]:
    """The same 32 bits, read in two's complement."""
    return lax.bitcast_convert_type(x, jnp.int32)


def multiply_high(a: Int32[Array, "*#b"], y: Int32[Array, "*#b"]) -> Int32[Array, "*b"]:
    """About a * y / 2^32, by 16-bit halves: a1 y1 + (a1 y0 >> 16) + (a0 y1 >> 16).

    The upper halves a1, y1 are signed, the lower ones a0, y0 are not, and >> rounds down; the
    product a0 y0 is left out. The result is at most 3 below the true quotient, never above it.
    """
    sixteen, low = jnp.int32(16), jnp.int32(0xFFFF)
    a1, a0, y1, y0 = a >> sixteen, a & low, y >> sixteen, y & low
    return a1 * y1 + ((a1 * y0) >> sixteen) + ((a0 * y1) >> sixteen)


def polynomial(
    y: Int32[Array, "*b"], coefficients: Sequence[int | Int32[Array, "*b"]]
) -> Int32[Array, "*b"]:
    """c0 + c1 y + c2 y^2 + ... by Horner's rule; y in units of 2^-32, the rest in one of its own.

    Args:
        coefficients: c0 first.
    """
    *lower, value = (jnp.asarray(c, jnp.int32) for c in coefficients)
    for coefficient in reversed(lower):
        value = coefficient + multiply_high(value, y)
    return value


def wide_sum(x: UInt32[Array, "b v"]) -> Wide:
    """Sum of each row, exact for v <= 2^20 and values up to 2^31."""
    # At most 2^9 values a column, so that neither half of a column's sum exceeds 2^25.
    low, high = column_sums(x & 0xFFFF), column_sums(x >> 16)
    low = low + ((high & 0xF) << 16)
    # At most 2^11 columns: both sums stay below 2^32.
    column = Wide((high >> 4) + (low >> LIMB_BITS), low & _LIMB)
    return _carried(jnp.sum(column.high, axis=1), jnp.sum(column.low, axis=1))


def wide_prefix_sums(x: UInt32[Array, "b k"]) -> Wide:
    """Sums of the first 1, 2, ... k of each row, exact for k <= 2^12 and values up to 2^31."""
    return _carried(jnp.cumsum(x >> LIMB_BITS, axis=1), jnp.cumsum(x & _LIMB, axis=1))


def at_least(a: Wide, b: Wide) -> Bool[Array, "*b"]:
    """a >= b."""
    return (a.high > b.high) | ((a.high == b.high) & (a.low >= b.low))


def share(fraction: UInt32[Array, " b"], total: Wide) -> Wide:
    """ceil(fraction * total / 2^20), for fractions up to 2^20: schoolbook, in digits of 10 bits."""
    by = [(fraction >> (_DIGIT_BITS * i)) & _DIGIT for i in range(3)]
    digits = [(total.low >> (_DIGIT_BITS * i)) & _DIGIT for i in range(2)]
    digits += [(total.high >> (_DIGIT_BITS * i)) & _DIGIT for i in range(4)]
    carry, product = jnp.zeros_like(fraction), list[Array]()
    for place in range(len(digits) + len(by)):
        terms = [
            digit * by[place - i] for i, digit in enumerate(digits) if 0 <= place - i < len(by)
        ]
        column = sum(terms, start=carry)
        product.append(column & _DIGIT)
        carry = column >> _DIGIT_BITS
    low = product[2] + (product[3] << _DIGIT_BITS)
    high = product[4] + (product[5] << _DIGIT_BITS) + (product[6] << 2 * _DIGIT_BITS)
    high = high + (product[7] << 3 * _DIGIT_BITS)
    rest = ((product[0] | product[1]) > 0).astype(jnp.uint32)
    return _carried(high, low + rest)


def _carried(high: UInt32[Array, "*b"], low: UInt32[Array, "*b"]) -> Wide:
    return Wide(high + (low >> LIMB_BITS), low & _LIMB)
