"""The model's pass over a cache in parts: into the stream, layer after layer, and out of it.

A part can be a program of its own, or all parts can be one program. Between two parts of one
program stands a barrier, so that what a layer is given has the same bits in both forms.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
from jax import Array
from jaxtyping import Float, Float32, Int32

from refimpl.model.cache import KVCache
from refimpl.model.gemma import Gemma
from refimpl.model.implementations import Implementations, implementations_for
from refimpl.model.layer_spec import AttentionKind
from refimpl.model.trace import Taps

Parameters = Mapping[str, Any]
Stream = Float[Array, "*u b t d"]
# Keys and values of a layer, of every slot.
Held = tuple[Float[Array, "c s k h"], Float[Array, "c s k h"]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Entered:
    """What there is before the first layer.

    Attributes:
        x: the stream, or all streams.
        given: for each layer, its inputs beside the stream; None where the model has none.
        angles: rotary angles of the positions, for each kind of layer.
        positions: of the call's tokens; negative ones are padding.
        rows: the slots that the call is about.
    """

    x: Stream
    given: tuple[Float[Array, "b t p"] | None, ...]
    angles: dict[AttentionKind, Float32[Array, "b t r"]]
    positions: Int32[Array, "b t"]
    rows: Int32[Array, " b"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCall:
    """What one layer is called with, besides its parameters and what it holds.

    Attributes:
        x, given, angles, rows, positions: as in `Entered`, for this layer.
        key_positions: which position each index of what it holds has.
    """

    x: Stream
    given: Float[Array, "b t p"] | None
    angles: Float32[Array, "b t r"]
    key_positions: Int32[Array, "c s"]
    rows: Int32[Array, " b"]
    positions: Int32[Array, "b t"]


RunLayer = Callable[[Held, LayerCall], tuple[Held | None, Stream]]


@dataclass(frozen=True)
class Forward:
    """The parts, for prefill or for decode.

    Attributes:
        gemma: the model.
        phase: which of its implementations are taken.
    """

    gemma: Gemma
    phase: Literal["prefill", "decode"]

    def enter(
        self,
        parameters: Parameters,
        cache: KVCache,
        tokens: Int32[Array, "b t"],
        positions: Int32[Array, "b t"],
        rows: Int32[Array, " b"],
    ) -> tuple[KVCache, Entered]:
        """The cache with these positions noted, and what there is before the first layer."""
        module = self.gemma.module(parameters)
        x, given = module.enter(tokens, implementations=self.implementations)
        angles = module.angles(positions)
        cache = cache.of_rows(rows).begin(positions)
        return cache, Entered(x, tuple(given), angles, positions, rows)

    def layer(
        self, index: int, parameters: Parameters, held: Held, call: LayerCall
    ) -> tuple[Held | None, Stream]:
        """One layer.

        Args:
            index: of the layer, or of another one of the same specification.
            parameters: the layer's own.
            held: what the layer holds, or its donor.
            call: see `LayerCall`.

        Returns:
            What the layer holds with this call's keys and values, None where a donor holds it; and
            the stream.
        """
        spec = self.gemma.config.layers[index]
        block = self.gemma.module({"layers": {index: parameters}}).layers[index]
        memory = KVCache(
            keys=held[:1],
            values=held[1:],
            positions={spec.kind: call.key_positions},
            latest=call.positions,
            rows=call.rows,
            owners=(index if spec.donor is None else spec.donor,),
            chunk=call.positions.shape[1],
            length=held[0].shape[1],
        )
        x, memory = block(
            call.x,
            call.positions,
            {spec.kind: call.angles},
            memory,
            given=call.given,
            implementations=self.implementations,
            taps=Taps(),
        )
        assert isinstance(memory, KVCache)  # A cache went in.
        return (memory.keys[0], memory.values[0]) if spec.donor is None else None, x

    def leave(self, parameters: Parameters, x: Stream) -> Float[Array, "b t d"]:
        """The stream after the final norm."""
        return self.gemma.module(parameters).leave(x, implementations=self.implementations)

    def through_layers(
        self, layers: Sequence[RunLayer], cache: KVCache, entered: Entered
    ) -> tuple[KVCache, Stream]:
        """The cache and the stream after all layers, each of which is computed as `layer` does."""
        keys, values, x = list(cache.keys), list(cache.values), entered.x
        for index, (run, spec) in enumerate(zip(layers, self.gemma.config.layers, strict=True)):
            place = cache.owners.index(index if spec.donor is None else spec.donor)
            call = LayerCall(
                x=x,
                given=entered.given[index],
                angles=entered.angles[spec.kind],
                key_positions=cache.positions[spec.kind],
                rows=entered.rows,
                positions=entered.positions,
            )
            held, x = run((keys[place], values[place]), call)
            if held is not None:
                keys[place], values[place] = held
        return replace(cache, keys=tuple(keys), values=tuple(values)), x

    def within_one_program(self, parameters: Mapping[int, Parameters]) -> list[RunLayer]:
        """All layers for `through_layers`, where one program computes them all."""

        def run(index: int, held: Held, call: LayerCall) -> tuple[Held | None, Stream]:
            with jax.named_scope(f"layer_{index}"):
                held, call = jax.lax.optimization_barrier((held, call))
                result = self.layer(index, parameters[index], held, call)
                return jax.lax.optimization_barrier(result)

        return [partial(run, index) for index in range(self.gemma.config.num_layers)]

    @property
    def implementations(self) -> Implementations:
        """Which fast paths the parts take."""
        return implementations_for(self.gemma.numerics, phase=self.phase)
