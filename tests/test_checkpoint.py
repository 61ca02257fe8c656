"""Hugging Face folders: every tensor exactly once, and bit for bit."""

from dataclasses import replace

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from refimpl_weights import synthetic
from refimpl_weights.synthetic import TINY
from safetensors.numpy import save_file

from refimpl.model.checkpoint import open_checkpoint
from refimpl.model.hf_config import from_hugging_face
from refimpl.model.names import joined_outputs, strip_prefix
from refimpl.model.parameters import load_model
from tests.checkpoint_files import (
    assert_same,
    bare,
    expected_parameters,
    faults,
    load,
    logits,
    parameters,
    refusal,
    small,
    write,
)

PREFIXES = ("model.", "language_model.model.", "model.language_model.")

every_model = pytest.mark.parametrize("name", list(TINY))


@every_model
def test_every_tensor_arrives_bit_for_bit(tmp_path, name):
    # Three shards with neighbours apart, and bfloat16, which must stay so.
    synthetic.write_checkpoint(tmp_path, name, shards=3, dtype="bfloat16")
    checkpoint = open_checkpoint(tmp_path)
    got = parameters(load_model(checkpoint))
    assert_same(got, expected_parameters(bare(name, dtype="bfloat16"), checkpoint.config))
    assert {leaf.dtype for leaf in got.values()} == {np.dtype(jnp.bfloat16)}


@every_model
@pytest.mark.parametrize("prefix", PREFIXES)
def test_every_prefix_names_the_same_tensors(tmp_path, name, prefix):
    synthetic.write_checkpoint(tmp_path, name, prefix=prefix)
    checkpoint = open_checkpoint(tmp_path)
    found = {ours: checkpoint.source.read(theirs) for ours, theirs in checkpoint.available.items()}
    assert_same(found, bare(name))
    stored = synthetic.tensors(name, prefix=prefix)
    assert {*checkpoint.available.values(), *checkpoint.ignored} == set(stored)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_every_prefix_loads(tmp_path, prefix):
    synthetic.write_checkpoint(tmp_path, "gemma3_multimodal", prefix=prefix)
    checkpoint = open_checkpoint(tmp_path)
    expected = expected_parameters(bare("gemma3_multimodal"), checkpoint.config)
    assert_same(parameters(load_model(checkpoint)), expected)


@every_model
def test_configuration_comes_with_the_ids_of_the_generation_file(tmp_path, name):
    synthetic.write_checkpoint(tmp_path, name)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config == replace(from_hugging_face(TINY[name]), eos_ids=(1, 6))
    assert checkpoint.path == tmp_path


def test_tensors_without_any_prefix(tmp_path):
    config, arrays = small()
    without = {name.removeprefix("model."): array for name, array in arrays.items()}
    write(tmp_path / "with", config, arrays)
    write(tmp_path / "without", config, without)
    assert_same(load(tmp_path / "without"), load(tmp_path / "with"))


@pytest.mark.parametrize("name", ["gemma4_e2b", "gemma3n"])
def test_tensors_that_sharing_layers_do_not_read_may_be_absent(tmp_path, name):
    synthetic.write_checkpoint(tmp_path / "released", name)
    synthetic.write_checkpoint(tmp_path / "saved again", name, shared_tensors=False)
    assert_same(load(tmp_path / "saved again"), load(tmp_path / "released"))


def test_what_sharing_layers_do_not_read_must_still_fit(tmp_path):
    arrays = synthetic.tensors("gemma3n")
    at = "model.language_model.layers."
    del arrays[f"{at}3.self_attn.k_proj.weight"]
    arrays[f"{at}4.self_attn.v_proj.weight"] = arrays[f"{at}4.self_attn.v_proj.weight"][:5]
    for part in ("k_proj", "v_proj", "k_norm"):
        del arrays[f"{at}5.self_attn.{part}.weight"]
    arrays["blk.3.attn_k.weight"] = arrays[f"{at}3.self_attn.v_proj.weight"]
    assert faults(write(tmp_path, TINY["gemma3n"], arrays)) == {
        "missing: layers.3.self_attn.k_proj.weight",
        f"mis-shaped: {at}4.self_attn.v_proj.weight is (5, 32), expected (32, 32)",
        "unused: blk.3.attn_k.weight",
    }


def test_stacks_of_the_wrong_shape_are_named(tmp_path):
    arrays = synthetic.tensors("gemma4_moe")
    at = "model.layers."
    arrays[f"{at}1.experts.gate_up_proj"] = arrays[f"{at}1.experts.gate_up_proj"][:7]
    arrays[f"{at}2.experts.down_proj"] = arrays[f"{at}2.experts.down_proj"][:, :, :11].copy()
    # The right number of weights, gates and ups of all experts one under the other.
    flat = arrays[f"{at}3.experts.gate_up_proj"].reshape(8 * 24, 32)
    arrays[f"{at}3.experts.gate_up_proj"] = flat[:-1]
    assert faults(write(tmp_path, TINY["gemma4_moe"], arrays)) == {
        f"mis-shaped: {at}1.experts.gate_up_proj is (7, 24, 32), expected (8, 24, 32)",
        f"mis-shaped: {at}2.experts.down_proj is (8, 32, 11), expected (8, 32, 12)",
        f"mis-shaped: {at}3.experts.gate_up_proj is (191, 32), expected (192, 32)",
    }


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_precision_of_the_file_is_kept(tmp_path, dtype):
    config, arrays = small()
    write(tmp_path, config, {name: array.astype(dtype) for name, array in arrays.items()})
    assert {leaf.dtype for leaf in load(tmp_path).values()} == {np.dtype(dtype)}


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_tensors_of_the_vision_tower_are_reported_as_ignored(tmp_path, prefix):
    synthetic.write_checkpoint(tmp_path, "gemma3_multimodal", prefix=prefix)
    stored = synthetic.tensors("gemma3_multimodal", prefix=prefix)
    vision = [name for name in stored if not name.startswith(prefix)]
    assert len(vision) == 23
    assert sorted(open_checkpoint(tmp_path).ignored) == sorted(vision)


