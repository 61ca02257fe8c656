"""Text to ids and back.

Owns the way between a string and what the model computes with, and the roles of ids: which begins
a text, which end one. It knows no model and no chat template.

How Gemma 3 reads "Hello <b>world</b>\\n\\n":

1. Verbatim pieces are cut out, the longest first: "Hello ", `<b>`, "world", `</b>`, `\\n\\n`.
2. In what lies between them a space becomes "▁": "Hello▁", "world". Nothing else is normalised, and
   no space is put in front: "world" here is another piece than the "▁world" of "Hello world".
3. What lies between them is taken apart into characters. Then, of all pairs of neighbours, the one
   that ranks highest among the merges becomes one piece, again and again until no pair is a merge.
   "Hello▁" ends as "Hello", "▁". Nothing stops a merge at the end of a word, but of all pieces only
   ">▁</" reaches into the next one. Digits stay single, as no piece has two.
4. A character that is no piece becomes the pieces of its UTF-8 bytes.
5. `<bos>` is put in front. Gemma has never seen a text without it, and is lost then: the perplexity
   of ordinary text rises from single digits to thousands and more.

Gemma 4 has the same pieces, merges and ids, but for the control pieces: none is verbatim. Runs of
newlines are merged from single ones, to the same ids. `<b>` is no piece of its own any more: "Hello
<b>world" ends as "Hello", "▁<", "b", ">", "world".

The way back is simple: every piece stands for some bytes, and the text is all of them in a row.

References: Kudo and Richardson, "SentencePiece" (arXiv 1808.06226). For the merging, Sennrich et
al., "Neural Machine Translation of Rare Words with Subword Units" (arXiv 1508.07909).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from refimpl.errors import TokenizerError
from refimpl.model.vocabulary import BYTE_PIECES, SPACE, UNKNOWN, Vocabulary, build_engine
from refimpl.model.vocabulary_gguf import read_gguf_vocabulary
from refimpl.model.vocabulary_json import read_json_vocabulary

BEGIN = "<bos>"
END = "<eos>"
PADDING = "<pad>"

# What a model that was tuned to chat ends its turn with: its own turn's end, or the place where
# the result of a tool belongs. A pretrained model has these pieces too, but has learnt nothing of
# them.
TURN_ENDS = ("<end_of_turn>", "<turn|>", "<|tool_response>")


@dataclass(frozen=True, kw_only=True)
class FillInTheMiddleIds:
    """CodeGemma's control ids: `prefix` P `suffix` S `middle` asks for what is between P and S.

    Attributes:
        prefix: stands before the text before the gap.
        suffix: stands before the text after the gap.
        middle: stands before the text that fills the gap.
        file_separator: stands between files, and so ends the text in the gap.
    """

    prefix: int
    suffix: int
    middle: int
    file_separator: int


class Tokenizer:
    """Gemma's tokenizer, any generation's. Immutable, so that threads can share it."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        bos_id: int,
        pad_id: int,
        eos_ids: Iterable[int],
    ) -> None:
        """Build the engine. `from_file` and `from_gguf` are the usual ways in.

        Args:
            vocabulary: nothing of it is kept but ids; the engine has the rest.
            bos_id: begins every text.
            pad_id: fills up shorter rows of a batch.
            eos_ids: each of them ends a text.

        Raises:
            TokenizerError: the merges do not fit the pieces, or an id is outside of the vocabulary.
        """
        ids = vocabulary.ids
        self._engine = build_engine(vocabulary)
        self._size = max(ids.values()) + 1
        self._special_ids = vocabulary.control
        self._control = {piece: i for piece, i in ids.items() if i in vocabulary.control}
        self._fill_in_the_middle = _fill_in_the_middle(ids)
        self._byte_of = {ids[p]: bytes([b]) for b, p in enumerate(BYTE_PIECES) if p in ids}
        self._bos_id, self._pad_id, self._unk_id = bos_id, pad_id, ids[UNKNOWN]
        self._eos_ids = tuple(sorted(set(eos_ids)))
        for token_id in (bos_id, pad_id, *self._eos_ids):
            self.piece(token_id)

    @classmethod
    def from_file(
        cls,
        path: Path,
        *,
        tokenizer_config: Mapping[str, Any] | None = None,
        eos_ids: Iterable[int] = (),
    ) -> "Tokenizer":
        """The tokenizer in a `tokenizer.json`.

        Args:
            path: of the file.
            tokenizer_config: contents of the `tokenizer_config.json` beside it. It may give other
                pieces the roles of `<bos>` and `<pad>`, and name one more that ends a text.
            eos_ids: `eos_token_id` of the `generation_config.json` beside it. They end a text too.

        Raises:
            TokenizerError: the file cannot be read or is no Gemma tokenizer.
        """
        vocabulary = read_json_vocabulary(path)
        config = tokenizer_config or {}
        end = _named_piece(config, "eos_token", END)
        return cls(
            vocabulary,
            bos_id=_find(vocabulary, _named_piece(config, "bos_token", BEGIN)),
            pad_id=_find(vocabulary, _named_piece(config, "pad_token", PADDING)),
            eos_ids={
                _find(vocabulary, END),
                _find(vocabulary, end),
                *eos_ids,
                *_turn_ends(vocabulary, chats="chat_template" in config),
            },
        )

    @classmethod
    def from_gguf(
        cls, metadata: Mapping[str, Any], *, cache_dir: Path | None = None
    ) -> "Tokenizer":
        """The tokenizer in the header of a GGUF file.

        Args:
            metadata: the header's key-value pairs, as `GGUFFile.metadata` gives them.
            cache_dir: folder in which the merges of Gemma 1 to 3n are kept once they are derived,
                about a second of work. None keeps nothing.

        Raises:
            TokenizerError: the header holds no Gemma vocabulary, or one that is damaged.
        """
        vocabulary = read_gguf_vocabulary(metadata, cache_dir=cache_dir)
        key = "tokenizer.ggml.{}_token_id".format
        ends = (metadata.get(key(role)) for role in ("eos", "eot", "eom"))
        return cls(
            vocabulary,
            bos_id=metadata.get(key("bos"), _find(vocabulary, BEGIN)),
            pad_id=metadata.get(key("padding"), _find(vocabulary, PADDING)),
            eos_ids={
                _find(vocabulary, END),
                *(token_id for token_id in ends if token_id is not None),
                *metadata.get("tokenizer.ggml.eos_token_ids", ()),
                *_turn_ends(vocabulary, chats="tokenizer.chat_template" in metadata),
            },
        )

    @property
    def engine(self) -> tokenizers.Tokenizer:
        """The library's object that does the work; it knows no control pieces. Do not change it."""
        return self._engine

    @property
    def vocab_size(self) -> int:
        """One more than the highest id. A model may have more rows, or fewer (no image piece)."""
        return self._size

    @property
    def bos_id(self) -> int:
        """Begins every text."""
        return self._bos_id

    @property
    def pad_id(self) -> int:
        """Fills up shorter rows of a batch."""
        return self._pad_id

    @property
    def unk_id(self) -> int:
        """Stands for what has no piece. Text never becomes it: every byte has one."""
        return self._unk_id

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Every id that ends a text, in ascending order."""
        return self._eos_ids

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of control pieces, which text never becomes."""
        return self._special_ids

    @property
    def fill_in_the_middle(self) -> FillInTheMiddleIds | None:
        """CodeGemma's control ids, or None for every other Gemma."""
        return self._fill_in_the_middle

    def is_special(self, token_id: int) -> bool:
        """Whether the id is a control piece's."""
        return token_id in self._special_ids

    def encode(self, text: str, *, add_bos: bool = True, parse_special: bool = False) -> list[int]:
        """The ids of a text.

        Args:
            text: any Unicode text; control characters and NUL are characters like others.
            add_bos: put `<bos>` in front, unless the text was parsed to begin with it.
            parse_special: read the spellings of control pieces, such as "<start_of_turn>", as those
                pieces. Only for text that no user had a hand in: a prompt that a chat template
                made. Otherwise they are text like any other.

        Raises:
            TokenizerError: the text has a lone surrogate in it, which is no character.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"the text has a lone surrogate, U+{ord(text[error.start]):04X}, at character "
                f"{error.start}, expected Unicode text; it has no UTF-8 form and so no ids. Mend "
                "the text where it was read, for example by decoding with errors='replace'"
            ) from error
        ids = self._encode_with_control(text) if parse_special else self._encode_plain(text)
        if add_bos and ids[:1] != [self._bos_id]:
            ids.insert(0, self._bos_id)
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of ids: the bytes of their pieces in a row, read as UTF-8.

        Bytes that are not UTF-8, which a model can generate, become U+FFFD: one for each maximal
        subpart of a well-formed sequence, as Unicode (section 3.9) recommends and
        `IncrementalDecoder` does.

        Args:
            ids: of pieces of this vocabulary.
            skip_special: leave out control pieces instead of spelling them.

        Raises:
            TokenizerError: an id has no piece.
        """
        skipped = self._special_ids if skip_special else frozenset()
        data = b"".join([self.piece_bytes(i) for i in ids if i not in skipped])
        return data.decode(errors="replace")

    def piece(self, token_id: int) -> str:
        """The piece as the vocabulary spells it: "▁the", "<0x0A>", "<bos>".

        Raises:
            TokenizerError: there is no piece of this id.
        """
        piece = self._engine.id_to_token(token_id) if 0 <= token_id < self._size else None
        if piece is None:
            raise TokenizerError(
                f"id {token_id} has no piece, expected one of 0 to {self._size - 1}; the ids are "
                "another tokenizer's, or the model has more rows than its vocabulary has pieces"
            )
        return piece

    def piece_bytes(self, token_id: int) -> bytes:
        """The bytes that an id contributes to a text.

        A space for each "▁", one byte for a byte piece, which need not be a character, and for a
        control piece its spelling.

        Raises:
            TokenizerError: there is no piece of this id.
        """
        byte = self._byte_of.get(token_id)
        return byte if byte is not None else self.piece(token_id).replace(SPACE, " ").encode()

    def _encode_plain(self, text: str) -> list[int]:
        return self._engine.encode(text, add_special_tokens=False).ids

    def _encode_with_control(self, text: str) -> list[int]:
        # Longest first: a spelling may begin another. With a group around it, `split` returns the
        # separators too, at the odd places.
        spellings = sorted(self._control, key=len, reverse=True)
        parts = re.split("(" + "|".join(map(re.escape, spellings)) + ")", text)
        ids = self._encode_plain(parts[0])
        for spelling, plain in zip(parts[1::2], parts[2::2], strict=True):
            ids += [self._control[spelling], *self._encode_plain(plain)]
        return ids


