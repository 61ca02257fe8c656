"""The mixture of experts beside the dense feed-forward of Gemma 4 26B-A4B."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float
from refimpl_kernels.experts import mix_experts, route
from refimpl_kernels.linear import LinearImplementation

from refimpl.model.config import GemmaConfig
from refimpl.model.layer_spec import ExpertsSpec
from refimpl.model.layers import Linear, RMSNorm, add
from refimpl.model.numerics import Numerics, Rounding
from refimpl.model.trace import Taps


class Experts(nnx.Module):
    """rms(dense) + rms(sum_e weight_e Expert_e(rms(x))), the router looking at x itself.

    The router sees x without any learned norm: rms(x) * scale / sqrt(d). An expert counts as much
    as its share among the chosen, times a learned number of its own.
    """

    def __init__(
        self, config: GemmaConfig, spec: ExpertsSpec, numerics: Numerics, *, rngs: nnx.Rngs
    ) -> None:
        self.chosen, self.root = spec.chosen, config.width**-0.5
        self.router_norm = RMSNorm(None, config, numerics)
        self.router_scale = nnx.Param(jnp.ones((config.width,), jnp.float32))
        self.router = Linear(config.width, spec.count, rngs=rngs)
        self.expert_scale = nnx.Param(jnp.ones((spec.count,), jnp.float32))
        self.gate_up = Linear(config.width, spec.count * 2 * spec.width, rngs=rngs)
        self.down = Linear(spec.width, spec.count * config.width, rngs=rngs)
        self.norm_before = RMSNorm(config.width, config, numerics)
        self.norm_after = RMSNorm(config.width, config, numerics)
        self.norm_after_dense = RMSNorm(config.width, config, numerics)
        self.rounding: Rounding = numerics.gelu

    def __call__(
        self,
        x: Float[Array, "b t d"],
        dense: Float[Array, "b t d"],
        *,
        implementation: LinearImplementation,
        taps: Taps,
    ) -> Float[Array, "b t d"]:
        """What both branches add, before the norm after the feed-forward.

        Args:
            x: the stream before the feed-forward, not normalised.
            dense: what the dense branch made of it.
        """
        rows = x.reshape(-1, x.shape[-1])
        scores = self._scores(rows, implementation)
        taps("router", scores.reshape(*x.shape[:-1], -1))
        routed = route(scores, chosen=self.chosen)
        scale = self.expert_scale.get_value()[routed.experts].astype(jnp.float32)
        mixed = mix_experts(
            self.norm_before(rows),
            routed._replace(weights=routed.weights * scale),
            self.gate_up.weight.get_value(),
            self.down.weight.get_value(),
            implementation=implementation,
            rounding=self.rounding,
        )
        return add(self.norm_after_dense(dense), self.norm_after(mixed.reshape(x.shape)))

    def _scores(self, rows: Array, implementation: LinearImplementation) -> Float[Array, "r e"]:
        scaled = self.router_norm(rows) * self.router_scale.get_value().astype(rows.dtype)[None]
        scaled = (scaled.astype(jnp.float32) * self.root).astype(rows.dtype)
        # Without the barrier the two factors might be multiplied with each other first.
        scaled = jax.lax.optimization_barrier(scaled)
        return self.router(scaled[None], implementation=implementation)[0]
