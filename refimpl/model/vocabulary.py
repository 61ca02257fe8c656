"""Gemma's vocabulary: its pieces, which of them are what, and how they merge.

Owns what a vocabulary is, and the engine, a `tokenizers.Tokenizer`, that is built from one. Reading
one from a file is the business of `vocabulary_gguf.py` and `vocabulary_json.py`; both give the same
`Vocabulary` for the same model, hence the same ids.

There are four kinds of pieces, and text becomes each of them in its own way:

- normal: made by merging, as `merges.py` tells;
- byte, `<0x00>` to `<0xFF>`: what a character that is no piece falls apart into, in UTF-8;
- verbatim ("user-defined" to SentencePiece), such as runs of newlines, HTML tags or `<unused7>`:
  looked up in the raw text before anything else, the longest first, and never merged further.
  Gemma 4 has none: runs of newlines are merged there, `<b>` and `<unused7>` fall apart;
- control, such as `<bos>` and `<start_of_turn>`: not at all. The engine is not even told of them;
  whoever wants one says so by its id.

A space is written "▁" (U+2581) in every piece, so that a piece can begin with one: "▁the".
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from refimpl.errors import TokenizerError

SPACE = "▁"
UNKNOWN = "<unk>"
BYTE_PIECES: tuple[str, ...] = tuple(f"<0x{byte:02X}>" for byte in range(256))

# Control pieces of one generation or another that some file lists as something else. Hugging Face
# marks those around images as special and llama.cpp's converters do not; CodeGemma's and some of
# Gemma 4's have to stay visible to whoever parses the output; where a tuned Gemma 4 has "<turn|>"
# for its `eos_token`, "<eos>" itself is converted to a normal piece. Nobody may type himself one.
_ALWAYS_CONTROL = frozenset(
    [
        *("<pad>", "<eos>", "<bos>", "<unk>"),
        *("<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>"),
        *("<image_soft_token>", "<|image>", "<image|>", "<|image|>", "<|video|>"),
        *("<|audio>", "<audio|>", "<|audio|>", "<|turn>", "<turn|>", "<|channel>", "<channel|>"),
        *("<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>"),
        *("<tool_response|>", '<|"|>', "<|think|>"),
        *("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|file_separator|>"),
    ]
)

_SPARE = re.compile(r"<unused\d+>|<mask>")


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Everything that decides which ids a text becomes.

    Attributes:
        ids: id of every piece, by its spelling.
        merges: pairs of pieces whose union is a piece, the first to be merged first.
        verbatim: pieces that are looked up in the raw text.
        control: ids that text never becomes.
    """

    ids: dict[str, int]
    merges: list[tuple[str, str]]
    verbatim: tuple[AddedToken, ...]
    control: frozenset[int]

    def __post_init__(self) -> None:
        # "\t" may stand in for its byte: see `with_tab`.
        wanted = {UNKNOWN, *BYTE_PIECES} - ({"<0x09>"} if "\t" in self.ids else set())
        if missing := sorted(wanted - self.ids.keys()):
            raise TokenizerError(
                f"the vocabulary of {len(self.ids)} pieces lacks {len(missing)} that every Gemma "
                f"vocabulary has, {missing[:3]} among them; without them some characters have no "
                "ids. The file is damaged, or not a Gemma tokenizer"
            )


def always_control(ids: Mapping[str, int]) -> frozenset[int]:
    """Ids of the pieces, given by spelling, that are control whatever their file says."""
    return frozenset(ids[piece] for piece in _ALWAYS_CONTROL & ids.keys())


def is_spare(piece: str) -> bool:
    """Whether a piece is one of those that Google keeps for later use.

    Gemma's own tokenizer matches them in text, as it does any user-defined piece. llama.cpp's
    converter makes control pieces of them because of how they are spelled.
    """
    return _SPARE.fullmatch(piece) is not None


def with_tab(pieces: list[str]) -> list[str]:
    """The pieces by id, the byte 0x09 spelled as the character that it is, unless that is a piece.

    The vocabularies of Gemma 1 and 2 have pieces for two tabs and more but none for one. The files
    of Hugging Face's converter come with this change, those of llama.cpp's without.
    """
    if "\t" in pieces:
        return pieces
    return ["\t" if piece == "<0x09>" else piece for piece in pieces]


def to_merges(stored: Iterable[Any], *, where: str) -> list[tuple[str, str]]:
    """Merges as the files have them: two pieces each, or one string with a space between the two.

    Raises:
        TokenizerError: one of them is not two pieces; `where` says which list it is in.
    """
    merges: list[Any] = [
        tuple(item.split(" "))
        if isinstance(item, str)
        else (tuple(item) if isinstance(item, list) else (item,))
        for item in stored
    ]
    if wrong := [merge for merge in merges if not _is_pair(merge)]:
        raise TokenizerError(
            f"{where} has {len(wrong)} items that are not two pieces, {wrong[0]!r:.80} the first; "
            "expected pairs alone. The file is damaged, convert or download it again"
        )
    return merges


def _is_pair(merge: tuple[Any, ...]) -> bool:
    return len(merge) == 2 and isinstance(merge[0], str) and isinstance(merge[1], str)


def build_engine(vocabulary: Vocabulary) -> tokenizers.Tokenizer:
    """The `tokenizers` object that turns text into ids, knowing nothing of control pieces.

    Raises:
        TokenizerError: the merges do not fit the pieces.
    """
    try:
        model = models.BPE(
            vocabulary.ids,
            vocabulary.merges,
            unk_token=UNKNOWN,
            fuse_unk=True,
            byte_fallback=True,
        )
    except Exception as error:  # `tokenizers` has no error class of its own.
        raise TokenizerError(
            f"the vocabulary's {len(vocabulary.merges)} merges do not fit its "
            f"{len(vocabulary.ids)} pieces: {error}; expected that both halves and their union are "
            "pieces. The file is damaged, convert or download it again"
        ) from error
    engine = tokenizers.Tokenizer(model)
    engine.normalizer = normalizers.Replace(" ", SPACE)
    engine.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    engine.add_tokens(list(vocabulary.verbatim))
    return engine
