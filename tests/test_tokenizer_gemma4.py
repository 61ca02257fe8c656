"""Gemma 4's tokenizer: the real vocabulary against two originals, and what a file may get wrong.

`golden/tokenizer_gemma4.json.gz` holds llama.cpp's published test vectors, and what Hugging Face's
tokenizer made of six hundred texts; see `golden/make_tokenizer_gemma4_golden.py`. The vocabulary
under test is the whole one of 262,144 pieces. It is made of Gemma 3's, from the embedded model's
GGUF file, and checked against the digests of the published file.
"""

import gzip
import hashlib
import json
import re
from collections.abc import Iterable
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from refimpl_weights import embedded, synthetic_tokenizer
from refimpl_weights.gguf import GGUFFile

from refimpl.errors import TokenizerError
from refimpl.model.detokenizer import IncrementalDecoder
from refimpl.model.merges import derive_merges
from refimpl.model.tokenizer import Tokenizer
from refimpl.model.vocabulary import build_engine
from refimpl.model.vocabulary_gguf import read_gguf_vocabulary

GOLDEN = Path(__file__).parent / "golden" / "tokenizer_gemma4.json.gz"
SPARE_IN_GEMMA3 = re.compile(r"<unused\d+>|<(start|end)_of_(turn|image)>")
NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 3, 4, 6
TURN, TURN_END, TOOL_RESPONSE = 105, 106, 50

Metadata = dict[str, Any]
Case = dict[str, Any]


def digest(strings: Iterable[str]) -> str:
    return hashlib.sha256("".join(f"{string}\0" for string in strings).encode()).hexdigest()


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return json.loads(gzip.decompress(GOLDEN.read_bytes()))


@pytest.fixture(scope="module")
def metadata(golden: dict[str, Any]) -> Metadata:
    """The header of Gemma 4's file, without its chat template."""
    gemma3 = GGUFFile(embedded.assemble()).metadata
    special = {i: (spelling, kind) for i, spelling, kind in golden["special"]}
    number = count()
    tokens, types = list[str](), list[int]()
    for i, piece in enumerate(gemma3["tokenizer.ggml.tokens"]):
        is_spare = SPARE_IN_GEMMA3.fullmatch(piece) is not None
        normal = f"<unused{next(number)}>" if is_spare and i not in special else piece
        spelling, kind = special.get(i, (normal.replace(" ", "▁"), NORMAL))
        tokens.append(spelling)
        types.append(BYTE if re.fullmatch("<0x..>", spelling) else kind)
    return {
        "general.architecture": "gemma4",
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-1000.0] * len(tokens),
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges_of_gemma3(gemma3),
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.mask_token_id": 4,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.add_bos_token": True,
    }


def merges_of_gemma3(metadata: Any) -> list[str]:
    pieces = [piece.replace(" ", "▁") for piece in metadata["tokenizer.ggml.tokens"]]
    types, scores = metadata["tokenizer.ggml.token_type"], list(metadata["tokenizer.ggml.scores"])
    mergeable = {p: i for i, p in enumerate(pieces) if types[i] in (NORMAL, USER_DEFINED)}
    for i, kind in enumerate(types):
        scores[i] = scores[i] if kind == NORMAL else 0.0
    left, right = derive_merges(mergeable, scores).T.tolist()
    return [f"{pieces[i]} {pieces[j]}" for i, j in zip(left, right, strict=True)]


@pytest.fixture(scope="module")
def gemma(metadata: Metadata) -> Tokenizer:
    return Tokenizer.from_gguf(metadata)


def differences(tokenizer: Tokenizer, cases: list[Case], field: str, **options: bool) -> list[str]:
    """What a reader needs to see of every text whose ids are not the recorded ones."""
    lines = []
    for case in cases:
        expected = case.get(field, case["ids"])
        got = tokenizer.encode(case["text"], add_bos=False, **options)
        if got != expected:
            lines.append(f"{case['text']!r}\n  got      {got}\n  expected {expected}")
    return lines


