"""Streaming ids back to text: never half a character, and in the end what `decode` says."""

import json
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refimpl_weights import synthetic_tokenizer

from refimpl.errors import TokenizerError
from refimpl.model.detokenizer import IncrementalDecoder
from refimpl.model.tokenizer import Tokenizer

FIRST_BYTE = synthetic_tokenizer.pieces().index("<0x00>")
BYTE_IDS = st.integers(FIRST_BYTE, FIRST_BYTE + 255)
# The bytes that make up well and badly formed sequences; all 256 alike would seldom meet.
TELLING_BYTES = st.sampled_from(
    [FIRST_BYTE + b for b in b"a\x80\xbf\xc2\xe0\xa0\xe2\xed\xf0\x90\xf4"]
)
ALL_IDS = st.integers(0, synthetic_tokenizer.NUM_PIECES - 1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(json.dumps(synthetic_tokenizer.tokenizer_json()))
    return Tokenizer.from_file(path)


def byte_ids(data: bytes) -> list[int]:
    return [FIRST_BYTE + byte for byte in data]


def stream(decoder: IncrementalDecoder, ids: Iterable[int]) -> list[str]:
    return [*(decoder.push(i) for i in ids), decoder.flush()]


@given(ids=st.lists(TELLING_BYTES | BYTE_IDS | ALL_IDS, max_size=30), skip_special=st.booleans())
@settings(deadline=None, max_examples=300)
def test_stream_is_the_decoded_text(
    tokenizer: Tokenizer, ids: list[int], skip_special: bool
) -> None:
    decoder = IncrementalDecoder(tokenizer, skip_special=skip_special)
    assert "".join(stream(decoder, ids)) == tokenizer.decode(ids, skip_special=skip_special)


@given(text=st.text(max_size=20))
@settings(deadline=None)
def test_every_character_comes_with_its_last_byte(tokenizer: Tokenizer, text: str) -> None:
    decoder = IncrementalDecoder(tokenizer)
    for char in text:
        *first, last = byte_ids(char.encode())
        for held, token_id in enumerate(first, start=1):
            assert decoder.push(token_id) == ""
            assert decoder.pending == char.encode()[:held]
        assert decoder.push(last) == char
        assert decoder.pending == b""
    assert decoder.flush() == ""


@given(ids=st.lists(TELLING_BYTES, max_size=30))
@settings(deadline=None)
def test_at_most_three_bytes_are_held_back(tokenizer: Tokenizer, ids: list[int]) -> None:
    decoder = IncrementalDecoder(tokenizer)
    for token_id in ids:
        decoder.push(token_id)
        assert len(decoder.pending) <= 3  # The longest beginning of a character, of four bytes.


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"\xe2\x82\xac", ["", "", "€", ""]),
        (b"\xe2\x82", ["", "", "\ufffd"]),
        (b"\xe2\x82a", ["", "", "\ufffda", ""]),
        (b"\xff\xfe", ["\ufffd", "\ufffd", ""]),
        (b"\x80", ["\ufffd", ""]),
        (b"\xed\xa0\x80", ["", "", "\ufffd" * 3, ""]),  # A surrogate in UTF-8.
        (b"\xf0\x9f\x99\xf0\x9f\x99\x82", ["", "", "", "\ufffd", "", "", "🙂", ""]),
    ],
)
def test_when_text_becomes_certain(tokenizer: Tokenizer, data: bytes, expected: list[str]) -> None:
    assert stream(IncrementalDecoder(tokenizer), byte_ids(data)) == expected


def test_special_pieces_are_left_out_or_spelled(tokenizer: Tokenizer) -> None:
    ids = [synthetic_tokenizer.BOS, *byte_ids(b"\xc3"), synthetic_tokenizer.EOS, *byte_ids(b"\xa9")]
    assert stream(IncrementalDecoder(tokenizer), ids) == ["", "", "", "é", ""]
    spelled = stream(IncrementalDecoder(tokenizer, skip_special=False), ids)
    assert spelled == ["<bos>", "", "\ufffd<eos>", "\ufffd", ""]


def test_flush_begins_a_new_text(tokenizer: Tokenizer) -> None:
    decoder = IncrementalDecoder(tokenizer)
    assert stream(decoder, byte_ids(b"\xe2\x82")) == ["", "", "\ufffd"]
    assert stream(decoder, byte_ids(b"\xac!")) == ["\ufffd", "!", ""]


def test_unknown_id_changes_nothing(tokenizer: Tokenizer) -> None:
    decoder = IncrementalDecoder(tokenizer)
    decoder.push(FIRST_BYTE + 0xC3)
    with pytest.raises(TokenizerError, match=r"id 512 has no piece, expected one of 0 to 511"):
        decoder.push(512)
    assert decoder.push(FIRST_BYTE + 0xA9) == "é"


def test_nothing_is_decoded_twice(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def counted(token_id: int) -> bytes:
        asked.append(token_id)
        return b"\xe2\x82"  # Never a whole character: the worst there is to hold back.

    monkeypatch.setattr(tokenizer, "piece_bytes", counted)
    assert "".join(stream(IncrementalDecoder(tokenizer), range(300, 400))) == "\ufffd" * 100
    assert asked == list(range(300, 400))
