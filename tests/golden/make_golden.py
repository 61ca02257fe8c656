# pyright: reportMissingImports=false
"""Records what Hugging Face's models compute on the tiny synthetic checkpoints.

Owns `tests/golden/tiny/<name>.npz`; README.md beside this file describes every array. Not part of
the test suite and of no environment of ours: it needs torch and transformers, which the project
itself never imports.

    python3.11 -m venv golden && golden/bin/pip install \\
        torch==2.13.0 transformers==5.23.0 numpy==2.4.6 ml-dtypes==0.6.0 safetensors==0.8.0
    golden/bin/python tests/golden/make_golden.py

The reference is the eager implementation on one CPU thread with deterministic algorithms. Every
weight of every checkpoint must have found its place, or nothing is written.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from edits import edits
from mistakes import mistakes
from reference import Arrays, forward, load, record, synthetic, synthetic_tokenizer
from transformers import PreTrainedModel

GREEDY_STEPS = 64
# A float32 logit of size 5 is known to about 1e-5; a choice by hundreds of times that is no tie.
MIN_MARGIN = 5e-3
# A continuation that repeats a few ids proves little about the cache.
MIN_DISTINCT = 24
# What a broken model must change at least, to be told from rounding with a bound of 2e-5.
MIN_CHANGE = 1e-3
# Which experts are asked is no matter of rounding if the last one chosen leads by this.
MIN_ROUTER_MARGIN = 1e-3
FAR = 5000
# Beyond what 16 bits can count: for those that were released with such long contexts.
VERY_FAR = 70000
NEWER = ("gemma3n", "gemma4")


def random_ids(length: int, *, seed: int) -> np.ndarray:
    """`<bos>`, then ids drawn evenly from all pieces behind `<unk>`. Shape (1, length), int64."""
    raw = np.random.PCG64(seed).random_raw(length - 1)
    low = synthetic_tokenizer.UNK + 1
    body = raw % np.uint64(synthetic_tokenizer.NUM_PIECES - low) + np.uint64(low)
    return np.concatenate([[synthetic_tokenizer.BOS], body.astype(np.int64)])[None]


def padded_case(lengths: tuple[int, ...], *, left: bool) -> Arrays:
    """Rows of different lengths filled with `<pad>`; positions as `generate` computes them."""
    width = max(lengths)
    ids = np.full((len(lengths), width), synthetic_tokenizer.PAD, np.int64)
    mask = np.zeros((len(lengths), width), np.int64)
    for row, length in enumerate(lengths):
        at = slice(width - length, width) if left else slice(0, length)
        ids[row, at] = random_ids(length, seed=30 + row)[0]
        mask[row, at] = 1
    positions = np.where(mask == 1, mask.cumsum(axis=-1) - 1, 0)
    return {"ids": ids, "mask": mask, "positions": positions}


def cases(name: str) -> dict[str, Arrays]:
    """Inputs of a model by their names; without padding the mask is all ones."""

    def whole(length: int, first: int, seed: int) -> Arrays:
        positions = np.arange(first, first + length)[None]
        ids = random_ids(length, seed=seed)
        return {"ids": ids, "mask": np.ones_like(ids), "positions": positions}

    inputs = {
        "short": whole(7, 0, 10),
        "long": whole(40, 0, 11),
        "far": whole(12, FAR, 12),
        "left_padded": padded_case((12, 9, 3), left=True),
        "right_padded": padded_case((12, 9, 3), left=False),
    }
    if name.startswith(NEWER):
        inputs["very_far"] = whole(12, VERY_FAR, 13)
    return inputs


def greedy(model: PreTrainedModel, prompt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Likeliest ids after the prompt, and by how much the best logit beats the second best.

    Computed twice, by full passes and with a cache, which must agree on every id.
    """
    ids = torch.from_numpy(prompt)
    margins = []
    for _ in range(GREEDY_STEPS):
        logits = model(input_ids=ids, use_cache=False).logits[0, -1]
        best, second = logits.topk(2).values
        margins.append((best - second).item())
        ids = torch.cat([ids, logits.argmax()[None, None]], dim=1)
    full = ids[0, prompt.shape[1] :]

    step = model(input_ids=torch.from_numpy(prompt), use_cache=True)
    cached = [step.logits[0, -1].argmax()]
    while len(cached) < GREEDY_STEPS:
        step = model(
            input_ids=cached[-1][None, None], past_key_values=step.past_key_values, use_cache=True
        )
        cached.append(step.logits[0, -1].argmax())
    if not torch.equal(full, torch.stack(cached)):
        raise RuntimeError("greedy ids differ with and without a cache")
    return full.numpy(), np.asarray(margins, np.float32)


