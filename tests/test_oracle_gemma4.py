"""What the oracle computes for Gemma 4 alone, against numbers worked out by hand.

Bounds as in `test_oracle.py`: both sides are float64 and of order one, and 1e-12 is far above the
rounding of some tens of operations. Where no operation may differ, equality is exact.
"""

from functools import partial

import numpy as np
import pytest

from tests.oracle import OracleResult, forward, from_hugging_face, rope
from tests.oracle.attention import keys_and_values
from tests.oracle.config import LayerConfig, OracleConfig
from tests.oracle.elementary import gelu_tanh, rms_norm
from tests.oracle.feed_forward import experts, feed_forward, routing
from tests.oracle.per_layer_inputs import per_layer_addition, per_layer_inputs
from tests.oracle.random_weights import random_weights

ROUNDING = 1e-12
NORM = partial(rms_norm, epsilon=0.0, offset=0.0)

LOCAL, FULL = "sliding_attention", "full_attention"
SMALL = {
    "model_type": "gemma4_text",
    "num_hidden_layers": 4,
    "layer_types": [LOCAL, FULL, LOCAL, FULL],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "global_head_dim": 8,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "sliding_window": 3,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 0,
    "enable_moe_block": False,
    "top_k_experts": None,
    "final_logit_softcapping": 30.0,
    "rope_parameters": {
        FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
        LOCAL: {"rope_type": "default", "rope_theta": 1e4},
    },
}
WITH_PER_LAYER_INPUTS = {"hidden_size_per_layer_input": 4, "num_kv_shared_layers": 2}
WITH_EXPERTS = {"enable_moe_block": True, "top_k_experts": 2}
every_kind = pytest.mark.parametrize(
    "changes", [{}, WITH_PER_LAYER_INPUTS, WITH_EXPERTS], ids=["dense", "per layer", "experts"]
)


def small(**changes) -> OracleConfig:
    return from_hugging_face({**SMALL, **changes})


def run(config: OracleConfig, weights, tokens, *, start: int = 0) -> OracleResult:
    tokens = np.array([tokens])
    return forward(config, weights, tokens, np.arange(tokens.shape[1])[None] + start)


# Attention.


@pytest.mark.parametrize("angles", [rope.exact_angles, rope.float32_angles])
def test_at_head_width_512_only_the_first_64_pairs_turn(angles):
    at = angles(np.array([[1, 70_000]]), 512, base=1e6, factor=1.0, proportion=0.25)
    np.testing.assert_array_equal(at[..., 64:], 0.0)
    # The exponent counts over the whole width: pair 63 turns by 1e6^(-126/512) = 0.03338, where
    # a head of width 128 would have 1e6^(-126/128) = 1.24e-6.
    assert at[0, 0, 63] == pytest.approx(1e6 ** (-126 / 512), rel=3 * 2.0**-24)
    assert at[0, 0, 63] == pytest.approx(0.03338, abs=5e-6)

    x = np.ones((1, 2, 1, 512))
    is_turned = (rope.rotate(x, at) != x)[0, 1, 0]
    np.testing.assert_array_equal(np.flatnonzero(is_turned), [*range(64), *range(256, 320)])


def test_values_are_projected_keys_before_their_norm_and_rotation():
    config = LayerConfig(
        heads=1,
        kv_heads=1,
        head_width=4,
        query_scale=1.0,
        window=None,
        rope_base=1e4,
        rope_factor=1.0,
        score_cap=None,
        normalizes_queries_and_keys=True,
        norm_after_attention=None,
        norm_before_mlp="pre_feedforward_layernorm",
        norm_after_mlp=None,
        normalizes_values=True,
        values_are_keys=True,
    )
    weights = {
        "self_attn.k_proj.weight": np.eye(4),
        "self_attn.k_norm.weight": np.array([2.0, 1.0, 1.0, 1.0]),
    }
    # A quarter turn of pair (0, 2), none of pair (1, 3). The root mean square of x is 2.5.
    x, angles = np.array([[[3.0, 4.0, 0.0, 0.0]]]), np.array([[[np.pi / 2, 0.0]]])
    read = keys_and_values(config, weights, x, angles, norm=NORM)
    np.testing.assert_allclose(read.values[0, 0, 0], [1.2, 1.6, 0.0, 0.0], atol=ROUNDING)
    np.testing.assert_allclose(read.keys[0, 0, 0], [0.0, 1.6, 2.4, 0.0], atol=ROUNDING)


