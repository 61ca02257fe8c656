"""What the tests of other servers of this endpoint check, in our own words, asked of this one.

lengths, usage, a plain greedy call      test_a_greedy_call_is_counted_exactly
ids as prompts, extra fields             test_ids_of_a_prompt_*, test_returned_ids_*
truncation                               test_a_prompt_is_cut_*
numbers of log-probabilities             test_the_number_of_logprobs_*, test_too_many_logprobs_*
log-probabilities of prompts             test_prompt_logprobs_*, test_an_echoed_prompt_is_scored
streams                                  test_a_stream_*, test_usage_*, test_frames_*
choices, arrays, their order             test_choices_*, test_an_array_*, test_four_prompts_*
stop strings, streamed and not           test_places_of_a_stream_*, test_a_stop_*
what is refused, and how                 test_guided_*, test_ids_that_*, test_errors_*
engines that fail                        test_an_engine_that_*
keys, preflights, ids of requests        test_keys_*, test_preflights_*, test_ids_of_requests
clients that leave, draining, figures    test_clients_that_leave_*, test_draining_*, test_metrics_*
seeds, neighbours, caches                test_seeds_*, test_neighbours_*, test_a_prompt_in_the_cache
cached tokens in the usage               test_tokens_that_were_cached_*
the whole product of forms               test_server_completions
what real sockets and signals need       test_server_run, test_server_command
bodies of clients                        test_contract_clients
"""

import asyncio
import json
import math
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import pytest
from openai.types import CompletionUsage

from refimpl.engine.events import Delta
from refimpl.server.app import create_app
from refimpl.server.keys import read_keys
from refimpl.server.lifecycle import Service
from refimpl.server.loading import Loaded
from refimpl.server.settings import ServerSettings
from tests.engines import tiny_engine
from tests.servers import FINGERPRINT, MODEL, NAMES, SLOTS, Client, client_of, tiny_client, until

TEXT = "the cat sat"
# Tokens of whole letters: " t", "in", " a", "er", "on", "he", "re", "or", ... 20 of them.
PIECES = list(range(278, 298))
# The end of text among them, so that texts end by themselves.
WITH_END = [1, *PIECES[:5]]


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with tiny_client() as client:
        yield client


def drawn(client: Client, **more: Any) -> dict[str, Any]:
    """The only choice of a text of ordinary pieces, drawn by a seed."""
    body = {"prompt": TEXT, "max_tokens": 10, "temperature": 1, "seed": 4,
            "allowed_token_ids": PIECES, **more}  # fmt: skip
    [choice] = client.complete(**body).choices
    return choice


# Completions


def test_a_greedy_call_is_counted_exactly(client):
    got = client.complete(prompt=TEXT, max_tokens=5)
    [choice] = got.choices
    count = len(client.ids_of(TEXT))
    assert choice["finish_reason"] == "length"
    assert got.json["usage"] == {
        "prompt_tokens": count, "completion_tokens": 5, "total_tokens": count + 5,
        "prompt_tokens_details": {"cached_tokens": 0},
    }  # fmt: skip
    assert got.json["system_fingerprint"].startswith("fp_")
    assert got.json["id"].startswith("cmpl-")


