"""Tokens in a reply: their spelling, where they begin, which are listed; streamed or not."""

import math

import numpy as np
import pytest

from refimpl.engine.events import Admitted, Event, Finished, PromptScored, TokenLogprob, collect
from refimpl.engine.packing import StepRow
from refimpl.engine.request import Request, SamplingParams
from refimpl.engine.session import Session
from refimpl.server.choices import Piece, PromptWriter, joined
from refimpl.server.contract import CompletionRequest, parse_request
from refimpl.server.errors import Problem
from refimpl.server.logprobs import LEAST, Entry, Places, Speller
from refimpl.server.prompts import Prompt
from refimpl.server.settings import ServerSettings
from tests.engines import tiny_gemma

TOKENIZER = tiny_gemma("gemma3").tokenizer
EOS = tiny_gemma("gemma3").eos_ids
SPELLER = Speller(TOKENIZER, as_ids=False)


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_bos=False)


def byte_id(byte: int) -> int:
    [found] = [i for i in range(512) if TOKENIZER.piece(i) == f"<0x{byte:02X}>"]
    return found


def characters(data: bytes) -> list[int]:
    """For each byte, which character of the text it is in; a broken one is a character, too."""
    places = list[int]()
    start = number = 0
    while start < len(data):
        rest = data[start:]
        size = next((n for n in range(1, 5) if _is_character(rest[:n])), 0)
        if size == 0:
            with pytest.raises(UnicodeDecodeError) as caught:
                rest.decode()
            assert caught.value.start == 0
            size = caught.value.end
        places += [number] * size
        start, number = start + size, number + 1
    return places


def _is_character(data: bytes) -> bool:
    try:
        return len(data.decode()) == 1
    except UnicodeDecodeError:
        return False


def test_characters_of_bytes_the_long_way_round():
    assert characters("aé🙂".encode()) == [0, 1, 1, 2, 2, 2, 2]
    assert characters(b"\xe9\x80a\xff\xc3") == [0, 0, 1, 2, 3]


@pytest.mark.parametrize(
    ("piece", "spelt"),
    [
        ("<eos>", "<eos>"),
        ("▁the", " the"),
        ("<0x0A>", "\n"),
        ("<0xE9>", r"bytes:\xe9"),
        ("<0x0F>", "\x0f"),
        ("<0x80>", r"bytes:\x80"),
        ("日本", "日本"),
    ],
)
def test_a_token_is_spelt_as_its_text_or_its_bytes(piece, spelt):
    [token_id] = [i for i in range(512) if TOKENIZER.piece(i) == piece]
    assert SPELLER.spell(token_id) == spelt
    assert Speller(TOKENIZER, as_ids=True).spell(token_id) == f"token_id:{token_id}"


def test_a_split_character_is_one_place_and_the_count_moves_when_it_is_complete():
    places = Places(TOKENIZER, hidden=(), start=5)
    smile = [byte_id(byte) for byte in "🙂".encode()]
    assert [places.push(i) for i in (*smile, byte_id(0x41), *smile[:2])] == [5, 5, 5, 5, 6, 7, 7]
    # A character that goes on otherwise than it began was one, and another begins.
    assert places.push(byte_id(0x42)) == 8
    assert places.push(byte_id(0xC3)) == 9
    assert places.end() == 10


def test_hidden_tokens_have_no_width():
    places = Places(TOKENIZER, hidden=TOKENIZER.special_ids)
    assert [places.push(i) for i in (2, byte_id(0x41), 5, byte_id(0x42))] == [0, 0, 1, 1]
    places = Places(TOKENIZER, hidden=())
    assert [places.push(i) for i in (2, byte_id(0x41))] == [0, 5]


@pytest.mark.parametrize("seed", range(50))
def test_places_of_any_tokens_are_those_of_the_characters_that_they_begin_in(seed):
    random = np.random.default_rng(seed)
    # Mostly bytes from the upper half, so that characters are split and broken in every way.
    ids = [
        int(i) for i in np.where(random.random(60) < 0.8, random.integers(150, 278, 60),
                                 random.integers(7, 490, 60))
    ]  # fmt: skip
    pieces = [TOKENIZER.piece_bytes(i) for i in ids]
    by_byte = characters(b"".join(pieces))
    starts = np.cumsum([0, *(len(piece) for piece in pieces[:-1])])
    places = Places(TOKENIZER, hidden=())
    assert [places.push(i) for i in ids] == [by_byte[start] for start in starts]
    assert places.end() == len(TOKENIZER.decode(ids))


