"""A checkpoint's weights as the device wants them, kept in a file for the next start.

A GGUF file packs its integers. To unpack, check and transpose those of Gemma 3 270M takes about two
seconds; to read the result and its checksum, half a second. So the result is kept, as a safetensors
file beside what else is derived from a checkpoint, unless it is large: then reading it is what
takes time, and a second copy on the disk is more than a user may want.

A file belongs to one state of one checkpoint and of our sources, and holds its own checksum. Any
other is made anew.
"""

import hashlib
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array
from refimpl_kernels.matrix import Matrix, OutputMajorMatrix, Quantized, QuantizedMatrix
from refimpl_weights.errors import WeightsError
from refimpl_weights.safetensors import SafetensorsCheckpoint, read_header
from refimpl_weights.safetensors_writer import write_safetensors

from refimpl import sources

# More than this is not kept, in bytes.
MOST_BYTES = 1 << 30

# Where a file is written before it has its name, and from when on nobody is writing there.
_PARTIAL = ".refimpl-weights-"
_STALE_SECONDS = 3600
# Between the parts of a parameter's path; before the name of a matrix's class, and of its part.
_SLASH, _CLASS, _PART = "/", "#", "."
_CLASSES = {kind.__name__: kind for kind in (QuantizedMatrix, OutputMajorMatrix)}
# Beside the identity.
_CHECKSUM = "sha256"

Identity = dict[str, str]
Tree = dict[Any, Any]


def identity_of(checkpoint: Path) -> Identity | None:
    """Everything that the parameters depend on; None where nothing is to be kept.

    Taken before anything of the checkpoint is read, so that what is kept cannot be older than it.
    """
    path = str(checkpoint.resolve())
    if not path.isprintable() or not sources.are_what_runs():
        return None
    status = checkpoint.stat()
    return {
        "checkpoint": path,
        "size": str(status.st_size),
        "inode": str(status.st_ino),
        "mtime_ns": str(status.st_mtime_ns),
        # Unlike the time before, nobody can set this one back.
        "ctime_ns": str(status.st_ctime_ns),
        "sources": sources.digest(),
    }


def read_prepared(folder: Path, identity: Identity) -> Tree | None:
    """The tree of parameters that was kept for this checkpoint; None where there is none.

    Args:
        folder: where such files are kept.
        identity: of a GGUF file.
    """
    try:
        file = SafetensorsCheckpoint(_place(folder, identity))
        told = dict(file.metadata)
        checksum = told.pop(_CHECKSUM, None)
        if told != identity:
            return None
        flat = {name: file.read(name) for name in sorted(file.names())}
    except (WeightsError, OSError):
        # Missing, or damaged: then it will be made anew.
        return None
    return _unflattened(flat) if _checksum(flat) == checksum else None


def keep_prepared(folder: Path, identity: Identity, parameters: Mapping[str, Any]) -> None:
    """Keep a checkpoint's parameters, unless they are more than `MOST_BYTES` or the disk is small.

    Nor if the checkpoint is another one by now. Files of checkpoints that are gone are removed.
    """
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(dict(parameters)))
    if size > MOST_BYTES:
        return
    path = _place(folder, identity)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_orphans(folder)
        if shutil.disk_usage(folder).free < 2 * size:
            return
        # In a folder of its own: the package, too, writes under another name first.
        with tempfile.TemporaryDirectory(dir=folder, prefix=_PARTIAL) as partial:
            file = Path(partial) / path.name
            flat = dict(sorted(_flattened(parameters)))
            write_safetensors(file, flat, metadata={**identity, _CHECKSUM: _checksum(flat)})
            # A power cut must not leave a whole name on half a file.
            with file.open("rb") as written:
                os.fsync(written.fileno())
            if identity_of(Path(identity["checkpoint"])) == identity:
                file.replace(path)
    except (WeightsError, OSError) as error:
        warnings.warn(
            f"the weights of {identity['checkpoint']} cannot be kept in {path}: {error}; every "
            "start unpacks them anew, some seconds; make the folder writable, or choose another",
            RuntimeWarning,
            stacklevel=2,
        )


def _place(folder: Path, identity: Identity) -> Path:
    name = hashlib.sha256(identity["checkpoint"].encode()).hexdigest()[:32]
    return folder / f"weights-{name}.safetensors"


def _checksum(flat: Mapping[str, np.ndarray]) -> str:
    """Of all arrays, in order of their names."""
    digest = hashlib.sha256()
    for array in flat.values():
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return digest.hexdigest()


def _remove_orphans(folder: Path) -> None:
    """Remove what belongs to no checkpoint any more, or to a process that was killed."""
    for path in folder.glob("weights-*.safetensors"):
        with suppress(WeightsError, OSError):
            told = read_header(path).metadata
            is_ours = _CHECKSUM in told and path == _place(folder, dict(told))
            if is_ours and not Path(told["checkpoint"]).is_file():
                path.unlink()
    oldest = time.time() - _STALE_SECONDS
    for partial in folder.glob(f"{_PARTIAL}*"):
        with suppress(OSError):
            if partial.is_dir() and partial.stat().st_mtime < oldest:
                shutil.rmtree(partial)


def _flattened(tree: Mapping[Any, Any], path: str = "") -> Iterator[tuple[str, np.ndarray]]:
    for key, value in tree.items():
        place = f"{path}{key}"
        if isinstance(value, Mapping):
            yield from _flattened(value, place + _SLASH)
        elif isinstance(value, Quantized):
            for name, part in vars(value).items():
                if part is not None:
                    yield f"{place}{_CLASS}{type(value).__name__}{_PART}{name}", np.asarray(part)
        else:
            yield place, np.asarray(value)


def _unflattened(flat: Mapping[str, np.ndarray]) -> Tree:
    tree: Tree = {}
    matrices: dict[tuple[str, str], dict[str, Array]] = {}
    for name, array in flat.items():
        path, _, kind = name.partition(_CLASS)
        kind, _, part = kind.partition(_PART)
        on_device = jax.device_put(array, may_alias=True)
        if kind:
            matrices.setdefault((path, kind), {})[part] = on_device
        else:
            _put(tree, path, on_device)
    for (path, kind), parts in matrices.items():
        _put(tree, path, _CLASSES[kind](**parts))
    return tree


def _put(tree: Tree, path: str, value: Matrix) -> None:
    *folders, name = (int(part) if part.isdecimal() else part for part in path.split(_SLASH))
    for folder in folders:
        tree = tree.setdefault(folder, {})
    tree[name] = value