def test_a_layer_with_a_donor_reads_its_keys_and_needs_none_of_its_own():
    config = small(**WITH_PER_LAYER_INPUTS)
    assert [layer.donor for layer in config.layers] == [None, None, 0, 1]
    weights = random_weights(config)
    result = run(config, weights, [1, 9, 4, 16, 2])

    # Files of the older style hold projections that no layer reads.
    unread = {
        f"layers.{i}.self_attn.{name}.weight": np.full(4, np.nan)
        for i in (2, 3)
        for name in ("k_proj", "v_proj", "k_norm")
    }
    again = run(config, {**weights, **unread}, [1, 9, 4, 16, 2])
    np.testing.assert_array_equal(again.logits, result.logits)
    with pytest.raises(ValueError, match=r"not understood \['layers.1.self_attn.v_proj.weight'\]"):
        run(config, {**weights, "layers.1.self_attn.v_proj.weight": np.ones(4)}, [1])

    # Layers 0 and 1 leave the stream alone, and layer 2 asks what layer 0 asked: of the same keys.
    for i in (0, 1):
        for name in ("post_attention", "post_feedforward"):
            weights[f"layers.{i}.{name}_layernorm.weight"] *= 0.0
        weights[f"layers.{i}.post_per_layer_input_norm.weight"] *= 0.0
        weights[f"layers.{i}.layer_scalar"] = np.ones(1)
    for name in ("input_layernorm", "self_attn.q_proj", "self_attn.q_norm"):
        weights[f"layers.2.{name}.weight"] = weights[f"layers.0.{name}.weight"]
    result = run(config, weights, [1, 9, 4, 16, 2])
    np.testing.assert_array_equal(result.scores[2], result.scores[0])


# Feed-forward.


def test_router_weights_sum_to_the_scales_of_the_experts():
    share = np.array([0.1, 0.2, 0.3, 0.4])
    weights = {
        # The norm makes the stream 1, and 1 * scale * 4^-1/2 = 1: logits are the logarithms.
        "router.scale": np.full(4, 2.0),
        "router.proj.weight": np.outer(np.log(share), [1.0, 0.0, 0.0, 0.0]),
        "router.per_expert_scale": np.array([5.0, 5.0, 7.0, 0.7]),
    }
    stream = np.array([[[1.0, 1.0, 1.0, 1.0], [9.0, 9.0, 9.0, 9.0]]])
    got = routing(weights, stream, norm=NORM, count=2)
    # 0.3 and 0.4 are the largest, 3/7 and 4/7 of their sum; how large the stream is says nothing.
    np.testing.assert_allclose(got, [[[0.0, 0.0, 3.0, 0.4]] * 2], atol=ROUNDING)

    weights["router.per_expert_scale"] = np.ones(4)
    for count in (1, 3, 4):
        got = routing(weights, stream, norm=NORM, count=count)
        np.testing.assert_array_equal((got > 0).sum(axis=-1), [[count, count]])
        np.testing.assert_allclose(got.sum(axis=-1), [[1.0, 1.0]], atol=ROUNDING)


def test_of_equally_likely_experts_the_first_are_taken():
    weights = {
        "router.scale": np.ones(4),
        "router.proj.weight": np.zeros((4, 4)),
        "router.per_expert_scale": np.ones(4),
    }
    got = routing(weights, np.ones((1, 1, 4)), norm=NORM, count=2)
    np.testing.assert_array_equal(got, [[[0.5, 0.5, 0.0, 0.0]]])


def test_an_expert_gates_with_the_first_half_of_its_rows():
    # Expert 1 has width 1: gate x0, up x1, down to (1, 10).
    weights = {
        "experts.gate_up_proj": np.array([np.full((2, 2), np.pi), np.eye(2)]),
        "experts.down_proj": np.array([np.full((2, 1), np.pi), [[1.0], [10.0]]]),
    }
    got = experts(weights, np.array([[[1.0, 3.0]]]), np.array([[[0.0, 2.0]]]))
    gelu = 0.8411919906  # of 1, as in test_oracle.py
    np.testing.assert_allclose(got[0, 0], [gelu * 3 * 2, gelu * 3 * 2 * 10], atol=1e-8)


