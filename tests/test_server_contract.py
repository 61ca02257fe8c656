"""The request's schema: what is taken, what is refused, and what of it a client is told."""

import json

import pytest

from refimpl.server.body import parse_json
from refimpl.server.contract import CompletionRequest, parse_request
from refimpl.server.errors import MAX_MESSAGE, Problem
from refimpl.server.extensions import NOT_CARRIED
from refimpl.server.settings import ServerSettings

SETTINGS = ServerSettings()


def parsed(**fields) -> CompletionRequest:
    request, ignored = parse_request({"model": "m", **fields}, SETTINGS)
    assert ignored == []
    return request


def refused(body: object, settings: ServerSettings = SETTINGS) -> Problem:
    with pytest.raises(Problem) as caught:
        parse_request(body, settings)
    problem = caught.value
    assert (problem.status, problem.type) == (400, "invalid_request_error")
    return problem


DEFAULTS = {
    "prompt": None, "best_of": 0, "echo": False, "frequency_penalty": 0, "logit_bias": {},
    "logprobs": None, "max_tokens": 16, "n": 1, "presence_penalty": 0, "seed": None, "stop": [],
    "stream": False, "stream_options": None, "suffix": "", "temperature": 1, "top_p": 1, "user": "",
    "ignore_eos": False, "repetition_penalty": 1, "top_k": 0, "min_p": 0, "min_tokens": 0,
    "stop_token_ids": [], "include_stop_str_in_output": False, "skip_special_tokens": True,
    "add_special_tokens": True, "truncate_prompt_tokens": None, "truncation_side": "left",
    "allowed_token_ids": None, "bad_words": [], "prompt_logprobs": None, "return_token_ids": False,
    "return_tokens_as_token_ids": False, "request_id": None,
}  # fmt: skip


def test_every_field_has_its_default_and_null_is_the_same_as_left_out():
    assert set(DEFAULTS) | {"model"} == set(CompletionRequest.model_fields)
    left_out, null = parsed(), parsed(**dict.fromkeys(DEFAULTS))
    for name, value in DEFAULTS.items():
        assert getattr(left_out, name) == value, name
        assert getattr(null, name) == value, name


@pytest.mark.parametrize(
    ("field", "low", "high", "below", "above"),
    [
        ("best_of", 1, 20, -1, 21),
        ("n", 1, 128, 0, 129),
        ("frequency_penalty", -2, 2, -2.01, 2.01),
        ("presence_penalty", -2, 2, -2.01, 2.01),
        ("temperature", 0, 2, -0.01, 2.01),
        ("top_p", 0, 1, -0.01, 1.01),
        ("min_p", 0, 1, -0.01, 1.01),
        ("logprobs", 0, 5, -1, 6),
        ("prompt_logprobs", 0, 5, -1, 6),
        ("seed", -(2**63), 2**63 - 1, -(2**63) - 1, 2**63),
    ],
)
def test_a_range_has_both_its_ends_and_nothing_beyond(field, low, high, below, above):
    for inside in (low, high):
        assert getattr(parsed(**{field: inside}), field) == inside
    for outside, word in ((below, "less than the minimum of"), (above, "greater than the maximum")):
        problem = refused({"model": "m", field: outside})
        assert problem.param == field
        assert problem.message.startswith(f"{outside} is {word}")
        assert problem.message.endswith(f" - '{field}'")


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_tokens", -1), ("min_tokens", -1), ("top_k", -2), ("truncate_prompt_tokens", -2),
     ("repetition_penalty", 0), ("repetition_penalty", -1)],
)  # fmt: skip
def test_what_has_no_highest_value_has_a_lowest(field, value):
    assert refused({"model": "m", field: value}).param == field


INTEGERS = ("max_tokens", "n", "best_of", "logprobs", "seed", "top_k", "min_tokens",
            "truncate_prompt_tokens", "prompt_logprobs")  # fmt: skip
NUMBERS = ("temperature", "top_p", "frequency_penalty", "presence_penalty", "repetition_penalty",
           "min_p")  # fmt: skip
BOOLEANS = ("echo", "stream", "ignore_eos", "include_stop_str_in_output", "skip_special_tokens",
            "add_special_tokens", "return_token_ids", "return_tokens_as_token_ids")  # fmt: skip
STRINGS = ("suffix", "user", "request_id")


@pytest.mark.parametrize("field", INTEGERS)
def test_an_integer_is_no_bool_no_string_and_no_fraction_but_may_be_a_whole_float(field):
    for wrong in (True, "1", 1.5, [1], {}):
        problem = refused({"model": "m", field: wrong})
        assert problem.param == field
        assert problem.message == f"{wrong!r} is not of type 'integer' - '{field}'"
    value = getattr(parsed(**{field: 1.0}), field)
    assert value == 1
    assert type(value) is int


@pytest.mark.parametrize("field", NUMBERS)
def test_a_number_is_no_bool_and_no_string(field):
    for wrong in (True, "1", [1]):
        problem = refused({"model": "m", field: wrong})
        assert problem.message == f"{wrong!r} is not of type 'number' - '{field}'"
    assert getattr(parsed(**{field: 1}), field) == 1.0


