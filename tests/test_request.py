"""What may be asked of the engine, how it is refused, and how events add up to an answer."""

import dataclasses
import itertools
import math
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl.engine.events import (
    Completion,
    Delta,
    Event,
    Finished,
    FinishReason,
    PromptScored,
    TokenLogprob,
    collect,
)
from refimpl.engine.request import Request, SamplingParams
from refimpl.errors import InvalidRequestError

INT64 = 2**63


def sampling(**arguments: Any) -> SamplingParams:
    """Parameters from arguments of types that a caller may give, right or wrong."""
    return SamplingParams(**arguments)


def refusal(**arguments: Any) -> InvalidRequestError:
    """The error of parameters that must not be."""
    with pytest.raises(InvalidRequestError) as caught:
        sampling(**arguments)
    return caught.value


# Sampling parameters.


def test_defaults_are_those_of_the_contract() -> None:
    assert dataclasses.asdict(SamplingParams()) == {
        "max_tokens": 16, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0,
        "frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0,
        "logit_bias": {}, "allowed_token_ids": None, "banned_token_ids": (), "min_tokens": 0,
        "stop": (), "stop_token_ids": (), "ignore_eos": False,
        "include_stop_str_in_output": False, "skip_special_tokens": True, "seed": None, "n": 1,
        "best_of": None, "logprobs": None,
    }  # fmt: skip


BOUNDS: list[tuple[str, Any, Any]] = [
    ("max_tokens", 0, 2**31 - 1),
    ("top_k", -1, 2**31 - 1),
    ("n", 1, 128),
    ("best_of", 1, 128),
    ("logprobs", 0, 20),
    ("seed", -INT64, INT64 - 1),
    ("temperature", 0.0, 2.0),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("frequency_penalty", -2.0, 2.0),
    ("presence_penalty", -2.0, 2.0),
    ("repetition_penalty", 1e-37, 1e37),
]


@pytest.mark.parametrize(("name", "low", "high"), BOUNDS)
def test_both_ends_of_a_range_are_in_it_and_their_neighbours_out(
    name: str, low: Any, high: Any
) -> None:
    if isinstance(low, int):
        below, above, limits = low - 1, high + 1, f"an integer from {low} to {high}"
    else:
        below, above = math.nextafter(low, -math.inf), math.nextafter(high, math.inf)
        limits = f"a number from {low:g} to {high:g}"
    for value in (low, high):
        assert getattr(sampling(**{name: value}), name) == value
    for value in (below, above):
        error = refusal(**{name: value})
        assert error.parameter == name
        assert str(error).startswith(f"{name} must be {limits}, got {value!r}; ")


WHOLE = [name for name, low, _ in BOUNDS if isinstance(low, int)]
FRACTIONAL = [name for name, low, _ in BOUNDS if isinstance(low, float)]


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("value", [True, False, 5.0, 1.5, math.nan, "5", b"5", [5], np.True_])
def test_only_integers_are_integers(name: str, value: Any) -> None:
    assert refusal(**{name: value}).parameter == name


@pytest.mark.parametrize("name", FRACTIONAL)
@pytest.mark.parametrize("value", [True, np.True_, math.nan, -math.inf, math.inf, "1", None, 1j])
def test_only_finite_numbers_are_numbers(name: str, value: Any) -> None:
    assert refusal(**{name: value}).parameter == name


@pytest.mark.parametrize("name", ["max_tokens", "min_tokens", "top_k", "n"])
def test_none_is_for_what_is_optional(name: str) -> None:
    assert refusal(**{name: None}).parameter == name


@pytest.mark.parametrize("name", FRACTIONAL)
@pytest.mark.parametrize("value", [1, np.int32(1), np.float32(1), np.float64(1)])
def test_a_whole_number_does_for_a_float(name: str, value: Any) -> None:
    taken = getattr(SamplingParams(**{name: value}), name)
    assert taken == 1.0
    assert type(taken) is float


@pytest.mark.parametrize("value", [np.int32(7), np.uint8(7), np.int64(7)])
def test_numpy_integers_do_for_integers(value: Any) -> None:
    params = sampling(max_tokens=value, seed=value, banned_token_ids=np.full(1, value))
    assert (params.max_tokens, params.seed, params.banned_token_ids) == (7, 7, (7,))
    assert type(params.seed) is int


