"""The parts of a decoder layer that look at one position at a time."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float, Int
from refimpl_kernels.attention import soft_cap
from refimpl_kernels.gelu import gelu
from refimpl_kernels.linear import LinearImplementation, linear
from refimpl_kernels.matrix import take_columns
from refimpl_kernels.norm import rms_norm
from refimpl_kernels.sparse_gate import sparse_gate

from refimpl.model.config import GemmaConfig
from refimpl.model.layer_spec import LayerSpec
from refimpl.model.numerics import Numerics, Rounding
from refimpl.model.trace import Taps


class Linear(nnx.Module):
    """A linear map without bias. Holds a dense array, or a quantized matrix as the file stores it.

    The initial values only serve a model that is built without a checkpoint.
    """

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs) -> None:
        self.weight = nnx.Param(_initial(rngs.params(), inputs, outputs))

    def __call__(
        self, x: Float[Array, "b t i"], *, implementation: LinearImplementation
    ) -> Float[Array, "b t o"]:
        return linear(x, self.weight.get_value(), implementation=implementation)


@partial(jax.jit, static_argnums=(1, 2))
def _initial(key: Array, inputs: int, outputs: int) -> Float[Array, "i o"]:
    """Random weights. Traced once for each shape: a checkpoint asks for the shapes of all."""
    return jax.random.normal(key, (inputs, outputs), jnp.float32) * inputs**-0.5


class RMSNorm(nnx.Module):
    """Root mean square norm over the last axis, with a scale that is stored less `norm_offset`.

    A norm without a width has no scale.
    """

    def __init__(self, width: int | None, config: GemmaConfig, numerics: Numerics) -> None:
        neutral = 1.0 - config.norm_offset
        self.scale = None if width is None else nnx.Param(jnp.full((width,), neutral, jnp.float32))
        self.offset = config.norm_offset
        self.epsilon = config.norm_epsilon
        self.rounding: Rounding = numerics.norm

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        return rms_norm(
            x,
            None if self.scale is None else self.scale.get_value(),
            epsilon=self.epsilon,
            offset=self.offset,
            rounding=self.rounding,
        )


class Scalar(nnx.Module):
    """A learned number that the whole stream is multiplied by."""

    def __init__(self) -> None:
        self.factor = nnx.Param(jnp.ones((1,), jnp.float32))

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        return x * self.factor.get_value()[0].astype(x.dtype)


def normalised(x: Float[Array, "*b d"], norm: RMSNorm | None) -> Float[Array, "*b d"]:
    """norm(x), or x where the model has no such norm."""
    return x if norm is None else norm(x)


def add(x: Float[Array, "*b d"], y: Float[Array, "*#b d"]) -> Float[Array, "*b d"]:
    """x + y, of an x and a y that were rounded first.

    Most of what is added ends with a product. Without the barrier the compiler may round it once
    together with the sum, and whether it does depends on the shapes: a request alone would have
    other bits.
    """
    x, y = jax.lax.optimization_barrier((x, y))
    return x + y


class Embedder(nnx.Module):
    """Token ids to the residual stream, and the stream to logits.

    The table is stored "d v": as it stands it is the tied head, by column it is the embedding.
    """

    def __init__(self, config: GemmaConfig, numerics: Numerics, *, rngs: nnx.Rngs) -> None:
        self.table = Linear(config.width, config.vocab_size, rngs=rngs)
        self.head = (
            None if config.has_tied_head else Linear(config.width, config.vocab_size, rngs=rngs)
        )
        # float32 first, then the activation type, as the references round it: 55.4256 or 55.5.
        self.scale = float(np.float32(config.width**0.5).astype(numerics.dtype))
        self.dtype = numerics.dtype
        self.cap = config.final_cap

    def encode(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """Embedding times sqrt(d), rounded to the activation type."""
        embedded = take_columns(self.table.weight.get_value(), tokens).astype(self.dtype)
        return embedded * self.scale

    def decode(
        self, x: Float[Array, "b t d"], *, implementation: LinearImplementation
    ) -> Float[Array, "b t v"]:
        """Logits, soft-capped where the model caps them, in the activation type."""
        head = self.table if self.head is None else self.head
        return soft_cap(head(x, implementation=implementation), self.cap)


class FeedForward(nnx.Module):
    """(gelu(x G) * x U) D: a gated hidden layer, gate and up projection in one matrix.

    Where the layer has a cutoff, only the gates that stand out are kept.
    """

    def __init__(
        self, config: GemmaConfig, spec: LayerSpec, numerics: Numerics, *, rngs: nnx.Rngs
    ) -> None:
        width = spec.feed_forward_width
        self.gate_up = Linear(config.width, 2 * width, rngs=rngs)
        self.down = Linear(width, config.width, rngs=rngs)
        self.cutoff = spec.gate_cutoff
        self.rounding: Rounding = numerics.gelu

    def __call__(
        self, x: Float[Array, "b t d"], *, implementation: LinearImplementation, taps: Taps
    ) -> Float[Array, "b t d"]:
        gate, up = jnp.split(self.gate_up(x, implementation=implementation), 2, axis=-1)
        taps("gate", gate)
        taps("up", up)
        if self.cutoff is not None:
            gate = sparse_gate(gate, cutoff=self.cutoff)
        return self.down(gelu(gate, rounding=self.rounding) * up, implementation=implementation)
