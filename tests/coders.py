"""A tiny model that was trained, as far as its vocabulary says, to fill gaps as CodeGemma was."""

import json
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

from refimpl_weights.synthetic_tokenizer import tokenizer_json

from refimpl.engine.engine import Engine
from refimpl.model.tokenizer import Tokenizer
from tests.engines import tiny_engine

# The pieces of the form: before the text before the gap, before that behind it, before the gap's
# own, and what ends a file.
FORM = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|file_separator|>")


def coder_engine(*, slots: int = 16) -> Engine:
    """An engine whose vocabulary has the pieces of the form in place of four that are unused."""
    engine = tiny_engine(slots=slots)
    engine.gemma = replace(engine.gemma, tokenizer=coder_tokenizer())
    return engine


@cache
def coder_tokenizer() -> Tokenizer:
    """The tokenizer of `coder_engine`."""
    form = {f"<unused{number}>": piece for number, piece in enumerate(FORM)}
    contents = tokenizer_json()
    contents["model"]["vocab"] = {
        form.get(piece, piece): i for piece, i in contents["model"]["vocab"].items()
    }
    for added in contents["added_tokens"]:
        if added["content"] in form:
            added |= {"content": form[added["content"]], "special": True}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        path.write_text(json.dumps(contents), encoding="utf-8")
        return Tokenizer.from_file(path)
