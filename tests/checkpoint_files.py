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
from refimpl_kernels.matrix import Quantized, dequantize
from refimpl_weights import synthetic
from refimpl_weights.gguf import GGUFFile
from refimpl_weights.synthetic import TINY
from safetensors.numpy import save_file

from refimpl.errors import CheckpointError
from refimpl.model.checkpoint import open_checkpoint
from refimpl.model.config import GemmaConfig
from refimpl.model.parameters import load_model
from refimpl.model.transformer import Transformer

Arrays = dict[str, np.ndarray]


def parameters(model: Transformer) -> dict[str, Any]:
    """Every parameter by its path, such as "layers.0.attention.output.weight"."""
    flat = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): variable.get_value() for path, variable in flat}


def as_float32(leaf: Any) -> np.ndarray:
    """A parameter's numbers, whatever it is stored as."""
    return np.asarray(dequantize(leaf) if isinstance(leaf, Quantized) else leaf, np.float32)


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


# What our layers call the vectors and matrices of a Hugging Face layer.
VECTORS = {
    "norm_before_attention.scale": "input_layernorm.weight",
    "norm_after_attention.scale": "post_attention_layernorm.weight",
    "norm_before_feed_forward.scale": "pre_feedforward_layernorm.weight",
    "norm_after_feed_forward.scale": "post_feedforward_layernorm.weight",
    "attention.query_norm.scale": "self_attn.q_norm.weight",
    "attention.key_norm.scale": "self_attn.k_norm.weight",
    "scalar.factor": "layer_scalar",
    "per_layer_input.norm.scale": "post_per_layer_input_norm.weight",
    "experts.router_scale": "router.scale",
    "experts.expert_scale": "router.per_expert_scale",
    "experts.norm_before.scale": "pre_feedforward_layernorm_2.weight",
    "experts.norm_after.scale": "post_feedforward_layernorm_2.weight",
    "experts.norm_after_dense.scale": "post_feedforward_layernorm_1.weight",
    "streams.router_norm.scale": "altup.router_norm.weight",
    "streams.output_scale": "altup.correct_output_scale",
    "laurel.norm.scale": "laurel.post_laurel_norm.weight",
}
MATRICES = {
    "attention.query_key_value": [f"self_attn.{part}_proj.weight" for part in "qkv"],
    "attention.output": ["self_attn.o_proj.weight"],
    "feed_forward.gate_up": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    "feed_forward.down": ["mlp.down_proj.weight"],
    "per_layer_input.gate": ["per_layer_input_gate.weight"],
    "per_layer_input.output": ["per_layer_projection.weight"],
    "experts.router": ["router.proj.weight"],
    # Stacks: the matrices of all experts side by side.
    "experts.gate_up": ["experts.gate_up_proj"],
    "experts.down": ["experts.down_proj"],
    "streams.router": ["altup.modality_router.weight"],
    "streams.prediction": ["altup.prediction_coefs.weight"],
    "streams.correction": ["altup.correction_coefs.weight"],
    "laurel.left": ["laurel.linear_left.weight"],
    "laurel.right": ["laurel.linear_right.weight"],
}
OUTSIDE_LAYERS = {
    "embedder.table": ["embed_tokens.weight"],
    "per_layer_embedder.table": ["embed_tokens_per_layer.weight"],
    "per_layer_embedder.projection": ["per_layer_model_projection.weight"],
    "streams.into": [f"altup_projections.{stream}.weight" for stream in range(3)],
    "streams.back": [f"altup_unembed_projections.{stream}.weight" for stream in range(3)],
}


def expected_parameters(arrays: Arrays, config: GemmaConfig) -> Arrays:
    """What our parameters must hold, from the tensors of a Hugging Face decoder."""
    expected = {"final_norm.scale": arrays["norm.weight"]}
    if "per_layer_projection_norm.weight" in arrays:
        expected["per_layer_embedder.norm.scale"] = arrays["per_layer_projection_norm.weight"]
    expected |= joined(arrays, OUTSIDE_LAYERS)
    vectors = dict(VECTORS)
    if config.family == "gemma":
        vectors["norm_before_feed_forward.scale"] = vectors.pop("norm_after_attention.scale")
    for layer, spec in enumerate(config.layers):
        at = f"layers.{layer}."
        inside = {key.removeprefix(at): a for key, a in arrays.items() if key.startswith(at)}
        if spec.donor is not None:
            # Released files hold them, and nothing reads them.
            for unread in ("k_proj", "v_proj", "k_norm"):
                inside.pop(f"self_attn.{unread}.weight", None)
        found = {ours: inside[name] for ours, name in vectors.items() if name in inside}
        found |= joined(inside, MATRICES)
        expected |= {f"{at}{ours}": array for ours, array in found.items()}
    return expected


