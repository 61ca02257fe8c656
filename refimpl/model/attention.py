"""Grouped-query attention of one layer: project, normalise, rotate, attend, project back."""

from flax import nnx
from jax import Array
from jaxtyping import Float, Float32, Int
from refimpl_kernels.attention import (
    attention_scores,
    blocked_attention,
    dense_attention,
    visible,
)
from refimpl_kernels.rope import apply_rope

from refimpl.model.cache import KVCache, Memory
from refimpl.model.config import GemmaConfig
from refimpl.model.implementations import Implementations
from refimpl.model.layers import Linear, RMSNorm
from refimpl.model.numerics import Numerics
from refimpl.model.trace import Taps


class Attention(nnx.Module):
    """Query head j reads key/value head j * k // n; queries, keys and values share one matrix."""

    def __init__(
        self, config: GemmaConfig, layer: int, numerics: Numerics, *, rngs: nnx.Rngs
    ) -> None:
        self.layer = layer
        self.spec = config.layers[layer]
        self.num_heads = config.num_heads
        self.scale = config.query_scale
        self.cap = config.attention_cap
        self.numerics = numerics

        head_width = self.spec.head_width
        all_heads = config.num_heads + 2 * self.spec.num_kv_heads
        self.query_key_value = Linear(config.width, all_heads * head_width, rngs=rngs)
        self.output = Linear(config.num_heads * head_width, config.width, rngs=rngs)
        normed = config.has_query_key_norm
        self.query_norm = RMSNorm(head_width, config, numerics) if normed else None
        self.key_norm = RMSNorm(head_width, config, numerics) if normed else None

    def __call__(
        self,
        x: Float[Array, "b t d"],
        positions: Int[Array, "b t"],
        angles: Float32[Array, "b t r"],
        memory: Memory,
        *,
        implementations: Implementations,
        taps: Taps,
    ) -> tuple[Float[Array, "b t d"], Memory]:
        """Attend from `positions` to what the memory holds, these positions included.

        Args:
            x: the normalised stream.
            positions: of each token; negative ones are padding, which nothing attends to.
            angles: rotary angles of the positions, for this layer's kind.
            memory: a cache, or a full pass.
            implementations: which fast paths to take.
            taps: takes note of intermediates.

        Returns:
            What to add to the stream, and the memory with this layer's keys and values.

        Raises:
            NotImplementedError: blocked attention was asked for scores, or for bfloat16.
        """
        query, key, value = self._project(x, angles, implementations)
        taps("query", query)
        taps("key", key)
        taps("value", value)

        keys, values, memory = memory.extend(self.layer, key, value)
        mixed = self._attend(query, keys, values, positions, memory, implementations, taps)
        taps("mixed", mixed)

        flat = mixed.reshape(*mixed.shape[:2], -1)
        return self.output(flat, implementation=implementations.linear), memory

    def _project(
        self, x: Array, angles: Array, implementations: Implementations
    ) -> tuple[Array, Array, Array]:
        heads = self.query_key_value(x, implementation=implementations.linear)
        heads = heads.reshape(*x.shape[:2], -1, self.spec.head_width)
        query = heads[:, :, : self.num_heads]
        key = heads[:, :, self.num_heads : self.num_heads + self.spec.num_kv_heads]
        value = heads[:, :, self.num_heads + self.spec.num_kv_heads :]
        # The norm comes before the rotation, which keeps a head's length but mixes its entries.
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        rounding = self.numerics.rope
        return (
            apply_rope(query, angles, rounding=rounding),
            apply_rope(key, angles, rounding=rounding),
            value,
        )

    def _attend(
        self,
        query: Array,
        keys: Array,
        values: Array,
        positions: Array,
        memory: Memory,
        implementations: Implementations,
        taps: Taps,
    ) -> Float[Array, "b t n h"]:
        key_positions = memory.key_positions(self.spec.kind)
        if implementations.attention == "blocked":
            if taps.wants("scores") or not isinstance(memory, KVCache):
                raise NotImplementedError(
                    "blocked attention needs a cache and never holds all scores at once; "
                    "use implementations with attention='dense'"
                )
            return blocked_attention(
                query,
                keys,
                values,
                query_positions=positions,
                key_positions=key_positions,
                scale=self.scale,
                window=self.spec.window,
                cap=self.cap,
                block=memory.block,
                rows=memory.rows,
            )
        if memory.rows is not None:
            keys, values = keys[memory.rows], values[memory.rows]
            key_positions = key_positions[memory.rows]
        scores = attention_scores(
            query, keys, scale=self.scale, cap=self.cap, scale_site=self.numerics.query_scale
        )
        taps("scores", scores)
        mask = visible(positions, key_positions, window=self.spec.window)
        return dense_attention(scores, values, mask, softmax=self.numerics.softmax)
