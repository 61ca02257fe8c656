"""Tiny random Gemma models as GGUF files, complete with configuration and vocabulary.

Owns the plan of tensors and metadata of Gemma 1 to 3, and the types that a file may be stored in;
Gemma 3n and Gemma 4 are `synthetic_conversion.py`'s. The files have what llama.cpp's converter
writes: its names, its key-value pairs, norm weights with 1 added, and every vector in float32. All
matrices have 256 columns or 512, so that every type fits.

The weights depend on architecture and seed alone, not on the type that they are stored in, and they
are the same with every numpy: raw bits of PCG64, the one thing numpy promises never to change, and
correctly rounded arithmetic.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, RopeScalingType
from jaxtyping import Float32

from refimpl_weights import synthetic_tokenizer as tokenizer
from refimpl_weights.synthetic_blocks import quantize
from refimpl_weights.synthetic_gguf_vocabulary import add_vocabulary

EMBEDDING_LENGTH = 256
FEED_FORWARD_LENGTH = 512
HEADS = 4
HEAD_WIDTH = 64
WINDOW = 8

# The name that `tensor_type` takes, and what the file calls itself then.
FILE_TYPES: Mapping[str, LlamaFileType] = MappingProxyType(
    {
        "F32": LlamaFileType.ALL_F32,
        "F16": LlamaFileType.MOSTLY_F16,
        "BF16": LlamaFileType.MOSTLY_BF16,
        "Q4_0": LlamaFileType.MOSTLY_Q4_0,
        "Q4_1": LlamaFileType.MOSTLY_Q4_1,
        "Q5_0": LlamaFileType.MOSTLY_Q5_0,
        "Q5_1": LlamaFileType.MOSTLY_Q5_1,
        "Q8_0": LlamaFileType.MOSTLY_Q8_0,
        "Q4_K": LlamaFileType.MOSTLY_Q4_K_S,
        "Q5_K": LlamaFileType.MOSTLY_Q5_K_S,
        "Q6_K": LlamaFileType.MOSTLY_Q6_K,
        "Q4_K_M": LlamaFileType.MOSTLY_Q4_K_M,
    }
)

# The types of the released Gemma 3 270M in Q4_K_M; its 640 columns are why Q5_0 is among them.
_MIXTURE: Mapping[str, str] = MappingProxyType(
    {
        "token_embd": "Q8_0",
        "attn_q": "Q5_0",
        "attn_k": "Q5_0",
        "attn_v": "Q8_0",
        "attn_output": "Q4_K",
        "ffn_gate": "Q5_0",
        "ffn_up": "Q5_0",
        "ffn_down": "Q6_K",
    }
)


@dataclass(frozen=True)
class _Shape:
    """What differs between the generations."""

    layers: int
    kv_heads: int
    has_post_norms: bool
    has_query_key_norms: bool


_SHAPES: Mapping[str, _Shape] = MappingProxyType(
    {
        "gemma": _Shape(2, kv_heads=1, has_post_norms=False, has_query_key_norms=False),
        "gemma2": _Shape(4, kv_heads=2, has_post_norms=True, has_query_key_norms=False),
        # Five local layers and a global one.
        "gemma3": _Shape(6, kv_heads=1, has_post_norms=True, has_query_key_norms=True),
    }
)


ARCHITECTURES: tuple[str, ...] = tuple(_SHAPES)


class _Planned(NamedTuple):
    """A tensor to be drawn: uniform in [centre - spread, centre + spread)."""

    name: str
    shape: tuple[int, ...]
    centre: float
    spread: float


def write_gguf(
    path: str | Path,
    *,
    architecture: str,
    seed: int = 0,
    tensor_type: str = "Q8_0",
    layers: int | None = None,
    rope_factor: float | None = None,
) -> Path:
    """Write a whole model to one file.

    Args:
        path: of the file, which is replaced if it is there.
        architecture: one of `ARCHITECTURES`, as the file's `general.architecture` spells it.
        seed: of the weights; the same arguments give the same bytes everywhere.
        tensor_type: of every matrix, a key of `FILE_TYPES`. "Q4_K_M" gives each kind of matrix the
            type that it has in the released Gemma 3 270M, so that one file holds four.
        layers: number of layers, None for 2 (gemma), 4 (gemma2) or 6 (gemma3).
        rope_factor: linear scaling of positions, as Gemma 3 has it from 4B on; None for none.

    Returns:
        The path.

    Raises:
        ValueError: an unknown architecture or tensor type, or fewer than one layer.
    """
    if tensor_type not in FILE_TYPES:
        raise ValueError(f"tensor_type is {tensor_type!r}, expected one of {', '.join(FILE_TYPES)}")
    arrays = tensors(architecture, seed=seed, layers=layers)
    path = Path(path)
    writer = GGUFWriter(path, architecture)
    _add_configuration(writer, architecture, _shape(architecture, layers))
    if rope_factor is not None:
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope_factor)
    add_vocabulary(writer, model="llama")
    writer.add_quantization_version(2)
    writer.add_file_type(FILE_TYPES[tensor_type])
    for name, array in arrays.items():
        stored_as = GGMLQuantizationType[_stored_type(name, array, tensor_type)]
        writer.add_tensor(name, quantize(array, stored_as), raw_dtype=stored_as)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensors(
    architecture: str, *, seed: int = 0, layers: int | None = None
) -> dict[str, Float32[np.ndarray, "..."]]:
    """The weights of `write_gguf` by their names in the file, before they are rounded to a type.

    Raises:
        ValueError: an unknown architecture, or fewer than one layer.
    """
    generator = np.random.PCG64(seed)
    plan = _plan(architecture, _shape(architecture, layers))
    return {planned.name: _draw(generator, planned) for planned in plan}


def _shape(architecture: str, layers: int | None) -> _Shape:
    if architecture not in _SHAPES:
        raise ValueError(f"architecture is {architecture!r}, expected one of {', '.join(_SHAPES)}")
    shape = _SHAPES[architecture]
    if layers is None:
        return shape
    if layers < 1:
        raise ValueError(f"layers is {layers}, expected 1 or more")
    return replace(shape, layers=layers)


def _stored_type(name: str, array: np.ndarray, tensor_type: str) -> str:
    if array.ndim == 1:
        return "F32"
    kind = name.removesuffix(".weight").split(".")[-1]
    return _MIXTURE[kind] if tensor_type == "Q4_K_M" else tensor_type


def _plan(architecture: str, shape: _Shape) -> Iterator[_Planned]:
    """Every tensor, with scales by which mistakes show: see `synthetic.py`."""
    d, f, h = EMBEDDING_LENGTH, FEED_FORWARD_LENGTH, HEAD_WIDTH
    yield _matrix("token_embd", tokenizer.NUM_PIECES, d)
    for layer in range(shape.layers):
        at = f"blk.{layer}."
        # Without norms on q and k their size sets that of the scores; one layer hits the cap.
        qk_gain = 3.5 if architecture == "gemma2" and layer == 1 else 1.3
        yield _norm(at + "attn_norm", d)
        yield _matrix(at + "attn_q", HEADS * h, d, gain=qk_gain)
        yield _matrix(at + "attn_k", shape.kv_heads * h, d, gain=qk_gain)
        yield _matrix(at + "attn_v", shape.kv_heads * h, d)
        if shape.has_query_key_norms:
            yield _norm(at + "attn_q_norm", h, centre=0.4)
            yield _norm(at + "attn_k_norm", h, centre=0.4)
        yield _matrix(at + "attn_output", d, HEADS * h)
        if shape.has_post_norms:
            yield _norm(at + "post_attention_norm", d, centre=-0.4)
        yield _norm(at + "ffn_norm", d)
        yield _matrix(at + "ffn_gate", f, d, gain=1.2)
        yield _matrix(at + "ffn_up", f, d)
        yield _matrix(at + "ffn_down", d, f)
        if shape.has_post_norms:
            yield _norm(at + "post_ffw_norm", d, centre=-0.4)
    yield _norm("output_norm", d, spread=16.0 if architecture == "gemma2" else 4.0)


def _matrix(name: str, outputs: int, inputs: int, *, gain: float = 1.0) -> _Planned:
    """Standard deviation `gain / sqrt(inputs)`, of which a uniform bound is sqrt(3) times."""
    return _Planned(f"{name}.weight", (outputs, inputs), 0.0, gain * math.sqrt(3.0 / inputs))


def _norm(name: str, width: int, *, centre: float = 0.0, spread: float = 0.5) -> _Planned:
    """A norm's weight as the converter stores it: with 1 added."""
    return _Planned(f"{name}.weight", (width,), 1.0 + centre, spread)


def _draw(generator: np.random.PCG64, planned: _Planned) -> Float32[np.ndarray, "..."]:
    raw = generator.random_raw(math.prod(planned.shape))
    # A float64 holds 53 bits exactly, so all that rounds is one product, one sum and one cast.
    unit = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1.0
    numbers = planned.centre + planned.spread * unit
    return numbers.astype(np.float32).reshape(planned.shape)


def _add_configuration(writer: GGUFWriter, architecture: str, shape: _Shape) -> None:
    writer.add_type("model")
    writer.add_name(f"Synthetic {architecture}")
    writer.add_context_length(32768)
    writer.add_embedding_length(EMBEDDING_LENGTH)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(FEED_FORWARD_LENGTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_key_length(HEAD_WIDTH)
    writer.add_value_length(HEAD_WIDTH)
    if architecture != "gemma":
        writer.add_sliding_window(WINDOW)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(50.0)
        writer.add_final_logit_softcapping(30.0)
    if architecture == "gemma3":
        writer.add_rope_freq_base(1_000_000.0)
