"""A tokenizer of 512 pieces, laid out and behaving like Gemma's of 262,144.

Owns the contents of the `tokenizer.json` beside a synthetic checkpoint. It knows no model.

The order of ids is Gemma's: control pieces, runs of newlines, runs of spaces, the 256 bytes,
merged pieces by rank, single characters, unused slots. So are the rules: a space becomes "▁", no
other normalisation, no word boundary stops a merge, digits never merge, and a character that is no
piece falls back to its UTF-8 bytes.
"""

from typing import Any

NUM_PIECES = 512
PAD, EOS, BOS, UNK, MASK, START_OF_TURN, END_OF_TURN = range(7)

_CONTROL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>")
_NEWLINE_RUNS = tuple("\n" * length for length in range(1, 9))
_SPACE_RUNS = tuple("▁" * length for length in range(2, 9))
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
_CHARACTERS = ("▁", *(chr(code) for code in range(0x21, 0x7F)), *"éüßжи日本語🙂")

# Every piece is the union of two that are single characters or stand before it.
_MERGED_BY_RANK = """
▁t in ▁a er on he re or at ▁s en ▁c it is ▁w ▁b an ▁o ou ▁p ar es ▁f ▁m al ed ▁in ing ▁th ▁the ▁to
▁of ▁d ▁h ▁l ▁n ▁e ▁g ▁r ▁y ▁i ic as st ro le nd ▁and om ion ent ve ll ow ly ▁re ▁be ▁is ▁it ▁on
▁you us ch ur id ut im ▁st ▁an ▁for ▁wh ay ith ▁with ▁that el ot ad ct ter ver ▁not ▁de ▁def ret
urn return ▁= == () ): sel self ., жи 日本 日本語
"""
_MERGED = tuple(_MERGED_BY_RANK.split())


def pieces() -> tuple[str, ...]:
    """All 512 pieces; a piece's place is its id."""
    used = (*_CONTROL, *_NEWLINE_RUNS, *_SPACE_RUNS, *_BYTES, *_MERGED, *_CHARACTERS)
    return (*used, *(f"<unused{index}>" for index in range(NUM_PIECES - len(used))))


def tokenizer_json() -> dict[str, Any]:
    """Contents of `tokenizer.json`, with the same components as Gemma 3's own."""
    begin = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    begin_second = {"SpecialToken": {"id": "<bos>", "type_id": 1}}
    first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added(index, piece) for index, piece in enumerate(pieces()) if _is_added(piece)
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, first],
            "pair": [begin, first, begin_second, second],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [BOS], "tokens": ["<bos>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: index for index, piece in enumerate(pieces())},
            "merges": _merges(),
        },
    }


def _is_added(piece: str) -> bool:
    """Whether the piece is looked up in the raw text before any merge, as Gemma's list has it."""
    return (
        piece in _CONTROL
        or piece in _NEWLINE_RUNS
        or piece in _SPACE_RUNS
        or piece.startswith("<unused")
    )


def _added(index: int, piece: str) -> dict[str, Any]:
    return {
        "id": index,
        "content": piece,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        # Special tokens are left out of decoded text; Gemma does not count <mask> among them.
        "special": piece in _CONTROL and piece != "<mask>",
    }


def _merges() -> list[list[str]]:
    """Every pair of pieces whose union is a piece, best rank first.

    Long runs rank before short ones, so that five spaces become one piece and not two and a half.
    """
    ranked = (*reversed(_NEWLINE_RUNS[1:]), *reversed(_SPACE_RUNS), *_MERGED)
    known = {*_CHARACTERS, *_NEWLINE_RUNS, *_SPACE_RUNS, *_MERGED}
    return [
        [piece[:cut], piece[cut:]]
        for piece in ranked
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]
