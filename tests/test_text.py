"""Text while it is generated: what is held back, for how long, and where a stop string ends it.

The reference decodes all tokens at once and looks at every place for every stop string. What must
have been shown at some point is what all its texts share, over all ways to go on.
"""

import importlib.util
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.machinery import SourceFileLoader
from types import FunctionType
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from refimpl_weights import synthetic_tokenizer

from refimpl.engine.text import Piece, StopStrings, TextAssembler
from refimpl.errors import TokenizerError
from refimpl.model.tokenizer import Tokenizer


class Pieces(Tokenizer):
    """Any pieces; the first ids are the 256 bytes."""

    def __init__(self, *more: bytes, special: bytes = b"<end>") -> None:
        self._pieces = [*(bytes([b]) for b in range(256)), *more, special]

    @property
    def special_ids(self) -> frozenset[int]:
        return frozenset([len(self._pieces) - 1])

    def piece_bytes(self, token_id: int) -> bytes:
        if not 0 <= token_id < len(self._pieces):
            raise TokenizerError(f"id {token_id} has no piece")
        return self._pieces[token_id]


BYTES = Pieces()
SPECIAL = 256


def tokens(chunks: Iterable[bytes]) -> tuple[Pieces, list[int]]:
    """A tokenizer with these pieces, and their ids in a row."""
    chunks = list(chunks)
    return Pieces(*chunks), list(range(256, 256 + len(chunks)))


def stream(assembler: TextAssembler, ids: Iterable[int]) -> list[Piece]:
    return [*(assembler.push(i) for i in ids), assembler.flush()]


def result(pieces: Iterable[Piece]) -> tuple[str, str | None]:
    """The whole text, and the stop string that ended it."""
    pieces = list(pieces)
    stops = [piece.stop for piece in pieces if piece.stop is not None]
    assert len(stops) <= 1, "a text ends once"
    return "".join(piece.text for piece in pieces), (stops or [None])[0]


def cut(text: str, stops: Iterable[str], *, include: bool = False) -> tuple[str, str | None]:
    """The reference: of all occurrences that which ends first, and among those the longest."""
    stops = sorted([stop for stop in stops if stop in text], key=len, reverse=True)
    for end in range(len(text) + 1):
        for stop in stops:
            if text[:end].endswith(stop):
                return text[: end if include else end - len(stop)], stop
    return text, None


def common_beginning(texts: Sequence[str]) -> str:
    """What all texts begin with; the least and the greatest have no more in common than all."""
    least, greatest = min(texts), max(texts)
    pairs = enumerate(zip(least, greatest, strict=False))
    return least[: next((end for end, (one, other) in pairs if one != other), len(least))]


def compositions(data: bytes) -> Iterator[list[bytes]]:
    """All ways to split it into tokens."""
    for cuts in itertools.product([False, True], repeat=len(data) - 1):
        places = [0, *(place for place, is_cut in enumerate(cuts, start=1) if is_cut), len(data)]
        yield [data[a:b] for a, b in itertools.pairwise(places)]


# Nothing held back that is certain, nothing shown that is not.


def certain(
    data: bytes, alphabet: bytes, ahead: int, stops: Sequence[str], *, include: bool
) -> Iterator[tuple[bytes, str]]:
    """What all texts that begin with `data` share, and the same for all beginnings they have."""
    shared = [cut(data.decode(errors="replace"), stops, include=include)[0]]
    if ahead:
        for byte in alphabet:
            inner = list(certain(data + bytes([byte]), alphabet, ahead - 1, stops, include=include))
            yield from inner
            shared.append(inner[-1][1])
    yield data, common_beginning(shared)


def assert_minimal(
    alphabet: bytes, length: int, ahead: int, stops: Sequence[str], *, include: bool = False
) -> int:
    """Compare all texts of a length, byte by byte; returns how many beginnings were compared.

    Args:
        alphabet: bytes of the texts. With those of the stop strings they make up what may follow.
        length: of a text.
        ahead: bytes to look ahead.
        stops: end the text.
        include: leave them in it.
    """
    alphabet = bytes({*alphabet, *"".join(stops).replace("\ufffd", "").encode()})
    expected = dict(certain(b"", alphabet, length + ahead, stops, include=include))
    automaton = StopStrings(stops)
    for text in itertools.product(alphabet, repeat=length):
        assembler = TextAssembler(BYTES, automaton, include_stop=include)
        shown = ""
        for end, byte in enumerate(text, start=1):
            shown += assembler.push(byte).text
            assert shown == expected[bytes(text[:end])], (stops, text[:end])
        shown += assembler.flush().text
        assert shown == cut(bytes(text).decode(errors="replace"), stops, include=include)[0]
    return length * len(alphabet) ** length


