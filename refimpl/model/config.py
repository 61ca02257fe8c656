"""What a Gemma model is, as one frozen value.

Owns the architecture's numbers and nothing else: no dtype, no kernel choice, no sampling. Whatever
differs from layer to layer is resolved here, once, into a tuple of `LayerSpec`, so that the layers'
code asks for numbers and never for a generation.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property

from refimpl.errors import ConfigError

# Far above any model. A damaged count must not become a tuple that fills the memory.
MOST_LAYERS = 1024


class AttentionKind(StrEnum):
    """How far back a layer looks."""

    LOCAL = "local"
    GLOBAL = "global"


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary embedding of one kind of layer: the base of its wavelengths, and their stretching.

    Attributes:
        theta: base of the geometric series of timescales.
        factor: linear position interpolation, 1.0 for none.
    """

    theta: float = 10_000.0
    factor: float = 1.0


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """Everything one decoder layer needs to know about itself.

    Attributes:
        kind: local or global attention.
        window: number of keys a query sees, itself included; None for all.
        head_width: width of one head.
        num_kv_heads: key/value heads.
        rope: rotary embedding.
        feed_forward_width: width of the gated hidden layer.
    """

    kind: AttentionKind
    window: int | None
    head_width: int
    num_kv_heads: int
    rope: RopeSpec
    feed_forward_width: int


