"""GGUF files of Gemma 3n and Gemma 4: the same model that Hugging Face's files hold."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from refimpl_kernels.matrix import Quantized
from refimpl_weights import synthetic
from refimpl_weights.synthetic_conversion import CONVERTIBLE, write_gguf

from refimpl.errors import ConfigError
from refimpl.model.checkpoint import open_checkpoint
from refimpl.model.hf_config import from_hugging_face
from refimpl.model.parameters import load_model
from tests.checkpoint_files import (
    Arrays,
    as_float32,
    as_hugging_face,
    assert_same,
    bare,
    expected_parameters,
    faults,
    load,
    parameters,
    rewrite_gguf,
)

every_model = pytest.mark.parametrize("name", sorted(CONVERTIBLE))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Every model in float32."""
    folder = tmp_path_factory.mktemp("gguf")
    return {name: write_gguf(folder / f"{name}.gguf", name) for name in CONVERTIBLE}


@every_model
def test_the_architecture_is_that_of_the_other_format(files, name):
    config = from_hugging_face(synthetic.TINY[name])
    if config.per_layer_input is not None:
        # The converter fills this table up with zeros, one row for each id of the vocabulary.
        config = replace(
            config, per_layer_input=replace(config.per_layer_input, vocab_size=config.vocab_size)
        )
    assert open_checkpoint(files[name]).config == replace(config, eos_ids=(1, 6))


@every_model
def test_parameters_are_those_of_the_other_format_bit_for_bit(files, name):
    """Norms too: nothing is added to them since Gemma 3n."""
    checkpoint = open_checkpoint(files[name])
    arrays = bare(name)
    if name == "gemma3n":
        table = arrays["embed_tokens_per_layer.weight"]
        assert table.shape == (480, 48)
        arrays["embed_tokens_per_layer.weight"] = np.pad(table, ((0, 48), (0, 0)))
    assert_same(parameters(load_model(checkpoint)), expected_parameters(arrays, checkpoint.config))


@pytest.mark.parametrize("name", ["gemma4_e2b", "gemma3n"])
def test_tensors_that_sharing_layers_do_not_read_may_be_absent(tmp_path, files, name):
    lean = write_gguf(tmp_path / "x.gguf", name, shared_tensors=False)
    absent = set(open_checkpoint(files[name]).available) - set(open_checkpoint(lean).available)
    assert len(absent) == 3 * 3
    assert_same(load(lean), load(files[name]))


def test_gate_and_up_of_the_experts_may_be_two_tensors(tmp_path, files):
    parted = write_gguf(tmp_path / "x.gguf", "gemma4_moe", has_fused_experts=False)
    available = open_checkpoint(parted).available
    assert "blk.0.ffn_gate_exps.weight" in available
    assert "blk.0.ffn_gate_up_exps.weight" not in available
    assert_same(load(parted), load(files["gemma4_moe"]))


@pytest.mark.parametrize(
    ("name", "tensor_type", "is_wide"),
    [
        ("gemma4", "BF16", False),
        ("gemma4_e2b", "Q8_0", False),
        ("gemma3n", "Q5_0", False),
        # Blocks of 256.
        ("gemma4_moe", "Q4_K", True),
    ],
)
def test_rounded_weights_are_those_that_the_gguf_package_reads(
    tmp_path, name, tensor_type, is_wide
):
    path = write_gguf(tmp_path / "x.gguf", name, tensor_type=tensor_type, is_wide=is_wide)
    checkpoint = open_checkpoint(path)
    got = parameters(load_model(checkpoint))
    expected = expected_parameters(as_hugging_face(path, checkpoint.config), checkpoint.config)
    assert_same({key: as_float32(leaf) for key, leaf in got.items()}, expected)

    quantized = {
        re.sub("[0-9]+", "*", key) for key, leaf in got.items() if isinstance(leaf, Quantized)
    }
    # A byte a weight, in stacks and tables as in the matrices of a dense model.
    own = {
        "gemma4": set(),
        "gemma4_e2b": {"per_layer_embedder.table.weight", "layers.*.per_layer_input.gate.weight"},
        "gemma3n": {"streams.into.weight", "streams.back.weight", "layers.*.laurel.left.weight"},
        "gemma4_moe": {"layers.*.experts.gate_up.weight", "layers.*.experts.down.weight"},
    }[name]
    assert own <= quantized
    assert ("layers.*.attention.query_key_value.weight" in quantized) == (tensor_type != "BF16")