SHORT = ["".join(letters) for n in (1, 2, 3) for letters in itertools.product("ab", repeat=n)]


@pytest.mark.parametrize("first", SHORT)
def test_hold_back_is_minimal_for_every_pair_of_short_stops(first: str) -> None:
    """A stop string of three characters needs two more to come to a difference."""
    for second in SHORT[SHORT.index(first) :]:
        assert assert_minimal(b"abc", 3, 2, [first, second]) == 81


def test_hold_back_is_minimal_for_longer_and_more_stops() -> None:
    for stops in (
        ["abab"], ["aaaa"], ["aab", "aba", "baa"], ["abba", "bb"], ["abba", "ba", "bba"],
        ["aabb", "ab", "bab"], ["abaab", "b"], ["aaaab", "aab"], ["abaa", "ab"], ["bbbb", "abb"],
    ):  # fmt: skip
        assert assert_minimal(b"ab", 6, 4, stops) == 384


@pytest.mark.parametrize(
    "stops",
    [
        ["aé"], ["é"], ["a\ufffd"], ["\ufffd"], ["\ufffda"], ["\ufffd\ufffd"], ["aéa", "a\ufffda"],
        ["aé", "a\ufffda"], ["aaé"], ["aaé", "aa"], ["aà", "aé"], ["ab"], ["aab", "aÄ"], ["éé"],
        ["é\ufffd", "éé"], ["éa\ufffd", "aé"], ["\ufffdé", "éaa"], ["aaa", "éa"], ["éaab", "aa"],
        ["aa", "a\ufffdéa", "é"],
    ],
)  # fmt: skip
def test_hold_back_is_minimal_within_characters(stops: list[str]) -> None:
    """Of "é" there is a first byte, with which "ab" cannot go on, but "aà" can."""
    assert assert_minimal(b"a\xc3\xa9", 3, 4, stops) > 0


@pytest.mark.parametrize(
    "stops", [["a€"], ["a\ufffd"], ["a₭"], ["ab"], ["€€"], ["\ufffda€", "€a"], ["a\ufffd€"]]
)
def test_hold_back_is_minimal_within_longer_characters(stops: list[str]) -> None:
    assert assert_minimal(b"a\xe2\x82\xac", 3, 4, stops) > 0


@pytest.mark.parametrize("stops", [["aba", "bb"], ["aé"], ["a\ufffd", "é"], ["ab", "a"]])
def test_included_stops_hold_back_nothing(stops: list[str]) -> None:
    """Whether they come or not, their beginning stays."""
    assert assert_minimal(b"ab\xc3\xa9", 4, 3, stops, include=True) == 1024


@given(
    text=st.text("aab", max_size=16),
    stops=st.lists(st.text("ab", min_size=1, max_size=8), min_size=1, max_size=4),
    include=st.booleans(),
)
@settings(deadline=None, max_examples=250)
@example(text="aabaabaab", stops=["aabaabaac", "baab"], include=False)
def test_hold_back_is_minimal(text: str, stops: list[str], include: bool) -> None:
    """To become a stop string, the text needs no more than one end of one of them."""
    ends = ["c", *(stop[begin:] for stop in stops for begin in range(len(stop)))]
    assembler = TextAssembler(BYTES, StopStrings(stops), include_stop=include)
    shown = ""
    for end in range(1, len(text) + 1):
        shown += assembler.push(ord(text[end - 1])).text
        continued = [text[:end] + more for more in ("", *ends)]
        texts = [cut(whole, stops, include=include)[0] for whole in continued]
        assert shown == common_beginning(texts)


# Every split.

MIXED = "é€🙂"