@dataclass(frozen=True, kw_only=True)
class GemmaConfig:
    """The architecture of one Gemma decoder.

    Attributes:
        family: Hugging Face's model type of the text decoder. For reading and writing files only.
        vocab_size: rows of the embedding, which may exceed the tokenizer's size (padding rows).
        width: of the residual stream.
        num_heads: query heads; their total width need not be `width`.
        head_width: width of one head.
        num_kv_heads: key/value heads.
        feed_forward_width: width of the gated hidden layer.
        layer_kinds: local or global, for each layer.
        window: keys a local layer sees, the query's own included.
        context_length: positions the model was made for.
        local_rope, global_rope: rotary embedding of each kind of layer.
        query_scalar: scores are scaled by query_scalar ** -0.5. Not always the head width.
        attention_cap: soft cap of attention scores, or None.
        final_cap: soft cap of logits, or None.
        has_query_key_norm: RMSNorm on every query and key head before the rotary embedding.
        has_post_norms: RMSNorm on what attention and feed-forward add to the residual stream.
        norm_offset: added to every norm's stored scale: 1.0 in Hugging Face files, 0.0 in GGUF.
        norm_epsilon: added to the mean square.
        has_tied_head: the head is the embedding.
        pad_id, bos_id: special ids. eos_ids: every id that ends a text.
    """

    family: str
    vocab_size: int
    width: int
    num_heads: int
    head_width: int
    num_kv_heads: int
    feed_forward_width: int
    layer_kinds: tuple[AttentionKind, ...]
    window: int | None
    context_length: int
    local_rope: RopeSpec = field(default_factory=RopeSpec)
    global_rope: RopeSpec = field(default_factory=RopeSpec)
    query_scalar: float
    attention_cap: float | None = None
    final_cap: float | None = None
    has_query_key_norm: bool = False
    has_post_norms: bool = False
    norm_offset: float = 1.0
    norm_epsilon: float = 1e-6
    has_tied_head: bool = True
    pad_id: int = 0
    bos_id: int = 2
    eos_ids: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        """Refuse numbers that contradict each other.

        Raises:
            ConfigError: listing every contradiction.
        """
        faults = [*self._size_faults(), *self._number_faults(), *self._id_faults()]
        if faults:
            raise ConfigError("this is not a Gemma configuration: " + "; ".join(faults))

    def _size_faults(self) -> Iterator[str]:
        for name in (
            "vocab_size",
            "width",
            "num_heads",
            "head_width",
            "num_kv_heads",
            "feed_forward_width",
            "context_length",
        ):
            if getattr(self, name) < 1:
                yield f"{name} must be at least 1, got {getattr(self, name)}"
        if not self.layer_kinds:
            yield "there must be at least one layer, got none"
        if self.num_kv_heads > 0 and self.num_heads % self.num_kv_heads:
            yield (
                f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} and "
                f"{self.num_kv_heads}"
            )
        if self.head_width % 2:
            yield f"head_width must be even for rotary embedding, got {self.head_width}"
        if AttentionKind.LOCAL in self.layer_kinds and (self.window is None or self.window < 1):
            yield f"local layers need a window of at least 1, got {self.window}"

    def _number_faults(self) -> Iterator[str]:
        numbers = {
            "query_scalar": self.query_scalar,
            "norm_epsilon": self.norm_epsilon,
            "attention_cap": self.attention_cap,
            "final_cap": self.final_cap,
            "local_rope.theta": self.local_rope.theta,
            "local_rope.factor": self.local_rope.factor,
            "global_rope.theta": self.global_rope.theta,
            "global_rope.factor": self.global_rope.factor,
        }
        for name, number in numbers.items():
            if number is not None and not 0 < number < math.inf:
                yield f"{name} must be above 0 and finite, got {number}"

    def _id_faults(self) -> Iterator[str]:
        if self.vocab_size < 1:
            return
        # An id past the last row of the table would read, or wait for, a token that there is not.
        for name, ids in (
            ("pad_id", (self.pad_id,)),
            ("bos_id", (self.bos_id,)),
            ("eos_ids", self.eos_ids),
        ):
            strange = [i for i in ids if not 0 <= i < self.vocab_size]
            if strange:
                yield f"{name} must be in 0..{self.vocab_size - 1}, got {strange}"

    @property
    def num_layers(self) -> int:
        return len(self.layer_kinds)

    @property
    def query_scale(self) -> float:
        """What attention scores are multiplied by."""
        return self.query_scalar**-0.5

    @cached_property
    def layers(self) -> tuple[LayerSpec, ...]:
        """One specification for each layer, in order."""
        return tuple(self._layer(kind) for kind in self.layer_kinds)

    def _layer(self, kind: AttentionKind) -> LayerSpec:
        is_local = kind is AttentionKind.LOCAL
        return LayerSpec(
            kind=kind,
            window=self.window if is_local else None,
            head_width=self.head_width,
            num_kv_heads=self.num_kv_heads,
            rope=self.local_rope if is_local else self.global_rope,
            feed_forward_width=self.feed_forward_width,
        )

    @property
    def parameter_count(self) -> int:
        """Parameters of the text decoder, a tied head counted once."""
        norms_of_width = 4 if self.has_post_norms else 2
        total = self.vocab_size * self.width * (1 if self.has_tied_head else 2) + self.width
        for layer in self.layers:
            query_width = self.num_heads * layer.head_width
            key_width = layer.num_kv_heads * layer.head_width
            total += self.width * (2 * query_width + 2 * key_width)
            total += 3 * self.width * layer.feed_forward_width
            total += norms_of_width * self.width
            total += 2 * layer.head_width if self.has_query_key_norm else 0
        return total


def periodic_kinds(num_layers: int, *, period: int) -> tuple[AttentionKind, ...]:
    """Layer i is global iff (i + 1) is a multiple of the period, so a period of 1 is all global.

    >>> [kind.value for kind in periodic_kinds(4, period=2)]
    ['local', 'global', 'local', 'global']

    Raises:
        ConfigError: a period below 1, or too many layers.
    """
    if period < 1:
        raise ConfigError(
            f"local and global layers must alternate with a period of 1 or more, got {period}"
        )
    if num_layers > MOST_LAYERS:
        raise ConfigError(f"there must be at most {MOST_LAYERS} layers, got {num_layers}")
    return tuple(
        AttentionKind.LOCAL if (i + 1) % period else AttentionKind.GLOBAL for i in range(num_layers)
    )
