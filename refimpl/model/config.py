"""What a Gemma model is, as one frozen value.

Owns the architecture's numbers and nothing else: no dtype, no kernel choice, no sampling. Whatever
differs from layer to layer is resolved here, once, into a tuple of `LayerSpec`, so that the layers'
code asks for numbers and never for a generation.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property

from refimpl.errors import ConfigError
from refimpl.model.layer_spec import (
    AltUpSpec,
    AttentionKind,
    ExpertsSpec,
    LayerSpec,
    PerLayerInputSpec,
    RopeSpec,
)
from refimpl.model.parameter_count import parameter_count

# Far above any model. A damaged count must not become a tuple that fills the memory.
MOST_LAYERS = 1024


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
        layer_feed_forward_widths: the same for each layer, where layers differ; else None.
        layer_kinds: local or global, for each layer.
        window: keys a local layer sees, the query's own included.
        context_length: positions the model was made for.
        global_head_width, global_num_kv_heads: of global layers, where those differ; else None.
        values_are_keys: global layers have no projection of values: they take the raw keys.
        num_sharing_layers: how many of the last layers have no keys and values of their own, but
            read those of the last layer of their kind that has.
        local_rope, global_rope: rotary embedding of each kind of layer.
        query_scalar: scores are scaled by query_scalar ** -0.5. Not always the head width.
        attention_cap: soft cap of attention scores, or None.
        final_cap: soft cap of logits, or None.
        has_query_key_norm: RMSNorm on every query and key head before the rotary embedding.
        has_value_norm: RMSNorm without a scale on every value head.
        has_post_norms: RMSNorm on what attention and feed-forward add to the residual stream.
        norm_offset: added to every norm's stored scale: 1.0 in Hugging Face files, 0.0 in GGUF.
        norm_epsilon: added to the mean square.
        has_layer_scalar: the stream is multiplied by a learned number after each layer.
        gate_cutoffs: for each layer how sparse its gate is, see `LayerSpec.gate_cutoff`; or None.
        per_layer_input, experts, altup: parts that some models have; else None.
        laurel_rank: of the learned residual beside attention ("LAuReL"), or None.
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
    layer_feed_forward_widths: tuple[int, ...] | None = None
    layer_kinds: tuple[AttentionKind, ...]
    window: int | None
    context_length: int
    global_head_width: int | None = None
    global_num_kv_heads: int | None = None
    values_are_keys: bool = False
    num_sharing_layers: int = 0
    local_rope: RopeSpec = field(default_factory=RopeSpec)
    global_rope: RopeSpec = field(default_factory=RopeSpec)
    query_scalar: float
    attention_cap: float | None = None
    final_cap: float | None = None
    has_query_key_norm: bool = False
    has_value_norm: bool = False
    has_post_norms: bool = False
    norm_offset: float = 1.0
    norm_epsilon: float = 1e-6
    has_layer_scalar: bool = False
    gate_cutoffs: tuple[float | None, ...] | None = None
    per_layer_input: PerLayerInputSpec | None = None
    experts: ExpertsSpec | None = None
    altup: AltUpSpec | None = None
    laurel_rank: int | None = None
    has_tied_head: bool = True
    pad_id: int = 0
    bos_id: int = 2
    eos_ids: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        """Refuse numbers that contradict each other.

        Raises:
            ConfigError: listing every contradiction.
        """
        faults = [
            *self._size_faults(),
            *self._layer_faults(),
            *self._number_faults(),
            *self._id_faults(),
        ]
        if faults:
            raise ConfigError("this is not a Gemma configuration: " + "; ".join(faults))

    def _size_faults(self) -> Iterator[str]:
        for name, size in self._sizes().items():
            if size is not None and size < 1:
                yield f"{name} must be at least 1, got {size}"
        if not self.layer_kinds:
            yield "there must be at least one layer, got none"
        for heads in {self.num_kv_heads, self._global_num_kv_heads}:
            if heads > 0 and self.num_heads % heads:
                yield (
                    f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} and "
                    f"{heads}"
                )
        for width in {self.head_width, self._global_head_width}:
            if width % 2:
                yield f"head_width must be even for rotary embedding, got {width}"
        if AttentionKind.LOCAL in self.layer_kinds and (self.window is None or self.window < 1):
            yield f"local layers need a window of at least 1, got {self.window}"

    def _sizes(self) -> dict[str, int | None]:
        names = (
            "vocab_size",
            "width",
            "num_heads",
            "head_width",
            "num_kv_heads",
            "feed_forward_width",
            "context_length",
            "global_head_width",
            "global_num_kv_heads",
            "laurel_rank",
        )
        widths = self.layer_feed_forward_widths or ()
        parts = {"per_layer_input": self.per_layer_input, "experts": self.experts}
        return {
            **{name: getattr(self, name) for name in names},
            **{f"layer_feed_forward_widths[{i}]": width for i, width in enumerate(widths)},
            **{
                f"{name}.{key}": size
                for name, part in parts.items()
                if part is not None
                for key, size in asdict(part).items()
                if not isinstance(size, bool)
            },
        }

    def _layer_faults(self) -> Iterator[str]:
        for name in ("layer_feed_forward_widths", "gate_cutoffs"):
            listed = getattr(self, name)
            if listed is not None and len(listed) != self.num_layers:
                yield f"{name} must name all {self.num_layers} layers, got {len(listed)}"
        owners = self.num_layers - self.num_sharing_layers
        if not 0 <= self.num_sharing_layers < max(self.num_layers, 1):
            yield (
                f"num_sharing_layers must be 0 or more and leave a layer with keys, got "
                f"{self.num_sharing_layers} of {self.num_layers}"
            )
        elif not set(self.layer_kinds[owners:]) <= set(self.layer_kinds[:owners]):
            yield "a layer without keys must come after one of its kind that has keys"
        if self.experts is not None and self.experts.chosen > self.experts.count:
            yield (
                f"experts.chosen must be at most experts.count {self.experts.count}, got "
                f"{self.experts.chosen}"
            )
        altup = self.altup
        if altup is not None and (altup.streams < 2 or not 0 <= altup.active < altup.streams):
            yield (
                "altup must have 2 streams or more, one of them active, got "
                f"{altup.streams} and {altup.active}"
            )

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
        for i, cutoff in enumerate(self.gate_cutoffs or ()):
            if cutoff is not None and not math.isfinite(cutoff):
                yield f"gate_cutoffs[{i}] must be finite, got {cutoff}"
        for name in ("local_rope", "global_rope"):
            proportion = getattr(self, name).proportion
            if not 0 < proportion <= 1:
                yield f"{name}.proportion must be above 0 and at most 1, got {proportion}"

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
        return tuple(self._layer(index, kind) for index, kind in enumerate(self.layer_kinds))

    def _layer(self, index: int, kind: AttentionKind) -> LayerSpec:
        is_local = kind is AttentionKind.LOCAL
        widths, cutoffs = self.layer_feed_forward_widths, self.gate_cutoffs
        return LayerSpec(
            kind=kind,
            window=self.window if is_local else None,
            head_width=self.head_width if is_local else self._global_head_width,
            num_kv_heads=self.num_kv_heads if is_local else self._global_num_kv_heads,
            rope=self.local_rope if is_local else self.global_rope,
            feed_forward_width=self.feed_forward_width if widths is None else widths[index],
            values_are_keys=self.values_are_keys and not is_local,
            donor=self._donor(index, kind),
            gate_cutoff=None if cutoffs is None else cutoffs[index],
        )

    def _donor(self, index: int, kind: AttentionKind) -> int | None:
        """The last layer of this kind that has keys and values of its own, if this one has not."""
        owners = self.num_layers - self.num_sharing_layers
        if index < owners:
            return None
        return max(i for i in range(owners) if self.layer_kinds[i] is kind)

    @property
    def _global_head_width(self) -> int:
        return self.head_width if self.global_head_width is None else self.global_head_width

    @property
    def _global_num_kv_heads(self) -> int:
        return self.num_kv_heads if self.global_num_kv_heads is None else self.global_num_kv_heads

    @property
    def parameter_count(self) -> int:
        """Parameters of the text decoder, a tied head counted once."""
        return parameter_count(self)


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
