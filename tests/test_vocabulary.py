"""Vocabularies: what is read from a file, what is refused, and which merges follow from scores."""

import json
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from refimpl_weights import synthetic_tokenizer
from refimpl_weights.gguf import GGUFFile
from refimpl_weights.synthetic_gguf import write_gguf

from refimpl.errors import TokenizerError
from refimpl.model.merges import cached_merges, derive_merges
from refimpl.model.tokenizer import Tokenizer
from refimpl.model.vocabulary import Vocabulary, build_engine
from refimpl.model.vocabulary_gguf import read_gguf_vocabulary
from refimpl.model.vocabulary_json import read_json_vocabulary

Metadata = dict[str, Any]


@pytest.fixture(scope="module")
def tiny_metadata(tmp_path_factory: pytest.TempPathFactory) -> Metadata:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return dict(GGUFFile(write_gguf(path, architecture="gemma3")).metadata)


@pytest.fixture
def metadata(tiny_metadata: Metadata) -> Metadata:
    """A copy for each test, to be changed."""
    return {
        key: list(value) if isinstance(value, list) else value
        for key, value in tiny_metadata.items()
    }


@pytest.fixture
def content() -> dict[str, Any]:
    """Contents of a `tokenizer.json`, to be changed."""
    return synthetic_tokenizer.tokenizer_json()


def spell(pieces: list[str], merges: np.ndarray) -> list[tuple[str, str]]:
    return [(pieces[left], pieces[right]) for left, right in merges]


def mergeable(pieces: list[str]) -> dict[str, int]:
    return {piece: i for i, piece in enumerate(pieces)}


# Deriving


def test_merges_of_a_higher_score_come_first() -> None:
    pieces = ["a", "b", "c", "ab", "bc", "abc"]
    merges = derive_merges(mergeable(pieces), [0.0, 0.0, 0.0, -3.0, -1.0, -2.0])
    # For "abc" both splits are there, the longer left half first.
    assert spell(pieces, merges) == [("b", "c"), ("ab", "c"), ("a", "bc"), ("a", "b")]


def test_equal_scores_put_the_longest_halves_first() -> None:
    pieces = ["\n", "\n\n", "\n\n\n", " ", "  ", "   "]
    merges = derive_merges(mergeable(pieces), [0.0] * 6)
    assert [(len(left), left[0]) for left, _ in spell(pieces, merges)] == [
        (2, "\n"),
        (2, " "),
        (1, "\n"),  # ("\n", "\n\n"): its right half is longer than that of the next two.
        (1, " "),
        (1, "\n"),
        (1, " "),
    ]


def test_pieces_that_take_no_part_do_not_merge() -> None:
    pieces = ["a", "b", "ab", "abb"]
    merges = derive_merges({"a": 0, "b": 1, "abb": 3}, [0.0, 0.0, -1.0, -2.0])
    assert spell(pieces, merges) == []
    assert merges.shape == (0, 2)
    assert merges.dtype == np.uint32


@given(
    pieces=st.lists(st.text("ab", min_size=1, max_size=5), unique=True, max_size=25),
    data=st.data(),
)
@settings(deadline=None)
def test_merges_are_all_pairs_whose_union_is_a_piece(
    pieces: list[str], data: st.DataObject
) -> None:
    ids = mergeable(pieces)
    few = st.integers(-3, 0).map(float)  # So that many tie.
    scores = data.draw(st.lists(few, min_size=len(pieces), max_size=len(pieces)))

    def rank(pair: tuple[str, str]) -> tuple[float, int, int, int]:
        left, right = pair
        return -scores[ids[left + right]], -len(left), -len(right), ids[left + right]

    pairs = [(left, right) for left, right in product(pieces, pieces) if left + right in ids]
    assert spell(pieces, derive_merges(ids, scores)) == sorted(pairs, key=rank)


# Caching


PIECES = ["a", "b", "ab", "abb", "é", "日"]
SCORES = [0.0, 0.0, -1.0, -2.0, -3.0, -4.0]
MERGES = [[0, 1], [2, 1]]


def only_file(folder: Path) -> Path:
    [file] = folder.iterdir()
    return file


