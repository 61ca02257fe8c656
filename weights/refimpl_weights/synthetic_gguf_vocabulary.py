"""The tiny tokenizer's pieces as llama.cpp's converters store them in a GGUF file.

Owns the `tokenizer.*` keys of synthetic files. Up to Gemma 3n a file has the pieces and scores of a
SentencePiece model; one of Gemma 4 has ranked merges, and scores that mean nothing.
"""

import re

from gguf import GGUFWriter, TokenType

from refimpl_weights import synthetic_tokenizer as tokenizer

_NO_SCORE, _PADDING_SCORE = -1000.0, -10000.0


def add_vocabulary(writer: GGUFWriter, *, model: str, size: int = tokenizer.NUM_PIECES) -> None:
    """All pieces, and which ids begin and end a text.

    Args:
        writer: of a file without these keys.
        model: "llama" up to Gemma 3n, or "gemma4".
        size: rows of the embedding. Those without a piece are called "[PAD512]" and so on, as the
            converter calls them in files of the first kind.

    Raises:
        ValueError: another model, or a size that it cannot have.
    """
    if model not in ("llama", "gemma4"):
        raise ValueError(f"model is {model!r}, expected 'llama' or 'gemma4'")
    if size < tokenizer.NUM_PIECES or (model == "gemma4" and size > tokenizer.NUM_PIECES):
        raise ValueError(f"size is {size}, expected {tokenizer.NUM_PIECES}, or more with 'llama'")
    writer.add_tokenizer_model(model)
    if model == "llama":
        _add_scored_pieces(writer, [f"[PAD{i}]" for i in range(tokenizer.NUM_PIECES, size)])
    else:
        _add_merged_pieces(writer)
    writer.add_bos_token_id(tokenizer.BOS)
    writer.add_eos_token_id(tokenizer.EOS)
    writer.add_eot_token_id(tokenizer.END_OF_TURN)
    writer.add_unk_token_id(tokenizer.UNK)
    writer.add_pad_token_id(tokenizer.PAD)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)


def _add_scored_pieces(writer: GGUFWriter, padding: list[str]) -> None:
    pieces = tokenizer.pieces()
    kinds = [_kind(piece) for piece in pieces]
    normal = [place for place, kind in enumerate(kinds) if kind == TokenType.NORMAL]
    scores = [0.0 if kind == TokenType.BYTE else _NO_SCORE for kind in kinds]
    for rank, place in enumerate(normal):
        scores[place] = -float(rank)
    # Runs of spaces are looked up in the text as it is, before spaces become "▁".
    spelled = [
        piece.replace("▁", " ") if kind == TokenType.USER_DEFINED else piece
        for piece, kind in zip(pieces, kinds, strict=True)
    ]
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*spelled, *padding])
    writer.add_token_scores([*scores, *[_PADDING_SCORE] * len(padding)])
    writer.add_token_types([*kinds, *[TokenType.UNUSED] * len(padding)])


def _add_merged_pieces(writer: GGUFWriter) -> None:
    """Runs are pieces like others here, which merges make."""
    contents = tokenizer.tokenizer_json()
    special = {added["content"] for added in contents["added_tokens"] if added["special"]}
    pieces = tokenizer.pieces()
    writer.add_token_list(pieces)
    writer.add_token_scores([_NO_SCORE] * len(pieces))
    writer.add_token_types(
        [
            TokenType.CONTROL
            if piece in special
            else TokenType.BYTE
            if _kind(piece) == TokenType.BYTE
            else TokenType.NORMAL
            for piece in pieces
        ]
    )
    writer.add_token_merges([" ".join(pair) for pair in contents["model"]["merges"]])


def _kind(piece: str) -> TokenType:
    if re.fullmatch("<0x[0-9A-F]{2}>", piece):
        return TokenType.BYTE
    if re.fullmatch("\n+|▁▁+", piece):
        return TokenType.USER_DEFINED
    # <pad>, <start_of_turn> and the like, and <unused7>; "<" itself is a character.
    return TokenType.CONTROL if re.fullmatch("<[a-z_0-9]+>", piece) else TokenType.NORMAL
