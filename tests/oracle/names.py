"""The names of weights: Hugging Face's, without the prefix in front of "layers."."""

from collections.abc import Mapping

import numpy as np

from tests.oracle.arrays import Floats
from tests.oracle.config import LayerConfig, OracleConfig

Weights = Mapping[str, np.ndarray]

_PER_LAYER = ("per_layer_input_gate", "per_layer_projection", "post_per_layer_input_norm")
_LAUREL = ("laurel.linear_left", "laurel.linear_right", "laurel.post_laurel_norm")
_ALTUP = tuple(
    f"altup.{name}"
    for name in ("correction_coefs", "prediction_coefs", "modality_router", "router_norm")
)
_EXPERT_NORMS = tuple(
    f"{name}_feedforward_layernorm_{which}"
    for name, which in (("pre", 2), ("post", 1), ("post", 2))
)
_EXPERTS = ("router.scale", "router.per_expert_scale", "experts.gate_up_proj", "experts.down_proj")


def weight_names(config: OracleConfig) -> set[str]:
    """Every weight that is read (a tied head is no weight of its own)."""
    modules = ["embed_tokens", "norm"]
    if config.has_per_layer_inputs:
        modules += ["embed_tokens_per_layer", "per_layer_model_projection"]
        modules += ["per_layer_projection_norm"]
    for index in range(config.streams - 1):
        modules += [f"altup_projections.{index}", f"altup_unembed_projections.{index}"]

    names = {f"{module}.weight" for module in modules}
    for index, layer in enumerate(config.layers):
        names |= {f"layers.{index}.{name}" for name in _layer_names(layer)}
    return names


def unread_names(config: OracleConfig) -> set[str]:
    """Weights that released files may hold and no layer reads: layers that take keys and values
    from a donor were published with projections of their own.
    """
    modules = ("k_proj", "v_proj", "k_norm", "v_norm")
    return {
        f"layers.{index}.self_attn.{module}.weight"
        for index, layer in enumerate(config.layers)
        for module in modules
        if layer.donor is not None
    }


def check_names(config: OracleConfig, weights: Weights) -> None:
    """Raises ValueError unless these are the weights of this configuration."""
    expected = weight_names(config)
    got = set(weights) - {"lm_head.weight"} - unread_names(config)
    if got != expected:
        raise ValueError(
            f"weights: missing {sorted(expected - got)}, not understood {sorted(got - expected)}; "
            "the names are Hugging Face's without the prefix before 'layers.'"
        )


def layer_weights(weights: Weights, index: int) -> dict[str, Floats]:
    """One layer's weights in float64, named within the layer; never the whole model at once."""
    prefix = f"layers.{index}."
    return {
        name.removeprefix(prefix): np.asarray(value, np.float64)
        for name, value in weights.items()
        if name.startswith(prefix)
    }


def _layer_names(layer: LayerConfig) -> set[str]:
    """Named within the layer."""
    modules = ["input_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    norms = (layer.norm_after_attention, layer.norm_before_mlp, layer.norm_after_mlp)
    modules += [norm for norm in norms if norm is not None]
    modules += [f"self_attn.{module}" for module in _attention_modules(layer)]
    others: list[str] = []
    if layer.experts_per_token > 0:
        modules += ["router.proj", *_EXPERT_NORMS]
        others += _EXPERTS
    if layer.has_per_layer_input:
        modules += _PER_LAYER
    if layer.has_laurel:
        modules += _LAUREL
    if layer.streams > 1:
        modules += _ALTUP
        others += ["altup.correct_output_scale"]
    if layer.has_scalar:
        others += ["layer_scalar"]
    return {f"{module}.weight" for module in modules} | set(others)


def _attention_modules(layer: LayerConfig) -> list[str]:
    modules = ["q_proj", "o_proj"]
    if layer.normalizes_queries_and_keys:
        modules += ["q_norm"]
    if layer.donor is not None:
        return modules
    modules += ["k_proj"]
    if not layer.values_are_keys:
        modules += ["v_proj"]
    if layer.normalizes_queries_and_keys:
        modules += ["k_norm"]
    return modules