@pytest.fixture
def is_derived(monkeypatch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """Whether merges have been derived since it was last asked."""
    calls: list[int] = []

    def counted(*arguments: Any) -> np.ndarray:
        calls.append(1)
        return derive_merges(*arguments)

    monkeypatch.setattr("refimpl.model.merges.derive_merges", counted)

    def answer() -> bool:
        derived = bool(calls)
        calls.clear()
        return derived

    return answer


def test_merges_are_derived_once(tmp_path: Path, is_derived: Callable[[], bool]) -> None:
    folder = tmp_path / "made" / "when needed"
    assert_array_equal(cached_merges(mergeable(PIECES), SCORES, cache_dir=folder), MERGES)
    assert is_derived()
    assert_array_equal(cached_merges(mergeable(PIECES), SCORES, cache_dir=folder), MERGES)
    assert not is_derived()
    # A checksum of 32 bytes, then two ids of 4 bytes for each merge.
    assert only_file(folder).stat().st_size == 32 + 2 * 2 * 4


def test_without_a_cache_nothing_is_kept(is_derived: Callable[[], bool]) -> None:
    for _ in range(2):
        assert_array_equal(cached_merges(mergeable(PIECES), SCORES, cache_dir=None), MERGES)
        assert is_derived()


@pytest.mark.parametrize(
    ("pieces", "scores"),
    [
        ({**mergeable(PIECES), "c": 6}, [*SCORES, -5.0]),
        (mergeable(PIECES), [*SCORES[:5], -4.5]),
        (mergeable(PIECES), [*SCORES, 0.0]),
        ({"b": 0, "a": 1, "ab": 2, "abb": 3, "é": 4, "日": 5}, SCORES),
        ({"ab": 0, "a": 1, "b": 2, "abb": 3, "é": 4, "日": 5}, SCORES),
        ({"a": 0, "b": 1, "ab": 2, "abb": 3, "é": 4, "日": 6}, [*SCORES, 0.0]),
    ],
)
def test_another_vocabulary_has_another_file(
    tmp_path: Path, is_derived: Callable[[], bool], pieces: dict[str, int], scores: list[float]
) -> None:
    cached_merges(mergeable(PIECES), SCORES, cache_dir=tmp_path)
    assert is_derived()
    expected = derive_merges(pieces, scores)
    assert_array_equal(cached_merges(pieces, scores, cache_dir=tmp_path), expected)
    assert is_derived()
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:20],
        lambda content: content[:-1],
        lambda content: content[:-4],
        lambda content: content + b"\x00",
        lambda content: bytes(len(content)),
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),
        lambda content: bytes([content[0] ^ 1]) + content[1:],
    ],
    ids=["empty", "short", "a byte less", "an id less", "longer", "zeros", "end", "checksum"],
)
def test_damaged_cache_is_derived_anew_and_mended(
    tmp_path: Path, is_derived: Callable[[], bool], damage: Callable[[bytes], bytes]
) -> None:
    cached_merges(mergeable(PIECES), SCORES, cache_dir=tmp_path)
    file = only_file(tmp_path)
    sound = file.read_bytes()
    file.write_bytes(damage(sound))
    is_derived()
    assert_array_equal(cached_merges(mergeable(PIECES), SCORES, cache_dir=tmp_path), MERGES)
    assert is_derived()
    assert only_file(tmp_path).read_bytes() == sound


def test_cache_of_another_vocabulary_is_not_trusted(tmp_path: Path) -> None:
    """Even under the right name: the checksum is over the vocabulary too."""
    cached_merges(mergeable(PIECES), SCORES, cache_dir=tmp_path / "one")
    other = [*SCORES[:3], 1.0, *SCORES[4:]]
    cached_merges(mergeable(PIECES), other, cache_dir=tmp_path / "two")
    shutil.copy(only_file(tmp_path / "one"), only_file(tmp_path / "two"))
    merges = cached_merges(mergeable(PIECES), other, cache_dir=tmp_path / "two")
    assert_array_equal(merges, [[2, 1], [0, 1]])


def test_folder_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    folder = tmp_path / "a file"
    folder.write_text("in the way")
    with pytest.warns(RuntimeWarning, match=r"cannot be kept in .*a file.*: .* make the folder"):
        merges = cached_merges(mergeable(PIECES), SCORES, cache_dir=folder)
    assert_array_equal(merges, MERGES)


