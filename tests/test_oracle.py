"""The float64 oracle against numbers worked out by hand, before it judges anything else.

Bounds: both sides of a comparison are float64 and of order one, and differ at most in the order of
some tens of operations, so 1e-12 is far above rounding and far below any wrong formula. Where no
operation may differ, equality is exact.
"""

import math

import numpy as np
import pytest

from tests.oracle import (
    OracleResult,
    elementary,
    forward,
    from_hugging_face,
    log_probabilities,
    rope,
    sample_greedy,
)
from tests.oracle.attention import visibility
from tests.oracle.config import LayerConfig, OracleConfig
from tests.oracle.random_weights import random_weights

ROUNDING = 1e-12
LAYER = LayerConfig(
    heads=4,
    kv_heads=2,
    head_width=4,
    query_scale=0.5,
    window=None,
    rope_base=100.0,
    rope_factor=1.0,
    score_cap=None,
    normalizes_queries_and_keys=False,
    norm_after_attention=None,
    norm_before_mlp="post_attention_layernorm",
    norm_after_mlp=None,
)
EVERYTHING = {
    "score_cap": 2.0,
    "normalizes_queries_and_keys": True,
    "norm_after_attention": "post_attention_layernorm",
    "norm_before_mlp": "pre_feedforward_layernorm",
    "norm_after_mlp": "post_feedforward_layernorm",
}


def layer(**changes) -> LayerConfig:
    return LayerConfig(**{**vars(LAYER), **changes})


def model(*layers: LayerConfig, logit_cap: float | None = None) -> OracleConfig:
    return OracleConfig(layers, norm_epsilon=1e-6, logit_cap=logit_cap)


def run(config: OracleConfig, tokens, *, positions=None, **options) -> OracleResult:
    tokens = np.atleast_2d(tokens)
    if positions is None:
        positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    return forward(config, random_weights(config), tokens, np.atleast_2d(positions), **options)


# The parts, by hand.


