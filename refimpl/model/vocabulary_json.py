"""The vocabulary in a `tokenizer.json`, the file of the library `tokenizers`.

Owns the question whether such a file describes Gemma's way from text to ids, the only one that we
carry, and the reading of pieces and merges from it. The file is read here and not by the library,
so that a file which says anything else is refused instead of half obeyed.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from refimpl.errors import TokenizerError
from refimpl.model.vocabulary import (
    SPACE,
    UNKNOWN,
    Vocabulary,
    always_control,
    to_merges,
    with_tab,
)

_EXPECTED: Mapping[str, tuple[Any, ...]] = {
    "normalizer": ({"type": "Replace", "pattern": {"String": " "}, "content": SPACE},),
    # Splits at spaces, of which the normalizer has left none: it does nothing. Old files lack it.
    "pre_tokenizer": (
        {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        None,
    ),
    "decoder": (
        {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
    ),
}
_EXPECTED_MODEL: Mapping[str, tuple[Any, ...]] = {
    "type": ("BPE",),
    "dropout": (None,),
    "unk_token": (UNKNOWN,),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "fuse_unk": (True,),
    "byte_fallback": (True,),
    "ignore_merges": (False, None),
}


def read_json_vocabulary(path: Path) -> Vocabulary:
    """The vocabulary in a `tokenizer.json`.

    Three of its entries are left aside. `truncation` and `padding` concern batches, and
    `post_processor` puts `<bos>` in front, which `Tokenizer.encode` does on its own.

    Raises:
        TokenizerError: the file cannot be read, or describes another kind of tokenizer.
    """
    content = _load(path)
    model = content["model"]
    _check(content, _EXPECTED, path=path, where="")
    _check(model, _EXPECTED_MODEL, path=path, where="model.")

    listed: dict[str, int] = model["vocab"]
    ids = dict(zip(with_tab(list(listed)), listed.values(), strict=True))
    added = content["added_tokens"]
    for entry in added:
        if ids.setdefault(entry["content"], entry["id"]) != entry["id"]:
            raise TokenizerError(
                f"{path}: the added token {entry['content']!r} has the id {entry['id']}, and as a "
                f"piece of the vocabulary {ids[entry['content']]}; expected the same; the file is "
                "damaged"
            )
    control = always_control(ids) | {entry["id"] for entry in added if entry["special"]}
    for entry in added:
        changes_neighbours = entry["single_word"] or entry["lstrip"] or entry["rstrip"]
        if changes_neighbours and entry["id"] in control:
            raise TokenizerError(
                f"{path}: the control piece {entry['content']!r} wants its neighbours changed "
                "(single_word, lstrip or rstrip is true), expected all three false as in Gemma"
            )
    return Vocabulary(
        ids=ids,
        merges=to_merges(model["merges"], where=f"{path}: model.merges"),
        verbatim=tuple(_added_token(entry) for entry in added if entry["id"] not in control),
        control=control,
    )


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise TokenizerError(
            f"{path} cannot be read: {error.strerror or error}; a model folder has its tokenizer "
            "in tokenizer.json"
        ) from error
    except ValueError as error:
        raise TokenizerError(f"{path} is not JSON: {error}; download it again") from error
    if not isinstance(content, dict) or not {"model", "added_tokens"} <= content.keys():
        raise TokenizerError(
            f"{path} has no 'model' and 'added_tokens', expected the tokenizer.json of the library "
            "tokenizers; tokenizer_config.json is another file"
        )
    return content


def _check(
    got: Mapping[str, Any], expected: Mapping[str, tuple[Any, ...]], *, path: Path, where: str
) -> None:
    for key, accepted in expected.items():
        if got.get(key) not in accepted:
            raise TokenizerError(
                f"{path}: {where}{key} is {got.get(key)!r:.200}, expected {accepted[0]!r}, as in "
                "every Gemma tokenizer; the ids of another kind of tokenizer cannot be told"
            )


def _added_token(entry: Mapping[str, Any]) -> AddedToken:
    return AddedToken(
        entry["content"],
        single_word=entry["single_word"],
        lstrip=entry["lstrip"],
        rstrip=entry["rstrip"],
        normalized=entry["normalized"],
    )