def test_nothing_but_the_cache_is_left_when_writing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.warns(RuntimeWarning, match="No space left on device"):
        cached_merges(mergeable(PIECES), SCORES, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


# Reading a GGUF header


@given(
    text=st.lists(st.sampled_from(["the ", " and", "日本", "<bos>", "<mask>", "\n"]) | st.text())
)
@settings(deadline=None)
def test_gguf_and_json_give_the_same_ids(
    tiny_both: tuple[Tokenizer, Tokenizer], text: list[str]
) -> None:
    from_gguf, from_json = tiny_both
    joined = "".join(text)
    for parse_special in (False, True):
        ids = from_gguf.encode(joined, parse_special=parse_special)
        assert ids == from_json.encode(joined, parse_special=parse_special)


@pytest.fixture(scope="module")
def tiny_both(
    tiny_metadata: Metadata, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, Tokenizer]:
    path = tmp_path_factory.mktemp("json") / "tokenizer.json"
    path.write_text(json.dumps(synthetic_tokenizer.tokenizer_json()))
    return Tokenizer.from_gguf(tiny_metadata), Tokenizer.from_file(path)


def test_gguf_and_json_agree_on_all_pieces(tiny_both: tuple[Tokenizer, Tokenizer]) -> None:
    from_gguf, from_json = tiny_both
    assert from_gguf.vocab_size == from_json.vocab_size == 512
    assert from_gguf.special_ids == from_json.special_ids == {0, 1, 2, 3, 5, 6}
    for i in range(512):
        assert from_gguf.piece(i) == from_json.piece(i)
        assert from_gguf.piece_bytes(i) == from_json.piece_bytes(i)


def test_ids_of_roles_come_from_the_header(metadata: Metadata) -> None:
    metadata["tokenizer.ggml.padding_token_id"] = 7
    metadata["tokenizer.ggml.eom_token_id"] = 9
    del metadata["tokenizer.ggml.eot_token_id"]
    tokenizer = Tokenizer.from_gguf(metadata)
    assert tokenizer.pad_id == 7
    assert tokenizer.eos_ids == (1, 9)
    metadata["tokenizer.chat_template"] = "{{ bos_token }}"
    assert Tokenizer.from_gguf(metadata).eos_ids == (1, 6, 9)
    del metadata["tokenizer.ggml.padding_token_id"]
    assert Tokenizer.from_gguf(metadata).pad_id == 0


def test_unused_pieces_are_never_made(metadata: Metadata) -> None:
    """Pieces of type 5, with which llama.cpp fills up a vocabulary, have ids and no other use."""
    the = metadata["tokenizer.ggml.tokens"].index("▁the")
    assert the in Tokenizer.from_gguf(metadata).encode(" the")
    metadata["tokenizer.ggml.token_type"][the] = 5
    tokenizer = Tokenizer.from_gguf(metadata)
    assert [tokenizer.piece(i) for i in tokenizer.encode(" the", add_bos=False)] == ["▁t", "he"]
    assert tokenizer.decode([the]) == " the"
    assert not tokenizer.is_special(the)


def test_tab_without_a_piece_is_its_byte(metadata: Metadata) -> None:
    """Gemma 1 and 2: one tab is the byte's id, spelled as the tab in Hugging Face's file."""
    tokenizer = Tokenizer.from_gguf(metadata)
    byte = metadata["tokenizer.ggml.tokens"].index("<0x09>")
    assert tokenizer.encode("\t", add_bos=False) == [byte]
    assert tokenizer.piece(byte) == "\t"
    assert tokenizer.piece_bytes(byte) == b"\t"


def test_stored_merges_are_taken_as_they_are(metadata: Metadata) -> None:
    """Gemma 4: the scores say nothing, the merges are there, and types are Hugging Face's."""
    pieces = [token.replace(" ", "▁") for token in metadata["tokenizer.ggml.tokens"]]
    metadata["general.architecture"] = metadata["tokenizer.ggml.model"] = "gemma4"
    metadata["tokenizer.ggml.tokens"] = pieces
    metadata["tokenizer.ggml.scores"] = [-1000.0] * 512
    metadata["tokenizer.ggml.merges"] = ["▁ t", "h e", "▁t he", "\n \n"]
    # Hugging Face's converter gives only special pieces and bytes a type of their own.
    metadata["tokenizer.ggml.token_type"] = [
        kind if kind != 4 else 1 for kind in metadata["tokenizer.ggml.token_type"]
    ]
    tokenizer = Tokenizer.from_gguf(metadata)
    ids = tokenizer.encode(" the\n\n\n", add_bos=False)
    assert [tokenizer.piece(i) for i in ids] == ["▁the", "\n\n", "\n"]
    assert {tokenizer.piece(i) for i in tokenizer.special_ids} >= {"<mask>", "<unused0>", "<bos>"}
    metadata["tokenizer.ggml.merges"].append("▁the")
    with pytest.raises(TokenizerError, match=r"merges has 1 items that are not two pieces"):
        Tokenizer.from_gguf(metadata)


def test_pieces_that_must_stay_control_do(metadata: Metadata) -> None:
    """Whatever the file calls them: llama.cpp lists those around images as user-defined."""
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    spare = tokens.index("<unused0>")
    tokens[spare] = "<start_of_image>"
    metadata["tokenizer.ggml.token_type"][spare] = 4
    tokenizer = Tokenizer.from_gguf(metadata)
    assert spare in tokenizer.special_ids
    assert spare not in tokenizer.encode("<start_of_image>")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model", "gpt2", r"model is 'gpt2', expected one of \['gemma4', 'llama'\]"),
        ("model", None, r"model is None, expected one of"),
        ("tokens", None, r"lacks tokenizer.ggml.tokens, without which a 'llama' vocabulary"),
        ("scores", None, r"lacks tokenizer.ggml.scores"),
        ("token_type", None, r"lacks tokenizer.ggml.token_type"),
        ("scores", [0.0] * 511, r"scores has 511 items and tokenizer.ggml.tokens 512"),
        ("token_type", [1] * 513, r"token_type has 513 items and tokenizer.ggml.tokens 512"),
        ("token_type", [7] * 512, r"token_type has the values \[7\], expected 1 to 6"),
        ("tokens", ["a"] * 512, r"lists 1 pieces more than once, \['a'\] among them"),
        ("add_space_prefix", True, r"add_space_prefix is True, expected it to be off or absent"),
        ("remove_extra_whitespaces", True, r"remove_extra_whitespaces is True"),
        ("precompiled_charsmap", [1, 2], r"precompiled_charsmap is \[1, 2\]"),
        ("escape_hatch", 1, r"has the key 'tokenizer.ggml.escape_hatch', of which this reader"),
    ],
)
def test_header_that_is_not_understood_is_refused(
    metadata: Metadata, key: str, value: object, message: str
) -> None:
    metadata[f"tokenizer.ggml.{key}"] = value
    if value is None:
        del metadata[f"tokenizer.ggml.{key}"]
    with pytest.raises(TokenizerError, match=message):
        read_gguf_vocabulary(metadata, cache_dir=None)


