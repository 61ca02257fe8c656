"""Synthetic checkpoints: the same numbers everywhere, in files shaped like the hub's."""

import hashlib
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from refimpl_weights import synthetic, synthetic_tokenizer
from safetensors import safe_open
from tokenizers import Tokenizer

GOLDEN = Path(__file__).parent / "golden"

CONFIGS = synthetic.TINY
# Gemma 3n and Gemma 4.
NEWER = ("gemma4", "gemma4_e2b", "gemma4_moe", "gemma3n")
every_model = pytest.mark.parametrize("name", list(CONFIGS))
every_newer_model = pytest.mark.parametrize("name", NEWER)

# Counted by hand from the shapes that Hugging Face's classes give these configurations: decoder
# tensors, and numbers in them.
SIZES = {
    "gemma_mha": (1 + 3 * 9 + 1, 512 * 32 + 3 * (4 * 64 * 32 + 3 * 64 * 32 + 2 * 32) + 32),
    "gemma_mqa": (
        1 + 3 * 9 + 1,
        512 * 64 + 3 * (2 * 64 * 64 + 2 * 16 * 64 + 3 * 96 * 64 + 2 * 64) + 64,
    ),
    "gemma2": (
        1 + 4 * 11 + 1,
        512 * 48 + 4 * (2 * 64 * 48 + 2 * 32 * 48 + 3 * 80 * 48 + 4 * 48) + 48,
    ),
    "vaultgemma": (1 + 3 * 9 + 1, 512 * 40 + 3 * (4 * 64 * 40 + 3 * 56 * 40 + 2 * 40) + 40),
    "gemma3": (
        1 + 8 * 13 + 1,
        512 * 40 + 8 * (2 * 64 * 40 + 2 * 16 * 40 + 3 * 48 * 40 + 4 * 40 + 2 * 16) + 40,
    ),
    "gemma3_linear": (
        1 + 7 * 13 + 1,
        512 * 48 + 7 * (2 * 64 * 48 + 2 * 32 * 48 + 3 * 64 * 48 + 4 * 48 + 2 * 16) + 48,
    ),
    "gemma3_multimodal": (
        1 + 7 * 13 + 1,
        576 * 32 + 7 * (2 * 64 * 32 + 2 * 32 * 32 + 3 * 64 * 32 + 4 * 32 + 2 * 16) + 32,
    ),
    # Five local layers and two global ones without values; then what all seven have alike.
    "gemma4": (
        1 + 5 * 14 + 2 * 13 + 1,
        512 * 40
        + 5 * (2 * 64 * 40 + 2 * 32 * 40 + 2 * 16)
        + 2 * (2 * 128 * 40 + 32 * 40 + 2 * 32)
        + 7 * (4 * 40 + 3 * 48 * 40 + 1)
        + 40,
    ),
    # Six local, two global; five feed-forward blocks 32 wide, three twice that.
    "gemma4_e2b": (
        1 + 3 + 8 * 17 + 1,
        512 * 32
        + (128 * 32 + 16 + 512 * 128)
        + 6 * (2 * 64 * 32 + 2 * 16 * 32 + 2 * 16)
        + 2 * (2 * 128 * 32 + 2 * 32 * 32 + 2 * 32)
        + 5 * (3 * 32 * 32)
        + 3 * (3 * 64 * 32)
        + 8 * (4 * 32 + 1 + 2 * 16 * 32 + 32)
        + 32,
    ),
    # The last two lines of sums: the router with its two scales, and the experts with their norms.
    "gemma4_moe": (
        1 + 2 * 22 + 2 * 21 + 1,
        512 * 32
        + 2 * (2 * 64 * 32 + 2 * 32 * 32 + 2 * 16)
        + 2 * (2 * 128 * 32 + 32 * 32 + 2 * 32)
        + 4 * (4 * 32 + 3 * 32 * 32 + 1)
        + 4 * (8 * 32 + 32 + 8)
        + 4 * (8 * 24 * 32 + 8 * 32 * 12 + 3 * 32)
        + 32,
    ),
    # The last two lines of sums: streams, and the low-rank residual.
    "gemma3n": (
        1 + 3 + 6 + 6 * 24 + 1,
        528 * 32
        + (48 * 32 + 8 + 480 * 48)
        + 6 * 32 * 32
        + 6 * (2 * 64 * 32 + 2 * 32 * 32 + 2 * 16 + 4 * 32 + 3 * 128 * 32)
        + 6 * (2 * 8 * 32 + 32)
        + 6 * (32 + 4 * 4 + 16 * 4 + 4 * 32 + 32)
        + 6 * (2 * 4 * 32 + 32)
        + 32,
    ),
}