@pytest.mark.parametrize(
    ("before", "stop", "after"),
    [
        ("ab", "STOP", "cd"),
        ("", "\n\n", "x"),
        ("aa", "aab", "a"),  # The text begins a match that fails, within which the match begins.
        ("", MIXED, ""),
        ("é", "🙂", "é"),
        ("x\u00c3", "é", ""),
        ("1\ufffd", "\ufffd2", ""),
    ],
)
@pytest.mark.parametrize("include", [False, True])
def test_every_split_of_a_stop_string(before: str, stop: str, after: str, include: bool) -> None:
    data = (before + stop + after).encode()
    expected = before + stop if include else before
    for chunks in compositions(data):
        tokenizer, ids = tokens(chunks)
        assembler = TextAssembler(tokenizer, StopStrings([stop]), include_stop=include)
        assert result(stream(assembler, ids)) == (expected, stop)


@pytest.mark.parametrize(
    "character", [*"\0a\x7f\x80é\u07ff\u0800€\ud7ff\ue000\uffff", *"𐀀🙂\U0010ffff"]
)
@pytest.mark.parametrize("stops", [[], ["xy"], ["x\ufffd"], ["«»"]])
def test_every_split_of_a_character(character: str, stops: list[str]) -> None:
    """The text before it is there in time, and the character with its last byte."""
    for chunks in compositions(character.encode()):
        tokenizer, ids = tokens([b"w", *chunks])
        pieces = stream(TextAssembler(tokenizer, StopStrings(stops)), ids)
        inner = [""] * (len(chunks) - 1)
        assert [piece.text for piece in pieces] == ["w", *inner, character, ""]


@pytest.mark.parametrize("stops", [["xy"], ["x\ufffdz"], ["xé"]])
def test_text_that_waits_is_given_up_when_it_must(stops: list[str]) -> None:
    """What "x" waits for: an "y", a broken character, or one that begins as "é" does."""
    pieces = stream(TextAssembler(BYTES, StopStrings(stops)), b"x\xe2\x82\xac")
    expected = {
        "xy": ["", "x", "", "€", ""],
        "x\ufffdz": ["", "", "", "x€", ""],
        "xé": ["", "x", "", "€", ""],
    }
    assert [piece.text for piece in pieces] == expected[stops[0]]


CHUNKS = st.lists(st.sampled_from(
    [b"a", b"b", b"ab", b"ba", b"aab", "é".encode(), b"\xc3", b"\xa9", b"a\xc3", b"\xa9b", b"",
     b"\xe2\x82", b"\xac\xf0", b"\x9f\x99\x82", "🙂".encode()]
), max_size=12)  # fmt: skip


@given(
    chunks=CHUNKS,
    stops=st.lists(st.text("abé€🙂\ufffd", min_size=1, max_size=5), max_size=4),
    include=st.booleans(),
)
@settings(deadline=None, max_examples=300)
def test_the_stream_is_the_text_cut_at_the_first_stop(
    chunks: list[bytes], stops: list[str], include: bool
) -> None:
    tokenizer, ids = tokens(chunks)
    assembler = TextAssembler(tokenizer, StopStrings(stops), include_stop=include)
    whole = tokenizer.decode(ids)
    assert result(stream(assembler, ids)) == cut(whole, stops, include=include)


# Which stop string.


@pytest.mark.parametrize(
    ("stops", "text", "expected"),
    [
        (["b", "abc"], "xabc", ("xa", "b")),  # Ends first, though the other begins first.
        (["abc", "b"], "xabc", ("xa", "b")),
        (["c", "abc"], "xabc", ("x", "abc")),  # Both end here; the longer begins first.
        (["abc", "bc", "c"], "xabc", ("x", "abc")),
        (["bc", "c"], "xabc", ("xa", "bc")),
        (["two", "one"], "one two", ("", "one")),  # Not the first of the list.
        (["aa"], "baaa", ("b", "aa")),
        (["a", "a"], "ba", ("b", "a")),
        (["abcd", "bd"], "abd", ("a", "bd")),
        (["abcd", "bce", "c"], "abcd", ("ab", "c")),
        ([], "abc", ("abc", None)),
    ],
)
def test_which_stop_ends_the_text(
    stops: list[str], text: str, expected: tuple[str, str | None]
) -> None:
    assert cut(text, stops) == expected
    for chunks in compositions(text.encode()):
        tokenizer, ids = tokens(chunks)
        assert result(stream(TextAssembler(tokenizer, StopStrings(stops)), ids)) == expected


