"""GGUF files that are damaged, foreign, hostile or gone: each refused, and by one of our errors."""

import math
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from refimpl_weights.errors import FormatError, MissingError, UnsupportedError, WeightsError
from refimpl_weights.gguf import GGUFFile
from refimpl_weights.gguf_cursor import MAX_HEADER_BYTES, Cursor, opened
from refimpl_weights.quantized import QuantizedArray

from tests.gguf_files import Pair, Tensor, Type, build, listed, open_bytes, random_rows, string

MEBIBYTE = 2**20

F32_PAIR = Pair("k", GGUFValueType.FLOAT32, struct.pack("<f", 1.0))


class TestDamage:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", r"begins with b'GGUF', got b''"),
            (b"GG", r"begins with b'GGUF', got b'GG'"),
            (b"PK\x03\x04 a zip archive", r"begins with b'GGUF', got b'PK\\x03\\x04'"),
            (b"GGUF", "the version at byte 4 takes 4 bytes, but the file ends at 4"),
            (build()[:20], "the number of key-value pairs at byte 16 takes 8 bytes"),
            (build(num_tensors=2**60), f"{2**60} tensors and 1 key-value pairs, expected at most"),
            (build(num_pairs=2**63), f"1 tensors and {2**63} key-value pairs, expected at most"),
            (
                build(num_tensors=2, data=b"", alignment=1),
                "the length of a tensor's name at byte .* takes 8 bytes, but the file ends at",
            ),
            (
                build([], num_pairs=2, data=b"", alignment=1),
                "the length of a metadata key at byte .* takes 8 bytes, but the file ends at",
            ),
            (build(pairs=[Pair(b"\xff", GGUFValueType.UINT8, b"\0")]), "key is .*expected UTF-8"),
            (build(pairs=[F32_PAIR, F32_PAIR]), "metadata key 'k' comes twice"),
            (build(pairs=[Pair("k", GGUFValueType.STRING, string(b"\xc3"))]), "'k' is .*UTF-8"),
            (build(pairs=[Pair("k", GGUFValueType.BOOL, b"\x02")]), "bool with value 2"),
            (
                build(pairs=[Pair("k", GGUFValueType.STRING, struct.pack("<Q", 2**63))]),
                f"metadata 'k' at byte .* takes {2**63} bytes",
            ),
            (
                build(
                    pairs=[
                        Pair(
                            "k", GGUFValueType.ARRAY, listed(GGUFValueType.UINT64, [], count=2**61)
                        )
                    ]
                ),
                f"metadata 'k' at byte .* takes {2**64} bytes",
            ),
            (
                build(
                    pairs=[
                        Pair(
                            "k", GGUFValueType.ARRAY, listed(GGUFValueType.STRING, [], count=2**40)
                        )
                    ]
                ),
                f"metadata 'k' at byte .* takes {2**43} bytes",
            ),
            (
                build(
                    pairs=[
                        Pair(
                            "k",
                            GGUFValueType.ARRAY,
                            listed(GGUFValueType.STRING, [struct.pack("<Q", 2**62)]),
                        )
                    ]
                ),
                "metadata 'k' at byte .* the file ends at",
            ),
            (build([Tensor("w", (4,)), Tensor("w", (4,))]), "two tensors are called 'w'"),
            (build([Tensor("w", (1,) * 5)]), "tensor 'w' has 5 axes, expected at most 4"),
            (build([Tensor("w", (4, 0))]), r"tensor 'w' has shape \(0, 4\), expected no axis"),
            (build([Tensor("w", (2**32, 2**32))]), "tensor 'w', F32.* the file ends at"),
            (build([Tensor("w", (2**63, 2, 2, 2))]), "tensor 'w', F32.* the file ends at"),
            (build([Tensor("w", (4,), offset=4)]), "has offset 4, expected a multiple of 32"),
            (build([Tensor("w", (4,), offset=2**63)]), "ends at byte .* but the file ends at"),
            (build([Tensor("w", (5,))]), "ends at byte .* but the file ends at"),
            (build()[:-1], "ends at byte .* but the file ends at"),
            (
                build([Tensor("w", (48,), Type.Q8_0)]),
                "48 columns, type Q8_0 needs a multiple of 32",
            ),
            (build([Tensor("w", (32, 8), Type.Q4_K)]), "type Q4_K needs a multiple of 256"),
            (
                build([Tensor("a", (9,)), Tensor("b", (4,), offset=32)], data=bytes(64)),
                "'b' starts at byte .*, but 'a' before it ends at",
            ),
            (
                build(
                    pairs=[Pair("general.alignment", GGUFValueType.UINT32, bytes([24, 0, 0, 0]))]
                ),
                "alignment is 24, expected a power of two",
            ),
            (
                build(pairs=[Pair("general.alignment", GGUFValueType.STRING, string("32"))]),
                "alignment is '32', expected a power of two",
            ),
        ],
    )
    def test_a_damaged_or_foreign_file_is_refused_on_opening(
        self, content: bytes, message: str, tmp_path: Path
    ) -> None:
        with pytest.raises(FormatError, match=message) as caught:
            open_bytes(tmp_path, content)
        assert str(tmp_path / "model.gguf") in str(caught.value)
        assert "fetch it again" in str(caught.value)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (build(version=1), "GGUF version 1, expected one of"),
            (build(version=4), "GGUF version 4, expected one of"),
            (build(version=0), "GGUF version 0, expected one of"),
            (build(version=3 << 24), "a big-endian GGUF file, .* gguf-convert-endian"),
            (build(pairs=[Pair("k", 13, b"")]), "metadata 'k' is type 13, expected"),
            (
                build(pairs=[Pair("k", GGUFValueType.ARRAY, listed(13, []))]),
                "metadata 'k' is type 13, expected",
            ),
            (
                build(pairs=[Pair("k", GGUFValueType.ARRAY, listed(GGUFValueType.ARRAY, []))]),
                "metadata 'k' is a list of lists",
            ),
            (build([Tensor("w", (4,), 4)]), "tensor 'w' has type number 4, which the gguf"),
            (build([Tensor("w", (4,), 999)]), "tensor 'w' has type number 999, which the gguf"),
            (build([Tensor("w", (4,), Type.I32)]), "tensor 'w' is stored as I32, expected one of"),
            (
                build([Tensor("w", (256,), Type.IQ2_XS)], data=bytes(74)),
                "tensor 'w' is stored as IQ2_XS, expected one of F32, .*Q6_K",
            ),
            (
                build(pairs=[Pair("split.count", GGUFValueType.UINT16, b"\x03\x00")]),
                "one of 3 parts of a model, .* llama-gguf-split --merge",
            ),
        ],
    )
    def test_what_we_do_not_read_is_named(
        self, content: bytes, message: str, tmp_path: Path
    ) -> None:
        with pytest.raises(UnsupportedError, match=message):
            open_bytes(tmp_path, content)

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (
                listed(GGUFValueType.STRING, [string("ok"), string(b"\xe2\x96")]),
                r"metadata 'k'\[1\] is b'\\xe2\\x96', expected UTF-8",
            ),
            (listed(GGUFValueType.BOOL, [b"\0\1\2"], count=3), "'k' is a bool with value 2"),
        ],
    )
    def test_a_broken_item_is_refused_when_the_list_is_asked_for(
        self, value: bytes, message: str, tmp_path: Path
    ) -> None:
        pair = Pair("k", GGUFValueType.ARRAY, value)
        metadata = open_bytes(tmp_path, build(pairs=[pair])).metadata
        for _ in range(2):
            with pytest.raises(FormatError, match=message):
                metadata["k"]

    @pytest.mark.parametrize(
        "content",
        [
            build(num_tensors=2**63, num_pairs=2**63),
            build(pairs=[Pair("k", GGUFValueType.STRING, struct.pack("<Q", 2**62))]),
            build(
                pairs=[
                    Pair("k", GGUFValueType.ARRAY, listed(GGUFValueType.STRING, [], count=2**50))
                ]
            ),
            build([Tensor("w", (2**40,))]),
        ],
    )
    def test_a_hostile_number_allocates_nothing(self, content: bytes, tmp_path: Path) -> None:
        path = tmp_path / "model.gguf"
        path.write_bytes(content)
        tracemalloc.start()
        with pytest.raises(FormatError):
            GGUFFile(path)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        # The one step of the header that is read, and the error with its traceback.
        assert peak < 2 * MEBIBYTE

    def test_a_header_longer_than_any_we_know_is_not_read(self, tmp_path: Path) -> None:
        path = tmp_path / "model.gguf"
        length = 2 * MAX_HEADER_BYTES
        pair = Pair("k", GGUFValueType.STRING, struct.pack("<Q", length))
        content = build(pairs=[pair])
        path.write_bytes(content)
        os.truncate(path, len(content) + length)
        with pytest.raises(FormatError, match="the longest header that we read ends at"):
            GGUFFile(path)


