"""The residual stream around a layer: one stream, or several with alternating updates.

Most Gemmas have one stream "b t d", and a layer adds to it. Gemma 3n has several, "u b t d", of
which its layers compute the active one; the others are predicted before a layer and corrected after
it (AltUp, arXiv 2301.13310). Blocks and the transformer speak to both through the same methods.
"""

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float
from refimpl_kernels.linear import LinearImplementation, linear
from refimpl_kernels.matrix import slice_columns
from refimpl_kernels.norm import with_magnitude_of
from refimpl_kernels.tanh import tanh

from refimpl.model.config import GemmaConfig
from refimpl.model.layer_spec import AltUpSpec
from refimpl.model.layers import Linear, RMSNorm, add
from refimpl.model.numerics import Numerics

Stream = Float[Array, "b t d"]
Streams = Float[Array, "*u b t d"]

# Least mean square that a projected stream is divided by the root of (Hugging Face).
_LEAST = 1e-5


class OneStream(nnx.Module):
    """One stream, which is what every layer computes."""

    def predict(self, x: Stream, *, implementation: LinearImplementation) -> tuple[Stream, Stream]:
        del implementation
        return x, x

    def correct(
        self, predicted: Stream, computed: Stream, *, implementation: LinearImplementation
    ) -> Stream:
        del predicted, implementation
        return computed

    def shown(self, x: Stream) -> Stream:
        return x

    def with_input(self, x: Stream, y: Stream) -> Stream:
        return add(x, y)

    def enter(self, x: Stream, *, implementation: LinearImplementation) -> Stream:
        """The streams before the first layer, from the scaled embedding."""
        del implementation
        return x

    def leave(self, x: Stream, *, implementation: LinearImplementation) -> Stream:
        """What the final norm sees, from the streams after the last layer."""
        del implementation
        return x


class AltUp(nnx.Module):
    """Prediction and correction of all streams around one layer, with u^2 and u coefficients.

    The coefficients come from the active stream: m = tanh(rms(x) / d @ R), then

        predicted_i = x_i + sum_j (m P)[j, i] x_j
        corrected_i = predicted_i + (computed - predicted_active) (1 + (m C)_i)

    where P is stored as its transpose, [i, j] (Hugging Face modeling_gemma3n.py).
    """

    def __init__(
        self, config: GemmaConfig, spec: AltUpSpec, numerics: Numerics, *, rngs: nnx.Rngs
    ) -> None:
        self.num_streams, self.active = spec.streams, spec.active
        self.router_norm = RMSNorm(config.width, config, numerics)
        self.router = Linear(config.width, spec.streams, rngs=rngs)
        self.prediction = Linear(spec.streams, spec.streams**2, rngs=rngs)
        self.correction = Linear(spec.streams, spec.streams, rngs=rngs)
        self.output_scale = nnx.Param(jnp.ones((config.width,), jnp.float32))

    def predict(
        self, x: Streams, *, implementation: LinearImplementation
    ) -> tuple[Streams, Stream]:
        """All streams as the layer leaves them unless corrected, and the active one of them."""
        routed = self._routed(x[self.active], implementation)
        coefficients = self.prediction(routed, implementation=implementation).astype(jnp.float32)
        # "b t i j" for the i-th stream predicted from the j-th.
        coefficients = coefficients.reshape(*routed.shape[:-1], self.num_streams, self.num_streams)
        wide = x.astype(jnp.float32)
        total = jnp.zeros_like(wide)
        for j in range(self.num_streams):
            factor = jnp.moveaxis(coefficients[..., j], -1, 0)[..., None]
            total = add(total, wide[j][None] * factor)
        predicted = add(x, total.astype(x.dtype))
        return predicted, predicted[self.active]

    def correct(
        self, predicted: Streams, computed: Stream, *, implementation: LinearImplementation
    ) -> Streams:
        """All streams, moved by what the layer computed beyond the prediction."""
        routed = self._routed(computed, implementation)
        coefficients = self.correction(routed, implementation=implementation) + 1
        factor = jnp.moveaxis(coefficients, -1, 0)[..., None]
        innovation = computed - predicted[self.active]
        return add(predicted, innovation[None] * factor)

    def shown(self, x: Streams) -> Stream:
        """The active stream, scaled."""
        return x[self.active] * self.output_scale.get_value().astype(x.dtype)[None, None]

    def with_input(self, x: Streams, y: Stream) -> Streams:
        """To every stream but the first."""
        return jnp.concatenate([x[:1], add(x[1:], y[None])])

    def _routed(self, x: Stream, implementation: LinearImplementation) -> Float[Array, "b t u"]:
        scaled = self.router_norm(x) * jnp.asarray(1 / x.shape[-1], x.dtype)
        routed = self.router(scaled, implementation=implementation)
        return tanh(routed.astype(jnp.float32)).astype(x.dtype)


class StreamProjections(nnx.Module):
    """From the embedding to all streams, and from all streams to one.

    Each further stream is a projection of the first, scaled to the first one's magnitude; at the
    end each is projected back, scaled to the first one's magnitude, and their mean is taken. The
    projections lie side by side, as columns of one matrix [d, (u-1) d].
    """

    def __init__(self, config: GemmaConfig, spec: AltUpSpec, *, rngs: nnx.Rngs) -> None:
        self.num_further = spec.streams - 1
        outputs = self.num_further * config.width
        self.into = Linear(config.width, outputs, rngs=rngs)
        self.back = Linear(config.width, outputs, rngs=rngs)

    def enter(self, x: Stream, *, implementation: LinearImplementation) -> Streams:
        """The streams before the first layer, from the scaled embedding."""
        projected = self.into(x, implementation=implementation)
        further = jnp.split(projected, self.num_further, axis=-1)
        return jnp.stack([x, *[with_magnitude_of(y, x, least=_LEAST) for y in further]])

    def leave(self, x: Streams, *, implementation: LinearImplementation) -> Stream:
        """What the final norm sees, from the streams after the last layer."""
        width, total = x.shape[-1], x[0].astype(jnp.float32)
        for index in range(self.num_further):
            matrix = slice_columns(self.back.weight.get_value(), index * width, width)
            y = linear(x[index + 1], matrix, implementation=implementation)
            total = add(total, with_magnitude_of(y, x[0], least=_LEAST).astype(jnp.float32))
        return (total / (self.num_further + 1)).astype(x.dtype)
