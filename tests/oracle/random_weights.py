"""Random weights for a small model of any configuration, to try the oracle's properties on."""

from dataclasses import dataclass

import numpy as np

from tests.oracle.arrays import Floats
from tests.oracle.config import LayerConfig, OracleConfig
from tests.oracle.names import weight_names


@dataclass(frozen=True)
class Widths:
    """What a configuration leaves to the weights."""

    d: int = 6
    f: int = 10
    v: int = 17
    per_layer: int = 4
    per_layer_vocabulary: int = 13
    experts: int = 5
    expert_f: int = 3
    laurel_rank: int = 2


def random_weights(
    config: OracleConfig, *, widths: Widths | None = None, seed: int = 0
) -> dict[str, Floats]:
    """A weight for every name that the configuration asks for, in float64."""
    random = np.random.default_rng(seed)
    widths = Widths() if widths is None else widths
    return {
        name: random.normal(scale=0.7, size=_shape(config, widths, name))
        for name in sorted(weight_names(config))
    }


def _shape(config: OracleConfig, widths: Widths, name: str) -> tuple[int, ...]:
    first, *rest = name.removesuffix(".weight").split(".")
    if first == "layers":
        of_layer = _layer_shapes(config.layers[int(rest[0])], widths)
        return of_layer.get(".".join(rest[1:]), (widths.d,))
    packed = len(config.layers) * widths.per_layer
    return {
        "embed_tokens": (widths.v, widths.d),
        "embed_tokens_per_layer": (widths.per_layer_vocabulary, packed),
        "per_layer_model_projection": (packed, widths.d),
        "per_layer_projection_norm": (widths.per_layer,),
        "altup_projections": (widths.d, widths.d),
        "altup_unembed_projections": (widths.d, widths.d),
    }.get(first, (widths.d,))


def _layer_shapes(layer: LayerConfig, widths: Widths) -> dict[str, tuple[int, ...]]:
    """Of everything but norms and scales over d."""
    d, f, streams = widths.d, widths.f, layer.streams
    queries, keys = layer.heads * layer.head_width, layer.kv_heads * layer.head_width
    return {
        "self_attn.q_proj": (queries, d),
        "self_attn.k_proj": (keys, d),
        "self_attn.v_proj": (keys, d),
        "self_attn.o_proj": (d, queries),
        "self_attn.q_norm": (layer.head_width,),
        "self_attn.k_norm": (layer.head_width,),
        "mlp.gate_proj": (f, d),
        "mlp.up_proj": (f, d),
        "mlp.down_proj": (d, f),
        "layer_scalar": (1,),
        "per_layer_input_gate": (widths.per_layer, d),
        "per_layer_projection": (d, widths.per_layer),
        "router.proj": (widths.experts, d),
        "router.per_expert_scale": (widths.experts,),
        "experts.gate_up_proj": (widths.experts, 2 * widths.expert_f, d),
        "experts.down_proj": (widths.experts, d, widths.expert_f),
        "laurel.linear_left": (widths.laurel_rank, d),
        "laurel.linear_right": (d, widths.laurel_rank),
        "altup.modality_router": (streams, d),
        "altup.prediction_coefs": (streams**2, streams),
        "altup.correction_coefs": (streams, streams),
    }