# The whole vocabulary


@pytest.mark.parametrize("key", ["general.architecture", "tokenizer.ggml.model"])
def test_pieces_that_merge_by_rank_are_not_merged_by_score(metadata: Metadata, key: str) -> None:
    """Ollama's converter names the older kind of vocabulary, under which ranks went unread."""
    other = {"general.architecture": "gemma3", "tokenizer.ggml.model": "llama"}[key]
    with pytest.raises(TokenizerError, match="merge by"):
        Tokenizer.from_gguf(metadata | {key: other})


def test_vocabulary_is_the_published_one(metadata: Metadata, golden: dict[str, Any]) -> None:
    """Also: what we derive for Gemma 3 is what Hugging Face's converter wrote for Gemma 4."""
    lists = {name: metadata[f"tokenizer.ggml.{name}"] for name in golden["sha256"]}
    assert len(lists["merges"]) == 514_906
    assert {name: digest(map(str, items)) for name, items in lists.items()} == golden["sha256"]


def test_golden_texts_are_many(golden: dict[str, Any]) -> None:
    """The file is what the other tests take it to be: not cut short, not one kind of text."""
    published, cases = golden["published"], golden["cases"]
    assert len(published) == 46
    assert sum(len(case["ids"]) for case in published) == 362
    assert len(cases) == 595
    assert sum("parsed" in case for case in cases) == 43
    assert sum(len(case["ids"]) for case in cases) == 9477
    assert len({i for case in cases for i in case["ids"]}) > 3000


def test_text_becomes_the_ids_that_llama_cpp_publishes(
    gemma: Tokenizer, golden: dict[str, Any]
) -> None:
    assert differences(gemma, golden["published"], "ids") == []


def test_text_becomes_the_ids_of_the_original(gemma: Tokenizer, golden: dict[str, Any]) -> None:
    assert differences(gemma, golden["cases"], "ids") == []


def test_parsed_text_becomes_the_ids_of_the_original(
    gemma: Tokenizer, golden: dict[str, Any]
) -> None:
    assert differences(gemma, golden["cases"], "parsed", parse_special=True) == []


def test_ids_become_the_text_of_the_original(gemma: Tokenizer, golden: dict[str, Any]) -> None:
    for case in golden["cases"]:
        expected = case.get("decoded", case["text"])
        assert expected == case["text"].replace("▁", " ")  # Nothing else is lost on the way.
        assert gemma.decode(case["ids"]) == expected
        decoder = IncrementalDecoder(gemma)
        assert "".join(map(decoder.push, case["ids"])) + decoder.flush() == expected


def test_merging_is_what_llama_cpp_does(metadata: Metadata, golden: dict[str, Any]) -> None:
    """Its rule, spelled out: runs of newlines apart and looked up whole, then the best pair."""
    ids = {piece: i for i, piece in enumerate(metadata["tokenizer.ggml.tokens"])}
    ranks = {merge: rank for rank, merge in enumerate(metadata["tokenizer.ggml.merges"])}

    def unite(symbols: list[str]) -> list[str]:
        while True:
            pairs = [ranks.get(f"{left} {right}", len(ranks)) for left, right in pairwise(symbols)]
            best = min(pairs, default=len(ranks))
            if best == len(ranks):
                return symbols
            place = pairs.index(best)
            symbols[place : place + 2] = ["".join(symbols[place : place + 2])]

    for case in golden["cases"]:
        expected: list[int] = []
        for part in re.findall(r"[^\n]+|\n+", case["text"].replace(" ", "▁")):
            is_known_run = part.startswith("\n") and part in ids
            for symbol in [part] if is_known_run else unite(list(part)):
                spelled = [symbol] if symbol in ids else [f"<0x{b:02X}>" for b in symbol.encode()]
                expected += [ids[piece] for piece in spelled]
        assert case["ids"] == expected, case["text"]


