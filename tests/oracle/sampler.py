"""The published sampler once more, in NumPy, from its definition alone.

Written from the docstrings of `refimpl_kernels.noise`, `.penalties`, `.truncation` and `.sampling`,
one row at a time, with 64-bit integers where those say 32 bits, and a plain sort. Every result must
be the same, bit for bit.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tests.oracle.arrays import Booleans, Integers

Float32s = NDArray[np.float32]
Words = NDArray[np.int64]

MASK = 0xFFFFFFFF
LOG = (108841209, 178956836, -59651939, 26519210, -13266407, 54457, -29914, 21483, -13212)
RATIO = (37687007, 85194129, 23447431, 9354470, 4346120, 16914, 8901, 6075, 3619)
EXPONENTIAL = (759250125, -759250154, 379625075, -126539760, 31634974, -6358988, 1059641)


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """How one row is sampled; the defaults ask for nothing."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    frequency: float = 0.0
    presence: float = 0.0
    repetition: float = 1.0
    seed: int = 0
    choice: int = 0


def threefry(key: tuple[int, int], one: Words, two: Words) -> tuple[Words, Words]:
    """Threefry 2x32 with 20 rounds."""
    schedule = (key[0], key[1], key[0] ^ key[1] ^ 0x1BD11BDA)
    one, two = one + key[0] & MASK, two + key[1] & MASK
    for step in range(20):
        rotation = (13, 15, 26, 6, 17, 29, 16, 24)[step % 8]
        one = one + two & MASK
        two = (two << rotation & MASK | two >> 32 - rotation) ^ one
        if step % 4 == 3:
            group = step // 4 + 1
            one = one + schedule[group % 3] & MASK
            two = two + schedule[(group + 1) % 3] + group & MASK
    return one, two


def words(parameters: Parameters, position: int, ids: Integers) -> Words:
    """The random word of each id."""
    seed = parameters.seed & 0xFFFFFFFFFFFFFFFF
    where = np.array([parameters.choice]), np.array([position])
    key = threefry((seed & MASK, seed >> 32), *where)
    counter = np.asarray(ids, np.int64)
    return threefry((int(key[0][0]), int(key[1][0])), counter, np.zeros_like(counter))[0]


def mulhi(a: Words, y: Words) -> Words:
    """By 16-bit halves, the product of the lower ones left out."""
    a1, a0, y1, y0 = a >> 16, a & 0xFFFF, y >> 16, y & 0xFFFF
    return a1 * y1 + (a1 * y0 >> 16) + (a0 * y1 >> 16)


def leading_zeros(x: Words) -> Words:
    """Of 32 bits; x > 0."""
    return 32 - np.frexp(x.astype(np.float64))[1].astype(np.int64)


def halved_polynomial(y: Words, coefficients: tuple[int, ...]) -> Words:
    """P(.., y) + 1 >> 1."""
    value = np.full_like(y, coefficients[8])
    for k in (7, 6, 5):
        value = coefficients[k] + (value * (y >> 16) >> 16)
    value = value << 7
    for k in (4, 3, 2, 1, 0):
        value = coefficients[k] + mulhi(value, y)
    return value + 1 >> 1


def gumbel(word: Words) -> Words:
    """The noise of each word, in units of 2^-24."""
    low = word < 2**31
    odd = 2 * np.where(low, word, MASK - word) + 1
    zeros = leading_zeros(odd)
    y = (odd << zeros + 1 & MASK) - 2**31
    exponential = (zeros + 2) * 93032640 - halved_polynomial(y, LOG)
    zeros = leading_zeros(exponential)
    y = (exponential << zeros + 1 & MASK) - 2**31
    of_low = (zeros - 4) * 93032640 - halved_polynomial(y, LOG) + 4 >> 3
    of_high = exponential - halved_polynomial(odd - 2**31, RATIO) + 4 >> 3
    return np.where(low, of_low, of_high)


def weight(distance: Words) -> Words:
    """2^31 exp(-distance / 2^24), nearly."""
    distance = np.minimum(distance, 24 << 24)
    halvings = (distance >> 13) * 23637 >> 25
    y = (distance << 2) - halvings * 46516320 - 23258160 << 6
    value = np.full_like(y, EXPONENTIAL[6])
    for k in (5, 4, 3, 2, 1, 0):
        value = EXPONENTIAL[k] + mulhi(value, y)
    rounded = np.minimum((2 * value + ((1 << halvings) >> 1)) >> halvings, 2**31)
    rounded = np.where(halvings > 31, 0, rounded)
    return np.where(distance == 0, 2**31, rounded)


def process(
    logits: Float32s,
    parameters: Parameters,
    *,
    counts: Integers,
    in_prompt: Booleans,
    bias: Float32s | None = None,
    banned: tuple[int, ...] = (),
) -> Float32s:
    """Bias, repetition, frequency, presence, ban; each operation rounded to float32."""
    x = logits.copy()
    if bias is not None:
        x = x + bias
    one = np.float32(1)
    if parameters.repetition != 1:
        by = np.float32(parameters.repetition)
        seen = in_prompt | (counts > 0)
        x = np.where(seen, np.where(x > 0, x / by, x / (one / by)), x)
    sampled = counts > 0
    if parameters.frequency != 0:
        times = counts.astype(np.float32) / (one / np.float32(parameters.frequency))
        x = np.where(sampled, x - times, x)
    if parameters.presence != 0:
        x = np.where(sampled, x - np.float32(parameters.presence), x)
    x[list(banned)] = -np.inf
    return x


def draw(processed: Float32s, parameters: Parameters, position: int, *, vocab_size: int) -> int:
    """The next token."""
    x = processed[:vocab_size].astype(np.float32)
    x = np.where(np.abs(x) < np.float32(2.0**-126), np.float32(0), x)
    temperature = np.float32(parameters.temperature)
    if temperature < np.float32(1e-5):
        return int(np.argmax(x))
    with np.errstate(over="ignore", invalid="ignore"):
        apart = np.where(x == x.max(), np.float32(0), (x.max() - x) / temperature)
    distance = (np.minimum(apart, np.float32(64)) * np.float32(2**24)).astype(np.int64)
    weights = weight(distance)

    order = np.lexsort((np.arange(len(x)), -x))
    kept = order[: parameters.top_k] if parameters.top_k > 0 else order
    share = int(np.floor(np.clip(np.float32(parameters.top_p), 0, 1) * np.float64(2**20)))
    if share < 2**20:
        total = int(weights[kept].sum())
        needed = max(1, -(-share * total // 2**20))
        kept = kept[: int(np.searchsorted(np.cumsum(weights[kept]), needed)) + 1]
    least = int(np.ceil(np.clip(np.float32(parameters.min_p), 0, 1) * np.float64(2**31)))
    kept = np.sort(kept[(weights[kept] >= least) & (x[kept] > -np.inf)])
    if len(kept) == 0:
        return 0
    score = gumbel(words(parameters, position, kept)) - distance[kept]
    return int(kept[np.argmax(score)])
