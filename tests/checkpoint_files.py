"""Small checkpoints for tests: written, changed, and what our parameters must hold."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from refimpl_weights import synthetic
from refimpl_weights.gguf import GGUFFile
from refimpl_weights.synthetic import TINY
from safetensors.numpy import save_file

from refimpl.errors import CheckpointError
from refimpl.model.checkpoint import load_model, open_checkpoint
from refimpl.model.config import GemmaConfig
from refimpl.model.transformer import Transformer

Arrays = dict[str, np.ndarray]


def parameters(model: Transformer) -> dict[str, Any]:
    """Every parameter by its path, such as "layers.0.attention.output.weight"."""
    flat = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): variable.get_value() for path, variable in flat}


def load(path: Path) -> dict[str, Any]:
    return parameters(load_model(open_checkpoint(path)))


def logits(path: Path, tokens: list[int]) -> np.ndarray:
    """Of one row of tokens, "t v"."""
    graph, state = nnx.split(load_model(open_checkpoint(path)))
    ids = jnp.asarray([tokens], jnp.int32)
    positions = jnp.arange(len(tokens), dtype=jnp.int32)[None]

    def run(state: Any) -> Any:
        return nnx.merge(graph, state)(ids, positions)[0]

    # These models run once, so that compiling is all their time.
    options = {"xla_backend_optimization_level": 0}
    return np.asarray(jax.jit(run, compiler_options=options)(state)[0])


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_model(open_checkpoint(path))
    return str(caught.value)


def faults(path: Path) -> set[str]:
    """The lines of the one error."""
    first, *lines = refusal(path).split("\n  ")
    assert f"{len(lines)} faults:" in first
    return set(lines)


def write(folder: Path, config: Mapping[str, Any], arrays: Arrays) -> Path:
    """A Hugging Face checkpoint."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(arrays, folder / "model.safetensors")
    return folder


def bare(name: str, **options: Any) -> Arrays:
    """A synthetic decoder's tensors without their prefix."""
    prefix = "model.language_model."
    arrays = synthetic.tensors(name, prefix=prefix, **options)
    return {k.removeprefix(prefix): a for k, a in arrays.items() if k.startswith(prefix)}


def small(family: str = "gemma3") -> tuple[dict[str, Any], Arrays]:
    """Configuration and tensors of a synthetic model cut off after two layers."""
    config = {**TINY[family], "num_hidden_layers": 2}
    cut_off = re.compile(r"model\.layers\.[2-9]\.")
    arrays = {k: a for k, a in synthetic.tensors(family).items() if not cut_off.match(k)}
    return config, arrays


def expected_parameters(arrays: Arrays, config: GemmaConfig) -> Arrays:
    """What our parameters must hold, from the tensors of a Hugging Face decoder."""
    expected = {
        "embedder.table.weight": arrays["embed_tokens.weight"].T,
        "final_norm.scale": arrays["norm.weight"],
    }
    norms = {
        "norm_before_attention": "input_layernorm",
        "norm_after_attention": "post_attention_layernorm",
        "norm_before_feed_forward": "pre_feedforward_layernorm",
        "norm_after_feed_forward": "post_feedforward_layernorm",
        "attention.query_norm": "self_attn.q_norm",
        "attention.key_norm": "self_attn.k_norm",
    }
    if config.family == "gemma":
        norms["norm_before_feed_forward"] = norms.pop("norm_after_attention")
    matrices = {
        "attention.query_key_value": [f"self_attn.{part}_proj" for part in "qkv"],
        "attention.output": ["self_attn.o_proj"],
        "feed_forward.gate_up": ["mlp.gate_proj", "mlp.up_proj"],
        "feed_forward.down": ["mlp.down_proj"],
    }
    for layer in range(config.num_layers):
        theirs = f"layers.{layer}."
        for ours, name in norms.items():
            if f"{theirs}{name}.weight" in arrays:
                expected[f"layers.{layer}.{ours}.scale"] = arrays[f"{theirs}{name}.weight"]
        for ours, names in matrices.items():
            joined = np.concatenate([arrays[f"{theirs}{name}.weight"] for name in names])
            expected[f"layers.{layer}.{ours}.weight"] = joined.T
    return expected


def assert_same(got: Mapping[str, Any], expected: Mapping[str, np.ndarray]) -> None:
    """The same names, types and bits."""
    assert set(got) == set(expected)
    for name, array in expected.items():
        ours = np.asarray(got[name])
        assert (ours.dtype, ours.shape) == (array.dtype, array.shape), name
        assert ours.tobytes() == array.tobytes(), name


def rewrite_gguf(path: Path, template: Path, change: Callable[[Arrays], Any]) -> Path:
    """A template's configuration, and its tensors with changes.

    Args:
        change: alters a dictionary of the tensors as the file stores them. A quantized one is a
            matrix of bytes; what is added is of the type that its dtype says, bytes being Q8_0.
    """
    metadata = GGUFFile(template).metadata
    architecture = metadata["general.architecture"]
    reader = GGUFReader(template)
    types = {tensor.name: tensor.tensor_type for tensor in reader.tensors}
    arrays = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    change(arrays)

    writer = GGUFWriter(path, architecture)
    for key, value in metadata.items():
        if key.startswith(f"{architecture}.") and isinstance(value, float):
            writer.add_float32(key, value)
        elif key.startswith(f"{architecture}."):
            writer.add_uint32(key, value)
    for name, array in arrays.items():
        added = GGMLQuantizationType.Q8_0 if array.dtype == np.uint8 else None
        writer.add_tensor(name, array, raw_dtype=types.get(name, added))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


GGUF_NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def as_hugging_face(path: Path, config: GemmaConfig) -> Arrays:
    """The tensors of a GGUF file under their other names, read with the gguf package alone."""
    arrays: Arrays = {}
    for tensor in GGUFReader(path).tensors:
        *at, name, _ = tensor.name.split(".")
        theirs = GGUF_NAMES[name]
        if config.family == "gemma" and name == "ffn_norm":
            theirs = "post_attention_layernorm"
        layer = f"layers.{at[1]}." if at else ""
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        arrays[f"{layer}{theirs}.weight"] = values.astype(np.float32)
    return arrays
