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

every_model = pytest.mark.parametrize("name", list(synthetic.TINY))

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


@every_model
def test_config_file(name, tmp_path):
    synthetic.write_checkpoint(tmp_path, name, dtype="bfloat16")
    written = json.loads((tmp_path / "config.json").read_text())
    spelling = "dtype" if "rope_parameters" in written else "torch_dtype"
    assert written == {**synthetic.TINY[name], spelling: "bfloat16"}


def test_both_spellings_of_rope_are_there():
    text = [config.get("text_config", config) for config in synthetic.TINY.values()]
    assert [("rope_theta" in c, "rope_parameters" in c) for c in text] == [
        (True, False),
        (False, True),
        (True, False),
        (False, True),
        (True, False),
        (False, True),
        (True, False),
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
    text = synthetic.TINY[name].get("text_config", synthetic.TINY[name])
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
            expected[f"{case}.{dtype}.residual"] = ((layers + 1, *shape, width), kind)
            expected[f"{case}.{dtype}.max_score"] = ((layers,), "f")
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
