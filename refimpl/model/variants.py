"""The published sizes of Gemma, by name.

Numbers: google/gemma_pytorch `gemma/config.py`, google-deepmind/gemma `gm/nn`, and Hugging Face's
conversion scripts. A test holds each variant's parameter count against the published one.
"""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from refimpl.errors import UnknownModelError
from refimpl.model.config import GemmaConfig, periodic_kinds
from refimpl.model.gate_sparsity import cutoff_of_share
from refimpl.model.layer_spec import (
    AltUpSpec,
    AttentionKind,
    ExpertsSpec,
    PerLayerInputSpec,
    RopeSpec,
)


def _gemma1(layers: int, width: int, heads: int, kv_heads: int, feed_forward: int) -> GemmaConfig:
    return GemmaConfig(
        family="gemma",
        vocab_size=256_000,
        width=width,
        num_heads=heads,
        head_width=256,
        num_kv_heads=kv_heads,
        feed_forward_width=feed_forward,
        layer_kinds=periodic_kinds(layers, period=1),
        window=None,
        context_length=8192,
        query_scalar=256.0,
    )


def _gemma2(
    layers: int,
    width: int,
    heads: int,
    kv_heads: int,
    feed_forward: int,
    *,
    head_width: int = 256,
    query_scalar: float = 256.0,
) -> GemmaConfig:
    return GemmaConfig(
        family="gemma2",
        vocab_size=256_000,
        width=width,
        num_heads=heads,
        head_width=head_width,
        num_kv_heads=kv_heads,
        feed_forward_width=feed_forward,
        layer_kinds=periodic_kinds(layers, period=2),
        window=4096,
        context_length=8192,
        query_scalar=query_scalar,
        attention_cap=50.0,
        final_cap=30.0,
        has_post_norms=True,
    )


def _gemma3(
    layers: int,
    width: int,
    heads: int,
    kv_heads: int,
    feed_forward: int,
    *,
    window: int = 1024,
    vocab_size: int = 262_208,
    context_length: int = 131_072,
    factor: float = 8.0,
    head_width: int = 256,
    query_scalar: float = 256.0,
) -> GemmaConfig:
    return GemmaConfig(
        family="gemma3_text",
        vocab_size=vocab_size,
        width=width,
        num_heads=heads,
        head_width=head_width,
        num_kv_heads=kv_heads,
        feed_forward_width=feed_forward,
        layer_kinds=periodic_kinds(layers, period=6),
        window=window,
        context_length=context_length,
        local_rope=RopeSpec(theta=1e4),
        global_rope=RopeSpec(theta=1e6, factor=factor),
        query_scalar=query_scalar,
        has_query_key_norm=True,
        has_post_norms=True,
    )


def _gemma3n(layers: int, feed_forward: int, *, num_sharing_layers: int) -> GemmaConfig:
    # The gates of the first ten layers let one in twenty through.
    cutoffs = [cutoff_of_share(0.95 if layer < 10 else 0.0) for layer in range(layers)]
    return GemmaConfig(
        family="gemma3n_text",
        vocab_size=262_400,
        width=2048,
        num_heads=8,
        head_width=256,
        num_kv_heads=2,
        feed_forward_width=feed_forward,
        layer_kinds=periodic_kinds(layers, period=5),
        window=512,
        context_length=32_768,
        num_sharing_layers=num_sharing_layers,
        local_rope=RopeSpec(theta=1e4),
        global_rope=RopeSpec(theta=1e6),
        query_scalar=1.0,
        final_cap=30.0,
        has_query_key_norm=True,
        has_value_norm=True,
        has_post_norms=True,
        norm_offset=0.0,
        gate_cutoffs=tuple(cutoffs),
        per_layer_input=PerLayerInputSpec(width=256, vocab_size=262_144, has_rounded_scales=True),
        altup=AltUpSpec(streams=4),
        laurel_rank=64,
    )


def _gemma4(
    layers: int,
    width: int,
    heads: int,
    kv_heads: int,
    feed_forward: int,
    *,
    family: str = "gemma4_text",
    period: int = 6,
    window: int = 1024,
    context_length: int = 262_144,
    global_num_kv_heads: int | None = None,
    experts: ExpertsSpec | None = None,
) -> GemmaConfig:
    return GemmaConfig(
        family=family,
        vocab_size=262_144,
        width=width,
        num_heads=heads,
        head_width=256,
        num_kv_heads=kv_heads,
        feed_forward_width=feed_forward,
        layer_kinds=periodic_kinds(layers, period=period),
        window=window,
        context_length=context_length,
        global_head_width=512,
        global_num_kv_heads=global_num_kv_heads,
        values_are_keys=global_num_kv_heads is not None,
        local_rope=RopeSpec(theta=1e4),
        global_rope=RopeSpec(theta=1e6, proportion=0.25),
        query_scalar=1.0,
        final_cap=30.0,
        has_query_key_norm=True,
        has_value_norm=True,
        has_post_norms=True,
        norm_offset=0.0,
        has_layer_scalar=True,
        experts=experts,
    )


