"""Configurations: the published numbers, written out once more, and contradictions refused."""

import ast
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import NamedTuple

import pytest

from refimpl.errors import ConfigError, UnknownModelError
from refimpl.model.config import MOST_LAYERS, GemmaConfig, periodic_kinds
from refimpl.model.hf_families import FAMILIES, NESTED
from refimpl.model.layer_spec import (
    AttentionKind,
    ExpertsSpec,
    LayerSpec,
    PerLayerInputSpec,
    RopeSpec,
)
from refimpl.model.variants import VARIANTS, variant

ROOT = Path(__file__).parents[1]
LOCAL, GLOBAL = AttentionKind.LOCAL, AttentionKind.GLOBAL


class Published(NamedTuple):
    """What a model card or an official configuration says of a size.

    `scale` is the number whose square root divides attention scores, `every` the distance from one
    global layer to the next.
    """

    parameters: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    feed_forward: int
    vocabulary: int
    context: int
    window: int | None
    every: int
    local_theta: float
    global_theta: float
    factor: float
    scale: float
    caps: tuple[float | None, float | None]


# fmt: off
PUBLISHED = {
    "gemma-2b": Published(
        2_506_172_416, 18, 2048, 8, 1, 256, 16384, 256_000, 8192, None, 1, 1e4, 1e4, 1.0, 256,
        (None, None)),
    "gemma-7b": Published(
        8_537_680_896, 28, 3072, 16, 16, 256, 24576, 256_000, 8192, None, 1, 1e4, 1e4, 1.0, 256,
        (None, None)),
    "codegemma-2b": Published(
        2_506_172_416, 18, 2048, 8, 1, 256, 16384, 256_000, 8192, None, 1, 1e4, 1e4, 1.0, 256,
        (None, None)),
    "codegemma-7b": Published(
        8_537_680_896, 28, 3072, 16, 16, 256, 24576, 256_000, 8192, None, 1, 1e4, 1e4, 1.0, 256,
        (None, None)),
    "gemma-2-2b": Published(
        2_614_341_888, 26, 2304, 8, 4, 256, 9216, 256_000, 8192, 4096, 2, 1e4, 1e4, 1.0, 256,
        (50.0, 30.0)),
    # 256, and not the 224 = width / heads that a conversion script once had.
    "gemma-2-9b": Published(
        9_241_705_984, 42, 3584, 16, 8, 256, 14336, 256_000, 8192, 4096, 2, 1e4, 1e4, 1.0, 256,
        (50.0, 30.0)),
    # 144 = width / heads, and not the head width of 128.
    "gemma-2-27b": Published(
        27_227_128_320, 46, 4608, 32, 16, 128, 36864, 256_000, 8192, 4096, 2, 1e4, 1e4, 1.0, 144,
        (50.0, 30.0)),
    "vaultgemma-1b": Published(
        1_038_741_120, 26, 1152, 4, 4, 256, 6912, 256_000, 1024, 512, 1, 1e4, 1e4, 1.0, 256,
        (None, None)),
    "gemma-3-270m": Published(
        268_098_176, 18, 640, 4, 1, 256, 2048, 262_144, 32768, 512, 6, 1e4, 1e6, 1.0, 256,
        (None, None)),
    "gemma-3-1b": Published(
        999_885_952, 26, 1152, 4, 1, 256, 6912, 262_144, 32768, 512, 6, 1e4, 1e6, 1.0, 256,
        (None, None)),
    "gemma-3-4b": Published(
        3_880_263_168, 34, 2560, 8, 4, 256, 10240, 262_208, 131_072, 1024, 6, 1e4, 1e6, 8.0, 256,
        (None, None)),
    "gemma-3-12b": Published(
        11_766_034_176, 48, 3840, 16, 8, 256, 15360, 262_208, 131_072, 1024, 6, 1e4, 1e6, 8.0, 256,
        (None, None)),
    # 168 = width / heads, and not the head width of 128.
    "gemma-3-27b": Published(
        27_009_346_304, 62, 5376, 32, 16, 128, 21504, 262_208, 131_072, 1024, 6, 1e4, 1e6, 8.0, 168,
        (None, None)),
    "gemma-3n-e2b": Published(
        4_435_182_688, 30, 2048, 8, 2, 256, 8192, 262_400, 32768, 512, 5, 1e4, 1e6, 1.0, 1,
        (None, 30.0)),
    "gemma-3n-e4b": Published(
        6_835_235_568, 35, 2048, 8, 2, 256, 16384, 262_400, 32768, 512, 5, 1e4, 1e6, 1.0, 1,
        (None, 30.0)),
    "gemma-4-e2b": Published(
        4_628_569_379, 35, 1536, 8, 1, 256, 6144, 262_144, 131_072, 512, 5, 1e4, 1e6, 1.0, 1,
        (None, 30.0)),
    "gemma-4-e4b": Published(
        7_463_013_418, 42, 2560, 8, 2, 256, 10240, 262_144, 131_072, 512, 6, 1e4, 1e6, 1.0, 1,
        (None, 30.0)),
    "gemma-4-12b": Published(
        11_907_350_320, 48, 3840, 16, 8, 256, 15360, 262_144, 262_144, 1024, 6, 1e4, 1e6, 1.0, 1,
        (None, 30.0)),
    "gemma-4-26b-a4b": Published(
        25_233_141_790, 30, 2816, 16, 8, 256, 2112, 262_144, 262_144, 1024, 6, 1e4, 1e6, 1.0, 1,
        (None, 30.0)),
    "gemma-4-31b": Published(
        30_697_345_340, 60, 5376, 32, 16, 256, 21504, 262_144, 262_144, 1024, 6, 1e4, 1e6, 1.0, 1,
        (None, 30.0)),
}
# fmt: on