class TestMissing:
    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(MissingError, match=r"absent\.gguf cannot be read: No such file"):
            GGUFFile(tmp_path / "absent.gguf")

    @pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "pipe"])
    def test_not_a_file(self, make: Callable[[Path], None], tmp_path: Path) -> None:
        path = tmp_path / "model.gguf"
        make(path)
        with pytest.raises(MissingError, match=r"model\.gguf is not a file; expected"):
            GGUFFile(path)

    def test_no_such_tensor(self, tmp_path: Path) -> None:
        file = open_bytes(tmp_path, build())
        for method in (file.read, file.shape, file.tensor_type):
            with pytest.raises(MissingError, match="no tensor 'v' among its 1"):
                method("v")

    def test_a_file_that_vanishes_after_opening(self, tmp_path: Path) -> None:
        file = open_bytes(tmp_path, build())
        file.path.unlink()
        with pytest.raises(MissingError, match="cannot be read"):
            file.read("w")

    @pytest.mark.parametrize("tensor_type", [Type.F32, Type.Q8_0])
    def test_a_file_that_shrinks_after_opening(
        self, tensor_type: GGMLQuantizationType, tmp_path: Path
    ) -> None:
        file = open_bytes(tmp_path, build([Tensor("w", (32, 2), tensor_type)], data=bytes(256)))
        os.truncate(file.path, file.path.stat().st_size - 250)
        with pytest.raises(FormatError, match="got 6 bytes of tensor 'w', expected"):
            file.read("w")

    def test_a_file_that_shrinks_while_its_header_is_read(self, tmp_path: Path) -> None:
        path = tmp_path / "model.gguf"
        path.write_bytes(bytes(100))
        with opened(path) as file:
            cursor = Cursor(path, file)
            os.truncate(path, 10)
            with pytest.raises(FormatError, match="it had 100 bytes and shrank while it was read"):
                cursor.need(11, what="a header")


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound file of less than 1 KiB with every construct in it."""
    path = tmp_path_factory.mktemp("small") / "model.gguf"
    writer = GGUFWriter(path, "gemma3")
    writer.add_block_count(1)
    writer.add_rope_freq_base(1e6)
    writer.add_add_bos_token(True)
    writer.add_custom_alignment(8)
    writer.add_token_list(["<pad>", "▁the", "🙂"])
    writer.add_token_scores([0.0, -1.0, -2.0])
    writer.add_array("flags", [True, False])
    writer.add_tensor("norm", np.ones(3, np.float32))
    writer.add_tensor("half", np.ones((2, 3), np.float16))
    for kind in (Type.Q8_0, Type.Q5_1):
        writer.add_tensor(kind.name, random_rows(kind, rows=2, blocks=1), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read_everything(path: Path) -> tuple[dict[str, object], dict[str, np.ndarray | QuantizedArray]]:
    file = GGUFFile(path)
    return dict(file.metadata), {name: file.read(name) for name in file.names()}


class TestAnyDamage:
    """Whatever happens to the bytes, a file is read or refused with one of our own errors."""

    def test_the_sound_file_is_read(self, small_file: Path) -> None:
        metadata, arrays = read_everything(small_file)
        assert len(metadata) == 8
        assert list(arrays) == ["norm", "half", "Q8_0", "Q5_1"]

    def test_every_truncation_is_refused(self, small_file: Path) -> None:
        content = small_file.read_bytes()
        damaged = small_file.with_name("truncated.gguf")
        # The writer pads the last tensor to the alignment too, and those bytes are nobody's.
        padding = -GGML_QUANT_SIZES[Type.Q5_1][1] * 2 % 8
        for length in range(len(content) - padding):
            damaged.write_bytes(content[:length])
            with pytest.raises(FormatError):
                read_everything(damaged)

    @settings(max_examples=200, deadline=None)
    @given(data=st.data())
    def test_flipped_bytes_are_read_or_refused(self, small_file: Path, data: st.DataObject) -> None:
        content = bytearray(small_file.read_bytes())
        positions = st.integers(0, len(content) - 1)
        flips = data.draw(
            st.lists(st.tuples(positions, st.integers(1, 255)), min_size=1, max_size=4)
        )
        for position, mask in flips:
            content[position] ^= mask
        damaged = small_file.with_name("flipped.gguf")
        damaged.write_bytes(content)
        message, num_weights = "", 0
        try:
            _, arrays = read_everything(damaged)
            num_weights = sum(math.prod(array.shape) for array in arrays.values())
        except WeightsError as error:
            message = str(error)
        assert message == "" or str(damaged) in message
        # No type stores more than four weights a byte, and no two tensors share a byte.
        assert num_weights <= 4 * len(content)
