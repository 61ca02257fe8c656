"""Safetensors checkpoints against the format's own library, and against every kind of damage."""

import json
import re
import struct
import tracemalloc
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from refimpl_weights.errors import FormatError, MissingError, UnsupportedError, WeightsError
from refimpl_weights.memory import ALIGNMENT
from refimpl_weights.safetensors import DTYPES, INDEX_FILE, SafetensorsCheckpoint
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save, save_file

F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def tensors_of_every_type() -> dict[str, np.ndarray]:
    """Random bits, so that every exponent and not-a-number pattern has to survive."""
    generator = np.random.default_rng(0)
    tensors = {}
    for code, dtype in DTYPES.items():
        bits = generator.integers(0, 256, 6 * dtype.itemsize, np.uint8)
        tensors[f"tensor.{code}"] = bits.view(dtype).reshape(2, 3)
    tensors["scalar"] = np.array(1.5, ml_dtypes.bfloat16)
    tensors["empty"] = np.zeros((0, 3), np.float32)
    return tensors


def assert_same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.tobytes() == expected.tobytes()


def write_raw(path: Path, header: object, data: bytes = b"") -> Path:
    """A file with this header, which may be JSON content or the very bytes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def write_shards(
    folder: Path,
    shards: Mapping[str, Mapping[str, np.ndarray]],
    *,
    weight_map: Mapping[str, object] | None = None,
) -> Path:
    """A folder of shards with an index; the truthful one where `weight_map` is not given."""
    for file, tensors in shards.items():
        save_file(dict(tensors), folder / file)
    truth = {name: file for file, tensors in shards.items() for name in tensors}
    index = {
        "metadata": {"total_size": 1},
        "weight_map": truth if weight_map is None else weight_map,
    }
    (folder / INDEX_FILE).write_text(json.dumps(index))
    return folder


def numbers(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


class TestOneFile:
    def test_every_type_keeps_its_bits(self, tmp_path: Path) -> None:
        tensors = tensors_of_every_type()
        save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
        checkpoint = SafetensorsCheckpoint(tmp_path / "x.safetensors")

        assert set(checkpoint.names()) == set(tensors)
        assert checkpoint.metadata == {"format": "pt"}
        assert checkpoint.folder == tmp_path
        for name, expected in tensors.items():
            assert checkpoint.shape(name) == expected.shape
            assert_same_bits(checkpoint.read(name), expected)

    def test_names_come_in_the_order_of_the_header(self, tmp_path: Path) -> None:
        header = {
            name: dict(F32, data_offsets=offsets)
            for name, offsets in [("z", [4, 8]), ("a", [8, 12]), ("m", [0, 4])]
        }
        path = write_raw(tmp_path / "x.safetensors", header, numbers(1, 2, 3).tobytes())
        checkpoint = SafetensorsCheckpoint(path)
        assert checkpoint.names() == ("z", "a", "m")
        assert [checkpoint.read(name).item() for name in checkpoint.names()] == [2, 3, 1]

    def test_a_folder_stands_for_its_model_file(self, tmp_path: Path) -> None:
        save_file({"a": numbers(1)}, tmp_path / "model.safetensors")
        save_file({"b": numbers(2)}, tmp_path / "adapter.safetensors")
        checkpoint = SafetensorsCheckpoint(tmp_path)
        assert checkpoint.names() == ("a",)
        assert checkpoint.path == checkpoint.folder == tmp_path

    def test_an_array_belongs_to_the_caller(self, tmp_path: Path) -> None:
        path = tmp_path / "x.safetensors"
        save_file({"a": numbers(1, 2)}, path)
        array = SafetensorsCheckpoint(path).read("a")
        path.write_bytes(bytes(path.stat().st_size))
        assert_array_equal(array, numbers(1, 2))
        # Memory of an array, aligned within it, and no map of the file.
        assert isinstance(array.base, np.ndarray)
        assert array.base.flags.owndata
        assert array.ctypes.data % ALIGNMENT == 0
        assert array.flags.writeable

    def test_reading_needs_no_more_memory_than_the_tensor(self, tmp_path: Path) -> None:
        path = tmp_path / "x.safetensors"
        save_file({"a": np.ones((1024, 1024), np.float32), "b": np.ones(1 << 20, np.float32)}, path)
        checkpoint = SafetensorsCheckpoint(path)
        tracemalloc.start()
        try:
            array = checkpoint.read("a")
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        # The file object's buffer is 8 to 128 KiB; a second copy would be 4 MiB.
        assert array.nbytes <= peak <= array.nbytes + 256 * 1024


class TestShards:
    def test_the_map_says_where_a_tensor_is(self, tmp_path: Path) -> None:
        # In the order of the file names, each tensor would be looked for in the wrong shard.
        write_shards(
            tmp_path,
            {
                "model-00002-of-00002.safetensors": {"layers.0": numbers(1), "norm": numbers(2)},
                "model-00001-of-00002.safetensors": {"layers.1": numbers(3)},
            },
        )
        for path in (tmp_path, tmp_path / INDEX_FILE):
            checkpoint = SafetensorsCheckpoint(path)
            assert checkpoint.names() == ("layers.0", "norm", "layers.1")
            assert [checkpoint.read(name).item() for name in checkpoint.names()] == [1, 2, 3]
            assert checkpoint.folder == tmp_path
            assert checkpoint.metadata == {"total_size": 1}

    def test_links_into_a_blob_store_are_followed(self, tmp_path: Path) -> None:
        # How the Hub's cache keeps a snapshot: names that link to files named by their hash.
        snapshot, blobs = tmp_path / "snapshot", tmp_path / "blobs"
        snapshot.mkdir()
        blobs.mkdir()
        write_shards(snapshot, {"model-1.safetensors": {"a": numbers(7)}})
        for number, file in enumerate(sorted(snapshot.iterdir())):
            file.rename(blobs / str(number))
            file.symlink_to(Path("..") / "blobs" / str(number))
        assert SafetensorsCheckpoint(snapshot).read("a").item() == 7

    def test_every_fault_is_listed_at_once(self, tmp_path: Path) -> None:
        write_shards(
            tmp_path,
            {
                "one.safetensors": {"a": numbers(1), "twice": numbers(1), "stray": numbers(1)},
                "two.safetensors": {"b": numbers(1), "twice": numbers(1)},
                "three.safetensors": {"c": numbers(1)},
            },
            weight_map={
                "a": "one.safetensors",
                "twice": "one.safetensors",
                "b": "two.safetensors",
                "absent": "two.safetensors",
                "c": "three.safetensors",
                "d": "four.safetensors",
            },
        )
        damaged = tmp_path / "three.safetensors"
        size = damaged.stat().st_size
        damaged.write_bytes(damaged.read_bytes()[:-1])
        with pytest.raises(FormatError) as caught:
            SafetensorsCheckpoint(tmp_path)
        assert [line.replace(str(tmp_path), "F") for line in str(caught.value).splitlines()] == [
            f"F/{INDEX_FILE} and its shards do not make a checkpoint:",
            f"- F/three.safetensors is truncated: got {size - 1} bytes, expected {size}; "
            "remove it and fetch it again",
            "- F/four.safetensors cannot be read: No such file or directory",
            "- one.safetensors holds tensors that the index does not list: 'stray'",
            "- two.safetensors lacks tensors that the index maps to it: 'absent'",
            "- tensors that stand in more than one shard: 'twice'",
        ]

    def test_a_tensor_in_another_shard_than_mapped(self, tmp_path: Path) -> None:
        write_shards(
            tmp_path,
            {"one.safetensors": {"a": numbers(1)}, "two.safetensors": {"b": numbers(1)}},
            weight_map={"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"},
        )
        with pytest.raises(FormatError, match=r"one\.safetensors lacks tensors .*: 'b'"):
            SafetensorsCheckpoint(tmp_path)

    def test_only_missing_shards_are_a_missing_error(self, tmp_path: Path) -> None:
        write_shards(
            tmp_path,
            {f"model-{number}.safetensors": {f"t{number}": numbers(1)} for number in range(30)},
        )
        for number in range(1, 30):
            (tmp_path / f"model-{number}.safetensors").unlink()
        with pytest.raises(MissingError) as caught:
            SafetensorsCheckpoint(tmp_path)
        lines = str(caught.value).splitlines()
        assert len(lines) == 1 + 20 + 1
        assert lines[-1] == "- and 9 more faults"

    def test_long_lists_of_names_are_cut(self, tmp_path: Path) -> None:
        strays = {f"t{number:02}": numbers(1) for number in range(50)}
        write_shards(tmp_path, {"m.safetensors": strays}, weight_map={"t00": "m.safetensors"})
        with pytest.raises(FormatError, match=r"holds tensors .*: 't01', .*'t20' and 29 more$"):
            SafetensorsCheckpoint(tmp_path)

    @pytest.mark.parametrize(
        "file",
        [
            "../x.safetensors",
            "/x.safetensors",
            "sub/x.safetensors",
            "sub\\x.safetensors",
            "C:x.safetensors",
            "x\0.safetensors",
            "pytorch_model.bin",
            "",
            None,
            3,
            ["x.safetensors"],
        ],
    )
    def test_a_shard_lies_beside_its_index(self, tmp_path: Path, file: object) -> None:
        folder = tmp_path / "folder"
        (folder / "sub").mkdir(parents=True)
        for place in (tmp_path, folder, folder / "sub"):
            save_file({"a": numbers(1)}, place / "x.safetensors")
        write_shards(folder, {}, weight_map={"a": file})
        with pytest.raises(FormatError, match="expected the names of"):
            SafetensorsCheckpoint(folder)

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"[]",
            b"{",
            b"{}",
            b'{"weight_map": {}}',
            b'{"weight_map": ["a"]}',
            b'{"weight_map": {"a": "x.safetensors"}, "metadata": 1}',
            b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}',
            b"\xff\xfe{}",
            b"[" * 200_000,
            b'{"metadata": {"total_size": ' + b"9" * 5000 + b"}}",
        ],
    )
    def test_a_file_that_is_no_index(self, tmp_path: Path, content: bytes) -> None:
        save_file({"a": numbers(1)}, tmp_path / "x.safetensors")
        (tmp_path / INDEX_FILE).write_bytes(content)
        with pytest.raises(FormatError, match=re.escape(INDEX_FILE)):
            SafetensorsCheckpoint(tmp_path)


class TestWhichFile:
    def test_two_checkpoints_in_a_folder_are_not_chosen_between(self, tmp_path: Path) -> None:
        write_shards(tmp_path, {"model-1.safetensors": {"a": numbers(1)}})
        save_file({"a": numbers(2)}, tmp_path / "model.safetensors")
        with pytest.raises(FormatError, match="two checkpoints"):
            SafetensorsCheckpoint(tmp_path)
        assert SafetensorsCheckpoint(tmp_path / INDEX_FILE).read("a").item() == 1
        assert SafetensorsCheckpoint(tmp_path / "model.safetensors").read("a").item() == 2

    def test_an_index_may_name_the_single_file(self, tmp_path: Path) -> None:
        write_shards(tmp_path, {"model.safetensors": {"a": numbers(5)}})
        assert SafetensorsCheckpoint(tmp_path).read("a").item() == 5

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(MissingError, match="does not exist"):
            SafetensorsCheckpoint(tmp_path / "nothing")
        with pytest.raises(MissingError, match=r"no \.safetensors file at all"):
            SafetensorsCheckpoint(tmp_path)
        save_file({"a": numbers(1)}, tmp_path / "model-00001-of-00002.safetensors")
        with pytest.raises(MissingError, match="only 'model-00001-of-00002"):
            SafetensorsCheckpoint(tmp_path)

    def test_a_name_that_is_not_there(self, tmp_path: Path) -> None:
        save_file({"a": numbers(1)}, tmp_path / "x.safetensors")
        checkpoint = SafetensorsCheckpoint(tmp_path / "x.safetensors")
        for ask in (checkpoint.shape, checkpoint.read):
            with pytest.raises(MissingError, match="no tensor 'b'; it has 1: 'a'"):
                ask("b")

    def test_a_file_that_shrinks_or_goes_after_opening(self, tmp_path: Path) -> None:
        path = tmp_path / "x.safetensors"
        save_file({"a": numbers(1, 2)}, path)
        checkpoint = SafetensorsCheckpoint(path)
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(FormatError, match="got 7 bytes of tensor 'a', expected 8"):
            checkpoint.read("a")
        path.unlink()
        with pytest.raises(MissingError, match="cannot be read"):
            checkpoint.read("a")


class TestDamage:
    @pytest.mark.parametrize(
        ("header", "data"),
        [
            (b"", b""),
            (b"{", b""),
            (b"[]", b""),
            (b"\xff\xff", b""),
            (b"{}\0", b""),
            (b"{}", b"0000"),
            (b"[" * 200_000, b""),
            (b'{"a":' + b"9" * 5000 + b"}", b""),
            ('{"a": {}}'.encode("utf-16"), b""),
            ({"__metadata__": {"a": 1}}, b""),
            ({"__metadata__": []}, b""),
            ({"a": None}, b""),
            ({"a": {}}, b""),
            ({"a": F32}, b"00000"),
            ({"a": F32}, b"000"),
            ({"a": F32, "b": F32}, b"0000"),
            ({"a": {**F32, "more": 1}}, b"0000"),
            ({"a": {**F32, "shape": [2]}}, b"0000"),
            ({"a": {**F32, "shape": [1.0]}}, b"0000"),
            ({"a": {**F32, "shape": [True]}}, b"0000"),
            ({"a": {**F32, "shape": [-1, -1]}}, b"0000"),
            ({"a": {**F32, "shape": [1] * 65}}, b"0000"),
            ({"a": {**F32, "shape": [0, 2**62], "data_offsets": [0, 0]}}, b""),
            ({"a": {**F32, "data_offsets": [4, 8]}}, b"00000000"),
            ({"a": {**F32, "data_offsets": [4, 0]}}, b"0000"),
            ({"a": {**F32, "data_offsets": [0, 4, 8]}}, b"0000"),
            ({"a": {**F32, "data_offsets": [0, 2**64 + 4]}}, b"0000"),
            (b'{"a":%b,"a":%b}' % ((json.dumps(F32).encode(),) * 2), b"0000"),
        ],
    )
    def test_a_header_that_is_wrong(self, tmp_path: Path, header: object, data: bytes) -> None:
        path = write_raw(tmp_path / "x.safetensors", header, data)
        with pytest.raises(FormatError, match=re.escape(str(path))):
            SafetensorsCheckpoint(path)

    @pytest.mark.parametrize("code", ["F8_E4M3", "F4", "BOOL", "C64", "Q4_K"])
    def test_types_that_mean_nothing_alone(self, tmp_path: Path, code: str) -> None:
        path = write_raw(tmp_path / "x.safetensors", {"a": {**F32, "dtype": code}}, b"0000")
        with pytest.raises(UnsupportedError, match=f"tensor 'a' has element type '{code}'"):
            SafetensorsCheckpoint(path)

    @pytest.mark.parametrize("content", [b"", b"\x02", b"GGUF\x03\0\0\0" * 9, b"PK\x03\x04" * 99])
    def test_foreign_files(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "x.safetensors"
        path.write_bytes(content)
        with pytest.raises(FormatError, match="not a safetensors file"):
            SafetensorsCheckpoint(path)

    def test_every_truncation_is_noticed_on_opening(self, tmp_path: Path) -> None:
        whole = save({"a": numbers(1, 2), "b": np.ones((2, 2), ml_dtypes.bfloat16)})
        path = tmp_path / "x.safetensors"
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            with pytest.raises(FormatError):
                SafetensorsCheckpoint(path)

    def test_every_flipped_bit_of_a_header_is_an_error_or_harmless(self, tmp_path: Path) -> None:
        """What we accept, the format's own library accepts too, with the same content."""
        whole = save({"a": numbers(1, 2), "b": numbers(3)}, metadata={"format": "pt"})
        header_bytes = 8 + int.from_bytes(whole[:8], "little")
        path = tmp_path / "x.safetensors"
        refused = 0
        for bit in range(8 * header_bytes):
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            refused += outcome(path) == "refused"
        # Harmless are the flips inside names, the metadata's text, and trailing blanks. The exact
        # share depends on the header's text; that most of it matters does not.
        assert 0.7 < refused / (8 * header_bytes) < 1

    @settings(max_examples=150, deadline=None)
    @given(
        content=st.binary(max_size=200)
        | st.binary(max_size=200).map(lambda raw: struct.pack("<Q", len(raw)) + raw)
    )
    def test_noise(self, tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
        path = tmp_path_factory.getbasetemp() / "noise.safetensors"
        path.write_bytes(content)
        outcome(path)


def outcome(path: Path) -> str:
    """How we take a file: "refused", or "read", and then the library must read it alike."""
    try:
        checkpoint = SafetensorsCheckpoint(path)
        tensors = {name: checkpoint.read(name) for name in checkpoint.names()}
    except WeightsError:
        return "refused"
    try:
        with safe_open(path, "np") as theirs:
            assert set(theirs.keys()) == set(tensors)
            for name, array in tensors.items():
                assert_same_bits(array, theirs.get_tensor(name))
    except SafetensorError as error:
        pytest.fail(f"we read a file that the library refuses: {error}")
    return "read"