def test_experts_stand_beside_the_dense_branch_and_read_the_stream():
    """The branch once more for one token, its chosen experts one after the other."""
    layer = small(**WITH_EXPERTS).layers[0]
    own = random_weights(OracleConfig((layer,), norm_epsilon=0.0, logit_cap=None, norm_offset=0.0))
    weights = {name.removeprefix("layers.0."): value for name, value in own.items()}
    stream = np.random.default_rng(3).normal(size=6)
    got = feed_forward(layer, weights, stream[None, None], norm=NORM)[0, 0]

    def norm(x, name):
        return x / np.sqrt(np.mean(x**2)) * weights[f"{name}.weight"]

    def mlp(x, gate, up, down):
        return down @ (gelu_tanh(gate @ x) * (up @ x))

    names = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")
    x = norm(stream, "pre_feedforward_layernorm")
    dense = norm(mlp(x, *(weights[n] for n in names)), "post_feedforward_layernorm_1")

    z = stream / np.sqrt(np.mean(stream**2)) * weights["router.scale"] * 6**-0.5
    share = np.exp(weights["router.proj.weight"] @ z)
    first, second = np.argsort(share)[::-1][:2]
    x = norm(stream, "pre_feedforward_layernorm_2")
    mixed = 0.0
    for index in (first, second):
        gate, up = weights["experts.gate_up_proj"][index].reshape(2, 3, 6)
        weight = share[index] / (share[first] + share[second])
        weight *= weights["router.per_expert_scale"][index]
        mixed = mixed + weight * mlp(x, gate, up, weights["experts.down_proj"][index])
    want = dense + norm(mixed, "post_feedforward_layernorm_2")
    np.testing.assert_allclose(got, want, atol=ROUNDING * 10)


# Per-layer inputs.


def test_per_layer_inputs_are_packed_layer_after_layer_and_unknown_ids_read_row_0():
    weights = {
        "embed_tokens_per_layer.weight": np.arange(12.0).reshape(3, 4),
        "per_layer_model_projection.weight": np.zeros((4, 5)),
        "per_layer_projection_norm.weight": np.ones(2),
    }
    norm = partial(rms_norm, epsilon=1e-6, offset=0.0)
    tokens = np.array([[2, 1, 3, 99]])
    told = per_layer_inputs(weights, tokens, np.ones((1, 4, 5)), layers=2, norm=norm)
    # The root of the width 2 scales the table, and of two halves the sum is divided by it.
    np.testing.assert_allclose(told[0, 0], [[8, 9], [4, 5], [0, 1], [0, 1]], atol=ROUNDING)
    np.testing.assert_allclose(told[1, 0], [[10, 11], [6, 7], [2, 3], [2, 3]], atol=ROUNDING)


def test_the_projection_of_the_embedding_is_the_other_half():
    weights = {
        "embed_tokens_per_layer.weight": np.zeros((3, 4)),
        "per_layer_model_projection.weight": np.array([[6.0, 0], [8.0, 0], [0, 1.0], [0, 1.0]]),
        "per_layer_projection_norm.weight": np.array([1.0, 2.0]),
    }
    # Layer 0: (6, 8) / sqrt 2 has root mean square 5, and 12.5 = 5^2 / 2 is added to its square.
    norm = partial(rms_norm, epsilon=12.5, offset=0.0)
    told = per_layer_inputs(weights, np.array([[1]]), np.array([[[1.0, 0.0]]]), layers=2, norm=norm)
    want = np.array([6.0, 8.0 * 2.0]) / np.sqrt(2) / np.sqrt(25 + 12.5) / np.sqrt(2)
    np.testing.assert_allclose(told[0, 0, 0], want, atol=ROUNDING)
    np.testing.assert_array_equal(told[1], 0.0)


