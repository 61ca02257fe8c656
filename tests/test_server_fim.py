"""Gaps that are filled in the form that CodeGemma was trained for: the form, and over the API."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from refimpl.engine.engine import Engine
from refimpl.engine.request import SamplingParams
from refimpl.server.infill import InfillLimits, fim_request
from tests.coders import FORM, coder_engine, coder_tokenizer
from tests.engines import request_of
from tests.servers import SLOTS, Client, client_of

# The first test that needs an engine compiles its programs.
pytestmark = pytest.mark.timeout(900)

LIMITS = InfillLimits()
BEFORE, BEHIND = "the cat", " sat on"
FIM = coder_tokenizer().fill_in_the_middle
assert FIM is not None
ENDS = [FIM.file_separator, FIM.prefix, FIM.suffix, FIM.middle]


@pytest.fixture(scope="module")
def coder() -> Iterator[Engine]:
    engine = coder_engine(slots=SLOTS)
    engine.options = replace(engine.options, compile_at_start=False)
    with engine:
        yield engine


@pytest.fixture(scope="module")
def client(coder: Engine) -> Client:
    return client_of(coder)


def ids_of(text: str) -> list[int]:
    return coder_tokenizer().encode(text, add_bos=False)


# The form


def test_the_form_has_the_pieces_in_their_order(coder: Engine) -> None:
    tokenizer = coder.gemma.tokenizer
    request = coder.request("AB", SamplingParams(max_tokens=9, seed=3))
    form = fim_request(coder, request, suffix="CD ", limits=LIMITS)
    assert form is not None
    pieces = [tokenizer.piece(i) for i in form.prompt_ids]
    assert pieces == ["<bos>", FORM[0], "A", "B", FORM[1], "C", "D", "▁", FORM[2]]
    ends = [tokenizer.piece(i) for i in form.params.stop_token_ids]
    assert ends == [FORM[3], *FORM[:3]]
    assert replace(form, prompt_ids=request.prompt_ids, params=request.params) == request
    assert replace(form.params, stop_token_ids=()) == request.params


@pytest.mark.parametrize("ids", [(2, 7, 8), (7, 8), (2, 2, 7), (2,)])
def test_a_prompt_of_ids_is_taken_as_it_is_behind_one_beginning(
    coder: Engine, ids: tuple[int, ...]
) -> None:
    form = fim_request(coder, request_of(ids), suffix="A", limits=LIMITS)
    pieces = coder.gemma.tokenizer.fill_in_the_middle
    assert form is not None
    assert pieces is not None
    rest = ids[1:] if ids[0] == 2 else ids
    (a,) = ids_of("A")
    assert form.prompt_ids == (2, pieces.prefix, *rest, pieces.suffix, a, pieces.middle)


def test_a_spelling_in_a_text_is_no_piece_of_the_form(coder: Engine) -> None:
    form = fim_request(coder, request_of((2, 7)), suffix="<|fim_middle|>", limits=LIMITS)
    pieces = coder.gemma.tokenizer.fill_in_the_middle
    assert form is not None
    assert pieces is not None
    assert form.prompt_ids.count(pieces.middle) == 1


def test_every_piece_of_the_form_ends_the_middle(coder: Engine) -> None:
    pieces = coder.gemma.tokenizer.fill_in_the_middle
    assert pieces is not None
    for end in (pieces.file_separator, pieces.prefix, pieces.suffix, pieces.middle):
        asked = request_of((2, 7), logit_bias={end: 100.0}, min_tokens=3, seed=1)
        form = fim_request(coder, asked, suffix="A", limits=LIMITS)
        assert form is not None
        (choice,) = coder.complete(form.prompt_ids, form.params).choices
        assert (choice.finish_reason, choice.stop, len(choice.token_ids)) == ("stop", end, 4)


def test_ends_that_the_request_names_or_ignores(coder: Engine) -> None:
    pieces = coder.gemma.tokenizer.fill_in_the_middle
    assert pieces is not None
    asked = request_of((2, 7), stop_token_ids=(9, pieces.middle))
    form = fim_request(coder, asked, suffix="A", limits=LIMITS)
    assert form is not None
    own = (pieces.file_separator, pieces.prefix, pieces.suffix)
    assert form.params.stop_token_ids == (9, pieces.middle, *own)
    endless = fim_request(coder, request_of((2, 7), ignore_eos=True), suffix="A", limits=LIMITS)
    assert endless is not None
    assert endless.params.stop_token_ids == ()


# Over the API


def in_the_form() -> list[int]:
    """What the model is to be asked, id by id."""
    assert FIM is not None
    return [2, FIM.prefix, *ids_of(BEFORE), FIM.suffix, *ids_of(BEHIND), FIM.middle]


def asked(**more: Any) -> dict[str, Any]:
    return {"prompt": BEFORE, "suffix": BEHIND, "temperature": 1, "seed": 3, "logprobs": 2} | more


@pytest.mark.parametrize("prompt", [BEFORE, [2, *ids_of(BEFORE)], ids_of(BEFORE)])
def test_a_gap_is_filled_with_what_follows_the_form(client: Client, prompt: Any) -> None:
    got = client.complete(**asked(prompt=prompt, n=2))
    # The same ids, as anybody might send them.
    plain = client.complete(**asked(prompt=in_the_form(), suffix=None, n=2, stop_token_ids=ENDS))
    assert got.json["usage"] == plain.json["usage"]
    assert got.json["usage"]["prompt_tokens"] == len(in_the_form())
    shift = len(BEFORE) - len(BEFORE + BEHIND)
    for choice, other in zip(got.choices, plain.choices, strict=True):
        # Places count from the prompt that the client sent.
        other["logprobs"]["text_offset"] = [
            place + shift for place in other["logprobs"]["text_offset"]
        ]
        assert choice == other


def test_an_echoed_prompt_is_what_was_sent_and_scored_as_that(client: Client) -> None:
    got = client.complete(**asked(echo=True, max_tokens=4))
    [choice] = got.choices
    [middle] = client.complete(**asked(max_tokens=4)).choices
    [scored] = client.complete(prompt=BEFORE, echo=True, max_tokens=0, logprobs=2).choices
    assert choice["text"] == BEFORE + middle["text"]
    for name, values in choice["logprobs"].items():
        assert values == scored["logprobs"][name] + middle["logprobs"][name]


@pytest.mark.parametrize("is_listed", [True, False])
def test_an_end_of_file_ends_the_middle_and_is_listed_as_an_end_of_text_is(
    client: Client, is_listed: bool
) -> None:
    server = client_of(client.service.engine, list_end_of_text=is_listed)
    body = asked(logit_bias={str(ENDS[0]): 100}, min_tokens=2, max_tokens=9)
    [choice] = server.complete(**body).choices
    assert choice["finish_reason"] == "stop"
    assert FORM[3] not in choice["text"]
    tokens = choice["logprobs"]["tokens"]
    assert len(tokens) == 2 + is_listed
    assert (tokens[-1] == FORM[3]) == is_listed


def test_a_stream_has_the_middle_as_it_comes(client: Client) -> None:
    body = asked(n=2, max_tokens=5, prompt=[BEFORE, "a dog"], ignore_eos=True)
    whole = client.complete(**body)
    streamed = client.complete(**body, stream=True, stream_options={"include_usage": True})
    *chunks, last = streamed.events
    assert last["usage"] == whole.json["usage"]
    for choice in whole.choices:
        pieces = [
            piece for chunk in chunks for piece in chunk["choices"]
            if piece["index"] == choice["index"]
        ]  # fmt: skip
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        assert [name for piece in pieces for name in piece["logprobs"]["tokens"]] == (
            choice["logprobs"]["tokens"]
        )
        assert len(pieces) > 2, "it does not come at once, as what is resampled does"


def test_the_best_of_several_middles(client: Client) -> None:
    [best] = client.complete(**asked(best_of=3, max_tokens=4, ignore_eos=True)).choices
    every = client.complete(**asked(n=3, max_tokens=4, ignore_eos=True)).choices
    sums = [sum(choice["logprobs"]["token_logprobs"]) for choice in every]
    assert best["text"] == every[sums.index(max(sums))]["text"]


def test_the_model_says_that_it_can(client: Client) -> None:
    told = client.get("/v1/models/tiny:1b").json["capabilities"]
    assert (told["fill_in_the_middle"], told["suffix"]) == (True, "fill_in_the_middle")