def test_ids_of_a_prompt_are_a_prompt_and_bring_nothing_unasked(client):
    [choice] = client.complete(prompt=client.ids_of(TEXT), max_tokens=3).choices
    assert list(choice) == ["text", "index", "logprobs", "finish_reason"]
    assert choice["text"] == client.complete(prompt=TEXT, max_tokens=3).choices[0]["text"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_prompt_is_cut_to_its_last_or_first_ids(client, side):
    ids = [2, *PIECES[:6]]
    got = client.complete(
        prompt=ids, max_tokens=1, truncate_prompt_tokens=3, truncation_side=side,
        return_token_ids=True,
    )  # fmt: skip
    kept = ids[-3:] if side == "left" else ids[:3]
    assert got.choices[0]["prompt_token_ids"] == kept
    assert got.json["usage"]["prompt_tokens"] == 3


@pytest.mark.parametrize("stream", [False, True])
def test_the_number_of_logprobs_is_the_one_asked_for_or_one_more(client, stream):
    sizes = dict[int | None, set[int]]()
    for count in (None, 0, 1, 5):
        body = {"prompt": TEXT, "max_tokens": 6, "temperature": 2, "seed": 1, "logprobs": count}
        got = client.complete(**body, stream=stream)
        choice = got.assembled[0] if stream else got.choices[0]
        if count is None:
            assert choice["logprobs"] is None
            continue
        logprobs = choice["logprobs"]
        assert {len(values) for values in logprobs.values()} == {6}
        sizes[count] = {len(top) for top in logprobs["top_logprobs"]}
    assert sizes[0] == {1}
    # At this temperature nearly every token drawn is outside the likeliest, and is there too.
    assert 2 in sizes[1] <= {1, 2}
    assert 6 in sizes[5] <= {5, 6}


@pytest.mark.parametrize("stream", [False, True])
def test_too_many_logprobs_are_refused_and_the_next_request_is_served(client, stream):
    for count in (6, -1):
        got = client.complete(prompt=TEXT, max_tokens=1, logprobs=count, stream=stream)
        assert (got.status, got.error["param"]) == (400, "logprobs")
    assert len(client.complete(prompt=TEXT, max_tokens=1, logprobs=5).choices) == 1


def test_prompt_logprobs_come_for_each_choice_if_asked_for(client):
    got = client.complete(prompt=[TEXT, "a dog"], max_tokens=1, prompt_logprobs=1)
    for choice, text in zip(got.choices, [TEXT, "a dog"], strict=True):
        first, *others = choice["prompt_logprobs"]
        assert first is None
        assert len(others) == len(client.ids_of(text)) - 1
        assert {len(entry) for entry in others} <= {1, 2}
    only = client.complete(prompt=TEXT, max_tokens=1, prompt_logprobs=0).choices[0]
    assert {len(entry) for entry in only["prompt_logprobs"][1:]} == {1}
    assert "prompt_logprobs" not in client.complete(prompt=TEXT, max_tokens=1).choices[0]
    refused = client.complete(prompt=TEXT, max_tokens=1, prompt_logprobs=-1)
    assert (refused.status, refused.error["param"]) == (400, "prompt_logprobs")


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("form", ["text", "ids"])
def test_an_echoed_prompt_is_scored(client, count, form):
    prompt = TEXT if form == "text" else client.ids_of(TEXT)
    got = client.complete(prompt=prompt, max_tokens=2, echo=True, logprobs=count)
    [choice] = got.choices
    # Ids may have begun with the beginning of text, which is then theirs.
    assert choice["text"].removeprefix("<bos>").startswith(TEXT)
    logprobs = choice["logprobs"]
    num_prompt = len(client.ids_of(TEXT))
    assert {len(values) for values in logprobs.values()} == {num_prompt + 2}
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    for token, value, top in zip(
        logprobs["tokens"][1:], logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:],
        strict=True,
    ):  # fmt: skip
        assert max(count, 1) <= len(top) <= count + 1
        assert top[token] == value
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])


def test_the_likeliest_are_probabilities(client):
    [choice] = client.complete(prompt=TEXT, max_tokens=8, logprobs=5).choices
    for top in choice["logprobs"]["top_logprobs"]:
        assert all(isinstance(text, str) and value <= 0 for text, value in top.items())
        assert sum(math.exp(value) for value in top.values()) <= 1
        assert list(top.values()) == sorted(top.values(), reverse=True)


# Streams


def test_a_stream_is_the_reply_in_pieces(client):
    for seed in (1, 2, 3):
        body = {"prompt": TEXT, "max_tokens": 12, "temperature": 1, "seed": seed, "logprobs": 1}
        whole = client.complete(**body).choices[0]
        got = client.complete(**body, stream=True)
        piece = got.assembled[0]
        for name in ("text", "logprobs", "finish_reason"):
            assert piece[name] == whole[name]
        reasons = [event["choices"][0]["finish_reason"] for event in got.events]
        assert [reason is None for reason in reasons] == [True] * (len(reasons) - 1) + [False]


def test_choices_of_a_seed_differ_in_text_and_length_streamed_and_not(client):
    body = {"prompt": TEXT, "n": 3, "temperature": 1, "seed": 7, "max_tokens": 12,
            "allowed_token_ids": WITH_END, "return_token_ids": True}  # fmt: skip
    choices = client.complete(**body).choices
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    assert len({choice["text"] for choice in choices}) == 3
    assert len({len(choice["token_ids"]) for choice in choices}) > 1
    got = client.complete(**body | {"return_token_ids": False}, stream=True)
    assert [piece["text"] for piece in got.assembled] == [choice["text"] for choice in choices]
    # One for each token at most, and the one that finishes.
    counts = Counter(event["choices"][0]["index"] for event in got.events)
    assert all(count <= 12 + 1 for count in counts.values())