@pytest.mark.parametrize("field", BOOLEANS)
def test_a_boolean_is_no_number_and_no_string(field):
    for wrong in (0, 1, "true", []):
        problem = refused({"model": "m", field: wrong})
        assert problem.message == f"{wrong!r} is not of type 'boolean' - '{field}'"


@pytest.mark.parametrize("field", STRINGS)
def test_a_string_is_nothing_else(field):
    for wrong in (0, True, ["a"]):
        assert refused({"model": "m", field: wrong}).param == field


def test_without_a_model_it_says_so():
    for body in ({}, {"model": None}, {"prompt": "a"}):
        problem = refused(body)
        assert (problem.message, problem.param) == ("you must provide a model parameter", "model")


@pytest.mark.parametrize("body", [[], "text", 1, None, True])
def test_a_body_that_is_no_object(body):
    problem = refused(body)
    assert problem.param is None
    assert "must be a JSON object" in problem.message


@pytest.mark.parametrize(
    "prompt",
    [[], [[]], [[1], []], ["a", 1], [1, "a"], [True], [1.0], [[1.5]], [-1], [[1], [-2]], 5, {},
     True, [None], ["a", None], [[[1]]]],
)  # fmt: skip
def test_prompts_that_are_none(prompt):
    assert refused({"model": "m", "prompt": prompt}).param == "prompt"


@pytest.mark.parametrize("prompt", ["", "text", ["a", ""], [0, 1], [[0], [1, 2]]])
def test_prompts_in_every_form_are_kept_as_they_are(prompt):
    assert parsed(prompt=prompt).prompt == prompt


@pytest.mark.parametrize(
    ("prompt", "count"), [(None, 1), ("", 1), (["a", "b"], 2), ([1, 2, 3], 1), ([[1], [2]], 2)]
)
def test_the_number_of_prompts(prompt, count):
    assert parsed(prompt=prompt).num_prompts == count


@pytest.mark.parametrize(
    ("stop", "stops"), [("a", ("a",)), ([], ()), (["a", "bb"], ("a", "bb")), (None, ())]
)
def test_stop_in_every_form(stop, stops):
    assert parsed(stop=stop).stops == stops


@pytest.mark.parametrize("stop", ["", [""], ["a", ""], [1], 1, list("abcde"), "a" * 257])
def test_stops_that_are_none(stop):
    assert refused({"model": "m", "stop": stop}).param == "stop"


@pytest.mark.parametrize("key", ["a", "-1", "1.0", " 1", "1 ", "+1", "", "١"])
def test_a_key_of_logit_bias_is_a_decimal_id(key):
    problem = refused({"model": "m", "logit_bias": {key: 1}})
    assert problem.param == "logit_bias"
    assert problem.message == (
        f"Invalid key in 'logit_bias': {key!r}. You should only be submitting non-negative "
        "integers."
    )


@pytest.mark.parametrize("value", [100.5, -101, "1", True, None])
def test_a_value_of_logit_bias_is_a_number_from_minus_100_to_100(value):
    assert refused({"model": "m", "logit_bias": {"1": value}}).param == "logit_bias"
    assert parsed(logit_bias={"1": -100, "2": 0.5, "3": 100}).logit_bias["2"] == 0.5


def test_more_entries_of_logit_bias_than_the_cap():
    assert len(parsed(logit_bias={str(i): 0 for i in range(300)}).logit_bias) == 300
    assert refused({"model": "m", "logit_bias": {str(i): 0 for i in range(301)}}).param == (
        "logit_bias"
    )


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"n": 1, "best_of": 2, "stream": True}, "best_of"),
        ({"stream_options": {}}, "stream_options"),
        ({"stream_options": {"include_usage": True}, "stream": False}, "stream_options"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"min_tokens": 3, "max_tokens": 2}, "min_tokens"),
        ({"stream": True, "stream_options": {"other": 1}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options"),
        ({"stream": True, "stream_options": []}, "stream_options"),
        ({"truncation_side": "middle"}, "truncation_side"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids"),
        ({"stop_token_ids": [True]}, "stop_token_ids"),
        ({"bad_words": [""]}, "bad_words"),
        ({"request_id": "two words"}, "request_id"),
        ({"user": "u" * 257}, "user"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": ["a"] * 2, "n": 65}, "n"),
        ({"prompt": ["a"] * 7, "n": 2, "best_of": 20}, "best_of"),
    ],
)
def test_what_does_not_go_together_or_is_too_much(fields, param):
    assert refused({"model": "m", **fields}).param == param


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 5, "best_of": 0},
        {"n": 5, "best_of": None},
        {"n": 2, "best_of": 2, "stream": True},
        {"stream": True, "stream_options": {}},
        {"stream": True, "stream_options": {"include_usage": None}},
        {"stream_options": None},
        {"prompt_logprobs": 0, "stream": True},
        {"n": 128, "temperature": 0},
        {"max_tokens": 0},
        {"top_p": 0},
    ],
)
def test_what_goes_together(fields):
    assert parsed(**fields).model == "m"


