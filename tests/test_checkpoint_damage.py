"""Checkpoints that are none, or not whole: one error that lists what is wrong, and no model."""

import json
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from refimpl_weights import synthetic_gguf
from refimpl_weights.synthetic import TINY

from refimpl.errors import CheckpointError, ConfigError
from refimpl.model.checkpoint import open_checkpoint
from refimpl.model.parameters import load_model
from tests.checkpoint_files import faults, refusal, small, write

# What is wrong with a checkpoint.


def test_one_error_lists_everything_that_is_wrong(tmp_path):
    config, arrays = small()
    at = "model.layers.1."
    del arrays["model.norm.weight"]
    del arrays[at + "mlp.up_proj.weight"]
    arrays["model.layers.2.input_layernorm.weight"] = np.zeros(40, np.float32)
    arrays["model.magic"] = np.zeros(1, np.float32)
    arrays[at + "self_attn.o_proj.weight"] = np.zeros((40, 63), np.float32)
    arrays[at + "self_attn.q_norm.weight"] = np.zeros(17, np.float32)
    arrays[at + "self_attn.k_proj.weight"][3, 4] = np.nan
    arrays[at + "self_attn.v_proj.weight"][0, 0] = -np.inf
    arrays["model.embed_tokens.weight"] = np.zeros((512, 40), np.int8)
    write(tmp_path, config, arrays)
    assert faults(tmp_path) == {
        "missing: norm.weight",
        "missing: layers.1.mlp.up_proj.weight",
        "unused: model.layers.2.input_layernorm.weight",
        "unused: model.magic",
        f"mis-shaped: {at}self_attn.o_proj.weight is (40, 63), expected (40, 64)",
        f"mis-shaped: {at}self_attn.q_norm.weight is (17,), expected (16,)",
        f"not finite: {at}self_attn.k_proj.weight",
        f"not finite: {at}self_attn.v_proj.weight",
        "mistyped: model.embed_tokens.weight is int8, expected one of float32, float16, bfloat16",
    }


def test_the_error_says_which_checkpoint_and_which_model(tmp_path):
    config, arrays = small()
    write(tmp_path, config, {**arrays, "model.magic": np.zeros(1, np.float32)})
    message = refusal(tmp_path)
    assert str(tmp_path) in message
    assert "gemma3_text model that its configuration describes" in message


def test_a_long_list_is_counted_and_not_cut(tmp_path):
    config, arrays = small()
    surplus = {f"model.magic.{i}": np.zeros(1, np.float32) for i in range(100)}
    write(tmp_path, config, {**arrays, **surplus})
    message = refusal(tmp_path)
    assert "100 faults" in message
    assert message.count("unused: ") == 100


def test_parts_of_a_joined_matrix_are_checked_one_by_one(tmp_path):
    # Together they have the right number of outputs.
    config, arrays = small()
    at = "model.layers.0."
    query, key = (arrays[f"{at}self_attn.{part}_proj.weight"] for part in "qk")
    arrays[f"{at}self_attn.q_proj.weight"] = query[:48].copy()
    arrays[f"{at}self_attn.k_proj.weight"] = np.concatenate([key, query[48:]])
    gate = arrays[f"{at}mlp.gate_proj.weight"]
    arrays[f"{at}mlp.gate_proj.weight"] = np.concatenate([gate, gate[:1]])
    arrays[f"{at}mlp.up_proj.weight"] = arrays[f"{at}mlp.up_proj.weight"][:-1].copy()
    write(tmp_path, config, arrays)
    assert faults(tmp_path) == {
        f"mis-shaped: {at}self_attn.q_proj.weight is (48, 40), expected (64, 40)",
        f"mis-shaped: {at}self_attn.k_proj.weight is (32, 40), expected (16, 40)",
        f"mis-shaped: {at}mlp.gate_proj.weight is (49, 40), expected (48, 40)",
        f"mis-shaped: {at}mlp.up_proj.weight is (47, 40), expected (48, 40)",
    }


