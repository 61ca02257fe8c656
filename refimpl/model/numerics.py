"""Where each rounding of the forward pass happens.

A checkpoint is a function only together with its roundings: run in bfloat16, Hugging Face's Gemma
and DeepMind's differ, and both differ from float32. So the roundings are one frozen value beside
the configuration. Three presets:

    float32            everything in float32; what the others approximate, and the default
    hf_bfloat16        rounds where Hugging Face's eager attention rounds
    deepmind_bfloat16  rounds where google-deepmind/gemma rounds

    step            hf_bfloat16                             deepmind_bfloat16
    embedding       times sqrt(d), rounded to bfloat16      the same
    RMSNorm         in float32, rounded once                each step rounded
    rope angle      position * (1 / timescale)              position / timescale
    rope rotation   sine, cosine and products rounded       in float32, rounded once
    query scale     on the scores                           on the query
    softmax         in float32, weights rounded             each step rounded
    GELU            in float32, rounded once                each step rounded

Sources: transformers `models/gemma*/modeling_gemma*.py`; google-deepmind/gemma `gm/nn/_layers.py`,
`gm/nn/_modules.py`, `gm/math/_positional_embeddings.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import jax.numpy as jnp

from refimpl.errors import ConfigError

Rounding = Literal["float32", "activation"]


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """In which type each step of the forward pass is computed.

    Attributes:
        name: of the preset.
        activation: type of the residual stream and of every product's result.
        norm: "float32" rounds once, "activation" after each step.
        rope_angle: position * (1 / timescale), or position / timescale.
        rope: as `norm`, for sine, cosine and the rotation.
        query_scale: whether scores or the query are multiplied by the scale.
        softmax: as `norm`.
        gelu: as `norm`.
    """

    name: str
    activation: Literal["float32", "bfloat16"]
    norm: Rounding = "float32"
    rope_angle: Literal["multiply", "divide"] = "multiply"
    rope: Rounding = "float32"
    query_scale: Literal["scores", "query"] = "scores"
    softmax: Rounding = "float32"
    gelu: Rounding = "float32"

    @property
    def dtype(self) -> jnp.dtype:
        """The activation type, as jax spells it."""
        return jnp.dtype(self.activation)

    @property
    def compiler_options(self) -> dict[str, Any]:
        """What `jax.jit` must be told so that XLA keeps every rounding that is written down.

        By default XLA may skip the rounding between two fused bfloat16 operations, and which it
        fuses changes from backend to backend.
        """
        if self.activation == "float32":
            return {}
        return {"xla_allow_excess_precision": False}


FLOAT32 = Numerics(name="float32", activation="float32")
HF_BFLOAT16 = Numerics(name="hf_bfloat16", activation="bfloat16", rope="activation")
DEEPMIND_BFLOAT16 = Numerics(
    name="deepmind_bfloat16",
    activation="bfloat16",
    norm="activation",
    rope_angle="divide",
    query_scale="query",
    softmax="activation",
    gelu="activation",
)

PRESETS: Mapping[str, Numerics] = MappingProxyType(
    {preset.name: preset for preset in (FLOAT32, HF_BFLOAT16, DEEPMIND_BFLOAT16)}
)


def preset(name: str) -> Numerics:
    """A preset by name.

    Raises:
        ConfigError: there is none of that name; the message lists those there are.
    """
    if name not in PRESETS:
        raise ConfigError(f"numerics must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]
