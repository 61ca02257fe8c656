"""What the device holds between two programs: one row for each slot, donated from call to call.

A slot is a place for one choice of one request. Programs name slots by number; nothing about a
request depends on which number it got.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float32, Int32
from refimpl_kernels.sampling import SamplingRows

from refimpl.engine.memory import release_zeros
from refimpl.engine.packing import MAX_STOP_IDS
from refimpl.model.cache import KVCache


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """Everything that changes while requests run.

    Attributes:
        cache: keys and values of every slot.
        token: the last token of each slot, which no layer has seen yet.
        position: of that token.
        last_position: the position of the last token that the slot may generate.
        first_stop: from this position on an id that ends the text may be drawn.
        stop_ids: ids that end the slot's text; -1 where there are fewer.
        wants_top: whether the likeliest ids are asked for.
        is_running: false once a stop id, the last position or a fault has been met.
        sampling: how each slot is sampled.
        counts: how often the slot has sampled each id.
        in_prompt: whether an id occurs in the slot's prompt; kept for repetition penalties only.
        bias: added to the logits; read only where `sampling.is_biased`.
        logits: of a step's rows, on their way from one program to the next; no rows where one
            program computes the whole step.
    """

    cache: KVCache
    token: Int32[Array, " s"]
    position: Int32[Array, " s"]
    last_position: Int32[Array, " s"]
    first_stop: Int32[Array, " s"]
    stop_ids: Int32[Array, "s e"]
    wants_top: Bool[Array, " s"]
    is_running: Bool[Array, " s"]
    sampling: SamplingRows
    counts: Int32[Array, "s v"]
    in_prompt: Bool[Array, "s v"]
    bias: Float32[Array, "s v"]
    logits: Float32[Array, "r v"]

    @classmethod
    def create(cls, cache: KVCache, *, slots: int, num_logits: int, rows: int = 0) -> "DecodeState":
        """A state in which no slot runs.

        Args:
            rows: of logits that it holds between two programs.
        """

        # An array of its own for each field: one that is donated twice is an error.
        def zeros(dtype: DTypeLike = jnp.int32) -> Array:
            return jnp.zeros(slots, dtype)

        floats = {
            name: zeros(jnp.float32)
            for name in ("temperature", "top_p", "min_p", "frequency", "presence")
        }
        return cls(
            cache=cache,
            token=zeros(),
            position=zeros(),
            last_position=zeros(),
            first_stop=zeros(),
            stop_ids=jnp.full((slots, MAX_STOP_IDS), -1, jnp.int32),
            wants_top=zeros(bool),
            is_running=zeros(bool),
            sampling=SamplingRows(
                **floats,
                top_k=zeros(),
                repetition=jnp.ones(slots, jnp.float32),
                seed=jnp.zeros((slots, 2), jnp.uint32),
                choice=zeros(),
                is_biased=zeros(bool),
            ),
            counts=jnp.zeros((slots, num_logits), jnp.int32),
            in_prompt=jnp.zeros((slots, num_logits), bool),
            bias=jnp.zeros((slots, num_logits), jnp.float32),
            logits=jnp.zeros((rows, num_logits), jnp.float32),
        )

    def release_empty_cache(self) -> "DecodeState":
        """Give back the memory of a cache that holds zeros alone; gives the same state."""
        cache = jax.block_until_ready(self).cache
        for held in (*cache.keys, *cache.values):
            release_zeros(held)
        return self

    def with_cache(self, cache: KVCache) -> "DecodeState":
        """The state with this cache, which is about all rows again."""
        latest = jnp.zeros((self.token.shape[0], 0), jnp.int32)
        return replace(self, cache=replace(cache, rows=None, latest=latest))
