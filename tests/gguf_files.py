"""GGUF files for tests: sound ones from the gguf package, and any others byte by byte."""

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
from refimpl_weights.ggml_blocks import BLOCK_FORMATS
from refimpl_weights.gguf import GGUFFile

Type = GGMLQuantizationType


class Tensor(NamedTuple):
    """A line of the tensor directory, with the axes in the file's order."""

    name: str
    axes: tuple[int, ...]
    type: int = Type.F32
    offset: int = 0


class Pair(NamedTuple):
    """A key-value pair, its value as bytes."""

    key: str | bytes
    type: int
    value: bytes


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def listed(item_type: int, items: Sequence[bytes], *, count: int | None = None) -> bytes:
    count = len(items) if count is None else count
    return struct.pack("<IQ", item_type, count) + b"".join(items)


def build(
    tensors: Sequence[Tensor] = (Tensor("w", (4,)),),
    pairs: Sequence[Pair] = (Pair("general.architecture", GGUFValueType.STRING, string("gemma3")),),
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    num_tensors: int | None = None,
    num_pairs: int | None = None,
    data: bytes = bytes(range(16)),
    alignment: int = 32,
) -> bytes:
    """The bytes of a file, sound or not; the defaults are one pair and one tensor."""
    parts = [
        magic,
        struct.pack("<I", version),
        struct.pack("<Q", len(tensors) if num_tensors is None else num_tensors),
        struct.pack("<Q", len(pairs) if num_pairs is None else num_pairs),
    ]
    parts += [string(p.key) + struct.pack("<I", p.type) + p.value for p in pairs]
    for tensor in tensors:
        parts.append(string(tensor.name))
        parts.append(struct.pack(f"<I{len(tensor.axes)}Q", len(tensor.axes), *tensor.axes))
        parts.append(struct.pack("<IQ", tensor.type, tensor.offset))
    header = b"".join(parts)
    return header + bytes(-len(header) % alignment) + data


def open_bytes(folder: Path, content: bytes) -> GGUFFile:
    path = folder / "model.gguf"
    path.write_bytes(content)
    return GGUFFile(path)


def write(path: Path, arrays: dict[str, tuple[np.ndarray, GGMLQuantizationType]]) -> GGUFFile:
    """A file written by the gguf package; quantised arrays are given as its bytes."""
    writer = GGUFWriter(path, "gemma3")
    for name, (array, tensor_type) in arrays.items():
        writer.add_tensor(name, array, raw_dtype=tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUFFile(path)


def random_rows(tensor_type: GGMLQuantizationType, *, rows: int, blocks: int) -> np.ndarray:
    """Rows of blocks with every bit random, but for float16 infinities and NaNs."""
    generator = np.random.default_rng(int(tensor_type))
    layout = BLOCK_FORMATS[tensor_type].layout
    stored = generator.integers(0, 256, (rows, blocks * layout.itemsize), dtype=np.uint8)
    records = stored.reshape(-1).view(layout)
    for field in ("scale", "minimum"):
        if field in (layout.names or ()):
            bits = generator.integers(0, 2**16, len(records), dtype=np.uint16)
            bits[bits & 0x7C00 == 0x7C00] &= 0x83FF
            # Both zeros, the smallest and largest subnormal, the largest number, of both signs.
            special = [0, 0x8000, 1, 0x8001, 0x03FF, 0x83FF, 0x7BFF, 0xFBFF][: len(bits)]
            bits[: len(special)] = special
            records[field] = bits.view(np.float16)
    return stored