def scored(token_id: int, logprob: float, *top: tuple[int, float]) -> TokenLogprob:
    return TokenLogprob(token_id, logprob, top)


def test_the_map_of_the_likeliest_has_the_token_itself_too():
    a, b = byte_id(0x41), byte_id(0x42)
    entry = Entry(a, 0, scored(a, -3.0, (b, -1.0)))
    assert SPELLER.logprobs([entry], top=1)["top_logprobs"] == [{"B": -1.0, "A": -3.0}]
    assert SPELLER.logprobs([entry], top=0)["top_logprobs"] == [{"A": -3.0}]
    itself = Entry(b, 0, scored(b, -1.0, (b, -1.0)))
    assert SPELLER.logprobs([itself], top=1)["top_logprobs"] == [{"B": -1.0}]


def test_of_two_tokens_with_one_text_the_likelier_is_in_the_map():
    plain, byte = ids_of("A")[0], byte_id(0x41)
    assert plain != byte
    assert SPELLER.spell(plain) == SPELLER.spell(byte) == "A"
    # Greedy means that the value is the highest of the map, which it must not be here.
    lists = SPELLER.logprobs([Entry(byte, 0, scored(byte, -2.5, (plain, -0.5)))], top=1)
    assert lists["top_logprobs"] == [{"A": -0.5}]
    assert lists["token_logprobs"] == [-2.5]
    both = scored(plain, -0.5, (plain, -0.5), (byte, -2.5))
    assert SPELLER.logprobs([Entry(plain, 0, both)], top=2)["top_logprobs"] == [{"A": -0.5}]
    by_id = Speller(TOKENIZER, as_ids=True).logprobs([Entry(plain, 0, both)], top=2)
    assert by_id["top_logprobs"] == [{f"token_id:{plain}": -0.5, f"token_id:{byte}": -2.5}]


def test_minus_infinity_is_spelt_as_a_number():
    a, b = byte_id(0x41), byte_id(0x42)
    lists = SPELLER.logprobs([Entry(a, 0, scored(a, -math.inf, (b, -math.inf)))], top=1)
    assert lists["token_logprobs"] == [LEAST]
    assert lists["top_logprobs"] == [{"B": LEAST, "A": LEAST}]


def test_ranks_of_prompt_logprobs():
    a, b = byte_id(0x41), byte_id(0x42)
    [nothing, entry] = SPELLER.prompt_logprobs([None, scored(a, -3.0, (b, -1.0))], top=1)
    assert nothing is None
    assert entry == {
        str(b): {"logprob": -1.0, "rank": 1, "decoded_token": "B"},
        str(a): {"logprob": -3.0, "rank": None, "decoded_token": "A"},
    }


def request_of(**fields) -> CompletionRequest:
    return parse_request({"model": "m", **fields}, ServerSettings(max_stop=10))[0]


def writer_of(request: CompletionRequest, prompt: Prompt, **options) -> PromptWriter:
    return PromptWriter(request, prompt, number=0, tokenizer=TOKENIZER, eos_ids=EOS, **options)


def run(request: CompletionRequest, ids: list[int]) -> tuple[Request, list[Event]]:
    """The events of a choice that draws these ids, as the engine makes them."""
    params = SamplingParams(
        max_tokens=len(ids),
        stop=request.stops,
        stop_token_ids=tuple(request.stop_token_ids),
        include_stop_str_in_output=request.include_stop_str_in_output,
        skip_special_tokens=request.skip_special_tokens,
        ignore_eos=request.ignore_eos,
        logprobs=request.logprobs,
    )
    asked = Request(prompt_ids=(2,), params=params)
    session = Session(asked, TOKENIZER, EOS)
    events = list[Event]()
    for number, token_id in enumerate(ids):
        row = StepRow(
            token=token_id,
            logprob=-float(number),
            top=((token_id, -float(number)),) * 5,
            is_running=number + 1 < len(ids),
            is_finite=True,
        )
        new, goes_on = session.push(0, row)
        events += new
        if not goes_on:
            break
    return asked, events


def streamed(
    request: CompletionRequest, prompt: Prompt, events: list[Event], **options
) -> list[Piece]:
    writer = writer_of(request, prompt, **options)
    shown = [event for event in events if not isinstance(event, Admitted)]
    return [piece for event in shown for piece in writer.take(event)]


