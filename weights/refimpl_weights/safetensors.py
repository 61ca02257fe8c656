"""Safetensors checkpoints: one file, or a folder of shards with an index that says what is where.

Owns both formats down to the bytes: the header of a file (the format is small enough to read
whole: https://github.com/huggingface/safetensors#format) and the `weight_map` of an index. Does not
know what a tensor is for, and does not read `config.json`.

The header is parsed here and not by the `safetensors` package because that one maps the file into
memory, which makes resident every page that was ever touched, and gives numpy no bfloat16. The
tests hold the two readers against each other.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from refimpl_weights.errors import FormatError, MissingError, UnsupportedError, WeightsError
from refimpl_weights.memory import aligned_empty

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# Every integer and float of the format that is one number an element. The others (four- and
# eight-bit floats) mean nothing without scales that stand in tensors of their own.
DTYPES = {
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}

# The format's own limit, there so that a damaged length cannot ask for all the memory.
MAX_HEADER_BYTES = 100_000_000
MAX_SHOWN = 20


@dataclass(frozen=True)
class Tensor:
    """Where one tensor lies: `nbytes` bytes from `start`, counted from the file's first byte."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself; the tensors stand in the header's order."""

    metadata: Mapping[str, str]
    tensors: Mapping[str, Tensor]


class SafetensorsCheckpoint:
    """An open checkpoint, a `TensorSource`: only headers are in memory, no file stays open."""

    def __init__(self, path: str | Path) -> None:
        """Read and verify every header.

        Args:
            path: a `.safetensors` file, an index file, or a folder that holds `model.safetensors`
                or `model.safetensors.index.json` with its shards.

        Raises:
            MissingError: there is no checkpoint at `path`, or shards of it are not there.
            FormatError: a file is truncated, corrupt or foreign, or index and shards contradict
                each other. All the faults of all the shards are listed at once.
            UnsupportedError: a tensor's element type is not one of `DTYPES`.
        """
        self._path = Path(path)
        index = find_index(self._path)
        if index is None:
            header = read_header(self._path / SINGLE_FILE if self._path.is_dir() else self._path)
            self._metadata: Mapping[str, Any] = header.metadata
            self._tensors = dict(header.tensors)
        else:
            self._metadata, weight_map = read_index(index)
            self._tensors = _resolve(index, weight_map)

    @property
    def path(self) -> Path:
        """The file or folder that the checkpoint was opened with."""
        return self._path

    @property
    def folder(self) -> Path:
        """Where the checkpoint lies, and with it `config.json` and `tokenizer.json`."""
        return self._path if self._path.is_dir() else self._path.parent

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The file's `__metadata__` (strings), or the index's `metadata` where there is one."""
        return self._metadata

    def names(self) -> tuple[str, ...]:
        """Every tensor, in the order of the header or of the index."""
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, from the header alone.

        Raises:
            MissingError: the checkpoint has no tensor of this name.
        """
        return self._tensor(name).shape

    def read(self, name: str) -> np.ndarray:
        """One tensor in memory of its own, in the precision of the file (bfloat16 stays so).

        Raises:
            MissingError: the checkpoint has no tensor of this name, or its file has gone.
            FormatError: the file has become shorter since it was opened.
        """
        tensor = self._tensor(name)
        array = aligned_empty(tensor.shape, tensor.dtype)
        with _opened(tensor.file) as file:
            file.seek(tensor.start)
            # Straight into the array: there is never a second copy of the bytes.
            count = file.readinto(array.reshape(-1).view(np.uint8))
        if count != tensor.nbytes:
            raise FormatError(
                f"{tensor.file}: got {count} bytes of tensor {name!r}, expected {tensor.nbytes}; "
                "the file was cut after it had been opened, fetch it again"
            )
        return array

    def _tensor(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise MissingError(
                f"{self._path} has no tensor {name!r}; it has {len(self._tensors)}: "
                f"{_some(self._tensors)}"
            )
        return self._tensors[name]


def find_index(path: Path) -> Path | None:
    """The index that governs the checkpoint at `path`, None where a single file stands for itself.

    Raises:
        MissingError: there is no checkpoint at `path`.
        FormatError: a folder holds both a single file and an index that does not name it.
    """
    if not path.is_dir():
        if not path.exists():
            raise MissingError(f"{path} does not exist; expected a .safetensors file or a folder")
        return path if path.name.endswith(".index.json") else None
    index, single = path / INDEX_FILE, path / SINGLE_FILE
    if not index.exists():
        if single.exists():
            return None
        others = sorted(file.name for file in path.glob("*.safetensors"))
        found = f"only {_some(others)}" if others else "no .safetensors file at all"
        raise MissingError(
            f"{path} holds neither {SINGLE_FILE} nor {INDEX_FILE}, {found}; "
            "fetch the missing file, or pass the path of one file"
        )
    if single.exists() and SINGLE_FILE not in read_index(index)[1].values():
        raise FormatError(
            f"{path} holds two checkpoints, {SINGLE_FILE} and the shards of {INDEX_FILE}; "
            "pass the path of the one that you mean, or remove the other"
        )
    return index


def read_index(index: Path) -> tuple[Mapping[str, Any], dict[str, str]]:
    """An index's `metadata` and its `weight_map`: the name of a tensor to the name of its shard.

    Raises:
        FormatError: not such an index, or it names a file outside its own folder.
    """
    with _opened(index) as file:
        content = _parse_json(file.read(), index)
    weight_map, metadata = content.get("weight_map"), content.get("metadata", {})
    if not isinstance(weight_map, dict) or not weight_map or not isinstance(metadata, dict):
        raise FormatError(
            f"{index}: expected an object with a non-empty weight_map; remove it and fetch it again"
        )
    # A shard lies beside its index. Anything else, such as "../x.safetensors" or "/x.safetensors",
    # could make us read a file that the checkpoint has no business with.
    strange = [file for file in weight_map.values() if not _is_plain_name(file)]
    if strange:
        raise FormatError(
            f"{index}: expected the names of .safetensors files in its own folder, "
            f"got {_some(dict.fromkeys(map(str, strange)))}; do not trust this checkpoint"
        )
    return metadata, weight_map


def read_header(path: Path) -> Header:
    """Parse and verify the header of one safetensors file: 8 bytes of length, then JSON.

    Raises:
        MissingError: the file cannot be opened.
        FormatError: the header is damaged, or the tensors do not fill the file exactly.
        UnsupportedError: a tensor's element type is not one of `DTYPES`.
    """
    with _opened(path) as file:
        file_bytes = os.fstat(file.fileno()).st_size
        header_bytes = int.from_bytes(file.read(8), "little")
        data_start = 8 + header_bytes
        if file_bytes < 8 or header_bytes > MAX_HEADER_BYTES or data_start > file_bytes:
            raise FormatError(
                f"{path}: not a safetensors file, or a truncated one: it has {file_bytes} bytes "
                f"and claims a header of {header_bytes}; remove it and fetch it again"
            )
        content = _parse_json(file.read(header_bytes), path)
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(type(v) is str for v in metadata.values()):
        raise FormatError(f"{path}: expected strings in __metadata__, got {metadata!r:.200}")
    tensors = {name: _parse_entry(path, name, content[name], data_start) for name in content}
    _check_tiling(path, tensors, data_start, file_bytes)
    return Header(metadata, tensors)


def _parse_entry(path: Path, name: str, entry: object, data_start: int) -> Tensor:
    """One entry of a header, `{"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}`."""
    match entry:
        case {"dtype": str(code), "shape": list(shape), "data_offsets": [begin, end], **rest} if (
            not rest and all(type(number) is int and number >= 0 for number in [*shape, begin, end])
        ):
            pass
        case _:
            raise FormatError(f"{path}: header of tensor {name!r} is damaged: {entry!r:.200}")
    if code not in DTYPES:
        raise UnsupportedError(
            f"{path}: tensor {name!r} has element type {code!r:.20}, expected one of "
            f"{', '.join(DTYPES)}; use a checkpoint that is not quantised, or a GGUF file"
        )
    dtype, nbytes = DTYPES[code], end - begin
    # numpy's limits, which an empty tensor could break in spite of its right number of bytes.
    if len(shape) > 64 or math.prod(max(size, 1) for size in shape) * dtype.itemsize >= 2**63:
        raise FormatError(f"{path}: tensor {name!r} has an impossible shape {shape!r:.200}")
    if math.prod(shape) * dtype.itemsize != nbytes:
        raise FormatError(f"{path}: tensor {name!r}, {code}{shape}, cannot have {nbytes} bytes")
    return Tensor(path, dtype, tuple(shape), data_start + begin, nbytes)


def _check_tiling(path: Path, tensors: Mapping[str, Tensor], start: int, file_bytes: int) -> None:
    """The format allows no gap, no overlap and nothing after the last tensor."""
    position = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if tensor.start != position:
            raise FormatError(
                f"{path}: tensor {name!r} starts at byte {tensor.start}, but the one before it "
                f"ends at {position}; the header is damaged, remove it and fetch it again"
            )
        position += tensor.nbytes
    if position != file_bytes:
        state = "truncated" if position > file_bytes else "followed by foreign bytes"
        raise FormatError(
            f"{path} is {state}: got {file_bytes} bytes, expected {position}; "
            "remove it and fetch it again"
        )


def _resolve(index: Path, weight_map: Mapping[str, str]) -> dict[str, Tensor]:
    """Every tensor of the map, in its order, once index and shards agree in every respect."""
    headers: dict[str, Header] = {}
    faults: list[WeightsError] = []
    for shard in dict.fromkeys(weight_map.values()):
        try:
            headers[shard] = read_header(index.parent / shard)
        except WeightsError as error:
            faults.append(error)
    faults += [FormatError(line) for line in _contradictions(weight_map, headers)]
    if faults:
        kinds = {type(fault) for fault in faults}
        kind = kinds.pop() if len(kinds) == 1 else FormatError
        lines = [f"\n- {fault}" for fault in faults[:MAX_SHOWN]]
        if len(faults) > MAX_SHOWN:
            lines.append(f"\n- and {len(faults) - MAX_SHOWN} more faults")
        raise kind(f"{index} and its shards do not make a checkpoint:{''.join(lines)}")
    return {name: headers[shard].tensors[name] for name, shard in weight_map.items()}


def _contradictions(weight_map: Mapping[str, str], headers: Mapping[str, Header]) -> Iterator[str]:
    """One line for each way in which a shard that can be read differs from what the map says."""
    places: dict[str, list[str]] = {}
    for shard, header in headers.items():
        for name in header.tensors:
            places.setdefault(name, []).append(shard)
        mapped = [name for name, home in weight_map.items() if home == shard]
        if lacking := [name for name in mapped if name not in header.tensors]:
            yield f"{shard} lacks tensors that the index maps to it: {_some(lacking)}"
        if surplus := [name for name in header.tensors if name not in weight_map]:
            yield f"{shard} holds tensors that the index does not list: {_some(surplus)}"
    if double := [name for name, shards in places.items() if len(shards) > 1]:
        yield f"tensors that stand in more than one shard: {_some(double)}"


def _parse_json(raw: bytes, path: Path) -> dict[str, Any]:
    """A JSON object in UTF-8 in which no key comes twice.

    Raises:
        FormatError: anything else.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) != len(pairs):
            raise ValueError("a key comes twice")
        return content

    try:
        # RecursionError: brackets nested some thousands deep. ValueError covers bad UTF-8, bad
        # JSON and integers of thousands of digits.
        content = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise FormatError(
            f"{path}: expected JSON, got {error}; remove it and fetch it again"
        ) from error
    if not isinstance(content, dict):
        raise FormatError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _is_plain_name(name: object) -> bool:
    return (
        isinstance(name, str)
        and name.endswith(".safetensors")
        and not any(character in name for character in "/\\:\0")
    )


@contextmanager
def _opened(path: Path) -> Iterator[BufferedReader]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise MissingError(f"{path} cannot be read: {error.strerror or error}") from error


def _some(names: Iterable[str]) -> str:
    """Names for a message: the first ones in full, the rest as a number."""
    listed = list(names)
    shown = ", ".join(repr(name) for name in listed[:MAX_SHOWN])
    rest = len(listed) - MAX_SHOWN
    return f"{shown} and {rest} more" if rest > 0 else shown