def test_experts_of_two_types_are_joined_without_loss(tmp_path, files):
    """Gates in float32 and ups in Q8_0; files mix types."""
    rounded = write_gguf(
        tmp_path / "rounded.gguf", "gemma4_moe", tensor_type="Q8_0", has_fused_experts=False
    )

    def mix(arrays: Arrays) -> None:
        arrays["blk.0.ffn_gate_exps.weight"] = gates

    paths = (files["gemma4_moe"], rounded)
    # Inputs; then of each expert the outputs, gates in front.
    exact, near = (
        as_float32(load(path)["layers.0.experts.gate_up.weight"]).T.reshape(8, 24, 32)
        for path in paths
    )
    gates = exact[:, :12].copy()
    mixed = load(rewrite_gguf(tmp_path / "mixed.gguf", rounded, mix))
    got = as_float32(mixed["layers.0.experts.gate_up.weight"]).T.reshape(8, 24, 32)
    np.testing.assert_array_equal(got, np.concatenate([gates, near[:, 12:]], axis=1))
    assert np.abs(got - exact).max() > 0


def test_divisors_of_angles_are_read_and_are_no_parameter(files):
    checkpoint = open_checkpoint(files["gemma4"])
    assert "rope_freqs.weight" in checkpoint.source.names()
    assert "rope_freqs.weight" not in checkpoint.available
    assert checkpoint.config.global_rope.proportion == 0.25


@pytest.mark.parametrize(
    ("divisors", "message"),
    [
        ([1.0, 1e30, 1.0, 1.0, *[1e30] * 12], r"must hold 16 numbers, ones and then 1e30"),
        ([1.0] * 4 + [8.0] * 12, r"must hold 16 numbers, ones and then 1e30"),
        ([1.0] * 4 + [1e30] * 4, r"must hold 16 numbers, ones and then 1e30"),
        (None, "rope_freqs.weight is missing"),
    ],
)
def test_divisors_that_are_not_those_of_p_rope_are_refused(tmp_path, files, divisors, message):
    def change(arrays: Arrays) -> None:
        del arrays["rope_freqs.weight"]
        if divisors is not None:
            arrays["rope_freqs.weight"] = np.asarray(divisors, np.float32)

    path = rewrite_gguf(tmp_path / "x.gguf", files["gemma4"], change)
    with pytest.raises(ConfigError, match=message):
        open_checkpoint(path)


def test_quantized_divisors_are_refused_by_what_they_say(tmp_path, files):
    def change(arrays: Arrays) -> None:
        # One block of Q8_0, all of it zeros.
        arrays["rope_freqs.weight"] = np.zeros(34, np.uint8)

    def remove(arrays: Arrays) -> None:
        del arrays["rope_freqs.weight"]

    without = rewrite_gguf(tmp_path / "without.gguf", files["gemma4"], remove)
    with pytest.raises(ConfigError, match="must hold 16 numbers, ones and then 1e30"):
        open_checkpoint(rewrite_gguf(tmp_path / "x.gguf", without, change))


def test_divisors_in_a_file_that_has_no_use_for_them(tmp_path, files):
    def add(arrays: Arrays) -> None:
        arrays["rope_freqs.weight"] = np.ones(8, np.float32)

    path = rewrite_gguf(tmp_path / "x.gguf", files["gemma3n"], add)
    assert faults(path) == {"unused: rope_freqs.weight"}


def test_stacks_of_the_wrong_shape_are_named(tmp_path, files):
    def damage(arrays: Arrays) -> None:
        arrays["blk.1.ffn_gate_up_exps.weight"] = arrays["blk.1.ffn_gate_up_exps.weight"][:7]
        arrays["blk.2.ffn_down_exps.weight"] = arrays["blk.2.ffn_down_exps.weight"][:, :31]
        arrays["blk.3.ffn_down_exps.scale"] = arrays["blk.3.ffn_down_exps.scale"][:7]

    assert faults(rewrite_gguf(tmp_path / "x.gguf", files["gemma4_moe"], damage)) == {
        "mis-shaped: blk.1.ffn_gate_up_exps.weight is (7, 24, 32), expected (8, 24, 32)",
        "mis-shaped: blk.2.ffn_down_exps.weight is (8, 31, 12), expected (8, 32, 12)",
        "mis-shaped: blk.3.ffn_down_exps.scale is (7,), expected (8,)",
    }


def test_streams_that_are_no_stack_of_squares_are_named(tmp_path, files):
    def damage(arrays: Arrays) -> None:
        arrays["altup_proj.weight"] = arrays["altup_proj.weight"][:2]
        arrays["altup_unembd_proj.weight"] = arrays["altup_unembd_proj.weight"][..., :31]

    assert faults(rewrite_gguf(tmp_path / "x.gguf", files["gemma3n"], damage)) == {
        "mis-shaped: altup_proj.weight is (2, 32, 32), expected (3, 32, 32)",
        "mis-shaped: altup_unembd_proj.weight is (3, 32, 31), expected (3, 32, 32)",
    }