def test_a_stop_within_a_token_cuts_it() -> None:
    tokenizer, ids = tokens([b"one", b" tw", b"o. three", b" four"])
    for include, text in [(False, "o"), (True, "o.")]:
        assembler = TextAssembler(tokenizer, StopStrings([".", "two!"]), include_stop=include)
        pieces = stream(assembler, ids)
        assert pieces[2].stop == "."
        assert result(pieces) == (f"one tw{text}", ".")


def test_after_a_stop_comes_nothing() -> None:
    assembler = TextAssembler(BYTES, StopStrings(["b"]))
    assert [assembler.push(i) for i in b"ab"] == [("a", None), ("", "b")]
    assert [assembler.push(i) for i in b"ab\xc3"] == [("", None)] * 3
    assert assembler.flush() == ("", None)


def test_after_the_end_comes_nothing() -> None:
    assembler = TextAssembler(BYTES, StopStrings(["ab"]))
    assert assembler.push(ord("a")) == ("", None)
    assert assembler.flush() == ("a", None)
    assert assembler.push(ord("b")) == ("", None)
    assert assembler.flush() == ("", None)


@pytest.mark.parametrize("include", [False, True])
def test_a_broken_character_at_the_end_can_complete_a_stop(include: bool) -> None:
    assembler = TextAssembler(BYTES, StopStrings(["a\ufffd"]), include_stop=include)
    pieces = stream(assembler, b"xa\xe2\x82")
    assert [piece.stop for piece in pieces] == [None, None, None, None, "a\ufffd"]
    assert result(pieces)[0] == ("xa\ufffd" if include else "x")


def test_a_broken_character_at_the_end_can_begin_a_stop() -> None:
    assert stream(TextAssembler(BYTES, StopStrings(["\ufffda"])), b"x\xe2")[-1] == ("\ufffd", None)


def test_choices_share_the_stops() -> None:
    stops = StopStrings(["abc"])
    one, two = TextAssembler(BYTES, stops), TextAssembler(BYTES, stops)
    assert [a.push(ord(c)) for a, c in [(one, "a"), (two, "b"), (one, "b"), (two, "c")]] == [
        ("", None), ("b", None), ("", None), ("c", None),
    ]  # fmt: skip
    assert one.push(ord("c")) == ("", "abc")


# Special tokens and strange ids.


def test_skipped_special_tokens_are_part_of_nothing() -> None:
    stops = StopStrings(["<end>", "ab"])
    assert result(stream(TextAssembler(BYTES, stops), [*b"xa", SPECIAL, *b"c"])) == ("xac", None)
    # The text is "xab", in which there is a stop string.
    assert result(stream(TextAssembler(BYTES, stops), [*b"xa", SPECIAL, *b"b"])) == ("x", "ab")
    # Typed out, it is text like any other.
    assert result(stream(TextAssembler(BYTES, stops), b"x<end>")) == ("x", "<end>")


def test_special_tokens_that_are_spelt_are_text() -> None:
    assembler = TextAssembler(BYTES, StopStrings(["a<e"]), skip_special=False)
    assert stream(assembler, [*b"xa", SPECIAL])[-2:] == [("", "a<e"), ("", None)]
    assembler = TextAssembler(BYTES, StopStrings(["!"]), skip_special=False)
    assert result(stream(assembler, [*b"xa", SPECIAL])) == ("xa<end>", None)


def test_a_skipped_token_within_a_character_changes_nothing() -> None:
    pieces = stream(TextAssembler(BYTES, StopStrings(["é!"])), [0xC3, SPECIAL, SPECIAL, 0xA9, 33])
    assert pieces[-2:] == [("", "é!"), ("", None)]


def test_an_id_without_piece_does_not_disturb_the_text() -> None:
    assembler = TextAssembler(BYTES, StopStrings(["a\u00e9"]))
    assert [assembler.push(i) for i in b"a\xc3"] == [("", None)] * 2
    with pytest.raises(TokenizerError, match="id 257 has no piece"):
        assembler.push(257)
    assert assembler.push(0xA9) == ("", "aé")


# Time.


@pytest.fixture(scope="module")
def plain() -> Any:
    """The module without the checks of types that tests run under, whose lines are many."""
    path = importlib.import_module("refimpl.engine.text").__file__
    spec = importlib.util.spec_from_loader("plain", SourceFileLoader("plain", str(path)))
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    assert spec.loader is not None
    spec.loader.exec_module(module)
    return module