@pytest.mark.parametrize(
    "name", ["ignore_eos", "include_stop_str_in_output", "skip_special_tokens"]
)
@pytest.mark.parametrize("value", [0, 1, None, "true"])
def test_flags_are_bools(name: str, value: Any) -> None:
    error = refusal(**{name: value})
    assert error.parameter == name
    assert str(error) == f"{name} must be True or False, got {value!r}"


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        ({-1: 0.0}, "an id of logit_bias must be an integer from 0 to 2147483647, got -1"),
        ({"5": 0.0}, "an id of logit_bias must be an integer from 0 to 2147483647, got '5'"),
        ({True: 0.0}, "an id of logit_bias must be an integer from 0 to 2147483647, got True"),
        ({5: 100.5}, "a value of logit_bias must be a number from -100 to 100, got 100.5"),
        ({5: -101}, "a value of logit_bias must be a number from -100 to 100, got -101"),
        ({5: math.nan}, "a value of logit_bias must be a number from -100 to 100, got nan"),
        ({5: None}, "a value of logit_bias must be a number from -100 to 100, got None"),
        ([(5, 1.0)], "logit_bias must map token ids to numbers, got [(5, 1.0)]"),
        (None, "logit_bias must map token ids to numbers, got None"),
    ],
)
def test_bias_is_refused(bias: Any, message: str) -> None:
    error = refusal(logit_bias=bias)
    assert error.parameter == "logit_bias"
    assert str(error).startswith(message)


def test_bias_is_a_copy() -> None:
    bias = {3: 100, 4: -100.0}
    params = SamplingParams(logit_bias=bias)
    bias.clear()
    assert params.logit_bias == {3: 100.0, 4: -100.0}
    assert all(type(value) is float for value in params.logit_bias.values())
    assert hash(params) == hash(SamplingParams())  # Unequal, but it can be a key.
    assert params != SamplingParams()


@pytest.mark.parametrize("name", ["allowed_token_ids", "banned_token_ids", "stop_token_ids"])
def test_ids_are_tuples_of_integers(name: str) -> None:
    for ids in ([3, 1, 3], (3, 1, 3), np.array([3, 1, 3])):
        assert getattr(sampling(**{name: ids}), name) == (3, 1, 3)
    for ids in (5, "5", b"\5", {5: 1.0}, [-1], [2**31], [5.0], [True], [None], ["5"], [[5]]):
        error = refusal(**{name: ids})
        assert error.parameter == name
        assert "got " in str(error)


def test_nothing_allowed_is_refused() -> None:
    error = refusal(allowed_token_ids=())
    assert error.parameter == "allowed_token_ids"
    assert "at least one id, or be None" in str(error)


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        ("\n\n", "stop must be a tuple of strings, also for a single one, got '\\n\\n'"),
        (7, "stop must be a tuple of strings, also for a single one, got 7"),
        (None, "stop must be a tuple of strings, also for a single one, got None"),
        (["a", ""], "stop must hold strings of at least one character, got ''"),
        ([7], "stop must hold strings of at least one character, got 7"),
        (["a\ud83d"], "stop must hold Unicode text; no text has a lone surrogate in it, got "),
    ],
)
def test_stop_is_refused(stop: Any, message: str) -> None:
    error = refusal(stop=stop)
    assert error.parameter == "stop"
    assert str(error).startswith(message)


def test_stop_takes_any_text() -> None:
    stop = ["\n", "🙂", "\x00", "a" * 10_000, "\ufffd", "a", "a"]
    assert sampling(stop=stop).stop == tuple(stop)


def test_a_text_cannot_be_kept_open_longer_than_it_may_be() -> None:
    assert SamplingParams(min_tokens=5, max_tokens=5).min_tokens == 5
    error = refusal(min_tokens=6, max_tokens=5)
    assert error.parameter == "min_tokens"
    assert "at most max_tokens, 5, got 6" in str(error)


def test_choices_are_picked_from_at_least_as_many_candidates() -> None:
    assert SamplingParams(n=3).num_candidates == 3
    assert SamplingParams(n=3, best_of=3).num_candidates == 3
    assert SamplingParams(n=3, best_of=7).num_candidates == 7
    error = refusal(n=3, best_of=2)
    assert error.parameter == "best_of"
    assert "at least n, 3, got 2" in str(error)


@pytest.mark.parametrize("sign", [1, -1])
def test_messages_stay_short(sign: int) -> None:
    for name in (*WHOLE, *FRACTIONAL):
        assert "got an integer of 20001 bits" in str(refusal(**{name: sign * 2**20_000}))
    assert len(str(refusal(stop="x" * 10**6))) < 200
    assert len(str(refusal(banned_token_ids="x" * 10**6))) < 200


def test_parameters_do_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().seed = 5  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TypeError):
        SamplingParams(5)  # pyright: ignore[reportCallIssue]
    assert dataclasses.replace(SamplingParams(seed=1), n=2) == SamplingParams(seed=1, n=2)


