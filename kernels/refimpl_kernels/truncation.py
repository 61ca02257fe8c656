"""Which ids a row may draw from: top_k, top_p and min_p, without sorting the row.

The definition, in integers, is part of `refimpl_kernels.sampling`'s. What is special here is how it
is computed: exactly, from the best few ids of each row where these decide, and by bisection where
they do not. Both ways find the same set.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float32, Int32, UInt32

from refimpl_kernels.fixed_point import (
    LIMB_BITS,
    Wide,
    at_least,
    polynomial,
    share,
    signed,
    unsigned,
    wide_prefix_sums,
    wide_sum,
)
from refimpl_kernels.rows import best_of_rows, first_where, max_of_rows

WEIGHT_BITS = 31  # a weight is in units of 2^-31
LOG_2 = 46516320  # in units of 2^-26
EXPONENTIAL = (759250125, -759250154, 379625075, -126539760, 31634974, -6358988, 1059641)

NO_SHARE = 1 << LIMB_BITS
FARTHEST = 1 << 30  # distances end here: 64, in units of 2^-24

# How many of the best of a row are looked at first, and in how many columns.
_SIZE = 256
_COLUMNS = 256


class Rules(NamedTuple):
    """What each row is cut down to.

    Attributes:
        best: the highest value of a row, from which distances are measured.
        temperature: their unit.
        top_k: how many ids; v where the rule is off.
        share: of the mass, in units of 2^-20; NO_SHARE where the rule is off.
        farthest: the largest distance that min_p leaves; FARTHEST where the rule is off.
    """

    best: Float32[Array, " b"]
    temperature: Float32[Array, " b"]
    top_k: Int32[Array, " b"]
    share: UInt32[Array, " b"]
    farthest: Int32[Array, " b"]


class Limit(NamedTuple):
    """The last of the ids that are kept, in the order (value descending, id ascending).

    Attributes:
        value: its value.
        last_id: itself.
    """

    value: Float32[Array, " b"]
    last_id: Int32[Array, " b"]


class Head(NamedTuple):
    """The best ids of each row.

    Attributes:
        values: descending.
        ids: ascending where values are equal.
        limit: what top_k and top_p leave.
        is_enough: whether every id that the rules leave is in here, and the limit is known.
    """

    values: Float32[Array, "b k"]
    ids: Int32[Array, "b k"]
    limit: Limit
    is_enough: Bool[Array, " b"]


def rules_of(
    *,
    best: Float32[Array, " b"],
    temperature: Float32[Array, " b"],
    top_k: Int32[Array, " b"],
    top_p: Float32[Array, " b"],
    min_p: Float32[Array, " b"],
    width: int,
) -> Rules:
    """The parameters in integers; scaling by a power of two is exact, so no rounding is hidden."""
    share = jnp.floor(jnp.clip(top_p, 0, 1) * NO_SHARE).astype(jnp.uint32)
    least = jnp.ceil(jnp.clip(min_p, 0, 1) * 2.0**WEIGHT_BITS).astype(jnp.uint32)
    farthest = jnp.full(top_k.shape, FARTHEST, jnp.int32)

    def by_min_p() -> Int32[Array, " b"]:
        nearest = jnp.zeros_like(farthest)
        found = _bisect(lambda d: weight_of(d) >= least, true=nearest, false=farthest)
        return jnp.where(least > 0, found, farthest)

    farthest = lax.cond(jnp.any(least > 0), by_min_p, lambda: farthest)
    top_k = jnp.where((top_k > 0) & (top_k < width), top_k, width)
    return Rules(best, temperature, top_k, share, farthest)


def is_cutting(rules: Rules, width: int) -> Bool[Array, " b"]:
    """Whether any rule is on."""
    return (rules.top_k < width) | (rules.share < NO_SHARE) | (rules.farthest < FARTHEST)


def distance_of(x: Float32[Array, "b w"], rules: Rules) -> Int32[Array, "b w"]:
    """How far below the best, in units of 2^-24 temperatures; at most FARTHEST."""
    best = rules.best[:, None]
    is_best = x == best
    # Were the divisor a constant, XLA would multiply by its rounded reciprocal.
    apart = (best - x) / jnp.where(is_best, 1, rules.temperature[:, None])
    apart = jnp.where(is_best, 0, apart)  # not nan, where both are infinite
    return (jnp.minimum(apart, FARTHEST / 2.0**24) * 2.0**24).astype(jnp.int32)


def weight_of(distance: Int32[Array, "*b"]) -> UInt32[Array, "*b"]:
    """About 2^31 exp(-distance / 2^24), for distances from 0 to 2^30; never more for a larger one.

    The steps stand in the docstring of `refimpl_kernels.sampling`.
    """
    distance = jnp.minimum(distance, jnp.int32(24 << 24))
    halvings = ((distance >> 13) * 23637) >> 25
    y = ((distance << 2) - halvings * LOG_2 - LOG_2 // 2) << 6
    halvings = unsigned(halvings)
    weight = unsigned(polynomial(y, EXPONENTIAL)) << 1
    weight = (weight + ((jnp.uint32(1) << halvings) >> 1)) >> halvings
    weight = jnp.minimum(weight, jnp.uint32(1 << WEIGHT_BITS))
    weight = jnp.where(halvings > WEIGHT_BITS, jnp.uint32(0), weight)
    return jnp.where(distance == 0, jnp.uint32(1 << WEIGHT_BITS), weight)


def no_limit(x: Float32[Array, "b v"]) -> Limit:
    """The limit that leaves all."""
    b, width = x.shape
    return Limit(jnp.full((b,), -jnp.inf, jnp.float32), jnp.full((b,), width, jnp.int32))


def no_head(x: Float32[Array, "b v"]) -> Head:
    """A head that is never enough."""
    b, size = x.shape[0], min(_SIZE, x.shape[1])
    values = jnp.full((b, size), -jnp.inf, jnp.float32)
    return Head(values, jnp.zeros((b, size), jnp.int32), no_limit(x), jnp.zeros((b,), bool))


def head_of(x: Float32[Array, "b v"], rules: Rules) -> Head:
    """The best ids of each row, and the limit as far as they tell it."""
    width = x.shape[1]
    size = min(_SIZE, width)
    values, ids, floor = best_of_rows(x, size=size, columns=_COLUMNS)
    is_sure = values > floor[:, None]
    is_whole_row = (floor == -jnp.inf) & ((values[:, -1] == -jnp.inf) | (size == width))
    distances = distance_of(values, rules)
    has_end = jnp.any(is_sure & (distances > rules.farthest[:, None]), axis=1) | is_whole_row

    k_is_inside = rules.top_k <= jnp.sum(is_sure, axis=1, dtype=jnp.int32)
    last_of_k = jnp.minimum(rules.top_k, size) - 1
    has_share = rules.share < NO_SHARE
    prefix = wide_prefix_sums(jnp.where(is_sure, weight_of(distances), jnp.uint32(0)))
    # The mass that top_p is a share of: that of the k best, or of the whole row.
    of_row = lax.cond(
        jnp.any(has_share & ~k_is_inside),
        lambda: wide_sum(lax.optimization_barrier(weight_of(distance_of(x, rules)))),
        lambda: Wide(prefix.high[:, -1], prefix.low[:, -1]),
    )
    of_k = Wide(_at(prefix.high, last_of_k), _at(prefix.low, last_of_k))
    total = Wide(*(jnp.where(k_is_inside, k, row) for k, row in zip(of_k, of_row, strict=True)))
    needed = _needed(rules.share, total)
    reaches = is_sure & at_least(prefix, Wide(needed.high[:, None], needed.low[:, None]))
    share_is_inside = jnp.any(reaches, axis=1)
    total_is_known = ~has_share | k_is_inside | (rules.top_k >= width) | is_whole_row

    last = jnp.where(has_share, jnp.argmax(reaches, axis=1).astype(jnp.int32), last_of_k)
    is_limited = jnp.where(has_share, share_is_inside, k_is_inside)
    none = no_limit(x)
    limit = Limit(
        jnp.where(is_limited, _at(values, last), none.value),
        jnp.where(is_limited, _at(ids, last), none.last_id),
    )
    return Head(values, ids, limit, total_is_known & (is_limited | has_end))


def limits_of(x: Float32[Array, "b v"], rules: Rules, head: Head) -> Limit:
    """What top_k and top_p leave: as the head tells, or searched for in the whole row.

    Row by row, since a search takes some thirty passes and few rows need one.
    """
    has_to_search = is_cutting(rules, x.shape[1]) & ~head.is_enough

    def of_row(row: tuple[Array, Rules, Limit, Array]) -> Limit:
        x, rules, limit, has_to_search = row

        def search() -> Limit:
            found = _searched(x[None], Rules(*(value[None] for value in rules)))
            return Limit(found.value[0], found.last_id[0])

        return lax.cond(has_to_search, search, lambda: limit)

    return lax.cond(
        jnp.any(has_to_search),
        lambda: lax.map(of_row, (x, rules, head.limit, has_to_search)),
        lambda: head.limit,
    )


def _searched(x: Float32[Array, "b v"], rules: Rules) -> Limit:
    """The limit by top_k, then by top_p in what that leaves: twice the same search."""
    width = x.shape[1]

    def step(limit: Limit, by_share: Bool[Array, ""]) -> tuple[Limit, None]:
        weights = jnp.where(by_share, weight_of(distance_of(x, rules)), jnp.uint32(1))
        weights = jnp.where(is_within(limit, x, ids_of(x)), weights, jnp.uint32(0))
        weights = lax.optimization_barrier(weights)
        share = _needed(rules.share, wide_sum(weights))
        count = unsigned(rules.top_k)
        count = Wide(count >> LIMB_BITS, count & (NO_SHARE - 1))
        needed = Wide(*(jnp.where(by_share, a, b) for a, b in zip(share, count, strict=True)))
        is_on = jnp.where(by_share, rules.share < NO_SHARE, rules.top_k < width)
        found = lax.cond(
            jnp.any(is_on), lambda: _shortest_prefix(x, weights, needed), lambda: limit
        )
        value = jnp.where(is_on, found.value, limit.value)
        return Limit(value, jnp.where(is_on, found.last_id, limit.last_id)), None

    return lax.scan(step, no_limit(x), jnp.array([False, True]))[0]


def is_within(
    limit: Limit, x: Float32[Array, "b w"], ids: Int32[Array, "#b w"]
) -> Bool[Array, "b w"]:
    """Whether an id comes no later than the limit."""
    value, last_id = limit.value[:, None], limit.last_id[:, None]
    return (x > value) | ((x == value) & (ids <= last_id))


def _shortest_prefix(
    x: Float32[Array, "b v"], amounts: UInt32[Array, "b v"], needed: Wide
) -> Limit:
    """The end of the shortest prefix whose amounts sum up to what is needed.

    In the order (value descending, id ascending); what is needed is at least 1 and at most the sum
    of all. First the value is found, by bisection over the floats in their order, then the id.
    """
    best = max_of_rows(x)

    def reached(value: Float32[Array, " b"], last_id: Int32[Array, " b"]) -> Bool[Array, " b"]:
        inside = is_within(Limit(value, last_id), x, ids_of(x))
        return at_least(wide_sum(jnp.where(inside, amounts, jnp.uint32(0))), needed)

    every_id = jnp.full(best.shape, x.shape[1], jnp.int32)
    key = _bisect(
        lambda key: reached(_value_of(key), every_id),
        true=_key_of(jnp.full_like(best, -jnp.inf)),
        false=_key_of(best) + 1,
    )
    value = _value_of(key)
    is_last_value = x == value[:, None]
    first_id = first_where(is_last_value)
    ties = wide_sum(is_last_value.astype(jnp.uint32))
    last_id = lax.cond(
        jnp.any((ties.high > 0) | (ties.low > 1)),
        lambda: _bisect(lambda i: reached(value, i), true=every_id, false=first_id - 1),
        lambda: first_id,
    )
    return Limit(value, last_id)


def _bisect(
    holds: Callable[[Int32[Array, " b"]], Bool[Array, " b"]],
    *,
    true: Int32[Array, " b"],
    false: Int32[Array, " b"],
) -> Int32[Array, " b"]:
    """A number that holds and has a neighbour that does not, between one of each kind."""

    def gap(true: Array, false: Array) -> Array:
        # Unsigned, since keys may lie more than 2^31 apart.
        return jnp.where(
            true < false, unsigned(false) - unsigned(true), unsigned(true) - unsigned(false)
        )

    def halve(ends: tuple[Array, Array]) -> tuple[Array, Array]:
        true, false = ends
        middle = signed(unsigned(jnp.minimum(true, false)) + (gap(true, false) >> 1))
        apart, does = gap(true, false) > 1, holds(middle)
        return jnp.where(apart & does, middle, true), jnp.where(apart & ~does, middle, false)

    return lax.while_loop(lambda ends: jnp.any(gap(*ends) > 1), halve, (true, false))[0]


def _key_of(x: Float32[Array, "*b"]) -> Int32[Array, "*b"]:
    """An integer for each float, in the same order."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _value_of(key: Int32[Array, "*b"]) -> Float32[Array, "*b"]:
    return lax.bitcast_convert_type(key ^ ((key >> 31) & 0x7FFFFFFF), jnp.float32)


def _needed(fraction: UInt32[Array, " b"], total: Wide) -> Wide:
    """The mass that top_p asks for: at least 1, since one id is always kept."""
    mass = share(fraction, total)
    return Wide(mass.high, jnp.where((mass.high | mass.low) == 0, jnp.uint32(1), mass.low))


def ids_of(x: Float32[Array, "b v"]) -> Int32[Array, "1 v"]:
    """The ids of a row, to be asked for by each reader: shared by branches they take memory."""
    return lax.broadcasted_iota(jnp.int32, (1, x.shape[1]), 1)


def _at(x: Array, place: Int32[Array, " b"]) -> Array:
    return jnp.take_along_axis(x, place[:, None], axis=1)[:, 0]
