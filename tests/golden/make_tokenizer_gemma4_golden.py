# pyright: reportMissingImports=false
"""Records the Gemma 4 vocabulary, and what two originals make of some six hundred texts.

Owns `tokenizer_gemma4.json.gz`. No test runs it: it needs llama.cpp's vocabulary file (16 MB),
which is not in the repository, and asks the libraries of Hugging Face alone, none of our code. The
file is `vendor/llama.cpp/models/ggml-vocab-gemma-4.gguf` of the source package llama-cpp-python
0.3.36, with its test vectors `.inp` and `.out` beside it (llama.cpp: MIT License, Copyright (c)
2023-2026 The ggml authors). In the environment of README.md:

    golden/bin/python tests/golden/make_tokenizer_gemma4_golden.py path/to/ggml-vocab-gemma-4.gguf

What it holds:

- `source_sha256`: of the vocabulary file, its `.inp` and its `.out`;
- `special`: id, spelling and GGUF type of the 24 pieces that are special in Hugging Face's file;
- `sha256`: of all `tokens`, types and merges, see `digest`. The 16 MB are not needed beside them:
  every other piece has the id that it has in Gemma 3, except that the spare ones, `<unused0>` and
  so on, which take the places of Gemma 3's control pieces too, are numbered anew in the order of
  ids; and the merges are those that follow from Gemma 3's scores;
- `published`: llama.cpp's own vectors, `text` and `ids`, without `<bos>`;
- `cases`: `text`, `ids`, `parsed` and `decoded` as in `make_tokenizer_golden.py`, but without
  `<bos>`, as Hugging Face's `GemmaTokenizer` has them if it is made of this vocabulary and these
  merges, the way in which its converter of Gemma 4 made the original `tokenizer.json`.
"""

import argparse
import gzip
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gguf import GGUFReader, TokenType
from make_tokenizer_golden import all_texts
from transformers import GemmaTokenizer

OUTPUT = Path(__file__).with_name("tokenizer_gemma4.json.gz")
SEPARATOR = "\n__ggml_vocab_test__\n"


def digest(strings: Iterable[str]) -> str:
    """Of strings in a row, a NUL behind each: no piece has one in it."""
    return hashlib.sha256("".join(f"{string}\0" for string in strings).encode()).hexdigest()


def read(path: Path) -> tuple[list[str], list[int], list[str]]:
    """Pieces, their types and the merges."""
    fields = GGUFReader(path).fields
    contents = (
        fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type", "merges")
    )
    tokens, types, merges = contents
    return tokens, types, merges


def original(special: Iterable[str], tokens: list[str], merges: list[str]) -> Any:
    """The `tokenizers` object inside of Hugging Face's tokenizer."""
    roles = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    tokenizer = GemmaTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[tuple(merge.split(" ")) for merge in merges],
        extra_special_tokens=[token for token in special if token not in roles],
    )
    if tokenizer.all_special_tokens is None or set(tokenizer.all_special_tokens) != set(special):
        raise SystemExit(f"special pieces are {tokenizer.all_special_tokens}, expected {special}")
    return tokenizer.backend_tokenizer


def published(path: Path) -> list[dict[str, Any]]:
    """llama.cpp's test vectors: texts between separators, and a line of ids for each."""
    texts = Path(f"{path}.inp").read_bytes().decode().split(SEPARATOR)
    lines = Path(f"{path}.out").read_text().splitlines()
    return [
        {"text": text, "ids": [int(number) for number in line.split()]}
        for text, line in zip(texts, lines, strict=True)
    ]


def texts_of_gemma4(special: list[str]) -> list[str]:
    """What the texts of Gemma 3 do not have: these control pieces, and longer runs of newlines."""
    turns = "<|turn>user\nWhy?<turn|>\n<|turn>model\n<|channel>thought\n<channel|>Because.<turn|>\n"
    runs = ["a" + "\n" * length + "b" for length in range(1, 41)]
    runs += ["\n" * length for length in (61, 62, 63, 64, 93, 94, 200)]
    mixed = [
        "\n \n\n  \n\n\n   ",
        " \n" * 33,
        "\t\n\t\n\n\t\t",
        "\r\n" * 20,
        "\n▁\n",
        "\n\u2028\n\u0085\n",
    ]
    data = ["".join(map(chr, range(256))), "".join(f"<0x{byte:02X}>" for byte in range(256))]
    return [*special, "".join(special), turns, "<bos>" + turns, *runs, *mixed, *data]


def make_case(tokenizer: Any, text: str) -> dict[str, Any]:
    """What the original makes of one text."""
    tokenizer.encode_special_tokens = True
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    tokenizer.encode_special_tokens = False
    parsed = tokenizer.encode(text, add_special_tokens=False).ids
    decoded = tokenizer.decode(ids, skip_special_tokens=False)
    case: dict[str, Any] = {"text": text, "ids": ids}
    if parsed != ids:
        case["parsed"] = parsed
    if decoded != text:
        case["decoded"] = decoded
    return case


def main() -> None:
    """Write the golden file."""
    parser = argparse.ArgumentParser(description=f"Writes tests/golden/{OUTPUT.name}.")
    parser.add_argument("vocabulary", type=Path, help="llama.cpp's ggml-vocab-gemma-4.gguf")
    path = parser.parse_args().vocabulary
    tokens, types, merges = read(path)
    kinds = (TokenType.CONTROL, TokenType.USER_DEFINED)
    special = [(i, token, int(types[i])) for i, token in enumerate(tokens) if types[i] in kinds]
    spellings = [token for _, token, _ in special]
    tokenizer = original(spellings, tokens, merges)
    texts = dict.fromkeys([*all_texts(), *texts_of_gemma4(spellings)])
    golden = {
        "source_sha256": {
            suffix: hashlib.sha256(Path(f"{path}{suffix}").read_bytes()).hexdigest()
            for suffix in ("", ".inp", ".out")
        },
        "special": special,
        "sha256": {
            "tokens": digest(tokens),
            "token_type": digest(map(str, types)),
            "merges": digest(merges),
        },
        "published": published(path),
        "cases": [make_case(tokenizer, text) for text in texts],
    }
    content = json.dumps(golden, separators=(",", ":")).encode()
    # No time in the header: the same cases give the same file.
    OUTPUT.write_bytes(gzip.compress(content, mtime=0))
    num_cases = f"{len(golden['published'])} published and {len(golden['cases'])} recorded cases"
    print(f"{OUTPUT}: {num_cases}, {OUTPUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
