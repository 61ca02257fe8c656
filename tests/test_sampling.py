"""The draw: bit for bit the published sampler, and what a sort in float64 would choose."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from refimpl_kernels.noise import NOISE_BITS, gumbel_of_words, noise_words
from refimpl_kernels.penalties import process
from refimpl_kernels.sampling import draw
from refimpl_kernels.truncation import (
    Rules,
    distance_of,
    head_of,
    limits_of,
    no_head,
    rules_of,
    weight_of,
)

from tests.oracle import sampler as oracle
from tests.oracle.sampler import Parameters
from tests.sampler_rows import compiled, drawing, hard_logits, random_parameters, rows_of

VECTORS = json.loads((Path(__file__).parent / "golden" / "sampler" / "vectors.json").read_text())


def floats(bits: list[int]) -> np.ndarray:
    return np.array(bits, np.uint32).view(np.float32)


# The published vectors.


def test_noise_vectors() -> None:
    word = np.array(VECTORS["noise"]["word"], np.int64)
    assert len(word) > 100
    np.testing.assert_array_equal(oracle.gumbel(word), VECTORS["noise"]["noise"])
    got = gumbel_of_words(jnp.asarray(word.astype(np.uint32)))
    np.testing.assert_array_equal(np.asarray(got), VECTORS["noise"]["noise"])


@pytest.mark.parametrize("vector", VECTORS["words"], ids=lambda v: str(v["seed"]))
def test_word_vectors(vector: dict[str, int]) -> None:
    parameters = Parameters(seed=vector["seed"], choice=vector["choice"])
    ids = np.array([[vector["id"]]], np.int32)
    assert oracle.words(parameters, vector["position"], ids[0])[0] == vector["word"]
    rows = rows_of([parameters])
    at = jnp.array([vector["position"]], jnp.int32)
    assert int(noise_words(rows.seed, rows.choice, at, jnp.asarray(ids))[0, 0]) == vector["word"]


@pytest.mark.parametrize("half", [0, 1])
def test_draw_vectors(half: int) -> None:
    """Eight rows at once, each beside the others; processed logits and tokens."""
    assert len(VECTORS["draws"]) == 16
    vectors = VECTORS["draws"][8 * half :][:8]
    parameters = [Parameters(**vector["parameters"]) for vector in vectors]
    rows = rows_of(parameters, is_biased=True)
    processed = compiled(process)(
        np.stack([floats(v["logits_bits"]) for v in vectors]),
        rows,
        slot=np.arange(8),
        counts=np.array([v["counts"] for v in vectors], np.int32),
        in_prompt=np.array([v["in_prompt"] for v in vectors]),
        bias=np.stack([floats(v["bias_bits"]) for v in vectors]),
        banned=np.array([v["banned"] for v in vectors], np.int32),
    )
    expected = np.array([v["processed_bits"] for v in vectors], np.uint32)
    np.testing.assert_array_equal(np.asarray(processed).view(np.uint32), expected)
    for position in range(8):
        tokens = drawing(53)(processed, rows, np.full(8, position, np.int32))
        published = [v["tokens_at_positions_0_to_7"][position] for v in vectors]
        assert np.asarray(tokens).tolist() == published
        assert published == [
            oracle.draw(row, one, position, vocab_size=53)
            for row, one in zip(np.asarray(processed), parameters, strict=True)
        ]


# Any rows.


@pytest.mark.parametrize(("width", "b", "count"), [(60, 8, 150), (20_000, 8, 40), (262_144, 2, 20)])
def test_any_row_beside_any_others_is_drawn_as_the_oracle_draws_it_alone(
    width: int, b: int, count: int
) -> None:
    """Whichever branches the rows beside it need, and whichever its own."""
    random = np.random.default_rng(width)
    draw = drawing(width - 7)
    for _ in range(count):
        several = hard_logits(random, width)
        logits = np.stack([several[random.integers(len(several))] for _ in range(b)])
        parameters = [random_parameters(random) for _ in range(b)]
        position = random.integers(0, 99_999, b).astype(np.int32)
        tokens = np.asarray(draw(logits, rows_of(parameters), position))
        expected = [
            oracle.draw(logits[i], parameters[i], int(position[i]), vocab_size=width - 7)
            for i in range(b)
        ]
        assert tokens.tolist() == expected


@pytest.mark.parametrize("temperature", [0.0, 1e-6])
@pytest.mark.parametrize(
    ("beginning", "token"),
    [((1e-40, 2e-40), 0), ((-1e-40, 0, 1e-40), 0), ((-5, -1e-45, 3e-39), 1), ((0, 1.2e-38), 1)],
)
def test_greedy_takes_what_is_next_to_zero_for_zero(
    beginning: tuple[float, ...], token: int, temperature: float
) -> None:
    """As the definition has it, on every device; 1.2e-38 is just large enough."""
    logits = np.full((1, 60), -5, np.float32)
    logits[0, : len(beginning)] = beginning
    one = Parameters(temperature=temperature)
    assert np.asarray(drawing(53)(logits, rows_of([one]), np.zeros(1, np.int32))).tolist() == [
        token
    ]
    assert oracle.draw(logits[0], one, 0, vocab_size=53) == token


def test_a_row_is_drawn_alike_alone_and_in_every_slot() -> None:
    random = np.random.default_rng(3)
    width = 20_000
    draw = drawing(width - 7)
    logits = np.stack([hard_logits(random, width)[i] for i in (0, 1, 3, 4, 5, 7, 7, 8)])
    parameters = [random_parameters(random) for _ in range(8)]
    position = random.integers(0, 99_999, 8).astype(np.int32)
    one_by_one = [
        int(draw(logits[i : i + 1], rows_of(parameters[i : i + 1]), position[i : i + 1])[0])
        for i in range(8)
    ]
    for shift in range(8):
        order = np.roll(np.arange(8), shift)
        tokens = draw(logits[order], rows_of([parameters[i] for i in order]), position[order])
        assert np.asarray(tokens).tolist() == [one_by_one[i] for i in order]


def draw_float64(logits: np.ndarray, parameters: Parameters, position: int) -> tuple[int, float]:
    """The token by plain formulas, and by how much the closest decision was clear."""
    logits = logits.astype(np.float64)
    if parameters.temperature == 0:
        return int(np.argmax(logits)), np.inf
    best = logits.max()
    apart = np.where(logits == best, 0, (logits - best) / parameters.temperature)
    order = np.argsort(-logits, kind="stable")
    order = order[: parameters.top_k] if parameters.top_k > 0 else order
    p = np.exp(apart[order]) / np.exp(apart[order]).sum()
    below = np.cumsum(p) - p
    kept = order[(below < parameters.top_p) | (np.arange(len(order)) == 0)]
    clear = np.min(np.abs(np.cumsum(p) - parameters.top_p)) if parameters.top_p < 1 else np.inf
    relative = np.exp(apart[kept])
    clear = min(clear, np.min(np.abs(relative - parameters.min_p)) if parameters.min_p else np.inf)
    kept = np.sort(kept[(relative >= parameters.min_p) & (logits[kept] > -np.inf)])
    word = oracle.words(parameters, position, kept)
    score = apart[kept] - np.log(-np.log((word + 0.5) / 2**32))
    first, *second = np.sort(score)[::-1][:2]
    clear = min(clear, *(first - value for value in second), np.inf)
    return int(kept[np.argmax(score)]), clear


@pytest.mark.parametrize("width", [60, 20_000])
def test_draws_are_what_a_sort_in_float64_chooses(width: int) -> None:
    """Where no decision is closer than 4e-6: top_p is rounded to 2^-20, distances to 2^-24."""
    random = np.random.default_rng(width + 1)
    draw = drawing(width - 7)
    num_clear = 0
    for _ in range(25):
        several = hard_logits(random, width)
        logits = np.stack([several[random.integers(len(several))] for _ in range(8)])
        parameters = [random_parameters(random) for _ in range(8)]
        tokens = np.asarray(draw(logits, rows_of(parameters), np.arange(8, dtype=np.int32)))
        for i in range(8):
            expected, clear = draw_float64(logits[i, : width - 7], parameters[i], i)
            if clear > 4e-6:
                num_clear += 1
                assert tokens[i] == expected
    assert num_clear > 160  # of 200; where all values are equal, sums fall on round shares


# The parts of the definition.


def rules(best: np.ndarray, parameters: list[Parameters], width: int) -> Rules:
    rows = rows_of(parameters)
    return rules_of(
        best=jnp.asarray(best),
        temperature=rows.temperature,
        top_k=rows.top_k,
        top_p=rows.top_p,
        min_p=rows.min_p,
        width=width,
    )


@pytest.mark.parametrize("temperature", [0.1, 0.7, 1.0, 1.1, 2.0])
def test_distances_are_true_quotients(temperature: float) -> None:
    """Also where the temperature is a constant that a compiler might turn into a factor."""
    random = np.random.default_rng(5)
    x = (random.normal(size=(1, 100_000)) * 9).astype(np.float32)
    by = np.float32(temperature)
    expected = np.floor(np.minimum((x.max() - x) / by, 64) * np.float64(2**24)).astype(np.int32)
    rule = rules(x.max(axis=1), [Parameters(temperature=temperature)], x.shape[1])
    assert np.any((x.max() - x) / by != (x.max() - x) * (1 / by)) or temperature in (1.0, 2.0)
    for program in (
        compiled(lambda x: distance_of(x, rule))(x),
        compiled(distance_of)(x, rule),
    ):
        np.testing.assert_array_equal(np.asarray(program), expected)


def test_weights_are_exponentials_and_never_rise() -> None:
    weights = compiled(weight_of)
    for start in range(0, 24 << 24, 3 << 24):
        distance = np.arange(start, start + (1 << 20), dtype=np.int32)
        got = np.asarray(weights(distance)).astype(np.int64)
        exact = 2.0**31 * np.exp(-distance / 2**24)
        assert np.max(np.abs(got - exact) - 1e-8 * exact) < 0.6
        assert np.max(np.diff(got)) <= 0
    assert int(weight_of(jnp.int32(0))) == 2**31
    np.testing.assert_array_equal(
        np.asarray(weights(np.arange(0, 1 << 30, 1 << 10, dtype=np.int32))),
        oracle.weight(np.arange(0, 1 << 30, 1 << 10, dtype=np.int64)),
    )


def test_the_head_and_the_search_find_the_same_limits() -> None:
    random = np.random.default_rng(8)
    width, num_enough = 20_000, 0
    by_head = compiled(head_of)
    by_search = compiled(lambda x, rules: limits_of(x, rules, no_head(x)))
    for _ in range(6):
        x = np.stack(hard_logits(random, width)[:6])
        parameters = [
            Parameters(
                top_k=int(random.choice([0, 1, 5, 50, 200])),
                top_p=float(random.choice([0.0, 0.2, 0.9, 1.0])),
            )
            for _ in range(6)
        ]
        rule = rules(x.max(axis=1), parameters, width)
        head, limit = by_head(x, rule), by_search(x, rule)
        is_cut = [one.top_k > 0 or one.top_p < 1 for one in parameters]
        is_enough = np.asarray(head.is_enough) & np.array(is_cut)
        num_enough += int(is_enough.sum())
        for found, searched in zip(head.limit, limit, strict=True):
            np.testing.assert_array_equal(
                np.asarray(found)[is_enough], np.asarray(searched)[is_enough]
            )
    assert num_enough > 10


def test_scores_that_no_bound_tells_apart_are_computed_one_by_one() -> None:
    """Logits that undo the noise: all scores are equal to their last bits, in every column."""
    width, position = 20_000, 17
    parameters = Parameters(seed=99)
    word = oracle.words(parameters, position, np.arange(width))
    logits = (-oracle.gumbel(word) * 2.0**-NOISE_BITS).astype(np.float32)
    at = np.array([position], np.int32)
    token = drawing(width - 7)(logits[None], rows_of([parameters]), at)
    assert int(token[0]) == oracle.draw(logits, parameters, position, vocab_size=width - 7)


# Edges.


def draw_one(logits: list[float], **changed: Any) -> set[int]:
    """All tokens that 64 positions draw; impossible ids fill up the row."""
    row = np.array(logits + [-np.inf] * (60 - len(logits)), np.float32)
    rows = rows_of([Parameters(seed=5, **changed)] * 8)
    x, positions = np.broadcast_to(row, (8, 60)), np.arange(64, dtype=np.int32).reshape(8, 8)
    tokens = [drawing(53)(x, rows, position) for position in positions]
    return set(np.stack(tokens).ravel().tolist())


def test_zero_temperature_takes_the_lowest_of_equal_ids() -> None:
    assert draw_one([0.0, 2.0, 1.0, 2.0], temperature=0) == {1}
    assert draw_one([-0.0, 0.0], temperature=0) == {0}


def test_ids_beyond_the_vocabulary_are_never_chosen() -> None:
    logits = [0.0] * 53 + [9.0] * 7
    assert draw_one(logits, temperature=0) == {0}
    for temperature in (1.0, 2.0):
        tokens = draw_one(logits, temperature=temperature)
        assert max(tokens) < 53
        assert len(tokens) > 20


def test_impossible_ids_are_never_drawn() -> None:
    assert draw_one([-np.inf, 0.0, -np.inf, 0.0], temperature=2) == {1, 3}
    assert draw_one([-np.inf, 0.0, -np.inf, 0.0], top_p=0.999, temperature=2) == {1, 3}


def test_rows_of_infinities_give_an_id_all_the_same() -> None:
    for temperature in (0.0, 1.0):
        assert draw_one([-np.inf] * 3, temperature=temperature) == {0}
        assert draw_one([-np.inf] * 3, temperature=temperature, top_p=0.5) == {0}
    assert draw_one([0.0, np.inf, np.inf, 5.0], temperature=1) == {1, 2}


def test_ties_at_the_limit_go_to_the_lowest_ids() -> None:
    logits = [1.0, 3.0, 3.0, 0.0, 3.0, 3.0]
    assert draw_one(logits, top_k=2) == {1, 2}
    assert draw_one(logits, top_k=3) == {1, 2, 4}
    # Each of the four has less than 1/4 of the mass.
    assert draw_one(logits, top_p=0.45) == {1, 2}
    assert draw_one(logits, top_p=0) == {1}
    assert draw_one(logits, min_p=1) == {1, 2, 4, 5}


def test_top_p_is_a_share_of_what_top_k_leaves() -> None:
    """Of four equal ids 0.6 takes three; of the first two of them, two."""
    assert draw_one([1.0, 1.0, 1.0, 1.0], top_p=0.6) == {0, 1, 2}
    assert draw_one([1.0, 1.0, 1.0, 1.0], top_p=0.6, top_k=2) == {0, 1}
    assert draw_one([1.0, 1.0, 1.0, 1.0], top_p=0.5, top_k=2) == {0}


def test_a_search_of_the_whole_row_holds_few_arrays_of_its_width() -> None:
    """Each of them is asked of the system at every step, whether or not there is a search."""
    width, size = 1 << 14, 4
    leaves, tree = jax.tree.flatten(rows_of([Parameters()]))

    def drawn(x: Array, position: Array, *leaves: Array) -> Array:
        return draw(x, jax.tree.unflatten(tree, leaves), position, vocab_size=width)

    program: Any = compiled(drawn)
    lowered = program.lower(jnp.zeros((1, width)), jnp.zeros(1, jnp.int32), *leaves)
    analysis = lowered.compile().memory_analysis()
    # Eighty or more, where XLA moves what does not change out of the loop of the search.
    assert analysis.temp_size_in_bytes < 20 * width * size
