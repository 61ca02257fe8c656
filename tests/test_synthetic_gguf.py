"""Tiny GGUF models: the same bytes everywhere, near their own weights, complete."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, LlamaFileType, TokenType
from refimpl_weights import synthetic_tokenizer
from refimpl_weights.gguf import GGUFFile
from refimpl_weights.quantized import QuantizedArray
from refimpl_weights.synthetic import fingerprint
from refimpl_weights.synthetic_blocks import quantize
from refimpl_weights.synthetic_gguf import ARCHITECTURES, FILE_TYPES, tensors, write_gguf

Type = GGMLQuantizationType

# The largest error as a part of the largest weight: what rounding to integers costs, plus
# what rounding the scales costs. Integers without a minimum lose a whole step where +8,
# say, is missing, the others half a step. A float16 scale is off by 2^-11; a scale and a minimum of
# six bits by half a 63rd each, a scale of eight bits by half a 127th.
BOUNDS = {
    "F32": 0.0,
    "F16": 2**-11,
    "BF16": 2**-8,
    "Q4_0": 1 / 8 + 2**-11,
    "Q4_1": 1 / 15 + 2 * 2**-11,
    "Q5_0": 1 / 16 + 2**-11,
    "Q5_1": 1 / 31 + 2 * 2**-11,
    "Q8_0": 1 / 254 + 2**-11,
    "Q4_K": 1 / 15 + 1 / 63,
    "Q5_K": 1 / 31 + 1 / 63,
    "Q6_K": 1 / 32 + 1 / 254,
}


def read_float32(file: GGUFFile, name: str) -> np.ndarray:
    array = file.read(name)
    return array.dequantize() if isinstance(array, QuantizedArray) else array.astype(np.float32)


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("gemma", "bfe42df831ca5b5c4e716dd9c2d91cf7b19d9b5917c63add65321d9d9cd12269"),
        ("gemma2", "60509b6673d2049d58ce85fe68af60e68a49f1a3b6d645cd6d54f4344a735f13"),
        ("gemma3", "8cd0a2a2d1fd3cb606a8353beeecb81b2fd24011b55a90dbfe9330f19287c837"),
    ],
)
def test_the_weights_are_those_of_every_other_machine(architecture: str, expected: str) -> None:
    assert fingerprint(tensors(architecture, seed=0)) == expected


@pytest.mark.parametrize(
    ("tensor_type", "expected"),
    [
        (Type.Q4_K, "e1cfe4be289978c9616c8d54153ecd385cf18190c476909630e6dcdfd6aecd7f"),
        (Type.Q5_K, "f9f5eb6520e7d024378228fc17cdce1b58c005cfa5c834c063bac7b58ddea130"),
        (Type.Q6_K, "28df98bf7a9afaad2f29c1a1f02329eb12925b3e49c9fad5650ebc915cc91cd0"),
    ],
)
def test_k_blocks_are_those_of_every_other_machine(tensor_type: Type, expected: str) -> None:
    weights = tensors("gemma", seed=0)["blk.0.ffn_down.weight"]
    assert fingerprint({"w": quantize(weights, tensor_type)}) == expected


def test_a_seed_decides_every_byte(tmp_path: Path) -> None:
    first, again, other = (
        write_gguf(tmp_path / f"{index}.gguf", architecture="gemma", seed=seed).read_bytes()
        for index, seed in enumerate([7, 7, 8])
    )
    assert first == again
    assert len(first) == len(other)
    assert first != other


@pytest.mark.parametrize("tensor_type", BOUNDS)
def test_what_is_stored_is_the_weights_to_half_a_step(tensor_type: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", architecture="gemma3", tensor_type=tensor_type, layers=1)
    file = GGUFFile(path)
    weights = tensors("gemma3", layers=1)
    assert file.names() == tuple(weights)
    for name, exact in weights.items():
        stored = read_float32(file, name)
        assert file.shape(name) == exact.shape
        if exact.ndim == 1:
            assert file.tensor_type(name) == Type.F32
            np.testing.assert_array_equal(stored, exact, strict=True)
        else:
            assert file.tensor_type(name) == Type[tensor_type]
            error = np.abs(stored - exact).max() / np.abs(exact).max()
            # Above the lower bound too: a file in a finer type than asked for is wrong as well.
            assert BOUNDS[tensor_type] / 2 <= error <= BOUNDS[tensor_type]


def test_the_gguf_package_reads_the_same_file(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", architecture="gemma2", tensor_type="Q4_K_M")
    file, theirs = GGUFFile(path), GGUFReader(path)
    assert file.names() == tuple(tensor.name for tensor in theirs.tensors)
    for tensor in theirs.tensors:
        assert file.tensor_type(tensor.name) == tensor.tensor_type
        expected = gguf.quants.dequantize(np.asarray(tensor.data), tensor.tensor_type)
        np.testing.assert_array_equal(read_float32(file, tensor.name), expected)
    assert dict(file.metadata) == {
        key: field.contents() for key, field in theirs.fields.items() if key[:5] != "GGUF."
    }


def test_the_mixture_is_that_of_the_released_270m(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", architecture="gemma3", tensor_type="Q4_K_M")
    file = GGUFFile(path)
    assert file.metadata["general.file_type"] == LlamaFileType.MOSTLY_Q4_K_M
    matrices = {name: file.tensor_type(name).name for name in file.names()}
    assert {
        name.removesuffix(".weight").removeprefix("blk.5."): kind
        for name, kind in matrices.items()
        if kind != "F32" and (name.startswith("blk.5.") or not name.startswith("blk."))
    } == {
        "token_embd": "Q8_0",
        "attn_q": "Q5_0",
        "attn_k": "Q5_0",
        "attn_v": "Q8_0",
        "attn_output": "Q4_K",
        "ffn_gate": "Q5_0",
        "ffn_up": "Q5_0",
        "ffn_down": "Q6_K",
    }


class TestConfiguration:
    def test_what_all_three_say(self, tmp_path: Path) -> None:
        for architecture in ARCHITECTURES:
            path = write_gguf(tmp_path / "m.gguf", architecture=architecture, layers=3)
            file = GGUFFile(path)
            metadata = file.metadata
            assert metadata["general.architecture"] == architecture
            assert metadata["general.file_type"] == LlamaFileType.MOSTLY_Q8_0
            heads = metadata[f"{architecture}.attention.head_count"]
            kv_heads = metadata[f"{architecture}.attention.head_count_kv"]
            width = metadata[f"{architecture}.attention.key_length"]
            embedding = metadata[f"{architecture}.embedding_length"]
            feed_forward = metadata[f"{architecture}.feed_forward_length"]
            assert file.shape("token_embd.weight") == (512, embedding)
            assert file.shape("blk.2.attn_q.weight") == (heads * width, embedding)
            assert file.shape("blk.2.attn_k.weight") == (kv_heads * width, embedding)
            assert file.shape("blk.2.attn_output.weight") == (embedding, heads * width)
            assert file.shape("blk.2.ffn_down.weight") == (embedding, feed_forward)
            assert metadata[f"{architecture}.block_count"] == 3
            assert not [name for name in file.names() if name.startswith("blk.3.")]

    @pytest.mark.parametrize(
        ("architecture", "own", "norms_a_layer"),
        [
            ("gemma", {}, 2),
            (
                "gemma2",
                {
                    "attention.sliding_window": 8,
                    "attn_logit_softcapping": 50.0,
                    "final_logit_softcapping": 30.0,
                },
                4,
            ),
            ("gemma3", {"attention.sliding_window": 8, "rope.freq_base": 1e6}, 6),
        ],
    )
    def test_what_each_one_adds(
        self,
        architecture: str,
        own: dict[str, float],
        norms_a_layer: int,
        tmp_path: Path,
    ) -> None:
        file = GGUFFile(write_gguf(tmp_path / "m.gguf", architecture=architecture))
        prefix = f"{architecture}."
        common = {
            *("context_length", "embedding_length", "block_count", "feed_forward_length"),
            *("attention.head_count", "attention.head_count_kv", "attention.key_length"),
            *("attention.value_length", "attention.layer_norm_rms_epsilon"),
        }
        said = {
            key.removeprefix(prefix): value
            for key, value in file.metadata.items()
            if key.startswith(prefix)
        }
        assert {key: value for key, value in said.items() if key not in common} == own
        norms = [name for name in file.names() if name.startswith("blk.0.") and "norm" in name]
        assert len(norms) == norms_a_layer

    def test_positions_can_be_scaled(self, tmp_path: Path) -> None:
        path = write_gguf(tmp_path / "m.gguf", architecture="gemma3", layers=1, rope_factor=8.0)
        metadata = GGUFFile(path).metadata
        assert metadata["gemma3.rope.scaling.type"] == "linear"
        assert metadata["gemma3.rope.scaling.factor"] == 8.0

    def test_norm_weights_are_stored_with_1_added(self) -> None:
        for name, array in tensors("gemma", seed=3).items():
            if name.endswith(("attn_norm.weight", "ffn_norm.weight")):
                assert 0.5 <= array.min() < 0.55
                assert 1.45 < array.max() < 1.5

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"architecture": "gemma4"}, "architecture is 'gemma4', expected one of gemma, gemma2"),
            ({"architecture": "gemma", "layers": 0}, "layers is 0, expected 1 or more"),
        ],
    )
    def test_what_cannot_be_written_is_refused(
        self, options: dict[str, object], message: str, tmp_path: Path
    ) -> None:
        path = tmp_path / "m.gguf"
        with pytest.raises(ValueError, match=message):
            write_gguf(path, **options)  # pyright: ignore[reportArgumentType]
        assert not path.exists()

    def test_an_unknown_type_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="tensor_type is 'Q2_K', expected one of F32, F16"):
            write_gguf(tmp_path / "m.gguf", architecture="gemma", tensor_type="Q2_K")

    def test_every_file_type_can_be_written(self, tmp_path: Path) -> None:
        assert {*FILE_TYPES} == {*BOUNDS, "Q4_K_M"}
        for tensor_type, number in FILE_TYPES.items():
            path = tmp_path / "m.gguf"
            write_gguf(path, architecture="gemma", layers=1, tensor_type=tensor_type)
            assert GGUFFile(path).metadata["general.file_type"] == number


def test_the_vocabulary_is_the_tiny_tokenizers_as_a_converter_stores_it(tmp_path: Path) -> None:
    metadata = GGUFFile(write_gguf(tmp_path / "m.gguf", architecture="gemma", layers=1)).metadata
    pieces = metadata["tokenizer.ggml.tokens"]
    scores = metadata["tokenizer.ggml.scores"]
    kinds = metadata["tokenizer.ggml.token_type"]
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert len(pieces) == len(scores) == len(kinds) == len(set(pieces)) == 512
    assert pieces[:5] == ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    ids = ("padding", "eos", "bos", "unknown")
    assert [metadata[f"tokenizer.ggml.{kind}_token_id"] for kind in ids] == [0, 1, 2, 3]
    assert pieces[metadata["tokenizer.ggml.eot_token_id"]] == "<end_of_turn>"
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert metadata["tokenizer.ggml.add_space_prefix"] is False

    by_kind: dict[int, list[int]] = {}
    for index, kind in enumerate(kinds):
        by_kind.setdefault(kind, []).append(index)
    assert [pieces[index] for index in by_kind[TokenType.BYTE]] == [
        f"<0x{byte:02X}>" for byte in range(256)
    ]
    # Runs stand in the file as the text has them, not with "▁" for the space.
    runs = [*("\n" * length for length in range(1, 9)), *(" " * length for length in range(2, 9))]
    assert [pieces[index] for index in by_kind[TokenType.USER_DEFINED]] == runs
    assert {scores[index] for index in by_kind[TokenType.CONTROL]} == {-1000.0}
    assert {scores[index] for index in by_kind[TokenType.BYTE]} == {0.0}
    normal = by_kind[TokenType.NORMAL]
    assert [scores[index] for index in normal] == [-float(rank) for rank in range(len(normal))]
    assert [pieces[index] for index in normal] == [
        synthetic_tokenizer.pieces()[index] for index in normal
    ]
    assert set(by_kind) == {
        TokenType.NORMAL, TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.BYTE,
    }  # fmt: skip


class TestKBlocks:
    @pytest.mark.parametrize("tensor_type", [Type.Q4_K, Type.Q5_K, Type.Q6_K])
    def test_zeros_stay_zeros(self, tensor_type: Type) -> None:
        stored = quantize(np.zeros((2, 512), np.float32), tensor_type)
        assert not gguf.quants.dequantize(stored, tensor_type).any()

    @pytest.mark.parametrize(
        ("tensor_type", "group", "steps"),
        [(Type.Q4_K, 32, 15), (Type.Q5_K, 32, 31), (Type.Q6_K, 16, 31)],
    )
    def test_each_group_has_a_scale_of_its_own(
        self, tensor_type: Type, group: int, steps: int
    ) -> None:
        # Groups whose sizes are 1, 2, 3 ... in turn, in one block.
        sizes = np.arange(1, 256 // group + 1, dtype=np.float32)
        generator = np.random.default_rng(0)
        unit = generator.uniform(-1, 1, (4, len(sizes), group)).astype(np.float32)
        weights = (unit * sizes[:, None]).reshape(4, 256)
        restored = gguf.quants.dequantize(quantize(weights, tensor_type), tensor_type)
        error = np.abs(restored - weights).reshape(unit.shape).max(axis=(0, 2))
        # A step is 2 * size / steps. A scale of six bits or eight is off by half a unit in 63 of
        # the largest scale, and that times the integer is what else an error is made of.
        bound = 2 * sizes / steps + sizes.max() / 63
        assert (error <= bound).all()
        assert error[0] < error[-1] / 2