@pytest.mark.parametrize(
    ("name", "ids"),
    [
        ("logit_bias", {100: 1.0}),
        ("allowed_token_ids", (1, 100)),
        ("banned_token_ids", (100,)),
        ("stop_token_ids", (100,)),
    ],
)
def test_ids_are_of_the_vocabulary(name: str, ids: Any) -> None:
    params = SamplingParams(**{name: ids})
    params.check_vocabulary(101)
    with pytest.raises(InvalidRequestError) as caught:
        params.check_vocabulary(100)
    assert caught.value.parameter == name
    assert str(caught.value) == (
        f"{name} has token id 100, which is outside the vocabulary of 100: give ids from 0 to 99"
    )


@pytest.mark.parametrize(
    ("params", "parameter"),
    [
        ({"allowed_token_ids": (1, 2)}, None),
        ({"allowed_token_ids": (1, 2), "banned_token_ids": (1,)}, None),
        ({"allowed_token_ids": (1, 2), "banned_token_ids": (2, 1)}, "banned_token_ids"),
        ({"banned_token_ids": tuple(range(8))}, None),
        ({"banned_token_ids": tuple(range(9))}, "banned_token_ids"),
        ({"banned_token_ids": tuple(range(8)), "min_tokens": 1}, None),
        ({"allowed_token_ids": (7, 2), "stop_token_ids": (2,)}, None),
        ({"allowed_token_ids": (7, 2), "stop_token_ids": (2,), "min_tokens": 1}, "min_tokens"),
        ({"allowed_token_ids": (7,), "min_tokens": 1}, "min_tokens"),
        ({"allowed_token_ids": (7,), "min_tokens": 1, "ignore_eos": True}, None),
    ],
)
def test_there_is_always_a_token_to_draw(params: dict[str, Any], parameter: str | None) -> None:
    """In a vocabulary of nine ids, of which 7 is the end of a text."""
    taken = SamplingParams(**params)
    if parameter is None:
        taken.check_vocabulary(9, eos_ids=(7,))
        return
    with pytest.raises(InvalidRequestError, match="leave no token to draw") as caught:
        taken.check_vocabulary(9, eos_ids=(7,))
    assert caught.value.parameter == parameter


# Requests.


def test_a_request_needs_a_prompt() -> None:
    with pytest.raises(InvalidRequestError, match="the prompt is empty") as caught:
        Request(prompt_ids=())
    assert caught.value.parameter == "prompt"