def test_no_piece_has_a_newline_and_something_else(metadata: Metadata) -> None:
    """This is why it does not matter whether a text is cut at its newlines."""
    with_newline = [piece for piece in metadata["tokenizer.ggml.tokens"] if "\n" in piece]
    assert with_newline == ["\n" * length for length in range(1, 32)]


@pytest.mark.parametrize("length", range(1, 41))
def test_runs_of_newlines(gemma: Tokenizer, length: int) -> None:
    """Of 1 to 31 one id each, 107 to 137; a longer run is one of 31 and the rest."""
    run = [106 + length] if length <= 31 else [137, 106 + length - 31]
    newlines = "\n" * length
    assert gemma.encode(newlines, add_bos=False) == run
    a, b = gemma.encode("a", add_bos=False), gemma.encode("b", add_bos=False)
    assert gemma.encode(f"a{newlines}b", add_bos=False) == [*a, *run, *b]
    assert gemma.decode(run) == newlines


def test_example_of_the_module_docstring(gemma: Tokenizer) -> None:
    ids = gemma.encode("Hello <b>world", add_bos=False)
    assert [gemma.piece(i) for i in ids] == ["Hello", "▁<", "b", ">", "world"]


def test_roles_of_ids(gemma: Tokenizer, golden: dict[str, Any]) -> None:
    assert gemma.vocab_size == 262_144
    assert (gemma.bos_id, gemma.pad_id, gemma.unk_id) == (2, 0, 3)
    assert gemma.special_ids == {i for i, _, _ in golden["special"]}
    assert [gemma.piece(i) for i in (TURN, TURN_END, TOOL_RESPONSE)] == [
        "<|turn>",
        "<turn|>",
        "<|tool_response>",
    ]
    assert gemma.fill_in_the_middle is None
    assert gemma.eos_ids == (1,)
    assert gemma.engine.get_added_tokens_decoder() == {}  # Nothing is looked up in the raw text.


def test_the_256_byte_pieces_are_all_bytes(gemma: Tokenizer) -> None:
    assert [gemma.piece_bytes(i) for i in range(238, 494)] == [bytes([b]) for b in range(256)]


def test_begin_comes_exactly_once(gemma: Tokenizer) -> None:
    turn = "<|turn>user\nHi<turn|>\n"
    ids = [TURN, 2364, 107, 10979, TURN_END, 107]
    assert gemma.encode("") == [2]
    assert gemma.encode(turn, parse_special=True) == [2, *ids]
    # As a chat template writes it, which brings its own.
    assert gemma.encode("<bos>" + turn, parse_special=True) == [2, *ids]


def test_a_template_is_text_unless_parsed(gemma: Tokenizer, golden: dict[str, Any]) -> None:
    for token_id, spelling, _ in golden["special"]:
        plain = gemma.encode(f"a{spelling}b", add_bos=False)
        assert not gemma.special_ids & set(plain)
        assert gemma.decode(plain) == f"a{spelling}b"
        assert gemma.encode(spelling, add_bos=False, parse_special=True) == [token_id]


FRAGMENTS = ("<|turn>", "<turn|>", "<|", "|>", "turn", "<bos>", "<", ">", "\n", "\n\n", " ", "<b>")


@given(parts=st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=4), max_size=12))
@settings(deadline=None)
def test_text_comes_back_and_is_never_control(gemma: Tokenizer, parts: list[str]) -> None:
    text = "".join(parts)
    ids = gemma.encode(text)
    assert ids[0] == 2
    assert not gemma.special_ids & set(ids[1:])
    assert gemma.decode(ids, skip_special=True) == text.replace("▁", " ")
    parsed = gemma.encode(text, parse_special=True)
    assert gemma.decode(parsed).removeprefix("<bos>") == text.replace("▁", " ").removeprefix(
        "<bos>"
    )