@pytest.mark.parametrize("head", ["lm_head.weight", "language_model.lm_head.weight"])
def test_head_that_repeats_the_embedding_is_an_alias(tmp_path, head):
    config, arrays = small()
    repeated = {**arrays, head: arrays["model.embed_tokens.weight"].copy()}
    write(tmp_path / "repeated", config, repeated)
    write(tmp_path / "absent", config, arrays)
    assert open_checkpoint(tmp_path / "repeated").config.has_tied_head
    assert_same(load(tmp_path / "repeated"), load(tmp_path / "absent"))


def test_head_that_differs_is_a_head_of_its_own(tmp_path):
    config, arrays = small("gemma_mqa")
    doubled = {**arrays, "lm_head.weight": arrays["model.embed_tokens.weight"] * np.float32(2)}
    write(tmp_path / "doubled", config, doubled)
    write(tmp_path / "tied", config, arrays)
    checkpoint = open_checkpoint(tmp_path / "doubled")
    assert not checkpoint.config.has_tied_head
    head = parameters(load_model(checkpoint))["embedder.head.weight"]
    assert np.asarray(head).tobytes() == doubled["lm_head.weight"].T.tobytes()
    tokens = [2, 17, 300, 5]
    tied = logits(tmp_path / "tied", tokens)
    # Twice the head is twice the logits, to the bit: a factor of 2 never rounds.
    np.testing.assert_array_equal(logits(tmp_path / "doubled", tokens), 2 * tied)
    assert np.abs(tied).min(axis=0).max() > 0


def test_untied_head_that_is_not_there(tmp_path):
    config, arrays = small()
    write(tmp_path, {**config, "tie_word_embeddings": False}, arrays)
    assert faults(tmp_path) == {"missing: lm_head.weight"}


def test_two_decoders_in_one_file(tmp_path):
    config, arrays = small()
    double = {"language_model.model.norm.weight": arrays["model.norm.weight"].copy()}
    message = refusal(write(tmp_path, config, {**arrays, **double}))
    both = ("model.norm.weight", "language_model.model.norm.weight")
    assert any(f"{one} and {other};" in message for one, other in (both, both[::-1]))


def test_names_without_their_prefix():
    names = ["model.norm.weight", "lm_head.weight", "model.vision_tower.a", "audio_tower.b", "c"]
    assert strip_prefix(names) == (
        {"norm.weight": "model.norm.weight", "lm_head.weight": "lm_head.weight", "c": "c"},
        ("model.vision_tower.a", "audio_tower.b"),
    )


def test_only_joined_parameters_have_parts():
    config = from_hugging_face(TINY["gemma3"])
    at = ("layers", 0, "attention")
    assert joined_outputs(config, (*at, "query_key_value", "weight")) == (64, 16, 16)
    assert joined_outputs(config, ("layers", 7, "feed_forward", "gate_up", "weight")) == (48, 48)
    with pytest.raises(ValueError, match="nothing is joined into"):
        joined_outputs(config, (*at, "output", "weight"))


@pytest.mark.parametrize("name", ["gemma_mha", "gemma3_multimodal"])
def test_progress_counts_every_parameter_once(tmp_path, name):
    synthetic.write_checkpoint(tmp_path, name)
    checkpoint = open_checkpoint(tmp_path)
    calls: list[tuple[int, int]] = []
    model = load_model(checkpoint, progress=lambda done, total: calls.append((done, total)))
    total = checkpoint.config.parameter_count
    assert {whole for _, whole in calls} == {total}
    done = [part for part, _ in calls]
    assert done == sorted(set(done)), "it only grows"
    assert done[-1] == total
    assert len(done) == len(parameters(model))


# Other ways to name a checkpoint than by its folder.


def test_one_file_of_a_folder_that_holds_two_checkpoints(tmp_path):
    config, arrays = small()
    write(tmp_path, config, arrays)
    others = {name: array + np.float32(1) for name, array in arrays.items()}
    save_file(others, tmp_path / "other.safetensors")
    got = load(tmp_path / "other.safetensors")
    np.testing.assert_array_equal(got["final_norm.scale"], arrays["model.norm.weight"] + 1)


def test_index_by_its_own_name(tmp_path):
    synthetic.write_checkpoint(tmp_path, "gemma_mqa", shards=2)
    by_index = load(tmp_path / "model.safetensors.index.json")
    assert_same(by_index, load(tmp_path))
