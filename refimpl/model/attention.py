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
from refimpl_kernels.attention_rows import row_attention
from refimpl_kernels.rope import apply_rope

from refimpl.model.cache import KVCache, Memory
from refimpl.model.config import GemmaConfig
from refimpl.model.implementations import Implementations
from refimpl.model.layers import Linear, RMSNorm, normalised
from refimpl.model.numerics import Numerics
from refimpl.model.trace import Taps


class Attention(nnx.Module):
    """Query head j reads key/value head j * k // n.

    Queries, keys and values come from one matrix, as far as the layer has them: one may take its
    raw keys for values, and one with a donor has only queries.
    """

    def __init__(
        self, config: GemmaConfig, layer: int, numerics: Numerics, *, rngs: nnx.Rngs
    ) -> None:
        self.layer = layer
        self.spec = config.layers[layer]
        self.num_heads = config.num_heads
        self.scale = config.query_scale
        self.cap = config.attention_cap
        self.numerics = numerics

        head_width, owns = self.spec.head_width, self.spec.donor is None
        parts = (1 if self.spec.values_are_keys else 2) if owns else 0
        all_heads = config.num_heads + parts * self.spec.num_kv_heads
        self.query_key_value = Linear(config.width, all_heads * head_width, rngs=rngs)
        self.output = Linear(config.num_heads * head_width, config.width, rngs=rngs)

        def norm(width: int | None, is_there: bool) -> RMSNorm | None:
            return RMSNorm(width, config, numerics) if is_there else None

        self.query_norm = norm(head_width, config.has_query_key_norm)
        self.key_norm = norm(head_width, config.has_query_key_norm and owns)
        self.value_norm = norm(None, config.has_value_norm and owns)

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
            NotImplementedError: attention over blocks was asked for scores, or for bfloat16.
        """
        heads = self.query_key_value(x, implementation=implementations.linear)
        heads = heads.reshape(*x.shape[:2], -1, self.spec.head_width)
        # The norm comes before the rotation, which keeps a head's length but mixes its entries.
        query = self._rotated(normalised(heads[:, :, : self.num_heads], self.query_norm), angles)
        taps("query", query)

        if self.spec.donor is None:
            key, value = self._key_value(heads[:, :, self.num_heads :], angles)
            taps("key", key)
            taps("value", value)
            keys, values, memory = memory.extend(self.layer, key, value)
        else:
            keys, values = memory.held(self.spec.donor)
        mixed = self._attend(query, keys, values, positions, memory, implementations, taps)
        taps("mixed", mixed)

        flat = mixed.reshape(*mixed.shape[:2], -1)
        return self.output(flat, implementation=implementations.linear), memory

    def _key_value(self, heads: Array, angles: Array) -> tuple[Array, Array]:
        """Keys and values of the layer's own, from what the projection gives for both."""
        key = heads[:, :, : self.spec.num_kv_heads]
        value = key if self.spec.values_are_keys else heads[:, :, self.spec.num_kv_heads :]
        key = self._rotated(normalised(key, self.key_norm), angles)
        return key, normalised(value, self.value_norm)

    def _rotated(self, x: Array, angles: Array) -> Array:
        return apply_rope(x, angles, rounding=self.numerics.rope)

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
        if implementations.attention != "dense":
            if taps.wants("scores") or not isinstance(memory, KVCache):
                raise NotImplementedError(
                    "blocked attention needs a cache and never holds all scores at once; "
                    "use implementations with attention='dense'"
                )
            by_rows = implementations.attention == "rows" and query.shape[1] == 1
            attend = row_attention if by_rows else blocked_attention
            return attend(
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