def test_usage_of_a_stream_is_null_until_it_is_told_once(client):
    body = {"prompt": TEXT, "max_tokens": 4, "stream": True}
    for options in (None, {}, {"include_usage": False}):
        events = client.complete(**body, stream_options=options).events
        assert all("usage" not in event for event in events)
    *chunks, last = client.complete(**body, stream_options={"include_usage": True}).events
    assert {event["usage"] for event in chunks} == {None}
    assert last["choices"] == []
    count = len(client.ids_of(TEXT))
    expected = {
        "prompt_tokens": count, "completion_tokens": 4, "total_tokens": count + 4,
        "prompt_tokens_details": {"cached_tokens": 0},
    }  # fmt: skip
    assert last["usage"] == expected
    always = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = client.complete(**body, stream_options=always).events
    assert all(event["usage"]["prompt_tokens"] == count for event in chunks)
    assert last["usage"] == expected


@pytest.mark.parametrize("options", [{}, {"include_usage": True}, {"include_usage": False}])
@pytest.mark.parametrize("stream", [None, False])
def test_options_of_a_stream_without_one_are_refused(client, options, stream):
    got = client.complete(prompt=TEXT, max_tokens=1, stream=stream, stream_options=options)
    assert (got.status, got.error["param"]) == (400, "stream_options")


def test_an_array_of_two_gives_its_choices_in_the_order_of_prompts(client):
    ids = client.ids_of(TEXT)
    for prompt in ([TEXT, TEXT], [ids, ids]):
        choices = client.complete(prompt=prompt, max_tokens=3).choices
        assert choices[0]["text"] == choices[1]["text"]
    body = {"prompt": [TEXT, "a dog"], "n": 2, "max_tokens": 3, "temperature": 1, "seed": 2}
    choices = client.complete(**body).choices
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    alone = client.complete(**body | {"prompt": "a dog"}).choices
    assert [choice["text"] for choice in choices[2:]] == [choice["text"] for choice in alone]
    got = client.complete(**body, stream=True)
    assert {len(event["choices"]) for event in got.events} == {1}
    assert got.assembled == choices


def test_four_prompts_are_told_apart_by_their_index(client):
    prompts = [TEXT, "a dog", "in", "the"]
    alone = [client.complete(prompt=text, max_tokens=3).choices[0]["text"] for text in prompts]
    choices = client.complete(prompt=prompts, max_tokens=3).choices
    assert [choice["text"] for choice in choices] == alone
    body = {"prompt": prompts, "max_tokens": 3, "stream": True}
    got = client.complete(**body, stream_options={"include_usage": True})
    assert [piece["text"] for piece in got.assembled] == alone
    *chunks, last = got.events
    assert [bool(event["usage"]) for event in chunks] == [False] * len(chunks)
    assert last["usage"]["completion_tokens"] == 12
    assert last["usage"]["prompt_tokens"] == sum(len(client.ids_of(text)) for text in prompts)


def test_prompts_as_text_and_ids_agree_and_do_not_mix(client):
    ids = client.ids_of(TEXT)
    texts = {
        client.complete(prompt=prompt, max_tokens=4).choices[0]["text"]
        for prompt in (TEXT, [TEXT], ids, [ids])
    }
    assert len(texts) == 1
    for mixed in ([TEXT, ids], [TEXT, 5], [ids, 5], [[TEXT]]):
        got = client.complete(prompt=mixed, max_tokens=1)
        assert (got.status, got.error["param"]) == (400, "prompt")