def test_header_may_say_what_does_not_concern_us(metadata: Metadata) -> None:
    expected = read_gguf_vocabulary(metadata, cache_dir=None)
    metadata |= {
        "tokenizer.chat_template": "{{ messages }}",
        "tokenizer.chat_template.tools": "{{ tools }}",
        "tokenizer.ggml.mask_token_id": 4,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.remove_extra_whitespaces": False,
        "another.tokenizer": 1,
    }
    assert read_gguf_vocabulary(metadata, cache_dir=None).ids == expected.ids


def test_missing_bytes_are_noticed(metadata: Metadata) -> None:
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    tokens[tokens.index("<0x41>")] = "something else"
    with pytest.raises(TokenizerError, match=r"512 pieces lacks 1 .* \['<0x41>'\] among them"):
        read_gguf_vocabulary(metadata, cache_dir=None)


# Reading tokenizer.json


def write(content: object, folder: Path) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(content))
    return path


def test_merges_may_be_strings(content: dict[str, Any], tmp_path: Path) -> None:
    expected = read_json_vocabulary(write(content, tmp_path))
    content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]
    assert read_json_vocabulary(write(content, tmp_path)).merges == expected.merges


def test_pre_tokenizer_may_be_missing(content: dict[str, Any], tmp_path: Path) -> None:
    expected = read_json_vocabulary(write(content, tmp_path))
    content["pre_tokenizer"] = None
    del content["model"]["ignore_merges"]
    assert read_json_vocabulary(write(content, tmp_path)).ids == expected.ids


