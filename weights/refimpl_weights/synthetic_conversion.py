"""Tiny Gemma 3n and Gemma 4 models as GGUF files: what llama.cpp's converter makes of them.

Owns what the converter does to these generations, and the types that a file's tensors get. The
weights are those of `synthetic.tensors`; names are the gguf package's, which are llama.cpp's own.
Sources: llama.cpp `conversion/base.py`, `conversion/gemma.py`.

llama.cpp loads these files of Gemma 4. Of Gemma 3n it knows by heart where sharing of keys begins,
which layers are sparse, and how wide per-layer input and low-rank residual are, so it takes none
that is this small.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from gguf import (
    GGML_QUANT_SIZES,
    MODEL_ARCH,
    GGMLQuantizationType,
    GGUFWriter,
    get_tensor_name_map,
)

from refimpl_weights import synthetic_decoders as decoders
from refimpl_weights.synthetic_blocks import quantize
from refimpl_weights.synthetic_configs_newer import GEMMA3N, GEMMA4, GEMMA4_E2B, GEMMA4_MOE
from refimpl_weights.synthetic_conversion_metadata import add_configuration
from refimpl_weights.synthetic_drawing import draw
from refimpl_weights.synthetic_gguf import FILE_TYPES
from refimpl_weights.synthetic_gguf_vocabulary import add_vocabulary

Tensors = dict[str, np.ndarray]

CONVERTIBLE: Mapping[str, dict[str, Any]] = MappingProxyType(
    {
        "gemma3n": GEMMA3N,
        "gemma4": GEMMA4,
        "gemma4_e2b": GEMMA4_E2B,
        "gemma4_moe": GEMMA4_MOE,
    }
)
"""The keys of `synthetic.TINY` that this module writes."""

# Matrices that the converter never rounds, whatever the file's type.
_ALWAYS_FLOAT32 = ("ffn_gate_inp.weight", "altup_correct_coef.weight", "altup_predict_coef.weight")
# A pair of a global layer that does not turn has its angle divided by this.
_STANDING_STILL = 1e30


def write_gguf(
    path: str | Path,
    name: str,
    *,
    seed: int = 0,
    tensor_type: str = "F32",
    is_wide: bool = False,
    shared_tensors: bool = True,
    has_fused_experts: bool = True,
) -> Path:
    """Write a whole model to one file.

    Args:
        path: of the file, which is replaced if it is there.
        name: a key of `CONVERTIBLE`.
        seed: of the weights; the same arguments give the same bytes everywhere.
        tensor_type: of every matrix that the converter rounds, a key of `FILE_TYPES` that is one
            type. A matrix whose columns are no whole number of blocks becomes F16.
        is_wide: whether the widths are those of `wide`, so that every type fits.
        shared_tensors: whether layers without keys of their own have such tensors nevertheless.
        has_fused_experts: whether gate and up projections of the experts are one tensor.

    Returns:
        The path.

    Raises:
        ValueError: an unknown name or tensor type.
    """
    types = [key for key in FILE_TYPES if key in GGMLQuantizationType.__members__]
    if tensor_type not in types:
        raise ValueError(f"tensor_type is {tensor_type!r}, expected one of {', '.join(types)}")
    config = text_config(name, is_wide=is_wide)
    arrays = tensors(
        name,
        seed=seed,
        is_wide=is_wide,
        shared_tensors=shared_tensors,
        has_fused_experts=has_fused_experts,
    )
    path = Path(path)
    writer = GGUFWriter(path, architecture(name))
    writer.add_type("model")
    writer.add_name(f"Synthetic {name}")
    add_configuration(writer, config)
    add_vocabulary(
        writer, model="llama" if name == "gemma3n" else "gemma4", size=config["vocab_size"]
    )
    writer.add_quantization_version(2)
    writer.add_file_type(FILE_TYPES[tensor_type])
    for key, array in arrays.items():
        stored_as = _stored_type(key, array, GGMLQuantizationType[tensor_type])
        writer.add_tensor(key, quantize(array, stored_as), raw_dtype=stored_as)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensors(
    name: str,
    *,
    seed: int = 0,
    is_wide: bool = False,
    shared_tensors: bool = True,
    has_fused_experts: bool = True,
) -> Tensors:
    """The weights of `write_gguf` by their names in the file, before they are rounded to a type.

    Raises:
        ValueError: an unknown name.
    """
    config = text_config(name, is_wide=is_wide)
    generator = np.random.PCG64(seed)
    drawn = {plan.name: draw(generator, plan) for plan in decoders.decoder(config)}
    if not shared_tensors:
        unused = decoders.unused(config)
        drawn = {key: array for key, array in drawn.items() if key not in unused}
    arrays = dict(_converted(drawn, config, architecture(name)))
    return arrays if has_fused_experts else _with_parted_experts(arrays)


def architecture(name: str) -> str:
    """What the file of a model calls its architecture."""
    return "gemma3n" if name == "gemma3n" else "gemma4"


def text_config(name: str, *, is_wide: bool) -> dict[str, Any]:
    """The text model's part of a configuration, as it is in `synthetic.TINY` or wider.

    Raises:
        ValueError: an unknown name.
    """
    if name not in CONVERTIBLE:
        raise ValueError(f"name is {name!r}, expected one of {', '.join(CONVERTIBLE)}")
    config = CONVERTIBLE[name].get("text_config", CONVERTIBLE[name])
    return wide(config) if is_wide else config


def wide(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same model with 256 columns, or a multiple of that, in what files are rounded for.

    Left narrow are only the low-rank residual and the routers of streams, which are small
    everywhere.
    """
    widths = {
        "hidden_size": 256,
        "intermediate_size": 256,
        "head_dim": 64,
        "global_head_dim": 128,
        "moe_intermediate_size": 256,
        "hidden_size_per_layer_input": 256,
    }
    # 0 and None say that there is no such part.
    wider = {**config, **{key: width for key, width in widths.items() if config.get(key)}}
    if isinstance(config["intermediate_size"], list):
        wider["intermediate_size"] = [256] * config["num_hidden_layers"]
    if "per_layer_config" in config:
        wider["per_layer_config"] = {
            layer: {**own, "head_dim": 128} for layer, own in config["per_layer_config"].items()
        }
    return wider