def stored(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of every safetensors file, each name at most once, bfloat16 included."""
    found: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118  (an open file is no mapping)
                assert name not in found
                found[name] = file.get_tensor(name)
    return found


@every_model
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_those_the_golden_data_was_made_from(name, dtype):
    golden = np.load(GOLDEN / "tiny" / f"{name}.npz")
    arrays = synthetic.tensors(name, dtype=dtype)
    assert synthetic.fingerprint(arrays) == str(golden[f"sha256.{dtype}"])


@every_model
def test_sizes(name):
    decoder = {
        key: array
        for key, array in synthetic.tensors(name, prefix="model.language_model.").items()
        if key.startswith("model.language_model.")
    }
    assert (len(decoder), sum(array.size for array in decoder.values())) == SIZES[name]


def test_shapes_of_one_layer():
    arrays = synthetic.tensors("gemma3")
    at = "model.layers.7."
    assert {key.removeprefix(at): a.shape for key, a in arrays.items() if key.startswith(at)} == {
        "input_layernorm.weight": (40,),
        "self_attn.q_proj.weight": (64, 40),
        "self_attn.k_proj.weight": (16, 40),
        "self_attn.v_proj.weight": (16, 40),
        "self_attn.o_proj.weight": (40, 64),
        "self_attn.q_norm.weight": (16,),
        "self_attn.k_norm.weight": (16,),
        "post_attention_layernorm.weight": (40,),
        "pre_feedforward_layernorm.weight": (40,),
        "mlp.gate_proj.weight": (48, 40),
        "mlp.up_proj.weight": (48, 40),
        "mlp.down_proj.weight": (40, 48),
        "post_feedforward_layernorm.weight": (40,),
    }


def test_shapes_of_one_layer_with_experts():
    arrays = synthetic.tensors("gemma4_moe")
    at = "model.layers.3."
    assert {key.removeprefix(at): a.shape for key, a in arrays.items() if key.startswith(at)} == {
        "input_layernorm.weight": (32,),
        "self_attn.q_proj.weight": (128, 32),
        "self_attn.k_proj.weight": (32, 32),
        "self_attn.o_proj.weight": (32, 128),
        "self_attn.q_norm.weight": (32,),
        "self_attn.k_norm.weight": (32,),
        "post_attention_layernorm.weight": (32,),
        "pre_feedforward_layernorm.weight": (32,),
        "mlp.gate_proj.weight": (32, 32),
        "mlp.up_proj.weight": (32, 32),
        "mlp.down_proj.weight": (32, 32),
        "post_feedforward_layernorm.weight": (32,),
        "router.proj.weight": (8, 32),
        "router.scale": (32,),
        "router.per_expert_scale": (8,),
        "experts.gate_up_proj": (8, 24, 32),
        "experts.down_proj": (8, 32, 12),
        "post_feedforward_layernorm_1.weight": (32,),
        "post_feedforward_layernorm_2.weight": (32,),
        "pre_feedforward_layernorm_2.weight": (32,),
        "layer_scalar": (1,),
    }


@pytest.mark.parametrize(("name", "first"), [("gemma4_e2b", 5), ("gemma3n", 3)])
def test_unused_tensors_of_sharing_layers_can_be_left_out(name, first, tmp_path):
    released = synthetic.tensors(name)
    synthetic.write_checkpoint(tmp_path, name, shared_tensors=False)
    saved_again = stored(tmp_path)
    layers = CONFIGS[name]["text_config"]["num_hidden_layers"]
    assert released.keys() - saved_again.keys() == {
        f"model.language_model.layers.{layer}.self_attn.{tensor}.weight"
        for layer in range(first, layers)
        for tensor in ("k_proj", "v_proj", "k_norm")
    }
    kept = {key: released[key] for key in saved_again}
    assert synthetic.fingerprint(saved_again) == synthetic.fingerprint(kept)


@pytest.mark.parametrize("name", ["gemma3", "gemma4", "gemma4_moe"])
def test_nothing_is_left_out_where_no_layer_shares(name):
    assert synthetic.tensors(name, shared_tensors=False).keys() == synthetic.tensors(name).keys()


def test_the_12b_spelling_holds_the_same_text_model(tmp_path):
    """Other senses and other words in the configuration, but not one number of the decoder."""
    text = "model.language_model."
    dense, unified = (
        {key: array for key, array in synthetic.tensors(name).items() if key.startswith(text)}
        for name in ("gemma4", "gemma4_unified")
    )
    assert synthetic.fingerprint(unified) == synthetic.fingerprint(dense)
    synthetic.write_checkpoint(tmp_path, "gemma4_unified")
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["model_type"], written["text_config"]["model_type"]) == (
        "gemma4_unified",
        "gemma4_unified_text",
    )


@pytest.mark.parametrize("name", ["gemma4", "gemma4_e2b", "gemma4_moe"])
def test_no_layer_scalar_is_nearly_one(name):
    """A scalar that is forgotten, or applied to a branch alone, has to show."""
    arrays = synthetic.tensors(name)
    scalars = [float(a[0]) for key, a in arrays.items() if key.endswith("layer_scalar")]
    text = CONFIGS[name].get("text_config", CONFIGS[name])
    assert len(scalars) == text["num_hidden_layers"]
    assert min(scalars) >= 0.75
    assert np.mean([abs(scalar - 1) for scalar in scalars]) > 0.05


def test_first_number_by_hand():
    """One weight by integer arithmetic alone: 53 bits of PCG64, placed in [-1, 1), scaled."""
    raw = int(np.random.PCG64(0).random_raw())
    unit = (raw >> 11) / 2**52 - 1
    expected = np.float32((3 / 32) ** 0.5 * unit)
    assert synthetic.tensors("gemma_mha")["model.embed_tokens.weight"][0, 0] == expected


def test_seeds_give_different_numbers():
    zero = synthetic.tensors("gemma2")["model.norm.weight"]
    one = synthetic.tensors("gemma2", seed=1)["model.norm.weight"]
    assert not np.any(zero == one)


@every_model
def test_bfloat16_is_rounded_to_nearest_even(name):
    exact = synthetic.tensors(name)
    for key, array in synthetic.tensors(name, dtype="bfloat16").items():
        word = exact[key].view(np.uint32).astype(np.uint64)
        # Adding just under half of the last kept place, and the last kept bit itself, carries
        # into the upper half exactly when round-half-to-even says so.
        rounded = (word + 0x7FFF + ((word >> 16) & 1)) >> 16
        assert array.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(array.view(np.uint16), rounded)


@every_model
def test_file_holds_the_tensors(name, tmp_path):
    assert synthetic.write_checkpoint(tmp_path / "new" / "folder", name) == (
        tmp_path / "new" / "folder"
    )
    found = stored(tmp_path / "new" / "folder")
    assert synthetic.fingerprint(found) == synthetic.fingerprint(synthetic.tensors(name))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shards_hold_what_one_file_holds(dtype, tmp_path):
    synthetic.write_checkpoint(tmp_path / "whole", "gemma2", dtype=dtype)
    synthetic.write_checkpoint(tmp_path / "parts", "gemma2", dtype=dtype, shards=3)
    whole, parts = stored(tmp_path / "whole"), stored(tmp_path / "parts")
    assert synthetic.fingerprint(parts) == synthetic.fingerprint(whole)

    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    files = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert sorted(path.name for path in (tmp_path / "parts").glob("*.safetensors")) == files
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in whole.values())
    assert index["weight_map"].keys() == whole.keys()
    for file in files:
        with safe_open(tmp_path / "parts" / file, framework="np") as opened:
            mapped = {key for key, where in index["weight_map"].items() if where == file}
            assert set(opened.keys()) == mapped
    # One layer's gate and up projections lie apart: order of files is not order of layers.
    gate, up = (index["weight_map"][f"model.layers.0.mlp.{n}_proj.weight"] for n in ("gate", "up"))
    assert gate != up


@pytest.mark.parametrize(
    ("prefix", "root"),
    [("model.", ""), ("language_model.model.", ""), ("model.language_model.", "model.")],
)
def test_prefix_changes_names_only(prefix, root):
    released = synthetic.tensors("gemma3_multimodal")
    renamed = synthetic.tensors("gemma3_multimodal", prefix=prefix)
    rename = {
        key: root + key
        if key.startswith(("vision_tower.", "multi_modal_projector."))
        else prefix + key.removeprefix("language_model.model.")
        for key in released
    }
    assert list(renamed) == [rename[key] for key in released]
    for key, array in released.items():
        np.testing.assert_array_equal(array, renamed[rename[key]])


def test_default_prefixes():
    assert all(key.startswith("model.") for key in synthetic.tensors("gemma3"))
    multimodal = synthetic.tensors("gemma3_multimodal")
    assert {key.split(".")[0] for key in multimodal} == {
        "language_model",
        "vision_tower",
        "multi_modal_projector",
    }


@pytest.mark.parametrize(
    ("name", "roots"),
    [
        ("gemma4", {"language_model", "vision_tower", "embed_vision"}),
        (
            "gemma4_e2b",
            {"language_model", "vision_tower", "embed_vision", "audio_tower", "embed_audio"},
        ),
        ("gemma4_unified", {"language_model", "vision_embedder", "embed_vision", "embed_audio"}),
        (
            "gemma3n",
            {"language_model", "vision_tower", "embed_vision", "audio_tower", "embed_audio"},
        ),
        ("gemma4_moe", {"embed_tokens", "layers", "norm"}),
    ],
)
def test_default_prefixes_of_newer_models(name, roots):
    keys = [key.split(".") for key in synthetic.tensors(name)]
    assert {key[0] for key in keys} == {"model"}
    assert {key[1] for key in keys} == roots


@every_model
def test_config_file(name, tmp_path):
    synthetic.write_checkpoint(tmp_path, name, dtype="bfloat16")
    written = json.loads((tmp_path / "config.json").read_text())
    text = written.get("text_config", written)
    spelling = "dtype" if "rope_parameters" in text else "torch_dtype"
    assert written == {**CONFIGS[name], spelling: "bfloat16"}


def test_both_spellings_of_rope_are_there():
    text = [
        config.get("text_config", config) for name, config in CONFIGS.items() if name not in NEWER
    ]
    assert [("rope_theta" in c, "rope_parameters" in c) for c in text] == [
        (True, False),
        (False, True),
        (True, False),
        (False, True),
        (True, False),
        (False, True),
        (True, False),
    ]


def test_both_spellings_of_global_layers_are_there():
    text = [CONFIGS[name].get("text_config", CONFIGS[name]) for name in NEWER]
    assert [("global_head_dim" in c, "per_layer_config" in c, "rope_theta" in c) for c in text] == [
        (True, False, False),
        (True, False, False),
        (False, True, False),
        (False, False, True),
    ]


def test_generation_config_stops_at_end_of_turn(tmp_path):
    synthetic.write_checkpoint(tmp_path, "gemma3")
    written = json.loads((tmp_path / "generation_config.json").read_text())
    assert written == {"bos_token_id": 2, "eos_token_id": [1, 6], "pad_token_id": 0}


def test_unknown_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no synthetic model is called 'gemma9'; use one of gemma"):
        synthetic.write_checkpoint(tmp_path, "gemma9")


def test_no_shards_are_refused(tmp_path):
    with pytest.raises(ValueError, match="shards must be 1 or more, got 0"):
        synthetic.write_checkpoint(tmp_path, "gemma3", shards=0)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_str(json.dumps(synthetic_tokenizer.tokenizer_json()))


def test_every_piece_has_its_own_id(tokenizer):
    pieces = synthetic_tokenizer.pieces()
    assert len(set(pieces)) == tokenizer.get_vocab_size() == 512
    assert [tokenizer.token_to_id(piece) for piece in pieces] == list(range(512))
    assert pieces[:7] == (
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        "<mask>",
        "<start_of_turn>",
        "<end_of_turn>",
    )
    assert pieces[7] == "\n"
    assert pieces.index("<0xFF>") - pieces.index("<0x00>") == 255


def test_every_merged_piece_can_be_reached():
    tokenizer = synthetic_tokenizer.tokenizer_json()
    reached = {left + right for left, right in tokenizer["model"]["merges"]}
    first, last = (synthetic_tokenizer.pieces().index(piece) for piece in ("▁t", "日本語"))
    assert set(synthetic_tokenizer.pieces()[first : last + 1]) <= reached


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the return", "<bos> t he ▁re t urn"),
        (" the return", "<bos> ▁the ▁re t urn"),
        ("a     b", "<bos> a ▁▁▁▁▁ b"),
        ("\n\n\nx", "<bos> \n\n\n x"),
        ("1234", "<bos> 1 2 3 4"),
        ("日本語ж", "<bos> 日本語 ж"),
        ("♥", "<bos> <0xE2> <0x99> <0xA5>"),
        ("\t", "<bos> <0x09>"),
        ("<start_of_turn>user\n", "<bos> <start_of_turn> us er \n"),
    ],
)
def test_tokens(tokenizer, text, expected):
    assert tokenizer.encode(text).tokens == expected.split(" ")


@pytest.mark.parametrize(
    "text", ["", " ", "  leading and trailing  ", "a\n\nb\tc", "naïve ♥ 🙂 日本", "▁"]
)
def test_text_comes_back(tokenizer, text):
    # The one text that cannot: U+2581 is what a space is written as.
    assert tokenizer.decode(tokenizer.encode(text).ids) == text.replace("▁", " ")


@every_model
def test_golden_arrays(name):
    """The names and shapes that golden/README.md promises, and nothing else."""
    text = CONFIGS[name].get("text_config", CONFIGS[name])
    layers, width, vocabulary = (
        text[key] for key in ("num_hidden_layers", "hidden_size", "vocab_size")
    )
    shapes = {
        "short": (1, 7),
        "long": (1, 40),
        "far": (1, 12),
        "left_padded": (3, 12),
        "right_padded": (3, 12),
    }
    if name in NEWER:
        shapes["very_far"] = (1, 12)
    streams = (4,) if name == "gemma3n" else ()
    expected = {
        "changes": ((), "U"),
        "sha256.float32": ((), "U"),
        "sha256.bfloat16": ((), "U"),
        "greedy.prompt": ((7,), "i"),
        "greedy.ids": ((64,), "i"),
        "greedy.margins": ((64,), "f"),
    }
    for case, shape in shapes.items():
        expected |= {f"{case}.{key}": (shape, "i") for key in ("ids", "positions", "mask")}
        for dtype, kind in (("float32", "f"), ("bfloat16", "u")):
            if dtype == "bfloat16" and case not in ("short", "long"):
                continue
            expected[f"{case}.{dtype}.logits"] = ((*shape, vocabulary), kind)
            expected[f"{case}.{dtype}.residual"] = (
                (layers + 1, *streams, *shape, width),
                kind,
            )
            expected[f"{case}.{dtype}.max_score"] = ((layers,), "f")
            if name == "gemma4_moe":
                expected[f"{case}.{dtype}.router_margin"] = ((layers,), "f")
    golden = np.load(GOLDEN / "tiny" / f"{name}.npz")
    found = {key: (golden[key].shape, golden[key].dtype.kind) for key in golden.files}
    assert found == expected


@every_model
def test_golden_data_can_tell_a_broken_model(name):
    """Each recorded mistake moves a logit by 1e-3 or more: fifty times the 2e-5 we allow."""
    golden = np.load(GOLDEN / "tiny" / f"{name}.npz")
    changes = json.loads(str(golden["changes"]))
    assert len(changes) >= 4
    assert min(changes.values()) >= 1e-3
    assert golden["greedy.margins"].min() >= 5e-3
    # More than a loop over a handful of ids.
    assert len(set(golden["greedy.ids"].tolist())) >= 24
    assert golden["greedy.ids"].max() < synthetic_tokenizer.NUM_PIECES


@every_newer_model
def test_newer_golden_data_asks_for_what_float32_can_give(name):
    """An absolute bound of 2e-5 is fifty units in the last place of a logit of 4 to 8, no less."""
    golden = np.load(GOLDEN / "tiny" / f"{name}.npz")
    assert 4 <= np.abs(golden["long.float32.logits"]).max() <= 8
    rms = np.sqrt(np.mean(golden["long.float32.residual"].astype(np.float64) ** 2))
    assert 1 <= rms <= 2
    assert golden["very_far.positions"].min() > 65536


def test_no_golden_case_is_torn_between_two_experts():
    golden = np.load(GOLDEN / "tiny" / "gemma4_moe.npz")
    margins = [golden[key].min() for key in golden.files if key.endswith("float32.router_margin")]
    # Logits are known to about 1e-5: a choice by a hundred times that is the same everywhere.
    assert len(margins) == 6
    assert min(margins) >= 1e-3


def test_golden_cases_have_ids_that_the_per_layer_vocabulary_of_gemma3n_lacks():
    golden = np.load(GOLDEN / "tiny" / "gemma3n.npz")
    rows = CONFIGS["gemma3n"]["text_config"]["vocab_size_per_layer_input"]
    assert np.sum(golden["long.ids"] >= rows) >= 2


def test_gemma2_runs_into_both_caps():
    golden = np.load(GOLDEN / "tiny" / "gemma2.npz")
    assert golden["long.float32.max_score"].max() > 50
    # 30 tanh(z / 30) differs from z = 5.9 by 0.075: thousands of times what the tests allow.
    changes = json.loads(str(golden["changes"]))
    assert changes["scores not capped"] > 0.05
    assert changes["logits not capped"] > 0.05


@pytest.mark.parametrize(
    ("text", "length"), [("english", 338), ("mixed", 325), ("python", 478), ("long", 2889)]
)
def test_golden_record_of_the_real_model(text, length):
    golden = np.load(GOLDEN / "real" / "270m.npz")
    contents = (GOLDEN / "texts" / f"{text}.txt").read_bytes()
    assert hashlib.sha256(contents).hexdigest() == str(golden[f"sha256.{text}"])
    ids, logprobs = golden[f"{text}.ids"], golden[f"{text}.logprobs"]
    assert ids.shape == (length,)
    assert ids[0] == 2
    assert logprobs.shape == (length - 1,)
    assert logprobs.max() < 0
    # A model that reads: uniform guessing would give -12.5, one that misreads its weights less.
    assert -4.5 < logprobs.mean() < -1.5
    prompts = ("long", "past_window") if text == "long" else (text,)
    for prompt in prompts:
        assert golden[f"greedy.{prompt}.ids"].shape == (64,)
        assert golden[f"greedy.{prompt}.margins"].min() >= 1e-2
        assert golden[f"greedy.{prompt}.prompt_length"] < length