def joined(arrays: Arrays, table: Mapping[str, list[str]]) -> Arrays:
    """Those matrices of the table that are there, one beside the other and "i o"."""
    found = {
        ours: [array.reshape(-1, array.shape[-1]) for array in map(arrays.get, names)
               if array is not None]
        for ours, names in table.items()
    }  # fmt: skip
    return {f"{ours}.weight": np.concatenate(parts).T for ours, parts in found.items() if parts}


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
            matrix of bytes; bytes that are added are Q8_0, and numbers are what their dtype says.
    """
    metadata = GGUFFile(template).metadata
    architecture = metadata["general.architecture"]
    reader = GGUFReader(template)
    types = {tensor.name: tensor.tensor_type for tensor in reader.tensors}
    arrays = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    change(arrays)

    writer = GGUFWriter(path, architecture)
    for key, value in metadata.items():
        if not key.startswith(f"{architecture}."):
            continue
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    for name, array in arrays.items():
        stored_as = types.get(name, GGMLQuantizationType.Q8_0) if array.dtype == np.uint8 else None
        writer.add_tensor(name, array, raw_dtype=stored_as)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# Of whole names, because some end with ".weight" on one side alone.
GGUF_NAMES = {
    "token_embd.weight": "embed_tokens.weight",
    "output_norm.weight": "norm.weight",
    "per_layer_token_embd.weight": "embed_tokens_per_layer.weight",
    "per_layer_model_proj.weight": "per_layer_model_projection.weight",
    "per_layer_proj_norm.weight": "per_layer_projection_norm.weight",
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "ffn_norm.weight": "pre_feedforward_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
    "layer_output_scale.weight": "layer_scalar",
    "inp_gate.weight": "per_layer_input_gate.weight",
    "proj.weight": "per_layer_projection.weight",
    "post_norm.weight": "post_per_layer_input_norm.weight",
    "ffn_gate_inp.weight": "router.proj.weight",
    "ffn_gate_inp.scale": "router.scale",
    "ffn_gate_up_exps.weight": "experts.gate_up_proj",
    "ffn_down_exps.weight": "experts.down_proj",
    "ffn_down_exps.scale": "router.per_expert_scale",
    "pre_ffw_norm_2.weight": "pre_feedforward_layernorm_2.weight",
    "post_ffw_norm_1.weight": "post_feedforward_layernorm_1.weight",
    "post_ffw_norm_2.weight": "post_feedforward_layernorm_2.weight",
    "altup_correct_coef.weight": "altup.correction_coefs.weight",
    "altup_predict_coef.weight": "altup.prediction_coefs.weight",
    "altup_correct_scale.weight": "altup.correct_output_scale",
    "altup_router.weight": "altup.modality_router.weight",
    "altup_router_norm.weight": "altup.router_norm.weight",
    "laurel_l.weight": "laurel.linear_left.weight",
    "laurel_r.weight": "laurel.linear_right.weight",
    "laurel_post_norm.weight": "laurel.post_laurel_norm.weight",
}
GGUF_STACKS = {
    "altup_proj.weight": "altup_projections",
    "altup_unembd_proj.weight": "altup_unembed_projections",
}


def as_hugging_face(path: Path, config: GemmaConfig) -> Arrays:
    """The tensors of a GGUF file under their other names, read with the gguf package alone."""
    arrays: Arrays = {}
    for tensor in GGUFReader(path).tensors:
        *at, name, kind = tensor.name.split(".")
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if name == "rope_freqs":
            continue
        if f"{name}.{kind}" in GGUF_STACKS:
            for index, matrix in enumerate(values):
                arrays[f"{GGUF_STACKS[f'{name}.{kind}']}.{index}.weight"] = matrix
            continue
        theirs = GGUF_NAMES[f"{name}.{kind}"]
        if config.family == "gemma" and name == "ffn_norm":
            theirs = "post_attention_layernorm.weight"
        arrays[f"layers.{at[1]}.{theirs}" if at else theirs] = values
    return arrays
