"""Tiny random Gemma checkpoints in Hugging Face's format, one for each architecture we carry.

Owns the random numbers and the folder that they are written to. The files are what a hub download
would be, spelling and tensor names included, so whatever reads one of them reads the real one;
tests and notebooks start here because real weights are large and gated.

The numbers are the same on every machine and with every numpy: they are raw bits of PCG64, the one
thing numpy promises never to change, scaled by correctly rounded arithmetic. Scales are chosen so
that a mistake shows: norm weights are far from zero, attention is far from uniform, Gemma 2's
scores and logits run into their caps, and the tied head does not merely repeat its input.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from refimpl_weights import synthetic_decoders as decoders
from refimpl_weights import synthetic_tokenizer as tokenizer
from refimpl_weights.synthetic_configs import TINY
from refimpl_weights.synthetic_configs_newer import GEMMA4_UNIFIED
from refimpl_weights.synthetic_drawing import Drawn, draw, matrix, norm

__all__ = ["TINY", "fingerprint", "tensors", "write_checkpoint"]

DataType = Literal["float32", "bfloat16"]
Prefix = Literal["model.", "language_model.model.", "model.language_model."]

_OLDER = ("gemma", "gemma2", "vaultgemma", "gemma3_text")
_CONFIGS = MappingProxyType({**TINY, "gemma4_unified": GEMMA4_UNIFIED})


def write_checkpoint(
    folder: str | Path,
    name: str,
    *,
    seed: int = 0,
    dtype: DataType = "float32",
    prefix: Prefix | None = None,
    shards: int = 1,
    shared_tensors: bool = True,
) -> Path:
    """Writes config, weights, generation config and tokenizer as one model folder of the hub.

    Args:
        folder: made if it is not there.
        name: a key of `TINY`, or "gemma4_unified": "gemma4" as the 12B spells it.
        seed: of the random weights; the same seed gives the same numbers everywhere.
        dtype: of every tensor in the file; bfloat16 is the float32 number rounded to nearest even.
        prefix: of the decoder's tensors. None is the released spelling: "language_model.model."
            for a multimodal Gemma 3, "model.language_model." for a multimodal Gemma 3n or 4,
            "model." for all others.
        shards: number of safetensors files. With more than one, neighbouring tensors lie in
            different files and an index says where, so a reader that trusts file order fails.
        shared_tensors: whether layers that take keys and values from an earlier layer have
            projections of their own in the file nevertheless, as released files do; False leaves
            these unused tensors out, as files do that transformers saved again.

    Returns:
        The folder.

    Raises:
        ValueError: an unknown name or dtype, or fewer than one shard.
    """
    if shards < 1:
        raise ValueError(f"shards must be 1 or more, got {shards}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = tensors(name, seed=seed, dtype=dtype, prefix=prefix, shared_tensors=shared_tensors)
    config = {**_CONFIGS[name], _dtype_key(name): dtype}
    generation = {
        "bos_token_id": tokenizer.BOS,
        "eos_token_id": [tokenizer.EOS, tokenizer.END_OF_TURN],
        "pad_token_id": tokenizer.PAD,
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", generation)
    _write_json(folder / "tokenizer.json", tokenizer.tokenizer_json())
    if shards == 1:
        save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        _write_shards(folder, arrays, shards)
    return folder


def tensors(
    name: str,
    *,
    seed: int = 0,
    dtype: DataType = "float32",
    prefix: Prefix | None = None,
    shared_tensors: bool = True,
) -> dict[str, np.ndarray]:
    """Every tensor of the checkpoint by its name in the file; linear weights are (out, in)."""
    if name not in _CONFIGS:
        raise ValueError(f"no synthetic model is called {name!r}; use one of {', '.join(_CONFIGS)}")
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype must be 'float32' or 'bfloat16', got {dtype!r}")
    config = _CONFIGS[name]
    text = config.get("text_config", config)
    multimodal = text is not config
    newer = text["model_type"] not in _OLDER
    if prefix is None:
        nested = "model.language_model." if newer else "language_model.model."
        prefix = nested if multimodal else "model."
    decoder = decoders.decoder(text) if newer else _decoder(text)
    plan = [drawn._replace(name=prefix + drawn.name) for drawn in decoder]
    if multimodal:
        root = "model." if prefix == "model.language_model." else ""
        foreign = decoders.foreign(config) if newer else _vision(config)
        plan += [drawn._replace(name=root + drawn.name) for drawn in foreign]
    generator = np.random.PCG64(seed)
    arrays = {drawn.name: draw(generator, drawn) for drawn in plan}
    if not shared_tensors:
        # Left out, not left undrawn: every other tensor has the same numbers in both styles.
        unused = {prefix + key for key in decoders.unused(text)} if newer else set()
        arrays = {key: array for key, array in arrays.items() if key not in unused}
    if dtype == "bfloat16":
        return {key: array.astype(ml_dtypes.bfloat16) for key, array in arrays.items()}
    return arrays


def fingerprint(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, types, shapes and bytes, in order of name.

    Unlike the hash of a file it does not depend on how a version of safetensors lays out headers.
    """
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype.name} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _decoder(config: Mapping[str, Any]) -> Iterator[Drawn]:
    """The text model's tensors without prefix, in the order in which they are drawn."""
    d, f = config["hidden_size"], config["intermediate_size"]
    n, k, h = (config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    family = config["model_type"]
    qk_norm = family == "gemma3_text"
    post_norms = family in ("gemma2", "gemma3_text")
    yield matrix("embed_tokens.weight", config["vocab_size"], d)
    for layer in range(config["num_hidden_layers"]):
        at = f"layers.{layer}."
        # Scores grow with the square of this. Gemma 2's first global layer shall run into the cap
        # of 50; not all layers, for scores that large make rounding errors grow with every layer.
        qk_gain = 3.5 if family == "gemma2" and layer == 1 else 1.3
        yield norm(at + "input_layernorm.weight", d)
        yield matrix(at + "self_attn.q_proj.weight", n * h, d, gain=qk_gain)
        yield matrix(at + "self_attn.k_proj.weight", k * h, d, gain=qk_gain)
        yield matrix(at + "self_attn.v_proj.weight", k * h, d)
        yield matrix(at + "self_attn.o_proj.weight", d, n * h)
        if qk_norm:
            yield norm(at + "self_attn.q_norm.weight", h, centre=0.4)
            yield norm(at + "self_attn.k_norm.weight", h, centre=0.4)
        if family != "vaultgemma":
            centre = -0.65 if post_norms else 0.0
            yield norm(at + "post_attention_layernorm.weight", d, centre=centre)
        if post_norms or family == "vaultgemma":
            yield norm(at + "pre_feedforward_layernorm.weight", d)
        yield matrix(at + "mlp.gate_proj.weight", f, d, gain=1.2)
        yield matrix(at + "mlp.up_proj.weight", f, d)
        yield matrix(at + "mlp.down_proj.weight", d, f)
        if post_norms:
            yield norm(at + "post_feedforward_layernorm.weight", d, centre=-0.65)
    # Factors of both signs: the head is the embedding again, and with a plain final norm the
    # likeliest next token would be the last one over and over. Not larger than this, so that an
    # absolute bound on logits asks for no more than a few units in the last place.
    yield norm("norm.weight", d, centre=-1.0, spread=3.0 if family == "gemma2" else 2.0)


def _vision(config: Mapping[str, Any]) -> Iterator[Drawn]:
    """A one-layer SigLIP tower and the projector: tensors that a text model must pass over."""
    vision = config["vision_config"]
    d, f, patch = (vision[key] for key in ("hidden_size", "intermediate_size", "patch_size"))
    tower = "vision_tower.vision_model."
    layer = tower + "encoder.layers.0."
    yield Drawn(tower + "embeddings.patch_embedding.weight", (d, 3, patch, patch), 0.0, 0.1)
    yield norm(tower + "embeddings.patch_embedding.bias", d)
    yield matrix(tower + "embeddings.position_embedding.weight", 4, d)
    for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
        yield matrix(f"{layer}self_attn.{name}.weight", d, d)
        yield norm(f"{layer}self_attn.{name}.bias", d)
    for name, outputs, inputs in (("fc1", f, d), ("fc2", d, f)):
        yield matrix(f"{layer}mlp.{name}.weight", outputs, inputs)
        yield norm(f"{layer}mlp.{name}.bias", outputs)
    for name in (layer + "layer_norm1", layer + "layer_norm2", tower + "post_layernorm"):
        yield norm(name + ".weight", d, centre=1.0)
        yield norm(name + ".bias", d)
    width = config["text_config"]["hidden_size"]
    yield matrix("multi_modal_projector.mm_input_projection_weight", d, width)
    yield norm("multi_modal_projector.mm_soft_emb_norm.weight", d)


def _dtype_key(name: str) -> str:
    """transformers 5 writes "dtype", earlier ones and the hub's files "torch_dtype"."""
    config = _CONFIGS[name]
    return "dtype" if "rope_parameters" in config.get("text_config", config) else "torch_dtype"


def _write_shards(folder: Path, arrays: Mapping[str, np.ndarray], shards: int) -> None:
    files = [f"model-{shard + 1:05}-of-{shards:05}.safetensors" for shard in range(shards)]
    placed = {name: files[index % shards] for index, name in enumerate(arrays)}
    for file in files:
        part = {name: arrays[name] for name in arrays if placed[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    total = sum(array.nbytes for array in arrays.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
    _write_json(folder / "model.safetensors.index.json", index)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
