"""An open checkpoint: which architecture it holds, and where its tensors are.

Headers and configurations are read here, of GGUF files and of Hugging Face folders; of the weights
nothing but what the architecture depends on. `parameters.py` reads the rest.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from refimpl_weights.errors import WeightsError
from refimpl_weights.gguf import GGUFFile
from refimpl_weights.quantized import QuantizedArray
from refimpl_weights.safetensors import SafetensorsCheckpoint
from refimpl_weights.source import TensorSource

from refimpl.errors import CheckpointError
from refimpl.model import names
from refimpl.model.config import GemmaConfig
from refimpl.model.gguf_config import from_gguf
from refimpl.model.hf_config import from_hugging_face

_WHAT_A_CHECKPOINT_IS = (
    "a checkpoint is a .gguf file, or a folder with config.json and safetensors files"
)
# What a GGUF file of Gemma 4 says about the rotary embedding of its global layers.
_ROPE_DIVISORS = "rope_freqs.weight"


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint whose architecture is known, and of which no tensor is in memory.

    Attributes:
        path: the file or folder that it was opened with.
        config: the architecture.
        source: the tensors.
        available: the text decoder's tensors: our table's name, and the file's.
        ignored: tensors of other modalities, which a text decoder has no use for.
        sources: where each parameter comes from.
        unread: tensors that may be there together and that no parameter comes from.
        suppressed_ids: ids that the checkpoint wants never drawn.
    """

    path: Path
    config: GemmaConfig
    source: TensorSource
    available: Mapping[str, str]
    ignored: tuple[str, ...]
    sources: Mapping[names.Path, names.Sources]
    unread: tuple[names.Shapes, ...] = ()
    suppressed_ids: tuple[int, ...] = ()


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Read headers and configuration of a GGUF file or a Hugging Face folder.

    Args:
        path: a file `x.gguf`; a folder with `config.json` and safetensors; or one of its files,
            `x.safetensors` or `x.index.json`, where the folder holds several.

    Raises:
        CheckpointError: nothing there, or not a checkpoint.
        ConfigError: the architecture is not one we carry.
    """
    path = Path(path)
    try:
        if not path.exists():
            raise CheckpointError(f"there is nothing at {path}; {_WHAT_A_CHECKPOINT_IS}")
        if path.is_dir() or path.name.endswith((".safetensors", ".index.json")):
            return _open_hugging_face(path)
        return _open_gguf(path)
    except WeightsError as error:
        raise CheckpointError(str(error)) from error
    except OSError as error:
        raise CheckpointError(f"cannot open {path}: {error}; {_WHAT_A_CHECKPOINT_IS}") from error


def _open_gguf(path: Path) -> Checkpoint:
    file = GGUFFile(path)
    stored = set(file.names())
    if "token_embd.weight" not in stored:
        raise CheckpointError(f"{path} holds no token_embd.weight; is it a language model?")
    shape = file.shape("token_embd.weight")
    if len(shape) != 2:
        raise CheckpointError(f"{path}: token_embd.weight must be a matrix, got shape {shape}")
    tied = "output.weight" not in stored or _is_alias(file, "output.weight", "token_embd.weight")
    config = from_gguf(
        file.metadata,
        vocab_size=shape[0],
        has_tied_head=tied,
        shapes={name: file.shape(name) for name in stored},
        rope_divisors=_rope_divisors(file),
    )
    available = {name: name for name in file.names()}
    if config.family == "gemma4_text":
        # Read, as part of the architecture. In a file of another one nothing reads it.
        del available[_ROPE_DIVISORS]
    checkpoint = _checkpoint(path, config, file, available, (), names.gguf_sources(config))
    checkpoint = replace(checkpoint, unread=names.gguf_unread(config))
    return _with_suppressed(checkpoint, file.metadata, "tokenizer.ggml.suppress_tokens")


def _rope_divisors(file: GGUFFile) -> list[float] | None:
    """By what the angle of each pair is divided in global layers, where the file says so."""
    if _ROPE_DIVISORS not in file.names():
        return None
    stored = file.read(_ROPE_DIVISORS)
    dense = stored.dequantize() if isinstance(stored, QuantizedArray) else stored
    return dense.astype(np.float64).reshape(-1).tolist()


def _open_hugging_face(path: Path) -> Checkpoint:
    folder = path if path.is_dir() else path.parent
    config = read_json(folder / "config.json")
    generation_file = folder / "generation_config.json"
    generation = read_json(generation_file) if generation_file.is_file() else {}
    architecture = from_hugging_face(config, generation=generation)
    source = SafetensorsCheckpoint(path)
    available, ignored = names.strip_prefix(source.names())
    head, table = available.get("lm_head.weight"), available.get("embed_tokens.weight")
    if head is not None and table is not None and architecture.has_tied_head:
        # Some exports write the alias out. A head that differs was trained apart: it is the truth.
        tied = _is_alias(source, head, table)
        architecture = replace(architecture, has_tied_head=tied)
    sources = names.hugging_face_sources(architecture)
    checkpoint = _checkpoint(path, architecture, source, available, ignored, sources)
    checkpoint = replace(checkpoint, unread=names.hugging_face_unread(architecture))
    return _with_suppressed(checkpoint, generation, "suppress_tokens")


def _checkpoint(
    path: Path,
    config: GemmaConfig,
    source: TensorSource,
    available: Mapping[str, str],
    ignored: tuple[str, ...],
    sources: Mapping[names.Path, names.Sources],
) -> Checkpoint:
    if config.has_tied_head:
        # What is left under these names is an alias of the embedding.
        available = {k: v for k, v in available.items() if k not in names.HEADS}
    return Checkpoint(path, config, source, available, ignored, sources)


def _with_suppressed(checkpoint: Checkpoint, place: Mapping[str, Any], key: str) -> Checkpoint:
    """The checkpoint with the ids under this key, which a file need not have."""
    ids = [] if place.get(key) is None else place[key]
    v = checkpoint.config.vocab_size
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < v for i in ids):
        raise CheckpointError(
            f"{checkpoint.path}: {key} must be a list of ids in 0..{v - 1}, got {ids!r:.80}"
        )
    return replace(checkpoint, suppressed_ids=tuple(ids))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint.

    Raises:
        CheckpointError: no such file, or no JSON object in it.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"there is no {path.name} in {path.parent}; {_WHAT_A_CHECKPOINT_IS}"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def _is_alias(source: TensorSource, one: str, other: str) -> bool:
    """Whether two tensors hold the same bytes."""
    if source.shape(one) != source.shape(other):
        return False
    pair = (source.read(one), source.read(other))
    if not any(isinstance(array, QuantizedArray) for array in pair):
        return _same_bytes(*(np.asarray(array) for array in pair))
    if not all(isinstance(array, QuantizedArray) for array in pair):
        return False
    first, second = (_parts(array) for array in pair)
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def _same_bytes(one: np.ndarray, other: np.ndarray, *, band: int = 1024) -> bool:
    """Compared in bands of rows: two embeddings are enough to hold, without copies of both."""
    return one.dtype == other.dtype and all(
        one[row : row + band].tobytes() == other[row : row + band].tobytes()
        for row in range(0, len(one), band)
    )


def _parts(array: np.ndarray | QuantizedArray) -> tuple[Any, ...]:
    if isinstance(array, QuantizedArray):
        return array.values, array.scales, array.minimums
    return (array,)