def _small_gemma4(config: GemmaConfig, *, num_sharing_layers: int, is_wider: bool) -> GemmaConfig:
    """With what the two for telephones have: inputs for each layer, and layers without keys."""
    owners, width = config.num_layers - num_sharing_layers, config.feed_forward_width
    widths = (*[width] * owners, *[2 * width] * num_sharing_layers)
    return replace(
        config,
        layer_feed_forward_widths=widths if is_wider else None,
        num_sharing_layers=num_sharing_layers,
        per_layer_input=PerLayerInputSpec(width=256, vocab_size=262_144),
    )


_VAULTGEMMA_1B = GemmaConfig(
    family="vaultgemma",
    vocab_size=256_000,
    width=1152,
    num_heads=4,
    head_width=256,
    num_kv_heads=4,
    feed_forward_width=6912,
    layer_kinds=(AttentionKind.GLOBAL,) * 26,
    window=512,
    context_length=1024,
    query_scalar=256.0,
)

# Gemma 3's smaller two were trained at 32k without interpolation, on the tokenizer's exact size.
_SMALL_GEMMA3 = {"window": 512, "vocab_size": 262_144, "context_length": 32_768, "factor": 1.0}

VARIANTS: Mapping[str, GemmaConfig] = MappingProxyType(
    {
        "gemma-2b": _gemma1(18, 2048, 8, 1, 16384),
        "gemma-7b": _gemma1(28, 3072, 16, 16, 24576),
        "codegemma-2b": _gemma1(18, 2048, 8, 1, 16384),
        "codegemma-7b": _gemma1(28, 3072, 16, 16, 24576),
        "gemma-2-2b": _gemma2(26, 2304, 8, 4, 9216),
        "gemma-2-9b": _gemma2(42, 3584, 16, 8, 14336),
        # 27B scales by width / heads = 144, not by its head width of 128.
        "gemma-2-27b": _gemma2(46, 4608, 32, 16, 36864, head_width=128, query_scalar=144.0),
        "vaultgemma-1b": _VAULTGEMMA_1B,
        "gemma-3-270m": _gemma3(18, 640, 4, 1, 2048, **_SMALL_GEMMA3),
        "gemma-3-1b": _gemma3(26, 1152, 4, 1, 6912, **_SMALL_GEMMA3),
        "gemma-3-4b": _gemma3(34, 2560, 8, 4, 10240),
        "gemma-3-12b": _gemma3(48, 3840, 16, 8, 15360),
        # 27B scales by width / heads = 168, not by its head width of 128.
        "gemma-3-27b": _gemma3(62, 5376, 32, 16, 21504, head_width=128, query_scalar=168.0),
        "gemma-3n-e2b": _gemma3n(30, 8192, num_sharing_layers=10),
        "gemma-3n-e4b": _gemma3n(35, 16384, num_sharing_layers=15),
        # E2B has a global layer every five, and layers without keys are twice as wide.
        "gemma-4-e2b": _small_gemma4(
            _gemma4(35, 1536, 8, 1, 6144, period=5, window=512, context_length=131_072),
            num_sharing_layers=20,
            is_wider=True,
        ),
        "gemma-4-e4b": _small_gemma4(
            _gemma4(42, 2560, 8, 2, 10240, window=512, context_length=131_072),
            num_sharing_layers=18,
            is_wider=False,
        ),
        "gemma-4-12b": _gemma4(
            48, 3840, 16, 8, 15360, family="gemma4_unified_text", global_num_kv_heads=1
        ),
        "gemma-4-26b-a4b": _gemma4(
            30,
            2816,
            16,
            8,
            2112,
            global_num_kv_heads=2,
            experts=ExpertsSpec(count=128, chosen=8, width=704),
        ),
        "gemma-4-31b": _gemma4(60, 5376, 32, 16, 21504, global_num_kv_heads=4),
    }
)


def variant(name: str) -> GemmaConfig:
    """The configuration of a published size.

    Raises:
        UnknownModelError: there is none of that name; the message lists those there are.
    """
    if name not in VARIANTS:
        raise UnknownModelError(
            f"no variant is called {name!r}; there are {', '.join(sorted(VARIANTS))}"
        )
    return VARIANTS[name]
