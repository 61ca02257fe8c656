"""GGUF files that are sound: every number as the gguf package reads it."""

import struct
import tracemalloc
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from refimpl_weights.errors import FormatError
from refimpl_weights.ggml_blocks import BLOCK_FORMATS
from refimpl_weights.gguf import PLAIN_DTYPES, SUPPORTED_TYPES, GGUFFile
from refimpl_weights.quantized import QuantizedArray

from tests.gguf_files import (
    Pair,
    Tensor,
    Type,
    build,
    listed,
    open_bytes,
    random_rows,
    string,
    write,
)

QUANTIZED_TYPES = tuple(BLOCK_FORMATS)
MEBIBYTE = 2**20


def assert_same_bits(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    bits = np.dtype(f"u{ours.dtype.itemsize}")
    np.testing.assert_array_equal(
        np.ascontiguousarray(ours).view(bits), np.ascontiguousarray(theirs).view(bits)
    )


class TestQuantizedTensors:
    @pytest.mark.parametrize("tensor_type", QUANTIZED_TYPES, ids=lambda kind: kind.name)
    def test_random_blocks_dequantise_to_the_bits_that_the_gguf_package_gives(
        self, tensor_type: GGMLQuantizationType, tmp_path: Path
    ) -> None:
        # 300 KiB: the reader unpacks 256 KiB at a time, so the last part is a short one.
        blocks = 5
        rows = 300 * 1024 // (blocks * BLOCK_FORMATS[tensor_type].layout.itemsize)
        stored = random_rows(tensor_type, rows=rows, blocks=blocks)
        file = write(tmp_path / "model.gguf", {"w": (stored, tensor_type)})
        array = file.read("w")
        assert isinstance(array, QuantizedArray)
        assert file.tensor_type("w") == tensor_type
        assert array.shape == file.shape("w") == (rows, blocks * BLOCK_FORMATS[tensor_type].columns)
        assert array.block == BLOCK_FORMATS[tensor_type].group
        assert (array.minimums is not None) == BLOCK_FORMATS[tensor_type].has_minimums
        assert_same_bits(array.dequantize(), gguf.quants.dequantize(stored, tensor_type))

    @pytest.mark.parametrize("tensor_type", QUANTIZED_TYPES, ids=lambda kind: kind.name)
    def test_our_record_has_the_size_of_ggmls_block(
        self, tensor_type: GGMLQuantizationType
    ) -> None:
        form = BLOCK_FORMATS[tensor_type]
        assert (form.columns, form.layout.itemsize) == GGML_QUANT_SIZES[tensor_type]
        assert form.columns % form.group == 0

    def test_a_q4_0_block_by_hand(self, tmp_path: Path) -> None:
        # Byte j holds weight j in its low half and weight 16 + j in its high half, both plus 8.
        block = struct.pack("<e", 0.5) + bytes([0x80] + [0x88] * 14 + [0x1F])
        stored = np.frombuffer(block, np.uint8).reshape(1, 18)
        array = write(tmp_path / "model.gguf", {"w": (stored, Type.Q4_0)}).read("w")
        assert isinstance(array, QuantizedArray)
        expected = np.zeros((1, 32), np.int8)
        expected[0, 0], expected[0, 15], expected[0, 31] = -8, 7, -7
        np.testing.assert_array_equal(array.values, expected, strict=True)
        np.testing.assert_array_equal(array.scales, np.array([[0.5]], np.float32), strict=True)

    def test_a_stack_of_matrices_keeps_its_axes(self, tmp_path: Path) -> None:
        stored = random_rows(Type.Q8_0, rows=6, blocks=2)
        file = write(tmp_path / "model.gguf", {"w": (stored.reshape(2, 3, -1), Type.Q8_0)})
        array = file.read("w")
        assert isinstance(array, QuantizedArray)
        assert array.shape == file.shape("w") == (2, 3, 64)
        assert array.scales.shape == (2, 3, 2)
        expected = gguf.quants.dequantize(stored, Type.Q8_0).reshape(2, 3, 64)
        assert_same_bits(array.dequantize(), expected)

    def test_a_vector_comes_as_the_float32_numbers_it_stands_for(self, tmp_path: Path) -> None:
        stored = random_rows(Type.Q5_1, rows=1, blocks=3)[0]
        array = write(tmp_path / "model.gguf", {"w": (stored, Type.Q5_1)}).read("w")
        assert isinstance(array, np.ndarray)
        assert_same_bits(array, gguf.quants.dequantize(stored, Type.Q5_1))

    @pytest.mark.parametrize("bits", [0x7C00, 0xFC00, 0x7E00])
    @pytest.mark.parametrize(
        ("tensor_type", "field"),
        [(Type.Q8_0, "scale"), (Type.Q6_K, "scale"), (Type.Q4_K, "minimum")],
    )
    def test_an_infinite_or_undefined_scale_is_damage(
        self, tensor_type: GGMLQuantizationType, field: str, bits: int, tmp_path: Path
    ) -> None:
        stored = random_rows(tensor_type, rows=2, blocks=2)
        records = stored.reshape(-1).view(BLOCK_FORMATS[tensor_type].layout)
        records[field][-1:] = np.array([bits], np.uint16).view(np.float16)
        file = write(tmp_path / "model.gguf", {"w": (stored, tensor_type)})
        with pytest.raises(FormatError, match="tensor 'w' has an infinite or undefined scale"):
            file.read("w")

    def test_reading_takes_the_memory_of_the_result_and_one_part(self, tmp_path: Path) -> None:
        stored = random_rows(Type.Q5_0, rows=4096, blocks=32)
        file = write(tmp_path / "model.gguf", {"w": (stored, Type.Q5_0)})
        del stored
        tracemalloc.start()
        array = file.read("w")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert isinstance(array, QuantizedArray)
        assert array.nbytes == 4096 * 1024 + 4096 * 32 * 4
        # A part is 256 KiB of blocks, 372 KiB of integers, and a handful of arrays of that size.
        assert peak - array.nbytes < 3 * MEBIBYTE


class TestPlainTensors:
    @pytest.mark.parametrize(
        ("tensor_type", "dtype"),
        [
            (Type.F32, np.dtype(np.float32)),
            (Type.F16, np.dtype(np.float16)),
            (Type.BF16, np.dtype(ml_dtypes.bfloat16)),
        ],
        ids=lambda value: value.name,
    )
    def test_all_bits_arrive_those_of_a_nan_too(
        self, tensor_type: GGMLQuantizationType, dtype: np.dtype, tmp_path: Path
    ) -> None:
        generator = np.random.default_rng(1)
        data = generator.bytes(3 * 5 * dtype.itemsize)
        axes = (5, 3)
        file = open_bytes(tmp_path, build([Tensor("w", axes, tensor_type)], data=data))
        array = file.read("w")
        assert isinstance(array, np.ndarray)
        assert array.dtype == dtype
        assert array.shape == file.shape("w") == (3, 5)
        assert array.tobytes() == data

    @pytest.mark.parametrize("axes", [(), (1,), (7,), (3, 2), (4, 3, 2), (5, 4, 3, 2)])
    def test_axes_are_reversed_whatever_their_number(
        self, axes: tuple[int, ...], tmp_path: Path
    ) -> None:
        shape = axes[::-1]
        expected = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
        file = open_bytes(tmp_path, build([Tensor("w", axes)], data=expected.tobytes()))
        assert file.shape("w") == shape
        np.testing.assert_array_equal(file.read("w"), expected, strict=True)

    def test_a_result_is_the_callers_own(self, tmp_path: Path) -> None:
        file = open_bytes(tmp_path, build(data=np.ones(4, np.float32).tobytes()))
        first = file.read("w")
        assert isinstance(first, np.ndarray)
        first[:] = 7
        np.testing.assert_array_equal(file.read("w"), np.ones(4, np.float32), strict=True)


class TestHeader:
    def test_every_kind_of_value_reads_as_the_gguf_package_reads_it(self, tmp_path: Path) -> None:
        path = tmp_path / "model.gguf"
        writer = GGUFWriter(path, "gemma3")
        writer.add_uint8("u8", 255)
        writer.add_int8("i8", -128)
        writer.add_uint16("u16", 65535)
        writer.add_int16("i16", -32768)
        writer.add_uint32("u32", 2**32 - 1)
        writer.add_int32("i32", -(2**31))
        writer.add_uint64("u64", 2**64 - 1)
        writer.add_int64("i64", -(2**63))
        writer.add_float32("f32", 1e-6)
        writer.add_float64("f64", 1e-6)
        writer.add_bool("true", True)
        writer.add_bool("false", False)
        writer.add_string("text", "▁日本 🙂")
        writer.add_array("texts", ["", "▁the", "\n", "🙂"])
        writer.add_array("numbers", [-1.5, 0.25])
        writer.add_array("integers", [1, -2, 3])
        writer.add_array("bools", [True, False, True])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        metadata = GGUFFile(path).metadata
        theirs = {
            key: field.contents()
            for key, field in GGUFReader(path).fields.items()
            if not key.startswith("GGUF.")
        }
        assert dict(metadata) == theirs
        assert list(metadata) == list(theirs)
        assert {key: type(value) for key, value in metadata.items()} == {
            key: type(value) for key, value in theirs.items()
        }
        assert metadata["f32"] == float(np.float32(1e-6))
        assert metadata["bools"] == [True, False, True]
        assert [type(item) for item in metadata["bools"]] == [bool] * 3

    def test_a_list_is_decoded_once(self, tmp_path: Path) -> None:
        value = listed(GGUFValueType.STRING, [string("a"), string("b")])
        file = open_bytes(tmp_path, build(pairs=[Pair("k", GGUFValueType.ARRAY, value)]))
        assert file.metadata["k"] is file.metadata["k"]
        assert file.metadata["k"] == ["a", "b"]

    @pytest.mark.parametrize("item_type", [GGUFValueType.STRING, GGUFValueType.FLOAT32])
    def test_an_empty_list_is_a_list(self, item_type: int, tmp_path: Path) -> None:
        pair = Pair("k", GGUFValueType.ARRAY, listed(item_type, []))
        assert open_bytes(tmp_path, build(pairs=[pair])).metadata["k"] == []

    def test_an_absent_key_is_a_key_error(self, tmp_path: Path) -> None:
        metadata = open_bytes(tmp_path, build()).metadata
        assert "absent" not in metadata
        assert metadata.get("absent", 5) == 5
        with pytest.raises(KeyError):
            metadata["absent"]

    @pytest.mark.parametrize("version", [2, 3])
    def test_versions_2_and_3_are_read(self, version: int, tmp_path: Path) -> None:
        file = open_bytes(tmp_path, build(version=version))
        assert file.path == tmp_path / "model.gguf"
        assert file.names() == ("w",)
        assert file.metadata == {"general.architecture": "gemma3"}

    @pytest.mark.parametrize("alignment", [1, 8, 64, 4096])
    def test_data_begin_where_the_files_own_alignment_says(
        self, alignment: int, tmp_path: Path
    ) -> None:
        pair = Pair("general.alignment", GGUFValueType.UINT32, struct.pack("<I", alignment))
        expected = np.arange(4, dtype=np.float32)
        content = build(pairs=[pair], alignment=alignment, data=expected.tobytes())
        np.testing.assert_array_equal(open_bytes(tmp_path, content).read("w"), expected)

    def test_names_keep_the_order_of_the_header_and_not_of_the_data(self, tmp_path: Path) -> None:
        tensors = [Tensor("b", (4,), offset=32), Tensor("a", (4,), offset=0)]
        data = np.array([1] * 4 + [0] * 4 + [2] * 4, np.float32).tobytes()
        file = open_bytes(tmp_path, build(tensors, data=data))
        assert file.names() == ("b", "a")
        np.testing.assert_array_equal(file.read("a"), np.full(4, 1, np.float32))
        np.testing.assert_array_equal(file.read("b"), np.full(4, 2, np.float32))

    def test_a_file_without_tensors_is_a_file(self, tmp_path: Path) -> None:
        content = build([], alignment=1, data=b"")
        assert open_bytes(tmp_path, content).names() == ()

    def test_a_vocabulary_costs_its_own_bytes_until_it_is_asked_for(self, tmp_path: Path) -> None:
        # More than the 1 MiB that is read at a time, so that strings straddle the boundary.
        pieces = [f"▁piece{index}" for index in range(120_000)]
        value = listed(GGUFValueType.STRING, [string(piece) for piece in pieces])
        content = build(pairs=[Pair("tokens", GGUFValueType.ARRAY, value)])
        assert len(content) > 2 * MEBIBYTE
        tracemalloc.start()
        file = open_bytes(tmp_path, content)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        # The header as it grows, its last step, and the copy that is kept.
        assert peak < 2 * len(content) + 2 * MEBIBYTE
        assert file.metadata["tokens"] == pieces

    def test_supported_types_are_these(self) -> None:
        assert {kind.name for kind in SUPPORTED_TYPES} == {
            *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "IQ4_XS"),
            *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
        }
        assert len(SUPPORTED_TYPES) == len(PLAIN_DTYPES) + len(BLOCK_FORMATS) == 15