@pytest.mark.parametrize("ids", ["text", 5, [5.0], [True], [-1], [None], {1: 2.0}])
def test_a_prompt_is_ids(ids: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        Request(prompt_ids=ids)
    assert caught.value.parameter == "prompt"


def test_a_prompt_may_be_any_row_of_ids() -> None:
    rows: list[Any] = [[2, 7], np.array([2, 7], np.int32), range(2, 12, 5)]
    for ids in rows:
        assert Request(prompt_ids=ids).prompt_ids == (2, 7)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("prompt_logprobs", [-1, 21, True, 5.0, "5"]),
        ("deadline", [math.nan, math.inf, True, "5", 2**60]),
    ],
)
def test_what_else_a_request_refuses(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(InvalidRequestError) as caught:
            Request(prompt_ids=(2,), **{name: value})
        assert caught.value.parameter == name


def test_a_request_fits_its_model() -> None:
    request = Request(prompt_ids=(0, 99), params=SamplingParams(max_tokens=8), deadline=5)
    assert request.deadline == 5.0
    request.check(100, 10)
    for vocab_size, context, parameter, message in [
        (99, 10, "prompt", "prompt has token id 99, which is outside the vocabulary of 99"),
        (
            100,
            9,
            "max_tokens",
            "the engine's context is 9 tokens; the prompt has 2 and max_tokens is 8",
        ),
        (
            100,
            2,
            "max_tokens",
            "the engine's context is 2 tokens; the prompt has 2 and max_tokens is 8",
        ),
        (
            100,
            1,
            "prompt",
            "the engine's context is 1 tokens; the prompt has 2 and max_tokens is 8",
        ),
    ]:
        with pytest.raises(InvalidRequestError, match=message) as caught:
            request.check(vocab_size, context)
        assert caught.value.parameter == parameter
    with pytest.raises(InvalidRequestError, match="leave no token"):
        Request(prompt_ids=(2,), params=SamplingParams(allowed_token_ids=(1,), min_tokens=1)).check(
            100, 100, eos_ids=(1,)
        )


def test_a_scored_prompt_may_fill_the_context() -> None:
    Request(prompt_ids=(1,) * 10, params=SamplingParams(max_tokens=0)).check(100, 10)


# Events.


def entry(token_id: int) -> TokenLogprob:
    return TokenLogprob(token_id, -0.5 * token_id, ((0, -0.25),))


def story(
    choice: int, words: str, *, mean: float | None, reason: FinishReason = "stop"
) -> list[Delta | Finished]:
    """The events of one choice: a delta for each word."""
    deltas = [
        Delta(choice, word, (index,), (entry(index),)) for index, word in enumerate(words.split())
    ]
    return [*deltas, Finished(choice, reason, None, len(deltas), mean)]


def test_events_add_up() -> None:
    request = Request(prompt_ids=(2, 5, 6), params=SamplingParams(logprobs=1), prompt_logprobs=1)
    events: list[Event] = [
        PromptScored((None, entry(5), entry(6))),
        Delta(0, "", (1,), (entry(1),)),
        Delta(0, "one", (2, 3), (entry(2), entry(3))),
        Delta(0, " two", (), ()),
        Finished(0, "stop", "STOP", 3, -1.0),
    ]
    completion = collect(request, events)
    [choice] = completion.choices
    assert (choice.index, choice.text, choice.token_ids) == (0, "one two", (1, 2, 3))
    assert choice.logprobs == (entry(1), entry(2), entry(3))
    assert (choice.finish_reason, choice.stop, choice.mean_logprob) == ("stop", "STOP", -1.0)
    assert completion.prompt_logprobs == (None, entry(5), entry(6))
    assert (completion.prompt_tokens, completion.completion_tokens) == (3, 3)


def test_log_probabilities_not_asked_for_are_none() -> None:
    completion = collect(Request(prompt_ids=(2,)), [Finished(0, "length", None, 0, None)])
    assert completion == Completion(completion.choices, 1, 0, None)
    assert completion.choices[0].logprobs is None
    wanted = Request(prompt_ids=(2,), params=SamplingParams(logprobs=0))
    assert collect(wanted, [Finished(0, "length", None, 0, None)]).choices[0].logprobs == ()
    assert completion.choices[0].text == ""


def kept(n: int, best_of: int | None, ends: list[tuple[float | None, FinishReason]]) -> list[str]:
    """The texts of the choices; candidate i says its own number."""
    stories = [story(i, f"{i} .", mean=mean, reason=why) for i, (mean, why) in enumerate(ends)]
    request = Request(prompt_ids=(2,), params=SamplingParams(n=n, best_of=best_of))
    completion = collect(request, itertools.chain.from_iterable(stories))
    assert [choice.index for choice in completion.choices] == list(range(n))
    assert completion.completion_tokens == 2 * len(ends), "all candidates count"
    return [choice.text.removesuffix(".") for choice in completion.choices]


@pytest.mark.parametrize(
    ("n", "best_of", "ends", "expected"),
    [
        (3, None, [(-3.0, "stop"), (-1.0, "stop"), (-2.0, "length")], ["0", "1", "2"]),
        (3, 3, [(-3.0, "stop"), (-1.0, "stop"), (-2.0, "length")], ["0", "1", "2"]),
        (2, 3, [(-3.0, "stop"), (-1.0, "stop"), (-2.0, "length")], ["1", "2"]),
        (2, 4, [(-2.0, "stop"), (-1.0, "stop"), (-1.0, "stop"), (-1.0, "stop")], ["1", "2"]),
        (1, 3, [(-9.0, "length"), (-0.1, "error"), (-0.1, "deadline")], ["0"]),
        (2, 3, [(-0.1, "cancelled"), (None, "error"), (-9.0, "stop")], ["2", "0"]),
        (1, 2, [(None, "length"), (None, "length")], ["0"]),
        (2, 3, [(math.nan, "error"), (-2.0, "error"), (-1.0, "error")], ["2", "1"]),
    ],
)
def test_the_best_candidates_are_kept(
    n: int, best_of: int | None, ends: list[Any], expected: list[str]
) -> None:
    assert kept(n, best_of, ends) == expected


@given(
    means=st.lists(st.sampled_from([-3.0, -2.0, -1.0, 0.0]), min_size=1, max_size=6),
    n=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_choices_do_not_depend_on_how_their_events_are_mixed(
    means: list[float], n: int, seed: int
) -> None:
    best_of = max(n, len(means))
    means += [-9.0] * (best_of - len(means))
    stories = [story(i, f"a{i} b{i} c{i}", mean=mean) for i, mean in enumerate(means)]
    request = Request(prompt_ids=(2,), params=SamplingParams(n=n, best_of=best_of, logprobs=0))
    whole = collect(request, itertools.chain.from_iterable(stories))
    turns = [i for i, events in enumerate(stories) for _ in events]
    random.Random(seed).shuffle(turns)
    sources = [iter(events) for events in stories]
    assert collect(request, [next(sources[i]) for i in turns]) == whole
    assert [len(choice.token_ids) for choice in whole.choices] == [3] * n


def test_a_candidate_without_an_end_is_not_passed_over() -> None:
    with pytest.raises(AssertionError, match="every candidate ends with Finished"):
        collect(Request(prompt_ids=(2,)), [Delta(0, "a", (1,), ())])
