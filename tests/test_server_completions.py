"""Completions over a tiny model: every field, whole and streamed, next to the engine itself."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import TypeAdapter

from refimpl.engine.request import SamplingParams
from refimpl.server.reply import Reply
from tests.engines import CONTEXT, tiny_gemma
from tests.servers import FINGERPRINT, MODEL, NAMES, Client, Got, client_of, tiny_client

TOKENIZER = tiny_gemma("gemma3").tokenizer
TEXT = "is the "
IDS = TOKENIZER.encode(TEXT)
REPLY = TypeAdapter(Reply)


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with tiny_client() as client:
        yield client


def engine_of(client: Client) -> Any:
    return client.service.engine


def assembled_of(got: Got) -> list[dict[str, Any]]:
    """The choices of a stream, each chunk of which is as it is described."""
    for chunk in got.events:
        REPLY.validate_python(chunk, strict=True)
    return got.assembled


FORMS: dict[str, tuple[Any, list[tuple[str, list[int]]]]] = {
    "null": (None, [("", [2])]),
    "empty": ("", [("", [2])]),
    "text": (TEXT, [(TEXT, IDS)]),
    "texts": ([TEXT, "日本é"], [(TEXT, IDS), ("日本é", TOKENIZER.encode("日本é"))]),
    "ids": (IDS[1:], [(TEXT, IDS[1:])]),
    "id lists": ([IDS, [*IDS, 500]], [(TEXT, IDS), (TEXT + "<unused20>", [*IDS, 500])]),
}


@pytest.mark.parametrize(
    ("echo", "logprobs", "form", "n"),
    list(itertools.product([False, True], [None, 0, 5], FORMS, [1, 2])),
)
def test_echo_times_logprobs_times_prompt_times_n_streamed_and_not(client, echo, logprobs, form, n):
    prompt, expected = FORMS[form]
    expected = [(TOKENIZER.decode(ids[ids[0] == 2 :]), ids) for _, ids in expected]
    body = {
        "prompt": prompt, "echo": echo, "logprobs": logprobs, "n": n, "max_tokens": 4,
        "temperature": 1, "seed": 7,
    }  # fmt: skip
    got = client.complete(**body)
    REPLY.validate_python(got.json, strict=True)
    assert got.json["object"] == "text_completion"
    assert got.json["model"] == MODEL
    assert got.json["system_fingerprint"] == FINGERPRINT
    assert [choice["index"] for choice in got.choices] == list(range(n * len(expected)))
    for number, choice in enumerate(got.choices):
        assert list(choice) == ["text", "index", "logprobs", "finish_reason"]
        text, ids = expected[number // n]
        alone = engine_of(client).complete(
            ids, SamplingParams(max_tokens=4, seed=7, n=n, logprobs=logprobs)
        )
        made = alone.choices[number % n]
        assert choice["text"] == (text if echo else "") + made.text
        assert choice["finish_reason"] == made.finish_reason
        if logprobs is None:
            assert choice["logprobs"] is None
            continue
        check_logprobs(client, choice["logprobs"], ids if echo else [], made, logprobs, len(text))
    usage = got.json["usage"]
    assert usage["prompt_tokens"] == sum(len(ids) for _, ids in expected)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]

    streamed = client.complete(**body, stream=True, stream_options={"include_usage": True})
    assert assembled_of(streamed) == got.choices
    assert streamed.events[-1]["usage"] == usage


def check_logprobs(
    client: Client, lists: dict[str, Any], prompt: list[int], made: Any, top: int, start: int
) -> None:
    assert list(lists) == ["tokens", "token_logprobs", "top_logprobs", "text_offset"]
    ids = [*prompt, *made.token_ids]
    assert {len(values) for values in lists.values()} == {len(ids)}
    scores = engine_of(client).score(prompt, top=top) if prompt else ()
    own = [None if entry is None else entry.logprob for entry in (*scores, *made.logprobs)]
    assert lists["token_logprobs"] == own
    if prompt:
        assert (lists["token_logprobs"][0], lists["top_logprobs"][0]) == (None, None)
        assert lists["text_offset"][0] == 0
    for logprob, best in zip(own, lists["top_logprobs"], strict=True):
        if logprob is not None:
            assert max(best.values()) >= logprob
            assert 1 <= len(best) <= top + 1
            assert logprob in best.values() or max(best.values()) > logprob
    assert lists["text_offset"] == sorted(lists["text_offset"])
    if made.token_ids:
        assert lists["text_offset"][len(prompt)] == start


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_what_lm_eval_reads_of_a_text_is_what_the_model_says(client, max_tokens):
    prompts = [IDS, [2, 20, 30, 40, 50], list(range(100, 140))]
    got = client.complete(
        prompt=prompts, temperature=0, max_tokens=max_tokens, logprobs=1, seed=1234, echo=True
    )
    for ids, choice in zip(prompts, got.choices, strict=True):
        values = choice["logprobs"]["token_logprobs"]
        tops = choice["logprobs"]["top_logprobs"]
        assert len(values) == len(tops) == len(ids) + max_tokens
        scores = engine_of(client).score(ids, top=1)
        assert values[: len(ids)] == [None, *(entry.logprob for entry in scores[1:])]
        is_greedy = [
            value == max(top.values()) for value, top in zip(values[1:], tops[1:], strict=True)
        ]
        assert is_greedy[: len(ids) - 1] == [entry.id == entry.top[0][0] for entry in scores[1:]]
        assert is_greedy[len(ids) - 1 :] == [True] * max_tokens
        assert choice["finish_reason"] == "length"
    assert got.json["usage"]["completion_tokens"] == max_tokens * len(prompts)


def test_nothing_is_generated_for_max_tokens_0_with_or_without_echo(client):
    for echo in (False, True):
        got = client.complete(prompt=TEXT, max_tokens=0, echo=echo)
        [choice] = got.choices
        assert (choice["text"], choice["finish_reason"]) == (TEXT if echo else "", "length")
        assert got.json["usage"] == {
        "prompt_tokens": 4, "completion_tokens": 0, "total_tokens": 4,
        "prompt_tokens_details": {"cached_tokens": 0},
    }  # fmt: skip
        assert assembled_of(client.complete(prompt=TEXT, max_tokens=0, echo=echo, stream=True)) == [
            choice
        ]


def test_max_tokens_is_16_unless_said(client):
    got = client.complete(prompt=TEXT, ignore_eos=True)
    assert got.json["usage"]["completion_tokens"] == 16


def test_choices_differ_and_the_same_seed_gives_the_same(client):
    body = {"prompt": TEXT, "n": 3, "temperature": 1, "seed": 5, "max_tokens": 12}
    texts = [choice["text"] for choice in client.complete(**body).choices]
    assert len(set(texts)) == 3
    assert [choice["text"] for choice in client.complete(**body).choices] == texts
    others = [choice["text"] for choice in client.complete(**{**body, "seed": 6}).choices]
    assert set(others).isdisjoint(texts)
    # Choice j is the same however many there are.
    [alone] = client.complete(**{**body, "n": 1}).choices
    assert alone["text"] == texts[0]


def test_without_a_seed_each_request_has_a_fresh_one(client):
    body = {"prompt": TEXT, "temperature": 1, "max_tokens": 12, "n": 2}
    texts = {choice["text"] for _ in range(3) for choice in client.complete(**body).choices}
    assert len(texts) == 6


def test_a_prompt_in_an_array_gives_what_it_gives_alone(client):
    body = {"temperature": 1, "seed": 3, "n": 2, "logprobs": 2, "max_tokens": 6}
    prompts = [TEXT, "the ", TEXT]
    together = client.complete(prompt=prompts, **body).choices
    for number, prompt in enumerate(prompts):
        alone = client.complete(prompt=prompt, **body).choices
        for choice in alone:
            choice["index"] += number * 2
        assert together[number * 2 : number * 2 + 2] == alone


@pytest.mark.parametrize("n", [1, 2])
def test_best_of_keeps_the_likeliest_a_token_best_first(client, n):
    body = {"prompt": [TEXT, "in "], "temperature": 1.5, "seed": 11, "max_tokens": 6}
    all_of = client.complete(**body, n=5, logprobs=0)
    best = client.complete(**body, n=n, best_of=5, logprobs=0)
    assert [choice["index"] for choice in best.choices] == list(range(2 * n))
    for prompt in range(2):
        candidates = all_of.choices[prompt * 5 : prompt * 5 + 5]
        values = [choice["logprobs"]["token_logprobs"] for choice in candidates]
        means = [sum(each) / len(each) for each in values]
        assert len(set(means)) == 5
        ranked = sorted(range(5), key=lambda i: -means[i])[:n]
        kept = best.choices[prompt * n : prompt * n + n]
        assert [each["text"] for each in kept] == [candidates[i]["text"] for i in ranked]
    assert best.json["usage"] == all_of.json["usage"]


def test_an_alias_is_served_and_the_reply_has_the_name_that_was_asked_for(client):
    for name in NAMES:
        assert client.complete(model=name, prompt="a").json["model"] == name
    got = client.complete(model="gpt-3.5-turbo-instruct", prompt="a")
    assert got.status == 404
    assert (got.error["code"], got.error["param"]) == ("model_not_found", "model")


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"prompt": [512]}, "prompt", None),
        ({"prompt": [[2], [10**30]]}, "prompt", None),
        ({"prompt": [2] * 380, "max_tokens": 5}, "max_tokens", "context_length_exceeded"),
        ({"prompt": [2] * 400, "max_tokens": 5}, "prompt", "context_length_exceeded"),
        ({"prompt": "a", "max_tokens": 10**12}, "max_tokens", "context_length_exceeded"),
        ({"prompt": "", "add_special_tokens": False}, "prompt", None),
        ({"prompt": "a", "truncate_prompt_tokens": 0}, "prompt", None),
        ({"prompt": "a", "logit_bias": {"512": 1}}, "logit_bias", None),
        ({"prompt": "a", "logit_bias": {"9" * 50: 1}}, "logit_bias", None),
        ({"prompt": "a", "logit_bias": {"7": 1, "07": 1}}, "logit_bias", None),
        ({"prompt": "a", "allowed_token_ids": [600]}, "allowed_token_ids", None),
        ({"prompt": "a", "stop_token_ids": [600]}, "stop_token_ids", None),
        ({"prompt": "a", "top_k": 2**40}, "top_k", None),
        ({"prompt": "a", "repetition_penalty": 1e300}, "repetition_penalty", None),
        ({"prompt": "a", "bad_words": ["many pieces"]}, "bad_words", None),
        ({"prompt": "a", "bad_words": [" "]}, "bad_words", None),
        ({"prompt": "a", "suffix": "b" * 600}, "suffix", None),
    ],
)
def test_what_the_model_cannot_do_is_refused_and_the_next_request_is_served(
    client, fields, param, code
):
    for extra in ({}, {"stream": True}):
        got = client.complete(**fields, **extra)
        assert got.status == 400
        assert got.error["type"] == "invalid_request_error"
        assert (got.error["param"], got.error["code"]) == (param, code)
    assert client.complete(prompt="a", max_tokens=1).status == 200


def test_messages_about_ids_and_length_say_the_numbers(client):
    assert "token id 512 is out of vocabulary" in client.complete(prompt=[512]).error["message"]
    message = client.complete(prompt=[2] * 380, max_tokens=10).error["message"]
    assert all(number in message for number in (str(CONTEXT), "390", "380", "10"))


def test_a_warning_for_ids_without_a_beginning_of_text(client):
    assert "id 2" in client.complete(prompt=[30, 31]).headers["x-refimpl-warning"]
    for prompt in ([2, 30], TEXT, "", None):
        assert "x-refimpl-warning" not in client.complete(prompt=prompt).headers


def ids_of(client: Client, **fields: Any) -> tuple[list[int], list[int]]:
    """Prompt and generated ids."""
    [choice] = client.complete(return_token_ids=True, **fields).choices
    return choice["prompt_token_ids"], choice["token_ids"]


def test_a_text_begins_once_and_ids_are_taken_as_they_are(client):
    for prompt, ids in (
        ("", [2]), (None, [2]), (TEXT, IDS), (IDS, IDS), (IDS[1:], IDS[1:]),
        ([2, 2, 30], [2, 2, 30]),
        ("<bos>a", TOKENIZER.encode("<bos>a")),
    ):  # fmt: skip
        assert ids_of(client, prompt=prompt)[0] == ids
    assert ids_of(client, prompt=TEXT, add_special_tokens=False)[0] == IDS[1:]


def test_truncation_keeps_the_last_or_the_first_ids(client):
    ids = [2, 30, 31, 32, 33]
    assert ids_of(client, prompt=ids, truncate_prompt_tokens=3)[0] == [31, 32, 33]
    right = ids_of(client, prompt=ids, truncate_prompt_tokens=3, truncation_side="right")[0]
    assert right == [2, 30, 31]
    assert ids_of(client, prompt=ids, truncate_prompt_tokens=9)[0] == ids
    # As many as leave room.
    long = [2, *range(30, 430)]
    kept = ids_of(client, prompt=long, truncate_prompt_tokens=-1, max_tokens=4)[0]
    assert kept == long[-(CONTEXT - 4) :]
    # What is echoed is what was kept.
    [choice] = client.complete(
        prompt=TEXT, truncate_prompt_tokens=2, echo=True, max_tokens=0
    ).choices
    assert choice["text"] == TOKENIZER.decode(IDS[-2:])


def test_returned_ids_are_those_listed(client):
    body = {"prompt": TEXT, "temperature": 1, "seed": 1, "max_tokens": 8, "return_token_ids": True,
            "return_tokens_as_token_ids": True, "logprobs": 1, "echo": True}  # fmt: skip
    [choice] = client.complete(**body).choices
    spelt = [f"token_id:{i}" for i in [*IDS, *choice["token_ids"]]]
    assert choice["logprobs"]["tokens"] == spelt
    assert choice["prompt_token_ids"] == IDS
    assert choice["text"] == TEXT + TOKENIZER.decode(choice["token_ids"], skip_special=True)
    assert assembled_of(client.complete(**body, stream=True)) == [choice]
    [plain] = client.complete(**{**body, "return_token_ids": False}).choices
    assert "token_ids" not in plain
    assert "prompt_token_ids" not in plain


@pytest.mark.parametrize("count", [0, 2])
def test_prompt_logprobs(client, count):
    body = {"prompt": [TEXT, "in "], "prompt_logprobs": count, "max_tokens": 1}
    got = client.complete(**body)
    for prompt, choice in zip(body["prompt"], got.choices, strict=True):
        scores = engine_of(client).score(prompt, top=count)
        listed = choice["prompt_logprobs"]
        assert listed[0] is None
        assert choice["logprobs"] is None
        for entry, score in zip(listed[1:], scores[1:], strict=True):
            assert entry[str(score.id)]["logprob"] == score.logprob
            assert {int(i) for i in entry} == {score.id, *(i for i, _ in score.top)}
    if count == 0:
        assert assembled_of(client.complete(**body, stream=True)) == got.choices
    assert "prompt_logprobs" not in client.complete(prompt=TEXT).choices[0]
    # Each takes what it wants of the one list.
    both = client.complete(prompt=TEXT, prompt_logprobs=count, echo=True, logprobs=1, max_tokens=0)
    [choice] = both.choices
    assert all(len(top) <= 2 for top in choice["logprobs"]["top_logprobs"][1:])
    assert all(len(entry) <= count + 1 for entry in choice["prompt_logprobs"][1:])


def test_stop_ends_before_the_first_in_the_text_streamed_and_not(client):
    [plain] = client.complete(prompt=TEXT, max_tokens=24).choices
    text = plain["text"]
    middle = text[5:9]
    for stops in (middle, [middle], ["nowhere", middle], [text[7:11], middle], []):
        [choice] = client.complete(prompt=TEXT, max_tokens=24, stop=stops, logprobs=0).choices
        assert choice["text"] == (text[: text.index(middle)] if stops else text)
        assert choice["finish_reason"] == ("stop" if stops else plain["finish_reason"])
        streamed = client.complete(prompt=TEXT, max_tokens=24, stop=stops, logprobs=0, stream=True)
        assert assembled_of(streamed) == [choice]
    kept = client.complete(prompt=TEXT, max_tokens=24, stop=middle, include_stop_str_in_output=True)
    assert kept.choices[0]["text"] == text[: text.index(middle) + len(middle)]


def test_a_stop_string_is_not_looked_for_in_the_echoed_prompt(client):
    [choice] = client.complete(
        prompt="abc the end", stop="the end", echo=True, max_tokens=2
    ).choices
    assert choice["text"].startswith("abc the end")


def test_stop_ids_and_what_masks_them(client):
    _, ids = ids_of(client, prompt=TEXT, max_tokens=8)
    third = ids[2]
    first = ids.index(third)
    got = client.complete(prompt=TEXT, max_tokens=8, stop_token_ids=[third], return_token_ids=True)
    [choice] = got.choices
    assert (choice["token_ids"], choice["finish_reason"]) == (ids[: first + 1], "stop")
    assert got.json["usage"]["completion_tokens"] == first + 1
    _, later = ids_of(client, prompt=TEXT, max_tokens=8, stop_token_ids=[third], min_tokens=6)
    assert len(later) >= 6
    assert third not in later[:5]


def test_bans_and_biases(client):
    _, ids = ids_of(client, prompt=TEXT, max_tokens=6)
    _, banned = ids_of(client, prompt=TEXT, max_tokens=6, logit_bias={str(ids[0]): -100})
    assert ids[0] not in banned
    _, forced = ids_of(client, prompt=TEXT, max_tokens=3, logit_bias={"33": 100})
    assert forced == [33, 33, 33]
    _, allowed = ids_of(client, prompt=TEXT, max_tokens=6, allowed_token_ids=[40, 41])
    assert set(allowed) <= {40, 41}


def test_bad_words_of_one_token_never_come(client):
    both = [TOKENIZER.encode(word, add_bos=False) for word in ("=", " =")]
    assert [len(ids) for ids in both] == [1, 1]
    body = {"prompt": TEXT, "max_tokens": 8, "logit_bias": {str(ids[0]): 50 for ids in both}}
    drawn = set(ids_of(client, **body)[1])
    assert drawn <= {ids[0] for ids in both}
    for word in ("=", " ="):
        assert drawn.isdisjoint(ids_of(client, **body, bad_words=[word])[1])


def test_penalties_and_truncations_reach_the_engine(client):
    def text(**fields: Any) -> str:
        return client.complete(prompt=TEXT, max_tokens=12, seed=9, **fields).choices[0]["text"]

    hot = {"temperature": 2.0}
    plain = text(**hot)
    for fields in ({"top_k": 1}, {"top_p": 0}, {"min_p": 1}):
        assert text(**hot, **fields) == text(temperature=0) != plain
    for off in ({"top_k": 0}, {"top_k": -1}, {"top_p": 1}, {"min_p": 0}, {"repetition_penalty": 1}):
        assert text(**hot, **off) == plain
    greedy = text(temperature=0)
    for name in ("frequency_penalty", "presence_penalty", "repetition_penalty"):
        assert text(temperature=0, **{name: 2}) != greedy


def test_ignore_eos_and_special_tokens(client):
    force = {"logit_bias": {"1": 100}, "prompt": TEXT, "max_tokens": 3}
    ended = client.complete(**force, logprobs=0)
    [choice] = ended.choices
    assert (choice["text"], choice["finish_reason"]) == ("", "stop")
    assert choice["logprobs"]["tokens"] == ["<eos>"]
    assert choice["logprobs"]["text_offset"] == [len(TEXT)]
    assert ended.json["usage"]["completion_tokens"] == 1
    [choice] = client.complete(**force, ignore_eos=True).choices
    assert (choice["text"], choice["finish_reason"]) == ("", "length")
    [choice] = client.complete(**force, ignore_eos=True, skip_special_tokens=False).choices
    assert choice["text"] == "<eos>" * 3
    quiet = Client(client_of(engine_of(client), list_end_of_text=False).app, client.service)
    [choice] = quiet.complete(**force, logprobs=0).choices
    assert choice["logprobs"]["tokens"] == []


def test_an_end_of_text_among_lm_evals_tokens_keeps_the_count(client):
    got = client.complete(prompt=IDS, max_tokens=1, logprobs=1, echo=True, logit_bias={"1": 100})
    [choice] = got.choices
    assert len(choice["logprobs"]["tokens"]) == len(IDS) + 1
    assert choice["logprobs"]["tokens"][-1] == "<eos>"


@pytest.mark.parametrize("stream", [False, True])
def test_a_suffix_is_reached_by_resampling(client, stream):
    body = {"prompt": [TEXT, "of "], "suffix": " of the", "n": 2, "temperature": 1, "seed": 4,
            "max_tokens": 5, "logprobs": 1, "echo": True}  # fmt: skip
    got = client.complete(**body)
    assert len(got.choices) == 4
    assert client.complete(**body).choices == got.choices
    for choice, prompt in zip(got.choices, [TEXT, TEXT, "of ", "of "], strict=True):
        assert choice["text"].startswith(prompt)
        assert choice["finish_reason"] in ("stop", "length")
        lists = choice["logprobs"]
        assert lists["tokens"][0] == "<bos>"
        assert len({len(values) for values in lists.values()}) == 1
    suffix = len(TOKENIZER.encode(" of the", add_bos=False))
    prompts = sum(len(TOKENIZER.encode(prompt)) for prompt in body["prompt"])
    assert got.json["usage"]["prompt_tokens"] == prompts + 2 * suffix
    if stream:
        streamed = client.complete(**body, stream=True, stream_options={"include_usage": True})
        assert assembled_of(streamed) == got.choices
        assert streamed.events[-1]["usage"] == got.json["usage"]


def test_an_empty_suffix_is_none(client):
    plain = client.complete(prompt=TEXT).choices
    assert client.complete(prompt=TEXT, suffix="").choices == plain
    assert client.complete(prompt=TEXT, suffix=None).choices == plain
    [nothing] = client.complete(prompt=TEXT, suffix="x", max_tokens=0).choices
    assert (nothing["text"], nothing["finish_reason"]) == ("", "length")


def test_ids_of_replies_are_new_or_the_clients_own(client):
    ids = {client.complete(prompt="a", max_tokens=1).json["id"] for _ in range(3)}
    assert len(ids) == 3
    assert all(each.startswith("cmpl-") for each in ids)
    assert client.complete(prompt="a", request_id="mine-1").json["id"] == "cmpl-mine-1"


def test_caps_of_the_settings(client):
    tight = client_of(
        engine_of(client), max_tokens_total=40, max_prompts=2, max_candidates=3, max_queue=2,
        max_logprobs=7, unknown_fields="ignore",
    )  # fmt: skip
    assert tight.complete(prompt=["a"] * 3).error["param"] == "prompt"
    assert tight.complete(prompt=["a"] * 2, n=2).error["param"] == "n"
    assert tight.complete(prompt=["a"] * 2, max_tokens=21).error["param"] == "max_tokens"
    assert tight.complete(prompt="a", n=3, max_tokens=1).status == 400
    assert tight.complete(prompt=["a"] * 2, max_tokens=20).status == 200
    assert tight.complete(prompt="a", logprobs=7, max_tokens=1).status == 200
    got = tight.complete(prompt="a", max_tokens=1, other=1, **{"an\u00efve\n": 2})
    assert got.headers["x-refimpl-ignored-fields"] == "other"
    assert tight.service.queue.num_held == 0


def test_text_to_ids_and_back(client):
    got = client.post("/tokenize", {"prompt": "test", "add_special_tokens": False})
    ids = TOKENIZER.encode("test", add_bos=False)
    assert got.json == {"count": len(ids), "max_model_len": CONTEXT, "tokens": ids}
    pieces = client.post("/tokenize", {"prompt": " the", "return_token_strs": True}).json
    assert pieces["token_strs"] == ["<bos>", "▁the"]
    assert client.post("/detokenize", {"tokens": ids}).json == {"prompt": "test"}
    assert client.post("/detokenize", {"tokens": []}).json == {"prompt": ""}
    for path, body, param in (
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "a", "other": 1}, "other"),
        ("/detokenize", {"tokens": [9999]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
    ):
        got = client.post(path, body)
        assert (got.status, got.error["param"]) == (400, param)
    assert client.post("/tokenize", {"prompt": "a", "model": "other"}).status == 404
    info = client.get("/tokenizer_info").json
    assert (info["bos_token"], info["eos_token"], info["chat_template"]) == ("<bos>", "<eos>", None)
