"""What attention reads besides its own queries: a cache of earlier positions, or nothing.

Local layers keep a ring, global layers the full length. Position p lies at index p % length of its
layer's arrays, and an array of positions says what each index holds (-1: nothing), so a mask never
has to guess. A ring of window + chunk places is enough for a local layer: a chunk is written first
and attended after, and its first query still finds the whole window before it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from refimpl.errors import InvalidRequestError
from refimpl.model.config import GemmaConfig
from refimpl.model.layer_spec import AttentionKind

# Positions in one block of the blocked attention; every length is a multiple of it.
BLOCK = 128


@dataclass(frozen=True)
class FullPass:
    """No memory: a call attends to its own positions and to nothing else.

    Attributes:
        positions: of the call's tokens.
        layers: keys and values of the layers so far, for those that have none of their own.
    """

    positions: Int[Array, "b t"]
    layers: Mapping[int, tuple[Array, Array]] = field(default_factory=dict[int, Any])

    @property
    def rows(self) -> None:
        """Queries attend to their own row."""
        return None

    def extend(
        self, layer: int, key: Float[Array, "b t k h"], value: Float[Array, "b t k h"]
    ) -> tuple[Float[Array, "b t k h"], Float[Array, "b t k h"], "FullPass"]:
        """A layer's own keys and values, which are all that it may attend to."""
        return key, value, replace(self, layers={**self.layers, layer: (key, value)})

    def held(self, layer: int) -> tuple[Float[Array, "b t k h"], Float[Array, "b t k h"]]:
        """What an earlier layer extended the memory by."""
        return self.layers[layer]

    def key_positions(self, kind: AttentionKind) -> Int[Array, "b t"]:
        """The positions of what `extend` gives to layers of this kind."""
        return self.positions


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """The state of a decode: passed in, returned, and donated by the programs that carry it.

    K and V are separate arrays for each layer: one stacked array would be copied whole wherever a
    layer writes its part.

    Attributes:
        keys: for each layer that has keys of its own, "b s k h"; s is the length of its kind.
        values: as keys.
        positions: for each kind of layer, which position each index holds, or -1.
        latest: the positions of the call under way, "t" for each row of the call.
        rows: the rows that the call under way is about, or None for all in order.
        owners: the layers that have keys of their own, in order.
        chunk: most positions that one call may write.
        length: positions that a row can hold in all.
        block: every array's s is a multiple of it.
    """

    keys: tuple[Float[Array, "b _ _ _"], ...]
    values: tuple[Float[Array, "b _ _ _"], ...]
    positions: dict[AttentionKind, Int[Array, "b _"]]
    latest: Int[Array, "_ t"]
    rows: Int[Array, " _"] | None
    owners: tuple[int, ...] = field(metadata={"static": True})
    chunk: int = field(metadata={"static": True})
    length: int = field(metadata={"static": True})
    block: int = field(metadata={"static": True}, default=BLOCK)

    @classmethod
    def create(
        cls,
        config: GemmaConfig,
        *,
        batch: int,
        length: int,
        chunk: int,
        dtype: DTypeLike = jnp.float32,
        block: int = BLOCK,
        ring: bool = True,
    ) -> "KVCache":
        """An empty cache.

        Args:
            batch: rows.
            length: positions that a row can hold in all.
            chunk: most positions that one call may write.
            dtype: of keys and values, the activation type.
            block: positions in a block of the blocked attention.
            ring: give local layers a ring; False gives every layer the full length.
        """
        lengths = {kind: _round_up(length, block) for kind in AttentionKind}
        if ring and config.window is not None:
            local = _round_up(config.window + chunk, block)
            lengths[AttentionKind.LOCAL] = min(local, lengths[AttentionKind.GLOBAL])
        owners = tuple(i for i, layer in enumerate(config.layers) if layer.donor is None)
        shapes = [
            (batch, lengths[layer.kind], layer.num_kv_heads, layer.head_width)
            for layer in map(config.layers.__getitem__, owners)
        ]
        return cls(
            keys=tuple(jnp.zeros(shape, dtype) for shape in shapes),
            values=tuple(jnp.zeros(shape, dtype) for shape in shapes),
            positions={
                kind: jnp.full((batch, lengths[kind]), -1, jnp.int32)
                for kind in dict.fromkeys(config.layer_kinds)
            },
            latest=jnp.zeros((batch, 0), jnp.int32),
            rows=None,
            owners=owners,
            chunk=chunk,
            length=length,
            block=block,
        )

    def of_rows(self, rows: Int[Array, " b"] | None) -> "KVCache":
        """The same cache, of which the next call is about these rows; None for all in order.

        A row may be named twice only with positions that write nothing.
        """
        return replace(self, rows=rows)

    def begin(self, positions: Int[Array, "b t"]) -> "KVCache":
        """Write down where this call's positions will lie; negative ones (padding) lie nowhere.

        The positions are those of the rows that `of_rows` names, or of all rows.

        Raises:
            InvalidRequestError: more positions than the chunk the rings were made for.
        """
        if positions.shape[1] > self.chunk:
            raise InvalidRequestError(
                f"this cache takes at most {self.chunk} positions in one call, got "
                f"{positions.shape[1]}; split the call or create the cache with a larger chunk"
            )
        noted = {
            kind: _write(held, positions, positions, self.rows)
            for kind, held in self.positions.items()
        }
        return replace(self, positions=noted, latest=positions)

    def extend(
        self, layer: int, key: Float[Array, "b t k h"], value: Float[Array, "b t k h"]
    ) -> tuple[Float[Array, "c s k h"], Float[Array, "c s k h"], "KVCache"]:
        """Add a layer's keys and values; gives all that the layer holds, of every row."""
        place = self.owners.index(layer)
        keys = _write(self.keys[place], key, self.latest, self.rows)
        values = _write(self.values[place], value, self.latest, self.rows)
        extended = replace(
            self,
            keys=(*self.keys[:place], keys, *self.keys[place + 1 :]),
            values=(*self.values[:place], values, *self.values[place + 1 :]),
        )
        return keys, values, extended

    def held(self, layer: int) -> tuple[Float[Array, "c s k h"], Float[Array, "c s k h"]]:
        """All that a layer with keys of its own holds, of every row, this call's included."""
        place = self.owners.index(layer)
        return self.keys[place], self.values[place]

    def key_positions(self, kind: AttentionKind) -> Int[Array, "c s"]:
        """The positions of what `extend` gives to layers of this kind."""
        return self.positions[kind]


Memory = FullPass | KVCache


def _round_up(length: int, block: int) -> int:
    return -(-length // block) * block


def _write(
    held: Array, new: Array, positions: Int[Array, "b t"], rows: Int[Array, " b"] | None
) -> Array:
    """`new` at index position % s of each row; what has a negative position is dropped."""
    if rows is None:
        rows = jnp.arange(held.shape[0], dtype=positions.dtype)
    # An index of s is out of bounds, and mode "drop" writes nothing there.
    index = jnp.where(positions >= 0, positions % held.shape[1], held.shape[1])
    return held.at[rows[:, None], index].set(new, mode="drop")