def test_places_of_a_stream_that_holds_text_back_are_those_of_the_reply(client):
    plain = drawn(client)["text"]
    # Held back again and again, but never whole.
    stop = [plain[2:5] + "\x00", plain[:3] + "\x00", plain[-3:] + "\x00"]
    body = {"prompt": TEXT, "max_tokens": 10, "temperature": 1, "seed": 4, "logprobs": 1,
            "allowed_token_ids": PIECES, "stop": stop}  # fmt: skip
    for echo in (False, True):
        whole = client.complete(**body, echo=echo).choices[0]
        assert whole["text"] == (TEXT if echo else "") + plain
        piece = client.complete(**body, echo=echo, stream=True).assembled[0]
        assert piece["text"] == whole["text"]
        assert piece["logprobs"] == whole["logprobs"]
        full = TEXT + plain
        for token, offset in zip(
            whole["logprobs"]["tokens"], whole["logprobs"]["text_offset"], strict=True
        ):
            assert token == "<bos>" or full[offset : offset + len(token)] == token


def test_a_stop_that_never_comes_whole_cuts_nothing(client):
    plain = drawn(client)["text"]
    for begin in range(0, len(plain) - 4, 3):
        stop = plain[begin : begin + 4] + "\x00"
        kept = drawn(client, stop=stop)
        assert (kept["text"], kept["finish_reason"]) == (plain, "length")


def test_a_stop_may_lie_across_tokens_and_be_a_string_or_a_list(client):
    plain = drawn(client)["text"]
    stop = plain[4:9]
    expected = plain[: plain.index(stop)]
    for value in (stop, [stop], ["never", stop]):
        whole = drawn(client, stop=value)
        assert (whole["text"], whole["finish_reason"]) == (expected, "stop")
        got = client.complete(
            prompt=TEXT, max_tokens=10, temperature=1, seed=4, allowed_token_ids=PIECES,
            stop=value, stream=True,
        )  # fmt: skip
        assert got.assembled[0]["text"] == expected


def test_frames_of_odd_texts_are_spelt_in_one_way(client):
    odd = 'a "quote", a back\\slash, \x07\x00\t\r\n, 🙂 日本語 \u2028 </script> ﷺ'
    got = client.complete(prompt=odd, max_tokens=2, echo=True, logprobs=1, stream=True)
    assert got.assembled[0]["text"].startswith(odd)
    for frame in got.body.decode("ascii").split("\n\n")[:-2]:
        data = frame.removeprefix("data: ")
        assert data == json.dumps(json.loads(data), separators=(",", ":"))
    whole = client.complete(prompt=odd, max_tokens=2, echo=True, logprobs=1).choices[0]
    assert whole["logprobs"] == got.assembled[0]["logprobs"]


def test_returned_ids_are_those_of_the_tokenizer_and_of_the_spelt_tokens(client):
    body = {"prompt": TEXT, "max_tokens": 4, "logprobs": 0, "return_token_ids": True,
            "return_tokens_as_token_ids": True}  # fmt: skip
    [choice] = client.complete(**body).choices
    assert choice["prompt_token_ids"] == client.ids_of(TEXT)
    assert [f"token_id:{i}" for i in choice["token_ids"]] == choice["logprobs"]["tokens"]
    tokenizer = client.service.engine.gemma.tokenizer
    assert tokenizer.decode(choice["token_ids"]) == choice["text"]
    [echoed] = client.complete(**body, echo=True).choices
    spelt = [f"token_id:{i}" for i in choice["token_ids"]]
    assert echoed["logprobs"]["tokens"][-4:] == spelt
    chunks = client.complete(**body, stream=True).events
    with_prompt = [event for event in chunks if "prompt_token_ids" in event["choices"][0]]
    assert with_prompt == chunks[:1]
    ids = [i for event in chunks for i in event["choices"][0]["token_ids"]]
    assert ids == choice["token_ids"]
    plain = client.complete(prompt=TEXT, max_tokens=1).choices[0]
    assert not {"token_ids", "prompt_token_ids"} & set(plain)


# Refusals


@pytest.mark.parametrize(
    "field",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"type": "nonsense"}}},
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"regex": "["}},
        {"structured_outputs": {"grammar": "root ::="}},
        {"guided_regex": "["},
    ],
)
def test_guided_generation_is_refused_by_name(client, field):
    got = client.complete(prompt=TEXT, max_tokens=1, **field)
    [name] = field
    assert (got.status, got.error["param"]) == (400, name)
    assert name in got.error["message"]


@pytest.mark.parametrize("prompt", [[-1], [[-1]], [2, -5], [[2], [2, -5]]])
def test_ids_that_are_negative_are_refused(client, prompt):
    got = client.complete(prompt=prompt, max_tokens=1)
    assert (got.status, got.error["param"]) == (400, "prompt")


