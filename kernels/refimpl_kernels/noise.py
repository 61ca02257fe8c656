"""Gumbel noise that depends on a seed, a choice, a position and a token id, and on nothing else.

Defined in integers from end to end, so that it comes out the same on every device and in every
program. All words have 32 bits; >> shifts in zeros on unsigned numbers and the sign on signed ones,
so it rounds down; products and sums are taken modulo 2^32.

The random word
    key  = threefry2x32(key=(seed mod 2^32, seed // 2^32), counter=(choice, position))
    word = threefry2x32(key=key, counter=(id, 0)), first word
with 20 rounds (Salmon et al. 2011, table 2; the constants are those of Random123). A signed seed is
taken in two's complement.

The noise of a word stands for -log(-log(u)) with u = (word + 1/2) / 2^32, in units of 2^-24:
    low  = word < 2^31                      whether u < 1/2
    a    = word if low else 2^32 - 1 - word
    odd  = 2 a + 1                          so that p = odd / 2^33 is u, or 1 - u
    n    = leading zeros of odd
    A    = (n + 2) L - (P(LOG, y) + 1 >> 1)          -log(p) in units of 2^-27; unsigned
           where y = ((odd << n + 1) mod 2^32) - 2^31, signed
    if low, where m = leading zeros of A and y = ((A << m + 1) mod 2^32) - 2^31, signed:
        noise = (m - 4) L - (P(LOG, y) + 1 >> 1) + 4 >> 3        that is -log(A); signed
    otherwise, where y = odd - 2^31, signed:
        noise = A - (P(RATIO, y) + 1 >> 1) + 4 >> 3              -log(1 - u) - log(e / (1 - u))
with L = 93032640 (log 2 in units of 2^-27). The polynomials take y in units of 2^-32 and give
    P(LOG, y)   = log(3/2 + y)                               in units of 2^-28
    P(RATIO, y) = log(-log(1 - t) / t), t = (y + 1/2) / 2    likewise
by Horner's rule, the four inner steps with 16 bits:
    v = c8;  v = ck + (v (y >> 16) >> 16)  for k = 7, 6, 5, in units of 2^-21
    v = v << 7;  v = ck + mulhi(v, y)      for k = 4, 3, 2, 1, 0, in units of 2^-28
    mulhi(v, y) = v1 y1 + (v1 y0 >> 16) + (v0 y1 >> 16), where v = 2^16 v1 + v0, 0 <= v0 < 2^16
and the coefficients c0 ... c8 below (least largest error, by Lawson's iteration).

It differs from -log(-log(u)) by less than 1.7e-7, nearly three of its units: the tests hold 21
million words to that, both ends and the seam at 2^31 among them. It lies between -3.13 and 22.88.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Int32, UInt32

from refimpl_kernels.fixed_point import multiply_high, signed, unsigned

NOISE_BITS = 24  # noise is in units of 2^-24

LOG_2 = 93032640
LOG = (108841209, 178956836, -59651939, 26519210, -13266407, 54457, -29914, 21483, -13212)
RATIO = (37687007, 85194129, 23447431, 9354470, 4346120, 16914, 8901, 6075, 3619)

_PARITY = 0x1BD11BDA
_NOISE_OF_HALF = 6149100  # -log(log 2), a little more
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def gumbel_noise(
    seed: UInt32[Array, "b 2"],
    choice: Int32[Array, " b"],
    position: Int32[Array, " b"],
    ids: Int32[Array, "#b v"],
) -> Int32[Array, "b v"]:
    """Standard Gumbel noise in units of 2^-24.

    Args:
        seed: low and high word of each request's 64-bit seed.
        choice: which of the request's choices a row is, from 0.
        position: of the token to be chosen, from 0 at the first token of the prompt.
        ids: token ids.
    """
    return gumbel_of_words(noise_words(seed, choice, position, ids))


def noise_words(
    seed: UInt32[Array, "b 2"],
    choice: Int32[Array, " b"],
    position: Int32[Array, " b"],
    ids: Int32[Array, "#b v"],
) -> UInt32[Array, "b v"]:
    """The random words of these ids."""
    key = threefry_2x32(seed[:, 0], seed[:, 1], unsigned(choice), unsigned(position))
    counter = unsigned(ids)
    return threefry_2x32(key[0][:, None], key[1][:, None], counter, jnp.zeros_like(counter))[0]


def threefry_2x32(
    key_one: UInt32[Array, "*#b"],
    key_two: UInt32[Array, "*#b"],
    one: UInt32[Array, "*#b"],
    two: UInt32[Array, "*#b"],
) -> tuple[UInt32[Array, "*b"], UInt32[Array, "*b"]]:
    """Threefry 2x32 with 20 rounds of a counter (one, two).

    Unrolled, so that XLA makes one vector loop of it: five times as fast as JAX's own on a CPU.
    """
    schedule = (key_one, key_two, key_one ^ key_two ^ jnp.uint32(_PARITY))
    one, two = one + key_one, two + key_two
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            one = one + two
            two = (two << rotation | two >> (32 - rotation)) ^ one
        one = one + schedule[(group + 1) % 3]
        two = two + schedule[(group + 2) % 3] + jnp.uint32(group + 1)
    return one, two


def gumbel_of_words(word: UInt32[Array, "*b"]) -> Int32[Array, "*b"]:
    """Gumbel noise of random words, in units of 2^-24."""
    low = word < jnp.uint32(1 << 31)
    odd = jnp.where(low, word, ~word) * jnp.uint32(2) + jnp.uint32(1)
    zeros = lax.clz(odd)
    log = _polynomial(_centred(odd << zeros << 1), LOG)
    exponential = (zeros + jnp.uint32(2)) * jnp.uint32(LOG_2) - unsigned(log)

    # Two polynomials, evaluated as one: each element has the coefficients that it needs.
    zeros = lax.clz(exponential)
    coefficients = [
        jnp.where(low, jnp.int32(a), jnp.int32(b)) for a, b in zip(LOG, RATIO, strict=True)
    ]
    log = _polynomial(_centred(jnp.where(low, exponential << zeros << 1, odd)), coefficients)
    of_low = (signed(zeros) - jnp.int32(4)) * jnp.int32(LOG_2) - log
    of_high = exponential - unsigned(log)
    # One may exceed 2^31 and the other may be negative: the shifts differ.
    return jnp.where(low, (of_low + 4) >> 3, signed((of_high + 4) >> 3))


def bound_of_words(word: UInt32[Array, "*b"]) -> Int32[Array, "*b"]:
    """What the noise of random words does not exceed, for a tenth of its cost.

    Where u >= 1/2, the noise is below -log(1 - u), and the bits of a float are a logarithm of base
    2 with straight lines between the powers; so the bound is at most 0.43 too high, and 0.07 for
    large noise. Where u < 1/2 it is the noise of 1/2.
    """
    rest = signed(~word).astype(jnp.float32)  # meant for words of 2^31 and more
    log_2 = lax.bitcast_convert_type(rest, jnp.int32) - ((127 + 32) << 23)
    # 355 / 2^8 is a little more than 2 log 2; the 2 makes up for what was rounded.
    bound = (((-log_2) >> 8) + 2) * 355
    return jnp.where(word < jnp.uint32(1 << 31), jnp.int32(_NOISE_OF_HALF), bound)


def _centred(x: UInt32[Array, "*b"]) -> Int32[Array, "*b"]:
    """x - 2^31: a fraction in units of 2^-32, less one half."""
    return signed(x ^ jnp.uint32(1 << 31))


def _polynomial(
    y: Int32[Array, "*b"], coefficients: Sequence[int | Int32[Array, "*b"]]
) -> Int32[Array, "*b"]:
    """P of the module's docstring, halved with rounding: in units of 2^-27."""
    c = [jnp.asarray(value, jnp.int32) for value in coefficients]
    coarse, value = y >> 16, c[8]
    for k in (7, 6, 5):
        value = c[k] + ((value * coarse) >> 16)
    value = value << 7
    for k in (4, 3, 2, 1, 0):
        value = c[k] + multiply_high(value, y)
    return (value + 1) >> 1
