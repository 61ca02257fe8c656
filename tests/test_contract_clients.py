"""What known clients of the completions API send, body by body, and what they read of the reply.

Each test sends a client's own request and then reads the reply as that client does, so that a
reply which looks right but cannot be used fails here.

    lm-evaluation-harness   log-likelihoods of ids and texts, generation, tokenizer, gguf
    openai-python           its headers, its typed reply, its stream, its errors
    litellm, langchain      lists of prompts, fields that are null or empty, streams
    guidellm, vllm bench    probes, streams with usage, ends of text that are passed over
    llmperf, HELM           bare lines, errors of strings; tokens that are bytes
"""

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
from openai.types import Completion

from refimpl.engine.request import SamplingParams
from tests.servers import MODEL, Client, Got, client_of, tiny_client

TEXT = "the cat sat"
# Three bytes that are one character, and ids of the tokens that are one byte each.
DAY = "日"
BYTE_ZERO = 22


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with tiny_client() as client:
        yield client


def send(client: Client, body: dict[str, Any], *, headers: dict[str, str] | None = None) -> Got:
    """The body as it is, with nothing put in."""
    return client.post("/v1/completions", body, headers=headers)


def data_of(got: Got) -> list[str]:
    """What a client reads of a stream line by line, up to the end of it."""
    assert got.status == 200, got.body
    lines = [line for line in got.body.decode().split("\n") if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [line.removeprefix("data: ") for line in lines[:-1]]


# lm-evaluation-harness


def lm_eval_scoring(prompt: Any, *, max_tokens: int = 1) -> dict[str, Any]:
    return {
        "model": MODEL,
        "prompt": prompt,
        "temperature": 0,
        "max_tokens": max_tokens,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }


def lm_eval_reads(choice: dict[str, Any], context: int) -> tuple[float, bool, int]:
    """Sum, whether every token is the likeliest by exact equality, and number of tokens."""
    logprobs = choice["logprobs"]
    scores = logprobs["token_logprobs"][context:-1]
    tops = logprobs["top_logprobs"][context:-1]
    greedy = all(score == max(top.values()) for score, top in zip(scores, tops, strict=True))
    return sum(scores), greedy, len(scores)


def test_lm_eval_scores_continuations_as_the_model_does(client):
    engine = client.service.engine
    context = client.ids_of(TEXT)
    [said] = engine.complete(
        context, SamplingParams(temperature=0, max_tokens=4, logprobs=0)
    ).choices
    likeliest = list(said.token_ids)
    unlikely = client.ids_of(" on the mat")[1:]
    # The last has no beginning of text: ids are taken as they are.
    prompts = [context + likeliest, context + unlikely, context[1:] + unlikely]
    contexts = [len(context), len(context), len(context) - 1]
    got = send(client, lm_eval_scoring(prompts), headers={"Authorization": "Bearer "})
    choices = sorted(got.choices, key=lambda choice: choice["index"])
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    read = [lm_eval_reads(choice, n) for choice, n in zip(choices, contexts, strict=True)]
    assert [greedy for _, greedy, _ in read] == [True, False, False]
    # Scoring adds in another order than generating: a few last bits of numbers below 16.
    generated = [entry.logprob for entry in said.logprobs or ()]
    scored = choices[0]["logprobs"]["token_logprobs"][len(context) : -1]
    assert scored == pytest.approx(generated, rel=0, abs=1e-5)
    for choice, ids, (total, _, count), start in zip(choices, prompts, read, contexts, strict=True):
        logprobs = choice["logprobs"]
        assert {len(values) for values in logprobs.values()} == {len(ids) + 1}
        assert count == len(ids) - start
        assert None not in logprobs["token_logprobs"][1:]
        direct = [entry.logprob for entry in engine.score(ids)[start:] if entry is not None]
        # Sums of a few numbers near -8, each to be the same float32.
        assert math.isclose(total, sum(direct), rel_tol=0, abs_tol=1e-4)


def test_lm_eval_scores_texts_with_one_beginning_and_one_more_entry(client):
    texts = [TEXT, "a dog"]
    got = send(client, lm_eval_scoring(texts))
    for choice, text in zip(got.choices, texts, strict=True):
        ids = client.ids_of(text)
        assert choice["logprobs"]["tokens"][0] == "<bos>"
        assert choice["logprobs"]["tokens"].count("<bos>") == 1
        total, _, count = lm_eval_reads(choice, 1)
        assert count == len(ids) - 1
        direct = [entry.logprob for entry in client.service.engine.score(text)[1:] if entry]
        assert math.isclose(total, sum(direct), rel_tol=0, abs_tol=1e-4)


def test_lm_eval_may_score_without_generating(client):
    ids = client.ids_of(TEXT)
    got = send(client, lm_eval_scoring([ids], max_tokens=0))
    [choice] = got.choices
    assert len(choice["logprobs"]["token_logprobs"]) == len(ids)
    assert got.json["usage"] == {
        "prompt_tokens": len(ids), "completion_tokens": 0, "total_tokens": len(ids),
        "prompt_tokens_details": {"cached_tokens": 0},
    }  # fmt: skip
    with_one_more = send(client, lm_eval_scoring([ids])).choices[0]["logprobs"]
    for name, values in choice["logprobs"].items():
        assert values == with_one_more[name][:-1]


def lm_eval_generation(**more: Any) -> dict[str, Any]:
    return {
        "prompt": [TEXT, "a dog"],
        "model": MODEL,
        "max_tokens": 6,
        "temperature": 0,
        "stop": ["\n\n", "<eos>"],
        "seed": 1234,
        **more,
    }


def test_lm_eval_generates_one_text_a_prompt_in_order(client):
    got = send(client, lm_eval_generation(top_p=0.95, top_k=20))
    assert [choice["index"] for choice in got.choices] == [0, 1]
    alone = [client.complete(prompt=text, max_tokens=6).choices[0] for text in (TEXT, "a dog")]
    assert [choice["text"] for choice in got.choices] == [choice["text"] for choice in alone]


def test_lm_eval_without_ends_sends_an_empty_list_of_them(client):
    texts = [choice["text"] for choice in send(client, lm_eval_generation(stop=[])).choices]
    assert texts == [choice["text"] for choice in send(client, lm_eval_generation()).choices]


def test_lm_eval_has_more_ends_than_four_for_code_and_a_server_may_let_it(client):
    stop = ["\nclass", "\ndef", "\n#", "\nif", "\nprint", "<eos>"]
    error = send(client, lm_eval_generation(stop=stop)).error
    assert error["param"] == "stop"
    generous = client_of(client.service.engine, max_stop=6)
    assert len(send(generous, lm_eval_generation(stop=stop)).choices) == 2


def test_lm_eval_finds_a_tokenizer_at_the_root(client):
    info = client.get("/tokenizer_info").json
    assert info["eos_token"] == "<eos>"
    assert info["bos_token"] == "<bos>"
    tokens = client.post("/tokenize", {"prompt": "test", "add_special_tokens": False}).json
    assert tokens["tokens"] == client.ids_of("test")[1:]
    assert client.post("/detokenize", {"tokens": tokens["tokens"]}).json["prompt"] == "test"


GGUF = {"logprobs": 10, "temperature": 0.0, "max_tokens": 1, "echo": True}


def gguf_reads(logprobs: dict[str, Any], context: int) -> tuple[float, bool]:
    """Sum and greediness of what begins at a character of the prompt."""
    begin = next(i for i, offset in enumerate(logprobs["text_offset"]) if offset >= context)
    tokens, tops = logprobs["tokens"][begin:], logprobs["top_logprobs"][begin:]
    greedy = all(
        max(top, key=lambda text: top[text]) == token
        for token, top in zip(tokens, tops, strict=True)
    )
    return sum(logprobs["token_logprobs"][begin:-1]), greedy


def test_lm_evals_gguf_client_is_told_that_the_model_and_the_number_are_not_right(client):
    error = send(client, {"prompt": TEXT, **GGUF}).error
    assert error["message"] == "you must provide a model parameter"
    assert (error["type"], error["param"]) == ("invalid_request_error", "model")
    error = send(client, {"model": MODEL, "prompt": TEXT, **GGUF}).error
    assert error["param"] == "logprobs"
    assert "5" in error["message"]


def test_lm_evals_gguf_client_need_not_name_the_model_where_the_server_lets_it(client):
    lenient = client_of(client.service.engine, require_model=False, max_logprobs=10)
    for body in ({"prompt": TEXT, **GGUF}, {"model": None, "prompt": TEXT, **GGUF}):
        got = send(lenient, body)
        assert got.json["model"] == MODEL
        assert got.choices == send(lenient, {"model": MODEL, "prompt": TEXT, **GGUF}).choices
    assert send(lenient, {"model": "", "prompt": TEXT, **GGUF}).status == 404
    schemas = lenient.get("/openapi.json").json["components"]["schemas"]
    assert schemas["CompletionRequest"]["required"] == []


@pytest.mark.parametrize("is_likeliest", [False, True])
def test_lm_evals_gguf_client_can_find_its_continuation_by_characters(client, is_likeliest):
    generous = client_of(client.service.engine, max_logprobs=10)
    context = "the cat"
    likeliest = client.complete(prompt=context, max_tokens=1).choices[0]["text"]
    continuation = likeliest if is_likeliest else " on"
    # One more token, cut where the context ends.
    assert client.ids_of(context + continuation)[:-1] == client.ids_of(context)
    body = {"model": MODEL, "prompt": context + continuation, **GGUF}
    total, greedy = gguf_reads(send(generous, body).choices[0]["logprobs"], len(context))
    direct = client.service.engine.score(context + continuation)[-1]
    assert direct is not None
    assert math.isclose(total, direct.logprob, rel_tol=0, abs_tol=1e-4)
    assert greedy == is_likeliest


# openai-python, litellm, langchain

STAINLESS = {
    "Authorization": "Bearer sk-none",
    "User-Agent": "OpenAI/Python 3.54.0",
    "x-stainless-lang": "python",
    "x-stainless-retry-count": "0",
    "x-stainless-read-timeout": "600",
    "x-stainless-async": "false",
}

# Every field that the official client knows, in the order of its own documentation.
EVERY_FIELD = {
    "model": MODEL,
    "prompt": TEXT,
    "best_of": 2,
    "echo": True,
    "frequency_penalty": -2,
    "logit_bias": {"40": 1},
    "logprobs": 2,
    "max_tokens": 4,
    "n": 1,
    "presence_penalty": -2,
    "seed": 5,
    "stop": "\n",
    "stream": False,
    "suffix": None,
    "temperature": 1,
    "top_p": 1,
    "user": "user-1234",
}


def test_openai_python_may_send_every_field_and_loses_nothing_of_the_reply(client):
    got = send(client, EVERY_FIELD, headers=STAINLESS)
    # The client builds its types without checking them: an echoed prompt's first token has no
    # log-probability, which they do not foresee.
    parsed = Completion.construct(**got.json)
    dumped = parsed.model_dump(mode="json", exclude_unset=True, warnings=False)
    assert dumped == got.json
    assert parsed.choices[0].text.startswith(TEXT)
    assert parsed.choices[0].logprobs is not None
    assert parsed.usage is not None
    assert parsed.system_fingerprint == got.json["system_fingerprint"]
    assert got.headers["x-request-id"].startswith("req_")
    assert len(got.headers["x-request-id"]) == len("req_") + 32


def test_openai_python_finds_every_type_right_without_echo(client):
    got = send(client, EVERY_FIELD | {"echo": False}, headers=STAINLESS)
    parsed = Completion.model_validate(got.json, strict=True)
    assert parsed.model_extra == {}
    assert parsed.model_dump(mode="json", exclude_unset=True) == got.json


def test_openai_python_streams_until_done_and_every_chunk_is_a_completion(client):
    body = EVERY_FIELD | {
        "best_of": None,
        "stream": True,
        "stream_options": {"include_usage": True, "include_obfuscation": False},
    }
    values = [json.loads(line) for line in data_of(send(client, body))]
    chunks = [Completion.construct(**value) for value in values]
    # Its types do not foresee a text that has not ended, of which there is no reason.
    for chunk, value in zip(chunks, values, strict=True):
        assert chunk.model_dump(mode="json", exclude_unset=True, warnings=False) == value
    assert all(chunk.choices for chunk in chunks[:-1])
    last = chunks[-1]
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.total_tokens == last.usage.prompt_tokens + last.usage.completion_tokens
    whole = send(client, EVERY_FIELD | {"best_of": None}).json
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole["choices"][0]["text"]
    assert last.usage.model_dump(exclude_unset=True) == whole["usage"]


def test_openai_python_raises_what_the_error_says(client):
    got = send(client, {"model": "davinci-002", "prompt": TEXT}, headers=STAINLESS)
    assert got.status == 404
    assert got.error["code"] == "model_not_found"
    assert "davinci-002" in got.error["message"]
    assert got.headers["x-request-id"].startswith("req_")


def test_litellm_passes_stream_options_and_reads_text_reason_and_usage(client):
    body = {
        "model": MODEL, "prompt": TEXT, "max_tokens": 5, "temperature": 0,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    chunks = [json.loads(line) for line in data_of(send(client, body, headers=STAINLESS))]
    texts = [chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"]]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks if chunk["choices"]]
    assert "".join(texts) == client.complete(prompt=TEXT, max_tokens=5).choices[0]["text"]
    assert [reason for reason in reasons if reason] == ["length"]
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks if chunk["usage"]] == [5]


def langchain(**more: Any) -> dict[str, Any]:
    return {
        "model": MODEL,
        "temperature": 0.7,
        "max_tokens": 3,
        "top_p": 1,
        "frequency_penalty": 0,
        "presence_penalty": 0,
        "n": 2,
        "logit_bias": {},
        "seed": None,
        "logprobs": None,
        **more,
    }


def test_langchain_sends_twenty_prompts_and_takes_choices_by_position(client):
    prompts = [f"{TEXT} {i}" for i in range(20)]
    got = send(client, langchain(prompt=prompts, seed=1))
    assert [choice["index"] for choice in got.choices] == list(range(40))
    assert [choice["logprobs"] for choice in got.choices] == [None] * 40
    for i in (0, 7, 19):
        alone = send(client, langchain(prompt=[prompts[i]], seed=1)).choices
        mine = got.choices[2 * i : 2 * i + 2]
        assert [choice["text"] for choice in mine] == [choice["text"] for choice in alone]
    usage = got.json["usage"]
    assert usage["prompt_tokens"] == sum(len(client.ids_of(prompt)) for prompt in prompts)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_langchain_streams_and_skips_chunks_without_choices(client):
    body = langchain(
        prompt=TEXT, n=1, seed=1, stop=["zq"], stream=True, stream_options={"include_usage": True}
    )
    chunks = [json.loads(line) for line in data_of(send(client, body))]
    texts = [chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"]]
    whole = send(client, langchain(prompt=[TEXT], n=1, seed=1, stop=["zq"])).choices[0]
    assert "".join(texts) == whole["text"]


# Benchmarks


def test_guidellm_probes_and_takes_the_first_model(client):
    assert client.get("/health").status == 200
    models = client.get("/v1/models").json
    assert models["object"] == "list"
    assert models["data"][0]["id"] == MODEL
    assert set(models["data"][0]) >= {"id", "object", "created", "owned_by"}


def test_guidellm_counts_tokens_by_usage_and_by_chunks(client):
    body = {
        "model": MODEL, "prompt": TEXT, "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "max_tokens": 6, "ignore_eos": True,
        # The one field that is ours: the end of text is as likely as can be.
        "logit_bias": {"1": 100},
    }  # fmt: skip
    chunks = [json.loads(line) for line in data_of(send(client, body))]
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 6
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {len(client.ids_of(TEXT))}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks if chunk["choices"]][-1] == (
        "length"
    )


def test_a_benchmark_sees_each_token_in_a_chunk_of_its_own(client):
    # Pieces of ordinary text, so that nothing waits for more bytes.
    got = client.complete(
        prompt=TEXT, max_tokens=6, temperature=1, seed=1, stream=True,
        allowed_token_ids=[278, 279, 280, 281],
    )  # fmt: skip
    texts = [chunk["choices"][0]["text"] for chunk in got.events]
    assert len([text for text in texts if text]) == 6


def test_vllm_bench_reads_usage_only_from_a_chunk_without_choices(client):
    body = {
        "model": MODEL, "prompt": TEXT, "repetition_penalty": 1.0, "max_tokens": 7,
        "logprobs": None, "stream": True, "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }  # fmt: skip
    got = send(client, body, headers={"x-request-id": "bench-0"})
    assert got.headers["x-request-id"] == "bench-0"
    frames = got.body.decode().split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(frame.removeprefix("data: ")) for frame in frames[:-2]]
    [usage] = [chunk["usage"] for chunk in chunks if not chunk["choices"]]
    assert usage["completion_tokens"] == 7
    assert usage["prompt_tokens"] == len(client.ids_of(TEXT))
    assert all(chunk["usage"] is None for chunk in chunks if chunk["choices"])


def test_llmperf_cuts_six_bytes_off_every_line_and_reads_errors(client):
    got = client.complete(prompt=TEXT, max_tokens=3, stream=True)
    lines = [line for line in got.body.splitlines() if line]
    values = [line[len(b"data: ") :] for line in lines]
    assert values[-1] == b"[DONE]"
    assert all(json.loads(value)["choices"] for value in values[:-1])
    error = client.complete(prompt=TEXT, max_tokens=-1, stream=True).error
    assert isinstance(error["message"], str)
    assert error["code"] is None


# HELM


def bytes_of(token: str) -> bytes:
    """As HELM: `bytes:` and then each byte as a backslash, an x and two digits."""
    if token.startswith("bytes:"):
        return bytes.fromhex(token.removeprefix("bytes:").replace("\\x", ""))
    return token.encode()


def test_helm_puts_texts_together_from_tokens_that_are_bytes(client):
    ids = [2, *(BYTE_ZERO + byte for byte in DAY.encode()), *client.ids_of(TEXT)[1:]]
    body = {
        "model": MODEL, "prompt": ids, "temperature": 1, "n": 2, "max_tokens": 9,
        "best_of": 3, "logprobs": 1, "stop": None, "top_p": 1, "presence_penalty": 0,
        "frequency_penalty": 0, "echo": True, "seed": 3,
        "allowed_token_ids": [BYTE_ZERO + byte for byte in DAY.encode()],
    }  # fmt: skip
    got = send(client, body)
    assert len(got.choices) == 2
    for choice in got.choices:
        tokens = choice["logprobs"]["tokens"]
        assert tokens[0] == "<bos>"
        assert tokens[1:4] == ["bytes:\\xe6", "bytes:\\x97", "bytes:\\xa5"]
        whole = b"".join(bytes_of(token) for token in tokens[1:])
        assert whole.decode(errors="replace").startswith(DAY + TEXT)
        assert choice["text"].removeprefix("<bos>") == whole.decode(errors="replace")
        assert choice["finish_reason"] == "length"
        scores = choice["logprobs"]["token_logprobs"]
        assert len(scores) == len(tokens)
        assert all(score <= 0 for score in scores[1:])
