"""Tiny GGUF files of Gemma 3n and Gemma 4: what llama.cpp's converter would write."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, LlamaFileType
from refimpl_weights import synthetic, synthetic_tokenizer
from refimpl_weights.gguf import GGUFFile
from refimpl_weights.quantized import QuantizedArray
from refimpl_weights.synthetic_conversion import CONVERTIBLE, tensors, write_gguf
from refimpl_weights.synthetic_gguf import FILE_TYPES

from refimpl.model.tokenizer import Tokenizer

PREFIX = "model.language_model."


def keys(path: Path) -> dict[str, object]:
    """Those of the architecture, without its name."""
    metadata = GGUFFile(path).metadata
    name = f"{metadata['general.architecture']}."
    return {k.removeprefix(name): value for k, value in metadata.items() if k.startswith(name)}


@pytest.mark.parametrize("name", sorted(CONVERTIBLE))
def test_the_weights_are_those_of_the_synthetic_checkpoint(name):
    """Every number of it but those of other senses, no other number, and none changed."""
    decoder = synthetic.tensors(name, prefix=PREFIX)
    numbers = np.concatenate([a.ravel() for k, a in decoder.items() if k.startswith(PREFIX)])
    converted = tensors(name)
    divisors = converted.pop("rope_freqs.weight", None)
    assert (divisors is None) == (name == "gemma3n")
    if name == "gemma3n":
        padded = converted["per_layer_token_embd.weight"]
        assert not padded[480:].any()
        converted["per_layer_token_embd.weight"] = padded[:480]
    got = np.concatenate([array.ravel() for array in converted.values()])
    np.testing.assert_array_equal(np.sort(got), np.sort(numbers))


def test_shapes_of_what_is_stacked():
    streams = tensors("gemma3n")
    assert streams["altup_proj.weight"].shape == (3, 32, 32)
    original = synthetic.tensors("gemma3n", prefix=PREFIX)
    for index, matrix in enumerate(streams["altup_unembd_proj.weight"]):
        name = f"{PREFIX}altup_unembed_projections.{index}.weight"
        np.testing.assert_array_equal(matrix, original[name])
    fused = tensors("gemma4_moe")["blk.3.ffn_gate_up_exps.weight"]
    parted = tensors("gemma4_moe", has_fused_experts=False)
    assert fused.shape == (8, 24, 32)
    np.testing.assert_array_equal(parted["blk.3.ffn_gate_exps.weight"], fused[:, :12])
    np.testing.assert_array_equal(parted["blk.3.ffn_up_exps.weight"], fused[:, 12:])


def test_a_quarter_of_the_pairs_of_a_global_head_turn():
    divisors = tensors("gemma4")["rope_freqs.weight"]
    assert divisors.dtype == np.float32
    np.testing.assert_array_equal(divisors, np.array([1.0] * 4 + [1e30] * 12, np.float32))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "gemma4",
            {
                "attention.head_count_kv": [2, 2, 2, 2, 2, 1, 1],
                "attention.key_length": 32,
                "attention.key_length_swa": 16,
                "attention.shared_kv_layers": 0,
                "attention.sliding_window_pattern": [True] * 5 + [False] * 2,
                "embedding_length_per_layer_input": 0,
                "feed_forward_length": 48,
                "rope.dimension_count": 32,
                "rope.dimension_count_swa": 16,
            },
        ),
        (
            "gemma4_e2b",
            {
                "attention.head_count_kv": 1,
                "attention.shared_kv_layers": 3,
                "embedding_length_per_layer_input": 16,
                "feed_forward_length": [32] * 5 + [64] * 3,
                "rope.freq_base": 1e6,
                "rope.freq_base_swa": 1e4,
            },
        ),
        (
            "gemma4_moe",
            {
                "attention.head_count_kv": [2, 1, 2, 1],
                "expert_count": 8,
                "expert_used_count": 3,
                "expert_feed_forward_length": 12,
            },
        ),
        (
            "gemma3n",
            {
                # The quantile of 0.95 in float32.
                "activation_sparsity_scale": [float(np.float32(1.6448536))] * 2 + [-np.inf] * 4,
                "altup.active_idx": 0,
                "altup.num_inputs": 4,
                "attention.shared_kv_layers": 3,
                "feed_forward_length": [128] * 6,
                "final_logit_softcapping": 30.0,
            },
        ),
    ],
)
def test_what_the_file_says(name, said, tmp_path):
    found = keys(write_gguf(tmp_path / "x.gguf", name))
    assert {key: found[key] for key in said} == said


def test_columns_that_are_no_whole_blocks_are_halves(tmp_path):
    path = write_gguf(tmp_path / "x.gguf", "gemma4_moe", tensor_type="Q8_0")
    file, theirs = GGUFFile(path), GGUFReader(path)
    assert file.metadata["general.file_type"] == LlamaFileType.MOSTLY_Q8_0
    assert {key: file.tensor_type(f"blk.0.{key}").name for key in (
        "ffn_gate_up_exps.weight", "ffn_down_exps.weight", "ffn_down_exps.scale",
        "ffn_gate_inp.weight", "attn_norm.weight", "layer_output_scale.weight",
    )} == {
        "ffn_gate_up_exps.weight": "Q8_0",
        "ffn_down_exps.weight": "F16",
        "ffn_down_exps.scale": "F32",
        "ffn_gate_inp.weight": "F32",
        "attn_norm.weight": "F32",
        "layer_output_scale.weight": "F32",
    }  # fmt: skip
    assert file.names() == tuple(tensor.name for tensor in theirs.tensors)
    for tensor in theirs.tensors:
        array = file.read(tensor.name)
        ours = array.dequantize() if isinstance(array, QuantizedArray) else array
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(ours.astype(np.float32), expected, strict=True)


def test_every_matrix_of_a_wide_model_that_is_rounded_fits_every_type():
    narrow = {"laurel_r", "altup_correct_coef", "altup_predict_coef"}
    for name in CONVERTIBLE:
        for key, array in tensors(name, is_wide=True).items():
            if array.ndim > 1 and key.split(".")[-2] not in narrow:
                assert array.shape[-1] % 256 == 0, f"{name}: {key} is {array.shape}"


@pytest.mark.parametrize("name", ["gemma3n", "gemma4"])
def test_the_vocabulary_gives_the_ids_of_the_checkpoints_tokenizer(name, tmp_path):
    """In scored pieces and in ranked merges."""
    synthetic.write_checkpoint(tmp_path / "folder", name)
    metadata = GGUFFile(write_gguf(tmp_path / "x.gguf", name)).metadata
    assert metadata["tokenizer.ggml.model"] == ("llama" if name == "gemma3n" else "gemma4")
    ours = Tokenizer.from_gguf(metadata)
    theirs = Tokenizer.from_file(tmp_path / "folder" / "tokenizer.json")
    for text in (
        "the return of it",
        "  a     b\n\n\nx",
        "日本語жи♥ 1234 == ())",
        "<start_of_turn>x",
    ):
        assert ours.encode(text, parse_special=True) == theirs.encode(text, parse_special=True)
    assert metadata["tokenizer.ggml.bos_token_id"] == synthetic_tokenizer.BOS
    # Rows of the embedding without a piece have names, so that there are as many as rows.
    pieces = metadata["tokenizer.ggml.tokens"]
    rows = CONVERTIBLE[name]["text_config"]["vocab_size"]
    assert pieces[512:] == [f"[PAD{i}]" for i in range(512, rows)]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gemma3", {}, "name is 'gemma3', expected one of gemma3n, gemma4, gemma4_e2b"),
        ("gemma4", {"tensor_type": "Q4_K_M"}, "tensor_type is 'Q4_K_M', expected one of F32"),
    ],
)
def test_what_cannot_be_written_is_refused(name, options, message, tmp_path):
    assert "Q4_K_M" in FILE_TYPES
    assert "Q4_K_M" not in GGMLQuantizationType.__members__
    with pytest.raises(ValueError, match=message):
        write_gguf(tmp_path / "x.gguf", name, **options)
    assert not (tmp_path / "x.gguf").exists()
