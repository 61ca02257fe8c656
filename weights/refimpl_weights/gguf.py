"""GGUF checkpoints: llama.cpp's single file with weights, configuration and vocabulary.

Owns which tensor types we read and the reading of tensor data. The header is `gguf_header.py`'s,
the packing of quantised blocks `ggml_blocks.py`'s. Does not know what a tensor is for: in
particular the 1 that llama.cpp's converter adds to Gemma's norm weights is still in them.
"""

import math
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType, Keys

from refimpl_weights.errors import FormatError, MissingError, UnsupportedError
from refimpl_weights.ggml_blocks import BLOCK_FORMATS
from refimpl_weights.gguf_cursor import opened
from refimpl_weights.gguf_header import Tensor, read_header
from refimpl_weights.quantized import QuantizedArray

PLAIN_DTYPES: Mapping[GGMLQuantizationType, np.dtype] = MappingProxyType(
    {
        GGMLQuantizationType.F32: np.dtype("<f4"),
        GGMLQuantizationType.F16: np.dtype("<f2"),
        GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
    }
)

SUPPORTED_TYPES: tuple[GGMLQuantizationType, ...] = (*PLAIN_DTYPES, *BLOCK_FORMATS)
"""Every tensor type that we read: the plain ones, then the quantised ones."""

# Bytes of blocks that are unpacked at a time. Small, so that the intermediate arrays stay in the
# processor's cache and a tensor costs no memory beyond the result; measured flat from 64 KiB to
# 4 MiB.
_UNPACK_STEP = 2**18


class GGUFFile:
    """An open GGUF file, a `TensorSource`: only the header is in memory, no file stays open."""

    def __init__(self, path: str | Path) -> None:
        """Read and verify the header.

        Raises:
            MissingError: the file cannot be opened.
            FormatError: not a GGUF file, or a truncated or corrupt one.
            UnsupportedError: a version, byte order or tensor type that we do not read, or one part
                of a model that is split over several files.
        """
        self._path = Path(path)
        header = read_header(self._path)
        self._metadata = header.metadata
        self._tensors = header.tensors
        self._check_whole()
        self._check_types()

    @property
    def path(self) -> Path:
        """The file, for messages."""
        return self._path

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The header's key-value pairs: numbers, strings, bools, and lists of them."""
        return self._metadata

    def names(self) -> tuple[str, ...]:
        """Every tensor, in the order of the header."""
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, row-major: a linear weight is `(outputs, inputs)`.

        Raises:
            MissingError: the file has no tensor of this name.
        """
        return self._tensor(name).shape

    def tensor_type(self, name: str) -> GGMLQuantizationType:
        """How the file stores one tensor, one of `SUPPORTED_TYPES`.

        Raises:
            MissingError: the file has no tensor of this name.
        """
        return self._tensor(name).type

    def read(self, name: str) -> np.ndarray | QuantizedArray:
        """One tensor in memory of its own, in the precision of the file.

        Plain types come as arrays of their own type, bit for bit. Quantised ones come as a
        `QuantizedArray`, except vectors: a vector is a norm's weight or a table and never a factor
        of a matrix product, so it comes as the float32 numbers that the blocks stand for.

        Raises:
            MissingError: the file has no tensor of this name, or has gone.
            FormatError: the file has become shorter since it was opened, or a scale is no number.
        """
        tensor = self._tensor(name)
        with opened(self._path) as file:
            file.seek(tensor.start)
            if tensor.type in PLAIN_DTYPES:
                array = np.empty(tensor.shape, PLAIN_DTYPES[tensor.type])
                self._fill(array.reshape(-1), file, name=name)
                return array
            quantized = self._read_blocks(tensor, file, name=name)
        return quantized.dequantize() if len(tensor.shape) == 1 else quantized

    def _read_blocks(self, tensor: Tensor, file: BufferedReader, *, name: str) -> QuantizedArray:
        form = BLOCK_FORMATS[tensor.type]
        num_blocks = math.prod(tensor.shape) // form.columns
        num_groups = form.columns // form.group
        values = np.empty((num_blocks, form.columns), np.int8)
        scales = np.empty((num_blocks, num_groups), np.float32)
        minimums = np.empty_like(scales) if form.has_minimums else None

        step = _UNPACK_STEP // form.layout.itemsize
        buffer = np.empty(min(step, num_blocks), form.layout)
        for begin in range(0, num_blocks, step):
            blocks = buffer[: num_blocks - begin]
            part = slice(begin, begin + len(blocks))
            self._fill(blocks, file, name=name)
            if not form.has_finite_factors(blocks):
                raise FormatError(
                    f"{self._path}: tensor {name!r} has an infinite or undefined scale, expected "
                    "numbers; the file is corrupt, fetch it again"
                )
            values[part], scales[part], part_minimums = form.unpack(blocks)
            if minimums is not None:
                minimums[part] = part_minimums

        *rows, columns = tensor.shape
        groups = (*rows, columns // form.group)
        if minimums is not None:
            minimums = minimums.reshape(groups)
        return QuantizedArray(values.reshape(tensor.shape), scales.reshape(groups), minimums)

    def _fill(self, array: np.ndarray, file: BufferedReader, *, name: str) -> None:
        """The file's next bytes into `array`: there is never a second copy of them."""
        count = file.readinto(array.view(np.uint8))
        if count != array.nbytes:
            raise FormatError(
                f"{self._path}: got {count} bytes of tensor {name!r}, expected {array.nbytes}; "
                "the file was cut after it had been opened, fetch it again"
            )

    def _tensor(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise MissingError(
                f"{self._path} has no tensor {name!r} among its {len(self._tensors)}; "
                "names() lists them"
            )
        return self._tensors[name]

    def _check_whole(self) -> None:
        parts = self._metadata.get(Keys.Split.LLM_KV_SPLIT_COUNT, 1)
        if parts not in (0, 1):
            raise UnsupportedError(
                f"{self._path}: one of {parts!r} parts of a model, expected a model in one file; "
                "join them with llama-gguf-split --merge"
            )

    def _check_types(self) -> None:
        for name, tensor in self._tensors.items():
            if tensor.type not in SUPPORTED_TYPES:
                raise UnsupportedError(
                    f"{self._path}: tensor {name!r} is stored as {tensor.type.name}, expected one "
                    f"of {', '.join(known.name for known in SUPPORTED_TYPES)}; "
                    "get or make a file with one of these quantisations"
                )
