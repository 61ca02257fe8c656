# pyright: reportMissingImports=false
"""Records what Hugging Face's Gemma 3 computes with the real weights of Gemma 3 270M.

Owns `tests/golden/real/270m.npz`; README.md beside this file describes every array. Needs the same
separate environment as make_golden.py, and `gguf==0.19.0` in it:

    golden/bin/python tests/golden/make_real_golden.py <model.gguf> <tokenizer.json>

The weights are those of a quantised GGUF file, dequantised to float32 by the `gguf` package, which
shares no code with ours. So the file is a golden record of that file, and whoever compares with it
has to read the same one; its SHA-256 is among the arrays.
"""

import argparse
import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from tokenizers import Tokenizer
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

HERE = Path(__file__).resolve().parent
GREEDY_STEPS = 64
# Float32 logits of this model are good to about 1e-4, so a lead of 1e-2 is no matter of rounding.
MIN_MARGIN = 1e-2
# Text, and the number of ids after which the greedy continuation starts (or a few more, should the
# continuation come near a tie). The last begins where local layers have long begun to forget.
PROMPTS = {
    "english": ("english", 32),
    "mixed": ("mixed", 32),
    "python": ("python", 32),
    "long": ("long", 32),
    "past_window": ("long", 700),
}
HEAD_ROWS = 64

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def config() -> Gemma3TextConfig:
    """Gemma 3 270M, every number spelt out: the defaults of the class are another model's."""
    return Gemma3TextConfig(
        vocab_size=262144,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        hidden_activation="gelu_pytorch_tanh",
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        query_pre_attn_scalar=256,
        sliding_window=512,
        layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 3,
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )


def parameters(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the GGUF file as float32 under its name in transformers."""
    for tensor in GGUFReader(path).tensors:
        value = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        name = tensor.name.removesuffix(".weight")
        if name.endswith("norm"):
            # llama.cpp's converter stores 1 + w; the model adds the 1 itself, and must get back
            # the very number that the file holds.
            offset = value - np.float32(1)
            if not np.array_equal(offset + np.float32(1), value):
                raise RuntimeError(f"{tensor.name}: 1 cannot be subtracted without rounding")
            value = offset
        yield f"model.{parameter_name(name)}.weight", torch.from_numpy(value)


def parameter_name(name: str) -> str:
    """GGUF's name of a tensor to that of transformers, both without `.weight`."""
    if not name.startswith("blk."):
        return {"token_embd": "embed_tokens", "output_norm": "norm"}[name]
    _, layer, part = name.split(".")
    return f"layers.{layer}.{LAYER_NAMES[part]}"


def load(path: Path) -> Gemma3ForCausalLM:
    """The model with every parameter replaced, each exactly once."""
    with torch.device("meta"):
        model = Gemma3ForCausalLM(config())
    model.to_empty(device="cpu")
    left = dict(model.model.named_parameters(prefix="model"))
    for name, value in parameters(path):
        left.pop(name).copy_(value)
    if left:
        raise RuntimeError(f"not in the file: {sorted(left)}")
    # `to_empty` leaves rope frequencies and the embedding scale undefined; a model that was
    # constructed in full knows them.
    small = config()
    small.vocab_size = 8
    buffers = dict(Gemma3ForCausalLM(small).named_buffers())
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    model.tie_weights()
    return model.eval()


def logprobs(model: Gemma3ForCausalLM, ids: np.ndarray) -> np.ndarray:
    """log p(ids[i + 1] | ids[: i + 1]) for every i; float32, shape (t - 1,)."""
    tokens = torch.from_numpy(ids).long()
    hidden = model.model(input_ids=tokens[None], use_cache=False).last_hidden_state[0, :-1]
    parts = []
    # A few rows at a time: all logits of the long text would be 3 GB.
    for rows, wanted in zip(hidden.split(HEAD_ROWS), tokens[1:].split(HEAD_ROWS), strict=True):
        normalised = model.lm_head(rows).double().log_softmax(dim=-1)
        parts.append(normalised.gather(1, wanted[:, None])[:, 0])
    return torch.cat(parts).float().numpy()


def greedy(model: Gemma3ForCausalLM, prompt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Likeliest ids, and the lead of the best logit over the second; a stop token does not stop.

    Decoded with a cache, then checked against one pass over the whole without a cache.
    """
    tokens = torch.from_numpy(prompt).long()[None]
    step = model(input_ids=tokens, use_cache=True, logits_to_keep=1)
    chosen, margins = [], []
    for _ in range(GREEDY_STEPS):
        best, second = step.logits[0, -1].topk(2).values
        margins.append((best - second).item())
        chosen.append(step.logits[0, -1].argmax())
        step = model(
            input_ids=chosen[-1][None, None], past_key_values=step.past_key_values, use_cache=True
        )
    ids = torch.stack(chosen)
    whole = torch.cat([tokens[0], ids[:-1]])[None]
    again = model(input_ids=whole, use_cache=False, logits_to_keep=GREEDY_STEPS).logits[0]
    if not torch.equal(again.argmax(dim=-1), ids):
        raise RuntimeError("greedy ids differ with and without a cache")
    return ids.numpy().astype(np.int32), np.asarray(margins, np.float32)


def decisive_greedy(model: Gemma3ForCausalLM, ids: np.ndarray, first: int) -> dict[str, np.ndarray]:
    """The continuation of the shortest prompt, from `first` ids on, that comes near no tie."""
    for length in range(first, first + 64):
        chosen, margins = greedy(model, ids[:length])
        if margins.min() >= MIN_MARGIN:
            return {
                "prompt_length": np.asarray(length, np.int32),
                "ids": chosen,
                "margins": margins,
            }
    raise RuntimeError(f"every prompt from {first} ids on comes near a tie")


def sha256(path: Path) -> np.ndarray:
    """Hash of a file's bytes, as a text array without axes."""
    with path.open("rb") as file:
        return np.asarray(hashlib.file_digest(file, "sha256").hexdigest())


def main() -> None:
    """Writes the one file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("gguf", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--out", type=Path, default=HERE / "real")
    arguments = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    tokenizer = Tokenizer.from_file(str(arguments.tokenizer))
    model = load(arguments.gguf)

    arrays = {
        "sha256.gguf": sha256(arguments.gguf),
        "sha256.tokenizer": sha256(arguments.tokenizer),
    }
    for name in ("english", "mixed", "python", "long"):
        path = HERE / "texts" / f"{name}.txt"
        text = path.read_text(encoding="utf-8")
        ids = np.asarray(tokenizer.encode(text).ids, np.int32)
        if ids[0] != 2 or (ids[1:] == 2).any():
            raise RuntimeError(f"{name}: <bos> must stand in front, once")
        arrays[f"sha256.{name}"] = sha256(path)
        arrays[f"{name}.ids"] = ids
        arrays[f"{name}.logprobs"] = logprobs(model, ids)
        mean = arrays[f"{name}.logprobs"].mean()
        print(f"{name}: {len(ids)} ids, mean logprob {mean:.4f}", flush=True)
    for name, (text, first) in PROMPTS.items():
        found = decisive_greedy(model, arrays[f"{text}.ids"], first)
        arrays |= {f"greedy.{name}.{key}": value for key, value in found.items()}
        length, margin = found["prompt_length"], found["margins"].min()
        said = tokenizer.decode(found["ids"].tolist())
        print(f"greedy {name}: prompt {length}, least margin {margin:.4f}, {said!r}", flush=True)

    arguments.out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(arguments.out / "270m.npz", allow_pickle=False, **arrays)


if __name__ == "__main__":
    main()
