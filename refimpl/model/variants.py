"""The published sizes of Gemma, by name.

Numbers: google/gemma_pytorch `gemma/config.py`, google-deepmind/gemma `gm/nn`, and Hugging Face's
conversion scripts. A test holds each variant's parameter count against the published one.
"""

from collections.abc import Mapping
from types import MappingProxyType

from refimpl.errors import UnknownModelError
from refimpl.model.config import GemmaConfig, periodic_kinds
from refimpl.model.layer_spec import AttentionKind, RopeSpec


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
