"""What one forward pass must know about a Gemma model."""

from dataclasses import dataclass
from typing import Literal

LayerKind = Literal["sliding_attention", "full_attention"]


@dataclass(frozen=True)
class LayerConfig:
    """One decoder layer, with everything that depends on its place or kind resolved."""

    heads: int
    kv_heads: int
    head_width: int
    query_scale: float  # what query . key is multiplied by
    window: int | None  # keys a query sees, itself included; None: all before it
    rope_base: float
    rope_factor: float  # positions are divided by it (linear interpolation); 1.0: unscaled
    score_cap: float | None
    normalizes_queries_and_keys: bool
    # Names of weights; None: the model has no such norm. The norm before attention is always
    # `input_layernorm`.
    norm_after_attention: str | None
    norm_before_mlp: str
    norm_after_mlp: str | None

    # The rest came with Gemma 3n and 4. By default: as before them.
    rope_proportion: float = 1.0  # the share of pairs that turn at all
    normalizes_values: bool = False
    values_are_keys: bool = False  # no projection of values: the projected keys are used
    donor: int | None = None  # the layer whose keys and values this one reads; None: its own
    gate_sparsity: float = 0.0  # the share of the feed-forward gate that is to be zero
    experts_per_token: int = 0  # 0: no experts, and no router
    has_per_layer_input: bool = False
    has_laurel: bool = False
    has_scalar: bool = False  # one number that the stream is multiplied by at the end
    streams: int = 1  # more than one: they are predicted and corrected by AltUp


@dataclass(frozen=True)
class OracleConfig:
    """A whole model. Widths that the weights show are read off the weights: d, f, v, the number
    of experts and their width, the width of per-layer inputs and the rank of LAuReL.
    """

    layers: tuple[LayerConfig, ...]
    norm_epsilon: float
    logit_cap: float | None
    norm_offset: float = 1.0  # added to every norm's weight

    @property
    def streams(self) -> int:
        """Kept side by side; as many in every layer."""
        return self.layers[0].streams

    @property
    def has_per_layer_inputs(self) -> bool:
        return any(layer.has_per_layer_input for layer in self.layers)
