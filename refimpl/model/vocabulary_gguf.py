"""The vocabulary in the header of a GGUF file.

Owns the `tokenizer.*` keys that say which ids a text becomes, and what llama.cpp's converters do to
the pieces on the way. For Gemma 1 to 3n (`tokenizer.ggml.model` is "llama") the file has the pieces
and scores of the SentencePiece model; for Gemma 4 ("gemma4") it has ranked merges, and scores that
mean nothing.

llama.cpp cuts a text for Gemma 4 into runs of newlines and what lies between them, and looks a
whole run up before it merges anything. Hugging Face does neither, and nor do we. Both ways give the
same ids: no piece has a newline and another character in it, and the merges that make the longest
runs come first, so that a run grows from its left end until it is a piece of 31, as if looked up.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from refimpl.errors import TokenizerError
from refimpl.model.merges import cached_merges
from refimpl.model.vocabulary import (
    SPACE,
    Vocabulary,
    always_control,
    is_spare,
    to_merges,
    with_tab,
)

_MODEL = "tokenizer.ggml.model"
_TOKENS = "tokenizer.ggml.tokens"
_SCORES = "tokenizer.ggml.scores"
_TYPES = "tokenizer.ggml.token_type"
_MERGES = "tokenizer.ggml.merges"
_KINDS: Mapping[str, type] = {_TOKENS: str, _TYPES: int, _SCORES: float, _MERGES: str}

# Keys that would change the ids of a text if they were other than Gemma's. Gemma adds no space in
# front, keeps every space, and normalises nothing.
_MUST_BE_OFF = (
    "tokenizer.ggml.add_space_prefix",
    "tokenizer.ggml.remove_extra_whitespaces",
    "tokenizer.ggml.precompiled_charsmap",
)

# Keys that do not bear on the ids of a text: roles of ids (`Tokenizer` reads some of them; Ollama
# writes `eos_token_ids`), which ids are not to be drawn, what llama.cpp puts around a prompt by
# default (`encode` is told by its caller), chat templates.
_HARMLESS = frozenset(
    [
        *(
            f"tokenizer.ggml.{name}_token_id"
            for name in (
                *("bos", "eos", "eot", "eom", "unknown", "padding", "mask", "cls", "seperator"),
                *("prefix", "suffix", "middle", "fsep"),
                *("fim_pre", "fim_suf", "fim_mid", "fim_pad", "fim_rep", "fim_sep"),
            )
        ),
        *(f"tokenizer.ggml.add_{name}_token" for name in ("bos", "eos", "sep")),
        "tokenizer.ggml.eos_token_ids",
        "tokenizer.ggml.suppress_tokens",
        "tokenizer.ggml.token_type_count",
        "tokenizer.huggingface.json",
    ]
)
_PREFIX_OF_TEMPLATES = "tokenizer.chat_template"


class PieceType(IntEnum):
    """`tokenizer.ggml.token_type`, with the numbers of SentencePiece's own enumeration."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def read_gguf_vocabulary(metadata: Mapping[str, Any], *, cache_dir: Path | None) -> Vocabulary:
    """The vocabulary in a GGUF header's metadata.

    Args:
        metadata: all keys of the header; those that do not begin with "tokenizer." are not looked
            at.
        cache_dir: where derived merges are kept, see `cached_merges`.

    Raises:
        TokenizerError: keys are missing, unknown, or do not fit together.
    """
    _check_keys(metadata)
    pieces, marked = _read_pieces(metadata)
    ids = dict(zip(pieces, range(len(pieces)), strict=True))
    if len(ids) < len(pieces):
        twice = [piece for piece, count in Counter(pieces).items() if count > 1]
        raise TokenizerError(
            f"{_TOKENS} lists {len(twice)} pieces more than once, {twice[:3]} among them; expected "
            "one id for each. The file is damaged, or its strings were changed on the way"
        )
    control = always_control(ids) | {
        i for i, kind in marked.items() if _is_control(pieces[i], kind, model=metadata[_MODEL])
    }
    if metadata[_MODEL] == "gemma4":
        merges = to_merges(metadata[_MERGES], where=_MERGES)
    else:
        merges = _derived_merges(metadata[_SCORES], pieces, marked, cache_dir=cache_dir)
    return Vocabulary(
        ids=ids,
        merges=merges,
        verbatim=tuple(
            AddedToken(pieces[i], normalized=False)
            for i, kind in marked.items()
            if kind in (PieceType.CONTROL, PieceType.USER_DEFINED) and i not in control
        ),
        control=control,
    )


