"""What the oracle computes for Gemma 3n alone, against numbers worked out by hand.

Bounds as in `test_oracle.py`: both sides are float64 and of order one, and 1e-12 is far above the
rounding of some tens of operations. Where no operation may differ, equality is exact.
"""

import math
from functools import partial

import numpy as np
import pytest

from tests.oracle import OracleResult, forward, from_hugging_face
from tests.oracle.altup import correct, laurel, merge_streams, predict, split_stream
from tests.oracle.config import OracleConfig
from tests.oracle.elementary import rms_norm
from tests.oracle.feed_forward import gated_mlp, sparse
from tests.oracle.random_weights import random_weights

ROUNDING = 1e-12
NORM = partial(rms_norm, epsilon=0.0, offset=0.0)

LOCAL, FULL = "sliding_attention", "full_attention"
E2B = {
    "model_type": "gemma3n_text",
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "sliding_window": 512,
    "layer_types": [FULL if (i + 1) % 5 == 0 else LOCAL for i in range(30)],
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "rope_scaling": None,
    "final_logit_softcapping": 30.0,
    "altup_active_idx": 0,
    "altup_correct_scale": True,
    "altup_num_inputs": 4,
    "num_kv_shared_layers": 10,
    "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 20,
}
E4B = {
    **E2B,
    "num_hidden_layers": 35,
    "layer_types": [FULL if (i + 1) % 5 == 0 else LOCAL for i in range(35)],
    "num_kv_shared_layers": 15,
    "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 25,
}
SMALL = {
    **E2B,
    "num_hidden_layers": 4,
    "layer_types": [LOCAL, FULL, LOCAL, FULL],
    "num_attention_heads": 4,
    "head_dim": 4,
    "sliding_window": 3,
    "num_kv_shared_layers": 2,
    "activation_sparsity_pattern": [0.95, 0.0, 0.5, 0.0],
}


def altup_weights(**changes) -> dict[str, np.ndarray]:
    """Of one layer of width 2 with 3 streams, routed by the first number of the stream alone."""
    return {
        "altup.router_norm.weight": np.ones(2),
        "altup.modality_router.weight": np.array([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]),
        "altup.prediction_coefs.weight": np.zeros((9, 3)),
        "altup.correction_coefs.weight": np.zeros((3, 3)),
        **changes,
    }


def run(config: OracleConfig, weights, tokens, *, start: int = 0) -> OracleResult:
    tokens = np.array([tokens])
    return forward(config, weights, tokens, np.arange(tokens.shape[1])[None] + start)


# The parts, by hand.


def test_the_sparse_gate_keeps_what_stands_out():
    # 31 zeros and a 32: mean 1, squared deviations 31 * 1 + 31^2 = 32 * 31, so by f the deviation
    # is sqrt 31 (by f - 1 it would be sqrt 32). The 95th percentile of a normal distribution is
    # 1.6448536 deviations above its mean.
    gate = np.zeros(32)
    gate[7] = 32.0
    got = sparse(gate, sparsity=0.95)
    assert got[7] == pytest.approx(32 - (1 + 1.6448536269514722 * math.sqrt(31)), abs=1e-9)
    assert np.count_nonzero(got) == 1

    # Half of them: the mean itself is the threshold, and the rest loses it.
    np.testing.assert_allclose(
        sparse(np.array([[1.0, 2.0, 3.0, 6.0], [-1.0, -1.0, -1.0, 7.0]]), sparsity=0.5),
        [[0.0, 0.0, 0.0, 3.0], [0.0, 0.0, 0.0, 6.0]],
        atol=ROUNDING,
    )


def test_without_sparsity_the_gate_is_left_alone():
    gate = np.array([-3.0, 0.0, 5.0])
    assert sparse(gate, sparsity=0.0) is gate


def test_the_gate_loses_its_threshold_before_the_activation():
    weights = {
        "mlp.gate_proj.weight": np.array([[1.0], [3.0]]),
        "mlp.up_proj.weight": np.array([[100.0], [10.0]]),
        "mlp.down_proj.weight": np.array([[1.0, 1.0]]),
    }
    # Gate (1, 3) has mean 2, which leaves (0, 1); gelu(1) = 0.8411919906.
    got = gated_mlp(weights, np.ones((1, 1, 1)), sparsity=0.5)
    assert got[0, 0, 0] == pytest.approx(8.411919906, abs=1e-8)


def test_predicting_with_zero_coefficients_changes_nothing():
    streams = np.random.default_rng(0).normal(size=(3, 1, 5, 2))
    np.testing.assert_array_equal(predict(altup_weights(), streams, norm=NORM), streams)