@pytest.mark.parametrize("prompt", [[2, 512], [[2], [10**9]]])
def test_ids_that_the_vocabulary_does_not_have_are_refused_in_these_words(client, prompt):
    got = client.complete(prompt=prompt, max_tokens=1)
    assert (got.status, got.error["param"]) == (400, "prompt")
    assert "out of vocabulary" in got.error["message"]


def test_no_prompt_is_a_new_text_and_an_empty_array_is_none(client):
    alone = client.complete(prompt=[2], max_tokens=3).choices[0]["text"]
    for body in ({}, {"prompt": None}, {"prompt": ""}, {"prompt": [""]}):
        got = client.complete(**body, max_tokens=3)
        assert got.choices[0]["text"] == alone
        assert got.json["usage"]["prompt_tokens"] == 1
    for prompt in ([], [[]], [[2], []]):
        got = client.complete(prompt=prompt, max_tokens=3)
        assert (got.status, got.error["param"]) == (400, "prompt")


def test_a_prompt_that_is_too_long_is_refused_with_the_numbers(client):
    ids = [2] + [300] * 380
    got = client.complete(prompt=ids, max_tokens=10)
    assert got.status == 400
    assert got.error["code"] == "context_length_exceeded"
    assert "context" in got.error["message"]
    assert all(number in got.error["message"] for number in ("384", "381", "10"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", "5"), ("max_tokens", True), ("max_tokens", -1), ("n", 0), ("n", 129),
        ("temperature", "hot"), ("temperature", 2.1), ("top_p", -0.1), ("seed", 2**63),
        ("stop", ["a", ""]), ("stop", list("abcde")), ("echo", "yes"), ("stream", 1),
        ("best_of", 21), ("presence_penalty", 2.5), ("frequency_penalty", -2.5),
        ("logit_bias", {"a": 1}), ("logit_bias", {"5": 101}), ("logit_bias", [[5, 1]]),
        ("suffix", 5), ("user", 5), ("logprobs", 1.5), ("stream_options", "all"),
    ],
)  # fmt: skip
def test_errors_name_the_field_and_nothing_of_the_server(client, field, value):
    got = client.complete(prompt=TEXT, **{field: value})
    assert (got.status, got.error["type"]) == (400, "invalid_request_error")
    assert got.error["param"] == field
    lowered = got.error["message"].lower()
    assert not [word for word in ("pydantic", "body.", ".py", "traceback") if word in lowered]


@pytest.mark.parametrize(
    "body",
    [
        {"logit_bias": {f"key {i}": "x" * 20 for i in range(5000)}},
        {"stop": [""] * 5000},
        {"prompt": [[-1, "a", None]] * 5000},
        {f"unknown_{i}": i for i in range(5000)},
        {"prompt": ["x" * 40, 1] * 5000},
        {"user": "u" * 100_000},
    ],
    ids=["keys", "stops", "prompts", "fields", "mixed", "text"],
)
def test_errors_of_thousands_of_mistakes_are_short(client, body):
    got = client.complete(**body)
    assert got.status == 400
    assert got.error["param"] is not None
    # 32 kB is what a peer allows itself; nobody reads more than a few lines.
    assert len(got.body) < 4_096


def test_errors_of_what_is_no_json(client):
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        got = client.send("POST", "/v1/completions", b"{}", {"Content-Type": kind})
        assert got.status in (400, 415)
        assert got.error["type"] == "invalid_request_error"


# Failures


@pytest.mark.parametrize("after", [0, 1])
def test_an_engine_that_fails_is_a_500_or_an_event_and_the_end(client, after):
    engine = client.service.engine
    plain = engine.generate

    async def failing(request: Any) -> AsyncIterator[Any]:
        left = after
        async for event in plain(request):
            if isinstance(event, Delta):
                if not left:
                    raise RuntimeError("a secret of the device")
                left -= 1
            yield event

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "generate", failing)
        whole = client.complete(prompt=TEXT, max_tokens=4)
        streamed = client.complete(prompt=TEXT, max_tokens=4, stream=True, allowed_token_ids=PIECES)
    assert (whole.status, whole.error["type"]) == (500, "server_error")
    if after == 0:
        assert (streamed.status, streamed.error["type"]) == (500, "server_error")
    else:
        *chunks, last = streamed.events
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * len(chunks)
        assert list(last) == ["error"]
        assert list(last["error"]) == ["message", "type", "param", "code"]
        assert last["error"]["type"] == "server_error"
    assert b"secret" not in whole.body + streamed.body
    assert len(client.complete(prompt=TEXT, max_tokens=1).choices) == 1


