"""GGUF files as models: integers stay integers, and the function is that of the dense weights."""

from pathlib import Path

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from refimpl_kernels.matrix import OutputMajorMatrix, QuantizedMatrix
from refimpl_weights import synthetic_gguf

from refimpl.model.checkpoint import open_checkpoint
from refimpl.model.hf_config import to_hugging_face
from refimpl.model.parameters import load_model
from tests.checkpoint_files import (
    Arrays,
    as_float32,
    as_hugging_face,
    assert_same,
    expected_parameters,
    faults,
    load,
    logits,
    parameters,
    refusal,
    rewrite_gguf,
    write,
)
from tests.gguf_files import Tensor, build


@pytest.fixture(scope="module")
def plain_gguf(tmp_path_factory) -> Path:
    """A Gemma 2 of one layer in float32."""
    path = tmp_path_factory.mktemp("gguf") / "plain.gguf"
    return synthetic_gguf.write_gguf(path, architecture="gemma2", tensor_type="F32", layers=1)


@pytest.mark.parametrize("tensor_type", list(synthetic_gguf.FILE_TYPES))
def test_every_type_arrives_as_the_gguf_package_reads_it(tmp_path, tensor_type):
    path = synthetic_gguf.write_gguf(
        tmp_path / "x.gguf", architecture="gemma2", tensor_type=tensor_type, layers=1
    )
    checkpoint = open_checkpoint(path)
    got = parameters(load_model(checkpoint))
    expected = expected_parameters(as_hugging_face(path, checkpoint.config), checkpoint.config)
    assert_same({name: as_float32(leaf) for name, leaf in got.items()}, expected)

    matrices = [leaf for name, leaf in got.items() if name.endswith(".weight")]
    assert len(matrices) == 5
    plain = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
    if tensor_type in plain:
        assert {matrix.dtype for matrix in matrices} == {np.dtype(plain[tensor_type])}
    else:
        # Never widened: a byte a weight, and a scale a block.
        assert sum(isinstance(matrix, QuantizedMatrix) for matrix in matrices) == 1
        assert sum(isinstance(matrix, OutputMajorMatrix) for matrix in matrices) == 4
        assert {leaf.values.dtype for leaf in matrices} == {np.dtype(np.int8)}


@pytest.mark.parametrize(("architecture", "layers"), [("gemma", 1), ("gemma2", 2), ("gemma3", 1)])
def test_a_quantized_model_computes_what_its_dense_twin_computes(tmp_path, architecture, layers):
    path = synthetic_gguf.write_gguf(
        tmp_path / "x.gguf", architecture=architecture, tensor_type="Q4_K_M", layers=layers
    )
    config = open_checkpoint(path).config
    assert config.norm_offset == 0.0
    twin = as_hugging_face(path, config)
    for name, array in twin.items():
        if array.ndim == 1:
            # The converter has added one, and Hugging Face's file is without.
            twin[name] = array - np.float32(1)
    folder = write(tmp_path / "twin", to_hugging_face(config), twin)
    tokens = [2, 17, 300, 5, 400, 401, 17, 9, 250, 11, 30, 31]
    ours, theirs = logits(path, tokens), logits(folder, tokens)
    # The same float32 products, added in another order at most: 4e-5 was the largest difference,
    # of logits up to 26. A norm off by its one is off by whole numbers.
    assert np.abs(theirs).max() > 5
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def test_fused_queries_keys_and_values(tmp_path, plain_gguf):
    def fuse(arrays: Arrays) -> None:
        parts = [arrays.pop(f"blk.0.attn_{part}.weight") for part in "qkv"]
        arrays["blk.0.attn_qkv.weight"] = np.concatenate(parts)

    fused = rewrite_gguf(tmp_path / "fused.gguf", plain_gguf, fuse)
    assert "blk.0.attn_qkv.weight" in open_checkpoint(fused).available
    assert_same(load(fused), load(plain_gguf))


def test_fused_and_separate_at_once_leaves_one_unused(tmp_path, plain_gguf):
    def add(arrays: Arrays) -> None:
        parts = [arrays[f"blk.0.attn_{part}.weight"] for part in "qkv"]
        arrays["blk.0.attn_qkv.weight"] = np.concatenate(parts)

    assert faults(rewrite_gguf(tmp_path / "x.gguf", plain_gguf, add)) == {
        "unused: blk.0.attn_qkv.weight"
    }


