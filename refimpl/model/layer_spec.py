"""What one decoder layer, and each optional part of a decoder, needs to know about itself.

Owns the small frozen values that `GemmaConfig` is made of and that the layers' code reads. A part
that a model does not have is None, so that code asks for parts and never for a generation.
"""

from dataclasses import dataclass
from enum import StrEnum


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
        proportion: share of the pairs of dimensions that are rotated, the fastest first; the
            others stay as they are ("p-RoPE" of Gemma 4).
    """

    theta: float = 10_000.0
    factor: float = 1.0
    proportion: float = 1.0


@dataclass(frozen=True, kw_only=True)
class PerLayerInputSpec:
    """An embedding of each token for each layer, beside the stream (Gemma 3n, Gemma 4 E2B, E4B).

    Attributes:
        width: of what one layer gets.
        vocab_size: rows of the table. An id beyond them gets the row of id 0.
        has_rounded_scales: whether the scales of what is projected and of the mean are rounded to
            the activation type (Gemma 3n) or kept in float32 (Gemma 4).
    """

    width: int
    vocab_size: int
    has_rounded_scales: bool = False


@dataclass(frozen=True, kw_only=True)
class ExpertsSpec:
    """A mixture of experts beside the dense feed-forward (Gemma 4 26B-A4B).

    Attributes:
        count: experts in a layer.
        chosen: experts that see one token.
        width: of the gated hidden layer of each expert.
    """

    count: int
    chosen: int
    width: int


@dataclass(frozen=True, kw_only=True)
class AltUpSpec:
    """Alternating updates: several residual streams, of which layers compute one (Gemma 3n).

    Attributes:
        streams: how many there are.
        active: the one that layers compute; the others are predicted and corrected.
    """

    streams: int
    active: int = 0


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """Everything in which one decoder layer can differ from another.

    Attributes:
        kind: local or global attention.
        window: number of keys a query sees, itself included; None for all.
        head_width: width of one head.
        num_kv_heads: key/value heads.
        rope: rotary embedding.
        feed_forward_width: width of the gated hidden layer.
        values_are_keys: whether values are the keys before their norm and rotation, without a
            projection of their own.
        donor: the earlier layer whose keys and values this one reads; None for its own.
        gate_cutoff: the gate keeps what lies more than so many standard deviations above its mean
            (in a normal distribution, 1.645 keeps 5 %); None keeps all.
    """

    kind: AttentionKind
    window: int | None
    head_width: int
    num_kv_heads: int
    rope: RopeSpec
    feed_forward_width: int
    values_are_keys: bool = False
    donor: int | None = None
    gate_cutoff: float | None = None