def test_an_engine_that_is_gone_is_not_healthy():
    engine = tiny_engine(slots=SLOTS)
    engine.options = replace(engine.options, compile_at_start=False)
    with engine:
        client = client_of(engine)
        assert client.get("/health").status == client.get("/ready").status == 200
    assert client.get("/health").status == client.get("/ready").status == 503
    assert client.complete(prompt=TEXT, max_tokens=1).status in (500, 503)


# Keys


ORIGIN = "https://page.example"


@pytest.fixture(scope="module")
def guarded(client: Client) -> Client:
    loaded = Loaded(
        engine=client.service.engine, fingerprint=FINGERPRINT, block=128,
        num_compilations=lambda: 0,
    )  # fmt: skip
    settings = ServerSettings(cors_origins=(ORIGIN,))
    service = Service(
        settings, names=NAMES, load=lambda progress: loaded, keyring=read_keys(plain="sk-alice")
    )
    service.begin()
    asyncio.run(until(lambda: not service.is_loading))
    return Client(create_app(service), service)


def test_keys_open_every_route_and_only_probes_need_none(guarded):
    paths = guarded.get("/openapi.json", headers={"Authorization": "Bearer sk-alice"}).json["paths"]
    routes = [(path, method.upper()) for path, methods in paths.items() for method in methods]
    assert ("/v1/completions", "POST") in routes
    assert ("/metrics", "GET") in routes
    opened = {path for path, method in routes if guarded.send(method, path, b"", {}).status != 401}
    assert opened == {"/health", "/ready"}
    assert guarded.get("/health/").status in (200, 308)
    assert guarded.get("/nowhere").status == 401
    assert guarded.send("OPTIONS", "/v1/completions", b"", {}).status == 401


def test_keys_are_told_apart_as_missing_wrong_and_right(guarded):
    body = {"model": MODEL, "prompt": TEXT, "max_tokens": 1}
    codes = {}
    for name, header in (
        ("missing", None), ("wrong", "Bearer sk-bob"), ("cut", "Bearer sk-alic"),
        ("capital", "Bearer SK-ALICE"), ("empty", "Bearer "), ("basic", "Basic sk-alice"),
    ):  # fmt: skip
        headers = {} if header is None else {"Authorization": header}
        got = guarded.post("/v1/completions", body, headers=headers)
        assert (got.status, got.error["type"]) == (401, "invalid_request_error")
        assert got.headers["WWW-Authenticate"].startswith("Bearer")
        codes[name] = got.error["code"]
    assert codes["missing"] is None
    assert codes["wrong"] == codes["cut"] == codes["capital"] == "invalid_api_key"
    for scheme in ("Bearer", "bearer", "BEARER"):
        headers = {"Authorization": f"{scheme} sk-alice"}
        assert guarded.post("/v1/completions", body, headers=headers).status == 200


def test_preflights_pass_and_say_what_a_page_may_send(guarded):
    headers = {
        "Origin": ORIGIN,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, content-type",
    }
    got = guarded.send("OPTIONS", "/v1/completions", b"", headers)
    assert got.status in (200, 204)
    assert got.body == b""
    assert got.headers["Access-Control-Allow-Origin"] == ORIGIN
    assert "POST" in got.headers["Access-Control-Allow-Methods"]
    allowed = got.headers["Access-Control-Allow-Headers"].lower()
    assert "authorization" in allowed
    assert "content-type" in allowed
    other = guarded.send("OPTIONS", "/v1/completions", b"", headers | {"Origin": "https://else"})
    assert "Access-Control-Allow-Origin" not in other.headers
    assert "Access-Control-Allow-Credentials" not in got.headers