def test_a_prediction_mixes_streams_row_by_row():
    # Stream 0 is (7, 0): its norm makes it sqrt 2, and 1/2 of that is routed.
    coefficients = np.zeros((9, 3))
    coefficients[2 * 3 + 1, 0] = 10.0  # to stream 2 from stream 1, by what the first route says
    weights = altup_weights(**{"altup.prediction_coefs.weight": coefficients})
    streams = np.array([[7.0, 0.0], [1.0, 2.0], [3.0, 4.0]])[:, None, None]
    got = predict(weights, streams, norm=NORM)[:, 0, 0]

    mixed = 10 * math.tanh(math.sqrt(2) / 2)
    np.testing.assert_allclose(
        got, [[7.0, 0.0], [1.0, 2.0], [3.0 + mixed, 4.0 + 2 * mixed]], atol=ROUNDING
    )


def test_a_correction_moves_every_stream_by_what_the_first_missed():
    coefficients = np.zeros((3, 3))
    coefficients[1, 0] = 4.0  # of stream 1, by what the first route says
    weights = altup_weights(**{"altup.correction_coefs.weight": coefficients})
    predicted = np.array([[1.0, 1.0], [10.0, 20.0], [30.0, 40.0]])[:, None, None]
    got = correct(weights, predicted, np.array([[[5.0, 0.0]]]), norm=NORM)[:, 0, 0]

    more = 1 + 4 * math.tanh(math.sqrt(2) / 2)
    np.testing.assert_allclose(
        got, [[5.0, 0.0], [10.0 + 4 * more, 20.0 - more], [34.0, 39.0]], atol=ROUNDING
    )


def test_streams_begin_as_large_as_the_embedding():
    weights = {
        "altup_projections.0.weight": np.array([[0.0, 1.0], [0.0, 0.0]]),
        "altup_projections.1.weight": np.zeros((2, 2)),
    }
    streams = split_stream(weights, np.array([[[3.0, 4.0]]]), streams=3)[:, 0, 0]
    # (4, 0) made as long as (3, 4); nothing stays nothing.
    np.testing.assert_allclose(streams, [[3.0, 4.0], [5.0, 0.0], [0.0, 0.0]], atol=ROUNDING)


def test_a_projection_of_almost_nothing_is_not_blown_up():
    weights = {"altup_projections.0.weight": np.eye(2) * 1e-3}
    streams = split_stream(weights, np.array([[[1.0, 1.0]]]), streams=2)[:, 0, 0]
    # Its mean square, 1e-6, is taken for 1e-5.
    np.testing.assert_allclose(streams[1], np.full(2, 1e-3 / math.sqrt(1e-5)), atol=ROUNDING)


def test_streams_end_in_their_mean_at_the_size_of_the_first():
    weights = {
        "altup_unembed_projections.0.weight": np.eye(2),
        "altup_unembed_projections.1.weight": np.array([[0.0, 1.0], [1.0, 0.0]]),
    }
    streams = np.array([[3.0, 4.0], [100.0, 0.0], [0.3, 0.4]])[:, None, None]
    merged = merge_streams(weights, streams)[0, 0]
    np.testing.assert_allclose(merged, [(3 + 5 + 4) / 3, (4 + 0 + 3) / 3], atol=ROUNDING)


def test_laurel_adds_a_normalised_product_of_low_rank():
    weights = {
        "laurel.linear_left.weight": np.array([[1.0, 1.0]]),
        "laurel.linear_right.weight": np.array([[3.0], [4.0]]),
        "laurel.post_laurel_norm.weight": np.array([1.0, 10.0]),
    }
    got = laurel(weights, np.array([[[1.0, 2.0]]]), norm=NORM)[0, 0]
    # (9, 12) has root mean square 15 / sqrt 2.
    np.testing.assert_allclose(
        got, [1 + 0.6 * math.sqrt(2), 2 + 8 * math.sqrt(2)], atol=ROUNDING * 10
    )


# The whole pass.


def test_all_streams_are_recorded_before_and_after_each_layer():
    config = from_hugging_face(SMALL)
    result = run(config, random_weights(config), [1, 2, 3])
    assert [residual.shape for residual in result.residuals] == [(4, 1, 3, 6)] * 5
    assert result.logits.shape == (1, 3, 17)
    assert np.abs(result.logits).max() <= 30.0


def test_the_first_stream_is_not_told_which_token_it_works_on():
    config = from_hugging_face(SMALL)
    weights = random_weights(config)
    one = run(config, weights, [1, 2, 3]).residuals[1]
    weights["embed_tokens_per_layer.weight"] = weights["embed_tokens_per_layer.weight"] + 1.0
    other = run(config, weights, [1, 2, 3]).residuals[1]
    np.testing.assert_array_equal(one[0], other[0])
    assert np.abs(one[1:] - other[1:]).max(axis=(1, 2, 3)).min() > 1e-2
    # To each of the others the same is added.
    np.testing.assert_allclose((other - one)[1], (other - one)[3], atol=ROUNDING * 10)