def test_added_token_beyond_the_vocabulary(content: dict[str, Any], tmp_path: Path) -> None:
    """Like the image piece of Gemma 3, which has the first id after the others, or a later one."""
    image = dict(content["added_tokens"][0], content="<image_soft_token>", id=600)
    content["added_tokens"].append(image)
    tokenizer = Tokenizer.from_file(write(content, tmp_path))
    assert tokenizer.vocab_size == 601
    assert tokenizer.piece(600) == "<image_soft_token>"
    assert tokenizer.encode("<image_soft_token>", parse_special=True) == [2, 600]
    assert 600 not in tokenizer.encode("<image_soft_token>")
    with pytest.raises(TokenizerError, match=r"id 599 has no piece"):
        tokenizer.piece(599)


def test_added_token_may_have_the_flags_of_the_library(
    content: dict[str, Any], tmp_path: Path
) -> None:
    """A piece that someone added to a tuned model; the library's meaning of the flags stands."""
    word = dict(content["added_tokens"][0], content="we are", id=512, special=False)
    content["added_tokens"].append(dict(word, single_word=True, normalized=True))
    tokenizer = Tokenizer.from_file(write(content, tmp_path))
    assert tokenizer.encode("we are", add_bos=False) == [512]
    assert 512 not in tokenizer.encode("awe area")


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        (None, "normalizer", None, r"normalizer is None, expected \{'type': 'Replace'"),
        (None, "normalizer", {"type": "NFKC"}, r"normalizer is \{'type': 'NFKC'\}"),
        (None, "pre_tokenizer", {"type": "ByteLevel"}, r"pre_tokenizer is \{'type': 'ByteLevel'\}"),
        (None, "decoder", {"type": "ByteLevel"}, r"decoder is .* expected \{'type': 'Sequence'"),
        ("model", "type", "Unigram", r"model.type is 'Unigram', expected 'BPE'"),
        ("model", "dropout", 0.1, r"model.dropout is 0.1, expected None"),
        ("model", "byte_fallback", False, r"model.byte_fallback is False, expected True"),
        ("model", "ignore_merges", True, r"model.ignore_merges is True, expected False"),
        ("model", "unk_token", None, r"model.unk_token is None, expected '<unk>'"),
        ("model", "merges", [["a", "zzz"]], r"1 merges do not fit its 512 pieces: .*zzz"),
        ("model", "merges", [["a"]], r"model.merges has 1 items that are not two pieces, \('a',\)"),
        ("model", "vocab", {"a": 0}, r"the vocabulary of \d+ pieces lacks 256"),
    ],
)
def test_other_tokenizers_are_refused(
    content: dict[str, Any],
    tmp_path: Path,
    section: str | None,
    key: str,
    value: object,
    message: str,
) -> None:
    (content if section is None else content[section])[key] = value
    with pytest.raises(TokenizerError, match=message):
        build_engine(read_json_vocabulary(write(content, tmp_path)))


def test_contradictory_added_tokens_are_refused(content: dict[str, Any], tmp_path: Path) -> None:
    content["added_tokens"][2]["id"] = 77
    with pytest.raises(TokenizerError, match=r"'<bos>' has the id 77, .* of the vocabulary 2"):
        read_json_vocabulary(write(content, tmp_path))
    content["added_tokens"][2] |= {"id": 2, "lstrip": True}
    with pytest.raises(TokenizerError, match=r"control piece '<bos>' wants its neighbours changed"):
        read_json_vocabulary(write(content, tmp_path))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", r"is not JSON"),
        (b"\xff\xfe", r"is not JSON"),
        (b"[]", r"has no 'model' and 'added_tokens'"),
        (b'{"bos_token": "<bos>"}', r"tokenizer_config.json is another file"),
    ],
)
def test_files_that_are_something_else(tmp_path: Path, raw: bytes, message: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(raw)
    with pytest.raises(TokenizerError, match=message):
        read_json_vocabulary(path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"absent.json cannot be read: No such file"):
        read_json_vocabulary(tmp_path / "absent.json")


def test_engine_of_a_vocabulary_without_its_pieces() -> None:
    with pytest.raises(TokenizerError, match=r"the vocabulary of 1 pieces lacks 257"):
        Vocabulary(ids={"a": 0}, merges=[], verbatim=(), control=frozenset())