def _converted(
    drawn: Tensors, config: Mapping[str, Any], arch: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors under llama.cpp's names, in its shapes; norms are factors as they stand."""
    known = get_tensor_name_map(MODEL_ARCH[arch.upper()], config["num_hidden_layers"])
    streams = range(config.get("altup_num_inputs", 1) - 1)
    for ours, theirs in (("projections", "proj"), ("unembed_projections", "unembd_proj")):
        stack = [drawn.pop(f"altup_{ours}.{stream}.weight") for stream in streams]
        if stack:
            yield f"altup_{theirs}.weight", np.stack(stack)
    for name, array in drawn.items():
        layer = name.removeprefix("layers.").split(".")[0]
        if name.endswith("router.scale"):
            yield f"blk.{layer}.ffn_gate_inp.scale", array
        elif name.endswith("router.per_expert_scale"):
            yield f"blk.{layer}.ffn_down_exps.scale", array
        else:
            # Some parameters are no weight of any module, and are called one here.
            full = f"model.{name.removesuffix('.weight')}.weight"
            theirs = known.get_name(full, try_suffixes=(".weight",))
            if theirs is None:
                raise ValueError(f"llama.cpp has no name for {name}")
            if arch == "gemma3n" and theirs == "per_layer_token_embd.weight":
                array = _padded(array, config["vocab_size"])
            yield theirs, array
    if arch == "gemma4":
        yield "rope_freqs.weight", _rope_divisors(config)


def _padded(table: np.ndarray, rows: int) -> np.ndarray:
    """With zeros for ids that the table of per-layer inputs lacks."""
    return np.pad(table, ((0, rows - len(table)), (0, 0)))


def _rope_divisors(config: Mapping[str, Any]) -> np.ndarray:
    """By what each pair's angle is divided in global layers, of which a share turns."""
    layer = config["layer_types"].index("full_attention")
    _, width = decoders.key_value_shape(config, layer)
    share = config["rope_parameters"]["full_attention"]["partial_rotary_factor"]
    turning = int(width * share / 2)
    divisors = np.full(width // 2, _STANDING_STILL, np.float32)
    divisors[:turning] = 1.0
    return divisors


def _with_parted_experts(arrays: Tensors) -> Tensors:
    """Gate and up projections of all experts as two tensors, as older files have them."""
    parted: Tensors = {}
    for name, array in arrays.items():
        if name.endswith("ffn_gate_up_exps.weight"):
            gate, up = np.split(array, 2, axis=1)
            parted[name.replace("gate_up", "gate")] = gate
            parted[name.replace("gate_up", "up")] = up
        else:
            parted[name] = array
    return parted


def _stored_type(
    name: str, array: np.ndarray, wanted: GGMLQuantizationType
) -> GGMLQuantizationType:
    if array.ndim == 1 or name.endswith(_ALWAYS_FLOAT32):
        return GGMLQuantizationType.F32
    block, _ = GGML_QUANT_SIZES[wanted]
    return wanted if array.shape[-1] % block == 0 else GGMLQuantizationType.F16