every_variant = pytest.mark.parametrize("name", sorted(PUBLISHED))


def tiny(**changes) -> GemmaConfig:
    """A valid configuration, with changes."""
    return replace(
        GemmaConfig(
            family="gemma3_text",
            vocab_size=32,
            width=24,
            num_heads=4,
            head_width=8,
            num_kv_heads=2,
            feed_forward_width=20,
            layer_kinds=(LOCAL, GLOBAL),
            window=4,
            context_length=64,
            query_scalar=8.0,
        ),
        **changes,
    )


def test_every_published_size_is_there():
    assert set(VARIANTS) == set(PUBLISHED)


@every_variant
def test_variant_has_the_published_numbers(name):
    config = variant(name)
    assert (
        Published(
            parameters=config.parameter_count,
            layers=config.num_layers,
            width=config.width,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_width=config.head_width,
            feed_forward=config.feed_forward_width,
            vocabulary=config.vocab_size,
            context=config.context_length,
            window=config.window,
            every=config.layer_kinds.index(GLOBAL) + 1,
            local_theta=config.local_rope.theta,
            global_theta=config.global_rope.theta,
            factor=config.global_rope.factor,
            scale=config.query_scalar,
            caps=(config.attention_cap, config.final_cap),
        )
        == (PUBLISHED[name])
    )
    assert config.local_rope.factor == 1.0
    assert config.query_scale == pytest.approx(PUBLISHED[name].scale ** -0.5, rel=1e-15)


@every_variant
def test_variant_has_the_features_of_its_generation(name):
    config = variant(name)
    is_gemma2, is_gemma3 = name.startswith("gemma-2-"), name.startswith("gemma-3-")
    is_gemma3n, is_gemma4 = name.startswith("gemma-3n-"), name.startswith("gemma-4-")
    is_newer = is_gemma3n or is_gemma4
    assert config.has_post_norms is (is_gemma2 or is_gemma3 or is_newer)
    assert config.has_query_key_norm is (is_gemma3 or is_newer)
    assert config.has_value_norm is is_newer
    assert config.has_layer_scalar is is_gemma4
    assert config.global_rope.proportion == (0.25 if is_gemma4 else 1.0)
    assert (config.altup is not None, config.laurel_rank) == (
        is_gemma3n,
        64 if is_gemma3n else None,
    )
    assert config.norm_offset == (0.0 if is_newer else 1.0)
    assert (config.norm_epsilon, config.has_tied_head) == (1e-6, True)
    assert (config.pad_id, config.eos_ids, config.bos_id) == (0, (1,), 2)


@every_variant
def test_layer_i_is_global_when_i_plus_1_is_a_multiple_of_the_period(name):
    config, every = variant(name), PUBLISHED[name].every
    assert [spec.kind for spec in config.layers] == [
        GLOBAL if (i + 1) % every == 0 else LOCAL for i in range(config.num_layers)
    ]


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("gemma-2b", [GLOBAL], [GLOBAL]),
        ("gemma-2-2b", [LOCAL, GLOBAL], [LOCAL, GLOBAL]),
        ("gemma-2-9b", [LOCAL, GLOBAL], [LOCAL, GLOBAL]),
        ("gemma-2-27b", [LOCAL, GLOBAL], [LOCAL, GLOBAL]),
        ("vaultgemma-1b", [GLOBAL], [GLOBAL, GLOBAL]),
        ("gemma-3-270m", [LOCAL] * 5 + [GLOBAL], [LOCAL, GLOBAL]),
        ("gemma-3-1b", [LOCAL] * 5 + [GLOBAL], [GLOBAL, LOCAL, LOCAL]),
        ("gemma-3-4b", [LOCAL] * 5 + [GLOBAL], [GLOBAL, LOCAL, LOCAL, LOCAL, LOCAL]),
        ("gemma-3-12b", [LOCAL] * 5 + [GLOBAL], [LOCAL, GLOBAL]),
        ("gemma-3-27b", [LOCAL] * 5 + [GLOBAL], [GLOBAL, LOCAL, LOCAL]),
    ],
)
def test_first_and_last_layers(name, first, last):
    kinds = list(variant(name).layer_kinds)
    assert (kinds[: len(first)], kinds[-len(last) :]) == (first, last)