def lines_run(plain: Any, stops: list[str], data: Iterable[int]) -> int:
    """Lines that a text takes, once its stop strings have been read."""
    assembler = plain.TextAssembler(BYTES, plain.StopStrings(stops))
    monitoring, count = sys.monitoring, itertools.count()
    lines, tool = monitoring.events.LINE, monitoring.PROFILER_ID
    monitoring.use_tool_id(tool, "lines_run")
    monitoring.register_callback(tool, lines, lambda *_: next(count) and None)
    for function in (*vars(plain.TextAssembler).values(), *vars(plain.StopStrings).values()):
        if isinstance(function, FunctionType):
            monitoring.set_local_events(tool, function.__code__, lines)
    try:
        for byte in data:
            assembler.push(byte)
    finally:
        monitoring.free_tool_id(tool)
    return next(count)


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("a{n}b", "a"),  # Held back for ever.
        ("a{n}b", "a" * 19 + "c"),  # Held back, and given up.
        ("a{n}b", "aé"),
        ("é{n}b", "é"),
        ("\ufffd{n}b", "\udce2"),  # A byte that is always the first of a character.
        ("\ufffd{n}b", "\udce2\udc82a"),
        ("b{n}c", "bé"),
    ],
)
def test_time_is_proportional_to_the_text(plain: Any, stop: str, text: str) -> None:
    """Also if a string of 2,000 characters is found to be no beginning again and again."""
    data = text.encode(errors="surrogateescape") * (4000 // len(text))
    long = stop.replace(stop[0] + "{n}", stop[0] * 2000)
    # A string with another one inside is never found, and must cost no more for it.
    for stops in ([long], [long + "c", "b"]):
        assert len(data) <= lines_run(plain, stops, data) < 40 * len(data)


def test_all_suffixes_are_tried_once(plain: Any) -> None:
    """After 9,999 characters that match comes one that does not, and 9,999 suffixes fail."""
    text = ("a" * 9_999 + "c") * 2
    assert len(text) <= lines_run(plain, ["a" * 10_000], text.encode()) < 40 * len(text)


def test_tokens_without_text_take_no_time(plain: Any) -> None:
    """Within a character, what is no beginning of a stop string is found to be none once."""
    ids = [*b"a" * 2000, 0xE2, *[SPECIAL] * 2000]
    assert len(ids) <= lines_run(plain, ["a" * 2000 + "b"], ids) < 40 * len(ids)


# A real tokenizer.


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(json.dumps(synthetic_tokenizer.tokenizer_json()))
    return Tokenizer.from_file(path)


STORY = "def ret(self):\n    return self.日本語 = 'Gruß 🙂 žluť'\n\nthe end of the story"


@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        (["\n\n"], "def ret(self):\n    return self.日本語 = 'Gruß 🙂 žluť'"),
        (["本"], "def ret(self):\n    return self.日"),
        ([" 🙂 ž"], "def ret(self):\n    return self.日本語 = 'Gruß"),
        (["urn self!", "ť'\n\nthe e"], "def ret(self):\n    return self.日本語 = 'Gruß 🙂 žlu"),
        (["the end of the story."], STORY),
    ],
)
def test_a_text_of_the_tokenizer(tokenizer: Tokenizer, stops: list[str], expected: str) -> None:
    ids = [*tokenizer.encode(STORY), *tokenizer.eos_ids]
    pieces = stream(TextAssembler(tokenizer, StopStrings(stops)), ids)
    found = next((stop for stop in stops if stop in STORY), None)
    assert result(pieces) == (expected, found)
    assert expected == cut(tokenizer.decode(ids, skip_special=True), stops)[0]


@given(
    ids=st.lists(st.integers(0, synthetic_tokenizer.NUM_PIECES - 1), max_size=30),
    begin=st.integers(0, 40),
    length=st.integers(1, 8),
    skip=st.booleans(),
)
@settings(deadline=None, max_examples=200)
def test_any_ids_and_any_stop_that_occurs_in_them(
    tokenizer: Tokenizer, ids: list[int], begin: int, length: int, skip: bool
) -> None:
    whole = tokenizer.decode(ids, skip_special=skip)
    stops = [whole[begin : begin + length]] if whole[begin : begin + length] else []
    assembler = TextAssembler(tokenizer, StopStrings(stops), skip_special=skip)
    assert result(stream(assembler, ids)) == cut(whole, stops)
