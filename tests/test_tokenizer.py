"""The tokenizer against what the original made of five hundred texts, and against itself.

`golden/tokenizer.json.gz` was recorded from Gemma 3's own `tokenizer.json` with the library
`tokenizers` alone, see `golden/make_tokenizer_golden.py`. The vocabulary under test is the real
one, from the embedded model's GGUF file; only tests of `from_file` use the small synthetic one.
"""

import gzip
import json
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from refimpl_weights import embedded, synthetic_tokenizer
from refimpl_weights.gguf import GGUFFile

from refimpl.errors import TokenizerError
from refimpl.model.tokenizer import FillInTheMiddleIds, Tokenizer

GOLDEN = Path(__file__).parent / "golden" / "tokenizer.json.gz"
CONTROL = {
    "<pad>": 0,
    "<eos>": 1,
    "<bos>": 2,
    "<unk>": 3,
    "<start_of_turn>": 105,
    "<end_of_turn>": 106,
    "<start_of_image>": 255999,
    "<end_of_image>": 256000,
}
# In Hugging Face's file only: it has an id beyond the model's rows.
IMAGE = "<image_soft_token>"

Case = dict[str, Any]


@pytest.fixture(scope="module")
def golden() -> list[Case]:
    return json.loads(gzip.decompress(GOLDEN.read_bytes()))["cases"]


@pytest.fixture(scope="module")
def metadata() -> Mapping[str, Any]:
    return GGUFFile(embedded.assemble()).metadata


@pytest.fixture(scope="module")
def gemma(metadata: Mapping[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_gguf(metadata, cache_dir=tmp_path_factory.mktemp("merges"))


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tokenizer.json"
    path.write_text(json.dumps(synthetic_tokenizer.tokenizer_json()))
    return path


@pytest.fixture(scope="module")
def tiny(tiny_file: Path) -> Tokenizer:
    return Tokenizer.from_file(tiny_file)


def differences(tokenizer: Tokenizer, cases: list[Case], field: str, **options: bool) -> list[str]:
    """What a reader needs to see of every text whose ids are not the recorded ones."""
    lines = []
    for case in cases:
        expected = case.get(field, case["ids"])
        got = tokenizer.encode(case["text"], **options)
        if got != expected:
            lines.append(
                f"{case['text']!r}\n  got      {got} {[tokenizer.piece(i) for i in got]}\n"
                f"  expected {expected} {[tokenizer.piece(i) for i in expected]}"
            )
    return lines


def test_golden_texts_are_many(golden: list[Case]) -> None:
    """The file is what the other tests take it to be: not cut short, not one kind of text."""
    assert len(golden) == 525
    assert sum(len(case["ids"]) for case in golden) == 8021
    assert len({i for case in golden for i in case["ids"]}) > 2000
    assert sum("parsed" in case for case in golden) == 27


def test_text_becomes_the_ids_of_the_original(gemma: Tokenizer, golden: list[Case]) -> None:
    assert differences(gemma, golden, "ids") == []


def test_parsed_text_becomes_the_ids_of_the_original(gemma: Tokenizer, golden: list[Case]) -> None:
    # The original puts a second <bos> before one that is in the text. We do not: tested below.
    cases = [
        case
        for case in golden
        if IMAGE not in case["text"] and not case["text"].startswith("<bos>")
    ]
    assert sum("parsed" in case for case in cases) == 20
    assert differences(gemma, cases, "parsed", parse_special=True) == []


def test_ids_become_the_text_of_the_original(gemma: Tokenizer, golden: list[Case]) -> None:
    for case in golden:
        expected = case.get("decoded", case["text"])
        assert expected == case["text"].replace("▁", " ")  # Nothing else is lost on the way.
        assert gemma.decode(case["ids"], skip_special=True) == expected
        assert gemma.decode(case["ids"]) == "<bos>" + expected


def test_merges_do_what_sentencepiece_does(metadata: Mapping[str, Any], golden: list[Case]) -> None:
    """SentencePiece's rule, spelled out: unite the best scored pair, the leftmost if they tie."""
    pieces = [token.replace(" ", "▁") for token in metadata["tokenizer.ggml.tokens"]]
    types = metadata["tokenizer.ggml.token_type"]
    ids = {piece: i for i, piece in enumerate(pieces)}
    scores = {
        piece: score if kind == 1 else 0.0
        for piece, score, kind in zip(pieces, metadata["tokenizer.ggml.scores"], types, strict=True)
        if kind in (1, 4)
    }
    verbatim = [p for p, kind in zip(pieces, types, strict=True) if kind in (3, 4)]
    verbatim = sorted(set(verbatim) - CONTROL.keys(), key=len, reverse=True)
    pattern = re.compile("(" + "|".join(map(re.escape, verbatim)) + ")")

    def unite(symbols: list[str]) -> list[str]:
        while True:
            unions = [left + right for left, right in pairwise(symbols)]
            known = [place for place, union in enumerate(unions) if union in scores]
            if not known:
                return symbols
            best = max(known, key=lambda place: (scores[unions[place]], -place))
            symbols[best : best + 2] = [unions[best]]

    for case in golden:
        expected = [2]
        for place, part in enumerate(pattern.split(case["text"])):
            for symbol in [part] if place % 2 else unite(list(part.replace(" ", "▁"))):
                spelled = [symbol] if symbol in ids else [f"<0x{b:02X}>" for b in symbol.encode()]
                expected += [ids[piece] for piece in spelled]
        assert case["ids"] == expected, case["text"]


def test_example_of_the_module_docstring(gemma: Tokenizer) -> None:
    ids = gemma.encode("Hello <b>world</b>\n\n")
    pieces = ["<bos>", "Hello", "▁", "<b>", "world", "</b>", "\n\n"]
    assert [gemma.piece(i) for i in ids] == pieces
    assert [gemma.piece(i) for i in gemma.encode("Hello world")] == ["<bos>", "Hello", "▁world"]


def test_roles_of_ids(gemma: Tokenizer) -> None:
    assert gemma.vocab_size == 262_144
    assert (gemma.bos_id, gemma.pad_id, gemma.unk_id) == (2, 0, 3)
    assert gemma.eos_ids == (1,)  # Pretrained: it ends no turns.
    assert gemma.special_ids == set(CONTROL.values())
    assert [i for i in range(300) if gemma.is_special(i)] == [0, 1, 2, 3, 105, 106]
    assert gemma.fill_in_the_middle is None


@pytest.mark.parametrize("spelling", CONTROL)
def test_control_piece_is_text_unless_asked_for(gemma: Tokenizer, spelling: str) -> None:
    plain = gemma.encode(f"a{spelling}b", add_bos=False)
    assert not gemma.special_ids & set(plain)
    assert gemma.decode(plain) == f"a{spelling}b"
    a, b = gemma.encode("a", add_bos=False), gemma.encode("b", add_bos=False)
    parsed = gemma.encode(f"a{spelling}b", add_bos=False, parse_special=True)
    assert parsed == [*a, CONTROL[spelling], *b]


FRAGMENTS = (
    *CONTROL,
    "<",
    ">",
    "<b>",
    "\n",
    " ",
    "▁",
    "bos",
    "_of_",
    "<unused5>",
    "turn",
    "\ufeff",
)


@given(parts=st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=4), max_size=12))
@settings(deadline=None)
def test_no_text_becomes_a_control_piece(gemma: Tokenizer, parts: list[str]) -> None:
    text = "".join(parts)
    ids = gemma.encode(text)
    assert ids[0] == 2
    assert not gemma.special_ids & set(ids[1:])
    assert gemma.decode(ids, skip_special=True) == text.replace("▁", " ")