@pytest.mark.parametrize(
    ("name", "kv_heads", "values_are_keys", "experts"),
    [
        ("gemma-4-e2b", 1, False, None),
        ("gemma-4-e4b", 2, False, None),
        ("gemma-4-12b", 1, True, None),
        ("gemma-4-26b-a4b", 2, True, ExpertsSpec(count=128, chosen=8, width=704)),
        ("gemma-4-31b", 4, True, None),
    ],
)
def test_global_layers_of_gemma_4(name, kv_heads, values_are_keys, experts):
    for spec in variant(name).layers:
        expected = (512, kv_heads, values_are_keys) if spec.kind is GLOBAL else None
        found = (spec.head_width, spec.num_kv_heads, spec.values_are_keys)
        assert found == (expected or (256, variant(name).num_kv_heads, False))
    assert variant(name).experts == experts


@pytest.mark.parametrize(
    ("name", "owners", "local", "everywhere", "last_width"),
    [
        ("gemma-3n-e2b", 20, 18, 19, 8192),
        ("gemma-3n-e4b", 20, 18, 19, 16384),
        # Layers without keys are twice as wide here, and here only.
        ("gemma-4-e2b", 15, 13, 14, 12288),
        ("gemma-4-e4b", 24, 22, 23, 10240),
    ],
)
def test_layers_without_keys(name, owners, local, everywhere, last_width):
    config = variant(name)
    assert {spec.donor for spec in config.layers[:owners]} == {None}
    for spec in config.layers[owners:]:
        assert spec.donor == (local if spec.kind is LOCAL else everywhere)
        assert spec.feed_forward_width == last_width
    assert {spec.feed_forward_width for spec in config.layers[:owners]} == {
        PUBLISHED[name].feed_forward
    }


def test_parts_of_small_models():
    with_inputs = [name for name, config in VARIANTS.items() if config.per_layer_input is not None]
    assert with_inputs == ["gemma-3n-e2b", "gemma-3n-e4b", "gemma-4-e2b", "gemma-4-e4b"]
    for name in with_inputs:
        inputs = PerLayerInputSpec(
            width=256, vocab_size=262_144, has_rounded_scales=name.startswith("gemma-3n")
        )
        assert variant(name).per_layer_input == inputs
    for name in with_inputs[:2]:
        cutoffs = [spec.gate_cutoff for spec in variant(name).layers]
        assert cutoffs[:10] == pytest.approx([1.6448536] * 10, abs=1e-7)
        assert set(cutoffs[10:]) == {None}


def test_a_layer_knows_everything_about_itself():
    local, last_of_six = (variant("gemma-3-4b").layers[i] for i in (4, 5))
    assert local == LayerSpec(
        kind=LOCAL,
        window=1024,
        head_width=256,
        num_kv_heads=4,
        rope=RopeSpec(theta=1e4, factor=1.0),
        feed_forward_width=10240,
    )
    assert last_of_six == replace(
        local, kind=GLOBAL, window=None, rope=RopeSpec(theta=1e6, factor=8.0)
    )


def test_a_window_that_no_layer_uses_reaches_no_layer():
    assert {spec.window for spec in variant("vaultgemma-1b").layers} == {None}


def test_parameters_counted_by_hand():
    # Table 32*24; each layer: q and o 2*24*32, k and v 2*24*16, gate, up and down 3*24*20, norms.
    layer = 2 * 24 * 32 + 2 * 24 * 16 + 3 * 24 * 20
    assert tiny().parameter_count == 32 * 24 + 2 * (layer + 2 * 24) + 24
    assert tiny(has_post_norms=True).parameter_count == 32 * 24 + 2 * (layer + 4 * 24) + 24
    assert tiny(has_query_key_norm=True).parameter_count == (
        32 * 24 + 2 * (layer + 2 * 24 + 2 * 8) + 24
    )
    assert tiny(has_tied_head=False).parameter_count == 2 * 32 * 24 + 2 * (layer + 2 * 24) + 24