def test_rope_turns_pairs_half_a_head_apart_by_explicit_matrices():
    # Head width 4, base 100: pair (0, 2) turns with frequency 100^0 = 1, pair (1, 3) with
    # 100^(-2/4) = 0.1.
    x = np.array([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    positions = np.array([[0, 3]])
    angles = rope.exact_angles(positions, 4, base=100.0, factor=1.0)
    rotated = rope.rotate(x[None, :, None], angles)[0, :, 0]

    for place, position in enumerate((0, 3)):
        for pair, frequency in enumerate((1.0, 0.1)):
            c, s = math.cos(position * frequency), math.sin(position * frequency)
            want = np.array([[c, -s], [s, c]]) @ x[place, [pair, pair + 2]]
            np.testing.assert_allclose(rotated[place, [pair, pair + 2]], want, atol=ROUNDING)
    np.testing.assert_array_equal(rotated[0], x[0])  # position 0: no turn at all
    # Written out once in digits: cos 3 = -0.98999249660, sin 3 = 0.14112000806.
    assert rotated[1, 0] == pytest.approx(5 * -0.98999249660 - 7 * 0.14112000806, abs=1e-9)


def test_rope_scores_depend_on_the_distance_alone():
    random = np.random.default_rng(1)
    query, key = random.normal(size=(2, 1, 1, 1, 8))

    def turn(x: np.ndarray, position: int) -> np.ndarray:
        return rope.rotate(x, rope.exact_angles(np.array([[position]]), 8, base=1e4, factor=1.0))

    def score(i: int, j: int) -> float:
        return float(np.sum(turn(query, i) * turn(key, j)))

    # Angles near 8000 carry the rounding of 8000: 8000 * 2^-53 = 9e-13, times a score near 8.
    assert score(8007, 8003) == pytest.approx(score(4, 0), abs=1e-10)
    assert abs(score(5, 0) - score(4, 0)) > 1e-2


@pytest.mark.parametrize("angles", [rope.exact_angles, rope.float32_angles])
def test_linear_rope_factor_divides_positions(angles):
    scaled = angles(np.array([[8, 80, 800]]), 8, base=1e6, factor=8.0)
    plain = angles(np.array([[1, 10, 100]]), 8, base=1e6, factor=1.0)
    np.testing.assert_array_equal(scaled, plain)  # a power of two divides without rounding


def test_float32_angles_are_the_exact_ones_rounded_a_few_times():
    positions = np.arange(9000)[None]
    exact = rope.exact_angles(positions, 256, base=1e4, factor=8.0)
    rounded = rope.float32_angles(positions, 256, base=1e4, factor=8.0)
    np.testing.assert_array_equal(rounded, rounded.astype(np.float32))
    # The power, its reciprocal and the product are rounded, each by 2^-24 at most.
    np.testing.assert_allclose(rounded, exact, rtol=3.01 * 2.0**-24)
    assert np.abs(rounded - exact).max() > 1e-5


def test_rms_norm_multiplies_by_one_plus_the_weight():
    # mean(3^2, 4^2, 0, 0) = 6.25, root 2.5: 3 -> 1.2, 4 -> 1.6; gains 1.5 and 0.
    normed = elementary.rms_norm(
        np.array([3.0, 4.0, 0.0, 0.0]), np.array([0.5, -1.0, 7.0, 7.0]), epsilon=0.0, offset=1.0
    )
    np.testing.assert_allclose(normed, [1.8, 0.0, 0.0, 0.0], atol=ROUNDING)
    # epsilon stands inside the root: 1 / sqrt(1 + 3) = 0.5.
    halved = elementary.rms_norm(np.ones(2), np.zeros(2), epsilon=3.0, offset=1.0)
    np.testing.assert_allclose(halved, [0.5, 0.5], atol=ROUNDING)


def test_soft_cap_bends_and_bounds():
    assert elementary.soft_cap(np.array([50.0]), 50.0)[0] == pytest.approx(
        50 * math.tanh(1), abs=1e-12
    )
    assert elementary.soft_cap(np.array([-1e6]), 30.0)[0] == -30.0
    assert elementary.soft_cap(np.array([123.0]), None)[0] == 123.0


def test_gelu_is_the_tanh_form():
    # 0.5 (1 + tanh(0.7978845608 * 1.044715)) = 0.8411919906; the exact form gives 0.8413447461.
    assert elementary.gelu_tanh(np.array([1.0]))[0] == pytest.approx(0.8411919906, abs=1e-10)


def test_softmax_rows_sum_to_one_and_a_row_that_sees_nothing_is_zero():
    scores = np.array([[0.0, math.log(3.0), -np.inf], [1000.0, 1000.0, 0.0], [-np.inf] * 3])
    want = [[0.25, 0.75, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]
    np.testing.assert_allclose(elementary.softmax(scores), want, atol=ROUNDING)


@pytest.mark.parametrize("window", [1, 3, 5])
def test_a_window_of_w_sees_w_keys_itself_included(window):
    positions = np.arange(9)[None] + 100  # counted by position, wherever the text starts
    seen = visibility(positions, np.ones((1, 9), bool), window=window)[0]
    np.testing.assert_array_equal(seen.sum(axis=1), np.minimum(np.arange(9) + 1, window))
    assert seen[8, 8 - window + 1]
    assert not seen[8, 8 - window]
    assert seen[8, 8]


def test_padding_is_seen_by_nobody():
    visible = np.array([[False, True, True]])
    seen = visibility(np.array([[0, 0, 1]]), visible, window=None)[0]
    np.testing.assert_array_equal(seen, [[0, 1, 0], [0, 1, 0], [0, 1, 1]])


def test_log_probabilities_judge_the_next_token():
    logits = np.log(np.array([[[1.0, 3.0], [4.0, 1.0], [9.0, 9.0]]])) + 700.0
    got = log_probabilities(logits, np.array([[0, 1, 0]]))
    # exp(700) * 9 is near the largest float64; without the shift this would overflow.
    np.testing.assert_allclose(got, [[math.log(0.75), math.log(0.8)]], atol=ROUNDING)


# The whole pass, by its properties.


def test_no_attention_and_no_mlp_leaves_the_scaled_embedding():
    config = model(layer())
    weights = random_weights(config)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        weights[f"layers.0.{name}.weight"] *= 0.0
    result = forward(config, weights, np.array([[3, 5]]), np.array([[0, 1]]))

    table = weights["embed_tokens.weight"]
    stream = table[[3, 5]] * math.sqrt(6)
    np.testing.assert_allclose(result.residuals[1][0], stream, atol=ROUNDING)
    root = np.sqrt((stream**2).mean(axis=1, keepdims=True) + 1e-6)
    logits = (stream / root * (1 + weights["norm.weight"])) @ table.T
    np.testing.assert_allclose(result.logits[0], logits, atol=ROUNDING * 10)


@pytest.mark.parametrize("changes", [{}, EVERYTHING], ids=["gemma", "gemma3-with-cap"])
def test_one_layer_equals_loops_over_heads_and_places(changes):
    """The same layer once more without einsum or grouping: one query head and place at a time."""
    config = model(layer(**changes))
    weights = random_weights(config)
    tokens = np.array([[1, 9, 4, 16]])
    result = forward(config, weights, tokens, np.arange(4)[None])

    def weight(name: str) -> np.ndarray:
        return weights[f"layers.0.{name}.weight"]

    def norm(x, name):
        return x / math.sqrt(x @ x / len(x) + 1e-6) * (1 + weight(name))

    def turn(x, position):
        pairs = x.reshape(2, 2).T  # (x0, x2) and (x1, x3)
        z = (pairs[:, 0] + 1j * pairs[:, 1]) * np.exp(1j * position * np.array([1.0, 0.1]))
        return np.concatenate([z.real, z.imag])

    def head(which: str, index: int, place: int) -> np.ndarray:
        rows = weight(f"self_attn.{which}_proj")[4 * index : 4 * index + 4]
        x = rows @ norm(result.residuals[0][0, place], "input_layernorm")
        if which == "v":
            return x
        x = norm(x, f"self_attn.{which}_norm") if changes else x
        return turn(x, place)

    for place in range(4):
        mixed = []
        for j, kv in enumerate((0, 0, 1, 1)):  # query heads 0, 1 share the first key/value head
            scores = np.array([head("q", j, place) @ head("k", kv, s) for s in range(place + 1)])
            scores = 2.0 * np.tanh(scores * 0.5 / 2.0) if changes else scores * 0.5
            np.testing.assert_allclose(
                result.scores[0][0, j, place, : place + 1], scores, atol=ROUNDING * 10
            )
            share = np.exp(scores) / np.exp(scores).sum()
            mixed.append(sum(p * head("v", kv, s) for s, p in enumerate(share)))
        stream = result.residuals[0][0, place]
        added = weight("self_attn.o_proj") @ np.concatenate(mixed)
        stream = stream + (norm(added, "post_attention_layernorm") if changes else added)
        before = "pre_feedforward_layernorm" if changes else "post_attention_layernorm"
        x = norm(stream, before)
        gate, up = weight("mlp.gate_proj") @ x, weight("mlp.up_proj") @ x
        added = weight("mlp.down_proj") @ (elementary.gelu_tanh(gate) * up)
        stream = stream + (norm(added, "post_feedforward_layernorm") if changes else added)
        np.testing.assert_allclose(result.residuals[1][0, place], stream, atol=ROUNDING * 100)


def test_a_later_token_changes_nothing_before_it():
    config = model(layer(window=3, **EVERYTHING), layer(**EVERYTHING), logit_cap=30.0)
    one, other = run(config, [1, 2, 3, 4, 5]), run(config, [1, 2, 3, 4, 6])
    np.testing.assert_array_equal(one.logits[0, :4], other.logits[0, :4])
    assert np.abs(one.logits[0, 4] - other.logits[0, 4]).max() > 1e-2


def test_in_a_local_layer_a_token_w_or_more_back_has_no_influence():
    config = model(layer(window=3))
    one, other = run(config, [1, 2, 3, 4, 5, 6]), run(config, [7, 2, 3, 4, 5, 6])
    changed = np.abs(one.logits - other.logits)[0].max(axis=1) > 0
    np.testing.assert_array_equal(changed, [True, True, True, False, False, False])


def test_only_relative_positions_matter():
    config = model(layer(window=3, **EVERYTHING), layer(rope_factor=8.0, **EVERYTHING))
    tokens = [1, 9, 4, 16, 2]
    near, far = run(config, tokens), run(config, tokens, positions=np.arange(5) + 4096)
    np.testing.assert_allclose(near.logits, far.logits, atol=1e-9)  # angles near 4096, see above
    spread = run(config, tokens, positions=np.arange(5) * 2)
    assert np.abs(near.logits - spread.logits).max() > 1e-2


def test_padding_before_or_after_changes_no_real_token():
    config = model(layer(window=3, **EVERYTHING), layer(**EVERYTHING))
    alone = run(config, [5, 6, 7]).logits[0]
    left = run(
        config, [0, 0, 5, 6, 7], positions=[0, 0, 0, 1, 2], visible=np.array([[0, 0, 1, 1, 1]]) > 0
    ).logits[0]
    right = run(
        config, [5, 6, 7, 0, 0], positions=[0, 1, 2, 3, 4], visible=np.array([[1, 1, 1, 0, 0]]) > 0
    ).logits[0]
    np.testing.assert_allclose(left[2:], alone, atol=ROUNDING * 10)
    np.testing.assert_allclose(right[:3], alone, atol=ROUNDING * 10)
    assert np.isfinite(left).all()  # places 0 and 1 see nothing, and still give numbers


def test_rows_of_a_batch_are_independent():
    config = model(layer(window=2, **EVERYTHING))
    both = run(config, [[1, 2, 3], [4, 5, 6]]).logits
    np.testing.assert_allclose(both[1], run(config, [4, 5, 6]).logits[0], atol=ROUNDING * 10)


def test_greedy_takes_the_likeliest_token_at_every_step():
    config = model(layer(), logit_cap=30.0)
    weights = random_weights(config)
    tokens = [3, 8]
    for _ in range(3):
        tokens.append(int(run(config, tokens).logits[0, -1].argmax()))
    assert sample_greedy(config, weights, np.array([3, 8]), count=3).tolist() == tokens[2:]


def test_final_logits_are_capped():
    plain, capped = run(model(layer()), [3, 5]).logits, run(model(layer(), logit_cap=3.0), [3, 5])
    assert np.abs(plain).max() > 3.0
    np.testing.assert_allclose(capped.logits, 3.0 * np.tanh(plain / 3.0), atol=ROUNDING)


def test_an_untied_head_replaces_the_embedding():
    config = model(layer())
    weights = random_weights(config)
    tied = forward(config, weights, np.array([[1, 2]]), np.array([[0, 1]])).logits
    weights["lm_head.weight"] = 2.0 * weights["embed_tokens.weight"]
    untied = forward(config, weights, np.array([[1, 2]]), np.array([[0, 1]])).logits
    np.testing.assert_array_equal(untied, 2.0 * tied)  # doubling is exact


def test_an_unread_or_missing_weight_and_an_unknown_id_are_errors():
    config = model(layer())
    weights = random_weights(config)
    one = np.array([[1]])
    with pytest.raises(ValueError, match=r"not understood \['layers.0.self_attn.q_norm.weight'\]"):
        forward(config, {**weights, "layers.0.self_attn.q_norm.weight": np.ones(4)}, one, one)
    del weights["norm.weight"]
    with pytest.raises(ValueError, match=r"missing \['norm.weight'\]"):
        forward(config, weights, one, one)
    with pytest.raises(ValueError, match=r"got -1\.\.-1, expected 0\.\.16"):
        run(config, [-1])


# Configurations. Numbers are those of the released files.

GEMMA_7B = {
    "model_type": "gemma",
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "rope_theta": 10000.0,
    "hidden_act": "gelu",
    "hidden_activation": None,
}
GEMMA2_27B = {
    "model_type": "gemma2",
    "num_hidden_layers": 46,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "query_pre_attn_scalar": 144,
    "sliding_window": 4096,
    "rope_theta": 10000.0,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "hidden_activation": "gelu_pytorch_tanh",
}
GEMMA3_4B = {
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
}
GEMMA3_4B_SAVED_AGAIN = {
    "model_type": "gemma3_text",
    "num_hidden_layers": 34,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 1024,
    "layer_types": ["sliding_attention" if (i + 1) % 6 else "full_attention" for i in range(34)],
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}
VAULTGEMMA_1B = {
    **GEMMA2_27B,
    "model_type": "vaultgemma",
    "num_hidden_layers": 26,
    "layer_types": ["full_attention"] * 26,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}


def test_gemma_1():
    config = from_hugging_face(GEMMA_7B)
    assert len(config.layers) == 28
    assert set(config.layers) == {
        layer(heads=16, kv_heads=16, head_width=256, query_scale=1 / 16, rope_base=1e4)
    }
    assert (config.norm_epsilon, config.logit_cap) == (1e-6, None)


def test_gemma_2_starts_with_a_local_layer():
    config = from_hugging_face(GEMMA2_27B)
    assert [own.window for own in config.layers] == [4096, None] * 23
    first = config.layers[0]
    assert first.query_scale == pytest.approx(1 / 12, abs=1e-16)
    assert (first.score_cap, config.logit_cap) == (50.0, 30.0)
    assert first.norm_after_attention == "post_attention_layernorm"
    assert first.norm_before_mlp == "pre_feedforward_layernorm"
    assert first.norm_after_mlp == "post_feedforward_layernorm"


def test_vaultgemma_has_two_norms_and_no_window():
    config = from_hugging_face(VAULTGEMMA_1B)
    assert {own.window for own in config.layers} == {None}
    first = config.layers[0]
    assert (first.norm_after_attention, first.norm_after_mlp) == (None, None)
    assert first.norm_before_mlp == "pre_feedforward_layernorm"
    with pytest.raises(KeyError, match="sliding_window_pattern"):
        from_hugging_face({k: v for k, v in VAULTGEMMA_1B.items() if k != "layer_types"})


@pytest.mark.parametrize(
    "file", [GEMMA3_4B, GEMMA3_4B_SAVED_AGAIN], ids=["released", "saved again"]
)
def test_gemma_3_scales_positions_of_global_layers_only(file):
    config = from_hugging_face(file)
    local, full = config.layers[0], config.layers[5]
    assert (local.window, local.rope_base, local.rope_factor) == (1024, 1e4, 1.0)
    assert (full.window, full.rope_base, full.rope_factor) == (None, 1e6, 8.0)
    assert config.layers == ((local,) * 5 + (full,)) * 5 + (local,) * 4  # ends with four locals
    assert (local.heads, local.kv_heads, local.head_width, local.query_scale) == (8, 4, 256, 1 / 16)
    assert local.normalizes_queries_and_keys


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type: got 'llama'"),
        ({"hidden_activation": "gelu"}, "activation: got 'gelu'"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention: got True"),
        ({"layer_types": ["full_attention"]}, "expected 46 entries"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_type: got 'yarn'"),
    ],
)
def test_what_the_oracle_does_not_compute_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        from_hugging_face({**GEMMA2_27B, **change})
