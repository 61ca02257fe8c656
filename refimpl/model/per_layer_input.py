"""Per-layer inputs of Gemma 3n and of Gemma 4's small sizes: an embedding of each token for each
layer, mixed with a projection of the stream, and let into the layer through a gate.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float, Int
from refimpl_kernels.gelu import gelu
from refimpl_kernels.linear import LinearImplementation
from refimpl_kernels.matrix import take_columns

from refimpl.model.config import GemmaConfig
from refimpl.model.layer_spec import PerLayerInputSpec
from refimpl.model.layers import Linear, RMSNorm
from refimpl.model.numerics import Numerics, Rounding


class PerLayerEmbedder(nnx.Module):
    """What every layer gets, all at once: (rms(x W / sqrt(d)) + E[token] sqrt(p)) / sqrt(2).

    The table is stored "l p, v" and the projection "d, l p", packed layer by layer.
    """

    def __init__(
        self, config: GemmaConfig, spec: PerLayerInputSpec, numerics: Numerics, *, rngs: nnx.Rngs
    ) -> None:
        packed = config.num_layers * spec.width
        self.table = Linear(packed, spec.vocab_size, rngs=rngs)
        self.projection = Linear(config.width, packed, rngs=rngs)
        self.norm = RMSNorm(spec.width, config, numerics)
        self.width, self.vocab_size = spec.width, spec.vocab_size
        # Gemma 3n holds the two scales in the activation type, Gemma 4 in float32.
        rounded = numerics.dtype if spec.has_rounded_scales else np.float32
        self.projection_scale = float(np.float32(config.width**-0.5).astype(rounded))
        self.mean_scale = float(np.float32(0.5**0.5).astype(rounded))
        self.table_scale = float(np.float32(spec.width**0.5).astype(numerics.dtype))
        self.dtype = numerics.dtype

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        x: Float[Array, "b t d"],
        *,
        implementation: LinearImplementation,
    ) -> Float[Array, "b t l p"]:
        """Inputs of all layers, from the ids and the scaled embedding."""
        # An id that the table does not know, such as a padding row of the vocabulary.
        known = jnp.where((tokens >= 0) & (tokens < self.vocab_size), tokens, 0)
        embedded = take_columns(self.table.weight.get_value(), known).astype(self.dtype)
        embedded = self._by_layer(embedded * self.table_scale)
        projected = _scaled(
            self.projection(x, implementation=implementation), self.projection_scale
        )
        projected = self.norm(self._by_layer(projected))
        # Behind a barrier, or the compiler might round a product once together with the sum.
        projected, embedded = jax.lax.optimization_barrier((projected, embedded))
        return _scaled(projected + embedded, self.mean_scale)

    def _by_layer(self, packed: Float[Array, "b t q"]) -> Float[Array, "b t l p"]:
        return packed.reshape(*packed.shape[:-1], -1, self.width)


class PerLayerInput(nnx.Module):
    """What a layer makes of its input: rms((gelu(x G) * input) O)."""

    def __init__(
        self, config: GemmaConfig, spec: PerLayerInputSpec, numerics: Numerics, *, rngs: nnx.Rngs
    ) -> None:
        self.gate = Linear(config.width, spec.width, rngs=rngs)
        self.output = Linear(spec.width, config.width, rngs=rngs)
        self.norm = RMSNorm(config.width, config, numerics)
        self.rounding: Rounding = numerics.gelu

    def __call__(
        self,
        x: Float[Array, "b t d"],
        given: Float[Array, "b t p"],
        *,
        implementation: LinearImplementation,
    ) -> Float[Array, "b t d"]:
        gate = gelu(self.gate(x, implementation=implementation), rounding=self.rounding)
        return self.norm(self.output(gate * given, implementation=implementation))


def _scaled(x: Array, scale: float) -> Array:
    """x * scale, rounded once to the type of x, whatever the type the scale would have there."""
    return (x.astype(jnp.float32) * scale).astype(x.dtype)