def test_ids_of_requests_are_made_or_taken_over(client):
    made = {client.complete(prompt=TEXT, max_tokens=0).headers["x-request-id"] for _ in range(3)}
    assert len(made) == 3
    for value in made:
        assert value.startswith("req_")
        assert len(bytes.fromhex(value.removeprefix("req_"))) == 16
    assert client.get("/health", headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == (
        "mine-1"
    )


# Load, life and figures


def figures(client: Client) -> dict[str, float]:
    """Sums over the labels of each line of /metrics."""
    sums = dict[str, float]()
    for line in client.get("/metrics").body.decode().splitlines():
        if not line.startswith("#"):
            name, value = line.split("{")[0], float(line.rsplit(" ", 1)[1])
            sums[name] = sums.get(name, 0) + value
    return sums


def test_metrics_move_by_exactly_what_was_done(client):
    before = figures(client)
    client.complete(prompt=[TEXT, "a dog"], n=2, max_tokens=3, ignore_eos=True)
    client.complete(prompt=TEXT, max_tokens=5, stream=True, ignore_eos=True)
    after = figures(client)
    moved = {name: after[name] - before.get(name, 0) for name in after}
    prompts = 2 * len(client.ids_of(TEXT)) + len(client.ids_of("a dog"))
    assert moved["vllm:prompt_tokens_total"] == prompts
    assert moved["vllm:generation_tokens_total"] == 4 * 3 + 5
    assert moved["vllm:request_success_total"] == 5
    assert moved["vllm:time_to_first_token_seconds_count"] == 2
    assert moved["vllm:e2e_request_latency_seconds_count"] == 2
    for phase in ("queue", "prefill", "decode", "inference"):
        assert moved[f"vllm:request_{phase}_time_seconds_count"] == 2
    # A prompt's last token is computed with the first one generated.
    computed = prompts - 3 + 4 * 3 + 5
    assert moved["vllm:iteration_tokens_total_sum"] == computed
    assert after["vllm:num_requests_running"] == after["vllm:num_requests_waiting"] == 0


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_leave_leave_nothing_behind(client, stream):
    worker = client.service.engine.worker
    assert worker is not None
    body = {"model": MODEL, "prompt": TEXT, "max_tokens": 350, "ignore_eos": True, "stream": stream}

    async def leave() -> None:
        connection = client.app.test_client().request(
            "/v1/completions", method="POST", headers={"Content-Type": "application/json"}
        )
        async with connection as sent:
            await sent.send(json.dumps(body).encode())
            await sent.send_complete()
            await until(lambda: worker.num_in_flight > 0)
            await sent.disconnect()

    async def scene() -> None:
        # More than there are slots, so that some leave while they wait.
        await asyncio.gather(*(leave() for _ in range(20)))
        await until(lambda: worker.num_in_flight == 0)

    asyncio.run(scene())
    left = figures(client)
    assert left["vllm:num_requests_running"] == left["vllm:num_requests_waiting"] == 0
    assert left["vllm:kv_cache_usage_perc"] == left["refimpl:slots_in_use"] == 0
    assert len(client.complete(prompt=TEXT, max_tokens=1).choices) == 1


def test_more_requests_than_slots_are_all_answered_as_if_alone(client):
    bodies = [
        {"model": MODEL, "prompt": f"{TEXT} {i % 3}", "max_tokens": 2, "temperature": 0}
        for i in range(24)
    ]
    alone = [client.complete(**body).choices[0]["text"] for body in bodies[:3]]
    texts = [got.choices[0]["text"] for got in client.complete_at_once(bodies)]
    assert texts == alone * 8


def test_draining_lets_a_stream_end_and_nothing_begin(client):
    own = client_of(client.service.engine)
    body = {"model": MODEL, "prompt": TEXT, "max_tokens": 40, "stream": True, "ignore_eos": True}

    async def scene() -> bytes:
        connection = own.app.test_client().request(
            "/v1/completions", method="POST", headers={"Content-Type": "application/json"}
        )
        async with connection as sent:
            await sent.send(json.dumps(body).encode())
            await sent.send_complete()
            data = await sent.receive()
            own.service.drain()
            refused = await own.app.test_client().post("/v1/completions", json=body)
            ready = await own.app.test_client().get("/ready")
            error = (await refused.get_json())["error"]
            assert (refused.status_code, error["code"]) == (503, "shutting_down")
            assert int(refused.headers["Retry-After"]) >= 1
            assert ready.status_code == 503
            while not data.endswith(b"[DONE]\n\n"):
                data += await asyncio.wait_for(sent.receive(), 20)
            return data

    data = asyncio.run(scene())
    assert data.endswith(b'"finish_reason":"length"}]}\n\ndata: [DONE]\n\n')
    assert own.service.queue.num_held == 0


# Seeds and neighbours


def test_seeds_decide_the_text(client):
    body = {"prompt": TEXT, "max_tokens": 8, "temperature": 1}
    once, again, other = (client.complete(**body, seed=seed).choices[0] for seed in (5, 5, 6))
    assert once == again
    assert once["text"] != other["text"]


@pytest.mark.parametrize("temperature", [0, 1])
def test_neighbours_change_no_bit(client, temperature):
    body = {"model": MODEL, "prompt": TEXT, "max_tokens": 6, "temperature": temperature,
            "seed": 9, "logprobs": 5, "echo": True}  # fmt: skip
    alone = client.complete(**body).choices
    # Seeds, none, other prompts and lengths.
    others = [
        {"model": MODEL, "prompt": "a dog" * i, "max_tokens": 2 + i, "temperature": 1.5,
         "seed": None if i % 2 else i, "n": 1 + i % 2}
        for i in range(1, 8)
    ]  # fmt: skip
    got = client.complete_at_once([*others[:3], body, *others[3:]])[3]
    assert got.choices == alone


def test_a_prompt_in_the_cache_changes_no_bit(client):
    # Longer than the block of 128 that the cache keeps, and new.
    ids = [2, *(PIECES[i * i % 19] for i in range(150))]
    body = {"prompt": ids, "max_tokens": 3, "temperature": 1, "seed": 3, "logprobs": 5}
    hits = figures(client)["vllm:prefix_cache_hits_total"]
    first = client.complete(**body).choices
    assert figures(client)["vllm:prefix_cache_hits_total"] == hits
    second = client.complete(**body)
    assert figures(client)["vllm:prefix_cache_hits_total"] == hits + 128
    assert second.choices == first


def cached_tokens(client: Client, **body: Any) -> int:
    """What the usage says of the prompts, the same streamed and not."""
    usage = client.complete(**body).json["usage"]
    streamed = client.complete(**body, stream=True, stream_options={"include_usage": True})
    assert streamed.events[-1]["usage"] == usage
    # Nothing is in it that OpenAI's own type does not know.
    parsed = CompletionUsage.model_validate(usage, strict=True)
    assert parsed.prompt_tokens_details is not None
    assert not parsed.model_extra
    assert not parsed.prompt_tokens_details.model_extra
    assert parsed.prompt_tokens_details.cached_tokens is not None
    return parsed.prompt_tokens_details.cached_tokens


def test_tokens_that_were_cached_are_counted_once_for_each_prompt(client):
    # Of one block, of two and of none, which begin like no other prompt here.
    prompts = [[2, *[278] * 150], [2, *[279] * 300], [2, 280]]
    body = {"prompt": prompts, "max_tokens": 1}
    first = client.complete(**body).json["usage"]
    assert first["prompt_tokens_details"] == {"cached_tokens": 0}
    assert first["prompt_tokens"] == 151 + 301 + 2
    # Choices that wait for a slot find more than the first one did, which counts.
    assert cached_tokens(client, **body) == cached_tokens(client, **body, n=5) == 128 + 256
    # What is scored is computed in any case. Without choices there is nothing to compute at all.
    assert cached_tokens(client, **body, echo=True, logprobs=0) == 0
    assert cached_tokens(client, prompt=prompts, max_tokens=0) == 0
    # A block that is whole only with the prompt's last token, which is computed in any case.
    assert cached_tokens(client, prompt=[2, *[280] * 127], max_tokens=1) == 0
    # Of a gap, the prompt before it.
    assert cached_tokens(client, prompt=prompts[0], suffix="the", max_tokens=1) == 128


def test_banned_tokens_never_come_and_forced_ones_always(client):
    body = {"prompt": TEXT, "max_tokens": 8, "temperature": 2, "seed": 3,
            "return_token_ids": True, "ignore_eos": True}  # fmt: skip
    plain = client.complete(**body).choices[0]["token_ids"]
    banned = client.complete(**body, logit_bias={str(i): -100 for i in plain}).choices[0]
    assert not set(plain) & set(banned["token_ids"])
    forced = client.complete(**body, logit_bias={"278": 100}).choices[0]
    assert forced["token_ids"] == [278] * 8
    assert forced["text"] == " t" * 8