def test_parts_of_a_joined_matrix_that_cannot_be_joined(tmp_path):
    config, arrays = small()
    name = "model.layers.0.self_attn.v_proj.weight"
    arrays[name] = np.zeros((16, 41), np.float32)
    write(tmp_path, config, arrays)
    assert faults(tmp_path) == {f"mis-shaped: {name} is (16, 41), expected (16, 40)"}


def test_transposed_matrix(tmp_path):
    config, arrays = small()
    name = "model.layers.0.mlp.down_proj.weight"
    arrays[name] = np.ascontiguousarray(arrays[name].T)
    write(tmp_path, config, arrays)
    assert faults(tmp_path) == {f"mis-shaped: {name} is (48, 40), expected (40, 48)"}


def test_checkpoint_of_another_family(tmp_path):
    # Gemma 2 has neither of the two norms of queries and keys.
    config, arrays = small("gemma2")
    write(tmp_path, {**TINY["gemma3"], "num_hidden_layers": 2, "hidden_size": 48}, arrays)
    found = faults(tmp_path)
    norms = {f"missing: layers.{i}.self_attn.{p}_norm.weight" for i in range(2) for p in "qk"}
    assert norms <= found
    assert config["model_type"] == "gemma2"


# What is no checkpoint.


def cut(path: Path, nbytes: int) -> Path:
    path.write_bytes(path.read_bytes()[:nbytes])
    return path


@pytest.mark.parametrize("nbytes", [0, 10, 200, 100_000])
def test_truncated_gguf(tmp_path, nbytes):
    path = synthetic_gguf.write_gguf(tmp_path / "x.gguf", architecture="gemma", layers=1)
    message = refusal(cut(path, nbytes))
    assert str(path) in message


@pytest.mark.parametrize("nbytes", [0, 10, 200, 20_000])
def test_truncated_safetensors(tmp_path, nbytes):
    write(tmp_path, *small())
    message = refusal(cut(tmp_path / "model.safetensors", nbytes))
    assert "model.safetensors" in message


def test_file_that_is_cut_after_it_was_opened(tmp_path):
    write(tmp_path, *small())
    checkpoint = open_checkpoint(tmp_path)
    cut(tmp_path / "model.safetensors", 150_000)
    with pytest.raises(CheckpointError, match=r"unreadable: .*cut after it had been opened"):
        load_model(checkpoint)


@pytest.mark.parametrize("name", ["x.gguf", "x.bin", "model.safetensors", "x"])
def test_foreign_file(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(TINY["gemma3"]))
    path = tmp_path / name
    path.write_bytes(b"PK\x03\x04 something else altogether" * 10)
    assert name in refusal(path)


def test_model_that_is_none_of_ours(tmp_path):
    writer = GGUFWriter(tmp_path / "llama.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConfigError, match="got 'llama'"):
        open_checkpoint(tmp_path / "llama.gguf")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="got 'llama'"):
        open_checkpoint(tmp_path)


def test_folder_without_a_configuration(tmp_path):
    write(tmp_path, *small())
    (tmp_path / "config.json").unlink()
    for path in (tmp_path, tmp_path / "model.safetensors"):
        message = refusal(path)
        assert f"there is no config.json in {tmp_path}" in message
        assert "a folder with config.json and safetensors files" in message


def test_folder_without_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY["gemma3"]))
    assert "no .safetensors file at all" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["nowhere", "nowhere.gguf", "nowhere.safetensors", "n" * 300])
def test_nothing_there(tmp_path, name):
    message = refusal(tmp_path / name)
    assert name in message
    assert "a checkpoint is a .gguf file, or a folder with config.json" in message


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"{", "cannot read"),
        (b"\xff\xfe", "cannot read"),
        (b"[" * 100_000, "cannot read"),
        (b"[1]", "must hold a JSON object, got list"),
        (b"null", "must hold a JSON object, got NoneType"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_damaged_json(tmp_path, name, content, fault):
    write(tmp_path, *small())
    (tmp_path / name).write_bytes(content)
    message = refusal(tmp_path)
    assert fault in message
    assert name in message
