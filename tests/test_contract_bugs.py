"""Bugs that servers of this endpoint have had, each with a test that it is not ours.

The report of each is named beside its test: project and number, or where its source shows it.
"""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.servers import MODEL, Client, client_of, tiny_client, until

TEXT = "the cat sat"
# Tokens of whole letters: " t", "in", " a", "er", "on", ... 20 of them.
PIECES = list(range(278, 298))
# Of the token that is the byte 0; the other bytes follow.
BYTE_ZERO = 22
DRAW = {"prompt": TEXT, "max_tokens": 10, "temperature": 1, "seed": 4, "allowed_token_ids": PIECES}


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with tiny_client() as client:
        yield client


def texts(choices: list[dict[str, Any]]) -> list[str]:
    return [choice["text"] for choice in choices]


def pieces(client: Client, **body: Any) -> list[dict[str, Any]]:
    """The parts that a stream brings of its only choice."""
    return [event["choices"][0] for event in client.complete(**body, stream=True).events]


def lists(parts: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """The log-probabilities of all parts."""
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return {name: [value for part in parts for value in part["logprobs"][name]] for name in names}


# Log-probabilities


def test_echo_with_logprobs_covers_the_prompt(client):
    """ggml-org/llama.cpp#27174, vllm-metal#680: generated tokens only, or `[None]`, with a 200."""
    [choice] = client.complete(prompt=TEXT, max_tokens=3, echo=True, logprobs=1).choices
    logprobs = choice["logprobs"]
    ids = client.ids_of(TEXT)
    assert [len(values) for values in logprobs.values()] == [len(ids) + 3] * 4
    assert None not in logprobs["token_logprobs"][1:]
    direct = [entry.logprob for entry in client.service.engine.score(ids)[1:] if entry]
    assert logprobs["token_logprobs"][1 : len(ids)] == direct


def test_logprobs_are_there_if_asked_for(client):
    """ggml-org/llama.cpp#11346: null on this path."""
    [choice] = client.complete(prompt=TEXT, max_tokens=2, logprobs=0).choices
    assert list(choice["logprobs"]) == ["tokens", "token_logprobs", "top_logprobs", "text_offset"]
    assert all(len(values) == 2 for values in choice["logprobs"].values())


def test_echoed_tokens_are_spelt_one_by_one_and_the_beginning_has_no_width(client):
    """vllm-project/vllm#5334: tokens that repeat all before them, places moved by `<bos>`."""
    [choice] = client.complete(prompt=TEXT, max_tokens=0, echo=True, logprobs=0).choices
    logprobs = choice["logprobs"]
    assert logprobs["tokens"][0] == "<bos>"
    assert "".join(logprobs["tokens"][1:]) == TEXT == choice["text"]
    assert logprobs["text_offset"][:2] == [0, 0]
    for token, offset in zip(logprobs["tokens"][1:], logprobs["text_offset"][1:], strict=True):
        assert TEXT[offset : offset + len(token)] == token


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("holds_back", [False, True])
def test_places_of_a_stream_are_those_of_the_reply(client, echo, holds_back):
    """vllm#47815 and its completion tests: wrong with echo, and while text waits for a stop."""
    plain = client.complete(**DRAW).choices[0]["text"]
    stop = [plain[i : i + 3] + "\x00" for i in (0, 4, len(plain) - 3)] if holds_back else None
    body = {**DRAW, "echo": echo, "logprobs": 1, "stop": stop}
    whole = client.complete(**body).choices[0]["logprobs"]
    assert lists(pieces(client, **body)) == whole
    full = TEXT + plain
    for token, offset in zip(whole["tokens"], whole["text_offset"], strict=True):
        assert token == "<bos>" or full[offset : offset + len(token)] == token


def test_two_tokens_of_one_text_keep_the_likelier_in_the_map(client):
    """vllm#44319, sglang#32290: the value of the unlikely one takes the other's place."""
    # The likeliest first token of a text is "a"; the byte of this letter is another token.
    likeliest = client.complete(prompt=[2], max_tokens=1, return_token_ids=True)
    assert likeliest.choices[0]["text"] == "a"
    byte = BYTE_ZERO + ord("a")
    assert likeliest.choices[0]["token_ids"] != [byte]
    [choice] = client.complete(prompt=[2, byte], max_tokens=0, echo=True, logprobs=1).choices
    logprobs = choice["logprobs"]
    assert logprobs["tokens"][1] == "a"
    scored = client.service.engine.score([2, byte], top=1)[1]
    assert scored is not None
    [(_, likely)] = scored.top
    assert logprobs["top_logprobs"][1] == {"a": likely}
    # lm-eval calls a token greedy if its value is the highest: this one is not.
    assert logprobs["token_logprobs"][1] < likely


def test_tokens_that_are_bytes_have_names_of_their_own(client):
    """vllm#27300: they become the empty text in the map."""
    ids = [2, *(BYTE_ZERO + byte for byte in "日".encode())]
    logprobs = client.complete(prompt=ids, max_tokens=8, echo=True, logprobs=5).choices[0][
        "logprobs"
    ]
    assert logprobs["tokens"][1:4] == ["bytes:\\xe6", "bytes:\\x97", "bytes:\\xa5"]
    names = {name for top in logprobs["top_logprobs"][1:] for name in top}
    assert "" not in names
    assert not [name for name in names if "\ufffd" in name]
    assert [name for name in names if name.startswith("bytes:\\x")]


def test_an_echo_of_ids_is_served(client):
    """vllm#2706: a 500."""
    ids = client.ids_of(TEXT)
    for logprobs in (None, 0):
        got = client.complete(prompt=ids[1:], max_tokens=1, echo=True, logprobs=logprobs)
        assert got.choices[0]["text"].startswith(TEXT)


def test_a_stop_takes_tokens_and_their_numbers_alike(client):
    """TensorRT-LLM#18190: cut from the ids but not from the log-probabilities, and a 400."""
    plain = client.complete(**DRAW, logprobs=1).choices[0]
    for begin in range(1, len(plain["text"]) - 3, 2):
        stop = plain["text"][begin : begin + 3]
        got = client.complete(**DRAW, logprobs=1, stop=stop)
        [choice] = got.choices
        assert choice["text"] == plain["text"][: plain["text"].index(stop)]
        logprobs = choice["logprobs"]
        count = len(logprobs["tokens"])
        for name, values in logprobs.items():
            assert values == plain["logprobs"][name][:count]
        end = len(TEXT) + len(choice["text"])
        assert all(offset < end for offset in logprobs["text_offset"])
        # All that was generated counts, what the stop took with it too.
        assert count <= got.json["usage"]["completion_tokens"] <= 10


def test_an_end_of_text_that_comes_first_is_listed(client):
    """llama-cpp-python#1528: no entry at all."""
    got = client.complete(prompt=TEXT, max_tokens=5, logprobs=1, logit_bias={"1": 100})
    [choice] = got.choices
    assert (choice["text"], choice["finish_reason"]) == ("", "stop")
    assert choice["logprobs"]["tokens"] == ["<eos>"]
    assert choice["logprobs"]["text_offset"] == [len(TEXT)]
    assert len(choice["logprobs"]["token_logprobs"]) == 1
    assert got.json["usage"]["completion_tokens"] == 1


def test_places_are_places(client):
    """sglang, `utils.py`: always -1."""
    plain = client.complete(**DRAW, logprobs=0).choices[0]
    offsets, place = [], len(TEXT)
    for token in plain["logprobs"]["tokens"]:
        offsets.append(place)
        place += len(token)
    assert plain["logprobs"]["text_offset"] == offsets


def test_the_lists_are_equally_long_and_null_is_as_left_out(client):
    """Megatron-LM's tests: a 500 for null, one value more than tokens."""
    names = [
        "best_of", "echo", "frequency_penalty", "logit_bias", "logprobs", "max_tokens", "n",
        "presence_penalty", "seed", "stop", "stream", "stream_options", "suffix", "temperature",
        "top_p", "user", "top_k", "min_p", "repetition_penalty", "min_tokens", "stop_token_ids",
        "ignore_eos", "allowed_token_ids", "bad_words", "prompt_logprobs",
    ]  # fmt: skip
    got = client.post("/v1/completions", {"model": MODEL, "prompt": TEXT, **dict.fromkeys(names)})
    assert got.json["usage"]["completion_tokens"] <= 16
    for echo in (False, True):
        lengths = {
            len(values)
            for values in client.complete(prompt=TEXT, max_tokens=2, logprobs=2, echo=echo)
            .choices[0]["logprobs"]
            .values()
        }
        assert len(lengths) == 1


# Choices


def test_each_choice_of_a_stream_ends_under_its_own_index(client):
    """ggml-org/llama.cpp#20226: index 0 for the ends of all."""
    body = {**DRAW, "n": 3, "max_tokens": 3}
    events = client.complete(**body, stream=True).events
    ends = [event["choices"][0] for event in events if event["choices"][0]["finish_reason"]]
    assert sorted(end["index"] for end in ends) == [0, 1, 2]
    assert {end["text"] for end in ends} == {""}


def test_choices_of_one_request_differ(client):
    """ggml-org/llama.cpp#18700: they shared a seed."""
    for seed in (None, 0, 4):
        choices = client.complete(**{**DRAW, "seed": seed}, n=4).choices
        # 20 ** 10 texts: that two of four are equal by chance does not happen.
        assert len(set(texts(choices))) == 4


def test_more_choices_are_the_same_choices_and_more(client):
    """vllm#16449 and a comment to its #2514: other texts with another n or batch."""
    one, two, four = (client.complete(**DRAW, n=n).choices for n in (1, 2, 4))
    assert four[:2] == two
    assert two[:1] == one


def test_without_a_seed_texts_differ(client):
    """Blaizzy/mlx-vlm#1818: no seed was the seed 0."""
    body = {**DRAW, "seed": None}
    first, second = client.complete(**body).choices, client.complete(**body).choices
    assert texts(first) != texts(second)
    assert texts(first) != texts(client.complete(**DRAW | {"seed": 0}).choices)


def test_a_seed_leaves_the_temperature_alone(client):
    """ollama#5044: it became 0."""
    greedy = client.complete(**DRAW | {"temperature": 0}).choices
    assert texts(client.complete(**DRAW).choices) != texts(greedy)
    assert texts(client.complete(**DRAW | {"seed": 5}).choices) != texts(greedy)


def test_the_best_of_each_prompt_is_returned_in_order(client):
    """openai-python#90, of OpenAI itself: the last prompt's only, its index moved by best_of."""
    body = {**DRAW, "best_of": 3, "max_tokens": 4}
    both = client.complete(**body | {"prompt": [TEXT, "a dog"]}).choices
    assert [choice["index"] for choice in both] == [0, 1]
    alone = [client.complete(**body | {"prompt": text}).choices[0] for text in (TEXT, "a dog")]
    assert texts(both) == texts(alone)


def test_every_choice_has_every_key_and_no_reason_is_an_empty_one(client):
    """huggingface/text-generation-inference#2211: keys missing, "" for a reason, out of order."""
    body = {"prompt": [TEXT, "a dog", "in", "on"], "max_tokens": 2}
    for choice, index in zip(client.complete(**body).choices, range(4), strict=True):
        assert list(choice) == ["text", "index", "logprobs", "finish_reason"]
        assert (choice["index"], choice["logprobs"], choice["finish_reason"]) == (
            index, None, "length",
        )  # fmt: skip
    for event in client.complete(**body, stream=True).events:
        [choice] = event["choices"]
        assert list(choice) == ["text", "index", "logprobs", "finish_reason"]
        assert choice["finish_reason"] in (None, "length")
    refused = client.complete(prompt=TEXT, n=0, stream=True)
    assert (refused.status, refused.error["param"]) == (400, "n")


# Neighbours


def test_neighbours_change_nothing(client):
    """vllm#23138, #53257 and #51226, ollama#586: greedy texts and seeds that others change."""
    greedy = {"prompt": TEXT, "max_tokens": 5, "temperature": 0, "logprobs": 5}
    alone = [client.complete(**body).choices for body in (greedy, DRAW)]
    others = [
        {"prompt": "a dog" * i, "max_tokens": 3 + i, "temperature": 1.3, "n": 2} for i in (1, 2, 5)
    ]
    replies = client.complete_at_once([others[0], greedy, others[1], DRAW, others[2]])
    assert [reply.status for reply in replies] == [200] * 5
    assert [replies[i].choices for i in (1, 3)] == alone


def test_streams_and_replies_with_and_without_logprobs_share_a_batch(client):
    """sglang#30188: streams cut twice ("Hellod"), mixed batches that crash."""
    bodies = [
        {**DRAW, "seed": seed, "stream": seed % 2 == 0, "logprobs": logprobs}
        for seed, logprobs in enumerate((None, 2, 5, None, 0, 1))
    ]
    for body, got in zip(bodies, client.complete_at_once(bodies), strict=True):
        whole = client.complete(**body | {"stream": False}).choices
        assert (got.assembled if body["stream"] else got.choices) == whole


# Stop strings


def test_every_stop_is_found_and_nothing_of_it_leaks(client):
    """vllm#3574, TGI#1254, sglang#11446, SwiftLM#126, mlx-knife#68; llama.cpp#13780.

    Parts of a stop leaked into the stream, a stop across tokens was not seen, text was dropped.
    """
    plain = client.complete(**DRAW | {"max_tokens": 6}).choices[0]["text"]
    for length in (1, 2, 5):
        for begin in range(0, len(plain) - length, 2):
            stop = plain[begin : begin + length]
            expected = plain[: plain.index(stop)]
            parts = pieces(client, **DRAW | {"max_tokens": 6, "stop": [stop]})
            said = ""
            for part in parts:
                said += part["text"]
                assert expected.startswith(said)
            assert (said, parts[-1]["finish_reason"]) == (expected, "stop")


def test_only_what_may_become_a_stop_waits(client):
    """vllm#45636, smg#2203: a window as wide as the stop delays whatever there is."""
    stop = "\x00" * 200
    parts = pieces(client, **DRAW, stop=[stop])
    assert len([part for part in parts if part["text"]]) == 10


def test_the_first_stop_of_the_text_counts_not_that_of_the_list(client):
    """llama-cpp-python, `llama.py`: a reply is cut in the list's order, a stream in the text's."""
    plain = client.complete(**DRAW).choices[0]["text"]
    late, early = plain[-4:-1], plain[3:6]
    assert plain.index(early) < plain.index(late)
    expected = plain[: plain.index(early)]
    for stop in ([late, early], [early, late]):
        assert texts(client.complete(**DRAW, stop=stop).choices) == [expected]
        assert "".join(texts(pieces(client, **DRAW, stop=stop))) == expected


# Prompts


def test_the_prompt_is_fed_as_it_is(client):
    """ollama#5544, #12636: a chat template around it."""
    for prompt in (TEXT, "<start_of_turn>user\nhi<end_of_turn>\n"):
        got = client.complete(prompt=prompt, max_tokens=1, return_token_ids=True)
        assert got.choices[0]["prompt_token_ids"] == client.ids_of(prompt)
        assert got.json["usage"]["prompt_tokens"] == len(client.ids_of(prompt))


def test_a_text_has_one_beginning_and_ids_have_their_own(client):
    """vllm#52304, lm-eval#1465 and #3206: without one Gemma is lost, two do harm as well."""
    fed = client.complete(prompt=[TEXT, "a"], max_tokens=1, return_token_ids=True).choices
    assert [choice["prompt_token_ids"].count(2) for choice in fed] == [1, 1]
    assert [choice["prompt_token_ids"][0] for choice in fed] == [2, 2]
    for ids in ([278, 279], [2, 278], [2, 2, 278]):
        [choice] = client.complete(prompt=ids, max_tokens=1, return_token_ids=True).choices
        assert choice["prompt_token_ids"] == ids


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_nothing_may_be_asked_for_and_costs_nothing(client, echo, stream):
    """lm-eval#1903, vllm's `serving.py`: max_tokens 0 refused, or counted as one token."""
    options = {"include_usage": True} if stream else None
    got = client.complete(
        prompt=TEXT, max_tokens=0, echo=echo, stream=stream, stream_options=options
    )
    count = len(client.ids_of(TEXT))
    usage = {
        "prompt_tokens": count, "completion_tokens": 0, "total_tokens": count,
        "prompt_tokens_details": {"cached_tokens": 0},
    }  # fmt: skip
    if stream:
        *parts, last = got.events
        assert last["usage"] == usage
        choices = [part["choices"][0] for part in parts]
        assert "".join(texts(choices)) == (TEXT if echo else "")
        assert choices[-1]["finish_reason"] == "length"
    else:
        assert got.json["usage"] == usage
        assert texts(got.choices) == [TEXT if echo else ""]
        assert got.choices[0]["finish_reason"] == "length"


def test_texts_can_be_scored(client):
    """lm-eval#2982, unsloth#7703, textgen#5954: no way to a log-likelihood on this endpoint."""
    [choice] = client.complete(prompt=[TEXT], max_tokens=0, echo=True, logprobs=1).choices
    scored = [entry.logprob for entry in client.service.engine.score(TEXT)[1:] if entry]
    assert choice["logprobs"]["token_logprobs"][1:] == scored


# Clients


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_is_generated_for_no_longer(client, stream):
    """ATOM#1441, mlx-openai-server#269, FreeToken#222, unsloth#10096: it goes on to the end."""
    worker = client.service.engine.worker
    assert worker is not None
    body = {"model": MODEL, **DRAW, "max_tokens": 370, "stream": stream}
    before = client.service.metrics.value("vllm:generation_tokens_total") or 0

    async def scene() -> None:
        connection = client.app.test_client().request(
            "/v1/completions", method="POST", headers={"Content-Type": "application/json"}
        )
        async with connection as sent:
            await sent.send(json.dumps(body).encode())
            await sent.send_complete()
            await until(lambda: worker.num_in_flight == 1)
            await sent.disconnect()
        await until(lambda: worker.num_in_flight == 0)

    asyncio.run(scene())
    made = (client.service.metrics.value("vllm:generation_tokens_total") or 0) - before
    assert made < 370


def test_the_queue_has_an_end_and_says_when_to_come_again(client):
    """vllm#18826, #2901, #58192: it has none, or is looked at only after the costly step."""
    small = client_of(client.service.engine, max_queue=1)
    body = {"model": MODEL, **DRAW, "max_tokens": 100, "stream": True}

    async def scene() -> None:
        connection = small.app.test_client().request(
            "/v1/completions", method="POST", headers={"Content-Type": "application/json"}
        )
        async with connection as sent:
            await sent.send(json.dumps(body).encode())
            await sent.send_complete()
            await sent.receive()
            refused = await small.app.test_client().post("/v1/completions", json=body)
            error = (await refused.get_json())["error"]
            assert (refused.status_code, error["code"]) == (503, "overloaded")
            assert 1 <= int(refused.headers["Retry-After"]) <= 120
            await sent.disconnect()
        await until(lambda: small.service.queue.num_held == 0)

    asyncio.run(scene())
    assert len(small.complete(**DRAW).choices) == 1


def test_a_chunk_without_choices_comes_only_if_asked_for(client):
    """ogx#6541, openai-partial-stream#22: clients that cannot read it get it all the same."""
    assert all(event["choices"] for event in client.complete(**DRAW, stream=True).events)


def test_a_small_bad_body_gets_a_small_reply(client):
    """vllm#49239: 23 MB for 4 kB."""
    for value in ({"prompt": [[[["x"]] * 20] * 20] * 2}, {"stop": [[]] * 2000}, {"n": "1" * 4000}):
        got = client.complete(**{"prompt": TEXT, **value})
        assert got.status == 400
        assert len(got.body) < 4_096