def test_a_per_layer_input_is_let_in_by_a_gate_and_normalised():
    weights = {
        "per_layer_input_gate.weight": np.array([[1.0, 0.0], [0.0, 1.0]]),
        "per_layer_projection.weight": np.array([[3.0, 0.0], [4.0, 7.0]]),
        "post_per_layer_input_norm.weight": np.array([5.0, 10.0]),
    }
    got = per_layer_addition(weights, np.array([[[1.0, 0.0]]]), np.array([[[2.0, 9.0]]]), norm=NORM)
    # gelu(0) = 0 shuts out the 9; (3, 4) times anything has direction (3, 4) / (5 / sqrt 2).
    np.testing.assert_allclose(got[0, 0], [3 * np.sqrt(2), 8 * np.sqrt(2)], atol=ROUNDING)


# The whole pass.


@every_kind
def test_the_scalar_of_a_layer_multiplies_the_whole_stream(changes):
    config = small(**changes)
    weights = random_weights(config)
    weights["layers.0.layer_scalar"] = np.array([1.0])
    whole = run(config, weights, [3, 8, 1]).residuals[1]
    weights["layers.0.layer_scalar"] = np.array([0.25])
    np.testing.assert_array_equal(run(config, weights, [3, 8, 1]).residuals[1], whole / 4)


@every_kind
def test_a_later_token_changes_nothing_before_it(changes):
    config = small(**changes)
    weights = random_weights(config)
    one, other = (run(config, weights, [1, 2, 3, 4, last]).logits[0] for last in (5, 6))
    np.testing.assert_allclose(one[:4], other[:4], atol=ROUNDING * 10)
    assert np.abs(one[4] - other[4]).max() > 1e-2
    assert np.abs(one).max() <= 30.0


@every_kind
def test_only_relative_positions_matter(changes):
    config = small(**changes)
    weights = random_weights(config)
    near, far = (run(config, weights, [1, 9, 4, 16, 2], start=s).logits for s in (0, 70_000))
    # An angle near 70,000 carries a rounding of 70,000 * 2^-53 = 8e-12.
    np.testing.assert_allclose(near, far, atol=1e-8)


def test_positions_matter_to_a_quarter_of_a_full_layer():
    config = small(num_hidden_layers=1, layer_types=[FULL])
    weights = random_weights(config)
    # Of a head of width 8 a quarter of the four pairs turns: numbers 0 and 4.
    weights["layers.0.self_attn.k_proj.weight"][[0, 4]] = 0.0
    tokens, near, spread = np.array([[1, 9, 4]]), np.array([[0, 1, 2]]), np.array([[0, 40, 900]])
    one, other = (forward(config, weights, tokens, where).scores[0] for where in (near, spread))
    np.testing.assert_allclose(one, other, atol=ROUNDING)

    weights["layers.0.self_attn.k_proj.weight"][0] = 1.0
    one, other = (forward(config, weights, tokens, where).scores[0] for where in (near, spread))
    seen = np.isfinite(one)
    assert np.abs(one[seen] - other[seen]).max() > 1e-2


def test_a_wider_feed_forward_is_read_off_the_weights():
    config = small(**WITH_PER_LAYER_INPUTS, use_double_wide_mlp=True)
    weights = random_weights(config)
    narrow = run(config, weights, [1, 9, 4])
    # The same numbers twice, each at half the weight, in the layers that share.
    for index in (2, 3):
        for name in ("gate_proj", "up_proj"):
            key = f"layers.{index}.mlp.{name}.weight"
            weights[key] = np.concatenate([weights[key], weights[key]])
        key = f"layers.{index}.mlp.down_proj.weight"
        weights[key] = np.concatenate([weights[key], weights[key]], axis=1) / 2
    np.testing.assert_allclose(
        run(config, weights, [1, 9, 4]).logits, narrow.logits, atol=ROUNDING * 100
    )


# Configurations. Numbers are those of the released models.

E2B = {
    **SMALL,
    "num_hidden_layers": 35,
    "layer_types": [FULL if (i + 1) % 5 == 0 else LOCAL for i in range(35)],
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "global_head_dim": 512,
    "num_global_key_value_heads": None,
    "attention_k_eq_v": False,
    "sliding_window": 512,
    "num_kv_shared_layers": 20,
    "hidden_size_per_layer_input": 256,
    "use_double_wide_mlp": True,
}
E4B = {
    **E2B,
    "num_hidden_layers": 42,
    "layer_types": [FULL if (i + 1) % 6 == 0 else LOCAL for i in range(42)],
    "num_key_value_heads": 2,
    "num_kv_shared_layers": 18,
}
MOE_26B = {
    **SMALL,
    "num_hidden_layers": 30,
    "layer_types": None,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "global_head_dim": 512,
    "num_global_key_value_heads": 2,
    "sliding_window": 1024,
    "enable_moe_block": True,
    "top_k_experts": 8,
    "query_pre_attn_scalar": 256,  # in early files; it never scaled anything
    "use_bidirectional_attention": "vision",
}