PROMPT = Prompt((2, *ids_of("of ")), "of ", is_bos_ours=True)


def listed(
    request: CompletionRequest, ids: list[int], **options
) -> tuple[str, list[str], list[int]]:
    """Text, tokens and offsets of a choice that draws these ids; the same streamed and not."""
    asked, events = run(request, ids)
    pieces = streamed(request, PROMPT, events, **options)
    whole = writer_of(request, PROMPT, **options).take_whole(collect(asked, events))
    assert joined(pieces) == joined(whole)
    final = joined(pieces)
    assert [piece.finish_reason for piece in pieces].count(None) == len(pieces) - 1
    assert pieces[-1].text == ""
    assert final.logprobs is not None
    assert final.logprobs["token_logprobs"] == [
        -float(i) for i in range(len(final.logprobs["tokens"]))
    ]
    return final.text, final.logprobs["tokens"], final.logprobs["text_offset"]


def test_tokens_of_a_stop_string_are_left_out_but_for_one_that_begins_before_it():
    ids = [*ids_of("re"), *ids_of(" in"), *ids_of("ing"), *ids_of("x")]
    assert [TOKENIZER.piece(i) for i in ids] == ["re", "▁in", "ing", "x"]
    logs = {"logprobs": 0}
    assert listed(request_of(**logs), ids) == (
        "re ining" + "x",
        ["re", " in", "ing", "x"],
        [3, 5, 8, 11],
    )
    # Begins and ends with tokens.
    assert listed(request_of(stop=" in", **logs), ids) == ("re", ["re"], [3])
    # Begins in the middle of one.
    assert listed(request_of(stop="nin", **logs), ids) == ("re i", ["re", " in"], [3, 5])
    # Nothing is left.
    assert listed(request_of(stop="re", **logs), ids) == ("", [], [])
    kept = request_of(stop="nin", include_stop_str_in_output=True, **logs)
    assert listed(kept, ids) == ("re inin", ["re", " in", "ing"], [3, 5, 8])


def test_the_end_of_a_text_is_listed_behind_it():
    ids = [*ids_of("re"), byte_id(0xC3), EOS[0]]
    assert listed(request_of(logprobs=0), ids) == (
        "re\ufffd", ["re", r"bytes:\xc3", "<eos>"], [3, 5, 6],
    )  # fmt: skip
    assert listed(request_of(logprobs=0), ids, list_end_of_text=False) == (
        "re\ufffd", ["re", r"bytes:\xc3"], [3, 5],
    )  # fmt: skip
    assert listed(request_of(logprobs=0), [EOS[0]]) == ("", ["<eos>"], [3])
    # Ignored, it is a token like others.
    assert listed(request_of(logprobs=0, ignore_eos=True), [EOS[0], *ids_of("re")]) == (
        "re", ["<eos>", "re"], [3, 3],
    )  # fmt: skip
    spelt = request_of(logprobs=0, ignore_eos=True, skip_special_tokens=False)
    assert listed(spelt, [EOS[0], *ids_of("re")], list_end_of_text=False) == (
        "<eos>re", ["<eos>", "re"], [3, 8],
    )  # fmt: skip


def test_a_stop_id_is_listed_whatever_becomes_of_the_end_of_text():
    re, he = ids_of("re")[0], ids_of("he")[0]
    request = request_of(logprobs=0, stop_token_ids=[he])
    for is_listed in (True, False):
        assert listed(request, [re, he], list_end_of_text=is_listed) == ("re", ["re", "he"], [3, 5])
    shown = request_of(logprobs=0, stop_token_ids=[he], include_stop_str_in_output=True)
    assert listed(shown, [re, he]) == ("rehe", ["re", "he"], [3, 5])


def test_tokens_wait_for_their_text():
    request = request_of(logprobs=0, stop="ing!")
    _, events = run(request, [*ids_of("re"), *ids_of("ing"), *ids_of("x"), *ids_of("in")])
    pieces = streamed(request, PROMPT, events)
    tokens = [(piece.text, (piece.logprobs or {})["tokens"]) for piece in pieces]
    # The last "in" may not become the stop string any more once the text has ended.
    assert tokens == [("re", ["re"]), ("ingx", ["ing", "x"]), ("in", ["in"]), ("", [])]


