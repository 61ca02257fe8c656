"""The learned residual beside attention ("LAuReL", arXiv 2411.07501) of Gemma 3n."""

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float
from refimpl_kernels.linear import LinearImplementation

from refimpl.model.config import GemmaConfig
from refimpl.model.layers import Linear, RMSNorm, add
from refimpl.model.numerics import Numerics


class Laurel(nnx.Module):
    """(x + y + rms(y L R)) / sqrt(2), of the stream x after attention and its normalised self y
    before, with a narrow L and R.
    """

    def __init__(
        self, config: GemmaConfig, rank: int, numerics: Numerics, *, rngs: nnx.Rngs
    ) -> None:
        self.left = Linear(config.width, rank, rngs=rngs)
        self.right = Linear(rank, config.width, rngs=rngs)
        self.norm = RMSNorm(config.width, config, numerics)

    def __call__(
        self,
        y: Float[Array, "b t d"],
        x: Float[Array, "b t d"],
        *,
        implementation: LinearImplementation,
    ) -> Float[Array, "b t d"]:
        narrow = self.left(y, implementation=implementation)
        beside = add(y, self.norm(self.right(narrow, implementation=implementation)))
        # In float32: PyTorch does not round a Python number to the type of what it divides.
        return (add(x, beside).astype(jnp.float32) / 2**0.5).astype(x.dtype)