@pytest.mark.parametrize(
    ("file", "first", "local", "full"),
    [(E2B, 15, 13, 14), (E4B, 24, 22, 23)],
    ids=["E2B", "E4B"],
)
def test_donors_are_the_last_layers_of_their_kind_that_have_keys(file, first, local, full):
    config = from_hugging_face({"model_type": "gemma4", "text_config": file})
    donors = [layer.donor for layer in config.layers]
    assert donors[:first] == [None] * first
    assert (
        donors[first:]
        == [full if layer.window is None else local for layer in config.layers][first:]
    )
    one, other = config.layers[local], config.layers[full]
    assert (one.window, one.head_width, one.rope_base, one.rope_proportion) == (512, 256, 1e4, 1.0)
    assert (other.window, other.head_width, other.rope_base) == (None, 512, 1e6)
    assert other.rope_proportion == 0.25
    assert one.kv_heads == other.kv_heads == file["num_key_value_heads"]
    assert all(layer.has_per_layer_input and layer.has_scalar for layer in config.layers)
    assert not any(layer.values_are_keys for layer in config.layers)
    assert (config.norm_offset, config.logit_cap, config.streams) == (0.0, 30.0, 1)


def test_experts_and_shared_projections_of_26b():
    config = from_hugging_face(MOE_26B)
    local, full = config.layers[0], config.layers[5]
    assert config.layers == ((local,) * 5 + (full,)) * 5
    assert (local.kv_heads, local.head_width, local.values_are_keys) == (8, 256, False)
    assert (full.kv_heads, full.head_width, full.values_are_keys) == (2, 512, True)
    assert local.experts_per_token == full.experts_per_token == 8
    assert local.query_scale == full.query_scale == 1.0
    assert local.normalizes_values
    assert local.normalizes_queries_and_keys
    assert local.donor is None
    assert not config.has_per_layer_inputs


@pytest.mark.parametrize("key", [str, int], ids=["read from a file", "never written"])
def test_both_spellings_of_global_layers_say_the_same(key):
    new = {k: v for k, v in MOE_26B.items() if "global" not in k}
    changes = {"head_dim": 512, "num_key_value_heads": 2}
    new["per_layer_config"] = {key(i): changes for i in range(5, 30, 6)}
    assert from_hugging_face(new) == from_hugging_face(MOE_26B)

    new["per_layer_config"][key(5)] = {"sliding_window": 7}
    with pytest.raises(ValueError, match=r"got \['sliding_window'\] for layer 5"):
        from_hugging_face(new)


def test_the_unified_model_has_neither_experts_nor_per_layer_inputs():
    absent = ("enable_moe_block", "top_k_experts", "hidden_size_per_layer_input")
    text = {k: v for k, v in MOE_26B.items() if k not in absent}
    text["model_type"] = "gemma4_unified_text"
    config = from_hugging_face({"model_type": "gemma4_unified", "text_config": text})
    dense = from_hugging_face({**MOE_26B, "enable_moe_block": False})
    assert config == dense
    with pytest.raises(KeyError, match="hidden_size_per_layer_input"):
        from_hugging_face({**text, "model_type": "gemma4_text", "enable_moe_block": False})


def test_the_last_layer_is_full_whatever_the_file_says():
    kinds = [LOCAL, FULL, LOCAL, LOCAL]
    assert [layer.window for layer in small(layer_types=kinds).layers] == [3, None, 3, None]


def test_global_heads_count_only_where_values_are_keys():
    assert small(attention_k_eq_v=False).layers[1].kv_heads == 2
    assert small().layers[1].kv_heads == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention: got 'all'"),
        ({"num_kv_shared_layers": 3}, "expected a layer with 'full_attention' before them"),
        ({"hidden_activation": "silu"}, "activation: got 'silu'"),
    ],
)
def test_what_the_oracle_does_not_compute_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        small(**change)