def test_unknown_variant_names_all_there_are():
    with pytest.raises(UnknownModelError) as caught:
        variant("gemma-3-2b")
    message = str(caught.value)
    assert "'gemma-3-2b'" in message
    assert all(name in message for name in PUBLISHED)


def test_a_configuration_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        tiny().width = 25  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"width": -24}, "width must be at least 1, got -24"),
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"num_kv_heads": 0}, "num_kv_heads must be at least 1, got 0"),
        ({"num_kv_heads": 3}, "num_heads must be a multiple of num_kv_heads, got 4 and 3"),
        ({"num_kv_heads": 8}, "num_heads must be a multiple of num_kv_heads, got 4 and 8"),
        ({"head_width": 7}, "head_width must be even for rotary embedding, got 7"),
        ({"feed_forward_width": 0}, "feed_forward_width must be at least 1, got 0"),
        ({"context_length": 0}, "context_length must be at least 1, got 0"),
        ({"layer_kinds": ()}, "there must be at least one layer, got none"),
        ({"window": None}, "local layers need a window of at least 1, got None"),
        ({"window": 0}, "local layers need a window of at least 1, got 0"),
        ({"query_scalar": 0.0}, "query_scalar must be above 0 and finite, got 0.0"),
        ({"query_scalar": float("inf")}, "query_scalar must be above 0 and finite, got inf"),
        ({"norm_epsilon": float("nan")}, "norm_epsilon must be above 0 and finite, got nan"),
        ({"attention_cap": 0.0}, "attention_cap must be above 0 and finite, got 0.0"),
        # inf * tanh(x / inf) would be nan, and not the identity that a writer may have meant.
        ({"final_cap": float("inf")}, "final_cap must be above 0 and finite, got inf"),
        ({"local_rope": RopeSpec(theta=0.0)}, "local_rope.theta must be above 0 and finite"),
        ({"global_rope": RopeSpec(factor=-8.0)}, "global_rope.factor must be above 0 and finite"),
        ({"pad_id": -1}, "pad_id must be in 0..31, got [-1]"),
        ({"bos_id": 32}, "bos_id must be in 0..31, got [32]"),
        ({"eos_ids": (1, 106)}, "eos_ids must be in 0..31, got [106]"),
    ],
)
def test_contradiction_is_refused(changes, fault):
    with pytest.raises(ConfigError) as caught:
        tiny(**changes)
    assert fault in str(caught.value)
    assert str(caught.value).count(";") == 0, "one mistake, one fault"


def test_all_contradictions_are_listed_at_once():
    with pytest.raises(ConfigError) as caught:
        tiny(vocab_size=0, head_width=7, window=None, final_cap=-1.0, num_kv_heads=3)
    message = str(caught.value)
    for name in ("vocab_size", "head_width", "window", "final_cap", "num_kv_heads"):
        assert name in message


def test_a_window_is_needed_by_local_layers_only():
    assert tiny(layer_kinds=(GLOBAL,), window=None).window is None


@pytest.mark.parametrize(("num_layers", "period"), [(4, 0), (4, -6), (MOST_LAYERS + 1, 6)])
def test_layers_that_cannot_be(num_layers, period):
    with pytest.raises(ConfigError):
        periodic_kinds(num_layers, period=period)


# Who may ask for the generation: what reads and writes files. Block code asks for numbers.
BLOCK_CODE = {
    "model": """transformer layers attention cache experts implementations laurel layer_spec
        numerics per_layer_input streams trace""",
    "engine": "forward layered programs state steps",
}
GENERATION_FREE = [
    *(
        ROOT / "refimpl" / room / f"{name}.py"
        for room, names in BLOCK_CODE.items()
        for name in names.split()
    ),
    *sorted((ROOT / "kernels" / "refimpl_kernels").glob("*.py")),
]
GENERATIONS = {*FAMILIES, *NESTED, *PUBLISHED}


def generation_questions(source: str) -> list[str]:
    """Places in a module that ask for the generation, or spell one in a string."""
    return [
        ast.unparse(node)
        for node in ast.walk(ast.parse(source))
        if (isinstance(node, ast.Attribute) and node.attr == "family")
        or (isinstance(node, ast.Constant) and node.value in {"family", *GENERATIONS})
    ]


@pytest.mark.parametrize("path", GENERATION_FREE, ids=lambda path: path.stem)
def test_block_code_never_asks_for_the_generation(path):
    assert generation_questions(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "snippet",
    [
        "if config.family == 'x': pass",
        "kind = getattr(config, 'family')",
        "is_new = name == 'gemma2'",
        "match name:\n    case 'gemma3_text': pass",
    ],
)
def test_a_question_for_the_generation_would_be_found(snippet):
    assert len(generation_questions(snippet)) == 1