def test_begin_comes_exactly_once(gemma: Tokenizer) -> None:
    assert gemma.encode("") == [2]
    assert gemma.encode("", add_bos=False) == []
    hello = gemma.encode("Hello", add_bos=False)
    assert gemma.encode("Hello") == [2, *hello]
    assert gemma.encode("<bos>Hello", parse_special=True) == [2, *hello]
    assert gemma.encode("<bos>Hello", parse_special=True, add_bos=False) == [2, *hello]
    assert gemma.encode("<bos>") != [2]  # Text: the five characters.


@pytest.mark.parametrize("text", ["\ud800", "a\udc00b", "ok \ud83d"])
def test_lone_surrogate_is_refused(gemma: Tokenizer, text: str) -> None:
    place = next(i for i, char in enumerate(text) if "\ud800" <= char <= "\udfff")
    message = rf"lone surrogate, U\+{ord(text[place]):04X}, at character {place}, .* Mend"
    with pytest.raises(TokenizerError, match=message):
        gemma.encode(text)


@pytest.mark.parametrize("token_id", [-1, 262_144, 2**31, 2**70])
def test_id_outside_of_the_vocabulary_is_refused(gemma: Tokenizer, token_id: int) -> None:
    message = f"id {token_id} has no piece, expected one of 0 to 262143"
    for use in (gemma.piece, gemma.piece_bytes, lambda i: gemma.decode([2, i])):
        with pytest.raises(TokenizerError, match=message):
            use(token_id)


@pytest.mark.parametrize(
    ("token_id", "piece", "data"),
    [
        (2, "<bos>", b"<bos>"),
        (107, "\n", b"\n"),
        (138, "▁▁", b"  "),
        (185, "<h2>", b"<h2>"),
        (238, "<0x00>", b"\x00"),
        (493, "<0xFF>", b"\xff"),
        (494, "▁t", b" t"),
        (255_968, "\t", b"\t"),
        (236_743, "▁", b" "),
        (107_068, ">▁</", b"> </"),
        (237_922, "\ufeff", b"\xef\xbb\xbf"),
    ],
)
def test_piece_and_its_bytes(gemma: Tokenizer, token_id: int, piece: str, data: bytes) -> None:
    assert gemma.piece(token_id) == piece
    assert gemma.piece_bytes(token_id) == data


def test_the_256_byte_pieces_are_all_bytes(gemma: Tokenizer) -> None:
    assert [gemma.piece_bytes(i) for i in range(238, 494)] == [bytes([b]) for b in range(256)]