def _fill_in_the_middle(ids: Mapping[str, int]) -> FillInTheMiddleIds | None:
    # Ids by spelling: llama.cpp's converter gives every Gemma 1 the metadata of CodeGemma.
    pieces = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|file_separator|>")
    match [ids[piece] for piece in pieces if piece in ids]:
        case [prefix, suffix, middle, file_separator]:
            return FillInTheMiddleIds(
                prefix=prefix, suffix=suffix, middle=middle, file_separator=file_separator
            )
    return None


def _find(vocabulary: Vocabulary, piece: str) -> int:
    if piece not in vocabulary.ids:
        raise TokenizerError(
            f"the vocabulary of {len(vocabulary.ids)} pieces has no {piece!r}, which every Gemma "
            "needs; the file is damaged, or not a Gemma tokenizer"
        )
    return vocabulary.ids[piece]


def _turn_ends(vocabulary: Vocabulary, *, chats: bool) -> list[int]:
    return [vocabulary.ids[piece] for piece in TURN_ENDS if chats and piece in vocabulary.ids]


def _named_piece(config: Mapping[str, Any], role: str, default: str) -> str:
    """The piece that `tokenizer_config.json` names for a role: a string, or an object with one."""
    named = config.get(role) or default
    return named["content"] if isinstance(named, Mapping) else named
