"""A checkpoint's weights as the device wants them, kept in a file for the next start.

A GGUF file packs its integers. To unpack, check and transpose those of Gemma 3 270M takes about two
seconds; to read the result about a quarter of one. So the result is kept, as a safetensors file
beside what else is derived from a checkpoint, unless it is large: then reading it is what takes
time, and a second copy on the disk is more than a user may want.

A file belongs to one state of one checkpoint, and of our sources. Any other is made anew.
"""

import hashlib
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array
from refimpl_kernels.matrix import QuantizedMatrix
from refimpl_weights.errors import WeightsError
from refimpl_weights.safetensors import SafetensorsCheckpoint, read_header
from refimpl_weights.safetensors_writer import write_safetensors

from refimpl import sources

# More than this is not kept, in bytes.
MOST_BYTES = 1 << 30

_PREFIX = "weights-"
# Between the parts of a parameter's path, and before the part of a quantized matrix.
_SLASH, _PART = "/", "#"

Tree = dict[Any, Any]


def read_prepared(folder: Path, checkpoint: Path) -> Tree | None:
    """The tree of parameters that was kept for this checkpoint; None where there is none.

    Args:
        folder: where such files are kept.
        checkpoint: a GGUF file.
    """
    path = _place(folder, checkpoint)
    try:
        file = SafetensorsCheckpoint(path)
        if file.metadata != _identity(checkpoint):
            return None
        flat = {name: file.read(name) for name in file.names()}
    except (WeightsError, OSError):
        # Missing, or damaged: then it will be made anew.
        return None
    return _unflattened(flat)


def keep_prepared(folder: Path, checkpoint: Path, parameters: Mapping[str, Any]) -> None:
    """Keep a checkpoint's parameters, unless they are more than `MOST_BYTES` or the disk is small.

    Files of checkpoints that are gone are removed.
    """
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(dict(parameters)))
    if size > MOST_BYTES:
        return
    path = _place(folder, checkpoint)
    partial = path.with_suffix(".partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_orphans(folder)
        if shutil.disk_usage(folder).free < 2 * size:
            return
        write_safetensors(partial, dict(_flattened(parameters)), metadata=_identity(checkpoint))
        partial.replace(path)
    except (WeightsError, OSError) as error:
        warnings.warn(
            f"the weights of {checkpoint} cannot be kept in {path}: {error}; every start unpacks "
            "them anew, some seconds; make the folder writable, or choose another one",
            RuntimeWarning,
            stacklevel=2,
        )
    finally:
        # After the renaming there is nothing left to remove.
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _place(folder: Path, checkpoint: Path) -> Path:
    name = hashlib.sha256(str(checkpoint.resolve()).encode()).hexdigest()[:32]
    return folder / f"{_PREFIX}{name}.safetensors"


def _identity(checkpoint: Path) -> dict[str, str]:
    """Everything that the parameters depend on."""
    status = checkpoint.stat()
    return {
        "checkpoint": str(checkpoint.resolve()),
        "size": str(status.st_size),
        "mtime_ns": str(status.st_mtime_ns),
        "sources": sources.digest(),
    }


def _remove_orphans(folder: Path) -> None:
    for path in folder.glob(f"{_PREFIX}*.safetensors"):
        with suppress(WeightsError, OSError):
            if not Path(read_header(path).metadata.get("checkpoint", "")).is_file():
                path.unlink()


def _flattened(tree: Mapping[Any, Any], path: str = "") -> Iterator[tuple[str, np.ndarray]]:
    for key, value in tree.items():
        place = f"{path}{key}"
        if isinstance(value, Mapping):
            yield from _flattened(value, place + _SLASH)
        elif isinstance(value, QuantizedMatrix):
            for name, part in vars(value).items():
                if part is not None:
                    yield f"{place}{_PART}{name}", np.asarray(part)
        else:
            yield place, np.asarray(value)


def _unflattened(flat: Mapping[str, np.ndarray]) -> Tree:
    tree: Tree = {}
    matrices: dict[str, dict[str, Array]] = {}
    for name, array in flat.items():
        path, _, part = name.partition(_PART)
        on_device = jax.device_put(array, may_alias=True)
        if part:
            matrices.setdefault(path, {})[part] = on_device
        else:
            _put(tree, path, on_device)
    for path, parts in matrices.items():
        _put(tree, path, QuantizedMatrix(**parts))
    return tree


def _put(tree: Tree, path: str, value: Array | QuantizedMatrix) -> None:
    *folders, name = (int(part) if part.isdecimal() else part for part in path.split(_SLASH))
    for folder in folders:
        tree = tree.setdefault(folder, {})
    tree[name] = value
