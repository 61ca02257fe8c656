"""The header of a GGUF file: what it says of itself, and the directory of its tensors.

Owns the order of things in the header and every check on tensors that needs no tensor data. Does
not know which tensor types this project reads (`gguf.py`), nor how their blocks are packed
(`ggml_blocks.py`). Numbers are little endian; a string is its length in 8 bytes, then UTF-8:

    "GGUF" · version u32 · number of tensors u64 · number of key-value pairs u64
    each pair:    key string · value type u32 · value          (gguf_metadata.py)
    each tensor:  name string · number of axes u32 · axes u64, fastest first · type u32 · offset u64
    padding to a multiple of `general.alignment`, then the data that the offsets count from

The layout is that of `docs/gguf.md` in the ggml repository, versions 2 and 3.

Why not `gguf.GGUFReader`: it makes one or two numpy arrays of every item of every list. Gemma's
vocabulary has 262,144 pieces, scores and types, so a file of 250 MB took 21 s and 725 MB to open.
Enums, key names and block sizes are that package's all the same.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, Keys

from refimpl_weights.errors import FormatError, UnsupportedError
from refimpl_weights.gguf_cursor import Cursor, opened
from refimpl_weights.gguf_metadata import Metadata, read_pairs

VERSIONS = (2, 3)
MAX_AXES = 4
DEFAULT_ALIGNMENT = 32

# The largest Gemma has some forty pairs and a thousand tensors. A count is checked before anything
# is made in that number.
MAX_PAIRS = 2**16
MAX_TENSORS = 2**16


@dataclass(frozen=True)
class Tensor:
    """Where one tensor lies: `nbytes` bytes from `start`, counted from the file's first byte.

    The shape is row-major, the reverse of the file's own order.
    """

    type: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """What a GGUF file says of itself; the tensors stand in the header's order."""

    metadata: Metadata
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class _Entry:
    """One line of the directory as it stands in the file, unchecked."""

    name: str
    axes: tuple[int, ...]
    type_number: int
    offset: int


def read_header(path: Path) -> Header:
    """Read and verify the header of one file.

    When this function returns, every tensor's bytes are inside the file and belong to it alone.

    Raises:
        MissingError: the file cannot be opened.
        FormatError: not a GGUF file, or a damaged one.
        UnsupportedError: another version, big-endian numbers, or a type that GGUF does not define.
    """
    with opened(path) as file:
        cursor = Cursor(path, file)
        num_tensors, num_pairs = _read_preamble(cursor)
        values = read_pairs(cursor, num_pairs)
        entries = [_read_entry(cursor) for _ in range(num_tensors)]
    alignment = _alignment(cursor, values)
    padding = -cursor.position % alignment
    tensors: dict[str, Tensor] = {}
    for entry in entries:
        if entry.name in tensors:
            raise cursor.damage(f"two tensors are called {entry.name!r:.99}")
        if entry.offset % alignment:
            raise cursor.damage(
                f"tensor {entry.name!r:.99} has offset {entry.offset}, "
                f"expected a multiple of {alignment}"
            )
        tensors[entry.name] = _place(cursor, entry, data_start=cursor.position + padding)
    _check_overlap(cursor, tensors)
    header = bytes(memoryview(cursor.buffer)[: cursor.position])
    return Header(Metadata(path, header, values), tensors)


def _read_preamble(cursor: Cursor) -> tuple[int, int]:
    """Numbers of tensors and of pairs, once magic and version are found to be ours."""
    length = min(4, cursor.file_bytes)
    cursor.skip(length, what="the magic number")
    magic = bytes(cursor.buffer[:length])
    if magic != b"GGUF":
        raise FormatError(
            f"{cursor.path}: expected a file that begins with b'GGUF', got {magic!r}; "
            "give the path of a GGUF file, and if this should be one, fetch it again"
        )
    version = cursor.integer("I", what="the version")
    if version and version % 2**16 == 0:
        raise UnsupportedError(
            f"{cursor.path}: a big-endian GGUF file, expected a little-endian one; "
            "convert it with gguf-convert-endian of the gguf package"
        )
    if version not in VERSIONS:
        raise UnsupportedError(
            f"{cursor.path}: GGUF version {version}, expected one of {VERSIONS}; "
            "convert the model again with a current llama.cpp, or fetch the file again"
        )
    num_tensors = cursor.integer("Q", what="the number of tensors")
    num_pairs = cursor.integer("Q", what="the number of key-value pairs")
    if num_tensors > MAX_TENSORS or num_pairs > MAX_PAIRS:
        raise cursor.damage(
            f"{num_tensors} tensors and {num_pairs} key-value pairs, "
            f"expected at most {MAX_TENSORS} and {MAX_PAIRS}"
        )
    return num_tensors, num_pairs


def _read_entry(cursor: Cursor) -> _Entry:
    name = cursor.string(what="a tensor's name")
    what = f"tensor {name!r:.99}"
    num_axes = cursor.integer("I", what=f"the number of axes of {what}")
    if num_axes > MAX_AXES:
        raise cursor.damage(f"{what} has {num_axes} axes, expected at most {MAX_AXES}")
    axes = tuple(cursor.integer("Q", what=f"the axes of {what}") for _ in range(num_axes))
    type_number = cursor.integer("I", what=f"the type of {what}")
    return _Entry(name, axes, type_number, cursor.integer("Q", what=f"the offset of {what}"))


def _alignment(cursor: Cursor, values: Mapping[str, Any]) -> int:
    alignment = values.get(Keys.General.ALIGNMENT, DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise cursor.damage(
            f"{Keys.General.ALIGNMENT} is {alignment!r:.99}, expected a power of two"
        )
    return alignment


def _place(cursor: Cursor, entry: _Entry, *, data_start: int) -> Tensor:
    """The place of the entry's bytes in the file, if it can have one."""
    what = f"tensor {entry.name!r:.99}"
    try:
        tensor_type = GGMLQuantizationType(entry.type_number)
        block_columns, block_bytes = GGML_QUANT_SIZES[tensor_type]
    except (ValueError, KeyError) as error:
        raise UnsupportedError(
            f"{cursor.path}: {what} has type number {entry.type_number}, which the gguf package "
            "does not know; the file is corrupt, or has a type of a later llama.cpp"
        ) from error
    shape = entry.axes[::-1]
    columns = shape[-1] if shape else 1
    if 0 in shape:
        raise cursor.damage(f"{what} has shape {shape}, expected no axis of length 0")
    if columns % block_columns:
        raise cursor.damage(
            f"{what} has {columns} columns, "
            f"type {tensor_type.name} needs a multiple of {block_columns}"
        )
    start = data_start + entry.offset
    nbytes = math.prod(shape) // block_columns * block_bytes
    if start + nbytes > cursor.file_bytes:
        raise cursor.damage(
            f"{what}, {tensor_type.name}{list(shape)}, ends at byte {start + nbytes}, "
            f"but the file ends at {cursor.file_bytes}"
        )
    return Tensor(tensor_type, shape, start, nbytes)


def _check_overlap(cursor: Cursor, tensors: Mapping[str, Tensor]) -> None:
    end, before = 0, ""
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        if tensor.start < end:
            raise cursor.damage(
                f"tensor {name!r:.99} starts at byte {tensor.start}, but {before!r:.99} before it "
                f"ends at {end}"
            )
        end, before = tensor.start + tensor.nbytes, name