def test_the_scale_of_the_first_stream_only_asks():
    config = from_hugging_face(SMALL)
    weights = random_weights(config)
    one = run(config, weights, [1, 2, 3]).residuals[1]
    weights["layers.0.altup.correct_output_scale"] = np.zeros(6)
    other = run(config, weights, [1, 2, 3]).residuals[1]
    np.testing.assert_array_equal(one[0], other[0])
    # gelu(0) = 0 lets nothing in, and the norm of nothing is nothing.
    weights["layers.0.post_per_layer_input_norm.weight"] = np.zeros(6)
    np.testing.assert_array_equal(run(config, weights, [1, 2, 3]).residuals[1], other)


def test_attention_and_laurel_are_added_and_divided_by_root_2():
    """With attention, feed-forward and the product of LAuReL shut, (stream + its norm) is left."""
    config = from_hugging_face(SMALL)
    weights = random_weights(config)
    for name in ("post_attention_layernorm", "post_feedforward_layernorm"):
        weights[f"layers.0.{name}.weight"] *= 0.0
    weights["layers.0.altup.prediction_coefs.weight"] *= 0.0
    weights["layers.0.altup.correction_coefs.weight"] *= 0.0
    weights["layers.0.laurel.post_laurel_norm.weight"] *= 0.0
    result = run(config, weights, [5, 9])
    before = result.residuals[0][0]
    root = np.sqrt(np.mean(before**2, axis=-1, keepdims=True) + 1e-6)
    x = before / root * weights["layers.0.input_layernorm.weight"]
    np.testing.assert_allclose(result.residuals[1][0], (before + x) / math.sqrt(2), atol=ROUNDING)


def test_a_later_token_changes_nothing_before_it():
    config = from_hugging_face(SMALL)
    weights = random_weights(config)
    one, other = (run(config, weights, [1, 2, 3, 4, last]).logits[0] for last in (5, 6))
    np.testing.assert_allclose(one[:4], other[:4], atol=ROUNDING * 10)
    assert np.abs(one[4] - other[4]).max() > 1e-2


def test_only_relative_positions_matter():
    config = from_hugging_face(SMALL)
    weights = random_weights(config)
    near, far = (run(config, weights, [1, 9, 4, 16, 2], start=s).logits for s in (0, 70_000))
    # An angle near 70,000 carries a rounding of 70,000 * 2^-53 = 8e-12.
    np.testing.assert_allclose(near, far, atol=1e-8)


# Configurations. Numbers are those of the released models.


@pytest.mark.parametrize("file", [E2B, E4B], ids=["E2B", "E4B"])
def test_the_first_twenty_layers_have_keys_and_the_rest_read_18_and_19(file):
    config = from_hugging_face({"model_type": "gemma3n", "text_config": file})
    donors = [layer.donor for layer in config.layers]
    assert donors[:20] == [None] * 20
    assert donors[20:] == [18, 18, 18, 18, 19] * ((len(donors) - 20) // 5)
    assert [layer.gate_sparsity for layer in config.layers] == file["activation_sparsity_pattern"]

    local, full = config.layers[18], config.layers[19]
    assert (local.window, local.rope_base, full.window, full.rope_base) == (512, 1e4, None, 1e6)
    assert local.query_scale == full.query_scale == 1.0
    assert (local.rope_factor, local.rope_proportion, local.score_cap) == (1.0, 1.0, None)
    assert local.normalizes_values
    assert local.has_laurel
    assert local.has_per_layer_input
    assert not local.has_scalar
    assert (config.streams, config.norm_offset, config.logit_cap) == (4, 0.0, 30.0)


def test_both_spellings_of_rope_and_pattern_say_the_same():
    absent = ("layer_types", "rope_theta", "rope_local_base_freq", "rope_scaling")
    new = {k: v for k, v in E2B.items() if k not in absent}
    new["rope_parameters"] = {
        FULL: {"rope_type": "default", "rope_theta": 1e6},
        LOCAL: {"rope_type": "default", "rope_theta": 1e4},
    }
    assert from_hugging_face(new) == from_hugging_face(E2B)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"altup_active_idx": 1}, "altup_active_idx: got 1"),
        ({"altup_correct_scale": False}, "altup_correct_scale: got False"),
        ({"num_kv_shared_layers": 4}, "expected a layer with 'sliding_attention' before them"),
    ],
)
def test_what_the_oracle_does_not_compute_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        from_hugging_face({**SMALL, **change})
