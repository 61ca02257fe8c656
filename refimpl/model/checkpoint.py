"""A checkpoint on disk to a model in memory.

Our tree of parameters is walked and the file's tensors are looked up, each exactly once. Whatever
is missing, left over, of another shape or not finite is collected, and one error lists it all; a
model is never returned in part. Tensors are read one at a time and keep the file's precision.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from refimpl_kernels.matrix import QuantizedMatrix
from refimpl_weights.errors import WeightsError
from refimpl_weights.gguf import GGUFFile
from refimpl_weights.quantized import QuantizedArray
from refimpl_weights.safetensors import SafetensorsCheckpoint
from refimpl_weights.source import TensorSource

from refimpl.errors import CheckpointError
from refimpl.model import names
from refimpl.model.config import GemmaConfig
from refimpl.model.device import to_device
from refimpl.model.gguf_config import from_gguf
from refimpl.model.hf_config import from_hugging_face
from refimpl.model.numerics import FLOAT32, Numerics
from refimpl.model.transformer import Transformer

Progress = Callable[[int, int], None]

_WHAT_A_CHECKPOINT_IS = (
    "a checkpoint is a .gguf file, or a folder with config.json and safetensors files"
)
# What a GGUF file of Gemma 4 says about the rotary embedding of its global layers.
_ROPE_DIVISORS = "rope_freqs.weight"
# What the kernels widen without loss. A tensor of integers belongs to a quantization that we do not
# know, and a float64 would lose bits.
_FLOATS = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(jnp.bfloat16))


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
    """

    path: Path
    config: GemmaConfig
    source: TensorSource
    available: Mapping[str, str]
    ignored: tuple[str, ...]
    sources: Mapping[names.Path, names.Sources]


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


def load_model(
    checkpoint: Checkpoint, numerics: Numerics = FLOAT32, *, progress: Progress | None = None
) -> Transformer:
    """The model with the checkpoint's weights, matrices in the precision of the file.

    Args:
        numerics: where the forward pass rounds.
        progress: called with parameters read so far and in all.

    Raises:
        CheckpointError: listing every tensor that is missing, unused, mis-shaped, mistyped,
            unreadable or not finite.
    """
    graph, state = nnx.split(
        nnx.eval_shape(lambda: Transformer(checkpoint.config, numerics, rngs=nnx.Rngs(0)))
    )
    wanted = {path: variable.get_value().shape for path, variable in nnx.to_flat_state(state)}
    plan, faults = _plan(checkpoint, wanted)
    arrays, more_faults = _read_all(
        checkpoint, plan, wanted, progress or _no_progress, keep=not faults
    )
    _raise_if(faults + more_faults, checkpoint)
    return nnx.merge(graph, nnx.traversals.unflatten_mapping(arrays))


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
    return _checkpoint(path, config, file, available, (), names.gguf_sources(config))


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
    return _checkpoint(path, architecture, source, available, ignored, sources)


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


def _plan(
    checkpoint: Checkpoint, wanted: Mapping[names.Path, tuple[int, ...]]
) -> tuple[dict[names.Path, tuple[str, ...]], list[str]]:
    """The file's tensors for each of our parameters, and all that does not fit."""
    faults: list[str] = []
    plan: dict[names.Path, tuple[str, ...]] = {}
    used: set[str] = set()
    for path, shape in wanted.items():
        alternatives = checkpoint.sources[path].alternatives
        chosen = next(
            (found for found in alternatives if all(n in checkpoint.available for n in found)),
            alternatives[0],
        )
        used.update(chosen)
        missing = [name for name in chosen if name not in checkpoint.available]
        faults += [f"missing: {name}" for name in missing]
        if not missing:
            plan[path] = tuple(checkpoint.available[name] for name in chosen)
            faults += _shape_faults(checkpoint, path, plan[path], shape)
    used |= names.unread(checkpoint.config)
    faults += [f"unused: {full}" for name, full in checkpoint.available.items() if name not in used]
    return plan, faults


def _shape_faults(
    checkpoint: Checkpoint, path: names.Path, tensors: tuple[str, ...], wanted: tuple[int, ...]
) -> list[str]:
    """What is wrong with the shapes, given that joined and transposed they must be `wanted`."""
    shapes = [checkpoint.source.shape(name) for name in tensors]
    if len(wanted) == 1:
        expected = [wanted]
    else:
        # One by one: a query too narrow and a key too wide would add up to the right sum.
        single = len(tensors) == 1
        joined = wanted[1:] if single else names.joined_outputs(checkpoint.config, path)
        expected = [(outputs, wanted[0]) for outputs in joined]
        height = names.stack_height(checkpoint.config, path)
        expected = [
            (height, outputs // height, inputs) if len(shape) == 3 else (outputs, inputs)
            for shape, (outputs, inputs) in zip(shapes, expected, strict=True)
        ]
    return [
        f"mis-shaped: {name} is {got}, expected {shape}"
        for name, got, shape in zip(tensors, shapes, expected, strict=True)
        if got != shape
    ]


def _read_all(
    checkpoint: Checkpoint,
    plan: Mapping[names.Path, tuple[str, ...]],
    wanted: Mapping[names.Path, tuple[int, ...]],
    progress: Progress,
    *,
    keep: bool,
) -> tuple[dict[names.Path, Array | QuantizedMatrix], list[str]]:
    """Every parameter, and what is wrong with the tensors' content.

    From the first fault on, or from the start unless `keep`, tensors are only looked through.
    """
    total = sum(int(np.prod(shape)) for shape in wanted.values())
    done, faults = 0, []
    arrays: dict[names.Path, Array | QuantizedMatrix] = {}
    for path, tensors in plan.items():
        read: list[np.ndarray | QuantizedArray] = []
        for name in tensors:
            try:
                read.append(checkpoint.source.read(name))
            except WeightsError as error:
                faults.append(f"unreadable: {error}")
            else:
                faults += _content_faults(name, read[-1])
        if keep and not faults:
            arrays[path] = to_device(read)
        done += int(np.prod(wanted[path]))
        progress(done, total)
    return arrays, faults


def _content_faults(name: str, array: np.ndarray | QuantizedArray) -> list[str]:
    if isinstance(array, QuantizedArray):
        floats = [part for part in (array.scales, array.minimums) if part is not None]
    elif array.dtype in _FLOATS:
        floats = [array]
    else:
        expected = ", ".join(dtype.name for dtype in _FLOATS)
        return [f"mistyped: {name} is {array.dtype.name}, expected one of {expected}"]
    return [] if all(bool(np.isfinite(part).all()) for part in floats) else [f"not finite: {name}"]


def _raise_if(faults: list[str], checkpoint: Checkpoint) -> None:
    if not faults:
        return
    listed = "\n  ".join(faults)
    raise CheckpointError(
        f"{checkpoint.path} does not hold the {checkpoint.config.family} model that its "
        f"configuration describes; {len(faults)} faults:\n  {listed}"
    )


def _no_progress(done: int, total: int) -> None:
    del done, total
