"""Test vectors of the published sampler: run from the repository's root, with NumPy alone.

    python -m tests.golden.make_sampler_vectors

They come from `tests.oracle.sampler`, which is written from the definition, not from the kernels.
Floats are given by their bits, so that no reader rounds them.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from tests.oracle.sampler import MASK, Parameters, draw, gumbel, process, words

OUTPUT = Path(__file__).parent / "sampler" / "vectors.json"
WIDTH = 60
VOCABULARY = 53
RULES: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0},
    {"temperature": 0.7},
    {"top_k": 3},
    {"top_p": 0.5},
    {"top_p": 0},
    {"min_p": 0.1},
    {"temperature": 1.3, "top_k": 12, "top_p": 0.9, "min_p": 0.02},
    {"frequency": 0.7},
    {"presence": -1.1},
    {"repetition": 1.3},
    {"temperature": 2, "top_p": 0.95},
    {"temperature": 2, "top_k": 30, "min_p": 0.001},
    {"temperature": 0.01},
    {"repetition": 0.8, "temperature": 0},
    {"frequency": 0.3, "presence": 0.4, "repetition": 0.9, "temperature": 1.5, "top_k": 20},
)


def bits(x: np.ndarray) -> list[int]:
    """The bits of float32 numbers."""
    return x.astype(np.float32).view(np.uint32).tolist()


def noise_vectors() -> dict[str, Any]:
    """Words at the ends, at the seam and at every power of two, and their noise."""
    powers = [1 << i for i in range(32)]
    some = np.random.default_rng(7).integers(0, 2**32, 60).tolist()
    chosen = {0, MASK, 2**31 - 1, *powers, *(MASK - p for p in powers), *some}
    word = np.array(sorted(chosen), np.int64)
    return {"word": word.tolist(), "noise": gumbel(word).tolist()}


def word_vectors() -> list[dict[str, int]]:
    """Random words for a seed, choice, position and id."""
    where = [(0, 0, 0, 0), (1, 0, 5, 262_143), (-1, 3, 131_071, 2), (2**63 - 1, 127, 7, 106)]
    return [
        {
            "seed": seed,
            "choice": choice,
            "position": position,
            "id": i,
            "word": int(words(Parameters(seed=seed, choice=choice), position, np.array([i]))[0]),
        }
        for seed, choice, position, i in where
    ]


def draw_vectors() -> list[dict[str, Any]]:
    """Rows of raw logits with parameters; processed logits and tokens at eight positions."""
    random = np.random.default_rng(11)
    vectors = []
    for number, changed in enumerate(RULES):
        logits = (random.normal(size=WIDTH) * 3).astype(np.float32)
        if number % 3 == 2:
            logits = np.round(logits)
        counts = random.integers(0, 4, WIDTH) * (random.random(WIDTH) < 0.4)
        in_prompt = random.random(WIDTH) < 0.3
        bias = (random.normal(size=WIDTH) * (random.random(WIDTH) < 0.2)).astype(np.float32)
        bias[random.integers(WIDTH)] = -np.inf
        banned = (int(random.integers(WIDTH)),)
        parameters = Parameters(
            seed=int(random.integers(-(2**63), 2**63)), choice=number, **changed
        )
        processed = process(
            logits, parameters, counts=counts, in_prompt=in_prompt, bias=bias, banned=banned
        )
        tokens = [draw(processed, parameters, i, vocab_size=VOCABULARY) for i in range(8)]
        vectors.append(
            {
                "parameters": asdict(parameters),
                "logits_bits": bits(logits),
                "counts": counts.tolist(),
                "in_prompt": in_prompt.tolist(),
                "bias_bits": bits(bias),
                "banned": banned,
                "processed_bits": bits(processed),
                "vocab_size": VOCABULARY,
                "tokens_at_positions_0_to_7": tokens,
            }
        )
    return vectors


if __name__ == "__main__":
    OUTPUT.parent.mkdir(exist_ok=True)
    vectors = {"noise": noise_vectors(), "words": word_vectors(), "draws": draw_vectors()}
    lines = [f'"{key}": {json.dumps(value)}' for key, value in vectors.items() if key == "noise"]
    for key in ("words", "draws"):
        rows = ",\n".join(json.dumps(row) for row in vectors[key])
        lines.append(f'"{key}": [\n{rows}\n]')
    OUTPUT.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