def test_bytes_that_are_no_character(gemma: Tokenizer) -> None:
    """C0, AF and F4 cannot go on as they do, E2 82 could have become a character: 1 each."""
    data = b"a\xc0\xaf\xf4z\xe2\x82\xe2\x82\xacb"
    ids = [238 + byte for byte in data]
    assert gemma.decode(ids) == "a\ufffd\ufffd\ufffdz\ufffd€b"


def test_special_pieces_between_bytes_can_be_left_out(gemma: Tokenizer) -> None:
    ids = [238 + 0xC3, 106, 238 + 0xA9]
    assert gemma.decode(ids, skip_special=True) == "é"
    assert gemma.decode(ids) == "\ufffd<end_of_turn>\ufffd"


def test_a_file_written_from_the_gguf_gives_the_same_ids(
    gemma: Tokenizer, golden: list[Case], metadata: Mapping[str, Any], tmp_path: Path
) -> None:
    """Both constructions of the real vocabulary, the file's being the library's own writing."""
    content = json.loads(gemma.engine.to_str())
    flags = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    content["added_tokens"] += [
        {"id": i, "content": piece, "special": True, **flags} for piece, i in CONTROL.items()
    ]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    read = Tokenizer.from_file(path)
    assert differences(read, golden, "ids") == []
    assert read.special_ids == gemma.special_ids
    assert read.vocab_size == gemma.vocab_size
    assert [read.piece(i) for i in range(500)] == [gemma.piece(i) for i in range(500)]


TINY_FRAGMENTS = (
    "the ",
    " and",
    "return",
    "日本語",
    "<bos>",
    "<end_of_turn>",
    "<unused3>",
    "<mask>",
)


@given(text=st.lists(st.sampled_from(TINY_FRAGMENTS) | st.text(max_size=5)).map("".join))
@settings(deadline=None)
def test_file_is_obeyed_as_the_library_obeys_it(
    tiny: Tokenizer, tiny_file: Path, text: str
) -> None:
    library = tokenizers.Tokenizer.from_file(str(tiny_file))
    parsed = library.encode(text, add_special_tokens=False).ids
    assert tiny.encode(text, add_bos=False, parse_special=True) == parsed
    library.encode_special_tokens = True
    ids = library.encode(text, add_special_tokens=False).ids
    assert tiny.encode(text, add_bos=False) == ids
    assert tiny.decode(ids) == library.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize(
    ("config", "eos_ids", "expected"),
    [
        ({}, (), (1,)),
        ({"eos_token": "<eos>"}, (), (1,)),
        ({"eos_token": {"content": "<end_of_turn>"}}, (), (1, 6)),
        ({}, (6, 1), (1, 6)),
        ({"chat_template": "{{ bos_token }}"}, (), (1, 6)),
        ({}, (50,), (1, 50)),
    ],
)
def test_every_id_that_ends_a_text(
    tiny_file: Path, config: dict[str, Any], eos_ids: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    tokenizer = Tokenizer.from_file(tiny_file, tokenizer_config=config, eos_ids=eos_ids)
    assert tokenizer.eos_ids == expected


def test_config_may_name_other_pieces(tiny_file: Path) -> None:
    config = {"pad_token": "<unused0>", "bos_token": {"content": "<start_of_turn>"}}
    tokenizer = Tokenizer.from_file(tiny_file, tokenizer_config=config)
    assert tokenizer.piece(tokenizer.pad_id) == "<unused0>"
    assert tokenizer.encode("")[0] == synthetic_tokenizer.START_OF_TURN
    with pytest.raises(TokenizerError, match=r"512 pieces has no '<start>'"):
        Tokenizer.from_file(tiny_file, tokenizer_config={"bos_token": "<start>"})


def test_id_of_a_role_has_to_have_a_piece(tiny_file: Path) -> None:
    with pytest.raises(TokenizerError, match=r"id 512 has no piece, expected one of 0 to 511"):
        Tokenizer.from_file(tiny_file, eos_ids=[512])


def test_codegemma_has_pieces_for_a_gap(tmp_path: Path) -> None:
    content = synthetic_tokenizer.tokenizer_json()
    spellings = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|file_separator|>")
    vocabulary = content["model"]["vocab"]
    for index, spelling in enumerate(spellings):
        spare = f"<unused{index}>"
        vocabulary[spelling] = vocabulary.pop(spare)
        for entry in content["added_tokens"]:
            if entry["content"] == spare:
                entry["content"] = spelling  # Not marked as special, as in CodeGemma's own file.
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    tokenizer = Tokenizer.from_file(path)
    first = vocabulary["<|fim_prefix|>"]
    assert tokenizer.fill_in_the_middle == FillInTheMiddleIds(
        prefix=first, middle=first + 1, suffix=first + 2, file_separator=first + 3
    )
    gap = [first, first + 1, first + 2, first + 3]
    assert tokenizer.special_ids >= set(gap)
    assert not set(gap) & set(tokenizer.encode("".join(spellings)))
    assert tokenizer.encode("".join(spellings), add_bos=False, parse_special=True) == gap