def _check_keys(metadata: Mapping[str, Any]) -> None:
    model = metadata.get(_MODEL)
    wanted = {"llama": (_TOKENS, _TYPES, _SCORES), "gemma4": (_TOKENS, _TYPES, _MERGES)}
    if model not in wanted:
        raise TokenizerError(
            f"{_MODEL} is {model!r}, expected one of {sorted(wanted)}, the kinds of vocabulary "
            "that Gemma has; convert the model again, with its tokenizer.model beside it"
        )
    architecture = metadata.get("general.architecture")
    if (architecture == "gemma4") != (model == "gemma4") and architecture is not None:
        raise TokenizerError(
            f"{_MODEL} is {model!r} in a file of the architecture {architecture!r}, whose pieces "
            f"merge {'by rank' if architecture == 'gemma4' else 'by score'}: text would get other "
            "ids; convert the model again with llama.cpp's converter"
        )
    if missing := [key for key in wanted[model] if key not in metadata]:
        raise TokenizerError(
            f"the GGUF header lacks {', '.join(missing)}, without which a {model!r} vocabulary "
            "gives no ids; convert the model again"
        )
    for key in wanted[model]:
        value, kind = metadata[key], _KINDS[key]
        # A GGUF list has items of one type: the first stands for all.
        if not isinstance(value, list) or not isinstance(value[0] if value else None, kind):
            raise TokenizerError(
                f"{key} is {value!r:.50}, expected a list of {kind.__name__}; the file is damaged, "
                "convert the model again"
            )
    for key in _MUST_BE_OFF:
        if metadata.get(key):
            raise TokenizerError(
                f"{key} is {metadata[key]!r:.50}, expected it to be off or absent: Gemma takes "
                "text as it is; convert the model again"
            )
    known = {_MODEL, "tokenizer.ggml.pre", _TOKENS, _SCORES, _TYPES, _MERGES, *_MUST_BE_OFF}
    for key in metadata:
        if (
            key.startswith("tokenizer.")
            and not key.startswith(_PREFIX_OF_TEMPLATES)
            and key not in known | _HARMLESS
        ):
            raise TokenizerError(
                f"the GGUF header has the key {key!r}, of which this reader does not know whether "
                "it changes the ids of a text; use a newer version of this program"
            )


def _read_pieces(metadata: Mapping[str, Any]) -> tuple[list[str], dict[int, PieceType]]:
    """All pieces by id, and the type of those few thousand that are not normal."""
    pieces, types = list(metadata[_TOKENS]), metadata[_TYPES]
    if len(types) != len(pieces):
        raise TokenizerError(
            f"{_TYPES} has {len(types)} items and {_TOKENS} {len(pieces)}, expected as many; the "
            "file is damaged"
        )
    if unknown := set(types) - set(PieceType):
        raise TokenizerError(
            f"{_TYPES} has the values {sorted(unknown)}, expected 1 to 6; use a newer version of "
            "this program"
        )
    normal = int(PieceType.NORMAL)
    marked = {i: PieceType(kind) for i, kind in enumerate(types) if kind != normal}
    # User-defined pieces come with real spaces in them, all others with "▁".
    for i, kind in marked.items():
        if kind == PieceType.USER_DEFINED:
            pieces[i] = pieces[i].replace(" ", SPACE)
    pieces = with_tab(pieces)
    # A byte that is spelled as its character now is a piece like others.
    is_tab = [i for i, kind in marked.items() if kind == PieceType.BYTE and pieces[i] == "\t"]
    for i in is_tab:
        del marked[i]
    return pieces, marked


def _is_control(piece: str, kind: PieceType, *, model: str) -> bool:
    if kind not in (PieceType.UNKNOWN, PieceType.CONTROL):
        return False
    # Gemma 4's types are Hugging Face's own; the others went through llama.cpp's guess by spelling.
    return model == "gemma4" or not is_spare(piece)


def _derived_merges(
    scores: Sequence[float],
    pieces: list[str],
    marked: Mapping[int, PieceType],
    *,
    cache_dir: Path | None,
) -> list[tuple[str, str]]:
    if len(scores) != len(pieces):
        raise TokenizerError(
            f"{_SCORES} has {len(scores)} items and {_TOKENS} {len(pieces)}, expected as many; the "
            "file is damaged"
        )
    mergeable = dict(zip(pieces, range(len(pieces)), strict=True))
    scores = list(scores)
    for i, kind in marked.items():
        # SentencePiece gives all user-defined pieces the score 0, llama.cpp's converter -1000.
        scores[i] = 0.0
        if kind != PieceType.USER_DEFINED:
            del mergeable[pieces[i]]
    left, right = cached_merges(mergeable, scores, cache_dir=cache_dir).T.tolist()
    of_id = pieces.__getitem__
    return list(zip(map(of_id, left), map(of_id, right), strict=True))