def decisive_greedy(model: PreTrainedModel) -> Arrays:
    """The first random prompt whose continuation is varied and nowhere near a tie."""
    for seed in range(100, 400):
        prompt = random_ids(7, seed=seed)
        ids, margins = greedy(model, prompt)
        decisive = margins.min() >= MIN_MARGIN and len(set(ids.tolist())) >= MIN_DISTINCT
        if decisive and ids.max() < synthetic_tokenizer.NUM_PIECES:
            return {"prompt": prompt[0].astype(np.int32), "ids": ids.astype(np.int32),
                    "margins": margins}  # fmt: skip
    raise RuntimeError("every prompt comes near a tie or repeats itself")


def changes(folder: Path, model: PreTrainedModel, inputs: dict[str, Arrays]) -> dict[str, float]:
    """By how much each mistake moves some logit, at most; every one must be plain to see."""
    right = forward(model, inputs["long"])
    found = {
        label: (forward(load(folder, torch.float32, change), inputs["long"]) - right).abs().max()
        for label, change in mistakes(folder.name).items()
    }
    for label, edit in edits(folder.name).items():
        broken = load(folder, torch.float32)
        edit(broken)
        found[label] = (forward(broken, inputs["long"]) - right).abs().max()

    far = inputs["far"]
    rounded = torch.from_numpy(far["positions"]).to(torch.bfloat16).long().numpy()
    moved = forward(model, {**far, "positions": rounded})
    found["far: positions in bfloat16"] = (moved - forward(model, far)).abs().max()

    left = inputs["left_padded"]
    unmasked = forward(model, {**left, "mask": np.ones_like(left["mask"])})
    real = torch.from_numpy(left["mask"]) == 1
    found["left_padded: padding attended to"] = (unmasked - forward(model, left))[real].abs().max()

    figures = {label: float(f"{change:.3g}") for label, change in found.items()}
    if min(figures.values()) < MIN_CHANGE:
        raise RuntimeError(f"{folder.name}: a mistake would pass unnoticed: {figures}")
    return figures


def check_spellings(name: str, model: PreTrainedModel, inputs: dict[str, Arrays]) -> None:
    """Without the tensors that sharing layers do not use, and as the 12B, the bits are the same."""
    right = forward(model, inputs["long"])
    for other in (name, "gemma4_unified") if name == "gemma4" else (name,):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / other
            synthetic.write_checkpoint(folder, other, shared_tensors=False)
            if not torch.equal(forward(load(folder, torch.float32), inputs["long"]), right):
                raise RuntimeError(f"{other}, saved again, is another model than {name}")


def check_routers(name: str, arrays: Arrays) -> None:
    """No case comes near a tie of two experts, in float32."""
    margins = {
        key: value.min() for key, value in arrays.items() if key.endswith("float32.router_margin")
    }
    if margins and min(margins.values()) < MIN_ROUTER_MARGIN:
        raise RuntimeError(f"{name}: a choice of experts is nearly a tie: {margins}")


def golden(name: str) -> Arrays:
    """All arrays of one file."""
    arrays: Arrays = {}
    inputs = cases(name)
    for case, values in inputs.items():
        arrays |= {f"{case}.{key}": value.astype(np.int32) for key, value in values.items()}
    for dtype in ("float32", "bfloat16"):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / name
            synthetic.write_checkpoint(folder, name, dtype=dtype)
            model = load(folder, getattr(torch, dtype))
            chosen = inputs if dtype == "float32" else {c: inputs[c] for c in ("short", "long")}
            for case, values in chosen.items():
                said = record(model, values)
                arrays |= {f"{case}.{dtype}.{key}": value for key, value in said.items()}
            if dtype == "float32":
                check_routers(name, arrays)
                check_spellings(name, model, inputs)
                arrays |= {f"greedy.{key}": v for key, v in decisive_greedy(model).items()}
                figures = changes(folder, model, inputs)
                arrays["changes"] = np.asarray(json.dumps(figures))
        arrays[f"sha256.{dtype}"] = np.asarray(
            synthetic.fingerprint(synthetic.tensors(name, dtype=dtype))
        )
    return arrays


def main() -> None:
    """Writes one file for each synthetic model, or for those that are named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(synthetic.TINY))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tiny")
    arguments = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.names:
        arrays = golden(name)
        path = arguments.out / f"{name}.npz"
        np.savez_compressed(path, allow_pickle=False, **arrays)
        scores = arrays["long.float32.max_score"].max()
        logits = np.abs(arrays["long.float32.logits"]).max()
        margin = arrays["greedy.margins"].min()
        print(f"{name}: {path.stat().st_size} bytes, max |score| {scores:.1f}, "
              f"max |logit| {logits:.1f}, margin {margin:.4f}")  # fmt: skip
        print(f"    {arrays['changes']}")


if __name__ == "__main__":
    main()