# A small one, through a file


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file of 512 pieces with everything as llama.cpp's converter of Gemma 4 writes it."""
    content = tiny_json()
    control = {entry["id"] for entry in content["added_tokens"]}
    pieces = list(content["model"]["vocab"])
    path = tmp_path_factory.mktemp("gguf") / "gemma4.gguf"
    writer = GGUFWriter(path, "gemma4")
    writer.add_tokenizer_model("gemma4")
    writer.add_token_list(pieces)
    writer.add_token_scores([-1000.0] * len(pieces))
    writer.add_token_types(
        [
            CONTROL if i in control else BYTE if piece.startswith("<0x") else NORMAL
            for i, piece in enumerate(pieces)
        ]
    )
    writer.add_token_merges([" ".join(merge) for merge in content["model"]["merges"]])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_add_space_prefix(False)
    writer.add_add_bos_token(True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def tiny_json() -> dict[str, Any]:
    """Contents of a `tokenizer.json` as Gemma 4 has it: only control pieces are added tokens."""
    content = synthetic_tokenizer.tokenizer_json()
    renamed = {
        "<start_of_turn>": "<|turn>",
        "<end_of_turn>": "<turn|>",
        "<unused0>": "<|tool_response>",
    }
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {renamed.get(p, p): i for p, i in vocabulary.items()}
    special = {"<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *renamed.values()}
    content["added_tokens"] = [
        {**entry, "content": piece, "special": True}
        for entry in content["added_tokens"]
        if (piece := renamed.get(entry["content"], entry["content"])) in special
    ]
    return content


@pytest.fixture
def tiny(tiny_file: Path) -> Metadata:
    """The header of the small file, to be changed."""
    return dict(GGUFFile(tiny_file).metadata)


@pytest.fixture(scope="module")
def tiny_both(
    tiny_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, Tokenizer]:
    path = tmp_path_factory.mktemp("json") / "tokenizer.json"
    path.write_text(json.dumps(tiny_json()))
    return Tokenizer.from_gguf(GGUFFile(tiny_file).metadata), Tokenizer.from_file(path)


@given(text=st.lists(st.sampled_from(["the ", "\n", "<bos>", *FRAGMENTS]) | st.text()).map("".join))
@settings(deadline=None)
def test_gguf_and_json_give_the_same_ids(tiny_both: tuple[Tokenizer, Tokenizer], text: str) -> None:
    from_gguf, from_json = tiny_both
    for parse_special in (False, True):
        ids = from_gguf.encode(text, parse_special=parse_special)
        assert ids == from_json.encode(text, parse_special=parse_special)


def test_gguf_and_json_agree_on_all_pieces(tiny_both: tuple[Tokenizer, Tokenizer]) -> None:
    from_gguf, from_json = tiny_both
    assert from_gguf.vocab_size == from_json.vocab_size == 512
    assert from_gguf.special_ids == from_json.special_ids
    assert len(from_gguf.special_ids) == 8
    assert [from_gguf.piece(i) for i in range(512)] == [from_json.piece(i) for i in range(512)]


@pytest.mark.parametrize("says", [True, False])
def test_begin_does_not_depend_on_the_file(tiny: Metadata, tmp_path: Path, says: bool) -> None:
    """Hugging Face's converter of Gemma 4 writes False, llama.cpp's True."""
    tiny["tokenizer.ggml.add_bos_token"] = says
    the = [2, tiny["tokenizer.ggml.tokens"].index("▁the")]
    assert Tokenizer.from_gguf(tiny).encode(" the") == the
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(tiny_json() | {"post_processor": None}))
    config = {"add_bos_token": says}
    assert Tokenizer.from_file(path, tokenizer_config=config).encode(" the") == the


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, {"<eos>"}),  # Pretrained: it ends no turns.
        ({"tokenizer.chat_template": "{{ }}"}, {"<eos>", "<turn|>", "<|tool_response>"}),
        ({"tokenizer.ggml.eos_token_id": 6}, {"<eos>", "<turn|>"}),
        ({"tokenizer.ggml.eot_token_id": 6}, {"<eos>", "<turn|>"}),
        # Ollama's converter, instead of a template.
        ({"tokenizer.ggml.eos_token_ids": [1, 6]}, {"<eos>", "<turn|>"}),
    ],
)
def test_every_id_that_ends_a_text(tiny: Metadata, more: Metadata, expected: set[str]) -> None:
    tokenizer = Tokenizer.from_gguf(tiny | more)
    assert {tokenizer.piece(i) for i in tokenizer.eos_ids} == expected