@pytest.mark.parametrize("seed", range(60))
def test_whatever_is_drawn_the_stream_adds_up_to_the_whole_and_lists_what_it_should(seed):
    random = np.random.default_rng(seed)

    def some(*choices):
        return choices[int(random.integers(len(choices)))]

    ids = [int(i) for i in random.choice(
        [*range(0, 7), *range(150, 278, 3), *ids_of("there is no end in"), *EOS], 40
    )]  # fmt: skip
    text = TOKENIZER.decode(ids, skip_special=True)
    cuts = [sorted(random.integers(0, len(text) + 1, 2)) for _ in range(3)]
    stops = [text[a:b] for a, b in cuts if a < b] + ["nowhere"]
    request = request_of(
        logprobs=some(0, 3),
        stop=some([], stops),
        include_stop_str_in_output=some(False, False, True),
        skip_special_tokens=some(True, False),
        ignore_eos=some(True, True, False),
        return_token_ids=True,
    )
    asked, events = run(request, ids)
    pieces = streamed(request, PROMPT, events)
    final = joined(pieces)
    assert final == joined(writer_of(request, PROMPT).take_whole(collect(asked, events)))

    end = events[-1]
    assert isinstance(end, Finished)
    drawn = ids[: end.num_tokens]
    shown = drawn[:-1] if isinstance(end.stop, int) else drawn
    hidden = TOKENIZER.special_ids if request.skip_special_tokens else frozenset()
    visible = [b"" if i in hidden else TOKENIZER.piece_bytes(i) for i in shown]
    by_byte = [*characters(b"".join(visible)), len(b"".join(visible).decode(errors="replace"))]
    starts = np.cumsum([0, *(len(each) for each in visible)])
    assert final.logprobs is not None
    assert final.token_ids is not None
    count = len(final.token_ids)
    offsets = [offset - len(PROMPT.text) for offset in final.logprobs["text_offset"]]
    assert final.token_ids == drawn[:count]
    assert final.logprobs["tokens"] == [SPELLER.spell(i) for i in drawn[:count]]
    for number, offset in enumerate(offsets):
        if number < len(visible) and visible[number]:
            assert offset == by_byte[starts[number]]
    assert offsets == sorted(offsets)
    if isinstance(end.stop, str):
        # What is listed begins in the text, and what is not begins behind it.
        assert all(offset < len(final.text) for offset in offsets)
        left = [by_byte[starts[i]] for i in range(count, len(visible)) if visible[i]]
        assert all(place >= len(final.text) for place in left)
    else:
        assert count == len(drawn)


def test_echo_begins_each_choice_with_the_prompt():
    request = request_of(echo=True, logprobs=0, n=2, return_token_ids=True)
    prompt = Prompt((2, *ids_of("ré")), "ré", is_bos_ours=True)
    scores = tuple(None if i == 0 else scored(t, -1.0) for i, t in enumerate(prompt.ids))
    pieces = list(writer_of(request, prompt).take(PromptScored(scores)))
    assert [piece.index for piece in pieces] == [0, 1]
    for piece in pieces:
        assert piece.text == "ré"
        assert piece.prompt_ids == list(prompt.ids)
        assert piece.logprobs is not None
        assert piece.logprobs["tokens"] == ["<bos>", *(SPELLER.spell(i) for i in prompt.ids[1:])]
        assert piece.logprobs["text_offset"] == [0, 0, 1]
        assert piece.logprobs["token_logprobs"] == [None, -1.0, -1.0]
        assert piece.logprobs["top_logprobs"][0] is None


def test_the_beginning_of_text_has_a_width_only_if_the_client_gave_it_and_sees_it():
    scores = (None, scored(ids_of("re")[0], -1.0))
    ids = (2, *ids_of("re"))
    for is_ours, skip, text, offsets in (
        (True, True, "re", [0, 0]),
        (True, False, "re", [0, 0]),
        (False, True, "re", [0, 0]),
        (False, False, "<bos>re", [0, 5]),
    ):
        request = request_of(echo=True, logprobs=0, skip_special_tokens=skip)
        prompt = Prompt(ids, text, is_bos_ours=is_ours)
        [piece] = writer_of(request, prompt).take(PromptScored(scores))
        assert piece.logprobs is not None
        assert piece.logprobs["text_offset"] == offsets


@pytest.mark.parametrize(
    ("reason", "status"), [("deadline", 504), ("error", 500), ("cancelled", 500)]
)
def test_what_was_broken_off_is_an_error(reason, status):
    with pytest.raises(Problem) as caught:
        list(writer_of(request_of(), PROMPT).take(Finished(0, reason, None, 0, None)))
    assert caught.value.status == status
