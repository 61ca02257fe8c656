"""Records what the original Gemma 3 tokenizer makes of some five hundred texts.

Owns `tokenizer.json.gz`. No test runs it: it needs the original `tokenizer.json` (33 MB),
which is not in the repository, and asks the library `tokenizers` alone, none of our code. Anyone
with a folder of a Gemma 3 model can make the same file again:

    python tests/golden/make_tokenizer_golden.py path/to/tokenizer.json

It holds the checksum of its source and one case per text, with `<bos>` in front of all ids:

- `text`: from `tokenizer_texts.json`, or made below;
- `ids`: with the spellings of control pieces taken as text;
- `parsed`: with the spellings of control pieces taken as those pieces, if that differs;
- `decoded`: the text of `ids` without control pieces, if that is not the text again.
"""

import argparse
import gzip
import hashlib
import json
import random
from pathlib import Path

import tokenizers

TEXTS = Path(__file__).with_name("tokenizer_texts.json")
OUTPUT = Path(__file__).with_name("tokenizer.json.gz")

NUM_MIXTURES = 40
PARTS_OF_A_MIXTURE = 6
MAX_PART = 30


def all_texts() -> list[str]:
    """Every text once, in a fixed order."""
    groups = json.loads(TEXTS.read_text(encoding="utf-8"))
    listed = [*groups.pop("languages").values()]
    for group in groups.values():
        listed += group
    runs = [char * length for char in "\n\t " for length in range(1, 41)]
    runs_in_text = [f"a{char * length}b" for char in "\n\t " for length in (2, 5, 16, 31, 32, 33)]
    return list(dict.fromkeys([*listed, *runs, *runs_in_text, *mixtures(listed)]))


def mixtures(parts: list[str]) -> list[str]:
    """Excerpts of the texts in random order, so that everything meets everything."""
    # Seeded, and only `random()` is used, whose numbers are the same in every Python.
    draw = random.Random(20250312).random

    def excerpt() -> str:
        part = parts[int(draw() * len(parts))]
        start = int(draw() * len(part))
        return part[start : start + 1 + int(draw() * MAX_PART)]

    return ["".join(excerpt() for _ in range(PARTS_OF_A_MIXTURE)) for _ in range(NUM_MIXTURES)]


def make_case(tokenizer: tokenizers.Tokenizer, text: str) -> dict[str, str | list[int]]:
    """What the tokenizer makes of one text."""
    tokenizer.encode_special_tokens = True
    ids = tokenizer.encode(text).ids
    tokenizer.encode_special_tokens = False
    parsed = tokenizer.encode(text).ids
    decoded = tokenizer.decode(ids, skip_special_tokens=True)
    case: dict[str, str | list[int]] = {"text": text, "ids": ids}
    if parsed != ids:
        case["parsed"] = parsed
    if decoded != text:
        case["decoded"] = decoded
    return case


def main() -> None:
    """Write the golden file."""
    parser = argparse.ArgumentParser(description="Writes tests/golden/tokenizer.json.gz.")
    parser.add_argument("tokenizer", type=Path, help="Gemma 3's tokenizer.json")
    path = parser.parse_args().tokenizer
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    golden = {
        "source_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "cases": [make_case(tokenizer, text) for text in all_texts()],
    }
    content = json.dumps(golden, separators=(",", ":")).encode()
    # No time in the header: the same cases give the same file.
    OUTPUT.write_bytes(gzip.compress(content, mtime=0))
    print(f"{OUTPUT}: {len(golden['cases'])} cases, {OUTPUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
