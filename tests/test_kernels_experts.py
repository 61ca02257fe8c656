"""What experts make, against the spec; the spec against float64; and how much is computed."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import Array
from refimpl_kernels import spec
from refimpl_kernels.experts import Route, mix_experts
from refimpl_kernels.gelu import gelu
from refimpl_kernels.linear import LinearImplementation
from refimpl_kernels.matrix import Matrix, OutputMajorMatrix, Quantized, slice_columns

from tests.kernel_cases import (
    UNIT,
    assert_same_bits,
    assert_within,
    dense_weights,
    float64,
    matrix,
    normal,
    parts,
    row_stable,
    summed,
)

# Half of the time that compiling takes is spent on speed.
QUICKLY = {"xla_backend_optimization_level": 0}
IMPLEMENTATIONS: tuple[LinearImplementation, ...] = ("dot", "chain")


Spread = Literal["together", "apart", "random"]


class Case(NamedTuple):
    """Shapes; `stored_as` is the form of the weights."""

    stored_as: str
    rows: int
    num_experts: int
    chosen: int
    f: int = 32
    d: int = 32

    @property
    def x(self) -> np.ndarray:
        return normal(self.rows, self.d) / np.float32(self.d**0.5)

    def routed(self, spread: Spread) -> Route:
        shape, e = (self.rows, self.chosen), self.num_experts
        if spread == "together":
            experts = np.broadcast_to(np.arange(self.chosen) + e - self.chosen, shape)
        elif spread == "apart":
            experts = np.arange(self.rows * self.chosen).reshape(shape) % e
        else:
            order = np.random.default_rng(0).random((self.rows, e)).argsort(axis=-1)
            experts = order[:, : self.chosen]
        weights = np.random.default_rng(1).uniform(0.1, 2, shape).astype(np.float32)
        return Route(jnp.asarray(np.sort(experts, axis=-1), jnp.int32), jnp.asarray(weights))

    def inputs(self, spread: Spread = "random") -> "Inputs":
        e = self.num_experts
        return Inputs(
            jnp.asarray(self.x),
            self.routed(spread),
            matrix(self.stored_as, self.d, e * 2 * self.f),
            matrix(self.stored_as, self.f, e * self.d),
        )


class Inputs(NamedTuple):
    x: Array
    routed: Route
    gate_up: Matrix
    down: Matrix


# Blocks of 1, 2, 16 and 1 rows.
CASES = [
    Case("float32", 1, 4, 1),
    Case("float32", 40, 128, 8),
    Case("q32-", 40, 4, 2),
    Case("bfloat16", 16, 16, 1, f=24),
]
# All rows to the same experts, each to others as far as there are, or as it comes.
SPREADS: tuple[Spread, ...] = ("together", "apart", "random")


def mix(inputs: Inputs, implementation: LinearImplementation) -> Array:
    return mix_experts(*inputs, implementation=implementation, rounding="float32")


# All given cases in one program, as to compile is most of the time that a case takes.
MIX_ALL = jax.jit(
    lambda given: {
        case: [mix(one, name) for name in IMPLEMENTATIONS] for case, one in given.items()
    },
    compiler_options=QUICKLY,
)
JUDGE_ALL = jax.jit(
    lambda given: {case: spec.experts(*one) for case, one in given.items()},
    compiler_options=QUICKLY,
)


def by_expert(stored: Matrix, num_experts: int, *, is_magnitude: bool = False) -> np.ndarray:
    """The columns of each expert, "e i o", in float64; or the sum of magnitudes they come from."""
    products, minimums = parts(stored)
    wide = np.abs(products) + np.abs(minimums) if is_magnitude else products - minimums
    return wide.reshape(len(wide), num_experts, -1).swapaxes(0, 1)


@cache
def results(spread: Spread) -> dict[Case, list[Array]]:
    return MIX_ALL({case: case.inputs(spread) for case in CASES})


@cache
def judged(spread: Spread) -> dict[Case, Array]:
    inputs = {}
    for case in CASES:
        x, routed, *stored = case.inputs(spread)
        wide = [by_expert(one, case.num_experts).astype(np.float32) for one in stored]
        weights = dense_weights(routed, case.num_experts)
        inputs[case] = [x, *(jnp.asarray(one) for one in (weights, *wide))]
    return JUDGE_ALL(inputs)


def exact(case: Case, spread: Spread) -> tuple[np.ndarray, np.ndarray]:
    """The sum in float64, and the bound of one in float32."""
    x, routed, *stored = case.inputs(spread)
    shares = float64(dense_weights(routed, case.num_experts))
    gate_up, down = (by_expert(one, case.num_experts) for one in stored)
    of_gate_up, of_down = (by_expert(one, case.num_experts, is_magnitude=True) for one in stored)

    gate, up = np.split(np.einsum("rd,edf->ref", float64(x), gate_up), 2, axis=-1)
    both = summed(case.d + 1) * np.einsum("rd,edf->ref", np.abs(float64(x)), of_gate_up)
    gate_error, up_error = np.split(both, 2, axis=-1)
    active = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    # gelu is at most 1.13 steep and errs by 11 units of its argument, see `test_kernels_gelu.py`.
    active_error = 1.13 * gate_error + 11 * UNIT * np.abs(gate)
    hidden = active * up
    hidden_error = active_error * (np.abs(up) + up_error) + np.abs(active) * up_error
    hidden_error += UNIT * np.abs(hidden)

    made = np.einsum("ref,efd->red", hidden, down)
    made_error = np.einsum(
        "ref,efd->red", summed(case.f + 1) * np.abs(hidden) + hidden_error, of_down
    )
    # The product with a weight rounds, and the sum over the chosen.
    made_error += (UNIT + summed(case.chosen)) * np.abs(made)
    return np.einsum("re,red->rd", shares, made), np.einsum("re,red->rd", shares, made_error)


every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_spread = pytest.mark.parametrize("spread", SPREADS)


@every_case
@every_spread
def test_the_spec_is_the_formula(case: Case, spread: Spread) -> None:
    expected, bound = exact(case, spread)
    assert judged(spread)[case].dtype == jnp.float32
    assert_within(judged(spread)[case], expected, bound)


@every_case
@every_spread
def test_float32_is_the_spec(case: Case, spread: Spread) -> None:
    for found in results(spread)[case]:
        assert found.dtype == jnp.float32
        assert_within(found, judged(spread)[case], 2 * exact(case, spread)[1])


def test_the_spec_widens_what_it_is_given() -> None:
    given = [
        jnp.asarray(normal(*shape), jnp.bfloat16)
        for shape in [(2, 8), (2, 2), (2, 8, 6), (2, 3, 8)]
    ]
    assert_same_bits(spec.experts(*given), spec.experts(*(x.astype(jnp.float32) for x in given)))


def test_in_bfloat16_products_and_each_sum_are_rounded() -> None:
    # Sums before the gelu are exact in float32, and each column of D has one weight, a power of
    # two: no order of a sum shows.
    random, (r, d, e, f, chosen) = np.random.default_rng(4), (6, 32, 4, 8, 3)
    x, gate_up = (random.integers(-8, 9, shape) / 32 for shape in [(r, d), (e, d, 2 * f)])
    column = np.arange(d)
    down = np.zeros((e, f, d))
    down[:, column % f, column] = random.choice([-2, -1, 1, 2], (e, d))
    routed = Case("", r, e, chosen).routed("random")
    x, gate_up, down = (array.astype(ml_dtypes.bfloat16) for array in (x, gate_up, down))

    experts, total = np.asarray(routed.experts), np.zeros((r, d), x.dtype)
    for choice in range(chosen):
        own = experts[:, choice]
        wide = np.einsum("rd,rdf->rf", float64(x), float64(gate_up)[own]).astype(x.dtype)
        gate, up = np.split(wide, 2, axis=-1)
        hidden = np.multiply(np.asarray(gelu(jnp.asarray(gate))), up)
        made = np.einsum("rf,rfd->rd", float64(hidden), float64(down)[own]).astype(np.float32)
        weighted = np.multiply(made, np.asarray(routed.weights)[:, choice, None]).astype(x.dtype)
        total = weighted if choice == 0 else np.add(total, weighted)

    side_by_side = [
        jnp.asarray(one.swapaxes(0, 1).reshape(one.shape[1], -1)) for one in (gate_up, down)
    ]
    run = jax.jit(
        lambda inputs: [mix(inputs, name) for name in IMPLEMENTATIONS],
        compiler_options={"xla_allow_excess_precision": False},
    )
    for found in run(Inputs(jnp.asarray(x), routed, *side_by_side)):
        assert_same_bits(found, total)


def without(stored: Matrix, num_experts: int, used: np.ndarray) -> Matrix:
    """The matrix with nothing but nan for experts that are not among the used."""
    width = stored.shape[1] // num_experts
    is_used = jnp.asarray(np.isin(np.arange(num_experts), used).repeat(width))[None]
    is_used = is_used.T if isinstance(stored, OutputMajorMatrix) else is_used

    def fill(leaf: Array) -> Array:
        return jnp.where(is_used, leaf, jnp.asarray(jnp.nan, leaf.dtype))

    if isinstance(stored, Quantized):
        return replace(stored, scales=fill(stored.scales))
    return fill(stored)


@every_spread
def test_an_expert_that_nobody_chose_is_never_read(spread: Spread) -> None:
    inputs = {}
    for case in CASES:
        given = case.inputs(spread)
        used = np.unique(given.routed.experts)
        gate_up, down = (
            without(one, case.num_experts, used) for one in (given.gate_up, given.down)
        )
        inputs[case] = given._replace(gate_up=gate_up, down=down)
    for case, found in MIX_ALL(inputs).items():
        for with_nan, expected in zip(found, results(spread)[case], strict=True):
            assert_same_bits(with_nan, expected)


CHAIN_ALL = row_stable(lambda given: {case: mix(one, "chain") for case, one in given.items()})


def chains(change: Callable[[Case], tuple[np.ndarray, Route]]) -> dict[Case, Array]:
    """What the chain gives with rows and routes of a case changed, blocks of many rows."""
    given = {}
    for case in CASES[2:3]:
        x, routed = change(case)
        arrays = (jnp.asarray(one) for one in routed)
        given[case] = case.inputs()._replace(x=jnp.asarray(x), routed=Route(*arrays))
    return CHAIN_ALL(given)


def test_a_row_has_the_same_bits_alone_and_among_others() -> None:
    together = chains(lambda case: (case.x, case.routed("random")))
    # Blocks of four experts have 16 rows, 2 and 1.
    for count in (7, 1):
        some = chains(
            lambda case, n=count: (case.x[:n], Route(*(one[:n] for one in case.routed("random"))))
        )
        for case, found in some.items():
            assert_same_bits(found, together[case][:count])

    backwards = chains(
        lambda case: (case.x[::-1], Route(*(one[::-1] for one in case.routed("random"))))
    )
    for case, found in backwards.items():
        assert_same_bits(found[::-1], together[case])

    def crowd(case: Case) -> tuple[np.ndarray, Route]:
        """The first row as it was, others with other contents and all to the same experts."""
        pairs = zip(case.routed("random"), case.routed("together"), strict=True)
        return (
            np.concatenate([case.x[:1], -case.x[1:]]),
            Route(*(jnp.concatenate([one[:1], other[1:]]) for one, other in pairs)),
        )

    for case, found in chains(crowd).items():
        assert_same_bits(found[0], together[case][0])


def products(program: Any) -> list[tuple[tuple[int, ...], ...]]:
    """Shapes of the factors of every matrix product in a program, a loop's contents once."""
    found = []
    for equation in program.eqns:
        if equation.primitive.name == "dot_general":
            found.append(tuple(variable.aval.shape for variable in equation.invars))
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=is_program):
            if is_program(inner):
                found += products(inner)
    return found


def is_program(node: object) -> bool:
    return hasattr(node, "eqns")


def test_a_step_of_the_loop_multiplies_one_block_by_one_expert() -> None:
    case = Case("float32", 40, 128, 8, f=24)
    program = jax.make_jaxpr(partial(mix, implementation="dot"))(case.inputs())
    assert products(program) == [((2, 32), (32, 48)), ((2, 24), (24, 32))]


@pytest.mark.parametrize("stored_as", ["bfloat16", "q16-", "o16-"])
def test_columns_from_a_traced_place_are_those_from_a_known_one(stored_as: str) -> None:
    stored = matrix(stored_as, 32, 40)
    from_traced = jax.jit(partial(slice_columns, length=8))
    for start in (0, 13, 32):
        found, expected = from_traced(stored, jnp.int32(start)), slice_columns(stored, start, 8)
        for leaf, known in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert_same_bits(leaf, known)