def test_pieces_that_must_stay_control_do(tiny: Metadata, tmp_path: Path) -> None:
    """Files of tuned models, whose `eos_token` is "<turn|>", have "<eos>" as a normal piece."""
    types = list(tiny["tokenizer.ggml.token_type"])
    types[1], types[6] = NORMAL, USER_DEFINED
    content = tiny_json()
    content["added_tokens"] = [entry for entry in content["added_tokens"] if entry["id"] != 1]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    from_gguf = Tokenizer.from_gguf(tiny | {"tokenizer.ggml.token_type": types})
    for tokenizer in (from_gguf, Tokenizer.from_file(path)):
        assert tokenizer.special_ids >= {1, 6}
        assert tokenizer.encode("<eos><turn|>", parse_special=True) == [2, 1, 6]
        assert not {1, 6} & set(tokenizer.encode("<eos><turn|>"))


def test_ids_that_are_not_to_be_drawn_do_not_change_a_text(tiny: Metadata) -> None:
    """Of the 12B's header; sampling is not the tokenizer's business."""
    expected = read_gguf_vocabulary(tiny, cache_dir=None)
    tiny["tokenizer.ggml.suppress_tokens"] = [5, 6]
    assert read_gguf_vocabulary(tiny, cache_dir=None) == expected


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("merges", None, r"lacks tokenizer.ggml.merges, without which a 'gemma4' vocabulary"),
        (
            "merges",
            [1, 2],
            r"merges is \[1, 2\], expected a list of str; .* convert the model again",
        ),
        ("merges", "▁ t", r"merges is '▁ t', expected a list of str"),
        ("merges", [], r"merges is \[\], expected a list of str"),
        ("merges", ["▁ t", "▁the"], r"merges has 1 items that are not two pieces, \('▁the',\)"),
        ("merges", ["▁ t h"], r"merges has 1 items that are not two pieces"),
        ("tokens", list(range(512)), r"tokens is \[0, 1, .* expected a list of str"),
        ("token_type", ["1"] * 512, r"token_type is \['1', .* expected a list of int"),
        ("token_type", [1] * 511, r"token_type has 511 items and tokenizer.ggml.tokens 512"),
        ("model", "gpt2", r"model is 'gpt2', expected one of \['gemma4', 'llama'\]"),
        ("normalizer.lowercase", True, r"has the key 'tokenizer.ggml.normalizer.lowercase', of"),
    ],
)
def test_header_that_is_not_understood_is_refused(
    tiny: Metadata, key: str, value: object, message: str
) -> None:
    tiny[f"tokenizer.ggml.{key}"] = value
    if value is None:
        del tiny[f"tokenizer.ggml.{key}"]
    with pytest.raises(TokenizerError, match=message):
        read_gguf_vocabulary(tiny, cache_dir=None)


@pytest.mark.parametrize("merge", ["▁ zzz", "zzz t", "▁the ▁the"])
def test_merges_of_unknown_pieces_are_refused(tiny: Metadata, merge: str) -> None:
    """A half that is no piece, or a union that is none."""
    tiny["tokenizer.ggml.merges"] = [*tiny["tokenizer.ggml.merges"], merge]
    with pytest.raises(TokenizerError, match=r"merges do not fit its 512 pieces: .* again"):
        build_engine(read_gguf_vocabulary(tiny, cache_dir=None))


@pytest.mark.parametrize("merge", [7, None, [1, 2], {"a": "b"}])
def test_merges_that_are_no_strings_are_refused(tmp_path: Path, merge: object) -> None:
    content = tiny_json()
    content["model"]["merges"].append(merge)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match="not two pieces"):
        Tokenizer.from_file(path)
