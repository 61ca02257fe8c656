"""A name for everything that a reply's tokens depend on, besides the request.

A request with the same seed has the same reply wherever the fingerprint is the same.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from refimpl_kernels.sampling import SAMPLER_VERSION

# Of a file's content, so many bytes at so many places: two checkpoints that differ do so nearly
# everywhere, and reading all of tens of gigabytes would take longer than loading them.
_SAMPLE_BYTES = 1 << 16
_SAMPLES = 16
_PREFIX = "fp_"
_DIGITS = 12


def fingerprint(path: Path, *, parameters: Any, numerics: object) -> str:
    """The fingerprint of a loaded checkpoint on this machine's device.

    Args:
        path: file or folder that it was loaded from.
        parameters: tree of its arrays.
        numerics: where the forward pass rounds.
    """
    digest = hashlib.sha256()
    for part in _parts(path, parameters, numerics):
        digest.update(len(part).to_bytes(8, "little") + part)
    return _PREFIX + digest.hexdigest()[:_DIGITS]


def _parts(path: Path, parameters: Any, numerics: object) -> Iterator[bytes]:
    device = jax.devices()[0]
    yield f"sampler {SAMPLER_VERSION}, jax {jax.__version__}, {device.device_kind}".encode()
    yield repr(numerics).encode()
    for place, leaf in jax.tree_util.tree_leaves_with_path(parameters):
        yield f"{jax.tree_util.keystr(place)} {leaf.dtype} {leaf.shape}".encode()
    for file in sorted(_files(path), key=lambda file: file.name):
        yield f"{file.name if path.is_dir() else ''} {file.stat().st_size}".encode()
        yield from _samples(file)


def _files(path: Path) -> Iterator[Path]:
    """The file, or in a folder those that a model is loaded from."""
    if path.is_file():
        yield path
    else:
        for pattern in ("*.safetensors", "*.json", "*.model"):
            yield from path.glob(pattern)


def _samples(file: Path) -> Iterator[bytes]:
    """Pieces of a file, from its first bytes to its last."""
    last = max(0, file.stat().st_size - _SAMPLE_BYTES)
    with file.open("rb") as opened:
        for place in sorted({last * number // (_SAMPLES - 1) for number in range(_SAMPLES)}):
            opened.seek(place)
            yield opened.read(_SAMPLE_BYTES)