def test_output_that_repeats_the_embedding_is_an_alias(tmp_path, plain_gguf):
    def add(arrays: Arrays) -> None:
        arrays["output.weight"] = arrays["token_embd.weight"]

    path = rewrite_gguf(tmp_path / "x.gguf", plain_gguf, add)
    assert open_checkpoint(path).config.has_tied_head
    assert_same(load(path), load(plain_gguf))


def test_output_that_differs_is_a_head_of_its_own(tmp_path, plain_gguf):
    def add(arrays: Arrays) -> None:
        arrays["output.weight"] = -arrays["token_embd.weight"]

    path = rewrite_gguf(tmp_path / "x.gguf", plain_gguf, add)
    assert not open_checkpoint(path).config.has_tied_head
    got = load(path)
    head, table = (np.asarray(got[f"embedder.{part}.weight"]) for part in ("head", "table"))
    np.testing.assert_array_equal(head, -table)


@pytest.mark.parametrize(
    ("tensor_type", "seed", "is_alias"),
    [("Q8_0", 0, True), ("Q8_0", 1, False), ("F32", 0, False)],
)
def test_quantized_heads_are_compared_as_they_are_stored(tmp_path, tensor_type, seed, is_alias):
    # The embedding is that of seed 0 in Q8_0.
    template = synthetic_gguf.write_gguf(tmp_path / "x.gguf", architecture="gemma", layers=1)
    table = synthetic_gguf.tensors("gemma", seed=seed, layers=1)["token_embd.weight"]
    head = gguf.quants.quantize(table, GGMLQuantizationType[tensor_type])

    def add(arrays: Arrays) -> None:
        arrays["output.weight"] = head

    path = rewrite_gguf(tmp_path / "headed.gguf", template, add)
    assert open_checkpoint(path).config.has_tied_head is is_alias


def test_one_error_lists_everything_that_is_wrong_with_a_gguf(tmp_path, plain_gguf):
    def damage(arrays: Arrays) -> None:
        del arrays["output_norm.weight"]
        arrays["rope_freqs.weight"] = np.ones(32, np.float32)
        arrays["blk.0.attn_k.weight"] = arrays["blk.0.attn_k.weight"][:64]
        arrays["blk.0.ffn_down.weight"][1, 2] = np.inf

    assert faults(rewrite_gguf(tmp_path / "x.gguf", plain_gguf, damage)) == {
        "missing: output_norm.weight",
        "unused: rope_freqs.weight",
        "mis-shaped: blk.0.attn_k.weight is (64, 256), expected (128, 256)",
        "not finite: blk.0.ffn_down.weight",
    }


def test_scale_that_is_no_number_is_listed_with_the_rest(tmp_path):
    template = synthetic_gguf.write_gguf(tmp_path / "x.gguf", architecture="gemma", layers=1)

    def damage(arrays: Arrays) -> None:
        for name in ("attn_q", "ffn_up"):
            # A block of Q8_0 begins with its scale, a float16.
            scale = np.array([np.nan], np.float16)
            arrays[f"blk.0.{name}.weight"][0, :2] = scale.view(np.uint8)
        del arrays["output_norm.weight"]

    path = rewrite_gguf(tmp_path / "damaged.gguf", template, damage)
    assert {line.split(" has ")[0] for line in faults(path)} == {
        "missing: output_norm.weight",
        f"unreadable: {path}: tensor 'blk.0.attn_q.weight'",
        f"unreadable: {path}: tensor 'blk.0.ffn_up.weight'",
    }


def test_a_gguf_without_an_embedding(tmp_path, plain_gguf):
    def remove(arrays: Arrays) -> None:
        del arrays["token_embd.weight"]

    path = rewrite_gguf(tmp_path / "x.gguf", plain_gguf, remove)
    assert "holds no token_embd.weight" in refusal(path)


@pytest.mark.parametrize("axes", [(), (4,), (2, 2, 1)])
def test_an_embedding_that_is_no_matrix(tmp_path, axes):
    path = tmp_path / "x.gguf"
    path.write_bytes(build([Tensor("token_embd.weight", axes)]))
    assert f"must be a matrix, got shape {axes[::-1]}" in refusal(path)