def test_unknown_fields_are_refused_by_name():
    problem = refused({"model": "m", "frobnicate": None})
    assert problem.message == "Unrecognized request argument supplied: frobnicate"
    assert problem.param == "frobnicate"
    assert "a, b" in refused({"model": "m", "a": 1, "b": 2}).message


def test_unknown_fields_are_ignored_and_named_if_the_settings_say_so():
    settings = ServerSettings(unknown_fields="ignore")
    request, ignored = parse_request({"model": "m", "a": 1, "n": 2, "b": None}, settings)
    assert (request.n, ignored) == (2, ["a", "b"])
    assert refused({"model": "m", "a": 1, "n": 0}, settings).param == "n"


@pytest.mark.parametrize("name", NOT_CARRIED)
def test_a_known_field_that_means_nothing_here_is_refused_unless_it_asks_for_nothing(name):
    problem = refused({"model": "m", name: "something"})
    assert (problem.param, problem.message) == (
        name, f"'{name}' is not supported by this server: leave it out",
    )  # fmt: skip
    for neutral in (None, *NOT_CARRIED[name]):
        assert parsed(**{name: neutral}).model == "m"


@pytest.mark.parametrize(
    "body",
    [
        {"model": "m", "n": "x" * 100_000},
        {"model": "m", "n": 10**300},
        {"model": "m", "prompt": [["y"] * 50_000] * 2},
        {"model": "m", "prompt": ["a" * 50_000, 1]},
        {"model": "m", "z" * 100_000: 1},
        {"model": "m", **{f"field{i}": i for i in range(5000)}},
        {"model": "m", "logit_bias": {"k" * 100_000: 1}},
        {"model": "m", "logit_bias": {str(i): "no" for i in range(5000)}},
        {"model": "m", "stop": ["s" * 100_000]},
        {"model": "m", "stream": True, "stream_options": {"o" * 100_000: 1}},
    ],
    ids=range(10),
)
def test_an_error_is_short_and_has_nothing_of_the_library_in_it(body):
    problem = refused(body)
    assert len(problem.message) <= MAX_MESSAGE
    assert len(json.dumps(problem.to_json())) < 1400
    assert "pydantic" not in problem.message
    assert "Traceback" not in problem.message


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"{} {}", "Extra data"),
        (b'{"a": 1, "a": 2}', "the key 'a' comes twice"),
        (b'{"x": {"a": 1, "a": 1}}', "the key 'a' comes twice"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": Infinity}', "Infinity is no number"),
        (b'{"a": -Infinity}', "-Infinity is no number"),
        (b'{"a": 1e999}', "the number 1e999 is too large"),
        (b'{"a": -1e999}', "the number -1e999 is too large"),
        (b'{"a": ' + b"1" * 5000 + b"}", "a number has 5000 digits"),
        (b"[" * 17 + b"]" * 17, "nested more than 16 deep"),
        (b"[" * 1_000_000, "nested more than 16 deep"),
        (b'{"a":' * 100_000, "nested more than 16 deep"),
        (b'"' + b'\\"' * 500_000, "Unterminated string"),
        (b'"\xff"', "not UTF-8 at byte 1"),
        (b"{'a': 1}", "Expecting property name"),
    ],
    ids=range(17),
)
@pytest.mark.timeout(10)
def test_json_that_is_none(text, why):
    with pytest.raises(Problem, match="We could not parse the JSON body") as caught:
        parse_json(text, max_depth=16)
    assert caught.value.status == 400
    assert why in caught.value.message


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b"[" * 16 + b"]" * 16, [[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]),
        (b'"[[[[[[[[[[[[[[[[[[[["', "[" * 20),
        (b'"\\"[[[[[[[[[[[[[[[[[[[["', '"' + "[" * 20),
        (b"\xef\xbb\xbf[1]", [1]),
        (b'"\\ud83d\\ude42"', "\N{SLIGHTLY SMILING FACE}"),
        ('{"ключ": "🙂"}'.encode(), {"ключ": "🙂"}),
        (b"[1e5, -0, 9223372036854775808]", [1e5, 0, 2**63]),
    ],
    ids=range(7),
)
def test_json_that_is_some(text, value):
    assert parse_json(text, max_depth=16) == value


@pytest.mark.parametrize(
    ("text", "param"),
    [
        (b'{"model": "m", "prompt": "a\\ud800"}', "prompt"),
        (b'{"user": "\\udfff"}', "user"),
        (b'{"stop": ["a", "\\uD83D"]}', "stop"),
        (b'{"a\\ud800": 1}', r"a\ud800"),
        (b'["\\ud800"]', None),
    ],
)
def test_half_a_character_is_refused(text, param):
    with pytest.raises(Problem, match="lone surrogate") as caught:
        parse_json(text, max_depth=16)
    assert caught.value.param == param
