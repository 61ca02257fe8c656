"""Random bodies: whatever is sent, no reply is an error of the server's, and it serves on."""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refimpl.server.contract import CompletionRequest
from refimpl.server.errors import MAX_MESSAGE, MAX_PARAM
from refimpl.server.extensions import NOT_CARRIED
from tests.servers import MODEL, NAMES, Client, Got, tiny_client

MANY = 10_000
SUITE = 200
# An engine's programs are compiled at their first use, and ten thousand requests take long.
pytestmark = pytest.mark.timeout(900)

Settings = settings(
    deadline=None,
    derandomize=True,
    database=None,
    # Half of the bodies have prompts, ids and options, and are large to Hypothesis.
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

ids = st.integers(0, 600)
integers = st.integers(-2, 8)
numbers = st.one_of(st.floats(-3, 3), st.integers(-3, 3))
texts = st.text(max_size=12)
# Any value of JSON, such as comes of a mistake: also numbers out of all ranges, and odd letters.
values = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.integers(-(2**70), 2**70), st.floats(),
        texts, st.text(st.characters(), max_size=4),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=3)
    ),
    max_leaves=8,
)  # fmt: skip
options = st.fixed_dictionaries(
    {},
    optional={
        "include_usage": st.booleans(),
        "include_obfuscation": st.booleans(),
        "continuous_usage_stats": st.booleans(),
    },
)

# What each field takes, and a little beyond its ends.
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "model": st.sampled_from([*NAMES, *NAMES, *NAMES, "nobody"]),
    "prompt": st.one_of(
        texts,
        st.lists(texts, max_size=3),
        st.lists(ids, max_size=20),
        st.lists(st.lists(ids, max_size=5), max_size=3),
        st.just([2, *range(5, 400)]),
    ),
    "best_of": integers,
    "echo": st.booleans(),
    "frequency_penalty": numbers,
    "logit_bias": st.dictionaries(st.one_of(ids.map(str), texts), numbers, max_size=3),
    "logprobs": st.integers(-1, 6),
    "max_tokens": st.integers(-1, 10),
    "n": integers,
    "presence_penalty": numbers,
    "seed": st.one_of(st.integers(-9, 9), st.sampled_from([2**63 - 1, 2**63, -(2**63), -1.0])),
    "stop": st.one_of(texts, st.lists(texts, max_size=5)),
    "stream": st.booleans(),
    "stream_options": options,
    "suffix": texts,
    "temperature": numbers,
    "top_p": numbers,
    "user": texts,
    "ignore_eos": st.booleans(),
    "repetition_penalty": numbers,
    "top_k": integers,
    "min_p": numbers,
    "min_tokens": integers,
    "stop_token_ids": st.lists(ids, max_size=20),
    "include_stop_str_in_output": st.booleans(),
    "skip_special_tokens": st.booleans(),
    "add_special_tokens": st.booleans(),
    "truncate_prompt_tokens": integers,
    "truncation_side": st.sampled_from(["left", "right", "up"]),
    "allowed_token_ids": st.lists(ids, max_size=5),
    "bad_words": st.lists(texts, max_size=3),
    "prompt_logprobs": st.integers(-1, 6),
    "return_token_ids": st.booleans(),
    "return_tokens_as_token_ids": st.booleans(),
    "request_id": texts,
}


@st.composite
def bodies(draw: st.DrawFn) -> dict[str, Any]:
    """A body that is nearly right: few fields, and of those seldom one with any value at all."""
    body: dict[str, Any] = {"model": MODEL, "max_tokens": 3}
    for name in draw(st.lists(st.sampled_from(sorted(FIELDS)), max_size=6, unique=True)):
        is_wild = draw(st.integers(0, 11)) == 0
        body[name] = draw(values if is_wild else FIELDS[name])
    if draw(st.integers(0, 15)) == 0:
        body[draw(st.one_of(texts, st.sampled_from(sorted(NOT_CARRIED))))] = draw(values)
    return body


# As text, because much of what may come is no JSON: NaN, lone surrogates, a piece, noise.
data = st.one_of(
    bodies().map(json.dumps).map(str.encode),
    bodies().map(json.dumps).map(str.encode),
    bodies().map(json.dumps).map(str.encode),
    values.map(json.dumps).map(str.encode),
    st.tuples(bodies(), st.integers(0, 60)).map(lambda cut: json.dumps(cut[0])[: cut[1]].encode()),
    st.binary(max_size=40),
)


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    # A suffix is reached by scoring every candidate, which is much work of one kind.
    with tiny_client(infill_candidates=2, infill_cuts=2) as started:
        yield started


def check(got: Got) -> None:
    """A completion or a stream that is whole, or an error that says what the client did wrong."""
    assert got.status in (200, 400, 404), got.body
    if got.status != 200:
        error = got.error
        assert error["type"] == "invalid_request_error"
        assert len(error["message"]) <= MAX_MESSAGE
        assert error["param"] is None or len(error["param"]) <= MAX_PARAM
    elif got.headers["Content-Type"] == "application/json":
        assert all(choice["finish_reason"] in ("stop", "length") for choice in got.choices)
    else:
        assert not any("error" in event for event in got.events)


def serves_on(client: Client) -> None:
    [choice] = client.complete(prompt="the quick", max_tokens=2, ignore_eos=True).choices
    assert choice["finish_reason"] == "length"
    statistics = client.service.statistics()
    assert statistics is not None
    assert (statistics.slots_in_use, statistics.running, statistics.waiting) == (0, 0, 0)


def test_every_field_is_among_those_drawn():
    assert set(FIELDS) == set(CompletionRequest.model_fields)


@pytest.mark.parametrize(
    "count",
    [SUITE, pytest.param(MANY, marks=[pytest.mark.long, pytest.mark.timeout(7200)])],
)
def test_random_bodies(client, count):
    statuses = Counter[int]()

    @settings(Settings, max_examples=count)
    @given(body=data)
    def any_body(body: bytes) -> None:
        got = client.send("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        check(got)
        assert client.service.queue.num_held == 0
        statuses[got.status] += 1

    any_body()
    # Neither are all refused, nor all served.
    assert min(statuses[200], statuses[400]) >= count // 10, statuses
    serves_on(client)


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
def test_random_bodies_of_the_tokenizer(client, path):
    fields = st.fixed_dictionaries(
        {}, optional={"prompt": st.one_of(texts, values), "tokens": st.lists(ids), "model": values}
    )

    @settings(Settings, max_examples=SUITE // 4)
    @given(body=st.one_of(fields, values))
    def any_body(body: Any) -> None:
        got = client.post(path, body)
        assert got.status in (200, 400, 404), got.body
        assert got.status == 200 or got.error["type"] == "invalid_request_error"

    any_body()
